"""judge.half_life=auto: planted drift is followed, stationary worlds get no decay, and the sums equal brute force."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rb_gpu.learn import learn
from rb_gpu.learn.config import JudgeConfig, QualityConfig
from rb_gpu.learn.decay import BLOCKS, GROUPS, HalfLife, auto_half_life, choose_half_life

DAY = 86_400
SPAN_DAYS = 60


def world(
    seed: int, rows: int = 6000, patterns: int = 12, configs: int = 3, change: str = "none", full: bool = False
) -> HalfLife:
    """Bernoulli outcomes with patterns of unequal difficulty; half-way nothing, the ranking or the level changes."""
    rng = np.random.default_rng(seed)
    queries = rows // configs if full else rows
    query = np.repeat(np.arange(queries), configs) if full else np.arange(queries)
    config = np.tile(np.arange(configs), queries) if full else rng.integers(configs, size=rows)
    time = np.sort(rng.integers(0, SPAN_DAYS * DAY, size=queries))
    pattern = rng.integers(patterns, size=queries)
    before = rng.uniform(0.3, 0.7, size=(patterns, 1)) + rng.uniform(-0.2, 0.2, size=(patterns, configs))
    after = {"none": before, "flip": before[:, ::-1], "shift": before - 0.2}[change]
    mean = np.where((time < SPAN_DAYS * DAY / 2)[query], before[pattern[query], config], after[pattern[query], config])
    hit = (rng.random(len(query)) < mean).astype(float)
    mixed = rng.permutation(len(query))
    cell = pattern[query] * configs + config
    return choose_half_life(
        time[query][mixed], query[mixed], cell[mixed], (patterns, configs), np.ones(len(query)), hit[mixed]
    )


@pytest.mark.parametrize(
    ("rows", "patterns", "configs", "full"),
    [(6000, 12, 3, False), (6000, 12, 3, True), (1000, 20, 5, False), (12_000, 80, 8, False), (4000, 1, 2, False)],
)
def test_a_stationary_world_gets_no_decay(rows, patterns, configs, full):
    found = [world(seed, rows, patterns, configs, full=full).half_life_days for seed in range(100)]
    assert np.mean([days is None for days in found]) >= 0.95


@pytest.mark.parametrize("half_life", [1.0, 1e-9])
def test_rows_that_have_lost_all_weight_do_no_harm(learned, half_life):
    # regression: squares of the weights vanished where a config ran only thousands of half-lives ago, and training
    # ended in "score is not finite; the artifact is damaged" or a traceback of the field
    table = learned.trajectories
    time = np.where(table.config_id == 1, 0, 4000 * DAY) + np.arange(len(table))
    judging = replace(learned.config.judge, half_life=half_life)
    config = replace(learned.config, judge=judging, cluster=replace(learned.config.cluster, k="auto"))
    bank = learn(replace(table, timestamp=time), config).bank()
    assert np.isfinite(bank.optimized_params_batch(table.x_QD[:50])["confidence"]).all()


@pytest.mark.parametrize("change", ["flip", "shift"])
@pytest.mark.parametrize("full", [False, True])
def test_planted_drift_is_followed(change, full):
    found = [world(seed, 9000, change=change, full=full) for seed in range(10)]
    days = [one.half_life_days for one in found]
    assert np.mean([each is not None and each < SPAN_DAYS for each in days]) >= 0.9
    # among the half-lives that significantly beat no decay, the one with the largest gain
    for one in found:
        told = zip(one.gain, one.error, one.candidates_days, strict=True)
        sure = [(gain, each) for gain, error, each in told if gain > 1.5 * error]
        assert one.half_life_days == (max(sure)[1] if sure else None)


def test_gain_and_error_are_those_of_brute_force():
    rng = np.random.default_rng(3)
    n, patterns, configs = 600, 3, 2
    time = np.sort(rng.integers(0, 10 * DAY, size=n))
    cell, weight = rng.integers(patterns * configs, size=n), rng.uniform(0.5, 2.0, size=n)
    weight /= weight.mean()
    utility = rng.normal(size=n) + 0.5 * cell + time / DAY / 10
    found = choose_half_life(time, np.arange(n), cell, (patterns, configs), weight, utility)
    group = np.random.default_rng(0).integers(GROUPS, size=n)

    # the prior's weight in rows: variance within cells over the variance between a config's patterns
    spread, mean = (weight**2).mean(), np.empty(patterns * configs)
    size = np.array([weight[cell == u].sum() for u in range(len(mean))])
    for u in range(len(mean)):
        mean[u] = np.average(utility[cell == u], weights=weight[cell == u])
    within = (weight * (utility - mean[cell]) ** 2).sum() / (n / spread - len(mean))
    between = extra = 0.0
    for c in range(configs):
        of = np.arange(len(mean)) % configs == c
        middle = np.average(mean[of], weights=size[of])
        between += (size[of] * (mean[of] - middle) ** 2).sum() - (of.sum() - 1) * within
        extra += size[of].sum() - (size[of] ** 2).sum() / size[of].sum()
    prior = within / (between / extra)

    def loss(keep: np.ndarray, seconds: float) -> tuple[float, float]:
        lost = seen = 0.0
        for b in range(1, BLOCKS):
            start, stop = b * n // BLOCKS, (b + 1) * n // BLOCKS
            w = np.where(keep, weight, 0.0)[:start] * 2.0 ** (-(time[start - 1] - time[:start]) / seconds)
            for i in np.flatnonzero(keep[start:stop]) + start:
                same, config = cell[:start] == cell[i], cell[:start] % configs == cell[i] % configs
                root = (w * utility[:start])[config].sum() / w[config].sum()
                predicted = ((w * utility[:start])[same].sum() + prior * root) / (w[same].sum() + prior)
                lost += weight[i] * (utility[i] - predicted) ** 2
                seen += weight[i]
        return lost, seen

    def gain(keep: np.ndarray, days: float) -> float:
        (plain, seen), (decayed, _) = loss(keep, np.inf), loss(keep, days * DAY)
        return (plain - decayed) / seen

    # a config that never ran changes nothing
    wider = cell // configs * (configs + 1) + cell % configs
    more = choose_half_life(time, np.arange(n), wider, (patterns, configs + 1), weight, utility)
    assert more.gain == pytest.approx(found.gain) and more.error == pytest.approx(found.error)
    for h in (0, 2):
        assert found.gain[h] == pytest.approx(gain(np.ones(n, bool), found.candidates_days[h]), rel=1e-9)
    left_out = np.array([gain(group != g, found.candidates_days[2]) for g in range(GROUPS)])
    assert found.error[2] == pytest.approx(np.sqrt((GROUPS - 1) * left_out.var()), rel=1e-9)


def test_rows_without_a_pattern_and_the_scale_of_weights_change_nothing():
    rng = np.random.default_rng(4)
    time, cell, y = rng.integers(0, DAY, size=900), rng.integers(6, size=900), rng.random(900)
    found = choose_half_life(time, np.arange(900), cell, (3, 2), np.full(900, 7.0), y)
    more = [np.concatenate([x, x[:100] * 0 - 1]) for x in (time, cell, y)]
    again = choose_half_life(more[0], np.arange(1000) % 900, more[1], (3, 2), np.ones(1000), more[2])
    np.testing.assert_allclose(found.gain, again.gain, rtol=1e-9)


@pytest.mark.parametrize("rows", [3, 500])
def test_few_rows_or_one_moment_give_none(rows):
    time = np.full(rows, 5) if rows == 500 else np.arange(rows)
    zeros = np.zeros(rows, dtype=np.int64)
    found = choose_half_life(time, np.arange(rows), zeros, (1, 1), np.ones(rows), np.arange(rows) / rows)
    assert found.half_life_days is None
    assert np.isnan(found.gain).all()


def test_constant_outcomes_and_a_config_seen_once_give_none():
    rng = np.random.default_rng(5)
    cell = rng.integers(2, size=400) * 2
    cell[399] = 1
    found = choose_half_life(np.arange(400), np.arange(400), cell, (2, 2), np.ones(400), np.full(400, 0.5))
    assert found.half_life_days is None
    assert np.isfinite(found.gain).all()


def test_auto_reaches_evidence_and_facts(learned):
    # in the second half of the time every outcome is inverted
    rows = learned.trajectories
    late = rows.timestamp > np.median(rows.timestamp)
    turned = replace(rows, precision=np.where(late, 1 - rows.precision, rows.precision).astype(np.float32))
    turned = replace(turned, recall=turned.precision)
    auto = replace(learned.config, judge=JudgeConfig(half_life="auto"))
    bank = learn(turned, auto)
    days = bank.data.facts["half_life"]["half_life_days"]
    assert 0 < days < SPAN_DAYS
    assert bank.data.facts["config"]["judge"]["half_life"] == "auto"
    np.testing.assert_array_equal(np.isnan(bank.data.arrays["verdict_p_sequential"]), True)
    assert bank.data.evidence.w.sum() < 0.8 * bank.data.evidence.rows.sum()
    # nothing changes over time here: the bank is the same as without decay
    plain, still = learned.bank, learn(rows, auto)
    assert still.data.facts["half_life"]["half_life_days"] is None
    assert plain.data.facts["half_life"] is None
    for name, array in plain.data.arrays.items():
        np.testing.assert_array_equal(still.data.arrays[name], array, err_msg=name)
    found = auto_half_life(turned, bank.label_Q, auto.judge, QualityConfig(), torch.device("cpu"))
    assert found.half_life_days == days
