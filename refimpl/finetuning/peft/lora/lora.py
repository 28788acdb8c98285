r"""LoRA: train a low-rank change of each weight, and add it to the weight when training is over.

Source: `lora` (arXiv 2106.09685), Eq. (3), Sections 4.1 and 4.2; official code
microsoft/LoRA@c4593f060e6a368d7bb5af5273b8e42810cdef90, loralib/layers.py. The scale of `rank_stabilized` is arXiv 2312.03732's.
Differs from the paper: A is drawn uniformly from $\pm 1/\sqrt{in}$, as the official code does (the paper says Gaussian); the
factors of a layer in half precision are float32, so that small steps are not rounded away (the official code keeps the
layer's dtype).
Not here: embeddings and convolutions; trained biases; a rank for each layer; several adapters on one layer; dropout draws
from PyTorch's global generator.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.finetuning.peft.adapter_files import read_adapter, write_adapter
from refimpl.finetuning.protocol import AdaptedLinear, M, adapt, is_linear, is_transposed, merge, trainable


FACTORS = ("lora_A", "lora_B")


@dataclass(frozen=True, kw_only=True)
class LoRA:
    r"""Low-rank adaptation of linear layers.

    Args:
        rank: $r$, columns of B and rows of A, 1 to the smaller side of each layer (paper, Table 9, and PEFT: 8).
        alpha: $\alpha$; the change is scaled by $\alpha / r$. The paper sets it to the first rank tried (Section 4.1).
        dropout: share of the inputs of A that training zeroes, 0 (none, as in PEFT) to below 1.
        target: patterns of layers' whole names, as in a shell; the paper's choice is queries and values (Section 4.2).
        rank_stabilized: scale by $\alpha / \sqrt r$ instead, so that the step does not shrink as the rank grows.

    >>> model = nn.Sequential(nn.Linear(5, 7))
    >>> method = LoRA(rank=2, target=("*",))
    >>> {name: list(factor.shape) for name, factor in method.trainable(method.inject(model)).items()}
    {'0.lora_A': [2, 5], '0.lora_B': [7, 2]}
    """

    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    target: tuple[str, ...] = ("*q_proj", "*v_proj")
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1); 0 is none")
        if isinstance(self.target, str):
            raise ValueError(f"target={self.target!r} must be a list of patterns; write [{self.target!r}]")
        object.__setattr__(self, "target", tuple(self.target))  # YAML gives a list

    @property
    def scale(self) -> float:
        r"""What $BA$ is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def inject(self, model: M, generator: torch.Generator | None = None) -> M:
        """Freeze the model and put a trained pair of factors beside every target layer, in place.

        The model computes what it did before: A is drawn from `generator`, and B is zero.

        Raises:
            ValueError: no layer matches, one is adapted already, or the rank exceeds a layer's smaller side, from where
                on it would add parameters and no freedom.
        """
        return adapt(model, self.target, partial(self._wrap, generator))

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The factors, by name."""
        return trainable(model)

    def merge(self, model: M) -> M:
        r"""Replace each target layer's weight by $W + \frac{\alpha}{r} BA$ and put the plain layer back, in place.

        The sum is taken in the factors' dtype and rounded once to the weight's.

        Raises:
            ValueError: the model was not injected.
        """
        return merge(model)

    def save(self, model: nn.Module, folder: str | Path) -> None:
        """Write the factors to a folder that `peft.PeftModel.from_pretrained` reads.

        Raises:
            ValueError: the model was not injected, or with another rank or scale.
        """
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
        if not layers:
            raise ValueError("the model has no LoRA layer to save: inject first, and save before merging")
        for name, layer in layers.items():
            if (len(layer.lora_A), layer.scale) != (self.rank, self.scale):
                raise ValueError(
                    f"layer {name!r} has rank {len(layer.lora_A)} and scale {layer.scale:g}, this configuration "
                    f"{self.rank} and {self.scale:g}: save with the one that injected it"
                )
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": getattr(model, "name_or_path", None),
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rank_stabilized,
            "target_modules": sorted(layers),
            "fan_in_fan_out": any(is_transposed(layer.base) for layer in layers.values()),
            "inference_mode": True,
        }
        tensors = {f"{name}.{f}.weight": getattr(layer, f) for name, layer in layers.items() for f in FACTORS}
        write_adapter(folder, config, tensors)

    @classmethod
    def load(cls, model: nn.Module, folder: str | Path) -> "LoRA":
        """Inject what `save` or PEFT wrote into its base model, in place, and return its configuration.

        Raises:
            ValueError: it is no plain LoRA, a factor is missing or has another shape, or the model has no such layer.
                The model is then unchanged.
            FileNotFoundError: the folder holds no adapter.
        """
        config, tensors = read_adapter(folder)
        _check_plain(folder, config)
        method = cls(
            rank=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            target=tuple(sorted({name.rpartition(".lora_")[0] for name in tensors})),
            rank_stabilized=config.get("use_rslora", False),
        )
        _check_fit(folder, tensors, method, model)
        factors = method.trainable(method.inject(model, torch.Generator()))
        with torch.no_grad():
            for name, factor in factors.items():
                factor.copy_(tensors[f"{name}.weight"])
        return method

    def _wrap(self, generator: torch.Generator | None, name: str, layer: nn.Linear) -> "LoRALinear":
        if self.rank > min(_sizes(layer)):
            raise ValueError(f"rank={self.rank} exceeds the smaller side of layer {name!r}, {_sizes(layer)}: lower it")
        return LoRALinear(layer, self.rank, self.scale, self.dropout, generator)


class LoRALinear(AdaptedLinear):
    r"""A frozen layer with a low-rank change beside it, $h = W_0 x + s\,BAx$ (Eq. 3).

    Args:
        base: the layer.
        rank: $r$.
        scale: $s$, as `LoRA.scale`.
        dropout: share of the inputs of A zeroed in training mode.
        generator: what A is drawn from.
    """

    def __init__(
        self, base: nn.Linear, rank: int, scale: float, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(base)
        self.scale, self.dropout = scale, dropout
        d_out, d_in = _sizes(base)
        device, dtype = base.weight.device, torch.promote_types(base.weight.dtype, torch.float32)
        drawn = torch.empty(rank, d_in, device=generator.device if generator else device, dtype=dtype)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(drawn.to(device))  # [rank, in]
        self.lora_B = nn.Parameter(torch.zeros(d_out, rank, device=device, dtype=dtype))  # [out, rank]

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        outputs = self.base(inputs)
        low = F.linear(F.dropout(inputs, self.dropout, self.training).to(self.lora_A.dtype), self.lora_A)
        return outputs + F.linear(low * self.scale, self.lora_B).to(outputs.dtype)

    @property
    def weight(self) -> Tensor:
        """The changed weight, in the dtype and the layout of the base's; differentiable."""
        change = low_rank_change(self.lora_A, self.lora_B, self.scale)
        return (self.base.weight + (change.T if is_transposed(self.base) else change)).to(self.base.weight.dtype)


def low_rank_change(A: Tensor, B: Tensor, scale: float) -> Tensor:
    r"""$\Delta W = s\,BA$ (Eq. 3 with the scale of Section 4.1).

    Args:
        A: `[rank, in]`.
        B: `[out, rank]`.
        scale: $s$, the paper's $\alpha / r$.

    Returns:
        `[out, in]`.

    >>> low_rank_change(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), scale=0.5).tolist()
    [[1.5, 3.0], [2.0, 4.0]]
    """
    return scale * (B @ A)


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a layer."""
    rows, columns = layer.weight.shape
    return (columns, rows) if is_transposed(layer) else (rows, columns)


PLAIN = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "fan_in_fan_out",
}  # what `LoRA` computes with
IDLE = {  # what changes no output of a trained adapter, or only says where others acted
    *(
        "peft_type",
        "peft_version",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *(
        "init_lora_weights",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "qalora_group_size",
    ),
}


def _check_plain(folder: str | Path, config: dict[str, Any]) -> None:
    """Raise for whatever asks for more than plain LoRA: DoRA, a rank for each layer, trained biases and the like."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: peft_type={config.get('peft_type')!r} is not 'LORA'")
    asked = {
        key: value
        for key, value in config.items()
        if key not in PLAIN | IDLE and value not in (None, False, "none", {}, [])
    }
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):  # the others change the base's weights
        asked["init_lora_weights"] = config["init_lora_weights"]
    if asked:
        raise ValueError(f"{folder}: asks for more than LoRA: {asked}; merge it with PEFT and load the merged model")


def _check_fit(folder: str | Path, tensors: dict[str, Tensor], method: LoRA, model: nn.Module) -> None:
    """Raise unless there are two factors for each layer, each of the shape that the model's layer asks for."""
    modules, expected = dict(model.named_modules()), {}
    for name in method.target:
        if not is_linear(modules.get(name, model)):
            raise ValueError(f"{folder}: the model has no linear layer {name!r}; was it trained on another base model?")
        d_out, d_in = _sizes(modules[name])
        expected |= {f"{name}.lora_A.weight": (method.rank, d_in), f"{name}.lora_B.weight": (d_out, method.rank)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found):
        if expected.get(name) != found.get(name):
            ask, got = expected.get(name, "nothing of that name"), found.get(name, "nothing")
            raise ValueError(
                f"{folder}: {name} is {got} where the model asks for {ask}; was it trained on another model?"
            )
    if not found:
        raise ValueError(f"{folder}: there are no factors in it")
