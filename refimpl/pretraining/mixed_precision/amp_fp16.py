r"""Mixed precision training in float16: float32 master weights, a scaled loss, and steps skipped on overflow.

Source: `mixed-precision-training` (arXiv 1710.03740), Sections 3.1 to 3.3. The paper chooses the scale by hand and proposes
to skip the update where a gradient overflows; the search for the scale, with its defaults, is that of PyTorch 2.13's
`torch.amp.GradScaler`.

Differs from the paper: the scale is searched while training; `growth_factor=1, backoff_factor=1` keeps it constant, as the
paper does. A scale that has fallen below $2^{-24}$ raises, since no step would ever be taken again.

Not here: operators chosen one by one (`torch.autocast`). All of the forward pass is float16 in memory; that dot products and
reductions (norms, softmax) accumulate in float32 is the kernels' part, and PyTorch's do. The loss must take its logits to
float32 itself, as `next_token_loss` does.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from refimpl.pretraining.mixed_precision.protocol import CopiedWeights
from refimpl.pretraining.protocol import Part

SMALLEST_SCALE = 2.0**-24


@dataclass(frozen=True, kw_only=True)
class AmpFP16:
    r"""Mixed precision training with dynamic loss scaling.

    Args:
        init_scale: $S$ at the start, above 0. Take a power of two: it changes exponents only.
        growth_factor: what $S$ is multiplied by after `growth_interval` steps without overflow, 1 or more.
        backoff_factor: what $S$ is multiplied by after an overflow, above 0, at most 1.
        growth_interval: steps, 1 or more.

    Examples:
        A gradient of $2^{-25}$ is zero in float16, and survives where the loss is scaled:

        >>> model = nn.Linear(1, 1, bias=False)
        >>> tiny = lambda model, batch: model(batch).float().sum() * 2.0**-25
        >>> for scale in (1.0, 2.0**10):
        ...     model.zero_grad()
        ...     _ = AmpFP16(init_scale=scale).start(model).backward(model, tiny, torch.ones(1, 1))
        ...     print(model.weight.grad.item() * 2**25)
        0.0
        1.0
    """

    init_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000

    part: ClassVar[Part] = "precision"

    def __post_init__(self) -> None:
        if not SMALLEST_SCALE <= self.init_scale < math.inf:
            raise ValueError(f"init_scale={self.init_scale} must be finite and at least 2**-24; 2**16 is usual")
        if not 1 <= self.growth_factor < math.inf:
            raise ValueError(f"growth_factor={self.growth_factor} must be finite and at least 1, which keeps the scale")
        if not 0 < self.backoff_factor <= 1:
            raise ValueError(f"backoff_factor={self.backoff_factor} must be in (0, 1]; 1 keeps the scale")
        if self.growth_interval < 1:
            raise ValueError(f"growth_interval={self.growth_interval} must be at least 1 step")

    def start(self, model: nn.Module) -> "ScaledLoss":
        """Begin a training of a model in float32, whose parameters become the master weights.

        Raises:
            ValueError: a parameter is of another floating-point dtype.
        """
        return ScaledLoss(model, self)


class ScaledLoss(CopiedWeights):
    """A training in float16: see `CopiedWeights` for forward and backward, here is the scale.

    Args:
        model: as in `CopiedWeights`.
        config: how the scale moves.
    """

    def __init__(self, model: nn.Module, config: AmpFP16) -> None:
        super().__init__(model, torch.float16)
        self.config, self.scale, self.clean_steps = config, config.init_scale, 0
        self.finite: list[Tensor] = []  # flags of each backward pass since the last update, which alone waits for them

    def add_gradients(self, masters: list[nn.Parameter], narrow: list[Tensor]) -> list[Tensor]:
        """As in `CopiedWeights`, and note whether all are finite."""
        wide = super().add_gradients(masters, narrow)
        if wide:
            self.finite.append(torch.stack(torch._foreach_norm(wide, math.inf)).isfinite().all())
        return wide

    def update(self, optimizer: torch.optim.Optimizer) -> bool:
        """Take the optimizer's step if all gradients since the last one were finite, and move the scale.

        Returns:
            Whether the step was taken.

        Raises:
            FloatingPointError: the scale has fallen below 2**-24.
        """
        taken = all(self.finite)
        self.finite = []
        if taken:
            optimizer.step()
            self.clean_steps += 1
            if self.clean_steps >= self.config.growth_interval:
                self._rescale(self.config.growth_factor)
        else:
            self._rescale(self.config.backoff_factor)
        return taken

    def _rescale(self, factor: float) -> None:
        self.clean_steps = 0
        if self.scale * factor < SMALLEST_SCALE:
            raise FloatingPointError(
                f"loss scale {self.scale * factor:g}: gradients are not finite at any scale; activations overflow, or "
                "weights are NaN"
            )
        if self.scale * factor <= torch.finfo(torch.float32).max:
            self.scale *= factor

    def state_dict(self) -> dict[str, Any]:
        """Scale, and steps since it moved."""
        return {"scale": self.scale, "clean_steps": self.clean_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.scale, self.clean_steps = float(state["scale"]), int(state["clean_steps"])
