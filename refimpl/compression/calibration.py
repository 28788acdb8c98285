r"""What reaches each layer of a model on calibration data, while the layers before it are being compressed.

Layers that are called with the same tensor (queries, keys and values) share one run. Blocks that are finished are not run
again: their last output is kept, and stands in for all of them. So a model of L blocks with g groups of layers each costs
(g + 1) L runs of a block, where running the whole model for each layer costs the square of L.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from refimpl.compression.blocks import block_lists


def batches_of(calibration: Iterable[Any], need: str | None = None) -> list[Any]:
    """Calibration data as a list of batches.

    Args:
        calibration: what a caller gave.
        need: who can't do without it, and for what, "SVDLLM needs texts"; None lets it be empty.

    Raises:
        ValueError: it is one batch instead of a list, or holds what is neither tensor nor mapping, or an empty tensor; there is
            none although it is needed.
    """
    if isinstance(calibration, Tensor | Mapping | str):
        raise ValueError(
            f"calibration is one {type(calibration).__name__} and must be a list of batches, each a tensor or a dict of "
            "keyword arguments: put it in [ ]"
        )
    batches = list(calibration)
    for i, batch in enumerate(batches):
        if not isinstance(batch, Tensor | Mapping):
            raise ValueError(
                f"calibration batch {i} is a {type(batch).__name__} and must be a tensor or a dict of keyword arguments"
            )
        if any(isinstance(value, Tensor) and value.numel() == 0 for value in _values(batch)):
            raise ValueError(f"calibration batch {i} is empty: {_describe(batch)}; leave it out")
    if need and not batches:
        raise ValueError(f"{need}: pass `calibration`")
    return batches


def call(model: nn.Module, batch: Any, i: int = 0) -> Any:
    """Run a model on calibration batch `i`.

    Raises:
        ValueError: the model can't take it.
    """
    try:
        return model(**batch) if isinstance(batch, Mapping) else model(batch)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"the model can't take calibration batch {i}, {_describe(batch)}: {error}") from error


@torch.no_grad()
def inputs_by_group(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: list[Any]
) -> Iterator[tuple[list[str], Tensor]]:
    """Layers that see the same inputs, in the order in which the model calls them, and these inputs.

    The caller replaces the layers that it is given before it asks for the next ones, whose inputs then come from what it
    put there.

    Args:
        model: in evaluation mode.
        layers: modules of it that take one tensor, by name.
        batches: at least one, as `batches_of` gives them.

    Yields:
        Names, and inputs `[n, in]`, one row a token, in the dtype that reaches the layers.

    Raises:
        ValueError: a layer is never reached, or gets NaN or infinity; the model can't take a batch.
    """
    recorder = _record(model, layers, batches)
    for name in layers:
        if name not in recorder.calls:
            raise ValueError(f"the calibration data never reaches layer {name!r}; leave it out by `skip`")
    replay = _Replay(model, batches, recorder.blocks if recorder.chained else "")
    for names, place in _groups(recorder):
        inputs = replay.inputs_of(names[0], place)
        if not torch.isfinite(inputs).all():
            raise ValueError(f"the calibration data makes NaN or infinity in the inputs of layer {names[0]!r}")
        yield names, inputs
        if place is None:
            replay.forget()


@dataclass
class _Recorder:
    """Who was called with what, in the order of first calls: `calls[name]` numbers the tensors over all batches."""

    blocks: str  # name of the list of blocks, "" if there is none
    calls: dict[str, list[int]] = field(default_factory=dict)
    chained: bool = True  # whether blocks run in order, once a batch, each on what the one before it returned
    seen: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)  # tensor → version, number
    tensors: int = 0
    at: int = 0
    last: Any = None

    def layer(self, name: str, args: Any, kwargs: Any) -> None:
        tensor = _first(args, kwargs)
        version = None if tensor.is_inference() else tensor._version  # written in place, it is another one
        known = self.seen.get(tensor)  # type: ignore[no-untyped-call]
        if known is None or known[0] != version or version is None:
            self.tensors += 1
            known = self.seen[tensor] = (version, self.tensors)
        self.calls.setdefault(name, []).append(known[1])

    def enter(self, place: int, args: Any, kwargs: Any) -> None:
        self.chained &= place == self.at and (place == 0 or _first(args, kwargs) is _first(self.last, {}))
        self.at += 1

    def leave(self, output: Any) -> None:
        self.last = output


def _record(model: nn.Module, layers: Mapping[str, nn.Module], batches: list[Any]) -> _Recorder:
    """Run the model once on every batch and watch."""
    lists = block_lists(model)
    largest = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()), default="")
    recorder = _Recorder(largest)
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(_watch(recorder.layer, name), with_kwargs=True))
        for place, block in enumerate(lists.get(largest, [])):
            hooks.enter_context(block.register_forward_pre_hook(_watch(recorder.enter, place), with_kwargs=True))
            hooks.enter_context(block.register_forward_hook(lambda _module, _args, output: recorder.leave(output)))
        for i, batch in enumerate(batches):
            recorder.at, recorder.last = 0, None
            call(model, batch, i)
            recorder.chained &= recorder.at == len(lists.get(largest, []))
    return recorder


def _groups(recorder: _Recorder) -> Iterator[tuple[list[str], int | None]]:
    """Names of layers with equal calls, and the place of the block that holds them all."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, calls in recorder.calls.items():
        groups.setdefault(tuple(calls), []).append(name)
    prefix = f"{recorder.blocks}."
    for names in groups.values():
        places = {int(n.removeprefix(prefix).split(".")[0]) if n.startswith(prefix) else None for n in names}
        yield names, places.pop() if recorder.chained and recorder.blocks and len(places) == 1 else None


class _Reached(Exception):
    """The block of interest has run; the rest of the model need not."""


class _Replay:
    """Runs a model whose first blocks are finished, without running them."""

    def __init__(self, model: nn.Module, batches: list[Any], blocks: str) -> None:
        self.model, self.batches, self.blocks = model, batches, blocks
        self.forget()

    def forget(self) -> None:
        """Something before the blocks has changed: their outputs no longer hold."""
        self.finished, self.outputs = 0, [None] * len(self.batches)

    def inputs_of(self, name: str, place: int | None) -> Tensor:
        """What reaches a layer in block `place`, or anywhere if that is None."""
        rows: list[Tensor] = []
        if place is not None:
            while self.finished < place:
                self.outputs = [self._run(i, self.finished) for i in range(len(self.batches))]
                self.finished += 1
        layer = self.model.get_submodule(name)

        def record(_module: nn.Module, args: Any, kwargs: Any) -> None:
            tensor = _first(args, kwargs).detach()
            rows.append(tensor.reshape(-1, tensor.shape[-1]).clone())

        with layer.register_forward_pre_hook(record, with_kwargs=True):
            for i in range(len(self.batches)):
                self._run(i, place)
        return torch.cat(rows)

    def _run(self, i: int, place: int | None) -> Any:
        """Run batch i up to block `place` and return that block's output; all of the model if it is None."""
        if place is None:
            return call(self.model, self.batches[i], i)
        reached: list[Any] = []
        block = self.model.get_submodule(f"{self.blocks}.{place}")
        forward = block.forward

        def stop(*args: Any, **kwargs: Any) -> None:
            reached.append(forward(*args, **kwargs))
            raise _Reached

        def stand_in(*_args: Any, **_kwargs: Any) -> Any:
            return _copy(self.outputs[i])

        with ExitStack() as restored:
            for j in range(self.finished):  # inside of whatever hooks a block has, which then run as ever
                _substitute(restored, self.model.get_submodule(f"{self.blocks}.{j}"), stand_in)
            _substitute(restored, block, stop)
            with suppress(_Reached):
                call(self.model, self.batches[i], i)
        return reached[0]


def _substitute(stack: ExitStack, block: nn.Module, forward: Callable[..., Any]) -> None:
    """Give a block another forward until the stack is left."""
    own = vars(block)
    before = {"forward": own.pop("forward")} if "forward" in own else {}
    stack.callback(own.update, before)
    stack.callback(own.pop, "forward")  # runs first
    own["forward"] = forward


def _watch(note: Callable[[Any, Any, Any], None], what: Any) -> Callable[[nn.Module, Any, Any], None]:
    """A hook before a forward that calls `note(what, args, kwargs)`."""
    return lambda _module, args, kwargs: note(what, args, kwargs)


def _first(args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """The first tensor of a call, or of what a block returned."""
    values = [args] if isinstance(args, Tensor) else [*(args or ()), *kwargs.values()]
    return next(value for value in values if isinstance(value, Tensor))


def _copy(output: Any) -> Any:
    """A block's output again, safe from what is written into it."""
    if isinstance(output, Tensor):
        return output.clone()
    return type(output)(_copy(part) for part in output) if type(output) in (tuple, list) else output


def _values(batch: Any) -> list[Any]:
    return list(batch.values()) if isinstance(batch, Mapping) else [batch]


def _describe(batch: Any) -> str:
    """A batch in words: shapes and dtypes."""
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key}: {_describe(value)}" for key, value in batch.items()) + "}"
    return f"{list(batch.shape)} of {batch.dtype}" if isinstance(batch, Tensor) else type(batch).__name__
