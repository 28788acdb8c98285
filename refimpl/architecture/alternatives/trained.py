"""Language models of mixers that come trained: a file of weights beside the mixer's module, `mamba.safetensors` beside `mamba.py`.

A mixer can have one whose settings offer `language_model(shape, generator)`, a model before its training.

Source: none, this is how the project stores them.

Differs from the paper: none; each method's page says what its model was trained on.

Not here: training (`python -m tools.mixers`), and Hugging Face's layout, which a method's own `load` reads.

Examples:
    >>> import tempfile
    >>> from pathlib import Path
    >>> from refimpl.architecture.alternatives.state_space.mamba import Mamba
    >>> shape = LanguageModelConfig(vocabulary=61, d_model=16, n_layers=2)
    >>> path = Path(tempfile.mkdtemp()) / "mamba.safetensors"
    >>> save(Mamba(d_state=4).language_model(shape, torch.Generator().manual_seed(0)), Mamba(d_state=4), path)
    >>> again = load(Mamba, path)
    >>> again.config == shape, again.embedding.weight.dtype
    (True, torch.bfloat16)
"""

import inspect
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from refimpl.architecture.alternatives.language_model import LanguageModel, LanguageModelConfig
from refimpl.model.tensor_files import opened


class Trainable(Protocol):
    """A mixer's settings, a dataclass, of which a language model can be made."""

    def language_model(self, shape: LanguageModelConfig, generator: torch.Generator | None = None) -> LanguageModel:
        """The model before its training."""
        ...


def weights_file(method: type[Trainable]) -> Path:
    """Where the weights of a method stand."""
    return Path(inspect.getfile(method)).with_suffix(".safetensors")


def save(model: LanguageModel, settings: Trainable, path: str | Path, **about: str) -> None:
    """Write weights in bfloat16, with the model's shape, the mixers' settings, and what else `about` says, as metadata."""
    told = {"shape": json.dumps(asdict(model.config)), "settings": json.dumps(asdict(settings)), **about}  # type: ignore[call-overload]
    save_file({name: value.bfloat16().contiguous() for name, value in model.state_dict().items()}, path, told)


def load(method: type[Trainable], path: str | Path | None = None, dtype: torch.dtype | None = None) -> LanguageModel:
    """The trained model of a method, in evaluation mode.

    Args:
        method: the class of its settings.
        path: what `save` wrote; None is the file beside the method's module.
        dtype: of all parameters; None keeps bfloat16.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it was not written by `save`, or for another method.
    """
    path = weights_file(method) if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; no trained model comes with {method.__name__} (`python -m tools.mixers` trains one)"
        )
    with opened(path) as file:
        told: dict[str, Any] = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    if not {"shape", "settings"} <= told.keys():
        raise ValueError(f"{path}: holds no language model of mixers; `save` writes one with its shape and settings")
    with torch.device("meta"):
        try:
            settings = method(**json.loads(told["settings"]))
        except TypeError as error:
            raise ValueError(f"{path}: holds no model of {method.__name__}, but one with {told['settings']}") from error
        model = settings.language_model(LanguageModelConfig(**json.loads(told["shape"])))
    return model.assign(tensors, dtype, source=path)
