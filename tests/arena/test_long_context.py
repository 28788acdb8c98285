"""The long-context arena on a tiny random decoder: what is read when, what is counted, and that all methods meet the same."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from refimpl import testbed
from refimpl.arena import long_context as arena
from refimpl.arena.protocol import Conditions
from refimpl.inference.kv_cache.dropped.streaming_llm import StreamingLLM
from refimpl.inference.kv_cache.protocol import tokens_to_keep
from refimpl.inference.kv_cache.quantized.kivi import KIVI
from refimpl.model.cache import FullCache
from refimpl.model.config import Config
from refimpl.model.generate import generate
from refimpl.model.load import save
from refimpl.model.model import Decoder, initialize_
from refimpl.testbed.tokenizer import CHECKPOINT, VOCABULARY, tokenizer

CONFIG = Config(vocabulary=VOCABULARY, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=32, d_ff=8)
TOKEN_BYTES = 2 * 2 * 32 * 2


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A random model in the testbed's place, texts of 300 tokens, answers of 8."""
    model = initialize_(Decoder(CONFIG), torch.Generator().manual_seed(0), std=0.3).bfloat16().requires_grad_(False)
    real_subject = testbed.subject

    def subject(path, device, dtype):
        own = testbed.Subject(copy.deepcopy(model).to(device, dtype), tokenizer())
        return own if path is None else real_subject(path, device, dtype)

    monkeypatch.setattr(testbed, "subject", subject)
    monkeypatch.setattr(arena, "LENGTH", 300)
    monkeypatch.setattr(arena, "CHUNK", 60)
    real = arena.substrate
    monkeypatch.setattr(arena, "substrate", lambda conditions: dataclasses.replace(real(conditions), answer_tokens=8))
    return model


def conditions(seed=0, **axes):
    point = {"task": "needle", "question": "seen", "prefill": "whole"} | axes
    return Conditions(torch.Generator().manual_seed(seed), axes=point, quick=True)


def exact(figures):
    return {metric.name: figures[metric.name] for metric in arena.METRICS if metric.exact}


def lengths(given):
    """Tokens of contexts, and of contexts and questions."""
    context = [len(tokenizer().encode(s.context).ids) for s in given.samples]
    return context, [c + len(tokenizer().encode(s.question).ids) for c, s in zip(context, given.samples, strict=True)]


def test_axes_are_the_testbeds_tasks_and_the_switches():
    assert arena.AXES["task"] == testbed.tasks.NAMES
    assert all(set(values) <= set(arena.AXES[name]) for name, values in arena.QUICK.items())


@pytest.mark.parametrize("axes", [{}, {"question": "hidden", "prefill": "chunks", "task": "few_shot"}])
def test_figures_are_those_announced_and_repeat(axes):
    """Oracle: the declaration; a second run."""
    first, second = (arena.measure(KIVI, {"bits": 2}, conditions(**axes)) for _ in range(2))
    assert list(first) == [metric.name for metric in arena.METRICS]
    assert exact(first) == exact(second)
    assert first["prefill_seconds"] > 0
    assert first["seconds_per_token"] > 0


def test_the_baseline_counts_its_16_bits():
    """Oracle: arithmetic: two layers of keys and values, 32 numbers of two bytes; after seven more tokens the buffer has doubled."""
    given = arena.substrate(conditions())
    figures = arena.baseline(conditions())
    _, prompts = lengths(given)
    assert figures["prompt_bytes"] == sum(prompts) / len(prompts) * TOKEN_BYTES
    assert figures["compression"] == 1
    assert figures["final_bytes"] == 2 * figures["prompt_bytes"]


@pytest.mark.parametrize("prefill", ["whole", "chunks"])
@pytest.mark.parametrize("question", ["seen", "hidden"])
def test_answers_are_those_of_generate(tiny, prefill, question):
    """Oracle: `generate` on the whole prompt; a full cache answers alike however it was read, in float32."""
    now = conditions(prefill=prefill, question=question)
    given = dataclasses.replace(arena.substrate(now), model=copy.deepcopy(tiny).float())
    for sample in given.samples:
        found = arena.answer(given, sample, lambda *_: FullCache(), now)
        prompt = torch.tensor([tokenizer().encode(sample.prompt).ids])
        expected = generate(given.model, prompt, 8, stop=tokenizer().encode("\n").ids)
        assert found.text == tokenizer().decode(expected[0].tolist()).split("\n")[0]


class Notes(FullCache):
    """Writes down what it is told."""

    def __init__(self):
        super().__init__()
        self.notes = []

    def update(self, layer, k, v, queries, positions):
        if layer == 0:
            self.notes.append(k.shape[2])
        return super().update(layer, k, v, queries, positions)

    def compress_prefill(self):
        self.notes.append("compress")


def test_what_is_read_before_it_compresses():
    """Oracle: by hand, from the lengths of context and question."""
    for question, prefill in (("seen", "whole"), ("seen", "chunks"), ("hidden", "whole"), ("hidden", "chunks")):
        now = conditions(question=question, prefill=prefill)
        given = arena.substrate(now)
        context, prompt = (sizes[0] for sizes in lengths(given))
        told, memory = [], Notes()

        def cache(config, read, told=told, memory=memory):
            told.append(read)
            return memory

        arena.answer(given, given.samples[0], cache, now)
        first = prompt if question == "seen" else context
        chunks = [first] if prefill == "whole" else [60] * (first // 60) + [first % 60] * (first % 60 > 0)
        after = [prompt - context] if question == "hidden" else []
        assert told == [first]
        assert memory.notes[: len(chunks) + 1 + len(after)] == [*chunks, "compress", *after]
        assert set(memory.notes[len(chunks) + 1 + len(after) :]) <= {1}


def test_compression_is_a_budget_for_every_sample():
    """Oracle: by hand: of a prompt of n tokens ceil(n / 4) are kept, beside the room and the sinks of a cache that holds them."""
    given = arena.substrate(conditions())
    _, prompts = lengths(given)
    budgets = []

    class Spy(StreamingLLM):
        def __post_init__(self):
            budgets.append(self.budget)

    figures = arena.measure(Spy, {"compression": 4}, conditions())
    assert budgets == [-(-n // 4) for n in prompts]
    assert 3 < figures["compression"] < 4
    assert arena.measure(StreamingLLM, {"budget": 2000}, conditions())["score"] == arena.baseline(conditions())["score"]


def test_scores_are_the_tasks(monkeypatch):
    """Oracle: a score that is 1 for whatever this model says, and 0 for a cache that makes it say something else."""
    given = arena.substrate(conditions())
    said = {s.answer: arena.answer(given, s, lambda *_: FullCache(), conditions()).text for s in given.samples}
    known = dataclasses.replace(given, score=lambda text, answer: float(text == said[answer]))
    monkeypatch.setattr(arena, "substrate", lambda conditions: known)
    assert arena.baseline(conditions())["score"] == 1
    assert arena.measure(StreamingLLM, {"budget": 8}, conditions())["score"] < 1


def test_a_model_of_the_users(tiny, tmp_path):
    """Oracle: the same weights as the testbed's stand-in."""
    save(tiny, tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((CHECKPOINT / "tokenizer.json").read_bytes())
    now = dataclasses.replace(conditions(), model=tmp_path)
    assert exact(arena.baseline(now)) == exact(arena.baseline(conditions()))


class Last:
    """A prompt compressor that keeps the text's end."""

    def compressor(self, reader, model):
        return self

    def compress(self, texts, budgets, questions):
        ids = [
            torch.tensor(tokenizer().encode(text).ids[-budget:]) for text, budget in zip(texts, budgets, strict=True)
        ]
        return [SimpleNamespace(ids=kept) for kept in ids]


@pytest.mark.parametrize("question", ["seen", "hidden"])
def test_a_prompt_compressor_reads_what_a_cache_of_the_same_budget_holds(question):
    """Oracle: what is read, by hand: the text's last tokens, so that with the question there are so many times fewer."""
    given = arena.substrate(conditions(question=question))
    figures = arena.measure(Last, {"compression": 4}, conditions(question=question))
    context, prompt = lengths(given)
    read = prompt if question == "seen" else context
    budgets = [tokens_to_keep(n, 4, arena.LEAST) for n in read]
    assert figures["prompt_bytes"] == sum(budgets) / len(budgets) * TOKEN_BYTES
    assert figures["compression"] == pytest.approx(sum(read) / sum(budgets))


def test_a_prompt_compressor_that_keeps_all_answers_as_the_full_cache():
    full = exact(arena.baseline(conditions()))
    assert exact(arena.measure(Last, {"compression": 1}, conditions())) == full


def test_a_method_that_is_calibrated_is_fitted_to_training_text_first(tiny):
    """Oracle: by hand: the first windows of training text, the substrate's model, and the cache of what comes back."""
    told = []

    class Fitted:
        def __init__(self, bits=2, ready=False):
            self.bits, self.ready = bits, ready

        def calibrated(self, model, texts):
            told.append((type(model), torch.cat(texts), {len(text) for text in texts}, self.bits))
            return Fitted(ready=True)

        def cache(self, config):
            assert self.ready
            return FullCache()

    assert exact(arena.measure(Fitted, {"bits": 3}, conditions())) == exact(arena.baseline(conditions()))
    ((model, text, lengths, bits),) = told
    assert (model, lengths, bits) == (type(tiny), {256}, 3)
    assert torch.equal(text, testbed.corpus.tokens("train", 4 * 256))


def test_a_method_of_neither_kind_is_refused():
    with pytest.raises(TypeError, match=r"dict has neither `cache\(config\)` nor `compressor\(tokenizer, model\)`"):
        arena.measure(dict, {}, conditions())
