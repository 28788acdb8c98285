"""Integers of 1 to 8 bits, stored in that many bits.

Eight codes fill `bits` whole bytes, whatever `bits` is: code i of the eight begins at bit `i * bits`, and spills into the next
byte where it does not fit into this one. Codes are packed along the last dimension, so that the others can be indexed, sliced
and appended to while packed.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

WORDS = {
    8: torch.uint8,
    4: torch.int16,
    2: torch.int32,
    1: torch.int64,
}  # bits to a type as wide as a byte's codes, unpacked


def pack(codes: Tensor, bits: int) -> Tensor:
    """Bytes that hold the codes.

    Args:
        codes: `[..., n]`, uint8, each below `2^bits`.
        bits: 1 to 8.

    Returns:
        `[..., ceil(n / 8) * bits]`, uint8; where 8 does not divide n, the last eight are filled up with zeros.

    Raises:
        ValueError: bits outside 1 to 8, or codes that are not uint8.

    Examples:
        >>> pack(torch.tensor([1, 2, 3, 0, 1, 2, 3, 0], dtype=torch.uint8), 2).tolist()
        [57, 57]
    """
    _check(codes, bits)
    eights = torch.unflatten(F.pad(codes, (0, -codes.shape[-1] % 8)), -1, (-1, 8))
    if bits in WORDS:  # no code spills: a byte's codes, each at its place
        groups = torch.unflatten(eights, -1, (bits, -1))
        packed = groups[..., 0].clone()
        for i in range(1, 8 // bits):
            packed |= groups[..., i] << i * bits
        return packed.flatten(-2)
    packed = eights.new_zeros(*eights.shape[:-1], bits)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        packed[..., byte] |= eights[..., i] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= eights[..., i] >> (8 - shift)
    return packed.flatten(-2)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of each row.

    Args:
        packed: `[..., ceil(count / 8) * bits]`, uint8, as `pack` gives it.
        bits: 1 to 8.
        count: codes in a row.

    Returns:
        `[..., count]`, uint8.

    Raises:
        ValueError: bits outside 1 to 8, or bytes that are not uint8 or hold another number of codes.

    Examples:
        >>> unpack(torch.tensor([57, 57], dtype=torch.uint8), 2, 6).tolist()
        [1, 2, 3, 0, 1, 2]
    """
    _check(packed, bits)
    if packed.shape[-1] != -(-count // 8) * bits:
        raise ValueError(
            f"{packed.shape[-1]} bytes do not hold {count} codes of {bits} bits: {-(-count // 8) * bits} do"
        )
    if bits in WORDS:  # a look-up by byte: several times as fast as shifting, and exact
        flat = _words(bits, packed.device).index_select(0, packed.flatten().int())
        return flat.view(torch.uint8).view(*packed.shape[:-1], packed.shape[-1] // bits * 8)[..., :count]
    groups = torch.unflatten(packed, -1, (-1, bits))
    codes = packed.new_empty(*groups.shape[:-1], 8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        codes[..., i] = groups[..., byte] >> shift
        if shift + bits > 8:
            codes[..., i] |= groups[..., byte + 1] << (8 - shift)
    return codes.bitwise_and_(2**bits - 1).flatten(-2)[..., :count]


@cache
def _words(bits: int, device: torch.device) -> Tensor:
    """The codes of each of the 256 bytes, one after the other in a word: `[256]`."""
    shifts = torch.arange(0, 8, bits, device=device)
    codes = (torch.arange(256, device=device)[:, None] >> shifts) & (2**bits - 1)
    words: Tensor = codes.to(torch.uint8).view(WORDS[bits]).flatten()
    return words


def _check(data: Tensor, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits} must be 1 to 8")
    if data.dtype != torch.uint8:
        raise ValueError(f"data of {data.dtype} must be torch.uint8")
