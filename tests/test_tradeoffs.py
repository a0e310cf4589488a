"""Quality over cost: hulls and areas by hand, and a bank's curve on a full table."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rb_gpu.bench.sets import tables
from rb_gpu.learn.config import IndexConfig, JudgeConfig, TrainConfig
from rb_gpu.learn.pipeline import learn
from rb_gpu.learn.tradeoffs import COST_WEIGHTS, Point, area, hull, measure_tradeoffs
from rb_gpu.learn.valuation import Valuation, held_out_outcomes


def points(*places: tuple[float, float]) -> list[Point]:
    return [Point("", cost, quality, False) for cost, quality in places]


def test_a_hull_leaves_out_what_a_mix_beats():
    cost, quality = hull(points((1, 0.2), (2, 0.3), (3, 0.8), (4, 0.5), (5, 0.9), (1, 0.1)))
    assert cost.tolist() == [1, 3, 5] and quality.tolist() == [0.2, 0.8, 0.9]
    assert [v.tolist() for v in hull([])] == [[], []]


places_of = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12)


@given(places_of)
def test_a_hull_is_the_best_mix_of_two_points(places: list[tuple[int, int]]):
    found = points(*((float(c), float(q)) for c, q in places))
    corners = hull(found)
    for at in np.linspace(min(c for c, _ in places), 21.0, 9):
        # the best mix of two points that costs no more, by trying all pairs
        best = max(
            a.quality + share * (b.quality - a.quality)
            for a in found
            for b in found
            for share in [1.0 if b.cost <= at else (at - a.cost) / (b.cost - a.cost) if a.cost <= at else 0.0]
            if a.cost <= at
        )
        assert np.interp(at, *corners) == pytest.approx(best)


def test_areas_by_hand():
    weak, strong = points((1, 0.2), (5, 1.0))
    straight = area([weak, strong], weak, strong)
    assert straight.aiq == pytest.approx(0.6) and straight.apgr == pytest.approx(0.5)
    # the whole gap is closed at half of the range
    middle = points((3, 1.0))[0]
    bent = area([weak, middle, strong], weak, strong)
    assert bent.aiq == pytest.approx((2 * 0.6 + 2 * 1.0) / 4)
    assert bent.apgr == pytest.approx(np.mean([0.1, 0.3, 0.5, 0.7, 0.9, 1, 1, 1, 1, 1]))
    assert math.isnan(area([weak, weak], *points((1, 0.2), (2, 0.1))).apgr)
    # relative to the gap between cheapest and most expensive, which a config in between may more than close
    assert area(points((0, 0.2), (1, 0.8), (2, 0.4)), *points((0, 0.2), (2, 0.4))).apgr > 2


def test_a_banks_curve_of_the_sample():
    training, held_out = tables("sample")["sample"]
    keep = np.arange(len(training.query_id)) % 4 == 0
    config = TrainConfig(judge=JudgeConfig(latency_weight=0.0), index=IndexConfig(kind="off"))
    bank = learn(training.select_queries(keep), config).bank()
    rows = held_out_outcomes(held_out, bank.data.objective)
    valuation = Valuation(rows, [np.full(rows.queries, c) for c in range(len(held_out.configs))])
    found = measure_tradeoffs(bank, held_out, valuation)
    assert len(found.bank) == len(COST_WEIGHTS) and len(found.configs) == len(held_out.configs)
    assert valuation.grade == "exact"
    cost = rows.cost.reshape(-1, 15)[:, 0].mean()
    assert {one.name: one.cost for one in found.configs}[held_out.configs.describe(0)] == pytest.approx(cost)
    by_weight = {float(one.name): one.cost for one in found.bank}
    assert by_weight[10.0] < by_weight[0.2] < by_weight[0.0]
    assert found.bank_area.apgr > found.configs_area.apgr > 0.5
    assert found.bank_area.aiq > found.configs_area.aiq
    cheapest, *_, dearest = sorted(found.configs, key=lambda one: one.cost)
    assert found.configs_area == area(found.configs, cheapest, dearest)
    assert measure_tradeoffs(bank, replace(held_out, cost=None), valuation) is None
