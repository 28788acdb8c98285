"""The committed checkpoint: small, whole, and the same model in transformers."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from refimpl import testbed


def test_it_is_a_small_checkpoint_in_safetensors():
    files = {path.name: path.stat().st_size for path in testbed.CHECKPOINT.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= set(files)
    assert sum(files.values()) < 12e6
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]


def test_it_loads_in_transformers_with_equal_logits(generator, monkeypatch):
    """Oracle: transformers (5.23) on the same folder, in float64, its norms too, which it computes in float32 otherwise."""

    def forward(norm, x):
        return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)

    monkeypatch.setattr(Qwen2RMSNorm, "forward", forward)
    ours, tokenizer = testbed.load()
    theirs = AutoModelForCausalLM.from_pretrained(testbed.CHECKPOINT, dtype=torch.float64).eval()
    ours = ours.double()
    (sample,) = testbed.tasks.samples("needle", 1, 1024, generator)
    tokens = torch.tensor([tokenizer.encode(sample.prompt).ids])
    with torch.no_grad():
        assert_close(ours(tokens), theirs(tokens).logits)
        assert ours(tokens).std() > 1  # negative control: logits that differ from each other


def test_its_tokenizer_loads_in_transformers():
    """Oracle: transformers' AutoTokenizer."""
    theirs = AutoTokenizer.from_pretrained(testbed.CHECKPOINT)
    text = "- Anna lives in Rome.\ndef f(x):\n    return 1234"
    assert theirs.encode(text) == testbed.load()[1].encode(text).ids
    assert theirs.decode(theirs.encode(text)) == text


def test_its_size_is_as_designed():
    config = json.loads((testbed.CHECKPOINT / "config.json").read_text())
    assert config["max_position_embeddings"] >= 1024
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert 2e6 <= sum(p.numel() for p in testbed.load()[0].parameters()) <= 5e6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_loads_in_the_dtype_that_is_asked_for(dtype):
    model, _ = testbed.load(dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not model.training
