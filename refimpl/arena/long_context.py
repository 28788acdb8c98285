r"""What is given up when the cache is compressed: tasks over a long text, by a small model that does them well without.

The substrate is the testbed's model in bfloat16, or a checkpoint of the user's, and samples of the testbed's tasks: a text of
`LENGTH` tokens with what is asked for somewhere in it. A prompt is read, the method is told that it is over
(`compress_prefill`), and the answer is decoded greedily up to the end of its line, sample by sample. Two things that benchmarks fix in
silence are axes here. `question`: whether the cache may see it while it compresses (`seen`), or is given the text alone and the
question after (`hidden`). `prefill`: whether the prompt is read at once, so that a method that compresses as tokens come
does so only after the whole is read, or in chunks of `CHUNK`, each of which sees what was left of those before.

A method's settings are its own, but for one: `compression` stands for the `budget` that is so many times below what was read
(`tokens_to_keep`), sample by sample, so that all methods that drop tokens have the same. The figure `compression` counts
bytes, and so is less than the setting where a cache holds more than its budget of tokens: room to append, scores.

Methods join by `cache(config)`, those that are fitted to a model after `calibrated(model, texts)` on training text, or, where they shorten the prompt instead, by `compressor(tokenizer, model)`: then the full cache
holds what they leave of the text, with the question as many tokens as a cache of the same setting would.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from refimpl import testbed
from refimpl.arena.protocol import Conditions, Metric, clock
from refimpl.inference.kv_cache.protocol import tokens_to_keep
from refimpl.model.cache import Cache, FullCache
from refimpl.model.config import Config
from refimpl.model.model import Decoder
from refimpl.testbed.sample import Sample

LENGTH, SAMPLES, QUICK_SAMPLES, CHUNK, LEAST = 896, 20, 4, 128, 8
WINDOWS, QUICK_WINDOWS, WINDOW = 16, 4, 256  # of training text, for methods that are calibrated

ABOUT = (
    f"The testbed's model in bfloat16 answers questions on texts of up to {LENGTH} tokens from a compressed cache: the task's own "
    "score, bytes held after the prompt and at the end, and time to read and to decode."
)
VERSION = 1
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
    "task": testbed.tasks.NAMES,
    "question": ("seen", "hidden"),
    "prefill": ("whole", "chunks"),
}
QUICK: dict[str, tuple[Any, ...]] = {"task": ("needle",), "question": ("seen",), "prefill": ("whole",)}


@dataclass(frozen=True)
class Substrate:
    """A model, its tokenizer, and the samples of one task with its score and the longest answer in tokens."""

    model: Decoder
    tokenizer: Tokenizer
    samples: Sequence[Sample]
    score: Callable[[str, str], float]
    answer_tokens: int


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


def substrate(conditions: Conditions) -> Substrate:
    """The model and the samples of the cell's task."""
    model, encoder = testbed.subject(conditions.model, conditions.device, torch.bfloat16)
    name = conditions.axes["task"]
    task = testbed.tasks.task(name)
    count = QUICK_SAMPLES if conditions.quick else SAMPLES
    samples = testbed.tasks.samples(name, count, LENGTH, conditions.generator)
    return Substrate(model, encoder, samples, task.score, task.ANSWER_TOKENS)


def baseline(conditions: Conditions) -> dict[str, float]:
    """All keys and values, in the model's 16 bits."""
    return figures(substrate(conditions), lambda config, _: FullCache(config.sliding_window), conditions)


def measure(implementation: Any, settings: dict[str, Any], conditions: Conditions) -> dict[str, float]:
    """The cache of `implementation(**settings)`, made anew for each sample; or a full cache of the prompt that it shortens.

    Raises:
        TypeError: the method neither makes a cache nor shortens prompts.
    """
    if callable(getattr(implementation, "compressor", None)):
        own = dict(settings)
        times = own.pop("compression")
        given = substrate(conditions)
        compressor = implementation(**own).compressor(given.tokenizer, given.model)

        def shorten(sample: Sample, question: int) -> list[int]:
            n = len(given.tokenizer.encode(sample.context, add_special_tokens=False).ids)
            budget = max(1, tokens_to_keep(n + question, times, LEAST) - question)
            said = sample.question if conditions.axes["question"] == "seen" else ""
            kept: list[int] = compressor.compress([sample.context], [budget], [said])[0].ids.tolist()
            return [*given.tokenizer.encode("").ids, *kept]

        return figures(given, lambda config, _: FullCache(config.sliding_window), conditions, shorten)
    if not callable(getattr(implementation, "cache", None)):
        raise TypeError(
            f"{implementation.__name__} has neither `cache(config)` nor `compressor(tokenizer, model)`, "
            "through which methods join this arena"
        )

    if callable(getattr(implementation, "calibrated", None)):
        given = substrate(conditions)
        windows = QUICK_WINDOWS if conditions.quick else WINDOWS
        text = testbed.Subject(given.model, given.tokenizer).text("train", windows * WINDOW)
        fitted = implementation(**settings).calibrated(given.model, list(text.view(windows, WINDOW)))
        return figures(given, lambda config, _: fitted.cache(config), conditions)

    def cache(config: Config, read: int) -> Cache:
        own = dict(settings)
        if "compression" in own:
            own["budget"] = tokens_to_keep(read, own.pop("compression"), LEAST)
        made: Cache = implementation(**own).cache(config)
        return made

    return figures(substrate(conditions), cache, conditions)


def figures(
    given: Substrate,
    cache: Callable[[Config, int], Cache],
    conditions: Conditions,
    shorten: Callable[[Sample, int], list[int]] | None = None,
) -> dict[str, float]:
    """Answer every sample, and average.

    Args:
        given: model and samples.
        cache: makes an empty cache, from the model's shape and the tokens that will be read when it compresses.
        conditions: the cell's.
        shorten: the context's tokens that are read, given how many tokens of question are read with them; None reads all.
    """
    answers = [answer(given, sample, cache, conditions, shorten) for sample in given.samples]
    config = given.model.config
    token_bytes = (
        2 * config.n_layers * config.n_kv_heads * config.head_dim * given.model.embedding.weight.element_size()
    )
    return {
        "score": statistics.fmean(given.score(a.text, s.answer) for a, s in zip(answers, given.samples, strict=True)),
        "compression": sum(a.read for a in answers) * token_bytes / sum(a.prompt_bytes for a in answers),
        "prompt_bytes": statistics.fmean(a.prompt_bytes for a in answers),
        "final_bytes": statistics.fmean(a.final_bytes for a in answers),
        "prefill_seconds": statistics.median(a.prefill_seconds for a in answers),
        "seconds_per_token": sum(a.decode_seconds for a in answers) / max(1, sum(a.decoded for a in answers)),
    }


@torch.no_grad()
def answer(
    given: Substrate,
    sample: Sample,
    cache: Callable[[Config, int], Cache],
    conditions: Conditions,
    shorten: Callable[[Sample, int], list[int]] | None = None,
) -> Answer:
    """Read a sample's prompt, compress, and decode the answer greedily."""
    device, axes = conditions.device, conditions.axes
    context = given.tokenizer.encode(sample.context).ids
    question = given.tokenizer.encode(sample.question, add_special_tokens=False).ids
    seen = axes["question"] == "seen"
    whole = len(context) + len(question) * seen
    start = clock(device)
    if shorten is not None:
        context = shorten(sample, len(question) * seen)
    first, after = (context + question, []) if seen else (context, question)
    chunk = CHUNK if axes["prefill"] == "chunks" else len(first)
    memory = cache(given.model.config, len(first))
    hidden = _read(given.model, first, memory, chunk)
    memory.compress_prefill()
    prompt_bytes = memory.nbytes
    if after:
        hidden = _read(given.model, after, memory, len(after))
    following = int(given.model.logits(hidden[0, -1]).argmax())
    began = clock(device)
    said = [following]
    while len(said) < given.answer_tokens and "\n" not in given.tokenizer.decode(said[-1:]):
        hidden = _read(given.model, said[-1:], memory, 1)
        said.append(int(given.model.logits(hidden[0, -1]).argmax()))
    seconds = clock(device) - began
    text = given.tokenizer.decode(said).split("\n")[0]
    return Answer(text, whole, prompt_bytes, memory.nbytes, began - start, seconds, len(said) - 1)


def _read(model: Decoder, tokens: Sequence[int], cache: Cache, chunk: int) -> Tensor:
    """Normalized outputs of the last chunk, `[1, time, d_model]`."""
    for part in torch.split(torch.tensor([tokens], device=model.embedding.weight.device), chunk, dim=1):
        hidden = model.hidden(part, cache)
    return hidden
