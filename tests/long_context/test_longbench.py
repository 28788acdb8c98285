"""LongBench's files in a local folder: what is asked, how it is scored, and what is refused."""

import json

import pytest

from refimpl.long_context import longbench


def write(folder, name, *lines, prompts=None):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    if prompts is not None:
        (folder / longbench.PROMPTS).write_text(json.dumps(prompts), encoding="utf-8")


def line(**changes):
    """A line as LongBench has them."""
    return {
        "input": "Where?", "context": "Long text.", "answers": ["Rome", "in Rome"], "length": 3, "dataset": "x",
        "language": "en", "all_classes": None, "_id": "0",
    } | changes  # fmt: skip


def test_the_datasets_of_a_folder_come_in_the_papers_order(tmp_path):
    for name in ("lcc", "qasper_e", "narrativeqa"):
        write(tmp_path, name, line())
    assert longbench.names(tmp_path) == ("narrativeqa", "qasper_e", "lcc")
    assert longbench.dataset("qasper_e") == longbench.DATASETS["qasper"]


def test_prompts_are_those_published_with_the_data(tmp_path):
    """Oracle: by hand; what stands before the text is read with it, what stands after it is the question."""
    write(tmp_path, "qasper", line(context="{input} C"), prompts={"qasper": "Read: {context}\nQ: {input}\nA:"})
    (example,) = longbench.read(tmp_path, "qasper")
    assert (example.context, example.question) == ("Read: {input} C", "\nQ: Where?\nA:")


def test_without_published_prompts_context_and_input_stand_alone(tmp_path):
    write(tmp_path, "qasper", line(), "", line(context="Second."))
    first, second = longbench.read(tmp_path, "qasper")
    assert (first.context, first.question, second.context) == ("Long text.", "\n\nWhere?\n", "Second.")
    assert [e.context for e in longbench.read(tmp_path, "qasper", most=1)] == ["Long text."]


def test_the_best_of_the_right_answers_counts(tmp_path):
    """Oracle: by hand: two words of two against `in Rome`, and two of three against `Rome`."""
    write(tmp_path, "qasper", line())
    (example,) = longbench.read(tmp_path, "qasper")
    assert example.score("in Rome") == 1.0
    assert example.score("Rome it is") == pytest.approx(2 / 4)


def test_few_shot_answers_end_with_their_line_and_classes_are_the_lines(tmp_path):
    write(tmp_path, "trec", line(answers=["Date"], all_classes=["Date", "Place"]))
    write(tmp_path, "narrativeqa", line(answers=["Rome"]))
    assert longbench.read(tmp_path, "trec")[0].score("\nDate\nPlace") == 1.0
    assert longbench.read(tmp_path, "trec")[0].score("Date or Place") == 0.5
    assert longbench.read(tmp_path, "narrativeqa")[0].score("It is\nRome") == pytest.approx(2 / 4)


def test_every_dataset_of_the_english_benchmark_is_there():
    """Oracle: the paper's Table 1 without Chinese: 16 datasets; three each of QA, QA, summaries and few-shot, two and two."""
    groups = [asked.group for asked in longbench.DATASETS.values()]
    assert [groups.count(group) for group in dict.fromkeys(groups)] == [3, 3, 3, 3, 2, 2]


@pytest.mark.parametrize(
    ("content", "prompts", "message"),
    [
        ([line(), "{"], None, r"qasper\.jsonl:2: no line of LongBench's"),
        ([{"input": "?"}], None, r"qasper\.jsonl:1: .*context"),
        ([], None, r"qasper\.jsonl: holds no line"),
        ([line()], {"lcc": "{context}"}, r"dataset2prompt\.json: holds no prompt for 'qasper'"),
        ([line()], {"qasper": "{input}"}, r"the prompt for 'qasper' has no \{context\} in it"),
        ([line()], [1], r"dataset2prompt\.json: holds no prompt"),
    ],
)
def test_files_that_are_not_longbenchs(tmp_path, content, prompts, message):
    write(tmp_path, "qasper", *content, prompts=prompts)
    with pytest.raises(ValueError, match=message):
        longbench.read(tmp_path, "qasper")


def test_missing_and_unknown_datasets(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lcc\.jsonl: no such file"):
        longbench.read(tmp_path, "lcc")
    write(tmp_path, "other", line())
    with pytest.raises(ValueError, match=r"other\.jsonl: no dataset that is scored here; there are narrativeqa"):
        longbench.names(tmp_path)


def test_the_whole_published_folder_may_stand_there_chinese_is_left_out(tmp_path):
    """Oracle: the official list of the benchmark's 21 datasets, of which five are in Chinese."""
    for name in (*longbench.DATASETS, *longbench.CHINESE):
        write(tmp_path, name, line())
    assert longbench.names(tmp_path) == tuple(longbench.DATASETS)
    assert len(list(tmp_path.iterdir())) == 21
    assert {path.stem for path in longbench.in_chinese(tmp_path)} == {
        "multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh",
    }  # fmt: skip


def test_bytes_that_are_no_text_are_told_with_their_line(tmp_path):
    (tmp_path / "qasper.jsonl").write_bytes(json.dumps(line()).encode() + b'\n{"input": "\xff"}\n')
    with pytest.raises(ValueError, match=r"qasper\.jsonl:2: no line of LongBench's"):
        longbench.read(tmp_path, "qasper")


def test_a_right_answer_may_be_a_number(tmp_path):
    write(tmp_path, "passage_count", line(answers=[7]))
    assert longbench.read(tmp_path, "passage_count")[0].score("It is 7") == 1
