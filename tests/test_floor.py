"""What a floor saves on easy queries is spent on hard ones, and the mean quality of every pattern keeps its target."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from rb_gpu.bank_data import NO_CHANCE  # noqa: E402
from rb_gpu.learn import learn  # noqa: E402
from rb_gpu.learn.abstention import out_of_reach  # noqa: E402
from rb_gpu.learn.config import ClusterConfig, IndexConfig, JudgeConfig, ParamsConfig, TrainConfig  # noqa: E402
from rb_gpu.learn.floor import Unseen, spend  # noqa: E402
from rb_gpu.learn.trajectories import Source, assemble  # noqa: E402
from rb_gpu.learn.valuation import held_out_outcomes  # noqa: E402
from rb_gpu.objective import Objective, choose  # noqa: E402
from rb_gpu.posterior import Beliefs  # noqa: E402

COST = np.array([1.0, 2.0, 4.0, 8.0])


def world(seed: int, sd: float = 1e-9):
    """Two leaves of 200 queries; recall rises with the config, from a start that depends on the query's hardness."""
    rng = np.random.default_rng(seed)
    label = np.repeat([0, 1], 200)
    hard = rng.uniform(0.0, 0.3, 400) + 0.05 * label
    quality = 1.0 - hard[:, None] / COST
    mean = np.stack([quality[label == p].mean(0) for p in (0, 1)])
    mean = np.vstack([mean, mean.mean(0)])
    nothing, flat = np.zeros((3, 4)), np.full((3, 4), sd)
    score = np.tile(-COST, (3, 1))
    beliefs = Beliefs(nothing, nothing, nothing, score, mean, np.zeros(4), mean, mean - 0.95, flat)
    return beliefs, Unseen(quality, label)


def served(beliefs: Beliefs, unseen: Unseen, least_z: float) -> np.ndarray:
    """The config that a lookup in the middle of each leaf would choose for every query."""
    apart = unseen.quality_QC - beliefs.quality[unseen.label_Q]
    test = beliefs.test[unseen.label_Q] + apart - least_z * beliefs.test_sd[unseen.label_Q]
    return choose(beliefs.score[unseen.label_Q], test, unseen.quality_QC, 0.0, 0, likeliest=True)


def test_every_leaf_keeps_the_target_at_less_cost():
    beliefs, unseen = world(0)
    each = np.arange(400)
    before, after = (served(b, unseen, 0.0) for b in (beliefs, spend(beliefs, unseen, 0.95, 0.5, 0)))
    assert COST[after].mean() < 0.85 * COST[before].mean()
    for leaf in (0, 1):
        mine = unseen.label_Q == leaf
        reached = unseen.quality_QC[each, after][mine].mean()
        assert 0.95 <= reached < 0.952 < unseen.quality_QC[each, before][mine].mean()


def test_a_surer_floor_costs_more():
    beliefs, unseen = world(1, sd=0.01)
    half, sure = (served(spend(beliefs, unseen, 0.95, p, 0), unseen, z) for p, z in ((0.5, 0.0), (0.9, 1.2815516)))
    each = np.arange(400)
    assert COST[half].mean() < COST[sure].mean()
    assert unseen.quality_QC[each, sure].mean() == pytest.approx(0.95 + 1.28 * 0.01, abs=2e-3)


def test_a_leaf_out_of_reach_and_one_without_queries_keep_the_target():
    beliefs, unseen = world(2)
    spent = spend(
        beliefs, Unseen(unseen.quality_QC - 0.5 * (unseen.label_Q == 0)[:, None], unseen.label_Q), 0.95, 0.5, 0
    )
    # the leaf's own belief decides, not the field's overall level
    assert spent.test[0] == pytest.approx(spend(beliefs, unseen, 0.95, 0.5, 0).test[0])
    poor = Beliefs(**{**beliefs.__dict__, "quality": beliefs.quality - [[0.5], [0.0], [0.0]]})
    assert np.array_equal(spend(poor, unseen, 0.95, 0.5, 0).test[0], beliefs.test[0])
    alone = Unseen(unseen.quality_QC, np.where(unseen.label_Q == 0, -1, 1))
    assert np.array_equal(spend(beliefs, alone, 0.95, 0.5, 0).test[[0, 2]], beliefs.test[[0, 2]])


def test_where_a_floor_is_out_of_reach_the_job_says_so():
    # regression: such patterns ran the dearest config, and nothing told why the bank cost more than a single config
    beliefs, judging = world(0)[0], JudgeConfig(objective="floor", min_probability=0.8)
    floor = Objective("floor", "f1", 0.0, 0.0, 1.0, 1.0, 0.99, None, None)
    reached = np.array([[0.1, 0.9, 0.9, 0.9], [0.1, 0.2, 0.3, 0.79], [0.0, 0.0, 0.0, 0.0]])
    said = out_of_reach(replace(beliefs, probability=reached), floor, judging)
    assert said is not None and said.startswith("judge.target=0.99: in 1 of 2 patterns no config reaches it")
    assert out_of_reach(replace(beliefs, probability=reached), replace(floor, kind="utility"), judging) is None
    assert out_of_reach(replace(beliefs, probability=np.maximum(reached, 0.8)), floor, judging) is None


def test_the_probability_is_that_of_the_test():
    beliefs, unseen = world(3, sd=0.02)
    spent = spend(beliefs, unseen, 0.95, 0.8, 0)
    assert ((spent.probability > 0.5) == (spent.test > 0)).all()
    assert (spent.test - beliefs.test).max() > 0.005 and (spent.test[-1] == beliefs.test[-1]).all()
    exact, unseen = world(3, sd=0.0)
    exact.test[:, 3] = NO_CHANCE  # never ran
    spent = spend(exact, unseen, 0.95, 0.8, 0)
    assert np.array_equal(spent.probability, spent.test >= 0.0)
    assert not spent.probability[:, 3].any() and spent.probability[:, :3].any()


def test_the_bar_does_not_settle_just_above_a_config_that_breaks_the_floor():
    # regression: it did where all predictions are alike, and a lookup's rounding served it to half the queries
    quality = np.tile([0.93, 0.99, 0.99, 0.99], (400, 1))
    mean, nothing = np.tile(quality[0], (3, 1)), np.zeros((3, 4))
    beliefs = Beliefs(
        nothing, nothing, nothing, np.tile(-COST, (3, 1)), mean, np.zeros(4), mean, mean - 0.95, nothing + 0.02
    )
    spent = spend(beliefs, Unseen(quality, np.repeat([0, 1], 200)), 0.95, 0.8, 0)
    sure = spent.test - 0.8416 * spent.test_sd
    assert (sure[:2, 0] < -0.01).all() and (sure[:2, 1:] > 0.01).all()


@pytest.mark.parametrize(("rows", "chosen"), [(3, 1), (10, 1), (60, 0)])
@pytest.mark.parametrize("failures", [0, 3])
def test_a_cheap_config_needs_enough_perfect_rows(rows, chosen, failures):
    # regression: 3 of them were certain. Where the default's own failures leave its floor in doubt, the 3 rows had the
    # highest quality of all, and were chosen for that
    config = np.repeat([0, 1], [rows, 60])
    quality = np.ones(len(config), np.float32)
    quality[rows : rows + failures] = 0.0
    each = np.arange(len(config))
    columns = {
        "id": each.astype(np.uint64), "query_id": each.astype(np.uint64), "query_row": each, "query_time": each,
        "x_QD": (1.0 + 0.1 * np.random.default_rng(0).normal(size=(len(config), 8))).astype(np.float32),
        "timestamp": each, "ef_search": 16 * (config + 1).astype(np.uint32), "precision": quality, "recall": quality,
        "latency_us": np.full(len(config), 1000), "cost": (config + 1).astype(np.float32),
    }  # fmt: skip
    trajectories = assemble(columns, [], ParamsConfig(default={"ef_search": 32}), Source())
    judging = JudgeConfig(objective="floor", target=0.95, latency_weight=0.0)
    given = TrainConfig(cluster=ClusterConfig(k=1), judge=judging, index=IndexConfig(kind="off"))
    bank = learn(trajectories, given).bank()
    assert (bank.optimized_params_batch(trajectories.x_QD)["config_id"] == chosen).all()
    assert all(bank.optimized_params(x).config_id == chosen for x in trajectories.x_QD[:5])


def test_delayed_answers_do_not_make_the_fastest_config_dear():
    # regression: without logged costs a floor took the config of least mean latency in each leaf, i.e. the one that the
    # machine happened not to delay, and the value of every policy was that of the delays
    rng = np.random.default_rng(0)
    n, configs = 4000, 5
    config = rng.integers(configs, size=n)
    latency_us = 100 * 2.0**config * np.where(rng.random(n) < 0.02, 500, rng.uniform(0.8, 1.2, n))
    quality = np.where(rng.random(n) < np.where(config == 0, 0.3, 0.02), 0.0, 1.0).astype(np.float32)
    kind, each = rng.integers(8, size=n), np.arange(n)
    columns = {
        "id": each.astype(np.uint64), "query_id": each.astype(np.uint64), "query_row": each, "query_time": each,
        "x_QD": (4 * np.eye(8)[kind] + 0.5 * rng.normal(size=(n, 8))).astype(np.float32), "timestamp": each,
        "ef_search": 16 * (config + 1).astype(np.uint32), "precision": quality, "recall": quality,
        "latency_us": latency_us.astype(np.int64), "propensity": np.full(n, 1 / configs, np.float32),
    }  # fmt: skip
    trajectories = assemble(columns, [], ParamsConfig(default={"ef_search": 80}), Source())
    judging = JudgeConfig(objective="floor", target=0.9)
    given = TrainConfig(cluster=ClusterConfig(k=32), judge=judging, index=IndexConfig(kind="off"))
    bank = learn(trajectories, given).bank()
    picks = np.bincount(bank.optimized_params_batch(trajectories.x_QD)["config_id"], minlength=configs) / n
    assert picks[1] > 0.9 and picks[0] < 0.02, picks
    told = held_out_outcomes(trajectories, bank.data.objective).utility
    assert abs(told[config == 4].mean() - told[config == 3].mean() + 1.0) < 0.3  # an octave, less chance
