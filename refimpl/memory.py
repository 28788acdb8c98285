"""How much memory a piece of work takes at its peak, beyond what is held when it begins."""

import ctypes
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """What `peak_of` found; `bytes` is set when its block ends."""

    bytes: int = 0


@contextmanager
def peak_of(device: torch.device) -> Iterator[Peak]:
    """Measure a block's peak: on a GPU what PyTorch allocates, on a CPU what the process has in memory.

    On a CPU, memory that the process has freed and kept would be used again unseen: with glibc it is given back before. Elsewhere the
    figure is a lower bound, near the truth for work that takes more than what came before it.

    Examples:
        >>> with peak_of(torch.device("cpu")) as peak:
        ...     _ = torch.ones(32 * 2**20)
        >>> 0.9 * 2**27 < peak.bytes < 1.5 * 2**27
        True
    """
    found = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        torch.cuda.synchronize(device)
        found.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    if RESET.exists():
        RESET.write_text("5")  # Linux: the peak of the resident set starts anew
    before = _resident("VmRSS")
    yield found
    found.bytes = max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    """Bytes of the resident set, `VmRSS` now or `VmHWM` at its peak; where Linux's files are missing, the peak so far."""
    if STATUS.exists():
        line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(f"{name}:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
