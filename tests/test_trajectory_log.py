"""The log is judged by the content of its file afterwards, read through `read_batches` or SQLite itself."""

from __future__ import annotations

import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rb_gpu import trajectory_file
from rb_gpu.errors import ConfigError, DataError
from rb_gpu.params import SearchParams
from rb_gpu.trajectory_file import read_batches
from rb_gpu.trajectory_log import TrajectoryLog
from rb_gpu.types import QueryTrajectory, UserFeedback

HERE = Path(__file__).parent
ROOT = HERE.parent
PATIENCE_S = 20.0


def trajectory(trajectory_id: int, **fields: Any) -> QueryTrajectory:
    values: dict[str, Any] = {
        "query_embedding": np.full(4, trajectory_id % 1000, dtype=np.float32),
        "search_params": SearchParams(),
        "precision": 0.5,
        "recall": 0.25,
        "latency_us": 1000,
        "timestamp": 1_700_000_000,
    }
    return QueryTrajectory(id=trajectory_id, **values | fields)


def columns(path: Path) -> dict[str, Any]:
    batches = list(read_batches(path))
    return {
        name: np.concatenate([batch[name] for batch in batches])
        if isinstance(batches[0][name], np.ndarray)
        else [value for batch in batches for value in batch[name]]
        for name in batches[0]
    }


def ids(path: Path) -> list[int]:
    return [int(row) for batch in read_batches(path) for row in batch["id"]]


def ratings(path: Path) -> dict[int, int]:
    return {
        int(row): int(rating)
        for batch in read_batches(path)
        for row, rating in zip(batch["id"], batch["rating"], strict=True)
    }


def query(path: Path, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another writer that holds the file's lock."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


def start(path: Path, code: str) -> subprocess.Popen[str]:
    """A new process that has `log`, `trajectory`, `UserFeedback` and `threading`."""
    prelude = (
        "import os, threading\n"
        "from test_trajectory_log import *\n"
        f"log = TrajectoryLog({str(path)!r}, flush_interval=0.02)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])}
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code], env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def killed_writer(path: Path) -> int:
    """Kills a process while it writes; returns the number of rows (ids 0, 1, ...) that it had certainly flushed."""
    writer = start(
        path,
        "import itertools\n"
        "for i in itertools.count():\n"
        "    log.record(trajectory(i))\n"
        "    if i % 100 == 99:\n"
        "        log.flush()\n"
        "        print(i + 1, flush=True)\n",
    )
    flushed = 0
    while flushed < 1000:
        flushed = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    rest = writer.communicate(timeout=PATIENCE_S)[0].split("\n")
    assert writer.returncode == -signal.SIGKILL
    return max([flushed] + [int(line) for line in rest[:-1]])


def test_every_field_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a log?#.db"
    full = QueryTrajectory(
        id=2**64 - 1,
        query_embedding=np.array([0.1, -2.5, 3e-9], dtype=np.float32),
        search_params=SearchParams(2**32 - 1, 3, "größer", 4096, 1.3),
        precision=0.123456,
        recall=1.0,
        latency_us=2**63 + 5,
        timestamp=-7,
        retrieved_ids=("a", 'b"\n', "ü"),
        feedback=UserFeedback(4, "fine 👍"),
        query_id=2**63,
        cost=0.037,
        propensity=0.2,
        policy="v12",
    )
    bare = trajectory(0, query_embedding=np.array([1.0, 2.0]), precision=float("nan"))
    with TrajectoryLog(path) as log:
        assert log.record(full)
        assert log.record(bare)
    got = columns(path)

    dtypes = {name: column.dtype.name for name, column in got.items() if isinstance(column, np.ndarray)}
    assert dtypes == {
        "seq": "int64",
        "id": "uint64",
        "query_id": "uint64",
        "ef_search": "uint32",
        "n_probes": "uint32",
        "context_tokens": "uint32",
        "temperature": "float32",
        "precision": "float32",
        "recall": "float32",
        "latency_us": "uint64",
        "cost": "float32",
        "rating": "int8",
        "timestamp": "int64",
        "propensity": "float32",
    }
    assert got["id"].tolist() == [2**64 - 1, 0]
    assert got["query_id"].tolist() == [2**63, 0]
    assert got["latency_us"].tolist() == [2**63 + 5, 1000]
    assert got["timestamp"].tolist() == [-7, 1_700_000_000]
    assert got["ef_search"].tolist() == [2**32 - 1, 100]
    assert got["n_probes"].tolist() == [3, 8]
    assert got["context_tokens"].tolist() == [4096, 2048]
    assert got["model_tier"] == ["größer", "auto"]
    assert got["policy"] == ["v12", None]
    assert got["rating"].tolist() == [4, 0]
    for name, values in {
        "temperature": [1.3, 0.7],
        "precision": [0.123456, np.nan],
        "recall": [1.0, 0.25],
        "cost": [0.037, np.nan],
        "propensity": [0.2, np.nan],
    }.items():
        np.testing.assert_array_equal(got[name], np.array(values, dtype=np.float32), err_msg=name)
    assert [vector.dtype for vector in got["query_embedding"]] == [np.float32, np.float32]
    assert got["query_embedding"][0].tobytes() == full.query_embedding.tobytes()
    assert got["query_embedding"][1].tolist() == [1.0, 2.0]
    assert json.loads(query(path, "SELECT retrieved_ids FROM trajectory")[0][0]) == ["a", 'b"\n', "ü"]
    assert query(path, "SELECT comment FROM vote") == [("fine 👍",)]


def test_the_row_is_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    buffer = np.ones(4, dtype=np.float32)
    with TrajectoryLog(path, flush_interval=60) as log:
        log.record(trajectory(1, query_embedding=buffer))
        buffer[:] = 9
    assert columns(path)["query_embedding"][0].tolist() == [1, 1, 1, 1]


def test_damaged_blob_is_returned_for_the_loader_to_count(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    with TrajectoryLog(path) as log:
        log.record(trajectory(1))
        log.record(trajectory(2))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE trajectory SET query_embedding = x'0000803f01' WHERE id = 1")
        connection.commit()
    assert [vector.tolist() for vector in columns(path)["query_embedding"]] == [[1.0], [2.0] * 4]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"query_embedding": np.ones(3)}, DataError),
        ({"query_embedding": np.ones((1, 4))}, DataError),
        ({"query_embedding": np.float32(1)}, DataError),
        # regression: the value under the mask was written
        ({"query_embedding": np.ma.masked_greater(np.arange(4.0), 2.5)}, DataError),
        ({"query_id": -1}, DataError),
        ({"latency_us": 2**64}, DataError),
        ({"timestamp": 2**63}, DataError),
        ({"timestamp": 1.5}, TypeError),
        ({"policy": "\ud800"}, ValueError),
        ({"feedback": UserFeedback(3, "\udcff")}, ValueError),
    ],
)
def test_a_row_that_cannot_be_kept_fails_in_the_caller(
    tmp_path: Path, fields: dict[str, Any], error: type[Exception]
) -> None:
    path = tmp_path / "log.db"
    with TrajectoryLog(path, dim=4) as log:
        with pytest.raises(error):
            log.record(trajectory(1, **fields))
        assert log.record(trajectory(2))
    assert ids(path) == [2]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        # regression: a latency from perf_counter and a time from time.time() said only that a float is no integer
        ({"latency_us": 480.5}, "latency_us=480.5 is not an integer; give a whole number"),
        ({"timestamp": 1e9}, "timestamp=1000000000.0 is not an integer"),
        ({"id": "q7"}, "id='q7' is not an integer"),
        ({"query_id": -1}, r"query_id=-1 is outside \[0, 18446744073709551615\]; give an integer of 64 bits"),
        # regression: these ended in an AttributeError, or in a TypeError that named no field
        ({"search_params": {"ef_search": 64}}, r"search_params=\{'ef_search': 64\} is not a SearchParams; give"),
        ({"feedback": 5}, r"feedback=5 is not a UserFeedback; give UserFeedback\(rating\)"),
        ({"precision": "high"}, "precision='high' is not a number that a float can hold; give a float"),
        ({"recall": [0.5]}, r"recall=\[0.5\] is not a number"),
        ({"cost": 10**400}, "cost=10+ is not a number"),
        ({"propensity": {}}, r"propensity=\{\} is not a number"),
        ({"policy": 7}, "policy=7 is not a string"),
        ({"policy": "\ud800"}, "policy='.*' is not valid Unicode"),
        ({"retrieved_ids": np.array(["a"])}, r"retrieved_ids=array.* is not a tuple; give a tuple of strings"),
        ({"retrieved_ids": (np.int64(1),)}, "retrieved_ids cannot be stored .*; give a tuple of strings"),
        ({"query_embedding": ["a"]}, "query_embedding of 1 is no vector of numbers .*; log the vector"),
    ],
)
def test_a_wrong_value_is_told_with_its_field(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    with TrajectoryLog(tmp_path / "log.db") as log, pytest.raises((TypeError, DataError), match=f"^{says}"):
        log.record(trajectory(1)._replace(**fields))


def test_what_is_no_trajectory_or_vote_is_told(tmp_path: Path) -> None:
    # regression: AttributeError: 'dict' object has no attribute 'query_embedding'
    with TrajectoryLog(tmp_path / "log.db") as log:
        with pytest.raises(TypeError, match=r"^trajectory is of type dict, not QueryTrajectory; give"):
            log.record(trajectory(1)._asdict())  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^feedback=5 is not a UserFeedback; give"):
            log.record_feedback(1, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad_id", [-1, 2**64])
def test_id_outside_uint64(tmp_path: Path, bad_id: int) -> None:
    with TrajectoryLog(tmp_path / "log.db") as log:
        with pytest.raises(DataError, match=str(bad_id)):
            log.record(trajectory(bad_id))
        with pytest.raises(DataError, match=str(bad_id)):
            log.record_feedback(bad_id, UserFeedback(1))


@pytest.mark.parametrize(
    "setting",
    [
        {"capacity": 0}, {"dim": 0}, {"queue_size": 0}, {"flush_interval": 0}, {"flush_interval": float("nan")},
        # regression: a capacity that SQLite cannot bind was accepted, and then no write ever succeeded
        {"capacity": 2**63}, {"capacity": float("nan")}, {"capacity": "10"}, {"dim": 3.5}, {"flush_interval": "1"},
    ],
)  # fmt: skip
def test_setting_out_of_bounds(tmp_path: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        TrajectoryLog(tmp_path / "log.db", **setting)
    assert not (tmp_path / "log.db").exists()


def test_settings_may_be_numpys(tmp_path: Path) -> None:
    # regression: the writer's thread died of a wait for np.float32 seconds, and nothing was ever written
    path = tmp_path / "log.db"
    with TrajectoryLog(path, np.int64(5), np.int64(4), np.float32(0.01), np.int64(9)) as log:
        assert log.record(trajectory(1)) and log.flush(PATIENCE_S)
    assert ids(path) == [1]


def test_capacity_keeps_the_newest(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    with TrajectoryLog(path, capacity=300) as log:
        for i in range(2500):
            log.record(trajectory(i, feedback=UserFeedback(1 + i % 5)))
            log.record(trajectory(i - i % 7))  # duplicates must not use up the ring's capacity
        log.flush()
        assert ids(path) == list(range(2200, 2500))
        assert ratings(path) == {i: 1 + i % 5 for i in range(2200, 2500)}
        assert log.duplicates == 2500
    assert query(path, "SELECT count(*) FROM vote") == [(300,)]
    with TrajectoryLog(path, capacity=3) as log:
        log.record(trajectory(9999))
    assert ids(path) == [2498, 2499, 9999]


def test_first_of_two_with_one_id_stands(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    with TrajectoryLog(path) as log:
        log.record(trajectory(1, precision=0.125))
        log.record(trajectory(1, precision=0.75))
        log.record(trajectory(2))
        log.flush()
        log.record(trajectory(1, precision=0.875))
        log.flush()
        assert log.duplicates == 2
        assert log.dropped == 0
    got = columns(path)
    assert got["id"].tolist() == [1, 2]
    assert got["precision"].tolist() == [0.125, 0.5]
    assert got["seq"].tolist() == [1, 2]


def test_overflow_is_counted_and_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.db"
    with TrajectoryLog(path, queue_size=10, flush_interval=0.01) as log:
        with locked(path), caplog.at_level(logging.WARNING):
            kept = [log.record(trajectory(i)) for i in range(13)]
            voted = log.record_feedback(1, UserFeedback(5))
            assert not log.flush(timeout=0.1)
        assert kept == [True] * 10 + [False] * 3
        assert not voted
        assert log.dropped == 4
        full = [record.getMessage() for record in caplog.records if "queue is full" in record.getMessage()]
        assert len(full) == 1
        assert "1 records dropped" in full[0]
        assert log.flush(timeout=PATIENCE_S)
    assert ratings(path) == dict.fromkeys(range(10), 0)


def test_record_does_not_wait_for_the_file(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    with TrajectoryLog(path, flush_interval=0.01) as log, locked(path):
        begin = time.monotonic()
        for i in range(2000):
            log.record(trajectory(i))
        assert time.monotonic() - begin < 0.9  # one wait for the lock takes a second
    assert ids(path) == list(range(2000))


def test_half_full_queue_is_written_at_once(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    with TrajectoryLog(path, flush_interval=600, queue_size=10) as log:
        for i in range(5):
            log.record(trajectory(i))
        give_up = time.monotonic() + PATIENCE_S
        while ids(path) != list(range(5)) and time.monotonic() < give_up:
            time.sleep(0.01)
        assert ids(path) == list(range(5))


def test_what_training_cannot_use_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # regression: a service's error (0 / 0 for a query without answers) showed only at night, when training stopped, and
    # the next nights, until such rows were 1 % of the log
    with TrajectoryLog(tmp_path / "log.db") as log, caplog.at_level(logging.WARNING):
        log.record(trajectory(0, propensity=1.0))
        assert not caplog.records
        for row, field in enumerate(({"precision": float("nan")}, {"recall": 1.5}, {"propensity": 0.0})):
            log.record(trajectory(row + 1, **field))
    assert ["out of bounds" in record.getMessage() for record in caplog.records] == [True]
    assert len(ratings(tmp_path / "log.db")) == 4


def test_failed_transaction_is_tried_again_as_a_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.db"
    with TrajectoryLog(path, flush_interval=0.3) as log, closing(sqlite3.connect(path)) as other:
        # simulates a disk that becomes full in the middle of a batch
        other.execute(
            "CREATE TRIGGER full BEFORE INSERT ON trajectory WHEN NEW.id = 77 "
            "BEGIN SELECT RAISE(FAIL, 'the disk is full'); END"
        )
        other.commit()
        for i in range(100):
            log.record(trajectory(i))
        assert not log.failing and log.queued == 100
        assert not log.flush(timeout=0.2)
        assert ids(path) == []
        # regression: it accepted records until the queue was full, and told nobody
        assert log.failing and log.queued == 100
        assert not log.record(trajectory(100)) and not log.record_feedback(1, UserFeedback(1))
        assert log.dropped == 2
        assert any("the disk is full" in record.getMessage() for record in caplog.records)
        other.execute("DROP TRIGGER full")
        other.commit()
        assert log.flush(timeout=PATIENCE_S)
        assert log.duplicates == 0
        assert not log.failing and log.queued == 0
        assert log.record(trajectory(100))
    assert ids(path) == list(range(101))


def test_close_gives_up_on_a_locked_file_and_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.db"
    log = TrajectoryLog(path)
    with locked(path), caplog.at_level(logging.WARNING):
        log.record(trajectory(1))
        log.close(timeout=0.2)
    assert log.dropped == 1
    assert not log.record(trajectory(2))
    assert not log.record_feedback(1, UserFeedback(1))
    assert log.dropped == 3
    assert not log.flush(timeout=1)
    assert any("closed before" in record.getMessage() for record in caplog.records)
    log.close()
    assert log.dropped == 3


def test_first_vote_stands(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    with TrajectoryLog(path) as log:
        log.record(trajectory(1))
        log.record(trajectory(2, feedback=UserFeedback(2)))
        log.record_feedback(1, UserFeedback(5))
        log.record_feedback(1, UserFeedback(1))
        log.record_feedback(2, UserFeedback(4))
        log.flush()
        assert ratings(path) == {1: 5, 2: 2}
        log.record_feedback(1, UserFeedback(3))
        log.record_feedback(404, UserFeedback(3))
    assert ratings(path) == {1: 5, 2: 2}


def test_vote_before_its_trajectory(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    with TrajectoryLog(path) as log, TrajectoryLog(path, flush_interval=60) as late:
        late.record(trajectory(1))  # still in the other log's memory
        log.record_feedback(1, UserFeedback(5))
        log.record_feedback(2, UserFeedback(4))  # in one batch, but before its trajectory
        log.record(trajectory(2))
        log.flush()
        assert ratings(path) == {2: 4}
        late.flush()
        assert ratings(path) == {2: 4, 1: 5}


def test_processes_and_threads_at_once(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    # thread t of process p votes for the rows of process p + 1, mostly before or while these are written
    writers = [
        start(
            path,
            "def work(first, voted):\n"
            "    for i in range(500):\n"
            "        log.record(trajectory(first + i))\n"
            "        log.record_feedback(voted + i, UserFeedback(1 + (voted + i) % 5))\n"
            f"starts = [(2000 * {p} + 500 * t, 2000 * {(p + 1) % 4} + 500 * t) for t in range(4)]\n"
            "threads = [threading.Thread(target=work, args=pair) for pair in starts]\n"
            "[thread.start() for thread in threads]\n"
            "[thread.join() for thread in threads]\n"
            "log.close(timeout=20)\n"
            "print(log.dropped, log.duplicates)\n",
        )
        for p in range(4)
    ]
    assert [writer.communicate(timeout=PATIENCE_S)[0] for writer in writers] == ["0 0\n"] * 4
    assert sorted(ids(path)) == list(range(8000))
    assert ratings(path) == {i: 1 + i % 5 for i in range(8000)}
    embeddings = {int(i): vector[0] for i, vector in zip(ids(path), columns(path)["query_embedding"], strict=True)}
    assert embeddings == {i: i % 1000 for i in range(8000)}


def test_killed_writer_leaves_what_it_flushed(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    flushed = killed_writer(path)
    found = ids(path)
    assert len(found) >= flushed
    assert found == list(range(len(found)))
    with TrajectoryLog(path) as log:
        log.record(trajectory(2**40))
    assert ids(path) == [*found, 2**40]
    assert query(path, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("damage", ["garbage", "cut"])
def test_torn_write(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "log.db"
    flushed = killed_writer(path)
    wal = path.with_name("log.db-wal")
    size = wal.stat().st_size
    assert size > 8192
    with wal.open("r+b") as file:
        if damage == "garbage":
            file.seek(0, os.SEEK_END)
            file.write(np.random.default_rng(0).bytes(10_001))
        else:
            file.truncate(size - 1000)
    with TrajectoryLog(path) as log:
        log.record(trajectory(2**40))
    *found, last = ids(path)
    assert last == 2**40
    assert found == list(range(len(found)))
    # the kill loses at most one flush of 100 rows since the last confirmed one
    assert len(found) >= (flushed if damage == "garbage" else flushed - 100)
    assert query(path, "PRAGMA integrity_check") == [("ok",)]


def test_normal_exit_without_close_writes_all(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    code = f"log = TrajectoryLog({str(path)!r}, flush_interval=60)\nfor i in range(50): log.record(trajectory(i))\n"
    writer = start(path, code)
    writer.communicate(timeout=PATIENCE_S)
    assert writer.returncode == 0
    assert ids(path) == list(range(50))


def run_in_child(work: Any) -> int:
    """Runs `work` in a forked child, which reports only by its exit status."""
    child = os.fork()
    if child == 0:
        signal.alarm(int(PATIENCE_S))  # a deadlock in the child must not outlive the test
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_fork_while_the_parent_writes(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    log = TrajectoryLog(path, flush_interval=0.001)
    stop = threading.Event()
    recorded = []

    def keep_writing() -> None:
        while not stop.is_set():
            recorded.append(log.record(trajectory(len(recorded))))
            time.sleep(0.0001)

    def child_work(first: int) -> None:
        for i in range(first, first + 200):
            log.record(trajectory(i))
        if not log.flush(timeout=PATIENCE_S) or log.dropped or log.duplicates:
            raise RuntimeError
        log.close()

    thread = threading.Thread(target=keep_writing)
    thread.start()
    children = []
    for n in range(1, 9):
        children.append(run_in_child(lambda n=n: child_work(10**6 * n)))
        time.sleep(0.02)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    stop.set()
    thread.join()
    log.close()
    assert statuses == [0] * 8
    assert all(recorded)
    assert log.duplicates == 0
    expected = set(range(len(recorded))) | {10**6 * n + i for n in range(1, 9) for i in range(200)}
    assert sorted(ids(path)) == sorted(expected)
    assert query(path, "PRAGMA integrity_check") == [("ok",)]


def test_opening_waits_for_the_process_that_makes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN EXCLUSIVE")
        release = threading.Timer(1.3, other.execute, ["ROLLBACK"])  # longer than SQLite itself waits
        release.start()
        with TrajectoryLog(path) as log:
            log.record(trajectory(1))
        release.join()
    assert ids(path) == [1]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_processes_that_make_the_file_together(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.db" for n in range(20)]
    begin = time.time() + 0.3

    def open_all() -> None:
        time.sleep(max(0.0, begin - time.time()))
        for path in paths:
            with TrajectoryLog(path) as log:
                log.record(trajectory(os.getpid()))

    children = [run_in_child(open_all) for _ in range(6)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 6
    assert [sorted(ids(path)) for path in paths] == [sorted(children)] * 20


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_child_outlives_its_parents_log(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    log = TrajectoryLog(path, flush_interval=60)
    log.record(trajectory(1))
    log.flush()
    log.record(trajectory(2))  # queued at the fork: the parent writes it
    ready, go = os.pipe(), os.pipe()

    def child_work() -> None:
        log.record(trajectory(3))
        log.flush()
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        log.record(trajectory(4))
        if not log.flush(timeout=PATIENCE_S) or log.duplicates:
            raise RuntimeError
        os.kill(os.getpid(), signal.SIGKILL)

    child = run_in_child(child_work)
    assert os.read(ready[0], 1) == b"x"
    log.close()  # closing a file's last connection deletes its -wal: the child's connection must count
    os.write(go[1], b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert ids(path) == [1, 3, 2, 4]
    for end in (*ready, *go):
        os.close(end)


def test_deleted_file_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    with TrajectoryLog(path) as log:
        log.record(trajectory(1))
        log.flush()
        for file in tmp_path.iterdir():
            file.unlink()
        log.record(trajectory(2))
        log.flush()
        assert ids(path) == [2]


def test_a_renamed_file_keeps_what_was_flushed(tmp_path: Path) -> None:
    # regression: rows in the write-ahead log were lost: 300 flushed rows, and an empty file
    path = tmp_path / "log.db"
    with TrajectoryLog(path) as log:
        for turn in range(3):
            for i in range(300):
                log.record(trajectory(1000 * turn + i))
            log.flush()
            path.rename(tmp_path / f"log.{turn}.db")
            # before and after the log notices the rename
            assert ids(tmp_path / f"log.{turn}.db") == list(range(1000 * turn, 1000 * turn + 300))
        log.record(trajectory(9999))
    assert ids(path) == [9999]
    for turn in range(3):
        assert ids(tmp_path / f"log.{turn}.db") == list(range(1000 * turn, 1000 * turn + 300))
    assert {file.name for file in tmp_path.iterdir()} == {"log.db", "log.0.db", "log.1.db", "log.2.db"}


def test_rows_that_a_reader_held_back_are_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, moved = tmp_path / "log.db", tmp_path / "log.1.db"
    with TrajectoryLog(path) as log, closing(sqlite3.connect(path, isolation_level=None)) as reader:
        log.record(trajectory(1))
        log.flush()
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM trajectory").fetchone()
        log.record(trajectory(2))
        log.flush()
        path.rename(moved)
        log.record(trajectory(3))
        log.flush()
    assert ids(path) == [3] and "may hold rows of the log that was renamed" in caplog.text
    (aside,) = tmp_path.glob("log.db-wal-*")
    aside.rename(tmp_path / "log.1.db-wal")
    assert ids(moved) == [1, 2]


def test_a_log_behind_a_link(tmp_path: Path) -> None:
    # regression: the -wal was looked for next to the link, so that a reader missed rows, or found the file malformed
    # during writes
    path, link = tmp_path / "data" / "log.db", tmp_path / "log.db"
    path.parent.mkdir()
    link.symlink_to("data/log.db")
    with TrajectoryLog(link) as log, closing(sqlite3.connect(path, isolation_level=None)) as reader:
        log.record(trajectory(1))
        log.flush()
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM trajectory").fetchone()
        log.record(trajectory(2))
        log.flush()
        assert ids(link) == [1, 2]
        reader.execute("COMMIT")
        # the link is resolved again after the file was renamed
        path.rename(tmp_path / "data" / "log.1.db")
        log.record(trajectory(3))
    assert ids(link) == ids(path) == [3] and ids(tmp_path / "data" / "log.1.db") == [1, 2] and link.is_symlink()
    assert {file.name for file in path.parent.iterdir()} == {"log.db", "log.1.db"}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_processes_go_on_in_one_new_file_after_a_rename(tmp_path: Path) -> None:
    path, moved = tmp_path / "log.db", tmp_path / "log.1.db"

    def child_work(first: int) -> None:
        with TrajectoryLog(path, flush_interval=0.005) as log:
            for i in range(first, first + 1000):
                log.record(trajectory(i))
                time.sleep(0.0005)

    children = [run_in_child(lambda n=n: child_work(10**6 * n)) for n in range(4)]
    time.sleep(0.3)
    path.rename(moved)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    before, after = ids(moved), ids(path)
    assert before and after
    assert sorted(before + after) == [10**6 * n + i for n in range(4) for i in range(1000)]
    for file in (path, moved):
        assert query(file, "PRAGMA integrity_check") == [("ok",)]


OTHER = """
import sys
from test_trajectory_log import TrajectoryLog, trajectory
print("opens", flush=True)
with TrajectoryLog(sys.argv[1]) as log:
    for i in range(100, 400):
        log.record(trajectory(i))
    log.flush()
"""


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a file that is open cannot be renamed")
def test_a_file_renamed_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # regression: connections to the old file used the -wal of another process's new file: the database image was
    # malformed
    path, moved = tmp_path / "log.db", tmp_path / "log.1.db"
    with TrajectoryLog(path) as log:
        log.record(trajectory(0))
    others, is_empty = [], trajectory_file._is_empty

    def renamed(connection: sqlite3.Connection, file: Path) -> bool:
        if not moved.exists():
            path.rename(moved)
            command, places = [sys.executable, "-c", OTHER, str(path)], os.pathsep.join([str(ROOT), str(HERE)])
            others.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": places}))
            assert others[0].stdout is not None and others[0].stdout.readline() == b"opens\n"
            time.sleep(0.5)
        return is_empty(connection, file)

    monkeypatch.setattr(trajectory_file, "_is_empty", renamed)
    with TrajectoryLog(path) as log:
        for i in range(1, 50):
            log.record(trajectory(i))
            log.flush()
    assert others[0].wait(PATIENCE_S) == 0
    assert sorted(ids(moved) + ids(path)) == [*range(50), *range(100, 400)]
    for file in (path, moved):
        assert query(file, "PRAGMA integrity_check") == [("ok",)]


def test_reading_in_batches_and_after(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    with TrajectoryLog(path) as log:
        for i in range(25):
            log.record(trajectory(1000 - i))
        log.flush()
        reader = read_batches(path, rows=10)
        first = next(reader)
        log.record(trajectory(5))  # after the reader's start
        log.flush()
        rest = list(reader)
        assert [len(batch["id"]) for batch in [first, *rest]] == [10, 10, 5]
        assert [int(i) for batch in [first, *rest] for i in batch["id"]] == list(range(1000, 975, -1))
        (new,) = read_batches(path, after=int(rest[-1]["seq"][-1]))
        assert new["id"].tolist() == [5]
        assert list(read_batches(path, after=int(new["seq"][-1]))) == []
    with pytest.raises(ConfigError, match="rows"):
        next(read_batches(path, rows=0))


def test_empty_log_has_no_batches(tmp_path: Path) -> None:
    TrajectoryLog(tmp_path / "log.db").close()
    assert list(read_batches(tmp_path / "log.db")) == []
    assert [file.name for file in tmp_path.iterdir()] == ["log.db"]


def test_reader_does_not_hold_the_write_ahead_log(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    with TrajectoryLog(path) as log:
        for i in range(20):
            log.record(trajectory(i))
        log.flush()
        reader = read_batches(path, rows=10)
        next(reader)
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
        assert len(next(reader)["id"]) == 10


def test_reading_in_a_folder_that_one_cannot_write() -> None:
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which only its owner may enter
        path = Path(folder) / "log.db"
        with TrajectoryLog(path) as log:
            log.record(trajectory(1))
        Path(folder).chmod(0o555)

        def read() -> None:
            if os.geteuid() == 0:
                os.setuid(65534)
            if os.access(folder, os.W_OK) or ids(path) != [1]:
                raise RuntimeError

        try:
            child = run_in_child(read)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        finally:
            Path(folder).chmod(0o755)


def make_text(path: Path) -> None:
    path.write_text("id,precision\n1,0.5\n" * 100)


def make_foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE trajectory (id INTEGER)")
        connection.commit()


def make_newer(path: Path) -> None:
    TrajectoryLog(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 2")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (make_text, "not a database.*give the path"),
        (make_foreign, "not an rb_gpu trajectory log; give another"),
        (make_newer, "schema 2.*upgrade rb_gpu"),
        (Path.mkdir, "give the path"),
    ],
)
def test_wrong_file(tmp_path: Path, make: Any, says: str) -> None:
    path = tmp_path / "other.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    for use in (lambda: TrajectoryLog(path), lambda: next(read_batches(path))):
        with pytest.raises(DataError, match=says) as caught:
            use()
        assert str(path) in str(caught.value)
    assert (path.read_bytes() if path.is_file() else None) == before
    assert [file.name for file in tmp_path.iterdir()] == ["other.db"]


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.db"):
        next(read_batches(tmp_path / "absent.db"))
    assert not (tmp_path / "absent.db").exists()
    with pytest.raises(DataError, match="unable to open"):
        TrajectoryLog(tmp_path / "absent" / "log.db")
    (tmp_path / "empty.db").touch()
    with pytest.raises(DataError, match="is empty"):
        next(read_batches(tmp_path / "empty.db"))
