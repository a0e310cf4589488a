"""Exact k-means: the public functions, and the validation and set-up of their input points.

Suffixes: N points on this rank, K clusters, D dims.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rb_gpu.learn.assign import Assignment
from rb_gpu.learn.assign_device import DeviceAssignment
from rb_gpu.learn.checkpoint import Checkpoint
from rb_gpu.learn.choice import choose
from rb_gpu.learn.devices import full_precision, points_room, resolve_device, resolve_engine
from rb_gpu.learn.distances import NORMED, normalise_
from rb_gpu.learn.distributed import Ranks
from rb_gpu.learn.inputs import (
    MIDDLE_ROWS,
    Array,
    Points,
    checked_counts,
    checked_matrix,
    checked_start,
    checked_weight,
    framed,
    generator_of,
    median_of,
)
from rb_gpu.learn.lloyd import EARLY, MOMENTUM, Solver
from rb_gpu.learn.seeding import seed_plus_plus
from rb_gpu.learn.shard import Shard, peaks
from rb_gpu.learn.starts import STARTS
from rb_gpu.learn.workers import Workers, workers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KMeansResult:
    """Centroids (K, D) and labels (N,) int64, both NumPy or torch as x was; inertia is Σ w·||x − c||².

    Centroids are float64 where x is float64 or a 32- or 64-bit integer type, else float32. n_iter counts Lloyd updates,
    without those of a small table's starts.
    Labels are the exact assignment to these centroids. K may be less than requested, because it never exceeds the
    number of distinct points. computed_share is the share of all point-centroid distances that were computed in full
    (1 on a GPU).
    """

    centroids: Any
    labels: Any
    inertia: float
    n_iter: int
    computed_share: float = 1.0


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
    checkpoint: Checkpoint | None = None,
    warm: Array | None = None,
    engine: str = "auto",
    precision: str = "tf32",
) -> KMeansResult:
    """Clusters the rows of x (N, D), a NumPy or torch array of real numbers, into min(k, distinct rows) clusters.

    init: "k-means++" (Arthur & Vassilvitskii 2007, true D² sampling; poor seeds are repaired by merging and splitting,
    and centroids move with momentum, Polyak 1964, until they settle; where N·k·D is at most 2^19, up to 20 such runs
    are made and the best is repaired) or a (k, D) array of initial centroids (plain Lloyd iterations, n_init is 1 and
    nothing is repaired; a row that attracts no weight is re-seeded).
    epsilon: stop once the root mean square distance over the points between a centroid and its cluster's mean is at
    most this, in units of the data's median distance to its median. metric: "l2", or "cosine": rows are normalised and
    centroids kept on the unit sphere.
    weight: (N,) >= 0; a cluster whose points have a mean weight below 2^-40 of the total keeps its previous centroid.
    memory_budget: bytes of x that may lie on a GPU (None: what is free there); larger data stay on the host and are
    streamed in chunks.
    code_budget: bytes that codes of the points may take on the host (None: a quarter of what is free; 0: none).
    ranks: the processes that hold the other rows; labels are then those of this rank's rows. checkpoint: where an
    interrupted run of the same call is resumed from. warm: up to k centroids of an earlier clustering, the same on all
    ranks, as seeds of the first of the n_init runs; k-means++ draws the missing ones, and repair replaces stale ones
    like any poor seed. engine: how points are assigned on CUDA: triton (exact labels), torch, or auto, which is triton
    where it runs. precision: of triton's coarse products: tf32, bf16 or ieee.

    Distances are float32. For l2, x of float64 or of 32- or 64-bit integers is first centred on its median, since a
    large offset would otherwise take all of float32's digits, and x whose largest magnitude lies outside [2^-40, 2^40]
    is scaled by a power of two. init and warm are transformed alike, and results are transformed back. x is never
    modified, nor copied on its device if it is contiguous float32 within these bounds and, for cosine, of norm 1.
    Structure smaller than 2^-24 of a point's distance from the median is therefore lost, in labels and in inertia.

    The same seed gives the same bits on one kind of device, whatever the budgets, threads and ranks. Raises ValueError
    on a bad argument, ConfigError where the device is missing.
    """
    k, max_iter, n_init = checked_counts(k=k, max_iter=max_iter, n_init=n_init)
    try:
        epsilon = float(epsilon)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"epsilon={epsilon!r} is not a number; give 0 or more") from None
    if not epsilon >= 0:
        raise ValueError(f"epsilon={epsilon!r} is not >= 0; give 0 or more")
    if isinstance(init, str) and init != "k-means++":
        raise ValueError(f'init={init!r} is neither "k-means++" nor a (K, D) array; pass one of them')
    with _opened(x, weight, metric, device, memory_budget, code_budget, ranks, engine, precision) as opened:
        where = opened.shard.device
        start = None if isinstance(init, str) else checked_start("init", init, opened.points, metric, where)
        if start is not None and len(start) != k:
            raise ValueError(f"init has {len(start)} rows; give k={k} of them, or some as warm")
        begun = None if warm is None else checked_start("warm", warm, opened.points, metric, where)
        if begun is not None and (start is not None or len(begun) > k):
            raise ValueError(f"warm has {len(begun)} rows; give at most k={k} of them, and no init")
        generator = generator_of(seed, where)
        settings = {"k": k, "init": _digest(start), "warm": _digest(begun), "max_iter": max_iter, "epsilon": epsilon,
                    "n_init": n_init, "metric": metric, "seed": int(seed), "early": EARLY,
                    "momentum": MOMENTUM, "starts": STARTS}  # fmt: skip
        solver = Solver(
            opened.assignment, opened.shard, opened.points.peak_N, opened.crew, max_iter, epsilon * opened.typical,
            metric == "cosine", generator, checkpoint, settings,
        )  # fmt: skip
        run = solver.best(k, start, n_init if start is None else 1, begun)
        frame = opened.points.frame
        centroids_KD = frame.out(run.centroids_KD)
    if len(run.centroids_KD) < k:
        log.warning("k=%d exceeds the %d distinct points; that many clusters were made", k, len(run.centroids_KD))
    share = opened.assignment.work.share if isinstance(opened.assignment, Assignment) else 1.0
    log.info("k-means: %.2f %% of the distances between points and centroids were computed, bounds ruled out the rest",
             100 * share)  # fmt: skip
    inertia = run.inertia / frame.scale / frame.scale / opened.weight_scale
    if inertia == math.inf:
        raise ValueError("x lies so far apart that its squared distances add up to more than float64; scale x down")
    labels = _as_given(x, opened.assignment.labels_N)
    return KMeansResult(_as_given(x, centroids_KD), labels, inertia, run.n_iter, share)


def kmeans_plus_plus(x: Array, k: int, seed: int = 0, device: str = "auto") -> tuple[Any, Any]:
    """k-means++ seeds (K, D) and each point's nearest seed (N,) int64; arguments and dtypes as in `kmeans`."""
    [k] = checked_counts(k=k)
    with _opened(x, None, "l2", device, None, None, None) as opened:
        assignment, shard = opened.assignment, opened.shard
        choose(assignment, shard.sample(k)[:k])
        seeds_KD = seed_plus_plus(assignment, shard, k, generator_of(seed, shard.device))
        seeds_KD = opened.points.frame.out(seeds_KD)
    return _as_given(x, seeds_KD), _as_given(x, assignment.labels_N)


@dataclass(frozen=True)
class _Opened:
    """Points that are ready to be clustered; typical is their median distance to their median, in frame units."""

    points: Points
    assignment: Assignment | DeviceAssignment
    shard: Shard
    crew: Workers | None
    typical: float
    weight_scale: float


@contextmanager
def _opened(
    x: Array,
    weight: Array | None,
    metric: str,
    device: str,
    memory_budget: int | None,
    code_budget: int | None,
    ranks: Ranks | None,
    engine: str = "auto",
    precision: str = "tf32",
) -> Iterator[_Opened]:
    if metric not in ("l2", "cosine"):
        raise ValueError(f"metric={metric!r} is not one of l2, cosine; choose one of them")
    given_ND, ranks = checked_matrix(x), ranks or Ranks()
    where = resolve_device(device)
    engine = resolve_engine(engine, where)
    with ExitStack() as stack:
        stack.enter_context(full_precision())
        # take torch's threads over before it starts any of its own, which a process forked later would lack
        crew = stack.enter_context(workers()) if where.type == "cpu" else None
        weight_N, weight_scale = checked_weight(weight, len(given_ND), ranks)
        if memory_budget is None and where.type == "cuda":
            memory_budget = points_room(len(given_ND), where)
        points = framed(given_ND, metric, crew, where, memory_budget, ranks)
        if metric == "cosine":
            points = _on_sphere(points, given_ND, crew, memory_budget)
        if points.x_ND.device.type != where.type:
            log.info("points stay on the host: they exceed the %.2f GiB of the GPU's memory that are theirs",
                     (memory_budget or 0) / 2**30)  # fmt: skip
        shard = Shard(points.x_ND, weight_N.to(where), ranks, memory_budget, engine)
        middle_D, typical = _middle(shard)
        assignment: Assignment | DeviceAssignment
        if crew is None:
            assignment = DeviceAssignment(points.x_ND, middle_D, memory_budget, engine, precision)
        else:
            assignment = Assignment(points.x_ND, middle_D, crew, code_budget)
        yield _Opened(points, assignment, shard, crew, typical, weight_scale)


def _on_sphere(points: Points, given_ND: Tensor, crew: Workers | None, budget: int | None) -> Points:
    """The points, scaled to norm 1. given_ND: what the caller passed, which must not be modified."""
    if not bool((points.peak_N > 0).all()):
        zeros = int((points.peak_N == 0).sum())
        raise ValueError(f"x has {zeros} rows of norm 0; cosine needs a direction, drop them")
    if float((points.norm_N - 1).abs().max()) <= NORMED:
        return points
    # a copy was made on the way to a GPU, which may have no room for another
    x_ND = normalise_(points.x_ND.clone() if points.x_ND is given_ND else points.x_ND)
    return Points(x_ND, *peaks(x_ND, crew, points.peak_N.device, budget), points.frame)


def _as_given(x: Array, tensor: Tensor) -> Any:
    """The tensor in the form of x: on x's device, or as NumPy."""
    return tensor.to(x.device) if isinstance(x, Tensor) else tensor.cpu().numpy()


def _digest(centroids_KD: Tensor | None) -> str:
    return hashlib.sha256(b"" if centroids_KD is None else centroids_KD.cpu().numpy().tobytes()).hexdigest()


def nearest(x_ND: Tensor, centroids_KD: Tensor, device: torch.device, engine: str = "auto") -> tuple[Tensor, Tensor]:
    """The exact nearest centroid of each point (N,) int64 and its squared distance (N,) float32, both on the host.

    x (N, D) and centroids (K, D) are float32 on the host. engine: as in `kmeans`.
    """
    middle_D = centroids_KD.mean(0)
    with full_precision():
        if device.type == "cuda":
            on_device = DeviceAssignment(x_ND, middle_D.to(device), engine=resolve_engine(engine, device))
            on_device.assign(centroids_KD.to(device))
            return on_device.labels_N.cpu(), on_device.d2_N.cpu()
        with workers() as crew:
            assignment = Assignment(x_ND, middle_D, crew, 0)
            choose(assignment, centroids_KD)
            assignment.assign(centroids_KD)
    return assignment.labels_N, assignment.d2_N


def _middle(shard: Shard) -> tuple[Tensor, float]:
    """Per-dimension median and the median distance to it, from evenly spaced rows; both are robust to outliers."""
    sample_SD = shard.sample(MIDDLE_ROWS)
    middle_D = median_of(sample_SD)
    distance_S = (sample_SD - middle_D).norm(dim=1)
    typical = float(distance_S.median())
    return middle_D, typical if typical > 0 else float(distance_S.mean())
