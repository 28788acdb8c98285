"""Entries of which each head of each row holds as many as it wants, one head behind another, without padding between."""

from collections.abc import Sequence

import torch
from torch import Tensor


class RaggedTokens:
    """Tensors `[rows, heads, entries, ...]` whose heads differ in entries, held flat.

    Attributes:
        lengths: `[rows, heads]`, entries of each.

    Examples:
        >>> held, x = RaggedTokens(), torch.arange(6.0).view(1, 2, 3)
        >>> held.hold([x], torch.tensor([[[True, False, True], [False, True, False]]]))
        >>> held.lengths.tolist(), held.flat[0].tolist()
        ([[2, 1]], [0.0, 2.0, 4.0])
        >>> (padded,), there = held.padded()
        >>> padded.tolist(), there.tolist()
        ([[[0.0, 2.0], [4.0, 0.0]]], [[[True, True], [True, False]]])
    """

    def __init__(self) -> None:
        self.flat: list[Tensor] = []
        self.lengths = torch.zeros(0, 0, dtype=torch.int64)

    def hold(self, tensors: Sequence[Tensor], stay: Tensor) -> None:
        """Hold these entries, and forget all others.

        Args:
            tensors: `[rows, heads, n, ...]` each.
            stay: `[rows, heads, n]`, bool.
        """
        self.flat = [x[stay] for x in tensors]
        self.lengths = stay.sum(dim=2)

    def padded(self) -> tuple[list[Tensor], Tensor]:
        """All heads side by side, for as long as it is needed.

        Returns:
            Of each tensor `[rows, heads, most, ...]`, zeros behind a head's last entry; and which entries there are,
            `[rows, heads, most]`, bool.
        """
        most = int(self.lengths.max()) if self.lengths.numel() else 0
        there = torch.arange(most, device=self.lengths.device) < self.lengths.unsqueeze(2)
        found = [x.new_zeros((*there.shape, *x.shape[1:])) for x in self.flat]
        for padded, x in zip(found, self.flat, strict=True):
            padded[there] = x
        return found, there
