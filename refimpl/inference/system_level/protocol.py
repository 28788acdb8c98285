r"""What all ways of serving many requests with one model share.

Glossary
    iteration  one pass of the model over whatever tokens were put together; time is counted in them, so that a trace repeats
    arrival    iteration from which on a request may take part; while nobody is there, the clock jumps to the next arrival
    admission  iteration in which its prompt is read for the first time
    end        iteration after which its answer is given
    slots      requests that take part in an iteration at most
    entry      keys and values of one token in all layers: 2 * layers * kv_heads * head_dim numbers
    memory     entries that all caches together may hold
    held       bytes that are taken from the memory, whatever lies in them
    resident   bytes of memory for caches on the device, taken or not
    used       bytes of the held ones that hold tokens of the iteration's requests; what several share counts once
    prefill    entries computed where a request is admitted, or again after it had to give up its memory; padding counts

A method is a frozen configuration with the fields `slots` and `memory`; all that lives from call to call is made inside `serve`.
Answers are greedy: what is served must not depend on who else is.

Examples:
    >>> from refimpl.inference.system_level.static_batching import StaticBatching
    >>> from refimpl.model.config import Config
    >>> from refimpl.model.model import initialize_
    >>> config = Config(vocabulary=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40)
    >>> model = initialize_(Decoder(config), torch.Generator().manual_seed(0))
    >>> served = StaticBatching(slots=2).serve(model, [Request(prompt=(5, 7), n=3), Request(prompt=(8,), n=1)])
    >>> [len(tokens) for tokens in served.tokens], served.iterations, served.utilization  # a slot idles for two iterations
    ([3, 1], 3, 0.6666666666666666)

Invariants, run for every method and for static batching by `tests/inference/system_level/test_protocol.py`: the tokens of each
request are those of `refimpl.model.generate` for it alone, with and without stop tokens, however scarce the memory and whenever it
arrives; the memory is never exceeded, what is used is part of what is held, and nothing is held at the end; a request that the memory can't
hold is refused before anything is computed; nothing of one call is left for the next.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from refimpl.model.config import Config
from refimpl.model.generate import check_arguments
from refimpl.model.model import Decoder


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a client asks for.

    Args:
        prompt: tokens, at least one.
        n: new tokens at most, 1 or more.
        arrival: iteration from which on it may take part, 0 or more.
        stop: tokens that end the answer; they count as part of it.
    """

    prompt: tuple[int, ...]
    n: int
    arrival: int = 0
    stop: frozenset[int] = field(default_factory=frozenset)

    @property
    def entries(self) -> int:
        """Entries that its cache has at most; the last new token needs none."""
        return len(self.prompt) + self.n - 1

    def ends(self, answer: Sequence[int]) -> bool:
        """Whether these new tokens are the whole answer."""
        return len(answer) == self.n or answer[-1] in self.stop


@dataclass(frozen=True, kw_only=True)
class Served:
    """What `serve` returns; lists are by request, in the order given, or by iteration.

    Attributes:
        tokens: each request's new tokens, its stop token included.
        arrival: of each request.
        admitted: iteration in which its prompt was first read.
        first: iteration that gave its first token.
        ended: iteration after which its answer was given.
        slots: that there were.
        running: requests that got a token, by iteration.
        held: bytes, by iteration.
        used: bytes, by iteration.
        device: bytes on the device, by iteration: weights, memory for caches, taken or not, and what is computed in.
        prefill_tokens: entries computed in prefill, padding included.
        prompt_tokens: of all prompts.
        found_tokens: of these, those whose entries were in the memory when their prompt was first read.
        preemptions: how often a request was made to give up its memory.
        seconds: that it all took.
    """

    tokens: list[list[int]]
    arrival: list[int]
    admitted: list[int]
    first: list[int]
    ended: list[int]
    slots: int
    running: list[int]
    held: list[int]
    used: list[int]
    device: list[int]
    prefill_tokens: int
    prompt_tokens: int
    found_tokens: int
    preemptions: int
    seconds: float

    @property
    def iterations(self) -> int:
        """Passes of the model."""
        return len(self.held)

    @property
    def utilization(self) -> float:
        """Share of the slots, over all iterations, that gave a token to a request."""
        return sum(self.running) / (self.slots * self.iterations)

    @property
    def waiting(self) -> float:
        """Mean iterations from arrival to admission."""
        return sum(x - y for x, y in zip(self.admitted, self.arrival, strict=True)) / len(self.arrival)

    def first_token(self, percent: float) -> int:
        """Iterations from arrival to the first token, that which gave it included, by nearest rank: so many percent of the requests take no more.

        Args:
            percent: above 0, at most 100.
        """
        taken = sorted(x - y + 1 for x, y in zip(self.first, self.arrival, strict=True))
        return taken[math.ceil(percent * len(taken) / 100) - 1]

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that were found in the memory."""
        return self.found_tokens / self.prompt_tokens

    @property
    def peak_bytes(self) -> int:
        """Bytes held at the peak."""
        return max(self.held)

    @property
    def peak_used(self) -> int:
        """Bytes used at the first iteration of the peak."""
        return self.used[self.held.index(self.peak_bytes)]

    @property
    def device_bytes(self) -> int:
        """Bytes on the device at the peak."""
        return max(self.device)

    @property
    def share_used(self) -> float:
        """Share of the bytes held, over all iterations, that was used."""
        return sum(self.used) / sum(self.held)


# Called after each iteration with what keys and values lie in: it has `held`, as in `Served`, and all tensors can be reached from it.
Watch = Callable[[Any], None]


class Serving(ABC):
    """A method: a frozen dataclass of settings."""

    slots: int
    memory: int

    @abstractmethod
    def serve(self, model: Decoder, requests: Sequence[Request], watch: Watch | None = None) -> Served:
        """Answer all requests.

        Args:
            model: left as it is.
            requests: at least one; those that arrive together are served in the order given, where the method has no reason for another.
            watch: for those who look at the memory from outside.

        Raises:
            ValueError: a request outside its ranges, or one that the memory can't hold.
        """


def check_requests(model: Decoder, requests: Sequence[Request], slots: int, memory: int) -> None:
    """Check what `serve` is called with.

    Raises:
        ValueError: slots or memory below 1; no request; a field outside its range, or more entries than the memory has.
    """
    if slots < 1 or memory < 1:
        raise ValueError(f"slots={slots} and memory={memory} (entries) must be at least 1")
    if not requests:
        raise ValueError("requests is empty: at least one is needed")
    for i, request in enumerate(requests):
        try:
            check_arguments(model, torch.tensor([request.prompt]), request.n, 0.0, None, None)
        except ValueError as error:
            raise ValueError(f"requests[{i}]: {error}") from error
        if request.arrival < 0:
            raise ValueError(f"requests[{i}]: arrival={request.arrival} must be at least 0")
        if request.entries > memory:
            raise ValueError(
                f"requests[{i}]: a prompt of {len(request.prompt)} tokens and n={request.n} take {request.entries} entries, and "
                f"the memory holds {memory}: give more of it, or ask for less"
            )


def entry_bytes(config: Config, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers.

    Examples:
        >>> entry_bytes(Config(vocabulary=2, d_model=8, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=8), torch.float16)
        128
    """
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * dtype.itemsize


def weight_bytes(model: Decoder) -> int:
    """Bytes of all weights; what is tied counts once."""
    return sum(parameter.nbytes for parameter in model.parameters())
