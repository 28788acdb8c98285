r"""LoRA: train a low-rank change of each weight, and add it to the weight when training is over.

Source: `lora` (arXiv 2106.09685), Eq. (3), Sections 4.1 and 4.2; official code
microsoft/LoRA@c4593f060e6a368d7bb5af5273b8e42810cdef90, loralib/layers.py; the scale of `rank_stabilized` is that of
`rslora` (arXiv 2312.03732).

Differs from the paper: A is drawn uniformly from $\pm 1/\sqrt{in}$, as the official code and PEFT do (the paper says
Gaussian); the factors of a layer in half precision are float32, as in PEFT, so that small steps are not rounded away.

Not here: embeddings and convolutions; trained biases; another rank or scale for single layers; several adapters on one
layer. Dropout draws from PyTorch's global generator.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.finetuning.peft.adapter_files import check_fit, read_adapter, write_adapter
from refimpl.finetuning.protocol import AdaptedLinear, M, adapt, merge, trainable
from refimpl.model.linear import is_linear, is_transposed, sizes

PEFT_NAMES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rank_stabilized": "use_rslora"}


@dataclass(frozen=True, kw_only=True)
class LoRA:
    r"""Low-rank adaptation of linear layers.

    Args:
        rank: $r$, columns of B and rows of A, 1 to the smaller side of every layer (8 in the paper's Table 9).
        alpha: $\alpha$; the change is scaled by $\alpha / r$. The paper sets it to the first rank it tries.
        dropout: share of the inputs of A that is zeroed in training, 0 (none) to below 1.
        target: patterns of layers' whole names, as in a shell; the paper adapts queries and values (Section 4.2).
        rank_stabilized: scale by $\alpha / \sqrt r$ instead, so that the change does not shrink as the rank grows.

    Examples:
        >>> model, method = nn.Sequential(nn.Linear(5, 7)), LoRA(rank=2, target=("*",))
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
            raise ValueError(f"target={self.target!r} must be a list of patterns: [{self.target!r}]")
        object.__setattr__(self, "target", tuple(self.target))  # YAML gives a list

    @property
    def scale(self) -> float:
        r"""What $BA$ is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def inject(self, model: M, generator: torch.Generator | None = None) -> M:
        """Freeze the model and put a pair of trained factors beside every target layer, in place.

        The model's outputs stay what they were: A is drawn from `generator`, B is zero.

        Raises:
            ValueError: no layer matches, one is adapted already, or the rank exceeds a layer's smaller side, beyond
                which it adds parameters and no freedom. The model is then unchanged.
        """
        return adapt(model, self.target, partial(self._wrap, generator))

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The factors, by name."""
        return trainable(model)

    def merge(self, model: M) -> M:
        r"""Replace each target layer's weight by $W_0 + s\,BA$ and put the plain layer back, in place.

        The sum is taken in the factors' dtype and rounded once to the weight's.

        Raises:
            ValueError: the model is not injected.
        """
        return merge(model)

    def save(self, model: nn.Module, folder: str | Path) -> None:
        """Write the factors as `peft.PeftModel.from_pretrained` reads them.

        Raises:
            ValueError: the model is not injected, or by a configuration of another rank or scale.
        """
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
        if not layers:
            raise ValueError("the model has no LoRA layer to save: inject first, and save before merging")
        for name, layer in layers.items():
            held = (layer.lora_A.shape[0], layer.scale)
            if held != (self.rank, self.scale):
                raise ValueError(
                    f"layer {name!r} has rank and scale {held}, this configuration {self.rank, self.scale}"
                )
        config = {
            **{theirs: getattr(self, ours) for ours, theirs in PEFT_NAMES.items()},
            "peft_type": "LORA",
            "base_model_name_or_path": getattr(model, "name_or_path", None),
            "target_modules": sorted(layers),
            "fan_in_fan_out": any(is_transposed(layer.base) for layer in layers.values()),
            "inference_mode": True,
        }
        factors = {name: factor for name, factor in model.named_parameters() if name.endswith((".lora_A", ".lora_B"))}
        write_adapter(folder, config, {f"{name}.weight": factor for name, factor in factors.items()})

    @classmethod
    def load(cls, model: nn.Module, folder: str | Path) -> "LoRA":
        """Inject what `save` or PEFT wrote into its base model, in place, and return its configuration.

        Raises:
            ValueError: the adapter is not plain LoRA or does not fit the model. The model is then unchanged.
            FileNotFoundError: the folder holds no adapter.
        """
        config, tensors = read_adapter(folder, "LORA", [*PEFT_NAMES.values(), "init_lora_weights"])
        if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
            raise ValueError(
                f"{folder}: init_lora_weights={config['init_lora_weights']!r} changes the base model's weights"
            )
        names = sorted({name.rpartition(".lora_")[0] for name in tensors})
        settings = {ours: config[theirs] for ours, theirs in PEFT_NAMES.items() if theirs in config}
        method = cls(**settings, target=tuple(names))
        expected: dict[str, tuple[int, ...]] = {}
        for name, layer in model.named_modules():
            if name in names and is_linear(layer):
                d_out, d_in = sizes(layer)
                expected[f"{name}.lora_A.weight"] = (method.rank, d_in)
                expected[f"{name}.lora_B.weight"] = (d_out, method.rank)
        check_fit(folder, tensors, expected)
        method.inject(model, torch.Generator())
        with torch.no_grad():
            for name, factor in method.trainable(model).items():
                factor.copy_(tensors[f"{name}.weight"])
        return method

    def _wrap(self, generator: torch.Generator | None, name: str, layer: nn.Linear) -> "LoRALinear":
        if self.rank > min(sizes(layer)):
            raise ValueError(f"rank={self.rank} exceeds the smaller side of layer {name!r}, {sizes(layer)}: lower it")
        return LoRALinear(layer, self.rank, self.scale, self.dropout, generator)


class LoRALinear(AdaptedLinear):
    r"""A frozen layer and a low-rank change of its weight, $h = W_0 x + s\,BAx$ (Eq. 3).

    Args:
        base: the layer.
        rank: $r$.
        scale: $s$, as `LoRA.scale`.
        dropout: share of the inputs of A that is zeroed in training mode.
        generator: what A is drawn from; PyTorch's global one if left out.
    """

    def __init__(
        self, base: nn.Linear, rank: int, scale: float, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(base)
        self.scale, self.dropout = scale, dropout
        d_out, d_in = sizes(base)
        device, dtype = base.weight.device, torch.promote_types(base.weight.dtype, torch.float32)
        drawn = torch.empty(rank, d_in, device=generator.device if generator else device, dtype=dtype)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(drawn.to(device))  # [rank, in]
        self.lora_B = nn.Parameter(torch.zeros(d_out, rank, device=device, dtype=dtype))  # [out, rank]

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`, in the dtype of the base's outputs."""
        outputs: Tensor = self.base(inputs)
        low = F.linear(F.dropout(inputs, self.dropout, self.training).to(self.lora_A.dtype), self.lora_A)
        return outputs + F.linear(low * self.scale, self.lora_B).to(outputs.dtype)

    @property
    def weight(self) -> Tensor:
        """The changed weight, in the dtype and the layout of the base's; differentiable."""
        change = low_rank_change(self.lora_A, self.lora_B, self.scale)
        return (self.base.weight + (change.T if is_transposed(self.base) else change)).to(self.base.weight.dtype)


def low_rank_change(A: Tensor, B: Tensor, scale: float) -> Tensor:
    r"""$\Delta W = s\,BA$ (Eq. 3, with the scale of Section 4.1).

    Args:
        A: `[rank, in]`.
        B: `[out, rank]`.
        scale: $s$, the paper's $\alpha / r$.

    Returns:
        `[out, in]`.

    Examples:
        >>> low_rank_change(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), scale=0.5).tolist()
        [[1.5, 3.0], [2.0, 4.0]]
    """
    return B @ A * scale
