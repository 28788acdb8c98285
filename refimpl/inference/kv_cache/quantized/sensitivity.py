r"""What a decoder's loss says about its keys and values: the diagonal of the Fisher information, from squared gradients."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.model.model import Attention, Decoder


class Sensitivity(NamedTuple):
    """Of one layer: keys before they are rotated, values, and their squared gradients; `[tokens, kv_heads * head_dim]`, float32."""

    keys: Tensor
    values: Tensor
    key_weights: Tensor
    value_weights: Tensor


def sensitivities(model: Decoder, texts: Sequence[Tensor], skip: int = 0) -> list[Sensitivity]:
    """Each layer's keys and values on some texts, with the squared gradients of each text's mean next-token loss.

    Args:
        model: the decoder; neither weights nor their gradients are written.
        texts: at least one, each `[time]` tokens.
        skip: first tokens of each text to leave out.

    Returns:
        One for each layer; memory is four times that of the cache of all texts in float32.

    Raises:
        ValueError: no text, a text that has no token to predict beyond those to skip, or a layer whose gradients are not finite.

    Examples:
        >>> from refimpl.model.config import Config
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=40)
        >>> found = sensitivities(Decoder(config), [torch.arange(9), torch.arange(5)], skip=1)
        >>> len(found), found[0].keys.shape, bool((found[0].value_weights > 0).any())
        (2, torch.Size([12, 4]), True)
    """
    if not texts:
        raise ValueError("texts is empty: the levels are fitted to what the model computes on at least one")
    for i, text in enumerate(texts):
        if text.ndim != 1 or len(text) < max(2, skip + 1):
            raise ValueError(
                f"texts[{i}] of shape {tuple(text.shape)} must be [time], with at least {max(2, skip + 1)} tokens"
            )
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in model.layers]
    for text in texts:
        for layer, (outputs, gradients) in enumerate(_outputs_and_gradients(model, text)):
            parts = [x.flatten(1)[skip:].float() for x in (*outputs, *gradients)]
            found[layer].append((parts[0], parts[1], parts[2].square(), parts[3].square()))
    whole = [Sensitivity(*(torch.cat(x) for x in zip(*layer, strict=True))) for layer in found]
    for i, layer_found in enumerate(whole):
        if not all(bool(x.isfinite().all()) for x in layer_found):
            raise ValueError(f"layer {i}: keys, values or their gradients are not finite on these texts; try float32")
    return whole


def _outputs_and_gradients(model: Decoder, text: Tensor) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Of each layer the keys before rotation and the values, `[time, ...]`, and the gradients of the loss with respect to them."""
    seen: dict[nn.Module, Tensor] = {}
    modules: list[tuple[nn.Module, nn.Module]] = []
    for layer in model.layers:
        attention = layer.attention
        assert isinstance(attention, Attention)
        modules.append((attention.k_proj if attention.k_norm is None else attention.k_norm, attention.v_proj))
    hooks = [
        module.register_forward_hook(lambda module, _, output: seen.__setitem__(module, output))
        for pair in modules
        for module in pair
    ]
    try:
        with torch.enable_grad():
            embedded = model.embedding(text.to(model.embedding.weight.device)[None]).detach().requires_grad_()
            logits = model(embedded)[0, :-1]
            loss = F.cross_entropy(logits.float(), text[1:].to(logits.device))
            wanted = [seen[module] for pair in modules for module in pair]
            gradients = torch.autograd.grad(loss, wanted)  # with respect to these alone: no parameter's is touched
    finally:
        for hook in hooks:
            hook.remove()
    return [
        ([x[0].detach() for x in wanted[i : i + 2]], [x[0] for x in gradients[i : i + 2]])
        for i in range(0, len(wanted), 2)
    ]
