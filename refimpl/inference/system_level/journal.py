"""What happened while requests were served, written down as it happens."""

import time
from collections.abc import Sequence

from refimpl.inference.system_level.protocol import Request, Served


class Journal:
    """The record that becomes a `Served`.

    Args:
        requests: in the order given.
        slots: that there are.
        weights: bytes of the model's, which stay on the device.

    Attributes:
        clock: the iteration to come.
        answers: new tokens of each request so far.

    Examples:
        >>> journal = Journal([Request(prompt=(5, 7), n=1)], slots=4, weights=100)
        >>> journal.admit(0, prefill=2)
        >>> journal.token(0, 8)
        >>> journal.end(0)
        >>> journal.iteration(running=1, held=32, used=32)
        >>> served = journal.served()
        >>> served.tokens, served.ended, served.utilization, served.device_bytes, journal.clock
        ([[8]], [0], 0.25, 132, 1)
    """

    def __init__(self, requests: Sequence[Request], slots: int, weights: int) -> None:
        self._requests, self._slots, self._weights, self._start = requests, slots, weights, time.perf_counter()
        self.clock, self.preemptions, self._prefill, self._found = 0, 0, 0, 0
        self.answers: list[list[int]] = [[] for _ in requests]
        self._admitted: dict[int, int] = {}
        self._first: dict[int, int] = {}
        self._ended: dict[int, int] = {}
        self._running: list[int] = []
        self._held: list[int] = []
        self._used: list[int] = []
        self._device: list[int] = []

    def admit(self, index: int, prefill: int, found: int = 0) -> None:
        """A request's prompt, or again what was computed of it, is read in this iteration.

        Args:
            index: the request.
            prefill: entries computed for it.
            found: entries of it that were in the memory; of what is read again they don't count.
        """
        if index not in self._admitted:
            self._admitted[index] = self.clock
            self._found += found
        self._prefill += prefill

    def token(self, index: int, token: int) -> None:
        """This iteration gave a request its next token."""
        self._first.setdefault(index, self.clock)
        self.answers[index].append(token)

    def end(self, index: int) -> None:
        """A request's answer is given after this iteration."""
        self._ended[index] = self.clock

    def iteration(self, running: int, held: int, used: int, device: int | None = None) -> None:
        """This iteration is over: requests that got a token, bytes held and used during it, and those on the device.

        Where `device` is None, all weights and all that is held are there.
        """
        self._running.append(running)
        self._held.append(held)
        self._used.append(used)
        self._device.append(self._weights + held if device is None else device)
        self.clock += 1

    def served(self) -> Served:
        """All of it."""
        order = range(len(self._requests))
        return Served(
            tokens=self.answers,
            arrival=[request.arrival for request in self._requests],
            admitted=[self._admitted[i] for i in order],
            first=[self._first[i] for i in order],
            ended=[self._ended[i] for i in order],
            slots=self._slots,
            running=self._running,
            held=self._held,
            used=self._used,
            device=self._device,
            prefill_tokens=self._prefill,
            prompt_tokens=sum(len(request.prompt) for request in self._requests),
            found_tokens=self._found,
            preemptions=self.preemptions,
            seconds=time.perf_counter() - self._start,
        )
