"""RPTQ: the function before rounding, clusters side by side, grids by definition, and what clusters are worth."""

import copy
from functools import cache

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from refimpl.compression.anatomy import anatomy
from refimpl.compression.protocol import CompressedLinear
from refimpl.compression.quantization.clustered import ClusteredWeight, ClusterRounded, ClusterScaledWeight
from refimpl.compression.quantization.weight_activation.rptq import RPTQ, ordered
from refimpl.compression.ranges import channel_ranges
from tests.compression.conftest import decoder, gpt2, opt
from tests.compression.quantization.weight_activation.test_outlier_suppression_plus import losses, off, plant


def test_no_output_changes_before_rounding(build, tokens, logits):
    """Oracle: the logits before, in float64. The channels that a norm makes now stand in clusters, which were apart before."""
    model = plant(build().double())
    expected = logits(model, tokens)
    moved = copy.deepcopy(model)
    clusters = RPTQ(clusters=4).reorder_(moved, anatomy(moved).blocks, [tokens])
    assert_close(logits(moved, tokens), expected, rtol=1e-9, atol=1e-9)
    for part in anatomy(model).blocks:
        labels = clusters.read[part.up]
        assert (labels.diff() >= 0).all() and labels.max() == 3
        (_, before), (low, high) = (
            channel_ranges(m, [], [tokens], made=[part.feed_forward_norm])[part.feed_forward_norm]
            for m in (model, moved)
        )
        assert not torch.equal(before, high) and torch.equal(before.sort().values, high.sort().values)
        spread = lambda points: float((points - points.mean(0)).square().sum())  # noqa: E731
        points = torch.stack([low, high], dim=1)
        assert sum(spread(points[labels == label]) for label in range(4)) < 0.2 * spread(points)


@pytest.mark.parametrize("layer", ["q", "k"])
def test_queries_and_keys_share_clusters_that_both_make(layer, tokens):
    """Oracle: one channel of the queries, or of the keys, is far wider than all others: it is alone in its cluster, in both."""
    model = opt()
    part = anatomy(model).blocks[1]
    model.get_submodule(getattr(part, layer)).weight.data[11] *= 100  # of the second head
    found = RPTQ(head_clusters=2).reorder_(model, anatomy(model).blocks, [tokens])
    for name in (part.q, part.k):
        assert sorted(found.made[name][8:16].bincount().tolist())[-2:] == [1, 7]


def test_order_by_hand():
    """Oracle: by hand, two sets, each with its own clusters; the order inside of a cluster is kept."""
    points = torch.tensor([[[5.0], [0.0], [5.1], [0.1]], [[1.0], [1.1], [9.0], [9.1]]])
    index, labels = ordered(points, 2)
    assert index.tolist() == [[0, 2, 1, 3], [0, 1, 2, 3]] and labels.tolist() == [[0, 0, 1, 1]] * 2


@torch.no_grad()
def test_grids_are_those_of_what_layers_read_and_make(build, tokens, logits, architecture):
    """Oracle: hooks on the quantized model: extremes of a cluster's channels over the calibration data, 2^b - 1 steps between; what
    norms make has 8 bits, all else 3; weights have a grid for each row and cluster.
    """
    model = build()
    small = RPTQ(bits=5, activation_bits=3, clusters=4, head_clusters=2)(model, [tokens])
    part = anatomy(model).blocks[0]
    seen = {}
    for name in part.linear:
        layer = small.get_submodule(name)
        layer.register_forward_pre_hook(lambda _m, args, name=name: seen.update({name: args[0].flatten(0, -2)}))
    logits(small, tokens)
    for name in part.linear:
        layer = small.get_submodule(name)
        held, bits = layer.compressed, 3 if name in (part.o, part.down) else 8
        assert type(held) is ClusteredWeight and (held.grids.bits, held.stored.bits) == (bits, 5)
        assert held.stored.scale.shape == (len(held.grids.scale), held.stored.shape[0])
        assert torch.equal(held.stored.labels, held.grids.labels) and (held.grids.labels.diff() >= 0).all()
        for label in range(int(held.grids.labels.max()) + 1):
            own = seen[name][:, held.grids.labels == label]
            assert_close(held.grids.scale[label], (own.max() - own.min()) / (2**bits - 1), rtol=1e-4, atol=1e-7)
        assert isinstance(layer, ClusterRounded) == (name in (part.q, part.k, part.v))
        if isinstance(layer, ClusterRounded):
            made = CompressedLinear.forward(layer, seen[name])[:, -len(layer.outputs.labels) :]
            for label in range(int(layer.outputs.labels.max()) + 1):
                own = made[:, layer.outputs.labels == label]
                assert_close(layer.outputs.scale[label], (own.max() - own.min()) / 7, rtol=1e-3, atol=1e-6)
    made = small.get_submodule(part.v)(seen[part.v])[:, -8:]  # the last head of values: two clusters of eight levels
    assert len(made.unique()) <= 16
    heads = {"decoder": 2, "llama": 2, "opt": 4, "gpt2": 3 * 4}[architecture]
    assert small.get_submodule(part.v).outputs.labels.max() == 2 * heads - 1


@pytest.mark.parametrize("build", [decoder, gpt2])
def test_only_keys_and_values(build, tokens):
    """Oracle: the layers' kinds: inputs are not read on grids, and queries stay as they are."""
    model = build()
    small, part = RPTQ(kv_only=True, activation_bits=2)(model, [tokens]), anatomy(model).blocks[1]
    kinds = {name: type(small.get_submodule(name)) for name in part.linear}
    assert all(type(small.get_submodule(name).compressed) is ClusterScaledWeight for name in part.linear)
    assert kinds[part.v] is kinds[part.k] is ClusterRounded
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    made = small.get_submodule(part.q)(x)[:, :32]
    assert len(made.unique()) > 1000  # queries
    assert len(small.get_submodule(part.k)(x)[:, -8:].unique()) <= 16
    if part.q != part.v:
        assert kinds[part.q] is CompressedLinear


def test_bytes_by_formula(tokens):
    """Oracle: arithmetic: 4-bit codes, a float16 scale and half a byte of zero point for each of 40 rows and 4 clusters; two bytes for
    each of 32 labels, those of the weight and those of its inputs, and a float32 scale and zero point for each of 4 clusters.
    """
    held = RPTQ(clusters=4)(opt(), [tokens]).model.decoder.layers[0].fc1.compressed
    assert held.nbytes == 40 * 32 // 2 + 4 * 40 * 2 + 4 * 40 // 2 + 2 * 32 * 2 + 4 * 8


def test_half_precision_and_keyword_batches(build, tokens, logits, architecture):
    """Oracle: the float32 model, in the precision of bfloat16 and 8 bits."""
    key = "tokens" if architecture == "decoder" else "input_ids"
    small = RPTQ(bits=8, activation_bits=8)(build().bfloat16(), [{key: tokens}])
    assert logits(small, tokens).dtype == torch.bfloat16
    assert off(logits(small, tokens).float(), logits(build(), tokens)) < 0.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 9}, "bits=9 must be 1 to 8"),
        ({"activation_bits": 1}, "activation_bits=1 must be 2 to 8"),
        ({"clusters": 0}, "clusters=0 must be at least 1"),
        ({"head_clusters": 0}, "head_clusters=0 must be at least 1"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        RPTQ(**change)


def test_bad_calibration_and_models_are_refused(tokens):
    with pytest.raises(ValueError, match=r"RPTQ needs texts .*: pass `calibration`"):
        RPTQ()(decoder())
    with pytest.raises(ValueError, match="must be a list of batches"):
        RPTQ()(decoder(), tokens)
    model = decoder()
    nn.init.constant_(model.layers[0].feed_forward_norm.weight, float("inf"))
    with pytest.raises(ValueError, match=r"NaN or infinity in the outputs of layer 'layers\.0\.feed_forward_norm'"):
        RPTQ()(model, [tokens])
    with pytest.raises(ValueError, match="must be a linear layer that nothing has compressed"):
        RPTQ()(RPTQ(clusters=2)(opt(), [tokens]), [tokens])


@pytest.fixture(scope="module")
def error():
    """`error(**settings)` of the logits on random tokens, of an OPT whose channels have very different ranges, planted; each computed
    once.
    """
    texts = torch.randint(0, 61, (2, 16, 32), generator=torch.Generator().manual_seed(0))
    model = plant(opt())
    found = cache(lambda method: losses(model, method, [texts[0]], texts[1]))
    return lambda **settings: found(RPTQ(**settings))


def test_claim_clusters_beat_one(claim, error):
    """Error of the logits with clusters, over that with one fixed grid for all channels, 4 bits; planted ranges."""
    claim("rptq", "clusters-beat-one", error() / error(clusters=1, head_clusters=1))


def test_claim_keys_and_values(claim, error):
    """Error of the logits with 4-bit keys and values, over that with all activations in 4 bits; planted ranges, 4-bit weights."""
    claim("rptq", "kv-loses-less", error(kv_only=True) / error())


@pytest.mark.parametrize(("bits", "name"), [(8, "few-clusters"), (4, "few-clusters-at-four-bits")])
def test_claim_few_clusters(bits, name, claim, error):
    """Error of the logits, 4-bit activations, with 4 clusters for what norms and feed-forwards make, over that with a grid for each
    channel; with weights of 8 and of 4 bits.
    """
    claim("rptq", name, error(bits=bits, clusters=4) / error(bits=bits, clusters=40))
