"""Evidence against pooled rows, scalar oracles, and its own additivity."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretend import pretended
from test_verdicts import table

from rb_gpu.evidence import OUTCOMES, Evidence, linear_moments
from rb_gpu.learn.evidence import f1_score, gather_evidence, row_weights

CPU = torch.device("cpu")


def gather(trajectories, label_Q, patterns, half_life=None) -> Evidence:
    weight_N = row_weights(trajectories, half_life)
    return gather_evidence(trajectories, torch.as_tensor(label_Q), patterns, weight_N, CPU)


def assert_equal(a: Evidence, b: Evidence, rtol: float = 1e-9) -> None:
    for name, one, other in zip(Evidence._fields, a, b, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-9, err_msg=name)


def test_cells_equal_a_scalar_reading():
    rows = table(seed=1, n=400, configs=3)
    label_Q = np.arange(len(rows.query_id)) % 4
    evidence = gather(rows, label_Q, 4)
    for p in range(4):
        for c in range(3):
            cell = [i for i in range(len(rows)) if label_Q[rows.query_row[i]] == p and rows.config_id[i] == c]
            assert evidence.rows[p, c] == len(cell)
            for name, values in (
                ("f1", [oracles.f1_exact(rows.precision[i], rows.recall[i]) for i in cell]),
                ("product", [oracles.product(rows.precision[i], rows.recall[i]) for i in cell]),
                ("log2_latency", [np.log2(max(rows.latency_us[i], 1)) for i in cell]),
            ):
                o = OUTCOMES.index(name)
                moments = oracles.weighted_moments(values, [1.0] * len(cell))
                assert evidence.mean[p, c, o] == pytest.approx(moments.mean, rel=1e-6)
                assert evidence.comoment[p, c, o, o] == pytest.approx(moments.m2, rel=1e-5, abs=1e-9)
            assert evidence.latency_us[p, c] == pytest.approx(np.mean([rows.latency_us[i] for i in cell]))


def test_weights_are_decay_over_propensity():
    rows = table(seed=2, n=50, configs=2, propensity=0.25)
    days = np.arange(len(rows)) * 86_400
    rows = rows.__class__(**{**rows.__dict__, "timestamp": days})
    weight = row_weights(rows, 10.0).numpy()
    assert weight[-1] == pytest.approx(4.0)
    assert weight[-11] == pytest.approx(2.0)
    assert np.all(row_weights(rows, None).numpy() == 4.0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 6))
def test_merged_evidence_is_that_of_the_pooled_rows(seed, patterns):
    rows = table(seed=seed, n=200, configs=3, propensity=0.5)
    rng = np.random.default_rng(seed)
    label_Q = rng.integers(-1, patterns, len(rows.query_id))
    group_P = rng.integers(0, 2, patterns)
    pooled_Q = np.where(label_Q < 0, -1, group_P[np.maximum(label_Q, 0)])
    merged = gather(rows, label_Q, patterns, 5.0).regroup(group_P, 2)
    assert_equal(merged, gather(rows, pooled_Q, 2, 5.0), rtol=1e-8)


def test_the_order_of_rows_does_not_matter():
    rows = table(seed=3, n=300, configs=3)
    order = np.random.default_rng(0).permutation(len(rows))
    per_row = ("query_row", "config_id", "precision", "recall", "latency_us", "rating", "timestamp", "id")
    shuffled = rows.__class__(**{k: v[order] if k in per_row else v for k, v in rows.__dict__.items()})
    label_Q = np.arange(len(rows.query_id)) % 3
    assert_equal(gather(rows, label_Q, 3), gather(shuffled, label_Q, 3))


def test_pairs_are_differences_to_the_default_on_the_same_query():
    rows = table(seed=4, n=90, configs=3, full=True)
    evidence = gather(rows, np.zeros(len(rows.query_id), int), 1)
    assert evidence.paired
    quality = f1_score(torch.from_numpy(rows.precision).double(), torch.from_numpy(rows.recall).double()).numpy()
    by_query = quality.reshape(-1, 3)
    for c in range(3):
        difference = by_query[:, c] - by_query[:, rows.configs.default]
        assert evidence.pair_mean[0, c, 0] == pytest.approx(difference.mean(), abs=1e-12)
        assert evidence.pair_comoment[0, c, 0, 0] == pytest.approx(((difference - difference.mean()) ** 2).sum())
    assert not gather(table(seed=4, n=90, configs=3), np.zeros(90, int), 1).paired


def test_rows_of_a_query_under_one_config_are_one_pair_whatever_threads_do():
    # regression: each row was compared with the default's last row, so that all shared its noise; and all rows of the
    # default were written to one place at once, on the CPU too from 32,768 rows on
    rows = table(seed=4, n=90, configs=3, full=True, propensity=0.5)
    rows = replace(rows, config_id=np.tile([0, 1, 1], 30), propensity=np.tile([0.5, 0.2, 0.4], 30).astype(np.float32))
    with pretended() as operations:
        weight_N, labels = row_weights(rows, None), torch.zeros(len(rows.query_id), dtype=torch.int64)
        found = gather_evidence(rows, labels, 1, weight_N, torch.device("cuda"))
        assert operations.raced == 0
        there = torch.zeros(3, device="cuda")
        there[torch.tensor([1, 1, 2], device="cuda")] = torch.arange(3.0, device="cuda")
        assert operations.raced == 1
    quality = f1_score(torch.from_numpy(rows.precision).double(), torch.from_numpy(rows.recall).double()).numpy()
    by_query = quality.reshape(-1, 3)
    difference = (5.0 * by_query[:, 1] + 2.5 * by_query[:, 2]) / 7.5 - by_query[:, 0]
    assert found.pair_rows.tolist() == [[30, 30, 0]]
    assert found.pair_mean[0, 1, 0] == pytest.approx(difference.mean())
    assert found.pair_comoment[0, 1, 0, 0] == pytest.approx(7.5 * ((difference - difference.mean()) ** 2).sum())
    assert found.pair_w[0, 1] ** 2 / found.pair_w2[0, 1] == pytest.approx(30)
    assert found.paired
    assert not gather(rows.select_queries(np.arange(30) < 20), np.zeros(20, int), 1).paired


def test_linear_moments_are_those_of_the_combined_outcome():
    rows = table(seed=5, n=300, configs=2)
    evidence = gather(rows, np.zeros(len(rows.query_id), int), 1)
    direction = np.array([1.0, 0.0, -0.1, 0.0])
    mean, variance, size = linear_moments(evidence.w, evidence.w2, evidence.mean, evidence.comoment, direction)
    for c in range(2):
        cell = rows.config_id == c
        p, r = rows.precision[cell].astype(float), rows.recall[cell].astype(float)
        utility = 2 * p * r / (p + r) - 0.1 * np.log2(rows.latency_us[cell])
        assert mean[0, c] == pytest.approx(utility.mean())
        assert variance[0, c] == pytest.approx(utility.var(ddof=1))
        assert size[0, c] == cell.sum()


def test_equal_values_have_no_variance():
    # regression: three times 0.1 leave a sum of squares of 1e-34 by rounding, and a test with that variance is
    # meaningless
    mean, comoment = np.full((1, 1, 4), 0.1), np.full((1, 1, 4, 4), 1e-34)
    _, variance, _ = linear_moments(np.full((1, 1), 3.0), np.full((1, 1), 3.0), mean, comoment, np.eye(4)[0])
    assert variance[0, 0] == 0.0


def test_latency_quantiles_are_within_a_half_octave():
    rows = table(seed=6, n=4000, configs=1)
    evidence = gather(rows, np.zeros(len(rows.query_id), int), 1)
    for q in (0.5, 0.95, 0.99):
        exact = np.quantile(rows.latency_us, q)
        assert exact / 2**0.5 <= evidence.latency_quantile(q)[0, 0] <= exact * 2**0.5


def test_f1_is_zero_where_nothing_is_right():
    values = f1_score(torch.tensor([0.0, 1.0, 0.5]).double(), torch.tensor([0.0, 0.0, 0.25]).double())
    assert values.tolist() == pytest.approx([0.0, 0.0, oracles.f1_exact(0.5, 0.25)])
