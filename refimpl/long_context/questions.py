"""What the long-context arena asks: the testbed's tasks, LongBench's, and needles in the testbed's text or in the user's."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from refimpl import testbed
from refimpl.long_context import haystack, longbench
from refimpl.model.model import Decoder

LENGTH, SAMPLES, QUICK_SAMPLES = 896, 10, 4
NEEDLES = {"needle": 7, "needle_64": 64}  # words or digits to be found
NAMES = (*testbed.tasks.NAMES, "needle_64")
PARTS, DEPTHS = (0.25, 0.5, 0.75, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0)  # of the longest text; a needle for each pair
QUICK_PARTS, QUICK_DEPTHS = (0.5, 1.0), (0.25, 0.75)


class Sample(NamedTuple):
    """A prompt in two parts, the score of what is said to it, and for a needle its depth and the text's length."""

    context: str
    question: str
    score: Callable[[str], float]
    at: tuple[float, float] | None = None


@dataclass(frozen=True)
class Substrate:
    """A model, its tokenizer, and the samples of one task.

    Attributes:
        model: that answers.
        tokenizer: of it.
        samples: what it is asked.
        answer_tokens: of the longest answer.
        ends: tokens that end an answer.
        one_line: whether a line break does, too.
        blank_lines: whether line breaks before anything else do not.
    """

    model: Decoder
    tokenizer: Tokenizer
    samples: Sequence[Sample]
    answer_tokens: int
    ends: Collection[int] = ()
    one_line: bool = True
    blank_lines: bool = False

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values, in all layers."""
        shape = self.model.config
        return 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * self.model.embedding.weight.element_size()


def names(texts: Path) -> tuple[str, ...]:
    """The tasks that a folder of the user's has.

    Raises:
        ValueError: it has neither of LongBench's files nor prose.
    """
    needles = tuple(NEEDLES) if any(texts.glob("*.txt")) else ()
    found = (*longbench.names(texts), *needles)
    if not found:
        raise ValueError(f"{texts}: holds neither LongBench's files (qasper.jsonl, …) nor prose (*.txt)")
    return found


def substrate(
    name: str,
    generator: torch.Generator,
    *,
    quick: bool = False,
    model: Path | None = None,
    texts: Path | None = None,
    device: torch.device | str = "cpu",
) -> Substrate:
    """A model and the samples of a task.

    Args:
        name: one of `NAMES`, or of `names(texts)`.
        generator: source of the samples.
        quick: fewer of them.
        model: folder of a checkpoint; None stands for the testbed's.
        texts: folder of the user's; None stands for the testbed's tasks.
        device: of the model.
    """
    decoder, encoder = testbed.subject(model, device, torch.bfloat16)
    if texts is not None:
        return _of_the_users(Substrate(decoder, encoder, [], 0, _end_tokens(model)), name, generator, texts, quick)
    if name in NEEDLES:
        task, samples = testbed.tasks.task("needle"), _needles(name, generator, quick)
    else:
        task, count = testbed.tasks.task(name), QUICK_SAMPLES if quick else SAMPLES
        drawn = testbed.tasks.samples(name, count, LENGTH, generator)
        samples = [Sample(s.context, s.question, partial(_score, task.score, s.answer)) for s in drawn]
    return Substrate(decoder, encoder, samples, task.ANSWER_TOKENS)


def _score(score: Callable[[str, str], float], answer: str, prediction: str) -> float:
    return score(prediction, answer)


def _grid(quick: bool) -> list[tuple[float, float]]:
    """Parts of the longest text, and depths."""
    parts, depths = (QUICK_PARTS, QUICK_DEPTHS) if quick else (PARTS, DEPTHS)
    return [(part, depth) for part in parts for depth in depths]


def _needles(name: str, generator: torch.Generator, quick: bool) -> list[Sample]:
    """The testbed's needle at each length and depth; of 64 words, those count that stand in their places."""
    words, found = NEEDLES[name], []
    score = testbed.tasks.task("needle").score if name == "needle" else words_in_place
    for part, depth in _grid(quick):
        length = int(part * LENGTH)
        (s,) = testbed.tasks.samples("needle", 1, length, generator, depth=depth, words=words)
        found.append(Sample(s.context, s.question, partial(_score, score, s.answer), (depth, length)))
    return found


def words_in_place(prediction: str, answer: str) -> float:
    """Share of the answer's words that a prediction has in their places.

    Examples:
        >>> words_in_place("red fish blue", "red fish two")
        0.6666666666666666
    """
    given, right = prediction.split(), answer.split()
    return sum(a == b for a, b in zip(given, right, strict=False)) / len(right)


def _of_the_users(given: Substrate, name: str, generator: torch.Generator, texts: Path, quick: bool) -> Substrate:
    """Samples of a dataset of LongBench's, or needles in prose, from the user's folder, for a model and its tokenizer."""
    if name in NEEDLES:
        prose, digits = haystack.texts(texts), NEEDLES[name]
        draw = Random(int(torch.randint(2**62, (), generator=generator)))
        ends = [end for _, end in given.tokenizer.encode(prose, add_special_tokens=False).offsets]
        longest = min(given.model.config.max_positions - 2 * digits, len(ends))
        needles = [
            haystack.needle(given.tokenizer, prose[: ends[longest - 1]], int(part * longest), depth, digits, draw)
            for part, depth in _grid(quick)
        ]
        samples = [Sample(s.context, s.question, s.score, (s.depth, s.length)) for s in needles]
        return replace(given, samples=samples, answer_tokens=2 * digits)
    asked = longbench.dataset(name)
    samples = [Sample(*example) for example in longbench.read(texts, name, QUICK_SAMPLES if quick else None)]
    return replace(
        given, samples=samples, answer_tokens=asked.answer_tokens, one_line=asked.one_line, blank_lines=asked.one_line
    )


def _end_tokens(folder: Path | None) -> list[int]:
    """Tokens at which a checkpoint ends its answers, as its configuration has them."""
    found: list[int] = []
    for name in ("config.json", "generation_config.json") if folder else ():
        path = Path(folder or ".") / name
        told = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        found += told if isinstance(told, list) else [] if told is None else [told]
    return found


def fitting(given: Substrate, sample: Sample) -> tuple[list[int], list[int]]:
    """Tokens of context and question; where with the answer they are more than the model reads, the middle is left out, as LongBench does.

    Raises:
        ValueError: the model reads no more than the answer takes.
    """
    context = given.tokenizer.encode(sample.context).ids
    question = given.tokenizer.encode(sample.question, add_special_tokens=False).ids
    most = given.model.config.max_positions
    room = most - given.answer_tokens
    if room < 2:
        raise ValueError(
            f"an answer may have {given.answer_tokens} tokens, and the model reads {most}: take another model"
        )
    start, end = room // 2, len(context) + len(question) - (room - room // 2)
    if end > start:
        question = question[: max(start - len(context), 0)] + question[max(end - len(context), 0) :]
        context = context[:start] + context[end:]
    return context, question


def said(given: Substrate, sample: Sample, context: list[int]) -> Sample:
    """A sample with what is left of its context, for those who read text: no method sees more than the others."""
    whole = len(given.tokenizer.encode(sample.context).ids) == len(context)
    return sample if whole else sample._replace(context=given.tokenizer.decode(context))
