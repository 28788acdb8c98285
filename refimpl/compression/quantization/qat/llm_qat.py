r"""LLM-QAT: a quantized copy learns the original's predictions on text that the original wrote; its cache is quantized too.

Source: `llm-qat` (arXiv 2305.17888), Section 2.1 for the data (the hybrid of greedy and drawn tokens), Section 2.2 for the symmetric
MinMax grids, what shares one, and the loss; official code facebookresearch/LLM-QAT@5ef1289730de080a4781f21ef27105b6c01b116a,
generate_data.py, models/utils_quant.py (SymQuantizer), models/modeling_llama_quant.py (keys and values are rounded as their
projections give them, before the rotation, with one scale for a token's row of all heads), utils/kd_trainer.py.

Differs from the paper: gradients pass straight through every rounding, as nothing is clipped; the official code stops those of
values beyond 2 in magnitude, though it does not clip them, and adds 1e-6 to ranges and scales. The loss is a mean over positions, as
in the paper; the official one is a mean over rows. First tokens are drawn, where the official script goes through the vocabulary in order.

Not here: an end of text, at which the official generation stops a row early; the official form of 1 and 2 bits (2 bits here are
MinMax's three levels); a packed cache in models of transformers, whose caches hold the rounded values as they are.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.compression.anatomy import anatomy
from refimpl.compression.protocol import CompressedLinear, CompressedWeight, M
from refimpl.compression.quantization.activations import Activations, absmax_round, integer_weight
from refimpl.compression.quantization.packed import QuantizedWeight
from refimpl.compression.quantization.qat.cache_rows import RowAttention, round_rows
from refimpl.compression.quantization.qat.own_text import GREEDY, evaluating, vocabulary, written
from refimpl.compression.quantization.qat.protocol import QAT, FakeLinear, logits_of
from refimpl.compression.quantization.qat.straight_through import straight_through
from refimpl.model.linear import sizes
from refimpl.model.model import Attention, Decoder

Parts = Sequence[slice]  # columns of a layer's outputs that are a token's keys, and those that are its values


@dataclass(frozen=True, kw_only=True)
class LLMQAT(QAT):
    """Data-free training with quantized weights, activations and cache.

    Args:
        bits: of weights, 2 to 8, one scale for each output channel.
        activation_bits: of inputs, 2 to 8, one scale for each token; None leaves them as they are.
        kv_bits: of keys and values, 2 to 8, one scale for each token's keys and one for its values; None leaves them. All else
            needs a decoder whose layout `anatomy` knows.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> generator = torch.Generator().manual_seed(0)
        >>> teacher, method = initialize_(Decoder(config), generator), LLMQAT()
        >>> student = method.prepare(teacher)
        >>> batch = next(method.batches(teacher, None, batch=2, length=9, generator=generator))
        >>> batch.shape, method.loss(student, teacher, batch) > 0
        (torch.Size([2, 10]), tensor(True))
    """

    bits: int = 4
    activation_bits: int | None = 8
    kv_bits: int | None = 4

    def __post_init__(self) -> None:
        for name in ("bits", "activation_bits", "kv_bits"):
            value, optional = getattr(self, name), name != "bits"
            if not (optional and value is None) and not 2 <= value <= 8:
                raise ValueError(
                    f"{name}={value} must be 2 to 8{', or None' if optional else ''}; the paper's are 4 and 8"
                )

    def replacements(self, model: nn.Module, layers: Mapping[str, nn.Linear]) -> dict[nn.Module, nn.Module]:
        """A trainable layer for each; those that make keys or values round these too."""
        parts = {} if self.kv_bits is None else keys_and_values(model)
        return {layer: MinMaxLinear(layer, self, parts.get(name, ())) for name, layer in layers.items()}

    def batches(
        self,
        teacher: nn.Module,
        text: Tensor | None,  # noqa: ARG002 - not looked at
        batch: int,
        length: int,
        generator: torch.Generator,
    ) -> Iterator[Tensor]:
        """What the teacher writes, for ever: `[batch, length + 1]` tokens; in turn 3, 4 and 5 of them are not drawn.

        Args:
            teacher: the model as it was.
            text: not looked at.
            batch: rows; each begins with a token of the vocabulary, none twice before all came.
            length: tokens of a row but the last, at least 3.
            generator: of what is drawn, on the CPU; it seeds one on the model's device.

        Raises:
            ValueError: rows too short for the tokens that are not drawn.
        """
        if length < GREEDY[-1] - 1:
            raise ValueError(
                f"length={length} must be at least {GREEDY[-1] - 1}: {GREEDY[-1]} tokens of a row are not drawn"
            )
        device = next(teacher.parameters()).device
        drawn = torch.Generator(device).manual_seed(int(torch.randint(2**31, (), generator=generator)))
        left = torch.empty(0, dtype=torch.int64)
        for greedy in itertools.cycle(GREEDY):
            while len(left) < batch:
                left = torch.cat([left, torch.randperm(vocabulary(teacher), generator=generator)])
            first, left = left[:batch], left[batch:]
            yield written(teacher, first.to(device), greedy, length + 1, drawn)

    def loss(self, student: nn.Module, teacher: nn.Module, batch: Tensor) -> Tensor:
        """Cross-entropy of the student's predictions under the teacher's, a mean over positions, in nats.

        Args:
            student: what `prepare` gave.
            teacher: the model as it was; read in evaluation mode, without a gradient.
            batch: `[batch, time + 1]` tokens, of which the last one is not read.
        """
        inputs = batch[:, :-1]
        with torch.no_grad():
            expected = evaluating(teacher, lambda: logits_of(teacher, inputs)).float().softmax(dim=-1)
        return F.cross_entropy(logits_of(student, inputs).flatten(0, 1).float(), expected.flatten(0, 1))

    def convert(self, model: M) -> M:
        """A packed copy; a `refimpl.model` Decoder also holds packed rows in a `FullCache`."""
        small = super().convert(model)
        if isinstance(small, Decoder) and self.kv_bits is not None:
            for block in small.layers:
                if type(block.attention) is Attention and isinstance(block.attention.k_proj, RoundedLinear):
                    block.attention = RowAttention.of(block.attention, self.kv_bits, small.rotary)
        return small


class MinMaxLinear(FakeLinear):
    """A linear layer whose weight has a symmetric grid for each channel, and whose inputs one for each token.

    Args:
        layer: copied.
        method: its settings.
        parts: of its outputs, which are rounded too, each with one grid for a token.
    """

    def __init__(self, layer: nn.Linear, method: LLMQAT, parts: Parts) -> None:
        super().__init__(layer)
        self.bits, self.kv_bits, self.parts = method.bits, method.kv_bits, tuple(parts)
        self.activations = None if method.activation_bits is None else Activations(bits=method.activation_bits)

    def rounded(self) -> Tensor:
        r"""$\hat W$; nothing is clipped, so that every weight gets its gradient."""
        integers, scale = absmax_round(self.weight.detach(), self.bits)
        return straight_through(self.weight, integers.mul_(scale[:, None]))

    def read(self, inputs: Tensor) -> Tensor:
        """The inputs `[..., in]`, each token on its grid."""
        return inputs if self.activations is None else round_rows(inputs, self.activations.bits)

    def write(self, outputs: Tensor) -> Tensor:
        """The outputs `[..., out]`, keys and values rounded."""
        return outputs if self.kv_bits is None else _rounded(outputs, self.parts, self.kv_bits)

    def held(self) -> CompressedWeight:
        """Packed codes, with the channels' scales in float32."""
        weight = self.weight.detach()
        if self.activations is not None:
            return integer_weight(weight, self.activations, bits=self.bits)
        integers, scale = absmax_round(weight, self.bits)
        return QuantizedWeight(
            integers.add_(2 ** (self.bits - 1)).to(torch.uint8),
            scale,
            None,
            bits=self.bits,
            granularity="channel",
            shape=(weight.shape[0], weight.shape[1]),
            dtype=weight.dtype,
        )

    def packed(self) -> nn.Module:
        """The layer that takes this one's place."""
        if self.kv_bits is None or not self.parts:
            return super().packed()
        return RoundedLinear(self.held(), self.bias, self.parts, self.kv_bits)


class RoundedLinear(CompressedLinear):
    """A compressed projection to keys or values, which rounds them as the cache holds them."""

    def __init__(self, compressed: CompressedWeight, bias: Tensor | None, parts: Parts, bits: int) -> None:
        super().__init__(compressed, bias)
        self.parts, self.bits = tuple((part.start, part.stop) for part in parts), bits

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        return _rounded(super().forward(inputs), [slice(*part) for part in self.parts], self.bits)


def _rounded(outputs: Tensor, parts: Parts, bits: int) -> Tensor:
    """Outputs `[..., out]` with each part of a token's row on its grid."""
    for part in parts:
        before, after = outputs[..., : part.start], outputs[..., part.stop :]
        outputs = torch.cat([before, round_rows(outputs[..., part], bits), after], dim=-1)
    return outputs


def keys_and_values(model: nn.Module) -> dict[str, Parts]:
    """Which outputs of which layers are keys and values; GPT-2's fused layer makes both, after the queries.

    Raises:
        ValueError: the layout is unknown.

    Examples:
        >>> from refimpl.model.config import Config
        >>> model = Decoder(Config(vocabulary=9, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=6))
        >>> keys_and_values(model)
        {'layers.0.attention.k_proj': [slice(0, 4, None)], 'layers.0.attention.v_proj': [slice(0, 4, None)]}
    """
    found: dict[str, Parts] = {}
    for block in anatomy(model).blocks:
        width = block.n_kv_heads * block.head_dim
        for name, place in ((block.k, 2), (block.v, 1)):
            out = sizes(model.get_submodule(name))[0]  # type: ignore[arg-type]
            start = out - place * width if block.k == block.v else 0
            found[name] = [*found.get(name, []), slice(start, start + width)]
    return found
