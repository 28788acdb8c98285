r"""BitNet b1.58: linear layers of weights -1, 0 and 1, each with a norm of its own, trained so from the first step.

Source: `bitnet-b1-58` (arXiv 2402.17764), Section 2, Eqs. (1) to (3); `bitnet` (arXiv 2310.11453), Section 2.1, for the norm before the
activations' quantization (SubLN); the authors' "The Era of 1-bit LLMs: Training Tips, Code and FAQ",
microsoft/unilm@768a3c873f598bb9b4d4dfb9267b099e35f8fe56, bitnet/, Section 3: linear layers of attention and feed-forward become BitLinear,
and the norms before these two go, since BitLinear has one.

Differs from the paper: a norm that goes leaves its factors to the layers that read it (the papers train from nothing, where they are 1);
embeddings, output layer and activation functions are the given model's, whatever its family. Weights are divided by their mean, where
the official code multiplies by its reciprocal.

Not here: the two stages of learning rate and weight decay (both are an optimizer's; the FAQ starts at 1.2e-3 to 1.5e-3, and takes the decay
away in the second half); kernels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from refimpl.compression.anatomy import anatomy
from refimpl.compression.protocol import CompressedWeight
from refimpl.compression.quantization.qat.protocol import QAT, FakeLinear
from refimpl.compression.quantization.qat.straight_through import straight_through
from refimpl.compression.quantization.qat.ternary import TernaryWeight, absmax_int8, absmean, rms_norm
from refimpl.model.linear import sizes


@dataclass(frozen=True, kw_only=True)
class BitNet(QAT):
    """Training with ternary weights and 8-bit activations.

    Args:
        eps: added to the mean square in the norms that the given model has none for.

    Examples:
        >>> import torch
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import Decoder, initialize_
        >>> config = Config(vocabulary=61, d_model=40, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=10, d_ff=40)
        >>> method = BitNet()
        >>> model = method.prepare(initialize_(Decoder(config), torch.Generator().manual_seed(0)))
        >>> up = method.convert(model).layers[0].feed_forward.up_proj.compressed
        >>> (up.dense() / up.scale).unique().tolist(), up.codes.nbytes  # 40 x 40 weights, five to a byte
        ([-1.0, 0.0, 1.0], 320)
    """

    eps: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.eps < float("inf"):
            raise ValueError(f"eps={self.eps} must be 0 or more; 1e-6 is Llama's")

    def replacements(self, model: nn.Module, layers: Mapping[str, nn.Linear]) -> dict[nn.Module, nn.Module]:
        """A BitLinear for each layer of a block's attention and feed-forward; the norms before the two go.

        Raises:
            ValueError: the layout is unknown; some, but not all readers of a norm would be replaced.
        """
        found: dict[nn.Module, nn.Module] = {}
        for block in anatomy(model).blocks:
            readers = {
                block.attention_norm: dict.fromkeys((block.q, block.k, block.v)),
                block.feed_forward_norm: {name: None for name in (block.gate, block.up) if name is not None},
            }
            for norm_name, names in readers.items():
                norm = model.get_submodule(norm_name)
                taken = [name for name in names if name in layers]
                if taken and len(taken) < len(names):
                    raise ValueError(
                        f"{taken} are taken, and {norm_name!r}, whose place their own norms take, has other readers: {list(names)}"
                    )
                for name in taken:
                    found[layers[name]] = BitLinear(layers[name], norm, self.eps)
                if taken:
                    found[norm] = nn.Identity()
            for name in (block.o, block.down):
                if name in layers:
                    found[layers[name]] = BitLinear(layers[name], None, self.eps)
        if not found:
            raise ValueError(f"none of {list(layers)[:8]} stands in a block's attention or feed-forward")
        return found


class BitLinear(FakeLinear):
    """A linear layer without bias that normalizes and rounds its inputs, and whose weight has three values.

    Args:
        layer: copied, but for its bias.
        norm: the one that stood before it, whose factors and eps it takes; None starts with 1.
        eps: where there was none.
    """

    def __init__(self, layer: nn.Linear, norm: nn.Module | None, eps: float) -> None:
        super().__init__(layer)
        self.bias = None
        factors = None if norm is None else norm.weight
        assert factors is None or isinstance(factors, Tensor)
        start = self.weight.new_ones(sizes(layer)[1]) if factors is None else factors.detach().clone()
        self.norm = nn.Parameter(start, layer.weight.requires_grad)
        self.eps = eps if norm is None else float(getattr(norm, "variance_epsilon", getattr(norm, "eps", eps)))

    def rounded(self) -> Tensor:
        r"""$\gamma \tilde W$, with the gradient straight through."""
        codes, scale = absmean(self.weight.detach())
        return straight_through(self.weight, codes.mul_(scale))

    def read(self, inputs: Tensor) -> Tensor:
        """The inputs `[..., in]`, normalized and rounded, with the gradient straight through the rounding."""
        x = rms_norm(inputs, self.norm, self.eps)
        codes, step = absmax_int8(x.detach())
        return straight_through(x, codes.mul_(step))

    def held(self) -> CompressedWeight:
        """Five weights to a byte, with the scale and the norm."""
        return TernaryWeight(self.weight.detach(), self.norm, self.eps)
