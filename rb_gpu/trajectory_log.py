"""The log of answered queries: a bounded ring in one SQLite file on a local disk, which many processes may write."""

from __future__ import annotations

import atexit
import logging
import os
import sqlite3
import threading
import time
from collections import deque
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np

from rb_gpu.errors import ConfigError
from rb_gpu.trajectory_file import empty_wal, gate, inode_of, open_writer
from rb_gpu.trajectory_row import Row, trajectory_row, vote_row
from rb_gpu.types import QueryTrajectory, UserFeedback, is_real

_logger = logging.getLogger(__name__)

_ROWS_PER_TRANSACTION = 1000  # short enough for other processes to get their turn
_ROWS_PER_STATEMENT = 50  # inserted in one hold of the GIL; 50 * 16 values are below the 999 of SQLite's oldest builds
_WARNING_INTERVAL_S = 60.0
_MAX_INT64 = 2**63 - 1

_UNUSABLE = (
    "recorded a precision, recall or propensity out of bounds; training sets such rows aside, and stops if they are "
    "more than data.max_bad_fraction"
)

_INSERT = "INSERT INTO {} VALUES {} ON CONFLICT (id) DO NOTHING"
_EVICT = "DELETE FROM {0} WHERE seq <= (SELECT max(seq) FROM {0}) - ?"
_open_logs: set[TrajectoryLog] = set()

_Record = dict[str, Row]  # rows by table: a trajectory, its vote, or both


class TrajectoryLog:
    """Appends trajectories and votes to the ring at `path`, from any number of threads and processes.

    The caller only appends to an in-memory queue of `queue_size` records, which one daemon thread writes every
    `flush_interval` seconds. A killed process loses what was not yet written, but never damages the file. A normal exit
    writes everything, except in a worker of `multiprocessing`, which has to call `close`. A forked child starts with an
    empty queue. While the file cannot be written, queued records wait and new ones are refused.

    The file may be renamed while it is written: flushed rows go with it, later rows go to a new file. Rows that a
    killed process wrote just before the rename, or that a reader kept in the -wal meanwhile, may remain in a -wal
    beside the old name; that -wal is then put aside, and a warning names it.

    capacity: number of newest trajectories kept, and of newest votes. dim: required length of embeddings, None for any.
    Raises ConfigError for a setting out of bounds, DataError if the file is no log of this version or cannot be opened.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        capacity: int = 1_000_000,
        dim: int | None = None,
        flush_interval: float = 0.2,
        queue_size: int = 65_536,
    ) -> None:
        for name, value in (("capacity", capacity), ("dim", 1 if dim is None else dim), ("queue_size", queue_size)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= _MAX_INT64:
                raise ConfigError(f"{name}={value!r} is not an integer in [1, {_MAX_INT64}]; give a positive integer")
        if not (is_real(flush_interval) and 0 < flush_interval <= threading.TIMEOUT_MAX):  # false for NaN too
            raise ConfigError(f"flush_interval={flush_interval!r} is not a positive number of seconds; try 0.2")
        self.path = Path(path).absolute()  # the process may change its working directory before the file is reopened
        # as Python numbers, since neither SQLite nor a wait takes NumPy's
        self._capacity, self._dim, self._queue_size = int(capacity), dim, int(queue_size)
        self._flush_interval = float(flush_interval)
        self._connection: sqlite3.Connection | None = None
        self._inode = 0
        self._deadline: float | None = None  # set by close
        self._start_empty()
        with gate:
            self._connect()
            _open_logs.add(self)
        atexit.register(self.close)

    def _start_empty(self) -> None:
        """Sets the state of a new log, and of a forked child, whose parent writes what was queued."""
        self._queue: deque[_Record] = deque()
        self._changed = threading.Condition()  # guards the queue, the counts and the thread
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._accepted = self._written = self._saved = self._dropped = self._duplicates = 0
        self._failing = False
        self._warned_at: dict[str, float] = {}

    @property
    def dropped(self) -> int:
        """Records (trajectories and votes) that this process lost because the queue was full, the file could not be
        written or the log was closed.
        """
        return self._dropped

    @property
    def queued(self) -> int:
        """Records that are not in the file yet, only in memory."""
        return len(self._queue)

    @property
    def failing(self) -> bool:
        """Whether the last attempt to write failed, for example on a full disk; the next one follows after
        `flush_interval`.
        """
        return self._failing

    @property
    def duplicates(self) -> int:
        """Trajectories that this process did not store because their id was already in the file; the first one is
        kept.
        """
        return self._duplicates

    def record(self, trajectory: QueryTrajectory) -> bool:
        """Queues a copy of a trajectory, with its feedback as a vote. Returns False if it was dropped.

        Raises DataError or TypeError, naming the field, as `trajectory_row` does. A precision, recall or propensity
        that training cannot use is stored, with a warning.
        """
        row = trajectory_row(trajectory, self._dim)
        odds = 1.0 if trajectory.propensity is None else trajectory.propensity
        shares = [float(share) for share in (trajectory.precision, trajectory.recall, odds)]
        if not (all(0 <= share <= 1 for share in shares) and shares[2] > 0):  # true for NaN too
            self._warn(_UNUSABLE)
        record: _Record = {"trajectory": row}
        if trajectory.feedback is not None:
            record["vote"] = vote_row(trajectory.id, trajectory.feedback)
        return self._put(record)

    def record_feedback(self, trajectory_id: int, feedback: UserFeedback) -> bool:
        """Queues a vote. Returns False if it was dropped. The first vote for an id to reach the file counts, later ones
        change nothing. A vote may come before its trajectory. Raises TypeError for a bare rating, or for an id that is
        not an integer, and DataError if the id is not a uint64.
        """
        return self._put({"vote": vote_row(trajectory_id, feedback)})

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until everything queued so far is in the file. Returns False after `timeout` seconds, or if close lost
        some of it.

        What is in the file survives the death of the process; a power cut may lose the last of it.
        """
        with self._changed:
            target = self._accepted
            self._wake.set()
            self._changed.wait_for(lambda: self._saved >= target or self._thread is None, timeout)
            return self._saved >= target

    def close(self, timeout: float = 5.0) -> None:
        """Writes what is queued. If the file cannot be written for `timeout` seconds, the rest counts as dropped."""
        with self._changed:
            self._deadline = self._deadline or time.monotonic() + timeout
            self._wake.set()
            thread = self._thread
        if thread is not None:
            thread.join()
        with gate:
            self._disconnect()
            _open_logs.discard(self)
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _put(self, record: _Record) -> bool:
        with self._changed:
            full = len(self._queue) >= self._queue_size
            if self._deadline is None and not self._failing and not full:
                self._queue.append(record)
                self._accepted += 1
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="rb_gpu trajectory log", daemon=True)
                    self._thread.start()
                if 2 * len(self._queue) == self._queue_size:
                    self._wake.set()
                return True
            self._dropped += 1
        if self._deadline is not None:
            self._warn("the log is closed")
        else:
            self._warn("the queue is full; raise queue_size" if full else "the file cannot be written")
        return False

    def _warn(self, problem: str) -> None:
        """Logs each problem at most once a minute, because a full disk must not flood the service's own log."""
        now = time.monotonic()
        if now - self._warned_at.get(problem, -_WARNING_INTERVAL_S) >= _WARNING_INTERVAL_S:
            self._warned_at[problem] = now
            _logger.warning("trajectory log %s: %s (%d records dropped so far)", self.path, problem, self._dropped)

    def _run(self) -> None:
        deadline = None
        while deadline is None or (self._queue and time.monotonic() < deadline):
            self._wake.wait(self._flush_interval if deadline is None else 0.05)
            self._wake.clear()
            deadline = self._deadline  # read before the queue, so that nothing queued before close is left behind
            try:
                self._write()
                self._failing = False
            except Exception as error:  # whatever the error: if the writer died, all later records would be lost
                self._failing = True
                self._warn(f"cannot write, will try again: {error}")
        with self._changed:
            lost = len(self._queue)
            self._dropped += lost
            self._thread = None
            self._changed.notify_all()
        if lost:
            self._warn("closed before the queue could be written")

    def _write(self) -> None:
        """Writes what is queued to the write-ahead log, and from there into the file, so that a rename takes it
        along.
        """
        target = self._accepted
        while self._written < target:
            self._write_batch()
        if self._saved < self._written:
            with gate:
                self._connect().execute("PRAGMA wal_checkpoint(PASSIVE)")
            with self._changed:
                self._saved = self._written
                self._changed.notify_all()

    def _write_batch(self) -> None:
        with self._changed:
            batch = list(islice(self._queue, _ROWS_PER_TRANSACTION))
        with gate:
            try:
                duplicates = self._transact(batch)
            except BaseException:
                self._disconnect()  # rolls back the transaction; its rows are still queued
                raise
        with self._changed:
            for _ in batch:
                self._queue.popleft()
            self._written += len(batch)
            self._duplicates += duplicates

    def _transact(self, batch: list[_Record]) -> int:
        """Writes the batch. Returns how many of its trajectories were duplicates."""
        connection = self._connect()
        connection.execute("BEGIN IMMEDIATE")
        repeated = {"trajectory": 0, "vote": 0}
        for table in repeated:
            rows = [record[table] for record in batch if table in record]
            for start in range(0, len(rows), _ROWS_PER_STATEMENT):
                part = rows[start : start + _ROWS_PER_STATEMENT]
                insert = _INSERT.format(table, ", ".join([f"({', '.join('?' * len(part[0]))})"] * len(part)))
                added = connection.execute(insert, [value for row in part for value in row]).rowcount
                repeated[table] += len(part) - added
            connection.execute(_EVICT.format(table), (self._capacity,))
        connection.execute("COMMIT")
        return repeated["trajectory"]

    def _connect(self) -> sqlite3.Connection:
        """The open connection, or a new one if the file was deleted or rotated away. The caller must hold the gate."""
        if self._connection and self._inode != inode_of(self.path):
            self._disconnect()
        if not self._connection:
            self._connection, self._inode = open_writer(self.path)
        return self._connection

    def _disconnect(self) -> None:
        if self._connection:
            if self._inode != inode_of(self.path):
                # SQLite itself does not empty the -wal when it closes a file that was renamed
                emptied = False
                with suppress(sqlite3.Error):
                    self._connection.rollback()
                    emptied = empty_wal(self._connection)
                if not emptied:
                    self._warn("the file was renamed, and its last rows may not be in it, as another process reads it")
            self._connection.close()
            self._connection = None


def _before_fork() -> None:
    gate.acquire()
    for log in _open_logs:
        log._disconnect()


def _after_fork_in_child() -> None:
    for log in _open_logs:
        log._start_empty()
    gate.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=gate.release, after_in_child=_after_fork_in_child)
