"""k-means++ in blocks: distributed exactly as sequential seeding, but with one matrix product per block of seeds.

Suffixes: N points here, M candidates of one block, K seeds, D dims.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rb_gpu.learn.assign import Assignment
from rb_gpu.learn.assign_device import DeviceAssignment
from rb_gpu.learn.progress import step
from rb_gpu.learn.shard import Shard

# largest integer weight of one point in the D² draw: 2^22 of them still sum exactly in int64
DRAW_BITS = 40
# most candidates per block: their pairwise distances are held in float64
MOST_CANDIDATES = 2048
# relative to the squared norms: candidates whose float64 squared distance is below this are duplicates
COPY = 1e-12


def seed_plus_plus(
    points: Assignment | DeviceAssignment,
    shard: Shard,
    k: int,
    generator: torch.Generator,
    given_KD: Tensor | None = None,
) -> Tensor:
    """Draws k-means++ seeds (K, D) float32; `points` then hold the assignment to them.

    They are distributed exactly as those of the sequential algorithm (Arthur & Vassilvitskii 2007). Fewer than k are
    returned where fewer distinct points have weight. given_KD: at most k seeds to begin with, instead of a drawn one.
    """
    points.reset()
    seeds_KD = shard.points(_draw(shard.weight_N.double(), 1, shard, generator)) if given_KD is None else given_KD
    points.lower(seeds_KD, 0)
    return more_seeds(points, shard, seeds_KD, k, generator)


def more_seeds(
    points: Assignment | DeviceAssignment, shard: Shard, seeds_KD: Tensor, k: int, generator: torch.Generator
) -> Tensor:
    """Extends seeds that `points` are already assigned to, up to k (K, D) float32, as k-means++ would.

    A block draws M candidates independently from w·D² as it stood before the block, and accepts each with probability
    D²_now / D²_before. That is rejection sampling from D²_now, the same law as drawing one seed after the other.
    """
    while len(seeds_KD) < k:
        count = min(len(seeds_KD), k - len(seeds_KD), MOST_CANDIDATES)
        drawn_M = _draw(points.d2_N.double() * shard.weight_N, count, shard, generator)
        if len(drawn_M) == 0:
            break
        candidates_MD = shard.points(drawn_M)
        uniform_M = torch.rand(len(drawn_M), dtype=torch.float64, generator=generator, device=shard.device)
        accepted = _accept(candidates_MD, shard.values(points.d2_N, drawn_M).double(), uniform_M)
        first = len(seeds_KD)
        seeds_KD = torch.cat([seeds_KD, candidates_MD[accepted]])
        points.lower(seeds_KD, first)
        step("k-means++", len(seeds_KD), k, "seeds")
    return seeds_KD


def _draw(mass_N: Tensor, count: int, shard: Shard, generator: torch.Generator) -> Tensor:
    """Draws row numbers (count,) over all ranks, independently and with probability proportional to mass (N,) float64;
    an empty tensor where all masses are 0.

    Masses are rounded up to integers so that their running sum is exact: every device and any number of ranks draw the
    same points, and a point of mass 0 is never drawn, not even from the end of the sum.
    """
    largest = shard.ranks.largest(float(mass_N.max()))
    if not largest > 0:
        return torch.empty(0, dtype=torch.int64, device=mass_N.device)
    bits = min(DRAW_BITS, 62 - max(1, shard.count).bit_length())
    # rounding up keeps a positive mass positive, or the last distinct points could not be drawn
    running_N = (mass_N / largest * 2**bits).ceil().to(torch.int64).cumsum(0)
    before, total = shard.ranks.place(int(running_N[-1]))
    uniform_M = torch.rand(count, dtype=torch.float64, generator=generator, device=mass_N.device)
    target_M = (uniform_M * total).to(torch.int64).clamp_(max=total - 1) - before
    here_M = (target_M >= 0) & (target_M < running_N[-1])
    rows_M = torch.searchsorted(running_N, target_M.clamp(min=0), right=True) + shard.first
    return shard.ranks.total(torch.where(here_M, rows_M, 0))


def _accept(candidates_MD: Tensor, before_M: Tensor, uniform_M: Tensor) -> Tensor:
    """Indices of the accepted candidates, each accepted with probability D²_now / D²_before in the order drawn."""
    about_MD = candidates_MD.double() - candidates_MD.double().mean(0)
    norm_M = about_MD.square().sum(1)
    norms_MM = norm_M[:, None] + norm_M
    between_MM = norms_MM - 2 * about_MD @ about_MD.T
    between_MM = torch.where(between_MM > COPY * norms_MM, between_MM, 0).cpu()
    now_M = before_M.cpu().clone()
    accepted: list[int] = []
    for i, (uniform, before) in enumerate(zip(uniform_M.tolist(), before_M.tolist(), strict=True)):
        if uniform * before < float(now_M[i]):
            accepted.append(i)
            torch.minimum(now_M, between_MM[i], out=now_M)
    return torch.tensor(accepted, dtype=torch.int64, device=candidates_MD.device)
