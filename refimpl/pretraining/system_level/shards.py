r"""Parameters laid end to end, padded, and cut into one shard for each rank.

Source: `zero` (arXiv 1910.02054), Section 5: state is divided into N equal partitions, and rank i updates the i-th only.

Differs from the paper: a unit's length is padded to a multiple of N; the padding is held and sent, and counted.

Not here: parameter groups; optimizers that look at a whole matrix (their pieces would be cut).
"""

from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from refimpl.distributed import Group
from refimpl.pretraining.system_level.protocol import Factory, bytes_of, state_tensors

HALF = (torch.float16, torch.bfloat16)


class Unit:
    r"""Parameters that are gathered and reduced together, and this rank's share of them.

    In half precision the optimizer works on a float32 copy of the shard, so that with Adam a rank's states take
    $K = 12$ bytes a parameter of its shard; otherwise on the shard itself, $K = 8$ bytes in float32.

    Args:
        parameters: of one dtype, all trained or none; their data become views of `flat`.
        optimizer: makes the optimizer of this rank's pieces; a parameter's piece is what of it falls into the shard, 1-D.
        group: the ranks.
        resident: whether `flat` stays; otherwise only the shard does, and the parameters are empty until `gather`.
    """

    def __init__(self, parameters: list[nn.Parameter], optimizer: Factory, group: Group, resident: bool) -> None:
        self.parameters, self.group, self.resident = parameters, group, resident
        self.trained = parameters[0].requires_grad
        self.ends = [0, *accumulate(p.numel() for p in parameters)]
        size = -(-self.ends[-1] // group.size)
        self.begin = group.rank * size
        self.flat: Tensor | None = parameters[0].data.new_zeros(size * group.size)
        for view, parameter in zip(self.views(self.flat), parameters, strict=True):
            view.copy_(parameter.data)
        group.broadcast(self.flat)
        self.shard = self.flat[self.begin : self.begin + size]
        if resident:
            self.show()
        else:
            self.shard = self.shard.clone()
            self.hide()
        self.gradient: Tensor | None = None
        self.reached: set[nn.Parameter] = set()
        self._make_optimizer(optimizer)

    def _make_optimizer(self, optimizer: Factory) -> None:
        self.master = self.shard.float() if self.trained and self.shard.dtype in HALF else self.shard
        self.pieces: list[tuple[nn.Parameter, nn.Parameter, slice]] = []
        for (start, end), parameter in zip(pairwise(self.ends), self.parameters, strict=True):
            piece = slice(max(start - self.begin, 0), min(end - self.begin, len(self.shard)))
            if self.trained and piece.start < piece.stop:
                self.pieces.append((parameter, nn.Parameter(self.master[piece]), piece))
        self.optimizer = optimizer([piece for _, piece, _ in self.pieces]) if self.pieces else None

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters as they lie in a flat tensor of the unit's layout."""
        return [flat[a:b].view(p.shape) for (a, b), p in zip(pairwise(self.ends), self.parameters, strict=True)]

    def gathered(self) -> Tensor:
        """All ranks' shards, `[padded]`, new memory; called on every rank."""
        return self.group.all_gather(self.shard.new_empty(len(self.shard) * self.group.size), self.shard)

    def show(self) -> None:
        """Let the parameters look at `flat`."""
        assert self.flat is not None
        for parameter, view in zip(self.parameters, self.views(self.flat), strict=True):
            parameter.data = view

    def hide(self) -> None:
        """Let go of `flat`: a parameter keeps its shape and reads NaN, one number however large it is."""
        self.flat = None
        nothing = torch.full((), float("nan"), dtype=self.shard.dtype, device=self.shard.device)
        for parameter in self.parameters:
            parameter.data = nothing.expand(parameter.shape)

    def reduce(self) -> Callable[[], None]:
        """Take the parameters' gradients away and start to sum them; the function returned waits and keeps this rank's part."""
        flat = self.shard.new_zeros(len(self.shard) * self.group.size)
        for parameter, view in zip(self.parameters, self.views(flat), strict=True):
            if parameter.grad is not None:
                self.reached.add(parameter)
                view.copy_(parameter.grad)
                parameter.grad = None
        part = self.group.reduce_scatter(flat)

        def finish() -> None:
            self.gradient = part() if self.gradient is None else self.gradient.add_(part())

        return finish

    def update(self, reached: set[nn.Parameter]) -> None:
        """Update this rank's shard by the summed gradient, and forget it; a parameter that nothing reached stays."""
        assert self.gradient is not None
        for parameter, piece, place in self.pieces:
            piece.grad = self.gradient[place].to(piece.dtype) if parameter in reached else None
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.master is not self.shard:
            self.shard.copy_(self.master)
        self.gradient = None
        self.reached.clear()
        if self.flat is not None:
            self.group.all_gather(self.flat)

    def states(self) -> Iterable[Tensor]:
        """What this rank holds for the optimizer, a float32 copy of the shard included."""
        yield from state_tensors(self.optimizer) if self.optimizer else ()
        if self.master is not self.shard:
            yield self.master

    def parameter_bytes(self) -> int:
        """Bytes of the shard, and of the whole unit or the empty parameters."""
        return bytes_of([self.shard, *self.parameters])


def by_bytes(parameters: Iterable[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    """Group neighbours of one dtype up to `limit` bytes; a larger parameter stands alone.

    Examples:
        >>> [len(group) for group in by_bytes([nn.Parameter(torch.zeros(n)) for n in (1, 2, 9, 1)], 12)]
        [2, 1, 1]
    """
    groups: list[list[nn.Parameter]] = []
    for parameter in parameters:
        last = groups[-1] if groups else []
        if last and last[0].dtype == parameter.dtype and sum(p.nbytes for p in [*last, parameter]) <= limit:
            last.append(parameter)
        else:
            groups.append([parameter])
    return groups
