r"""ZeRO: data parallelism whose ranks share optimizer states, then gradients, then parameters.

Source: `zero` (arXiv 1910.02054), Section 5 (stages, written $P_{os}$, $P_{os+g}$, $P_{os+g+p}$), Section 7 (communication),
Figure 1 (bytes); official code deepspeedai/DeepSpeed@edaa7221267243c7be7fb49c5d5f5c4fb97b4641, `deepspeed/runtime/zero`.

Bytes of a rank for $\Psi$ parameters and N ranks. Mixed precision with Adam, the paper's: $4\Psi + 12\Psi/N$,
$2\Psi + 14\Psi/N$, $16\Psi/N$. In float32 a parameter and a gradient take 4 bytes, the states 8 and no further copy:
$8\Psi + 8\Psi/N$, $4\Psi + 12\Psi/N$, $16\Psi/N$.

Differs from the paper: a shard is cut from each unit (bucket, or module) instead of from the whole model, which is the same
share. On gloo a reduce-scatter is a pairwise exchange and a sum (see `refimpl.distributed`), of the same volume. A weight is
gathered in the backward pass where autograd asks for it; what autograd does not need (a bias, an embedding) is not, so that
stage 3 sends a little less than $3\Psi$. The ranks also tell each other which parameters have a gradient, 8 bytes each.
Stages 1 and 2 of the official code do not reduce-scatter: by default they all-reduce whole buckets and keep a part
(`use_multi_rank_bucket_allreduce`), which with the gathering of parameters moves $3\Psi$; this follows the paper.

Not here: offloading, prefetching, clipping, loss scaling, buffers of the model, reentrant checkpointing, and ZeRO-R
(partitioned activations, constant buffers, defragmentation). In stage 3 all ranks must take the same way through the model.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from refimpl.distributed import Group
from refimpl.pretraining.system_level.data_parallel import check_micro_batches
from refimpl.pretraining.system_level.protocol import Factory, Loss, Parallel, Run
from refimpl.pretraining.system_level.sharded import Sharded
from refimpl.pretraining.system_level.shards import Unit, by_bytes


@dataclass(frozen=True, kw_only=True)
class ZeRO(Parallel):
    """Zero redundancy optimizer, for any module and any elementwise optimizer.

    Args:
        stage: 1 shards optimizer states; 2 gradients too; 3 parameters too.
        bucket_bytes: gradients that are reduced together in stages 1 and 2; in stage 3 a module's own are.
        micro_batches: parts in which each rank works through its rows; stages 2 and 3 exchange gradients after each.
    """

    stage: Literal[1, 2, 3] = 1
    bucket_bytes: int = 25 * 2**20
    micro_batches: int = 1

    def __post_init__(self) -> None:
        if self.stage not in (1, 2, 3):
            raise ValueError(f"stage={self.stage!r} must be 1, 2 or 3; `DataParallel` is stage 0")
        if self.bucket_bytes < 1:
            raise ValueError(f"bucket_bytes={self.bucket_bytes} must be at least 1, which reduces each parameter alone")
        check_micro_batches(self.micro_batches)

    def __call__(self, model: nn.Module, optimizer: Factory, loss: Loss, group: Group) -> Run:
        """Take over the training of a model, whose parameters become rank 0's everywhere.

        Args:
            model: the same module on every rank; it keeps its identity, its parameters change in place.
            optimizer: makes an elementwise optimizer (Adam, SGD, Lion); it gets 1-D pieces of parameters.
            loss: `loss(outputs, targets)`, a mean over rows.
            group: the ranks.

        Raises:
            ValueError: nothing in the model is trained.
        """
        if self.stage == 3:
            return ShardedParameters(model, optimizer, loss, group, self.micro_batches)
        return ShardedStates(model, optimizer, loss, group, self)


class ShardedStates(Sharded):
    """Stages 1 and 2: every rank holds all parameters, and updates its shard of each bucket."""

    def __init__(self, model: nn.Module, optimizer: Factory, loss: Loss, group: Group, settings: ZeRO) -> None:
        super().__init__(model, loss, group, settings.micro_batches)
        buckets = by_bytes(reversed(self.trained), settings.bucket_bytes)  # about the order of the backward pass
        self.units = [Unit(bucket, optimizer, group, resident=True) for bucket in buckets]
        self.eager = settings.stage == 2
        self.watch()
        for parameter in self.in_no_unit():
            group.broadcast(parameter.data)


class ShardedParameters(Sharded):
    """Stage 3: a module's own parameters are there while it runs, and in the backward pass while autograd reads them."""

    eager = True

    def __init__(self, model: nn.Module, optimizer: Factory, loss: Loss, group: Group, micro_batches: int) -> None:
        super().__init__(model, loss, group, micro_batches)
        self.units = [Unit(own, optimizer, group, resident=False) for own in _own_parameters(model)]
        self.watch()
        self.running: list[list[Unit]] = []  # of each module that runs, outermost first: units gathered for it
        self.latest: tuple[Unit, Tensor] | None = None
        for module in model.modules():
            self.hooks += [
                module.register_forward_pre_hook(self._enter, prepend=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]
            module._parameters = _Watched(module._parameters, self._use)

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.running.append([])
        for parameter in module.parameters(recurse=False):
            self._use(parameter)

    def _use(self, parameter: nn.Parameter | None) -> None:
        """Gather what a running module reads, be it another module's."""
        unit = self.unit_of.get(parameter) if parameter is not None and self.running else None
        if unit is not None and not any(unit in units for units in self.running):
            unit.flat = unit.gathered()
            unit.show()
            self.running[-1].append(unit)
            self.count_live(unit.flat.nbytes)

    def _leave(self, *_: Any) -> None:
        for unit in self.running.pop():
            assert unit.flat is not None
            self.count_live(-unit.flat.nbytes)
            unit.hide()

    def forward_pass(self) -> AbstractContextManager[object]:
        """Keep of a weight that autograd saves only whose it is and how it lies, so that the weight is freed."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, saved: Tensor) -> Any:
        memory = saved.untyped_storage().data_ptr()
        for units in self.running:
            for unit in units:
                if unit.flat is not None and unit.flat.untyped_storage().data_ptr() == memory:
                    return unit, saved.size(), saved.stride(), saved.storage_offset()
        return saved

    def _unpack(self, saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        unit, *layout = saved
        if self.latest is None or self.latest[0] is not unit:
            self._forget()
            self.latest = (unit, unit.gathered())
            self.count_live(self.latest[1].nbytes)
        return self.latest[1].as_strided(*layout)

    def _forget(self) -> None:
        if self.latest is not None:
            self.count_live(-self.latest[1].nbytes)
            self.latest = None

    def after_backward(self) -> None:
        """No whole parameter and no whole gradient outlives the backward pass."""
        self._forget()
        super().after_backward()

    def close(self) -> nn.Module:
        """Give the model its parameters back, and its modules their own dictionaries."""
        for module in self.model.modules():
            module._parameters = dict(module._parameters)
        return super().close()


class _Watched(dict[str, nn.Parameter | None]):
    """A module's parameters, which tells who reads one: also where another module than their owner does."""

    def __init__(self, parameters: dict[str, nn.Parameter | None], use: Callable[[nn.Parameter | None], None]) -> None:
        super().__init__(parameters)
        self.use = use

    def __getitem__(self, name: str) -> nn.Parameter | None:
        parameter = super().__getitem__(name)
        self.use(parameter)
        return parameter


def _own_parameters(model: nn.Module) -> list[list[nn.Parameter]]:
    """Of each module its own parameters, split by dtype and by whether they are trained; a tied one goes to the first."""
    found: list[list[nn.Parameter]] = []
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        kinds: dict[tuple[torch.dtype, bool], list[nn.Parameter]] = {}
        for parameter in module.parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                kinds.setdefault((parameter.dtype, parameter.requires_grad), []).append(parameter)
        found += kinds.values()
    return found[::-1]
