r"""Checkpoints in Hugging Face's layout: config.json, safetensors in one file or in shards, tokenizer.json.

Source: the layout that transformers 5.23.0 writes and reads (`save_pretrained`, `from_pretrained`).

Differs from transformers: a missing, unexpected or misshapen tensor is an error, never a fresh random weight.

Not here: pickles (`.bin`, `.pt`), which run code when they are read; the hub; quantized checkpoints.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from refimpl.model.config_json import config_json, read_config, read_object
from refimpl.model.model import Decoder
from refimpl.model.tensor_files import INDEX, SINGLE, headers, opened, some, tensor_files

# Parts of names: theirs, ours. The rest of a name is the same.
RENAMES = (
    ("model.embed_tokens.", "embedding."),
    ("model.layers.", "layers."),
    ("model.norm.", "norm."),
    (".self_attn.", ".attention."),
    (".mlp.", ".feed_forward."),
    (".input_layernorm.", ".attention_norm."),
    (".post_attention_layernorm.", ".feed_forward_norm."),
)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")  # written by old versions; the config says it too


def load(path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Decoder:
    """The model in a local folder, in evaluation mode.

    Tensors are read one by one into the model, which has no other copy of them.

    Args:
        path: folder with config.json and model.safetensors, or its shards and their index.
        dtype: of all parameters; None takes that in which the embedding is stored.
        device: where to; None is the CPU.

    Raises:
        FileNotFoundError: no folder, no config.json, no weights, or a shard is missing.
        ValueError: the config is not supported; weights are pickles only; a file is no safetensors or is cut off;
            tensors are missing, unexpected, misshapen or not floating point. All faults of tensors are told at once.
    """
    tensors = Tensors(path)
    with torch.device("meta"):
        model = Decoder(tensors.config)
    model.load_state_dict(tensors.read(tensors.names, dtype, device), assign=True)
    if tensors.repeats_embedding and not torch.equal(tensors.output_layer(dtype, device), model.embedding.weight):
        raise ValueError(f"{tensors.folder}: tie_word_embeddings=True, but lm_head.weight is not the embedding")
    return model.eval()


class Tensors:
    """The tensors of a checkpoint under the names of `Decoder`, read when they are asked for; all headers are checked at once.

    Args:
        path: folder with config.json and weights, as for `load`, which raises the same.

    Attributes:
        config: the model's.
        names: of all parameters, in the decoder's order.
        dtype: in which the embedding is stored.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        self.config = read_config(self.folder)
        with torch.device("meta"):
            shapes = {name: tuple(p.shape) for name, p in Decoder(self.config).named_parameters()}
        files = tensor_files(self.folder)
        self._stored = {
            name: (file, *about) for file, names in files.items() for name, about in headers(file, names).items()
        }
        _check(self.folder, {_theirs(name): shape for name, shape in shapes.items()}, self._stored)
        self.names = list(shapes)
        self.dtype = DTYPES[self._stored[_theirs("embedding.weight")][2]]
        self.repeats_embedding = self.config.tied_embeddings and "lm_head.weight" in self._stored

    def read(
        self, names: Iterable[str], dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        """Some tensors, each file opened once; all in one dtype, that of the embedding if it is None."""
        wanted = sorted((self._stored[_theirs(name)][0], name) for name in names)
        state: dict[str, Tensor] = {}
        for file, group in itertools.groupby(wanted, key=lambda pair: pair[0]):
            with opened(file, device) as weights:
                for _, name in group:
                    state[name] = weights.get_tensor(_theirs(name)).to(dtype or self.dtype)
        return state

    def output_layer(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        """The output layer's weight, also where the config says that it is the embedding's."""
        with opened(self._stored["lm_head.weight"][0], device) as weights:
            found: Tensor = weights.get_tensor("lm_head.weight").to(dtype or self.dtype)
        return found


def save(model: Decoder, path: str | Path, shard_bytes: int = 5 * 2**30) -> None:
    """Write a model in the layout that `load` and transformers read.

    Args:
        model: the decoder; adapters must be merged and replaced modules put back.
        path: folder, made if it is not there; weights in it are replaced, each file at once.
        shard_bytes: size from which weights are cut into several files.

    Raises:
        ValueError: the model has other parameters than its config says, or no config.json could say it.
    """
    folder = Path(path)
    config = config_json(model.config)
    with torch.device("meta"):
        plain = {name: parameter.shape for name, parameter in Decoder(model.config).named_parameters()}
    state = model.state_dict()
    different = sorted(
        {name for name in plain.keys() | state.keys() if plain.get(name) != getattr(state.get(name), "shape", None)}
    )
    if different:
        raise ValueError(f"the model is not the plain decoder of its config; different: {some(different)}")
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in state.items():
        if shards[-1] and sum(x.nbytes for x in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][_theirs(name)] = tensor.contiguous()
    config["dtype"] = config["torch_dtype"] = str(model.embedding.weight.dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = [SINGLE] if len(shards) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        written = folder / f"{name}.part"
        save_file(shard, written, metadata={"format": "pt"})
        written.replace(folder / name)  # a loaded model may still be mapped to the old file
    for old in {*folder.glob("model*.safetensors"), folder / INDEX} - {folder / name for name in names}:
        old.unlink(missing_ok=True)
    if len(shards) > 1:
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = {"total_size": sum(tensor.nbytes for tensor in state.values())}
        _write_json(folder / INDEX, {"metadata": total, "weight_map": where})
    _write_json(folder / "config.json", config)


def tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a model's folder.

    Raises:
        FileNotFoundError: there is no tokenizer.json or no config.json.
        ValueError: it is no tokenizer, or another model's: it has a token that the model's vocabulary has not, or texts begin with
            another one.
    """
    folder = Path(path)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; tokenizer.json is the only format that is read")
    try:
        found = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"{file}: is no tokenizer: {error}") from error
    vocabulary = read_config(folder).vocabulary
    token, index = max(found.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1], default=("", -1))
    if index >= vocabulary:
        raise ValueError(f"{file}: token {token!r} is number {index}, the model's vocabulary ends at {vocabulary - 1}")
    more, begins = folder / "tokenizer_config.json", read_object(folder / "config.json").get("bos_token_id")
    first = read_object(more).get("bos_token") if more.is_file() else None
    first = first.get("content") if isinstance(first, dict) else first
    if isinstance(first, str) and isinstance(begins, int) and found.token_to_id(first) != begins:
        number = found.token_to_id(first)
        raise ValueError(
            f"{file}: texts begin with {first!r}, number {number}, and by config.json with number {begins}; is it another model's tokenizer?"
        )
    return found


def _check(folder: Path, expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[Any, ...]]) -> None:
    """Compare names, shapes and dtypes, and tell all that is wrong."""
    known = {"lm_head.weight"} if "lm_head.weight" not in expected else set()
    unexpected = [name for name in stored if name not in expected and name not in known and not COMPUTED.search(name)]
    faults = [f"{name} is missing" for name in sorted(expected.keys() - stored.keys())]
    faults += [f"{name} (in {stored[name][0].name}) is unexpected" for name in sorted(unexpected)]
    for name in sorted(expected.keys() & stored.keys()):
        file, shape, dtype = stored[name]
        if shape != expected[name]:
            faults.append(f"{name} (in {file.name}) has shape {list(shape)}, config.json says {list(expected[name])}")
        if dtype not in DTYPES:
            faults.append(f"{name} (in {file.name}) is {dtype}; supported: {', '.join(DTYPES)}")
    if faults:
        raise ValueError(f"{folder}: the tensors are not those of config.json: {some(faults)}")


def _theirs(name: str) -> str:
    """The name of a parameter in a checkpoint.

    Examples:
        >>> _theirs("layers.3.attention.q_proj.weight"), _theirs("norm.weight"), _theirs("lm_head.weight")
        ('model.layers.3.self_attn.q_proj.weight', 'model.norm.weight', 'lm_head.weight')
    """
    for theirs, ours in RENAMES:
        if ours.startswith("."):
            name = name.replace(ours, theirs)
        elif name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    return name


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
