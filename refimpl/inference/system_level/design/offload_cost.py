r"""What it takes to run a block with weights, caches and activations on device, in CPU memory and on disk: seconds, and bytes held.

Glossary
    block        sequences that share each load of a layer's weights, $bls$: `batches` times `batch`
    batch        sequences that are computed at once, $gbs$
    shares       of weights, cache and activations in the three memories, $w_g, w_c, w_d, c_g, \dots, h_d$
    s, n         tokens of the padded prompts, and new ones
    T_pre, T_gen seconds of a layer and block in the first pass, and in a later one

Source: `flexgen` (arXiv 2303.06865), the section on the cost model, and the appendix that writes it out; official code
FMInference/FlexGen@19753bc, experimental/cost_model.py, which also has the constants.

Differs from the paper: as in the paper, and not as in the code, a layer takes as long as its slowest stream, and hidden states may lie on
disk. Constants of a link are one for all that passes it, here those of hidden states, and all products are as fast as those with
weights; the code has slower ones for the cache and for attention. The cache in a later pass has s + (n - 2) / 2 entries on average, which is
exact; the code takes s + n / 2. Memory has one peak, in the place of one in the first pass and one later, since all of a block's room
is taken when it starts; the code leaves a fifth of each memory free. Layers are the decoder's, of any shape, with grouped heads. While
a layer's weights are not all on the device, two buffers hold whole layers there, whatever its share.

Not here: attention that the CPU computes, so that a cache there must be moved; 4-bit weights and caches.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GB = 2**30
Shares = tuple[float, float, float]  # on the device, in CPU memory, on disk; their sum is 1
Linear = NDArray[np.float64]  # `[rows, 10]`, functions of the nine shares: factors, and in the last column constants


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Memories in bytes, links in bytes a second, and operations a second; speeds are the official code's of a T4 with an SSD.

    Args:
        device: bytes of the memory that is computed in.
        cpu: bytes.
        disk: bytes.
        cpu_to_device: link.
        device_to_cpu: link, here that of activations.
        disk_to_cpu: link.
        cpu_to_disk: link.
        prefill_flops: operations a second with many tokens.
        decode_flops: the same with one token of each sequence.
    """

    device: float
    cpu: float
    disk: float
    cpu_to_device: float = 12.89 * GB
    device_to_cpu: float = 4.82 * GB
    disk_to_cpu: float = 0.473 * GB
    cpu_to_disk: float = 2.015 * GB
    prefill_flops: float = 21.24e12
    decode_flops: float = 4.3e12

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (value >= 0 if name in ("device", "cpu", "disk") else value > 0):
                raise ValueError(f"{name}={value} must be above 0, a memory at least 0")


@dataclass(frozen=True, kw_only=True)
class Task:
    """Sizes of a model and of what is asked of it.

    Args:
        layers: $l$.
        weights: bytes of a layer, the largest.
        entry: bytes of a token's keys and values in a layer.
        feature: bytes of a token's hidden state.
        parameters: of a layer, each of which multiplies each token.
        attended: heads times their dimension.
        heads: of queries.
        inner: bytes that a layer takes beside these for a token: queries, gates, and so on.
        itemsize: bytes of a number.
        resident: bytes that always stay on the device: embedding, last norm, output layer.
        prompt: s.
        new: n, 1 or more.
        entries: tokens that the caches of a block may have together, None for any number.
    """

    layers: int
    weights: int
    entry: int
    feature: int
    parameters: int
    attended: int
    heads: int
    inner: int
    itemsize: int
    resident: int
    prompt: int
    new: int
    entries: int | None = None

    @property
    def length(self) -> int:
        """Entries of a sequence's cache: the last new token needs none."""
        return self.prompt + self.new - 1

    def cached(self, block: int) -> int:
        """Entries of a block's caches."""
        whole = block * self.length
        return whole if self.entries is None else min(whole, self.entries)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where all lies, and what that takes by the model.

    Attributes:
        batch: sequences computed at once.
        batches: of a block.
        weights: shares.
        cache: shares.
        activations: shares.
        seconds: of a block, $T_{pre} l + T_{gen} (n - 1) l$.
        bytes: held at most on the device, in CPU memory and on disk.
    """

    batch: int
    batches: int
    weights: Shares
    cache: Shares
    activations: Shares
    seconds: float
    bytes: tuple[float, float, float]

    @property
    def block(self) -> int:
        """Sequences of a block."""
        return self.batch * self.batches


def streams(task: Task, hardware: Hardware, block: int, first: bool) -> Linear:
    r"""Seconds of a layer and block on each stream as a linear function of the shares, `[5, 10]`.

    Rows are CPU to device, device to CPU, disk to CPU, CPU to disk, and computing; columns the nine shares.

    Args:
        task: sizes.
        hardware: speeds.
        block: sequences.
        first: whether it is the first pass, which reads the prompts.
    """
    s, n = task.prompt, task.new
    tokens = block * (s if first else 1)
    hidden, stored = tokens * task.feature, tokens * task.entry
    past = 0.0 if first else block * (s + (n - 2) / 2) * task.entry  # entries that are read, on average
    w, c, h = task.weights, past, hidden
    rows = np.zeros((5, 10))
    rows[0] = np.array([0, w, w, 0, c, c, 0, h, h, 0]) / hardware.cpu_to_device
    rows[1] = np.array([0, 0, 0, 0, stored, stored, 0, h, h, 0]) / hardware.device_to_cpu
    rows[2] = np.array([0, 0, w, 0, 0, c, 0, 0, h, 0]) / hardware.disk_to_cpu
    rows[3] = np.array([0, 0, 0, 0, 0, stored, 0, 0, h, 0]) / hardware.cpu_to_disk
    context = s if first else s + n / 2
    operations = tokens * (2 * task.parameters + 4 * context * task.attended)
    rows[4, 9] = operations / (hardware.prefill_flops if first else hardware.decode_flops)
    return rows


def footprint(task: Task, batch: int, block: int, streamed: bool) -> Linear:
    """Bytes on the device, in CPU memory and on disk as a linear function of the shares, `[3, 10]`.

    Args:
        task: sizes.
        batch: sequences computed at once.
        block: sequences.
        streamed: whether weights come to the device layer by layer, into two buffers.
    """
    w = task.layers * task.weights
    c = task.layers * task.cached(block) * task.entry
    h = block * task.prompt * task.feature
    rows = np.zeros((3, 10))
    for tier in range(3):
        rows[tier, [tier, 3 + tier, 6 + tier]] = w, c, h
    rows[1, 2] += task.weights  # what comes from disk passes through CPU memory, a layer's at a time
    rows[0, 9] = (
        task.resident
        + 2 * task.weights * streamed
        + batch * task.length * task.entry  # the cache that is computed with
        + batch
        * task.prompt
        * (task.feature + task.inner + task.heads * task.prompt * task.itemsize)  # scores, the last
    )
    batches = -(-block // batch)
    rounding = task.layers * (2 + 2 * batches * task.length) + 2 * batches * task.prompt
    rows[:, 9] += rounding * task.itemsize  # a share is made of whole numbers
    return rows


def evaluate(task: Task, hardware: Hardware, batch: int, batches: int, shares: Iterable[float]) -> Plan:
    """What given shares take, whether the memories hold them or not.

    Args:
        task: sizes.
        hardware: speeds.
        batch: sequences computed at once.
        batches: of a block.
        shares: nine, of weights, cache and activations in turn.
    """
    x = np.array([*shares, 1.0])
    block = batch * batches
    memory = footprint(task, batch, block, streamed=bool(x[0] < 1))
    first, later = (float((streams(task, hardware, block, one) @ x).max()) for one in (True, False))
    w, c, h = ((float(a), float(b), float(d)) for a, b, d in x[:9].reshape(3, 3))
    device, cpu, disk = (float(y) for y in memory @ x)
    return Plan(
        batch=batch,
        batches=batches,
        weights=w,
        cache=c,
        activations=h,
        seconds=task.layers * (first + (task.new - 1) * later),
        bytes=(device, cpu, disk),
    )
