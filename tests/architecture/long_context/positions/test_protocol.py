"""What holds for every position encoding; the list of methods is the taxonomy's, and toys fill every place of the protocol."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass

import pytest
import torch
import yaml
from torch import nn
from torch.testing import assert_close

import refimpl.model.model
import refimpl.model.step
import taxonomy
from refimpl.architecture.long_context.positions.protocol import NoPositions, Positions, distances
from refimpl.model.cache import FullCache
from refimpl.model.config import Config
from refimpl.model.generate import generate
from refimpl.model.model import Decoder, initialize_
from refimpl.model.rope import Rotary, rotate

CONFIG = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40, max_positions=16)
TOKENS = torch.randint(0, 61, (3, 13), generator=torch.Generator().manual_seed(1))
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # logits of size 10 through two layers in float32, sums in another order


class Table(nn.Module):
    """Learned vectors."""

    def __init__(self, generator):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(64, 32, generator=generator))

    def forward(self, positions, dtype):
        return self.vectors[positions].to(dtype)


class Slope(nn.Module):
    """A learned penalty of a layer."""

    def __init__(self, generator):
        super().__init__()
        self.slope = nn.Parameter(torch.rand(4, 1, 1, generator=generator))

    def forward(self, queries, keys):
        return -self.slope * distances(queries, keys, 4)


class Turn(nn.Module):
    """Learned frequencies."""

    def __init__(self, generator):
        super().__init__()
        self.frequencies = nn.Parameter(torch.rand(4, generator=generator))

    def forward(self, positions, dtype):
        angles = positions.unsqueeze(-1) * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1).to(dtype)[:, None], torch.cat((-sin, sin), -1).to(dtype)[:, None]


@dataclass(frozen=True)
class Everywhere(Positions):
    """A toy with learned parameters in every place."""

    def embedding(self, config, generator=None):
        return Table(generator)

    def rotary(self, config, generator=None):
        return Turn(generator)

    def score_bias(self, config, generator=None):
        return [Slope(generator) for _ in range(config.n_layers)]


@dataclass(frozen=True)
class OneBias(Positions):
    """A toy with one learned bias for all layers."""

    relative = True

    def score_bias(self, config, generator=None):
        return Slope(generator)


FOUND: dict[str, Callable[[], Positions]] = {
    method.id: method.load()
    for method in taxonomy.load().find(category="architecture/long_context/positions", implemented=True)
}
METHODS = FOUND | {"none": NoPositions, "toy-everywhere": Everywhere, "toy-one-bias": OneBias}


@pytest.fixture(params=sorted(METHODS))
def method(request):
    """A method at its default settings."""
    return METHODS[request.param]()


def plain(config=CONFIG, dtype=torch.float32):
    return initialize_(Decoder(config), torch.Generator().manual_seed(0), std=0.3).to(dtype).eval()


def installed(method, config=CONFIG, dtype=torch.float32):
    return method.install(plain(config, dtype), torch.Generator().manual_seed(2)).eval()


def test_methods_are_found():
    assert {"rope", "alibi"} <= FOUND.keys()


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[1] * 13, [5, 8], [6, 1, 6]])
def test_pieces_equal_the_whole(method, cuts):
    """Oracle: the whole prompt at once, without a cache."""
    model, cache = installed(method), FullCache()
    parts = [model(piece, cache) for piece in TOKENS.split(cuts, dim=1)]
    assert_close(torch.cat(parts, dim=1), model(TOKENS), **CLOSE)


@torch.no_grad()
def test_a_padded_row_equals_the_row_alone(method):
    """Oracle: the rows one by one; whole, and in chunks with a cache."""
    model, gaps, cache = installed(method), (0, 2, 7), FullCache()
    padded = model(TOKENS, padding=torch.tensor(gaps))
    pieces = [model(piece, cache, torch.tensor(gaps)) for piece in TOKENS.split([4, 8, 1], dim=1)]
    for out in (padded, torch.cat(pieces, dim=1)):
        for row, gap in enumerate(gaps):
            assert_close(out[row, gap:], model(TOKENS[row : row + 1, gap:])[0], **CLOSE)


def test_generation_reads_what_it_wrote(method):
    """Oracle: greedy decoding that reads the whole text again for each token."""
    model = installed(method)
    new, text = generate(model, TOKENS, 5, prefill_chunk=4), TOKENS
    with torch.no_grad():
        for _ in range(5):
            text = torch.cat((text, model(text)[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(new, text[:, 13:])


@torch.no_grad()
def test_the_order_of_tokens_matters(method):
    """Oracle: one layer without positions cannot tell the order of what came before its last token; with them it can."""
    config = Config(**{**vars(CONFIG), "n_layers": 1, "sliding_window": ()})
    swapped = torch.cat((TOKENS[:, :-1].flip(1), TOKENS[:, -1:]), dim=1)
    model = installed(method, config)
    apart = (model(TOKENS) - model(swapped))[:, -1].abs().max()
    assert apart < 1e-4 if isinstance(method, NoPositions) else apart > 0.1


@torch.no_grad()
def test_moving_all_positions(method, monkeypatch):
    """Oracle: `relative`. All positions of text move by 40, those of padding stay padding."""
    model = installed(method)
    before, real = model(TOKENS), refimpl.model.step.positions_of
    for module in (refimpl.model.model, refimpl.model.step):
        monkeypatch.setattr(module, "positions_of", lambda *inputs: real(*inputs) + 40)
    if method.relative:
        assert_close(model(TOKENS), before, **CLOSE)
    else:
        assert (model(TOKENS) - before).abs().max() > 0.1


@torch.no_grad()
def test_what_was_installed_before_is_gone(method):
    """Oracle: the method on a model that had nothing before; also the other way, by the baseline of this family."""
    expected = installed(method)(TOKENS)
    for before in (Everywhere(), OneBias()):
        assert_close(method.install(installed(before), torch.Generator().manual_seed(2))(TOKENS), expected)
    again = NoPositions().install(installed(method))
    assert torch.equal(again(TOKENS), installed(NoPositions())(TOKENS))
    assert {name for name, _ in again.named_parameters()} == {name for name, _ in plain().named_parameters()}


@torch.no_grad()
def test_a_copy_stands_for_itself(method):
    """Oracle: the model before its copy got other positions, and other weights."""
    model = installed(method)
    expected, other = model(TOKENS), copy.deepcopy(model)
    assert torch.equal(other(TOKENS), expected)
    for parameter in other.parameters():
        parameter.mul_(1.5)
    assert not torch.allclose(other(TOKENS), expected)
    NoPositions().install(other)
    assert torch.equal(model(TOKENS), expected)


def test_gradients_reach_every_parameter(method):
    model = installed(method)
    model(TOKENS).logsumexp(dim=-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_weights_are_not_written_and_learned_ones_are_saved(method):
    """Oracle: the state before; a second model that reads the state of the first."""
    model, before = installed(method), plain().state_dict()
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    other = method.install(plain(), torch.Generator().manual_seed(3))
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(other(TOKENS), model(TOKENS))


@torch.no_grad()
def test_the_same_generator_gives_the_same_model(method):
    """Oracle: a second run; PyTorch's global generator must not matter."""
    first = installed(method)(TOKENS)
    torch.seed()
    assert torch.equal(installed(method)(TOKENS), first)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(method, dtype):
    """Oracle: float32, to the rounding of the smaller dtype through two layers; the model's dtype comes out."""
    out, exact = installed(method, dtype=dtype)(TOKENS), installed(method)(TOKENS)
    assert out.dtype == dtype
    share = {torch.float64: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]  # of the logits' norm
    assert (out.double() - exact).norm() < share * exact.norm()


@torch.no_grad()
def test_a_token_and_a_long_text(method):
    """Oracle: causality; the first tokens' logits do not depend on what follows, however long, in a batch of one."""
    model, text = installed(method), torch.arange(60)[None]
    assert_close(model(text[:, :1]), model(text)[:, :1], **CLOSE)
    assert torch.isfinite(model(text)).all()


def test_configuration_survives_yaml(method):
    assert type(method)(**yaml.safe_load(yaml.safe_dump(asdict(method)))) == method


# The protocol's own parts


@torch.no_grad()
def test_a_decoder_of_its_own_is_rotary():
    """Oracle: `NoPositions` is another function than the decoder's own rotation, so that installing it did something."""
    model = plain()
    assert isinstance(model.rotary, Rotary)
    assert (model(TOKENS) - NoPositions().install(plain())(TOKENS)).abs().max() > 0.1


@torch.no_grad()
def test_each_place_by_hand():
    """Oracle: by hand. Embeddings that are handed over with the vectors added; a bias of each layer as a mask of its own."""
    model = installed(Everywhere())
    table = model.layers[0].position_embedding.vectors
    x = model.embedding(TOKENS)
    expected, i = model(TOKENS), torch.arange(13)
    by_hand = NoPositions().install(copy.deepcopy(model))
    by_hand.rotary = copy.deepcopy(model.rotary)
    for layer, own in zip(by_hand.layers, model.layers, strict=True):
        bias = (-own.attention.own_score_bias.slope * (i[:, None] - i)).masked_fill(i > i[:, None], float("-inf"))
        plain_attend = layer.attention.attend
        layer.attention.attend = lambda q, k, v, causal, bias=bias, f=plain_attend: f(q, k, v, mask=bias[None])
    assert_close(by_hand(x + table[:13]), expected, **CLOSE)
    slopes = [layer.attention.own_score_bias.slope for layer in model.layers]
    assert not torch.equal(*slopes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_rotation_is_the_identity(dtype, generator):
    """Oracle: the vectors themselves, bit by bit."""
    cos, sin = NoPositions().install(plain()).rotary(torch.tensor([[0, 5, 5000]]), dtype)
    x = torch.randn(2, 4, 3, 8, generator=generator).to(dtype)
    assert cos.dtype == sin.dtype == dtype and torch.equal(rotate(x, cos, sin), x)


def test_distances_of_grouped_heads():
    """Oracle: by hand; query heads 0 and 1 read key head 0, whose keys stand at 0 and 3, heads 2 and 3 the other's."""
    apart = distances(torch.tensor([4, 5]).view(1, 1, 2, 1), torch.tensor([[0, 3], [2, 5]]).view(1, 2, 1, 2), 4)
    assert apart[0, :, 1].tolist() == [[5, 2], [5, 2], [3, 0], [3, 0]]


def test_a_bias_for_another_number_of_layers_is_refused():
    """Oracle: the model, which is as it was."""

    class Odd(Positions):
        def score_bias(self, config, generator=None):
            return [Slope(generator)] * 3

    model = plain()
    with pytest.raises(ValueError, match="3 score biases must be one, or one for each of 2 layers"):
        Odd().install(model)
    assert torch.equal(model(TOKENS), plain()(TOKENS))


def test_modules_follow_training_mode():
    """Oracle: PyTorch's flag; a method that acts in training only relies on it."""
    model = installed(Everywhere())
    assert not model.rotary.training and model.train().rotary.training


def test_defaults_of_a_method():
    assert (Positions.extends, Positions.relative, NoPositions().tuning_length(64)) == (False, False, None)
