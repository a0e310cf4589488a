"""How far the field errs inside leaves: moments against sums over pairs, and estimates against what was planted."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

torch = pytest.importorskip("torch")

from rb_gpu.learn import learn  # noqa: E402
from rb_gpu.learn.config import JudgeConfig, ParamsConfig, TrainConfig  # noqa: E402
from rb_gpu.learn.field import Kernel, Rows, fit  # noqa: E402
from rb_gpu.learn.field_variance import Inside, not_negative, of_repeats  # noqa: E402
from rb_gpu.learn.ridge import RIDGES, Ridge  # noqa: E402
from rb_gpu.learn.trajectories import Source, assemble  # noqa: E402


def tensor(x):
    return torch.as_tensor(np.asarray(x, dtype=np.float64))


def rows_of(query, config, queries, configs):
    ones = torch.ones(len(query), dtype=torch.float64)
    return Rows(torch.as_tensor(query), torch.as_tensor(config), ones, ones, queries, configs)


def test_sums_over_pairs_leave_out_those_of_one_query():
    rng = np.random.default_rng(0)
    place, leaf = rng.normal(size=(12, 3)), np.array([0] * 5 + [1] * 6 + [-1])
    query, config = rng.integers(12, size=40), rng.integers(2, size=40)
    inside = Inside.of(tensor(place), torch.as_tensor(leaf), 2, [tensor(place)])
    away = np.vstack([place[:5] - place[:5].mean(0), place[5:11] - place[5:11].mean(0), np.zeros((1, 3))])
    np.testing.assert_allclose(inside.place_QR, away, atol=1e-12)
    overall = (away**2).sum() / 9
    np.testing.assert_allclose(inside.spread_U, [(away[:5] ** 2).sum() / 4, (away[5:11] ** 2).sum() / 5, overall])
    rows, known = rows_of(query, config, 12, 2), leaf[query] >= 0
    y = np.where(known, rng.normal(size=40), 0.0)
    sums = [inside._sums(rows, c, tensor(y), tensor(known)) for c in (0, 1)]
    for a, b in ((0, 0), (0, 1)):
        expected = np.zeros(5)
        for i in np.flatnonzero((config == a) & known):
            for j in np.flatnonzero((config == b) & known):
                if query[i] != query[j]:
                    near, same = away[query[i]] @ away[query[j]], leaf[query[i]] == leaf[query[j]]
                    expected += [y[i] * y[j] * near, y[i] * y[j] * same, near**2, near * same, same]
        np.testing.assert_allclose(sums[a].with_(sums[b]), expected, atol=1e-9)


@pytest.mark.parametrize("full", [False, True])
def test_what_varies_inside_leaves_is_measured_whatever_all_configs_share(full):
    # of effects that change with place: each config's difference to the default does by twice its own
    found, none = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        place, leaf = 0.3 * rng.normal(size=(1500, 8)), rng.integers(10, size=1500)
        query = np.repeat(np.arange(1500), 4) if full else np.arange(1500)
        config = np.tile(np.arange(4), 1500) if full else rng.integers(4, size=1500)
        inside = Inside.of(tensor(place), torch.as_tensor(leaf), 10, [tensor(place)])
        shared = place[query] @ rng.normal(size=8) + rng.normal(size=(10, 4))[leaf[query], config]
        effect = (place[query] * (0.3 * rng.normal(size=(8, 4))).T[config]).sum(1)
        noise = 0.3 * rng.normal(size=len(query))
        rows = rows_of(query, config, 1500, 4)
        found.append(inside.variance(rows, tensor(shared + effect + noise), 0))
        none.append(inside.variance(rows, tensor(shared + noise), 0))
    assert np.mean(found) == pytest.approx(2 * 0.3**2, rel=0.25)
    # what is not there is held for possible as far as noise would hide it
    assert 0 < np.mean(none) < 0.2 * np.mean(found)


def test_nothing_varies_inside_leaves_of_one_query():
    rows = rows_of(np.arange(6), np.arange(6) % 2, 6, 2)
    inside = Inside.of(tensor(np.eye(6)), torch.arange(6), 6, [tensor(np.eye(6))])
    assert inside.variance(rows, tensor(np.arange(6.0)), 0) == 0.0


def test_what_a_query_has_of_its_own_is_measured_by_its_own_rows():
    # of queries that run 10 times each: what all configs share, and what each has of its own
    found, said, none = [], [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        query, config = np.repeat(np.arange(200), 10), rng.integers(3, size=2000)
        shared, noise = 0.5 * rng.normal(size=200)[query], 0.3 * rng.normal(size=2000)
        rows = rows_of(query, config, 200, 3)
        estimate, error = of_repeats(rows, tensor(shared + noise + 0.2 * rng.normal(size=(200, 3))[query, config]), 0)
        found.append(estimate)
        said.append(error)
        none.append(of_repeats(rows, tensor(shared + noise), 0)[0])
    assert np.mean(found) == pytest.approx(2 * 0.2**2, rel=0.1)
    assert np.mean(said) == pytest.approx(np.std(found), rel=0.4)
    assert abs(np.mean(none)) < 0.1 * np.mean(found)
    assert of_repeats(rows_of(np.arange(6), np.arange(6) % 2, 6, 2), tensor(np.arange(6)), 0) == (0.0, 0.0)


def test_confidence_counts_what_queries_have_of_their_own():
    # 200 queries that run 30 times each and differ whatever their place: of the choices .70 were better, told as .94
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 8)).astype(np.float32)
    query, config = np.repeat(np.arange(200), 30), rng.integers(4, size=6000)
    worth = 0.5 + 0.02 * np.arange(4) + 0.08 * rng.normal(size=(200, 4))
    found = np.clip(worth[query, config] + 0.1 * rng.normal(size=6000), 0.0, 1.0).astype(np.float32)
    columns = {
        "id": np.arange(6000, dtype=np.uint64), "query_id": np.arange(200, dtype=np.uint64), "x_QD": x,
        "query_row": query, "query_time": np.arange(200), "timestamp": query,
        "ef_search": (config + 1).astype(np.uint32), "precision": found, "recall": found,
        "latency_us": np.full(6000, 1000), "propensity": np.full(6000, 0.25, dtype=np.float32),
    }  # fmt: skip
    learning = TrainConfig(judge=JudgeConfig(latency_weight=0.0, cost_weight=0.0))
    learning.index.kind = "off"
    table = assemble(columns, [], ParamsConfig(default={"ef_search": 1}), Source())
    answers = learn(table, learning).bank().optimized_params_batch(x)
    chosen = answers["config_id"]
    acts = chosen != table.configs.default
    better = worth[np.arange(200), chosen] > worth[:, 0]
    assert acts.mean() > 0.5
    assert abs(answers["confidence"][acts].mean() - better[acts].mean()) < 0.08


def test_the_mean_of_what_is_not_negative():
    for z in (-2.0, 0.0, 1.5):
        mass = quad(lambda v, z=z: norm.pdf(v, 0.1 * z, 0.1), 0, 3)[0]
        expected = quad(lambda v, z=z: v * norm.pdf(v, 0.1 * z, 0.1), 0, 3)[0] / mass
        assert not_negative(0.1 * z, 0.1) == pytest.approx(expected, rel=1e-4)
    assert not_negative(-0.5, 0.01) == not_negative(-0.03, 0.01) > 0
    assert (not_negative(0.2, 0.0), not_negative(-0.2, 0.0)) == (0.2, 0.0)


def test_what_a_ridge_learns_and_leaves_is_its_variance_and_squared_bias():
    rng = np.random.default_rng(1)
    x, at, ridge = rng.normal(size=(60, 4)), rng.normal(size=(9, 4)), RIDGES.index(30.0)
    learned, left = Ridge(tensor(x), tensor(np.ones(60))).learned(tensor(at), ridge)
    inner = (x - x.mean(0)).T @ (x - x.mean(0))
    shrunk = np.linalg.inv(inner + 30 * np.eye(4))
    missed = at @ (np.eye(4) - shrunk @ inner)
    assert float(learned) == pytest.approx(np.trace(at @ shrunk @ inner @ shrunk @ at.T) / 9)
    assert float(left) == pytest.approx((missed**2).sum() / (at**2).sum())


def test_where_configs_do_not_deviate_nothing_is_learned_inside_leaves():
    rng = np.random.default_rng(2)
    x, config = rng.normal(size=(300, 3)), rng.integers(2, size=300)
    inside = Inside.of(tensor(x), torch.arange(300) % 5, 5, [tensor(x)])
    for steep in (0.0, 2.0):
        y = steep * x[:, 0] * config + rng.normal(size=300)
        fitted = fit([Kernel(tensor(x), rows_of(np.arange(300), config, 300, 2))], tensor(y))
        learned_UC, left_UC = inside.share(fitted)
        assert fitted.deviates == (steep > 0) == bool((learned_UC > 0).all())
        whole_UC = inside.spread_U[:, None].expand_as(left_UC)
        assert torch.equal(left_UC, whole_UC) if steep == 0 else bool((left_UC < whole_UC).all())
