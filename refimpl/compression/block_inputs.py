r"""What each block of a model gets and returns on calibration data, for methods that fit one block after the other to its original.

Examples:
    >>> import torch
    >>> from refimpl.model.config import Config
    >>> from refimpl.model.model import Decoder
    >>> model = Decoder(Config(vocabulary=9, d_model=8, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=6))
    >>> with torch.no_grad():
    ...     first, second = block_inputs(model, "layers", [torch.arange(5)[None]])
    >>> torch.equal(first[0][1], second[0][0])  # what a block returns is what the next one gets
    True
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from refimpl.compression.calibration import call

# A block's input, its output, and what else it is called with.
Given = tuple[Tensor, Tensor, tuple[Any, ...], dict[str, Any]]


def block_inputs(model: nn.Module, name: str, batches: list[Any]) -> Iterator[list[Given]]:
    """What each block gets and returns, batch by batch; a block is run before it is given out, and may be changed then.

    Args:
        model: a decoder, whose blocks run one after the other.
        name: of its list of blocks.
        batches: what it is called with.

    Raises:
        ValueError: the model can't take a batch.
    """
    blocks = model.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)
    calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in blocks]
    streams: list[Tensor] = []

    def watch(place: int) -> Any:
        def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
            kwargs = {key: without_cache(value) for key, value in kwargs.items()}
            x = args[0] if args else kwargs.pop("hidden_states")
            if place == 0:
                streams.append(x.clone())
            calls[place].append((tuple(map(without_cache, args[1:])), kwargs))

        return note

    with ExitStack() as hooks:
        for place, block in enumerate(blocks):
            hooks.enter_context(block.register_forward_pre_hook(watch(place), with_kwargs=True))
        for i, batch in enumerate(batches):
            call(model, batch, i)
    for block, others in zip(blocks, calls, strict=True):
        outputs = [hidden_states(block(x, *args, **kwargs)) for x, (args, kwargs) in zip(streams, others, strict=True)]
        yield [(x, y, *other) for x, y, other in zip(streams, outputs, others, strict=True)]
        streams = outputs


def without_cache(value: Any) -> Any:
    """A module's argument, but for transformers' cache of keys and values, which a second run would lengthen."""
    return None if hasattr(value, "get_seq_length") else value


def hidden_states(output: Any) -> Tensor:
    """The hidden states of what a block returned."""
    hidden = output if isinstance(output, Tensor) else output[0]
    assert isinstance(hidden, Tensor)
    return hidden


def to_float(value: Any) -> Any:
    """The same with all floating-point tensors in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(map(to_float, value))
    return {key: to_float(part) for key, part in value.items()} if type(value) is dict else value
