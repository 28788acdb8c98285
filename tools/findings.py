"""What the published benchmark of compressed caches found, and whether the arena `long_context` finds the same here.

A finding is an order: one mean of scores is above another. Scores are shares of the uncompressed model's on the same task, so that a
small model's figures can stand beside a large one's; both sides of each order are computed from the published figures, where
they have what it needs, and from those measured here.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

BASELINE = "full cache"
PUBLISHED = Path(__file__).parents[1] / "docs" / "published" / "long_context.yaml"
DROP = ("h2o", "streaming-llm", "scissorhands", "snapkv", "pyramidkv", "tova")
TASKS = ("single_doc_qa", "multi_doc_qa", "summarization", "few_shot", "retrieval", "code_completion")
Row = Mapping[str, Any]


class Missing(LookupError):
    """A figure that was not measured, or not published."""


@dataclass(frozen=True)
class Scores:
    """Scores by method, settings, task and switches.

    Args:
        rows: each `{"method", "settings", "axes", "figures"}`, as in an arena's document; figures of several seeds are averaged.
    """

    rows: Sequence[Row]

    def score(
        self, method: str, task: str, *, question: str = "seen", prefill: str = "whole", **settings: Any
    ) -> float:
        """Mean score of a method on a task.

        Raises:
            Missing: there is none.
        """
        point = {"task": task, "question": question, "prefill": prefill}
        found = [
            row["figures"]["score"]
            for row in self.rows
            if row["method"] == method
            and not row.get("error")
            and settings.items() <= row["settings"].items()
            and row["axes"] == {name: point[name] for name in row["axes"]}
        ]
        if not found:
            raise Missing(f"{method} {settings} on {task}, question {question}, prefill {prefill}")
        return statistics.fmean(found)

    def share(self, methods: str | Iterable[str], tasks: str | Iterable[str], **point: Any) -> float:
        """Mean over methods and tasks of the score over the uncompressed model's, whose prompt is read in the same way.

        A method of these that was not measured has no part in the mean; a task must be there.

        Raises:
            Missing: none of the methods was measured.
        """
        methods = [methods] if isinstance(methods, str) else list(methods)
        tasks = [tasks] if isinstance(tasks, str) else list(tasks)
        switches = {name: point[name] for name in ("question", "prefill") if name in point}
        shares = []
        for method in methods:
            try:
                scores = [(self.score(method, task, **point), self.score(BASELINE, task, **switches)) for task in tasks]
            except Missing as error:
                missing = error
                continue
            shares += [mine / full for mine, full in scores if full]
        if not shares:
            raise missing
        return statistics.fmean(shares)


class Order(NamedTuple):
    """Two figures of which the first should be above the second."""

    above: float
    below: float

    @property
    def holds(self) -> bool:
        """Whether it is."""
        return self.above > self.below


Measure = Callable[[Scores], tuple[float, float]]


class Finding(NamedTuple):
    """An order that the paper found.

    Attributes:
        says: the finding, in our words.
        above: what should be the larger figure.
        below: what should be the smaller.
        here: both, from what was measured here.
        published: both, from the published rows; None where these do not have it.
    """

    says: str
    above: str
    below: str
    here: Measure
    published: Measure | None = None


def _read_whole_and_in_chunks(scores: Scores) -> tuple[float, float]:
    """Means over the methods that were measured both ways."""
    found = []
    for method in DROP:
        try:
            found.append([scores.share(method, TASKS, compression=4, prefill=way) for way in ("whole", "chunks")])
        except Missing as error:
            missing = error
    if not found:
        raise missing
    whole, chunks = (statistics.fmean(shares) for shares in zip(*found, strict=True))
    return whole, chunks


def _worst(scores: Scores, methods: Sequence[str], **settings: Any) -> float:
    """The lowest share over the tasks, of the method whose lowest is highest."""
    lowest = []
    for method in methods:
        try:
            lowest.append(min(scores.share(method, task, **settings) for task in TASKS))
        except Missing:
            continue
    if not lowest:
        raise Missing(f"{', '.join(methods)} {settings}")
    return max(lowest)


EVICT = ("streaming-llm", "infllm")
FINDINGS = (
    Finding(
        "A prompt that is read uncompressed loses less than one that is compressed while it is read, at the same budget.",
        "4 times, compressed after the prompt",
        "4 times, compressed while it is read",
        _read_whole_and_in_chunks,
        lambda s: (s.share("h2o", TASKS, compression=4), s.share(EVICT, TASKS, compression=4)),
    ),
    Finding(
        "Quantization keeps every task: its worst is above the worst of whatever drops tokens or words.",
        "worst task of KIVI at 4 bits",
        "worst task of the best that drops tokens or words, 4 times",
        *[lambda s: (_worst(s, ["kivi"], bits=4), _worst(s, [*DROP, "infllm", "llmlingua2"], compression=4))] * 2,
    ),
    Finding(
        "Dropping tokens spares few-shot learning and hurts retrieval.",
        "StreamingLLM and InfLLM at 4 times, few-shot learning",
        "the same, retrieval",
        *[lambda s: (s.share(EVICT, "few_shot", compression=4), s.share(EVICT, "retrieval", compression=4))] * 2,
    ),
    Finding(
        "Dropping tokens keeps code completion, and can raise it; shortening the prompt ruins it.",
        "StreamingLLM and InfLLM at 4 times, code completion",
        "LLMLingua-2 at 4 times, code completion",
        *[
            lambda s: (
                s.share(EVICT, "code_completion", compression=4),
                s.share("llmlingua2", "code_completion", compression=4),
            )
        ]
        * 2,
    ),
    Finding(
        "Shortening the prompt costs code completion more than questions over documents.",
        "LLMLingua-2 at 4 times, questions over several documents",
        "the same, code completion",
        *[
            lambda s: (
                s.share("llmlingua2", "multi_doc_qa", compression=4),
                s.share("llmlingua2", "code_completion", compression=4),
            )
        ]
        * 2,
    ),
    Finding(
        "Purely linear-time models fail at retrieval; some attention helps.",
        "Griffin, retrieval",
        "Mamba and RWKV, retrieval",
        *[lambda s: (s.share("griffin", "retrieval"), s.share(["mamba", "rwkv"], "retrieval"))] * 2,
    ),
    Finding(
        "Hybrids find needles that purely linear-time models lose.",
        "Griffin, needle",
        "Mamba and RWKV, needle",
        lambda s: (s.share("griffin", "needle"), s.share(["mamba", "rwkv"], "needle")),
    ),
    Finding(
        "Short answers flatter methods that drop tokens while decoding: the first token still comes from the full cache.",
        "H2O at 4 times, needle of 7 words",
        "the same, needle of 64 words",
        lambda s: (s.share("h2o", "needle", compression=4), s.share("h2o", "needle_64", compression=4)),
        lambda _: (1.0, 0.708),
    ),
)


class Answer(NamedTuple):
    """A finding with both orders; None where figures are missing."""

    finding: Finding
    published: Order | None
    here: Order | None


def answers(document: Mapping[str, Any], path: Path = PUBLISHED) -> list[Answer]:
    """All findings, held against an arena's document."""
    here, there = Scores(document["rows"]), Scores(published_rows(read(path)))
    return [Answer(f, _order(f.published, there), _order(f.here, here)) for f in FINDINGS]


def _order(measure: Measure | None, scores: Scores) -> Order | None:
    try:
        return None if measure is None else Order(*measure(scores))
    except Missing:
        return None


def read(path: Path = PUBLISHED) -> dict[str, Any]:
    """The published figures and where they come from."""
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def published_rows(published: Mapping[str, Any]) -> list[Row]:
    """The published figures as rows of an arena, on a scale of 0 to 1."""
    return [
        {
            "method": row["method"],
            "settings": row["settings"],
            "axes": {"task": task},
            "figures": {"score": score / 100},
        }
        for row in published["rows"]
        for task, score in zip(published["tasks"], row["scores"], strict=True)
    ]


class Beside(NamedTuple):
    """A published row and the same method here: on each task, the share of the uncompressed score that is left."""

    method: str
    settings: dict[str, Any]
    published: list[float]
    here: list[float | None]


def side_by_side(document: Mapping[str, Any], path: Path = PUBLISHED) -> list[Beside]:
    """Each published row but the uncompressed one, beside what was measured here."""
    published = read(path)
    there, here = Scores(published_rows(published)), Scores(document["rows"])
    found = []
    for row in published["rows"]:
        if row["method"] != BASELINE:
            theirs = [there.share(row["method"], task, **row["settings"]) for task in published["tasks"]]
            ours = [_share(here, row["method"], task, row["settings"]) for task in published["tasks"]]
            found.append(Beside(row["method"], row["settings"], theirs, ours))
    return found


def _share(scores: Scores, method: str, task: str, settings: Mapping[str, Any]) -> float | None:
    try:
        return scores.share(method, task, **settings)
    except Missing:
        return None
