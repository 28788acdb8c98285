r"""What is given up when the cache is compressed: tasks over a long text, by a small model that does them well without.

The substrate is the testbed's model in bfloat16, or a checkpoint of the user's, and samples of the testbed's tasks: a text of
`LENGTH` tokens with what is asked for somewhere in it; the needle on a grid of lengths and depths, once with 7 words to be
found and once with 64 (`needle_64`). In the place of these tasks it takes texts of the user's: LongBench's JSON lines with
LongBench's own scores, and prose in which pass keys of 7 and 64 digits are hidden. What is longer than the model reads loses its
middle, for all methods alike.

A prompt is read, the method is told that it is over (`compress_prefill`), and the answer is decoded greedily up to the end of its
line, sample by sample. Two things that benchmarks fix in silence are axes here. `question`: whether the cache may see it while it
compresses (`seen`), or is given the text alone and the question after (`hidden`). `prefill`: whether the prompt is read at once, so that
a method that compresses as tokens come does so only after the whole is read, or in chunks of `CHUNK`, each of which sees what
was left of those before.

A method's settings are its own, but for one: `compression` stands for the `budget` that is so many times below what was read
(`tokens_to_keep`), sample by sample, so that all methods that drop tokens have the same. The figure `compression` counts
bytes, and so is less than the setting where a cache holds more than its budget of tokens: room to append, scores. The full cache has
room for the prompt from the first, and later for a few tokens more than it holds.

Methods join in one of four ways: by `cache(config)`; those that are fitted to a model by `calibrated(model, texts)` before, on training
text; those that shorten the prompt by `compressor(tokenizer, model)`: then the full cache holds what they leave of the text, with
the question as many tokens as a cache of the same setting would; and mixers in the place of attention by `language_model`: they
answer with a model of their own, of the testbed's size and trained on the same rows (`trained`), whose state stands for the cache,
against the bytes of the testbed's.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refimpl import testbed
from refimpl.architecture.alternatives import trained
from refimpl.architecture.alternatives.language_model import LanguageModel, States
from refimpl.arena.protocol import Conditions, Metric, clock
from refimpl.inference.kv_cache.protocol import tokens_to_keep
from refimpl.long_context import questions
from refimpl.long_context.questions import LENGTH, Sample, Substrate
from refimpl.model.cache import Cache, FullCache
from refimpl.model.model import Decoder

CHUNK, LEAST = 128, 8
WINDOWS, QUICK_WINDOWS, WINDOW = 16, 4, 256  # of training text, for methods that are calibrated

ABOUT = (
    f"A model in bfloat16 answers questions on long texts (the testbed's on up to {LENGTH} tokens, unless others are given) from a "
    "compressed cache: the task's own score, bytes held after the prompt and at the end, and time to read and to decode."
)
VERSION = 3
METRICS = (
    Metric("score", "task's own, 0 to 1", "higher"),
    Metric("compression", "times fewer bytes than all tokens' after the prompt", "higher"),
    Metric("prompt_bytes", "bytes after the prompt", "lower"),
    Metric("final_bytes", "bytes after the answer", "lower"),
    Metric("prefill_seconds", "seconds", "lower", exact=False),
    Metric("seconds_per_token", "seconds", "lower", exact=False),
)
BASELINE = "full cache"
AXES: dict[str, tuple[Any, ...]] = {
    "task": questions.NAMES,
    "question": ("seen", "hidden"),
    "prefill": ("whole", "chunks"),
}
QUICK: dict[str, tuple[Any, ...]] = {"task": ("needle",), "question": ("seen",), "prefill": ("whole",)}


@dataclass(frozen=True)
class Answer:
    """One sample's: what was said, tokens read when the method was told that the prompt is over, bytes, seconds."""

    text: str
    read: int
    prompt_bytes: int
    final_bytes: int
    prefill_seconds: float
    decode_seconds: float
    decoded: int


def axes_of(texts: Path) -> dict[str, tuple[Any, ...]]:
    """The axes where a folder of the user's has the tasks."""
    return {**AXES, "task": questions.names(texts)}


def substrate(conditions: Conditions) -> Substrate:
    """The model and the samples of the cell's task."""
    return questions.substrate(
        conditions.axes["task"],
        conditions.generator,
        quick=conditions.quick,
        model=conditions.model,
        texts=conditions.texts,
        device=conditions.device,
    )


def baseline(conditions: Conditions) -> dict[str, float]:
    """All keys and values, in the model's 16 bits."""
    given = substrate(conditions)
    return figures(given, conditions, partial(_full, given))


def measure(implementation: Any, settings: dict[str, Any], conditions: Conditions) -> dict[str, float]:
    """The method `implementation(**settings)`, in the way that it joins.

    Raises:
        TypeError: it joins in none.
        ValueError: it has a model of its own, and one was given.
    """
    mixer = callable(getattr(implementation, "language_model", None))
    if mixer and conditions.model is not None:
        raise ValueError(
            f"--model {conditions.model}: {implementation.__name__} stands in the place of attention and answers with a model "
            "trained for it; it can't be run inside another one"
        )
    given = substrate(conditions)
    if mixer:
        own_model = trained.load(implementation).to(conditions.device)
        return figures(given, conditions, lambda _: States(), model=own_model)
    own = dict(settings)
    if callable(getattr(implementation, "compressor", None)):
        times = own.pop("compression")
        compressor = implementation(**own).compressor(given.tokenizer, given.model)

        def shorten(sample: Sample, context: list[int], question: int) -> list[int]:
            special = len(given.tokenizer.encode("").ids)
            budget = max(1, tokens_to_keep(len(context) - special + question, times, LEAST) - question)
            asked = sample.question if question else ""
            kept: list[int] = compressor.compress([sample.context], [budget], [asked])[0].ids.tolist()
            return [*context[:special], *kept]

        return figures(given, conditions, partial(_full, given), shorten)
    if not callable(getattr(implementation, "cache", None)):
        raise TypeError(
            f"{implementation.__name__} has none of `cache(config)`, `compressor(tokenizer, model)` and "
            "`language_model(shape, generator)`, through which methods join this arena"
        )
    if callable(getattr(implementation, "calibrated", None)):
        windows = QUICK_WINDOWS if conditions.quick else WINDOWS
        text = testbed.Subject(given.model, given.tokenizer).text("train", windows * WINDOW)
        fitted = implementation(**own).calibrated(given.model, list(text.view(windows, WINDOW)))
        return figures(given, conditions, lambda _: fitted.cache(given.model.config))

    def cache(read: int) -> Cache:
        budget = {"budget": tokens_to_keep(read, own["compression"], LEAST)} if "compression" in own else {}
        rest = {name: value for name, value in own.items() if name != "compression"}
        made: Cache = implementation(**rest, **budget).cache(given.model.config)
        return made

    return figures(given, conditions, cache)


def _full(given: Substrate, read: int) -> Cache:
    """With room for the prompt from the first, so that it holds as much however it is read; a layer with a window holds less of one in chunks."""
    return FullCache(given.model.config.sliding_window, reserve=read)


def figures(
    given: Substrate,
    conditions: Conditions,
    cache: Callable[[int], Cache | States],
    shorten: Callable[[Sample, list[int], int], list[int]] | None = None,
    model: LanguageModel | None = None,
) -> dict[str, float]:
    """Answer every sample, and average; where needles were looked for, a map of the scores goes to the curves.

    Args:
        given: model and samples.
        conditions: the cell's.
        cache: makes an empty cache, from the number of tokens that will be read when it compresses.
        shorten: the context's tokens that are read, given all of them and how many tokens of question are read with them; None
            reads all.
        model: that answers; None is the substrate's.
    """
    answers = [answer(given, sample, conditions, cache, shorten, model) for sample in given.samples]
    scores = [sample.score(answer.text) for sample, answer in zip(given.samples, answers, strict=True)]
    found = [(*s.at, score) for s, score in zip(given.samples, scores, strict=True) if s.at is not None]
    if found:
        conditions.curves["score over depth and length"] = found
    return {
        "score": statistics.fmean(scores),
        "compression": sum(a.read for a in answers) * given.token_bytes / sum(a.prompt_bytes for a in answers),
        "prompt_bytes": statistics.fmean(a.prompt_bytes for a in answers),
        "final_bytes": statistics.fmean(a.final_bytes for a in answers),
        "prefill_seconds": statistics.median(a.prefill_seconds for a in answers),
        "seconds_per_token": sum(a.decode_seconds for a in answers) / max(1, sum(a.decoded for a in answers)),
    }


@torch.no_grad()
def answer(
    given: Substrate,
    sample: Sample,
    conditions: Conditions,
    cache: Callable[[int], Cache | States],
    shorten: Callable[[Sample, list[int], int], list[int]] | None = None,
    model: LanguageModel | None = None,
) -> Answer:
    """Read a sample's prompt, compress, and decode the answer greedily; arguments as in `figures`."""
    device, axes, answering = conditions.device, conditions.axes, model or given.model
    context, question = questions.fitting(given, sample)
    seen = axes["question"] == "seen"
    whole = len(context) + len(question) * seen
    sample = questions.said(given, sample, context)
    start = clock(device)
    if shorten is not None:
        context = shorten(sample, context, len(question) * seen)
    first, after = (context + question, []) if seen else (context, question)
    memory = cache(len(first))
    hidden = _read(answering, first, memory, CHUNK if axes["prefill"] == "chunks" else len(first))
    memory.compress_prefill()
    prompt_bytes = memory.nbytes
    if after:
        hidden = _read(answering, after, memory, len(after))
    following = int(answering.logits(hidden[0, -1]).argmax())
    began = clock(device)
    said = [following]
    while len(said) < given.answer_tokens and not _over(given, said):
        hidden = _read(answering, said[-1:], memory, 1)
        said.append(int(answering.logits(hidden[0, -1]).argmax()))
    seconds = clock(device) - began
    spoken = said[:-1] if said[-1] in given.ends else said
    text = _text(given, spoken)
    text = text.split("\n")[0] if given.one_line else text
    return Answer(text, whole, prompt_bytes, memory.nbytes, began - start, seconds, len(said) - 1)


def _over(given: Substrate, said: list[int]) -> bool:
    return said[-1] in given.ends or (given.one_line and "\n" in _text(given, said))


def _text(given: Substrate, said: list[int]) -> str:
    text = given.tokenizer.decode(said)
    return text.lstrip("\n") if given.blank_lines else text


def _read(model: Decoder | LanguageModel, tokens: Sequence[int], cache: Any, chunk: int) -> Tensor:
    """Normalized outputs of the last chunk, `[1, time, d_model]`."""
    for part in torch.split(torch.tensor([tokens], device=model.embedding.weight.device), chunk, dim=1):
        hidden = model.hidden(part, cache)
    return hidden
