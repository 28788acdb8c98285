"""Finished cells, on disk as they finish: one SQLite row a cell, under the key of everything that determines it.

A run claims a cell before it computes it, by inserting its row, which SQLite lets one of many do. Finished, the row gets its
outcome, in a transaction of its own: a run that is killed loses only what it was computing, and the next one takes over the
claims of those that are dead. Rows hold JSON, and nothing that would be run when it is read.
"""

import json
import os
import platform
import sqlite3
import subprocess
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from refimpl.bench.fingerprint import content_digest, look

APPLICATION = 0x0EFF_11A1  # says in the file's head whose it is
LAYOUT = 1
BEAT, SILENCE = (
    15.0,
    120.0,
)  # seconds: how often an owner is heard of, and after what silence one on another host is dead

TABLES = (
    """CREATE TABLE cells (
    key TEXT PRIMARY KEY,
    arena TEXT NOT NULL, method TEXT NOT NULL,
    determinants TEXT NOT NULL,  -- JSON, what the key was made of
    owner TEXT,                  -- JSON, whoever computes it; NULL once it is finished
    seen REAL NOT NULL,          -- when the owner was last heard of; once finished, when that was
    outcome TEXT,                -- JSON; NULL until it is finished
    failed INTEGER
) WITHOUT ROWID""",
    "CREATE TABLE files (path TEXT PRIMARY KEY, look TEXT NOT NULL, digest TEXT NOT NULL) WITHOUT ROWID",
)


class Outcome(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What came of a cell.

    Args:
        figures: by metric; empty if it failed.
        curves: figures over the run.
        error: what it raised.
        seconds: how long it took.
        environment: where it was measured.
        node: host, or node of the cluster.
        pid: process on it.
    """

    figures: dict[str, int | float] = {}
    curves: dict[str, list[tuple[float | None, ...]]] = {}
    error: str | None = None
    seconds: float = 0.0
    environment: dict[str, Any] = {}
    node: str = ""
    pid: int = 0


class Unusable(ValueError):
    """The store cannot be read or written; the message says why, and what to do."""


class Store:
    """The file of finished cells; as many processes as like may have it open.

    Raises:
        Unusable: the file can't be opened, or is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.opened = path, time.time()
        process = {"host": platform.node(), "pid": os.getpid(), "started": process_start(os.getpid())}
        self.owner = json.dumps({**process, "run": uuid.uuid4().hex})
        self._lock = threading.RLock()  # joblib asks for the next cell from a thread of its own
        self._stop = threading.Event()
        self._digests: dict[Any, str] = {}
        with self._said():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise
        threading.Thread(target=self._beat, daemon=True).start()

    def _prepare(self) -> None:
        with self._transaction():
            [found] = self._db.execute("PRAGMA application_id").fetchone()
            [layout] = self._db.execute("PRAGMA user_version").fetchone()
            if not found and not self._db.execute("SELECT 1 FROM sqlite_schema").fetchone():
                for statement in TABLES:
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id = {APPLICATION}")
                self._db.execute(f"PRAGMA user_version = {LAYOUT}")
            elif (found, layout) != (APPLICATION, LAYOUT):
                made = "by another version of effllm" if found == APPLICATION else "by another program"
                raise Unusable(f"{self.path} was made {made}; move it away, or give another --store")
        self._db.execute("PRAGMA synchronous = FULL")
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            # another process is opening it; the file stays as it is, which is slower and no less safe

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back what is claimed and not finished, and close the file."""
        self._stop.set()
        with self._lock:
            with suppress(Unusable):  # what stays claimed is taken over once this process is dead
                self.release()
            self._db.close()

    def finished(self, keys: Iterable[str], *, retry: bool = False) -> dict[str, Outcome]:
        """Outcomes of those that are finished; with `retry` without those that failed before this store was opened."""
        found = {}
        for key in keys:
            row = self._ask("SELECT outcome, failed, seen FROM cells WHERE key = ? AND outcome IS NOT NULL", key)
            if row and not (retry and row[1] and row[2] < self.opened):
                found[key] = msgspec.json.decode(row[0], type=Outcome)
        return found

    def claim(self, key: str, determinants: dict[str, Any], label: tuple[str, str], *, retry: bool = False) -> bool:
        """Whether the cell is now this process's to compute: it was nobody's, its owner is dead, or it is to be retried.

        Args:
            key: the cell's.
            determinants: what the key was made of.
            label: arena and method, for who reads the file.
            retry: also if it failed before this store was opened.
        """
        now = time.time()
        with self._lock, self._said(), self._transaction():
            row = self._db.execute("SELECT owner, seen, outcome, failed FROM cells WHERE key = ?", (key,)).fetchone()
            if row is None:
                values = (key, *label, json.dumps(determinants, sort_keys=True), self.owner, now)
                self._db.execute(
                    "INSERT INTO cells (key, arena, method, determinants, owner, seen) VALUES (?, ?, ?, ?, ?, ?)",
                    values,
                )
                return True
            owner, seen, outcome, failed = row
            if outcome is None:
                free = owner is None or not alive(json.loads(owner), now - seen)
            else:
                free = bool(retry and failed and seen < self.opened)
            if free:
                self._db.execute(
                    "UPDATE cells SET owner = ?, seen = ?, outcome = NULL, failed = NULL WHERE key = ?",
                    (self.owner, now, key),
                )
            return free

    def finish(self, key: str, outcome: Outcome) -> None:
        """Store what came of a claimed cell; if another process was faster, what it stored stands."""
        self._do(
            "UPDATE cells SET outcome = ?, failed = ?, owner = NULL, seen = ? WHERE key = ? AND outcome IS NULL",
            msgspec.json.encode(outcome).decode(),
            outcome.error is not None,
            time.time(),
            key,
        )

    def release(self) -> None:
        """Give back the cells that this process claimed and did not finish."""
        self._do("DELETE FROM cells WHERE owner = ? AND outcome IS NULL", self.owner)

    def digest(self, path: Path) -> str:
        """The sha256 of a file's bytes, read again only if the file looks different since."""
        looks = look(path)
        if looks not in self._digests:
            text = json.dumps(msgspec.to_builtins(looks), sort_keys=True)
            row = self._ask("SELECT digest FROM files WHERE path = ? AND look = ?", looks.path, text)
            if row is None:
                row = (content_digest(path),)
                self._do("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", looks.path, text, row[0])
            self._digests[looks] = row[0]
        return self._digests[looks]

    def _ask(self, statement: str, *values: Any) -> Any:
        with self._lock, self._said():
            return self._db.execute(statement, values).fetchone()

    def _do(self, statement: str, *values: Any) -> None:
        with self._lock, self._said(), self._transaction():
            self._db.execute(statement, values)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            with self._lock, suppress(Unusable):  # the run itself meets the same trouble, and says so
                if not self._stop.is_set():
                    self._do("UPDATE cells SET seen = ? WHERE owner = ?", time.time(), self.owner)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with suppress(
                sqlite3.Error
            ):  # SQLite may have rolled back by itself; the first error is the one that counts
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            what, remedy = str(error), "give another --store"
            if "not a database" in what or "malformed" in what:
                what, remedy = f"is no store of effllm ({what})", "move it away, or give another --store"
            elif "full" in what:
                what, remedy = f"cannot grow ({what})", "what was finished is kept; make room and run again"
            else:
                what = f"cannot be used as a store ({what})"
            raise Unusable(f"{self.path} {what}; {remedy}") from error


def alive(owner: dict[str, Any], silence: float) -> bool:
    """Whether a claim's owner still computes: here, by its process; on another host, if it was heard of lately."""
    if owner["host"] == platform.node() and owner["started"] is not None:
        started: str | None = owner["started"]
        return process_start(owner["pid"]) == started
    return silence < SILENCE


def process_start(pid: int) -> str | None:
    """When a process started, which tells it from a later one of its number; None if there is none, or nobody can say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None if Path("/proc/self").exists() else _by_ps(pid)
    return None if fields[0] in "ZX" else f"{boot} {fields[19]}"  # a zombie computes nothing


def _by_ps(pid: int) -> str | None:
    try:
        done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
