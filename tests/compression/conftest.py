"""Tiny models of four architectures, four blocks each, with wide initial weights, so that attention is not flat."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from refimpl.compression.folder import load_compressed
from refimpl.model.cache import FullCache
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_

VOCABULARY, BLOCKS = 61, 4


def decoder() -> Decoder:
    """The substrate, with grouped heads and a window in every other block."""
    sizes = {"vocabulary": VOCABULARY, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 40}
    config = Config(n_layers=BLOCKS, sliding_window=(None, 3) * (BLOCKS // 2), **sizes)
    return initialize_(Decoder(config), torch.Generator().manual_seed(0), std=0.3).eval()


def decoder_with_biases() -> Decoder:
    """The same with the biases without which no config.json can say that some blocks have a window."""
    config = dataclasses.replace(decoder().config, qkv_bias=True)
    return initialize_(Decoder(config), torch.Generator().manual_seed(0), std=0.3).eval()


@torch.no_grad()
def differences(one: Decoder, other: Decoder, tokens: torch.Tensor) -> list[str]:
    """In what two decoders differ: their modules, what they hold, and what they compute, without and with a cache."""
    found: dict[str, list[object]] = {}
    for model in (one, other):
        cache = FullCache(model.config.sliding_window)
        found.setdefault("modules", []).append([(name, type(module)) for name, module in model.named_modules()])
        found.setdefault("config", []).append(model.config)
        found.setdefault("bytes", []).append({name: t.nbytes for name, t in model.state_dict().items()})
        found.setdefault("logits", []).append(model(tokens).tolist())
        found.setdefault("cached logits", []).append([model(part, cache).tolist() for part in tokens.split([8, 3], 1)])
        found.setdefault("bytes of the cache", []).append(cache.nbytes)
    return [name for name, (first, second) in found.items() if first != second]


def with_a_plainer_module(folder: Path, place: list[str], plain: type[nn.Module]) -> Decoder:
    """What a folder gives back once it describes a module of its second block, by the names down to it, as one of another class."""
    file = folder / "compressed.json"
    about = json.loads(file.read_text())
    module = about["layers"][1]
    for part in place:
        module = module["modules"][part]
    module["class"] = f"{plain.__module__}:{plain.__name__}"
    file.write_text(json.dumps(about))
    return load_compressed(folder)


def llama() -> nn.Module:
    """Transformers' Llama, with grouped heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": BLOCKS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.3, **sizes, **heads)).eval()


def opt() -> nn.Module:
    """Transformers' OPT, with a projection into and out of its blocks."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 40, "num_hidden_layers": BLOCKS}
    config = OPTConfig(vocab_size=VOCABULARY, num_attention_heads=4, init_std=0.3, **sizes, max_position_embeddings=64)
    return OPTForCausalLM(config).eval()


def gpt2() -> nn.Module:
    """Transformers' GPT-2, whose layers keep their weights transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64}
    config = GPT2Config(vocab_size=VOCABULARY, initializer_range=0.3, bos_token_id=0, eos_token_id=0, **sizes)
    return GPT2LMHeadModel(config).eval()


ARCHITECTURES = {"decoder": decoder, "llama": llama, "opt": opt, "gpt2": gpt2}
BLOCK_LISTS = {"decoder": "layers", "llama": "model.layers", "opt": "model.decoder.layers", "gpt2": "transformer.h"}


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    """Name of an architecture."""
    name: str = request.param
    return name


@pytest.fixture
def build(architecture: str) -> Callable[[], nn.Module]:
    """Builds a model of that architecture, the same each time."""
    return ARCHITECTURES[architecture]


@pytest.fixture
def block_list(architecture: str) -> str:
    """Name of its list of blocks."""
    return BLOCK_LISTS[architecture]


@pytest.fixture
def tokens(generator: torch.Generator) -> torch.Tensor:
    """`[3, 11]`."""
    return torch.randint(0, VOCABULARY, (3, 11), generator=generator)


@pytest.fixture
def logits() -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    """`logits(model, tokens)`, of any of the architectures."""

    @torch.no_grad()
    def logits_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        output = model(tokens)
        return output if isinstance(output, torch.Tensor) else output.logits

    return logits_of
