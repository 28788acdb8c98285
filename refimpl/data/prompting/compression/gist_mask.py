r"""Who sees whom in a text with gist tokens: what stands behind them sees them and not the prompt before them.

Source: `gist` (arXiv 2304.08467), Section 3, Figure 2a; official code jayelm/gisting@3be0d062b6bdfd3caf51843bbc60261a0855f876,
`src/data/gist.py`: `make_gist_mask`, `make_neg_control_mask`, `make_pos_control_mask`, here for decoders, whose own mask is added.

Differs from the paper: none.

Not here: the encoder's mask, under which the prompt does not see what stands behind the gist.
"""

from typing import Literal

from torch import Tensor

Condition = Literal["gist", "positive", "negative"]


def hidden(tokens: Tensor, gist: int, condition: Condition = "gist") -> Tensor:
    """Which keys a query must not see though they stand before it, `[batch, time, time]`, query by key.

    Args:
        tokens: `[batch, time]`.
        gist: the gist token; a row has its copies side by side, or none.
        condition: see `Gist`.

    Examples:
        >>> import torch
        >>> hidden(torch.tensor([[1, 2, 9, 9, 3]]), 9)[0, -1].int().tolist()
        [1, 1, 0, 0, 0]
    """
    here = tokens == gist
    after = here.any(dim=1, keepdim=True) & (_from_the_end(here) == 0)  # behind the last gist
    before = here.cumsum(dim=1) == 0 if condition == "gist" else _from_the_end(here) > 0
    return after[:, :, None] & before[:, None, :] & (condition != "positive")


def _from_the_end(here: Tensor) -> Tensor:
    return here.flip(1).cumsum(dim=1).flip(1)


class Hiding:
    """The past of a text that is read at once, some of it hidden from some queries; holds nothing, lets gradients through.

    Args:
        hidden: `[batch, time, time]`, see the function of this name.
    """

    length, nbytes = 0, 0

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden

    def update(
        self,
        layer: int,  # noqa: ARG002 - the protocol's, as the next
        k: Tensor,
        v: Tensor,
        queries: Tensor,  # noqa: ARG002
        positions: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """These keys and values, with the positions that each query sees; see `Cache.update`."""
        return k, v, positions[:, None, None, :].masked_fill(self.hidden.unsqueeze(1), -1)

    def compress_prefill(self) -> None:
        """Nothing."""

    def reset(self) -> None:
        """Nothing: it holds nothing."""
