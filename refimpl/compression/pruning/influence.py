r"""Which channels that a model's layers read depend on which that its layers make: derivatives between cut-out layers.

Every linear layer and embedding is cut out: what it would return is replaced by random numbers, which cost no product. All else runs as
it is. Rows of the batch do not depend on each other, so that each row can ask for another channel, and one backward answers for all.

Not here: what follows for pruning (`refimpl.compression.pruning.dependency`).

Examples:
    >>> model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 4), nn.GLU(), nn.Linear(2, 3))
    >>> trace = run_cut(model, torch.tensor([[0]]))
    >>> weights = torch.zeros(ROWS, TIME, 2)
    >>> weights[0, :, 0], weights[1, :, 1] = 1.0, 1.0
    >>> [(name, seen[:2].int().tolist()) for name, seen in fed_by(trace, trace.read["3"][0], weights)]
    [('1', [[1, 0, 1, 0], [0, 1, 0, 1]])]
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.compression.calibration import call
from refimpl.model.linear import is_linear, sizes

ROWS, TIME = 64, 4  # channels looked at in one run, and positions of each


@dataclass
class Trace:
    """What every layer read and what was put in the place of what it makes, call by call; and what the model returned."""

    read: dict[str, list[Tensor]] = field(default_factory=dict)
    made: list[tuple[str, Tensor]] = field(default_factory=list)
    returned: list[Tensor] = field(default_factory=list)


@torch.enable_grad()
def run_cut(model: nn.Module, tokens: Any) -> Trace:
    """Run a model on several rows with random numbers in the place of what its linear layers and embeddings make.

    Args:
        model: in evaluation mode; left as it is.
        tokens: `[batch, time]` or a dict with such; the first one is repeated.

    Raises:
        ValueError: the model can't take them.
    """
    trace, generator = Trace(), torch.Generator().manual_seed(0)
    replaced = {name: m for name, m in model.named_modules() if is_linear(m) or isinstance(m, nn.Embedding)}

    def stand_in(name: str, module: nn.Module, forward: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            if is_linear(module):
                x = args[0] if args else next(iter(kwargs.values()))
                trace.read.setdefault(name, []).append(x)
                like = x.new_empty(*x.shape[:-1], sizes(module)[0])
            else:
                with torch.no_grad():
                    like = forward(*args, **kwargs)
            values = _of_both_signs(like, generator).requires_grad_()
            trace.made.append((name, values))
            return values

        return made

    batch = (
        {key: _repeated(value) for key, value in tokens.items()} if isinstance(tokens, Mapping) else _repeated(tokens)
    )
    before = {name: vars(module).get("forward") for name, module in replaced.items()}
    try:
        for name, module in replaced.items():
            vars(module)["forward"] = stand_in(name, module, module.forward)
        output = call(model, batch)
    finally:
        for name, module in replaced.items():
            vars(module).pop("forward", None)
            if before[name] is not None:
                vars(module)["forward"] = before[name]
    trace.returned = [output if isinstance(output, Tensor) else output.logits]
    return trace


def _repeated(tokens: Any) -> Any:
    return tokens[:1, :1].repeat(ROWS, TIME) if isinstance(tokens, Tensor) else tokens


def _of_both_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers between 0.1 and 1 whose sign changes from one position to the next: no ReLU is shut at all of them."""
    size = 0.1 + 0.9 * torch.rand(like.shape, generator=generator)
    sign = (torch.rand(like.shape[-1:], generator=generator) < 0.5).float() * 2 - 1
    turn = 1 - 2.0 * (torch.arange(like.shape[-2]) % 2)[:, None] if like.ndim > 1 else torch.ones(1)
    return (size * sign * turn).to(like.device, like.dtype)


def fed_by(trace: Trace, x: Tensor, weights: Tensor) -> list[tuple[str, Tensor]]:
    """For each row, which channels of which layers a weighted sum of what a layer read depends on.

    Args:
        trace: of the run.
        x: one of its tensors.
        weights: of the same shape.

    Returns:
        Names of layers, and `[ROWS, channels]`, bool.
    """
    if not x.requires_grad:
        return []
    made = [values for _, values in trace.made]
    gradients = torch.autograd.grad(x, made, weights.to(x.dtype), retain_graph=True, allow_unused=True)
    found = []
    for (name, _), gradient in zip(trace.made, gradients, strict=True):
        if gradient is not None:
            seen = (gradient != 0).flatten(0, -2)
            seen = (
                seen.view(ROWS, -1, seen.shape[-1]).any(1) if len(seen) % ROWS == 0 else seen.any(0)
            )  # or all rows share it
            found.append((name, seen.expand(ROWS, -1).cpu()))
    return found
