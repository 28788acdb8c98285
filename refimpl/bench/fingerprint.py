"""Everything that determines a cell's figures, and the key made of it: two cells of one key are the same cell.

Code counts by what it does: comments, docstrings and layout may change. It is the method's module and the arena's, with every
module of this project that they import, however deep; of `refimpl.testbed`, as soon as one of its modules is imported, the
whole folder, its checkpoint included; and the weights that stand beside the method's module. A plugin's own package is followed in the same way.
"""

import ast
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import torch

from refimpl.bench.cells import Cell, open_arena

FORM = 1  # counts up when the runner itself gives a cell another meaning
TESTBED = "refimpl.testbed"
MODEL_FILES = ("*.json", "*.jsonl", "*.safetensors", "*.txt")
TEXT_FILES = ("*.json", "*.jsonl", "*.txt")

FileDigest = Callable[[Path], str]


def determinants(cells: Iterable[Cell], file_digest: FileDigest) -> list[dict[str, Any]]:
    """What each cell's figures depend on, as JSON; `file_digest` gives the digest of a large file.

    What cells share, their code and files, is looked at once: a full arena has thousands of cells of a few methods.
    """

    @cache
    def of_code(*modules: str) -> dict[str, Any]:
        testbed = any(map(_of_testbed, sources(modules)))
        return {
            "code": code_digest(modules),
            "testbed": testbed_digest(file_digest) if testbed else None,
            **({"weights": weights} if (weights := weights_digest(modules, file_digest)) else {}),
        }

    @cache
    def of_model(folder: str) -> str:
        return model_digest(Path(folder), file_digest)

    @cache
    def of_texts(folder: str) -> str:
        return texts_digest(Path(folder), file_digest)

    return [
        {
            "form": FORM,
            "arena": cell.arena,
            "version": open_arena(cell.arena).VERSION,
            "implementation": cell.implementation,
            "settings": cell.settings,
            "axes": cell.axes,
            "seed": cell.seed,
            "quick": cell.quick,
            "device": torch.device(cell.device).type,
            "model": of_model(cell.model) if cell.model else None,
            "torch": str(torch.__version__),
            **of_code(*_modules(cell)),
            **({"texts": of_texts(cell.texts)} if cell.texts else {}),
        }
        for cell in cells
    ]


def _modules(cell: Cell) -> list[str]:
    return [f"refimpl.arena.{cell.arena}", *([cell.implementation.partition(":")[0]] if cell.implementation else [])]


def key(determined: dict[str, Any]) -> str:
    """The sha256 of the determinants, whatever their order."""
    return hashlib.sha256(json.dumps(determined, sort_keys=True).encode()).hexdigest()


def content_digest(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digest(folder: Path, file_digest: FileDigest) -> str:
    """Digest of a model's folder: names and contents of its configuration, tokenizer and weights."""
    return _folder_digest(folder, (path for pattern in MODEL_FILES for path in folder.glob(pattern)), file_digest)


def texts_digest(folder: Path, file_digest: FileDigest) -> str:
    """Digest of a folder of texts: names and contents."""
    return _folder_digest(folder, (path for pattern in TEXT_FILES for path in folder.glob(pattern)), file_digest)


def weights_digest(modules: Sequence[str], file_digest: FileDigest) -> dict[str, str]:
    """Digests of the weights that come with a method: a file beside its module, as `llmlingua2.safetensors` beside `llmlingua2.py`."""
    files = [path.with_suffix(".safetensors") for name in modules if (path := _file(name))]
    return {path.name: file_digest(path) for path in files if path.is_file()}


def testbed_digest(file_digest: FileDigest) -> str:
    """Digest of the testbed's data: every file of its folder that is not code."""
    folder = _folder(TESTBED)
    files = (path for path in folder.rglob("*") if path.suffix not in (".py", ".pyc"))
    return _folder_digest(folder, files, file_digest)


def _folder_digest(folder: Path, files: Iterable[Path], file_digest: FileDigest) -> str:
    parts = {str(path.relative_to(folder)): file_digest(path) for path in files if path.is_file()}
    return key(parts)


def code_digest(modules: Iterable[str]) -> str:
    """Digest of what these modules do, and all those they import."""
    return key({name: _meaning(path, path.stat().st_mtime_ns) for name, path in sources(modules).items()})


def sources(modules: Iterable[str]) -> dict[str, Path]:
    """Files of the modules and of every module that they import from this project or from their own packages.

    Raises:
        ValueError: a module has no source file.
    """
    modules = list(modules)
    tops = {"refimpl", *(name.partition(".")[0] for name in modules)}
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        path = _file(name)
        if path is None:
            if name in modules:
                raise ValueError(f"{name} has no source file; what it does can't be told from its name")
            continue
        found[name] = path
        waiting += [other for other in _imports(name, path, path.stat().st_mtime_ns) if other.partition(".")[0] in tops]
        if _of_testbed(name):
            waiting += _modules_below(TESTBED)
    return found


def _of_testbed(name: str) -> bool:
    return f"{name}.".startswith(f"{TESTBED}.")


def _modules_below(package: str) -> list[str]:
    folder = _folder(package)
    parts = (path.relative_to(folder).with_suffix("").parts for path in folder.rglob("*.py"))
    return [".".join((package, *(p[:-1] if p[-1] == "__init__" else p))) for p in parts]


def _folder(package: str) -> Path:
    return next(path for path in _places(package) if path.is_dir())


def _file(name: str) -> Path | None:
    """The module's file, without importing anything; None of a folder without `__init__.py`, and of what is no module."""
    for place in _places(name):
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file():
                return path
    return None


def _places(name: str) -> Iterator[Path]:
    """Where a module could stand, without suffix."""
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return
    if spec.submodule_search_locations is None:  # a module by itself
        if spec.origin and not rest:
            yield Path(spec.origin).with_suffix("")
        return
    for folder in spec.submodule_search_locations:
        yield Path(folder, *rest)


@cache
def _imports(name: str, path: Path, _changed: int) -> frozenset[str]:
    """Dotted names that may be modules, of the imports anywhere in a file; the packages above them run too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(_tree(path) or ast.Module([], [])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return frozenset(".".join(parts[:n]) for parts in (f.split(".") for f in found) for n in range(1, len(parts) + 1))


@cache
def _meaning(path: Path, _changed: int) -> str:
    """Digest of a file's syntax tree without docstrings; of a file that is not Python, of its bytes."""
    tree = _tree(path)
    if tree is None:
        return content_digest(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _tree(path: Path) -> ast.Module | None:
    """A file's syntax tree; None if it has none: importing it will fail, and that is the cell's result."""
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return None


class Remembered(msgspec.Struct, frozen=True):
    """How a file looked when it was read: as long as size, time of change and inode stand, so does its digest."""

    path: str
    size: int
    changed: int
    inode: int


def look(path: Path) -> Remembered:
    """How a file looks now."""
    stat = path.stat()
    return Remembered(str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino)
