r"""What the loss would be without a group of channels, estimated from gradients on a few texts.

Without a weight w, the loss changes by about $g w - \frac12 h w^2$ less; with the squared gradient in the place of the curvature h:

    first     $|g w|$ of each element
    vector    $|\sum g w|$ over a row or a column
    second    $w^2 \overline{g^2}$ of each element
    mixed     $|g w - \frac12 w^2 \overline{g^2}|$ of each element

summed over what a layer has in the group; then over its layers, or their product, maximum, or the last layer's alone.

Source: `llm-pruner` (arXiv 2305.11627), Section 3.2 with Eq. (3) to (5); official code
horseee/LLM-Pruner@128a07d977f9b205d60ab14cfbc6a78f8a8e39d2, LLMPruner/pruner/hf_llama_pruner.py and hf_prune.py.

Differs from the paper: squared gradients are averaged over the texts, as in the official code (Eq. 5 has their sum beside a mean loss).
A head's importance in one layer is the sum over its channels, and layers are aggregated then; the official code does it the other way
round, which differs for product and maximum of heads.

Examples:
    >>> from refimpl.compression.pruning.dependency import coupled_groups
    >>> model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4))
    >>> texts = [torch.tensor([[0, 1, 2, 3]])]
    >>> [list(score.shape) for score in importance(model, coupled_groups(model, texts[0]), texts)]
    [[5]]
"""

from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from refimpl.compression.pruning.dependency import Family
from refimpl.compression.text_loss import mean_loss, rows_of
from refimpl.model.linear import is_transposed, weight_of

Taylor = Literal["vector", "first", "second", "mixed"]
Aggregation = Literal["sum", "prod", "max", "last"]


def importance(
    model: nn.Module,
    families: list[Family],
    batches: list[Any],
    taylor: Taylor = "first",
    aggregation: Aggregation = "sum",
    samples: int = 10,
) -> list[Tensor]:
    """Estimated loss without each group, `[n_groups]` for each family, float64.

    Args:
        model: in evaluation mode.
        families: of its groups.
        batches: texts.
        taylor: how the loss without a weight is estimated, see above.
        aggregation: how the layers of a group are put together: `last` takes the layer that runs last alone.
        samples: texts that gradients are taken on, the first ones.

    Raises:
        ValueError: the loss is NaN or infinite, or does not depend on a layer.
    """
    names = list(dict.fromkeys(member.layer for family in families for member in family.members))
    gradients, squares = mean_gradients(model, names, batches, samples)
    scores = []
    for family in families:
        layers = []
        for member in family.members:
            weight = weight_of(model.get_submodule(member.layer)).float()  # type: ignore[arg-type]
            first, second = weight * gradients[member.layer], weight.square() * squares[member.layer]
            across = 1 if member.side == "out" else 0
            element = {"first": first, "second": second, "mixed": first - second / 2}
            channel = first.sum(across).abs() if taylor == "vector" else element[taylor].abs().sum(across)
            belongs = member.group.to(channel.device) >= 0
            total = torch.zeros(family.n_groups, dtype=torch.float64, device=channel.device)
            layers.append(
                total.index_add_(0, member.group.to(channel.device)[belongs], channel[belongs].double()).cpu()
            )
        stacked = torch.stack(layers)
        together = {"sum": stacked.sum(0), "prod": stacked.prod(0), "max": stacked.amax(0), "last": stacked[-1]}
        scores.append(together[aggregation])
    return scores


@torch.enable_grad()
def mean_gradients(
    model: nn.Module, names: list[str], batches: list[Any], samples: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean over texts of the loss's gradient, and of its square, for some layers' weights `[out, in]`, float32.

    Raises:
        ValueError: the loss is NaN or infinite, or does not depend on a layer.
    """
    weights: dict[str, Tensor] = {name: model.get_submodule(name).get_parameter("weight") for name in names}
    took = {parameter: parameter.requires_grad for parameter in model.parameters()}
    rows = list(islice(((row, i) for i, batch in enumerate(batches) for row in rows_of(batch)), samples))
    means: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    try:
        model.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        for row, i in rows:
            found = torch.autograd.grad(mean_loss(model, row, i), list(weights.values()), allow_unused=True)
            for name, gradient in zip(names, found, strict=True):
                if gradient is None:
                    raise ValueError(f"the loss of the calibration data does not depend on layer {name!r}")
                gradient = gradient.float().T if is_transposed(model.get_submodule(name)) else gradient.float()
                means[name] = means.get(name, torch.zeros_like(gradient)) + gradient / len(rows)
                squares[name] = squares.get(name, torch.zeros_like(gradient)) + gradient.square() / len(rows)
    finally:
        for parameter, takes in took.items():
            parameter.requires_grad_(takes)
    return means, squares
