r"""How a budget of tokens is divided over the parts of a prompt, and which demonstrations stay.

Source: `llmlingua` (arXiv 2310.05736), Section 4.1: Algorithm 1, Eqs. (2) and (3).

Differs from the paper: the budget is met. Eqs. (3) and (6) together leave far less than it, since the demonstrations that stay would be
cut by the rate of all of them; here they get what instruction and question leave, as in the official code. What Eq. (3) adds is never
below 0, though the last demonstration may overfill its room, as in Algorithm 1 and the code; the paper's text stops before it. Where even
all tokens of the demonstrations that stay leave some of the budget, instruction and question get that too.

Not here: sentences in the place of demonstrations; the code's other ways to rank and order demonstrations.

Glossary
    rate    share of a part's tokens that stay, $\tau$
    left    what instruction and question leave of the budget, $\tau_{dems} L_{dems}$ (Eq. 2)
    room    tokens of the demonstrations before single ones are dropped, $k \tau_{dems} L_{dems}$; the last may go beyond it
    used    tokens of the demonstrations that are not dropped whole, $\tilde L_D$
    more    added to the rates of instruction and question, $\Delta\tau$ (Eq. 3)
"""

from collections.abc import Sequence
from typing import NamedTuple


class Plan(NamedTuple):
    """Tokens to keep of each part, and the demonstrations that are not dropped whole, ascending."""

    instruction: int
    demonstrations: int
    question: int
    kept: list[int]


def plan(
    instruction: int,
    demonstrations: Sequence[int],
    question: int,
    perplexity: Sequence[float],
    budget: int,
    *,
    instruction_rate: float,
    question_rate: float,
    coarse: float,
) -> Plan:
    r"""Divide a budget.

    Args:
        instruction: its tokens.
        demonstrations: tokens of each.
        question: its tokens.
        perplexity: of each demonstration, or anything in the same order; of equals the earlier comes first.
        budget: tokens to keep, fewer than there are.
        instruction_rate: share of the instruction's tokens that stays, $\tau_{ins}$.
        question_rate: of the question's, $\tau_{que}$.
        coarse: how many times their final budget the demonstrations that stay may have at first, $k$.

    Raises:
        ValueError: instruction and question at their rates alone are more than the budget.

    Examples:
        >>> rates = {"instruction_rate": 0.85, "question_rate": 0.9, "coarse": 2.0}
        >>> plan(20, [20, 20, 20], 10, [1.0, 3.0, 2.0], 41, **rates)  # 17 + 9 are spoken for, and 2 * 15 is room for two
        Plan(instruction=17, demonstrations=15, question=9, kept=[1, 2])
    """
    parts = instruction + question
    first, last = round(instruction_rate * instruction), round(question_rate * question)
    left = budget - first - last
    if left < 0:
        raise ValueError(
            f"budget={budget} is less than the {first + last} tokens that instruction and question keep at rates of "
            f"{instruction_rate} and {question_rate}: raise it, or lower the rates"
        )
    room, used = coarse * left, 0
    kept: list[int] = []
    for i in sorted(range(len(demonstrations)), key=lambda i: -perplexity[i]):
        if used > room:
            break
        kept.append(i)
        used += demonstrations[i]
    more = max(0.0, room - used) / parts if parts else 0.0  # Eq. (3)
    first = min(instruction, round((instruction_rate + more) * instruction), budget)
    last = min(question, round((question_rate + more) * question), budget - first)
    first += min(instruction - first, max(0, budget - first - last - used))
    last += min(question - last, max(0, budget - first - last - used))
    return Plan(first, budget - first - last, last, sorted(kept))
