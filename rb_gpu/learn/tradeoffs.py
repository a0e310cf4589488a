"""Quality over cost: the curve of one bank as cost weighs more, beside single configs and mixes of them.

Suffixes: Q queries, C configs, K points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from rb_gpu.bank import ReasoningBank
from rb_gpu.learn.trajectories import Trajectories
from rb_gpu.learn.valuation import Choice, Valuation
from rb_gpu.types import Tradeoff

Floats = npt.NDArray[np.float64]

# weights of cost, as a share of its reference, relative to quality
COST_WEIGHTS = (0.0, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
GRID = 10


@dataclass(frozen=True)
class Point:
    """Mean cost and quality on held-out queries. name: the bank's cost weight, or the parameters of a single config.

    on_hull: whether no mix of the other points of its curve is as good at its cost.
    """

    name: str
    cost: float
    quality: float
    on_hull: bool


@dataclass(frozen=True)
class Area:
    """A curve summarised in one number, by two measures.

    aiq: average improvement in quality (RouterBench, arXiv 2403.12031): area under the non-decreasing concave hull of
    quality over cost, divided by the range of cost. apgr: average performance gap recovered (RouteLLM, arXiv
    2406.18665): 0 for the cheapest config everywhere, .5 for even mixes of it with the dearest, above 1 if the curve is
    on average better than the dearest config, which need not be the best; NaN if the dearest is no better than the
    cheapest.
    """

    aiq: float
    apgr: float


@dataclass(frozen=True)
class Tradeoffs:
    """The bank's curve beside the single configs, between the costs of the cheapest and the dearest of these.

    bank, configs: points that have a value, by increasing cost. configs_area: of the configs' hull, the best that mixes
    of single configs achieve without looking at the query (RouterBench's Zero router).
    """

    bank: list[Point]
    configs: list[Point]
    bank_area: Area
    configs_area: Area


def choices(bank: ReasoningBank, table: Trajectories, tradeoff: Tradeoff | None = None) -> Choice:
    """What the bank picks for each query (Q,), as config ids of the table; -1 where the table lacks the config."""
    ids = [table.configs.id_of(params) for params in bank.configs]
    known = np.array([-1 if one is None else one for one in ids])
    return np.asarray(known[bank.optimized_params_batch(table.x_QD, tradeoff)["config_id"]])


def measure_tradeoffs(bank: ReasoningBank, held_out: Trajectories, valuation: Valuation) -> Tradeoffs | None:
    """The trade-offs on held-out queries, valued by the valuation's grade. None if no cost was logged or all costs are
    equal, or if the bank cannot answer for another trade-off (only judge.method=eb judge.objective=utility can).
    """
    objective = bank.data.objective
    if held_out.cost is None or bank.data.method != "eb" or objective.kind != "utility":
        return None

    def points(named: Sequence[tuple[str, Choice]]) -> list[Point]:
        found = []
        for name, choice_Q in named:
            if valuation.refusal(choice_Q) is None:
                cost, quality = (valuation.estimate(column, choice_Q).value for column in ("cost", "quality"))
                found.append(Point(name, cost, quality, on_hull=False))
        corners = {(cost, quality) for cost, quality in zip(*hull(found), strict=True)}
        found = [replace(point, on_hull=(point.cost, point.quality) in corners) for point in found]
        return sorted(found, key=lambda point: (point.cost, point.quality))

    queries = len(held_out.query_id)
    single = points([(held_out.configs.describe(c), np.full(queries, c)) for c in range(len(held_out.configs))])
    if len(single) < 2 or not single[-1].cost > single[0].cost:
        return None
    swept = points([
        (f"{weight:g}", choices(bank, held_out, Tradeoff(objective.latency_weight, weight))) for weight in COST_WEIGHTS
    ])  # fmt: skip
    weak, strong = single[0], single[-1]
    return Tradeoffs(swept, single, area([*swept, weak], weak, strong), area(single, weak, strong))


def hull(points: Sequence[Point]) -> tuple[Floats, Floats]:
    """Cost and quality (K,) of the corners of the least non-decreasing concave curve over all points: what random mixes
    of them reach, if a dearer choice never counts as worse.
    """
    corners: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda one: (one.cost, -one.quality)):
        if corners and point.quality <= corners[-1][1]:
            continue
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) <= _slope(corners[-1], (point.cost, point.quality)):
            corners.pop()
        corners.append((point.cost, point.quality))
    cost_K, quality_K = np.array(corners, dtype=np.float64).reshape(-1, 2).T
    return cost_K, quality_K


def _slope(start: tuple[float, float], end: tuple[float, float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])


def area(points: Sequence[Point], weak: Point, strong: Point) -> Area:
    """The area of the hull of the points between the costs of weak and strong, the cheapest and the dearest config. One
    of the points must cost no more than weak.

    APGR: RouteLLM averages PGR = (quality − weak's) / (strong's − weak's) over shares of calls to the stronger of two
    models. With more configs there is no such share. PGR is instead read off the hull at the midpoints of GRID equal
    steps of (cost − weak's) / (strong's − weak's), which for two configs is that share.
    """
    cost_K, quality_K = hull(points)
    # to the right, interp continues with the last corner's quality, so that the curve does not fall
    inside = cost_K[(cost_K > weak.cost) & (cost_K < strong.cost)]
    at = np.concatenate([[weak.cost], inside, [strong.cost]])
    quality = np.interp(at, cost_K, quality_K)
    aiq = float(np.diff(at) @ (quality[1:] + quality[:-1]) / 2.0) / (strong.cost - weak.cost)
    middles = weak.cost + (strong.cost - weak.cost) * (np.arange(GRID) + 0.5) / GRID
    gap = strong.quality - weak.quality
    recovered = np.interp(middles, cost_K, quality_K) - weak.quality
    return Area(aiq, float(recovered.mean() / gap) if gap > 0 else float("nan"))
