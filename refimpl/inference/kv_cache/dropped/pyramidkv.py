r"""PyramidKV: SnapKV's choice, of more tokens in lower layers and fewer in upper ones.

Source: `pyramidkv` (arXiv 2406.02069), Section 4.2, Eq. (1); official code
Zefan-Cai/KVCache-Factory@c97f9d706d63d1b56e980f8b81b2a924c21162b3, pyramidkv/pyramidkv_utils.py (`PyramidKVCluster`, and
`init_pyramidkv` for the defaults; the paper's experiments have the same beta and a window of 8, and pool by maximum over 7 in
run_longbench.py).
The window comes on top of each layer's share. Where the bottom layer's would be more than the prompt has, it is that, and the top
layer gets the difference; where the prompt has less than twice what is kept on average, all layers get the same.

Differs from the paper: shares are whole numbers and add up to the budget of all layers: what the lower half is rounded to, the upper half
makes up for. The official code rounds the step from layer to layer down, and so keeps a little more than its budget. For heads
that share keys, small budgets, and prompts in chunks, see `snapkv`.

Not here: merging what is dropped into what is kept, an option of the official code.
"""

from dataclasses import dataclass

from refimpl.inference.kv_cache.dropped.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """A cache whose prompt is compressed once, each layer to its own size.

    Args:
        budget: see `SnapKV`; the mean over the layers.
        window: see `SnapKV`.
        kernel: see `SnapKV`.
        pooling: see `SnapKV`.
        beta: how many times less than the mean the top layer chooses, 1 or more; with 1 this is SnapKV.

    Examples:
        >>> method = PyramidKV(budget=58, window=8, beta=5)
        >>> [method.chosen(layer, 5, length=1000) for layer in range(5)]  # a mean of 50
        [90, 70, 50, 30, 10]
    """

    beta: float = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 1:
            raise ValueError(f"beta={self.beta} must be at least 1; the paper's is 20")

    def chosen(self, layer: int, layers: int, length: int) -> int:
        """The share of a layer in tokens, of a prompt of this length above the budget."""
        mean = self.budget - self.observing
        if layers == 1 or length < 2 * mean:
            return mean
        bottom = min(2 * mean - int(mean / self.beta), length - self.observing)
        nearer = min(layer, layers - 1 - layer)  # to an end
        lower = bottom - nearer * 2 * (bottom - mean) // (layers - 1)
        return lower if nearer == layer else 2 * mean - lower
