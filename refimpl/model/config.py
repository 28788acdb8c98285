r"""The shape of a decoder: what distinguishes Llama, Mistral, Qwen2 and Qwen3.

`config_json.py` reads it from a checkpoint's config.json and writes it there.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions: base, and how frequencies are scaled for contexts beyond the trained one.

    Args:
        theta: base of the frequencies.
        type: which scaling; the fields below serve the types named.
        factor: extension of the context, 1 or more (linear, dynamic, llama3, yarn).
        original_max_positions: trained context in tokens (llama3, yarn).
        low_freq_factor: trained context / wavelength, below which a frequency is divided by `factor` (llama3).
        high_freq_factor: the same ratio, above which a frequency is kept (llama3).
        beta_fast: rotations within the trained context, above which a frequency is kept (yarn).
        beta_slow: rotations, below which it is divided by `factor` (yarn).
        truncate: whether the ramp between the two starts and ends at whole dimensions (yarn).
        attention_factor: factor of cosine and sine; None computes it from the factors (yarn).
        mscale: numerator's coefficient of the computed one; used if `mscale_all_dim` is given too (yarn).
        mscale_all_dim: denominator's coefficient (yarn).
    """

    theta: float = 10000.0
    type: RopeType = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        if self.type not in get_args(RopeType):
            raise ValueError(f"rope type={self.type!r} must be one of {', '.join(get_args(RopeType))}")
        if self.theta <= 1:
            raise ValueError(f"rope theta={self.theta} must be above 1; Llama's is 10000")
        if self.factor < 1:
            raise ValueError(f"rope factor={self.factor} must be at least 1: it extends the context")
        if self.type in ("llama3", "yarn") and self.original_max_positions < 1:
            raise ValueError(f"rope type={self.type!r} needs original_max_positions, the trained context in tokens")
        if self.type == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope low_freq_factor={self.low_freq_factor} must be positive and below "
                f"high_freq_factor={self.high_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of a decoder.

    Args:
        vocabulary: tokens that the embedding knows.
        d_model: width of the residual stream.
        n_layers: blocks.
        n_heads: query heads.
        n_kv_heads: key and value heads; divides `n_heads`.
        head_dim: size of a head, even.
        d_ff: width of the feed-forward.
        norm_eps: added to the mean square in RMSNorm.
        rope: rotary positions.
        tied_embeddings: whether the output layer is the embedding.
        qkv_bias: whether the projections to q, k and v have biases.
        qk_norm: whether q and k of each head are normalized before they are rotated.
        sliding_window: window of each layer in tokens, None for all; left empty, None for every layer.
        max_positions: context in tokens that the checkpoint states; nothing is cut there.

    Raises:
        ValueError: a size below 1, or sizes that do not fit together.

    Examples:
        >>> Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40).sliding_window
        (None, None)
    """

    vocabulary: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float = 1e-6
    rope: Rope = field(default_factory=Rope)
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: tuple[int | None, ...] = ()
    max_positions: int = 2048

    def __post_init__(self) -> None:
        if not self.sliding_window:
            object.__setattr__(self, "sliding_window", (None,) * self.n_layers)
        sizes = ("vocabulary", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_positions")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs")
        if len(self.sliding_window) != self.n_layers:
            raise ValueError(
                f"sliding_window has {len(self.sliding_window)} entries for {self.n_layers} layers; () is none"
            )
        if any(window is not None and window < 1 for window in self.sliding_window):
            raise ValueError(f"sliding_window={self.sliding_window} must be at least 1, or None")
