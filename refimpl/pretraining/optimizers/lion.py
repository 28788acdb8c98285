r"""Lion: move every weight by the same amount, in the direction of the sign of an interpolated momentum.

Source: `lion` (arXiv 2302.06675), Algorithm 2; official code google/automl@6a54c8741e7c3265d4547c4f35f47a0391122dc5,
lion/lion_pytorch.py, whose defaults are kept.

Differs from the paper: none.

Not here: the search that found it (google/automl, hero).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from refimpl.pretraining.optimizers.protocol import Optimizer, check_range


class Lion(Optimizer):
    r"""Sign of an interpolated momentum, with decoupled weight decay.

    State: one momentum in the parameter's shape, float32 or wider. Against AdamW's, take a learning rate 3 to 10 times
    smaller and a decay as much larger (the paper's Section 5).

    Args:
        params: parameters, or groups of them with settings of their own.
        lr: $\eta$, what every entry with a gradient moves by, 0 or more.
        betas: $\beta_1$, the momentum's share in the direction, and $\beta_2$, what is kept of it; 0 to below 1. The authors
            take (0.95, 0.98) for language models.
        weight_decay: $\lambda$, share of a weight that a step at learning rate 1 would take off, 0 or more.

    Raises:
        ValueError: a setting out of its range, or complex parameters.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
        >>> optimizer = Lion([weight], lr=0.25)
        >>> (weight * torch.tensor([5.0, -0.01, 0.0])).sum().backward()
        >>> optimizer.step(), weight.tolist()
        (None, [0.75, 1.25, 1.0])
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise ValueError for settings out of range."""
        check_range("lr", settings["lr"], 0.0, hint="3 to 10 times less than AdamW's is usual")
        check_range("betas[0]", settings["betas"][0], 0.0, 1.0, "0.9 is usual")
        check_range("betas[1]", settings["betas"][1], 0.0, 1.0, "0.99 is usual")
        check_range("weight_decay", settings["weight_decay"], 0.0, hint="3 to 10 times more than AdamW's is usual")

    def fresh_state(self, parameter: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - all alike
        """Zero momentum."""
        return {"exp_avg": torch.zeros_like(parameter)}

    def update(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        states: list[dict[str, Any]],
        settings: Mapping[str, Any],
    ) -> None:
        r"""One step of Algorithm 2.

        $c = \beta_1 m + (1-\beta_1) g$, then $\theta \leftarrow (1 - \eta\lambda)\theta - \eta \operatorname{sign}(c)$ and
        $m \leftarrow \beta_2 m + (1-\beta_2) g$.
        """
        lr, (beta1, beta2) = settings["lr"], settings["betas"]
        m = [state["exp_avg"] for state in states]
        direction = list(torch._foreach_lerp(m, gradients, 1 - beta1))
        torch._foreach_sign_(direction)
        if settings["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * settings["weight_decay"])
        torch._foreach_add_(parameters, direction, alpha=-lr)
        torch._foreach_lerp_(m, gradients, 1 - beta2)
