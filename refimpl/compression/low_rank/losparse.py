r"""LoSparse: a low-rank product plus a residual that loses neuron after neuron while both are trained.

Source: `losparse` (arXiv 2306.11222), Section 3 with Algorithm 1: the start from the SVD, the importance of entries and neurons, its
average over steps, the cubic schedule; official code yxli2123/LoSparse@7513452313f85611d356db064e4279062b5a73b9, utils.py,
and train_glue.sh (MNLI) for what is left open: learning rate, $\beta$, 10 steps between prunings, 5 % of the weights in the
product, the lengths of the first and last phase and of the warm-up as shares of the training, AdamW without decay, whose learning
rate rises and falls linearly.

The calibration batches are what is trained on, in order and again from the start: the loss is that of their next tokens. All
parameters are trained that take a gradient.

Differs from the paper: the task is the text's, and the number of steps is a setting, small by default, where the paper runs
8 to 12 epochs over a task's data; neither is dropout used. Importance is that of the weights before the step, as in Algorithm 1 (the
official code multiplies by those after it); neurons are pruned at the last step of a window of averaging, there one step later. What
remains of the residuals is a budget of parameters that is never exceeded, the
products being counted at their real ranks, which are rounded down (there, up). A layer whose parts would hold no fewer numbers
than the weight is put together again. A model in half precision is trained in float32 and rounded at the end.

Not here: distillation from the original model in the same training; other scores of a neuron (maximum, uncertainty).
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.compression.calibration import batches_of
from refimpl.compression.low_rank.factored import FactoredPlusRows, FactoredWeight, WholeWeight, rank_for
from refimpl.compression.low_rank.layers import linear_layers
from refimpl.compression.low_rank.svd import truncate
from refimpl.compression.protocol import CompressedLinear, CompressedWeight, M
from refimpl.compression.text_loss import check_texts, mean_loss
from refimpl.model.linear import weight_of

FIRST, LAST = 0.055, 0.275  # shares of the steps before pruning and at its end (675 and 3375 of 12272, train_glue.sh)
WARM_UP = 0.039  # of those in which the learning rate rises (480, likewise)


@dataclass(frozen=True, kw_only=True)
class LoSparse:
    r"""Low-rank and structured sparse approximation, by training.

    Args:
        ratio: share of the linear layers' parameters removed, 0 to below 1; the paper removes 50 to 95 percent.
        low_rank: share of a weight's parameters that its product UV holds, 0 (pruning alone) to 1 - ratio (no residual).
        steps: of training, 1 or more.
        lr: largest learning rate of AdamW.
        beta: weight of the past in the average of importances.
        every: steps whose importances are averaged alike, and between prunings before the last phase.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import Decoder, initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> small = LoSparse(ratio=0.5, steps=10)(model, [torch.arange(20).view(2, 10)])
        >>> sum(held.numel() for held in model.layers.state_dict().values())
        6976
        >>> 3000 < sum(held.numel() for held in small.layers.state_dict().values()) < 3700
        True
    """

    ratio: float = 0.2
    low_rank: float = 0.05
    steps: int = 30
    lr: float = 9e-5
    beta: float = 0.85
    every: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio={self.ratio} must be 0 (nothing is removed) to below 1 (all of it)")
        if not 0 <= self.low_rank <= 1 - self.ratio + 1e-9:
            raise ValueError(f"low_rank={self.low_rank} must be 0 to 1 - ratio = {1 - self.ratio:g}, all that remains")
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta={self.beta} must be 0 (no memory) to below 1; the paper uses 0.85")
        if not 0 <= self.lr < float("inf"):
            raise ValueError(f"lr={self.lr} must be 0 or more")
        for name in ("steps", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @torch.enable_grad()
    def __call__(self, model: M, calibration: Iterable[Any] = ()) -> M:
        """A trained and compressed copy, in evaluation mode.

        Args:
            model: a language model, from tokens to logits or to an object with `logits`; left unchanged.
            calibration: texts to train on: tokens `[batch, time]`, or a dict with them (`text`).

        Raises:
            ValueError: there is nothing to compress; there is no calibration data, or the model can't take it; the loss is NaN or
                infinite, or a layer is never reached.
        """
        batches = batches_of(calibration)
        linear_layers(model)
        small = copy.deepcopy(model).eval()
        if self.ratio == 0:
            return small
        if not batches:
            raise ValueError("LoSparse needs texts to train on: pass `calibration`")
        check_texts(batches)
        dtypes = {name: tensor.dtype for name, tensor in small.state_dict().items()}
        takes = {name: parameter.requires_grad for name, parameter in small.named_parameters()}
        if any(dtype in (torch.float16, torch.bfloat16) for dtype in dtypes.values()):
            small.float()
        parts: dict[str, LowRankPlusSparse] = {}
        for name, layer in linear_layers(small).items():
            out, columns = weight_of(layer).shape
            rank = rank_for(out, columns, 1 - self.low_rank) if self.low_rank else 0
            parts[name] = LowRankPlusSparse(layer, rank)
            small.set_submodule(name, parts[name])
        kept = self._train(small, parts, batches)
        with torch.no_grad():
            for (name, part), rows in zip(parts.items(), kept, strict=True):
                small.set_submodule(name, part.compressed(rows, dtypes[f"{name}.weight"]))
            for name, tensor in [*small.named_parameters(), *small.named_buffers()]:
                if name in dtypes:
                    tensor.data = tensor.data.to(dtypes[name])
        for name, parameter in small.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(takes.get(name, False))
        return small

    def _train(self, model: nn.Module, parts: "dict[str, LowRankPlusSparse]", batches: list[Any]) -> list[Tensor]:
        """Algorithm 1: trains in place, and returns which rows of each residual remain."""
        total = sum(part.sparse.numel() for part in parts.values())
        products = sum(part.left.numel() + part.right.numel() for part in parts.values())
        final = max(0.0, (1 - self.ratio) * total - products) / total
        residuals = [part.sparse for part in parts.values()]
        kept = [torch.ones(len(s), dtype=torch.bool, device=s.device) for s in residuals]
        window = [torch.zeros_like(s) for s in residuals]
        average = [torch.zeros_like(s) for s in residuals]
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.0)
        in_window = averaged = 0
        for step in range(1, self.steps + 1):
            place = (step - 1) % len(batches)
            mean_loss(model, batches[place], place).backward()  # type: ignore[no-untyped-call]
            for name, part, seen in zip(parts, parts.values(), window, strict=True):
                if part.sparse.grad is None:
                    raise ValueError(f"the loss of the calibration data does not depend on layer {name!r}")
                seen += (part.sparse.detach() * part.sparse.grad).abs()
            in_window += 1
            optimizer.param_groups[0]["lr"] = self.lr * warm_up_and_decay(step, self.steps)
            optimizer.step()
            optimizer.zero_grad()
            ended = step % self.every == 0 or step == self.steps
            if ended:
                for past, seen in zip(average, window, strict=True):
                    past.lerp_(seen / in_window, 1 - self.beta)
                    seen.zero_()
                in_window, averaged = 0, averaged + 1
            share, last = remaining_share(step, self.steps, final)
            if averaged and (last or (ended and share < 1)):
                kept = most_important_rows(average, share)
                for s, rows in zip(residuals, kept, strict=True):
                    s.data[~rows] = 0.0
        return kept


class LowRankPlusSparse(nn.Module):
    r"""$W = UV + S$ while it is trained: at first the truncated SVD and all that it leaves out."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        weight = weight_of(layer)
        left, right = truncate(weight, rank)
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)
        self.sparse = nn.Parameter(weight - left @ right)
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:
        """`[out, in]`, for code that reads a layer's weight."""
        return self.left @ self.right + self.sparse

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        return F.linear(F.linear(inputs, self.right), self.left, self.bias) + F.linear(inputs, self.sparse)

    def compressed(self, rows: Tensor, dtype: torch.dtype) -> CompressedLinear:
        """What is stored in the end: factors, and the rows of S that remain, `[out]`, bool."""
        out, columns = self.sparse.shape
        left, right, held = self.left.to(dtype), self.right.to(dtype), int(rows.sum())
        weight: CompressedWeight
        if left.numel() + right.numel() + held * columns >= out * columns:
            weight = WholeWeight(self.weight.to(dtype))
        elif held:
            weight = FactoredPlusRows(left, right, self.sparse[rows].to(dtype), rows.nonzero().flatten())
        else:
            weight = FactoredWeight(left, right)
        return CompressedLinear(weight, None if self.bias is None else self.bias.to(dtype))


def remaining_share(step: int, steps: int, final: float) -> tuple[float, bool]:
    r"""Share of the residual that remains at a step, and whether it is the last phase (Section 3, cubic schedule).

    All until step $t_i$; then $p = f + (1 - f)\left(1 - \frac{t - t_i}{T - t_i - t_f}\right)^3$; f in the last $t_f$ steps.

    Args:
        step: t, from 1.
        steps: T.
        final: f.

    Examples:
        >>> [round(remaining_share(step, 1000, 0.2)[0], 3) for step in (1, 55, 390, 725, 1000)]
        [1.0, 1.0, 0.3, 0.2, 0.2]
    """
    first, last = FIRST * steps, LAST * steps
    if step >= steps - last:
        return final, True
    if step <= first:
        return 1.0, False
    return final + (1 - final) * (1 - (step - first) / (steps - first - last)) ** 3, False


def warm_up_and_decay(step: int, steps: int) -> float:
    """Factor of the learning rate at a step, from 1: linear up, then linear down.

    Examples:
        >>> [warm_up_and_decay(step, 1000) for step in (13, 39, 1000)]
        [0.333..., 1.0, 0.001...]
    """
    first = WARM_UP * steps
    return min(1.0, step / first, (steps - step + 1) / (steps - first))


def most_important_rows(importance: Sequence[Tensor], share: float) -> list[Tensor]:
    r"""Which rows remain, the most important of all matrices first, as long as their entries are no more than a share.

    The score of a row, an output neuron, is the mean of its entries' importances, so that rows of different lengths compare.

    Args:
        importance: of each entry, `[out, in]` for each matrix.
        share: of all entries, 0 to 1.

    Returns:
        `[out]`, bool, for each matrix.

    Examples:
        >>> [rows.tolist() for rows in most_important_rows([torch.tensor([[1.0, 3.0], [0.0, 1.0]]), torch.ones(1, 4)], 0.5)]
        [[True, False], [False]]
    """
    scores = torch.cat([matrix.mean(dim=1) for matrix in importance])
    sizes = torch.cat([torch.full((len(m),), m.shape[1], device=m.device) for m in importance])
    order = scores.argsort(descending=True, stable=True)
    fits = sizes[order].cumsum(0) <= share * int(sizes.sum()) + 1e-6
    kept = torch.zeros_like(fits)
    kept[order[fits]] = True
    return list(torch.split(kept, [len(matrix) for matrix in importance]))
