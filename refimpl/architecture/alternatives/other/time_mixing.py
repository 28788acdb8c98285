r"""RWKV's branch over time: receptance, key and value of the input mixed with the one before, and the weighted average.

Source: `rwkv` (arXiv 2305.13048), Eqs. (11) to (13), (16) and (17), and the initial values of Appendix E; official code
BlinkDL/RWKV-LM@524481d5099b38d9bc8ef1e89209161b86c8011b, RWKV-v4neo/src/model.py (`RWKV_TimeMix`). Parameters have the names of Hugging Face's checkpoints.

Differs from the paper: the receptance's mixture starts with the root of the key's, as in the official code, where Appendix E
has half of it; the decay that Appendix E gives is that of $\ln w$. Every matrix is drawn here, orthogonal as the official code
draws those that it does not set to zero (`RWKVModel.initialize` sets the zeros). The average is float32 at least in any model.

Not here: the average itself (`wkv.py`).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from refimpl.architecture.alternatives.other.wkv import WKVState, no_past, wkv, wkv_step
from refimpl.architecture.alternatives.protocol import Mixer, blank


class TimeState(NamedTuple):
    """What a decoder keeps of the time mixing.

    Attributes:
        last: `[batch, d_model]`, the input before.
        sums: numerator, denominator and exponent.
    """

    last: Tensor
    sums: WKVState


class TimeMixing(Mixer):
    """The branch over time (Eqs. 11 to 13, 16, 17). Names are the checkpoints'."""

    def __init__(
        self, d_model: int, channels: int, generator: torch.Generator | None, layer: int = 0, n_layers: int = 1
    ) -> None:
        super().__init__()
        self.d_model = d_model
        deep, place = layer / max(n_layers - 1, 1), torch.arange(channels) / max(channels - 1, 1)
        self.time_decay = nn.Parameter(-5 + 8 * place ** (0.7 + 1.3 * deep))  # $\ln w$
        self.time_first = nn.Parameter(math.log(0.3) + 0.5 * ((torch.arange(channels) + 1) % 3 - 1))  # $u$
        ratio = (torch.arange(d_model) / d_model) ** (1 - layer / n_layers)
        self.time_mix_key = nn.Parameter(ratio)
        self.time_mix_value = nn.Parameter(ratio + 0.3 * deep)
        self.time_mix_receptance = nn.Parameter(ratio.sqrt())
        self.key, self.value, self.receptance = (orthogonal(d_model, channels, generator) for _ in range(3))
        self.output = orthogonal(channels, d_model, generator)

    def initial_state(self, batch: int) -> TimeState:
        """Zeros, and sums of nothing."""
        wide = torch.promote_types(self.time_decay.dtype, torch.float32)
        return TimeState(
            self.time_mix_key.new_zeros(batch, self.d_model),
            no_past(self.time_decay.new_empty(batch, len(self.time_decay), dtype=wide)),
        )

    def extend(self, x: Tensor, state: TimeState) -> tuple[Tensor, TimeState]:
        """See `Mixer.extend`."""
        self.check(x)
        gate, k, v, w, u = self.projected(x, shifted(x, state.last))
        y, sums = wkv(k, v, w, u, state.sums)
        return self.output(gate * y.to(gate.dtype)), TimeState(x[:, -1].clone(), sums)

    def step(self, x: Tensor, state: TimeState) -> tuple[Tensor, TimeState]:
        """See `Mixer.step`."""
        gate, k, v, w, u = self.projected(x, state.last)
        y, sums = wkv_step(k, v, w, u, state.sums)
        return self.output(gate * y.to(gate.dtype)), TimeState(x.clone(), sums)

    def projected(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        r"""What `wkv` takes and its gate, from inputs `[..., d_model]` and those one position before.

        Returns:
            $\sigma(r)$, $k$, $v$ `[..., channels]`, $w$ and $u$ `[channels]`; all but the first float32 at least.
        """
        r, k, v = (
            layer(torch.lerp(before, x, mix))
            for layer, mix in (
                (self.receptance, self.time_mix_receptance),
                (self.key, self.time_mix_key),
                (self.value, self.time_mix_value),
            )
        )
        wide = torch.promote_types(k.dtype, torch.float32)
        return r.sigmoid(), k.to(wide), v.to(wide), self.time_decay.to(wide).exp(), self.time_first.to(wide)


def shifted(x: Tensor, last: Tensor) -> Tensor:
    """Inputs one position before, `[batch, time, d_model]`; `last` `[batch, d_model]` is the one before them all."""
    return torch.cat((last.unsqueeze(1), x[:, :-1]), dim=1)


def orthogonal(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    r"""A linear layer without bias, orthogonal, times $\sqrt{out/in}$ where it widens."""
    layer = blank(nn.Linear(inputs, outputs, bias=False, device="meta"))
    nn.init.orthogonal_(layer.weight, max(1.0, outputs / inputs) ** 0.5, generator=generator)
    return layer
