r"""What a decoder computes on its way: its embeddings, each layer's output, and the attention scores.

Source: none; `tinybert` (arXiv 1909.10351), Section 3.1, says what is worth a look.

Differs from attention as it runs: raw scores are computed beside it, once more, for a fused kernel does not give them.

Not here: models other than `refimpl.model`'s decoders, into which `refimpl.model.load` reads checkpoints; what stands in a cache.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.model.model import AttentionFunction, Decoder

Scores = tuple[Tensor, Tensor]  # `[batch, heads, time, time]`, and where a query may look, of a shape that fits


@dataclass
class Inside:
    """What a decoder computed on its way: embedding, each layer's output `[batch, time, d_model]`, and its scores."""

    embedding: Tensor
    hidden: list[Tensor] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)


def decoder_of(model: nn.Module) -> Decoder:
    """The decoder that a model is, or that stands in it.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module, Decoder):
            return module
    raise ValueError(f"{type(model).__name__} has no inner layers known here: `refimpl.model.load` makes it a Decoder")


def read(model: nn.Module, tokens: Tensor, *, scores: bool) -> Inside:
    r"""What a decoder computes inside for tokens `[batch, time]`.

    Args:
        model: a decoder, or a module around one; as before afterwards.
        tokens: what it reads; its output layer is left out.
        scores: whether to write down $QK^T / \sqrt{d}$ of each layer, rotated, before mask and softmax.

    Raises:
        ValueError: no decoder.

    Examples:
        >>> from refimpl.model.config import Config
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> inside = read(Decoder(config), torch.arange(10).view(2, 5), scores=True)
        >>> inside.embedding.shape, len(inside.hidden), inside.scores[0][0].shape
        (torch.Size([2, 5, 32]), 2, torch.Size([2, 4, 5, 5]))
    """
    decoder, inside = decoder_of(model), Inside(torch.empty(0))
    with _watched(decoder, inside, scores=scores):
        decoder.hidden(tokens)
    return inside


@contextmanager
def _watched(decoder: Decoder, inside: Inside, *, scores: bool) -> Iterator[None]:
    """Write down what passes through, and leave the decoder as it was."""

    def embedded(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
        inside.embedding = out

    def done(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
        inside.hidden.append(out)

    attention: list[Any] = [layer.attention for layer in decoder.layers]
    before: list[AttentionFunction] = [module.attend for module in attention]
    handles = [decoder.embedding.register_forward_hook(embedded)]
    handles += [layer.register_forward_hook(done) for layer in decoder.layers]
    if scores:
        for module in attention:
            module.attend = _recording(module.attend, inside.scores)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, attend in zip(attention, before, strict=True):
            module.attend = attend


def _recording(attend: AttentionFunction, scores: list[Scores]) -> AttentionFunction:
    """The attention function, which also writes down raw scores and who sees whom."""

    def recording(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        raw = q @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5
        seen = torch.ones(raw.shape[-2:], dtype=torch.bool, device=raw.device)
        if causal:
            seen = seen.tril()
        if mask is not None:
            seen = mask if mask.dtype == torch.bool else mask > float("-inf")
            if 1 < seen.shape[1] < q.shape[1]:
                seen = seen.repeat_interleave(q.shape[1] // seen.shape[1], dim=1)
        scores.append((raw, seen))
        return attend(q, k, v, causal=causal) if mask is None else attend(q, k, v, causal=False, mask=mask)

    return recording
