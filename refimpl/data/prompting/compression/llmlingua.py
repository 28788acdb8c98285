r"""LLMLingua: demonstrations go whole, then tokens that a small model expects after what was kept before them.

Source: `llmlingua` (arXiv 2310.05736), Section 4.2: Algorithm 2, Eqs. (5) to (7); Section 5.1 for the defaults. The budget controller is
in `budget_controller.py`. Official code microsoft/LLMLingua@e0e9d99beb94098bbd924aa53c2c112eac41c758, `llmlingua/prompt_compressor.py`:
`iterative_compress_prompt`, from which it has that a segment which reaches over parts has a threshold for each of them.

Differs from the paper: a threshold is where the segment's share of the budget is used up, to the token, of equals the earlier; `compress`
takes a text's paragraphs for demonstrations, `compress_parts` is told what is what. Differs from the code: each token stays or goes by its
own information, where the code's mask stands one place early, so that what stays is the token before each surprising one, and the
last of all. A threshold is that of its segment, as in Eq. (6), where the code takes it over all tokens that are left up to there. A prompt
shorter than a segment, and the last segment, are compressed like others. Segments have the paper's 100 tokens, not 200. The tokens of a
demonstration, whose perplexity is taken alone, are those that it has in the whole prompt.

Not here: distribution alignment (Section 4.3): pass a model that was tuned on the reader's texts; a small model with another tokenizer than the
reader's; compressed prompts that are longer than the model's positions, of which the code forgets the oldest.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from refimpl.data.prompting.compression.budget_controller import plan
from refimpl.data.prompting.compression.protocol import Compressed, Compressor, most, portions
from refimpl.data.prompting.compression.self_information import Reading, asked, beginning, self_information
from refimpl.model.model import Decoder

SEPARATOR = "\n\n"
KINDS = INSTRUCTION, DEMONSTRATIONS, QUESTION = range(3)


@dataclass(frozen=True, kw_only=True)
class LLMLingua:
    r"""Coarse-to-fine prompt compression by perplexity.

    Args:
        segment: tokens that are judged together, given what was kept of those before; as many as the prompt has, and all are judged at once.
        instruction_rate: share of an instruction's tokens that stays.
        question_rate: share of a question's tokens that stays.
        coarse: how many times their final budget the demonstrations that stay whole at first may have.
        keep_split: empty lines between demonstrations stay, as far as the budget goes.

    Examples:
        >>> from refimpl.testbed import load
        >>> model, tokenizer = load()
        >>> compressor = LLMLingua().compressor(tokenizer, model)
        >>> found = compressor.compress_parts("Answer:", ["- Anna lives in Rome.", "import os"], "Where does Anna live?", 18)
        >>> tokenizer.decode(found.ids.tolist())
        'Answer:\n\n- Anna\nimport\nWhere does Anna live?'
    """

    question_aware: ClassVar[bool] = False

    segment: int = 100
    instruction_rate: float = 0.85
    question_rate: float = 0.9
    coarse: float = 2.0
    keep_split: bool = False

    def __post_init__(self) -> None:
        if self.segment < 1:
            raise ValueError(f"segment={self.segment} must be at least 1 token; the paper uses 100")
        for name, rate in (("instruction_rate", self.instruction_rate), ("question_rate", self.question_rate)):
            if not 0 <= rate <= 1:
                raise ValueError(f"{name}={rate} must be in [0, 1], the share of its tokens that stays")
        if not self.coarse >= 1:
            raise ValueError(
                f"coarse={self.coarse} must be at least 1, room for what stays in the end; the paper uses 2"
            )

    def compressor(self, tokenizer: Tokenizer, model: Decoder | None = None) -> "ByPerplexity":
        """What compresses prompts for readers with this tokenizer.

        Raises:
            ValueError: no model, or one of fewer tokens.
        """
        return ByPerplexity(tokenizer, self, asked(model, tokenizer, "LLMLingua"))


class ByPerplexity(Compressor):
    """Drops demonstrations, then tokens.

    Args:
        tokenizer: of reader and model.
        method: configuration.
        model: the small causal model.
    """

    def __init__(self, tokenizer: Tokenizer, method: LLMLingua, model: Decoder) -> None:
        super().__init__(tokenizer)
        self.method, self.model = method, model

    def positions(
        self,
        texts: Sequence[str],
        encodings: Sequence[Encoding],
        budgets: Sequence[int],
        questions: Sequence[str],  # noqa: ARG002 - the protocol passes it
    ) -> list[Tensor]:
        """The paragraphs of each prompt are its demonstrations."""
        return [
            self._kept(encoding, parts := paragraphs(text), [DEMONSTRATIONS] * len(parts), budget)
            for text, encoding, budget in zip(texts, encodings, budgets, strict=True)
        ]

    def compress_parts(self, instruction: str, demonstrations: Sequence[str], question: str, budget: int) -> Compressed:
        """Compress a prompt whose parts are known; empty lines join them.

        Args:
            instruction: what is to be done; may be empty.
            demonstrations: or documents; empty ones count for nothing.
            question: what is asked in the end; may be empty.
            budget: tokens to keep of all.

        Raises:
            ValueError: a budget below 1, or one that instruction and question use up.
        """
        if budget < 1:
            raise ValueError(f"budget={budget} must be at least 1 token; a prompt is never emptied")
        known = [(INSTRUCTION, instruction), *((DEMONSTRATIONS, text) for text in demonstrations), (QUESTION, question)]
        kinds, parts = [kind for kind, text in known if text], [text for _, text in known if text]
        parts = [text + SEPARATOR for text in parts[:-1]] + parts[-1:]
        encoding = self.tokenizer.encode("".join(parts), add_special_tokens=False)
        tokens = torch.tensor(encoding.ids, dtype=torch.int64)
        whole = len(tokens) <= budget
        return Compressed(tokens, torch.arange(len(tokens)) if whole else self._kept(encoding, parts, kinds, budget))

    def _kept(self, encoding: Encoding, parts: Sequence[str], kinds: Sequence[int], budget: int) -> Tensor:
        """Positions to keep of a prompt that the parts, joined, are."""
        ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        offsets = torch.tensor(encoding.offsets)
        part = torch.searchsorted(ends, (offsets[:, 1] - 1).maximum(offsets[:, 0]), right=True)  # that a token ends in
        tokens, kind = torch.tensor(encoding.ids), torch.tensor(kinds)
        shown = (kind == DEMONSTRATIONS).nonzero()[:, 0].tolist()
        texts = [tokens[part == i].tolist() for i in shown]
        told = self_information(self.model, texts, beginning(self.tokenizer))
        perplexity = [float(x.double().mean()) if len(x) else -1.0 for x in told]  # a part of no token comes last
        size = [int((kind[part] == of).sum()) for of in KINDS]
        found = plan(
            size[INSTRUCTION],
            [len(x) for x in texts],
            size[QUESTION],
            perplexity,
            budget,
            instruction_rate=self.method.instruction_rate,
            question_rate=self.method.question_rate,
            coarse=self.method.coarse,
        )
        stays = kind != DEMONSTRATIONS
        stays[[shown[i] for i in found.kept]] = True
        left = stays[part].nonzero()[:, 0]
        blank = [len(text) - len(text.rstrip("\n")) for text in parts]
        bodies = ends - torch.tensor([n if n >= len(SEPARATOR) and self.method.keep_split else 0 for n in blank])
        quotas = (found.instruction, found.demonstrations, found.question)
        return left[self._iterate(tokens[left], kind[part[left]], (offsets[:, 0] >= bodies[part])[left], quotas)]

    def _iterate(self, tokens: Tensor, kind: Tensor, forced: Tensor, quotas: Sequence[int]) -> Tensor:
        """Which of these tokens stay, ascending (Algorithm 2); a kind's quota is divided over its runs in the segments."""
        runs = [  # kind, first, end
            (of, a, b)
            for first in range(0, len(tokens), self.method.segment)
            for of, a, b in runs_of(kind[first : first + self.method.segment].tolist(), first)
        ]
        share: dict[int, int] = {}
        for of in KINDS:
            mine = [(a, b) for x, a, b in runs if x == of]
            share |= zip((a for a, _ in mine), portions([b - a for a, b in mine], quotas[of]), strict=True)
        reading, kept = Reading(self.model, beginning(self.tokenizer)), []
        for _, group in groupby(runs, lambda run: run[1] // self.method.segment):
            segment = list(group)
            first, end = segment[0][1], segment[-1][2]
            information = reading.judge(tokens[first:end]).masked_fill(forced[first:end], float("inf"))
            chosen = torch.cat([a + most(information[a - first : b - first], share[a]) for _, a, b in segment])
            reading.keep(tokens[chosen])
            kept.append(chosen)
        return torch.cat(kept)


def paragraphs(text: str) -> list[str]:
    r"""A text cut after its empty lines; joined they are the text.

    Examples:
        >>> paragraphs("a\nb\n\n\nc\n")
        ['a\nb\n\n\n', 'c\n']
    """
    return re.findall(r".+?(?:\n{2,}|\Z)", text, flags=re.DOTALL)


def runs_of(kinds: Sequence[int], first: int = 0) -> list[tuple[int, int, int]]:
    """Equal values in a row: each value, where its run begins and ends, counted from `first`.

    Examples:
        >>> runs_of([1, 1, 0], first=10)
        [(1, 10, 12), (0, 12, 13)]
    """
    found, place = [], first
    for kind, run in groupby(kinds):
        end = place + len(list(run))
        found.append((kind, place, end))
        place = end
    return found
