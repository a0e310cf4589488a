"""Stresses the trajectory log with many writers that are killed: is every acknowledged record there exactly once, and
how long does record() block its caller?

    python tests/soak_log.py                                  4 processes x 4 threads x 50,000 records
    python tests/soak_log.py --records 2000 --kill-every 1    a short one

Every thread records as fast as it can, and votes for the records of the next process. After each CHUNK it flushes and
notes these records as acknowledged. A killed process resumes after them, and so sends again whatever was not
acknowledged. Exits with 1 if a record or a vote is missing, duplicated or wrong, or if the 99th percentile of record()
exceeds --p99-us (0: not checked).
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from rb_gpu.params import SearchParams
from rb_gpu.trajectory_file import read_batches
from rb_gpu.trajectory_log import TrajectoryLog
from rb_gpu.types import QueryTrajectory, UserFeedback

CHUNK, DIM = 500, 128
# dtype of the latencies of record(), in ns, that are appended to a file
NS = np.dtype("int64")


def rating_of(trajectory_id: int) -> int:
    """The vote, from 1 to 5, that is given to the record with this id."""
    return 1 + trajectory_id % 5


def work(log: TrajectoryLog, folder: Path, options: argparse.Namespace, process: int, thread: int) -> None:
    """Records one thread's share, starting at the first chunk that is not acknowledged."""
    first = (process * options.threads + thread) * options.records
    voted = ((process + 1) % options.processes * options.threads + thread) * options.records
    acknowledged = folder / f"acknowledged-{process}-{thread}"
    done = acknowledged.stat().st_size * CHUNK if acknowledged.exists() else 0
    embedding = np.linspace(-1, 1, DIM, dtype=np.float32)
    while done < options.records:
        taken = []
        for i in range(done, min(done + CHUNK, options.records)):
            one = QueryTrajectory(first + i, embedding, SearchParams(), 0.5, 0.25, 1000, 1_700_000_000)
            while True:
                start = time.perf_counter_ns()
                kept = log.record(one)
                taken.append(time.perf_counter_ns() - start)
                if kept:
                    break
                time.sleep(0.01)  # record() returned False because the queue is full: try again
            while not log.record_feedback(voted + i, UserFeedback(rating_of(voted + i))):
                time.sleep(0.01)
        if log.flush(60):
            for name, content in ((f"ns-{process}", np.array(taken, NS).tobytes()), (acknowledged.name, b".")):
                with (folder / name).open("ab", buffering=0) as file:
                    file.write(content)
            done += CHUNK


def worker(folder: Path, options: argparse.Namespace, process: int) -> None:
    """Runs one process: all of its threads write to the same log."""
    log = TrajectoryLog(folder / "log.sqlite", dim=DIM)
    threads = [
        threading.Thread(target=work, args=(log, folder, options, process, thread)) for thread in range(options.threads)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close(60)


def chunks(folder: Path, process: int) -> int:
    """Number of acknowledged chunks of a process."""
    return sum(path.stat().st_size for path in folder.glob(f"acknowledged-{process}-*"))


def drive(folder: Path, options: argparse.Namespace) -> int:
    """Starts the processes, and every now and then kills one and restarts it. Returns the number of kills."""
    command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder), "--worker"]
    running = {process: subprocess.Popen([*command, str(process)]) for process in range(options.processes)}
    before = dict.fromkeys(running, 0)
    rng, kills, next_kill = random.Random(0), 0, time.monotonic() + options.kill_every
    while running:
        time.sleep(0.02)
        for process, one in list(running.items()):
            if one.poll() is not None:
                if one.returncode == 0:
                    del running[process]
                elif one.returncode == -signal.SIGKILL:
                    before[process] = chunks(folder, process)
                    running[process] = subprocess.Popen([*command, str(process)])
                else:
                    raise RuntimeError(f"process {process} ended with {one.returncode}")
        # kill only processes that made progress since their start; otherwise a slow machine would never finish
        at_work = [process for process in sorted(running) if chunks(folder, process) > before[process]]
        if at_work and time.monotonic() > next_kill:
            running[rng.choice(at_work)].kill()
            kills, next_kill = kills + 1, time.monotonic() + options.kill_every * rng.uniform(0.5, 1.5)
    return kills


def main() -> int:
    """Runs the soak and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--records", type=int, default=50_000, help="of each thread, a multiple of 500")
    parser.add_argument("--kill-every", type=float, default=5.0, help="seconds")
    parser.add_argument("--p99-us", type=float, default=50.0)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.folder, options, options.worker)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.monotonic()
        kills = drive(folder, options)
        seconds = time.monotonic() - started
        asked = options.processes * options.threads * options.records
        logged: Counter[int] = Counter()
        unrated = 0
        for batch in read_batches(folder / "log.sqlite"):
            logged.update(batch["id"].tolist())
            unrated += sum(
                rating != rating_of(one) for one, rating in zip(batch["id"].tolist(), batch["rating"], strict=True)
            )
        taken_us = np.concatenate([np.fromfile(path, NS) for path in folder.glob("ns-*")]) / 1000
    wrong = sum(logged[one] != 1 for one in range(asked)) + len(logged) - asked
    p50, p99, p999 = np.percentile(taken_us, [50, 99, 99.9])
    print(
        f"{asked:,} records and as many votes of {options.processes} processes x {options.threads} threads in "
        f"{seconds:.0f} s on {os.cpu_count()} cores, {kills} kills: {wrong} records not there once, {unrated} without "
        f"their vote\nrecord(): p50 {p50:.1f} us, p99 {p99:.1f} us, p99.9 {p999:.0f} us, of {len(taken_us):,}"
    )
    return int(wrong or unrated or bool(options.p99_us and p99 > options.p99_us))


if __name__ == "__main__":
    sys.exit(main())
