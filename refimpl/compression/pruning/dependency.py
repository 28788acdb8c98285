r"""Which channels of a model's linear layers can only be removed together, found by running the model, not by names.

Source: `llm-pruner` (arXiv 2305.11627), Section 3.1: a neuron depends on another if that is all it gets, or all it gives to; a
*group* is what follows from one neuron by such steps. Official code horseee/LLM-Pruner@128a07d977f9b205d60ab14cfbc6a78f8a8e39d2,
LLMPruner/torch_pruning/dependency.py.

Every linear layer and embedding is cut out: what it would return is replaced by random numbers. What stands between them (norms,
rotations, activations, attention, products, sums, views, splits) runs as it is, and derivatives say which channel that a layer
*reads* depends on which channels that layers *make*: those of the attention output on all channels of its head's queries, keys and values,
those inside of a feed-forward on one of its gate and one of its up projection. Channels joined by such threads, through any number of
layers, are a group. What the model returns, what other layers than those asked for read, and what embeddings make can't be removed, nor
can what is joined to it: the residual stream, whose channels every norm joins. A weight that is another module's too is left whole.

Differs from the paper: the official code follows the graph of operations, and has a rule for how each of them maps channels; here the
derivative is that rule, so that an operation without one can't be misread. Between two channels it is zero or not, at random
values of both signs and at several positions; a thread that is invisible at all of them is missed. Where one channel is fed by all of
another layer's, as behind a norm, all channels of the layer that reads it are taken for joined.

Not here: parameters beside linear layers, embeddings and norms over whole groups, such as a vector of one number for each neuron.

Examples:
    >>> from refimpl.model.config import Config
    >>> from refimpl.model.model import Decoder
    >>> model = Decoder(Config(vocabulary=9, d_model=8, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=2, d_ff=6))
    >>> for family in coupled_groups(model, torch.tensor([[0, 1]])):
    ...     print(family.n_groups, [(m.layer.rpartition(".")[2], m.side, m.group.tolist()) for m in family.members])
    2 [('q_proj', 'out', [0, 0, 0, 0, 1, 1, 1, 1]), ('k_proj', 'out', [0, 0, 1, 1]), ('v_proj', 'out', [0, 0, 1, 1]), ('o_proj', 'in', [0, 0, 0, 0, 1, 1, 1, 1])]
    6 [('gate_proj', 'out', [0, 1, 2, 3, 4, 5]), ('up_proj', 'out', [0, 1, 2, 3, 4, 5]), ('down_proj', 'in', [0, 1, 2, 3, 4, 5])]
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from refimpl.compression.pruning.influence import ROWS, Trace, fed_by, run_cut
from refimpl.compression.pruning.slimming import keep_inputs_, keep_outputs_, recount_heads_
from refimpl.model.linear import is_linear, sizes

Side = Literal["out", "in"]


@dataclass(frozen=True, eq=False)
class Member:
    """A layer's part in a family.

    Attributes:
        layer: its name.
        side: whether channels that it makes or that it reads belong to the groups.
        group: `[channels]`, the group of each, -1 for channels that belong to none of the family.
    """

    layer: str
    side: Side
    group: Tensor


@dataclass(frozen=True, eq=False)
class Family:
    """Groups of one kind: the heads of one attention, the neurons of one feed-forward.

    Attributes:
        members: in the order in which data reaches them.
        n_groups: how many groups there are.
    """

    members: tuple[Member, ...]
    n_groups: int


def coupled_groups(model: nn.Module, tokens: Any, layers: Collection[str] | None = None) -> list[Family]:
    """The groups of channels that can be removed, as families, in the order in which data reaches their first layers.

    Args:
        model: any module whose rows do not depend on each other; left as it is.
        tokens: `[1, time]` or a dict with such; what the model is called with, repeated. What it holds does not matter.
        layers: names of the linear layers that may lose channels; None stands for all.

    Raises:
        ValueError: a layer is none of the model's, or is never reached; the model can't take the tokens.
    """
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    names: dict[nn.Parameter, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter] = names.get(parameter, 0) + 1
    free = [name for name in linear if names[model.get_submodule(name).weight] == 1]  # type: ignore[index]
    wanted = free if layers is None else [name for name in free if name in set(layers)]
    unknown = sorted(set(layers or ()) - set(linear))
    if unknown:
        raise ValueError(f"layers {unknown[:4]} are no linear layers of the model; it has {linear[:4]} and others")
    was_training = model.training
    trace = run_cut(model.eval(), tokens)
    model.train(was_training)
    missing = [name for name in wanted if name not in trace.read]
    if missing:
        raise ValueError(f"the tokens never reach layer {missing[0]!r}: leave it out of `layers`")
    order = [name for name in trace.read if name in set(wanted)]
    shapes = {name: sizes(model.get_submodule(name)) for name in order}  # type: ignore[arg-type]
    places, n = _places(shapes)
    threads = _Threads(n + 1)  # the last stands for what can't be removed
    _join_outside(trace, places, threads, n)
    for name in order:
        for x in trace.read[name]:
            _join_reader(trace, x, places, places[name, "in"], threads, n)
    return _families(order, places, threads.roots(), n)


def cut_(model: nn.Module, families: Collection[Family], kept: Collection[Tensor]) -> None:
    """Remove groups from a model, in place: rows and columns of its layers are gone.

    Args:
        model: the model that the families were found in.
        families: any of them.
        kept: `[n_groups]`, bool, for each family the groups that stay.
    """
    stays: dict[tuple[str, Side], Tensor] = {}
    for family, keep in zip(families, kept, strict=True):
        for member in family.members:
            here = torch.cat([keep.cpu(), torch.tensor([True])])[member.group]  # -1 is the last: it stays
            key = (member.layer, member.side)
            stays[key] = stays.get(key, torch.ones_like(here)) & here
    for (name, side), mask in stays.items():
        layer = model.get_submodule(name)
        index = mask.nonzero().flatten().to(next(layer.parameters()).device)
        (keep_outputs_ if side == "out" else keep_inputs_)(layer, index)
    recount_heads_(model)


def _places(shapes: dict[str, tuple[int, int]]) -> tuple[dict[tuple[str, Side], slice], int]:
    """A number for each channel of each layer, those that it reads and those that it makes; and how many there are."""
    places: dict[tuple[str, Side], slice] = {}
    n = 0
    for name, (made, read) in shapes.items():
        for side, size in (("in", read), ("out", made)):
            places[name, side] = slice(n, n + size)  # type: ignore[index]
            n += size
    return places, n


class _Threads:
    """Sets of channels that threads join: each points at a channel of its set, the first at itself."""

    def __init__(self, n: int) -> None:
        self.parent = torch.arange(n)

    def join(self, a: Tensor, b: Tensor) -> None:
        """Join the sets of `a[i]` and `b[i]`, for all i."""
        while True:
            first, second = self.parent[a], self.parent[b]
            low = torch.minimum(first, second)
            if torch.equal(first, second):
                return
            for root in (first, second):
                self.parent.scatter_reduce_(0, root, low, "amin")
            self.parent = self.roots()

    def roots(self) -> Tensor:
        """The first channel of each one's set."""
        parent = self.parent
        while not torch.equal(parent, parent[parent]):
            parent = parent[parent]
        return parent


def _join_outside(trace: Trace, places: Mapping[Any, slice], threads: _Threads, outside: int) -> None:
    """Join to the outside what the model returns, and what layers read that are not to lose channels."""
    generator = torch.Generator().manual_seed(1)
    ends = trace.returned + [x for name, xs in trace.read.items() if (name, "in") not in places for x in xs]
    for x in ends:
        weights = torch.randn(x.shape, generator=generator).to(x.device)
        for name, seen in fed_by(trace, x, weights):
            if (name, "out") in places:
                channels = seen.any(0).nonzero().flatten() + places[name, "out"].start
                threads.join(channels, torch.full_like(channels, outside))


def _join_reader(
    trace: Trace, x: Tensor, places: Mapping[Any, slice], reads: slice, threads: _Threads, outside: int
) -> None:
    """Join each channel that a layer reads to those that it depends on; row r looks at one channel."""
    generator, width = torch.Generator().manual_seed(2), x.shape[-1]
    for start in range(0, width, ROWS):
        channels = torch.arange(start, min(start + ROWS, width))
        weights = torch.zeros(
            ROWS, x.numel() // width // ROWS, width
        )  # some layers are called with rows and time in one
        weights[torch.arange(len(channels)), :, channels] = torch.randn(
            len(channels), weights.shape[1], generator=generator
        )
        whole = False
        for name, seen in fed_by(trace, x, weights.view(x.shape).to(x.device)):
            row, column = seen[: len(channels)].nonzero(as_tuple=True)
            here = channels[row] + reads.start
            if (name, "out") in places:
                threads.join(here, column + places[name, "out"].start)
            else:
                threads.join(here, torch.full_like(here, outside))
            whole |= seen.shape[1] > 1 and bool(seen[: len(channels)].all(1).any())
        if whole:
            everything = torch.arange(reads.start, reads.stop)
            threads.join(everything, torch.full_like(everything, reads.start + start))
            return


def _families(order: list[str], places: Mapping[Any, slice], roots: Tensor, outside: int) -> list[Family]:
    """Sets that have channels on both sides of layers, as groups; those with equally many in the same layers are a family."""
    keys = [(name, side) for name in order for side in ("in", "out")]
    marks = torch.randint(2**62, (len(keys),), generator=torch.Generator().manual_seed(3))
    counts, sides = torch.zeros(outside + 1, dtype=torch.int64), torch.zeros(outside + 1, 2, dtype=torch.bool)
    for key, mark in zip(keys, marks, strict=True):
        here = roots[places[key]]
        counts.index_add_(0, here, mark.expand(len(here)))  # a sum of marks names layers and numbers of channels
        sides[here, int(key[1] == "in")] = True
    removable = sides.all(1)
    removable[roots[outside]] = False
    members: dict[int, list[Member]] = {}
    numbers: dict[int, Tensor] = {}
    for key in keys:
        here = roots[places[key]]
        for kind in sorted(set(counts[here][removable[here]].tolist())):
            mine = removable[here] & (counts[here] == kind)
            if kind not in numbers:
                numbers[kind] = torch.tensor(
                    sorted(set(here[mine].tolist()))
                )  # groups count up with the first channel of each
            group = torch.searchsorted(numbers[kind], here).masked_fill(~mine, -1)
            members.setdefault(kind, []).append(Member(key[0], key[1], group))  # type: ignore[arg-type]
    return [Family(tuple(members[kind]), len(numbers[kind])) for kind in members]
