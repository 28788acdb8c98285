"""Programs that the tests of processes run on several ranks; here, since a process imports the module of its program."""

import os
import signal
import threading
from pathlib import Path

import torch
import torch.distributed as dist


def answer(group, base, tensor):
    tensor += group.rank  # its own copy
    return {"rank": base + group.rank, "tensor": tensor, "threads": torch.get_num_threads()}


def fail(group, how, culprit):
    """One rank dies, the others wait for it in an exchange."""
    if group.rank == culprit:
        if how == "raise":
            raise ValueError("the culprit's own words")
        if how == "exit":
            os._exit(7)
        if how == "leave":
            os._exit(0)
        if how == "sys.exit":
            raise SystemExit(3)
        os.kill(os.getpid(), signal.SIGKILL)
    group.all_reduce(torch.ones(5))


def wait_for_ever(group, folder):
    (Path(folder) / f"{group.rank}.tmp").write_text(str(os.getpid()))
    (Path(folder) / f"{group.rank}.tmp").rename(Path(folder) / f"{group.rank}.pid")
    threading.Event().wait()


def late(group):
    if group.rank == 1:
        threading.Event().wait()


def written():
    """Bytes that the kernel has seen this process write, to sockets too."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["wchar"])


def exchanges(group, count):
    """Values and bytes of each kind of exchange: what came out, what the group counted, what the kernel saw."""
    rank, size = group.rank, group.size
    mine = torch.arange(float(count)) + 1000 * rank
    rounds = {
        "all_reduce": lambda: group.all_reduce(mine.clone()),
        "reduce_scatter": lambda: group.reduce_scatter(mine)(),
        "all_gather": lambda: group.all_gather(torch.empty(count), mine[: count // size]),
        "all_to_all": lambda: group.all_to_all(mine),
        "broadcast": lambda: group.broadcast(mine.clone(), size - 1),
        "send": lambda: (
            group.send(mine, (rank + 1) % size)
            if rank == 0
            else group.receive(torch.empty(count), 0)
            if rank == 1
            else None
        ),
    }
    found = {}
    for kind, exchange in rounds.items():
        exchange()  # connections are made at the first one
        dist.barrier()
        counted, seen = group.sent[kind], written()
        result = exchange()
        found[kind] = (result, group.sent[kind] - counted, written() - seen)
        dist.barrier()
    return found
