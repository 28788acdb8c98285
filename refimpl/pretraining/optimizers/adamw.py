r"""AdamW: Adam, with the weight decay applied to the weights and not through the gradient.

Source: `adamw` (arXiv 1711.05101), Algorithm 2; the moments and their correction are those of `adam` (arXiv 1412.6980),
Algorithm 1; official code loshchil/AdamW-and-SGDW@0ae5185b3c655e45cc249adaca4457cd881874cc, UPDATETORCHFILES/adam.lua.

Differs from the paper: the decay is $\eta_t\alpha\lambda$, the learning rate included, as in PyTorch, where the paper's is
$\eta_t\lambda$: `weight_decay` here is the paper's $\lambda/\alpha$, and is then the same at every point of any schedule. The
official code adds $\epsilon$ before it corrects the second moment; this follows the paper.

Not here: AMSGrad; the normalized weight decay and the warm restarts of the paper's Appendix.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from refimpl.pretraining.optimizers.protocol import Optimizer, check_range


class AdamW(Optimizer):
    r"""Adam with decoupled weight decay.

    State: two moments in the parameter's shape, float32 or wider, and a step count.

    Args:
        params: parameters, or groups of them with settings of their own.
        lr: $\eta_t\alpha$, 0 or more.
        betas: $\beta_1, \beta_2$, how much of each moment is kept from step to step, 0 to below 1.
        eps: $\epsilon$, 0 or more; with 0, an entry whose gradients were all zero becomes NaN.
        weight_decay: share of a weight that a step at learning rate 1 would take off, 0 or more. PyTorch's default.

    Raises:
        ValueError: a setting out of its range, or complex parameters.

    Examples:
        The first step moves each weight by the learning rate, whatever the gradient's size:

        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = AdamW([weight], lr=0.25, weight_decay=0.0)
        >>> (weight * torch.tensor([5.0, -0.01])).sum().backward()
        >>> optimizer.step(), [round(w, 4) for w in weight.tolist()]
        (None, [0.75, 1.25])
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise ValueError for settings out of range."""
        check_range("lr", settings["lr"], 0.0, hint="1e-3 is usual for small models")
        check_range("betas[0]", settings["betas"][0], 0.0, 1.0, "0.9 is usual")
        check_range("betas[1]", settings["betas"][1], 0.0, 1.0, "0.999 is usual, 0.95 for language models")
        check_range("eps", settings["eps"], 0.0, hint="1e-8 is usual")
        check_range("weight_decay", settings["weight_decay"], 0.0, hint="0 is none, 0.1 is usual for matrices")

    def fresh_state(self, parameter: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - all alike
        """Zero steps and zero moments."""
        return {"step": 0, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}

    def update(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        states: list[dict[str, Any]],
        settings: Mapping[str, Any],
    ) -> None:
        r"""One step of Algorithm 2.

        $m \leftarrow \beta_1 m + (1-\beta_1) g$ and $v \leftarrow \beta_2 v + (1-\beta_2) g^2$, corrected by
        $c_i = 1 - \beta_i^t$; then $\theta \leftarrow (1 - \eta\lambda)\theta - \eta\,\frac{m/c_1}{\sqrt{v/c_2} + \epsilon}$.
        """
        lr, eps, (beta1, beta2) = settings["lr"], settings["eps"], settings["betas"]
        for state in states:
            state["step"] += 1
        c1 = [1 - beta1 ** int(state["step"]) for state in states]
        c2 = [1 - beta2 ** int(state["step"]) for state in states]
        m, v = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        torch._foreach_lerp_(m, gradients, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
        if settings["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * settings["weight_decay"])
        size = list(torch._foreach_sqrt(v))
        torch._foreach_div_(size, [math.sqrt(c) for c in c2])
        torch._foreach_add_(size, eps)
        torch._foreach_addcdiv_(parameters, m, size, [-lr / c for c in c1])
