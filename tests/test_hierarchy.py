"""Consolidation, Ward's levels and pruning, compared with the naive oracles and SciPy."""

from __future__ import annotations

from contextlib import ExitStack
from unittest.mock import patch

import large_levels
import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.metrics import adjusted_rand_score

from rb_gpu.learn.hierarchy import build_hierarchy, consolidate, cut, level_counts, prune
from rb_gpu.learn.linkage import Merges, join_nearest
from rb_gpu.learn.linkages import Ward, least

CPU = torch.device("cpu")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 24), st.sampled_from([0.5, 0.8, 0.95]))
def test_consolidation_is_complete_linkage(seed, n, threshold):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(max(2, n // 3), 3))[rng.integers(max(2, n // 3), size=n)] + 0.2 * rng.normal(size=(n, 3))
    ours = consolidate(x.astype(np.float32), threshold, CPU)
    assert adjusted_rand_score(oracles.complete_linkage(x.tolist(), threshold), ours) == pytest.approx(1.0)


def test_no_chain_forms():
    # neighbours are close, the ends are not: single linkage, or the reference's stale list, would merge or lose them
    angles = np.deg2rad([0, 15, 30, 45])
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    label = consolidate(x, 0.95, CPU)
    unit = x @ x.T
    for group in np.unique(label):
        assert unit[np.ix_(label == group, label == group)].min() > 0.95
    assert len(np.unique(label)) == 2


def test_a_threshold_of_one_merges_nothing():
    assert consolidate(np.ones((4, 3), np.float32), 1.0, CPU).tolist() == [0, 1, 2, 3]


def short_lists() -> ExitStack:
    """Makes small sets take every code path of the linkages: exhausted neighbour lists, leaves in groups
    and in tiles.
    """
    stack = ExitStack()
    for name in ("linkage.LISTED", "linkages.LISTED"):
        stack.enter_context(patch(f"rb_gpu.learn.{name}", 8))
    stack.enter_context(patch("rb_gpu.learn.linkages.GROUP", 3))
    stack.enter_context(patch("rb_gpu.learn.devices.TILE_SCORES", {"cpu": 256}))
    return stack


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(20, 400), st.floats(0.05, 1.0), st.sampled_from([0.0, 1e-4]))
def test_without_a_matrix_it_is_scipys_complete_linkage(seed, n, spread, twins):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4, 6))[rng.integers(4, size=n)] + spread * rng.normal(size=(n, 6))
    if twins:  # float32 cannot tell which of them are nearer
        x = x[rng.integers(max(2, n // 12), size=n)] + twins * rng.normal(size=(n, 6))
    x = x.astype(np.float32)
    tree = linkage(x.astype(np.float64), "complete", metric="cosine")
    # twins differ by about 1e-8
    for threshold in (0.9, 1.0 - 3e-9) if twins else (0.9,):
        expected = fcluster(tree, np.nextafter(1.0 - threshold, 0.0), criterion="distance")
        assert adjusted_rand_score(expected, consolidate(x, threshold, CPU)) == pytest.approx(1.0)
        with short_lists():
            assert adjusted_rand_score(expected, consolidate(x, threshold, CPU)) == pytest.approx(1.0)


def test_equal_leaves_merge_into_one():
    x = np.repeat(np.eye(3, dtype=np.float32), [50, 1, 40], axis=0)
    assert consolidate(x, 0.95, CPU).tolist() == [0] * 50 + [1] + [2] * 40


def test_leaves_that_all_hang_together_are_scipys_too():
    # two of three pairs are over the threshold, so that all neighbour lists are exhausted many times
    x = large_levels.leaves(1200, 32, "cone").astype(np.float64)
    tree = linkage(x, "complete", metric="cosine")
    threshold = float(np.quantile(x[:50] @ x.T, 1 / 3))
    expected = fcluster(tree, 1.0 - threshold, criterion="distance")
    label = consolidate(x.astype(np.float32), threshold, CPU)
    assert adjusted_rand_score(expected, label) == pytest.approx(1.0) and label.max() < 600


@pytest.mark.parametrize("columns", [1, 5, 40, 500, 517])
def test_the_least_of_groups_are_the_least_of_all(columns):
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 60, size=(20, columns)).astype(np.float32))
    with patch("rb_gpu.learn.linkages.GROUP", 7):
        low, column = least(x.clone(), 6)
    assert torch.equal(low, x.sort(1).values[:, :6]) and torch.equal(low, x.gather(1, column))
    assert all(len(row.unique()) == len(row) for row in column)


def ward(x: np.ndarray, weight: np.ndarray) -> Merges:
    return join_nearest(Ward(x, weight, CPU), len(x))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 25))
def test_levels_are_wards_with_weights(seed, n):
    rng = np.random.default_rng(seed)
    x, weight = rng.normal(size=(n, 4)), rng.uniform(0.5, 5, n)
    merges = ward(x, weight)
    for count in {1, 2, max(1, n // 2), n}:
        expected = oracles.ward(x.tolist(), weight.tolist(), count)
        assert adjusted_rand_score(expected, cut(merges, n, count)) == pytest.approx(1.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 60), st.integers(1, 30), st.sampled_from([0.0, 1e-4]))
def test_a_weight_is_so_many_equal_points_to_scipys_ward(seed, n, most, twins):
    rng = np.random.default_rng(seed)
    x, weight = rng.normal(size=(n, 5)), rng.integers(1, most + 1, n)
    if twins:  # float32 cannot tell which of them are nearer
        x = rng.normal(size=(2, 5))[rng.integers(2, size=n)] + twins * x
    tree = linkage(np.repeat(x, weight, axis=0), "ward")
    merges = ward(x, weight.astype(np.float64))
    np.testing.assert_allclose(np.sqrt(2 * merges.height), np.sort(tree[:, 2])[weight.sum() - n :], rtol=1e-8)
    owner = np.repeat(np.arange(n), weight)
    with short_lists():
        np.testing.assert_array_equal(ward(x, weight.astype(np.float64)).height, merges.height)
    for count in {1, 2, max(1, n // 3), n - 1}:
        theirs = fcluster(tree, count, criterion="maxclust")
        assert adjusted_rand_score(theirs, cut(merges, n, count)[owner]) == pytest.approx(1.0)


@pytest.mark.parametrize("shape", ["chain", "hubs", "equal"])
def test_shapes_in_which_few_pairs_join_at_once_end_too(shape):
    n, rng = 200, np.random.default_rng(0)
    x, weight = rng.normal(size=(n, 3)), np.ones(n)
    if shape == "chain":
        x = np.stack([1.1 ** np.arange(n), np.zeros(n), np.zeros(n)], axis=1)
    elif shape == "hubs":  # the lightest leaf is the nearest neighbour of all
        weight = 2.0 ** -np.arange(n)
    else:
        x = np.ones((n, 3))
    merges = ward(x, weight)
    assert len(merges.height) == n - 1 and len(np.unique(cut(merges, n, 7))) == 7
    if shape == "chain":
        assert np.bincount(cut(merges, n, 2)).min() < n // 2
        expected = oracles.ward(x[:40].tolist(), weight[:40].tolist(), 5)
        assert adjusted_rand_score(expected, cut(ward(x[:40], weight[:40]), 40, 5)) == pytest.approx(1.0)


def test_points_far_from_the_origin_keep_their_distances():
    x = np.random.default_rng(0).normal(size=(60, 5))
    far = np.sort(np.sqrt(2 * ward(x + 1e7, np.ones(60)).height))
    np.testing.assert_allclose(far, np.sort(linkage(x, "ward")[:, 2]), rtol=1e-6)


def test_every_node_has_a_parent_one_level_above_and_levels_nest():
    x = np.random.default_rng(1).normal(size=(50, 6)).astype(np.float32)
    assert level_counts(256, "auto") == [64, 16, 4]
    counts = level_counts(50, "auto")
    assert counts == sorted(counts, reverse=True)
    parents = build_hierarchy(x, np.ones(50), counts, CPU)
    assert [len(p) for p in parents] == [50, *counts[:-1]]
    for parent, count in zip(parents, counts, strict=True):
        assert set(parent) == set(range(count))


@pytest.mark.parametrize("leaves", [1, 2, 3])
def test_few_leaves_have_levels_too(leaves):
    x = np.random.default_rng(0).normal(size=(leaves, 3)).astype(np.float32)
    parents = build_hierarchy(x, np.ones(leaves), level_counts(leaves, "auto"), CPU)
    assert len(parents) == 3
    assert level_counts(leaves, [32, 8, 2]) == [leaves, leaves, min(leaves, 2)]


def test_pruning_is_by_support_and_confidence():
    kept = prune(np.array([1, 5, 9]), np.array([0.9, 0.1, 0.9]), 3, 0.5)
    assert kept.tolist() == [False, False, True]
