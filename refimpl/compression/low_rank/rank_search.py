r"""A rank for each layer by its sensitivity: what truncating one layer alone does to perplexity, and a search over all layers.

Source: `asvd` (arXiv 2312.05821), sensitivity-based truncation rank searching (STRS); official code
hahnyuan/ASVD4LLM@863042743edb4c0dcc512a45534dea07df16b140, sensitivity.py, binary_search.py.

Differs from the paper: a text is measured at all candidate ranks at once, a layer's output being cut to each of them in rows of
its own. The search ends at the first list that is no larger than the target, parameters being counted as they are stored; the
official code counts ratios, and may end one entry of the list above or below.

Not here: the search for a target perplexity. Layers in which rows of a batch get mixed (mixtures of experts) would be searched
wrongly.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.compression.text_loss import IGNORED, loss_of, next_tokens, repeated, rows_of
from refimpl.model.linear import weight_of

TOKENS = 4096  # that are read at once


class Candidate(NamedTuple):
    """What truncating one layer alone does."""

    layer: str
    rank: int
    perplexity: float


class Cuts(nn.Module):
    """A layer's product at several ranks, one after the other: the batch holds the same rows once for each of them."""

    def __init__(self, layer: nn.Linear, basis: Tensor, ranks: Sequence[int]) -> None:
        super().__init__()
        weight, kept = weight_of(layer), basis[:, : max(ranks)]
        self.left, self.right = kept.to(weight.dtype), (kept.T @ weight.to(kept.dtype)).to(weight.dtype)
        self.weight, self.bias = layer.weight, layer.bias
        places = torch.arange(max(ranks), device=weight.device)
        self.mask = (places < torch.tensor(ranks, device=weight.device)[:, None]).to(weight.dtype)  # [ranks, largest]

    def forward(self, inputs: Tensor) -> Tensor:
        """`[ranks * batch, ..., in]` to `[ranks * batch, ..., out]`."""
        inner = F.linear(inputs, self.right)
        cut = inner.view(len(self.mask), -1, inner.shape[-1]) * self.mask[:, None]
        return F.linear(cut.view(inner.shape), self.left, self.bias)


@torch.no_grad()
def perplexities(model: nn.Module, name: str, basis: Tensor, ranks: Sequence[int], texts: list[Any]) -> list[float]:
    """Perplexity of texts where one layer alone is cut to each of some ranks (STRS).

    Args:
        model: in evaluation mode; as it was when this returns.
        name: of the layer.
        basis: `[out, at least the largest rank]`, as `scaled_basis` gives it.
        ranks: one or more.
        texts: batches, as `text.loss_of` takes them; every token weighs the same.

    Raises:
        ValueError: a perplexity is NaN.
    """
    layer = model.get_submodule(name)
    total, tokens = torch.zeros(len(ranks), dtype=torch.float64), 0
    model.set_submodule(name, Cuts(layer, basis, ranks))  # type: ignore[arg-type]
    try:
        for i, batch in enumerate(texts):
            labels = next_tokens(batch, i)
            tokens += int((labels != IGNORED).sum())
            size = max(1, TOKENS // (len(ranks) * (labels.shape[1] + 1)))
            for rows in rows_of(batch, size):
                losses = loss_of(model, repeated(rows, len(ranks)), i)
                total += losses.view(len(ranks), -1).double().sum(1).cpu()
    finally:
        model.set_submodule(name, layer)
    if total.isnan().any():
        raise ValueError(f"perplexity is NaN where layer {name!r} is truncated")
    return [math.exp(min(loss, 700.0)) for loss in (total / tokens).tolist()]  # e^709 is the largest float


def choose_ranks(found: list[Candidate], layers: dict[str, nn.Linear], ratio: float) -> dict[str, int]:
    """Ranks that take the parameters of all layers to a target, the least harmful candidates first (STRS).

    A layer gets the smallest rank among those of its candidates that are taken; a binary search finds how many are.

    Args:
        found: candidates of all layers.
        layers: by name, with those that have no candidate.
        ratio: share of all parameters to remove. Where it can't be reached, all candidates are taken.

    Returns:
        Ranks by name; layers that are missing stay whole.
    """
    listed = sorted(found, key=lambda candidate: candidate.perplexity)
    whole = sum(layer.weight.numel() for layer in layers.values())

    def taken(n: int) -> dict[str, int]:
        ranks: dict[str, int] = {}
        for name, rank, _ in listed[:n]:
            ranks[name] = min(rank, ranks.get(name, rank))
        return ranks

    def removed(n: int) -> float:
        parts = ((layers[name].weight, rank) for name, rank in taken(n).items())
        return sum(weight.numel() - rank * sum(weight.shape) for weight, rank in parts) / whole

    low, high = 0, len(listed)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if removed(middle) >= ratio else (middle + 1, high)
    return taken(low)
