r"""MSE clipping: round to nearest on the grid, narrower than the weights' range, that moves them least.

Source: `aciq` (arXiv 1810.05723) for the trade-off between clipping and rounding that the squared error measures; `ocs`
(arXiv 1901.09504), on clipping, for the search, whose official code is named in `refimpl/compression/quantization/observers.py`, where the
search stands (`mse_range`) for other quantizers to use.

Differs from the paper: every channel has its own range, where `ocs` clips whole tensors; `granularity="tensor"` does that. The grid may
have a zero point. Candidates are judged with the scale as it is stored.

Not here: ACIQ's formulas for Laplace and normal distributions, to which a test holds the search.
"""

from dataclasses import dataclass

from torch import Tensor

from refimpl.compression.quantization.affine import Granularity
from refimpl.compression.quantization.observers import mse_range, zero_filled
from refimpl.compression.quantization.weight_only.rtn import RTN


@dataclass(frozen=True, kw_only=True)
class MSEClip(RTN):
    r"""Round-to-nearest on the best share of each range, of 1, 0.99, down to 0.01.

    Args:
        bits: 1 to 8.
        granularity: what shares a range: the whole tensor, an output channel, or `group_size` neighbours in a channel.
        group_size: as in `rtn`.
        symmetric: as in `rtn`.
        scale_dtype: as in `rtn`.
        norm: exponent p of the error $\sum_i |w_i - \hat w_i|^p$, above 0; the official code of `gptq` uses 2.4.

    Examples:
        Levels 0, c/3, 2c/3 and c: $99 (c/3 - 1)^2 + (12 - c)^2$ is least at 3.75; tried are multiples of 0.12.

        >>> import torch
        >>> packed = MSEClip(bits=2)(torch.tensor([[1.0] * 99 + [12.0]]))
        >>> [round(value, 2) for value in packed.dense()[0, -2:].tolist()], packed.nbytes
        ([1.24, 3.72], 30)
    """

    bits: int = 4
    granularity: Granularity = "channel"
    norm: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.norm < float("inf"):
            raise ValueError(f"norm={self.norm} must be above 0; 2 is the squared error")

    def covered(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The range of least error of each group, `[groups]` twice."""
        groups = zero_filled(weight, self.granularity, self.group_size)
        return mse_range(groups, self.bits, symmetric=self.symmetric, scale_dtype=self.scale_dtype, norm=self.norm)
