"""Tiny models for the fine-tuning methods: builders, so that a test can have the same base model twice."""

from collections.abc import Callable

import pytest
import torch
from torch import nn


@pytest.fixture
def llama() -> Callable[[], nn.Module]:
    """Builds a Llama of transformers with grouped heads; wide initial weights, so that its attention is not flat."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=61, initializer_range=0.3, tie_word_embeddings=True, **sizes, **heads)
        ).eval()

    return build


@pytest.fixture
def gpt2() -> Callable[[], nn.Module]:
    """Builds a GPT-2 of transformers, whose layers keep their weights transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def build() -> nn.Module:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)).eval()

    return build
