"""Pooling compared with an exact multivariate normal and statsmodels, and tested in worlds without differences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracles
import pytest
from scipy.optimize import brentq
from scipy.stats import norm
from statsmodels.stats.meta_analysis import combine_effects

from rb_gpu.bank_data import NO_CHANCE
from rb_gpu.evidence import OUTCOMES, Evidence
from rb_gpu.field import Field
from rb_gpu.homogeneity import varies
from rb_gpu.moderation import moderated
from rb_gpu.normal import normal_cdf
from rb_gpu.objective import Objective, choose
from rb_gpu.pooling import _drawn_together, paule_mandel, pool
from rb_gpu.posterior import _predicted, believe, effects, surely_better, widest

UTILITY = Objective("utility", "f1", 0.0, 0.0, 1.0, 1.0, 0.95, None, None)


def levels(leaves: int, counts: list[int]) -> list[np.ndarray]:
    out, below = [], leaves
    for count in counts:
        out.append((np.arange(below) * count // below).astype(np.int64))
        below = count
    return out


def world(rng, leaves: int, configs: int, rows: int, effect=0.0, sd: float = 0.1) -> Evidence:
    """Cells of a table in which a config's quality is 0.5 + effect in every leaf."""
    n = rng.poisson(rows, (leaves, configs)).astype(np.int64)
    w = n.astype(float)
    mean, comoment = np.zeros((leaves, configs, 4)), np.zeros((leaves, configs, 4, 4))
    mean[..., 0] = np.where(n > 0, 0.5 + effect + rng.normal(size=n.shape) * sd / np.sqrt(np.maximum(n, 1)), 0)
    comoment[..., 0, 0] = np.where(n > 1, sd**2 * rng.chisquare(np.maximum(n - 1, 1)), 0)
    z, zi = np.zeros(n.shape), np.zeros(n.shape, np.int64)
    return Evidence(n, w, w, mean, comoment, z, z, z, np.zeros((*n.shape, 64)), zi, z, z, mean * 0, comoment * 0)


def test_paule_mandel_is_statsmodels():
    rng = np.random.default_rng(0)
    variance = rng.uniform(0.5, 2.0, 30)
    effect = rng.normal(size=30) * np.sqrt(variance + 1.5)
    ours = paule_mandel(effect[:, None], variance[:, None], np.zeros(30, np.int64), 1)[0]
    theirs = combine_effects(effect, variance, method_re="iterated", atol=1e-10).tau2
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours == pytest.approx(oracles.paule_mandel(effect.tolist(), variance.tolist()), rel=1e-5)


def test_pooling_is_exact_in_the_normal_tree():
    # the same posterior from one joint normal distribution over the root, the nodes and the leaves
    rng = np.random.default_rng(1)
    parents = levels(8, [3])
    variance = rng.uniform(0.2, 1.0, 8)
    node = rng.normal(size=3) * 2
    effect = node[parents[0]] + rng.normal(size=8) * np.sqrt(variance + 0.5)
    mean, var, _ = pool(effect[:, None], variance[:, None], parents, tested=False)
    tau_leaf = paule_mandel(effect[:, None], variance[:, None], parents[0], 3)[0]
    precision = 1 / (variance + tau_leaf)
    up = np.bincount(parents[0], weights=precision * effect) / np.bincount(parents[0], weights=precision)
    up_var = 1 / np.bincount(parents[0], weights=precision)
    tau_node = paule_mandel(up[:, None], up_var[:, None], np.zeros(3, np.int64), 1)[0]
    same_node = parents[0][:, None] == parents[0][None]
    flat = 1e4
    prior = flat + tau_node * same_node + tau_leaf * np.eye(8)
    gain = prior @ np.linalg.inv(prior + np.diag(variance))
    np.testing.assert_allclose(mean[:, 0], gain @ effect, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(var[:, 0], np.diag(prior - gain @ prior), rtol=1e-3)


def test_configs_of_few_rows_show_together_that_leaves_differ():
    # each config is better by 5 standard errors in about one leaf of 32, which a test over its 32 leaves seldom finds
    right, moved = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        best, effect, variance = rng.integers(60, size=32), rng.normal(size=(32, 60)), np.ones((32, 60))
        moved.append(np.abs(pool(effect, variance, [], True, gated=True)[0]).mean())
        effect[np.arange(32), best] += 5.0
        right.append(
            [(pool(effect, variance, [], True, gated=way)[0].argmax(1) == best).mean() for way in (False, True)]
        )
    alone, together = np.mean(right, axis=0)
    assert alone < 0.75 < 0.9 < together
    # if nothing differs, hardly anything is believed
    assert np.mean(moved) < 0.05


def test_a_lone_child_counts_its_rows_once():
    # if the child's rows were in both the parent's posterior, used as its prior, and its own, the variance would halve
    mean, var, _ = pool(np.array([[0.3]]), np.array([[0.04]]), [np.zeros(1, np.int64)] * 3, tested=False)
    assert (mean[0, 0], var[0, 0]) == (pytest.approx(0.3), pytest.approx(0.04))


def test_a_cell_without_rows_gets_its_neighbours_belief():
    effect, variance = np.array([[0.2], [0.2], [0.0]]), np.array([[1e-4], [1e-4], [np.inf]])
    mean, var, _ = pool(effect, variance, [np.array([0, 0, 0])], tested=False)
    assert mean[2, 0] == pytest.approx(0.2)
    assert 0 < var[2, 0] < 1e-3


def test_the_roots_variance_is_that_before_any_test():
    # regression: the test shrank the very array that had been kept for the margin
    effect, variance = 0.01 * np.random.default_rng(0).normal(size=(30, 3)), np.full((30, 3), 0.01)
    mean, var, root = pool(effect, variance, [], tested=True)
    np.testing.assert_allclose(root, 0.01 / 30)
    assert (np.abs(mean) < 1e-6).all() and (var < 1e-4 * root).all()


@pytest.mark.parametrize("differing", [0.0, 0.3])
def test_a_margin_of_its_own_is_the_sampling_error_over_the_leaves(differing):
    # regression: it counted how leaves differ, and was next to 0 for a config that no test found to differ
    rng = np.random.default_rng(0)
    evidence = world(rng, 12, 3, 50)
    evidence.mean[:, 1, 0] += differing * np.where(np.arange(12) % 2, 1.0, -1.0)
    beliefs = believe(evidence, levels(12, [3]), UTILITY, 0, "auto")
    _, variance, _ = effects(evidence, UTILITY.direction, 0, widest(evidence, UTILITY.direction))
    np.testing.assert_allclose(beliefs.margin[1:], (1 / variance[:, 1:]).sum(0) ** -0.5)
    assert beliefs.margin[0] == 0.0


def test_two_level_posterior_is_the_oracles():
    effect, variance = np.array([[0.5], [0.1], [-0.2], [0.3]]), np.full((4, 1), 0.05)
    tau2 = oracles.paule_mandel(effect[:, 0].tolist(), variance[:, 0].tolist())
    mean, var, _ = pool(effect, variance, [], tested=False)
    for i in range(4):
        rest = np.delete(effect[:, 0], i)
        expected = oracles.empirical_bayes_posterior(effect[i, 0], 0.05, rest.mean(), (0.05 + tau2) / 3 + tau2)
        assert mean[i, 0] == pytest.approx(expected[0], rel=1e-6, abs=1e-9)
        assert var[i, 0] == pytest.approx(expected[1], rel=1e-6)


@pytest.mark.parametrize(("leaves", "configs", "rows"), [(64, 6, 400), (64, 15, 80), (30, 11, 5), (8, 4, 50)])
def test_where_nothing_differs_nothing_is_recommended(leaves, configs, rows):
    rng = np.random.default_rng(5)
    parents = levels(leaves, [round(leaves**s) for s in (0.75, 0.5, 0.25)])
    false = []
    for _ in range(60):
        beliefs = believe(world(rng, leaves, configs, rows), parents, UTILITY, 0, "auto")
        false.append((beliefs.choose(0.8, 0, False) != 0).mean())
    assert np.mean(false) <= 0.08


def test_one_bad_config_makes_no_other_one_good():
    rng = np.random.default_rng(4)
    parents = levels(40, [12, 6, 2])
    effect = np.array([0, 0, 0, -0.3, 0, 0])
    false = []
    for _ in range(25):
        beliefs = believe(world(rng, 40, 6, 60, effect), parents, UTILITY, 0, "auto")
        chosen = beliefs.choose(0.8, 0, False)
        assert not (chosen == 3).any()
        false.append((chosen != 0).mean())
    assert np.mean(false) <= 0.06


def test_a_config_that_is_better_everywhere_is_recommended_everywhere():
    beliefs = believe(
        world(np.random.default_rng(5), 40, 4, 30, np.array([0, 0.05, 0, 0])),
        levels(40, [10, 5, 2]),
        UTILITY,
        0,
        "auto",
    )
    # the last row is for queries near no pattern
    assert (beliefs.choose(0.8, 0, False) == 1).all()


def test_an_unknown_pattern_is_doubted_where_patterns_differ():
    rng = np.random.default_rng(6)
    evidence = world(rng, 40, 2, 100, np.stack([np.zeros(40), rng.choice([-0.1, 0.12], 40)], axis=1))
    beliefs = believe(evidence, levels(40, [10, 5, 2]), UTILITY, 0, "auto")
    chosen = beliefs.choose(0.8, 0, False)
    assert 10 < (chosen[:-1] == 1).sum() < 30
    assert chosen[-1] == 0


def test_a_margin_asks_for_more():
    evidence = world(np.random.default_rng(7), 20, 2, 200, np.array([0, 0.05]))
    parents = levels(20, [5, 2, 1])
    assert (believe(evidence, parents, UTILITY, 0, 0.0).choose(0.8, 0, False) == 1).all()
    assert (believe(evidence, parents, UTILITY, 0, 0.2).choose(0.8, 0, False) == 0).all()


def test_choice_falls_back_on_the_default_or_the_best_quality():
    score, probability = np.array([[3.0, 2.0, 1.0]] * 2), np.array([[0.1, 0.9, 0.85], [0.2, 0.3, 0.1]])
    quality = np.array([[0.1, 0.2, 0.3]] * 2)
    assert choose(score, probability, quality, 0.8, 0, False).tolist() == [1, 0]
    assert choose(score, probability, quality, 0.8, 0, True).tolist() == [1, 2]


def test_the_normal_distribution_function():
    assert normal_cdf(np.array([0.0, 1.96, -8.0])).tolist() == pytest.approx([0.5, 0.9750021, 6.2e-16], rel=1e-2)


@pytest.mark.parametrize("unit", [1e-3, 1e3])
@pytest.mark.parametrize("tested", [False, True])
def test_pooling_does_not_depend_on_the_unit(unit, tested):
    rng = np.random.default_rng(9)
    variance = rng.uniform(0.5, 2.0, (12, 3)) * 1e-3
    variance[rng.random(variance.shape) < 0.2] = np.inf
    effect = np.where(np.isfinite(variance), rng.normal(size=variance.shape) * [0.01, 0.1, 0.3], 0.0)
    parents = levels(12, [4, 2])
    mean, var, root_var = pool(effect, variance, parents, tested)
    scaled = pool(unit * effect, unit**2 * variance, parents, tested)
    for ours, theirs in zip(scaled, (unit * mean, unit**2 * var, unit**2 * root_var), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-12 * unit)


def alike_error(evidence: Evidence) -> np.ndarray:
    """The variance of each cell's mean quality if all rows of a config have the same variance, cell by cell."""
    rows, square = evidence.rows, evidence.comoment[..., 0, 0]
    overall = square[rows > 1].sum() / (rows[rows > 1] - 1).sum()
    of_mean = np.full(rows.shape, np.inf)
    for c in range(rows.shape[1]):
        tried = rows[:, c] > 1
        pooled = (20 * overall + square[tried, c].sum()) / (20 + (rows[tried, c] - 1).sum())
        for p in range(len(rows)):
            if rows[p, c] > 0:
                of_mean[p, c] = pooled / rows[p, c]
    return of_mean


def test_an_effects_error_is_its_configs_and_the_defaults():
    # cells of 0 to 6 rows
    evidence = world(np.random.default_rng(10), 7, 4, 3)
    effect, error, _ = effects(evidence, UTILITY.direction, 1, 0.5)
    size = evidence.rows.astype(float)
    variance = np.where(size > 1, evidence.comoment[..., 0, 0] / np.maximum(size - 1, 1), np.nan)
    of_mean = moderated(variance, size, paired=False, apart=0.5)
    expected = of_mean + of_mean[:, [1]]
    expected[:, 1] = np.inf
    np.testing.assert_allclose(error, expected)
    known = np.isfinite(expected)
    assert 0 < known.sum() < known.size - 7
    quality = evidence.mean[..., 0]
    np.testing.assert_allclose(effect, np.where(known, quality - quality[:, [1]], 0))


def test_a_cell_without_evidence_has_no_test():
    evidence = world(np.random.default_rng(11), 6, 3, 40)
    never = evidence._replace(**{
        name: getattr(evidence, name) * (np.arange(3) != 2).reshape(-1, *[1] * (getattr(evidence, name).ndim - 2))
        for name in ("rows", "w", "w2", "mean", "comoment")
    })  # fmt: skip
    beliefs = believe(never, levels(6, [2]), UTILITY, 0, "auto")
    assert (beliefs.test[:, 2] == NO_CHANCE).all() and (beliefs.test_sd[:, 2] == 0).all()
    assert (beliefs.probability[:, 2] == 0).all() and (beliefs.test_sd[:, 1] > 0).all()
    held = beliefs.held_back()
    assert (held.choose(0.5, 0, False) == 0).all() and (held.test == NO_CHANCE).all() and not held.test_sd.any()


def constant(rows: int = 30, **outcomes: list[float]) -> Evidence:
    """One leaf in which all rows of a config have the same outcomes."""
    evidence = world(np.random.default_rng(12), 1, 2, rows)
    mean = np.zeros_like(evidence.mean)
    for name, values in outcomes.items():
        mean[..., OUTCOMES.index(name)] = values
    n = np.full((1, 2), rows)
    w = n.astype(float)
    return evidence._replace(rows=n, w=w, w2=w, mean=mean, comoment=0 * evidence.comoment)


@pytest.mark.parametrize(("rows", "sure"), [(3, 0.534), (10, 0.614), (30, 0.807), (100, 0.998)])
def test_equal_outcomes_clear_a_floor_as_surely_as_the_rule_of_three_says(rows, sure):
    # regression: they had no variance, so that 3 rows of recall 1 were certain
    floor = replace(UTILITY, kind="floor", target=0.95)
    beliefs = believe(constant(rows, f1=[1.0, 0.9]), [], floor, 0, "auto")
    assert beliefs.probability[0, 0] == pytest.approx(sure, abs=1e-3) and beliefs.probability[0, 1] < 0.5


def test_a_floor_is_cleared_sooner_where_falls_were_seen_to_be_small():
    floor = replace(UTILITY, kind="floor", target=0.95)
    evidence = constant(60, f1=[0.97, 0.97])
    # the first scatters by .03; the second fails completely in 3 rows of 100
    for config, variance in enumerate((0.03**2, 0.97 * 0.03)):
        evidence.comoment[:, config, 0, 0] = evidence.w[:, config] * variance
    sure = believe(evidence, [], floor, 0, "auto").probability[0]
    assert sure[0] > 0.85 and sure[1] < 0.75


def test_what_is_just_at_a_bound_keeps_it():
    # the default breaks the bound, so that any config that keeps it is better
    for limit, kept in ((2.0, [0, 1]), (1.9, [0, 0])):
        bound = replace(UTILITY, kind="bound", max_cost=limit)
        beliefs = believe(constant(f1=[0.8, 0.9], cost=[3.0, 2.0]), [], bound, 0, "auto")
        assert beliefs.probability[0].tolist() == kept


# the field's predictions for two leaves, relative to those for all queries
APART_UC = np.array([[0.0, 0.02, -0.03, 0.01, 0.04, 0.0], [0.0, -0.01, 0.05, 0.02, -0.04, 0.0], np.zeros(6)])


def field_of(level: np.ndarray, level_variance: np.ndarray) -> Field:
    """A field with a mean predicted quality of each config over two leaves, with these variances (C,)."""
    configs = len(level)
    of_one = np.zeros((configs, len(OUTCOMES)))
    mean, variance = np.zeros((3, *of_one.shape)), of_one.copy()
    mean[..., 0], variance[:, 0] = level + APART_UC[:, :configs], level_variance
    unused = [of_one] * 4
    none = np.zeros((0, 0), np.float32)
    return Field(
        none, none, none, none, none, of_one, variance, *unused, mean, 0 * mean, 0 * mean[..., 0], *[of_one] * 4
    )


def test_a_fields_levels_are_shrunk_together():
    # James & Stein with a common prior N(0, tau2), by the method of moments, config by config; negative effects are not
    # shrunk
    half = replace(UTILITY, latency_weight=0.5)
    level, variance = np.array([0.5, 0.58, 0.47, 0.9, 0.5]), np.array([0.0, 4e-4, 1e-4, 0.0, 9e-4])
    gain, gain_variance, error = _predicted(field_of(level, variance), half.direction, 0)
    known = [1, 2, 4]
    shift = level - 0.5
    excess = sum(shift[c] ** 2 / variance[c] for c in known) - len(known)
    tau2 = excess / sum(1 / variance[c] for c in known)
    assert tau2 > 0
    for c in range(5):
        kept = (tau2 / (tau2 + variance[c]) if shift[c] >= 0 else 1.0) if c in known else 0.0
        np.testing.assert_allclose(gain[:, c], kept * shift[c] + APART_UC[:, c], atol=1e-15)
        expected = kept * variance[c] if c in known else np.inf
        assert error[c] == (variance[c] if c in known else np.inf)
        np.testing.assert_allclose(gain_variance[:, c], expected)
    # the same for latency, whose weight enters a variance squared
    field = field_of(level, variance)
    field = field._replace(**{
        name: np.roll(getattr(field, name), OUTCOMES.index("log2_latency"), -1) for name in ("mean", "level_variance")
    })  # fmt: skip
    np.testing.assert_allclose(_predicted(field, half.direction, 0)[2], 0.25 * error)


def test_a_query_unlike_those_learned_from_is_asked_for_a_margin_that_leaves_are_not():
    evidence = world(np.random.default_rng(14), 2, 3, 50)
    variance = np.array([0.0, 4e-4, 9e-4])
    field = field_of(np.array([0.5, 0.6, 0.5]), variance)
    # the field's residuals are pure noise
    field = field._replace(**{
        f"residual_{name}": 0 * array if name.endswith("mean") else array for name, array in evidence._asdict().items()
        if f"residual_{name}" in Field._fields
    })  # fmt: skip
    beliefs = believe(evidence, [], UTILITY, 0, "auto", field)
    np.testing.assert_allclose(beliefs.test[:2, 1:], beliefs.gain[:2, 1:])
    np.testing.assert_allclose(beliefs.test[2, 1:], beliefs.gain[2, 1:] - np.sqrt(variance[1:]))
    assert not beliefs.margin.any()


def unexplained(field: Field, evidence: Evidence) -> Field:
    """A copy of the field whose residuals are this evidence."""
    return field._replace(**{
        f"residual_{name}": array for name, array in evidence._asdict().items() if f"residual_{name}" in Field._fields
    })  # fmt: skip


@pytest.mark.parametrize("by_field", [False, True])
def test_a_quality_is_its_leaves_posterior_though_no_test_finds_them_to_differ(by_field):
    # gains need a significant test for differences between leaves, but levels do not: they make no claim
    rng = np.random.default_rng(23)
    evidence = world(rng, 8, 3, 12, 0.06 * rng.normal(size=(8, 3)), sd=0.2)
    level, error = evidence.mean[..., 0], alike_error(evidence)
    n = evidence.rows
    squares = (evidence.comoment[..., 0, 0] + n * (1 - level) ** 2).sum(0)
    fall = (1 + squares) / (1 + (n * (1 - level)).sum(0))
    error = error + 3 * fall**2 / n.sum(0) / n
    expected, variance = np.zeros((8, 3)), np.zeros((8, 3))
    for c in range(3):
        tau2 = oracles.paule_mandel(level[:, c].tolist(), error[:, c].tolist())
        assert tau2 > 0
        for p in range(8):
            weight = np.delete(1 / (error[:, c] + tau2), p)
            mean = np.delete(level[:, c], p) @ weight / weight.sum()
            expected[p, c], variance[p, c] = oracles.empirical_bayes_posterior(
                level[p, c], error[p, c], mean, 1 / weight.sum() + tau2
            )
    assert not varies(level, error, np.full(3, np.inf)).any()
    field = None
    if by_field:
        of_leaves = rng.normal(size=(9, 3)) * 0.01
        field = unexplained(field_of(np.array([0.5, 0.6, 0.5]), np.array([0.0, 4e-4, 9e-4])), evidence)
        mean_UCO = np.zeros((9, 3, len(OUTCOMES)))
        mean_UCO[..., 0], base_CO = of_leaves, np.zeros((3, len(OUTCOMES)))
        base_CO[:, 0] = 0.1
        own = np.linspace(1e-3, 2e-3, 27).reshape(9, 3)
        field = field._replace(mean=mean_UCO, base=base_CO, quality_variance=own, gain_variance=0 * mean_UCO)
        expected, variance = expected + 0.1 + of_leaves[:8], variance + own[:8]
    floor = replace(UTILITY, kind="floor", target=0.55)
    found = believe(evidence, [], floor, 0, "auto", field)
    np.testing.assert_allclose(found.quality[:8], expected, rtol=1e-6)
    np.testing.assert_allclose(found.test_sd[:8] ** 2, variance, rtol=1e-6)
    np.testing.assert_allclose(found.probability[:8], norm.cdf((expected - 0.55) / np.sqrt(variance)), rtol=1e-5)


@pytest.mark.parametrize("share", [0.01, 0.93])
def test_the_quality_of_a_rare_outcome_is_its_share_of_rows(share):
    # regression: leaves without a single such outcome by chance dominated the overall mean: an answer promised .0015
    # where .017 were clicked, and a floor of .95 was kept only to .917
    rng = np.random.default_rng(24)
    evidence = world(rng, 24, 3, 40)
    n = np.maximum(evidence.rows, 1)
    hits = rng.binomial(n, share)
    mean, comoment = np.zeros_like(evidence.mean), np.zeros_like(evidence.comoment)
    mean[..., 0], comoment[..., 0, 0] = hits / n, hits * (1 - hits / n)
    w = n.astype(float)
    evidence = evidence._replace(rows=n, w=w, w2=w, mean=mean, comoment=comoment)
    quality = believe(evidence, levels(24, [4]), UTILITY, 0, "auto").quality[:-1]
    np.testing.assert_allclose((n * quality).sum(0) / n.sum(0), hits.sum(0) / n.sum(0), rtol=1e-3)


def test_with_a_field_leaves_are_drawn_together():
    rng = np.random.default_rng(16)
    evidence = world(rng, 8, 4, 12, 0.06 * rng.normal(size=(8, 4)), sd=0.2)
    field = field_of(np.array([0.5, 0.6, 0.5, 0.45]), np.array([0.0, 4e-4, 9e-4, 1e-4]))
    apart = np.concatenate([field.mean[:1]] * 8 + [field.mean[2:]])
    field = field._replace(mean=apart, gain_variance=0 * apart, quality_variance=0 * apart[..., 0])
    found = believe(evidence, [], UTILITY, 0, "auto", unexplained(field, evidence))
    effect, variance, _ = effects(evidence.with_unknown(), UTILITY.direction, 0, 0.5)
    drawn = pool(effect, variance, [], tested=True, gated=True)
    predicted = _predicted(field, UTILITY.direction, 0)
    np.testing.assert_allclose(found.gain[:, 1:], (drawn[0] + predicted[0])[:, 1:])
    np.testing.assert_allclose(found.gain_variance[:, 1:], (drawn[1] + predicted[1])[:, 1:])


def test_each_configs_scatter_is_drawn_to_that_of_all_as_far_as_chance_explains_how_they_differ():
    # config by config, over two parents with means of their own
    rng = np.random.default_rng(17)
    parent, tau = np.array([0] * 6 + [1] * 5), np.array([0.0, 0.3, 0.6, 1.2, 0.5])
    variance = rng.uniform(0.5, 2.0, (11, 5)) * 0.1
    variance[rng.random(variance.shape) < 0.15] = np.inf
    variance[1:, 4] = np.inf  # this config says nothing about how its leaves differ
    known = np.isfinite(variance)
    errors = np.where(known, variance, 0.0)
    effect = np.where(known, (tau + np.sqrt(errors)) * rng.normal(size=variance.shape), 0.0)
    cells = [[np.flatnonzero(known[:, c] & (parent == g)) for g in (0, 1)] for c in range(5)]

    def scatter(tau2: float) -> float:
        """The cells' weighted squared deviations from their parents' means, minus their degrees of freedom."""
        more = 0.0
        for c in range(5):
            for of in cells[c]:
                if len(of):
                    centre = np.average(effect[of, c], weights=1 / (variance[of, c] + tau2))
                    more += ((effect[of, c] - centre) ** 2 / (variance[of, c] + tau2)).sum() - (len(of) - 1)
        return more

    together, own, chance = brentq(scatter, 0, 100), [], []
    for c in range(4):
        weight = [1 / variance[of, c] for of in cells[c]]
        part = np.concatenate([w * (effect[of, c] - np.average(effect[of, c], weights=w)) ** 2
                               for w, of in zip(weight, cells[c], strict=True)])  # fmt: skip
        freedom, scale = sum(len(w) - 1 for w in weight), sum(w.sum() - (w**2).sum() / w.sum() for w in weight)
        own.append((part.sum() - freedom) / scale)
        chance.append(len(part) * len(part) * part.var() / freedom / scale**2)
    share = np.mean(chance) / np.mean((np.array(own) - together) ** 2)
    assert 0 < share < 1 and min(own) < 0
    expected = [max(share * together + (1 - share) * one, 0.0) for one in own] + [together]
    alone = np.full(5, 7.0)
    np.testing.assert_allclose(_drawn_together(effect, variance, parent, 2, alone), expected, rtol=1e-6)
    lone = np.where(np.arange(5) == 1, variance, np.inf)
    assert _drawn_together(effect, lone, parent, 2, alone) is alone


def test_what_never_ran_reaches_no_floor_whatever_the_field_says_of_it():
    evidence = world(np.random.default_rng(18), 2, 3, 50)
    never = np.arange(3) != 2
    evidence = evidence._replace(**{
        name: getattr(evidence, name) * never.reshape(-1, *[1] * (getattr(evidence, name).ndim - 2))
        for name in ("rows", "w", "w2", "mean", "comoment")
    })  # fmt: skip
    field = unexplained(field_of(np.array([0.0, 0.0, 0.9]), np.array([0.0, 4e-4, 0.0])), evidence)
    floor = replace(UTILITY, kind="floor", target=0.45)
    beliefs = believe(evidence, [], floor, 0, "auto", field)
    assert not beliefs.quality[:, 2].any() and not beliefs.probability[:, 2].any()
    assert (beliefs.test[:, 2] == NO_CHANCE).all()
    assert (beliefs.probability[:, :2] > 0.5).all()
    anything = believe(evidence, [], replace(floor, target=0.0), 0, "auto", field)
    assert not anything.probability[:, 2].any() and anything.probability[:, :2].all()


def test_a_cell_without_rows_keeps_a_bound_where_its_config_does_on_the_whole():
    evidence = world(np.random.default_rng(19), 2, 2, 40)
    rows = np.array([[40, 40], [40, 0]])
    w, mean = rows.astype(float), np.zeros_like(evidence.mean)
    mean[..., 0], mean[..., OUTCOMES.index("cost")] = [[0.5, 0.9], [0.5, 0.0]], [[4.0, 5.0], [4.0, 0.0]]
    evidence = evidence._replace(rows=rows, w=w, w2=w, mean=mean, comoment=0 * evidence.comoment)
    # the default breaks the bound, so that any config that keeps it is better
    bound = replace(UTILITY, kind="bound", max_cost=3.0)
    assert not believe(evidence, [], bound, 0, "auto").probability[:, 1].any()
    # and a cell without rows has its config's overall cost
    floor = replace(UTILITY, kind="floor", target=0.6)
    assert believe(evidence, [], floor, 0, "auto").score[:2].tolist() == [[-4.0, -5.0], [-4.0, -5.0]]


@pytest.mark.parametrize(("lead", "surely"), [(2.3, False), (2.5, True)])
def test_a_config_surely_beats_the_default_where_its_lead_counts_all_of_them(lead, surely):
    # five configs beside the default: at .05 / 5 a lead needs 2.326 standard errors
    field = field_of(np.array([0.5, *[0.4] * 4, 0.5 + lead * 0.01]), np.array([0.0, *[1e-4] * 5]))
    assert surely_better(field, UTILITY, 0) == surely


@pytest.mark.parametrize(("cost", "expected"), [([3.0, 2.0], [-3.0, -2.0]), ([0.0, 0.0], [-9.0, -8.0])])
def test_a_floor_spares_cost_where_any_was_logged_else_latency(cost, expected):
    evidence = constant(f1=[0.8, 0.9], cost=cost, log2_latency=[9.0, 8.0])
    beliefs = believe(evidence, [], replace(UTILITY, kind="floor", target=0.9), 0, "auto")
    assert beliefs.score[0].tolist() == expected


def test_one_row_of_a_constant_outcome_is_believed_and_no_row_is_the_mean_of_the_others():
    evidence = world(np.random.default_rng(13), 3, 2, 30)
    n = np.array([[30, 30], [10, 1], [0, 30]])
    mean = np.zeros_like(evidence.mean)
    mean[..., 0] = [[0.4, 0.9], [0.8, 0.3], [0.0, 0.9]]
    w = n.astype(float)
    evidence = evidence._replace(rows=n, w=w, w2=w, mean=mean, comoment=0 * evidence.comoment)
    quality = believe(evidence, levels(3, [1]), UTILITY, 0, "auto").quality
    np.testing.assert_allclose(quality[:3, 1], [0.9, 0.3, 0.9])
    np.testing.assert_allclose(quality[[2, 3], 0], (30 * 0.4 + 10 * 0.8) / 40)
