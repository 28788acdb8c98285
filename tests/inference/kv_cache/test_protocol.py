"""What holds for every method of the family, its shared arithmetic, and the list of methods, which is the taxonomy's."""

import dataclasses
import gc
import types

import pytest
import torch
import yaml
from torch.testing import assert_close

import taxonomy
from refimpl.inference.kv_cache.protocol import Turn, gather_tokens, tokens_to_keep
from refimpl.model.cache import FullCache
from refimpl.model.config import Rope
from refimpl.model.rope import Rotary, rotate
from tests.inference.kv_cache.decoders import decoder, draw, feed, run, shape

METHODS = taxonomy.load().find(category="inference/kv_cache", implemented=True)
TOKENS = torch.randint(0, 61, (3, 120), generator=torch.Generator().manual_seed(1))
WHILE_READING = {"infllm"}  # compresses what it is given at once, too
AFTER_READING = {"snapkv", "pyramidkv"}  # keeps all until the prompt is over, in chunks, too
HOLDS_ALL = {"quest", "infllm"}  # the budget is of what is read
BY_CALL = {"gear"}  # what a call brings is compressed as one block
OVER_HEADS = {"gear", "kvquant"}  # a token's values of all heads are one vector
SMALL = {"budget": 12, "residual_length": 32, "dense_layers": 0, "recovery": 0.3}
LARGE = {"budget": 512, "residual_length": 512, "dense_layers": 0}


@pytest.fixture(params=METHODS, ids=lambda method: method.id)
def entry(request):
    """A method as the taxonomy knows it."""
    return request.param


def made(entry, sizes=SMALL):
    """The method with its defaults, but for how much it holds as it came, and whether it does what it does in so small a decoder."""
    kind = entry.load()
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in sizes.items() if name in names})


def compressing(entry, model, tokens, sizes):
    """Logits with a small budget, the first chunk the prompt; that they are not those of the full cache is what a test of it needs."""
    cache = made(entry).cache(model.config)
    prompt = model(tokens[:, : sizes[0]], cache)
    cache.compress_prefill()
    found = torch.cat([prompt, run(model, tokens[:, sizes[0] :], cache, sizes[1:])], dim=1)
    assert not torch.allclose(found, run(model, tokens, FullCache(), sizes), rtol=0.01, atol=0.01)
    return found


def test_there_are_methods():
    assert METHODS


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("sizes", [[90] + [1] * 30, [30, 1, 1, 60, 28]])
def test_with_room_for_all_it_is_the_full_cache(entry, kv_heads, sizes):
    """Oracle: the model without a cache."""
    method = made(entry, LARGE)
    if method == made(entry, {}):
        pytest.skip("has neither budget nor residual")
    model = decoder(n_kv_heads=kv_heads)
    assert_close(run(model, TOKENS, method.cache(model.config), sizes), model(TOKENS))


@pytest.mark.parametrize("gaps", [(0, 0, 0), (0, 33, 95)])
def test_sliding_window_layers(entry, gaps):
    """Oracle: the model without a cache, whose first layer sees 8 tokens; the method has room for all."""
    method = made(entry, LARGE)
    if method == made(entry, {}):
        pytest.skip("has neither budget nor residual")
    model, padding = decoder(sliding_window=(8, None)), torch.tensor(gaps)
    expected = model(TOKENS, padding=padding)
    found = run(model, TOKENS, method.cache(model.config), [50, 40] + [1] * 30, padding)
    for row, gap in enumerate(gaps):
        assert_close(found[row, gap:], expected[row, gap:])
    assert (expected - decoder()(TOKENS, padding=padding)).abs().max() > 0.1  # negative control


@pytest.mark.parametrize("length", [1, 3])
def test_a_short_text_is_kept(entry, length):
    """Oracle: the model without a cache; a prompt below every budget, and three tokens more."""
    if made(entry, LARGE) == made(entry, {}):
        pytest.skip("has neither budget nor residual")
    model = decoder()
    cache = made(entry).cache(model.config)
    prompt = model(TOKENS[:, :length], cache)
    cache.compress_prefill()
    found = torch.cat([prompt, run(model, TOKENS[:, length : length + 3], cache, 1)], dim=1)
    assert_close(found, model(TOKENS[:, : length + 3]))


def test_the_first_answer_comes_from_the_whole_prompt(entry):
    """Oracle: the model without a cache: a prompt that is read at once is attended to whole, so that a first token flatters whatever is
    given up after it; the second token shows it."""
    if entry.id in WHILE_READING:
        pytest.skip("compresses while it reads, also what it is given at once")
    model = decoder()
    cache = made(entry).cache(model.config)
    exact = model(TOKENS)
    assert_close(model(TOKENS[:, :-1], cache), exact[:, :-1])
    cache.compress_prefill()
    assert (model(TOKENS[:, -1:], cache) - exact[:, -1:]).abs().max() > 0.01


def test_a_prompt_compressed_as_it_is_read_holds_as_much_and_gives_up_more(entry):
    """Oracle: the same prompt read at once: the same budget is kept of it in chunks, and its last logits are exact only at once."""
    if "budget" not in {field.name for field in dataclasses.fields(entry.load())} or entry.id in HOLDS_ALL:
        pytest.skip("has no budget of its own")
    model, errors, held = decoder(), [], []
    exact = model(TOKENS)[:, -1]
    for sizes in (120, 20):
        cache = made(entry).cache(model.config)
        errors.append((run(model, TOKENS, cache, sizes)[:, -1] - exact).abs().max())
        cache.compress_prefill()
        model(TOKENS[:, :1], cache)
        held.append(cache.nbytes)
    assert held[0] == pytest.approx(held[1], rel=0.1)
    assert (errors[0] < 1e-9) == (entry.id not in WHILE_READING)
    assert (errors[1] > 0.01) == (entry.id not in AFTER_READING)


@pytest.mark.parametrize("sizes", [[1] * 100, [7] * 14 + [2], [64, 36]])
def test_chunks_leave_what_the_whole_leaves(entry, sizes, generator):
    """Oracle: the same keys handed over at once."""
    if entry.facets.attention_scores:
        pytest.skip("facet attention_scores: what is kept depends on what the chunks before kept")
    if entry.id in BY_CALL:
        pytest.skip("what a call brings is compressed as one block")
    config = shape()
    k, v = draw(generator, config, 101, rows=2)
    method, found = made(entry), []
    for cut in (sizes, [100]):
        cache = method.cache(config)
        for _ in feed(cache, config, k, v, cut):
            pass
        cache.compress_prefill()
        (last,) = feed(cache, config, k[:, :, 100:], v[:, :, 100:], [1])
        found.append(last)
    assert found[0][2] is found[1][2] is None or torch.equal(found[0][2], found[1][2])
    assert_close(found[0][0], found[1][0], rtol=1.3e-6, atol=2e-5)  # angles of up to 100 in float32
    assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("sizes", [[60], [20, 20, 20], [50, 7, 3]])
def test_a_padded_batch_equals_its_rows(entry, sizes):
    """Oracle: each row alone, in chunks cut at the same tokens; one chunk is all padding of a row."""
    model, method = decoder(), made(entry)
    padding = torch.tensor([0, 33, 33, 57])
    tokens = torch.cat([TOKENS, TOKENS[:1].flip(1)])
    cache = method.cache(model.config)
    batch = run(model, tokens[:, :60], cache, sizes, padding)
    cache.compress_prefill()
    batch = torch.cat([batch, run(model, tokens[:, 60:], cache, 1, padding)], dim=1)
    assert batch.isfinite().all()
    ends = torch.tensor(sizes).cumsum(0)
    for row, gap in enumerate(padding.tolist()):
        own = [
            end - max(start, gap)
            for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)
            if end > gap
        ]
        alone = method.cache(model.config)
        expected = run(model, tokens[row : row + 1, gap:60], alone, own)
        alone.compress_prefill()
        expected = torch.cat([expected, run(model, tokens[row : row + 1, 60:], alone, 1)], dim=1)
        assert_close(batch[row : row + 1, gap:], expected, rtol=1e-4, atol=1e-4)  # angles up to 120 in float32
    compressing(entry, model, tokens[:1], [60] + [1] * 60)


@pytest.mark.parametrize("poison", [1e4, float("nan")])
def test_padding_enters_nothing(entry, poison, generator):
    """Oracle: each row alone; what stands at padding is large, or no number at all, and one row's numbers are large."""
    config = shape()
    x = torch.randn(2, 2, 101, 32, generator=generator) * torch.tensor([1.0, 30.0]).view(2, 1, 1, 1)
    x[1, :, :37] = poison
    cache, alone = (made(entry).cache(config) for _ in range(2))
    for part in (slice(0, 100), slice(100, 101)):
        at = torch.arange(101)[None, part] - torch.tensor([[0], [37]])
        mine = x[:, :, part]
        k, v, _ = cache.update(0, mine, mine, mine.repeat_interleave(2, dim=1), at)
        own = mine[1:, :, 37:] if part.start == 0 else mine[1:]
        expected = alone.update(0, own, own, own.repeat_interleave(2, dim=1), at[1:, -own.shape[2] :])
        kept = expected[0].shape[2]
        assert torch.equal(k[1:, :, -kept:], expected[0]) and torch.equal(v[1:, :, -kept:], expected[1])
        assert k.isfinite().all() or part.start == 0  # a prompt's own padding comes back as it is


def test_grouped_heads_read_their_key_head(entry):
    """Oracle: the same decoder with every key head written out for each of its query heads."""
    if entry.facets.attention_scores:
        pytest.skip("facet attention_scores: heads that share keys choose together")
    if entry.id in OVER_HEADS:
        pytest.skip("a token's values of all heads are one vector, which is another one when heads are written out")
    grouped, written = decoder(n_kv_heads=2), decoder(n_kv_heads=4)
    state = grouped.state_dict()
    for name in [name for name in state if "k_proj" in name or "v_proj" in name]:
        state[name] = state[name].unflatten(0, (2, 32)).repeat_interleave(2, dim=0).flatten(0, 1)
    written.load_state_dict(state)
    sizes = [70] + [1] * 50
    assert_close(compressing(entry, grouped, TOKENS, sizes), compressing(entry, written, TOKENS, sizes))


def test_reset_forgets(entry):
    """Oracle: a new cache. Negative control: without reset the next prompt sees the last."""
    model = decoder()
    cache, fresh = made(entry).cache(model.config), made(entry).cache(model.config)
    run(model, TOKENS, cache, [90] + [1] * 30)
    second = TOKENS.flip(1)
    expected = run(model, second, fresh, [50] + [1] * 70)
    assert not torch.allclose(model(second[:, :50], cache), expected[:, :50])
    cache.reset()
    assert (cache.length, cache.nbytes) == (0, 0)
    assert torch.equal(run(model, second, cache, [50] + [1] * 70), expected)
    cache.reset()
    model(TOKENS[:1, :5], cache)  # another batch


def test_caches_of_one_method_do_not_meet(entry):
    """Oracle: each alone; the configuration is frozen and survives YAML. Twice the same gives the same."""
    model, method = decoder(), made(entry)
    alone = [run(model, tokens, method.cache(model.config), 40) for tokens in (TOKENS, TOKENS.flip(1))]
    caches = [method.cache(model.config) for _ in range(2)]
    for start in range(0, 120, 40):
        for cache, tokens, expected in zip(caches, (TOKENS, TOKENS.flip(1)), alone, strict=True):
            found = model(tokens[:, start : start + 40], cache)
            assert torch.equal(found, expected[:, start : start + 40])
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(method, dataclasses.fields(method)[0].name, 1)
    assert type(method)(**yaml.safe_load(yaml.safe_dump(dataclasses.asdict(method)))) == method


def reachable(thing):
    """Every tensor that can be reached from an object, found by the garbage collector; of functions, what they close over."""
    seen, todo, found = set(), [thing], []
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, type | types.ModuleType):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            found.append(one)
        elif isinstance(one, types.FunctionType):
            todo += [one.__closure__, one.__defaults__]
        else:
            todo += gc.get_referents(one)
    return found


@pytest.mark.parametrize("padding", [None, [0, 20, 47]])
def test_bytes_claimed_are_bytes_held(entry, padding):
    """Oracle: the storages of all tensors that the garbage collector reaches from the cache."""
    model = decoder(torch.bfloat16)
    cache = made(entry).cache(model.config)
    for chunk in TOKENS.split([50, 1, 1, 40, 1, 1, 1, 25], dim=1):
        model(chunk, cache, padding and torch.tensor(padding))
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in reachable(cache)}
        assert cache.nbytes == sum(held.values()) > 0


def test_nothing_is_held_of_gradients_and_nothing_written_to_inputs(entry, generator):
    config = shape()
    k, v = draw(generator, config, 80, rows=2)
    before = k.clone(), v.clone()
    cache, grown = made(entry).cache(config), (k.requires_grad_(), v.requires_grad_())
    for result in feed(cache, config, *grown, [60] + [1] * 20):
        assert not any(x.requires_grad for x in result[:2])
    assert not any(tensor.requires_grad for tensor in reachable(cache))
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])


def test_decoding_far_beyond_the_budget(entry, generator):
    """Oracle: arithmetic: with a budget, bytes do not grow at all and stay near its own; otherwise far below the full cache's."""
    if not entry.facets.frees_memory:
        pytest.skip("facet frees_memory: false")
    if "decode" not in entry.facets.stage:
        pytest.skip("facet stage: what is decoded is kept")
    config, method, steps = shape(), made(entry), 700
    k, v = draw(generator, config, steps)
    cache, sizes, kept = method.cache(config), [], []
    for result in feed(cache, config, k, v, [1] * steps):
        if len(sizes) == 100:
            cache.compress_prefill()
        sizes.append(cache.nbytes)
        kept.append(result[0].shape[2])
        assert result[0][:, :, ::50].isfinite().all()
    per_token = 2 * config.n_kv_heads * config.head_dim * 4
    if hasattr(method, "budget"):
        assert max(kept[200:]) == method.budget + 1  # between, a method may drop many at once
        assert max(sizes[200:]) == min(sizes[200:]) < 2 * method.budget * per_token
    else:
        assert sizes[-1] < steps * per_token / 2


def test_a_long_prompt_is_compressed(entry, generator):
    """Oracle: arithmetic: in chunks or at once, with a budget bytes stay near its own, over all layers; otherwise far below the full cache's."""
    if not entry.facets.frees_memory:
        pytest.skip("facet frees_memory: false")
    config, method, length = shape(), made(entry), 700
    k, v = draw(generator, config, length)
    per_token = config.n_layers * 2 * config.n_kv_heads * config.head_dim * 4
    for sizes in ([length], [64] * 10 + [60]):
        cache = method.cache(config)
        for layer in range(config.n_layers):
            for _ in feed(cache, config, k, v, sizes, layer):
                pass
        cache.compress_prefill()
        bound = 2 * method.budget if hasattr(method, "budget") else length / 2
        assert cache.nbytes < bound * per_token


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_follows_the_models_dtype(entry, dtype):
    """Oracle: itself in float64, to the precision of the dtype's logits."""
    model, exact = decoder(dtype, n_layers=1), decoder(n_layers=1)
    method, sizes = made(entry), [40] + [1] * 20
    found = run(model, TOKENS[:, :60], method.cache(model.config), sizes)
    assert found.dtype == dtype
    expected = run(exact, TOKENS[:, :60], method.cache(exact.config), sizes)
    errors = (found.double() - expected).abs().mean(dim=-1) / expected.abs().mean()  # of each token
    # where attention scores decide who goes, the last digit may decide, and what comes after that differs: not most of it
    error = errors[:, 40:].median() if entry.facets.attention_scores else errors.mean()
    assert (
        error < {torch.bfloat16: 0.05, torch.float16: 0.02, torch.float32: 0.005}[dtype]
    )  # a code may round the other way


def test_another_batch_is_an_error(entry):
    model = decoder()
    cache = made(entry).cache(model.config)
    model(TOKENS, cache)
    with pytest.raises(ValueError, match="batch of 3, and gets 1"):
        model(TOKENS[:1], cache)


def test_it_computes_where_the_model_is(entry, device):
    """Oracle: the same on the CPU, in float64."""
    if device.type == "cpu":
        pytest.skip("needs another device: --device cuda")
    model, sizes = decoder(), [90] + [1] * 30
    expected = compressing(entry, model, TOKENS, sizes)
    found = compressing(entry, model.to(device), TOKENS.to(device), sizes)
    assert found.device.type == device.type
    assert_close(found.cpu(), expected)


# Shared arithmetic


@pytest.mark.parametrize(
    ("length", "compression", "least", "kept"),
    [
        (1000, 8, 1, 125),
        (1001, 8, 1, 126),
        (10, 100, 1, 1),
        (10, 8, 5, 5),
        (3, 8, 5, 3),
        (0, 2, 1, 0),
        (7, 1, 1, 7),
        (9, 1.5, 1, 6),
        (21, 1.4, 1, 15),
    ],
)
def test_tokens_to_keep_by_hand(length, compression, least, kept):
    """Oracle: by hand: rounded up, at least `least`, never more than there are."""
    assert tokens_to_keep(length, compression, least) == kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 2), "length=-1"),
        ((5, 0.5), "compression=0.5 must be at least 1"),
        ((5, float("nan")), "compression=nan"),
        ((5, 2, 0), "least=0"),
    ],
)
def test_tokens_to_keep_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        tokens_to_keep(*arguments)


def test_gather_by_loop(generator):
    """Oracle: one loop over rows, heads and entries."""
    x = torch.randn(2, 3, 7, 4, generator=generator)
    index = torch.randint(0, 7, (2, 3, 5), generator=generator)
    found = gather_tokens(x, index)
    assert all(
        torch.equal(found[r, h, i], x[r, h, index[r, h, i]]) for r in range(2) for h in range(3) for i in range(5)
    )


@pytest.mark.parametrize(
    "rope",
    [
        Rope(theta=500.0),
        Rope(type="linear", factor=3.0),
        Rope(type="llama3", factor=4.0, original_max_positions=32),
        Rope(type="yarn", factor=4.0, original_max_positions=16),
    ],
    ids=lambda rope: rope.type,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_turned_keys_are_those_of_other_positions(rope, dtype, generator):
    """Oracle: the unrotated keys, rotated to the other position at once."""
    config = shape(rope=rope)
    k = torch.randn(2, 2, 5, 32, generator=generator)
    rotary, turn = Rotary(config), Turn(config)
    for at, by in ((3, 40), (50, -50), (9, 0), (9, 7)):
        found = turn(rotate(k, *rotary(torch.arange(at, at + 5)[None], torch.float32)).to(dtype), by)
        expected = rotate(k, *rotary(torch.arange(at + by, at + by + 5)[None], torch.float32))
        assert found.dtype == dtype
        bound = 0.03 if dtype == torch.bfloat16 else 3e-5  # of keys up to 4; angles up to 60 in float32
        assert (found.float() - expected).abs().max() < bound


def test_keys_of_dynamic_frequencies_are_not_turned():
    with pytest.raises(ValueError, match="rope type='dynamic'"):
        Turn(shape(rope=Rope(type="dynamic", factor=2.0)))
