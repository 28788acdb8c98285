"""Ternary weights: torchao's rounding, digits counted by hand, and products of integers."""

import pytest
import torch
from torch.testing import assert_close
from torchao.prototype.quantized_training.bitnet import get_bitnet_scale, quantize_bitnet_weight

from refimpl.compression.quantization.qat.ternary import (
    FEW,
    TernaryWeight,
    absmax_int8,
    absmean,
    multiply_packed,
    pack_trits,
    rms_norm,
    unpack_trits,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_absmean_equals_torchaos(dtype, generator):
    """Oracle: torchao 0.18; and by hand: half of the mean is the border to 0."""
    weight = torch.randn(7, 33, generator=generator).to(dtype)
    codes, scale = absmean(weight)
    assert torch.equal(scale, get_bitnet_scale(weight))
    assert torch.equal(codes, quantize_bitnet_weight(weight, scale).float())
    assert absmean(torch.tensor([[0.49, -0.51, 1.0, 2.0]]))[0].tolist() == [[0.0, -1.0, 1.0, 1.0]]  # mean 1
    assert absmean(torch.zeros(2, 2))[0].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_share_of_zeros_of_a_gaussian(generator):
    """Oracle: closed form: P(|z| < E|z| / 2) with E|z| = sqrt(2 / pi): 0.310."""
    z = torch.tensor(2 / torch.pi).sqrt() / 2
    expected = torch.erf(z / 2**0.5).item()
    share = (absmean(torch.randn(300, 300, generator=generator))[0] == 0).float().mean().item()
    assert expected == pytest.approx(0.310, abs=1e-3) and share == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("count", [1, 4, 5, 6, 33])
def test_digits_come_back(count, generator):
    """Oracle: what was packed; by arithmetic ceil(n / 5) bytes a row."""
    codes = torch.randint(-1, 2, (3, 2, count), generator=generator).float()
    packed = pack_trits(codes)
    assert packed.shape == (3, 2, -(-count // 5)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_trits(packed, count), codes)


def test_a_byte_by_hand():
    """Oracle: by hand: sum of 3^i (w_i + 1)."""
    codes = torch.tensor([[1.0, -1.0, 0.0, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, -1.0, -1.0, -1.0]])
    assert pack_trits(codes).tolist() == [[2 + 0 + 9 + 54 + 0], [242], [0]]


@pytest.mark.parametrize("rows", [1, 3, FEW, FEW + 1, 20])
@pytest.mark.parametrize("columns", [1, 10, 33])
def test_products_from_packed_bytes_are_exact(rows, columns, generator):
    """Oracle: int64 arithmetic; looked up and unpacked, sizes that 5 does not divide."""
    x = torch.randint(-128, 128, (rows, columns), generator=generator)
    w = torch.randint(-1, 2, (7, columns), generator=generator)
    assert torch.equal(multiply_packed(x.float(), pack_trits(w.float())).long(), x @ w.T)


def test_few_rows_are_multiplied_without_unpacking(monkeypatch, generator):
    """Oracle: a function that must not be called."""
    from refimpl.compression.quantization.qat import ternary

    def unpacked(packed, count):
        raise AssertionError

    monkeypatch.setattr(ternary, "unpack_trits", unpacked)
    held = TernaryWeight(torch.randn(4, 12, generator=generator), torch.ones(12), 1e-6)
    assert held.multiply(torch.randn(2, 12, generator=generator)).shape == (2, 4)
    with pytest.raises(AssertionError):
        held.dense()


def test_activations_by_hand():
    """Oracle: by hand: 127 / 2 a unit; a row of zeros stays zero."""
    codes, step = absmax_int8(torch.tensor([[2.0, -0.5], [0.0, 0.0]]))
    assert codes.tolist() == [[127.0, -32.0], [0.0, 0.0]] and step[0].item() == pytest.approx(2 / 127)


def test_the_norm_is_torchs(generator):
    """Oracle: torch.nn.RMSNorm."""
    x, norm = torch.randn(3, 8, generator=generator), torch.nn.RMSNorm(8, eps=1e-3)
    norm.weight.data.uniform_(0.5, 2, generator=generator)
    assert_close(rms_norm(x, norm.weight, 1e-3), norm(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_multiplying_is_the_product_of_what_is_read_with_dense(dtype, generator):
    """Oracle: `read` and `dense`, in float64; with and without a bias, for a matrix, a batch and one row; bytes by arithmetic."""
    held = TernaryWeight(
        torch.randn(6, 33, generator=generator).to(dtype), torch.rand(33, generator=generator).to(dtype), 1e-6
    )
    bias, inputs = torch.randn(6, generator=generator), torch.randn(24, 33, generator=generator).to(dtype)
    close = {"rtol": 0.02, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    for x in (inputs, inputs.view(2, 3, 4, 33), inputs[0], inputs[:3]):
        expected = held.read(x).double() @ held.dense().double().T
        assert_close(held.multiply(x).double(), expected, **close)
        assert_close(held.multiply(x, bias.to(dtype)).double(), expected + bias, **close)
        assert held.multiply(x).dtype == held.read(x).dtype == held.dense().dtype == dtype
    assert held.nbytes == 6 * 7 + 4 + 33 * torch.finfo(dtype).bits // 8
