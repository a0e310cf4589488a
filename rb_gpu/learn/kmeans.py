"""Exact k-means: what callers use, and how their points are checked and opened.

Suffixes: N points here, K clusters, D dims.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rb_gpu.learn.assign import Assignment
from rb_gpu.learn.assign_device import DeviceAssignment
from rb_gpu.learn.checkpoint import Checkpoint
from rb_gpu.learn.devices import free_memory, full_precision, resolve_device, resolve_engine
from rb_gpu.learn.distances import NORMED, normalise_
from rb_gpu.learn.distributed import Ranks
from rb_gpu.learn.lloyd import Solver
from rb_gpu.learn.seeding import seed_plus_plus
from rb_gpu.learn.shard import Shard, peaks
from rb_gpu.learn.workers import Workers, workers

log = logging.getLogger(__name__)

Array = npt.NDArray[Any] | Tensor
MIDDLE_ROWS = 1024
# share of the free memory that codes of the points take where nothing else is said
CODE_SHARE = 0.25


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
    """Clusters the rows of x (N, D), NumPy or torch, into min(k, distinct rows) clusters.

    init: "k-means++" (Arthur & Vassilvitskii 2007, true D² sampling, then a repair of doubled centroids) or a (K, D)
    array to start from (then n_init is 1 and nothing is repaired; a row without points is drawn anew). epsilon: stop
    where the centroids' shifts, as a root mean square over the points, are at most this, in units of the data's median
    distance to its middle. metric: "l2", or "cosine": rows are normalised and centroids kept on the unit sphere.
    weight: (N,) >= 0. memory_budget: bytes of x that may lie on a GPU; larger data stay on the host and travel in
    chunks. code_budget: bytes that codes of the points may take on the host (None: a quarter of what is free; 0: none).
    ranks: the processes that hold the other rows; labels are then of the rows here. checkpoint: where to go on from, if
    the same call was cut off. warm: up to k centroids of an earlier clustering, the same on all ranks, with which the
    first of the n_init runs begins; k-means++ draws what they lack, and what is stale in them is repaired like bad
    luck. engine: of the assignment on CUDA: triton, whose labels are exact, torch, or auto, triton where it runs;
    precision: of triton's coarse products, tf32, bf16 or ieee. x is only read, and never copied if it is float32 and,
    for cosine, of norm 1.

    The same seed gives the same bits on one kind of device, whatever the budgets, threads and ranks. Raises ValueError
    on a bad argument, ConfigError where the device is missing.
    """
    points = _checked(x, metric)
    _check_counts(k=k, max_iter=max_iter, n_init=n_init)
    if not epsilon >= 0:
        raise ValueError(f"epsilon={epsilon!r} is not >= 0; give 0 or more")
    if isinstance(init, str) and init != "k-means++":
        raise ValueError(f'init={init!r} is neither "k-means++" nor a (K, D) array; pass one of them')
    with _opened(points, weight, metric, device, memory_budget, code_budget, ranks, engine, precision) as opened:
        start = None if isinstance(init, str) else _checked_init(init, points, metric, opened.shard.device)
        count = k if start is None else len(start)
        begun = None if warm is None else _checked_init(warm, points, metric, opened.shard.device, "warm")
        if begun is not None and (start is not None or len(begun) > k):
            raise ValueError(f"warm has {len(begun)} rows; give at most k={k} of them, and no init")
        settings = {"k": count, "init": _digest(start), "warm": _digest(begun), "max_iter": max_iter,
                    "epsilon": epsilon, "n_init": n_init, "metric": metric, "seed": seed}  # fmt: skip
        solver = Solver(
            opened.points, opened.shard, opened.peak_N, opened.crew, max_iter, epsilon * opened.typical,
            metric == "cosine", torch.Generator(device=opened.shard.device).manual_seed(seed), checkpoint, settings,
        )  # fmt: skip
        run = solver.best(count, start, n_init if start is None else 1, begun)
    if len(run.centroids_KD) < count:
        log.warning("k=%d exceeds the %d distinct points; that many clusters were made", count, len(run.centroids_KD))
    share = opened.points.work.share if isinstance(opened.points, Assignment) else 1.0
    log.info("k-means computed %.2f %% of all distances in full", 100 * share)
    centroids, labels = _as_given(x, run.centroids_KD), _as_given(x, opened.points.labels_N)
    return KMeansResult(centroids, labels, run.inertia, run.n_iter, share)


def kmeans_plus_plus(
    x: Array, k: int, seed: int = 0, metric: str = "l2", device: str = "auto", weight: Array | None = None
) -> tuple[Any, Any]:
    """k-means++ seeds (K, D) float32 and each point's nearest of them (N,) int64; arguments as those of `kmeans`."""
    _check_counts(k=k)
    with _opened(_checked(x, metric), weight, metric, device, None, None, None) as opened:
        opened.points.choose(opened.shard.sample(k)[:k])
        generator = torch.Generator(device=opened.shard.device).manual_seed(seed)
        seeds_KD = seed_plus_plus(opened.points, opened.shard, k, generator)
    return _as_given(x, seeds_KD), _as_given(x, opened.points.labels_N)


@dataclass(frozen=True)
class _Opened:
    """Points that are ready to be clustered; typical is their median distance to the middle."""

    points: Assignment | DeviceAssignment
    shard: Shard
    peak_N: Tensor
    crew: Workers | None
    typical: float


@contextmanager
def _opened(
    points: Tensor,
    weight: Array | None,
    metric: str,
    device: str,
    memory_budget: int | None,
    code_budget: int | None,
    ranks: Ranks | None,
    engine: str = "auto",
    precision: str = "tf32",
) -> Iterator[_Opened]:
    where = resolve_device(device)
    engine = resolve_engine(engine, where)
    weights = _checked_weight(weight, len(points)).to(where)
    with ExitStack() as stack:
        stack.enter_context(full_precision())
        crew = stack.enter_context(workers()) if where.type == "cpu" else None
        if crew is None and (memory_budget is None or points.numel() * 4 <= memory_budget):
            points = points.to(where)
        peak_N, norm_N = peaks(points, crew, where, memory_budget)
        if not bool(torch.isfinite(peak_N).all()):
            raise ValueError("x holds NaN or infinity; drop those rows first")
        if metric == "cosine":
            if not bool((peak_N > 0).all()):
                zeros = int((peak_N == 0).sum())
                raise ValueError(f"x has {zeros} rows of norm 0; cosine needs a direction, drop them")
            if float((norm_N - 1).abs().max()) > NORMED:
                points = normalise_(points.clone())
                peak_N, norm_N = peaks(points, crew, where, memory_budget)
        if not bool(torch.isfinite(norm_N).all()):
            raise ValueError(f"x reaches {float(peak_N.max()):.3g}, whose square overflows float32; scale x down")
        shard = Shard(points, weights, ranks or Ranks(), memory_budget, engine)
        middle_D, typical = _middle(shard)
        budget = int(CODE_SHARE * free_memory()) if code_budget is None else code_budget
        if crew is None:
            on_device = DeviceAssignment(points, middle_D, memory_budget, engine, precision)
            yield _Opened(on_device, shard, peak_N, crew, typical)
        else:
            yield _Opened(Assignment(points, middle_D, crew, budget), shard, peak_N, crew, typical)


def _as_given(x: Array, tensor: Tensor) -> Any:
    """The tensor as x came: on its device, or as NumPy."""
    return tensor.to(x.device) if isinstance(x, Tensor) else tensor.cpu().numpy()


def _digest(centroids_KD: Tensor | None) -> str:
    return hashlib.sha256(b"" if centroids_KD is None else centroids_KD.cpu().numpy().tobytes()).hexdigest()


def nearest(x_ND: Tensor, centroids_KD: Tensor, device: torch.device, engine: str = "auto") -> tuple[Tensor, Tensor]:
    """The exact nearest centroid of each point (N,) int64, and its squared distance (N,) float32, on the host.

    x (N, D) and centroids (K, D) are float32 on the host. engine: as in `kmeans`.
    """
    middle_D = centroids_KD.mean(0)
    if device.type == "cuda":
        on_device = DeviceAssignment(x_ND, middle_D.to(device), engine=resolve_engine(engine, device))
        on_device.assign(centroids_KD.to(device))
        return on_device.labels_N.cpu(), on_device.d2_N.cpu()
    with workers() as crew:
        assignment = Assignment(x_ND, middle_D, crew, 0)
        assignment.choose(centroids_KD)
        assignment.assign(centroids_KD)
    return assignment.labels_N, assignment.d2_N


def _middle(shard: Shard) -> tuple[Tensor, float]:
    """Per-dimension median, and the median distance to it: from evenly spaced rows, and unmoved by outliers."""
    sample_SD = shard.sample(MIDDLE_ROWS)
    middle = (len(sample_SD) - 1) // 2
    if sample_SD.device.type == "cpu":  # where torch's sort takes as long as ten iterations of a small table
        middle_D = torch.from_numpy(np.partition(sample_SD.T.contiguous().numpy(), middle, axis=1)[:, middle].copy())
    else:  # torch's own median has no deterministic form on a GPU
        middle_D = sample_SD.sort(dim=0).values[middle]
    distance_S = (sample_SD - middle_D).norm(dim=1)
    typical = float(distance_S.median())
    return middle_D, typical if typical > 0 else float(distance_S.mean())


def _checked(x: Array, metric: str) -> Tensor:
    if metric not in ("l2", "cosine"):
        raise ValueError(f"metric={metric!r} is not one of l2, cosine; choose one of them")
    points = x if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(x))
    if points.ndim != 2 or points.shape[0] == 0 or points.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(points.shape)}; give a non-empty (N, D) matrix")
    return points.detach().to(torch.float32).contiguous()


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name}={value!r} is not an integer >= 1; raise it")


def _checked_weight(weight: Array | None, n: int) -> Tensor:
    if weight is None:
        return torch.ones(n, dtype=torch.float32)
    weights = torch.as_tensor(weight).detach().to(torch.float32)
    if weights.shape != (n,) or not bool((torch.isfinite(weights) & (weights >= 0)).all()) or not bool(weights.any()):
        raise ValueError(f"weight has shape {tuple(weights.shape)}; give {n} finite numbers >= 0, one of them positive")
    return weights


def _checked_init(init: Array, points: Tensor, metric: str, device: torch.device, name: str = "init") -> Tensor:
    start = torch.as_tensor(init).detach().to(device, torch.float32)
    if start.ndim != 2 or start.shape[1] != points.shape[1] or len(start) == 0 or not bool(torch.isfinite(start).all()):
        raise ValueError(f"{name} has shape {tuple(start.shape)}; give finite (K, {points.shape[1]}) centroids")
    return normalise_(start.clone()) if metric == "cosine" else start.contiguous()
