r"""What all position encodings share: where they step into a decoder.

Glossary
    positions   $m$ of queries, $n$ of keys: a token's index in its own row, 0 for the first; below 0 for padding
    rotary      `rotary(positions, dtype) -> (cos, sin)`, turns queries and keys: see `refimpl.model.rope.Rotation`
    score bias  `score_bias(query positions, key positions)`, added to scores: see `refimpl.model.step.ScoreBias`
    embedding   vectors that are added to those of the tokens, before the first layer
    trained context   tokens of the longest text in training, `Config.max_positions`

A method is a configuration. It says what it puts in each of the three places, and nothing is what it leaves out:

Examples:
    >>> from refimpl.model.model import initialize_
    >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
    >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))  # rotary, as `config.rope` says
    >>> model = NoPositions().install(model)
    >>> tokens = torch.tensor([[5, 7, 33, 8]])
    >>> torch.allclose(model(tokens[:, :1])[:, -1], model(tokens[:, [0, 0, 0, 0]])[:, -1], atol=1e-6)  # 1 and 4 look alike
    True

A method that is put onto a trained rotary model, instead of training one from scratch, says so by `extends`. What is
learned are parameters of the model: draw its weights first, install, then hand `model.parameters()` to the optimizer.

Invariants, run for every method by `tests/architecture/long_context/positions/test_protocol.py`: a prompt read in
chunks or token by token with a cache equals the whole; a row padded at the left equals the row alone; the order of
tokens matters; moving all positions changes nothing if the method is `relative`; what was installed before is gone; a
copy of the model stands for itself; gradients reach every parameter; a model's own parameters are not written, nor its
dtype left; the same generator gives the same model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from refimpl.model.config import Config
from refimpl.model.model import Attention, Block, Decoder
from refimpl.model.rope import Rotation
from refimpl.model.step import ScoreBias, Step

Embedding = Callable[[Tensor, torch.dtype], Tensor]
RotaryFunction = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]


class Positions:
    """A method: a frozen dataclass of settings that overrides the places it uses.

    What a place holds is any callable of that form; one with parameters, or one that acts in training only, is a
    `torch.nn.Module`, and so is trained, saved, moved and switched to `eval()` with the model.

    Attributes:
        relative: whether outputs stay the same when all positions move by as much.
        extends: whether it is put onto a trained rotary model, to read beyond its trained context.
    """

    relative: ClassVar[bool] = False
    extends: ClassVar[bool] = False

    def embedding(self, config: Config, generator: torch.Generator | None) -> Embedding | None:  # noqa: ARG002
        """Vectors of positions: `[batch or 1, time]`, none below 0, and a dtype, to `[batch or 1, time, d_model]`."""
        return None

    def rotary(self, config: Config, generator: torch.Generator | None) -> RotaryFunction | None:  # noqa: ARG002
        """How queries and keys are turned."""
        return None

    def score_bias(
        self,
        config: Config,  # noqa: ARG002 - a method's, as the next
        generator: torch.Generator | None,  # noqa: ARG002
    ) -> ScoreBias | Sequence[ScoreBias] | None:
        """What is added to scores: the same in every layer, or one for each."""
        return None

    def tuning_length(self, trained: int) -> int | None:  # noqa: ARG002
        """Tokens of the texts that an extended model is tuned on, given its trained context; None where it is not tuned."""
        return None

    def install(self, model: Decoder, generator: torch.Generator | None = None) -> Decoder:
        """Put the method into a decoder, in place, instead of what it had; what is drawn comes from `generator`.

        Returns:
            The model.

        Raises:
            ValueError: the method does not fit the model. The model is then unchanged.
        """
        config, device = model.config, model.embedding.weight.device
        embedding, rotary, bias = (f(config, generator) for f in (self.embedding, self.rotary, self.score_bias))
        own = list(bias) if isinstance(bias, Sequence) else []
        if own and len(own) != config.n_layers:
            raise ValueError(f"{len(own)} score biases must be one, or one for each of {config.n_layers} layers")
        first: Block = model.layers[0]  # type: ignore[assignment]
        _put(model, "rotary", rotary or Rotation(torch.zeros(config.head_dim // 2)), device)  # none is a turn by 0
        _put(model, "score_bias", None if own else bias, device)
        _put(first, "position_embedding", embedding, device, _add_embedding)
        for i, layer in enumerate(model.layers):
            _put(layer.attention, "own_score_bias", own[i] if own else None, device, _use_own_bias)  # type: ignore[arg-type]
        return model


@dataclass(frozen=True)
class NoPositions(Positions):
    """Nothing anywhere: the causal mask alone tells the order (arXiv 2305.19466)."""

    relative: ClassVar[bool] = True


def distances(queries: Tensor, keys: Tensor, n_heads: int) -> Tensor:
    """How far each key lies behind each query, for a score bias; below 0 where it lies ahead.

    Args:
        queries: positions `[batch or 1, 1, time, 1]`.
        keys: positions `[batch or 1, 1 or kv_heads, 1, kept]`; where a cache keeps other keys in each key head, they differ.
        n_heads: query heads; head h reads key head h // (n_heads / kv_heads).

    Returns:
        `[batch or 1, 1 or n_heads, time, kept]`.

    Examples:
        >>> distances(torch.tensor([4, 5]).view(1, 1, 2, 1), torch.tensor([0, 4]).view(1, 1, 1, 2), 3).tolist()
        [[[[4, 0], [5, 1]]]]
    """
    apart = queries - keys
    return apart if apart.shape[1] == 1 else apart.repeat_interleave(n_heads // apart.shape[1], dim=1)


def _put(owner: nn.Module, name: str, value: Any, device: torch.device, hook: Any = None) -> None:
    """Set an attribute that may or may not be a module, on the device; with `hook`, let it act before the forward.

    A hook is registered with the first value and stays; it does nothing while the value is None.
    """
    there = hasattr(owner, name)
    if not there and value is None:
        return
    if hook is not None and not there:
        owner.register_forward_pre_hook(hook)
    if isinstance(getattr(owner, name, None), nn.Module):
        delattr(owner, name)
    setattr(owner, name, value.to(device) if isinstance(value, nn.Module) else value)


def _add_embedding(block: Block, inputs: tuple[Tensor, Step]) -> tuple[Tensor, Step]:
    """Before the first layer: add the positions' vectors."""
    embedding: Embedding | None = block.position_embedding  # type: ignore[assignment]
    x, step = inputs
    return inputs if embedding is None else (x + embedding(step.positions.clamp(min=0), x.dtype), step)


def _use_own_bias(attention: Attention, inputs: tuple[Tensor, Step]) -> tuple[Tensor, Step]:
    """Before a layer's attention: its own bias in the place of the decoder's, and masks that no other layer shares."""
    bias: ScoreBias | None = attention.own_score_bias  # type: ignore[assignment]
    x, step = inputs
    return inputs if bias is None else (x, replace(step, score_bias=bias, _masks={}))
