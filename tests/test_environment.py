"""What is stored beside every figure. Oracles: git, `platform`, and torch themselves."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from refimpl import environment as module
from refimpl.environment import environment

ROOT = Path(__file__).parents[1]


def git(*command):
    done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def test_environment_is_that_of_this_process():
    stamp = environment()
    assert stamp["commit"] == git("rev-parse", "--short=12", "HEAD")
    assert stamp["python"] == platform.python_version()
    assert stamp["torch"] == version("torch")
    assert stamp["system"] == f"{platform.system()} {platform.machine()}"
    assert (stamp["cores"], stamp["threads"]) == (os.cpu_count(), torch.get_num_threads())
    assert stamp["device"] == "cpu"
    assert stamp["processor"]


def test_the_dirty_flag_tells_whether_code_differs_from_the_commit(monkeypatch, tmp_path):
    """Oracle: git itself, in a small repository. Code and leaves that it does not know count, other files do not, nor those of results."""
    results, code = tmp_path / "docs/results/weights.json", tmp_path / "refimpl/rtn.py"
    for path in (results, code):
        path.parent.mkdir(parents=True)
        path.write_text("before")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(module, "HERE", code.parent)
    assert environment()["dirty"] is False
    (tmp_path / "new.py").write_text("unknown to git")
    results.write_text("after")
    assert environment()["dirty"] is False
    for path in (tmp_path / "refimpl/deep/mine.py", tmp_path / "taxonomy/mine.yaml"):
        path.parent.mkdir()
        path.write_text("a method that the commit does not have")
        assert environment()["dirty"] is True
        path.unlink()
    assert environment()["dirty"] is False
    code.write_text("after")
    assert environment()["dirty"] is True


def test_outside_of_git_commit_and_flag_are_unknown(monkeypatch, tmp_path):
    """No git on the path; and a folder that no repository holds."""
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert module._git("rev-parse", "HEAD") is None
    monkeypatch.setenv("PATH", "")
    stamp = environment()
    assert (stamp["commit"], stamp["dirty"]) == (None, None)


def test_packages_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setattr(module, "PACKAGES", ("torch", "no-such-package-as-this"))
    stamp = environment()
    assert "torch" in stamp
    assert "no-such-package-as-this" not in stamp


def test_processor_where_the_system_does_not_list_it(monkeypatch):
    """Oracle: `platform.processor`; also where /proc/cpuinfo has no such line, as on some ARM machines."""
    monkeypatch.setattr(platform, "processor", lambda: "a processor")
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "flags : x\nmodel name\t: Some Chip 3000\n")
    assert module._processor() == "Some Chip 3000"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "flags : x\n")
    assert module._processor() == "a processor"

    def absent(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    assert module._processor() == "a processor"


def test_stamp_is_plain_data():
    """JSON can hold it: texts, numbers, truths and nothing."""
    assert all(value is None or isinstance(value, str | int | bool) for value in environment().values())
