"""One worker per core over tiles of rows, each with products of one thread: tiles then stay in a core's own cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch


class Workers:
    """As many threads as torch would use, the caller's among them. `each` gives them tiles; what they write must not
    depend on which does.
    """

    def __init__(self) -> None:
        self.count = torch.get_num_threads()
        # a thread's own setting too: what has not called torch's loops would start as many threads as there are cores
        self._pool = ThreadPoolExecutor(
            max(1, self.count - 1), "rb_gpu-kmeans", initializer=torch.set_num_threads, initargs=(1,)
        )

    def each(self, n: int, step: int, work: Callable[[int, int, int], None]) -> None:
        """work(worker, start, stop) over all slices of n rows; the first error is raised when all have stopped."""
        starts, lock = iter(range(0, n, step)), threading.Lock()

        def run(worker: int) -> None:
            while True:
                with lock:
                    start = next(starts, None)
                if start is None:
                    return
                work(worker, start, min(start + step, n))

        if n <= step:
            run(0)
            return
        futures = [self._pool.submit(run, worker) for worker in range(1, self.count)]
        try:
            run(0)
        finally:
            wait(futures)
        for future in futures:
            future.result()

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()


@contextmanager
def workers() -> Iterator[Workers]:
    """Workers, while torch's own products use one thread each; its setting comes back afterwards."""
    crew = Workers()
    torch.set_num_threads(1)
    try:
        yield crew
    finally:
        torch.set_num_threads(crew.count)
        crew.close()
