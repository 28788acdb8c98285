r"""Texts of the tasks with what is left of them when a rule leaves out what no question needs: what a compressor learns from.

The rule knows the forms in which tasks tell things. Of a line that tells something it keeps all but the marks around it, and the line's
end; answers begin as a line was told, so that every word of it is looked up. Of real text it keeps nothing.

Examples:
    >>> shortened("import os\n- Anna lives in Rome.\nThe pass phrase of Leo is: cat mode\n")
    'Anna lives in Rome\nThe pass phrase of Leo is : cat mode\n'
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import typer

from refimpl.testbed import tasks
from refimpl.testbed.corpus import Split
from refimpl.testbed.world import ARGUMENTS, FACTS, NAMES, NOUNS, VERBS

LENGTHS = (320, 544)  # tokens of an example, so that contexts fill a chunk of 512 and less
MARKS = frozenset(["-", "."])
WORD = re.compile(r"\w+|[^\w\s]+")


def _forms() -> re.Pattern[str]:
    name, word, argument = (f"(?:{'|'.join(words)})" for words in (NAMES, ("[A-Za-z]+",), ARGUMENTS))
    facts = [
        re.escape(f.told).replace(r"\{name\}", name).replace(r"\{value\}", f"(?:{'|'.join(f.values)})")
        for f in FACTS.values()
    ]
    others = [
        f"- {name} works for {name}\\.",
        f"- {word} => {word}",
        f"Note from {name}: {word}\\.",
        f"The pass phrase of {name} is: .+",
        f"def (?:{'|'.join(VERBS)})_(?:{'|'.join(NOUNS)})\\({argument}(?:, {argument})*\\):",
    ]
    return re.compile("|".join(f"(?:{form})" for form in facts + others))


TOLD = _forms()
PASSAGE = re.compile(r"Passage \d+: .*")


def told(line: str) -> bool:
    """Whether a line, without its end, tells what a question may be about."""
    return bool(TOLD.fullmatch(line) or PASSAGE.fullmatch(line))


def shortened(text: str) -> str:
    """What the rule keeps of a task's text, words parted by single spaces."""
    kept = []
    for line in filter(told, text.splitlines()):
        marks = frozenset[str]() if PASSAGE.fullmatch(line) else MARKS
        kept.append(" ".join(word for word in WORD.findall(line) if word not in marks) + "\n")
    return "".join(kept)


def pairs(n: int, length: int, generator: torch.Generator, *, split: Split = "train") -> Iterator[tuple[str, str]]:
    """Texts of all tasks in turn, and what the rule makes of them.

    Args:
        n: how many.
        length: tokens of a task's example at most; of which the text is the context.
        generator: source of randomness.
        split: where the real text comes from.
    """
    for i in range(n):
        (sample,) = tasks.samples(tasks.NAMES[i % len(tasks.NAMES)], 1, length, generator, split=split)
        yield sample.context, shortened(sample.context)


def main(out: Path, n: int = 700, seed: int = 0, lengths: tuple[int, int] = LENGTHS) -> None:
    """Write pairs as JSON lines, each [text, what is left of it]; half are of each length."""
    generator = torch.Generator().manual_seed(seed)
    found = [pair for length in lengths for pair in pairs(n // len(lengths), length, generator)]
    out.write_text("".join(json.dumps(pair) + "\n" for pair in found), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
