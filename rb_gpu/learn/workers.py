"""One worker per core over tiles of rows, each with products of one thread: tiles then stay in a core's own cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch

from rb_gpu.learn.devices import own_threads, set_own_threads


class Workers:
    """As many threads as torch would use, the caller's among them, whose products of torch take one thread each.

    `each` gives them tiles; what they write must not depend on which does.
    """

    def __init__(self) -> None:
        with own_threads():
            self.count = torch.get_num_threads()
            set_own_threads(1)
            # a thread's own setting too: what has not called torch's loops would start as many as there are cores
            self._pool = ThreadPoolExecutor(
                max(1, self.count - 1), "rb_gpu-kmeans", initializer=set_own_threads, initargs=(1,)
            )
            # all must have set it before `own_threads` puts back what others begin with
            started = threading.Barrier(self.count)
            try:
                for _ in range(1, self.count):
                    self._pool.submit(started.wait)
                started.wait()
            finally:
                started.abort()

    def each(self, n: int, step: int, work: Callable[[int, int, int], None]) -> None:
        """work(worker, start, stop) over all slices of n rows; the first error is raised when all have stopped."""
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

        futures = [self._pool.submit(run, worker) for worker in range(1, self.count)]
        try:
            run(0)
        finally:
            wait(futures)
        for future in futures:
            future.result()

    def close(self) -> None:
        """Ends the threads and gives torch its own number of them back, which the thread that made these must do."""
        self._pool.shutdown()
        with own_threads():
            set_own_threads(self.count)


@contextmanager
def workers() -> Iterator[Workers]:
    """Workers, while torch's own products use one thread each; its setting comes back afterwards."""
    crew = Workers()
    try:
        yield crew
    finally:
        crew.close()
