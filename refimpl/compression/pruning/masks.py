r"""Masks that learn which gates of a decoder stay open, under the constraint that as many do as a target shape asks for.

$$\min_{\theta, \alpha} \max_{\lambda, \phi} \; L(\theta, z) + \sum_g \lambda_g (s_g - t_g) + \phi_g (s_g - t_g)^2$$

with $s_g$ the expected share of closed gates of a kind g, and $t_g$ the target's. Weights and masks descend, multipliers ascend.

Source: `sheared-llama` (arXiv 2310.06694), Section 2.1; official code
princeton-nlp/LLM-Shearing@b87218b566c73f6b246aaad3e4c42883f65a48a6, llmshearing/models/l0_module.py.

Differs from the paper: none.

Examples:
    >>> source, target = (Shape(d_model=8, n_layers=2, n_kv_heads=2, d_ff=n) for n in (10, 5))
    >>> masks = Masks(source, target, torch.Generator().manual_seed(0))
    >>> masks.targets["inner"], masks.settled(target)["inner"].count_nonzero(dim=1).tolist(), masks.penalty(1.0).item()
    (0.5, [5, 5], 0.0)
"""

import torch
from torch import Tensor, nn

from refimpl.compression.pruning.gates import KINDS, Gates, Shape, open_gates
from refimpl.compression.pruning.hard_concrete import LIMIT, probability_of_zero, sample, settled


class Masks(nn.Module):
    r"""The locations $\log\alpha$ of all gates, and the multipliers $\lambda, \phi$ of each kind's constraint.

    Args:
        source: shape of the model.
        target: shape that is asked for.
        generator: what the start is drawn from: nearly all gates are open, $\log\alpha$ is near 5 and is clamped to log 100.
    """

    def __init__(self, source: Shape, target: Shape, generator: torch.Generator) -> None:
        super().__init__()
        start = {kind: 5 + 0.01 * torch.randn(x.shape, generator=generator) for kind, x in open_gates(source).items()}
        self.log_alpha = nn.ParameterDict({kind: nn.Parameter(x) for kind, x in start.items()})
        self.multipliers = nn.ParameterDict({kind: nn.Parameter(torch.zeros(2)) for kind in KINDS})
        self.targets = {kind: 1 - target.of(kind) / source.of(kind) for kind in KINDS}

    @torch.no_grad()
    def clamp_(self) -> None:
        r"""Keep every $\log\alpha$ within log 0.01 and log 100."""
        for x in self.log_alpha.values():
            x.clamp_(-LIMIT, LIMIT)

    def draw(self, generator: torch.Generator) -> Gates:
        """Gates with fresh noise, the same for all texts of a step."""
        noise = {kind: torch.rand(x.shape, generator=generator).to(x.device) for kind, x in self.log_alpha.items()}
        return {kind: sample(x, noise[kind]) for kind, x in self.log_alpha.items()}

    def sparsity(self, kind: str) -> Tensor:
        """Expected share of closed gates: a number, or `[n_layers]` where each block has gates of its own."""
        return probability_of_zero(self.log_alpha[kind]).mean(dim=-1)

    def penalty(self, progress: float) -> Tensor:
        r"""$\sum_g \lambda_g (s_g - t_g) + \phi_g (s_g - t_g)^2$, each the mean over the blocks (Section 2.1).

        Args:
            progress: share of the targets that is asked for by now, 0 to 1.
        """
        terms = []
        for kind, (first, second) in self.multipliers.items():
            off = self.sparsity(kind) - progress * self.targets[kind]
            terms.append((first * off + second * off.square()).mean())
        return torch.stack(terms).sum()

    @torch.no_grad()
    def settled(self, target: Shape | None) -> Gates:
        """Gates without noise, as many open as in the target, or as is expected now."""
        return {
            kind: settled(x.detach(), None if target is None else target.of(kind)) for kind, x in self.log_alpha.items()
        }
