"""The testbed: a small language model trained here, the text it was trained on, and tasks that it can do.

    load()                          the committed model and its tokenizer
    subject(path)                   the same for a checkpoint of yours
    corpus.tokens("held-out")       real text that it has not seen
    tasks.samples("needle", ...)    examples of a task, drawn from a seed
    python -m refimpl.testbed.train        how it came about
    python -m refimpl.testbed.evaluate     what it can do, measured anew

Examples:
    >>> model, tokenizer = load()
    >>> tokenizer.encode("- Anna lives in Rome.").tokens[1:3]
    ['ĠAnna', 'Ġlives']
"""

import torch
from tokenizers import Tokenizer

from refimpl.model.model import Decoder
from refimpl.testbed import corpus, tasks
from refimpl.testbed.subject import Subject, subject
from refimpl.testbed.tokenizer import CHECKPOINT

__all__ = ["CHECKPOINT", "Subject", "corpus", "load", "subject", "tasks"]


def load(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Decoder, Tokenizer]:
    """The committed model, in evaluation mode, and its tokenizer.

    Args:
        device: where to.
        dtype: of its parameters, which are stored in bfloat16.
    """
    return subject(None, device, dtype)
