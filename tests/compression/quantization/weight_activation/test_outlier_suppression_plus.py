"""Outlier Suppression+: the function before rounding, the search against PyTorch's own rounding, grids, and planted asymmetry."""

from functools import cache

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.compression.anatomy import anatomy, feeds, rescale_
from refimpl.compression.protocol import CompressedLinear
from refimpl.compression.quantization.weight_activation import outlier_suppression_plus
from refimpl.compression.quantization.weight_activation.outlier_suppression_plus import (
    OutlierSuppressionPlus,
    divide_,
    stages,
)
from refimpl.compression.quantization.weight_activation.smoothquant import SmoothQuant
from refimpl.compression.ranges import channel_ranges
from refimpl.compression.shift import is_shiftable, shift_
from refimpl.model.linear import weight_of
from tests.compression.conftest import decoder, opt


class Unrounded(OutlierSuppressionPlus):
    """Shifts and scales, and leaves layers as they are."""

    def quantize_(self, model, layers, x):
        pass


class Unshifted(OutlierSuppressionPlus):
    """Scaling alone."""

    def shift(self, inputs):
        return torch.zeros_like(inputs[0])


def plant(model, factor=20.0, offset=30.0):
    """Make four channels of each norm's output 20 times larger, and move four others far to one side; the same function."""
    for block in anatomy(model).blocks:
        for feed in feeds(model, block):
            if feed.producer in (block.attention_norm, block.feed_forward_norm):
                rescale_(model, feed, torch.ones(32).index_fill(0, torch.arange(1, 32, 8), 1 / factor))
                if is_shiftable(model, feed):
                    away = torch.zeros(32)
                    away[3::8] = offset * torch.tensor([1.0, -1, 1, -1])
                    shift_(model, feed, -away)
    return model


def off(one, other):
    return float((one - other).norm() / other.norm())


def test_no_output_changes_before_rounding(build, tokens, logits, architecture, monkeypatch):
    """Oracle: the logits before, in float64. Then norms with a bias are centred, and no channel of theirs is beyond the largest
    threshold; the others are scaled only. Control: something moved.
    """
    monkeypatch.setattr(outlier_suppression_plus, "STRIDE", float("inf"))  # twelve thresholds, however large the inputs
    model = plant(build().double())
    expected = logits(model, tokens)
    moved = Unrounded(steps=12)(model, [tokens])
    assert_close(logits(moved, tokens), expected, rtol=1e-8, atol=1e-8)
    part = anatomy(model).blocks[2]
    names = [part.attention_norm, part.feed_forward_norm]
    before, after = (channel_ranges(m, [part.down], [tokens], made=names) for m in (model, moved))
    for name in names:
        (low, high), (least, greatest) = before[name], after[name]
        centre = (low + high) / 2 if architecture in ("opt", "gpt2") else torch.zeros(32)
        assert_close(
            (least + greatest) / 2,
            (low + high - 2 * centre) / 2 * (greatest - least) / (high - low),
            rtol=1e-3,
            atol=1e-3,
        )
        assert (torch.maximum(-least, greatest)).max() < 0.5 * torch.maximum(-low, high).max()
    inside = (before[part.down][1] / after[part.down][1]).nan_to_num(1.0)
    assert (inside.max() > 1.001) == (architecture in ("decoder", "llama"))  # of gated feed-forwards, scaled too


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (opt, [(True, 1.0, "out_proj"), (True, 1.0, None)]),
        (decoder, [(False, 0.1, "o_proj"), (False, 0.1, "down_proj"), (False, 0.1, None)]),
    ],
)
def test_what_is_searched_and_how_far(build, expected, tokens):
    """Oracle: the official code: the error is that of attention's output, of what the gate lets through, or of the layer's own output;
    thresholds go down to 1, and to 0.1 where nothing is shifted.
    """
    calls = []

    class Noting(Unrounded):
        def scale(self, x, output, least):
            low, high = x.flatten(0, -2).aminmax(dim=0)
            target = next((name for name, module in output.around.named_modules() if module is output.target), None)
            calls.append((bool((low + high).abs().max() < 1e-4), least, target))
            return torch.ones_like(low)

    Noting()(build(), [tokens])
    assert calls == expected * 4


class Product:
    """What the search is given: here, x times the weight."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, x, weight):
        return x @ weight.T


@pytest.mark.parametrize("scope", ["static", "token"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_threshold_is_the_best_of_all(scope, symmetric, generator):
    """Oracle: every threshold tried with PyTorch's fake quantization, whose best factors are taken. Control: they are not all 1,
    which the largest threshold gives.
    """
    x, weight = torch.randn(40, 10, generator=generator), torch.randn(6, 10, generator=generator)
    x[:, 2] *= 15
    x[:, 7] *= 8
    method = OutlierSuppressionPlus(bits=4, scope=scope, symmetric=symmetric, steps=20)
    found = method.scale(x, Product(weight), 1.0)
    largest, steps, errors = float(x.abs().max()), max(20, int(float(x.max()) / 0.5)), {}

    def fake(rows, low, high):
        if symmetric:
            scale, zero, span = torch.maximum(-low, high) / 7, torch.zeros(len(rows), dtype=torch.int32), (-7, 7)
        else:
            scale = (high.clamp(min=0) - low.clamp(max=0)) / 15
            zero, span = (-low.clamp(max=0) / scale).round().int(), (0, 15)
        return torch.fake_quantize_per_channel_affine(rows, scale, zero, 0, *span)

    for i in range(steps + 1):
        t = largest + (1.0 - largest) * i / steps
        s = (x.abs().amax(0) / t).clamp(min=1)
        own, w = x / s, weight * s
        ends = (own.amin(1), own.amax(1)) if scope == "token" else (torch.full((40,), -t), torch.full((40,), t))
        read = fake(own, *ends)
        errors[float((read @ fake(w, w.amin(1), w.amax(1)).T - x @ weight.T).square().sum())] = s
    assert_close(found, errors[min(errors)], rtol=1e-4, atol=1e-5)
    assert found.max() > 1.5


def test_nothing_is_scaled_where_no_channel_is_large(generator):
    """Oracle: the definition: no threshold lies between the largest magnitude and 1."""
    x = 0.9 * torch.rand(20, 5, generator=generator)
    assert OutlierSuppressionPlus().scale(x, Product(torch.ones(3, 5)), 1.0).tolist() == [1] * 5


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_of_a_quantized_layer_are_divided(granularity, symmetric, tokens, generator):
    """Oracle: the layer's dense weight and bias, divided; the inside of the feed-forward reaches the output unchanged."""
    model = decoder()
    part = anatomy(model).blocks[0]
    feed = stages(model, part)[3][0]
    method = OutlierSuppressionPlus(bits=6, granularity=granularity, symmetric=symmetric)
    method.quantize_(model, [part.up], torch.randn(5, 32, generator=generator))
    before, down = model.get_submodule(part.up).weight, weight_of(model.get_submodule(part.down)).clone()
    scale = torch.rand(40, generator=generator) + 0.5
    divide_(model, feed, scale)
    assert_close(model.get_submodule(part.up).weight, before / scale[:, None])
    assert_close(weight_of(model.get_submodule(part.down)), down * scale)


@pytest.mark.parametrize(
    ("change", "levels", "grids"),
    [
        ({}, 64, 32),
        ({"symmetric": True, "granularity": "tensor"}, 63, 1),
        ({"scope": "token", "bits": 4}, 16, 32),
    ],
)
def test_weights_and_inputs_are_on_their_grids(change, levels, grids, tokens, logits):
    """Oracle: counting: levels of a row, or of all rows; and of a token's inputs, or of all. A fixed grid spans the mean of the batches'
    ranges, by hooks on a layer that reads nothing quantized.
    """
    batches = [tokens[:2], tokens[2:]]
    small = OutlierSuppressionPlus(steps=4, **change)(opt(), batches)
    first, ends = small.get_submodule(anatomy(opt()).blocks[0].q), []
    first.register_forward_pre_hook(lambda _m, args: ends.append(torch.stack(args[0].aminmax())))
    for batch in batches:
        small(batch)
    if first.compressed.input_scale is not None:
        low, high = torch.stack(ends).mean(dim=0)
        width = 2 * max(-low, high) if change.get("symmetric") else high - low
        assert_close(first.compressed.input_scale, width / (levels - 1), rtol=1e-5, atol=0)
        assert not torch.allclose(ends[0], ends[1], rtol=1e-3)
    held = small.get_submodule(anatomy(opt()).blocks[1].q).compressed
    assert held.scale.numel() == grids
    rows = held.dense() if grids == 32 else held.dense().view(1, -1)
    for row, scale in zip(rows, held.scale, strict=True):
        codes = row / scale
        assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        assert codes.max() - codes.min() < levels
    read = held.read(torch.randn(9, 32, generator=torch.Generator().manual_seed(0)))
    rows = read if change.get("scope") == "token" else [read.flatten()]
    assert all(2 < len(row.unique()) <= levels for row in rows)
    assert (held.input_scale is None) == (change.get("scope") == "token")
    assert sum(isinstance(module, CompressedLinear) for module in small.modules()) == 4 * 6


def test_a_layer_sees_what_quantized_layers_make(tokens):
    """Oracle: what layers of the original read, by hooks: the first norm is all the same, the first output layer reads what 3-bit
    layers made.
    """
    seen, exact = [], {}

    class Watching(Unrounded):
        def quantize_(self, model, layers, x):
            seen.append(x.clone())
            OutlierSuppressionPlus.quantize_(self, model, layers, x)

    model = opt()
    part = anatomy(model).blocks[0]
    for name in (part.attention_norm, part.v):
        model.get_submodule(name).register_forward_hook(lambda _m, _a, out, name=name: exact.update({name: out}))
    model.get_submodule(part.o).register_forward_pre_hook(lambda _m, args: exact.update({part.o: args[0]}))
    with torch.no_grad():
        model(tokens)
    Watching(bits=3, steps=2, scope="token")(opt(), [tokens])
    centred = exact[part.attention_norm].flatten(0, 1)
    centred = centred - (centred.amin(0) + centred.amax(0)) / 2
    assert len(seen) == 4 * 4
    assert_close(
        seen[0].flatten(0, 1) / centred, (seen[0].flatten(0, 1) / centred)[:1].expand(33, -1), rtol=1e-2, atol=1e-2
    )
    assert 0.05 < off(seen[1], exact[part.o]) < 0.7


def test_half_precision_and_keyword_batches(build, tokens, logits, architecture):
    """Oracle: the float32 result, in the precision of bfloat16 and 8 bits."""
    key = "tokens" if architecture == "decoder" else "input_ids"
    small = OutlierSuppressionPlus(bits=8, steps=4)(build().bfloat16(), [{key: tokens}])
    assert logits(small, tokens).dtype == torch.bfloat16
    assert off(logits(small, tokens).float(), logits(build(), tokens)) < 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1}, "bits=1 must be 2 to 8"),
        ({"scope": "tensor"}, "scope='tensor' must be 'static' or 'token'"),
        ({"granularity": "group"}, "granularity='group' must be 'channel' or 'tensor'"),
        ({"steps": 0}, "steps=0 must be at least 1"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        OutlierSuppressionPlus(**change)


def test_bad_calibration_and_models_are_refused(tokens):
    with pytest.raises(ValueError, match=r"OutlierSuppressionPlus needs texts .*: pass `calibration`"):
        OutlierSuppressionPlus()(decoder())
    for place, message in (
        ("layers.1.attention.v_proj", "weight holds NaN"),
        ("embedding", r"makes NaN or infinity in the inputs of layer 'layers\.0\.attention\.q_proj'"),
    ):
        model = decoder()
        nn.init.constant_(model.get_submodule(place).weight, float("nan"))
        with pytest.raises(ValueError, match=message):
            OutlierSuppressionPlus(steps=2)(model, [tokens])
    small = OutlierSuppressionPlus(steps=2)(decoder(), [tokens])
    with pytest.raises(ValueError, match="must be a linear layer that nothing has compressed"):
        OutlierSuppressionPlus()(small, [tokens])


@torch.no_grad()
def losses(model, method, calibration, text):
    """Error of the logits of `model` on a text, after `method` has seen calibration data."""
    return off(method(model, calibration)(text).logits, model(text).logits)


@pytest.fixture(scope="module")
def error():
    """`error(method)`: of the logits on random tokens, of an OPT with planted outliers, far to one side too; each computed once."""
    texts = torch.randint(0, 61, (2, 16, 32), generator=torch.Generator().manual_seed(0))
    model = plant(opt())
    return cache(lambda method: losses(model, method, [texts[0]], texts[1]))


OURS = OutlierSuppressionPlus(bits=6, steps=30)


def test_claim_beats_smoothquant(claim, error):
    """Error of the logits at 6 bits, one fixed grid for activations, over SmoothQuant's; planted outliers, asymmetric."""
    theirs = error(SmoothQuant(bits=6, level="O3", granularity="channel"))
    claim("outlier-suppression-plus", "beats-smoothquant", error(OURS) / theirs)


def test_claim_shifting_matters(claim, error):
    """Error of the logits at 6 bits, over that of scaling alone, on the same model."""
    claim("outlier-suppression-plus", "shifting-matters", error(OURS) / error(Unshifted(bits=6, steps=30)))


def test_claim_eight_bits(claim, error):
    """Error of the logits at 8 bits, share of the logits' norm, on the same model."""
    claim("outlier-suppression-plus", "eight-bits", error(OutlierSuppressionPlus(bits=8, steps=30)))
