"""What the arena asks: the grid of needles, texts of the user's, and what is left out of a prompt that is too long."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from refimpl import testbed
from refimpl.long_context import questions
from refimpl.testbed.tokenizer import tokenizer


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    """Samples need a tokenizer, and of the model the tokens that it reads."""
    model = SimpleNamespace(config=SimpleNamespace(max_positions=1024))
    monkeypatch.setattr(testbed, "subject", lambda path, device, dtype: testbed.Subject(model, tokenizer()))


def asked(task, quick=False, **rest):
    return questions.substrate(task, torch.Generator().manual_seed(0), quick=quick, **rest)


def test_needles_stand_on_a_grid_of_lengths_and_depths():
    """Oracle: the texts themselves: their tokens, and the line that holds the phrase."""
    samples = asked("needle").samples
    assert [s.at for s in samples] == [(d, n) for n in (224, 448, 672, 896) for d in (0, 0.25, 0.5, 0.75, 1)]
    for sample in samples:
        depth, length = sample.at
        lines = sample.context.splitlines()
        (place,) = [i for i, line in enumerate(lines) if line.startswith("The pass phrase of")]
        assert place / (len(lines) - 1) == pytest.approx(depth, abs=0.6 / len(lines) + 0.01)
        tokens = len(tokenizer().encode(sample.context + sample.question).ids)
        assert length - 60 < tokens < length
    assert len(asked("needle", quick=True).samples) == 4


def test_seven_words_count_whole_and_sixty_four_in_place():
    """Oracle: the phrase that the text tells."""
    for task, words, part in (("needle", 7, 0.0), ("needle_64", 64, 63 / 64)):
        sample = asked(task, quick=True).samples[0]
        phrase = sample.context.split("The pass phrase of ")[1].split(": ")[1].splitlines()[0]
        assert len(phrase.split()) == words
        assert sample.score(f" {phrase}") == 1
        assert sample.score(f" {phrase.rpartition(' ')[0]}") == part
        assert sample.score(f" {phrase.partition(' ')[2]}") < 0.2  # all of them one place off


def test_other_tasks_are_the_testbeds():
    """Oracle: the task's own samples and score."""
    expected = testbed.tasks.samples("few_shot", 10, questions.LENGTH, torch.Generator().manual_seed(0))
    samples = asked("few_shot").samples
    assert [s.context for s in samples] == [s.context for s in expected]
    assert all(s.score(e.answer) == 1 and s.at is None for s, e in zip(samples, expected, strict=True))


def test_a_folder_of_the_users(tmp_path):
    """Oracle: the files, by hand: a dataset with its longest answer, needles of digits as far as the model reads."""
    with pytest.raises(ValueError, match="holds neither LongBench's files"):
        questions.names(tmp_path)
    line = {"input": "Where?", "context": "Rome.", "answers": ["Rome"], "all_classes": None}
    (tmp_path / "gov_report.jsonl").write_text(json.dumps(line))
    (tmp_path / "essay.txt").write_text("A long and quiet text. " * 400)
    assert questions.names(tmp_path) == ("gov_report", "needle", "needle_64")
    given = asked("gov_report", texts=tmp_path)
    assert (given.answer_tokens, given.one_line, given.ends) == (512, False, [])
    assert given.samples[0][:2] == ("Rome.", "\n\nWhere?\n")
    assert given.samples[0].score("Rome.") == pytest.approx(1)
    needles = asked("needle_64", texts=tmp_path).samples
    assert [s.at for s in needles[::5]] == [(0, n) for n in (224, 448, 672, 896)]


def test_needles_are_read_whole_by_a_tokenizer_that_begins_texts_with_a_token_of_its_own(tmp_path, monkeypatch):
    """Oracle: the model's length: prompt and answer fit, with the key in the middle as anywhere, and nothing is left out."""
    given = Tokenizer.from_str(tokenizer().to_str())
    given.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", given.encode("!").ids[0])])
    model = SimpleNamespace(config=SimpleNamespace(max_positions=1024))
    monkeypatch.setattr(testbed, "subject", lambda path, device, dtype: testbed.Subject(model, given))
    (tmp_path / "essay.txt").write_text("Long, quiet texts of unpronounceable Przemyśl. " * 400)
    found = asked("needle_64", texts=tmp_path)
    lengths = []
    for sample in found.samples:
        context, question = questions.fitting(found, sample)
        assert context == given.encode(sample.context).ids
        lengths.append(len(context) + len(question))
        assert sample.at[1] - 5 <= lengths[-1] <= sample.at[1]
    assert max(lengths) > 1024 - 128 - 5


def test_answers_end_where_the_checkpoint_says(tmp_path):
    """Oracle: by hand: both files of a checkpoint may say it, one token or several."""
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert questions._end_tokens(tmp_path) == [2, 2, 5]
    assert questions._end_tokens(None) == []


def test_the_middle_of_a_prompt_that_is_too_long_is_left_out():
    """Oracle: by hand: of 40 and 6 tokens 30 fit with the answer, half from the start, half to the end."""
    given = replace(asked("needle"), answer_tokens=20)
    given.model.config.max_positions = 50
    words = " ".join(str(i % 10) for i in range(20))
    sample = questions.Sample(words, " 7 7 7", lambda text: 0.0)
    context, question = (tokenizer().encode(text).ids for text in (words, " 7 7 7"))
    found, asking = questions.fitting(given, sample)
    room = 30 - len(question)
    assert asking == question
    assert found == context[:15] + context[len(context) - (room - 15) :] and len(found) == room < len(context)
    assert questions.said(given, sample, found).context == tokenizer().decode(found)
    given.model.config.max_positions = 999
    assert questions.fitting(given, sample) == (context, question)
    assert questions.said(given, sample, context) == sample


@pytest.mark.parametrize(("before", "after"), [(20, 2), (11, 11), (3, 19), (0, 22)])
def test_what_is_left_out_may_be_of_the_question(before, after):
    """Oracle: by hand: the first 4 and the last 5 of 22 tokens and more, wherever the question begins among them."""
    given = replace(asked("needle"), answer_tokens=20)
    given.model.config.max_positions = 29
    sample = questions.Sample(" x" * before, " 7" * after, lambda text: 0.0)
    whole = [tokenizer().encode(text).ids for text in sample[:2]]
    context, question = questions.fitting(given, sample)
    joined = whole[0] + whole[1]
    assert context + question == joined[:4] + joined[-5:]
    assert len(context) == min(4, len(whole[0])) + max(0, 5 - len(whole[1]))
    given.model.config.max_positions = 21
    with pytest.raises(ValueError, match="an answer may have 20 tokens, and the model reads 21"):
        questions.fitting(given, sample)


def test_words_in_place():
    assert questions.words_in_place("a b c d e", "a x c d") == 3 / 4
    assert questions.words_in_place("", "a") == 0
