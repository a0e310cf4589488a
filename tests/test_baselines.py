"""The baselines find what is planted, and each agrees with the formula of its paper."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from rb_gpu.learn.baselines import (  # noqa: E402
    LEARNERS,
    Training,
    hard_clusters,
    linucb,
    logistic_per_config,
    nearest_neighbours,
    rank_votes,
    tune,
)


def planted(seed: int, n: int = 600) -> Training:
    """Config 1 is best where x[0] > 0, config 2 elsewhere; config 0 is in between everywhere."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 4)).astype(np.float32)
    x[:, 0] += 2 * np.sign(x[:, 0])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    config = rng.integers(3, size=n)
    sign = np.where(x[:, 0] > 0, 1.0, -1.0)
    utility = 0.5 + 0.2 * sign * np.array([0.0, 1.0, -1.0])[config] + 0.1 * rng.normal(size=n)
    return Training(x, np.arange(n), config, np.full(n, 3.0), utility, 3)


@pytest.mark.parametrize("name", LEARNERS)
def test_every_baseline_finds_a_planted_boundary(name: str):
    training, x = planted(0), planted(1).x_QD
    choice = LEARNERS[name](training, np.random.default_rng(0))(training, x).argmax(1)
    assert (choice == np.where(x[:, 0] > 0, 1, 2)).mean() > 0.95


@pytest.mark.parametrize("name", LEARNERS)
def test_a_config_that_was_never_tried_is_not_chosen(name: str):
    training = planted(0)
    wider = Training(training.x_QD, training.query_N, training.config_N, training.weight_N, training.utility_N, 4)
    assert (LEARNERS[name](wider, np.random.default_rng(0))(wider, training.x_QD).argmax(1) != 3).all()


def test_neighbours_are_plain_means():
    training = planted(2, 60)
    prior = 5.0 * 3.0 * training.means
    both = nearest_neighbours(training, training.x_QD[:1], (7, 20))
    order = np.argsort(-(training.x_QD @ training.x_QD[0]))
    for k, scores in zip((7, 20), both[:, 0], strict=True):
        for c in range(3):
            rows = order[:k][training.config_N[order[:k]] == c]
            expected = (3.0 * training.utility_N[rows].sum() + prior[c]) / (3.0 * len(rows) + 15.0)
            assert scores[c] == pytest.approx(expected)


def test_clusters_are_plain_means():
    training = planted(2, 60)
    prior = 5.0 * 3.0 * training.means
    [scores] = hard_clusters(training, training.x_QD[:1], np.array([[1, 0, 0, 0], [-1, 0, 0, 0]], dtype=np.float32))
    mine = (training.x_QD[:, 0] > 0) == (training.x_QD[0, 0] > 0)
    for c in range(3):
        u = training.utility_N[mine & (training.config_N == c)]
        assert scores[c] == pytest.approx((3 * u.sum() + prior[c]) / (3 * len(u) + 15))


def test_rank_votes_by_a_loop():
    training = planted(3, 90)
    rng = np.random.default_rng(0)
    centroids = rng.normal(size=(7, 4)).astype(np.float32)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    total, weight = training.sums((training.x_QD @ centroids.T).argmax(1), 7)
    utility = training.shrunk(total, weight)
    for b, votes in enumerate(rank_votes(training, training.x_QD[:5], centroids)):
        cosine = centroids @ training.x_QD[b]
        expected = np.zeros(3)
        for k in np.argsort(-cosine)[:4]:
            for rank, c in enumerate(np.argsort(-utility[k])):
                expected[c] += np.exp(-9.0 * (1.0 - cosine[k])) / (1 + rank)
        assert votes / votes.sum() == pytest.approx(expected / expected.sum(), rel=1e-4)


def test_linucb_is_what_its_updates_give():
    training = planted(4, 80)
    a, b = np.stack([np.eye(5)] * 3), np.zeros((3, 5))
    for query, config, utility in zip(training.query_N, training.config_N, training.utility_N, strict=True):
        x = np.append(1.0, training.x_QD[query])
        a[config] += np.outer(x, x)
        b[config] += utility * x
    x = np.append(1.0, training.x_QD[7])
    expected = [x @ np.linalg.inv(a[c]) @ b[c] for c in range(3)]
    assert linucb(training, training.x_QD[7:8])[0] == pytest.approx(expected)


def test_logistic_is_at_the_optimum_of_its_loss():
    training = planted(5, 300)
    steep, flat = (logistic_per_config(training, training.x_QD, penalty) for penalty in (1e-3, 1e3))
    for c in range(3):
        mine = training.config_N == c
        # at the optimum, a logistic regression with an intercept reproduces each config's mean
        assert steep[mine, c].mean() == pytest.approx(training.utility_N[mine].mean(), abs=2e-3)
    assert flat == pytest.approx(np.tile(training.means, (300, 1)), abs=2e-3) and np.ptp(steep[:, 1]) > 0.2


def test_tuning_takes_the_setting_that_is_worth_most():
    training = planted(6)

    def settings(inside: Training, x: np.ndarray) -> np.ndarray:
        right = np.where(x[:, :1] > 0, [[0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]])
        return np.stack([1.0 - right, right, np.tile([[1.0, 0.0, 0.0]], (len(x), 1))])

    assert tune(settings, training, np.random.default_rng(0)) == 1
