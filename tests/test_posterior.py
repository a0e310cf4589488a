"""Pooling against an exact multivariate normal, statsmodels, and worlds in which nothing differs."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
from statsmodels.stats.meta_analysis import combine_effects

from rb_gpu.evidence import Evidence
from rb_gpu.homogeneity import hidden, varies
from rb_gpu.normal import normal_cdf
from rb_gpu.objective import Objective, choose
from rb_gpu.posterior import believe, paule_mandel, pool

UTILITY = Objective("utility", "f1", 0.0, 0.0, 1.0, 1.0, 0.95, None, None)


def levels(leaves: int, counts: list[int]) -> list[np.ndarray]:
    out, below = [], leaves
    for count in counts:
        out.append((np.arange(below) * count // below).astype(np.int64))
        below = count
    return out


def world(rng, leaves: int, configs: int, rows: int, effect=0.0, sd: float = 0.1) -> Evidence:
    """Cells of a table in which a config's quality is 0.5 + effect everywhere."""
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
    # the same posterior from one joint normal over the root, the nodes and the leaves
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


def test_a_lone_child_counts_its_rows_once():
    # with the parent's posterior as prior, and the child's rows in both, the variance would halve
    mean, var, _ = pool(np.array([[0.3]]), np.array([[0.04]]), [np.zeros(1, np.int64)] * 3, tested=False)
    assert (mean[0, 0], var[0, 0]) == (pytest.approx(0.3), pytest.approx(0.04))


def test_a_cell_without_rows_gets_its_neighbours_belief():
    effect, variance = np.array([[0.2], [0.2], [0.0]]), np.array([[1e-4], [1e-4], [np.inf]])
    mean, var, _ = pool(effect, variance, [np.array([0, 0, 0])], tested=False)
    assert mean[2, 0] == pytest.approx(0.2)
    assert 0 < var[2, 0] < 1e-3


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
    # the last row is for queries that are near no pattern
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


def test_what_a_test_did_not_find_may_be_there():
    # the posterior of a query knew its leaf's effect to be the mean: of choices foretold at .99, .83 beat the default
    rng = np.random.default_rng(8)
    variance = rng.uniform(0.5, 2.0, (40, 400)) * 0.01
    tau = np.sqrt(rng.uniform(0, 0.02, 400))
    effect = tau * rng.normal(size=(40, 400)) + np.sqrt(variance) * rng.normal(size=(40, 400))
    quiet = ~varies(effect, variance)
    found = hidden(effect, variance)
    assert 50 < quiet.sum() < 350 and not found[:, ~quiet].any()
    # the mean over leaves, since a leaf of many rows knows more of itself
    left = tau**2 * variance / (tau**2 + variance)
    assert found[:, quiet].mean() == pytest.approx(left[:, quiet].mean(), rel=0.25)
    unknown = np.vstack([variance, np.full((1, 400), np.inf)])
    assert (hidden(np.vstack([effect, np.zeros((1, 400))]), unknown)[-1, quiet] > found[:, quiet].max(0)).all()


def test_nothing_is_hidden_among_leaves_without_evidence():
    assert not hidden(np.zeros((3, 2)), np.full((3, 2), np.inf)).any()
    assert not hidden(np.array([[0.3, 0.1]]), np.array([[0.1, 0.1]])).any()
