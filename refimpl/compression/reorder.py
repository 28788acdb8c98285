r"""Channels of a block in another order: what makes them and what reads them agree, and no output of the model changes.

A norm writes its output in the new order, while the residual stream keeps its own; the layers that read it have their columns in
that order. The values of a head, and the inside of a feed-forward, are put in order by the rows of the layers that make them and the
columns of those that read them. Queries and keys share an order within their heads, where positions do not tie channels together.

Source: `rptq` (arXiv 2304.01089), the section on avoiding explicit reordering; official code
hahnyuan/RPTQ4LLM@96190691f02be6b27ba24d5a73574dbf9a8336c6, quantize/opt_reorder_quantize.py (R1 to R5) and reorder_layer_norm.py.

Differs from the paper: layouts with rotary positions, where the channels of queries and keys stay; the paper has OPT only.

Not here: which order.
"""

import torch
from torch import Tensor, nn

from refimpl.compression.anatomy import BlockParts
from refimpl.model.linear import linear_at, weight_of


class ReorderedNorm(nn.Module):
    """A norm whose output's channels stand in another order.

    Args:
        norm: the norm.
        index: `[channels]`, where each channel of the output comes from.

    Examples:
        >>> ReorderedNorm(nn.Identity(), torch.tensor([2, 0, 1]))(torch.tensor([[1.0, 2.0, 3.0]])).tolist()
        [[3.0, 1.0, 2.0]]
    """

    index: Tensor

    def __init__(self, norm: nn.Module, index: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("index", index.int())

    def forward(self, x: Tensor) -> Tensor:
        """`[..., channels]` to the same."""
        return torch.index_select(self.norm(x), -1, self.index)


@torch.no_grad()
def reorder_norm_(model: nn.Module, norm: str, readers: list[str], index: Tensor) -> None:
    """Put what a norm makes in order, in place.

    Args:
        model: a decoder.
        norm: the norm's name.
        readers: names of all linear layers that read it.
        index: a permutation, `[channels]`: where the channel of each place stood before.
    """
    model.set_submodule(norm, ReorderedNorm(model.get_submodule(norm), index))
    for name in readers:
        _order_columns_(model, name, index)


@torch.no_grad()
def reorder_inside_(model: nn.Module, part: BlockParts, index: Tensor) -> None:
    """Put the inside of a feed-forward in order, in place: `index` as in `reorder_norm_`."""
    for name in (part.gate, part.up):
        if name is not None:
            _order_rows_(model, name, index)
    _order_columns_(model, part.down, index)


@torch.no_grad()
def reorder_values_(model: nn.Module, part: BlockParts, index: Tensor) -> None:
    """Put the values in order within their heads, in place: `index`, `[kv heads, head_dim]`, counts from 0 in each head."""
    first = _rows(model, part.v) - part.n_kv_heads * part.head_dim  # a fused layer makes the values last
    _order_rows_(model, part.v, _flat(index), first)
    _order_columns_(model, part.o, _flat(index.repeat_interleave(part.n_heads // part.n_kv_heads, dim=0)))


@torch.no_grad()
def reorder_queries_and_keys_(model: nn.Module, part: BlockParts, index: Tensor) -> None:
    """Put queries and keys in one order within their heads, in place: `index` as in `reorder_values_`.

    Raises:
        ValueError: positions are rotary, or queries and keys are normalized: their channels can't move.
    """
    if not movable(model, part):
        raise ValueError(f"the channels of {part.q} are tied to their places: leave queries and keys in their order")
    _order_rows_(model, part.q, _flat(index.repeat_interleave(part.n_heads // part.n_kv_heads, dim=0)))
    _order_rows_(model, part.k, _flat(index), part.n_heads * part.head_dim if part.k == part.q else 0)


def movable(model: nn.Module, part: BlockParts) -> bool:
    """Whether the channels of queries and keys may move within a head: in the layouts without a gate, positions are not rotary."""
    attention = model.get_submodule(part.o.rpartition(".")[0])
    return part.gate is None and getattr(attention, "q_norm", None) is None


def _flat(index: Tensor) -> Tensor:
    """Places in heads as places in all of them."""
    heads, size = index.shape
    return (index + size * torch.arange(heads, device=index.device)[:, None]).flatten()


def _rows(model: nn.Module, name: str) -> int:
    return len(weight_of(linear_at(model, name)))


def _order_rows_(model: nn.Module, name: str, index: Tensor, first: int = 0) -> None:
    """Order the rows of a layer, and its bias, from row `first` on."""
    layer = linear_at(model, name)
    for made in (weight_of(layer), layer.bias):
        if made is not None:
            rows = made[first : first + len(index)]
            rows.copy_(rows[index])


def _order_columns_(model: nn.Module, name: str, index: Tensor) -> None:
    weight = weight_of(linear_at(model, name))
    weight.copy_(weight[:, index])
