"""What the published benchmark of compressed caches found, and whether the arena `long_context` finds the same here.

A finding is an order: one mean of scores is above another. Scores are shares of the uncompressed model's on the same task, so that a
small model's figures can stand beside a large one's; both sides of each order are computed from the published figures, where
they have what it needs, and from those measured here, of each seed by itself. A method's prompt is read as it was for the published
figures (`READ`), unless the order is about just that.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from safetensors import safe_open

from refimpl.views import mean_text, settings_text

BASELINE = "full cache"
PUBLISHED = Path(__file__).parents[1] / "docs" / "published" / "long_context.yaml"
TESTBED = Path(__file__).parents[1] / "refimpl" / "testbed" / "checkpoint" / "training.json"
READ = {"streaming-llm": "chunks"}  # all others whole; InfLLM takes what it is given in chunks of its own
TASKS = ("single_doc_qa", "multi_doc_qa", "summarization", "few_shot", "retrieval", "code_completion")
Row = Mapping[str, Any]


class Missing(LookupError):
    """A figure that was not measured, or not published, or that is no number."""


@dataclass(frozen=True)
class Scores:
    """Scores by method, settings, task and switches.

    Args:
        rows: each `{"method", "settings", "axes", "figures"}`, as in an arena's document; figures of several seeds are averaged.
    """

    rows: Sequence[Row]

    def score(
        self, method: str, task: str, *, question: str = "seen", prefill: str | None = None, **settings: Any
    ) -> float:
        """Mean score of a method on a task; without `prefill` its prompt is read as it was for the published figures.

        Raises:
            Missing: there is none.
        """
        point = {"task": task, "question": question, "prefill": prefill or READ.get(method, "whole")}
        found = [
            row["figures"]["score"]
            for row in self.rows
            if row["method"] == method
            and not row.get("error")
            and settings.items() <= row["settings"].items()
            and row["axes"] == {name: point[name] for name in row["axes"]}
        ]
        if not found:
            raise Missing(f"{method} {settings} on {point}")
        return statistics.fmean(found)

    def full(self, method: str, task: str, *, question: str = "seen", prefill: str | None = None) -> float:
        """What the uncompressed model scores on a task when its prompt is read as the method's is.

        Raises:
            Missing: it was not measured, or is 0, so that there is no share of it.
        """
        way = prefill or READ.get(method, "whole")
        if not (found := self.score(BASELINE, task, question=question, prefill=way)):
            raise Missing(f"{BASELINE} scores 0 on {task}, question {question}, prefill {way}")
        return found

    def share(self, methods: str | Iterable[str], tasks: str | Iterable[str], **point: Any) -> float:
        """Mean over methods and tasks of the score over the uncompressed model's, whose prompt is read in the same way.

        Raises:
            Missing: one of the methods has no score on one of the tasks, or the uncompressed model none above 0.
        """
        methods = [methods] if isinstance(methods, str) else list(methods)
        tasks = [tasks] if isinstance(tasks, str) else list(tasks)
        switches = {name: point[name] for name in ("question", "prefill") if name in point}
        return statistics.fmean(
            self.score(method, task, **point) / self.full(method, task, **switches)
            for method in methods
            for task in tasks
        )


@dataclass(frozen=True)
class Orders:
    """Two figures of which the first should be above the second, in each seed that has both; published figures have no seeds.

    Examples:
        >>> found = Orders([(0.75, 0.5), (0.25, 0.5)])
        >>> found.text, found.held, found.answer
        ('0.5 ±0.2, 0.5', 1, 'undecided')
    """

    pairs: Sequence[tuple[float, float]]

    @property
    def held(self) -> int:
        """In how many seeds it is above."""
        return sum(above > below for above, below in self.pairs)

    @property
    def answer(self) -> str:
        """Whether it is above: in all seeds yes, in none no."""
        if not self.pairs:
            return "no figures"
        return "yes" if self.held == len(self.pairs) else "undecided" if self.held else "no"

    @property
    def text(self) -> str:
        """Both figures, as the tables show them."""
        rows = [{"figures": {"above": above, "below": below}} for above, below in self.pairs]
        return f"{mean_text(rows, 'above')}, {mean_text(rows, 'below')}" if rows else "–"


Measure = Callable[[Scores], tuple[float, float]]


class Finding(NamedTuple):
    """An order that the paper found.

    Attributes:
        says: the finding, in our words.
        above: what should be the larger figure.
        below: what should be the smaller.
        here: both, from what was measured here.
        published: both, from the published rows; None computes them as those here.
        why: the reason, where one is known, if the answer here is no.
    """

    says: str
    above: str
    below: str
    here: Measure
    published: Measure | None = None
    why: str = ""


def _worst(scores: Scores, methods: Sequence[str], **settings: Any) -> float:
    """The lowest share over the tasks, of the method whose lowest is highest."""
    return max(min(scores.share(method, task, **settings) for task in TASKS) for method in methods)


AS_THEY_COME = ("h2o", "streaming-llm", "scissorhands", "tova")  # drop tokens whenever there are new ones
WHILE_READING = ("streaming-llm", "infllm")  # compressed the prompt while they read it, in the published figures
LINEAR = ("mamba", "rwkv")
FINDINGS = (
    Finding(
        "A prompt that is read uncompressed loses less than one that is compressed while it is read, at the same budget.",
        "4 times, compressed once the prompt is read: H2O; here StreamingLLM, Scissorhands and TOVA too",
        "4 times, compressed while it is read: StreamingLLM and InfLLM; here the same methods as above",
        lambda s: (
            s.share(AS_THEY_COME, TASKS, compression=4, prefill="whole"),
            s.share(AS_THEY_COME, TASKS, compression=4, prefill="chunks"),
        ),
        lambda s: (s.share("h2o", TASKS, compression=4), s.share(WHILE_READING, TASKS, compression=4)),
    ),
    Finding(
        "Quantization keeps every task: its worst is above the worst of whatever drops tokens or words.",
        "worst task of KIVI at 4 bits",
        "worst task of the best of H2O, StreamingLLM, InfLLM and LLMLingua-2, 4 times",
        lambda s: (_worst(s, ["kivi"], bits=4), _worst(s, ["h2o", *WHILE_READING, "llmlingua2"], compression=4)),
    ),
    Finding(
        "Dropping tokens spares few-shot learning and hurts retrieval.",
        "StreamingLLM and InfLLM at 4 times, few-shot learning",
        "the same, retrieval",
        lambda s: (
            s.share(WHILE_READING, "few_shot", compression=4),
            s.share(WHILE_READING, "retrieval", compression=4),
        ),
    ),
    Finding(
        "Dropping tokens spares few-shot learning and hurts questions over one document.",
        "StreamingLLM and InfLLM at 4 times, few-shot learning",
        "the same, questions over one document",
        lambda s: (
            s.share(WHILE_READING, "few_shot", compression=4),
            s.share(WHILE_READING, "single_doc_qa", compression=4),
        ),
    ),
    Finding(
        "Dropping tokens keeps code completion; shortening the prompt ruins it.",
        "StreamingLLM and InfLLM at 4 times, code completion",
        "LLMLingua-2 at 4 times, code completion",
        lambda s: (
            s.share(WHILE_READING, "code_completion", compression=4),
            s.share("llmlingua2", "code_completion", compression=4),
        ),
        why="what completes a call here is a definition that stands far back: it goes with the tokens that are dropped, and LLMLingua-2's classifier "
        "was taught to keep such lines, where the last lines of a program, which are not dropped, say much of how LongBench's go on",
    ),
    Finding(
        "Dropping tokens can raise code completion above what the uncompressed model does.",
        "StreamingLLM and InfLLM at 8 times, code completion",
        "the uncompressed model, code completion",
        lambda s: (s.share(WHILE_READING, "code_completion", compression=8), 1.0),
        why="the uncompressed model makes no mistake on this task, so that nothing can be above it",
    ),
    Finding(
        "Shortening the prompt costs code completion more than questions over documents.",
        "LLMLingua-2 at 4 times, questions over several documents",
        "the same, code completion",
        lambda s: (
            s.share("llmlingua2", "multi_doc_qa", compression=4),
            s.share("llmlingua2", "code_completion", compression=4),
        ),
        why="the classifier was taught here to keep the very lines of a program that are asked for",
    ),
    Finding(
        "Purely linear-time models fail at retrieval; some attention helps.",
        "Griffin, retrieval",
        "Mamba and RWKV, retrieval",
        lambda s: (s.share("griffin", "retrieval"), s.share(LINEAR, "retrieval")),
        why="most of what is asked for stands further back than Griffin's window of 256 tokens reaches; Mamba finds a part of it, RWKV nothing",
    ),
    Finding(
        "Some attention helps linear-time models with code completion.",
        "Griffin, code completion",
        "Mamba and RWKV, code completion",
        lambda s: (s.share("griffin", "code_completion"), s.share(LINEAR, "code_completion")),
    ),
    Finding(
        "Hybrids find needles that purely linear-time models lose.",
        "Griffin, needle",
        "Mamba and RWKV, needle",
        lambda s: (s.share("griffin", "needle"), s.share(LINEAR, "needle")),
    ),
    Finding(
        "Short answers flatter methods that drop tokens while decoding: the first token still comes from the full cache.",
        "H2O at 4 times, needle of 7 words or digits",
        "the same, needle of 64",
        lambda s: (s.share("h2o", "needle", compression=4), s.share("h2o", "needle_64", compression=4)),
        lambda s: (s.score("h2o", "needle", compression=4), s.score("h2o", "needle_64", compression=4)),
    ),
    Finding(
        "Dropping tokens while decoding loses a long needle that quantization keeps.",
        "KIVI at 2 bits, needle of 64 words or digits",
        "H2O at 4 times, the same",
        lambda s: (s.share("kivi", "needle_64", bits=2), s.share("h2o", "needle_64", compression=4)),
        lambda s: (s.score("kivi", "needle_64", bits=2), s.score("h2o", "needle_64", compression=4)),
    ),
)


class Answer(NamedTuple):
    """A finding with its orders there and here."""

    finding: Finding
    published: Orders
    here: Orders


def answers(document: Mapping[str, Any], path: Path = PUBLISHED) -> list[Answer]:
    """All findings, held against an arena's document."""
    here, there = _by_seed(document["rows"]), _by_seed(published_rows(read(path)))
    return [Answer(f, _orders(f.published or f.here, there), _orders(f.here, here)) for f in FINDINGS]


def _by_seed(rows: Iterable[Row]) -> list[Scores]:
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(row.get("seed"), []).append(row)
    return [Scores(own) for own in found.values()]


def _orders(measure: Measure, seeds: Iterable[Scores]) -> Orders:
    pairs = []
    for scores in seeds:
        try:
            pairs.append(measure(scores))
        except Missing:
            continue
    return Orders(pairs)


def read(path: Path = PUBLISHED) -> dict[str, Any]:
    """The published figures and where they come from."""
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def published_rows(published: Mapping[str, Any]) -> list[Row]:
    """The published figures as rows of an arena, on a scale of 0 to 1; those with models that have no part in the findings are left out."""
    return [
        {
            "method": row["method"],
            "settings": row["settings"],
            "axes": {"task": task},
            "figures": {"score": score / 100},
        }
        for table in (published, published["needle"])
        for row in table["rows"]
        for task, score in zip(table["tasks"], row["scores"], strict=True)
        if score is not None
    ]


class Beside(NamedTuple):
    """A published row and the same method here, in percent; None where there is no figure."""

    method: str
    settings: str
    published: Sequence[float | None]
    here: Sequence[float | None]


class Tables(NamedTuple):
    """The published rows.

    Attributes:
        tasks: what is left of the uncompressed model's score on each task, and of its mean over all datasets.
        needle: scores.
        means: with each further model, what is left of its uncompressed mean; nothing here.
    """

    tasks: list[Beside]
    needle: list[Beside]
    means: list[Beside]


def side_by_side(document: Mapping[str, Any], path: Path = PUBLISHED) -> Tables:
    """Each published row but the uncompressed ones, beside means over the seeds of what was measured here."""
    published, here = read(path), Scores(document["rows"])
    tasks, datasets, needle = published["tasks"], published["datasets"], published["needle"]

    def left(row: Row) -> list[float | None]:
        own = [_known(here.score, row["method"], task, **row["settings"]) for task in tasks]
        return _left(own, [_known(here.full, row["method"], task) for task in tasks], datasets)

    def found(row: Row) -> list[float | None]:
        scores = [_known(here.score, row["method"], task, **row["settings"]) for task in needle["tasks"]]
        return [None if score is None else 100 * score for score in scores]

    full, *rows = published["rows"]
    others = [
        [(row, _left(row["scores"], own[0]["scores"], datasets)[-1]) for row in own[1:]]
        for own in published["other_models"].values()
    ]
    return Tables(
        [_beside(row, _left(row["scores"], full["scores"], datasets), left(row)) for row in rows],
        [_beside(row, row["scores"], found(row)) for row in needle["rows"]],
        [_beside(same[0][0], [mean for _, mean in same], []) for same in zip(*others, strict=True)],
    )


def _beside(row: Row, published: Sequence[float | None], here: Sequence[float | None]) -> Beside:
    notes = [row.get("model", ""), settings_text(dict(row))]
    return Beside(row["method"], ", ".join(filter(None, notes)), published, here)


def _known(figure: Callable[..., float], *args: Any, **point: Any) -> float | None:
    try:
        return figure(*args, **point)
    except Missing:
        return None


def _left(scores: Sequence[float | None], full: Sequence[float | None], datasets: Sequence[int]) -> list[float | None]:
    """Percent of the uncompressed scores that is left on each task, and of their mean over so many datasets of each."""
    columns = [*zip(scores, full, strict=True), (_mean(scores, datasets), _mean(full, datasets))]
    return [None if own is None or whole is None else 100 * own / whole for own, whole in columns]


def _mean(scores: Sequence[float | None], datasets: Sequence[int]) -> float | None:
    known = [score for score in scores if score is not None]
    return statistics.fmean(known, datasets) if len(known) == len(scores) else None


def learnt(weights: Mapping[str, Path], testbed: Path = TESTBED) -> dict[str, dict[str, float]]:
    """The last row of each model's training log: what it answered, by teacher forcing, when its training ended.

    Args:
        weights: files of trained mixers, by method; those that are not there are left out.
        testbed: the testbed's own log.
    """
    found = {f"the testbed's ({BASELINE})": json.loads(testbed.read_text(encoding="utf-8"))["log"][-1]}
    for method, path in weights.items():
        if path.is_file():
            with safe_open(path, "np") as file:
                found[method] = json.loads(file.metadata()["log"])[-1]
    return found
