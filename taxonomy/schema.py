"""What the files of the knowledge base may say, and what they are once read.

One definition of every field: msgspec checks the YAML against these classes, writes the JSON Schema for editors from
them, and stores the compiled form with them. A `…File` class is a file as its author writes it; the class that extends it adds what
its place in the tree says: `compression/low_rank/svd.yaml` is method `svd` in category `compression/low_rank`.
"""

import difflib
import importlib
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

# `$` alone would let one line break follow, and `\d` digits of other scripts.
Line = Annotated[str, Meta(max_length=240, pattern=r"^\S([^\n]*\S)?$(?!\n)", description="One line of text.")]
Prose = Annotated[str, Meta(min_length=40, description="Paragraphs of Markdown; mathematics as $…$ or $$…$$.")]
Id = Annotated[str, Meta(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$(?!\n)", description="Lower-case letters, digits, hyphens.")]
CategoryId = Annotated[
    str, Meta(pattern=r"^[a-z0-9_]+(/[a-z0-9_]+)*$(?!\n)", description="Folders from taxonomy/ down.")
]
Url = Annotated[str, Meta(pattern=r"^https?://[^\s<>\"]+$(?!\n)", description="An http or https address.")]
ArxivId = Annotated[
    str, Meta(pattern=r"^[0-9]{4}\.[0-9]{4,5}$(?!\n)", description="arXiv id, quoted, without version.")
]

ObjectName = Annotated[
    str, Meta(pattern=r"^[A-Za-z_][A-Za-z_0-9]*$(?!\n)", description="Object in the mirrored module of refimpl/.")
]

RELATIONS = ("builds_on", "generalizes", "combines", "alternative_to", "composes_with")
Stage = Literal["data", "pre-training", "fine-tuning", "post-training", "prefill", "decode"]


def near(name: object, known: Iterable[str]) -> str:
    """`; did you mean 'gptq'?` where a known name is near, and nothing where none is.

    Examples:
        >>> near("gtpq", ["gptq", "awq"])
        "; did you mean 'gptq'?"
    """
    folded: dict[str, str] = {}
    for candidate in known:
        folded.setdefault(candidate.casefold(), candidate)
    matches = difflib.get_close_matches(str(name).casefold(), folded, n=1)
    return f"; did you mean {folded[matches[0]]!r}?" if matches else ""


class Facets(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Answers to *which method fits?*; null where the question has no meaning for the method."""

    stage: Annotated[list[Stage], Meta(min_length=1, description="When in a model's life it acts.")]
    training: Annotated[
        Literal["none", "partial", "full"],
        Meta(description="Gradient steps it needs: none; on few parameters or block by block; on the whole model."),
    ]
    calibration: Annotated[bool, Meta(description="Needs sample data, labelled or not, before it can be applied.")]
    exact: Annotated[
        bool, Meta(description="Leaves the result as without it: same function, tokens or distribution, to rounding.")
    ]
    frees_memory: Annotated[bool, Meta(description="Fewer bytes are held than without it.")]
    changes_architecture: Annotated[bool, Meta(description="The model that is served has other modules or shapes.")]
    attention_scores: Annotated[bool | None, Meta(description="Needs the attention scores themselves.")] = None
    gqa: Annotated[bool | None, Meta(description="Works with grouped-query attention.")] = None
    fused_attention: Annotated[bool | None, Meta(description="Works with a fused attention kernel.")] = None


class Relations(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Typed edges to other methods. Declared once, on the younger method; readers see both directions."""

    builds_on: Annotated[list[Id], Meta(description="Would not exist in this form without these.")] = []
    generalizes: Annotated[list[Id], Meta(description="Contains these as special cases.")] = []
    combines: Annotated[list[Id], Meta(description="Is these, put together.")] = []
    alternative_to: Annotated[list[Id], Meta(description="Solves the same problem in another way.")] = []
    composes_with: Annotated[list[Id], Meta(description="Can be applied together with these.")] = []

    def items(self) -> list[tuple[str, str]]:
        """Pairs (relation, target id), in the order of `RELATIONS`."""
        return [(kind, target) for kind in RELATIONS for target in getattr(self, kind)]


class Source(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a claim is made."""

    paper: Id
    where: Line


class Expect(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the measured value must satisfy: every bound given holds; `equals` means within `within` of it."""

    unit: Line
    above: float | None = None
    below: float | None = None
    equals: float | None = None
    within: Annotated[float, Meta(ge=0)] = 0.0

    def met_by(self, value: float) -> bool:
        """Whether a measured value satisfies every bound; a NaN satisfies none."""
        return (
            (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.equals is None or abs(value - self.equals) <= self.within)
            and value == value
        )

    def __str__(self) -> str:
        parts = [f"> {self.above:g}"] if self.above is not None else []
        parts += [f"< {self.below:g}"] if self.below is not None else []
        if self.equals is not None:
            parts += [f"= {self.equals:g}" + (f" ± {self.within:g}" if self.within else "")]
        return f"{' and '.join(parts)} {self.unit}"


class Claim(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A sentence of a paper turned into a measured quantity and an expectation."""

    id: Id
    says: Line
    source: Source
    expect: Expect
    holds: Annotated[bool, Meta(description="false: measured here and found not to hold; `why` says why.")] = True
    why: Line | None = None


class MethodFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A method, a leaf of the tree, as its file states it."""

    name: Annotated[Line, Meta(description="As the paper spells it.")]
    summary: Annotated[Line, Meta(description="One sentence: what it does, and how.")]
    papers: Annotated[list[Id], Meta(min_length=1, description="Keys into papers/; the first one introduced it.")]
    idea: Prose
    when: Annotated[Prose, Meta(description="Where it is the right choice, and where it is not.")]
    facets: Facets
    tags: list[Id] = []
    relations: Relations = Relations()
    impl: ObjectName | None = None
    claims: list[Claim] = []
    arena: Annotated[
        dict[str, dict[str, list[Any]]], Meta(description="Arena name to the settings that are run there.")
    ] = {}
    simulated: Annotated[bool, Meta(description="The implementation only masks or fake-quantizes.")] = False


class Method(MethodFile, frozen=True, kw_only=True):
    """A method with its place in the tree."""

    id: str
    category: str
    year: int

    @property
    def implemented(self) -> bool:
        """Whether a runnable implementation stands at its place in `refimpl/`."""
        return self.impl is not None

    @property
    def path(self) -> str:
        """Place in every tree, without suffix: `compression/low_rank/svd`."""
        return f"{self.category}/{self.id.replace('-', '_')}"

    @property
    def module(self) -> str:
        """Importable name of its module: `refimpl.compression.low_rank.svd`."""
        return f"refimpl.{self.path.replace('/', '.')}"

    def load(self) -> Any:
        """Import the implementation and return it.

        Raises:
            NotImplementedError: the method is on the reading list and has no code yet.
        """
        if self.impl is None:
            raise NotImplementedError(f"{self.id!r} has no implementation yet; `effllm tree --implemented` lists those")
        return getattr(importlib.import_module(self.module), self.impl)


class Question(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A question about a whole family that measured claims of its methods answer."""

    asks: Annotated[Line, Meta(description="As somebody would ask who has to choose.")]
    answer: Annotated[str, Meta(min_length=40, description="What the claims show together, and where that ends.")]
    claims: Annotated[
        list[str], Meta(min_length=1, description="Claims that answer it: `wanda/rows-beat-layers`, in reading order.")
    ]


class CategoryFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """An inner node of the tree: the `_category.yaml` of its folder."""

    name: Line
    summary: Line
    text: Annotated[str, Meta(min_length=300, description="What it is about, what its methods trade, how they differ.")]
    order: Annotated[int, Meta(ge=1, description="Place among its siblings.")]
    survey_path: Annotated[list[str], Meta(description="Headings of the survey's online list that it stands for.")] = []
    questions: Annotated[list[Question], Meta(description="Questions that running its methods answers.")] = []


class Category(CategoryFile, frozen=True, kw_only=True):
    """A category with its place in the tree."""

    id: str

    @property
    def parent(self) -> str | None:
        """Id of the category above, None for a top-level one."""
        return self.id.rpartition("/")[0] or None

    @property
    def depth(self) -> int:
        """0 for a top-level category."""
        return self.id.count("/")


class Correction(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A difference between an entry and the survey's list, with the reason."""

    kind: Annotated[
        Literal["fact", "form", "added", "duplicate", "misfiled", "unverified"],
        Meta(
            description="fact: the list was wrong; form: spelling or renamed; added: an id the list lacks; duplicate: "
            "listed twice; misfiled: the category is doubtful; unverified: left as listed, not confirmed."
        ),
    ]
    listed: str | None = None
    now: str | None = None
    evidence: str | None = None


class PaperEntry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A paper of the bibliography, in the file of its year."""

    title: Line
    venue: Line
    url: Url
    categories: Annotated[list[CategoryId], Meta(min_length=1)]
    name: Line | None = None
    authors: list[Line] = []
    arxiv: ArxivId | None = None
    code: Url | None = None
    listed: Annotated[list[str], Meta(description="Headings under which the survey's online list has it.")] = []
    aka: list[Line] = []
    evidence: Annotated[str | None, Meta(description="How id and title were checked, for a paper not in the list.")] = (
        None
    )
    corrections: list[Correction] = []


class Paper(PaperEntry, frozen=True, kw_only=True):
    """A paper with its key and year."""

    key: str
    year: int

    @property
    def posted(self) -> int:
        """Year of first appearance: of the arXiv posting where that came before the venue."""
        return min(self.year, 2000 + int(self.arxiv[:2])) if self.arxiv else self.year


class FrameworkFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A software framework of the survey's table."""

    name: Line
    summary: Line
    code: Url
    supports: Annotated[list[Literal["training", "fine-tuning", "inference"]], Meta(min_length=1)]
    features: list[Line]
    libraries: list[Line]
    ships: Annotated[list[Id], Meta(description="Methods of this tree that it ships.")] = []
    sources: Annotated[list[Url], Meta(min_length=1)]
    note: Line | None = None


class Framework(FrameworkFile, frozen=True, kw_only=True):
    """A framework with its id and category."""

    id: str
    category: str


class Compiled(Struct, frozen=True, kw_only=True):
    """Everything, as it is stored between runs."""

    categories: dict[str, Category]
    methods: dict[str, Method]
    papers: dict[str, Paper]
    frameworks: dict[str, Framework]
    survey: dict[str, str]


def json_schemas() -> dict[str, dict[str, Any]]:
    """JSON Schema of each kind of file, by the name under which it is published."""
    from msgspec import json

    kinds = {"method": MethodFile, "category": CategoryFile, "papers": dict[Id, PaperEntry], "framework": FrameworkFile}
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {name: {"$schema": draft, "title": f"effllm {name}", **json.schema(kind)} for name, kind in kinds.items()}
