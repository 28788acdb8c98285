"""The formulas against the paper's table, and against rounds that are simulated with chances that are known."""

import pytest
import torch

from refimpl.inference.decoding.protocol import Decoded
from refimpl.inference.decoding.speedup import chances_by_depth, expected_speedup, expected_tokens, expected_tokens_of

ROUNDS = 40_000


def record(depths, stood, drafted=None, rounds=None):
    """What decoding with these rounds, `[batch, calls]`, would tell; guesses are a chain unless more of them are `drafted`."""
    depths, stood = torch.as_tensor(depths), torch.as_tensor(stood)
    rounds = torch.full((len(depths),), depths.shape[1]) if rounds is None else torch.tensor(rounds)
    return Decoded(
        tokens=torch.zeros(len(depths), 0),
        target_calls=depths.shape[1],
        draft_calls=0,
        rounds=rounds,
        drafted=depths.sum(1) if drafted is None else drafted,
        rejected=(stood < depths).sum(1),
        widths=1 + depths.amax(0),
        depths=depths,
        stood=stood,
    )


def simulated(depths, chances, generator):
    """Guesses that stand, of rounds `[batch, calls]`, where one at depth d stands with `chances[d]`, whatever came before."""
    right = torch.rand(*depths.shape, len(chances), generator=generator) < torch.tensor(chances)
    return (right & (torch.arange(len(chances)) < depths[..., None])).long().cumprod(-1).sum(-1)


@pytest.mark.parametrize(
    ("alpha", "gamma", "operations", "speed"),
    [(0.6, 2, 1.53, 1.96), (0.7, 3, 1.58, 2.53), (0.8, 2, 1.23, 2.44), (0.8, 5, 1.63, 3.69), (0.9, 2, 1.11, 2.71), (0.9, 10, 1.60, 6.86)],
)  # fmt: skip
def test_formulas_give_the_papers_table(alpha, gamma, operations, speed):
    """Oracle: Leviathan et al., Table 1, where a draft costs nothing; and the sum 1 + a + ... + a^gamma."""
    tokens = expected_tokens(alpha, gamma)
    assert round(expected_speedup(tokens, gamma, 0.0), 2) == speed
    assert (gamma + 1) / tokens == pytest.approx(operations, abs=0.006)
    assert tokens == pytest.approx(sum(alpha**i for i in range(gamma + 1)))
    assert expected_speedup(tokens, gamma, 0.25) == pytest.approx(tokens / (1 + gamma / 4))


def test_time_of_a_round_by_hand():
    """Oracle: by hand: 3 tokens, for 2 calls of a draft that takes half as long, and a call that takes twice as long: 3 / 3."""
    assert expected_speedup(3.0, 2, 0.5, 2.0) == 1.0


@pytest.mark.parametrize("alpha", [0.5, 0.8, 0.95])
def test_rounds_of_equal_guesses_are_the_papers(alpha, generator):
    """Oracle: closed form, Eq. (1), and the tokens that were counted; both to five standard errors, and no more than gamma + 1."""
    depths = torch.full((1, ROUNDS), 4)
    stood = simulated(depths, [alpha] * 4, generator)
    found, error = expected_tokens_of([record(depths, stood)]), 5 * float(stood.double().std()) / ROUNDS**0.5
    assert found == pytest.approx(expected_tokens(alpha, 4), abs=error) and found <= 5
    assert found == pytest.approx(1 + float(stood.double().mean()), abs=error)


@pytest.mark.parametrize("alpha", [0.6, 0.9, 1.0])
def test_unequal_rounds_count_each_with_its_own_guesses(alpha, generator):
    """Oracle: mean of Eq. (1) over guesses of 0 to 10 in half of the rounds and none in the others; and the tokens counted.

    Control: Eq. (1) of the mean number of guesses gives more than is possible, or far too much.
    """
    depths = torch.randint(11, (4, ROUNDS // 4), generator=generator)
    depths[:, ::2] = 0
    stood = simulated(depths, [alpha] * 10, generator)
    runs = [record(d[None], s[None]) for d, s in zip(depths, stood, strict=True)]
    found, error = expected_tokens_of(runs), 5 * float(stood.double().std()) / ROUNDS**0.5
    counted = 1 + float(stood.double().mean())
    assert found == pytest.approx(counted, abs=error)
    of_each = sum(expected_tokens(alpha, gamma) for gamma in depths.flatten().tolist()) / ROUNDS
    assert found == pytest.approx(of_each, abs=error)
    assert found <= 1 + float(depths.double().mean()) + 1e-9
    if alpha < 1:
        assert expected_tokens(alpha, float(depths.double().mean())) > counted + 3 * error


def test_trees_count_by_depth(generator):
    """Oracle: closed form: of rounds 4 deep 1 + .3 + .3 * .9 + .3 * .9 * .8 + the same * .7, of rounds 1 deep 1 + .3; the tokens counted.

    With the same chance at each depth it is Eq. (1). Control: one chance for all gives too much where later guesses are surer.
    """
    depths, chances = torch.tensor([[4, 1]]).repeat(1, ROUNDS // 2), [0.3, 0.9, 0.8, 0.7]
    stood = simulated(depths, chances, generator)
    found, error = (
        expected_tokens_of([record(depths, stood, 3 * depths.sum(1))]),
        5 * float(stood.double().std()) / ROUNDS**0.5,
    )
    deep = 1 + 0.3 + 0.27 + 0.216 + 0.1512
    assert found == pytest.approx((deep + 1.3) / 2, abs=error)
    assert found == pytest.approx(1 + float(stood.double().mean()), abs=error)
    same = simulated(depths, [0.7] * 4, generator)
    expected = (expected_tokens(0.7, 4) + expected_tokens(0.7, 1)) / 2
    assert expected_tokens_of([record(depths, same, 3 * depths.sum(1))]) == pytest.approx(expected, abs=error)
    assert expected_tokens_of([record(depths[:, ::2], stood[:, ::2])]) > deep + 2 * error


def test_chances_by_hand():
    """Oracle: by hand: one of two guesses stands at the first depth, none was tried at the second; a round without a guess tells nothing."""
    assert chances_by_depth(torch.tensor([0, 1, 3]), torch.tensor([0, 1, 0])).tolist() == [0.5, 0, 0]
    assert chances_by_depth(torch.tensor([0]), torch.tensor([0])).tolist() == []


def test_a_batch_waits_for_its_slowest_row():
    """Oracle: by hand: guesses are right; 3 calls give one row 2 + 2 + 1 tokens, the other 3, and nothing behind its end: 8 of 6 places."""
    decoded = record([[1, 1, 0], [2, 0, 0]], [[1, 1, 0], [2, 0, 0]], rounds=[3, 1])
    assert expected_tokens_of([decoded]) == pytest.approx(8 / 6)
    assert expected_tokens_of([decoded, record([[0] * 6], [[0] * 6])]) == pytest.approx((8 + 6) / 12)
