"""Chunks on their way to a GPU: the order of copies and computations, on streams that run them as late as possible."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import torch

from rb_gpu.learn import assign_device, distances, streaming, sums
from rb_gpu.learn import shard as shard_module
from rb_gpu.learn.assign_device import DeviceAssignment
from rb_gpu.learn.distributed import Ranks
from rb_gpu.learn.lloyd import Solver
from rb_gpu.learn.shard import Shard, peaks
from rb_gpu.learn.streaming import chunks

GPU, DIM, ROWS = torch.device("cuda"), 3, 7
BUDGET = 2 * ROWS * 4 * DIM


class Simulated:
    """Two streams whose operations run in a random order, restricted only by the waits that were requested.

    log: requests, in order; ran: copies and computations, in the order in which they ran. fault: the name of a method
    and the number of its call that does nothing.
    """

    def __init__(self, seed: int = 0, fault: tuple[str, int] = ("", 0), eager: str = "") -> None:
        self.rng, self.fault, self.eager = np.random.default_rng(seed), fault, eager
        self.queues: dict[str, deque] = {"copies": deque(), "computations": deque()}
        self.come: set[int] = set()
        self.log: list[str] = []
        self.ran: list[str] = []
        self.memory = torch.full((2, ROWS, DIM), torch.nan)
        self.given = self.events = self.begun = self.computing = 0

    def pinned(self, rows: int, dim: int) -> torch.Tensor:
        return torch.full((rows, dim), torch.nan)

    def buffer(self, rows: int, dim: int) -> torch.Tensor:
        self.given += 1
        return self.memory[self.given - 1, :rows] if dim == DIM else torch.full((rows, dim), torch.nan)

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        self.log.append(f"copy {self.begun}")
        self.queues["copies"].append((f"copy {self.begun}", lambda: into.copy_(source)))
        self.begun += 1

    def compute(self, work) -> None:
        self.log.append(f"compute {self.computing}")
        self.queues["computations"].append((f"compute {self.computing}", work))
        self.computing += 1

    def copied(self) -> int:
        return self._event("copies")

    def computed(self) -> int:
        return self._event("computations")

    def _event(self, queue: str) -> int:
        event, self.events = self.events, self.events + 1
        self.queues[queue].append(("", lambda: self.come.add(event)))
        return event

    def _told(self, method: str, event: int) -> bool:
        self.log.append(method)
        return self.fault != (method, self.log.count(method) - 1)

    def copies_wait(self, event: int) -> None:
        if self._told("copies_wait", event):
            self.queues["copies"].append((event, None))

    def computations_wait(self, event: int) -> None:
        if self._told("computations_wait", event):
            self.queues["computations"].append((event, None))

    def host_waits(self, event: int) -> None:
        if self._told("host_waits", event):
            while event not in self.come:
                self.step()

    def step(self) -> bool:
        """Runs one operation that is ready; returns whether there was one."""
        ready = [q for q in self.queues.values() if q and (q[0][1] is not None or q[0][0] in self.come)]
        if not ready:
            return False
        liked = self.queues.get(self.eager)
        queue = liked if liked in ready else ready[self.rng.integers(len(ready))]
        name, work = queue.popleft()
        if work is not None:
            work()
            self.ran += [name] if name else []
        return True

    def finish(self) -> None:
        while self.step():
            pass
        assert not any(self.queues.values())


def through(streams: Simulated, x: torch.Tensor, rows: torch.Tensor | None = None, most: int = 99) -> torch.Tensor:
    """What the computations of the first `most` chunks read. Other tensors use the buffers' memory before and
    afterwards.
    """
    read: list[torch.Tensor] = []
    before, after = [], []
    streams.memory.fill_(-1)
    streams.compute(lambda: before.append(streams.memory.clone()))
    feed = chunks(x, 1, GPU, rows, BUDGET, lambda _: streams)
    for number, (_, x_TD) in enumerate(feed):
        streams.compute(lambda x_TD=x_TD: read.append(x_TD.clone()))
        if number + 1 == most:
            break
        for _ in range(streams.rng.integers(3)):
            streams.step()
    feed.close()
    streams.compute(lambda: streams.memory.fill_(-2))
    streams.compute(lambda: after.append(streams.memory.clone()))
    streams.finish()
    assert (before[0] == -1).all(), "a copy came under a computation that began before it"
    assert (after[0] == -2).all(), "a copy came into memory that was given back"
    return torch.cat(read)


X = torch.arange(5 * ROWS * DIM - 2 * DIM, dtype=torch.float32).reshape(-1, DIM)


def test_the_copy_of_the_next_chunk_is_begun_before_a_chunk_is_used():
    streams = Simulated()
    assert torch.equal(through(streams, X[: 3 * ROWS]), X[: 3 * ROWS])
    assert streams.log == [
        "compute 0", "copies_wait", "copy 0", "copy 1", "computations_wait", "compute 1",
        "copies_wait", "host_waits", "copy 2", "computations_wait", "compute 2",
        "computations_wait", "compute 3", "computations_wait", "compute 4", "compute 5",
    ]  # fmt: skip


def test_it_runs_under_the_computations_of_a_slow_device():
    streams = Simulated(eager="copies")
    through(streams, X)
    for chunk in range(4):
        assert streams.ran.index(f"copy {chunk + 1}") < streams.ran.index(f"compute {chunk + 1}")


@pytest.mark.parametrize("most", [1, 2, 99])
def test_every_order_that_the_waits_allow_reads_the_points(most):
    for seed in range(40):
        assert torch.equal(through(Simulated(seed), X, most=most), X[: most * ROWS])
        rows = torch.from_numpy(np.random.default_rng(seed).permutation(len(X))[:17])
        assert torch.equal(through(Simulated(seed), X, rows, most), X[rows][: most * ROWS])


# every wait there is, of those in the loop an early and a late one; the last matters for a feed that ends early
@pytest.mark.parametrize(
    ("method", "call", "most"),
    [("copies_wait", 0, 99), ("copies_wait", 1, 99), ("copies_wait", 3, 99), ("computations_wait", 0, 99),
     ("computations_wait", 4, 99), ("computations_wait", 2, 2), ("host_waits", 0, 99), ("host_waits", 2, 99)],
)  # fmt: skip
def test_a_wait_that_is_left_out_is_found(method, call, most):
    def right(seed: int) -> bool:
        try:
            return torch.equal(through(Simulated(seed, (method, call)), X, most=most), X[: most * ROWS])
        except AssertionError:
            return False

    assert not all(right(seed) for seed in range(40))


def test_chunks_keep_to_the_budget_and_to_the_tile(monkeypatch):
    def sizes(**given) -> list[int]:
        shapes: list[tuple[int, int]] = []
        streams = Simulated()
        streams.buffer = lambda *shape: shapes.append(shape) or torch.empty(shape)  # type: ignore[method-assign]
        spans = [tile for tile, _ in chunks(X, given.pop("width", 1), GPU, streams=lambda _: streams, **given)]
        assert [i for span in spans for i in range(span.start, span.stop)] == list(range(len(X)))
        assert len({rows for rows, _ in shapes}) == 1 and len(shapes) <= 2
        return [shape[0] for shape in shapes]

    assert sizes() == [len(X)]
    assert sizes(budget=BUDGET) == [ROWS, ROWS]
    assert sizes(budget=BUDGET - 1) == [ROWS - 1] * 2
    assert sizes(budget=1) == [1, 1]
    monkeypatch.setattr(streaming, "tile_rows", lambda width, _: 100 // width)
    assert sizes(width=10) == [10, 10]
    assert list(chunks(X[:0], 1, GPU, streams=lambda _: Simulated())) == []


class AtOnce(Simulated):
    """Computations run when they are called; copies still run as late as possible."""

    def computations_wait(self, event: int) -> None:
        self.host_waits(event)


def test_a_mapped_file_beyond_the_budget_clusters_to_the_same_bits(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(9, 8))[rng.integers(9, size=700)] + 0.4 * rng.normal(size=(700, 8))).astype(np.float32)
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=x.shape)
    mapped[:] = x

    def clustered(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shard = Shard(points, torch.ones(len(points)), Ranks())
        assignment = DeviceAssignment(points, points.median(0).values)
        generator = torch.Generator().manual_seed(1)
        peak_N = peaks(points, None, points.device)[0]
        run = Solver(assignment, shard, peak_N, None, 20, 0.0, False, generator).best(12, None, 2)
        return run.centroids_KD, assignment.labels_N

    expected = clustered(torch.from_numpy(x))
    begun = 0

    def from_the_host(x_ND, width, device, rows_M=None, budget=None):
        nonlocal begun
        streams = AtOnce()
        yield from chunks(x_ND, width, GPU, rows_M, 5 * 2**10, lambda _: streams)
        begun += streams.begun

    for module in (assign_device, distances, shard_module, sums):
        monkeypatch.setattr(module, "chunks", from_the_host)
    found = clustered(torch.from_numpy(np.asarray(mapped)))
    assert begun > 100
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.cuda
def test_a_gpu_sums_what_the_host_holds():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x = torch.rand(100_000, 64)
    total = torch.zeros(64, dtype=torch.float64, device="cuda")
    for _, x_TD in chunks(x, 64, GPU, budget=2**21):
        total += x_TD.double().sum(0)
    assert torch.allclose(total.cpu(), x.double().sum(0), rtol=1e-12)
