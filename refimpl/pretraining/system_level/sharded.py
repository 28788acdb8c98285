r"""What ZeRO's stages share: gradients are reduced unit by unit, each rank updates its shards.

Source: `zero` (arXiv 1910.02054), Section 5.

Differs from the paper: units are reduced in one fixed order, so that ranks whose backward passes reach different parameters
still send the same things at the same time. A unit that is ready early waits, its gradients whole, for those before it: for
one that no gradient reaches, until the backward pass ends.

Not here: what happens to parameters, see `zero`.
"""

from collections import deque
from collections.abc import Callable

from torch import Tensor, nn

from refimpl.pretraining.system_level.data_parallel import RowsRun
from refimpl.pretraining.system_level.protocol import Held, bytes_of
from refimpl.pretraining.system_level.shards import Unit


class Sharded(RowsRun):
    """A run whose ranks share optimizer states, and it may be more."""

    units: list[Unit]  # in the order in which they are reduced
    eager: bool  # reduce while the backward pass runs
    going: Callable[[], None] | None  # waits for the exchange that is under way

    def watch(self) -> None:
        """Have `_ready` called as soon as a parameter's gradient is complete; `live` counts what is held for a while."""
        self.unit_of = {parameter: unit for unit in self.units for parameter in unit.parameters}
        self.live, self.going = 0, None
        self.missing: dict[Unit, set[nn.Parameter]] = {}
        self.hooks = [p.register_post_accumulate_grad_hook(self._ready) for p in self.trained]  # type: ignore[no-untyped-call]
        self._expect()

    def _expect(self) -> None:
        self.missing = {unit: set(unit.parameters) for unit in self.units if unit.trained}
        self.queue = deque(self.missing)

    def _ready(self, parameter: nn.Parameter) -> None:
        unit = self.unit_of[parameter]
        if parameter in self.missing[unit]:  # otherwise a micro-batch after the first, in stage 1
            self.missing[unit].remove(parameter)
            self.count_live(parameter.nbytes if self.eager else 0)  # in stage 1 it is among the gradients held
        while self.eager and self.queue and not self.missing[self.queue[0]]:
            self._reduce(self.queue.popleft())

    def _reduce(self, unit: Unit) -> None:
        """Exchange a unit's gradients, while the backward pass goes on; one exchange at a time bounds the memory."""
        self._finish()
        flat = 2 * self.group.size * unit.shard.nbytes  # what is sent and what arrives
        self.count_live(flat)
        waited = unit.reduce()
        self.count_live(-sum(p.nbytes for p in unit.parameters if p in unit.reached))

        def going() -> None:
            waited()
            self.count_live(-flat)

        self.going = going

    def _finish(self) -> None:
        if self.going is not None:
            self.going()
            self.going = None

    def count_live(self, more: int) -> None:
        """Note bytes that come to live for a while, or that go again."""
        self.live += more
        self.peak = max(self.peak, self.live)

    def _flush(self) -> None:
        """Reduce what no hook has completed, in the same order on every rank."""
        while self.queue:
            self._reduce(self.queue.popleft())
        self._finish()
        if any(parameter.grad is not None for parameter in self.trained):
            raise RuntimeError("a gradient grew after it was sent: reentrant checkpointing is not supported")

    def after_backward(self) -> None:
        """Stages 2 and 3: no whole gradient outlives the backward pass."""
        if self.eager:
            self._flush()
            self._expect()
            self.live = 0

    def has_gradient(self, parameter: nn.Parameter) -> bool:
        """Whether this rank's backward passes reached a parameter."""
        return parameter.grad is not None or parameter in self.unit_of[parameter].reached

    def update(self, reached: set[nn.Parameter]) -> None:
        """Update the shards unit by unit, so that of whole gradients (stage 1) one more bucket is held at most."""
        units = [unit for unit in self.units if unit.trained]
        held = [p.grad for p in self.trained if p.grad is not None] + [
            u.gradient for u in units if u.gradient is not None
        ]
        gradients = bytes_of(held)
        del held
        for unit in units:
            if not self.eager:
                self.peak = max(self.peak, 2 * self.group.size * unit.shard.nbytes)
                unit.reduce()()
            unit.update(reached)
        self.held = Held(
            sum(unit.parameter_bytes() for unit in self.units) + bytes_of(self.in_no_unit()),
            gradients,
            bytes_of(tensor for unit in units for tensor in unit.states()),
        )
        self._expect()
        self.live = 0

    def in_no_unit(self) -> list[nn.Parameter]:
        """Parameters that are in no unit."""
        return [p for p in self.model.parameters() if p not in self.unit_of]

    def whole(self) -> dict[str, Tensor]:
        """Copies of all parameters, by name; a tied one under its first."""
        flats = {unit: unit.gathered() if unit.flat is None else unit.flat for unit in self.units}
        data = {p: v for unit, flat in flats.items() for p, v in zip(unit.parameters, unit.views(flat), strict=True)}
        return {name: data.get(p, p.detach()).clone() for name, p in self.model.named_parameters()}

    def close(self) -> nn.Module:
        """Give the model its parameters back, each in memory of its own."""
        for hook in self.hooks:
            hook.remove()
        whole = self.whole()
        for name, parameter in self.model.named_parameters():
            parameter.data = whole[name]
        return self.model
