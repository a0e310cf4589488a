"""The error of the field inside leaves: moments against sums over pairs, and estimates against planted values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

torch = pytest.importorskip("torch")

from rb_gpu.learn import learn  # noqa: E402
from rb_gpu.learn.config import JudgeConfig, ParamsConfig, TrainConfig  # noqa: E402
from rb_gpu.learn.field import Kernel, fit  # noqa: E402
from rb_gpu.learn.field_variance import Inside, not_negative, of_repeats, variances  # noqa: E402
from rb_gpu.learn.ridge import RIDGES, Ridge  # noqa: E402
from rb_gpu.learn.rows import Rows  # noqa: E402
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
    np.testing.assert_allclose(inside.features[0], away, atol=1e-12)
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
    # effects change with place; the variance of a config's difference to the default is twice its own
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
    # a variance that is absent is still considered possible as far as noise would hide it
    assert 0 < np.mean(none) < 0.2 * np.mean(found)


def test_nothing_varies_inside_leaves_of_one_query():
    rows = rows_of(np.arange(6), np.arange(6) % 2, 6, 2)
    inside = Inside.of(tensor(np.eye(6)), torch.arange(6), 6, [tensor(np.eye(6))])
    assert inside.variance(rows, tensor(np.arange(6.0)), 0) == 0.0


def test_what_a_query_has_of_its_own_is_measured_by_its_own_rows():
    # queries that run 10 times each: a part that all configs share, and a part of each config's own
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
    # 200 queries that run 30 times each and differ regardless of place; regression: 0.70 of the choices were better,
    # with a confidence of 0.94
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
        for found_UC, of_C, unit in zip(
            (learned_UC, left_UC), fitted.inside(inside.features), (whole_UC[-1], 1.0), strict=True
        ):
            np.testing.assert_allclose(found_UC, whole_UC / unit * of_C)
        assert torch.equal(left_UC, whole_UC) if steep == 0 else bool((left_UC < whole_UC).all())


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("queries", "steep"), [(9, 1.0), (40, 1.0), (40, 0.0)])
def test_what_varies_inside_leaves_is_what_least_squares_over_all_pairs_says(full, queries, steep):
    # estimates in planted worlds scatter too much to reveal a wrong error, ignored leaves or means that were left in
    rng = np.random.default_rng(queries)
    query, config = np.repeat(np.arange(queries), 3), np.tile(np.arange(3), queries)
    if not full:
        query = np.append(query[rng.random(len(query)) < 0.8], [0, 1, 1])
        config = rng.integers(3, size=len(query))
    place, leaf = rng.normal(size=(queries, 2)), np.where(np.arange(queries) < 2, -1, np.arange(queries) % 3)
    weight, importance = np.ones((2, len(query))) if full else rng.uniform(0.5, 2.0, (2, len(query)))
    rows = Rows(torch.as_tensor(query), torch.as_tensor(config), tensor(weight), tensor(importance), queries, 3)
    slope_DC = steep * rng.normal(size=(2, 3))
    y = 4.0 + config + (place[query] * slope_DC.T[config]).sum(1) + 1.5 * rng.normal(size=len(query))
    inside = Inside.of(tensor(place), torch.as_tensor(leaf), 3, [tensor(place)])

    def less_means(v, group, weights=None):
        weights = np.ones(len(v)) if weights is None else weights
        return v - (np.bincount(group, weights * v) / np.bincount(group, weights).clip(1e-9))[group]

    away = less_means(y, config, importance)
    away = less_means(less_means(away, query) if full else away, leaf[query] + 1)
    about, of = inside.place_QR.numpy(), {c: np.flatnonzero((config == c) & (leaf[query] >= 0)) for c in range(3)}
    estimate = error = 0.0
    own, default = (np.mean(away[np.concatenate([of[c] for c in cs])] ** 2) for cs in ((0, 2), (1,)))
    kinds = ((1, [(0, 0), (2, 2)], own**2), (-2, [(0, 1), (2, 1)], own * default), (1, [(1, 1)], default**2))
    for times, configs, product in kinds:
        pairs = np.array([
            (i, j) for a, b in configs for i in of[a] for j in of[b]
            if query[i] != query[j] and (a != b or i < j)
        ])  # fmt: skip
        one, other = query[pairs[:, 0]], query[pairs[:, 1]]
        design = np.stack([(about[one] * about[other]).sum(1), leaf[one] == leaf[other]], axis=1)
        estimate += times * np.linalg.lstsq(design, away[pairs[:, 0]] * away[pairs[:, 1]], rcond=None)[0][0]
        error += times**2 * product * np.linalg.inv(design.T @ design)[0, 0]
    most = (own + default) / float(inside.spread_U[-1])
    expected = min(not_negative(estimate, error**0.5), most)
    assert inside.variance(rows, tensor(y), 1) == pytest.approx(expected)
    assert (expected == most) == (queries == 9)


@pytest.mark.parametrize("lone", [None, 3, 2])  # a config with only one row; 2 is the default
def test_variances_are_those_of_every_config_and_leaf_by_itself(lone):
    # these variances only widen uncertainty, so that a wrong noise, weight or degree of freedom would show in no choice
    rng = np.random.default_rng(4)
    query, config = np.repeat(np.arange(60), 4), np.tile(np.arange(4), 60)
    if lone is not None:
        kept = (rng.random(240) < 0.6) & (config != lone) | (np.arange(240) == lone)
        query, config = query[kept], config[kept]
    weight, importance = rng.uniform(0.5, 2.0, (2, len(query))) if lone is not None else np.ones((2, 240))
    x, means = rng.normal(size=(60, 5)), [tensor(rng.normal(size=(4, 5)))]
    leaf, slope_OCD = np.arange(60) % 3 - (np.arange(60) > 50), rng.normal(size=(3, 4, 5))
    y = (slope_OCD[:, config] * x[query]).sum(2).T + rng.normal(size=(len(query), 3))
    columns = (torch.as_tensor(query), torch.as_tensor(config), tensor(weight), tensor(importance))
    rows = Rows(*columns, 60, 4)
    assert rows.full == (lone is None)
    kernels, inside = [Kernel(tensor(x), rows)], Inside.of(tensor(x), torch.as_tensor(leaf), 3, [tensor(x)])
    fits = {o: fit(kernels, tensor(y[:, o])) for o in (0, 2)}
    level_CO, gain_UCO, quality_UC = variances(fits, rows, tensor(y), means, inside, 2, 0)
    assert not level_CO[:, 1].any() and not gain_UCO[..., 1].any()
    for o, one in fits.items():
        (learned_UC, left_UC), leverage_UC = inside.share(one), one.leverage(means)
        assert one.deviates and float(learned_UC.max()) > 0 and float(left_UC.min()) < 1
        error, inner = y[:, o] - one.unseen_N.numpy(), inside.variance(rows, tensor(y[:, o]), 2)
        assert (inner > 0) == (lone != 2)
        of = {c: config == c for c in range(4)}
        noise = [np.average(error[of[c]] ** 2, weights=weight[of[c]]) for c in range(4)]
        level = {
            c: ((importance * error)[of[c]] ** 2).sum() / importance[of[c]].sum() ** 2 * of[c].sum() / (of[c].sum() - 1)
            for c in range(4)
            if c != lone
        }
        for c in range(4):
            known = leverage_UC[:, c] + learned_UC[:, c]
            if c == 2:
                expected, expected_U = 0.0, torch.zeros(4)
            elif lone is None:
                apart = np.mean((error[of[c]] - error[of[2]]) ** 2)
                expected, expected_U = apart / 60, known * apart + left_UC[:, c] * inner
            else:
                expected = 0.0 if lone in (c, 2) else level[c] + level[2]
                of_default = (leverage_UC[:, 2] + learned_UC[:, 2]) * noise[2]
                expected_U = known * noise[c] + of_default + left_UC[:, c] * inner
            assert float(level_CO[c, o]) == pytest.approx(expected)
            np.testing.assert_allclose(gain_UCO[:, c, o], expected_U)
            if o == 0:
                np.testing.assert_allclose(quality_UC[:, c], leverage_UC[:, c] * noise[c])
