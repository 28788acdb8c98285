r"""KL clipping: round to nearest on the grid whose histogram tells least apart from that of the weights.

Source: `tensorrt-int8-2017`, "Entropy Calibration - pseudocode", for the threshold; `refimpl/compression/quantization/observers.py`
has it (`kl_range`), for activations and other quantizers, and says what is taken from NVIDIA's code. Its use on weights is a baseline of
`ocs` (arXiv 1901.09504); official code cornell-zhang/dnn-quant-ocs@ca3a413c73850b4e5d7aac558f5856b44060e39c,
distiller/quantization/clip.py, `find_clip_entropy`.

Differs from the paper: the slides find thresholds for activations, and leave weights unclipped. With fewer bits than 8 there are
$2^{bits-1}$ levels for magnitudes, as in `ocs`, whose histogram has 1,001 bins with signs instead of 2,048 of magnitudes. The step is
$2T / (2^{bits} - 1)$, that of the symmetric grid of `rtn`, where the slides have $T / 127$.

Not here: calibration of activations over a model, to which `kl_range` is the step that finds a range.
"""

from dataclasses import dataclass

from torch import Tensor

from refimpl.compression.quantization.affine import Granularity
from refimpl.compression.quantization.observers import kl_range, zero_filled
from refimpl.compression.quantization.weight_only.rtn import RTN


@dataclass(frozen=True, kw_only=True)
class KLClip(RTN):
    r"""Round-to-nearest on the range $\pm T$ of least divergence.

    Args:
        bits: 2 to 8.
        granularity: what shares a threshold: the whole tensor, as in the source, an output channel, or `group_size` neighbours in a
            channel. A histogram of few weights is thin, and clips little.
        group_size: as in `rtn`.
        symmetric: the range is $[-T, T]$; False keeps of it what the weights reach, and a zero point.
        scale_dtype: as in `rtn`.

    Examples:
        >>> import torch
        >>> weight = torch.special.ndtri(torch.linspace(0.001, 0.999, 2000)).view(2, 1000)
        >>> weight[0, 0] = 40.0
        >>> [round(float(KLClip(bits=bits)(weight).dense().max()), 2) for bits in (8, 4, 2)]
        [3.1, 2.78, 1.82]
    """

    bits: int = 8
    granularity: Granularity = "tensor"
    symmetric: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits < 2:
            raise ValueError(f"bits={self.bits} must be 2 to 8: with one, the positive half has a single level")

    def covered(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The range of least divergence of each group, `[groups]` twice."""
        return kl_range(zero_filled(weight, self.granularity, self.group_size), self.bits)
