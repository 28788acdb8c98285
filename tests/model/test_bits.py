"""Packed codes: against Python's integers, and their size."""

import pytest
import torch

from refimpl.model.bits import pack, unpack


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1,), (8,), (33,), (3, 5), (2, 0, 7), (2, 3, 16)])
def test_packed_bytes_are_one_long_integer(bits, shape, generator):
    """Oracle: Python's integers: code i of a row, shifted by i * bits, little end first."""
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (*shape[:-1], -(-shape[-1] // 8) * bits)
    for row, stored in zip(
        codes.reshape(-1, shape[-1]).tolist(), packed.reshape(-1, packed.shape[-1]).tolist(), strict=True
    ):
        assert int.from_bytes(bytes(stored), "little") == sum(code << i * bits for i, code in enumerate(row))
    assert torch.equal(unpack(packed, bits, shape[-1]), codes)


def test_rows_can_be_cut_while_packed(generator):
    """Oracle: the codes themselves; a slice that is not contiguous."""
    codes = torch.randint(0, 4, (2, 9, 12), generator=generator, dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, 2)[:, 3:8], 2, 12), codes[:, 3:8])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack(torch.zeros(8, dtype=torch.uint8), 9), "bits=9 must be 1 to 8"),
        (lambda: pack(torch.zeros(8), 2), "must be torch.uint8"),
        (lambda: unpack(torch.zeros(2, dtype=torch.uint8), 2, 9), "2 bytes do not hold 9 codes of 2 bits: 4 do"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
