"""Tiny checkpoints of every supported kind, made and saved by transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "rms_norm_eps": 1e-5,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-scaled": {
        "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "mscale": 1.5, "mscale_all_dim": 0.5, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False,
    },
    "yarn-wide": {  # the ramp would end beyond the last dimension
        "rope_type": "yarn", "rope_theta": 20.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "beta_slow": 0.01,
    },
    "yarn-stated": {
        "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "attention_factor": 1.7,
    },
}  # fmt: skip

KINDS = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}),
    "llama-wide-heads": ("Llama", {"head_dim": 14}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral-full": ("Mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen2-mixed": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 10}),
    "qwen3-mixed": (
        "Qwen3",
        {
            "use_sliding_window": True, "sliding_window": 4, "head_dim": 8, "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    **{f"llama-{name}": ("Llama", {"rope_parameters": rope}) for name, rope in ROPES.items()},
    "qwen3-yarn": ("Qwen3", {"head_dim": 8, "rope_parameters": ROPES["yarn"]}),
}  # fmt: skip


def peer(kind: str, **more: object) -> nn.Module:
    """Model of transformers; biases and norms are drawn too, since a wrong one would not show at 0 or 1."""
    import transformers

    name, fields = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | fields | more))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + ("norm" in name))
    return model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., tuple[nn.Module, Path]]:
    """Builds a model of transformers, and the folder where it is saved."""

    def build(kind: str = "llama", shards: str = "50GB", **more: object) -> tuple[nn.Module, Path]:
        model, folder = peer(kind, **more), tmp_path / kind
        model.save_pretrained(folder, max_shard_size=shards)
        return model, folder

    return build


@pytest.fixture
def tokens(generator: torch.Generator) -> torch.Tensor:
    """`[3, 33]`."""
    return torch.randint(0, 61, (3, 33), generator=generator)
