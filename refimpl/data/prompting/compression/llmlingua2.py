r"""LLMLingua-2: keep the words that a classifier, which reads them from both sides, would keep.

Source: `llmlingua-2` (arXiv 2403.12968), Section 4, compression strategy; official code
microsoft/LLMLingua@e0e9d99beb94098bbd924aa53c2c112eac41c758, `llmlingua/prompt_compressor.py`, `compress_prompt_llmlingua2`.
How labels come about is in `annotation.py` (Algorithm 1, quality control), encoder and training are in `token_classifier.py`.

Differs from the paper: the teacher that shortened the training texts is not GPT-4, but a rule that knows which lines of this
project's task texts tell something (`refimpl/testbed/pairs.py`), and those texts, not transcripts of meetings, are what the classifier
that comes with this module knows; it is small and trained from scratch. Differs from the code: a chunk's threshold is where its
share of the budget is used up, to the token, where the code takes a percentile in whole percents and so keeps a little less; forced
tokens come first, but do not go beyond the budget; what is kept keeps its spaces.

Not here: leaving out whole contexts before (`use_context_level_filter`); placeholders for forced strings of several tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from refimpl.data.prompting.compression.protocol import Compressor, most, portions
from refimpl.data.prompting.compression.token_classifier import TokenClassifier, load
from refimpl.model.model import Decoder

CLASSIFIER = Path(__file__).with_suffix(".safetensors")
CHUNK_ENDS = (".", "\n")


@dataclass(frozen=True, kw_only=True)
class LLMLingua2:
    r"""Prompt compression as classification of tokens; the question plays no part.

    Args:
        classifier: file of the encoder and its tokenizer, written by `token_classifier.save`; it need not be the reader's.
        chunk: tokens that the encoder reads at once; each chunk gets its share of the budget.
        force_tokens: tokens that stay, without the spaces around them.
        force_reserve_digit: tokens with a digit count as certain in the mean of their word.
        drop_consecutive: a forced token goes where nothing is kept between it and the same one before.
        token_to_word: a word's probability, the mean of its tokens' or the first one's.

    Examples:
        >>> _, reader = load(CLASSIFIER)  # a tokenizer; the model's own, in earnest
        >>> text = "    return self.size\n- Anna lives in Rome.\n    for line in lines:\n"
        >>> found = LLMLingua2().compressor(reader).compress([text], [5])[0]
        >>> reader.decode(found.ids.tolist())
        ' Anna lives in Rome\n'
    """

    question_aware: ClassVar[bool] = False

    classifier: str | Path = CLASSIFIER
    chunk: int = 512
    force_tokens: tuple[str, ...] = ()
    force_reserve_digit: bool = False
    drop_consecutive: bool = False
    token_to_word: Literal["mean", "first"] = "mean"  # noqa: S105 - the paper's name

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be at least 1 token; the paper uses 512")
        if self.token_to_word not in ("mean", "first"):
            raise ValueError(f"token_to_word={self.token_to_word!r} must be 'mean' or 'first'")
        object.__setattr__(self, "classifier", str(self.classifier))  # YAML has no paths, and lists for tuples
        object.__setattr__(self, "force_tokens", tuple(self.force_tokens))

    def compressor(self, tokenizer: Tokenizer, model: Decoder | None = None) -> "ByClassifier":
        """What compresses prompts for a reader with this tokenizer, on the model's device.

        Raises:
            FileNotFoundError: there is no classifier.
        """
        device = "cpu" if model is None else model.embedding.weight.device
        return ByClassifier(tokenizer, self, *load(self.classifier, device))


class ByClassifier(Compressor):
    """Keeps the most probable words.

    Args:
        reader: tokenizer of the model that will read what is kept.
        method: configuration.
        classifier: says which tokens should stay.
        tokenizer: the classifier's.
    """

    def __init__(
        self, reader: Tokenizer, method: LLMLingua2, classifier: TokenClassifier, tokenizer: Tokenizer
    ) -> None:
        super().__init__(reader)
        self.method, self.classifier, self.own = method, classifier, tokenizer

    def positions(
        self,
        texts: Sequence[str],
        encodings: Sequence[Encoding],
        budgets: Sequence[int],
        questions: Sequence[str],  # noqa: ARG002 - the protocol passes it
    ) -> list[Tensor]:
        """Chunks of all prompts go through the encoder together, and are compressed one by one."""
        read = self.own.encode_batch(list(texts), add_special_tokens=False)
        pieces = [[text[a:b] for a, b in own.offsets] for text, own in zip(texts, read, strict=True)]
        parts = [chunks([piece.strip(" ") in CHUNK_ENDS for piece in found], self.method.chunk) for found in pieces]
        rows = [own.ids[a:b] for own, bounds in zip(read, parts, strict=True) for a, b in bounds]
        said = iter(self.classifier.probabilities(rows))
        chosen = []
        for i, bounds in enumerate(parts):
            if not bounds:  # a tokenizer may read spaces as nothing
                chosen.append(torch.arange(budgets[i]))
                continue
            starts = word_starts(pieces[i], read[i].offsets)
            owner = owners(encodings[i], read[i])
            of_chunk = [((owner >= a) & (owner < b)).nonzero()[:, 0] for a, b in bounds]
            kept = [
                index[self._keep(pieces[i][a:b], starts[a:b], next(said), owner[index] - a, budget)]
                for (a, b), index, budget in zip(
                    bounds, of_chunk, portions([len(index) for index in of_chunk], budgets[i]), strict=True
                )
            ]
            chosen.append(torch.cat(kept).sort().values)
        return chosen

    def _keep(self, pieces: Sequence[str], starts: Tensor, probability: Tensor, owner: Tensor, budget: int) -> Tensor:
        """Which of the reader's tokens of one chunk stay, given the token of the classifier's that each belongs to."""
        forced = torch.tensor([piece.strip(" ") in self.method.force_tokens for piece in pieces])
        digit = torch.tensor([self.method.force_reserve_digit and any(c.isdigit() for c in piece) for piece in pieces])
        starts = starts.clone()
        starts[0] = True  # a word does not reach over chunks
        word = starts.cumsum(0) - 1
        priority = word_probabilities(probability.masked_fill(forced | digit, 1.0), word, self.method.token_to_word)
        kept = most(priority[word[owner]], budget)
        if self.method.drop_consecutive:
            stays = torch.zeros(len(priority), dtype=torch.bool)
            stays[word[owner[kept]]] = True
            named = [""] * len(priority)
            for i, piece in zip(word.tolist(), pieces, strict=True):
                named[i] += piece
            named = [name.strip(" ") for name in named]
            must = torch.tensor([name in self.method.force_tokens for name in named])
            priority = priority.masked_fill(repeats(named, must, stays), -1.0)
            kept = most(priority[word[owner]], budget)
        return kept


def chunks(ends: Sequence[bool], size: int) -> list[tuple[int, int]]:
    """Cut a text into chunks of at most `size` tokens, each after the last token that may end one, if it holds one.

    Args:
        ends: of each token, whether a chunk may end after it.
        size: 1 or more.

    Examples:
        >>> chunks([False, True, False, False, False, True], 3)
        [(0, 2), (2, 5), (5, 6)]
    """
    found, start = [], 0
    while start < len(ends):
        stop = min(start + size, len(ends))
        if stop < len(ends):
            stop = next((i + 1 for i in range(stop - 1, start - 1, -1) if ends[i]), stop)
        found.append((start, stop))
        start = stop
    return found


def word_starts(pieces: Sequence[str], offsets: Sequence[tuple[int, int]]) -> Tensor:
    """Of each token whether a word starts with it, `[n]`: letters, digits and `_` in a row are one, any mark, with spaces before.

    Args:
        pieces: text of each token.
        offsets: its place.

    Examples:
        >>> word_starts(["a", "b", " c", "(", "d", " ", "4"], [(0, 1), (1, 2), (2, 4), (4, 5), (5, 6), (6, 7), (7, 8)]).int().tolist()
        [1, 0, 1, 1, 1, 1, 0]
    """
    inside = [piece[:1].isalnum() or piece[:1] == "_" for piece in pieces]
    open_ = [piece[-1:].isalnum() or piece[-1:] == "_" for piece in pieces]
    blank = [not piece.strip(" \t") for piece in pieces]
    joined = [
        i > 0 and (blank[i - 1] or (inside[i] and open_[i - 1])) and offsets[i][0] <= offsets[i - 1][1]
        for i in range(len(pieces))
    ]
    return ~torch.tensor(joined, dtype=torch.bool)


def owners(reader: Encoding, own: Encoding) -> Tensor:
    """For each token of the reader's the classifier's token that holds its last character, `[n]`, int64."""
    starts = torch.tensor([start for start, _ in own.offsets])
    last = torch.tensor([max(start, end - 1) for start, end in reader.offsets])
    return (torch.searchsorted(starts, last, right=True) - 1).clamp(min=0)


def word_probabilities(probability: Tensor, word: Tensor, by: Literal["mean", "first"]) -> Tensor:
    """Probability of each word, `[words]`.

    Args:
        probability: `[n]`, of each token.
        word: `[n]`, number of each token's word, from 0 and ascending.
        by: the mean of its tokens', or the first one's.

    Examples:
        >>> word_probabilities(torch.tensor([0.5, 1.0, 0.25]), torch.tensor([0, 0, 1]), "mean").tolist()
        [0.75, 0.25]
    """
    size = torch.bincount(word)
    if by == "first":
        return probability[size.cumsum(0) - size]
    return torch.zeros(len(size), dtype=probability.dtype).index_add(0, word, probability) / size


def repeats(words: Sequence[str], forced: Tensor, kept: Tensor) -> Tensor:
    """Forced words that follow the same forced word with nothing else kept between, `[words]`.

    Args:
        words: the words of a chunk.
        forced: `[words]`, which of them are forced.
        kept: `[words]`, which of them stay.

    Examples:
        >>> repeats(["a", ".", "b", ".", "."], torch.tensor([0, 1, 0, 1, 1]).bool(), torch.tensor([1, 1, 0, 1, 1]).bool()).int().tolist()
        [0, 0, 0, 1, 1]
    """
    at = forced.nonzero()[:, 0]
    others = (kept & ~forced).cumsum(0)[at]
    same = torch.tensor([words[a] == words[b] for a, b in zip(at[:-1].tolist(), at[1:].tolist(), strict=True)])
    found = torch.zeros_like(forced)
    if len(at) > 1:
        found[at[1:]] = (others[1:] == others[:-1]) & same
    return found
