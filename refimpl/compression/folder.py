r"""Compressed models in folders: written, read, and made block by block from a checkpoint that does not fit into memory.

A folder holds config.json and tokenizer.json as the checkpoint had them, the tensors of the ends (embedding, last norm, output layer)
and of each block in safetensors files of their own, and compressed.json, which says what each compressed weight is: its
class and what it holds beside tensors (bits, shape, dtype). Nothing in it is code; classes are looked up in
`refimpl.compression` and nowhere else.

Not here: `compress`, for a model that is in memory; formats of other libraries.

Examples:
    >>> import tempfile
    >>> from refimpl.compression.protocol import compress
    >>> from refimpl.compression.quantization.weight_only.rtn import RTN
    >>> from refimpl.model.config import Config
    >>> from refimpl.model.model import initialize_
    >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
    >>> small = compress(initialize_(Decoder(config)), RTN(bits=4, group_size=32))
    >>> with tempfile.TemporaryDirectory() as place:
    ...     save_compressed(small, f"{place}/small")
    ...     again = load_compressed(f"{place}/small")
    >>> tokens = torch.arange(5)[None]
    >>> torch.equal(again(tokens), small(tokens))
    True
"""

import importlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from refimpl.compression.calibration import batches_of
from refimpl.compression.protocol import CompressedLinear, CompressedWeight, LayerMethod, compress_, matching
from refimpl.model.config_json import config_json, read_config
from refimpl.model.load import Tensors
from refimpl.model.model import Block, Decoder
from refimpl.model.rope import Rotary
from refimpl.model.step import Step, positions_of
from refimpl.model.tensor_files import opened

ENDS, ABOUT = "ends.safetensors", "compressed.json"
DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
FAMILY = "refimpl.compression."


def save_compressed(model: Decoder, folder: str | Path) -> None:
    """Write a decoder whose layers `compress` has replaced.

    Args:
        model: `refimpl.model`'s decoder.
        folder: made new; what is written stands there only when all of it is written.

    Raises:
        FileExistsError: the folder is there already.
        OSError: it can't be written, for want of space or of rights; nothing is left behind.
        ValueError: a compressed weight holds what can't be written down.
    """
    with _fresh(Path(folder)) as place:
        described: dict[str, Any] = {}
        for i, block in enumerate(model.layers):
            described |= _write_block(place, i, block)
        _write_ends(place, {name: t for name, t in model.state_dict().items() if not name.startswith("layers.")})
        _write_about(place, config_json(model.config), described)


def load_compressed(folder: str | Path, device: torch.device | str | None = None) -> Decoder:
    """The decoder in a folder that `save_compressed` or `compress_folder` wrote, in evaluation mode.

    Raises:
        FileNotFoundError: the folder or a file of it is missing.
        ValueError: a file is cut off, or describes what is no compressed weight of `refimpl.compression`.
    """
    place = Path(folder)
    config = read_config(place)
    if not (place / ABOUT).is_file():
        raise FileNotFoundError(f"{place / ABOUT}: no such file; a plain checkpoint is read by refimpl.model.load")
    described: dict[str, Any] = json.loads((place / ABOUT).read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = Decoder(config)
    files = [place / ENDS, *(place / _block_file(i) for i in range(config.n_layers))]
    state: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, of those that {ABOUT} speaks of")
        with opened(file, device) as tensors:
            state |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - it is no dictionary
    for name, about in described.items():
        layer = CompressedLinear(_rebuilt(about, state, f"{name}.compressed", place), state.get(f"{name}.bias"))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    model.load_state_dict(state, assign=True)
    return model.eval()


@torch.no_grad()
def compress_folder(
    source: str | Path,
    destination: str | Path,
    method: LayerMethod,
    calibration: Iterable[Tensor] = (),
    *,
    target: Sequence[str] = ("*",),
    skip: Sequence[str] = ("lm_head",),
    done: Callable[[str], None] = lambda _: None,
) -> None:
    """Compress a checkpoint block by block, so that two blocks are in memory at a time, and never the model.

    What reaches a block is what the compressed blocks before it make of the calibration data, as in `compress`, which gives the
    same weights.

    Args:
        source: folder of a Llama, Mistral, Qwen2 or Qwen3 checkpoint; left unchanged.
        destination: folder that is made; what is written stands there only when all of it is.
        method: applied to the linear layers of the blocks.
        calibration: batches `[rows, time]` of tokens.
        target: patterns of the names of layers to compress, as in `compress`.
        skip: patterns of those to leave.
        done: called with each layer's name when it is finished.

    Raises:
        FileExistsError: the destination is there already.
        FileNotFoundError: the source lacks a file.
        OSError: the destination can't be written; nothing is left behind.
        ValueError: the source is no checkpoint that `refimpl.model` reads; the patterns match nothing, or the output layer; the
            calibration data does not fit.
    """
    tensors = Tensors(Path(source))
    config = tensors.config
    with torch.device("meta"):
        names = list(matching(Decoder(config), target, skip))
    outside = [name for name in names if not name.startswith("layers.")]
    if outside:
        raise ValueError(
            f"layer {outside[0]!r} stands outside of the blocks: leave it out by `skip`, or use `compress`"
        )
    batches = batches_of(calibration)
    ends = tensors.read([name for name in tensors.names if not name.startswith("layers.")])
    streams = [ends["embedding.weight"][batch] for batch in batches]
    with _fresh(Path(destination)) as place:
        described: dict[str, Any] = {}
        _write_ends(place, ends)
        del ends
        for i in range(config.n_layers):
            prefix = f"layers.{i}."
            one = _OneBlock(tensors, i)
            mine = [name for name in names if name.startswith(prefix)]
            if mine:
                one = compress_(one, method, streams, target=mine, skip=(), done=done)
            streams = [one(stream) for stream in streams] if i < config.n_layers - 1 else []
            described |= _write_block(place, i, one.layers[str(i)])
        _write_about(place, config_json(config), described)
        tokenizer = Path(source) / "tokenizer.json"
        if tokenizer.is_file():
            shutil.copyfile(tokenizer, place / tokenizer.name)


class _OneBlock(nn.Module):
    """A model of one block, under the name that it has in the whole: `[batch, time, d_model]` to the same."""

    def __init__(self, tensors: Tensors, i: int) -> None:
        super().__init__()
        prefix = f"layers.{i}."
        with torch.device("meta"):
            block = Block(tensors.config, i)
        state = tensors.read([name for name in tensors.names if name.startswith(prefix)])
        own = {
            name.removeprefix(prefix): state.pop(name).clone() for name in list(state)
        }  # a view keeps its whole file mapped
        block.load_state_dict(own, assign=True)
        self.layers = nn.ModuleDict({str(i): block.eval()})
        self.rotary = Rotary(tensors.config)

    def forward(self, x: Tensor) -> Tensor:
        positions = positions_of(0, x.shape[1], None, x.device)
        step = Step(0, positions, *self.rotary(positions, x.dtype), None, None, None)
        for block in self.layers.values():
            x = block(x, step)
        return x


@contextmanager
def _fresh(folder: Path) -> Iterator[Path]:
    """A folder beside the one that is wanted, which takes its name when everything is in it, and goes where something fails."""
    if folder.exists():
        raise FileExistsError(f"{folder}: is there already; name another folder, or remove it")
    place = folder.with_name(f"{folder.name}.part")
    try:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        yield place
        place.replace(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(place, ignore_errors=True)
        if isinstance(error, FileNotFoundError):
            raise
        raise OSError(f"{folder}: can't be written, and nothing is left of it: {error}") from error
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


def _block_file(i: int) -> str:
    return f"block-{i:05}.safetensors"


def _write_block(place: Path, i: int, block: nn.Module) -> dict[str, Any]:
    """Write a block's tensors; descriptions of its compressed layers, by their whole names."""
    prefix = f"layers.{i}."
    described = {
        f"{prefix}{name}": _description(layer.compressed, f"{prefix}{name}")
        for name, layer in block.named_modules()
        if isinstance(layer, CompressedLinear)
    }
    save_file({f"{prefix}{name}": t.contiguous() for name, t in block.state_dict().items()}, place / _block_file(i))
    return described


def _write_ends(place: Path, state: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, place / ENDS)


def _write_about(place: Path, config: dict[str, Any], described: dict[str, Any]) -> None:
    for name, value in ((ABOUT, described), ("config.json", config)):
        (place / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _description(weight: nn.Module, where: str) -> dict[str, Any]:
    """Class, plain attributes and tensors of a compressed weight, and the same of the modules in it."""
    kind = type(weight)
    if not kind.__module__.startswith(FAMILY):
        raise ValueError(
            f"layer {where!r} is a {kind.__module__}.{kind.__name__}: only classes of refimpl.compression can be read back"
        )
    plain = {name: value for name, value in vars(weight).items() if not name.startswith("_") and name != "training"}
    return {
        "class": f"{kind.__module__}:{kind.__name__}",
        "attributes": {name: _plain(value, f"{where}.{name}") for name, value in plain.items()},
        "tensors": {name: buffer is not None for name, buffer in weight._buffers.items()},
        "modules": {name: _description(child, f"{where}.{name}") for name, child in weight.named_children()},
    }


def _plain(value: Any, where: str) -> Any:
    """A value as JSON has it."""
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    if isinstance(value, tuple | list):
        return [_plain(part, where) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{where} is a {type(value).__name__}, which can't be written down: numbers, texts and dtypes can")


def _value(stored: Any) -> Any:
    if isinstance(stored, dict):
        return DTYPES[stored["dtype"]]
    return tuple(_value(part) for part in stored) if isinstance(stored, list) else stored


def _rebuilt(about: dict[str, Any], state: dict[str, Tensor], prefix: str, folder: Path) -> CompressedWeight:
    """A compressed weight from its description, without a call of its `__init__`, which takes what was not kept."""
    module, _, name = str(about["class"]).partition(":")
    kind = getattr(importlib.import_module(module), name, None) if module.startswith(FAMILY) else None
    if not (isinstance(kind, type) and issubclass(kind, CompressedWeight)):
        raise ValueError(f"{folder / ABOUT}: {about['class']!r} is no compressed weight of refimpl.compression")
    weight: CompressedWeight = kind.__new__(kind)
    nn.Module.__init__(weight)
    for attribute, value in about["attributes"].items():
        setattr(weight, attribute, _value(value))
    for tensor, held in about["tensors"].items():
        weight.register_buffer(tensor, state[f"{prefix}.{tensor}"] if held else None)
    for child, described in about["modules"].items():
        weight.add_module(child, _rebuilt(described, state, f"{prefix}.{child}", folder))
    return weight
