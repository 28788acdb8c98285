"""A crowd of random requests, served without computing: what is read goes into a list, where the store says, and is read again from there.

So an entry that is given to two, one that is not written, and one that is lost are all seen as a wrong text; no arithmetic rounds.
"""

import random
from types import SimpleNamespace

import torch

from refimpl.inference.system_level import scheduling
from refimpl.inference.system_level.protocol import Request
from refimpl.model.config import Config

ASKED, END = 12, 0  # new tokens at most; the token that ends an answer before
CONFIG = Config(vocabulary=2, d_model=2, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=2, d_ff=2)
MODEL = SimpleNamespace(
    config=CONFIG,
    embedding=SimpleNamespace(weight=torch.zeros(1)),
    parameters=lambda: [],
    logits=lambda said: said,
)


class Said(list):
    """Tokens, in the place of the logits that they are the largest of."""

    def argmax(self, dim):
        return self

    def tolist(self):
        return self


def crowd(count, every, seed=0):
    """Requests and what each is to be answered: two of three prompts begin with one of six preambles, which begin alike themselves;
    answers end where they were drawn to end; arrivals are `every` so many iterations on average, many of them at once.
    """
    rng = random.Random(seed)

    def tokens(least, most):
        return tuple(rng.randint(1, 50) for _ in range(rng.randint(least, most)))

    whole = tokens(3, 3)
    preambles = [(*whole[:length], *tokens(1, 9)) for length in (0, 1, 2, 3, 3, 3)]
    requests, answers, now = [], [], 0.0
    for _ in range(count):
        now += rng.expovariate(0.5 / every) if rng.random() < 0.5 else 0.0
        answer = [*tokens(1, ASKED)]
        if len(answer) < ASKED:
            answer[-1] = END
        prompt = (*(rng.choice(preambles) if rng.random() < 2 / 3 else ()), *tokens(1, 12))
        requests.append(Request(prompt=prompt, n=ASKED, arrival=int(now), stop=frozenset({END})))
        answers.append(answer)
    return requests, answers


def serve(monkeypatch, store, places_of, requests, answers, slots):
    """What `iterate` makes of a crowd; each text is read from the memory again when its answer is whole.

    Args:
        places_of: of the tokens of a job, by the store's books.
    """
    memory = {}

    def read(model, texts, starts, attend_to):
        said = Said()
        for job, new, start in zip(attend_to.keywords["running"], texts, starts, strict=True):
            places = places_of(job)
            memory.update(zip(places[start:], new, strict=False))
            said.append(answers[job.index][len(job.text) - len(job.request.prompt)])
            if len(job.text) - len(job.request.prompt) == len(answers[job.index]) - 1:
                assert [memory[place] for place in places[: len(job.text)]] == job.text
        return said

    monkeypatch.setattr(scheduling, "read", read)
    return scheduling.iterate(MODEL, requests, slots, store)
