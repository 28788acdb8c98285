r"""A decoder of the Llama family: Llama, Mistral, Qwen2, Qwen3, and the places where a method steps in.

Source: `llama-2` (arXiv 2307.09288), Section 2.2; grouped heads `gqa` (arXiv 2305.13245); transformers 5.23.0 for all that a
checkpoint takes for granted (half-split rotation, order of casts in RMSNorm, biases, windows).

Differs from transformers: padding is a number of tokens for each row, its outputs mean nothing.

Not here: dropout; output weights; kernels. What can be replaced, on any decoder, by plain assignment:

    layer.attention.attend    the attention function: see `AttentionFunction`; any method of `refimpl/architecture/attention`
    layer.feed_forward        a module, `[batch, time, d_model]` to the same shape
    model.rotary              positions: `rotary(positions, dtype) -> (cos, sin)`, see `rope.Rotary`
    model.score_bias          `score_bias(query_positions, key_positions)`, added to the scores: see `step.ScoreBias`
    cache                     an argument of every call, see `cache.Cache`

Examples:
    >>> from refimpl.model.cache import FullCache
    >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
    >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
    >>> tokens, cache = torch.arange(10).view(2, 5), FullCache()
    >>> whole, first, second = model(tokens), model(tokens[:, :3], cache), model(tokens[:, 3:], cache)
    >>> whole.shape, torch.allclose(whole, torch.cat((first, second), dim=1), atol=1e-6)
    (torch.Size([2, 5, 61]), True)
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.model.cache import Cache, Reader
from refimpl.model.config import Config
from refimpl.model.rope import Rotary, rotate
from refimpl.model.step import ScoreBias, Step, positions_of


class Decoder(nn.Module):
    """Tokens to logits. Its parameters are drawn as PyTorch's layers draw them: load or `initialize_` it.

    Args:
        config: its shape.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        # Drawn as `nn.Embedding` would, which on `meta` (see `load`) first imports torch's compiler: most of a second.
        drawn = torch.randn(config.vocabulary, config.d_model)
        self.embedding: nn.Embedding = nn.Embedding.from_pretrained(drawn, freeze=False)  # type: ignore[no-untyped-call]
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = None if config.tied_embeddings else nn.Linear(config.d_model, config.vocabulary, bias=False)
        self.rotary: Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]] = Rotary(config)
        self.score_bias: ScoreBias | None = None

    def forward(self, tokens: Tensor, cache: Cache | None = None, padding: Tensor | None = None) -> Tensor:
        """Logits of the token after each of these.

        Args:
            tokens: `[batch, time]`, or embeddings `[batch, time, d_model]`.
            cache: the tokens before these; it takes these in. None stands for no past and keeps nothing.
            padding: `[batch]`, tokens of left padding in each row, counted from the start of the cache.

        Returns:
            `[batch, time, vocabulary]`, in the parameters' dtype; what stands at padding means nothing.

        Raises:
            ValueError: shapes do not fit.
        """
        return self.logits(self.hidden(tokens, cache, padding))

    def hidden(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        padding: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """`forward` without the output layer, for who needs some positions only: `[batch, time, d_model]`, normalized.

        Args:
            tokens: as in `forward`, as the next two.
            cache: the tokens before these.
            padding: of the rows.
            positions: `[batch or 1, time]`, for tokens that do not stand one behind the other, such as a tree of guesses; they
                take the place of `padding`, and the cache says who sees whom. None counts on from the cache's length.
        """
        if tokens.ndim not in (2, 3) or 0 in tokens.shape:
            raise ValueError(
                f"tokens of shape {tuple(tokens.shape)} must be [batch, time] or [batch, time, d_model], not empty"
            )
        if padding is not None and padding.shape != tokens.shape[:1]:
            raise ValueError(f"padding of shape {tuple(padding.shape)} must be [batch], [{tokens.shape[0]}]")
        if tokens.ndim == 2 and isinstance(cache, Reader):
            cache.read(tokens)
        x = self.embedding(tokens) if tokens.ndim == 2 else tokens
        start = 0 if cache is None else cache.length
        if positions is None:
            positions = positions_of(start, start + x.shape[1], padding, x.device)
        step = Step(start, positions, *self.rotary(positions, x.dtype), cache, padding, self.score_bias)
        for layer in self.layers:
            x = layer(x, step)
        return self.norm(x)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer, `[..., d_model]` to `[..., vocabulary]`."""
        return F.linear(hidden, self.embedding.weight) if self.lm_head is None else self.lm_head(hidden)


class Block(nn.Module):
    """One layer: attention and feed-forward, each normalized before and added after."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward: nn.Module = SwiGLU(config)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """`[batch, time, d_model]` to the same."""
        x = x + self.attention(self.attention_norm(x), step)
        return x + self.feed_forward(self.feed_forward_norm(x))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Grouped-query attention over what the cache gives back."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.window = layer, config.head_dim, config.sliding_window[layer]
        self.q_proj = nn.Linear(config.d_model, config.n_heads * config.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.d_model, config.n_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.d_model, config.n_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.n_heads * config.head_dim, config.d_model, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.attend: AttentionFunction = attend

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """`[batch, time, d_model]` to the same."""
        q, k, v = self.project(x, step.cos, step.sin)
        return self.output(self.mix(q, k, v, step))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[batch, heads or kv_heads, time, head_dim]`, the first two rotated: each token by itself."""
        batch, time, _ = x.shape
        q = self.q_proj(x).view(batch, time, -1, self.head_dim)
        k = self.k_proj(x).view(batch, time, -1, self.head_dim)
        v = self.v_proj(x).view(batch, time, -1, self.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin), v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """What the queries find in the cache and these keys, `[batch, heads, time, head_dim]`."""
        positions = None
        if step.cache is not None:
            k, v, positions = step.cache.update(self.layer, k, v, q, step.positions)
        mask, causal = step.mask(k.shape[2], positions, self.window)
        return self.attend(q, k, v, causal=causal) if mask is None else self.attend(q, k, v, causal=False, mask=mask)

    def output(self, mixed: Tensor) -> Tensor:
        """`[batch, heads, time, head_dim]` to `[batch, time, d_model]`."""
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class AttentionFunction(Protocol):
    """What `Attention.attend` may be replaced by."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., mask: Tensor = ...) -> Tensor:
        """Attend.

        Args:
            q: `[batch, heads, time, head_dim]`, rotated.
            k: `[batch, kv_heads, kept, head_dim]`, rotated.
            v: `[batch, kv_heads, kept, head_dim]`.
            causal: query i sees keys 0 to i (then kept = time); otherwise it sees all.
            mask: passed only where `causal` can't say it (padding, windows, chunks after a past, what a cache dropped):
                `[batch or 1, 1 or kv_heads or heads, time, kept]`, True where it sees, or a float that is added to scores.

        Returns:
            `[batch, heads, time, head_dim]`.
        """
        ...


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Exact attention by PyTorch's kernels: see `AttentionFunction`."""
    heads, kv_heads = q.shape[1], k.shape[1]
    if mask is not None and 1 < mask.shape[1] < heads:
        mask = mask.repeat_interleave(heads // kv_heads, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=heads != kv_heads)


class SwiGLU(nn.Module):
    r"""The feed-forward $W_{down}(\operatorname{silu}(W_{gate}x) \odot W_{up}x)$."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d_model]` to the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class RMSNorm(nn.Module):
    r"""$w \odot x / \sqrt{\operatorname{mean}(x^2) + \epsilon}$, in float32 up to the product with w."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """`[..., size]` to the same."""
        if x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)


def initialize_(model: Decoder, generator: torch.Generator | None = None, std: float = 0.02) -> Decoder:
    """Draw weights as Llama's are, in place: normal with `std`, norms 1, biases 0.

    Args:
        model: the decoder.
        generator: source of randomness, on the device of the parameters; None is PyTorch's own.
        std: standard deviation; with 0.3 a tiny model's attention is far from flat, as tests want it.

    Returns:
        The model.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=std, generator=generator)
    return model
