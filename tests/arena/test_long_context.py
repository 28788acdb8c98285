"""The long-context arena on a tiny random decoder: what is read when, what is counted, and that all methods meet the same."""

import copy
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from refimpl import testbed
from refimpl.architecture.alternatives import trained
from refimpl.architecture.alternatives.language_model import LanguageModelConfig
from refimpl.architecture.alternatives.state_space.mamba import Mamba
from refimpl.arena import long_context as arena
from refimpl.arena.protocol import Conditions
from refimpl.inference.kv_cache.dropped.streaming_llm import StreamingLLM
from refimpl.inference.kv_cache.protocol import tokens_to_keep
from refimpl.inference.kv_cache.quantized.kivi import KIVI
from refimpl.long_context import questions
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
    monkeypatch.setattr(questions, "LENGTH", 300)
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
    assert arena.AXES["task"] == (*testbed.tasks.NAMES, "needle_64")
    assert all(set(values) <= set(arena.AXES[name]) for name, values in arena.QUICK.items())


@pytest.mark.parametrize("axes", [{}, {"question": "hidden", "prefill": "chunks", "task": "few_shot"}])
def test_figures_are_those_announced_and_repeat(axes):
    """Oracle: the declaration; a second run."""
    first, second = (arena.measure(KIVI, {"bits": 2}, conditions(**axes)) for _ in range(2))
    assert list(first) == [metric.name for metric in arena.METRICS]
    assert exact(first) == exact(second)
    assert first["prefill_seconds"] > 0
    assert first["seconds_per_token"] > 0


@pytest.mark.parametrize("prefill", ["whole", "chunks"])
def test_the_baseline_counts_its_16_bits(prefill):
    """Oracle: arithmetic: two layers of keys and values, 32 numbers of two bytes; after the prompt there is room for 64 tokens and the first."""
    given, figures = arena.substrate(conditions()), arena.baseline(conditions(prefill=prefill))
    _, prompts = lengths(given)
    assert figures["prompt_bytes"] == sum(prompts) / len(prompts) * TOKEN_BYTES
    assert figures["compression"] == 1
    assert figures["final_bytes"] == figures["prompt_bytes"] + 65 * TOKEN_BYTES


@pytest.mark.parametrize("prefill", ["whole", "chunks"])
@pytest.mark.parametrize("question", ["seen", "hidden"])
def test_answers_are_those_of_generate(tiny, prefill, question):
    """Oracle: `generate` on the whole prompt; a full cache answers alike however it was read, in float32."""
    now = conditions(prefill=prefill, question=question)
    given = dataclasses.replace(arena.substrate(now), model=copy.deepcopy(tiny).float())
    for sample in given.samples:
        found = arena.answer(given, sample, now, lambda _: FullCache())
        prompt = torch.tensor([tokenizer().encode(sample.context + sample.question).ids])
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

        def cache(read, told=told, memory=memory):
            told.append(read)
            return memory

        arena.answer(given, given.samples[0], now, cache)
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
    said = [arena.answer(given, s, conditions(), lambda _: FullCache()).text for s in given.samples]
    samples = [
        s._replace(score=lambda text, right=right: float(text == right))
        for s, right in zip(given.samples, said, strict=True)
    ]
    known = dataclasses.replace(given, samples=samples)
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
    with pytest.raises(
        TypeError, match=r"dict has none of `cache\(config\)`, `compressor\(tokenizer, model\)` and `language_model"
    ):
        arena.measure(dict, {}, conditions())


def test_needles_leave_a_map_of_their_scores(monkeypatch):
    """Oracle: the mean of the map is the score; its places are those of the samples."""
    monkeypatch.setattr(questions, "LENGTH", 500)
    for task, there in (("needle", True), ("needle_64", True), ("few_shot", False)):
        now = conditions(task=task)
        score = arena.baseline(now)["score"]
        assert list(now.curves) == (["score over depth and length"] if there else [])
        for points in now.curves.values():
            assert [(depth, length) for depth, length, _ in points] == [
                (d, n) for n in (250, 500) for d in (0.25, 0.75)
            ]
            assert sum(value for *_, value in points) / 4 == score


@pytest.fixture
def mamba(tmp_path, monkeypatch):
    """A random model of mixers, stored where a trained one would stand."""
    shape = LanguageModelConfig(vocabulary=VOCABULARY, d_model=16, n_layers=2)
    model = Mamba(d_state=4).language_model(shape, torch.Generator().manual_seed(0))
    monkeypatch.setattr(trained, "weights_file", lambda method: tmp_path / "mamba.safetensors")
    trained.save(model, Mamba(d_state=4), tmp_path / "mamba.safetensors")
    return trained.load(Mamba)


@pytest.mark.parametrize("prefill", ["whole", "chunks"])
def test_a_mixer_answers_with_a_model_of_its_own(mamba, prefill):
    """Oracle: the stored model's `generate` for the text; for the bytes, by hand: 32 channels of 4 numbers in float32 and of 3
    inputs in bfloat16, in two layers, against what the testbed's stand-in would hold."""
    now = conditions(prefill=prefill)
    given = arena.substrate(now)
    said = []
    given = dataclasses.replace(
        given, samples=[s._replace(score=lambda text: float(said.append(text) or 0)) for s in given.samples]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena, "substrate", lambda conditions: given)
        figures = arena.measure(Mamba, {}, now)
    state = 2 * (32 * 4 * 4 + 32 * 3 * 2)
    assert figures["prompt_bytes"] == figures["final_bytes"] == state
    _, prompts = lengths(given)
    assert figures["compression"] == pytest.approx(sum(prompts) / len(prompts) * TOKEN_BYTES / state)
    ends = tokenizer().encode("\n").ids
    for sample, text in zip(given.samples, said, strict=True):
        prompt = torch.tensor([tokenizer().encode(sample.context + sample.question).ids])
        expected = mamba.generate(prompt, 8, stop=ends)[0].tolist()
        assert text == tokenizer().decode(expected).split("\n")[0]


def test_a_mixer_has_no_place_in_a_model_of_the_users(mamba, tiny, tmp_path):
    with pytest.raises(ValueError, match=r"--model .*Mamba stands in the place of attention"):
        arena.measure(Mamba, {}, dataclasses.replace(conditions(), model=tmp_path))


@pytest.mark.parametrize(("blank_lines", "expected"), [(True, " b"), (False, "")])
def test_longbenchs_answers_of_a_line_may_begin_with_line_breaks(blank_lines, expected):
    """Oracle: by hand, from a model that says two line breaks, b, a line break and more."""
    now, lines = conditions(), tokenizer().encode("\n b\n c").ids
    spoken = iter([lines[0], *lines])
    given = dataclasses.replace(arena.substrate(now), blank_lines=blank_lines)
    logits = lambda hidden: torch.nn.functional.one_hot(torch.tensor(next(spoken)), VOCABULARY)  # noqa: E731
    given.model.logits = logits
    assert arena.answer(given, given.samples[0], now, lambda _: FullCache()).text == expected


def test_a_prompt_compressor_sees_no_more_than_caches_do(tiny, monkeypatch):
    """Oracle: the middle of a text that is too long is left out, for whoever reads it."""
    told = []

    class Spy(Last):
        def compress(self, texts, budgets, asked):
            told.extend(texts)
            return super().compress(texts, budgets, asked)

    given = arena.substrate(conditions())
    given.model.config = dataclasses.replace(given.model.config, max_positions=100)
    monkeypatch.setattr(arena, "substrate", lambda conditions: given)
    assert arena.measure(Spy, {"compression": 4}, conditions())["compression"] == pytest.approx(4, abs=0.2)
    for text, sample in zip(told, given.samples, strict=True):
        context, question = questions.fitting(given, sample)
        assert text == tokenizer().decode(context) and len(context) + len(question) == 92


def test_texts_of_the_users(tmp_path):
    """Oracle: by hand: the folder's tasks, and an answer that is scored against the file's."""
    line = {"input": "Where?", "context": "Rome. " * 50, "answers": ["1 2"], "all_classes": None}
    (tmp_path / "qasper.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line))
    assert arena.axes_of(tmp_path) == {**arena.AXES, "task": ("qasper",)}
    now = dataclasses.replace(conditions(task="qasper"), texts=tmp_path)
    given = arena.substrate(now)
    said = arena.answer(given, given.samples[0], now, lambda _: FullCache()).text
    (tmp_path / "qasper.jsonl").write_text(json.dumps({**line, "answers": [said]}))
    assert arena.baseline(now)["score"] == 1
    (tmp_path / "qasper.jsonl").write_text(json.dumps({**line, "answers": ["nothing of it"]}))
    assert arena.baseline(now)["score"] == 0
