r"""RWKV, version 4: a running weighted average with a decay for each channel, gated, and a gated feed-forward; no attention.

Source: `rwkv` (arXiv 2305.13048), Eqs. (11) to (18), Section 3.4 and Appendix E; official code
BlinkDL/RWKV-LM@524481d5099b38d9bc8ef1e89209161b86c8011b, RWKV-v4neo/src/model.py and RWKV-v4neo/cuda/wkv_cuda.cu.

Differs from the paper: matrices start as in the official code, where what a branch adds is zero and values over time and keys
over channels are orthogonal; Appendix E has it the other way round, what a branch adds normal and all others zero. `build`
draws every matrix; the zeros, after which a layer adds nothing before its first step, are set by the language model's
`initialize`. Embeddings start uniform in $\pm 10^{-4}$ as in Appendix E, where v4neo takes the learning rate for the bound. The
sums are float32 at least in any model.

Comes trained: `rwkv.safetensors`, from random weights on the testbed's rows, 2,600 steps of 8,192 tokens, for the arena long-context
(`python -m tools.mixers rwkv --d-model 160 --no-tied`).

Not here: later versions, the auxiliary loss on the largest logit, learning rates of their own for decays and bonuses, left
padding, halving the stream every six layers for 16 bits.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from refimpl.architecture.alternatives.checkpoint import read_checkpoint
from refimpl.architecture.alternatives.language_model import LanguageModelConfig
from refimpl.architecture.alternatives.other.channel_mixing import ChannelMixing
from refimpl.architecture.alternatives.other.time_mixing import TimeMixing
from refimpl.architecture.alternatives.other.two_branch_model import TwoBranchModel

EMBEDDING = 1e-4  # bound of the embeddings at the start


@dataclass(frozen=True, kw_only=True)
class RWKV:
    r"""The settings of a layer.

    Args:
        channels: of the time mixing, each with its own decay; None is the model's width.
        d_ff: hidden width of the channel mixing; None is four times the model's.

    Examples:
        >>> mixer = RWKV().build(8, torch.Generator().manual_seed(0))
        >>> mixer(torch.ones(1, 5, 8)).shape, mixer.initial_state(1).sums.exponent.shape
        (torch.Size([1, 5, 8]), torch.Size([1, 8]))
        >>> config = LanguageModelConfig(vocabulary=61, d_model=8, n_layers=2, tied_embeddings=False)
        >>> RWKV().language_model(config, torch.Generator().manual_seed(0))(torch.arange(6).view(2, 3)).shape
        torch.Size([2, 3, 61])
    """

    channels: int | None = None
    d_ff: int | None = None

    def __post_init__(self) -> None:
        for name in ("channels", "d_ff"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")

    def build(
        self, d_model: int, generator: torch.Generator | None = None, layer: int = 0, n_layers: int = 1
    ) -> "TimeMixing":
        """The time mixing of one of the layers: decays and mixtures start differently from layer to layer."""
        if d_model < 1:
            raise ValueError(f"d_model={d_model} must be at least 1")
        if not 0 <= layer < n_layers:
            raise ValueError(f"layer={layer} must be in 0 to {n_layers - 1}, n_layers={n_layers}")
        return TimeMixing(d_model, self.channels or d_model, generator, layer, n_layers)

    def language_model(self, shape: LanguageModelConfig, generator: torch.Generator | None = None) -> "RWKVModel":
        """A model of such layers with the paper's initial values; its output layer is not tied in the paper."""
        return RWKVModel(shape, self, generator).initialize(generator)


class RWKVModel(TwoBranchModel):
    """Tokens to logits: embedding and its normalization, layers of time and channel mixing, normalization, output layer."""

    def __init__(self, config: LanguageModelConfig, method: RWKV, generator: torch.Generator | None = None) -> None:
        d, n = config.d_model, config.n_layers
        super().__init__(
            config,
            lambda layer: method.build(d, generator, layer, n),
            lambda layer: ChannelMixing(d, method.d_ff or 4 * d, generator, layer, n),
            nn.LayerNorm,
        )
        self.embedding_norm = nn.LayerNorm(d, config.norm_eps)

    def embedded(self, x: Tensor) -> Tensor:
        """Normalized, so that tiny embeddings move fast at the start."""
        out: Tensor = self.embedding_norm(x.to(self.embedding_norm.weight.dtype))
        return out

    def initialize(self, generator: torch.Generator | None = None, std: float = EMBEDDING) -> "RWKVModel":
        """Embeddings uniform within `std`, an orthogonal output layer of half the usual size, and zero for each matrix that
        starts so: keys and receptances over time, receptances over channels, and what either branch adds.
        """
        nn.init.uniform_(self.embedding.weight, -std, std, generator=generator)
        if self.lm_head is not None:
            gain = 0.5 * max(1.0, self.config.vocabulary / self.config.d_model) ** 0.5
            nn.init.orthogonal_(self.lm_head.weight, gain, generator=generator)
        for block in self.blocks:
            over_time = isinstance(block.mixer, TimeMixing)
            for name in ("key", "receptance", "output") if over_time else ("receptance", "value"):
                nn.init.zeros_(block.mixer.get_parameter(f"{name}.weight"))
        return self


def load(path: str | Path, dtype: torch.dtype | None = None) -> RWKVModel:
    """An RWKV-4 language model from a local folder in Hugging Face's layout, in evaluation mode.

    Args:
        path: folder with config.json (`RwkvForCausalLM`) and safetensors.
        dtype: of all parameters; None keeps the embedding's.

    Raises:
        FileNotFoundError: no config.json or no weights.
        ValueError: another architecture, a setting that is not supported, or tensors that do not fit.
    """
    given, tensors = read_checkpoint(
        path,
        "RwkvForCausalLM",
        plain={"layer_norm_epsilon": (1e-5,)},  # the last normalization has it whatever the setting says
        renames={
            "rwkv.embeddings.": "embedding.",
            "rwkv.ln_out.": "norm.",
            "rwkv.blocks.0.pre_ln.": "embedding_norm.",
            "rwkv.blocks.": "layers.",
            "head.": "lm_head.",
        },
    )
    shape = LanguageModelConfig(
        vocabulary=given.get("vocab_size", 50277),
        d_model=given.get("hidden_size", 4096),
        n_layers=given.get("num_hidden_layers", 32),
        tied_embeddings=given.get("tie_word_embeddings", False),
    )
    config = RWKV(channels=given.get("attention_hidden_size"), d_ff=given.get("intermediate_size"))
    with torch.device("meta"):
        model = RWKVModel(shape, config)
    model.assign({_ours(name): _flat(name, value) for name, value in tensors.items()}, dtype, source=path)
    return model


def _ours(name: str) -> str:
    """`layers.3.ln2.` is the normalization of the second branch of layer 3, which is entry 7."""
    found = re.fullmatch(r"layers\.(\d+)\.(ln1|ln2|attention|feed_forward)\.(.*)", name)
    if found is None:
        return name
    layer, part, rest = found.groups()
    return f"layers.{2 * int(layer) + (part in ('ln2', 'feed_forward'))}.{'norm' if 'ln' in part else 'mixer'}.{rest}"


def _flat(name: str, value: Tensor) -> Tensor:
    """Mixtures are stored as `[1, 1, d_model]`."""
    return value.flatten() if ".time_mix_" in name else value
