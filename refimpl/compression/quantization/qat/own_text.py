r"""Text that a model writes from a single token: first what is likeliest, then what is drawn.

Source: `llm-qat` (arXiv 2305.17888), Section 2.1; official code facebookresearch/LLM-QAT@5ef1289730de080a4781f21ef27105b6c01b116a,
generate_data.py.

Differs from the paper: none; all rows of a batch have as many tokens that are not drawn.

Not here: an end of text; a cache for models other than `refimpl.model`'s.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from refimpl.compression.quantization.qat.protocol import logits_of
from refimpl.model.generate import generate, probabilities
from refimpl.model.model import Decoder

GREEDY = (3, 4, 5)  # tokens of a sequence before others are drawn: the first one, and those that are likeliest after it


@torch.no_grad()
def written(teacher: nn.Module, first: Tensor, greedy: int, length: int, generator: torch.Generator) -> Tensor:
    """Sequences that a model writes: the first token is given, the next are the likeliest, and the rest is drawn.

    Args:
        teacher: read in evaluation mode; one of another make than `Decoder` is read from the start for each token.
        first: `[batch]` tokens.
        greedy: tokens before others are drawn, the first one among them.
        length: tokens of a sequence, more than `greedy`.
        generator: of the draws, on the model's device.

    Returns:
        `[batch, length]`.

    Examples:
        >>> after = nn.Sequential(nn.Embedding(3, 3))
        >>> _ = after[0].weight.data.copy_(torch.eye(3).roll(1, dims=1) * 99)  # each token is followed by the next one
        >>> written(after, torch.tensor([0, 2]), 3, 6, torch.Generator().manual_seed(0)).tolist()
        [[0, 1, 2, 0, 1, 2], [2, 0, 1, 2, 0, 1]]
    """

    def write() -> Tensor:
        tokens = first[:, None]
        if isinstance(teacher, Decoder):
            tokens = torch.cat([tokens, generate(teacher, tokens, greedy - 1)], dim=1)
            return torch.cat(
                [tokens, generate(teacher, tokens, length - greedy, temperature=1.0, generator=generator)], dim=1
            )
        while tokens.shape[1] < length:
            logits = logits_of(teacher, tokens)[:, -1]
            if tokens.shape[1] < greedy:
                following = logits.argmax(dim=-1, keepdim=True)
            else:
                following = torch.multinomial(probabilities(logits, 1.0), 1, generator=generator)
            tokens = torch.cat([tokens, following], dim=1)
        return tokens

    return evaluating(teacher, write)


def evaluating(model: nn.Module, step: Callable[[], Tensor]) -> Tensor:
    """What a step returns while a model is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        return step()
    finally:
        model.train(training)


def vocabulary(model: nn.Module) -> int:
    """Tokens that a decoder's first embedding knows."""
    return next(module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding))
