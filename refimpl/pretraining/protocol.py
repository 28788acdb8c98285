r"""What all methods share that change how a model is pre-trained.

Glossary
    part        what of a training a method replaces: `optimizer`, `precision`, `growth` or `initialization`
    optimizer   a `torch.optim.Optimizer`: `Method(groups, **settings)`; `optimizers/protocol.py` has the base class
    precision   in which numbers gradients are computed and steps are taken, around any optimizer
    growth      makes a large model from a trained small one
    groups      parameters by `role`, with the settings that differ from the optimizer's own
    role        `hidden` (a matrix between hidden states), `embedding`, `output`, or `vector` (gains, biases)
    state       bytes that training holds beside weights and gradients, from step to step

A training is one factory for each part, and a method replaces the one that it names:

Examples:
    >>> from refimpl.pretraining.optimizers.lion import Lion
    >>> Lion.part
    'optimizer'
    >>> model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7))
    >>> optimizer = Lion(parameter_groups(model, weight_decay=0.1), lr=1e-3)
    >>> [(group["role"], len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
    [('hidden', 1, 0.1), ('embedding', 1, 0.1), ('output', 1, 0.1), ('vector', 2, 0.0)]

Invariants, run for every method by the tests beside each part's protocol. An optimizer: nothing moves without a step, a
parameter without gradient never; groups keep their own settings; saved and loaded, it goes on bit for bit; a quadratic's
minimum is found. A precision: gradients are those of the unscaled loss, in the parameters' dtype, and add up; `backward`
moves nothing, and leaves the model with its own parameters even where the loss raises; every optimizer trains under it.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from refimpl.model.config import Config
from refimpl.model.model import Decoder
from refimpl.model.train import Precision

Part = Literal["optimizer", "precision", "growth", "initialization"]
Role = Literal["hidden", "embedding", "output", "vector"]
Groups = list[dict[str, Any]]


class PrecisionSession(Precision, Protocol):
    """One training under a precision: `backward` and `update` of `refimpl.model.train`, and what it holds."""

    @property
    def nbytes(self) -> int:
        """Bytes held from step to step beside the model's own parameters."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a training that is resumed needs."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        ...


class PrecisionPolicy(Protocol):
    """A frozen dataclass of settings."""

    part: ClassVar[Part]

    def start(self, model: nn.Module) -> PrecisionSession:
        """Begin a training of a model whose parameters are the weights that steps are added to."""
        ...


class Growth(Protocol):
    """A frozen dataclass of settings."""

    part: ClassVar[Part]

    def small_config(self, config: Config) -> Config:
        """Shape of the small model that this method grows to `config`."""
        ...

    def grow(self, small: Decoder, config: Config, batches: Iterator[Tensor], generator: torch.Generator) -> Decoder:
        """The large model; `small` is left as it is. `batches` of `[batch, time + 1]` tokens are for who learns how to grow."""
        ...


class Initialization(Protocol):
    """A frozen dataclass of settings."""

    part: ClassVar[Part]

    def initialize(self, model: Decoder, generator: torch.Generator) -> Decoder:
        """Draw the weights, in place; modules may be replaced."""
        ...

    def groups(self, model: Decoder, weight_decay: float) -> Groups:
        """Groups for the optimizer: `parameter_groups(model, weight_decay)`, with `lr_scale` where rates must differ."""
        ...


def parameter_groups(model: nn.Module, weight_decay: float = 0.0) -> Groups:
    """A model's trained parameters by role, in the order hidden, embedding, output, vector; empty roles are left out.

    Args:
        model: any module. Its output layer is what `get_output_embeddings` gives (transformers), else an `lm_head`, else
            the last matrix. One that is tied to the embedding is an embedding.
        weight_decay: of all roles but vectors, which get none.

    Raises:
        ValueError: the model has no parameter that takes a gradient.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("the model has no parameter that takes a gradient: model.requires_grad_(True)")
    output = _output_weight(model, trained, embeddings)
    roles: dict[Role, list[nn.Parameter]] = {"hidden": [], "embedding": [], "output": [], "vector": []}
    for p in trained.values():
        role: Role = "embedding" if id(p) in embeddings else "output" if p is output else "hidden"
        roles["vector" if p.ndim < 2 else role].append(p)
    return [
        {"params": params, "role": role, "weight_decay": 0.0 if role == "vector" else weight_decay}
        for role, params in roles.items()
        if params
    ]


def _output_weight(model: nn.Module, trained: dict[str, nn.Parameter], embeddings: set[int]) -> Tensor | None:
    """The weight of the output layer, if there is one that is not the embedding's."""
    named = getattr(model, "get_output_embeddings", None)
    if callable(named):
        return getattr(named(), "weight", None)
    if any(name.endswith("lm_head.weight") for name in trained):
        return next(p for name, p in trained.items() if name.endswith("lm_head.weight"))
    if isinstance(model, Decoder):  # tied
        return None
    matrices = [p for p in trained.values() if p.ndim == 2 and id(p) not in embeddings]
    return matrices[-1] if matrices else None


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors that an optimizer holds from step to step, each storage counted once.

    Examples:
        >>> weight = nn.Parameter(torch.ones(5))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.sum().backward()
        >>> state_bytes(optimizer), optimizer.step(), state_bytes(optimizer)
        (0, None, 20)
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in _tensors(dict(optimizer.state))}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def _tensors(held: object) -> Iterator[Tensor]:
    """Every tensor in nested mappings and sequences; the keys of an optimizer's state are parameters, and not counted."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, Mapping):
        for value in held.values():
            yield from _tensors(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from _tensors(value)
