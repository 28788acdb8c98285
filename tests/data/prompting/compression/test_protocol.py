"""What holds for every method that shortens prompts, and the arithmetic they share; the list of methods is the taxonomy's."""

import dataclasses

import pytest
import torch
import yaml

import taxonomy
from refimpl.data.prompting.compression.protocol import most, portions
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_
from refimpl.testbed.tokenizer import tokenizer

METHODS = taxonomy.load().find(category="data/prompting/compression", implemented=True)
TEXT = (
    "    return self.size\n- Anna lives in Rome.\n    for line in lines:\nThe pass phrase of Leo is: cat mode 42\n\n"
    * 3
)
OTHER = "import os\n\n\ndef main(path):\n    print(os.listdir(path))\n"
WHOLE = tokenizer().encode(TEXT).ids


@pytest.fixture(scope="module", params=METHODS, ids=lambda method: method.id)
def entry(request):
    """A method as the taxonomy knows it."""
    if request.param.facets.training == "full":
        pytest.skip("facet training: full; it trains tokens of its own instead of leaving some out")
    return request.param


@pytest.fixture(scope="module")
def compressor(entry):
    """The method at its default settings, for readers with the testbed's tokenizer."""
    return made(entry)


def made(entry):
    size = tokenizer().get_vocab_size()
    config = Config(vocabulary=size, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24)
    model = initialize_(Decoder(config), torch.Generator().manual_seed(0), std=0.3).eval()
    return entry.load()().compressor(tokenizer(), model)


def kept(compressor, text, budget):
    return compressor.compress([text], [budget])[0].kept.tolist()


def is_subsequence(part, whole):
    rest = iter(whole)
    return all(token in rest for token in part)


def test_settings_survive_yaml(entry):
    """Oracle: PyYAML, which knows neither paths nor tuples."""
    method = entry.load()()
    again = type(method)(**yaml.safe_load(yaml.safe_dump(dataclasses.asdict(method))))
    assert again == method and hash(again) == hash(method)


def test_there_are_methods():
    assert METHODS


@pytest.mark.parametrize("more", [0, 1, 10_000])
def test_a_budget_for_all_keeps_all(compressor, more):
    """Oracle: the tokenizer; one token fewer is not the whole."""
    found = compressor.compress([TEXT], [len(WHOLE) + more])[0]
    assert found.tokens.tolist() == found.ids.tolist() == WHOLE
    assert compressor.compress([TEXT], [len(WHOLE) - 1])[0].ids.tolist() != WHOLE


@pytest.mark.parametrize("budget", [1, 2, 7, len(WHOLE) // 4, len(WHOLE) // 2, len(WHOLE) - 1])
def test_budgets_are_met_to_the_token_by_a_part_of_the_prompt(compressor, budget):
    """Oracle: counting, and a search for the kept tokens in the prompt from left to right."""
    found = compressor.compress([TEXT], [budget])[0]
    assert found.kept.dtype == found.tokens.dtype == torch.int64
    assert found.kept.tolist() == sorted(set(found.kept.tolist())) and len(found.kept) == budget
    assert is_subsequence(found.ids.tolist(), WHOLE)
    assert not is_subsequence(found.ids.tolist()[::-1], WHOLE) or budget <= 2  # negative control of the search


@pytest.mark.parametrize("text", ["cat", " cat", "\n", ".", "a b", "é—ü"])
def test_short_prompts_are_not_emptied(compressor, text):
    n = len(tokenizer().encode(text).ids)
    for budget in range(1, n + 1):
        assert len(kept(compressor, text, budget)) == budget


def test_an_empty_prompt_stays_empty(compressor):
    assert kept(compressor, "", 3) == []
    assert compressor.compress([], []) == []


def test_the_same_again_whatever_was_compressed_between(compressor, entry):
    """Oracle: another compressor that has seen nothing."""
    first = kept(compressor, TEXT, 20)
    kept(compressor, OTHER, 5)
    assert kept(compressor, TEXT, 20) == first == kept(made(entry), TEXT, 20)


def test_together_as_alone(compressor):
    """Oracle: one by one; prompts of different lengths, one shorter than its budget, one empty."""
    texts, budgets = [TEXT, OTHER, "", "cat", TEXT + OTHER], [20, 4, 3, 5, 33]
    found = compressor.compress(texts, budgets)
    assert [c.kept.tolist() for c in found] == [kept(compressor, t, b) for t, b in zip(texts, budgets, strict=True)]


def test_the_question_counts_only_where_it_is_said_to(compressor, entry):
    if entry.load().question_aware:
        pytest.skip("question_aware: it should change something, which the method's own tests show")
    asked = compressor.compress([TEXT], [20], ["Where does Anna live?"])[0]
    assert asked.kept.tolist() == kept(compressor, TEXT, 20)


@pytest.mark.parametrize("budget", [0, -3])
def test_a_budget_of_nothing_is_refused(compressor, budget):
    with pytest.raises(ValueError, match=f"budget={budget} must be at least 1 token"):
        compressor.compress([TEXT], [budget])


@pytest.mark.parametrize(("budgets", "questions"), [([1], None), ([1, 2], ["one"])])
def test_each_text_has_its_budget_and_question(compressor, budgets, questions):
    with pytest.raises(ValueError, match="2 texts need as many budgets"):
        compressor.compress([TEXT, OTHER], budgets, questions)


def test_most_by_brute_force(generator):
    """Oracle: sorting pairs of (minus the priority, position), with equals among them."""
    for n in (1, 5, 33):
        priority = torch.randint(0, 6, (n,), generator=generator).float()
        ranked = sorted(range(n), key=lambda i: (-priority[i].item(), i))
        for budget in (0, 1, n // 2, n, n + 3):
            assert most(priority, budget).tolist() == sorted(ranked[:budget])


def test_portions_add_up_and_are_near_their_share(generator):
    """Oracle: exact shares; a portion is less than one token away from its own."""
    for _ in range(200):
        lengths = torch.randint(0, 40, (5,), generator=generator).tolist()
        budget = int(torch.randint(0, sum(lengths) + 1, (), generator=generator))
        found = portions(lengths, budget)
        assert sum(found) == budget
        for length, portion in zip(lengths, found, strict=True):
            assert 0 <= portion <= length
            assert abs(portion - budget * length / max(1, sum(lengths))) < 1
    assert portions([0, 0], 0) == [0, 0] and portions([], 0) == []
