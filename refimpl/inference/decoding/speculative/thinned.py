r"""A decoder without some of its attention and feed-forward sub-layers: its own modules, in a shorter row.

Source: `draft-and-verify` (arXiv 2309.08168); official code dilab-zju/self-speculative-decoding@688db8b, modeling_llama.py, where a
sub-layer that is skipped leaves the residual stream as it is.

Differs from the paper: none. Not here: positions of a text that no kept attention counts, which nothing then depends on.
"""

from torch import Tensor, nn

from refimpl.model.model import Block, Decoder
from refimpl.model.step import Step


class Thinned(Decoder):
    """The decoder that is left: it shares all that it keeps, and a cache, with the whole.

    Args:
        target: the whole; left as it is.
        skipped: `[2, n_layers]`, not 0 where the attention, and the feed-forward, of a layer is left out.

    Attributes:
        skipped: as booleans.
        cost: weights that a call reads, over those that the whole reads; the embedding counts where it is the output layer.

    Raises:
        ValueError: another shape.

    Examples:
        >>> import torch
        >>> from refimpl.model.config import Config
        >>> target = Decoder(Config(vocabulary=5, d_model=8, n_layers=2, n_heads=1, n_kv_heads=1, head_dim=8, d_ff=16))
        >>> thinned = Thinned(target, torch.tensor([[0, 1], [0, 1]]))  # the first layer alone
        >>> thinned.embedding is target.embedding, 0.5 < thinned.cost < 0.6
        (True, True)
    """

    def __init__(self, target: Decoder, skipped: Tensor) -> None:
        nn.Module.__init__(self)  # a decoder's own would draw weights
        if skipped.shape != (2, target.config.n_layers):
            raise ValueError(
                f"skipped of shape {tuple(skipped.shape)} must be [2, n_layers], [2, {target.config.n_layers}]"
            )
        self.config, self.rotary, self.score_bias = target.config, target.rotary, target.score_bias
        self.embedding, self.norm, self.lm_head = target.embedding, target.norm, target.lm_head
        self.skipped = skipped.bool().cpu()
        self.layers = nn.ModuleList(
            _ThinnedBlock(block, *skip)  # type: ignore[arg-type]
            for block, skip in zip(target.layers, self.skipped.T.tolist(), strict=True)
        )
        head = target.embedding if target.lm_head is None else target.lm_head
        mine, whole = (
            sum(parameter.numel() for part in (head, layers) for parameter in part.parameters())
            for layers in (self.layers, target.layers)
        )
        self.cost = mine / whole


class _ThinnedBlock(nn.Module):
    """A block of which a sub-layer that is skipped adds nothing."""

    def __init__(self, block: Block, no_attention: bool, no_feed_forward: bool) -> None:
        super().__init__()
        self.attention_norm = None if no_attention else block.attention_norm
        self.attention = None if no_attention else block.attention
        self.feed_forward_norm = None if no_feed_forward else block.feed_forward_norm
        self.feed_forward = None if no_feed_forward else block.feed_forward

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """`[batch, time, d_model]` to the same."""
        if self.attention is not None and self.attention_norm is not None:
            x = x + self.attention(self.attention_norm(x), step)
        if self.feed_forward is not None and self.feed_forward_norm is not None:
            x = x + self.feed_forward(self.feed_forward_norm(x))
        return x
