"""Lloyd's iterations with momentum, re-seeding of empty clusters, repair and restarts.

The points' current assignment is kept in an `Assignment` (CPU) or `DeviceAssignment` (GPU) and updated in place.
Suffixes: N points on this rank, K clusters, D dims.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rb_gpu.learn.assign import Assignment
from rb_gpu.learn.assign_device import DeviceAssignment
from rb_gpu.learn.blocks import block_threads, row_hashes
from rb_gpu.learn.checkpoint import Checkpoint, fingerprint
from rb_gpu.learn.choice import choose
from rb_gpu.learn.devices import tiles
from rb_gpu.learn.distances import normalise_
from rb_gpu.learn.progress import step
from rb_gpu.learn.repair import exchange
from rb_gpu.learn.seeding import more_seeds, seed_plus_plus
from rb_gpu.learn.shard import Shard
from rb_gpu.learn.starts import best_start
from rb_gpu.learn.sums import ClusterSums, exact_total
from rb_gpu.learn.workers import Workers

log = logging.getLogger(__name__)

MAX_REPAIRS = 20
# updates between the early rounds of repair: Lloyd's iterations take many to split one cluster between two
# centroids, but which clusters need splitting shows after a few
EARLY = 2
# another such early round follows only if the last one reduced the inertia by this share: momentum reaches smaller
# gains sooner than repairs do
WORTH_A_ROUND = 3e-3
# the assignment method is chosen again after this update: by then the centroids are means, no longer data points
CHOOSE_AGAIN = 2
# share of its last move by which a centroid overshoots its mean: the initial value, the decrease per update and the
# minimum. A high value carries centroids over shallow minima at first, a lower one along flat valleys later.
MOMENTUM, MOMENTUM_LOST, LEAST_MOMENTUM = 0.9, 0.01, 0.5


@dataclass(frozen=True)
class Run:
    """Centroids (K, D) float32 on the device, their inertia, the updates so far, and whether they converged."""

    centroids_KD: Tensor
    inertia: float
    n_iter: int
    converged: bool


@dataclass
class Progress:
    """Where a solve stands: the restart's number, the best run of earlier restarts, the repairs so far, and the run
    before the last repair; until: the update at which iterations stop for a repair at the latest.
    """

    attempt: int = 0
    best: Run | None = None
    repairs: int = 0
    before: Run | None = None
    until: int = EARLY


@dataclass
class Course:
    """How centroids move: their position before the last update (K, D), the update count when the course began, the
    momentum it began with, and whether updates are plain means (no momentum) from now on.
    """

    previous_KD: Tensor
    began: int
    momentum: float
    settling: bool


@dataclass
class Solver:
    """k-means over one set of points. least_shift: in units of x; settings: all else the result depends on."""

    points: Assignment | DeviceAssignment
    shard: Shard
    peak_N: Tensor
    crew: Workers | None
    max_iter: int
    least_shift: float
    on_sphere: bool
    generator: torch.Generator
    checkpoint: Checkpoint | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    _sums: ClusterSums | None = None
    _progress: Progress = field(default_factory=Progress)
    _plain: bool = False
    _fingerprint: str = ""

    def best(self, k: int, start: Tensor | None, n_init: int, warm: Tensor | None = None) -> Run:
        """Returns the run of least inertia among n_init with drawn seeds, or the one from `start`; points hold its
        assignment afterwards. warm: seeds to begin the first run with.
        """
        self._plain = start is not None
        resumed = self._resumed()
        if resumed is None:
            choose(self.points, self.shard.sample(k)[:k] if start is None else start)
        run = None
        while self._progress.attempt < n_init:
            run = resumed or self._first_run(k, start, warm if self._progress.attempt == 0 else None)
            resumed = None
            run = run if start is not None else self._repaired(run)
            best = self._progress.best
            self._progress = Progress(
                self._progress.attempt + 1, run if best is None or run.inertia < best.inertia else best
            )
        best = self._progress.best
        if best is None:
            raise ValueError(f"n_init={n_init} runs nothing; give 1 or more")
        if best is not run:
            self.points.assign(best.centroids_KD)
        if self.checkpoint is not None and self.shard.ranks.rank == 0:
            self.checkpoint.clear()
        return best

    def _first_run(self, k: int, start: Tensor | None, warm: Tensor | None) -> Run:
        if start is not None:
            self._progress.until = self.max_iter
            self._assign_first(start)
            return self._lloyd(start, 0)
        started = time.perf_counter()
        if warm is None:
            momentum = MOMENTUM, MOMENTUM_LOST, LEAST_MOMENTUM
            warm = best_start(self.shard, k, self.max_iter, self.least_shift, momentum, self.on_sphere, self.generator)
        seeds_KD = seed_plus_plus(self.points, self.shard, k, self.generator, warm)
        log.debug("%d seeds in %.2f s", len(seeds_KD), time.perf_counter() - started)
        return self._lloyd(seeds_KD, 0)

    def _assign_first(self, centroids_KD: Tensor) -> None:
        """Assigns points to centroids that may include duplicates: the first copy takes the points."""
        _, which_K = torch.unique(centroids_KD, dim=0, return_inverse=True)
        rows_K = torch.arange(len(which_K), device=which_K.device)
        first_K = torch.full_like(rows_K, len(rows_K)).scatter_reduce(0, which_K, rows_K, "amin")
        kept_U = first_K[first_K < len(rows_K)].sort().values
        self.points.reset()
        # comparing a point with copies would fall back to float64 for every tie, so they are left out
        self.points.assign(centroids_KD[kept_U])
        self.points.labels_N.copy_(kept_U[self.points.labels_N])

    def _lloyd(self, centroids_KD: Tensor, n_iter: int, course: Course | None = None) -> Run:
        """Iterates from centroids whose assignment the points hold; afterwards they hold that of the returned ones.

        Each update moves a centroid to its mean plus a share of its last move (momentum; Polyak 1964, the heavy ball),
        which converges in fewer updates and to a lower inertia. Once nothing changes, or at the last update, plain
        means follow; with a given start all updates are plain. course: the state of interrupted iterations to resume.
        """
        sums, converged = self._held_sums(len(centroids_KD)), False
        first = self._progress.before is None
        course = course or Course(centroids_KD, n_iter, MOMENTUM if first else LEAST_MOMENTUM, self._plain)
        limit = min(self.max_iter, self._progress.until)
        sums.update(self.points.labels_N)
        empty = int(sums.empties().sum())
        while not converged and n_iter < limit:
            momentum = max(LEAST_MOMENTUM, course.momentum - MOMENTUM_LOST * (n_iter - course.began))
            n_iter += 1
            course.settling = course.settling or n_iter == limit
            if empty > 0:
                empty_K = sums.empties()
                centroids_KD = self._filled(centroids_KD, empty_K)
                course.previous_KD = torch.where(empty_K[:, None], centroids_KD, course.previous_KD)
                sums.update(self.points.labels_N)
            means_KD, mass_K, lost_K = sums.means()
            if self.on_sphere:
                norm_K = means_KD.norm(dim=1, keepdim=True)
                means_KD = means_KD / norm_K.clamp(min=torch.finfo(torch.float64).tiny)
                lost_K = lost_K | (norm_K[:, 0] < 1e-12)
            # a cluster without mass, or whose members cancel out on the sphere, has no mean: its centroid stays
            means_KD = torch.where(lost_K[:, None], centroids_KD.double(), means_KD)
            squared_shift = ((means_KD - centroids_KD).square().sum(1) * mass_K).sum() / mass_K.sum()
            updated_KD = means_KD.float()
            if not course.settling:
                carried_KD = means_KD + momentum * (centroids_KD.double() - course.previous_KD)
                carried_KD = normalise_(carried_KD) if self.on_sphere else carried_KD
                updated_KD = torch.where(lost_K[:, None], updated_KD, carried_KD.float())
            moved_K = (updated_KD - centroids_KD).double().square().sum(1)
            centroids_KD, course.previous_KD = updated_KD, centroids_KD
            if n_iter == CHOOSE_AGAIN:
                choose(self.points, centroids_KD)
            self.points.assign(centroids_KD, moved_K.sqrt())
            changed_any = sums.update(self.points.labels_N)
            # one transfer for all that the host needs: a GPU runs dry at each synchronisation
            told = torch.stack([squared_shift, changed_any.double(), sums.empties().sum().double()]).tolist()
            shift, changed, empty = told[0] ** 0.5, told[1], int(told[2])
            step("Lloyd", n_iter, self.max_iter, "updates")
            still = shift <= self.least_shift or self.shard.ranks.largest(changed) == 0
            # the first update of a course has no momentum yet, so it may converge like the last ones
            converged = still and (course.settling or n_iter == course.began + 1)
            course.settling = course.settling or still
            if self.checkpoint is not None and not converged and n_iter % self.checkpoint.every == 0:
                self._save(self.checkpoint, centroids_KD, n_iter, course)
        self.points.settle(centroids_KD)
        return Run(centroids_KD, self._inertia(), n_iter, converged)

    def _repaired(self, run: Run) -> Run:
        """Alternates exchanges and Lloyd's iterations while they lower the inertia, within max_iter; returns the best.

        First come short rounds of EARLY updates, while they are worth it, then rounds that run to convergence.
        """
        progress = self._progress
        while True:
            spent = progress.repairs == MAX_REPAIRS or run.n_iter >= self.max_iter
            if progress.before is not None:
                least = WORTH_A_ROUND if progress.until < self.max_iter else 0.0
                spent = spent or run.inertia >= (1 - least) * progress.before.inertia
                if run.inertia >= progress.before.inertia:
                    run = progress.before
                    self.points.assign(run.centroids_KD)
            centroids_KD = None if spent else self._exchanged(run.centroids_KD)
            if centroids_KD is not None:
                progress.before, progress.repairs = run, progress.repairs + 1
                progress.until = progress.until if progress.until == self.max_iter else run.n_iter + EARLY
                self.points.assign(centroids_KD)
            elif progress.until < self.max_iter and run.n_iter < self.max_iter and (spent or not run.converged):
                # a converged run continues, too, if an exchange failed: EARLY updates may not show its full value
                progress.before, progress.repairs, progress.until = None, 0, self.max_iter
                centroids_KD = run.centroids_KD
            else:
                return run
            run = self._lloyd(centroids_KD, run.n_iter)

    def _exchanged(self, centroids_KD: Tensor) -> Tensor | None:
        k = len(centroids_KD)
        if k < 3:
            return None
        drawn_KD, known_K = self._members_drawn(k)
        _, mass_K, _ = self._held_sums(k).means()
        halves = ClusterSums(self.shard, self.peak_N, 2 * k, self.crew)
        moved_KD = exchange(self.points, centroids_KD, mass_K, drawn_KD, known_K, halves)
        return normalise_(moved_KD) if moved_KD is not None and self.on_sphere else moved_KD

    def _members_drawn(self, k: int) -> tuple[Tensor, Tensor]:
        """One member (K, D) of each cluster, drawn with probability in proportion to w·D², and which clusters have one
        at D > 0. Its arrays over the points are freed on return: a GPU that is full of points has no room for them.
        """
        shard = self.shard
        # the first of independent exponential clocks with rates w·D²
        rate_N = shard.weight_N.double() * self.points.d2_N
        uniform_N = torch.rand(shard.count, dtype=torch.float64, generator=self.generator, device=shard.device)
        uniform_N = uniform_N[shard.first : shard.first + len(rate_N)].clamp_(min=1e-300)
        clock_N = torch.where(rate_N > 0, -uniform_N.log() / rate_N, torch.inf)
        return shard.first_of_each(clock_N, self.points.labels_N, k)

    def _held_sums(self, k: int) -> ClusterSums:
        """The cluster sums of the last update's labels; kept across restarts, as they are updated by difference."""
        if self._sums is None or len(self._sums.mass_K) != k:
            self._sums = ClusterSums(self.shard, self.peak_N, k, self.crew)
        return self._sums

    def _filled(self, centroids_KD: Tensor, empty_K: Tensor) -> Tensor:
        """The centroids (K, D) with the empty ones re-drawn as k-means++ would draw its last seeds.

        They are sampled by D² rather than placed at the farthest points: those are outliers, and a centroid placed on
        one would keep only that point.
        """
        self.points.settle(centroids_KD)
        k, empty_E = len(centroids_KD), torch.nonzero(empty_K).squeeze(1)
        drawn_ED = more_seeds(self.points, self.shard, centroids_KD, k + len(empty_E), self.generator)[k:]
        labels_N = self.points.labels_N
        labels_N.copy_(torch.where(labels_N < k, labels_N, empty_E[(labels_N - k).clamp_(min=0)]))
        filled_KD = centroids_KD.index_copy(0, empty_E[: len(drawn_ED)], drawn_ED)
        if self.shard.ranks.largest(float((self.shard.weight_N == 0).any())) > 0:
            # a re-drawn cluster may still hold points of weight 0, whose distances refer to its old centroid; all ranks
            # reassign, because ties may resolve differently on a rank that does not
            self.points.assign(filled_KD)
        return filled_KD

    def _inertia(self) -> float:
        return exact_total(self.points.d2_N.double() * self.shard.weight_N, self.shard.ranks)

    def _save(self, checkpoint: Checkpoint, centroids_KD: Tensor, n_iter: int, course: Course) -> None:
        if self.shard.ranks.rank > 0:
            return
        progress = self._progress
        tensors = {
            "centroids": centroids_KD, "previous": course.previous_KD, "generator": self.generator.get_state()
        }  # fmt: skip
        facts: dict[str, Any] = {
            "n_iter": n_iter, "attempt": progress.attempt, "repairs": progress.repairs, "until": progress.until,
            "began": course.began, "momentum": course.momentum, "settling": course.settling,
        }  # fmt: skip
        for name, run in (("best", progress.best), ("before", progress.before)):
            if run is not None:
                tensors[name], facts[name] = run.centroids_KD, [run.inertia, run.n_iter, run.converged]
        checkpoint.save(tensors, facts, self._fingerprint)

    def _resumed(self) -> Run | None:
        """Resumes and finishes the run of a checkpoint of the same points and settings; None where there is none."""
        if self.checkpoint is None:
            return None
        ranks = self.shard.ranks
        x_ND = self.shard.x_ND
        # hash in tiles what lies on a GPU: moved at once, it would be a second copy in the host's memory
        on_host = x_ND.device.type == "cpu"
        spans = [slice(None)] if on_host else tiles(len(x_ND), x_ND.shape[1], x_ND.device)
        with block_threads() as pool:
            hashes = [row_hashes(x_ND[span].cpu().numpy(), pool) for span in spans]
        hash_N = torch.from_numpy(np.concatenate(hashes).view("int64"))
        self._fingerprint = fingerprint((hash_N, self.shard.weight_N), self.settings, ranks)
        found = ranks.of_first(self.checkpoint.load(self._fingerprint) if ranks.rank == 0 else None)
        if found is None:
            return None
        tensors, facts = found
        self.generator.set_state(tensors["generator"])
        runs = {
            name: Run(tensors[name].to(self.shard.device), *facts[name]) for name in ("best", "before") if name in facts
        }
        self._progress = Progress(
            facts["attempt"], runs.get("best"), facts["repairs"], runs.get("before"), facts["until"]
        )
        log.info(
            "going on from %s: restart %d, %d updates done", self.checkpoint.path, facts["attempt"], facts["n_iter"]
        )
        centroids_KD, previous_KD = (tensors[name].to(self.shard.device) for name in ("centroids", "previous"))
        choose(self.points, centroids_KD)
        self.points.assign(centroids_KD)
        course = Course(previous_KD, facts["began"], facts["momentum"], facts["settling"])
        return self._lloyd(centroids_KD, facts["n_iter"], course)
