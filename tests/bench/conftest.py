"""A toy arena and toy methods, written into a folder that Python finds: other processes meet them too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from refimpl.bench.cells import Cell
from refimpl.bench.store import Store

ROOT = Path(__file__).parents[2]

ARENA = '''
"""A toy."""
from refimpl.arena.protocol import Metric
from refimpl.toys.rules import figures

ABOUT = "Toys, by points."
VERSION = 1
METRICS = (Metric("score", "points", "higher"), Metric("cost", "bytes", "lower"))
BASELINE = "nothing"
AXES = {"task": ("sum", "count"), "length": (1, 2, 4)}
QUICK = {"task": ("sum",), "length": (1, 2)}


def baseline(conditions):
    return figures(0.0, conditions)


def measure(implementation, settings, conditions):
    return implementation(**settings)(conditions)
'''

RULES = '''
"""How a toy's figures come about."""
import torch


def figures(gain, conditions):
    drawn = float(torch.rand(1, generator=conditions.generator)) + float(torch.rand(1))
    length = conditions.axes.get("length", 0)
    conditions.curves["score over steps"] = [(step, gain * step) for step in range(2 if conditions.quick else 4)]
    return {"score": gain + drawn + 10 * length, "cost": 8}
'''

METHODS = '''
"""Toy methods, good and bad."""
import os
import signal
import sys
from pathlib import Path

from refimpl.toys.rules import figures


class Good:
    """Leaves a line in `marks` each time it is run."""

    def __init__(self, gain=1.0, marks=None):
        self.gain, self.marks = gain, marks

    def __call__(self, conditions):
        if self.marks:
            with open(self.marks, "a") as file:
                file.write(f"{self.gain} {dict(conditions.axes)} {os.getpid()}\\\\n")
        return figures(self.gain, conditions)


class Bad(Good):
    """Fails."""

    def __call__(self, conditions):
        super().__call__(conditions)
        raise RuntimeError("no luck")


class Deadly(Good):
    """Ends its process."""

    def __call__(self, conditions):
        super().__call__(conditions)
        os._exit(9)


class Interrupted(Good):
    """As if Ctrl-C were pressed."""

    def __call__(self, conditions):
        raise KeyboardInterrupt


class Blocks(Good):
    """Says so and waits for ever, the first time; later it is good."""

    def __call__(self, conditions):
        before = Path(self.marks).read_text() if Path(self.marks).exists() else ""
        result = super().__call__(conditions)
        if f"{self.gain} " not in before:
            os.write(1, b"blocking\\n")
            signal.pause()
        return result


class Meets(Good):
    """Ends only once another cell of this kind has opened the other end of its pipe, at the same time."""

    def __init__(self, end, pipe, marks=None):
        super().__init__(1.0, marks)
        self.end, self.pipe = end, pipe

    def __call__(self, conditions):
        with open(self.pipe, self.end):
            return super().__call__(conditions)
'''


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """The folder of the toys."""
    folder = tmp_path / "toys"
    for name, text in {"arena/toy": ARENA, "toys/rules": RULES, "toys/methods": METHODS}.items():
        path = folder / "refimpl" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("\\\\n", "\\n"))
    for name in [name for name in sys.modules if name.startswith(("refimpl.arena.toy", "refimpl.toys"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in [name for name in sys.modules if name.startswith(("refimpl.arena.toy", "refimpl.toys"))]:
        del sys.modules[name]


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store" / "bench.sqlite") as opened:
        yield opened


def toy(method="Good", *, length=1, **rest):
    """A cell of a toy method; its settings are given by name."""
    fields = {name: rest.pop(name) for name in ("seed", "quick", "device", "model") if name in rest}
    return Cell(
        arena="toy",
        method=method or "nothing",
        implementation=method and f"refimpl.toys.methods:{method}",
        settings={name: str(value) if isinstance(value, Path) else value for name, value in rest.items()},
        axes={"task": "sum", "length": length},
        **fields,
    )


SCRIPT = """
import sys
from pathlib import Path
import msgspec
from refimpl.bench.cells import Cell
from refimpl.bench.engines import Pool
from refimpl.bench.runner import run
from refimpl.bench.store import Store
cells = msgspec.json.decode(sys.argv[2], type=list[Cell])
with Store(Path(sys.argv[1])) as store:
    rows = run(cells, store, Pool("here"))
print(msgspec.json.encode(rows).decode())
"""


def another_process(toys, path, cells):
    """A process of its own that runs cells on the store at `path`; it prints their rows."""
    import msgspec

    variables = {**os.environ, "PYTHONPATH": f"{toys}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(path), msgspec.json.encode(list(cells)).decode()]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)
