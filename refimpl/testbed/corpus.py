"""Real text that every machine with Python has: the interpreter's standard library and its documentation.

Nothing of it is shipped. What it is depends on the interpreter's minor version, which the environment stamp of every figure names;
which file is held out depends on its name alone.
"""

import hashlib
import sysconfig
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from refimpl.testbed.tokenizer import END_ID, tokenizer

Split = Literal["train", "held-out"]
HELD_OUT = 20  # one document in so many
LONGEST = 80  # tokens of a line: tables in one line would fill a context
# Tests repeat themselves, codecs are tables, the rest is not part of every installation.
LEFT_OUT = {
    "site-packages",
    "test",
    "tests",
    "encodings",
    "lib2to3",
    "idlelib",
    "turtledemo",
    "ensurepip",
    "pydoc_data",
}


@cache
def documents(split: Split) -> dict[str, str]:
    """Every document of a split by its name, in an order that mixes code and documentation.

    Raises:
        ValueError: an unknown split.
        FileNotFoundError: the interpreter came without its standard library's sources.
    """
    if split not in ("train", "held-out"):
        raise ValueError(f"split={split!r} must be 'train' or 'held-out'")
    everything = _modules() | _topics()
    if not everything:
        raise FileNotFoundError(f"no sources of the standard library in {sysconfig.get_paths()['stdlib']}")
    held_out = {name: _order(name) % HELD_OUT == 0 for name in everything}
    names = [name for name in everything if held_out[name] == (split == "held-out")]
    return {name: everything[name] for name in sorted(names, key=_order)}


def _modules() -> dict[str, str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(root): path for path in root.rglob("*.py")}
    wanted = {name: path for name, path in files.items() if not LEFT_OUT & set(name.parts)}
    return {name.as_posix(): path.read_text(encoding="utf-8", errors="replace") for name, path in wanted.items()}


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:  # some distributions package it apart
        return {}
    return {f"topic {name}": text for name, text in topics.items()}


def _order(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


def digest() -> str:
    """SHA-256 of all documents: which corpus this interpreter has."""
    whole = hashlib.sha256()
    for split in ("train", "held-out"):
        for name, text in documents(split).items():
            whole.update(f"{split} {name} {len(text)}\n{text}".encode())
    return whole.hexdigest()


@cache
def tokens(split: Split, n: int | None = None, reader: Tokenizer | None = None) -> Tensor:
    """A split as tokens, documents one after the other.

    Args:
        split: which.
        n: only the first n, which spares reading the rest; None gives all.
        reader: what cuts the text; None stands for the testbed's, and then `END` ends each document.

    Returns:
        `[time]`, int64.

    Raises:
        ValueError: the split has fewer than n tokens.
    """
    found: list[int] = []
    for text in documents(split).values():
        if reader is None:
            found += [*tokenizer().encode(text).ids, END_ID]
        else:
            found += reader.encode(text, add_special_tokens=False).ids
        if n is not None and len(found) >= n:
            return torch.tensor(found[:n])
    if n is not None:
        raise ValueError(f"the split {split!r} has {len(found):,} tokens, fewer than n={n:,}")
    return torch.tensor(found)


class Lines:
    """The lines of a split and how many tokens each takes, to fill a context with.

    Args:
        split: which.
        language: code, documentation, or any text.
    """

    def __init__(self, split: Split, language: Literal["code", "prose", "any"] = "any") -> None:
        chosen = [
            text
            for name, text in documents(split).items()
            if language == "any" or name.startswith("topic ") == (language == "prose")
        ]
        lines = [line + "\n" for text in chosen for line in text.splitlines() if line.strip()]
        sizes = [len(encoding.ids) for encoding in tokenizer().encode_batch_fast(lines)]
        kept = [i for i, size in enumerate(sizes) if size <= LONGEST]
        self.lines, self.sizes = [lines[i] for i in kept], [sizes[i] for i in kept]
        self.until = list(accumulate(self.sizes, initial=0))


lines = cache(Lines)
