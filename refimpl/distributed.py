"""What processes that compute together exchange, and the bytes that each sends.

Source: none; plain use of `torch.distributed`. Counts follow the algorithms that move the fewest bytes: ring or pairwise.

Differs from `torch.distributed`: gloo sums by reduce-scatter only after a whole all-reduce, which sends twice as much; here
every rank sends each other rank its part, and adds what it receives.

Not here: starting them (`refimpl.processes`), subgroups.

What is counted, for size N and a buffer of b bytes (the whole one, where ranks hold parts), without headers and barriers:

    all_reduce       2 b (N - 1) / N        a reduce-scatter and an all-gather
    reduce_scatter     b (N - 1) / N
    all_gather         b (N - 1) / N
    all_to_all         b (N - 1) / N
    broadcast          b for each rank that this one passes it on to, in a binomial tree
    send               b

A program gets its `Group` from `refimpl.processes.launch`, or, started by torchrun, from `with joined() as group:`.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# torch before 2.13 knows them under their older names only.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Group:
    """This process among the others: `rank` of `size`, on `device`; `sent` counts bytes by kind of exchange."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device
        self.sent: Counter[str] = Counter()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        self._count("all_reduce", 2 * self._others(tensor))
        dist.all_reduce(tensor)
        return tensor

    def reduce_scatter(self, whole: Tensor) -> Callable[[], Tensor]:
        """Start to sum over ranks, each keeping its own part.

        Args:
            whole: `[n]`, n divisible by the group's size, contiguous; not to be written before the sum is fetched.

        Returns:
            A function that waits and gives the sum of part number `rank`, `[n / size]`.

        Raises:
            ValueError: n is not divisible by the group's size.
        """
        self._check(whole)
        self._count("reduce_scatter", self._others(whole))
        if dist.get_backend() == "nccl":
            part = whole.new_empty(len(whole) // self.size)
            work = _reduce_scatter(part, whole, async_op=True)
            return lambda: _waited(work, part)
        received = torch.empty_like(whole)
        work = dist.all_to_all_single(received, whole, async_op=True)
        return lambda: _waited(work, received).view(self.size, -1).sum(dim=0)

    def all_gather(self, whole: Tensor, part: Tensor | None = None) -> Tensor:
        """Fill `whole`, `[n]`, from the ranks' parts, `[n / size]`; None: each rank's part already stands in its place."""
        self._check(whole)
        self._count("all_gather", self._others(whole))
        _all_gather(whole, whole.view(self.size, -1)[self.rank] if part is None else part)
        return whole

    def all_to_all(self, whole: Tensor) -> Tensor:
        """Part i of every rank goes to rank i; the result holds what all ranks sent to this one, in their order."""
        self._check(whole)
        self._count("all_to_all", self._others(whole))
        received = torch.empty_like(whole)
        dist.all_to_all_single(received, whole)
        return received

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrite with the source's, in place."""
        place = (self.rank - source) % self.size
        children = [c for bit in range(place.bit_length(), self.size.bit_length()) if (c := place + 2**bit) < self.size]
        self._count("broadcast", len(children) * tensor.nbytes)
        dist.broadcast(tensor, source)
        return tensor

    def send(self, tensor: Tensor, to: int) -> None:
        """Send to one rank, which calls `receive`; returns when the tensor may be written again."""
        self._count("send", tensor.nbytes)
        dist.send(tensor, to)

    def receive(self, tensor: Tensor, source: int) -> Tensor:
        """Overwrite with what one rank sends, in place."""
        dist.recv(tensor, source)
        return tensor

    def _others(self, whole: Tensor) -> int:
        """Bytes of all parts but this rank's; every kind of exchange here is a multiple of it."""
        return whole.nbytes * (self.size - 1) // self.size

    def _count(self, kind: str, n_bytes: int) -> None:
        self.sent[kind] += n_bytes

    def _check(self, whole: Tensor) -> None:
        if whole.shape[0] % self.size:
            raise ValueError(f"a tensor of {whole.shape[0]} rows can't be cut into {self.size} equal parts; pad it")


def _waited(work: dist.Work, result: Tensor) -> Tensor:
    work.wait()
    return result


@contextmanager
def joined(
    rank: int = -1, size: int = -1, meeting: str | None = None, device: str = "cpu", timeout: float = 600.0
) -> Iterator[Group]:
    """Join the group of processes, and leave it at the end: gloo on the CPU, nccl on GPUs, one for each rank.

    Args:
        rank: this process's; left out under torchrun, which states it in the environment.
        size: number of processes; likewise.
        meeting: where they meet, `file://…` or `tcp://…`; None: where torchrun says.
        device: `cpu` or `cuda`.
        timeout: seconds after which an exchange that the others do not join raises.
    """
    cuda = device.startswith("cuda")
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=meeting or "env://",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    local = dist.get_rank() if meeting else int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(local)
    yield Group(torch.device("cuda", local) if cuda else torch.device("cpu"))
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone
