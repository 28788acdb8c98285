"""Distilling Step-by-Step: its loss against the official formula, its texts taken apart, and what rationales are worth."""

import itertools
import random
import re

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from refimpl.compression.distillation.black_box.distilling_step_by_step import (
    DistillingStepByStep,
    Example,
    explained,
    few_shot,
    taken_apart,
)
from refimpl.compression.distillation.protocol import Sequences, label_loss
from refimpl.model.config import Config
from refimpl.model.generate import generate
from refimpl.model.model import Decoder, initialize_
from refimpl.model.train import train

INPUTS, LABELS, RATIONALES = [[5, 6], [7], [8, 5, 6]], [[2], [3], [2, 4]], [[4, 4, 3], [6], [7, 2]]

# The loss


def test_the_loss_is_the_official_one_twice(table):
    """Oracle: model_utils.py's alpha * label + (1 - alpha) * rationale, each with targets of -100 elsewhere, at alpha 0.5 and 0.2."""
    student = table(9)

    def official(prefix, targets):
        rows = [[prefix, *x, *y] for x, y in zip(INPUTS, targets, strict=True)]
        wanted = [[-100] * len(x) + y for x, y in zip(INPUTS, targets, strict=True)]  # the next token of each position
        logits = torch.cat([student(torch.tensor(row[:-1])) for row in rows])
        return F.cross_entropy(logits, torch.tensor(list(itertools.chain(*wanted))), ignore_index=-100)

    label, rationale = official(0, LABELS), official(1, RATIONALES)
    for alpha, scale in ((0.5, 2), (0.2, 5)):
        method = DistillingStepByStep(weight=(1 - alpha) / alpha)
        loss = method.objective(student, method.rows(INPUTS, labels=LABELS, rationales=RATIONALES))
        assert_close(loss, scale * (alpha * label + (1 - alpha) * rationale))
    alone = DistillingStepByStep(weight=0)
    assert_close(alone.objective(student, alone.rows(INPUTS, labels=LABELS, rationales=RATIONALES)), label)
    assert (label - rationale).abs() > 0.01


def test_what_is_laid_out(table):
    """Oracle: by hand: prefixes of two tokens and of none, padding at the right, targets alone count."""
    method = DistillingStepByStep(label_prefix=[], rationale_prefix=[1, 0])
    rows = method.rows(INPUTS[:2], labels=LABELS[:2], rationales=RATIONALES[:2])
    assert rows.tokens.tolist() == [
        [5, 6, 2, 0, 0, 0, 0],
        [7, 3, 0, 0, 0, 0, 0],
        [1, 0, 5, 6, 4, 4, 3],
        [1, 0, 7, 6, 0, 0, 0],
    ]
    assert [row.nonzero().flatten().tolist() for row in rows.mask] == [[1], [0], [3, 4, 5], [2]]
    student = table(9)
    other = rows.tokens.masked_fill(rows.tokens == 0, 8)
    other[2:, 1] = 0  # the prefix again
    assert_close(method.objective(student, Sequences(other, rows.mask)), method.objective(student, rows))


def test_an_example_without_rationale_counts_for_its_label_only(table):
    """Oracle: the rationale's loss of the other examples alone; without any it is the label's loss."""
    student, method = table(9), DistillingStepByStep()
    some = method.objective(student, method.rows(INPUTS, labels=LABELS, rationales=[[], *RATIONALES[1:]]))
    only = DistillingStepByStep(weight=0)
    label = only.objective(student, only.rows(INPUTS, labels=LABELS, rationales=RATIONALES))
    rest = method.objective(student, method.rows(INPUTS[1:], labels=LABELS[1:], rationales=RATIONALES[1:]))
    rest_label = only.objective(student, only.rows(INPUTS[1:], labels=LABELS[1:], rationales=RATIONALES[1:]))
    assert_close(some, label + rest - rest_label)
    assert_close(method.objective(student, method.rows(INPUTS, labels=LABELS, rationales=[[], [], []])), label)


def test_windows_of_plain_text(table, generator):
    """Oracle: `label_loss` of what follows in the text after one prefix, and of what the teacher writes after the other."""
    student, batch = table(9), torch.randint(2, 9, (3, 8), generator=generator)
    written = torch.randint(2, 9, (3, 4), generator=generator)
    asked = []

    def write(prompts, n):
        asked.append((prompts.clone(), n))
        return written

    method = DistillingStepByStep(weight=0.5)
    loss = method.objective(student, method.sequences(batch, student, write, generator))
    [(prompts, n)] = asked
    assert torch.equal(prompts, batch[:, :4]) and n == 4
    halves = [
        torch.cat((torch.full((3, 1), prefix), x), 1)
        for prefix, x in enumerate((batch, torch.cat((prompts, written), 1)))
    ]
    parts = [label_loss(student(half[:, :-1])[:, 4:], half[:, 5:]) for half in halves]
    assert_close(loss, parts[0] + 0.5 * parts[1])


# The texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Wax melts.\nSo the answer is (b) wax.\n\nQ: What is ice?\nA: …", ("Wax melts.", "(b) wax")),
        ("So the answer is 7", ("", "7")),
        ("It is 7.", None),
        ("a. So the answer is 7. So the answer is 8.", None),
        ("Wax melts. So the answer is .", None),
        ("Q: So the answer is 7", None),
        ("", None),
    ],
)
def test_a_text_is_taken_apart(text, expected):
    """Oracle: data_utils.py's rules by hand: up to the next question, around the marker, without the full stop."""
    assert taken_apart(text) == expected


def test_the_teacher_is_shown_how_and_asked_for_each():
    """Oracle: by hand; right answers replace the teacher's, and texts that can't be taken apart leave them alone."""
    shown = [Example("2 + 1", "2 and 1 more is 3.", "3"), Example("1 + 1", "Both are 1.", "2")]
    prompts, replies = (
        [],
        {"1 + 4": " 4 and 1 more. So the answer is 5.", "2 + 2": " Four.", "3 + 3": " So the answer is 7."},
    )

    def ask(prompt):
        prompts.append(prompt)
        return replies[prompt.split("Q: ")[-1].removesuffix("\nA:")]

    assert explained(replies, ask, shown) == [Example("1 + 4", "4 and 1 more.", "5"), Example("3 + 3", "", "7")]
    assert prompts[0] == few_shot("1 + 4", shown)
    assert prompts[0].startswith("Q: 2 + 1\nA: 2 and 1 more is 3. So the answer is 3.\n\nQ: 1 + 1\n")
    assert explained(replies, ask, shown, labels=["5", "4", "6"]) == [
        Example("1 + 4", "4 and 1 more.", "5"),
        Example("2 + 2", "", "4"),
        Example("3 + 3", "", "6"),
    ]
    with pytest.raises(ValueError, match="zip"):
        explained(replies, ask, shown, labels=["5"])


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1}, "weight=-1 must be 0"),
        ({"weight": float("nan")}, "weight=nan must be 0"),
        ({"label_prefix": [1]}, r"label_prefix=\(1,\) must not be rationale_prefix"),
        ({"prompt": 1.0}, r"prompt=1\.0 must be in \(0, 1\)"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillingStepByStep(**settings)


def test_what_does_not_fit_is_refused(table):
    method, student = DistillingStepByStep(), table(9)
    with pytest.raises(ValueError, match="0 inputs, 0 labels, 0 rationales"):
        method.rows([], labels=[], rationales=[])
    with pytest.raises(ValueError, match="3 inputs, 2 labels, 3 rationales"):
        method.rows(INPUTS, labels=LABELS[:2], rationales=RATIONALES)
    with pytest.raises(ValueError, match="an empty input without a prefix"):
        DistillingStepByStep(label_prefix=[]).rows([[]], labels=[[2]], rationales=[[3]])
    with pytest.raises(ValueError, match="no label counts"):
        method.objective(student, method.rows(INPUTS, labels=[[], [], []], rationales=RATIONALES))
    with pytest.raises(ValueError, match="mask=None"):
        method.objective(student, Sequences(torch.zeros(2, 3, dtype=torch.int64)))


# Claims: thirty goods lie on four shelves; whether two lie on one is all that a label tells, a rationale tells which.

GOODS = [f"good{i}" for i in range(30)]
WORDS = ["[label]", "[rationale]", "?", "yes", "no", *"0123", *GOODS]
CODE = {word: i for i, word in enumerate(WORDS)}
SHOWN = [Example("Do bread and butter lie together?", "They lie on shelves 2 and 3.", "no")]


def encode(text):
    return [CODE[word] for word in re.findall(r"\w+|\?", text) if word in CODE]


@pytest.fixture(scope="module")
def world():
    """240 examples as the teacher explains them, half of the answers yes, and 1000 questions with their answers."""
    draw = random.Random(0)
    shelf = {good: draw.randrange(4) for good in GOODS}

    def ask(prompt):
        first, second = re.findall(r"good\d+", prompt)
        where = shelf[first], shelf[second]
        return f" They lie on shelves {where[0]} and {where[1]}. So the answer is {'yes' if where[0] == where[1] else 'no'}.\n"

    def questions(n):
        kinds = {True: [], False: []}
        while min(map(len, kinds.values())) < n // 2:
            pair = draw.choices(GOODS, k=2)
            kinds[shelf[pair[0]] == shelf[pair[1]]].append(f"Do {pair[0]} and {pair[1]} lie together?")
        both = kinds[True][: n // 2] + kinds[False][: n // 2]
        return draw.sample(both, len(both))

    return explained(questions(240), ask, SHOWN), explained(questions(1000), ask, SHOWN)


def learned(examples, method, single=False):
    """A student that has learnt from examples; `single` has it write the rationale before the label."""
    generator = torch.Generator().manual_seed(0)
    config = Config(
        vocabulary=len(WORDS),
        d_model=24,
        n_layers=2,
        n_heads=2,
        n_kv_heads=2,
        head_dim=12,
        d_ff=48,
        tied_embeddings=True,
    )
    student = initialize_(Decoder(config), generator, std=0.1)
    parts = [[encode(getattr(e, name)) for e in examples] for name in ("question", "label", "rationale")]
    if single:
        parts[1] = [rationale + label for label, rationale in zip(parts[1], parts[2], strict=True)]
    given = method.rows(parts[0], labels=parts[1], rationales=parts[2])
    n = len(examples)

    def loss(model, chosen):
        rows = torch.cat((chosen, chosen + n))
        return method.objective(model, Sequences(given.tokens[rows], given.mask[rows]))

    batches = (torch.randint(n, (32,), generator=generator) for _ in range(200))
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2, weight_decay=0.1)
    train(student, optimizer, batches, 200, loss=loss, schedule=lambda p: min(1.0, 10 * p + 0.1) * (1 - p))
    return student.eval()


def score(student, examples, tokens=1):
    """Share of right answers, the last of the tokens written after the label's prefix."""
    prompts = torch.tensor([[0, *encode(e.question)] for e in examples])
    said = generate(student, prompts, tokens)[:, -1].tolist()
    return sum(WORDS[token] == e.label for token, e in zip(said, examples, strict=True)) / len(examples)


@pytest.fixture(scope="module")
def with_rationales(world):
    """The score after half of the examples, label and rationale as two tasks."""
    return score(learned(world[0][:120], DistillingStepByStep()), world[1])


def test_the_world_is_as_told(world):
    """Oracle: counting; a rationale is two shelves, and the label says whether they are one."""
    for examples in world:
        assert sum(e.label == "yes" for e in examples) == len(examples) // 2
        assert all((encode(e.rationale)[0] == encode(e.rationale)[1]) == (e.label == "yes") for e in examples)
    assert encode(SHOWN[0].rationale) == [CODE["2"], CODE["3"]]


def test_claim_fewer_examples(claim, world, with_rationales):
    """Oracle: right answers to unseen questions; of chance alone half are."""
    labels_only = score(learned(world[0], DistillingStepByStep(weight=0)), world[1])
    assert labels_only > 0.6  # it has learnt
    claim("distilling-step-by-step", "fewer-examples", with_rationales - labels_only)


def test_claim_two_tasks_beat_one(claim, world, with_rationales):
    """Oracle: the same examples, learnt as one task that writes the rationale and then the label."""
    one = score(learned(world[0][:120], DistillingStepByStep(weight=0), single=True), world[1], tokens=3)
    claim("distilling-step-by-step", "two-tasks-beat-one", with_rationales - one)
