r"""Selective Context: leave out what a small causal model finds most predictable.

Source: `selective-context` (arXiv 2310.06201), Section 3, Eqs. (5) to (8), and Section 4.4, sentence by sentence; official code
liyucheng09/Selective_Context@3074343653bbf3559a87a588667e843744bc6f2a, `src/selective_context/__init__.py`: a unit has the mean of its
tokens' self-information, where Eq. (6) has the sum; a sentence ends at a space after `.` or `?` that ends no abbreviation.

Differs from the paper: noun phrases need a parser, which this project has not. Units are words and single marks, as the code's are but
for noun phrases; `unit` takes a function that finds phrases in a sentence. Differs from the code: the text stays as it is, where
the code makes one space of all in a row and takes off those around a sentence; a token that reaches over several units counts for the one
it ends in, where the code shares its information out. `reduced` takes the paper's percentile, `compress` a budget, which it meets to the
token: units in falling order, the last in part, of equals the earlier.

Not here: a note in the place of what is left out.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from refimpl.data.prompting.compression.annotation import split
from refimpl.data.prompting.compression.protocol import Compressed, Compressor, most
from refimpl.data.prompting.compression.self_information import asked, beginning, self_information
from refimpl.model.model import Decoder

Unit = Literal["token", "word", "sentence"] | Callable[[str], Sequence[str]]
SENTENCE_END = re.compile(r"(?<=[.?])(?<!\w\.\w\.)(?<![A-Z][a-z]\.)\s")


@dataclass(frozen=True, kw_only=True)
class SelectiveContext:
    r"""Prompt compression by self-information; the question plays no part.

    Args:
        unit: what is kept or left out as a whole: "token", "word" (a word or a mark with the spaces before it), "sentence"; or a
            function that cuts a sentence into phrases, which joined are the sentence.

    Examples:
        >>> from refimpl.testbed import load
        >>> model, tokenizer = load()
        >>> compressor = SelectiveContext().compressor(tokenizer, model)
        >>> found = compressor.compress(["    for line in lines:\n- Anna lives in Rome.\n"], [6])[0]
        >>> tokenizer.decode(found.ids.tolist())
        '    for line- Anna Rome'
    """

    question_aware: ClassVar[bool] = False

    unit: Unit = "word"

    def __post_init__(self) -> None:
        if not callable(self.unit) and self.unit not in ("token", "word", "sentence"):
            raise ValueError(
                f"unit={self.unit!r} must be 'token', 'word', 'sentence', or a function from text to phrases"
            )

    def compressor(self, tokenizer: Tokenizer, model: Decoder | None = None) -> "BySelfInformation":
        """What compresses prompts for readers with this tokenizer.

        Raises:
            ValueError: no model, or one of fewer tokens.
        """
        return BySelfInformation(tokenizer, self, asked(model, tokenizer, "SelectiveContext"))


class BySelfInformation(Compressor):
    """Keeps the units that were least expected.

    Args:
        tokenizer: of reader and model.
        method: configuration.
        model: the small causal model.
    """

    def __init__(self, tokenizer: Tokenizer, method: SelectiveContext, model: Decoder) -> None:
        super().__init__(tokenizer)
        self.method, self.model = method, model

    def positions(
        self,
        texts: Sequence[str],
        encodings: Sequence[Encoding],
        budgets: Sequence[int],
        questions: Sequence[str],  # noqa: ARG002 - the protocol passes it
    ) -> list[Tensor]:
        """Each prompt's sentences go through the model together."""
        chosen = []
        for text, encoding, budget in zip(texts, encodings, budgets, strict=True):
            information, unit = self._units(text, encoding)
            chosen.append(most(information[unit], budget))
        return chosen

    def reduced(self, text: str, share: float = 0.35) -> Compressed:
        """Leave out the units below a percentile (Eqs. 7 and 8).

        Args:
            text: the prompt.
            share: of the units that go, 0 to 1; the code's 0.35. What stands at the percentile stays.

        Raises:
            ValueError: share outside [0, 1].
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share={share} must be in [0, 1], the share of units that is left out")
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        information, unit = self._units(text, encoding)
        stays = information >= torch.quantile(information, share) if len(information) else information > 0
        return Compressed(torch.tensor(encoding.ids, dtype=torch.int64), stays[unit].nonzero()[:, 0])

    def _units(self, text: str, encoding: Encoding) -> tuple[Tensor, Tensor]:
        """Self-information of each unit that has tokens, `[units]`, float64; and the unit of each token, `[n]`."""
        sentences = cut(text)
        sentence = containing(sentences, encoding)
        rows: list[list[int]] = [[] for _ in sentences]
        for token, i in zip(encoding.ids, sentence.tolist(), strict=True):
            rows[i].append(token)
        of_token = torch.cat([*self_information(self.model, rows, beginning(self.tokenizer)), torch.zeros(0)]).double()
        if self.method.unit == "token":
            return of_token, torch.arange(len(of_token))
        unit = sentence if self.method.unit == "sentence" else containing(self._phrases(sentences), encoding)
        _, unit, size = torch.unique_consecutive(unit, return_inverse=True, return_counts=True)
        return torch.zeros(len(size), dtype=torch.float64).index_add(0, unit, of_token) / size, unit

    def _phrases(self, sentences: Sequence[str]) -> list[str]:
        cut_up = self.method.unit if callable(self.method.unit) else split
        phrases = [list(cut_up(sentence)) for sentence in sentences]
        for sentence, found in zip(sentences, phrases, strict=True):
            if "".join(found) != sentence:
                raise ValueError(f"unit makes {found} of {sentence!r}; phrases must, joined, be the sentence")
        return [phrase for found in phrases for phrase in found]


def cut(text: str) -> list[str]:
    r"""Sentences, each with the space before it; joined they are the text.

    Examples:
        >>> cut("Mr. Lee, e.g. Anna? Yes.\nOr no")
        ['Mr. Lee, e.g. Anna?', ' Yes.', '\nOr no']
    """
    places = [0, *(found.start() for found in SENTENCE_END.finditer(text)), len(text)]
    return [text[a:b] for a, b in pairwise(places) if a < b]


def containing(parts: Sequence[str], encoding: Encoding) -> Tensor:
    """Which part of a text each token ends in, `[n]`, int64.

    Args:
        parts: joined they are the text.
        encoding: the text's.
    """
    ends = torch.tensor([len(part) for part in parts], dtype=torch.int64).cumsum(0)
    last = torch.tensor([max(a, b - 1) for a, b in encoding.offsets], dtype=torch.int64)
    return torch.searchsorted(ends, last, right=True)
