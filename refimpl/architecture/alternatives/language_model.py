r"""A language model of sequence mixers: embedding, blocks of norm, mixer and residual, norm, output layer.

Source: `mamba` (arXiv 2312.00752), Section 3.4 and Figure 3: one kind of block and no separate feed-forward; official code
state-spaces/mamba@60dadf2e0ee730ac337035d5533de10bc26e4847, mamba_ssm/models/mixer_seq_simple.py.

Differs from the paper: none; sums of the residual stream are float32 at least, as the official code's default has it.

Not here: left padding, feed-forward layers (a mixer that has one brings it), dropout.

It is called as `refimpl.model.model.Decoder` is, with `States` in the place of a cache, so that `generate` and whatever reads
logits from a decoder works on it:

Examples:
    >>> import torch
    >>> from refimpl.architecture.alternatives.softmax_attention import SoftmaxAttention
    >>> generator = torch.Generator().manual_seed(0)
    >>> config = LanguageModelConfig(vocabulary=61, d_model=32, n_layers=2)
    >>> model = LanguageModel(config, lambda layer: SoftmaxAttention(head_dim=8).build(32, generator)).initialize(generator)
    >>> tokens, states = torch.arange(10).view(2, 5), States()
    >>> whole, first, second = model(tokens), model(tokens[:, :3], states), model(tokens[:, 3:], states)
    >>> whole.shape, torch.allclose(whole, torch.cat((first, second), dim=1), atol=1e-6), states.length
    (torch.Size([2, 5, 61]), True, 5)
    >>> model.generate(tokens[:, :2], 3).shape
    torch.Size([2, 3])
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.architecture.alternatives.protocol import Mixer, State, state_bytes
from refimpl.model.generate import generate
from refimpl.model.model import Decoder, RMSNorm


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """Shape of a model, but for its mixers.

    Args:
        vocabulary: tokens that the embedding knows.
        d_model: width of the residual stream.
        n_layers: blocks.
        norm_eps: added to the mean square in RMSNorm.
        tied_embeddings: whether the output layer is the embedding.
    """

    vocabulary: int
    d_model: int
    n_layers: int
    norm_eps: float = 1e-5
    tied_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("vocabulary", "d_model", "n_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


class States:
    """The past of a model: the state of each layer. What a cache is to a decoder; `reset` before another text."""

    def __init__(self) -> None:
        self.length = 0  # tokens seen
        self.layers: list[State] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' states."""
        return state_bytes(self.layers)

    def compress_prefill(self) -> None:
        """Nothing: `generate` calls it between prompt and decoding."""

    def reset(self) -> None:
        """Forget everything."""
        self.length, self.layers = 0, []


class LanguageModel(nn.Module):
    """Tokens to logits.

    Args:
        config: its shape.
        mixer: the mixer of each layer, by index.
    """

    def __init__(self, config: LanguageModelConfig, mixer: Callable[[int], Mixer]) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.d_model)
        self.layers = nn.ModuleList(Block(config, mixer(layer)) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = None if config.tied_embeddings else nn.Linear(config.d_model, config.vocabulary, bias=False)

    def initialize(self, generator: torch.Generator | None = None, std: float = 0.02) -> "LanguageModel":
        r"""Draw embedding and output layer, and divide the mixers' `out_proj` by $\sqrt{layers}$: once, as the official code does."""
        for table in (self.embedding, self.lm_head):
            if table is not None:
                nn.init.normal_(table.weight, std=std, generator=generator)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("mixer.out_proj.weight"):
                    parameter.div_(self.config.n_layers**0.5)
        return self

    def forward(self, tokens: Tensor, states: States | None = None, padding: Tensor | None = None) -> Tensor:
        """Logits of the token after each of these, `[batch, time, vocabulary]` in the parameters' dtype.

        Args:
            tokens: `[batch, time]`, or embeddings `[batch, time, d_model]`.
            states: the past; it takes these tokens in. None stands for no past and keeps nothing.
            padding: must be None, or 0 for every row: a state can't leave tokens out. Run rows of one length.

        Raises:
            ValueError: shapes do not fit, another batch than that of the past, or padding.
        """
        return self.logits(self.hidden(tokens, states, padding))

    def hidden(self, tokens: Tensor, states: States | None = None, padding: Tensor | None = None) -> Tensor:
        """`forward` without the output layer: `[batch, time, d_model]`, normalized."""
        if tokens.ndim not in (2, 3) or 0 in tokens.shape:
            raise ValueError(
                f"tokens of shape {tuple(tokens.shape)} must be [batch, time] or [batch, time, d_model], not empty"
            )
        if padding is not None and bool((padding != 0).any()):
            raise ValueError(f"padding={padding.tolist()}: a state takes in every token; run rows of one length")
        states = States() if states is None else states
        past = states.layers or [block.mixer.initial_state(len(tokens)) for block in self.blocks]
        if _batch(past) != len(tokens):
            raise ValueError(f"the states hold a batch of {_batch(past)}, and get {len(tokens)}: reset() them first")
        x = self.embedding(tokens) if tokens.ndim == 2 else tokens
        after = []
        for block, state in zip(self.blocks, past, strict=True):
            x, state = block(x, state)
            after.append(state)
        states.layers, states.length = after, states.length + tokens.shape[1]
        return self.norm(x.to(self.norm.weight.dtype))  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer, `[..., d_model]` to `[..., vocabulary]`."""
        return F.linear(hidden, self.embedding.weight) if self.lm_head is None else self.lm_head(hidden)

    def generate(self, tokens: Tensor, n: int, **options: Any) -> Tensor:
        """Continue prompts by up to `n` tokens; see `refimpl.model.generate.generate`, whose options these are."""
        options.setdefault("cache", States())
        return generate(cast(Decoder, self), tokens, n, **options)

    @property
    def blocks(self) -> "list[Block]":
        """The layers, with their type."""
        return cast("list[Block]", list(self.layers))

    def assign(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, source: str | Path) -> "LanguageModel":
        """Take parameters over from a checkpoint, and return the model in evaluation mode.

        Args:
            tensors: by this model's names; an output layer that is tied may be among them.
            dtype: of all parameters; None is that of the embedding.
            source: named in messages.

        Raises:
            ValueError: tensors are missing, unexpected or misshapen; all faults are told at once.
        """
        stored, expected = dict(tensors), {name: value.shape for name, value in self.named_parameters()}
        head = None if "lm_head.weight" in expected else stored.pop("lm_head.weight", None)
        faults = [f"{name} is missing" for name in sorted(expected.keys() - stored.keys())]
        faults += [f"{name} is unexpected" for name in sorted(stored.keys() - expected.keys())]
        faults += [
            f"{name} has shape {list(stored[name].shape)}, config.json says {list(expected[name])}"
            for name in sorted(expected.keys() & stored.keys())
            if stored[name].shape != expected[name]
        ]
        if head is not None and not faults and not torch.equal(head, stored["embedding.weight"]):
            faults = ["lm_head.weight is not the embedding, but config.json says that they are tied"]
        if faults:
            raise ValueError(f"{source}: the tensors are not those of config.json: {'; '.join(faults[:8])}")
        kind = dtype or stored["embedding.weight"].dtype
        self.load_state_dict({name: value.to(kind) for name, value in stored.items()}, assign=True)
        return self.eval()


class Block(nn.Module):
    """One layer: normalized before, added after."""

    def __init__(self, config: LanguageModelConfig, mixer: Mixer) -> None:
        super().__init__()
        self.norm, self.mixer = RMSNorm(config.d_model, config.norm_eps), mixer

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """`[batch, time, d_model]` and a state to the same."""
        normal = self.norm(x.to(self.norm.weight.dtype))
        if x.shape[1] == 1:
            y, state = self.mixer.step(normal[:, 0], state)
            y = y.unsqueeze(1)
        else:
            y, state = self.mixer.extend(normal, state)
        return x.to(torch.promote_types(x.dtype, torch.float32)) + y, state


def _batch(states: State) -> int:
    """Rows of the first tensor in it."""
    while not isinstance(states, Tensor):
        states = states[0]
    return len(states)
