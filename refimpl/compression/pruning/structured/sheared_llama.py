r"""Sheared LLaMA: learn which part of a model has a given smaller shape and loses least, cut it out, and go on training.

Source: `sheared-llama` (arXiv 2310.06694), Section 2.1 (targeted structured pruning), Section 2.2 with Algorithm 1 (dynamic batch
loading, `refimpl.compression.pruning.domain_loading`); gates and cut in `hard_concrete` and `gates` there; official code
princeton-nlp/LLM-Shearing@b87218b566c73f6b246aaad3e4c42883f65a48a6, llmshearing/models/l0_module.py, llmshearing/train.py,
llmshearing/scripts/pruning.sh and continue_pretrain.sh, for all rates: Adam with betas 0.9 and 0.95, gradients of norm 1 at most, a
learning rate of 1 for gates and multipliers, targets that rise over the first fifth of the steps, warm-up over a tenth of the steps
(3 % in the second phase), cosine decay to a tenth, 64 evaluations while pruning and 120 after.

Differs from the paper: the numbers of steps and texts are settings, small by default, where the paper takes 3,200 steps of 32 texts and
48,000 of 256; so the result is no match for it. Without `domains` all calibration texts are one, and loading is not dynamic. A
reference loss that is not given is that of the model before it is pruned. All texts of a step meet the same gates, where each of the
authors' devices draws its own; the first step has a rate above 0, theirs is 0. Dropout is not used. A model in half precision is trained in
float32 and rounded at the end, where the authors mix them.

Not here: training over several devices; the width of single heads; a target that is a number of parameters alone.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.compression.anatomy import anatomy
from refimpl.compression.calibration import batches_of
from refimpl.compression.protocol import M
from refimpl.compression.pruning.domain_loading import Domain, Loading, Watch, text_loss
from refimpl.compression.pruning.gates import Gates, Shape, check_place, cut_, gated, shape_of
from refimpl.compression.pruning.masks import Masks

GATE_RATE, BETAS = 1.0, (0.9, 0.95)
TARGET_WARM_UP = 640 / 3200  # share of the pruning steps over which the targets rise
WARM_UP, WARM_UP_AFTER, FLOOR = 0.1, 0.03, 0.1  # shares of the steps; of the learning rate
EVALUATIONS, EVALUATIONS_AFTER = 3200 // 50, 48000 // 400


@dataclass(frozen=True, kw_only=True)
class ShearedLLaMA:
    r"""Targeted structured pruning and continued training.

    Args:
        sparsity: share of the blocks' parameters that is removed, 0 to below 1; width, heads and feed-forward each keep its
            complement's square root of their size, rounded. The paper's models have lost 0.61 and 0.81.
        target: sizes to cut to, by their names in `Shape`; those left out follow from `sparsity`, but blocks, which all stay. The paper's:
            `{d_model: 2560, n_kv_heads: 20, d_ff: 6912}` and `{d_model: 2048, n_layers: 24, n_kv_heads: 16, d_ff: 5504}`.
        steps: of pruning, 1 or more. Gates and multipliers move at the authors' rate, whatever their number: they pass the targets and
            come back, and have settled there after 200 to 400 steps; with fewer, what is cut is not what was closed.
        continued_steps: of training after the cut; None takes as many as of pruning, the paper 15 times as many.
        lr: largest learning rate of the weights.
        batch_size: texts of a step.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import Decoder, initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> method = ShearedLLaMA(target={"d_model": 20, "n_layers": 1, "n_kv_heads": 1, "d_ff": 30}, steps=3)
        >>> small = method(model, [torch.arange(40).view(4, 10)])
        >>> shape_of(small), small.embedding, small.config.n_heads
        (Shape(d_model=20, n_layers=1, n_kv_heads=1, d_ff=30), Embedding(61, 20), 2)
    """

    sparsity: float = 0.5
    target: Mapping[str, int] | None = None
    steps: int = 100
    continued_steps: int | None = None
    lr: float = 1e-4
    batch_size: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} must be 0 (nothing is removed) to below 1 (all is)")
        known = ("d_model", "n_layers", "n_kv_heads", "d_ff")
        for name, size in (self.target or {}).items():
            if name not in known or size < 1:
                raise ValueError(
                    f"target={dict(self.target or {})} must give sizes of 1 or more by the names {', '.join(known)}"
                )
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.continued_steps is not None and self.continued_steps < 0:
            raise ValueError(f"continued_steps={self.continued_steps} must be 0 (none) or more")
        if not 0 <= self.lr < float("inf"):
            raise ValueError(f"lr={self.lr} must be 0 or more; the paper uses 1e-4")

    @torch.enable_grad()
    def __call__(self, model: M, calibration: Iterable[Any] = (), *, domains: Mapping[str, Domain] | None = None) -> M:
        """A smaller, trained copy of the target shape, in evaluation mode.

        Args:
            model: one that `anatomy` knows, of one shape in all blocks, that ends in a norm; left unchanged.
            calibration: texts to train on, tokens `[batch, time]` or a dict with them (`refimpl.compression.text_loss`).
            domains: texts in several domains, instead of `calibration`.

        Raises:
            ValueError: the model is none of these; the target is larger than it, or one that its architecture can't say; there are no
                texts, the model can't take them, or the loss is NaN or infinite.
        """
        batches = batches_of(calibration)
        source = shape_of(model)
        target = self.shape(model, source)
        small = copy.deepcopy(model).eval()
        if target == source:
            return small
        if not batches and domains is None:
            raise ValueError("Sheared LLaMA needs texts to train on: pass `calibration`, or `domains`")
        domains = domains or {"all": Domain(texts=batches)}
        generator = torch.Generator().manual_seed(0)
        loading = Loading(domains, generator)
        dtypes = {name: tensor.dtype for name, tensor in small.state_dict().items()}
        takes = any(parameter.requires_grad for parameter in small.parameters())
        if any(dtype in (torch.float16, torch.bfloat16) for dtype in dtypes.values()):
            small.float()
        small.requires_grad_(True)
        watch = Watch(small, domains)
        gates = self._prune(small, target, loading, watch, generator)
        small.zero_grad()
        cut_(small, gates)
        self._continue(small, loading, watch)
        for name, tensor in [*small.named_parameters(), *small.named_buffers()]:
            tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))
            tensor.grad = None
        return small.requires_grad_(takes)

    def shape(self, model: nn.Module, source: Shape) -> Shape:
        """The target shape for a model.

        Args:
            model: the model.
            source: its shape.

        Raises:
            ValueError: a size is larger than the model's; its architecture can't say the shape.
        """
        keep = math.sqrt(1 - self.sparsity)
        block = anatomy(model).blocks[0]
        heads = max(1, round(source.n_kv_heads * keep))
        filled = block.n_kv_heads == block.n_heads and source.d_model == source.n_kv_heads * block.head_dim
        given = dict(self.target or {})
        heads = given.get("n_kv_heads", heads)
        width = (
            heads * block.head_dim if filled else max(1, round(source.d_model * keep))
        )  # as wide as its heads before: after, too
        sizes = {
            "d_model": width,
            "n_layers": source.n_layers,
            "n_kv_heads": heads,
            "d_ff": max(1, round(source.d_ff * keep)),
        }
        shape = Shape(**(sizes | given))
        if shape == source and self.sparsity and not given:
            shape = replace(source, d_ff=max(1, source.d_ff - 1))  # little is more than nothing
        for name, size in asdict(shape).items():
            if size > getattr(source, name):
                raise ValueError(f"target {name}={size} is larger than the model's {getattr(source, name)}")
        check_place(model, shape)
        return shape

    def _prune(
        self, model: nn.Module, target: Shape, loading: Loading, watch: Watch, generator: torch.Generator
    ) -> Gates:
        """Train weights and gates under the constraint, in place; the gates that are left open in the end."""
        parts = anatomy(model)
        masks = Masks(shape_of(model), target, generator).to(next(model.parameters()).device)
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(
            [
                {"params": weights, "lr": self.lr},
                {"params": list(masks.log_alpha.values()), "lr": GATE_RATE},
                {"params": list(masks.multipliers.values()), "lr": GATE_RATE, "maximize": True},
            ],
            betas=BETAS,
        )
        every = max(1, self.steps // EVALUATIONS)
        for step in range(self.steps):
            masks.clamp_()
            with gated(model, parts, masks.draw(generator)):
                loss = text_loss(model, loading.draw(self.batch_size))
            total = loss + masks.penalty(min(1.0, step / (TARGET_WARM_UP * self.steps)))
            _step(optimizer, total, [*weights, *masks.parameters()], step, self.steps, WARM_UP)
            if (step + 1) % every == 0:
                with gated(model, parts, masks.settled(None)):
                    watch.update(model, loading)
        masks.clamp_()
        return masks.settled(target)

    def _continue(self, model: nn.Module, loading: Loading, watch: Watch) -> None:
        """Train the smaller model, in place."""
        steps = self.steps if self.continued_steps is None else self.continued_steps
        if not steps:
            return
        weights = list(model.parameters())
        optimizer = torch.optim.Adam(weights, lr=self.lr, betas=BETAS)
        every = max(1, steps // EVALUATIONS_AFTER)
        for step in range(steps):
            _step(optimizer, text_loss(model, loading.draw(self.batch_size)), weights, step, steps, WARM_UP_AFTER)
            if (step + 1) % every == 0:
                watch.update(model, loading)


def rate(step: int, steps: int, warm_up: float) -> float:
    """Factor of the learning rates at a step, from 0: linear up over a share of the steps, then a cosine down to a tenth.

    Examples:
        >>> [round(rate(step, 1000, 0.1), 3) for step in (0, 49, 99, 550, 1000)]
        [0.01, 0.5, 1.0, 0.55, 0.1]
    """
    first = warm_up * steps
    if step < first - 1:
        return (step + 1) / first
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * min(1.0, max(0.0, step - first) / (steps - first)))) / 2


def _step(
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    parameters: list[nn.Parameter],
    step: int,
    steps: int,
    warm_up: float,
) -> None:
    """One update of all parameters at its learning rate; the groups' own are as before."""
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    largest = [group["lr"] for group in optimizer.param_groups]
    for group, lr in zip(optimizer.param_groups, largest, strict=True):
        group["lr"] = lr * rate(step, steps, warm_up)
    optimizer.step()
    for group, lr in zip(optimizer.param_groups, largest, strict=True):
        group["lr"] = lr
