"""SliceGPT: the whole algorithm by hand, streams that lose nothing, counts, and models that still decode."""

import pytest
import torch
from torch.testing import assert_close

from refimpl.compression.anatomy import anatomy
from refimpl.compression.protocol import compress
from refimpl.compression.pruning.structured import slicegpt
from refimpl.compression.pruning.structured.slicegpt import SliceGPT, principal_components
from refimpl.compression.quantization.rotation import haar
from refimpl.compression.quantization.weight_only.rtn import RTN
from refimpl.compression.rotation import fold_norms_, stream_writers, write_in_
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_
from refimpl.model.step import Step, positions_of
from refimpl.model.train import perplexity, train, windows
from tests.compression.conftest import decoder

NORMS = 1e-5  # transformers' RMSNorm computes in float32, whatever the model's dtype


@torch.no_grad()
def by_hand(model, tokens, width, normalize=True):
    """Logits in float64: the stream is projected on its first components at each place, found by a singular value decomposition."""
    model = model.double()
    fold_norms_(model)
    x = model.embedding(tokens)
    positions = positions_of(0, tokens.shape[1], None, x.device)
    step = Step(0, positions, *model.rotary(positions, x.dtype), None, None, None)

    def projected(x):
        rows = x.flatten(0, 1)
        signal = rows / (rows.square().mean(1, keepdim=True) + 1e-6).sqrt() if normalize else rows
        kept = torch.linalg.svd(signal).Vh[:width]
        return x @ kept.T @ kept

    for block in model.layers:
        for norm, part in ((block.attention_norm, "attention"), (block.feed_forward_norm, "feed_forward")):
            x = projected(x)
            inputs = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()  # the mean is over the whole width
            x = x + (block.attention(inputs, step) if part == "attention" else block.feed_forward(inputs))
    return model.logits(model.norm(x))


@pytest.mark.parametrize(("normalize", "sparsity", "width"), [(True, 0.25, 24), (True, 0.5, 16), (False, 0.25, 24)])
def test_the_whole_by_hand(tokens, logits, normalize, sparsity, width):
    """Oracle: Sections 3.3 and 3.4 by another route: nothing is sliced or turned, the stream is projected, Q comes from an SVD."""
    small = SliceGPT(sparsity=sparsity, normalize=normalize)(decoder().double(), [tokens[:2], tokens[2:]])
    expected = by_hand(decoder(), tokens, width, normalize)
    assert_close(logits(small, tokens), expected)
    assert not torch.allclose(expected, by_hand(decoder(), tokens, width, not normalize), rtol=1e-2)  # control
    assert not torch.allclose(expected, logits(decoder().double(), tokens), rtol=1e-2)


def test_turned_but_not_cut_computes_the_same(build, tokens, logits):
    """Oracle: Theorem 1 and Section 3.3. At a sparsity that removes no channel, each place has its own Q, and no logit moves."""
    model = build().double()
    turned = SliceGPT(sparsity=1e-17)(model, [tokens])
    assert_close(logits(turned, tokens), logits(model, tokens), rtol=NORMS, atol=NORMS)
    blocks = [block for block in turned.modules() if isinstance(block, slicegpt.SlicedBlock)]
    for block in blocks[:-1]:
        for shortcut in (block.attention_shortcut, block.feed_forward_shortcut):
            assert_close(shortcut @ shortcut.T, torch.eye(32, dtype=torch.float64))
            assert (shortcut - torch.eye(32)).abs().max() > 0.1  # the bases differ


def test_a_stream_with_dead_directions_loses_nothing(build, tokens, logits, generator):
    """Oracle: closed form. If all that is written lies in 24 dimensions, they are found and the other 8 go for nothing."""
    model = build().double()
    kept = haar(32, generator)[:, :24]
    for name in stream_writers(anatomy(model)):
        write_in_(model.get_submodule(name), kept @ kept.T)
    assert_close(logits(SliceGPT(sparsity=0.25)(model, [tokens]), tokens), logits(model, tokens), rtol=1e-5, atol=1e-5)
    cut = SliceGPT(sparsity=0.5)(model, [tokens])  # control
    assert not torch.allclose(logits(cut, tokens), logits(model, tokens), rtol=1e-2, atol=1e-2)


def n_parameters(config, width):
    """By hand: all that reads or writes the stream has `width` of its channels, but for the last block's output and the head."""
    full, heads = config.d_model, (2 * config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    shortcuts = (2 * width * width) * config.n_layers - width * width + width * full
    linear = (heads + 3 * config.d_ff) * width * config.n_layers + config.d_ff * (full - width)
    norms = 2 * width * config.n_layers + full
    return config.vocabulary * (width + full) + linear + shortcuts + norms


def test_parameters_are_gone(tokens):
    """Oracle: counting by hand; matrices are smaller, none is masked."""
    model = decoder()
    small = SliceGPT(sparsity=0.25)(model, [tokens])
    assert sum(p.numel() for p in small.parameters()) == n_parameters(model.config, 24)
    assert not any((p == 0).all(dim=-1).any() for p in small.parameters() if p.ndim == 2)
    block = small.layers[1]
    shapes = [tuple(p.shape) for p in (block.attention.k_proj.weight, block.feed_forward.down_proj.weight)]
    assert shapes == [(16, 24), (24, 40)]
    assert block.attention.k_proj.in_features == 24 and block.feed_forward.down_proj.out_features == 24


def test_all_layouts_shrink(build, tokens):
    """Oracle: 24 of 32 channels in every layer of every block, whatever its layout; the last block writes all 32."""
    small = SliceGPT(sparsity=0.25)(build(), [tokens])
    parts = anatomy(small)
    for i, block in enumerate(parts.blocks):
        for name, expected in ((block.q, 24), (block.o, 24), (block.up, 24), (block.down, 24 if i < 3 else 32)):
            assert expected in small.get_submodule(name).weight.shape, name


def test_long_vectors_count_for_no_more():
    """Oracle: by hand. Two tokens along one axis, one of length 10 along another: the first wins by number, the other by length."""
    stream = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 10.0]])
    unit = stream / stream.norm(dim=1, keepdim=True)
    assert principal_components(unit)[:, 0].abs().tolist() == [1.0, 0.0]
    assert principal_components(stream)[:, 0].abs().tolist() == [0.0, 1.0]


def test_components_are_orthonormal_and_ordered(generator):
    """Oracle: the definition of an eigendecomposition; float32 signals are decomposed in float64."""
    signal = torch.randn(50, 7, generator=generator) @ torch.diag(torch.arange(1.0, 8.0))
    q = principal_components(signal)
    assert q.dtype == torch.float64
    assert_close(q.T @ q, torch.eye(7, dtype=torch.float64))
    variance = (signal.double() @ q).square().sum(0)
    assert (variance.diff() < 0).all()
    assert_close((signal.double() @ q).T @ (signal.double() @ q), torch.diag(variance), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("sparsity", "width", "left"),
    [
        (0.25, 4096, 3072),
        (0.3, 8192, 5728),
        (0.25, 768, 576),
        (0.3, 768, 536),
        (0.9, 32, 3),
        (0.999, 32, 1),
        (0.5, 5, 2),
    ],
)
def test_width_by_hand(sparsity, width, left):
    """Oracle: the official code's arithmetic, and at least one channel: 0.7 * 8192 = 5734.4, the multiple of 8 below is 5728."""
    assert SliceGPT(sparsity=sparsity).width(width) == left


def test_then_quantized(build, tokens, logits):
    """Oracle: the sliced model; what is left are ordinary linear layers."""
    small = SliceGPT(sparsity=0.25)(build(), [tokens])
    both = compress(small, RTN(bits=8, group_size=8))
    off = (logits(both, tokens) - logits(small, tokens)).norm() / logits(small, tokens).norm()
    assert 0 < off < 0.1


def test_half_precision_and_keyword_batches(build, architecture, tokens, logits):
    """Oracle: the float32 result, to bfloat16's rounding through four blocks."""
    name = "tokens" if architecture == "decoder" else "input_ids"
    small = SliceGPT(sparsity=0.25)(build().bfloat16(), [{name: tokens}])
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert torch.isfinite(logits(small, tokens)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity=1\.0 must be 0 \(nothing is sliced\) to below 1"),
        ({"sparsity": -0.1}, r"sparsity=-0\.1"),
        ({"round_to": 0}, "round_to=0 must be at least 1"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        SliceGPT(**change)


def test_what_can_not_be_sliced_is_refused(tokens):
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(ValueError, match="needs texts"):
        SliceGPT()(decoder())
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4, add_cross_attention=True)
    with pytest.raises(ValueError, match="attends to an encoder too"):
        SliceGPT()(GPT2LMHeadModel(config), [tokens])


def test_the_count_is_the_papers_for_phi_2():
    """Oracle: Section 4.1: Phi-2 sliced by 25 % has 2.2B; attention and feed-forward stand side by side there, with one shortcut."""
    full, inside, layers, width = 2560, 10240, 32, SliceGPT(sparsity=0.25).width(2560)
    linear = (4 * full + 2 * inside) * width * layers + (full + inside) * (
        full - width
    )  # the last block writes all channels
    shortcuts = width * width * (layers - 1) + width * full
    assert round((51200 * (width + full) + linear + shortcuts) / 1e9, 1) == 2.2


def test_claim_llama_70b_parameters(claim):
    """Parameters of LLaMA-2 70B's shape at a slice of 30 %, by the count that `test_parameters_are_gone` holds."""
    shape = {"vocabulary": 32000, "d_model": 8192, "n_heads": 64, "n_kv_heads": 8, "head_dim": 128, "d_ff": 28672}
    config = Config(n_layers=80, **shape)
    claim("slicegpt", "llama-70b-parameters", n_parameters(config, SliceGPT(sparsity=0.3).width(8192)) / 1e9)


def test_claim_components_beat_columns(claim, monkeypatch):
    """Log-perplexity lost to a slice of a quarter, over that lost without the columns of least norm; a model trained for seconds."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(16, 16, 16, generator=generator).argmax(-1).tolist()
    noise = torch.randint(0, 20, (3000,), generator=generator).tolist()
    text = [0, 0]
    for drawn in noise:
        text.append(drawn if drawn < 4 else table[text[-2]][text[-1]])
    tokens = torch.tensor(text)
    shape = {"vocabulary": 16, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 64}
    model = initialize_(Decoder(Config(n_layers=2, **shape)), generator, std=0.1)
    train(model, torch.optim.AdamW(model.parameters(), lr=5e-3), windows(tokens, 8, 32, generator), steps=120)
    before, lost = perplexity(model.eval(), tokens, 32), []
    for components in (
        principal_components,
        lambda x: torch.eye(32).double()[:, x.norm(dim=0).argsort(descending=True)],
    ):
        monkeypatch.setattr(slicegpt, "principal_components", components)
        small = SliceGPT(sparsity=0.25)(model, [tokens[:1024].view(-1, 32)])
        lost.append(float(torch.tensor(perplexity(small, tokens, 32) / before).log()))
    assert before < 8 and lost[1] > 0
    claim("slicegpt", "components-beat-columns", lost[0] / lost[1])
