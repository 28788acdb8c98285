"""The file of finished cells: claims, outcomes, owners that are dead, files that cannot be used."""

import json
import os
import sqlite3
import subprocess
import sys
import time

import pytest

from refimpl.bench import store as module
from refimpl.bench.store import Outcome, Store, Unusable, alive, process_start

LABEL = ("toy", "Good")
GOOD, BAD = Outcome(figures={"score": 1.5, "cost": 2**60}, curves={"c": [(1.0, None)]}), Outcome(error="E: no")


def rows(path):
    """The table, by another connection."""
    with sqlite3.connect(path) as db:
        found = db.execute("SELECT key, owner, outcome, failed FROM cells ORDER BY key").fetchall()
    db.close()
    return found


def test_a_cell_is_claimed_once_and_kept_when_finished(store):
    assert store.claim("k", {"a": 1}, LABEL)
    assert not store.claim("k", {"a": 1}, LABEL)
    assert store.finished(["k"]) == {}
    store.finish("k", GOOD)
    assert not store.claim("k", {"a": 1}, LABEL)
    assert store.finished(["k", "other"]) == {"k": GOOD}
    assert [type(value) for value in store.finished(["k"])["k"].figures.values()] == [float, int]
    with Store(store.path) as other:
        assert other.finished(["k"]) == {"k": GOOD}
        assert not other.claim("k", {}, LABEL)


def test_what_is_stored_is_there_before_anything_is_closed(store):
    """Oracle: another connection to the file."""
    store.claim("k", {"a": 1}, LABEL)
    [(key, owner, outcome, failed)] = rows(store.path)
    assert (key, outcome, failed) == ("k", None, None)
    assert json.loads(owner)["pid"] == os.getpid()
    store.finish("k", GOOD)
    [(key, owner, outcome, failed)] = rows(store.path)
    assert (owner, failed) == (None, 0)
    assert json.loads(outcome) == {"figures": {"score": 1.5, "cost": 2**60}, "curves": {"c": [[1.0, None]]}}


def test_a_claim_of_a_living_owner_stands(store):
    store.claim("k", {}, LABEL)
    with Store(store.path) as other:
        assert not other.claim("k", {}, LABEL)
        other.release()  # its own, of which it has none
        assert not other.claim("k", {}, LABEL)


def test_what_is_not_finished_is_given_back(store):
    with Store(store.path) as other:
        other.claim("a", {}, LABEL)
        other.claim("b", {}, LABEL)
        other.finish("a", GOOD)
    assert [row[0] for row in rows(store.path)] == ["a"]
    assert store.claim("b", {}, LABEL)


def test_the_first_outcome_stands(store):
    store.claim("k", {}, LABEL)
    store.finish("k", GOOD)
    store.finish("k", BAD)
    assert store.finished(["k"]) == {"k": GOOD}


def test_what_failed_is_retried_on_request_and_only_once(store):
    store.claim("bad", {}, LABEL)
    store.claim("good", {}, LABEL)
    store.finish("bad", BAD)
    store.finish("good", GOOD)
    assert store.finished(["bad"], retry=True) == {"bad": BAD}  # it failed in this very run
    with Store(store.path) as later:
        assert later.finished(["bad", "good"]) == {"bad": BAD, "good": GOOD}
        assert later.finished(["bad", "good"], retry=True) == {"good": GOOD}
        assert not later.claim("bad", {}, LABEL)
        assert not later.claim("good", {}, LABEL, retry=True)
        assert later.claim("bad", {}, LABEL, retry=True)
        assert not later.claim("bad", {}, LABEL, retry=True)
        later.finish("bad", BAD)
        assert not later.claim("bad", {}, LABEL, retry=True)


CLAIMS = """
import os, sys
from pathlib import Path
from refimpl.bench.store import Store
store = Store(Path(sys.argv[1]))
print(store.claim("k", {}, ("toy", "Good")), flush=True)
sys.stdin.read()
os._exit(1)
"""


def test_the_claim_of_a_killed_process_is_taken_over(store):
    """A real process, claimed and killed with SIGKILL: as long as it lives, its claim stands."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIMS, str(store.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "True\n"
    assert not store.claim("k", {}, LABEL)
    process.kill()
    process.communicate()
    assert store.claim("k", {}, LABEL)
    assert not store.claim("k", {}, LABEL)


def owned(store, **change):
    """A claim whose owner is changed."""
    store.claim("k", {}, LABEL)
    owner = json.dumps({**json.loads(store.owner), "run": "another", **change})
    store._db.execute("UPDATE cells SET owner = ?", (owner,))


def test_a_later_process_of_the_same_number_is_not_the_owner(store):
    owned(store, started="long ago")
    assert store.claim("k", {}, LABEL)


def test_an_owner_on_another_host_is_dead_after_a_silence(store, monkeypatch):
    """Oracle: by hand, with the time of its last sign set into the table."""
    owned(store, host="elsewhere", pid=1)
    assert not store.claim("k", {}, LABEL)
    store._db.execute("UPDATE cells SET seen = ?", (time.time() - module.SILENCE - 1,))
    assert store.claim("k", {}, LABEL)


def test_an_owner_is_heard_of(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.01)
    with Store(tmp_path / "b.sqlite") as store:
        store.claim("k", {}, LABEL)
        store._db.execute("UPDATE cells SET seen = 0")
        until = time.monotonic() + 30
        while not store._db.execute("SELECT seen FROM cells").fetchone()[0]:
            assert time.monotonic() < until


def test_a_process_is_told_from_others():
    """Oracle: the kernel; a child that has ended and is not waited for yet computes nothing."""
    assert process_start(os.getpid()) == process_start(os.getpid()) is not None
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    child.stdout.read()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_start(child.pid) is None
    child.communicate()
    assert process_start(child.pid) is None
    assert not alive({"host": module.platform.node(), "pid": child.pid, "started": "x"}, silence=0)


def test_where_there_is_no_proc_ps_is_asked(monkeypatch):
    assert module._by_ps(os.getpid()) or module._by_ps(os.getpid()) is None  # there may be no ps
    monkeypatch.setenv("PATH", "")
    assert module._by_ps(os.getpid()) is None


OPENS = """
import sys
from pathlib import Path
from refimpl.bench.store import Store
print("ready", flush=True)
sys.stdin.readline()
with Store(Path(sys.argv[1])) as store:
    print(sum(store.claim(str(k), {}, ("toy", "Good")) for k in range(50)), flush=True)
    sys.stdin.read()
"""


def test_processes_that_open_a_new_file_at_once_share_its_cells(tmp_path):
    """Oracle: sum of what each claimed. They start together, on a file that is not there yet."""
    command = [sys.executable, "-c", OPENS, str(tmp_path / "new.sqlite")]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    claimed = [int(process.stdout.readline()) for process in processes]
    for process in processes:
        process.communicate()
    assert sum(claimed) == 50


# Files that cannot be used


def foreign(path):
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE accounts (money)")
    db.close()


def newer(path):
    Store(path).close()
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA user_version = 99")
    db.close()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_text("this is no database, " * 100), "is no store of effllm"),
        (foreign, "was made by another program; move it away, or give another --store"),
        (newer, "was made by another version of effllm; move it away"),
        (lambda path: path.mkdir(), "cannot be used as a store"),
    ],
    ids=["text", "foreign", "newer", "folder"],
)
def test_a_file_that_is_something_else_is_left_alone(tmp_path, spoil, said):
    path = tmp_path / "bench.sqlite"
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(Unusable, match=said) as raised:
        Store(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert (path.read_bytes() if path.is_file() else None) == before


def test_a_broken_file_is_named(store):
    """Pages in the middle are overwritten: SQLite finds it when it reads them."""
    for k in range(200):
        store.claim(str(k), {"long": "x" * 500}, LABEL)
    store.close()
    data = bytearray(store.path.read_bytes())
    data[4096:-4096] = b"\xff" * (len(data) - 8192)
    store.path.write_bytes(data)
    with pytest.raises(Unusable, match="move it away"), Store(store.path) as opened:
        opened.finished(str(k) for k in range(200))


@pytest.mark.parametrize("place", ["/proc/effllm/bench.sqlite", "/dev/null/bench.sqlite"])
def test_a_place_that_cannot_be_written_is_named(place):
    from pathlib import Path

    with pytest.raises(Unusable, match=r"bench\.sqlite cannot be used as a store .*give another --store"):
        Store(Path(place))


def test_a_file_that_may_only_be_read_is_named(store, monkeypatch):
    """SQLite is told so by the connection, since a superuser may write everything."""
    monkeypatch.setattr(module.sqlite3, "connect", lambda path, **rest: real(f"file:{path}?mode=ro", uri=True, **rest))
    with Store(store.path) as opened, pytest.raises(Unusable, match=r"readonly database.*give another --store"):
        opened.claim("k", {}, LABEL)


real = sqlite3.connect


def test_a_full_disk_is_said_and_loses_nothing(store):
    """Oracle: SQLite itself, which is given no more pages; then again, with room."""
    store.claim("a", {}, LABEL)
    store.finish("a", GOOD)
    store.claim("b", {}, LABEL)
    [pages] = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    large = Outcome(error="x" * 1_000_000)
    with pytest.raises(Unusable, match=r"full.*what was finished is kept; make room and run again"):
        store.finish("b", large)
    store._db.execute("PRAGMA max_page_count = 1000000")
    assert store.finished(["a", "b"]) == {"a": GOOD}
    store.finish("b", large)
    assert store.finished(["b"]) == {"b": large}


def test_nothing_in_the_file_would_be_run(store):
    """Oracle: the column's types. All of it is text and numbers."""
    store.claim("k", {"a": [1, None]}, LABEL)
    store.finish("k", GOOD)
    kinds = store._db.execute(
        "SELECT typeof(determinants), typeof(outcome), typeof(key), typeof(failed) FROM cells"
    ).fetchone()
    assert kinds == ("text", "text", "text", "integer")
    assert json.loads(store._db.execute("SELECT determinants FROM cells").fetchone()[0]) == {"a": [1, None]}
