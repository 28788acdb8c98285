"""The taxonomy of efficient large language models, as data.

Examples:
    >>> import taxonomy
    >>> tree = taxonomy.load()
    >>> tree.methods["gptq"].category
    'compression/quantization/weight_only'
    >>> tree.find("nearest level", implemented=True)[0].id
    'rtn'

Importing this package brings in neither torch nor the implementations; `method.load()` does, when it is called.
"""

import gc
import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import platformdirs

from taxonomy.query import Taxonomy
from taxonomy.schema import (
    Category,
    Claim,
    Compiled,
    Correction,
    Facets,
    Framework,
    Method,
    Paper,
    Relations,
    json_schemas,
    near,
)

if TYPE_CHECKING:
    from taxonomy.reader import Problem

__all__ = [
    "Category",
    "Claim",
    "Correction",
    "Facets",
    "Framework",
    "InvalidTaxonomy",
    "Method",
    "Paper",
    "Relations",
    "Taxonomy",
    "json_schemas",
    "load",
    "near",
    "stored_at",
    "validate",
]

ROOT = Path(__file__).parent
SOURCES = (ROOT / "schema.py", ROOT / "reader.py")


class InvalidTaxonomy(ValueError):
    """The files cannot be used as they are; `problems` lists everything that is wrong."""

    def __init__(self, problems: "list[Problem]") -> None:
        self.problems = problems
        super().__init__("\n".join(map(str, problems)))


def load(path: str | os.PathLike[str] | None = None) -> Taxonomy:
    """The taxonomy, from its compiled form where the files have not changed since.

    Args:
        path: folder of YAML files; the one that is installed with this package if left out.

    Raises:
        FileNotFoundError: `path` is not a folder.
        ValueError: it is a category's.
        InvalidTaxonomy: the files have problems; all of them are listed.
    """
    root = _folder(path)
    contents = _contents(root)
    digest = _digest(contents)
    store = stored_at(root)
    stored = _stored(store, digest)
    if stored is None:
        from taxonomy.reader import read

        reading = read(root, contents)
        if problems := reading.problems():
            raise InvalidTaxonomy(problems)
        stored = reading.compiled()
        _store(store, digest, stored)
    return Taxonomy(root, stored)


def validate(path: str | os.PathLike[str] | None = None) -> "list[Problem]":
    """Everything that is wrong with the files, in the order of their places; an empty list if nothing is.

    Raises:
        FileNotFoundError: `path` is not a folder.
        ValueError: it is a category's.
    """
    from taxonomy.reader import read

    return read(_folder(path)).problems()


def stored_at(root: Path) -> Path:
    """Where the compiled form of a tree is kept between runs."""
    name = hashlib.blake2b(os.fspath(root).encode(errors="surrogateescape"), digest_size=8).hexdigest()
    return platformdirs.user_cache_path("effllm") / f"{name}.taxonomy"


def _folder(path: str | os.PathLike[str] | None) -> Path:
    root = Path(path).resolve() if path is not None else ROOT
    if not root.is_dir():
        raise FileNotFoundError(f"path={os.fspath(root)!r} is not a folder; give the folder that holds the YAML files")
    if (root / "_category.yaml").exists() and not (root / "papers").exists():
        raise ValueError(
            f"path={os.fspath(root)!r} is a category; give the folder of the whole taxonomy, that of papers/"
        )
    return root


def _contents(root: Path) -> dict[Path, bytes | None]:
    """Bytes of every YAML file, in sorted order, None if it can't be read; `os.scandir` halves the time of `rglob`."""
    found: list[str] = []
    folders = [os.fspath(root)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.name.endswith((".yaml", ".yml")):
                    found.append(entry.path)
    contents: dict[Path, bytes | None] = {}
    for name in sorted(found):
        try:
            with open(name, "rb") as file:  # noqa: PTH123 - `Path.open` takes twice as long on thousands of files
                contents[Path(name)] = file.read()
        except OSError:  # the reader meets it again, and says so
            contents[Path(name)] = None
    return contents


def _digest(contents: Mapping[Path, bytes | None]) -> bytes:
    """Changes with any file's name or content, and with what schema and reader make of it."""
    digest = hashlib.blake2b(digest_size=32)
    for source in SOURCES:
        digest.update(source.read_bytes())
    for path, content in contents.items():
        data = content or b""  # None is never stored: it is a problem
        digest.update(f"\0{path}\0{len(data)}\0".encode(errors="surrogateescape"))
        digest.update(data)
    return digest.digest()


def _stored(store: Path, digest: bytes) -> Compiled | None:
    """The compiled form, if it is whole and belongs to these files."""
    try:
        data = store.read_bytes()
    except OSError:
        return None
    head, check, payload = data[:32], data[32:64], data[64:]
    if head != digest or check != hashlib.blake2b(payload, digest_size=32).digest():
        return None
    running = gc.isenabled()
    gc.disable()  # nothing made here is garbage: looking for some would take longer than the decoding
    try:
        return msgspec.msgpack.decode(payload, type=Compiled)
    finally:
        if running:
            gc.enable()


def _store(store: Path, digest: bytes, compiled: Compiled) -> None:
    """Write beside and rename, so that a reader never meets half a file; a store that can't be written costs only time."""
    payload = msgspec.msgpack.encode(compiled)
    partial = store.with_suffix(f".{os.getpid()}.partial")
    with suppress(OSError):
        store.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(digest + hashlib.blake2b(payload, digest_size=32).digest() + payload)
        partial.replace(store)
