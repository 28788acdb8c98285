r"""GEAR: a cache in few bits, with its outliers apart, and a matrix of low rank for what rounding leaves of the rest.

Source: `gear` (arXiv 2403.05527), $X \approx \hat D + L + S$, its filter of outliers, head-wise decomposition by power iteration, and
buffer of new tokens; official code opengear-project/GEAR@efe0bfe2b5a35b22122f7cefab5cde9db13a66cd,
GenerationBench/GenerationTest/GEARLM/Simulated/compress_function.py (`gearslkivi_channelQ_new`, `gearslkivi_tokenQ_new`,
`fake_poweriteration_group`), run_template_llama2-13b.sh for the settings of GEAR, and cuda_supported_gear/modeling_llamagear.py for when
blocks are compressed.

Differs from the paper: where an outlier is taken out, the mean of its vector stands before quantization, as in the code (a 0 would stretch
the range). Of each end of a vector of n numbers $\lfloor ns/2 \rfloor$ are outliers, and at least one unless s is 0; the code counts
so for values, where it may find none, and takes as many of a key channel, whatever its length, which is all of a block of 64 in
Llama-2. There are $2^b$ levels; the code has $b^2$, which is the same at 2 and 4 bits. The code draws the start of the
power iteration anew for each block; here it is fixed by a seed, so that a row does not depend on others. Where groups do not divide a
vector, its last is shorter. Prompts read in chunks: the first chunk that fills the buffer is the prompt, and later ones
are compressed like generated tokens.

Not here: kernels that multiply with the factors without expanding. Tokens are expanded for as long as a layer attends.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.inference.kv_cache.layered import LayeredCache
from refimpl.inference.kv_cache.quantized.groups import halved
from refimpl.inference.kv_cache.quantized.outliers import Outliers
from refimpl.inference.kv_cache.quantized.vectors import PackedVectors
from refimpl.inference.kv_cache.tokens import Tokens
from refimpl.model.config import Config

ROUNDS = 3  # of power iteration, as in the official code


@dataclass(frozen=True, kw_only=True)
class GEAR:
    r"""Keys are compressed in vectors along a block's tokens, one for each channel; values in one for each token, over all heads.

    Args:
        bits: 1 to 8; the paper's are 2 and 4.
        group_size: neighbours in a vector that share scale and minimum, as KIVI groups them; None takes whole vectors,
            the backbone that the paper calls KCVT.
        residual_length: R, the buffer: whenever it is full, its tokens become a block.
        outliers: s, share of each vector that is kept in 16 bits, half of it at either end; 0 is GEAR-L.
        prefill_rank: of the error of the prompt's block, for each head; 0 leaves the factors out.
        rank: the same for blocks of R tokens.

    Examples:
        >>> config = Config(vocabulary=61, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=64, d_ff=40)
        >>> cache, x = GEAR(outliers=0.0).cache(config), torch.randn(1, 1, 130, 64)
        >>> k, v, _ = cache.update(0, x, x, x, torch.arange(130)[None])  # a block of 128 tokens, of rank 4, and a buffer of 2
        >>> cache.nbytes - 64 * 4 * 4 == 2 * (128 * 64 * (2 + 32 / 64) / 8 + (128 + 64) * 4 * 2 + 2 * 64 * 4)
        True
    """

    bits: int = 2
    group_size: int | None = 64
    residual_length: int = 64
    outliers: float = 0.02
    prefill_rank: int = 4
    rank: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be 1 to 8; the paper uses 2 and 4")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(
                f"group_size={self.group_size} must be at least 1, or None for whole vectors; the paper uses 64"
            )
        if self.residual_length < 1:
            raise ValueError(f"residual_length={self.residual_length} must be at least 1; the official code uses 64")
        if not 0 <= self.outliers < 0.5:
            raise ValueError(f"outliers={self.outliers} must be a share from 0 to below 0.5; the paper uses 0.02")
        for name in ("prefill_rank", "rank"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0, which leaves the factors out")

    def cache(self, config: Config) -> LayeredCache:
        """An empty cache; a sliding-window layer's too holds all of its past."""
        generator = torch.Generator().manual_seed(0)
        start = torch.rand(config.head_dim, max(self.rank, self.prefill_rank), generator=generator)
        return LayeredCache(lambda _: _Layer(self, start))


class _Layer:
    """The prompt's block, blocks of R tokens, and the buffer; of each, keys and values."""

    def __init__(self, method: GEAR, start: Tensor) -> None:
        self.method, self.start = method, start
        self.blocks: list[list[_Blocks]] = []
        self.recent: list[Tensor] = []

    def update(self, k: Tensor, v: Tensor, queries: Tensor, start: int) -> tuple[Tensor, Tensor, None]:  # noqa: ARG002 - the protocol's
        """Everything before, expanded, and the new tokens as they are; then whole buffers are compressed."""
        recent = self.recent or [k[:, :, :0], v[:, :, :0]]
        held = sum(kind[0].length for kind in self.blocks)
        every = [self._all(i, held, recent[i], new) for i, new in enumerate((k, v))]
        end = every[0].shape[2] - (every[0].shape[2] - held) % self.method.residual_length
        if end > held:
            for blocks, x in zip(self._blocks(end - held), every, strict=True):
                blocks.append(x[:, :, held:end])
        self.recent = [x[:, :, end:].clone(memory_format=torch.contiguous_format) for x in every]
        return every[0], every[1], None

    def compress_prefill(self) -> None:
        """Nothing: `update` has compressed the prompt already."""

    def _all(self, i: int, held: int, recent: Tensor, new: Tensor) -> Tensor:
        """All tokens: those of the blocks expanded, then `recent`, then `new`."""
        between = held + recent.shape[2]
        if not between:
            return new
        every = new.new_empty(*new.shape[:2], between + new.shape[2], new.shape[3])
        done = 0
        for kind in self.blocks:
            kind[i].write(every[:, :, done : done + kind[i].length])
            done += kind[i].length
        every[:, :, held:between], every[:, :, between:] = recent, new
        return every

    def _blocks(self, tokens: int) -> list["_Blocks"]:
        """Where `tokens` tokens go."""
        if len(self.blocks) < 2:
            own = (self.method.residual_length, self.method.rank) if self.blocks else (tokens, self.method.prefill_rank)
            self.blocks.append([_Blocks(self.method, *own, self.start, keys=keys) for keys in (True, False)])
        return self.blocks[-1]


class _Blocks:
    """Blocks, of so many tokens each, of keys or of values."""

    def __init__(self, method: GEAR, tokens: int, rank: int, start: Tensor, *, keys: bool) -> None:
        self.tokens, self.share, self.keys = tokens, method.outliers, keys
        self.start = start[:, :rank]
        self.vectors = PackedVectors(method.bits, method.group_size)
        self.outliers = Outliers()
        self.left, self.right = Tokens(), Tokens()  # [rows, kv_heads, blocks, tokens or head_dim, rank]

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.vectors.length * self.tokens

    def append(self, x: Tensor) -> None:
        """Compress whole blocks `[rows, kv_heads, blocks * tokens, head_dim]`."""
        before, half = self.vectors.length, halved(x.dtype)
        blocks = torch.unflatten(x if x.dtype == torch.float64 else x.float(), 2, (-1, self.tokens))
        vectors = self._vectors(blocks)
        places = outlier_places(vectors, self.share)
        mean = vectors.mean(dim=-1, keepdim=True)
        self.vectors.append(vectors.scatter(-1, places, mean.expand(places.shape)))
        self.outliers.append(vectors.gather(-1, places), places, vectors.shape[-1], half)
        if self.start.shape[1]:
            rounded = self.vectors.write(torch.empty_like(vectors), before)
            error = self._whole((vectors - rounded).scatter_(-1, places, 0))
            for held, factor in zip((self.left, self.right), low_rank(error, self.start), strict=True):
                held.append(factor.to(half))

    def write(self, out: Tensor) -> None:
        """Expand all tokens to `out` `[rows, kv_heads, tokens, head_dim]`, in float32 or above."""
        rows, kv_heads, _, head_dim = out.shape
        n = self.vectors.length
        shape = (kv_heads, n, head_dim, self.tokens) if self.keys else (1, n, self.tokens, kv_heads * head_dim)
        wide = torch.promote_types(out.dtype, torch.float32)
        whole = self._whole(self.outliers.put(self.vectors.write(out.new_empty(rows, *shape, dtype=wide))))
        if self.left.length:
            whole = whole + self.left.all().to(wide) @ self.right.all().to(wide).mT
        torch.unflatten(out, 2, (n, self.tokens)).copy_(whole)

    def _vectors(self, blocks: Tensor) -> Tensor:
        """`[rows, kv_heads, blocks, tokens, head_dim]` with the vectors last: a head's channels, or all heads' tokens."""
        if self.keys:
            return blocks.mT.contiguous()
        return blocks.permute(0, 2, 3, 1, 4).flatten(3).unsqueeze(1)

    def _whole(self, vectors: Tensor) -> Tensor:
        """Back again."""
        if self.keys:
            return vectors.mT
        return torch.unflatten(vectors.squeeze(1), -1, (-1, len(self.start))).permute(0, 3, 1, 2, 4)


def outlier_places(vectors: Tensor, share: float) -> Tensor:
    r"""Where the largest and the smallest numbers of each vector stand, $\lfloor n \cdot share / 2 \rfloor$ of each, and at least one.

    Args:
        vectors: `[..., n]`.
        share: of a vector, 0 (none) to below 0.5.

    Returns:
        `[..., count]`, int64: those of the largest, then those of the smallest.

    Examples:
        >>> outlier_places(torch.tensor([3.0, -9, 1, 8, 0]), 0.02).tolist()
        [3, 1]
    """
    n = vectors.shape[-1]
    count = min(max(1, int(n * share / 2 + 1e-9)), n // 2) if share else 0
    return torch.cat([vectors.topk(count, largest=largest).indices for largest in (True, False)], dim=-1)


def low_rank(error: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    r"""Factors whose product comes near the best of their rank, by a few rounds of power iteration.

    Args:
        error: `[..., tokens, head_dim]`, float32 or float64.
        start: `[head_dim, rank]`, where the iteration begins.

    Returns:
        A with orthonormal columns `[..., tokens, r]`, and $B = E^\top A$ `[..., head_dim, r]`: the product $A B^\top$ is E projected
        onto A's columns. r is the rank, and less where E has fewer rows or columns.

    Examples:
        >>> a, b = low_rank(torch.tensor([[3.0, 4.0], [6.0, 8.0]]), torch.ones(2, 1))
        >>> (a @ b.T).round(decimals=4).tolist()
        [[3.0, 4.0], [6.0, 8.0]]
    """
    right = start.to(error)  # its dtype and its device
    for _ in range(ROUNDS - 1):
        right = error.mT @ (error @ right)
    left = torch.linalg.qr(error @ torch.linalg.qr(right).Q).Q
    return left, error.mT @ left
