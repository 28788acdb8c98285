"""Decoding: the tokens that the whole forward would choose, and those of transformers."""

import pytest
import torch

from refimpl import testbed
from refimpl.model.cache import STEP, FullCache
from refimpl.model.config import Config
from refimpl.model.config_json import config_json
from refimpl.model.generate import generate, pad
from refimpl.model.load import _theirs as their_name
from refimpl.model.load import load
from refimpl.model.model import Decoder, initialize_
from tests.model.conftest import KINDS

CONFIG = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
WINDOWS = Config(**{**vars(CONFIG), "sliding_window": (None, 5)})
PROMPTS = [[5, 7, 33, 2, 60, 1, 1, 9, 30, 12], [8], [3, 41, 5]]


@pytest.fixture(params=[CONFIG, WINDOWS], ids=["full", "windows"])
def model(request, generator):
    return initialize_(Decoder(request.param), generator, std=0.3)


@torch.no_grad()
def without_cache(model, prompt, n):
    tokens = torch.tensor([prompt])
    for _ in range(n):
        tokens = torch.cat((tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return tokens[0, len(prompt) :].tolist()


def test_with_and_without_cache_alone_and_padded_whole_and_in_chunks(model):
    """Oracle: the likeliest token of the whole forward, one row at a time, no cache."""
    expected = [without_cache(model, prompt, 20) for prompt in PROMPTS]
    assert len({tuple(row) for row in expected}) == 3
    for prompt, row in zip(PROMPTS, expected, strict=True):
        assert generate(model, torch.tensor([prompt]), 20).tolist() == [row]
    tokens, padding = pad(PROMPTS)
    for chunk in (None, 1, 3, 10, 99):
        assert generate(model, tokens, 20, padding=padding, prefill_chunk=chunk).tolist() == expected
    assert generate(model, tokens, 20).tolist() != expected  # control: padding that is not told is read


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_equal_those_of_transformers(checkpoint, kind):
    """Peer: transformers 5.23.0, `generate` on the left-padded batch; and from below to beyond the 64 tokens of the context."""
    theirs, folder = checkpoint(kind)
    ours = load(folder)
    tokens, padding = pad(PROMPTS)
    mask = (torch.arange(tokens.shape[1]) >= padding[:, None]).long()
    assert generate(ours, tokens, 20, padding=padding).tolist() == by_transformers(theirs, tokens, 20, mask).tolist()
    long = torch.tensor([(PROMPTS[0] * 6)[:58]])
    assert generate(ours, long, 12).tolist() == by_transformers(theirs, long, 12).tolist()


def by_transformers(model, tokens, n, mask=None):
    mask = torch.ones_like(tokens) if mask is None else mask
    said = model.generate(
        tokens, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0
    )
    return said[:, tokens.shape[1] :]


def in_transformers(model):
    """Its model of the same kind with the same tensors: what is compared shares the weights' memory."""
    import transformers

    fields = config_json(model.config)
    architecture = fields.pop("architectures")[0]
    config = getattr(transformers, architecture.replace("ForCausalLM", "Config"))(**fields)
    with torch.device("meta"):
        theirs = getattr(transformers, architecture)(config)
    tensors = {their_name(name): tensor for name, tensor in model.state_dict().items()}
    if model.config.tied_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    theirs.load_state_dict(tensors, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(
        config
    )  # has no tensor in the state, and so is still on meta
    return theirs.eval()


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("size", ["testbed", "large"])
def test_decoding_beside_transformers(size, batch, peer, generator, request):
    """Peer: transformers, `generate`, both on the same weights. Held together in passing by a small model; measured with one of a
    hundred million parameters."""
    if size == "testbed":
        (model, _), new = testbed.load(), 32
    else:
        wide = 12 if request.config.getoption("--peers-to") else 1
        shape = {"d_model": 64 * wide, "n_layers": wide, "n_heads": wide, "d_ff": 192 * wide}
        config = Config(vocabulary=32_000, n_kv_heads=max(1, wide // 3), head_dim=64, tied_embeddings=True, **shape)
        model, new = initialize_(Decoder(config), generator).eval(), 16
    theirs = in_transformers(model)
    prompt = torch.randint(0, model.config.vocabulary, (batch, 64), generator=generator)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    peer(
        "refimpl.model",
        "transformers",
        f"greedy decoding: {new} tokens after 64, batch of {batch}, {millions:.0f} million parameters: the tokens",
        lambda: generate(model, prompt, new),
        lambda: by_transformers(theirs, prompt, new),
        within=0,
    )


def test_stop_ends_a_row_and_repeats_its_token(model):
    """Oracle: the rows without stop, cut by hand."""
    tokens, padding = pad(PROMPTS)
    whole = generate(model, tokens, 20, padding=padding)
    stop = {int(whole[0, 3]), int(whole[1, 6]), int(whole[2, 1])}
    ends = [next(i for i, token in enumerate(row) if token in stop) for row in whole.tolist()]
    stopped = generate(model, tokens, 20, padding=padding, stop=stop)
    assert stopped.shape == (3, max(ends) + 1)
    for row, end in enumerate(ends):
        assert torch.equal(stopped[row, : end + 1], whole[row, : end + 1])
        assert (stopped[row, end:] == whole[row, end]).all()


def test_a_cache_goes_on_where_it_ended(model):
    """Oracle: one call for all; the last token is not in the cache, and so begins the next call."""
    prompt, cache = torch.tensor(PROMPTS[:1]), FullCache(model.config.sliding_window)
    whole = generate(model, prompt, 12)
    first = generate(model, prompt, 5, cache=cache)
    assert cache.length == prompt.shape[1] + 4
    assert torch.equal(torch.cat((first, generate(model, first[:, -1:], 7, cache=cache)), dim=1), whole)


def test_room_is_made_once(model, monkeypatch):
    """Oracle: by hand: prompt and new tokens but the last, k and v, 2 heads of 8, 4 bytes, in each full layer."""
    made = []
    monkeypatch.setattr(
        "refimpl.model.generate.FullCache",
        lambda windows, reserve: made.append(FullCache(windows, reserve=reserve)) or made[-1],
    )
    generate(model, torch.tensor(PROMPTS[:1]), 20)
    windowed = 5 + STEP if 5 in model.config.sliding_window else 29
    assert made[0].nbytes == (29 + windowed) * 2 * 2 * 8 * 4


def test_the_prompt_is_compressed_once():
    class Counting(FullCache):
        calls = ()

        def compress_prefill(self):
            self.calls = (*self.calls, self.length)

    cache = Counting()
    model = initialize_(Decoder(CONFIG), torch.Generator().manual_seed(0))
    generate(model, torch.tensor(PROMPTS[:1]), 5, cache=cache, prefill_chunk=3)
    assert cache.calls == (10,)


def test_draws_follow_the_distribution(generator):
    """Oracle: softmax(logits / temperature): a chi-square over 4000 draws; the same seed draws the same."""
    model = initialize_(Decoder(CONFIG), generator, std=0.1)
    prompt = torch.tensor([[5, 7]]).expand(4000, 2)
    draws = generate(model, prompt, 1, temperature=0.7, generator=torch.Generator().manual_seed(1)).flatten()
    with torch.no_grad():
        expected = 4000 * (model(prompt[:1])[0, -1] / 0.7).softmax(-1)
    chi_square = ((draws.bincount(minlength=61) - expected).square() / expected).sum()
    assert 27 < chi_square < 107  # 60 degrees of freedom: p = 0.0001 either side
    again = generate(model, prompt, 1, temperature=0.7, generator=torch.Generator().manual_seed(1)).flatten()
    assert torch.equal(again, draws)
    greedy = generate(model, prompt[:1], 3)
    cold = generate(model, prompt[:1], 3, temperature=1e-6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(cold, greedy)


def test_no_gradient_is_kept(model):
    cache = FullCache()
    generate(model, torch.tensor(PROMPTS[:1]), 2, cache=cache)
    k, _, _ = cache.update(0, *[torch.zeros(1, 2, 1, 8)] * 3, torch.tensor([[11]]))
    assert not k.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": torch.tensor([5])}, "tokens of shape"),
        ({"tokens": torch.tensor([[5, 61]])}, "tokens range from 5 to 61, the vocabulary from 0 to 60"),
        ({"tokens": torch.tensor([[-1]])}, "tokens range from -1"),
        ({"n": 0}, "n=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": 0.5}, "pass a torch.Generator"),
        ({"padding": torch.tensor([-1])}, "padding="),
        ({"padding": torch.tensor([0, 0])}, "padding="),
        (
            {"padding": torch.tensor([1])},
            r"padding=\[1\] must be a count for each of 1 rows, below their 1 tokens: leave empty prompts out",
        ),
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
    ],
)
def test_arguments_are_checked(arguments, message):
    arguments = {"tokens": torch.tensor([[5]]), "n": 1} | arguments
    with pytest.raises(ValueError, match=message):
        generate(Decoder(CONFIG), arguments.pop("tokens"), arguments.pop("n"), **arguments)


def test_prompts_that_cannot_be_padded():
    for rows in ([], [[1], []]):
        with pytest.raises(ValueError, match="one is needed"):
            pad(rows)


def test_padding_of_a_continued_batch_may_be_more_than_what_is_new(model):
    """Oracle: the whole prompts at once; two tokens of padding stand in the cache, and one token is new."""
    tokens, padding = torch.tensor([[0, 0, 5, 7], [9, 1, 33, 2]]), torch.tensor([2, 0])
    cache = FullCache()
    with torch.no_grad():
        model.hidden(tokens[:, :-1], cache, padding)
    found = generate(model, tokens[:, -1:], 5, padding=padding, cache=cache)
    assert torch.equal(found, generate(model, tokens, 5, padding=padding))
