r"""Compressed models in folders: written, read, and made block by block from a checkpoint that does not fit into memory.

A folder holds config.json and tokenizer.json as the checkpoint had them, the tensors of the ends (embedding, last norm, output layer)
and of each block in safetensors files of their own, and compressed.json, which says of every module what it is: its class, what
it holds beside tensors (bits, shape, dtype), and the same of the modules in it (see `description`). Nothing in it is code.

Not here: `compress`, for a model that is in memory; formats of other libraries; models of transformers.

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
from refimpl.compression.description import check_bare, described, rebuilt
from refimpl.compression.protocol import LayerMethod, compress_, matching
from refimpl.model.config_json import config_json, read_config
from refimpl.model.load import Tensors
from refimpl.model.model import Block, Decoder, attend
from refimpl.model.rope import Rotary
from refimpl.model.step import Step, positions_of
from refimpl.model.tensor_files import opened

ENDS, ABOUT = "ends.safetensors", "compressed.json"
PARTS = ("embedding", "norm", "lm_head")  # of a decoder, beside its blocks


def save_compressed(model: Decoder, folder: str | Path) -> None:
    """Write what any method makes of a decoder: compressed, pruned, or trained and converted.

    Args:
        model: `refimpl.model`'s decoder, whose modules may be replaced by those of `refimpl.compression`.
        folder: made new; what is written stands there only when all of it is written.

    Raises:
        FileExistsError: the folder is there already.
        OSError: it can't be written, for want of space or of rights; nothing is left behind.
        ValueError: the model holds something that could not be read back, which is named; nothing is written.
    """
    _check(model)
    config, shared = config_json(model.config), _shared(model.rotary)
    about = {
        name: None if getattr(model, name) is None else described(getattr(model, name), name, shared) for name in PARTS
    }
    blocks = [described(block, f"layers.{i}", shared) for i, block in enumerate(model.layers)]
    with _fresh(Path(folder)) as place:
        for i, block in enumerate(model.layers):
            _write_block(place, i, block)
        _write_ends(place, {name: t for name, t in model.state_dict().items() if not name.startswith("layers.")})
        _write_about(place, config, about, blocks)


def load_compressed(folder: str | Path, device: torch.device | str | None = None) -> Decoder:
    """The decoder in a folder that `save_compressed` or `compress_folder` wrote, in evaluation mode.

    Raises:
        FileNotFoundError: the folder or a file of it is missing.
        ValueError: a file is cut off; what is described is no module of `refimpl.compression` or of a decoder, or is not what the
            tensors are for.
    """
    place = Path(folder)
    config = read_config(place)
    if not (place / ABOUT).is_file():
        raise FileNotFoundError(f"{place / ABOUT}: no such file; a plain checkpoint is read by refimpl.model.load")
    found = json.loads((place / ABOUT).read_text(encoding="utf-8"))
    about: dict[str, Any] = found if isinstance(found, dict) else {}
    blocks = about.pop("layers", [])
    if about.keys() != set(PARTS) or len(blocks) != config.n_layers:
        raise ValueError(f"{place / ABOUT}: must describe {', '.join(PARTS)} and {config.n_layers} layers")
    with torch.device("meta"):
        model = Decoder(config)
    shared = _shared(model.rotary)

    def made(name: str, description: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
        try:
            return rebuilt(description, state, name, shared)
        except ValueError as error:
            raise ValueError(f"{place / ABOUT}: {error}") from error

    with _all_of(place / ENDS, device) as state:
        for name, description in about.items():
            setattr(model, name, None if description is None else made(name, description, state))
    for i, description in enumerate(blocks):
        with _all_of(place / _block_file(i), device) as state:
            model.layers[i] = made(f"layers.{i}", description, state)
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
    with torch.device("meta"):
        plain = Decoder(config)
    about = {
        name: None if getattr(plain, name) is None else described(getattr(plain, name), name, {}) for name in PARTS
    }
    blocks: list[dict[str, Any]] = []
    with _fresh(Path(destination)) as place:
        _write_ends(place, ends)
        del ends
        for i in range(config.n_layers):
            prefix = f"layers.{i}."
            one = _OneBlock(tensors, i)
            mine = [name for name in names if name.startswith(prefix)]
            if mine:
                one = compress_(one, method, streams, target=mine, skip=(), done=done)
            streams = [one(stream) for stream in streams] if i < config.n_layers - 1 else []
            blocks.append(described(one.layers[str(i)], f"layers.{i}", _shared(one.rotary)))
            _write_block(place, i, one.layers[str(i)])
        _write_about(place, config_json(config), about, blocks)
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


def _write_block(place: Path, i: int, block: nn.Module) -> None:
    save_file({f"layers.{i}.{name}": t.contiguous() for name, t in block.state_dict().items()}, place / _block_file(i))


def _write_ends(place: Path, state: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, place / ENDS)


def _write_about(place: Path, config: dict[str, Any], ends: dict[str, Any], blocks: list[dict[str, Any]]) -> None:
    for name, value in ((ABOUT, ends | {"layers": blocks}), ("config.json", config)):
        (place / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _all_of(file: Path, device: torch.device | str | None) -> Iterator[dict[str, Tensor]]:
    """The tensors of a file, of which the caller takes out those that it has a place for: all of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut off, or tensors are left over.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, of those that {ABOUT} speaks of")
    with opened(file, device) as tensors:
        state = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - it is no dictionary
    yield state
    if state:
        raise ValueError(f"{file}: holds tensor {min(state)!r}, which {ABOUT} does not describe")


def _shared(rotary: Any) -> dict[str, Any]:
    """What the modules of a decoder hold beside plain values."""
    return {"attend": attend, "rotary": rotary}


def _check(model: Decoder) -> None:
    """Refuse a decoder that its config and its modules do not describe."""
    if type(model) is not Decoder:
        raise ValueError(
            f"a {type(model).__name__} can't be written: load its checkpoint by refimpl.model.load, and compress that decoder"
        )
    with torch.device("meta"):
        plain = Decoder(model.config)
    here, there = (
        {key: value for key, value in vars(m.rotary).items() if key != "_frequencies"} for m in (model, plain)
    )
    if type(model.rotary) is not Rotary or here != there:
        raise ValueError(f"rotary={model.rotary} is not the rotation of the model's config: it can't be read back")
    for module, name in ((model, "the decoder"), (model.layers, "layers")):
        check_bare(module, name)
    if len(model.layers) != model.config.n_layers:
        raise ValueError(f"{len(model.layers)} layers can't be written, where config.n_layers={model.config.n_layers}")
    if model.score_bias is not None:
        raise ValueError("score_bias is replaced: it can't be read back")
    different = sorted((vars(model).keys() ^ vars(plain).keys()) | (model._modules.keys() ^ plain._modules.keys()))
    if different:
        raise ValueError(
            f"the decoder holds {different}, or lacks them, unlike that of its config: they can't be read back"
        )
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if seen.setdefault(id(tensor), name) != name:
            raise ValueError(
                f"{name!r} is {seen[id(tensor)]!r} too: what stands in two places can't be read back as one"
            )
