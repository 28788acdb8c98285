r"""LLM-Pruner: remove the groups of coupled weights that the loss would miss least, and heal the cut with LoRA.

Source: `llm-pruner` (arXiv 2305.11627), Section 3.1 (groups, see `refimpl.compression.pruning.dependency`), Section 3.2 with
Eq. (3) to (5) (importance, see `taylor` there), Section 3.3 (recovery); official code
horseee/LLM-Pruner@128a07d977f9b205d60ab14cfbc6a78f8a8e39d2, hf_prune.py, LLMPruner/pruner/hf_llama_pruner.py,
LLMPruner/torch_pruning/pruner/algorithms/metapruner.py, scripts/llama_prune.sh, post_training.py.

Pruning is block-wise: heads and neurons of feed-forwards, the same share in each block, none in the first four and the last two of 32
blocks. For another number of blocks both ends scale with it and are rounded up, as long as a block remains to be pruned.

Differs from the paper: how importances are averaged and aggregated, see `refimpl.compression.pruning.taylor`. One group of each kind is
always left. The recovery trains on the calibration texts,
for few steps and without dropout, where the paper has two epochs of instructions; a layer narrower than the rank is left out.

Not here: channel-wise and layer-wise pruning, global ranking, pruning in several rounds; importance by magnitude or at random (a test
has them as rivals); a checkpoint of the result in Hugging Face's layout, since its blocks have different sizes, which no config.json
says (`refimpl.compression.folder` writes it in its own).
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from refimpl.compression.blocks import find_blocks
from refimpl.compression.calibration import batches_of
from refimpl.compression.protocol import CompressedLinear, M
from refimpl.compression.pruning.dependency import Family, coupled_groups, cut_
from refimpl.compression.pruning.taylor import Aggregation, Taylor, importance
from refimpl.compression.text_loss import check_texts, mean_loss
from refimpl.finetuning.peft.lora.lora import LoRA
from refimpl.model.linear import is_linear, sizes

FIRST, LAST = 4 / 32, 2 / 32  # shares of the blocks that are left whole (scripts/llama_prune.sh)
RANK, ALPHA, WARM_UP = 8, 16.0, 100 / 1560  # of LoRA; 100 of two epochs of 50,000 samples in batches of 64


@dataclass(frozen=True, kw_only=True)
class LLMPruner:
    r"""Structured pruning by gradients, and recovery by LoRA.

    Args:
        sparsity: share of the heads and of the neurons of each pruned block that is removed, 0 to below 1; the number that stays
            is rounded up. The paper's 0.25 removes 20 % of LLaMA-7B.
        taylor: how the loss without a weight is estimated: `first`, $|g w|$ of each element, the official code's default; `vector`,
            $|\sum g w|$ over a row or column; `second`, $w^2 \overline{g^2}$; `mixed`, $|g w - \frac12 w^2 \overline{g^2}|$ (Eq. 5).
        aggregation: how the layers of a group are put together: `sum`, `prod`, `max`, or `last`, the layer that runs last alone.
        samples: texts that gradients are taken on, the first of the calibration data; the official code takes 10.
        steps: of recovery; 0 leaves it out. Each takes one calibration batch.
        lr: largest learning rate of the recovery.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import Decoder, initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> small = LLMPruner(sparsity=0.5, steps=0)(model, [torch.arange(40).view(4, 10)])
        >>> [layer.feed_forward.up_proj.weight.shape[0] for layer in small.layers]
        [40, 20, 40]
        >>> small.layers[1].attention.o_proj, small(torch.arange(5)[None]).shape
        (Linear(in_features=16, out_features=32, bias=False), torch.Size([1, 5, 61]))
    """

    sparsity: float = 0.25
    taylor: Taylor = "first"
    aggregation: Aggregation = "sum"
    samples: int = 10
    steps: int = 30
    lr: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} must be 0 (nothing is removed) to below 1 (all is)")
        for name, known in {"taylor": Taylor, "aggregation": Aggregation}.items():
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(get_args(known))}")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples} must be at least 1; the official code takes 10")
        if self.steps < 0:
            raise ValueError(f"steps={self.steps} must be 0 (no recovery) or more")
        if not 0 <= self.lr < float("inf"):
            raise ValueError(f"lr={self.lr} must be 0 or more")

    def __call__(self, model: M, calibration: Iterable[Any] = ()) -> M:
        """A pruned and recovered copy, in evaluation mode.

        Args:
            model: a language model with a list of blocks, from tokens to logits or to an object with `logits`: `refimpl.model`'s
                decoder, transformers' Llama, OPT, GPT-2 and the like; left unchanged.
            calibration: texts, tokens `[batch, time]` or a dict with them (`refimpl.compression.text_loss`).

        Raises:
            ValueError: the model has no blocks, or no groups in those that are pruned; it is compressed already; there is no
                calibration data, the model can't take it, or its loss is NaN or infinite.
        """
        batches = batches_of(calibration)
        small = copy.deepcopy(model).eval()
        if not self.sparsity:
            return small
        if not batches:
            raise ValueError("LLM-Pruner needs texts to see what the loss would miss: pass `calibration`")
        check_texts(batches)
        layers = prunable_layers(small)
        families = coupled_groups(small, _first_tokens(batches[0]), layers)
        if not families:
            raise ValueError(f"no group of channels can be removed from layers {layers[:4]} and others: all are joined")
        scores = importance(small, families, batches, self.taylor, self.aggregation, self.samples)
        cut_(small, families, [self.kept(family, score) for family, score in zip(families, scores, strict=True)])
        if self.steps:
            recover_(small, batches, self.steps, self.lr)
        return small

    def kept(self, family: Family, score: Tensor) -> Tensor:
        """Which groups of a family stay, `[n_groups]`, bool: the most important; of equal ones, the earlier go first.

        Args:
            family: the groups.
            score: `[n_groups]`, their importance.
        """
        channels = int((family.members[0].group >= 0).sum())
        removed = (channels - int(channels * (1 - self.sparsity))) // (channels // family.n_groups)
        stays = torch.ones(family.n_groups, dtype=torch.bool)
        stays[score.argsort(stable=True)[: min(removed, family.n_groups - 1)]] = False
        return stays


def prunable_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers of the blocks that are pruned.

    Raises:
        ValueError: the model has no blocks, or several lists of them; a layer of those that are pruned is compressed already.
    """
    name, blocks = find_blocks(model)
    first, last = whole_ends(len(blocks))
    modules = {
        f"{name}.{place}.{inner}": module
        for place in range(first, len(blocks) - last)
        for inner, module in blocks[place].named_modules()
    }
    for layer, module in modules.items():
        if isinstance(module, CompressedLinear):
            raise ValueError(
                f"layer {layer!r} is compressed already: prune the original model, and compress what comes out of it"
            )
    return [layer for layer, module in modules.items() if is_linear(module)]


def whole_ends(blocks: int) -> tuple[int, int]:
    """How many blocks are left whole at the beginning and at the end.

    Examples:
        >>> [whole_ends(blocks) for blocks in (32, 80, 6, 3, 2, 1)]
        [(4, 2), (10, 5), (1, 1), (1, 1), (1, 0), (0, 0)]
    """
    first = min(blocks - 1, -int(-blocks * FIRST // 1))
    return first, min(blocks - 1 - first, -int(-blocks * LAST // 1))


@torch.enable_grad()
def recover_(model: nn.Module, batches: list[Any], steps: int, lr: float) -> None:
    """Train LoRA on all linear layers of the blocks and merge it, in place; shapes stay, and so does the evaluation mode.

    Args:
        model: the pruned model.
        batches: texts, one batch a step, in order and again from the start.
        steps: 1 or more.
        lr: largest learning rate of AdamW; up linearly in the first steps, then linearly down.

    Raises:
        ValueError: the loss is NaN or infinite.
    """
    name, blocks = find_blocks(model)
    wide = [
        f"{name}.{inner}"
        for inner, module in blocks.named_modules()
        if is_linear(module) and min(sizes(module)) >= RANK
    ]
    if not wide:
        return
    took = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    lora = LoRA(rank=RANK, alpha=ALPHA, target=tuple(wide))
    lora.inject(model, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(lora.trainable(model).values(), lr=lr, weight_decay=0.0)
    warm_up = max(1, round(WARM_UP * steps))
    for step in range(steps):
        place = step % len(batches)
        optimizer.zero_grad()
        mean_loss(model, batches[place], place).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(lora.trainable(model).values(), 1.0)
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
        optimizer.step()
    lora.merge(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(took[name])


def _first_tokens(batch: Any) -> Any:
    """A batch's tokens, as the model takes them, without all else."""
    if not isinstance(batch, Mapping):
        return batch
    return {key: batch[key] for key in ("tokens", "input_ids") if key in batch}
