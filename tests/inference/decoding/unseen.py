"""Real text for the testbed's model to go on with."""

import torch

from refimpl import testbed


def unseen_text():
    """The model, and four pieces of 64 tokens that it has not seen."""
    subject = testbed.subject()
    text = subject.text("held-out", 8_000)
    return subject.model, text[torch.arange(4)[:, None] * 1_900 + torch.arange(64)]
