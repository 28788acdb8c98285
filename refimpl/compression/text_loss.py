r"""What a language model loses on calibration texts: for methods that look at the model's loss.

The label of a position is the token after it. Calibration batches are tokens `[batch, time]`, or a dict of keyword arguments
with them under `tokens` (`refimpl.model`) or `input_ids` (transformers). What is padding by `padding` or `attention_mask` is
neither read from nor predicted; a dict with `labels` (transformers' convention: in place, -100 for what does not count) says
for itself what is to be predicted.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.compression.calibration import call

IGNORED = -100


def loss_of(model: nn.Module, batch: Any, i: int = 0) -> Tensor:
    """Cross-entropy of each next token, `[batch, time - 1]`, nats, float32; 0 at positions that do not count.

    Args:
        model: from tokens to logits, or to an object with `logits`.
        batch: as above.
        i: its place in the calibration data, for messages.

    Raises:
        ValueError: the batch has no tokens; the model can't take it or returns no logits.

    Examples:
        >>> model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4)).requires_grad_(False)
        >>> _ = nn.init.zeros_(model[1].weight), nn.init.zeros_(model[1].bias)
        >>> loss_of(model, torch.tensor([[0, 1, 2]])).exp().round().tolist()
        [[4.0, 4.0]]
    """
    labels = next_tokens(batch, i)
    output = call(model, batch, i)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None or logits.ndim != 3 or logits.shape[1] != labels.shape[1] + 1:
        raise ValueError(
            "the model must return logits [batch, time, vocabulary], or an object that has them as `logits`"
        )
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )
    return losses.view(labels.shape)


def mean_loss(model: nn.Module, batch: Any, i: int = 0) -> Tensor:
    """Mean of `loss_of` over the positions that count, a scalar; 0 if none does.

    Raises:
        ValueError: it is NaN or infinite, or what `loss_of` raises.
    """
    loss = loss_of(model, batch, i).sum() / (next_tokens(batch, i) != IGNORED).sum().clamp_min(1)
    if not torch.isfinite(loss):
        raise ValueError(
            f"the loss on calibration batch {i} is {float(loss.detach())}: look for the text that causes it, or train at a lower lr"
        )
    return loss


def next_tokens(batch: Any, i: int = 0) -> Tensor:
    """Labels of all positions but the last, `[batch, time - 1]`, -100 for those that do not count.

    Raises:
        ValueError: the batch has no tokens.
    """
    given = batch if isinstance(batch, Mapping) else {"tokens": batch}
    tokens = next((given[key] for key in ("tokens", "input_ids") if key in given), None)
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
        raise ValueError(
            f"calibration batch {i} must hold tokens [batch, time]: the loss of predicting them is looked at"
        )
    if "labels" in given:
        labels: Tensor = given["labels"][:, 1:]
    else:
        real = torch.ones_like(tokens, dtype=torch.bool)
        if given.get("attention_mask") is not None:
            real = given["attention_mask"].bool()
        elif given.get("padding") is not None:
            real = torch.arange(tokens.shape[1], device=tokens.device) >= given["padding"][:, None]
        labels = tokens[:, 1:].masked_fill(~(real[:, 1:] & real[:, :-1]), IGNORED)
    return labels


def check_texts(batches: list[Any]) -> None:
    """Refuse data without a token to predict.

    Raises:
        ValueError: a batch has no tokens, or no text is longer than one.
    """
    if not any((next_tokens(batch, i) != IGNORED).any() for i, batch in enumerate(batches)):
        raise ValueError("the calibration data has no token with one before it: give texts of two tokens or more")


def rows_of(batch: Any, size: int = 1) -> Iterator[Any]:
    """Batches of at most `size` rows each, in order; what is not one value for each row goes to all of them.

    Examples:
        >>> [rows.tolist() for rows in rows_of(torch.arange(6).view(3, 2), 2)]
        [[[0, 1], [2, 3]], [[4, 5]]]
    """
    n = n_rows(batch)
    for start in range(0, n, size):
        yield _each(batch, n, lambda value, start=start: value[start : start + size])


def repeated(batch: Any, times: int) -> Any:
    """All rows of a batch, one time after the other: row i of time t is row `t * rows + i`."""
    return _each(batch, n_rows(batch), lambda value: value.repeat(times, *[1] * (value.ndim - 1)))


def n_rows(batch: Any) -> int:
    """Number of texts of a batch that `next_tokens` takes."""
    tokens: Tensor = batch.get("tokens", batch.get("input_ids")) if isinstance(batch, Mapping) else batch
    return tokens.shape[0]


def _each(batch: Any, n: int, change: Any) -> Any:
    """A batch in which every tensor of n rows is changed."""
    if not isinstance(batch, Mapping):
        return change(batch)
    return {
        key: change(value) if isinstance(value, Tensor) and value.ndim and value.shape[0] == n else value
        for key, value in batch.items()
    }
