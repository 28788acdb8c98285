r"""Gist tokens: a prompt's keys and values packed into those of a few tokens that stand behind it.

Source: `gist` (arXiv 2304.08467), Section 3, Figure 2a (decoders), and Section 4.2 (controls); official code
jayelm/gisting@3be0d062b6bdfd3caf51843bbc60261a0855f876: masks in `src/data/gist.py`, the token's start in `src/train.py`, what is
cached in `src/gist_caching.py`, positions in `src/gist_llama.py` (they count on from the whole prompt), the loss in
`src/data/alpaca/collator.py` (on the answer alone).

Differs from the paper: none. Differs from the code: one cache may serve a batch of prompts of different lengths.

Not here: encoder-decoders; the template of words around instruction, input and answer.

Glossary
    prompt    the task that is packed, $t$
    gist      k copies of one new token, $g_1 \dots g_k$; its number is the vocabulary's size of before
    input     what the task is done on, $x$; may be empty
    answer    $y$
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.data.prompting.compression.gist_mask import Condition, Hiding, hidden
from refimpl.data.prompting.compression.packed_prefix import Ends, Example, Packed
from refimpl.model.generate import pad
from refimpl.model.model import Decoder

IGNORED = -100  # label of what is not learnt
PADDING = -1  # in a batch for training


@dataclass(frozen=True, kw_only=True)
class Gist:
    """Fine-tuning under a mask, and a cache of what the gist holds.

    Args:
        tokens: copies of the gist token, k.
        condition: what tokens behind the gist do not see: "gist", the prompt; "positive", nothing is hidden; "negative", prompt and gist.

    Examples:
        >>> from refimpl.model.config import Config
        >>> from refimpl.model.generate import generate
        >>> from refimpl.model.model import initialize_
        >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
        >>> method = Gist(tokens=2)
        >>> model = method.prepare(initialize_(Decoder(config), torch.Generator().manual_seed(0)))
        >>> batch = method.batch(model, [Example([5, 7, 33], [8], [9, 1]), Example([6], [], [2])])
        >>> batch[0].tolist()
        [[5, 7, 33, 61, 61, 8, 9, 1], [-1, -1, -1, -1, 6, 61, 61, 2]]
        >>> method.loss(model, batch).backward()
        >>> packed = method.pack(model, [[5, 7, 33]])  # read once, for any number of inputs
        >>> packed.nbytes, generate(model, torch.tensor([[8, 9], [10, 11]]), 3, cache=packed.cache(2)).shape
        (512, torch.Size([2, 3]))
    """

    tokens: int = 1
    condition: Condition = "gist"

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} must be at least 1 gist token; the paper uses 1, 2, 5 and 10")
        if self.condition not in ("gist", "positive", "negative"):
            raise ValueError(f"condition={self.condition!r} must be 'gist', 'positive' or 'negative'")

    def prepare(self, model: Decoder) -> Decoder:
        """A copy of the model that knows one more token, which starts as the mean of all others; all its parameters train.

        Args:
            model: the pre-trained decoder; left unchanged.
        """
        made = copy.deepcopy(model).requires_grad_(True)
        made.config = replace(model.config, vocabulary=model.config.vocabulary + 1)
        made.embedding.weight = nn.Parameter(_with_mean(model.embedding.weight))
        made.embedding.num_embeddings += 1
        if made.lm_head is not None:
            made.lm_head.weight = nn.Parameter(_with_mean(made.lm_head.weight))
            made.lm_head.out_features += 1
        return made

    def batch(self, model: Decoder, examples: Sequence[Example]) -> Tensor:
        """Tokens and labels `[2, batch, longest]`, padded at the left; labels are `IGNORED` but for answers.

        Args:
            model: as `prepare` made it.
            examples: one or more; a prompt or an answer is not empty.

        Raises:
            ValueError: no example, an empty prompt or answer, or the gist token in one.
        """
        gist = _gist(model)
        for i, (prompt, given, answer) in enumerate(examples):
            if not prompt or not answer:
                raise ValueError(
                    f"example {i} has a prompt of {len(prompt)} and an answer of {len(answer)} tokens; neither may be empty"
                )
            if gist in (*prompt, *given, *answer):
                raise ValueError(f"example {i} holds {gist}, the gist token, which `batch` puts in")
        rows = [[*prompt, *[gist] * self.tokens, *given, *answer] for prompt, given, answer in examples]
        tokens, padding = pad(rows)
        labels = torch.full_like(tokens, IGNORED)
        for row, example in zip(labels, examples, strict=True):
            row[-len(example.answer) :] = torch.tensor(example.answer)
        tokens.masked_fill_(torch.arange(tokens.shape[1]) < padding.unsqueeze(1), PADDING)
        return torch.stack((tokens, labels))

    def loss(self, model: Decoder, batch: Tensor) -> Tensor:
        """Mean cross-entropy, in nats, over the tokens of all answers; what `refimpl.model.train.train` takes as `loss`.

        Args:
            model: as `prepare` made it.
            batch: `[2, batch, time]`, as `batch` made it.
        """
        tokens, labels = batch.to(model.embedding.weight.device)
        logits = self.logits(model, tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)

    def logits(self, model: Decoder, tokens: Tensor) -> Tensor:
        """Logits of the token after each of whole texts, prompt, gist, input and answer in one, under the mask of the condition.

        Args:
            model: as `prepare` made it.
            tokens: `[batch, time]`, padded at the left with `PADDING`; a row without a gist hides nothing.

        Returns:
            `[batch, time, vocabulary]`; what stands at padding means nothing.
        """
        padding = (tokens == PADDING).sum(dim=1)
        hides = Hiding(hidden(tokens, _gist(model), self.condition))
        made: Tensor = model(tokens.clamp(min=0), hides, padding if padding.any() else None)
        return made

    @torch.no_grad()
    def pack(self, model: Decoder, prompts: Sequence[Sequence[int]]) -> Packed:
        """Read prompts with their gists, and keep what later tokens may see of them.

        Args:
            model: as `prepare` made it, and trained.
            prompts: one for all requests, or one for each; none of them empty.

        Raises:
            ValueError: no prompt, or an empty one.
        """
        if not prompts or not all(prompts):
            raise ValueError(f"prompts of {[len(p) for p in prompts]} tokens: one is needed, and none may be empty")
        tokens, padding = pad([[*prompt, *[_gist(model)] * self.tokens] for prompt in prompts])
        length = tokens.shape[1]
        ends = Ends({"gist": self.tokens, "positive": length, "negative": 0}[self.condition])
        device = model.embedding.weight.device
        padded = padding.to(device) if padding.any() else None
        model.hidden(tokens.to(device), ends, padded)
        return Packed(ends.kept, length, padded, model.config.sliding_window)


def _gist(model: Decoder) -> int:
    return model.config.vocabulary - 1


@torch.no_grad()
def _with_mean(weight: Tensor) -> Tensor:
    """`[n, d]` to `[n + 1, d]`: the last row is the mean of all others."""
    return torch.cat((weight, weight.double().mean(dim=0, keepdim=True).to(weight.dtype)))
