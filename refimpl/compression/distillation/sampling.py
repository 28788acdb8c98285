r"""Text that models write while a student is trained: on its own, or teacher and student token by token together.

Source: none; `minillm` (arXiv 2306.08543), Eq. (4), draws from a mixture, the others from one model.

Differs from `refimpl.model.generate`: several models may share each draw; the temperature is 1; a model of another make is
read from the start for each token, without a cache.

Not here: an end of text (windows of plain text have none, and all continuations are equally long).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from refimpl.compression.distillation.protocol import Sequences, logits_of
from refimpl.model.cache import FullCache
from refimpl.model.generate import probabilities
from refimpl.model.model import Decoder


def continued(
    batch: Tensor, prompt: float, models: Sequence[tuple[float, nn.Module]], generator: torch.Generator
) -> Sequences:
    """The first part of each row of a batch, and what models write after it, up to the same length.

    Args:
        batch: `[batch, time + 1]` tokens.
        prompt: share of each row that is kept, in (0, 1); at least one token is kept, and one written.
        models: as of `written`.
        generator: source of the draws, on the models' device.

    Returns:
        Tokens of the batch's shape, and a mask that counts what was written.

    Examples:
        >>> reader = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7))
        >>> given = continued(torch.arange(6).view(1, 6), 0.5, [(1.0, reader)], torch.Generator().manual_seed(0))
        >>> given.tokens.shape, given.tokens[0, :3].tolist(), given.mask.tolist()
        (torch.Size([1, 6]), [0, 1, 2], [[False, False, True, True, True]])
    """
    kept = kept_tokens(batch.shape[1], prompt)
    tokens = torch.cat((batch[:, :kept], written(models, batch[:, :kept], batch.shape[1] - kept, generator)), dim=1)
    return Sequences(tokens, written_mask(tokens, prompt))


def check_prompt(prompt: float) -> None:
    """Refuse a share of a row that can't be kept as its prompt.

    Raises:
        ValueError: it is not in (0, 1).
    """
    if not 0 < prompt < 1:
        raise ValueError(f"prompt={prompt} must be in (0, 1), the share of a window that is kept")


def kept_tokens(length: int, prompt: float) -> int:
    """Tokens of a row that are kept as its prompt: at least one, and not all.

    Raises:
        ValueError: a row too short for both.

    Examples:
        >>> kept_tokens(7, 0.5), kept_tokens(7, 0.01), kept_tokens(2, 0.99)
        (3, 1, 1)
    """
    if length < 2:
        raise ValueError(f"rows of {length} tokens must have 2 at least: one of a prompt and one that is written")
    return min(max(1, int(prompt * length)), length - 1)


def written_mask(tokens: Tensor, prompt: float) -> Tensor:
    """Which targets of rows `[batch, time + 1]` that `continued` returned were written: `[batch, time]`."""
    length = tokens.shape[1]
    mask = torch.arange(1, length, device=tokens.device) >= kept_tokens(length, prompt)
    return mask.expand(len(tokens), -1)


@torch.no_grad()
def written(models: Sequence[tuple[float, nn.Module]], prompts: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Tokens drawn one by one from the weighted mean of what models expect next.

    Args:
        models: pairs (share, model), shares summing to 1; in evaluation mode while they write, and then as before.
        prompts: `[batch, time]`.
        n: tokens to write, 1 or more.
        generator: source of the draws, on the models' device.

    Returns:
        `[batch, n]`.
    """
    modes = [model.training for _, model in models]
    readers = [(share, _reader(model.eval(), prompts.shape[1] + n)) for share, model in models]
    new, out = prompts, []
    try:
        for _ in range(n):
            chances = torch.stack([share * probabilities(read(new), 1.0) for share, read in readers]).sum(0)
            new = torch.multinomial(chances, 1, generator=generator)
            out.append(new)
    finally:
        for (_, model), mode in zip(models, modes, strict=True):
            model.train(mode)
    return torch.cat(out, dim=1)


def _reader(model: nn.Module, length: int) -> Callable[[Tensor], Tensor]:
    """A function from the tokens that have come since its last call to the logits `[batch, vocabulary]` after them."""
    if isinstance(model, Decoder):
        cache = FullCache(model.config.sliding_window, reserve=length)
        return lambda new: model.logits(model.hidden(new, cache)[:, -1])
    past: list[Tensor] = []

    def read(new: Tensor) -> Tensor:
        past.append(new)
        return logits_of(model, torch.cat(past, dim=1))[:, -1]

    return read
