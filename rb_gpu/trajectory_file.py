"""The SQLite file of a trajectory log: its schema, how it is opened, and how it is read in batches."""

from __future__ import annotations

import logging
import os
import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rb_gpu.errors import ConfigError, DataError

_logger = logging.getLogger(__name__)

_APPLICATION_ID = 0x72624C47  # "rbLG"
_VERSION = 1
_LOCK_TIMEOUT_S = 1.0  # short, because a fork may have to wait for it; a writer tries again
_OPEN_TIMEOUT_S = 30.0
_EMPTY_TIMEOUT_S = 2.0

# A vote is a row of its own, because it may come before its trajectory, or from a process that never saw that. seq has
# no gaps: SQLite assigns max + 1, and only the oldest rows are ever deleted.
_CREATE = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS trajectory (
    seq INTEGER PRIMARY KEY, id INTEGER NOT NULL UNIQUE, query_id INTEGER, ef_search INTEGER NOT NULL,
    n_probes INTEGER NOT NULL, context_tokens INTEGER NOT NULL, model_tier TEXT NOT NULL, temperature REAL NOT NULL,
    precision REAL, recall REAL, latency_us INTEGER NOT NULL, cost REAL, timestamp INTEGER NOT NULL, propensity REAL,
    policy TEXT, retrieved_ids TEXT NOT NULL, query_embedding BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS vote (
    seq INTEGER PRIMARY KEY, id INTEGER NOT NULL UNIQUE, rating INTEGER NOT NULL, comment TEXT);
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_VERSION};
COMMIT;
"""
_SELECT = """
SELECT t.seq, t.id, coalesce(query_id, t.id) AS query_id, query_embedding, ef_search, n_probes, context_tokens,
    model_tier, temperature, precision, recall, latency_us, cost, coalesce(rating, 0) AS rating, timestamp, propensity,
    policy FROM trajectory t LEFT JOIN vote USING (id) WHERE t.seq > ? AND t.seq <= ? ORDER BY t.seq LIMIT ?
"""
_DTYPES = {
    "i8": ("seq", "timestamp"),
    "u8": ("id", "query_id", "latency_us"),
    "u4": ("ef_search", "n_probes", "context_tokens"),
    "f4": ("temperature", "precision", "recall", "cost", "propensity"),
    "i1": ("rating",),
}

# A child of fork() that inherits an open connection would share SQLite's bookkeeping of its parent's file locks, and so
# corrupt the file. All code here that uses SQLite holds the gate; a fork takes it and first closes open connections.
gate = threading.Lock()


def read_batches(
    path: str | os.PathLike[str], rows: int = 65_536, after: int | None = None
) -> Iterator[dict[str, Any]]:
    """The log's rows in the order of insertion, `rows` at a time, up to the newest one at the time of the first batch.

    Each batch maps the columns of the trajectory table to arrays of its n rows: seq, timestamp (UTC seconds) int64; id,
    query_id (the row's own id if none was logged), latency_us uint64; ef_search, n_probes, context_tokens uint32;
    temperature, precision, recall, cost, propensity float32, NaN if unknown; rating int8, 0 if there is none. Lists:
    model_tier str, policy str or None, query_embedding read-only float32 vectors, each as long as it was logged.

    after: the seq of a row; only later rows are read. Writers may continue meanwhile; rows that they evict before they
    are read are missing. The first batch raises ConfigError for rows < 1, DataError if the file is missing or no log of
    this version.
    """
    if rows < 1:
        raise ConfigError(f"rows={rows!r} is below 1; give the number of rows to read at a time")
    absolute, seq = Path(path).absolute(), after or 0
    newest = _select(absolute, "SELECT max(seq) AS newest FROM trajectory", ())["newest"][0]
    # one connection per batch: an open one would stop the writers from emptying the write-ahead log
    while batch := _select(absolute, _SELECT, (seq, newest, rows)):
        for dtype, names in _DTYPES.items():
            for name in names:  # SQLite stores uint64 as int64; NumPy reads None as NaN
                batch[name] = np.array(batch[name], dtype=dtype.replace("u8", "i8")).view(dtype)
        # with a count, a blob with a torn last number gives a shorter vector in place of an error
        batch["query_embedding"] = [np.frombuffer(blob, "<f4", len(blob) // 4) for blob in batch["query_embedding"]]
        seq = int(batch["seq"][-1])
        yield batch


def open_writer(given: Path) -> tuple[sqlite3.Connection, int]:
    """A writing connection and the file's inode; the file is created if there is none. The caller must hold the gate.
    Raises DataError.
    """
    deadline = time.monotonic() + _OPEN_TIMEOUT_S
    while True:
        inode, path = None, Path(os.path.realpath(given))  # SQLite puts the -wal beside the target of a link
        try:
            with ExitStack() as on_error, _folder_held(path, deadline):
                _make(path)
                inode = inode_of(path)
                # SQLite must not create the file: it would take a -wal that a renamed log left behind for the new
                # file's own
                mode = "rw" if os.name == "posix" else "rwc"
                # the gate keeps threads apart, and a fork closes the connection from its own thread
                connection = sqlite3.connect(
                    f"{path.as_uri()}?mode={mode}", _LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False,
                    uri=True,
                )  # fmt: skip
                on_error.callback(connection.close)
                if _is_empty(connection, path):  # opens the -wal by its name, so no other file may have it by now
                    connection.execute("PRAGMA journal_mode = WAL")
                    connection.executescript(_CREATE)
                connection.execute("PRAGMA synchronous = NORMAL")
                on_error.pop_all()
                return connection, path.stat().st_ino if inode is None else inode
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; give a path in a folder that you may read and write") from error
        except sqlite3.Error as error:
            # SQLite itself does not wait when several processes create the file at the same time
            again = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY or (
                inode is not None and inode_of(path) != inode
            )
            if not again or time.monotonic() > deadline:
                raise DataError(f"{path}: {error}; give the path of a trajectory log that you may write") from error
            time.sleep(0.01)


def empty_wal(connection: sqlite3.Connection) -> bool:
    """Moves the content of the -wal into the file. Returns whether that succeeded. The caller must hold the gate."""
    deadline = time.monotonic() + _EMPTY_TIMEOUT_S
    # two processes that do this at once both find the other busy at once, so neither would succeed without a random
    # wait
    while connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005 * random.random())
    return True


def inode_of(path: Path) -> int | None:
    """Inode of the file that has this name now, or None if there is none."""
    try:  # a single stat, since another process may rename the file between two
        return path.stat().st_ino
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextmanager
def _folder_held(path: Path, deadline: float) -> Iterator[None]:
    """Lets one process at a time open or create a file in this folder. Otherwise a process that has just opened a file
    which is then renamed would go on writing to the -wal of the file created in its place.
    """
    if os.name != "posix" or not path.parent.is_dir():  # only POSIX can rename an open file
        yield
        return
    import fcntl

    folder = os.open(path.parent, os.O_RDONLY)
    try:
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        yield
    finally:
        os.close(folder)


def _make(path: Path) -> None:
    """Creates an empty file if there is none, and puts aside the -wal that a renamed log left behind: SQLite would take
    that for the new file's own, and drop its rows. The caller must hold the folder.
    """
    if os.name != "posix" or path.exists() or not path.parent.is_dir():
        return
    path.with_name(path.name + "-shm").unlink(missing_ok=True)
    wal = path.with_name(path.name + "-wal")
    if wal.exists() and wal.stat().st_size > 0:
        aside = path.with_name(f"{wal.name}-{time.time_ns()}")
        wal.rename(aside)
        message = "%s may hold rows of the log that was renamed; put it beside that as NAME-wal and open it once"
        _logger.warning(message, aside)
    # an empty one is removed too, because a process that has the renamed log open still writes to it
    wal.unlink(missing_ok=True)
    path.touch()


def _select(path: Path, query: str, values: tuple[int, ...]) -> dict[str, Any]:
    """Columns of a query on a read-only connection; an empty dict if it returns no row."""
    path = Path(os.path.realpath(path))  # the -wal lies beside this
    # Without a -wal nobody is writing. immutable=1 then keeps the reader from creating a -wal, which it may not be
    # allowed to do, or which the next writer could not use
    wal = path.with_name(path.name + "-wal")
    alone = not wal.exists()
    uri = path.as_uri() + ("?mode=ro&immutable=1" if alone else "?mode=ro")
    try:
        with gate, closing(sqlite3.connect(uri, _OPEN_TIMEOUT_S, uri=True)) as connection:
            if _is_empty(connection, path):
                raise DataError(f"{path}: the file is empty; give the path of a trajectory log that was written to")
            cursor = connection.execute(query, values)
            names, rows = [name for name, *_ in cursor.description], cursor.fetchall()
    except sqlite3.Error as error:
        remedy = "give the path of a trajectory log that is whole and that you may read, or leave it out"
        raise DataError(f"{path}: {error}; {remedy}") from error
    if alone and wal.exists():  # a writer has come meanwhile
        return _select(path, query, values)
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=False))


def _is_empty(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether the file is still empty. Raises DataError if it holds anything but a log of this version."""
    # tables first, because another process may be creating the file between these queries
    queries = "SELECT count(*) FROM sqlite_master", "PRAGMA application_id", "PRAGMA user_version"
    tables, application_id, version = (connection.execute(query).fetchone()[0] for query in queries)
    if application_id == _APPLICATION_ID and version != _VERSION:
        raise DataError(f"{path}: log of schema {version}, this rb_gpu reads {_VERSION}; upgrade rb_gpu")
    if application_id != _APPLICATION_ID and tables:
        raise DataError(f"{path}: the database is not an rb_gpu trajectory log; give another path")
    return bool(application_id != _APPLICATION_ID)
