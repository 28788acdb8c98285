r"""A layer that continues the target's features: from features and the tokens that were chosen after them to the next features.

A feature is the target's last hidden state, of which its output layer makes the chances of the next token. Which feature comes next
depends on the token that is chosen now, so the layer is told: it sees feature i beside the embedding of token i + 1.

Source: `eagle` (arXiv 2401.15077), the sections on the drafting phase and on the training of the draft models; official code
SafeAILab/EAGLE@4a9cf3a: eagle/model/cnets.py (`Model`: a linear layer with bias, then a decoder layer without the norm before its
attention, and no norm behind it), eagle/train/main.py (losses, noise, optimizer).

Differs from the paper: trained in few steps at a higher learning rate, on windows of a text. Noise is the paper's U(-0.1, 0.1); the code
multiplies it by 512 / length, which on windows as short as these would be as large as the features themselves. The
layer attends to all of the past, also where the target's layers have windows.

Not here: text that the target wrote itself, which the paper finds to gain little; several layers.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.model.cache import Cache
from refimpl.model.model import Block, Decoder
from refimpl.model.step import Step, positions_of
from refimpl.model.train import Loss, train

CLASSIFICATION, NOISE = 0.1, 0.1  # weight of the second loss; half the width of the noise
RATE, BETAS, CLIP, WARMUP = (
    5e-3,
    (0.9, 0.95),
    0.5,
    0.1,
)  # of learning: ours; the paper's; of each gradient; share of steps: ours


class FeatureDraft(nn.Module):
    r"""The next features, $\hat f_{i+1} = \operatorname{Layer}(W[e_{i+1}; f_i] + b)$.

    Embedding, output layer and positions are the target's, which is passed to each call and is no part of it.

    Args:
        target: the decoder whose features it continues; gives shape, dtype and device.
        generator: source of the first weights, which are as PyTorch draws them.

    Examples:
        >>> from refimpl.model.config import Config
        >>> generator = torch.Generator().manual_seed(0)
        >>> target = Decoder(Config(vocabulary=5, d_model=8, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=8))
        >>> draft = FeatureDraft(target, generator)
        >>> draft(target, torch.tensor([[1, 4, 2]]), torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, target: Decoder, generator: torch.Generator) -> None:
        super().__init__()
        config = target.config
        self.fc = nn.Linear(2 * config.d_model, config.d_model)
        self.layer = Block(replace(config, n_layers=1, sliding_window=(None,)), 0)
        self.layer.attention_norm = nn.Identity()  # type: ignore[assignment]
        for module in self.modules():
            if isinstance(module, nn.Linear):
                for parameter in (module.weight, module.bias):
                    if parameter is not None:
                        nn.init.uniform_(parameter, -(bound := module.in_features**-0.5), bound, generator=generator)
        self.to(target.embedding.weight)

    def forward(
        self,
        target: Decoder,
        tokens: Tensor,
        features: Tensor,
        cache: Cache | None = None,
        padding: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The features behind these.

        Args:
            target: whose embedding and positions are used.
            tokens: `[batch, time]`, each the one that was chosen behind the feature beside it.
            features: `[batch, time, d_model]`, the target's or this layer's own.
            cache: what was read before; with the next two as in `Decoder.hidden`, where a pair stands where its feature does.
            padding: of the rows.
            positions: of the pairs, in the place of padding.

        Returns:
            `[batch, time, d_model]`.
        """
        x = self.fc(torch.cat((target.embedding(tokens), features), dim=-1))
        start = 0 if cache is None else cache.length
        if positions is None:
            positions = positions_of(start, start + x.shape[1], padding, x.device)
        rotated = target.rotary(positions, x.dtype)
        return self.layer(x, Step(start, positions, *rotated, cache, padding, target.score_bias))  # type: ignore[no-any-return]

    def as_decoder(self, target: Decoder) -> Callable[[Tensor, Cache], Tensor]:
        """Tokens and a cache to logits, beside features that are 0: what a call takes, for those who time it."""

        def call(tokens: Tensor, cache: Cache) -> Tensor:
            embedded = target.embedding(tokens)
            return target.logits(self(target, tokens, torch.zeros_like(embedded), cache))

        return call


def train_draft(
    draft: FeatureDraft, target: Decoder, batches: Iterable[Tensor], steps: int, generator: torch.Generator
) -> list[float]:
    """Train in place, and return the loss of each step; the target stays as it is.

    Args:
        draft: of this target; without gradients from here on.
        target: whose features are learnt.
        batches: `[batch, time + 1]` tokens, at least `steps` of them.
        steps: number of updates; AdamW, with a linear rise and fall of the rate.
        generator: source of the noise, on the CPU.
    """
    optimizer = torch.optim.AdamW(draft.parameters(), lr=RATE, betas=BETAS)
    loss = partial(_loss, target=target, generator=generator)
    losses = train(draft, optimizer, batches, steps, loss=loss, clip=None, schedule=_linear, precision=_OwnGradients())
    draft.eval().requires_grad_(False)
    return losses


def losses_of(
    draft: FeatureDraft, target: Decoder, batch: Tensor, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Regression and classification loss: smooth L1 of features, and cross-entropy against the target's distribution.

    Args:
        draft: what is judged.
        target: whose features and distributions are the truth.
        batch: `[batch, time + 1]` tokens, of which each but the first is seen beside the feature before it.
        noise: `[batch, time, d_model]`, added to the features that it sees.

    Returns:
        Scalars: means over all tokens, the first also over the features' entries.
    """
    with torch.no_grad():
        features = target.hidden(batch)
        seen, wanted = features[:, :-1], features[:, 1:]
        chances = target.logits(wanted).float().softmax(dim=-1)
    found = draft(target, batch[:, 1:], seen if noise is None else seen + noise)
    entropy = F.cross_entropy(target.logits(found).float().flatten(0, 1), chances.flatten(0, 1))
    return F.smooth_l1_loss(found, wanted), entropy


def _loss(draft: nn.Module, batch: Tensor, *, target: Decoder, generator: torch.Generator) -> Tensor:
    assert isinstance(draft, FeatureDraft)
    uniform = torch.rand(batch.shape[0], batch.shape[1] - 1, target.config.d_model, generator=generator)
    noise = NOISE * (2 * uniform - 1).to(target.embedding.weight)
    regression, classification = losses_of(draft, target, batch, noise)
    return regression + CLASSIFICATION * classification


class _OwnGradients:
    """Gradients of the draft alone, each clipped, though the loss runs through the target's output layer (`train.Precision`)."""

    def backward(self, model: nn.Module, loss: Loss, batch: Tensor) -> Tensor:
        value, mine = loss(model, batch), list(model.parameters())
        torch.autograd.backward(value, inputs=mine)
        nn.utils.clip_grad_value_(mine, CLIP)
        return value.detach()

    def update(self, optimizer: torch.optim.Optimizer) -> bool:
        optimizer.step()
        return True


def _linear(done: float) -> float:
    return done / WARMUP if done < WARMUP else (1 - done) / (1 - WARMUP)
