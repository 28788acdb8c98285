"""What the methods that ask a causal model are tested on: a random tiny decoder, and the testbed's model with what it is asked."""

import statistics

import pytest
import torch

from refimpl import testbed
from refimpl.data.prompting.compression.self_information import self_information
from refimpl.model.config import Config
from refimpl.model.generate import generate, pad
from refimpl.model.model import Decoder, initialize_

TASKS, EACH, LENGTH = ("single_doc_qa", "few_shot", "retrieval"), 3, 320


@pytest.fixture(scope="session")
def tiny():
    """A random decoder with the testbed's vocabulary, far from flat, with heads in groups."""
    config = Config(vocabulary=2048, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24)
    return initialize_(Decoder(config), torch.Generator().manual_seed(0), std=0.3).eval().requires_grad_(False)


class Asked:
    """The testbed's model, contexts of three tasks that it has not seen, and what is asked on each."""

    def __init__(self):
        self.model, self.tokenizer = testbed.load()
        generator = torch.Generator().manual_seed(21)
        self.tasks = [testbed.tasks.task(name) for name in TASKS for _ in range(EACH)]
        self.samples = [s for name in TASKS for s in testbed.tasks.samples(name, EACH, LENGTH, generator)]
        self.contexts = [sample.context for sample in self.samples]
        self.tokens = [torch.tensor(self.tokenizer.encode(text).ids) for text in self.contexts]
        self.lengths = [len(tokens) for tokens in self.tokens]

    def score(self, kept):
        """Mean score of the answers to what is left of each context, positions in it."""
        questions = [self.tokenizer.encode(sample.question).ids for sample in self.samples]
        rows = [ids[k].tolist() + q for ids, k, q in zip(self.tokens, kept, questions, strict=True)]
        tokens, padding = pad(rows)
        stop, n = self.tokenizer.encode("\n").ids, max(task.ANSWER_TOKENS for task in self.tasks)
        said = generate(self.model, tokens, n, stop=stop, padding=padding).tolist()
        texts = [self.tokenizer.decode(row).split("\n")[0] for row in said]
        return statistics.fmean(
            task.score(text, sample.answer) for task, text, sample in zip(self.tasks, texts, self.samples, strict=True)
        )

    def likelihood(self, kept):
        """Mean logarithm of the probability of a token of the right answers, after what is left of each context, in nats."""
        questions = [self.tokenizer.encode(sample.question).ids for sample in self.samples]
        answers = [self.tokenizer.encode(sample.answer + "\n").ids for sample in self.samples]
        rows = [ids[k].tolist() + q + a for ids, k, q, a in zip(self.tokens, kept, questions, answers, strict=True)]
        told = zip(self_information(self.model, rows), answers, strict=True)
        return -float(torch.cat([information[-len(answer) :] for information, answer in told]).mean())

    def left(self, compressor, times):
        """Positions of what a compressor leaves of each context, one of so many tokens."""
        return [c.kept for c in compressor.compress(self.contexts, [-(-n // times) for n in self.lengths])]


@pytest.fixture(scope="session")
def asked():
    """See `Asked`; read only."""
    return Asked()
