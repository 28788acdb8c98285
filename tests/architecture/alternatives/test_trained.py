"""Weights that come with a mixer: what `save` writes is what `load` reads, and nothing else is."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import taxonomy
from refimpl import testbed
from refimpl.architecture.alternatives import trained
from refimpl.architecture.alternatives.language_model import LanguageModelConfig
from refimpl.architecture.alternatives.state_space.mamba import Mamba
from refimpl.architecture.alternatives.trained import load, save, save_file


def test_the_model_read_says_what_the_written_one_said(tmp_path, generator):
    """Oracle: the model that was written; its weights are rounded to bfloat16, and no setting is lost."""
    shape = LanguageModelConfig(vocabulary=61, d_model=12, n_layers=3, tied_embeddings=False)
    settings, tokens = Mamba(d_state=5, expand=3), torch.randint(61, (2, 9), generator=generator)
    model = settings.language_model(shape, generator)
    save(model, settings, tmp_path / "weights.safetensors", log="[]")
    read = load(Mamba, tmp_path / "weights.safetensors", torch.float32)
    assert read.config == shape and read.blocks[0].mixer.config == settings
    assert_close(read(tokens), model.bfloat16().float()(tokens))
    assert not torch.allclose(read(tokens), settings.language_model(shape, generator)(tokens))  # drawn anew


def test_the_file_stands_beside_the_module():
    """Oracle: the module's own path."""
    assert (
        trained.weights_file(Mamba)
        .as_posix()
        .endswith("refimpl/architecture/alternatives/state_space/mamba.safetensors")
    )


@pytest.mark.parametrize("content", [None, {"other": torch.ones(1)}])
def test_what_is_no_trained_model(content, tmp_path):
    path = tmp_path / "weights.safetensors"
    if content is None:
        with pytest.raises(FileNotFoundError, match="no trained model comes with Mamba"):
            load(Mamba, path)
    else:
        save_file(content, path)
        with pytest.raises(ValueError, match="holds no language model of mixers"):
            load(Mamba, path)


def test_a_file_that_is_cut_off_or_another_methods_is_told(tmp_path, generator):
    path, shape = tmp_path / "weights.safetensors", LanguageModelConfig(vocabulary=61, d_model=12, n_layers=1)
    save(Mamba(d_state=5).language_model(shape, generator), Mamba(d_state=5), path)

    class Other:
        def __init__(self, heads=2):
            self.heads = heads

    with pytest.raises(ValueError, match=r'weights\.safetensors: holds no model of Other, but one with .*"d_state": 5'):
        load(Other, path)
    path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(ValueError, match=r"weights\.safetensors: is no safetensors file, or is cut off"):
        load(Mamba, path)


MIXERS = [m for m in taxonomy.load().find(category="architecture/alternatives") if "long_context" in m.arena]


@torch.no_grad()
@pytest.mark.parametrize("entry", MIXERS, ids=lambda method: method.id)
def test_models_that_come_along_have_learnt(entry):
    """Oracle: the entropy of a token whose share in the training text is known, in nats; a model that has learnt nothing is above it."""
    kind = entry.load()
    model, text = load(kind), testbed.corpus.tokens("held-out")[:2056].view(8, 257)
    seen = torch.bincount(testbed.corpus.tokens("train"), minlength=model.config.vocabulary).double()
    by_share = -(seen / seen.sum()).log()[text[:, 1:]].mean()
    learnt = F.cross_entropy(model(text[:, :-1]).float().flatten(0, 1), text[:, 1:].flatten())
    assert learnt < 0.7 * by_share
    assert trained.weights_file(kind).stat().st_size < 8e6
    assert 2.5e6 < sum(p.numel() for p in model.parameters()) < 3.6e6  # as large as the testbed's, within a fifth


def test_there_are_models_that_come_along():
    assert {method.id for method in MIXERS} == {"mamba", "rwkv", "griffin"}
