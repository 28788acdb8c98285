r"""Dynamic batch loading: texts of several domains, drawn more often where the loss is still far from what it should reach.

Source: `sheared-llama` (arXiv 2310.06694), Section 2.2 with Algorithm 1; official code
princeton-nlp/LLM-Shearing@b87218b566c73f6b246aaad3e4c42883f65a48a6, llmshearing/callbacks/dynamic_loading_callback.py,
llmshearing/datasets/streaming_dataset.py, scaling_law/reference_loss_estimation.ipynb.

Differs from the paper: none in Algorithm 1; the official code leaves the maximum with 0 out and mixes the weights with a little of the
uniform distribution, as DoReMi does, which `domain_weights` has as options. Texts of a domain are read in their order, and again from the
start where they are used up; the authors' never are.

Examples:
    >>> domains = {"code": Domain(texts=[torch.zeros(6, 4).long()]), "web": Domain(texts=[torch.ones(2, 4).long()])}
    >>> loading = Loading(domains, torch.Generator().manual_seed(0))
    >>> loading.weights.tolist()
    [0.75, 0.25]
    >>> sum(len(batch) for batch in loading.draw(8))
    8
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.compression.calibration import batches_of
from refimpl.compression.text_loss import IGNORED, check_texts, loss_of, next_tokens, rows_of


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Texts of one kind.

    Args:
        texts: batches to train on, as `refimpl.compression.text_loss` takes them.
        validation: batches to see how far the model is; left out, the texts themselves.
        reference: loss that it should reach there, nats a token (`predicted_loss`); None takes the loss of the model before it is
            pruned.
        weight: share of the batches at the start; None takes the share of the texts.
    """

    texts: Sequence[Any]
    validation: Sequence[Any] = ()
    reference: float | None = None
    weight: float | None = None


class Loading:
    """Texts drawn from domains by their weights.

    Args:
        domains: at least one, by name.
        generator: what the domain of each text is drawn from.

    Attributes:
        weights: `[domains]`, their shares of the next batch, float64, changed by who trains.

    Raises:
        ValueError: there is no domain; one has no text, or texts without a token to predict; weights are given for some domains only, or
            are no shares.
    """

    weights: Tensor

    def __init__(self, domains: Mapping[str, Domain], generator: torch.Generator) -> None:
        if not domains:
            raise ValueError("domains is empty: give at least one")
        self.rows: list[list[Any]] = []
        for name, domain in domains.items():
            batches = batches_of(domain.texts)
            if not batches:
                raise ValueError(f"domain {name!r} has no texts: leave it out")
            check_texts(batches)
            self.rows.append([row for batch in batches for row in rows_of(batch)])
        given = [domain.weight for domain in domains.values()]
        shares = [float(len(rows)) for rows in self.rows] if given == [None] * len(given) else given
        if any(share is None or not 0 < share < math.inf for share in shares):
            raise ValueError(f"weights of domains {given} must all be given and positive, or none")
        self.weights = torch.tensor(shares, dtype=torch.float64) / sum(shares)  # type: ignore[arg-type]
        self.generator, self.read = generator, [0] * len(self.rows)

    def draw(self, n: int) -> list[Any]:
        """The next n texts, each from a domain drawn by its weight; those of one length come as one batch."""
        rows = []
        for domain in torch.multinomial(self.weights, n, replacement=True, generator=self.generator).tolist():
            rows.append(self.rows[domain][self.read[domain] % len(self.rows[domain])])
            self.read[domain] += 1
        return _collated(rows)


class Watch:
    """Evaluates domains while a model is trained, and sets their weights; with one domain it does nothing.

    Args:
        model: before it is pruned, for references that are not given.
        domains: what is trained on.
    """

    def __init__(self, model: nn.Module, domains: Mapping[str, Domain]) -> None:
        self.texts = [batches_of(domain.validation or domain.texts) for domain in domains.values()]
        self.references = torch.zeros(len(domains), dtype=torch.float64)
        if len(domains) > 1:
            given = [domain.reference for domain in domains.values()]
            found = self.losses(model) if None in given else self.references
            known = [float(own) if ref is None else ref for own, ref in zip(found, given, strict=True)]
            self.references = torch.tensor(known, dtype=torch.float64)

    @torch.no_grad()
    def losses(self, model: nn.Module) -> Tensor:
        """Loss on each domain, `[domains]`, nats a token, float64."""
        return torch.stack([text_loss(model, texts).double().cpu() for texts in self.texts])

    def update(self, model: nn.Module, loading: Loading) -> None:
        """Evaluate the model, and give the domains their new weights."""
        if len(self.texts) > 1:
            loading.weights = domain_weights(loading.weights, self.losses(model), self.references)


def text_loss(model: nn.Module, batches: list[Any]) -> Tensor:
    """Mean cross-entropy over the tokens of all batches, a scalar, nats.

    Raises:
        ValueError: it is NaN or infinite.
    """
    total = torch.stack([loss_of(model, batch, i).sum() for i, batch in enumerate(batches)]).sum()
    count = sum(int((next_tokens(batch, i) != IGNORED).sum()) for i, batch in enumerate(batches))
    loss = total / max(1, count)
    if not torch.isfinite(loss):
        raise ValueError(
            f"the loss is {float(loss.detach())}: look for the text that causes it, or train at a lower lr"
        )
    return loss


def domain_weights(
    weights: Tensor, losses: Tensor, references: Tensor, *, clip: bool = True, smoothing: float = 0.0
) -> Tensor:
    r"""Shares of domains after an evaluation (Algorithm 1): $w_i \propto w_i \exp(\max(\ell_i - \ell^{ref}_i, 0))$.

    Args:
        weights: `[domains]`, shares before it.
        losses: `[domains]`, nats a token.
        references: `[domains]`, losses to be reached.
        clip: whether a loss below its reference counts as one that reaches it; the official code says False.
        smoothing: share of the uniform distribution that is mixed in; the official code's is 1e-4.

    Returns:
        `[domains]`, shares, their sum is 1.

    Examples:
        >>> losses = torch.tensor([3.0 + math.log(3.0), 1.0])
        >>> domain_weights(torch.tensor([0.5, 0.5]), losses, torch.tensor([3.0, 2.0])).mul(100).round().tolist()
        [75.0, 25.0]
    """
    excess = losses - references
    grown = torch.softmax(weights.log() + (excess.clamp_min(0.0) if clip else excess), dim=0)
    return (1 - smoothing) * grown + smoothing / len(grown)


def predicted_loss(sizes: Sequence[int], losses: Sequence[float], size: int) -> float:
    r"""The loss of a model of another size, by the law $\ell(N) = E + A / N^\alpha$ through three points.

    Args:
        sizes: parameters of three models of one family, rising.
        losses: theirs on a domain, falling.
        size: parameters of the model asked for.

    Raises:
        ValueError: there are not three sizes, rising, and three losses, falling; or no $\alpha$ from -5 to 5 fits.

    Examples:
        >>> round(predicted_loss([1, 10, 100], [4.0, 3.0, 2.5], 1000), 6)
        2.25
    """
    rising = len(sizes) == len(losses) == 3 and 0 < sizes[0] < sizes[1] < sizes[2]
    if not (rising and losses[0] > losses[1] > losses[2]):
        raise ValueError(
            f"sizes={list(sizes)} and losses={list(losses)} must be three, the sizes rising, the losses falling"
        )
    near, far = math.log(sizes[1] / sizes[0]), math.log(sizes[2] / sizes[1])
    wanted, low, high = (losses[0] - losses[1]) / (losses[1] - losses[2]), -5.0, 5.0

    def ratio(alpha: float) -> float:
        """(l0 - l1) / (l1 - l2) under the law, rising with alpha."""
        return near / far if alpha == 0 else -math.expm1(alpha * near) / math.expm1(-alpha * far)

    if not ratio(low) < wanted < ratio(high):
        raise ValueError(f"losses={list(losses)} at sizes={list(sizes)} follow no law with an exponent from -5 to 5")
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) < wanted else (low, middle)
    if low == 0:
        return losses[0] + (losses[1] - losses[0]) * math.log(size / sizes[0]) / near
    share = math.expm1(-low * math.log(size / sizes[0])) / math.expm1(-low * near)
    return losses[0] + (losses[1] - losses[0]) * share


def _collated(rows: list[Any]) -> list[Any]:
    """Rows of one kind and length as one batch."""
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        parts = row.items() if isinstance(row, Mapping) else [("", row)]
        key = tuple((name, tuple(x.shape) if isinstance(x, Tensor) else id(x)) for name, x in parts)
        groups.setdefault(key, []).append(row)
    return [_joined(group) for group in groups.values()]


def _joined(rows: list[Any]) -> Any:
    first = rows[0]
    if not isinstance(first, Mapping):
        return torch.cat(rows)
    return {k: torch.cat([row[k] for row in rows]) if isinstance(v, Tensor) else v for k, v in first.items()}
