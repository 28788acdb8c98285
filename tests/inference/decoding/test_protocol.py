"""What holds for every way of decoding; the list of methods is the taxonomy's, and plain decoding is held to the same."""

import copy
from dataclasses import asdict

import pytest
import torch
import yaml

import taxonomy
from refimpl.inference.decoding.protocol import Decoding, Plain
from refimpl.model.generate import generate, pad
from tests.inference.decoding.chances import FALSE_ALARM, chances, number, p_value, tiny

METHODS = taxonomy.load().find(category="inference/decoding", implemented=True)
PROMPTS = [[5, 7, 33, 2, 60, 1, 1, 9, 30, 12], [8], [3, 41, 5]]


@pytest.fixture(params=[None, *METHODS], ids=lambda method: method.id if method else "plain")
def entry(request):
    """A method as the taxonomy knows it; None is plain decoding."""
    return request.param


@pytest.fixture
def method(entry):
    """The method at its default settings."""
    return entry.load()() if entry else Plain()


PREPARED = {}  # by method, target and draft model: the target that it was made for, and what was made


def takes_a_draft_model(method, target):
    """Whether a small model guesses: what a method makes by itself, or does without, is the same beside each of them."""
    if type(method).prepare is not Decoding.prepare:
        return False
    try:
        method.decode(target, torch.tensor([[5]]), 1)
    except ValueError:
        return True
    return False


@pytest.fixture(params=["good", "itself", "bad"])
def draft(request, entry, method, target, drafts, generator):
    """What the method made of a draft model: made once, and copied for each test, but for the parts that are the target's own."""
    if request.param != "good" and not takes_a_draft_model(method, target):
        pytest.skip("no draft model: tried once")
    name = (entry and entry.id, request.node.callspec.params["target"], request.param)
    if name not in PREPARED:
        text = torch.randint(0, 61, (600,), generator=generator)
        PREPARED[name] = copy.deepcopy((target, method.prepare(target, drafts[request.param], text, generator)))
    first, made = PREPARED[name]
    mine, its = ([*model.modules(), *model.parameters()] for model in (target, first))
    return copy.deepcopy(made, {id(one): other for one, other in zip(its, mine, strict=True)})


def test_there_are_methods():
    assert METHODS


@pytest.mark.parametrize("n", [1, 2, 23])
def test_greedy_tokens_are_those_of_generate_alone_and_in_padded_batches(entry, method, target, draft, n):
    """Oracle: `generate`, which transformers' tokens and the whole forward hold."""
    if entry and not entry.facets.exact:
        pytest.skip("facet exact: false")
    tokens, padding = pad(PROMPTS)
    expected = generate(target, tokens, n, padding=padding)
    decoded = method.decode(target, tokens, n, draft=draft, padding=padding)
    assert torch.equal(decoded.tokens, expected)
    assert decoded.target_calls <= n
    for prompt, row in zip(PROMPTS, expected, strict=True):
        alone = method.decode(target, torch.tensor([prompt]), n, draft=draft)
        assert torch.equal(alone.tokens[0], row)


def test_stop_tokens_end_rows_where_they_stand(entry, method, target, draft):
    """Oracle: `generate`, with one stop token, with one for each row, and with one that never comes."""
    if entry and not entry.facets.exact:
        pytest.skip("facet exact: false")
    tokens, padding = pad(PROMPTS)
    whole = generate(target, tokens, 14, padding=padding)
    never = next(token for token in range(61) if token not in whole)
    for stop in ({int(whole[0, 4])}, {int(whole[0, 3]), int(whole[1, 7]), int(whole[2, 1])}, {never}, {*range(61)}):
        decoded = method.decode(target, tokens, 14, draft=draft, padding=padding, stop=stop)
        assert torch.equal(decoded.tokens, generate(target, tokens, 14, padding=padding, stop=stop))


def test_counts_fit_together(method, target, draft):
    """Oracle: each token of a row comes from a guess that stood, or from a round's own token."""
    tokens, padding = pad(PROMPTS)
    for n in (1, 20):
        decoded = method.decode(target, tokens, n, draft=draft, padding=padding)
        assert decoded.tokens.shape == (3, n)
        assert torch.equal(decoded.rounds + decoded.accepted, torch.full((3,), n))
        assert decoded.target_calls == decoded.rounds.max()
        assert ((decoded.accepted + decoded.rejected) <= decoded.drafted).all()
        assert 0 <= decoded.acceptance <= 1
        assert decoded.depths.shape == decoded.stood.shape == (3, len(decoded.widths)) == (3, decoded.target_calls)
        assert (decoded.stood <= decoded.depths).all() and (decoded.depths < decoded.widths).all()
        assert (decoded.depths.sum(dim=1) <= decoded.drafted).all()
        assert not decoded.depths[torch.arange(decoded.target_calls) >= decoded.rounds[:, None]].any()


def test_draws_follow_the_targets_distribution(entry, method, generator):
    """Oracle: the chance of every text of 3 tokens over 4, by the whole forward; 10,000 draws, a chi-square.

    The false alarm has chance 1e-4. Negative control: another temperature is found out.
    """
    if entry and not entry.facets.exact:
        pytest.skip("facet exact: false")
    target, small = tiny(generator), tiny(generator, n_layers=1)
    draft = method.prepare(target, small, torch.randint(0, 4, (600,), generator=generator), generator)
    prompt = [1, 3]
    decoded = method.decode(
        target, torch.tensor([prompt]).expand(10_000, 2), 3, draft=draft, temperature=0.8, generator=generator
    )
    counts = number(decoded.tokens, 4).bincount(minlength=64)
    assert p_value(counts, chances(target, prompt, 3, 0.8)) > FALSE_ALARM
    assert p_value(counts, chances(target, prompt, 3, 1.0)) < 1e-9


def test_same_seed_same_tokens_and_nothing_is_left_for_the_next_call(entry, method, target, draft):
    """Oracle: the call again, after another one on other prompts, and by a fresh configuration.

    Another seed gives others, unless a method is not exact and may do without draws, as typical acceptance does.
    """
    tokens, padding = pad(PROMPTS)
    fresh = copy.deepcopy(method)

    def draw(which, seed):
        seeded = torch.Generator().manual_seed(seed)
        return which.decode(
            target, tokens, 12, draft=draft, padding=padding, temperature=0.9, generator=seeded
        ).tokens.tolist()

    first = draw(method, 3)
    method.decode(target, torch.tensor([[1, 2]]), 5, draft=draft)
    assert draw(method, 3) == first == draw(fresh, 3)
    assert draw(method, 4) != first or (entry and not entry.facets.exact)
    assert method == fresh


def test_inputs_are_not_written_and_no_gradient_is_kept(method, target, draft):
    tokens, padding = pad(PROMPTS)
    state = {name: value.clone() for name, value in target.state_dict().items()}
    before = tokens.clone(), padding.clone()
    decoded = method.decode(target, tokens, 9, draft=draft, padding=padding)
    assert torch.equal(tokens, before[0]) and torch.equal(padding, before[1])
    assert all(torch.equal(value, state[name]) for name, value in target.state_dict().items())
    assert all(parameter.grad is None for parameter in target.parameters())
    assert not decoded.tokens.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(entry, method, target, draft, dtype):
    """Oracle: `generate`, in float64; in bfloat16 rounding may decide, so that shape and range are left."""
    if entry and not entry.facets.exact:
        pytest.skip("facet exact: false")
    target, draft = target.to(dtype), None if draft is None else draft.to(dtype)
    tokens, padding = pad(PROMPTS)
    decoded = method.decode(target, tokens, 9, draft=draft, padding=padding)
    assert decoded.tokens.shape == (3, 9) and decoded.tokens.min() >= 0 and decoded.tokens.max() < 61
    if dtype == torch.float64:
        assert torch.equal(decoded.tokens, generate(target, tokens, 9, padding=padding))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": torch.tensor([5])}, "tokens of shape"),
        ({"tokens": torch.tensor([[5, 61]])}, "tokens range from 5 to 61"),
        ({"n": 0}, "n=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": 0.5}, "pass a torch.Generator"),
        ({"padding": torch.tensor([0, 0])}, "padding="),
    ],
)
def test_arguments_are_checked(method, target, draft, arguments, message):
    arguments = {"tokens": torch.tensor([[5]]), "n": 1} | arguments
    with pytest.raises(ValueError, match=message):
        method.decode(target, arguments.pop("tokens"), arguments.pop("n"), draft=draft, **arguments)


@pytest.mark.parametrize("target", ["full"], indirect=True)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (torch.full((200,), 61), "text ranges from 61 to 61, the vocabulary from 0 to 60"),
        (torch.full((200,), -1), "text ranges from -1 to -1"),
        (torch.zeros(2, 200, dtype=torch.int64), r"text of shape \(2, 200\)"),
        (torch.zeros(200), "torch.float32 must be"),
        (torch.zeros(0, dtype=torch.int64), "a text of 0 tokens"),
    ],
)
def test_text_is_checked(method, target, generator, text, message):
    if type(method).prepare is Decoding.prepare:
        pytest.skip("nothing is made of the text")
    with pytest.raises(ValueError, match=message):
        method.prepare(target, None, text, generator)


def test_configuration_survives_yaml(method):
    assert type(method)(**yaml.safe_load(yaml.safe_dump(asdict(method)))) == method


def test_plain_decoding_counts_a_call_a_token(target):
    """Oracle: by hand; a row's rounds end with its stop token."""
    tokens, padding = pad(PROMPTS)
    whole = generate(target, tokens, 12, padding=padding)
    stop = int(whole[1, 5])
    ends = [next((i + 1 for i, token in enumerate(row) if token == stop), 12) for row in whole.tolist()]
    decoded = Plain().decode(target, tokens, 12, padding=padding, stop={stop})
    assert decoded.rounds.tolist() == ends and decoded.target_calls == max(ends)
    assert decoded.acceptance == 0 and decoded.draft_calls == 0
