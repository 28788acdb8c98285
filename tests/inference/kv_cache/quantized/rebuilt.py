"""What quantized caches are held against: the paper's quantizer as a loop in NumPy, and a cache that rebuilds the past at every call."""

import functools

import numpy as np
import torch


def plain(groups, bits):
    """Quantized and back, one group a row, by the formula; the grid in half precision, rounded outward."""
    return np.stack([_group(row.tobytes(), row.dtype, bits) for row in groups])


@functools.cache  # what is rebuilt at every call is the same past
def _group(numbers, dtype, bits):
    row = np.frombuffer(numbers, dtype)
    low = np.float16(row.min())
    low = np.nextafter(low, np.float16(-np.inf)) if low > row.min() else low
    step = max((row.max() - np.float64(low)) / (2**bits - 1), np.finfo(np.float16).tiny)
    scale = np.float16(step)
    scale = np.float64(np.nextafter(scale, np.float16(np.inf)) if scale < step else scale)
    return (np.clip(np.rint((row - np.float64(low)) / scale), 0, 2**bits - 1) * scale + np.float64(low)).astype(dtype)


def half(x):
    """Rounded to half precision as PyTorch rounds double precision: to single first."""
    return np.asarray(x).astype(np.float32).astype(np.float16).astype(np.float64)


class Rebuilt:
    """All keys and values as they came; attention sees those of earlier calls as `rebuild` says, and the new ones as they are.

    `rebuild(k, v, calls)` takes what came before `[rows, kv_heads, n, head_dim]`, which it may write to, and how many tokens each call
    brought.
    """

    def __init__(self, rebuild):
        self.rebuild, self.past, self.calls = rebuild, {}, {}

    @property
    def length(self):
        return max((k.shape[2] for k, _ in self.past.values()), default=0)

    def update(self, layer, k, v, queries, positions):
        old = self.past.get(layer, (k[:, :, :0], v[:, :, :0]))
        calls = self.calls.setdefault(layer, [])
        seen = self.rebuild(*(x.clone() for x in old), list(calls)) if calls else old
        self.past[layer] = tuple(torch.cat(pair, dim=2) for pair in zip(old, (k, v), strict=True))
        calls.append(k.shape[2])
        return *(torch.cat(pair, dim=2) for pair in zip(seen, (k, v), strict=True)), None
