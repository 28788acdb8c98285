"""SmoothQuant: Eq. (4) by hand, what smoothing leaves unchanged, and the grids of the three levels."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.compression.anatomy import anatomy, feeds, rescale_
from refimpl.compression.protocol import CompressedLinear
from refimpl.compression.quantization.activations import Activations, integer_weight
from refimpl.compression.quantization.weight_activation.smoothquant import (
    SCOPES,
    SmoothQuant,
    channel_maxima,
    smooth_,
    smoothing_scales,
)
from refimpl.model.linear import weight_of


def linear_names(model):
    return [name for block in anatomy(model).blocks for name in block.linear]


def norm_feeds(model):
    """Every feed of a norm, with the weights that read it."""
    for block in anatomy(model).blocks:
        for feed in feeds(model, block):
            if feed.producer in (block.attention_norm, block.feed_forward_norm):
                yield feed, [weight_of(model.get_submodule(name)) for name in feed.consumers]


def plant(model, factor=50.0, every=8):
    """Make every eighth channel of each norm's output `factor` times larger, and what reads it smaller; same function."""
    for feed, weights in norm_feeds(model):
        scale = torch.ones(weights[0].shape[1])
        scale[1::every] = 1 / factor
        rescale_(model, feed, scale)
    return model


def naive(model, batch, level):
    """W8A8 as at a level, without smoothing."""
    model = copy.deepcopy(model)
    for name, maxima in channel_maxima(model, linear_names(model), [batch]).items():
        layer = model.get_submodule(name)
        reach = (-maxima.max(), maxima.max()) if level == "O3" else None
        held = integer_weight(weight_of(layer), Activations(scope=SCOPES[level]), granularity="tensor", reach=reach)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, CompressedLinear(held, layer.bias))
    return model


def off(one, other):
    return float((one - other).norm() / other.norm())


def test_factors_by_hand():
    """Oracle: by hand. 16^0.75 / 4^0.25 = 8 / sqrt 2; 81^0.75 / 16^0.25 = 27 / 2."""
    found = smoothing_scales(torch.tensor([16.0, 81.0]), torch.tensor([4.0, 16.0]), 0.75)
    assert_close(found, torch.tensor([8 / 2**0.5, 13.5]))


def test_channels_without_input_or_weight_keep_their_scale():
    """Oracle: the definition as stated: s = 1, where Eq. (4) would give 0 or infinity."""
    largest, weights = torch.tensor([0.0, 3.0, 0.0]), torch.tensor([2.0, 0.0, 0.0])
    for alpha in (0.0, 0.5, 1.0):
        assert smoothing_scales(largest, weights, alpha).tolist() == [1, 1, 1]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothing_changes_no_output_and_balances_maxima(build, tokens, logits, alpha):
    """Oracle: Eq. (3), the model before; Eq. (4), by which a channel's maxima become 1 for the weights (alpha 0), 1 for the
    activations (1), and equal (0.5). Fed by norms only: other layers keep their weights.
    """
    model, plain = build(), build()
    largest = channel_maxima(model, linear_names(model), [tokens])
    told = smooth_(model, anatomy(model), largest, alpha)
    assert_close(logits(model, tokens), logits(plain, tokens), rtol=1e-4, atol=1e-4)  # logits of size 10, float32
    after = channel_maxima(model, linear_names(model), [tokens])
    fed = set()
    for (feed, weights), (_, before) in zip(norm_feeds(model), norm_feeds(plain), strict=True):
        fed |= {*feed.consumers}
        activations = after[feed.consumers[0]]
        columns = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
        expected = {0.0: (columns, 1.0), 0.5: (columns, activations), 1.0: (activations, 1.0)}[alpha]
        assert_close(expected[0], expected[1] * torch.ones_like(columns), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(weights[0], before[0], rtol=0.1)  # negative control
    for name, maxima in after.items():
        assert_close(told[name], maxima, rtol=1e-4, atol=1e-5)
        if name not in fed:
            assert torch.equal(weight_of(model.get_submodule(name)), weight_of(plain.get_submodule(name)))


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_weights_and_inputs_are_on_their_grids(build, tokens, level):
    """Oracle: absmax quantization of W diag(s), from Eq. (4) in float64, a scale for all of it; and of inputs, whose scale is a
    token's, the call's, or the calibration's.
    """
    model = build()
    small = SmoothQuant(level=level)(model, [tokens[:2], tokens[2:]])
    largest = channel_maxima(model, linear_names(model), [tokens])
    feed, weights = next(norm_feeds(model))
    w = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0).double()
    s = (largest[feed.consumers[0]].double() / w).sqrt()
    for name, weight in zip(feed.consumers, weights, strict=True):
        smooth = weight.double() * s
        step = smooth.abs().max() / 127
        held = small.get_submodule(name).compressed
        assert_close(held.dense().double(), (smooth / step).round() * step, rtol=1e-4, atol=1e-5)  # float32
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(1))
        ranges = {
            "O1": x.abs().amax(dim=1, keepdim=True),
            "O2": x.abs().max(),
            "O3": (largest[name].double() / s).max().float(),
        }
        expected = (x * 127 / ranges[level]).round().clamp(-127, 127) * ranges[level] / 127
        assert_close(held.read(x), expected, rtol=1e-4, atol=1e-5)  # as above
    replaced = [name for name, module in small.named_modules() if isinstance(module, CompressedLinear)]
    assert sorted(replaced) == sorted(linear_names(model))


def test_channel_weights_have_a_scale_each(tokens):
    """Oracle: RTN's definition, on the layer that no smoothing reaches."""
    from tests.compression.conftest import decoder

    model = decoder()
    held = SmoothQuant(granularity="channel")(model, [tokens]).layers[0].attention.o_proj.compressed
    weight = model.layers[0].attention.o_proj.weight.detach()
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert_close(held.dense(), (weight / step).round() * step)
    assert held.nbytes == weight.numel() + 4 * len(weight)


def test_a_model_is_nearly_unchanged_at_8_bits(build, tokens, logits):
    """Oracle: the model before; fewer bits are further away."""
    model = build()
    near, far = (off(logits(SmoothQuant(bits=b)(model, [tokens]), tokens), logits(model, tokens)) for b in (8, 4))
    assert 0 < near < 0.1 < far


def test_half_precision_and_keyword_batches(build, tokens, logits, architecture):
    """Oracle: the float32 result, in the precision of bfloat16 and 8 bits."""
    key = "tokens" if architecture == "decoder" else "input_ids"
    small = SmoothQuant()(build().bfloat16(), [{key: tokens}])
    assert logits(small, tokens).dtype == torch.bfloat16
    assert off(logits(small, tokens).float(), logits(SmoothQuant()(build(), [tokens]), tokens)) < 0.15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.5}, "alpha=1.5 must be 0 to 1; the paper uses 0.5"),
        ({"level": "O4"}, "level='O4' must be 'O1', 'O2' or 'O3'"),
        ({"granularity": "group"}, "granularity='group' must be 'tensor' or 'channel'"),
        ({"bits": 9}, "bits=9 must be 2 to 8"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        SmoothQuant(**change)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [((), "SmoothQuant needs texts .*: pass `calibration`"), (torch.ones(1, 2), "must be a list of batches")],
)
def test_bad_calibration_is_refused(calibration, message):
    from tests.compression.conftest import decoder

    with pytest.raises(ValueError, match=message):
        SmoothQuant()(decoder(), calibration)


def test_nan_and_unknown_models_are_refused(tokens):
    from tests.compression.conftest import decoder

    model = decoder()
    nn.init.constant_(model.layers[0].attention.o_proj.weight, float("nan"))
    with pytest.raises(
        ValueError, match=r"makes NaN or infinity in the inputs of layer 'layers\.0\.feed_forward\.gate_proj'"
    ):
        SmoothQuant()(model, [tokens])
    with pytest.raises(ValueError, match="no blocks"):
        SmoothQuant()(nn.Sequential(nn.Linear(2, 2)), [torch.ones(1, 2)])


@pytest.fixture
def planted(generator):
    """A decoder with activation outliers 50 times larger, planted without changing its function; two texts of random tokens."""
    from tests.compression.conftest import decoder

    texts = torch.randint(0, 61, (2, 16, 32), generator=generator)
    return plant(decoder()), texts[0], texts[1]


def test_claim_planted_outliers(claim, planted, logits):
    """Error of the logits, O3, over that of the same quantization without smoothing; outliers are planted."""
    model, calibration, text = planted
    exact = logits(model, text)
    smooth = off(logits(SmoothQuant(level="O3")(model, [calibration]), text), exact)
    claim("smoothquant", "planted-outliers", smooth / off(logits(naive(model, calibration, "O3"), text), exact))


def test_claim_static_suffices(claim, planted, logits):
    """Error of the logits at level O3 over that at level O1; outliers are planted."""
    model, calibration, text = planted
    errors = [off(logits(SmoothQuant(level=x)(model, [calibration]), text), logits(model, text)) for x in ("O3", "O1")]
    claim("smoothquant", "static-suffices", errors[0] / errors[1])


def test_claim_flattens(claim, planted):
    """Largest channel over the median channel of what norms feed, after smoothing over before; mean of all; planted."""
    model, calibration, _ = planted
    names = linear_names(model)
    before = channel_maxima(model, names, [calibration])
    after = smooth_(model, anatomy(model), before, 0.5)
    fed = [feed.consumers[0] for feed, _ in norm_feeds(model)]
    peaks = [[float(m[name].max() / m[name].median()) for name in fed] for m in (after, before)]
    claim("smoothquant", "flattens", sum(a / b for a, b in zip(*peaks, strict=True)) / len(fed))
