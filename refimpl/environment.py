"""Where a figure was measured: stored beside every one."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGES = ("effllm", "torch", "numpy", "transformers", "peft")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Commit, dirty flag, versions, processor, threads and device of this process."""
    import torch

    stamp: dict[str, Any] = {"commit": _git("rev-parse", "--short=12", "HEAD")}
    others = (":(top)", ":(top,exclude)docs/results")  # all but what this stamp is written into
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *others)
    new = _git("ls-files", "--others", "--exclude-standard", "--", ":(top)refimpl", ":(top)taxonomy")
    stamp["dirty"] = None if changed is None else bool(changed or new)
    stamp["python"] = platform.python_version()
    for name in PACKAGES:
        try:
            stamp[name] = version(name)
        except PackageNotFoundError:
            continue
    stamp["system"] = f"{platform.system()} {platform.machine()}"
    stamp["processor"] = _processor()
    stamp["cores"] = os.cpu_count()
    stamp["threads"] = torch.get_num_threads()
    stamp["device"] = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return stamp


def _git(*command: str) -> str | None:
    """Output of a git command in this checkout; None outside of one."""
    try:
        done = subprocess.run(["git", *command], cwd=HERE, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
