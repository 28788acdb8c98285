r"""Language models whose layers have two branches: one mixes positions, the next mixes channels.

Source: none; the residual structure that `rwkv` (arXiv 2305.13048) and `griffin` (arXiv 2402.19427) share with the
Transformer: $x \leftarrow x + f(\mathrm{norm}(x))$ for either branch.

Differs from the papers: none; sums of the residual stream are float32 at least.

Not here: what the branches compute, how they are drawn.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from refimpl.architecture.alternatives.language_model import LanguageModel, LanguageModelConfig, States
from refimpl.architecture.alternatives.protocol import Mixer


class TwoBranchModel(LanguageModel):
    """A language model with twice as many blocks as its configuration has layers.

    Args:
        config: its shape; a layer of it is two entries of `layers`.
        over_time: the branch that mixes positions, by layer.
        over_channels: the branch after it; what it remembers is in a state too.
        norm: makes a normalization of a width with an epsilon; one stands before each branch and one before the output.

    Examples:
        >>> from refimpl.architecture.alternatives.softmax_attention import SoftmaxAttention
        >>> config = LanguageModelConfig(vocabulary=5, d_model=8, n_layers=3)
        >>> model = TwoBranchModel(config, *2 * [lambda layer: SoftmaxAttention(head_dim=4).build(8)], nn.LayerNorm)
        >>> len(model.layers), model.config.n_layers, type(model.layers[1].norm).__name__
        (6, 3, 'LayerNorm')
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        over_time: Callable[[int], Mixer],
        over_channels: Callable[[int], Mixer],
        norm: Callable[[int, float], nn.Module],
    ) -> None:
        branches = over_time, over_channels
        super().__init__(replace(config, n_layers=2 * config.n_layers), lambda i: branches[i % 2](i // 2))
        self.config = config
        for module in (self, *self.blocks):
            module.register_module("norm", norm(config.d_model, config.norm_eps))

    def embedded(self, x: Tensor) -> Tensor:
        """What enters the first layer, from embeddings `[batch, time, d_model]`."""
        return x

    def hidden(self, tokens: Tensor, states: States | None = None, padding: Tensor | None = None) -> Tensor:
        """See `LanguageModel.hidden`."""
        x = self.embedding(tokens) if tokens.ndim == 2 else tokens
        return super().hidden(self.embedded(x) if x.ndim == 3 else x, states, padding)
