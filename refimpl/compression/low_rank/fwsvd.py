r"""FWSVD: weight a layer's inputs by how much the loss depends on what is done with them, then decompose.

Source: `fwsvd` (arXiv 2207.00112), Section 4: the empirical Fisher information, its sum over a row, and the closed form of the
weighted problem; Section 5.1 for factors without further training. There is no official code; that rows are the *inputs*
of a layer follows from the paper's $Z = XW$, and AIoT-MLSys-Lab/SVD-LLM and hahnyuan/ASVD4LLM read it likewise.

Differs from the paper: the loss is that of predicting the next token of each calibration text, where the paper has the loss
of the task that a model was fine-tuned for; a text is one sample d of the data set. The second factor is computed as
$U_r^\top W$, which $\Sigma_r V_r^\top \hat I^{-1/2}$ is equal to, so that inputs of no information need no care. A layer whose
gradient is zero for all texts is decomposed with equal weights. The model is read without dropout. Rank follows from a share
of the parameters, the same for all layers.

Not here: fine-tuning of the factors after the decomposition, which the paper's best results have; factored embeddings.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from refimpl.compression.calibration import batches_of
from refimpl.compression.low_rank.factored import check_size, output_directions, project, rank_for
from refimpl.compression.low_rank.layers import linear_layers, replace_weight
from refimpl.compression.protocol import M
from refimpl.compression.text_loss import IGNORED, check_texts, mean_loss, next_tokens, rows_of
from refimpl.model.linear import is_transposed, sizes, weight_of


@dataclass(frozen=True, kw_only=True)
class FWSVD:
    r"""Fisher-weighted SVD of every linear layer but the output layer.

    Args:
        ratio: share of each layer's parameters removed, 0 to below 1: $r = \lfloor (1 - ratio)\,mn / (m + n) \rfloor$, at
            least 1.
        rank: r itself, the same for all layers; `ratio` then counts for nothing.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.model import Decoder, initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
        >>> small = FWSVD(ratio=0.5)(model, [torch.arange(20).view(2, 10)])
        >>> small.layers[0].feed_forward.down_proj.compressed.left.shape
        torch.Size([32, 8])
    """

    ratio: float = 0.2
    rank: int | None = None

    def __post_init__(self) -> None:
        check_size(self.ratio, self.rank)

    def __call__(self, model: M, calibration: Iterable[Any] = ()) -> M:
        """A copy with factored layers, in evaluation mode.

        Args:
            model: a language model, from tokens to logits or to an object with `logits`; left unchanged. One in half
                precision is differentiated in a float32 copy.
            calibration: texts whose next tokens are predicted: tokens `[batch, time]`, or a dict with them (`text`).

        Raises:
            ValueError: there is nothing to factor; there is no calibration data, or the model can't take it; a gradient is NaN
                or infinite, or a layer is never reached.
        """
        batches = batches_of(calibration)
        layers = linear_layers(model)
        if self.rank is None and self.ratio == 0:
            return copy.deepcopy(model).eval()
        if not batches:
            raise ValueError("FWSVD needs texts to differentiate the loss on: pass `calibration`")
        check_texts(batches)
        information = fisher_information(model, list(layers), batches)
        small = copy.deepcopy(model).eval()
        for name, layer in linear_layers(small).items():
            weight = weight_of(layer)
            basis = weighted_basis(weight, information[name])
            out, columns = weight.shape
            replace_weight(small, name, project(weight, basis, self.rank or rank_for(out, columns, self.ratio)))
        return small


def fisher_information(model: nn.Module, names: list[str], batches: list[Any]) -> Mapping[str, Tensor]:
    r"""$\hat I_j = \sum_i \frac{1}{|D|} \sum_{d \in D} (\partial L(d) / \partial W_{ij})^2$ of each input j of each layer.

    A square is taken of the gradient of one text, not of their mean, and so every text is differentiated on its own: what
    autograd gives for several at once is their sum.

    Args:
        model: left unchanged.
        names: of linear layers.
        batches: texts, as `text.loss_of` takes them; L is the mean over the tokens of a text.

    Returns:
        `[in]`, float32 (float64 of a model in it), by name: summed over a layer's outputs.

    Raises:
        ValueError: as FWSVD does.
    """
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model = model.float() if half else model
    layers = [cast(nn.Linear, model.get_submodule(name)) for name in names]
    weights = [layer.weight.requires_grad_() for layer in layers]
    sums = [layer.weight.new_zeros(sizes(layer)[1]) for layer in layers]
    texts = 0
    for i, batch in enumerate(batches):
        for text, counted in zip(rows_of(batch), (next_tokens(batch, i) != IGNORED).sum(1).tolist(), strict=True):
            if not counted:
                continue  # all padding
            with torch.enable_grad():
                gradients = torch.autograd.grad(mean_loss(model, text, i), weights, allow_unused=True)
            texts += 1
            for name, layer, gradient, total in zip(names, layers, gradients, sums, strict=True):
                if gradient is None:
                    raise ValueError(f"the loss of calibration batch {i} does not depend on layer {name!r}")
                total += gradient.square_().sum(1 if is_transposed(layer) else 0)
                if not torch.isfinite(total).all():
                    raise ValueError(f"the gradient of layer {name!r} on calibration batch {i} is NaN or infinite")
    return {name: total / texts for name, total in zip(names, sums, strict=True)}


@torch.no_grad()
def weighted_basis(weight: Tensor, information: Tensor) -> Tensor:
    r"""Directions of the outputs in which $\sum_j \hat I_j \|W_{:j} - \hat W_{:j}\|^2$ is least, most important first.

    Left singular vectors of $W \hat I^{1/2}$; the paper's $\hat I W$ is this transposed.

    Args:
        weight: `[out, in]`.
        information: $\hat I$, `[in]`, 0 or more; all zero stands for all equal.

    Returns:
        `[out, min(out, in)]`, in float32 or the weight's float64.

    Examples:
        >>> weighted_basis(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 9.0])).abs().tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
    root = (information if information.any() else torch.ones_like(information)).to(precise.dtype).sqrt()
    return output_directions(precise * (root / root.max()))[0]
