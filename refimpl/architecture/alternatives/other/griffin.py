r"""Griffin: two blocks of a gated linear recurrence, one of local attention, and so on; a gated feed-forward after each.

Source: `griffin` (arXiv 2402.19427), Sections 2.1 to 2.4, Eqs. (1) to (6), and Section 3 for pattern and window; official code
google-deepmind/recurrentgemma@2efa84dac0e68e63547a27a18fa943c98f1c312e, recurrentgemma/torch/modules.py, layers.py, griffin.py.

Differs from the paper: decays start with $a$ itself between 0.9 and 0.999, uniform in $a^2$, and convolutions with a standard
deviation of 0.05, as in the official code; the paper draws $a^c$ there. The recurrence is as wide as the model unless a width
is given, as in RecurrentGemma; the paper has about four thirds of it. A layer that `build` makes alone is a run of the
pattern's blocks, each normalized before and added after, without feed-forward; a language model has them one by one.
Recurrences are float32 at least in any model.

Comes trained: `griffin.safetensors`, from random weights on the testbed's rows, 2,600 steps of 8,192 tokens, for the arena long-context
(`python -m tools.mixers griffin --d-model 192 --settings '{"window": 256}'`).

Not here: several texts in a row of tokens, the fused kernel, left padding, more heads of keys and values.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from refimpl.architecture.alternatives.checkpoint import read_checkpoint
from refimpl.architecture.alternatives.language_model import LanguageModelConfig
from refimpl.architecture.alternatives.other.griffin_blocks import (
    AttentionBlock,
    GatedMLP,
    RecurrentBlock,
    ZeroCentredRMSNorm,
)
from refimpl.architecture.alternatives.other.two_branch_model import TwoBranchModel
from refimpl.architecture.alternatives.protocol import Mixer, State

BlockType = Literal["recurrent", "attention"]
LAST = {
    RecurrentBlock: "linear_out",
    AttentionBlock: "o_proj",
    GatedMLP: "down_proj",
}  # what a branch adds comes from it


@dataclass(frozen=True, kw_only=True)
class Griffin:
    r"""The settings of a model's layers.

    Args:
        pattern: kinds of blocks, again and again; of `("recurrent",)` alone the model is the paper's Hawk.
        n_heads: of the attention's queries, and blocks on the diagonal of the recurrence's gates. The paper has 32 at 7 billion
            parameters; this default is ours.
        lru_width: channels of the recurrence; None is the model's width. The paper's 7 billion have 5,632 for 4,096.
        window: positions before its own that attention sees.
        d_conv: width of the causal convolution, in positions.
        d_ff: width of each branch of the feed-forward; None is three times the model's.

    Examples:
        >>> mixer = Griffin(n_heads=2, window=16).build(8, torch.Generator().manual_seed(0))
        >>> mixer(torch.ones(1, 5, 8)).shape, len(mixer.initial_state(1))
        (torch.Size([1, 5, 8]), 3)
        >>> config = LanguageModelConfig(vocabulary=61, d_model=8, n_layers=3)
        >>> model = Griffin(n_heads=2).language_model(config, torch.Generator().manual_seed(0))
        >>> model(torch.arange(6).view(2, 3)).shape
        torch.Size([2, 3, 61])
    """

    pattern: tuple[BlockType, ...] = ("recurrent", "recurrent", "attention")
    n_heads: int = 4
    lru_width: int | None = None
    window: int = 1024
    d_conv: int = 4
    d_ff: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", tuple(self.pattern))
        if not self.pattern or set(self.pattern) - {"recurrent", "attention"}:
            raise ValueError(f"pattern={self.pattern} must be of 'recurrent' and 'attention', at least one")
        for name in ("n_heads", "lru_width", "window", "d_conv", "d_ff"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")

    def block(self, kind: BlockType, d_model: int, generator: torch.Generator | None = None) -> Mixer:
        """One block that mixes positions, drawn as the official code draws those of a model of two.

        Raises:
            ValueError: `n_heads` divides a width badly.
        """
        if d_model < 1:
            raise ValueError(f"d_model={d_model} must be at least 1")
        if kind == "attention":
            return AttentionBlock(d_model, self.n_heads, self.window, generator)
        return RecurrentBlock(d_model, self.lru_width or d_model, self.n_heads, self.d_conv, generator)

    def build(self, d_model: int, generator: torch.Generator | None = None) -> "GriffinMixer":
        """One run of the pattern as a layer."""
        return GriffinMixer(d_model, [self.block(kind, d_model, generator) for kind in self.pattern])

    def language_model(
        self,
        shape: LanguageModelConfig,
        generator: torch.Generator | None = None,
        *,
        scale_embeddings: bool = False,
        logit_cap: float = 0.0,
    ) -> "GriffinModel":
        """A model of such layers with the official code's initial values; RecurrentGemma has the scale, and 30 for the cap."""
        return GriffinModel(shape, self, generator, scale_embeddings, logit_cap).initialize(generator)


class GriffinMixer(Mixer):
    """Blocks one after another, each normalized before and added after; its output is what they add together."""

    def __init__(self, d_model: int, blocks: list[Mixer]) -> None:
        super().__init__()
        self.d_model = d_model
        self.blocks = nn.ModuleList(blocks)
        self.norms = nn.ModuleList(ZeroCentredRMSNorm(d_model, 1e-6) for _ in blocks)

    def initial_state(self, batch: int) -> State:
        """Those of the blocks."""
        return tuple(block.initial_state(batch) for block in self._blocks())

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.extend`."""
        self.check(x)
        return self._run("extend", x, state)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`."""
        return self._run("step", x, state)

    def _run(self, form: Literal["extend", "step"], x: Tensor, state: State) -> tuple[Tensor, State]:
        added, after = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)), []
        for norm, block, past in zip(self.norms, self._blocks(), state, strict=True):
            y, past = getattr(block, form)(norm((x + added).to(x.dtype)), past)
            added = added + y
            after.append(past)
        return added.to(x.dtype), tuple(after)

    def _blocks(self) -> list[Mixer]:
        return [block for block in self.blocks if isinstance(block, Mixer)]


class GriffinModel(TwoBranchModel):
    """Tokens to logits; layers of a block over time and a gated feed-forward.

    Args:
        config: its shape; the paper's `norm_eps` is 1e-6.
        method: settings of the layers.
        generator: source of the weights.
        scale_embeddings: whether embeddings are multiplied by the root of the width, rounded to bfloat16 as in the official code.
        logit_cap: logits are kept below it by a tanh; 0 is none.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        method: Griffin,
        generator: torch.Generator | None = None,
        scale_embeddings: bool = False,
        logit_cap: float = 0.0,
    ) -> None:
        d = config.d_model
        super().__init__(
            config,
            lambda layer: method.block(method.pattern[layer % len(method.pattern)], d, generator),
            lambda _: GatedMLP(d, method.d_ff or 3 * d, generator),
            ZeroCentredRMSNorm,
        )
        self.scale = torch.tensor(d**0.5, device="cpu").bfloat16().item() if scale_embeddings else 1.0
        self.logit_cap = logit_cap

    def embedded(self, x: Tensor) -> Tensor:
        """Scaled, if the model scales them."""
        return x * self.scale if self.scale != 1.0 else x

    def logits(self, hidden: Tensor) -> Tensor:
        """See `LanguageModel.logits`; capped."""
        out = super().logits(hidden)
        return self.logit_cap * (out / self.logit_cap).tanh() if self.logit_cap else out

    def initialize(self, generator: torch.Generator | None = None, std: float | None = None) -> "GriffinModel":
        r"""Draw embedding and output layer with a variance of 1 / width, or `std`, and multiply what each branch ends with by
        $\sqrt{2 / layers}$: once.
        """
        for table in (self.embedding, self.lm_head):
            if table is not None:
                nn.init.normal_(table.weight, std=std or self.config.d_model**-0.5, generator=generator)
        with torch.no_grad():
            for block in self.blocks:
                last = block.mixer.get_parameter(f"{LAST[type(block.mixer)]}.weight")
                last.mul_(math.sqrt(2 / self.config.n_layers))
        return self


def load(path: str | Path, dtype: torch.dtype | None = None) -> GriffinModel:
    """A RecurrentGemma language model from a local folder in Hugging Face's layout, in evaluation mode.

    transformers counts a position's own key into the window, and so do models that are read here; the official code, which the
    published weights were trained with, does not, and sees one key more.

    Args:
        path: folder with config.json (`RecurrentGemmaForCausalLM`) and safetensors.
        dtype: of all parameters; None keeps the embedding's.

    Raises:
        FileNotFoundError: no config.json or no weights.
        ValueError: another architecture, a setting that is not supported, or tensors that do not fit.
    """
    given, tensors = read_checkpoint(
        path,
        "RecurrentGemmaForCausalLM",
        plain={
            "hidden_activation": ("gelu_pytorch_tanh",),
            "attention_bias": (False,),
            "num_key_value_heads": (1,),
            "embeddings_scale_by_sqrt_dim": (True,),
            "partial_rotary_factor": (0.5,),
            "rope_theta": (10_000, 10_000.0),
            "rope_parameters": (
                None,
                {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5, "rope_type": "default"},
            ),
        },
        renames={"model.embed_tokens.": "embedding.", "model.final_norm.": "norm.", "model.": ""},
    )
    d_model = given.get("hidden_size", 2560)
    method = Griffin(
        pattern=given.get("block_types") or Griffin.pattern,
        n_heads=given.get("num_attention_heads", 10),
        lru_width=given.get("lru_width"),
        window=given.get("attention_window_size", 2048) - 1,
        d_conv=given.get("conv1d_width", 4),
        d_ff=given.get("intermediate_size", 3 * 2560) // 2,
    )
    shape = LanguageModelConfig(
        vocabulary=given.get("vocab_size", 256_000),
        d_model=d_model,
        n_layers=given.get("num_hidden_layers", 26),
        norm_eps=given.get("rms_norm_eps", 1e-6),
        tied_embeddings=given.get("tie_word_embeddings", True),
    )
    with torch.device("meta"):
        model = GriffinModel(shape, method, None, True, given.get("logits_soft_cap", 30.0))
    model.assign({_ours(name): value for name, value in tensors.items()}, dtype, source=path)
    return model


def _ours(name: str) -> str:
    """The branches of `layers.3` are entries 6 and 7; the recurrence's parameters lie in its block."""
    found = re.fullmatch(r"layers\.(\d+)\.(temporal|channel|mlp)_(pre_norm|block)\.(?:rg_lru\.)?(.*)", name)
    if found is None:
        return name
    layer, branch, part, rest = found.groups()
    return f"layers.{2 * int(layer) + (branch != 'temporal')}.{'norm' if part == 'pre_norm' else 'mixer'}.{rest}"
