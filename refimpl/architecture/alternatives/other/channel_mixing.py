r"""RWKV's branch over channels: a feed-forward with a squared ReLU and a gate, on the input mixed with the one before.

Source: `rwkv` (arXiv 2305.13048), Eqs. (14), (15) and (18); official code
BlinkDL/RWKV-LM@524481d5099b38d9bc8ef1e89209161b86c8011b, RWKV-v4neo/src/model.py (`RWKV_ChannelMix`). Parameters have the names of Hugging Face's checkpoints.

Differs from the paper: every matrix is drawn here, as in `time_mixing.py`.

Not here: variants of later versions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.architecture.alternatives.other.time_mixing import orthogonal, shifted
from refimpl.architecture.alternatives.protocol import Mixer


class ChannelMixing(Mixer):
    r"""The branch over channels, $\sigma(r) \odot W_v \max(k, 0)^2$ (Eqs. 14, 15, 18); its state is the input before."""

    def __init__(
        self, d_model: int, d_ff: int, generator: torch.Generator | None, layer: int = 0, n_layers: int = 1
    ) -> None:
        super().__init__()
        self.d_model = d_model
        ratio = (torch.arange(d_model) / d_model) ** (1 - layer / n_layers)
        self.time_mix_key, self.time_mix_receptance = nn.Parameter(ratio), nn.Parameter(ratio.clone())
        self.key, self.receptance = orthogonal(d_model, d_ff, generator), orthogonal(d_model, d_model, generator)
        self.value = orthogonal(d_ff, d_model, generator)

    def initial_state(self, batch: int) -> Tensor:
        """Zeros."""
        return self.time_mix_key.new_zeros(batch, self.d_model)

    def extend(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.extend`."""
        self.check(x)
        return self.mixed(x, shifted(x, state)), x[:, -1].clone()

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.step`."""
        return self.mixed(x, state), x.clone()

    def mixed(self, x: Tensor, before: Tensor) -> Tensor:
        """Outputs from inputs `[..., d_model]` and those one position before."""
        k = self.key(torch.lerp(before, x, self.time_mix_key))
        r = self.receptance(torch.lerp(before, x, self.time_mix_receptance))
        out: Tensor = r.sigmoid() * self.value(F.relu(k).square())
        return out
