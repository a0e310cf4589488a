"""Consolidation, Ward's levels and pruning against the naive oracles and SciPy."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import linkage
from sklearn.metrics import adjusted_rand_score

from rb_gpu.learn.hierarchy import build_hierarchy, consolidate, cut, level_counts, prune, ward

CPU = torch.device("cpu")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 24), st.sampled_from([0.5, 0.8, 0.95]))
def test_consolidation_is_complete_linkage(seed, n, threshold):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(max(2, n // 3), 3))[rng.integers(max(2, n // 3), size=n)] + 0.2 * rng.normal(size=(n, 3))
    ours = consolidate(x.astype(np.float32), threshold, CPU)
    assert adjusted_rand_score(oracles.complete_linkage(x.tolist(), threshold), ours) == pytest.approx(1.0)


def test_no_chain_forms():
    # neighbours are close, ends are not: single linkage, or the document's stale list, would merge or lose them
    angles = np.deg2rad([0, 15, 30, 45])
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    label = consolidate(x, 0.95, CPU)
    unit = x @ x.T
    for group in np.unique(label):
        assert unit[np.ix_(label == group, label == group)].min() > 0.95
    assert len(np.unique(label)) == 2


def test_a_threshold_of_one_merges_nothing():
    assert consolidate(np.ones((4, 3), np.float32), 1.0, CPU).tolist() == [0, 1, 2, 3]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 25))
def test_levels_are_wards_with_weights(seed, n):
    rng = np.random.default_rng(seed)
    x, weight = rng.normal(size=(n, 4)), rng.uniform(0.5, 5, n)
    merges = ward(x, weight)
    for count in {1, 2, max(1, n // 2), n}:
        expected = oracles.ward(x.tolist(), weight.tolist(), count)
        assert adjusted_rand_score(expected, cut(merges, n, count)) == pytest.approx(1.0)


def test_with_equal_weights_it_is_scipys_ward():
    x = np.random.default_rng(0).normal(size=(60, 5))
    heights = np.sqrt(2 * ward(x, np.ones(60)).height)
    np.testing.assert_allclose(heights, np.sort(linkage(x, "ward")[:, 2]), rtol=1e-8)


def test_every_node_has_a_parent_one_level_above_and_levels_nest():
    x = np.random.default_rng(1).normal(size=(50, 6)).astype(np.float32)
    counts = level_counts(50, "auto")
    assert counts == sorted(counts, reverse=True)
    parents = build_hierarchy(x, np.ones(50), counts)
    assert [len(p) for p in parents] == [50, *counts[:-1]]
    for parent, count in zip(parents, counts, strict=True):
        assert set(parent) == set(range(count))


@pytest.mark.parametrize("leaves", [1, 2, 3])
def test_few_leaves_have_levels_too(leaves):
    x = np.random.default_rng(0).normal(size=(leaves, 3)).astype(np.float32)
    parents = build_hierarchy(x, np.ones(leaves), level_counts(leaves, "auto"))
    assert len(parents) == 3
    assert level_counts(leaves, [32, 8, 2]) == [leaves, leaves, min(leaves, 2)]


def test_pruning_is_by_support_and_confidence():
    kept = prune(np.array([1, 5, 9]), np.array([0.9, 0.1, 0.9]), 3, 0.5)
    assert kept.tolist() == [False, False, True]
