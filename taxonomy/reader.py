"""From YAML files to checked objects: every problem at once, each with its place.

`read(root)` is two steps: `parse` turns one file into plain values and remembers where each stood; the functions below
it check values against the schema, then the entries against each other. Nothing here raises for bad data.
"""

import ast
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import msgspec
import networkx
import yaml
from yaml.constructor import SafeConstructor

from taxonomy.schema import (
    RELATIONS,
    Category,
    CategoryFile,
    Compiled,
    Framework,
    FrameworkFile,
    Id,
    Method,
    MethodFile,
    Paper,
    PaperEntry,
    near,
)

FRAMEWORKS = "systems/frameworks"
SYMMETRIC = ("alternative_to", "composes_with")
STEM = re.compile(r"[a-z0-9]+(_[a-z0-9]+)*")
FOLDER = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+)*")
TAG = "tag:yaml.org,2002:"
TEXT = f"{TAG}str"
SCALARS = {TEXT} | {TAG + name for name in ("int", "float", "bool", "null")}
COLLECTIONS = {f"{TAG}map", f"{TAG}seq"}
UNQUOTED = {TAG + name for name in ("timestamp", "merge", "value")}  # what plain text may be taken for
HINTS = {
    "mapping values are not allowed": "put a text with a colon in it in quotes",
    "tab character": "indent with spaces",
    "cannot start any token": "put the text in quotes, and indent with spaces",
    "undefined alias": "put a text that starts with * in quotes",
}
BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # what YAML takes for the end of a line
DEEPEST = 100
# Plain scalars that YAML 1.1 reads otherwise than they look: 1e-3 and 1:30.
TRAPS = re.compile(r"(?P<power>[-+]?\d+[eE][-+]?\d+)|[-+]?\d[\d_]*(:[0-5]?\d)+(\.\d*)?")
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Where = tuple[str | int, ...]


class Problem(NamedTuple):
    """Something wrong in a file: prints as `file:line:column: what, and what would be right`."""

    file: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.message}"


@dataclass
class Document:
    """One parsed file: its plain value and, for each path into it, where it stands (1-based)."""

    file: str
    value: Any = None
    places: dict[Where, tuple[int, int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def report(self, where: Where, message: str) -> None:
        """Add a problem at the deepest known ancestor of `where`."""
        while where and where not in self.places:
            where = where[:-1]
        line, column = self.places.get(where, (1, 1))
        self.problems.append(Problem(self.file, line, column, message))


def parse(file: str, content: bytes) -> Document:
    """Read one YAML document with `safe_load`'s meaning, restricted to what a data file needs."""
    document = Document(file)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = _after(content[: error.start].decode("utf-8"))
        document.problems.append(Problem(file, *place, "a byte that is not UTF-8; save the file as UTF-8"))
        return document
    try:
        _compose(document, text)
    except yaml.MarkedYAMLError as error:
        what = ", ".join(part for part in (error.context, error.problem) if part)
        hint = next((f"; {hint}" for sign, hint in HINTS.items() if sign in what), "")
        place = min(_place(error.problem_mark or error.context_mark), _after(text))  # libyaml's end is a line too far
        document.problems.append(Problem(file, *place, f"not valid YAML: {what}{hint}"))
    except yaml.reader.ReaderError as error:
        # libyaml counts in bytes, the reader in Python in characters
        before = text[: error.position] if Loader is yaml.SafeLoader else content[: error.position].decode("utf-8")
        message = f"not valid YAML: {error.reason}; remove the character"
        document.problems.append(Problem(file, *_after(before), message))
    return document


def _compose(document: Document, text: str) -> None:
    nesting = text.count("[") + text.count("{") + 2 * max(map(len, text.splitlines()), default=0)  # at most
    if nesting > 1000 and (place := _too_deep(text)):  # composing recurses, in C without a check
        document.problems.append(
            Problem(document.file, *place, "nested too deeply; an entry needs five levels at most")
        )
        return
    loader = Loader(text)
    try:
        node = loader.get_single_node()
    finally:
        loader.dispose()
    if node is None:
        document.report((), "the file is empty; `effllm new` shows what belongs here")
        return
    seen: Counter[int] = Counter()
    try:
        document.value = _construct(node, (), document, seen)
    except RecursionError:
        place = _too_deep(text) or (1, 1)
        document.problems.append(
            Problem(document.file, *place, "nested too deeply; an entry needs five levels at most")
        )
    if max(seen.values()) > 1:
        for event in yaml.parse(text, Loader):
            if isinstance(event, yaml.AliasEvent):
                message = f"an alias (*{event.anchor}) repeats another node; write the value out"
                document.problems.append(Problem(document.file, *_place(event.start_mark), message))


def _too_deep(text: str) -> tuple[int, int] | None:
    """Place of the first collection that is nested too deeply."""
    depth = 0
    for event in yaml.parse(text, Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            return _place(event.start_mark)
    return None


def _place(mark: Any) -> tuple[int, int]:
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


def _after(text: str) -> tuple[int, int]:
    """Line and column of what follows a text."""
    lines = BREAK.split(text)
    return len(lines), len(lines[-1]) + 1


def _construct(node: yaml.Node, where: Where, document: Document, seen: Counter[int]) -> Any:
    document.places.setdefault(where, _place(node.start_mark))
    seen[id(node)] += 1
    if seen[id(node)] > 1:  # an alias
        return None
    scalar = isinstance(node, yaml.ScalarNode)
    if node.tag not in (SCALARS if scalar else COLLECTIONS):
        what = repr(node.value[:40]) if scalar else "this"
        remedy = "put it in quotes" if node.tag in UNQUOTED else "remove the tag"
        document.report(where, f"{what} is read as {node.tag.removeprefix(TAG)}; {remedy}")
        return None
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _key(key_node, document, seen)
            if key is not None:
                if key in values:
                    place = _place(key_node.start_mark)
                    document.problems.append(Problem(document.file, *place, f"{key!r} stands here twice; keep one"))
                document.places[(*where, key)] = _place(key_node.start_mark)
                values[key] = _construct(value_node, (*where, key), document, seen)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_construct(child, (*where, i), document, seen) for i, child in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and not node.style and (trap := TRAPS.fullmatch(node.value)):
        mantissa, _, power = node.value.lower().partition("e")
        number = f"write {mantissa}.0e{'' if power[:1] in '+-' else '+'}{power}, or"
        meant = f"text; {number} put it in quotes" if trap["power"] else "a number to the base 60; put it in quotes"
        document.report(where, f"{node.value[:40]!r} is read as {meant}")
        return None
    try:
        value = SafeConstructor().construct_object(node)
    except (ValueError, LookupError, yaml.YAMLError):
        name = node.tag.removeprefix(TAG)
        document.report(where, f"{node.value[:40]!r} cannot be read as {name}; put it in quotes")
        return None
    if isinstance(value, float) and not math.isfinite(value):
        document.report(where, f"{node.value[:40]!r} is not a finite number")
        return None
    if isinstance(value, int) and abs(value) >= 2**63:
        document.report(where, f"{node.value[:40]!r} is too large for a number; put it in quotes")
        return None
    return value


def _key(node: yaml.Node, document: Document, seen: Counter[int]) -> str | None:
    """A mapping's key, None where it is no text; that is a problem then."""
    seen[id(node)] += 1
    if isinstance(node, yaml.ScalarNode) and node.tag == TEXT:
        return str(node.value)
    what = "this is a collection"
    if isinstance(node, yaml.ScalarNode):
        what = f"{node.value[:40]!r} is read as {node.tag.removeprefix(TAG)}: put it in quotes"
    document.problems.append(Problem(document.file, *_place(node.start_mark), f"a key must be text; {what}"))
    return None


def check(value: Any, kind: Any, where: Where = ()) -> Iterator[tuple[Where, str]]:
    """Every difference between a plain value and a schema type, as (place, message).

    msgspec itself stops at the first; this walks down to the parts and lets it judge each.
    """
    bare = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if isinstance(bare, type) and issubclass(bare, msgspec.Struct) and isinstance(value, dict):
        fields = {f.encode_name: f for f in msgspec.structs.fields(bare)}
        absent = [name for name in fields if name not in value]
        guesses = {key: near(key, absent) for key in value.keys() - fields.keys()}
        for key, guess in guesses.items():
            yield (*where, key), f"unknown key {key!r}{guess or '; known: ' + ', '.join(fields)}"
        for name, spec in fields.items():
            if name in value:
                yield from check(value[name], spec.type, (*where, name))
            elif spec.required and not any(repr(name) in guess for guess in guesses.values()):  # a slip counts once
                yield where, f"{name!r} is missing; right: {_describe(spec.type)}"
        return
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        inner: list[tuple[Where, str]] = []
        if get_origin(bare) is list and isinstance(value, list):
            inner = [p for i, item in enumerate(value) for p in check(item, get_args(bare)[0], (*where, i))]
        elif get_origin(bare) is dict and isinstance(value, dict):
            key_kind, item_kind = get_args(bare)
            inner = [((*where, k), m) for k in value for _, m in check(k, key_kind)]
            inner += [p for k, item in value.items() for p in check(item, item_kind, (*where, k))]
        yield from inner or [(where, _explain(value, kind, error))]


def _explain(value: Any, kind: Any, error: msgspec.ValidationError) -> str:
    said = str(error).partition(" - at `")[0]
    literal = _literals(kind)
    if isinstance(value, str) and literal:
        return f"{value!r} is not one of {', '.join(literal)}{near(value, literal)}"
    said = f"{said[0].lower()}{said[1:]}".partition(" matching regex")[0]
    shown = repr(value) if len(repr(value)) < 60 else repr(value)[:57] + "..."
    return f"{said}, got {shown}; right: {_describe(kind)}"


def _literals(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    return [choice for part in get_args(kind) for choice in _literals(part)] if get_args(kind) else []


def _describe(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        base, *metas = get_args(kind)
        notes = [m.description for m in metas if isinstance(m, msgspec.Meta) and m.description]
        return f"{_describe(base)} ({notes[-1].rstrip('.')})" if notes else _describe(base)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return f"list of {_describe(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"mapping to {_describe(get_args(kind)[1])}"
    if get_args(kind):
        return " or ".join(_describe(part) for part in get_args(kind) if part is not type(None))
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return "mapping with " + ", ".join(f.encode_name for f in msgspec.structs.fields(kind))
    names: dict[Any, str] = {str: "text", bool: "true or false", int: "whole number", float: "number"}
    return names.get(kind, getattr(kind, "__name__", "value"))


@dataclass
class Reading:
    """What one pass over the tree has collected.

    `named` holds the ids that files stand for, those with an error in them too: a reference to one is not a second error.
    Where a file of papers cannot be parsed, nobody knows what it names: `unnamed` then stands for any paper.
    """

    root: Path
    documents: dict[str, Document] = field(default_factory=dict)
    categories: dict[str, Category] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)
    papers: dict[str, Paper] = field(default_factory=dict)
    frameworks: dict[str, Framework] = field(default_factory=dict)
    survey: dict[str, str] = field(default_factory=dict)
    origin: dict[tuple[str, str], tuple[Document, Where]] = field(default_factory=dict)
    named: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    unnamed: bool = False

    def problems(self) -> list[Problem]:
        """All of them, in the order of their places."""
        return sorted({p for document in self.documents.values() for p in document.problems})

    def compiled(self) -> Compiled:
        """The entries by id, categories in reading order, the rest sorted by place or key."""
        return Compiled(
            categories=self.categories,
            methods=self.methods,
            papers=dict(sorted(self.papers.items())),
            frameworks=self.frameworks,
            survey=self.survey,
        )


def files(root: Path) -> list[Path]:
    """All YAML files of a tree, sorted by path."""
    found = (path for pattern in ("*.yaml", "*.yml") for path in root.rglob(pattern))
    return sorted((path for path in found if not path.is_dir()), key=os.fspath)


def read(root: Path, contents: Mapping[Path, bytes | None] | None = None) -> Reading:
    """Read and check a whole tree; `contents` spares reading files that the caller has read already."""
    reading = Reading(root)
    if contents is None:
        contents = dict.fromkeys(files(root))
    for path, content in contents.items():
        relative = path.relative_to(root)
        try:
            document = parse(str(relative), path.read_bytes() if content is None else content)
        except OSError as error:
            document = Document(str(relative))
            document.report((), f"the file cannot be read: {error.strerror}; give it back, or remove it")
        reading.documents[str(relative)] = document
        _name(reading, relative, document)
        if not document.problems:
            _file(reading, relative, document)
    if not contents:
        document = reading.documents.setdefault(".", Document("."))
        document.report((), "no YAML file below this folder; a taxonomy has one `_category.yaml` in each folder")
    reading.categories = dict(sorted(reading.categories.items(), key=lambda item: _reading_order(reading, item[0])))
    _cross_check(reading)
    return reading


def _reading_order(reading: Reading, category: str) -> list[tuple[int, str]]:
    parts = category.split("/")
    prefixes = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return [(reading.categories[p].order if p in reading.categories else 0, p) for p in prefixes]


def _name(reading: Reading, relative: Path, document: Document) -> None:
    folder, stem = relative.parent.as_posix(), relative.stem
    if folder == "papers":
        whole = isinstance(document.value, dict)
        reading.named["papers"].update(document.value if whole else ())
        reading.unnamed |= not whole
    elif stem == "_category":
        reading.named["categories"].add(folder)
    elif folder != ".":
        reading.named["frameworks" if folder == FRAMEWORKS else "methods"].add(stem.replace("_", "-"))


def _file(reading: Reading, relative: Path, document: Document) -> None:
    folder, stem = relative.parent.as_posix(), relative.stem
    if relative.suffix != ".yaml":
        document.report((), f"unexpected suffix {relative.suffix!r}; name the file {stem}.yaml")
    elif folder == "papers":
        _papers(reading, stem, document)
    elif folder == ".":
        if stem == "survey":
            if not _checked(document, document.value, dict[str, str], ()):
                return
            reading.survey = document.value
        else:
            document.report((), f"no file {stem}.yaml is known here; methods stand in a category's folder")
    elif stem == "_category":
        if not FOLDER.fullmatch(folder):
            document.report((), f"folder name {folder!r} must be lower-case letters, digits and _, as in low_rank")
        elif _checked(document, document.value, CategoryFile, ()):
            category = Category(id=folder, **_fields(msgspec.convert(document.value, CategoryFile)))
            _add(reading, "categories", folder, category, document, ())
    elif not STEM.fullmatch(stem):
        document.report(
            (), f"file name {relative.name!r} must be lower-case letters, digits and _, as in mse_clip.yaml"
        )
    elif folder == FRAMEWORKS:
        if _checked(document, document.value, FrameworkFile, ()):
            name = stem.replace("_", "-")
            fields = _fields(msgspec.convert(document.value, FrameworkFile))
            _add(reading, "frameworks", name, Framework(id=name, category=folder, **fields), document, ())
    elif _checked(document, document.value, MethodFile, ()):
        name = stem.replace("_", "-")
        fields = _fields(msgspec.convert(document.value, MethodFile))
        _add(reading, "methods", name, Method(id=name, category=folder, year=0, **fields), document, ())


def _papers(reading: Reading, stem: str, document: Document) -> None:
    if not (stem.isascii() and stem.isdigit() and len(stem) == 4):
        document.report((), f"a file of papers is named for its year, as in 2023.yaml, not {stem}.yaml")
    elif _checked(document, document.value, dict[str, Any], ()):
        for key, value in document.value.items():
            if _checked(document, key, Id, (key,)) and _checked(document, value, PaperEntry, (key,)):
                entry = msgspec.convert(value, PaperEntry)
                _add(reading, "papers", key, Paper(key=key, year=int(stem), **_fields(entry)), document, (key,))


def _checked(document: Document, value: Any, kind: Any, where: Where) -> bool:
    before = len(document.problems)
    for place, message in check(value, kind, where):
        document.report(place, message)
    return len(document.problems) == before


def _fields(entry: msgspec.Struct) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in entry.__struct_fields__}


def _add(reading: Reading, kind: str, key: str, entry: Any, document: Document, where: Where) -> None:
    first = reading.origin.get((kind, key))
    if first:
        line, column = first[0].places.get(first[1], (1, 1))
        document.report(where, f"{key!r} stands in {first[0].file}:{line}:{column} already; an id is used once")
        return
    reading.origin[kind, key] = (document, where)
    getattr(reading, kind)[key] = entry


def _cross_check(reading: Reading) -> None:
    """What no file can know alone: references, years, cycles, implementations, places in the tree."""
    _check_categories(reading)
    _check_papers(reading)
    for name, method in reading.methods.items():
        document, _ = reading.origin["methods", name]
        known = [reading.papers[key] for key in method.papers if key in reading.papers]
        if known:
            method = reading.methods[name] = msgspec.structs.replace(method, year=known[0].posted)
        _refer_to_papers(reading, document, ("papers",), method.papers)
        _check_relations(reading, method, document)
        _check_claims(reading, method, document)
        _check_implementation(reading, method, document)
    _check_ages(reading)
    _check_cycles(reading)
    for name, framework in reading.frameworks.items():
        document, _ = reading.origin["frameworks", name]
        _refer(document, ("ships",), framework.ships, reading.named["methods"], "method", "effllm tree")


def _refer(document: Document, where: Where, names: list[str], known: set[str], kind: str, listed: str) -> None:
    for i, name in enumerate(names):
        if name not in known:
            document.report((*where, i), f"unknown {kind} {name!r}{near(name, known) or '; known: see ' + listed}")
        elif name in names[:i]:
            document.report((*where, i), f"{kind} {name!r} stands here twice; keep one")


def _refer_to_papers(reading: Reading, document: Document, where: Where, names: list[str]) -> None:
    known = reading.named["papers"] | set(names) if reading.unnamed else reading.named["papers"]
    _refer(document, where, names, known, "paper", "papers/")


def _check_categories(reading: Reading) -> None:
    named = reading.named["categories"]
    for document in reading.documents.values():
        for folder in map(Path.as_posix, Path(document.file).parents):
            if folder not in named and folder not in (".", "papers"):
                named.add(folder)  # one problem, however much stands in it or is filed under it
                document.report((), f"{folder}/_category.yaml is missing; each folder needs one")
    for key, category in reading.categories.items():
        document, _ = reading.origin["categories", key]
        for i, heading in enumerate(category.survey_path):
            if reading.survey and heading not in reading.survey:
                document.report(("survey_path", i), f"unknown heading {heading!r}{near(heading, reading.survey)}")
    _check_questions(reading)


def _check_questions(reading: Reading) -> None:
    known = {f"{method.id}/{claim.id}" for method in reading.methods.values() for claim in method.claims}
    broken = reading.named["methods"] - reading.methods.keys()
    for key, category in reading.categories.items():
        document, _ = reading.origin["categories", key]
        for i, question in enumerate(category.questions):
            unread = {
                name for name in question.claims if name.partition("/")[0] in broken
            }  # their file has its own problem
            _refer(document, ("questions", i, "claims"), question.claims, known | unread, "claim", "effllm claims")


def _check_papers(reading: Reading) -> None:
    ids: dict[str, str] = {}
    for key, paper in reading.papers.items():
        document, where = reading.origin["papers", key]
        _refer(
            document, (*where, "categories"), paper.categories, reading.named["categories"], "category", "effllm tree"
        )
        for i, heading in enumerate(paper.listed):
            if reading.survey and heading not in reading.survey:
                document.report((*where, "listed", i), f"unknown heading {heading!r}{near(heading, reading.survey)}")
        if paper.arxiv:
            if paper.arxiv in ids:
                document.report(
                    (*where, "arxiv"), f"arXiv {paper.arxiv} is {ids[paper.arxiv]!r} already; an id is used once"
                )
            ids.setdefault(paper.arxiv, key)
            if not 1 <= int(paper.arxiv[2:4]) <= 12:
                document.report(
                    (*where, "arxiv"), f"arXiv {paper.arxiv} has no month {paper.arxiv[2:4]}; it reads YYMM.number"
                )


def _check_relations(reading: Reading, method: Method, document: Document) -> None:
    for kind in RELATIONS:
        targets = getattr(method.relations, kind)
        _refer(document, ("relations", kind), targets, reading.named["methods"], "method", "effllm tree")
        if method.id in targets:
            document.report(("relations", kind, targets.index(method.id)), f"{method.id!r} points at itself; remove it")
    for kind in SYMMETRIC:
        for i, target in enumerate(getattr(method.relations, kind)):
            other = reading.methods.get(target)
            if other and method.id in getattr(other.relations, kind) and method.id > target:
                document.report(
                    ("relations", kind, i), f"{target!r} says so already; a symmetric relation is declared once"
                )


def _check_claims(reading: Reading, method: Method, document: Document) -> None:
    if method.impl and not method.claims:
        document.report((), "'claims' is missing; a method that runs has at least one claim of its paper measured")
    seen: set[str] = set()
    for i, claim in enumerate(method.claims):
        if claim.id in seen:
            document.report(("claims", i, "id"), f"claim {claim.id!r} stands here twice; keep one")
        seen.add(claim.id)
        _refer_to_papers(reading, document, ("claims", i, "source", "paper"), [claim.source.paper])
        if claim.expect.above is None and claim.expect.below is None and claim.expect.equals is None:
            document.report(("claims", i, "expect"), "expects nothing; give above, below or equals")
        if not claim.holds and not claim.why:
            document.report(("claims", i), "a claim with `holds: false` needs `why`: what was measured instead")


def _check_implementation(reading: Reading, method: Method, document: Document) -> None:
    if method.impl is None:
        return
    module = reading.root.parent / "refimpl" / f"{method.path}.py"
    try:
        names = _top_level_names(module.read_text(encoding="utf-8"))
    except FileNotFoundError:
        document.report(("impl",), f"refimpl/{method.path}.py is not there; write it, or leave out `impl`")
    except (OSError, SyntaxError, ValueError) as error:
        document.report(("impl",), f"refimpl/{method.path}.py cannot be read: {error}")
    else:
        if method.impl not in names:
            document.report(("impl",), f"refimpl/{method.path}.py has no {method.impl!r}{near(method.impl, names)}")


def _top_level_names(source: str) -> set[str]:
    """Names of the classes and functions a module defines; parsed, since importing it would bring in torch."""
    body = ast.parse(source).body
    return {node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def _check_ages(reading: Reading) -> None:
    for method in reading.methods.values():
        document, _ = reading.origin["methods", method.id]
        for i, target in enumerate(method.relations.builds_on):
            other = reading.methods.get(target)
            if other and method.year and other.year > method.year:
                document.report(
                    ("relations", "builds_on", i),
                    f"{method.id} ({method.year}) is older than {target} ({other.year}), which it is said to build on; "
                    "check the relation's direction and the first of `papers`",
                )


def _check_cycles(reading: Reading) -> None:
    """Report one cycle of `builds_on` for each group of methods that reach each other."""
    graph = networkx.DiGraph(
        (name, target)
        for name, method in reading.methods.items()
        for target in method.relations.builds_on
        if target in reading.methods and target != name
    )
    for group in networkx.strongly_connected_components(graph):
        if len(group) == 1:
            continue
        edges = networkx.find_cycle(graph.subgraph(group), source=min(group))
        name, target = edges[0][:2]
        cycle = " builds on ".join([*(edge[0] for edge in edges), edges[-1][1]])
        document, _ = reading.origin["methods", name]
        index = reading.methods[name].relations.builds_on.index(target)
        document.report(("relations", "builds_on", index), f"a cycle: {cycle}; one of these is wrong")
