"""The suite gpu: measures everything of interest on a GPU with one command, within a time budget.

It compares labels with the CPU's, times an iteration of every engine and peer against the roofline, and times whole
clusterings and jobs at growing sizes.

Suffixes: N points, K clusters, D dims.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rb_gpu.bench.device_facts import agreement, array_functions, facts, measured_card, planted, timed
from rb_gpu.bench.gpu_peers import ENGINES, PEERS, ours
from rb_gpu.bench.roofline import CARDS, Card, iteration, seconds, seeding, streamed_seconds, streamed_seeding_seconds
from rb_gpu.learn.assign_device import DeviceAssignment
from rb_gpu.learn.config import ClusterConfig, DataConfig, DeviceConfig, IndexConfig, ParamsConfig, TrainConfig
from rb_gpu.learn.devices import (
    BYTES_OF_A_POINT,
    WORK_BYTES,
    free_memory,
    full_precision,
    resolve_device,
    resolve_engine,
)
from rb_gpu.learn.job_config import SynthesizeConfig
from rb_gpu.learn.kmeans import kmeans
from rb_gpu.learn.pipeline import learn
from rb_gpu.learn.progress import channel
from rb_gpu.learn.streaming import BUFFERS, CHUNK_BYTES
from rb_gpu.learn.synthesize import synthesize
from rb_gpu.learn.trajectories import load

log = logging.getLogger(__name__)

# from this many points on, they are streamed from the host on every card, so that results compare across cards
STREAMED_ROWS = 50_000_000
CARD_SHARE, HOST_SHARE = 0.9, 0.5
# bytes of streamed points that are on the card at a time
STREAM_BUDGET = BUFFERS * CHUNK_BYTES
# bytes of points that are generated per second, at least; predicts the time of planting
DRAWN_BYTES_S = 1e9
# untimed iterations before the timed ones, which pay for filling caches and for kernel tuning
BEFORE = 2
# points of the untimed clustering before a timed one: enough for the block shapes that are used for many points
TUNED_ROWS = 2**18
# maximum Lloyd updates of a clustering
UPDATES = 20
# expected time of a call as a multiple of the roofline, by whether points are streamed (the bus is then the roofline,
# which host memory nearly keeps up with), and of a job per row, until one has been measured
SLACK, JOB_S_PER_ROW = {False: 8.0, True: 4.0}, 1e-4
LEFT_OUT = "left out: no time"
STOPPED = "stopped: no time"
OURS = "ours"
# maximum length of a failure note, in characters
MOST_SAID = 100
# a call is started only if its expected time is at most this share of the remaining budget
SHARE = 0.5


@dataclass
class Clock:
    """The suite's time budget in seconds, and when it started (time.perf_counter)."""

    budget_s: float
    started: float

    @property
    def left(self) -> float:
        """Seconds that remain."""
        return self.budget_s - (time.perf_counter() - self.started)

    def allows(self, expected_s: float) -> bool:
        """Whether a call with this expected time may still be started."""
        return expected_s <= SHARE * self.left


class OutOfTimeError(Exception):
    """Raised inside a measurement once the suite's time budget is spent."""


class Deadline(logging.Handler):
    """Ends what runs inside `watched` at its next step of progress after the budget is spent: how long a clustering
    takes can only be predicted roughly, since it depends on the number of repairs.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def emit(self, _record: logging.LogRecord) -> None:
        """Raises OutOfTimeError if no time is left."""
        if self.clock.left <= 0:
            raise OutOfTimeError

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Checks the time at every step of progress inside the block."""
        level = channel.level
        channel.setLevel(logging.INFO)
        channel.addHandler(self)
        try:
            yield
        finally:
            channel.removeHandler(self)
            channel.setLevel(level)


def sizes(rows: list[int], dim: int, card_bytes: int, host_bytes: int) -> list[tuple[int, bool]]:
    """The cases as (number of points, whether they are streamed from the host).

    Points are streamed if there are STREAMED_ROWS or more, or if they do not fit on the card; then their number is
    limited by the host's memory, and by the per-point state that stays on the card.
    """
    out = []
    for n in sorted(rows):
        need = (4 * dim + BYTES_OF_A_POINT) * n + WORK_BYTES
        streamed = n >= STREAMED_ROWS or need > CARD_SHARE * card_bytes
        # labels and bounds of all points are on the card even if the points are streamed
        most = int(min(HOST_SHARE * host_bytes / (4 * dim), max(0, card_bytes - WORK_BYTES) / BYTES_OF_A_POINT))
        out.append((min(n, most) if streamed else n, streamed))
    return [case for case in dict.fromkeys(out) if case[0] >= 1]


@contextmanager
def told(row: dict[str, Any]) -> Iterator[None]:
    """Turns an exception inside the block into the row's note, so that one failure does not end the suite; and logs the
    row, because a fault inside a peer's library can end the process before the results are written.
    """
    try:
        yield
    except ImportError as error:
        row["note"] = f"{error.name} is not installed"
    except torch.cuda.OutOfMemoryError:
        row["note"] = "out of the card's memory"
    except OutOfTimeError:
        row["note"] = STOPPED
    except Exception as error:
        log.warning("%s", row, exc_info=True)
        said = [*str(error).splitlines(), ""][0]
        row |= {"note": f"failed: {type(error).__name__}: {said}"[:MOST_SAID], "failed": True}
    log.info("%s", row)


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Runs the suite on the GPU. Raises ConfigError if there is none."""
    return run(settings, resolve_device("cuda"))


def run(settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Runs the suite on any device."""
    # some container images, such as NVIDIA's, enable tf32 by default; float32 rates and labels would then be tf32's
    with full_precision():
        return _run(settings, device)


def _run(settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    clock, dim = Clock(settings["gpu_budget_s"], time.perf_counter()), settings["gpu_dim"]
    known = facts(device)
    card = measured_card(device, known["memory_bytes"])
    can_triton = resolve_engine("auto", device) == "triton"
    engines = [one for one in ENGINES if can_triton or one[0] == "torch"]
    nothing = {"points": 0, "differ": 0, "worst_over_bound": math.inf}
    labels: list[dict[str, Any]] = []
    for engine, precision, _ in engines:
        labels.append({"engine": engine, "precision": precision, **nothing})
        with told(labels[-1]):
            labels[-1] |= agreement(device, engine, precision, settings["seed"])
    bench = Bench(settings, device, card, clock, engines)
    with Deadline(clock).watched():
        for n, streamed in sizes(settings["gpu_rows"], dim, known["memory_bytes"], free_memory()):
            # what no row accounts for: points that do not fit, or a card that has failed for good
            case: dict[str, Any] = {
                "n": n,
                "dim": dim,
                "k": min(settings["gpu_clusters"], default=0),
                "streamed": streamed,
            }
            with told(case):
                bench.case(n, streamed)
            if "note" in case:
                bench.clusterings.append(case)
    arrays: list[dict[str, Any]] = [{}]
    with told(arrays[0]):
        arrays = array_functions(device)
    rows = [row for row in bench.iterations if row["contestant"].startswith(OURS)] + bench.clusterings + bench.jobs
    return {
        "suite": "gpu", "settings": settings, "machine": known, "card": asdict(card),
        "sheet": next((asdict(one) for one in CARDS if one.name.split()[0] in known["card"].split()), None),
        "labels": labels, "arrays": arrays, "iterations": bench.iterations,
        "clusterings": bench.clusterings, "jobs": bench.jobs,
        # failures of rb_gpu only; a peer's failure does not fail the suite
        "failed": [row["note"] for row in rows if row.get("failed")],
        "seconds": settings["gpu_budget_s"] - clock.left,
    }  # fmt: skip


class Bench:
    """The results so far. slack: measured time over the roofline, by contestant and by whether points were streamed; it
    predicts the next call's time.
    """

    def __init__(
        self, settings: dict[str, Any], device: torch.device, card: Card, clock: Clock,
        engines: list[tuple[str, str, str]],
    ) -> None:  # fmt: skip
        self.settings, self.device, self.card, self.clock, self.engines = settings, device, card, clock, engines
        self.iterations: list[dict[str, Any]] = []
        self.clusterings: list[dict[str, Any]] = []
        self.jobs: list[dict[str, Any]] = []
        self.slack: dict[tuple[str, bool], float] = {}
        self.job_s_per_row = JOB_S_PER_ROW

    def case(self, n: int, streamed: bool) -> None:
        """Measures iterations and clusterings of n points at every number of clusters, and one whole job."""
        dim, seed = self.settings["gpu_dim"], self.settings["seed"]
        ks = [k for k in self.settings["gpu_clusters"] if k <= n]
        if not self.clock.allows(4 * n * dim / DRAWN_BYTES_S):
            self.clusterings += [{"n": n, "dim": dim, "k": k, "streamed": streamed, "note": LEFT_OUT} for k in ks]
            return
        where = torch.device("cpu") if streamed else self.device
        x_ND = planted(n, dim, seed, self.device, where)
        for k in ks:
            log.info("%d points, %d clusters: %.0f s left", n, k, self.clock.left)
            start_KD = x_ND[:: max(1, n // k)][:k].to(self.device)
            budget = STREAM_BUDGET if streamed else None
            # the bus limits streamed points, whatever the engine: measure only the default engine, to save time
            for engine, precision, product in self.engines[1:2] or self.engines if streamed else self.engines:
                name = f"{OURS}, {engine} {precision}" if engine == "triton" else f"{OURS}, {engine}"
                self._iteration(name, product, ours(engine, precision, budget), x_ND, start_KD, streamed)
            for name, fit in {} if streamed else PEERS.items():
                self._iteration(name, "tf32", fit, x_ND, start_KD, streamed)
            self._clustering(x_ND, k, streamed, budget)
        del x_ND
        self._job(n)

    def _iteration(
        self, name: str, product: str, fit: Callable[[Tensor, Tensor, int], Tensor], x_ND: Tensor, start_KD: Tensor,
        streamed: bool,
    ) -> None:  # fmt: skip
        (n, dim), k, more = x_ND.shape, len(start_KD), self.settings["iterations"]
        row: dict[str, Any] = {"n": n, "dim": dim, "k": k, "streamed": streamed, "contestant": name}
        self.iterations.append(row)
        parts = iteration(n, dim, k, product, "fused")
        least = streamed_seconds(n, dim, self.card, parts) if streamed else seconds(parts, self.card)
        if not self.clock.allows(self.slack.get((name, streamed), SLACK[streamed]) * least * (3 * BEFORE + more)):
            row["note"] = LEFT_OUT
            return
        with told(row):
            if self.device.type == "cuda":
                # return the memory that torch caches, which peers could not use otherwise
                torch.cuda.empty_cache()
            fit(x_ND, start_KD, BEFORE)
            before = timed(self.device, partial(fit, x_ND, start_KD, BEFORE))
            centroids: list[Tensor] = []
            whole = timed(self.device, lambda: centroids.append(fit(x_ND, start_KD, BEFORE + more)))
            took = (whole - before) / more
            if took <= 0:
                row["note"] = "too short to be timed"
                return
            self.slack[name, streamed] = took / least
            rate = 2.0 * n * dim * k / took / 1e12
            row |= {
                "inertia": self._inertia(x_ND, centroids[0]), "ms": 1e3 * took, "tflops": rate, "product": product,
                "of_product": rate / self.card.tflops(product), "of_roofline": least / took,
            }  # fmt: skip

    def _inertia(self, x_ND: Tensor, centroids_KD: Tensor) -> float:
        assignment = DeviceAssignment(x_ND, centroids_KD.mean(0))
        assignment.assign(centroids_KD.float().contiguous())
        return float(assignment.d2_N.sum(dtype=torch.float64))

    def _clustering(self, x_ND: Tensor, k: int, streamed: bool, budget: int | None) -> None:
        """Times a whole clustering: k-means++ and at most UPDATES Lloyd updates, with the device's default engine."""
        (n, dim), seed = x_ND.shape, self.settings["seed"]
        row: dict[str, Any] = {"n": n, "dim": dim, "k": k, "streamed": streamed}
        self.clusterings.append(row)
        product = "tf32" if len(self.engines) > 1 else "fp32"
        one = iteration(n, dim, k, product, "fused")
        seeds = seeding(n, dim, k, product)
        if streamed:
            least = streamed_seeding_seconds(n, dim, k, self.card, seeds)
            least += UPDATES * streamed_seconds(n, dim, self.card, one)
        else:
            least = seconds(seeds, self.card) + UPDATES * seconds(one, self.card)
        if not self.clock.allows(self.slack.get(("clustering", streamed), SLACK[streamed]) * least):
            row["note"] = LEFT_OUT
            return
        found: list[Any] = []
        with told(row):
            # choose the kernels' block shapes for every number of seeds, which is done once per machine
            kmeans(x_ND[:TUNED_ROWS], k, max_iter=1, seed=seed, device=self.device.type, memory_budget=budget)
            took = timed(self.device, lambda: found.append(kmeans(
                x_ND, k, max_iter=UPDATES, seed=seed, device=self.device.type, memory_budget=budget)))  # fmt: skip
            self.slack["clustering", streamed] = took / least
            row |= {"seconds": took, "updates": found[0].n_iter, "inertia": found[0].inertia,
                    "of_roofline": least / took}  # fmt: skip

    def _job(self, n: int) -> None:
        """Times a job on n planted trajectories: loading and learning, without writing an artifact."""
        row: dict[str, Any] = {"n": n, "dim": self.settings["gpu_dim"]}
        self.jobs.append(row)
        if not self.clock.allows(self.job_s_per_row * n):
            row["note"] = LEFT_OUT
            return
        with told(row), tempfile.TemporaryDirectory(prefix="rb_gpu-benchmark-") as folder:
            started = time.perf_counter()
            patterns = min(64, max(2, n // 100))
            synthesize(SynthesizeConfig(out=f"{folder}/made", n=n, dim=row["dim"], patterns=patterns,
                                        seed=self.settings["seed"]))  # fmt: skip
            made = time.perf_counter()
            table = load(DataConfig(path=f"{folder}/made/trajectories.parquet"), ParamsConfig())
            loaded = time.perf_counter()
            config = replace(TrainConfig(), device=DeviceConfig(self.device.type), index=IndexConfig("flat"),
                             cluster=ClusterConfig(max_iter=UPDATES), seed=self.settings["seed"])  # fmt: skip
            learned = learn(table, config)
            ended = time.perf_counter()
            self.job_s_per_row = (ended - started) / n
            row |= {"load_s": loaded - made, "stages_s": learned.seconds, "seconds": ended - made,
                    "patterns": learned.data.leaves}  # fmt: skip
