"""The three files of a new method: what is known, how it is computed, why it can be believed.

What `scaffold` writes does not pass: the YAML file lacks its texts, the implementation raises, the test fails. Each says
what belongs in its place.
"""

import keyword
import re
from pathlib import Path

import taxonomy
from taxonomy.reader import FRAMEWORKS

KNOWLEDGE = """\
# Fill in from top to bottom; `effllm check` names what is missing, with its place.
name: {name}
summary: ""  # one sentence: what it does, and how
papers: []  # keys into papers/<year>.yaml; the first one introduced the method
tags: []
relations: {{}}  # builds_on, generalizes, combines, alternative_to, composes_with: lists of ids
idea: ""  # two or three short paragraphs in our own words, with the central equations ($…$)
when: ""  # where it is the right choice, and where it is not
facets: {{}}  # stage, training, calibration, exact, frees_memory, changes_architecture
"""

FOR_CODE = """\
impl: {object}
claims:
- id: first-claim
  says: ""  # a sentence of the paper that could turn out wrong here
  source: {{paper: "", where: ""}}  # table, figure or section
  expect: {{unit: ratio}}  # above, below or equals
arena: {{}}  # arena: {{setting: [values]}}
"""

CODE = '''\
r"""{name}: one line that says what it does.

Source: `key` (arXiv id), equation or algorithm; official code owner/repo@commit, file.

Differs from the paper: none.

Not here: none.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class {object}:
    """What it computes; its configuration has the paper's defaults.

    See the family's `protocol.py` for how it is called.
    """

    def __post_init__(self) -> None:
        raise NotImplementedError("{object} is a scaffold: write the paper's algorithm here")
'''

TEST = '''\
"""{name}: name the oracles here."""

from {module} import {object}


def test_against_an_oracle():
    """Oracle: name a closed form, brute force, a theorem, worked numbers or a peer: a result that is not our own."""
    assert {object}() is None, "a scaffold: write what could be wrong"


def test_claim(claim):
    """Measure the claim that the YAML file states."""
    claim("{id}", "first-claim", float("nan"))
'''


def scaffold(place: str, root: Path) -> list[Path]:
    """Write the three files of a method and return their paths.

    A method that is described already, without code, keeps its YAML file; what code needs there is added at the end.

    Args:
        place: category and id, `compression/low_rank/svd`.
        root: the checkout.

    Raises:
        ValueError: the category does not exist, the id is no id, or it is taken.
        FileExistsError: one of the files stands already; none is written.
    """
    category, _, name = place.strip("/").rpartition("/")
    name = name.replace("_", "-")
    tree = root / "taxonomy"
    folder = tree / category
    known = sorted(p.parent.relative_to(tree).as_posix() for p in tree.rglob("_category.yaml"))
    if not category:
        raise ValueError(f"{place!r} is no category and id; give CATEGORY/ID, as compression/low_rank/svd")
    stem = name.replace("-", "_")
    if f"{category}/{stem}" in known:
        raise ValueError(f"{place!r} is a category; give CATEGORY/ID, as {category}/{stem}/my-method")
    if category not in known:
        raise ValueError(
            f"no category {category!r}{taxonomy.near(category, known)}; give CATEGORY/ID, as compression/low_rank/svd"
        )
    if category == FRAMEWORKS:
        raise ValueError(f"{category} holds frameworks, which have no code here; copy one of its files")
    title = "".join(word.capitalize() for word in name.split("-"))
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ValueError(f"id {name!r} must be lower-case letters, digits and single hyphens, and start with a letter")
    if keyword.iskeyword(stem) or keyword.iskeyword(title):
        raise ValueError(f"id {name!r} names a module, and is a word of Python; choose another")
    taken = next((p for p in (root / "taxonomy").rglob(f"{stem}.yaml") if p.parent.name != "papers"), None)
    described = taken == folder / f"{stem}.yaml" and not re.search(
        r"^impl\s*:", taken.read_text(encoding="utf-8"), re.M
    )
    if taken and not described:
        raise ValueError(f"id {name!r} is taken by {taken.relative_to(root)}")
    words = {
        "name": name,
        "id": name,
        "object": title,
        "module": f"refimpl.{category.replace('/', '.')}.{stem}",
    }
    knowledge = folder / f"{stem}.yaml"
    before = knowledge.read_text(encoding="utf-8").rstrip() + "\n" if described else KNOWLEDGE.format(**words)
    texts = {
        knowledge: before + FOR_CODE.format(**words),
        root / "refimpl" / category / f"{stem}.py": CODE.format(**words),
        root / "tests" / category / f"test_{stem}.py": TEST.format(**words),
    }
    for path in texts:
        if path.exists() and not (described and path == knowledge):
            raise FileExistsError(f"{path} stands already; nothing was written")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(texts)
