"""Training: what a step sees, what weighs, and that a stopped run goes on as if it had not been stopped."""

import json
from random import Random

import pytest
import torch
from torch.testing import assert_close

from refimpl.model.config import Config
from refimpl.model.load import load
from refimpl.testbed import tasks, train
from refimpl.testbed.sample import count
from refimpl.testbed.tokenizer import END_ID, VOCABULARY, tokenizer

TINY = Config(
    vocabulary=VOCABULARY,
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=1,
    head_dim=8,
    d_ff=24,
    tied_embeddings=True,
    qkv_bias=True,
)


@pytest.fixture
def tiny(monkeypatch):
    """A run of seconds: a tiny model, few rows, short contexts."""
    monkeypatch.setattr(train, "CONFIG", TINY)
    monkeypatch.setattr(train, "ROW_TOKENS", 4 * 256)
    monkeypatch.setattr(train, "STAGES", (SHORT,))


SHORT = train.Stage(4, (256,))


def test_a_steps_rows_depend_on_the_step_alone():
    again, other = train.batch_at(7, SHORT), train.batch_at(8, SHORT)
    assert torch.equal(train.batch_at(7, SHORT).tokens, again.tokens)
    assert not torch.equal(again.tokens, other.tokens)
    assert again.tokens.shape == again.roles.shape == (train.ROW_TOKENS // 256, 257)


def test_lengths_are_drawn_and_a_step_has_as_many_tokens_at_each():
    """Oracle: by hand, 8,192 tokens and one target a row."""
    mixed = train.Stage(1, (256, 256, 1024))
    shapes = {train.batch_at(step, mixed).tokens.shape for step in range(6)}
    assert shapes == {(32, 257), (8, 1025)}


def test_copies_repeat_and_are_targets_from_the_second_time_on():
    """Oracle: the period, found by comparing the row with itself; a stage of copies alone, one without."""
    tokens, roles = train.batch_at(0, train.Stage(1, (256,), copies=1.0))
    for row, role in zip(tokens, roles, strict=True):
        period = next(n for n in range(8, 65) if torch.equal(row[n:], row[:-n]))
        assert role.tolist() == [train.NOTHING] * period + [train.OTHER] * (257 - period)
    for row in train.batch_at(0, SHORT).tokens:
        assert not any(torch.equal(row[n:], row[:-n]) for n in range(8, 65))


def test_answers_are_told_from_the_text_and_the_end_from_both(generator):
    """Oracle: the sample's own texts, decoded from where the roles say that answers stand."""
    (sample,) = tasks.samples("single_doc_qa", 1, 256, generator)
    tokens, roles = train.encode(sample, 257)
    said = tokenizer().decode(tokens[roles == train.ANSWER].tolist())
    assert said == "".join(f"{answer}\n" for answer in (sample.answer, *(a for _, a in sample.more)))
    assert (tokens[roles == train.NOTHING] == END_ID).all()
    assert int((roles != train.NOTHING).sum()) == count(sample.context) + sum(
        count(f"{q}{a}\n") for q, a in ((sample.question, sample.answer), *sample.more)
    )


def test_a_sample_that_is_too_long_is_refused(generator):
    (sample,) = tasks.samples("needle", 1, 256, generator)
    with pytest.raises(ValueError, match=r"a sample of \d+ tokens does not fit in 99"):
        train.encode(sample, 99)


def test_longer_rows_ask_more():
    """Oracle: counting the questions in the text of rows of single-document QA."""

    def questions(length):
        rows = [train._task("single_doc_qa", length, Random(seed))[0] for seed in range(8)]
        return sum(tokenizer().decode(row.tolist()).count("Question: ") for row in rows) / len(rows)

    assert questions(1024) > 1.5 * questions(256)


def test_the_loss_is_the_mean_of_answers_plus_that_of_the_rest(tiny, tmp_path):
    """Oracle: token by token in float64, from the model's own log-probabilities in float32; bfloat16 rounds to 2^-8."""
    model = train.Run(tmp_path, train.fresh()).model
    batch = train.batch_at(0, SHORT)
    with torch.no_grad():
        model.embedding.weight.mul_(10)
        log_p = model(batch.tokens[:, :-1]).double().log_softmax(-1)
    cost = -log_p.gather(2, batch.tokens[:, 1:, None])[..., 0]
    hard = cost > cost.median()  # roles by what a token costs: the two means are far apart
    batch = batch._replace(roles=torch.where(hard, train.ANSWER, train.OTHER))
    batch.roles[:, 200:] = train.NOTHING
    batch = batch._replace(roles=torch.nn.functional.pad(batch.roles, (1, 0)))
    losses = {train.ANSWER: [], train.OTHER: [], train.NOTHING: []}
    for row, targets, roles in zip(log_p, batch.tokens[:, 1:].tolist(), batch.roles[:, 1:].tolist(), strict=True):
        for p, target, role in zip(row, targets, roles, strict=True):
            losses[role].append(-float(p[target]))
    expected = sum(sum(losses[role]) / len(losses[role]) for role in (train.ANSWER, train.OTHER))
    assert sum(losses[train.ANSWER]) > 1.2 * sum(losses[train.OTHER])
    assert_close(train.loss_of(model, batch).item(), expected, rtol=2**-8, atol=0)
    same = batch._replace(roles=torch.full_like(batch.roles, train.OTHER))
    assert train.loss_of(model, same).item() < 0.8 * expected  # negative control: the roles count


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tiny, tmp_path):
    whole = train.Run(tmp_path / "whole", train.fresh())
    for stage in whole:
        whole.advance(stage)
    for _ in range(2):  # two sittings of two steps
        part = train.Run(tmp_path / "part", train.fresh())
        for stage in part:
            part.advance(stage)
            if part.step % 2 == 0:
                break
        part.write()
    assert part.step == whole.step == 4
    for name, value in whole.model.state_dict().items():
        assert torch.equal(part.model.state_dict()[name], value), name


def test_the_command_trains_logs_and_publishes(tiny, tmp_path, monkeypatch):
    """Oracle: the files; the weights are those of the run's state, in bfloat16."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(train, "CHECKPOINT", checkpoint)
    monkeypatch.setattr(train, "teacher_forced", lambda model, name, rows, length: length / 1024)
    train.main(tmp_path / "run", every=2, compiled=False)
    log = json.loads((checkpoint / "training.json").read_text())
    assert [row["step"] for row in log["log"]] == [2, 4]
    assert log["log"][0]["needle"] == 0.25 and log["log"][0]["length"] == 256
    assert log["stages"] == [{"steps": 4, "lengths": [256], "copies": 0.0}]
    state, published = train.Run(tmp_path / "run", train.fresh()).model, load(checkpoint)
    assert_close(published.state_dict(), state.bfloat16().state_dict())
    assert (checkpoint / "tokenizer.json").read_text() == "{}"  # that of the corpus is left


def test_the_learning_rate_rises_stays_and_falls_to_nothing():
    """Oracle: by hand."""
    rates = [train.schedule(step, 4000) for step in range(4000)]
    assert rates[0] == 1 / train.WARMUP
    assert rates[train.WARMUP] == rates[4000 - train.DECAY] == 1
    assert rates[4000 - train.DECAY // 2] == 0.5
    assert rates[-1] == 1 / train.DECAY


def test_every_parameter_has_one_optimizer(tiny, tmp_path):
    run = train.Run(tmp_path, train.fresh())
    held = [id(p) for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in run.model.parameters())


def test_shares_sum_to_one_and_name_every_task():
    assert sum(train.SHARES.values()) == pytest.approx(1)
    assert set(train.SHARES) == {"text", *tasks.NAMES}


def test_teacher_forcing_counts_whole_answers(tiny, monkeypatch):
    """Oracle: a model that knows every next token scores 1, and one that is wrong in an answer's last token 0."""

    class Knows(torch.nn.Module):
        def __init__(self, spoil):
            super().__init__()
            self.spoil = spoil

        def forward(self, tokens):
            following = torch.roll(self.rows, -1, dims=1)[:, :-1]
            logits = torch.nn.functional.one_hot(following, VOCABULARY).float()
            return logits.roll(1, dims=-1) if self.spoil else logits

    seen = train.encode

    for spoil, score in ((False, 1.0), (True, 0.0)):
        model, rows = Knows(spoil), []

        def encode(sample, length, rows=rows, model=model):
            row = seen(sample, length)
            rows.append(row[0])
            model.rows = torch.stack(rows)
            return row

        monkeypatch.setattr(train, "encode", encode)
        assert train.teacher_forced(model, "few_shot", 3, 256) == score
