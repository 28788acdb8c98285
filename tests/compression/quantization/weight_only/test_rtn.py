"""RTN: closed forms, a peer's primitives, and the bound of half a step."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

from refimpl.compression.protocol import compress
from refimpl.compression.quantization.weight_only.rtn import RTN


def randn(*shape, generator, dtype=torch.float32):
    return torch.randn(*shape, generator=generator).to(dtype)


def test_worked_by_hand():
    """Oracle: by hand. Range [-1, 2] in 3 steps of 1: zero point 1; 0.4 -> 0, 1.6 -> 2, ends exact."""
    packed = RTN(bits=2, group_size=4)(torch.tensor([[-1.0, 0.4, 1.6, 2.0]]))
    assert packed.dense().tolist() == [[-1.0, 0.0, 2.0, 2.0]]
    assert packed.scale.tolist() == [1.0]


def test_symmetric_worked_by_hand():
    """Oracle: by hand. m = 1.5, step 2 * 1.5 / 3 = 1, levels -2..1: 1.5 ties to 2 and is clamped to 1, -1.5 to -2."""
    packed = RTN(bits=2, group_size=4, symmetric=True)(torch.tensor([[1.5, -1.5, 0.4, -0.6]]))
    assert packed.dense().tolist() == [[1.0, -2.0, 0.0, -1.0]]
    assert packed.zero is None


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_error_is_at_most_half_a_step(bits, symmetric, granularity, generator):
    """Oracle: a theorem. Rounding inside the range moves nothing by more than s / 2."""
    weight = randn(7, 33, generator=generator)
    packed = RTN(bits=bits, symmetric=symmetric, granularity=granularity, group_size=8)(weight)
    steps = _per_weight(packed.scale.float(), granularity, (7, 33), 8)
    error = (packed.dense() - weight).abs()
    assert (error <= steps / 2 * (1 + 1e-5)).all()
    assert (error > steps / 4).any()  # negative control: the bound is used, the step is not needlessly small


def _per_weight(scale, granularity, shape, group_size):
    if granularity == "group":
        return scale.view(shape[0], -1).repeat_interleave(group_size, dim=1)[:, : shape[1]]
    return scale[:, None].expand(-1, shape[1]) if granularity == "channel" else scale.expand(shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [11, 33])
def test_equals_torchao(bits, group_size, generator):
    """Oracle: torchao's affine primitives (0.18), asymmetric, float32 scales: same codes, same values."""
    weight = randn(6, 33, generator=generator)
    ours = RTN(bits=bits, group_size=group_size, scale_dtype=torch.float32)(weight).dense()
    assert_close(ours, torchaos(weight, bits, group_size))
    assert (ours - weight).abs().max() > 1e-3  # negative control: something was rounded


def torchaos(weight, bits, group_size):
    """The weight on torchao's grid, its codes a byte each on the way."""
    grid = {"block_size": (1, group_size), "quant_min": 0, "quant_max": 2**bits - 1}
    scale, zero = choose_qparams_affine(weight, MappingType.ASYMMETRIC, target_dtype=torch.uint8, **grid)
    sizes = (grid["block_size"], scale, zero)
    codes = quantize_affine(weight, *sizes, torch.uint8, grid["quant_min"], grid["quant_max"])
    return dequantize_affine(codes, *sizes, torch.uint8, grid["quant_min"], grid["quant_max"])


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_beside_torchao(bits, peer, generator):
    """Oracle: torchao's affine primitives (0.18). They multiply by the step's reciprocal, which can round a weight that lies
    halfway between two levels to the other one. Here none does: all are 128ths, and each group spans an odd number of them.
    """
    weight = torch.randint(-127, 129, (2048, 1024), generator=generator) / 128
    weight.view(-1, 128)[:, :2] = torch.tensor([-127, 128]) / 128
    method = RTN(bits=bits, group_size=128, scale_dtype=torch.float32)
    peer(
        "rtn",
        "torchao",
        f"quantize and back, 2048 by 1024, {bits} bits in groups of 128; ours packs the codes",
        lambda: method(weight).dense(),
        lambda: torchaos(weight, bits, 128),
        within=1e-6,  # float32 rounding of the step, times codes of up to 2^bits
    )


def test_a_product_with_one_row_beside_float32(peer, measured_layer, generator):
    """Oracle: PyTorch's product with the same weight, unpacked beforehand. It reads eight times the bytes, and computes less."""
    weight, row = randn(*measured_layer[:2], generator=generator), randn(1, measured_layer[1], generator=generator)
    packed = RTN(bits=4, group_size=128)(weight)
    dense = packed.dense()
    peer(
        "rtn",
        "torch",
        f"one row times a packed 4-bit weight, {measured_layer[0]} by {measured_layer[1]}, beside the same weight in float32",
        lambda: packed.multiply(row),
        lambda: torch.nn.functional.linear(row, dense),
        within=1e-3,  # sums of some thousand float32 products of size 1
    )


@pytest.mark.parametrize(("bits", "bytes_per_group"), [(4, 16 + 2 + 0.5), (3, 12 + 2 + 0.375), (2, 8 + 2 + 0.25)])
def test_bytes_by_formula(bits, bytes_per_group, generator):
    """Oracle: arithmetic. A group of 32 holds 32 * bits of codes, 16 bits of scale, `bits` of zero point."""
    packed = RTN(bits=bits, group_size=32)(randn(16, 64, generator=generator))
    assert packed.nbytes == 32 * bytes_per_group
    symmetric = RTN(bits=bits, group_size=32, symmetric=True)(randn(16, 64, generator=generator))
    assert symmetric.nbytes == 32 * (bytes_per_group - bits / 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_follows_the_weights_dtype(dtype, generator):
    """Oracle: the float32 result, cast."""
    weight = randn(5, 12, generator=generator, dtype=dtype)
    dense = RTN(group_size=4)(weight).dense()
    assert dense.dtype == dtype
    assert_close(dense, RTN(group_size=4)(weight.float()).dense().to(dtype))


@pytest.mark.parametrize("weight", [torch.zeros(3, 5), torch.full((3, 5), 2.5), torch.full((3, 5), -1e-30)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_constant_groups_stay_finite(weight, symmetric):
    """Oracle: closed form. A constant c >= 0 is the top of the range [0, c], so c is a level, as 0 is."""
    packed = RTN(bits=4, group_size=5, symmetric=symmetric, scale_dtype=torch.float32)(weight)
    bound = packed.scale[:, None] / 2 * (1 + 1e-5)
    assert ((packed.dense() - weight).abs() <= bound).all()
    if not symmetric:
        assert_close(packed.dense(), weight)


def test_last_group_is_shorter_not_padded_with_zeros():
    """Oracle: by hand. The last two columns are a group of their own, with range [0, 11] and step 11 / 15."""
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0, 10.0, 11.0]])
    packed = RTN(group_size=4)(weight)
    assert packed.scale.tolist() == pytest.approx([4 / 15, 11 / 15], rel=1e-3)
    assert packed.dense().shape == (1, 6)


def test_more_bits_and_smaller_groups_never_widen_the_bound(generator):
    """Oracle: the bound s / 2 halves with each bit, and a group's range is inside its channel's."""
    weight = randn(8, 64, generator=generator)
    scales = [RTN(bits=b, group_size=16, scale_dtype=torch.float32)(weight).scale for b in (2, 3, 4, 8)]
    assert_close(scales[0] * 3 / 15, scales[2])
    assert all((wide > narrow).all() for wide, narrow in pairwise(scales))
    channel = RTN(granularity="channel", scale_dtype=torch.float32)(weight).scale
    group = RTN(group_size=16, scale_dtype=torch.float32)(weight).scale.view(8, 4)
    assert (group <= channel[:, None]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 9}, "bits=9 must be 1 to 8"),
        ({"bits": 0}, "bits=0 must be 1 to 8"),
        ({"granularity": "row"}, "granularity='row'"),
        ({"group_size": 0}, "group_size=0"),
        ({"scale_dtype": torch.int8}, "scale_dtype=torch.int8"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        RTN(**change)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.randn(4), "must be a matrix"),
        (torch.empty(0, 4), "at least one element"),
        (torch.tensor([[1.0, float("nan")]]), "NaN or infinity"),
        (torch.full((1, 4), 1e8), "use scale_dtype=torch.float32"),
    ],
)
def test_bad_weights_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        RTN(bits=2)(weight)


def test_claim_error_bound(claim, generator):
    """Largest error of any weight on grids of 2 to 8 bits, in steps."""
    worst = 0.0
    for bits in (2, 3, 4, 8):
        weight = randn(64, 128, generator=generator)
        packed = RTN(bits=bits, group_size=32, scale_dtype=torch.float32)(weight)
        steps = _per_weight(packed.scale, "group", (64, 128), 32)
        worst = max(worst, float(((packed.dense() - weight).abs() / steps).max()))
    claim("rtn", "error-bound", worst)


def test_claim_groups_beat_channels(claim, generator):
    """Error of groups of 128 over error of whole channels at 3 bits, on weights whose columns differ in size."""
    weight = randn(64, 1024, generator=generator) * torch.exp(0.5 * randn(1024, generator=generator))
    error = {g: (RTN(bits=3, granularity=g)(weight).dense() - weight).norm() for g in ("channel", "group")}
    claim("rtn", "groups-beat-channels", float(error["group"] / error["channel"]))


def test_claim_group_overhead(claim, generator):
    """Bits per weight that are held beyond the codes, at 4 bits in groups of 128."""
    weight = randn(256, 1024, generator=generator)
    claim("rtn", "group-overhead", 8 * RTN(bits=4, group_size=128)(weight).nbytes / weight.numel() - 4)


def test_compress_a_hugging_face_model(generator):
    """Oracle: each layer's weight by `RTN` alone. Embedding and tied head stay as they are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = compress(model, RTN(bits=8, group_size=16))
    tokens = torch.randint(0, 64, (2, 9), generator=generator)
    with torch.no_grad():
        full, rounded = model(tokens).logits, small(tokens).logits
    layer = small.model.layers[1].self_attn.k_proj
    assert_close(
        layer.compressed.dense(), RTN(bits=8, group_size=16)(before["model.layers.1.self_attn.k_proj.weight"]).dense()
    )
    assert 0 < (full - rounded).norm() / full.norm() < 0.05
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert isinstance(small.lm_head, torch.nn.Linear)
