"""The model that an arena runs on: the testbed's, or a checkpoint of the user's; texts in its tokens, and its answers."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from refimpl.model.generate import generate, pad
from refimpl.model.load import load, tokenizer
from refimpl.model.model import Decoder
from refimpl.testbed import corpus, tasks
from refimpl.testbed.sample import Sample
from refimpl.testbed.tokenizer import CHECKPOINT
from refimpl.testbed.tokenizer import tokenizer as testbed_tokenizer

LINE_ENDS = ("\n", "Ċ", "<0x0A>")  # as vocabularies write it: plain, byte-level, and where bytes are a fallback


class Subject(NamedTuple):
    """A model and its tokenizer."""

    model: Decoder
    tokenizer: Tokenizer

    def text(self, split: corpus.Split, n: int) -> Tensor:
        """The first n tokens of the testbed's text, in this tokenizer's: `[n]` on the CPU.

        Raises:
            ValueError: the split is shorter.
        """
        return corpus.tokens(split, n, None if self.tokenizer is testbed_tokenizer() else self.tokenizer)

    def answers(self, prompts: Sequence[str], n: int, *, last: int | None = None, batch: int = 16) -> list[str]:
        """What the model says to each prompt, greedily, up to the end of the line.

        Args:
            prompts: at least one.
            n: tokens of an answer at most.
            last: tokens of a prompt's end that are shown; None shows all.
            batch: prompts at once.
        """
        ends = [token for text, token in self.tokenizer.get_vocab().items() if any(end in text for end in LINE_ENDS)]
        device = self.model.embedding.weight.device
        said: list[str] = []
        for first in range(0, len(prompts), batch):
            group = self.tokenizer.encode_batch(list(prompts[first : first + batch]))
            tokens, padding = pad([encoding.ids[-last if last else 0 :] for encoding in group])
            rows = generate(self.model, tokens.to(device), n, stop=ends, padding=padding.to(device))
            said += [self.tokenizer.decode(row).split("\n")[0] for row in rows.tolist()]
        return said

    def score(self, task: str, samples: Sequence[Sample], *, last: int | None = None) -> float:
        """Mean score of the model's answers to a task's samples, 0 to 1; `last` as in `answers`."""
        module = tasks.task(task)
        said = self.answers([sample.prompt for sample in samples], module.ANSWER_TOKENS, last=last)
        return statistics.fmean(module.score(text, sample.answer) for text, sample in zip(said, samples, strict=True))


def subject(
    path: Path | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Subject:
    """The model in a local Hugging Face folder and its tokenizer; None stands for the testbed's.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is no checkpoint that `refimpl.model` reads.
    """
    if path is None:
        return Subject(load(CHECKPOINT, dtype, device), testbed_tokenizer())
    return Subject(load(path, dtype, device), tokenizer(path))
