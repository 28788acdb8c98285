r"""ASVD: scale a layer's inputs by their size before the decomposition, and give each layer the rank it needs.

Source: `asvd` (arXiv 2312.05821), Section 3: the scaling, with mean absolute inputs and $\alpha = 0.5$, and sensitivity-based
truncation rank searching (STRS); official code hahnyuan/ASVD4LLM@863042743edb4c0dcc512a45534dea07df16b140, act_aware_utils.py,
sensitivity.py, binary_search.py, modules/svd_linear.py.

Differs from the paper: the second factor is computed as $U_r^\top W$, which $\Sigma_r V_r^\top S^{-1}$ is equal to; an input that
is always zero then needs nothing added to S (the official code adds $10^{-6}$). The decomposition is exact (there, randomized
with as many samples as ranks). Candidates are the paper's 0.1 to 0.9 (the newest official code: 0.4 to 0.9). The output layer is
left alone. `rank_search` says what differs in the search.

Not here: Cholesky whitening as a second choice of S, which is `svd_llm`; factored caches of keys and values.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.compression.calibration import batches_of, call
from refimpl.compression.low_rank.factored import output_directions, project, rank_for
from refimpl.compression.low_rank.layers import linear_layers, replace_weight
from refimpl.compression.low_rank.rank_search import Candidate, choose_ranks, perplexities
from refimpl.compression.protocol import M
from refimpl.compression.text_loss import check_texts, n_rows, next_tokens, rows_of
from refimpl.model.linear import weight_of


@dataclass(frozen=True, kw_only=True)
class ASVD:
    r"""Activation-aware SVD with a rank for each layer.

    Args:
        ratio: share of all factored layers' parameters removed, 0 up to what the smallest of `candidates` leaves.
        alpha: exponent of the mean absolute input in $S_{jj}$; 0 is the plain SVD.
        candidates: shares of a layer's parameters *kept* that the search tries.
        samples: texts that perplexity is measured on, the first ones of the calibration data (official code: 32).

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import Decoder, initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> small = ASVD(ratio=0.5)(model, [torch.arange(20).view(2, 10)])
        >>> sum(held.numel() for held in small.layers.state_dict().values()) < 3500, sum(
        ...     held.numel() for held in model.layers.state_dict().values()
        ... )
        (True, 6976)
    """

    ratio: float = 0.2
    alpha: float = 0.5
    candidates: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    samples: int = 32

    def __post_init__(self) -> None:
        if not self.candidates or not all(0 < kept < 1 for kept in self.candidates):
            raise ValueError(f"candidates={self.candidates} must be shares of parameters kept, above 0 and below 1")
        if not 0 <= self.ratio <= 1 - min(self.candidates):
            raise ValueError(
                f"ratio={self.ratio} must be 0 to {1 - min(self.candidates):g}, what the smallest candidate removes; give "
                "smaller `candidates`"
            )
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha={self.alpha} must be 0 (plain SVD) or more; the paper uses 0.5")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples} must be at least 1")

    @torch.no_grad()
    def __call__(self, model: M, calibration: Iterable[Any] = ()) -> M:
        """A copy with factored layers, in evaluation mode; layers that the search leaves whole stay as they are.

        Args:
            model: a language model, from tokens to logits or to an object with `logits`; left unchanged.
            calibration: texts: tokens `[batch, time]`, or a dict with them (`text`). Inputs are averaged over all of them.

        Raises:
            ValueError: there is nothing to factor; there is no calibration data, or the model can't take it; a layer is never
                reached; a perplexity is NaN.
        """
        batches = batches_of(calibration)
        small = copy.deepcopy(model).eval()
        layers = linear_layers(small)
        if self.ratio == 0:
            return small
        if not batches:
            raise ValueError("ASVD needs texts for the size of inputs and the search for ranks: pass `calibration`")
        texts = _first(batches, self.samples)
        check_texts(texts)
        sizes = mean_absolute_inputs(small, layers, batches)
        bases = {name: scaled_basis(weight_of(layer), sizes[name], self.alpha) for name, layer in layers.items()}
        found: list[Candidate] = []
        for name, layer in layers.items():
            ranks = self._ranks(layer)
            values = perplexities(small, name, bases[name], ranks, texts) if ranks else []
            found += [Candidate(name, rank, value) for rank, value in zip(ranks, values, strict=True)]
        for name, rank in choose_ranks(found, layers, self.ratio).items():
            replace_weight(small, name, project(weight_of(layers[name]), bases[name], rank))
        return small

    def _ranks(self, layer: nn.Linear) -> list[int]:
        """Ranks of the candidate ratios, those left out at which factors would be no smaller."""
        out, columns = weight_of(layer).shape
        ranks = [rank_for(out, columns, 1 - kept) for kept in self.candidates]
        return sorted({rank for rank in ranks if rank * (out + columns) < out * columns})


def mean_absolute_inputs(model: nn.Module, layers: dict[str, nn.Linear], batches: list[Any]) -> dict[str, Tensor]:
    r"""$\frac{1}{T} \sum_t |X_{jt}|$ of each input of each layer, `[in]`, float64, in one run of the model.

    Raises:
        ValueError: a layer is never reached, or its inputs are NaN or infinite.
    """
    sums: dict[str, Tensor] = {}
    rows = dict.fromkeys(layers, 0)

    def watch(name: str) -> Any:
        def note(_layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0].detach().flatten(0, -2).abs()
            sums[name] = sums.get(name, 0) + inputs.sum(0, dtype=torch.float64)
            rows[name] += len(inputs)

        return note

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        for i, batch in enumerate(batches):
            call(model, batch, i)
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if not rows[name]:
            raise ValueError(f"the calibration data never reaches layer {name!r}")
        if not torch.isfinite(sums[name]).all():
            raise ValueError(f"the calibration data makes NaN or infinity in the inputs of layer {name!r}")
    return {name: sums[name] / rows[name] for name in layers}


@torch.no_grad()
def scaled_basis(weight: Tensor, size: Tensor, alpha: float = 0.5) -> Tensor:
    r"""Left singular vectors of $WS$, $S_{jj} = size_j^\alpha$, most important first.

    Args:
        weight: `[out, in]`.
        size: mean absolute inputs, `[in]`.
        alpha: 0 or more.

    Returns:
        `[out, min(out, in)]`, in float32 or the weight's float64.

    Examples:
        >>> scaled_basis(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 9.0])).abs().tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return output_directions(precise * size.pow(alpha).to(precise.dtype))[0]


def _first(batches: list[Any], samples: int) -> list[Any]:
    """The first texts of the data."""
    chosen: list[Any] = []
    for i, batch in enumerate(batches):
        if samples < 1:
            break
        next_tokens(batch, i)  # refuses what has no rows
        rows = next(rows_of(batch, samples))
        chosen.append(rows)
        samples -= n_rows(rows)
    return chosen
