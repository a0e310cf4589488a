"""Exact k-means: k-means++ seeding by blocks, Lloyd's iterations, re-seeding of empty clusters, repair, restarts.

Suffixes: N points, K clusters, D dims, M candidates of one seeding block.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rb_gpu.learn.devices import resolve_device
from rb_gpu.learn.distances import label_sums, lower_distances, nearest, normalise_, tiles
from rb_gpu.learn.repair import exchange

log = logging.getLogger(__name__)

Array = npt.NDArray[Any] | Tensor
# largest integer weight of one point in the D^2 draw: sums of 2^22 of them stay exact in int64
DRAW_BITS = 40
MAX_REPAIRS = 20
MIDDLE_ROWS = 2**16


@dataclass(frozen=True)
class KMeansResult:
    """centroids (K, D) float32 and labels (N,) int64, as the input came (NumPy or torch); inertia is Σ w·||x − c||².

    n_iter counts Lloyd's updates. Labels are the exact assignment to these centroids. K may be less than asked for:
    never more than the distinct points.
    """

    centroids: Any
    labels: Any
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
) -> KMeansResult:
    """Clusters the rows of x (N, D), NumPy or torch, into min(k, distinct rows) clusters.

    init: "k-means++" (Arthur & Vassilvitskii 2007, true D² sampling, then a repair of doubled centroids) or a (K, D)
    array to start from (then n_init is 1 and nothing is repaired). epsilon: stop where no centroid moves farther than
    this, in units of the data's median distance to its middle. metric: "l2", or "cosine": rows are normalised and
    centroids kept on the unit sphere. weight: (N,) >= 0. memory_budget: bytes of x that may lie on a GPU; larger data
    stay on the host and travel in tiles. Raises ValueError on a bad argument, ConfigError where the device is missing.
    """
    where = resolve_device(device)
    points = _checked(x, k, max_iter, n_init, epsilon, metric)
    weights = _checked_weight(weight, len(points))
    fits = memory_budget is None or points.numel() * 4 <= memory_budget
    if metric == "cosine":
        norms = points.norm(dim=1)
        if not bool((norms > 0).all()):
            raise ValueError(f"x has {int((norms == 0).sum())} rows of norm 0; cosine needs a direction, drop them")
        if float((norms - 1).abs().max()) > 1e-6:
            points = normalise_(points.clone())
    offset, scale = _middle(points)
    if metric == "cosine":
        offset = torch.zeros_like(offset)
    else:
        # distances by product cancel where the data lie far from the origin
        points = points - offset
    if fits:
        points = points.to(where)
    weights, offset = weights.to(where), offset.to(where)
    generator = torch.Generator(device=where).manual_seed(seed)

    start = None if isinstance(init, str) else _checked_init(init, points, offset, metric, where)
    if start is None and init != "k-means++":
        raise ValueError(f'init={init!r} is neither "k-means++" nor a (K, D) array; pass one of them')
    best: tuple[Tensor, Tensor, float, int] | None = None
    for _ in range(1 if start is not None else n_init):
        if start is not None:
            centroids, (labels, d2) = start, nearest(points, start)
        else:
            centroids, labels, d2 = seed_plus_plus(points, weights, k, generator, where)
            if metric == "cosine":
                centroids = normalise_(centroids)
        run = _lloyd(points, weights, centroids, labels, d2, max_iter, epsilon * scale, metric == "cosine")
        if start is None:
            run = _repaired(points, weights, run, max_iter, epsilon * scale, metric == "cosine", generator)
        if best is None or run[2] < best[2]:
            best = run
    if best is None:
        raise ValueError(f"n_init={n_init} runs nothing; give 1 or more")
    centroids, labels, inertia, n_iter = best
    if len(centroids) < k and start is None:
        log.warning("k=%d exceeds the %d distinct points; that many clusters were made", k, len(centroids))
    centroids = centroids + offset
    if isinstance(x, Tensor):
        return KMeansResult(centroids.to(x.device), labels.to(x.device), inertia, n_iter)
    return KMeansResult(centroids.cpu().numpy(), labels.cpu().numpy(), inertia, n_iter)


def seed_plus_plus(
    x_ND: Tensor, weight_N: Tensor, k: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """k-means++ seeds (K, D), each point's nearest seed (N,) int64 and squared distance (N,).

    A block draws M candidates independently from w·D² as it stood before the block, and accepts each with probability
    D²_now / D²_before. That is rejection sampling from D²_now, so the seeds are distributed exactly as those of the
    sequential algorithm (Arthur & Vassilvitskii 2007), with one product a block in place of one a seed. Fewer than k
    seeds come back where fewer distinct points have weight.
    """
    first = _draw(weight_N.double(), 1, generator)
    seeds_KD = x_ND[first.to(x_ND.device)].to(device)
    labels_N = torch.zeros(len(x_ND), dtype=torch.int64, device=device)
    d2_N = torch.full((len(x_ND),), torch.inf, dtype=torch.float32, device=device)
    lower_distances(x_ND, d2_N, labels_N, seeds_KD, 0)
    while len(seeds_KD) < k:
        mass_N = d2_N.double() * weight_N
        if not bool(mass_N.sum() > 0):
            break
        drawn_M = _draw(mass_N, min(len(seeds_KD), k - len(seeds_KD)), generator)
        candidates_MD = x_ND[drawn_M.to(x_ND.device)].to(device)
        before_M = d2_N[drawn_M].cpu().double()
        uniform_M = torch.rand(len(drawn_M), dtype=torch.float64, generator=generator, device=device).cpu()
        accepted = _accept(candidates_MD, before_M, uniform_M)
        new_MD = candidates_MD[accepted.to(device)]
        lower_distances(x_ND, d2_N, labels_N, new_MD, len(seeds_KD))
        seeds_KD = torch.cat([seeds_KD, new_MD])
    return seeds_KD, labels_N, d2_N


def _draw(mass_N: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """M independent indices with probability proportional to mass (N,) float64.

    The masses become integers: their running sum is exact, so every device draws the same points and a point of mass 0
    is never drawn, not even from the end of the sum.
    """
    bits = min(DRAW_BITS, 62 - max(1, len(mass_N)).bit_length())
    # a positive mass never rounds to 0, or the last distinct points could not be drawn
    units_N = (mass_N / mass_N.max() * 2**bits).ceil().to(torch.int64)
    running_N = units_N.cumsum(0)
    uniform_M = torch.rand(count, dtype=torch.float64, generator=generator, device=mass_N.device)
    target_M = (uniform_M * running_N[-1]).to(torch.int64).clamp_(max=running_N[-1] - 1)
    return torch.searchsorted(running_N, target_M, right=True)


def _accept(candidates_MD: Tensor, before_M: Tensor, uniform_M: Tensor) -> Tensor:
    """Indices of the candidates that pass: each with probability D²_now / D²_before, in the order drawn."""
    between_MM = torch.cdist(candidates_MD, candidates_MD, compute_mode="donot_use_mm_for_euclid_dist")
    between_MM = between_MM.square().cpu().double()
    now_M = before_M.clone()
    accepted: list[int] = []
    for i, (uniform, before) in enumerate(zip(uniform_M.tolist(), before_M.tolist(), strict=True)):
        if uniform * before < float(now_M[i]):
            accepted.append(i)
            torch.minimum(now_M, between_MM[i], out=now_M)
    return torch.tensor(accepted, dtype=torch.int64)


def _lloyd(
    x_ND: Tensor,
    weight_N: Tensor,
    centroids_KD: Tensor,
    labels_N: Tensor,
    d2_N: Tensor,
    max_iter: int,
    least_shift: float,
    on_sphere: bool,
) -> tuple[Tensor, Tensor, float, int]:
    """Lloyd's iterations from a first assignment; ends on an assignment, so labels match the centroids returned."""
    n_iter = 0
    while n_iter < max_iter:
        n_iter += 1
        _fill_empty(x_ND, weight_N, labels_N, d2_N, len(centroids_KD))
        sums_KD, mass_K = label_sums(x_ND, weight_N, labels_N, len(centroids_KD))
        updated_KD = sums_KD / mass_K.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
        if on_sphere:
            norm_K = updated_KD.norm(dim=1, keepdim=True)
            updated_KD = updated_KD / norm_K.clamp(min=torch.finfo(torch.float64).tiny)
            lost_K = (mass_K == 0) | (norm_K[:, 0] < 1e-12)
        else:
            lost_K = mass_K == 0
        # a cluster without mass, or whose members cancel out on the sphere, has no mean: it stays where it was
        updated_KD = torch.where(lost_K[:, None], centroids_KD.double(), updated_KD).float()
        shift = (updated_KD - centroids_KD).norm(dim=1).max()
        previous_N = labels_N
        centroids_KD = updated_KD
        labels_N, d2_N = nearest(x_ND, centroids_KD)
        settled = torch.stack([shift <= least_shift, (labels_N == previous_N).all()])
        if bool(settled.any()):
            break
    return centroids_KD, labels_N, _inertia(x_ND, weight_N, centroids_KD, labels_N), n_iter


def _repaired(
    x_ND: Tensor,
    weight_N: Tensor,
    run: tuple[Tensor, Tensor, float, int],
    max_iter: int,
    least_shift: float,
    on_sphere: bool,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, float, int]:
    """The run after as many rounds of exchanges and Lloyd's iterations as lower its inertia within max_iter."""
    for _ in range(MAX_REPAIRS):
        centroids_KD, labels_N, inertia, n_iter = run
        if n_iter >= max_iter:
            break
        _, d2_N = nearest(x_ND, centroids_KD)
        moved_KD = exchange(x_ND, weight_N, centroids_KD, labels_N, d2_N, generator)
        if moved_KD is None:
            break
        moved_KD = normalise_(moved_KD) if on_sphere else moved_KD
        first = nearest(x_ND, moved_KD)
        after = _lloyd(x_ND, weight_N, moved_KD, *first, max_iter - n_iter, least_shift, on_sphere)
        if after[2] >= inertia:
            break
        run = (after[0], after[1], after[2], n_iter + after[3])
    return run


def _fill_empty(x_ND: Tensor, weight_N: Tensor, labels_N: Tensor, d2_N: Tensor, k: int) -> None:
    """Gives each empty cluster the point farthest from every centroid and from those given before it, in place."""
    counts_K = torch.bincount(labels_N, minlength=k)
    for empty in torch.nonzero(counts_K == 0).squeeze(1).tolist():
        far = int(torch.where(weight_N > 0, d2_N, 0).argmax())
        if float(d2_N[far]) <= 0:
            return
        chosen_1D = x_ND[far : far + 1].to(d2_N.device)
        labels_N[far] = empty
        # the point's neighbours are near a centroid now, so that the next empty cluster goes elsewhere
        scratch_N = torch.empty_like(labels_N)
        lower_distances(x_ND, d2_N, scratch_N, chosen_1D, 0)


def _inertia(x_ND: Tensor, weight_N: Tensor, centroids_KD: Tensor, labels_N: Tensor) -> float:
    total = torch.zeros((), dtype=torch.float64, device=centroids_KD.device)
    for tile in tiles(len(x_ND), x_ND.shape[1], centroids_KD.device):
        difference_TD = x_ND[tile].to(centroids_KD.device) - centroids_KD[labels_N[tile]]
        total += (difference_TD.square().sum(1) * weight_N[tile]).sum(dtype=torch.float64)
    return float(total)


def _middle(x_ND: Tensor) -> tuple[Tensor, float]:
    """Per-dimension median, and the median distance to it: from evenly spaced rows, and unmoved by outliers."""
    sample = x_ND[:: max(1, len(x_ND) // MIDDLE_ROWS)]
    middle_D = sample.median(dim=0).values
    distance = (sample - middle_D).norm(dim=1)
    typical = float(distance.median())
    return middle_D, typical if typical > 0 else float(distance.mean())


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
    points = points.detach().to(torch.float32)
    if not bool(torch.isfinite(points.sum())) and not bool(torch.isfinite(points).all()):
        raise ValueError("x holds NaN or infinity; drop those rows first")
    return points


def _checked_weight(weight: Array | None, n: int) -> Tensor:
    if weight is None:
        return torch.ones(n)
    weights = torch.as_tensor(weight).detach().to(torch.float32)
    if weights.shape != (n,) or not bool((torch.isfinite(weights) & (weights >= 0)).all()) or not bool(weights.any()):
        raise ValueError(f"weight has shape {tuple(weights.shape)}; give {n} finite numbers >= 0, one of them positive")
    return weights


def _checked_init(init: Array, points: Tensor, offset: Tensor, metric: str, device: torch.device) -> Tensor:
    start = torch.as_tensor(init).detach().to(device, torch.float32)
    if start.ndim != 2 or start.shape[1] != points.shape[1] or len(start) == 0 or not bool(torch.isfinite(start).all()):
        raise ValueError(f"init has shape {tuple(start.shape)}; give finite (K, {points.shape[1]}) centroids")
    start = start - offset
    return normalise_(start.clone()) if metric == "cosine" else start
