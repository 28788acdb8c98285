"""Budgets of the parts by the paper's equations, and which demonstrations stay by its algorithm, written as it stands there."""

import random

import pytest

from refimpl.data.prompting.compression.budget_controller import plan

PAPER = {"instruction_rate": 0.85, "question_rate": 0.9, "coarse": 2.0}


def test_by_hand():
    """Oracle: by hand. Of 100 tokens 40 may stay, 17 + 9 of instruction and question, so 14 of the demonstrations; room is 28, which the
    second demonstration of 20 overfills, and nothing is left to add."""
    found = plan(20, [20, 20, 20, 20], 10, [5.0, 1.0, 7.0, 7.0], 40, **PAPER)
    assert found == (17, 14, 9, [2, 3])


def test_what_room_is_left_raises_the_other_rates():
    """Oracle: Eq. (3) by hand. Budget 66: 40 are left, room 80; the demonstrations have 68, so 12 / 30 are added to both rates, which are
    then above 1: instruction and question stay whole, and the demonstrations get the other 36."""
    assert plan(20, [34, 34], 10, [1.0, 2.0], 66, **PAPER) == (20, 36, 10, [0, 1])
    rates = PAPER | {"instruction_rate": 0.5, "question_rate": 0.5}
    # 15 for both, 30 left, room 60, demonstrations 54: 6 / 30 more, 0.7 of each
    assert plan(20, [27, 27], 10, [1.0, 2.0], 45, **rates) == (14, 24, 7, [0, 1])


def test_what_nobody_else_can_take_goes_to_instruction_or_question():
    """Oracle: by hand: 25 are spoken for, 4 / 30 are added to both rates, which gives the whole part nothing and half of the other 6 of
    10; the one token of 27 that is left over goes there, too, since there are no demonstrations."""
    rates = PAPER | {"instruction_rate": 0.5, "question_rate": 1.0}
    assert plan(10, [], 20, [], 27, **rates) == (7, 0, 20, [])
    rates = PAPER | {"instruction_rate": 1.0, "question_rate": 0.5}
    assert plan(20, [], 10, [], 27, **rates) == (20, 0, 7, [])


def by_the_paper(lengths, perplexity, left, coarse):
    """Algorithm 1, lines 4 to 11."""
    kept, used = [], 0
    for _, i in sorted((-p, i) for i, p in enumerate(perplexity)):
        if used > coarse * left:
            break
        kept.append(i)
        used += lengths[i]
    return sorted(kept)


def test_on_random_prompts():
    """Oracle: Algorithm 1 as it stands, and counting: the budget is met, no part gets more than it has, rates are not undercut."""
    draw, cut = random.Random(0), 0
    for _ in range(300):
        ins, que = draw.choice([0, 3, 20]), draw.choice([0, 5, 12])
        lengths = [draw.randint(1, 30) for _ in range(draw.randint(1, 7))]
        perplexity = [draw.choice([1.0, 2.0, 3.0]) for _ in lengths]
        least = round(0.85 * ins) + round(0.9 * que)
        budget = draw.randint(max(1, least), ins + que + sum(lengths) - 1)
        found = plan(ins, lengths, que, perplexity, budget, **PAPER)
        assert found.kept == by_the_paper(lengths, perplexity, budget - least, 2.0)
        assert found.instruction + found.demonstrations + found.question == budget
        assert round(0.85 * ins) <= found.instruction <= ins and round(0.9 * que) <= found.question <= que
        assert 0 <= found.demonstrations <= sum(lengths[i] for i in found.kept)
        cut += len(found.kept) < len(lengths)
    assert cut > 50


def test_a_budget_that_the_other_parts_use_up_is_refused():
    with pytest.raises(ValueError, match=r"budget=25 is less than the 26 tokens .*: raise it, or lower the rates"):
        plan(20, [20], 10, [1.0], 25, **PAPER)
