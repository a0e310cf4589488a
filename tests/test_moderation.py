"""Variances of cells compared with loops over their rows, and their effect for rare outcomes and unequal leaves."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from test_posterior import UTILITY, levels, world

from rb_gpu.evidence import Evidence
from rb_gpu.homogeneity import varies
from rb_gpu.moderation import PRIOR_CONFIG_ROWS, alike, degrees_of_freedom, moderated
from rb_gpu.normal import as_normal
from rb_gpu.posterior import believe, effects, widest


def clicks(rng, share, n_PC: np.ndarray) -> list[list[np.ndarray]]:
    """Rows of every leaf and config; share: probability of a 1, (P, C) or broadcastable to it."""
    share_PC = np.broadcast_to(share, n_PC.shape)
    return [
        [(rng.random(n) < q).astype(float) for n, q in zip(*one, strict=True)]
        for one in zip(n_PC, share_PC, strict=True)
    ]


def cells(rows_PC: list[list[np.ndarray]], paired: bool = False) -> Evidence:
    """The evidence of the rows; paired: the rows of a leaf belong to the same queries."""
    n_PC = np.array([[len(y) for y in one] for one in rows_PC])
    evidence = world(np.random.default_rng(0), *n_PC.shape, 1)
    means, squares = np.zeros((2, *evidence.mean.shape)), np.zeros((2, *evidence.comoment.shape))
    for p, rows in enumerate(rows_PC):
        for c, y in enumerate(rows):
            for i, part in enumerate([y, y - rows[0]] if paired else [y]):
                means[i, p, c, 0], squares[i, p, c, 0, 0] = part.mean(), ((part - part.mean()) ** 2).sum()
    w, pair_n = n_PC.astype(float), n_PC * paired
    return evidence._replace(
        rows=n_PC, w=w, w2=w, mean=means[0], comoment=squares[0], pair_rows=pair_n, pair_w=w * paired,
        pair_w2=w * paired, pair_mean=means[1], pair_comoment=squares[1],
    )  # fmt: skip


def z_of_all(evidence: Evidence) -> np.ndarray:
    """The z-score over all leaves of each other config's difference to the first, weighted by inverse variance."""
    effect, variance, _ = effects(evidence, UTILITY.direction, 0, widest(evidence, UTILITY.direction))
    weight = 1.0 / variance[:, 1:]
    return (weight * effect[:, 1:]).sum(0) / np.sqrt(weight.sum(0))


@pytest.mark.parametrize("paired", [False, True])
def test_a_cells_variance_is_its_configs_times_its_leafs_scale(paired):
    # cells of 0 to 20 rows, in leaves of which some scatter three times as much
    rng = np.random.default_rng(10)
    size = rng.integers(0, 20, (12, 4)).astype(float)
    sd = 0.1 * np.where(np.arange(12) % 3, 1.0, 3.0)
    variance = np.where(
        size > 1, sd[:, None] ** 2 * rng.chisquare(np.maximum(size - 1, 1)) / np.maximum(size - 1, 1), np.nan
    )
    variance[:, 3] = np.where(size[:, 3] > 1, 0.0, np.nan)
    usable = [(p, c) for p in range(12) for c in range(3) if size[p, c] > 1]
    every = [(p, c) for p in range(12) for c in range(4) if size[p, c] > 1]
    # the last one never varied: as if one of its rows had, by .3
    freedom_3 = sum(size[i] - 1 for i in every if i[1] == 3)
    overall = (sum((size[i] - 1) * variance[i] for i in every) + 0.3**2) / sum(size[i] - 1 for i in every)
    of_config, scale = np.zeros(4), {}
    of_config[3] = (20 * overall + 0.3**2) / (20 + freedom_3)
    for c in range(3):
        mine = [i for i in usable if i[1] == c]
        squares, freedom = sum((size[i] - 1) * variance[i] for i in mine), sum(size[i] - 1 for i in mine)
        of_config[c] = (20 * overall + squares) / (20 + freedom)
        scale |= {i: variance[i] / of_config[c] for i in mine}
    rows, leaf = np.zeros(12), np.ones(12)
    for p in range(12):
        mine = [i for i in usable if i[0] == p]
        rows[p] = sum(size[i] - 1 for i in mine)
        if mine:
            leaf[p] = sum((size[i] - 1) * scale[i] for i in mine) / rows[p]
    noise = sum((size[i] - 1) * (scale[i] - leaf[i[0]]) ** 2 for i in usable) / (len(usable) - (rows > 0).sum())
    spread = (rows * (leaf - 1) ** 2).sum() - noise * ((rows > 0).sum() - 1)
    spread /= rows.sum() - (rows**2).sum() / rows.sum()
    if paired:
        spread, noise = spread - noise / (rows.sum() / len(usable)), 2 * noise
    assert spread > 0
    expected = np.full(size.shape, np.inf)
    for p in range(12):
        for c in range(4):
            known, freedom = (leaf[p], rows[p])
            if paired:
                known, freedom = scale.get((p, c), 1.0), max(size[p, c] - 1, 0) if c < 3 else 0
            kept = freedom / (freedom + noise / spread)
            correction = 1 + (noise * kept**2 / freedom if freedom else 0)
            if size[p, c] > 0:
                expected[p, c] = of_config[c] * (1 + kept * (known - 1)) * correction / size[p, c]
    np.testing.assert_allclose(moderated(variance, size, paired, 0.3), expected)


@pytest.mark.parametrize("paired", [False, True])
def test_leaves_of_single_rows_tell_nothing_whatever_the_unit(paired):
    # regression: a warning of an overflow, with the weight of latency at its bound
    size, variance = np.array([[5.0, 4.0], [1.0, 1.0]]), np.array([[0.1, 0.2], [np.nan, np.nan]])
    with np.errstate(all="raise"):
        small, large = (moderated(variance * unit**2, size, paired, unit) for unit in (1.0, 1e5))
    np.testing.assert_allclose(large, small * 1e10)


@pytest.mark.parametrize("paired", [False, True])
def test_the_gains_of_rare_outcomes_are_told(paired):
    # regression: leaves without a single click by chance had no variance and dominated: a gain of .02 was estimated as
    # .0006
    told, n_PC = [], np.full((24, 3), 40)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        evidence = cells(clicks(rng, [0.01, 0.02, 0.05], n_PC), paired)
        told.append(believe(evidence, levels(24, [4]), UTILITY, 0, "auto").gain[:-1, 2].mean())
    assert 0.033 < np.mean(told) < 0.043


@pytest.mark.parametrize(("rows", "paired"), [(40, False), (2000, False), (40, True)])
@pytest.mark.parametrize("share", [0.02, 0.95])
def test_what_seldom_fails_is_no_better_for_being_seldom_tried(rows, share, paired):
    # regression: with 40 rows per cell, one leaf in eight had no failure and claimed that the config never fails, while
    # those of a default with 2,000 rows had some; the default seemed worse by five standard errors in every world
    n_PC = np.column_stack([np.full(24, rows), np.full((24, 3), 40)])
    z = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        z.append(z_of_all(cells(clicks(rng, share, n_PC), paired)))
    assert abs(np.mean(z)) < 0.35
    assert 0.7 < np.std(z) < 1.3


def test_a_config_that_never_varied_or_was_never_tried_twice_has_no_error_of_its_own():
    variance, size = np.array([[0.1, 0.0, np.nan], [0.3, 0.0, np.nan]]), np.array([[5.0, 9.0, 1.0], [5.0, 9.0, 1.0]])
    error, prior = alike(variance, size), PRIOR_CONFIG_ROWS
    assert np.isinf(error[:, 1:]).all()
    # squares of 1.6 with 8 degrees of freedom, shrunk towards the variance of both configs that ran twice
    assert error[:, 0] == pytest.approx((prior * 1.6 / 24 + 1.6) / (prior + 8) / 5)


def test_leaves_that_scatter_more_are_trusted_less():
    # regression: with one variance for all leaves, false differences between leaves were found in one of six worlds
    found, apart = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        sd = np.where(np.arange(24) % 3, 0.15, 0.45)
        evidence = cells(list(sd[:, None, None] * rng.normal(size=(24, 4, 40))))
        effect, variance, _ = effects(evidence, UTILITY.direction, 0, widest(evidence, UTILITY.direction))
        found.append(varies(effect, variance, np.full(len(effect[0]), np.inf))[1:].any())
        apart.append(np.median(variance[::3, 1:]) / np.median(variance[1::3, 1:]))
    assert np.mean(found) <= 0.08
    assert 8.0 < np.mean(apart) < 10.0


@pytest.mark.parametrize("paired", [False, True])
def test_what_never_varies_is_believed_by_its_rows(paired):
    # without a spread nothing was known of it, and the default stood however many rows were against it
    def probability(rows: int, leaves: int = 1) -> float:
        evidence = cells([[np.full(rows, worth) for worth in (0.0, 1.0, 0.0)]] * leaves, paired)
        beliefs = believe(evidence, levels(leaves, []), UTILITY, 0, "auto")
        assert (beliefs.probability[:, 2] < 0.5).all()
        return float(beliefs.probability[0, 1])

    assert probability(1) == 0.0
    # by chance three of one kind beat three of another in one draw of twenty, and there are two to try
    assert probability(3) < 0.5
    assert 0.5 < probability(6) < probability(1000)
    assert probability(1000) > 0.9999 and probability(1000, leaves=3) > 0.9999


@pytest.mark.parametrize("paired", [False, True])
def test_where_all_outcomes_are_the_same_nothing_is_known(paired):
    # the mean of rows of .1 by their weights is off by rounding, of which one may be sure
    evidence = cells([[np.full(99, 0.1), np.full(99, 0.1)]] * 4, paired)
    evidence.mean[:, 1, 0] += 2e-17
    evidence.pair_mean[:, 1, 0] += 2e-17 * paired
    beliefs = believe(evidence, levels(4, [2]), UTILITY, 0, "auto")
    assert (beliefs.probability == 0).all()


@pytest.mark.parametrize("constant", [0, 1])
def test_one_config_that_never_varies_is_compared_with_those_that_do(constant):
    # a constant default left all others without a comparison, a constant other was never looked at
    rng = np.random.default_rng(3)
    rows = [[rng.normal(0.5 + 0.1 * c, 0.1, 50) for c in range(2)] for _ in range(8)]
    for leaf in rows:
        leaf[constant][:] = 0.5 + 0.1 * constant
    beliefs = believe(cells(rows), levels(8, [2]), UTILITY, 0, "auto")
    assert (beliefs.probability[:, 1] > 0.99).all()
    np.testing.assert_allclose(beliefs.gain[:, 1], 0.1, atol=0.03)


def test_a_leaf_without_spread_keeps_its_own_rows():
    # its scale was 0, and so its variance, which was taken for no rows: it was surely what the other leaf is
    noisy, worth = np.tile([0.0, 1.0], 100), (0.0, 1.0, 0.0)
    evidence = cells([[noisy, np.zeros(200), noisy], [np.full(100, v) for v in worth]])
    beliefs = believe(evidence, levels(2, []), UTILITY, 1, "auto")
    assert (beliefs.probability[0, [0, 2]] > 0.99).all()
    assert (beliefs.probability[1, [0, 2]] < 0.01).all()


@pytest.mark.parametrize("leaves", [1, 3])
def test_few_pairs_do_not_show_how_they_scatter(leaves):
    # regression: 3 pairs of each config were tested by the normal distribution, as if their variance were known, and a
    # bank acted in one of seven worlds where nothing differs
    acted = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        per_leaf = rng.multinomial(3, np.full(leaves, 1 / leaves), size=5)
        difference = [[0.15 * np.sqrt(1.25) * rng.normal(size=per_leaf[c, p]) for c in range(5)] for p in range(leaves)]
        evidence = pairs(difference, 24 // leaves)
        acted.append((believe(evidence, levels(leaves, []), UTILITY, 0, "auto").choose(0.8, 0, False) != 0).any())
    assert np.mean(acted) <= 0.06


def pairs(difference: list[list[np.ndarray]], queries: int) -> Evidence:
    """Evidence of configs that ran on some queries of the default (config 0), with these differences to it."""
    known = [[np.zeros(queries), *(y if len(y) else np.zeros(1) for y in one)] for one in difference]
    evidence, n_PC = cells(known), np.array([[queries, *map(len, one)] for one in difference])
    w = n_PC.astype(float)
    return evidence._replace(
        rows=n_PC, w=w, w2=w, pair_rows=n_PC, pair_w=w, pair_w2=w, pair_mean=evidence.mean,
        pair_comoment=evidence.comoment,
    )  # fmt: skip


def test_a_few_rows_test_as_students_t_and_f_do():
    t, freedom = np.array([0.5, 1.5, 3.0, 6.0]), np.array([2.0, 5.0, 20.0, np.inf])
    tails = [stats.norm.sf(as_normal(t, np.full(4, one))) for one in freedom]
    exact = [stats.t.sf(t, one) if np.isfinite(one) else stats.norm.sf(t) for one in freedom]
    np.testing.assert_allclose(tails, exact, rtol=0.13)
    # Cochran's Q of 6 leaves over its degrees of freedom, at and just past the critical values of F
    for freedom_of_variance in (4.0, 10.0, 60.0, 1e9):
        critical = stats.f.isf(0.025, 5, freedom_of_variance)
        effect = np.array([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])[:, None]
        for factor, found in ((0.9, False), (1.1, True)):
            variance = np.full((6, 1), 6.0 / 5.0 / (factor * critical))
            assert varies(effect, variance, np.array([freedom_of_variance]))[0] == found


def test_the_freedom_of_a_shrunk_variance_is_that_of_its_scatter():
    rng = np.random.default_rng(0)
    size = np.array([[4.0, 9.0, 31.0], [3.0, 12.0, 1.0]])
    found = degrees_of_freedom(np.where(size > 1, 1.0, np.nan), size, None)
    total = np.maximum(size - 1, 0).sum(0)
    assert (found >= total).all() and (found <= total.sum() * 1.001).all()
    own = total / (20 + total)
    of_config = rng.chisquare(total, (4000, 3)) / total
    shrunk = own * of_config + (1.0 - own) * (of_config @ total / total.sum())[:, None]
    np.testing.assert_allclose(found, 2.0 / shrunk.var(0), rtol=0.1)
