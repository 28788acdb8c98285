"""Integers of 1 to 8 bits in that many bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refimpl.compression.quantization.packed import pack, unpack


@given(st.integers(1, 8).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=70))))
def test_unpack_inverts_pack(case):
    bits, codes = case
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert unpack(packed, bits, len(codes)).tolist() == codes
    assert packed.numel() == -(-len(codes) // 8) * bits


@given(
    st.integers(1, 8).flatmap(
        lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), min_size=8, max_size=8))
    )
)
def test_layout_is_little_endian_in_bits(case):
    """Oracle: Python's integers. Code i stands at bit i * bits of the number that the bytes spell."""
    bits, codes = case
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    assert bytes(pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist()) == number.to_bytes(bits, "little")


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_nothing_packs_to_nothing(bits):
    packed = pack(torch.empty(0, dtype=torch.uint8), bits)
    assert packed.numel() == 0
    assert unpack(packed, bits, 0).numel() == 0
