"""One worker thread per core over tiles of rows, each multiplying on one thread: tiles stay in the core's own cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch

from rb_gpu.learn.devices import own_threads, set_own_threads


class Workers:
    """As many threads as torch would use, the caller's included; torch products inside each use a single thread.

    `each` hands out tiles; what is written must not depend on which worker gets which tile.
    """

    def __init__(self) -> None:
        self.count = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None
        if self.count > 1:
            with own_threads():
                set_own_threads(1)

    def _started(self) -> ThreadPoolExecutor:
        """The other threads, started on first use: on a small table that would take longer than all the rest."""
        if self._pool is None:
            with own_threads():
                # torch's thread count is per thread: without this, a new thread would use one per core
                self._pool = ThreadPoolExecutor(
                    self.count - 1, "rb_gpu-kmeans", initializer=set_own_threads, initargs=(1,)
                )
                # all must have set their count before `own_threads` restores the value that new threads begin with
                started = threading.Barrier(self.count)
                try:
                    for _ in range(1, self.count):
                        self._pool.submit(started.wait)
                    started.wait()
                finally:
                    started.abort()
        return self._pool

    def each(self, n: int, step: int, work: Callable[[int, int, int], None]) -> None:
        """Runs work(worker, start, stop) over all slices of n rows; raises the first error after all have stopped."""
        if n <= step:
            if n > 0:
                work(0, 0, n)
            return
        starts, lock = iter(range(0, n, step)), threading.Lock()

        def run(worker: int) -> None:
            while True:
                with lock:
                    start = next(starts, None)
                if start is None:
                    return
                work(worker, start, min(start + step, n))

        futures = [self._started().submit(run, worker) for worker in range(1, self.count)]
        try:
            run(0)
        finally:
            wait(futures)
        for future in futures:
            future.result()

    def close(self) -> None:
        """Ends the threads and restores torch's thread count; must be called from the thread that created them."""
        if self._pool is not None:
            self._pool.shutdown()
        if self.count > 1:
            with own_threads():
                set_own_threads(self.count)


@contextmanager
def workers() -> Iterator[Workers]:
    """Workers, with torch's own products limited to one thread each until they are closed."""
    crew = Workers()
    try:
        yield crew
    finally:
        crew.close()
