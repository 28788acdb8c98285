"""Vectors on levels of their own: against a loop in NumPy; bytes."""

import numpy as np
import torch
from torch.testing import assert_close

from refimpl.inference.kv_cache.quantized.leveled import LeveledVectors
from refimpl.inference.kv_cache.quantized.levels import Levels
from tests.inference.kv_cache.quantized.rebuilt import half

ENCODE, DECODE = torch.tensor([-1.0, -0.25, 0.5, 1.0]), torch.tensor([-0.9, -0.2, 0.4, 1.1])


def test_numbers_by_loop(generator):
    """Oracle: one loop over numbers: the nearest level by distance, what it stands for, and what an outlier lacks in half precision."""
    x = torch.randn(2, 1, 6, 10, generator=generator, dtype=torch.float64) * 2
    width, middle = (
        torch.rand(1, 1, 1, 10, generator=generator).double() + 1,
        torch.randn(1, 1, 1, 10, generator=generator).double(),
    )
    places = torch.rand(2, 1, 6, 10, generator=generator).argsort(dim=-1)[..., :3]
    apart = torch.rand(2, 1, 6, 3, generator=generator) > 0.5
    held = LeveledVectors(2, Levels(ENCODE, DECODE))
    for part in (slice(0, 1), slice(1, 6)):
        held.append(x[:, :, part], width, middle, places[:, :, part], apart[:, :, part], torch.float16)
    expected = x.clone()
    for at in np.ndindex(*x.shape):
        w, m = float(width[0, 0, 0, at[3]]), float(middle[0, 0, 0, at[3]])
        share = (float(x[at]) - m) / w
        rounded = float(DECODE[min(range(4), key=lambda i: abs(share - float(ENCODE[i])))]) * w + m
        lacks = bool((apart[at[:3]] & (places[at[:3]] == at[3])).any())
        expected[at] = rounded + (float(half(float(x[at]) - rounded)) if lacks else 0.0)
    assert held.length == 6
    assert_close(held.dense(10, width, middle), expected)
    assert (expected - x).abs().max() > 0.3  # negative control


def test_bytes_by_hand():
    """Oracle: by hand: 2 bits for each of 10 numbers, eights rounded up, and 3 bytes for each outlier."""
    held, none = LeveledVectors(2, Levels(ENCODE, DECODE)), torch.zeros(1, 1, 7, 3, dtype=torch.int64)
    held.append(torch.zeros(1, 1, 7, 10), torch.ones(1), torch.zeros(1), none, none.bool(), torch.float16)
    assert held.codes.nbytes + held.lacking.nbytes == 7 * (4 + 3 * 3)
