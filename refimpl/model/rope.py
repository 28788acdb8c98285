r"""Rotary positions: each pair of a head's dimensions is turned by an angle proportional to the position.

Source: `rope` (arXiv 2104.09864), Eq. (34); scalings as computed by transformers 5.23.0, modeling_rope_utils.py: linear
(arXiv 2306.15595), dynamic NTK, Llama 3, YaRN (arXiv 2309.00071).

Differs from the paper: dimension i is paired with i + head_dim / 2 (half-split), as in Hugging Face's checkpoints; the
paper pairs neighbours. A dynamic frequency depends on the row's own length at this call and on nothing else:
transformers takes the longest row of the batch, and keeps the frequencies of an earlier, longer input.

Not here: LongRoPE, proportional and partial rotation. With `dynamic`, keys that a cache holds stay as they were turned, so
that beyond `max_positions` decoding with a cache is not the whole forward; so it is in transformers.
"""

import math

import torch
from torch import Tensor

from refimpl.model.config import Config, Rope


class Rotation:
    """Cosines and sines of positions for given frequencies, as `rotate` takes them.

    No module: frequencies are no parameters, and stay as precise as they are whatever dtype the model is moved to.

    Args:
        frequencies: `[head_dim / 2]`, radians a token by which each pair turns.
        factor: of cosines and sines, see `attention_factor`.

    Examples:
        >>> rotation = Rotation(torch.tensor([math.pi / 2]))  # a quarter turn a token
        >>> rotate(torch.tensor([3.0, 4.0]), *rotation(torch.tensor([[1]]), torch.float32)).flatten().round().tolist()
        [-4.0, 3.0]
    """

    def __init__(self, frequencies: Tensor, factor: float = 1.0) -> None:
        self.factor = factor
        self._frequencies = {frequencies.device: frequencies}  # a copy for each device that asked

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What `rotate` takes, computed in the frequencies' dtype.

        Args:
            positions: `[batch or 1, time]`; those of padding, below 0, count for nothing.
            dtype: of the results.

        Returns:
            Cosines and signed sines, `[batch or 1, 1, time, head_dim]`.
        """
        frequencies = self._at(positions)
        angles = positions.to(frequencies.dtype).unsqueeze(-1) * frequencies
        cos, sin = angles.cos() * self.factor, angles.sin() * self.factor
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1)

    def _at(self, positions: Tensor) -> Tensor:
        """Frequencies that turn these positions, `[head_dim / 2]` or `[batch or 1, 1, head_dim / 2]`, on their device."""
        if positions.device not in self._frequencies:
            self._frequencies[positions.device] = next(iter(self._frequencies.values())).to(positions.device)
        return self._frequencies[positions.device]


class Rotary(Rotation):
    """The rotation of the models that `config` describes, in float32.

    Args:
        config: gives `rope`, `head_dim`, `max_positions`.
    """

    def __init__(self, config: Config) -> None:
        self.rope, self.head_dim, self.max_positions = config.rope, config.head_dim, config.max_positions
        frequencies = inverse_frequencies(config.rope, config.head_dim, config.max_positions)
        super().__init__(frequencies, attention_factor(config.rope))

    def _at(self, positions: Tensor) -> Tensor:
        if self.rope.type == "dynamic":
            length = positions[:, -1:, None] + 1
            return inverse_frequencies(self.rope, self.head_dim, self.max_positions, length)
        return super()._at(positions)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    r"""Turn the pairs $(x_i, x_{i+d/2})$: $(x_i \cos - x_{i+d/2} \sin,\; x_{i+d/2} \cos + x_i \sin)$.

    Args:
        x: `[batch, heads, time, head_dim]`.
        cos: `[batch or 1, 1, time, head_dim]`, the cosines twice.
        sin: the same shape: the sines negated, then as they are.

    Returns:
        x's shape and dtype.

    Examples:
        >>> x, zero, one = torch.tensor([3.0, 4.0]), torch.zeros(2), torch.ones(2)
        >>> rotate(x, zero, torch.tensor([-1.0, 1.0])).tolist()  # a quarter turn
        [-4.0, 3.0]
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def inverse_frequencies(rope: Rope, head_dim: int, max_positions: int, length: Tensor | int | None = None) -> Tensor:
    r"""Radians a token by which each pair turns, $\theta^{-2i/d}$ before it is scaled.

    Args:
        rope: base and scaling.
        head_dim: $d$.
        max_positions: the context that `dynamic` starts to stretch at.
        length: tokens of the input, for `dynamic`, `[..., 1]` if a tensor; None is `max_positions`.

    Returns:
        `[head_dim / 2]`, or `[..., head_dim / 2]` for a tensor of lengths; float32.

    Examples:
        >>> inverse_frequencies(Rope(theta=100.0), 4, 2048).tolist()
        [1.0, 0.10000000149011612]
    """
    device = length.device if isinstance(length, Tensor) else torch.device("cpu")  # never a default of `meta`
    if rope.type == "dynamic":
        beyond = torch.as_tensor(max_positions if length is None else length, device=device).clamp(min=max_positions)
        stretch = rope.factor * beyond / max_positions - (rope.factor - 1)
        return geometric(rope.theta * stretch ** (head_dim / (head_dim - 2)), head_dim, torch.float32, device)
    frequencies = geometric(rope.theta, head_dim, torch.float32, device)
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "llama3":
        return _llama3(rope, frequencies)
    if rope.type == "yarn":
        return _yarn(rope, frequencies)
    return frequencies


def geometric(theta: Tensor | float, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    r"""The unscaled frequencies $\theta^{-2i/d}$, `[head_dim / 2]`; `[..., head_dim / 2]` for bases `[..., 1]`.

    Examples:
        >>> geometric(100.0, 4, torch.float64, torch.device("cpu")).tolist()
        [1.0, 0.1]
    """
    return 1 / theta ** (torch.arange(0, head_dim, 2, device=device).to(dtype) / head_dim)  # rounded as in transformers


def attention_factor(rope: Rope) -> float:
    r"""Factor of cosines and sines: YaRN's $0.1 \ln(s) + 1$ (its Eq. 22), otherwise 1.

    Examples:
        >>> attention_factor(Rope(type="yarn", factor=math.e, original_max_positions=64))
        1.1
    """
    if rope.type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(coefficient: float) -> float:
        return 0.1 * coefficient * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def _llama3(rope: Rope, frequencies: Tensor) -> Tensor:
    """Keep short wavelengths, divide long ones by the factor, and interpolate between."""
    turns = rope.original_max_positions * frequencies / (2 * math.pi)  # within the trained context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return _blend(frequencies, rope.factor, keep.clamp(0, 1))


def _yarn(rope: Rope, frequencies: Tensor) -> Tensor:
    """The same with a ramp over dimensions, from that which turns `beta_fast` times to that which turns `beta_slow`."""
    pairs = len(frequencies)

    def dimension(turns: float) -> float:
        return pairs * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / math.log(rope.theta)

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    ramp = (torch.arange(pairs, device=frequencies.device) - low) / ((high - low) or 0.001)
    return _blend(frequencies, rope.factor, 1 - ramp.clamp(0, 1))


def _blend(frequencies: Tensor, factor: float, keep: Tensor) -> Tensor:
    """Frequencies as they are where `keep` is 1, divided by the factor where it is 0."""
    return frequencies * keep + frequencies / factor * (1 - keep)
