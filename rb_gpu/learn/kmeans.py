"""Exact k-means: k-means++ seeding by blocks, Lloyd's iterations, re-seeding of empty clusters, repair, restarts.

Suffixes: N points here, K clusters, D dims.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rb_gpu.learn.assign import Assignment
from rb_gpu.learn.assign_device import DeviceAssignment
from rb_gpu.learn.devices import free_memory, resolve_device
from rb_gpu.learn.distances import approach, normalise_
from rb_gpu.learn.distributed import Ranks
from rb_gpu.learn.repair import exchange
from rb_gpu.learn.seeding import seed_plus_plus
from rb_gpu.learn.shard import Shard, peaks
from rb_gpu.learn.sums import ClusterSums, exact_total
from rb_gpu.learn.workers import Workers, workers

log = logging.getLogger(__name__)

Array = npt.NDArray[Any] | Tensor
MAX_REPAIRS = 20
MIDDLE_ROWS = 4096
# share of the free memory that codes of the points take where nothing else is said
CODE_SHARE = 0.25
# the update after which the way to assign is chosen anew: centroids are means by then
CHOOSE_AGAIN = 2


@dataclass(frozen=True)
class KMeansResult:
    """centroids (K, D) float32 and labels (N,) int64, as the input came (NumPy or torch); inertia is Σ w·||x − c||².

    n_iter counts Lloyd's updates. Labels are the exact assignment to these centroids. K may be less than asked for:
    never more than the distinct points. computed_share: of all distances, those computed in full (1 on a GPU).
    """

    centroids: Any
    labels: Any
    inertia: float
    n_iter: int
    computed_share: float = 1.0


@dataclass(frozen=True)
class Run:
    """Centroids (K, D) float32 on the device, their inertia, and the updates that led to them."""

    centroids_KD: Tensor
    inertia: float
    n_iter: int


def kmeans(
    x: Array,
    k: int,
    init: str | Array = "k-means++",
    max_iter: int = 100,
    epsilon: float = 1e-4,
    n_init: int = 1,
    metric: str = "l2",
    seed: int = 0,
    device: str = "auto",
    weight: Array | None = None,
    memory_budget: int | None = None,
    code_budget: int | None = None,
    ranks: Ranks | None = None,
) -> KMeansResult:
    """Clusters the rows of x (N, D), NumPy or torch, into min(k, distinct rows) clusters.

    init: "k-means++" (Arthur & Vassilvitskii 2007, true D² sampling, then a repair of doubled centroids) or a (K, D)
    array to start from (then n_init is 1 and nothing is repaired). epsilon: stop where the centroids' shifts, as a root
    mean square over the points, are at most this, in units of the data's median distance to its middle. metric: "l2",
    or "cosine": rows are normalised and centroids kept on the unit sphere. weight: (N,) >= 0. memory_budget: bytes of x
    that may lie on a GPU; larger data stay on the host and travel in tiles. code_budget: bytes that codes of the points
    may take on the host (None: a quarter of what is free; 0: none). ranks: the processes that hold the other rows;
    labels are then of the rows here. x is only read, and never copied if it is float32 and, for cosine, of norm 1.

    The same seed gives the same bits on one kind of device, whatever the budgets, threads and ranks. Raises ValueError
    on a bad argument, ConfigError where the device is missing.
    """
    where, ranks = resolve_device(device), ranks or Ranks()
    points = _checked(x, k, max_iter, n_init, epsilon, metric)
    weights = _checked_weight(weight, len(points)).to(where)
    with ExitStack() as stack:
        crew = stack.enter_context(workers()) if where.type == "cpu" else None
        if crew is None and (memory_budget is None or points.numel() * 4 <= memory_budget):
            points = points.to(where)
        peak_N, norm_N = peaks(points, crew, where)
        if not bool(torch.isfinite(norm_N).all()):
            far = "its squares overflow float32; scale x down" if bool(torch.isfinite(peak_N).all()) else ""
            raise ValueError(f"x {far or 'holds NaN or infinity; drop those rows first'}")
        if metric == "cosine":
            if not bool((norm_N > 0).all()):
                raise ValueError(
                    f"x has {int((norm_N == 0).sum())} rows of norm 0; cosine needs a direction, drop them"
                )
            if float((norm_N - 1).abs().max()) > 1e-6:
                points, peak_N = normalise_(points.clone()), peak_N / norm_N
        shard = Shard(points, weights, ranks)
        middle_D, typical = _middle(shard)
        budget = int(CODE_SHARE * free_memory()) if code_budget is None else code_budget
        assignment: Assignment | DeviceAssignment = (
            DeviceAssignment(points, middle_D) if crew is None else Assignment(points, middle_D, crew, budget)
        )
        if not isinstance(init, str):
            start: Tensor | None = _checked_init(init, points, metric, where)
        elif init == "k-means++":
            start = None
        else:
            raise ValueError(f'init={init!r} is neither "k-means++" nor a (K, D) array; pass one of them')
        count = k if start is None else len(start)
        solver = _Solver(
            assignment, shard, peak_N, crew, max_iter, epsilon * typical, metric == "cosine",
            torch.Generator(device=where).manual_seed(seed),
        )  # fmt: skip
        run = solver.best(count, start, n_init)
        share = assignment.work.share if isinstance(assignment, Assignment) else 1.0
    if len(run.centroids_KD) < count:
        log.warning("k=%d exceeds the %d distinct points; that many clusters were made", count, len(run.centroids_KD))
    centroids, labels = run.centroids_KD, assignment.labels_N
    if isinstance(x, Tensor):
        return KMeansResult(centroids.to(x.device), labels.to(x.device), run.inertia, run.n_iter, share)
    return KMeansResult(centroids.cpu().numpy(), labels.cpu().numpy(), run.inertia, run.n_iter, share)


def nearest(x_ND: Tensor, centroids_KD: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The exact nearest centroid of each point (N,) int64, and its squared distance (N,) float32, on the host.

    x (N, D) and centroids (K, D) are float32 on the host.
    """
    middle_D = centroids_KD.mean(0)
    if device.type == "cuda":
        on_device = DeviceAssignment(x_ND, middle_D.to(device))
        on_device.assign(centroids_KD.to(device))
        return on_device.labels_N.cpu(), on_device.d2_N.cpu()
    with workers() as crew:
        assignment = Assignment(x_ND, middle_D, crew, 0)
        assignment.choose(centroids_KD)
        assignment.assign(centroids_KD)
    return assignment.labels_N, assignment.d2_N


@dataclass
class _Solver:
    """The iterations over one set of points. least_shift is in units of x."""

    points: Assignment | DeviceAssignment
    shard: Shard
    peak_N: Tensor
    crew: Workers | None
    max_iter: int
    least_shift: float
    on_sphere: bool
    generator: torch.Generator
    sums: ClusterSums | None = None

    def best(self, k: int, start: Tensor | None, n_init: int) -> Run:
        """The run of least inertia among n_init from drawn seeds, or the one from `start`; its assignment is held."""
        self.points.choose(self.shard.sample(k)[:k] if start is None else start)
        if start is not None:
            self.points.assign(start)
            return self._lloyd(start, 0)
        best = run = self._seeded_run(k)
        for _ in range(n_init - 1):
            run = self._seeded_run(k)
            best = run if run.inertia < best.inertia else best
        if best is not run:
            self.points.assign(best.centroids_KD)
        return best

    def _seeded_run(self, k: int) -> Run:
        started = time.perf_counter()
        seeds_KD = seed_plus_plus(self.points, self.shard, k, self.generator)
        log.debug("%d seeds in %.2f s", len(seeds_KD), time.perf_counter() - started)
        return self._repaired(self._lloyd(seeds_KD, 0))

    def _sums(self, k: int) -> ClusterSums:
        """The sums of the labels held; sums by difference outlive restarts."""
        if self.sums is None or len(self.sums.mass_K) != k:
            self.sums = ClusterSums(self.shard, self.peak_N, k, self.crew)
        self.sums.update(self.points.labels_N)
        return self.sums

    def _lloyd(self, centroids_KD: Tensor, n_iter: int) -> Run:
        """Lloyd's iterations from centroids whose assignment is held; after, that to those returned is."""
        while n_iter < self.max_iter:
            n_iter += 1
            self._fill_empty(len(centroids_KD))
            sums = self._sums(len(centroids_KD))
            means_KD, mass_K, lost_K = sums.means()
            if self.on_sphere:
                norm_K = means_KD.norm(dim=1, keepdim=True)
                means_KD = means_KD / norm_K.clamp(min=torch.finfo(torch.float64).tiny)
                lost_K = lost_K | (norm_K[:, 0] < 1e-12)
            # a cluster without mass, or whose members cancel out on the sphere, has no mean: it stays where it was
            updated_KD = torch.where(lost_K[:, None], centroids_KD.double(), means_KD).float()
            moved_K = (updated_KD - centroids_KD).double().square().sum(1)
            shift = float((moved_K * mass_K).sum() / mass_K.sum()) ** 0.5
            centroids_KD = updated_KD
            if n_iter == CHOOSE_AGAIN:
                self.points.choose(centroids_KD)
            self.points.assign(centroids_KD)
            changed = int((self.points.labels_N != sums.labels_N).any())
            if shift <= self.least_shift or self.shard.ranks.largest(changed) == 0:
                break
        return Run(centroids_KD, self._inertia(), n_iter)

    def _repaired(self, run: Run) -> Run:
        """The run after as many rounds of exchanges and Lloyd's iterations as lower its inertia within max_iter."""
        for _ in range(MAX_REPAIRS):
            moved_KD = self._exchanged(run.centroids_KD) if run.n_iter < self.max_iter else None
            if moved_KD is None:
                break
            self.points.assign(moved_KD)
            after = self._lloyd(moved_KD, run.n_iter)
            if after.inertia >= run.inertia:
                self.points.assign(run.centroids_KD)
                break
            run = after
        return run

    def _exchanged(self, centroids_KD: Tensor) -> Tensor | None:
        k, labels_N, shard = len(centroids_KD), self.points.labels_N, self.shard
        if k < 3:
            return None
        # the first of independent exponential clocks with rates w·D² draws one member per cluster by D²
        rate_N = shard.weight_N.double() * self.points.d2_N
        uniform_N = torch.rand(shard.count, dtype=torch.float64, generator=self.generator, device=shard.device)
        uniform_N = uniform_N[shard.first : shard.first + len(rate_N)].clamp_(min=1e-300)
        clock_N = torch.where(rate_N > 0, -uniform_N.log() / rate_N, torch.inf)
        drawn_KD, known_K = shard.first_of_each(clock_N, labels_N, k)
        _, mass_K, _ = self._sums(k).means()
        halves = ClusterSums(shard, self.peak_N, 2 * k, self.crew)
        moved_KD = exchange(self.points, centroids_KD, mass_K, drawn_KD, known_K, halves)
        return normalise_(moved_KD) if moved_KD is not None and self.on_sphere else moved_KD

    def _fill_empty(self, k: int) -> None:
        """Gives each empty cluster the point farthest from every centroid and from those given before it."""
        counts_K = self.shard.ranks.total(torch.bincount(self.points.labels_N, minlength=k))
        for empty in torch.nonzero(counts_K == 0).squeeze(1).tolist():
            row, d2 = self.shard.farthest(torch.where(self.shard.weight_N > 0, self.points.d2_N, 0))
            if d2 <= 0:
                return
            rows_1 = torch.tensor([row], device=self.shard.device)
            # the point's neighbours are near a centroid now, so that the next empty cluster goes elsewhere
            approach(self.shard.x_ND, self.points.d2_N, self.shard.points(rows_1))
            here_1, local_1 = self.shard.here(rows_1)
            self.points.labels_N[local_1[here_1]] = empty

    def _inertia(self) -> float:
        return exact_total(self.points.d2_N.double() * self.shard.weight_N, self.shard.ranks)


def _middle(shard: Shard) -> tuple[Tensor, float]:
    """Per-dimension median, and the median distance to it: from evenly spaced rows, and unmoved by outliers."""
    sample_SD = shard.sample(MIDDLE_ROWS)
    middle_D = sample_SD.median(dim=0).values
    distance_S = (sample_SD - middle_D).norm(dim=1)
    typical = float(distance_S.median())
    return middle_D, typical if typical > 0 else float(distance_S.mean())


def _checked(x: Array, k: int, max_iter: int, n_init: int, epsilon: float, metric: str) -> Tensor:
    points = x if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(x))
    if points.ndim != 2 or points.shape[0] == 0 or points.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(points.shape)}; give a non-empty (N, D) matrix")
    for name, value in (("k", k), ("max_iter", max_iter), ("n_init", n_init)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name}={value!r} is not an integer >= 1; raise it")
    if not epsilon >= 0:
        raise ValueError(f"epsilon={epsilon!r} is not >= 0; give 0 or more")
    if metric not in ("l2", "cosine"):
        raise ValueError(f"metric={metric!r} is not one of l2, cosine; choose one of them")
    return points.detach().to(torch.float32).contiguous()


def _checked_weight(weight: Array | None, n: int) -> Tensor:
    if weight is None:
        return torch.ones(n)
    weights = torch.as_tensor(weight).detach().to(torch.float32)
    if weights.shape != (n,) or not bool((torch.isfinite(weights) & (weights >= 0)).all()) or not bool(weights.any()):
        raise ValueError(f"weight has shape {tuple(weights.shape)}; give {n} finite numbers >= 0, one of them positive")
    return weights


def _checked_init(init: Array, points: Tensor, metric: str, device: torch.device) -> Tensor:
    start = torch.as_tensor(init).detach().to(device, torch.float32)
    if start.ndim != 2 or start.shape[1] != points.shape[1] or len(start) == 0 or not bool(torch.isfinite(start).all()):
        raise ValueError(f"init has shape {tuple(start.shape)}; give finite (K, {points.shape[1]}) centroids")
    return normalise_(start.clone()) if metric == "cosine" else start.contiguous()
