r"""LongBench's datasets in a local folder of JSON lines, one file a dataset, as its authors publish them.

Source: `longbench` (arXiv 2308.14508), Table 1; official code THUDM/LongBench@2e00731f8d0bff23dc4325161044d0ed8af94c1e,
`LongBench/pred.py`, `LongBench/eval.py` and `LongBench/config/dataset2maxlen.json`.

Differs from the paper: the sentences around context and question are those of `dataset2prompt.json`, which its authors publish
beside the code, where that file stands in the folder too; else context and input alone, which scores lower. No chat template is
put around them, and what stands after the context is tokenized apart from it. A summary of SAMSum's that begins with a line break goes on
behind it, where the code forbids the model to begin with one.

Not here: the datasets in Chinese; figures of LongBench-E by length.

    FOLDER/qasper.jsonl, hotpotqa.jsonl, …     or qasper_e.jsonl, of LongBench-E
    FOLDER/dataset2prompt.json                 optional
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from refimpl.long_context import longbench_metrics as metrics

PROMPTS = "dataset2prompt.json"
PLAIN = "{context}\n\n{input}\n"
Score = Callable[..., float]


class Dataset(NamedTuple):
    """How a dataset is asked and scored.

    Attributes:
        group: of tasks, as the paper has them.
        score: of a prediction and one right answer.
        answer_tokens: longest answer.
        one_line: whether only the answer's first line counts.
    """

    group: str
    score: Score
    answer_tokens: int
    one_line: bool = False


DATASETS = {
    "narrativeqa": Dataset("single-document QA", metrics.qa_f1, 128),
    "qasper": Dataset("single-document QA", metrics.qa_f1, 128),
    "multifieldqa_en": Dataset("single-document QA", metrics.qa_f1, 64),
    "hotpotqa": Dataset("multi-document QA", metrics.qa_f1, 32),
    "2wikimqa": Dataset("multi-document QA", metrics.qa_f1, 32),
    "musique": Dataset("multi-document QA", metrics.qa_f1, 32),
    "gov_report": Dataset("summarization", metrics.rouge_l, 512),
    "qmsum": Dataset("summarization", metrics.rouge_l, 512),
    "multi_news": Dataset("summarization", metrics.rouge_l, 512),
    "trec": Dataset("few-shot learning", metrics.classification, 64, one_line=True),
    "triviaqa": Dataset("few-shot learning", metrics.qa_f1, 32, one_line=True),
    "samsum": Dataset("few-shot learning", metrics.rouge_l, 128, one_line=True),
    "passage_count": Dataset("synthetic", metrics.count, 32),
    "passage_retrieval_en": Dataset("synthetic", metrics.retrieval, 32),
    "lcc": Dataset("code completion", metrics.code_similarity, 64),
    "repobench-p": Dataset("code completion", metrics.code_similarity, 64),
}


CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")


class Line(msgspec.Struct, rename={"question": "input", "classes": "all_classes"}):
    """A line of a file, but for what is not used here."""

    context: str
    question: str
    answers: list[str | int]
    classes: list[str] | None = None


class Example(NamedTuple):
    """A prompt in two parts, and the score of what is said to it."""

    context: str
    question: str
    score: Callable[[str], float]


def names(folder: Path) -> tuple[str, ...]:
    """The datasets that a folder has, in the paper's order, without those in Chinese.

    Raises:
        ValueError: a file of JSON lines is none of LongBench's datasets.
    """
    found = {path.stem: path for path in sorted(folder.glob("*.jsonl")) if path.stem not in CHINESE}
    if strange := [name for name in found if name.removesuffix("_e") not in DATASETS]:
        raise ValueError(
            f"{found[strange[0]]}: no dataset that is scored here; there are {', '.join(DATASETS)}, each also with _e at its end"
        )
    order = list(DATASETS)
    return tuple(sorted(found, key=lambda name: (order.index(name.removesuffix("_e")), name)))


def in_chinese(folder: Path) -> list[Path]:
    """The files of LongBench's that are not scored here."""
    return [path for path in sorted(folder.glob("*.jsonl")) if path.stem in CHINESE]


def dataset(name: str) -> Dataset:
    """A dataset by its file's name."""
    return DATASETS[name.removesuffix("_e")]


def read(folder: Path, name: str, most: int | None = None) -> list[Example]:
    """The first examples of a dataset; None stands for all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not what LongBench's lines are, or there is none.
    """
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it holds LongBench's {name}, one JSON object a line")
    template = _template(folder, name.removesuffix("_e"))
    found: list[Example] = []
    with path.open("rb") as lines:
        for number, text in enumerate(lines, 1):
            if most is not None and len(found) == most:
                break
            if text.strip():
                try:
                    found.append(_example(msgspec.json.decode(text, type=Line), template, dataset(name)))
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise ValueError(f"{path}:{number}: no line of LongBench's: {error}") from error
    if not found:
        raise ValueError(f"{path}: holds no line")
    return found


def _template(folder: Path, name: str) -> str:
    path = folder / PROMPTS
    if not path.is_file():
        return PLAIN
    try:
        template: str = msgspec.json.decode(path.read_bytes(), type=dict[str, str])[name]
    except (msgspec.DecodeError, KeyError) as error:
        raise ValueError(f"{path}: holds no prompt for {name!r}: {error}") from error
    if "{context}" not in template:
        raise ValueError(f"{path}: the prompt for {name!r} has no {{context}} in it")
    return template


def _example(line: Line, template: str, asked: Dataset) -> Example:
    before, after = (part.replace("{input}", line.question) for part in template.split("{context}", 1))
    answers = [str(answer) for answer in line.answers]
    return Example(before + line.context, after, partial(best_score, asked, answers, line.classes or []))


def best_score(asked: Dataset, answers: list[str], classes: list[str], prediction: str) -> float:
    """The best of a prediction's scores against the right answers."""
    if asked.one_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    more: dict[str, Any] = {"classes": classes} if asked.score is metrics.classification else {}
    return max((asked.score(prediction, answer, **more) for answer in answers), default=0.0)
