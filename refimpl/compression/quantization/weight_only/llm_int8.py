r"""LLM.int8(): vector-wise int8 products, with the inputs' outlier features apart, in 16 bits.

Source: `llm-int8` (arXiv 2208.07339), Section 3.1 for vector-wise quantization, Section 3.2 with Eq. (8) for the mixed-precision
decomposition, threshold 6.0; official code bitsandbytes-foundation/bitsandbytes@0155ecc672fc1523ae8dfd6440060f1c404fc8c3,
bitsandbytes/backends/default/ops.py (`int8_vectorwise_quant`, `int8_mixed_scaled_mm`).

Differs from the paper: as in the official code, weights are held in int8 alone, so that the columns of outliers are multiplied by
dequantized codes; and a token's scale counts its entries below the threshold in outlier features too, where Eq. (8) would
leave the whole features out. Outlier features are multiplied in the dtype of the layer's inputs, of which the paper's is
16 bits. A code is round(x / scale), there round(x · (1 / scale)): they part at ties alone.

Not here: 8-bit backward passes; integer kernels.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from refimpl.compression.protocol import check_layer
from refimpl.compression.quantization.activations import Activations, IntegerWeight, absmax_round


class OutlierWeight(IntegerWeight):
    """An int8 weight whose inputs are quantized token by token, but for features with outliers.

    Args:
        weight: `[out, in]`, left unchanged.
        threshold: magnitude from which an entry makes its feature an outlier, for all tokens of the call; None: none does.
    """

    def __init__(self, weight: Tensor, threshold: float | None) -> None:
        integers, scale = absmax_round(weight, 8)
        super().__init__(
            integers.add_(128).to(torch.uint8),
            scale,
            None,
            bits=8,
            granularity="channel",
            shape=(weight.shape[0], weight.shape[1]),
            dtype=weight.dtype,
            activations=Activations(),
        )
        self.threshold = threshold

    def outliers(self, inputs: Tensor) -> Tensor:
        """Features of `[..., in]` in which any token reaches the threshold, in rising order."""
        if self.threshold is None:
            return torch.empty(0, dtype=torch.long, device=inputs.device)
        return (inputs.abs() >= self.threshold).reshape(-1, inputs.shape[-1]).any(dim=0).nonzero().flatten()

    def quantize_inputs(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Integers for the inputs, 0 in outlier features, and the scale of each token."""
        if self.threshold is None:
            return super().quantize_inputs(inputs)
        codes, scale = super().quantize_inputs(inputs.masked_fill(inputs.abs() >= self.threshold, 0))
        return codes.index_fill_(-1, self.outliers(inputs), 0), scale

    def read(self, inputs: Tensor) -> Tensor:
        """The quantized inputs' values, and those in outlier features as they are."""
        apart = self.outliers(inputs)
        return super().read(inputs).index_copy_(-1, apart, inputs.index_select(-1, apart))

    def multiply(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., in]` to `[..., out]`: the product of integers, and that of outlier features (Eq. 8)."""
        output = super().multiply(inputs, bias)
        apart = self.outliers(inputs)
        if len(apart):
            codes = self.codes[: self.shape[0] * self.shape[1]].view(self.shape)  # packed, 8 bits are a byte
            columns = (codes.index_select(1, apart).float() - 128) * self.scale[:, None]
            output = output + inputs.index_select(-1, apart) @ columns.to(inputs.dtype).T
        return output


@dataclass(frozen=True, kw_only=True)
class LLMInt8:
    """Int8 weights and inputs with a scale for each output and each token, and outlier features in the inputs' precision.

    Args:
        threshold: magnitude from which an input is an outlier, above 0; None is vector-wise quantization alone.

    Examples:
        The second feature is an outlier, and stays 100; the third is rounded on a grid that does not know of it.

        >>> held = LLMInt8()(torch.ones(1, 3))
        >>> held.read(torch.tensor([[1.27, 100.0, 0.0149]]))[0, 1:].tolist()
        [100.0, 0.009999999776482582]
        >>> LLMInt8(threshold=None)(torch.ones(1, 3)).read(torch.tensor([[1.27, 100.0, 0.0149]]))[0, 2].item()
        0.0
    """

    needs_inputs: ClassVar[bool] = False

    threshold: float | None = 6.0

    def __post_init__(self) -> None:
        if self.threshold is not None and not self.threshold > 0:
            raise ValueError(
                f"threshold={self.threshold} must be above 0, or None for no decomposition; the paper uses 6.0"
            )

    @torch.no_grad()
    def __call__(self, weight: Tensor, inputs: Tensor | None = None) -> OutlierWeight:  # noqa: ARG002 - the protocol passes it
        """Quantize a weight; outliers are found anew in each call's inputs.

        Args:
            weight: `[out, in]`, finite, not empty; left unchanged.
            inputs: ignored.

        Returns:
            Codes of a byte and a float32 scale for each output; `multiply` quantizes what it is given.

        Raises:
            ValueError: the weight is no matrix, is empty, or holds NaN or infinity.
        """
        check_layer(weight)
        return OutlierWeight(weight, self.threshold)
