"""The subject of an arena: the testbed, or a checkpoint of the user's, in its own tokens."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from refimpl import testbed
from refimpl.model.config import Config
from refimpl.model.generate import generate
from refimpl.model.load import save
from refimpl.model.model import Decoder, initialize_
from refimpl.testbed.tokenizer import END_ID


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with a random model whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("own")
    config = Config(vocabulary=256, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24)
    save(initialize_(Decoder(config), torch.Generator().manual_seed(0), std=0.3), folder)
    reader = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    reader.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    reader.decoder = decoders.ByteLevel()
    reader.save(str(folder / "tokenizer.json"))
    return testbed.subject(folder)


def test_nothing_named_is_the_testbed():
    """Oracle: the committed weights."""
    subject, (model, tokenizer) = testbed.subject(), testbed.load()
    assert torch.equal(subject.model.embedding.weight, model.embedding.weight)
    assert subject.tokenizer.to_str() == tokenizer.to_str()


def test_text_is_the_testbeds_in_the_models_own_tokens(own):
    """Oracle: the documents, decoded; bytes need more tokens than merged ones."""
    text = own.tokenizer.decode(own.text("held-out", 300).tolist())
    assert next(iter(testbed.corpus.documents("held-out").values())).startswith(text)
    assert len(testbed.subject().tokenizer.encode(text).ids) < 200
    ends = testbed.subject().text("held-out", 20_000) == END_ID
    assert ends.any()  # the testbed's own text tells where a document ends, as in training


def test_answers_are_those_of_single_prompts_up_to_the_lines_end(own):
    """Oracle: `generate` on each prompt alone, without padding and without a stop."""
    prompts = ["def f(x):", "Anna", "the quick brown fox"]
    alone = [
        own.tokenizer.decode(generate(own.model, torch.tensor([own.tokenizer.encode(p).ids]), 12)[0].tolist())
        for p in prompts
    ]
    assert own.answers(prompts, 12, batch=2) == [text.split("\n")[0] for text in alone]
    assert len(set(alone)) == 3


def test_what_is_not_shown_does_not_matter(own):
    """Oracle: the prompt's last ten bytes alone."""
    assert own.answers(["something long before, then this end"], 8, last=10) == own.answers(
        [" this end"[-10:].rjust(10, "n")], 8
    )


def test_scores_are_the_tasks_mean(own, monkeypatch):
    """Oracle: the task's own score by hand: two of three answers are right."""
    samples = testbed.tasks.samples("few_shot", 3, 256, torch.Generator().manual_seed(0))
    said = [samples[0].answer, "nothing", samples[2].answer]
    monkeypatch.setattr(testbed.Subject, "answers", lambda self, prompts, n, last=None: said)
    assert own.score("few_shot", samples) == pytest.approx(2 / 3)


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        testbed.subject(tmp_path / "nowhere")
