r"""Mixtures of experts in a decoder: each stands as a layer's `feed_forward`, and its losses and routings are had from the model.

Examples:
    >>> from refimpl.architecture.moe.models.switch import Switch
    >>> from refimpl.model.config import Config
    >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
    >>> model = replace_feed_forward(Decoder(config), Switch(n_experts=4)).train()
    >>> loss = model(torch.arange(10).view(2, 5)).square().mean() + take_auxiliary_loss(model)
    >>> mixtures(model)[0].routing.load.shape
    torch.Size([4])
"""

import torch
from torch import Tensor, nn

from refimpl.architecture.moe.protocol import MixtureOfExperts, MoE, Routing
from refimpl.model.model import Decoder


def replace_feed_forward(
    model: Decoder, method: MixtureOfExperts, every: int = 2, generator: torch.Generator | None = None
) -> Decoder:
    """Put a mixture in the place of every second feed-forward (the second, the fourth, ...), in place.

    Args:
        model: the decoder; a mixture's experts have its `d_ff`.
        method: the settings.
        every: which layers; 1 replaces all.
        generator: source of the weights.

    Raises:
        ValueError: `every` is below 1 or leaves no layer.
    """
    if not 1 <= every <= len(model.layers):
        raise ValueError(f"every={every} must be 1 to {len(model.layers)}, the number of layers")
    for layer in list(model.layers)[every - 1 :: every]:
        moe = method.build(model.config.d_model, model.config.d_ff, generator)
        layer.feed_forward = FeedForward(moe.to(model.embedding.weight))
    return model


class FeedForward(nn.Module):
    """A mixture in the place of a decoder's feed-forward: returns the output, keeps the rest.

    Attributes:
        moe: the layer.
        generator: source of what training draws; None is PyTorch's own.
        routing: of the last call, without gradients.
        auxiliary: sum of the auxiliary losses of training's calls since `take_auxiliary_loss`, with its gradient.
    """

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe
        self.generator: torch.Generator | None = None
        self.routing: Routing | None = None
        self.auxiliary: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d_model]` to the same."""
        y, auxiliary, routing = self.moe(x, self.generator)
        self.routing = Routing(*(part.detach() for part in routing))
        if self.training and torch.is_grad_enabled():
            self.auxiliary = auxiliary if self.auxiliary is None else self.auxiliary + auxiliary
        return y  # type: ignore[no-any-return]


def mixtures(model: nn.Module) -> list[FeedForward]:
    """The mixtures in a model, in order."""
    return [module for module in model.modules() if isinstance(module, FeedForward)]


def take_auxiliary_loss(model: nn.Module) -> Tensor:
    """Sum of all layers' auxiliary losses since it was last taken, and forget them.

    Raises:
        ValueError: there are none: no mixture, or no call in training mode since.
    """
    found = [layer.auxiliary for layer in mixtures(model) if layer.auxiliary is not None]
    if not found:
        raise ValueError("no auxiliary loss to take: call the model in training mode first, and take it once")
    for layer in mixtures(model):
        layer.auxiliary = None
    return torch.stack(found).sum()
