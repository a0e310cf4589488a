"""The field: closed forms against refits, what it learns in planted worlds, and its part in an answer."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from scipy.linalg import inv, sqrtm
from scipy.stats import norm

torch = pytest.importorskip("torch")

from pretend import pretended  # noqa: E402

from rb_gpu.bank import ReasoningBank  # noqa: E402
from rb_gpu.errors import ArtifactError  # noqa: E402
from rb_gpu.evidence import OUTCOMES  # noqa: E402
from rb_gpu.field import FIELD_ARRAYS, SLOPE_BOUNDS  # noqa: E402
from rb_gpu.learn import landmarks, learn  # noqa: E402
from rb_gpu.learn.canonical import average_coordinates, canonical  # noqa: E402
from rb_gpu.learn.config import ClusterConfig, DeviceConfig, JudgeConfig, ParamsConfig, TrainConfig  # noqa: E402
from rb_gpu.learn.echo import echoes  # noqa: E402
from rb_gpu.learn.field import Kernel, fit  # noqa: E402
from rb_gpu.learn.landmarks import AXES, _axes  # noqa: E402
from rb_gpu.learn.ridge import FOLDS, RIDGES, Ridge, Task, average, repeated  # noqa: E402
from rb_gpu.learn.rows import Rows  # noqa: E402
from rb_gpu.learn.trajectories import Source, assemble  # noqa: E402
from rb_gpu.normal import normal_quantile  # noqa: E402
from rb_gpu.objective import Objective  # noqa: E402
from rb_gpu.types import Tradeoff  # noqa: E402
from tests.null_worlds import world  # noqa: E402


def tensor(x):
    return torch.as_tensor(np.asarray(x, dtype=np.float64))


def phi(field, cosine):
    return np.concatenate([np.exp(slope * (cosine - 1)) for slope in field.slopes], axis=-1)


def places(field, x_BD):
    unit_BD = x_BD.astype(np.float64) / np.linalg.norm(x_BD, axis=1, keepdims=True)
    place_BR = unit_BD @ field.axes.T - field.centre
    return place_BR / np.linalg.norm(place_BR, axis=1, keepdims=True)


def rows_of(query, config, queries, configs, weight=None):
    weight = np.ones(len(query)) if weight is None else weight / np.mean(weight)
    return Rows(torch.as_tensor(query), torch.as_tensor(config), tensor(weight), tensor(weight), queries, configs)


def test_leave_one_out_errors_are_those_of_refits():
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(30, 4)), rng.normal(size=(30, 2)), rng.uniform(0.5, 2, 30)
    x[29] *= 10  # an outlying row has a leverage near 1
    ridge = Ridge(tensor(x), tensor(w))
    assert float(ridge.kept_NL[29, RIDGES.index(3.0)]) < 0.1
    found = ridge.errors(tensor(y), *ridge.solve(tensor(y)), RIDGES.index(3.0)).numpy()
    for left in (0, 11, 29):
        keep = np.arange(30) != left
        # centring uses the mean of all rows instead of the others'; the term 1/Σw of the leverage accounts for that
        design = np.hstack([np.ones((29, 1)), x[keep]])
        penalty = np.diag([0.0, 3, 3, 3, 3])
        coef = np.linalg.solve((design * w[keep, None]).T @ design + penalty, (design * w[keep, None]).T @ y[keep])
        assert found[left] == pytest.approx(y[left] - np.append(1.0, x[left]) @ coef, rel=1e-9)


def test_a_row_is_predicted_without_all_rows_of_its_query():
    # regression: with only the row itself left out, the other rows of its query predicted the query's own deviation,
    # and 13 % of the worlds in which no config is better passed the gate
    rng = np.random.default_rng(1)
    query = np.array([0, 0, 0, 1, 2, 2, *range(3, 20)])
    x, y, w = rng.normal(size=(20, 3))[query], rng.normal(size=(23, 2)), rng.uniform(0.5, 2, 23)
    ridge = Ridge(tensor(x), tensor(w), repeated(tensor(query)))
    found = ridge.errors(tensor(y), *ridge.solve(tensor(y)), RIDGES.index(3.0)).numpy()
    for left in (0, 3, 4, 22):
        keep = query != query[left]
        design = np.hstack([np.ones((keep.sum(), 1)), x[keep]])
        penalty = np.diag([0.0, 3, 3, 3])
        coef = np.linalg.solve((design * w[keep, None]).T @ design + penalty, (design * w[keep, None]).T @ y[keep])
        assert found[left] == pytest.approx(y[left] - np.append(1.0, x[left]) @ coef, rel=1e-9)


def test_a_second_regression_predicts_a_row_whose_query_neither_has_seen():
    # regression: the first regression had seen the row, so that where outcomes were high, residuals nearby were low
    rng = np.random.default_rng(9)
    for times in (1, 2):
        query = np.arange(90) // times
        config, w, y = rng.integers(2, size=90), rng.uniform(0.5, 2, 90), rng.normal(size=90)
        features = [rng.normal(size=(90 // times, 5)) for _ in range(2)]

        def ridges(keep, query=query, features=features, w=w):
            q = tensor(query[keep])
            return [Ridge(tensor(x[query[keep]]), tensor(w[keep]), repeated(q)) for x in features]

        def left_by(shared, share, y):
            away = [share[s, i] * one.errors(tensor(y)[:, None], *one.solve(tensor(y)[:, None]), i)
                    for s, one in enumerate(shared) for i in range(len(RIDGES)) if share[s, i] > 0]  # fmt: skip
            return torch.stack(away).sum(0)[:, 0]

        shared, mine, ridge = ridges(np.arange(90)), np.flatnonzero(config == 1), RIDGES.index(3.0)
        share, _ = average([Task(shared, tensor(y)[:, None])], 90.0)
        left = left_by(shared, share, y)
        of_query = np.bincount(query, w * left.numpy())[query] / np.bincount(query, w)[query]
        own, left = ridges(mine), left[mine, None]
        missed = [tensor(of_query[mine, None]) * part for part in echoes(shared, share, own, torch.as_tensor(mine))]
        errors = {}
        for slope in (0, 1):
            solved = own[slope].solve(left)
            predicted = {
                name: left[:, 0] - task.errors(slope, solved, ridge)[:, 0]
                for name, task in (("unheard", Task(own, left, missed)), ("heard", Task(own, left)))
            }
            for at, row in enumerate(mine):
                keep = query != query[row]
                rest = left_by(ridges(keep), share, y[keep])[config[keep] == 1, None]
                again = ridges(keep & (config == 1))[slope]
                mean, products = again.solve(rest)
                coef = again.vectors_FE @ (products[:, 0] * again.shrunk_EL[:, ridge])
                refit = float(mean[0] + (tensor(features[slope][query[row]]) - again.mean_F) @ coef)
                for name, said in predicted.items():
                    errors.setdefault(name, []).append(float(said[at]) - refit)
        assert np.abs(errors["unheard"]).mean() < (0.1 if times == 1 else 0.3) * np.abs(errors["heard"]).mean()


@pytest.mark.parametrize("rows", [30, 12, 5])
def test_a_ridge_is_the_same_from_its_rows_as_from_its_features(rows):
    # with fewer rows than features there are fewer eigenvectors, and directions along which no row lies keep their
    # prior
    rng = np.random.default_rng(rows)
    x_NF, weight_N, y_N = rng.normal(size=(rows, 12)), rng.uniform(0.5, 2, rows), rng.normal(size=rows)
    x_PF = rng.normal(size=(7, 12))
    ridge = Ridge(tensor(x_NF), tensor(weight_N))
    mean, products = ridge.solve(tensor(y_N[:, None]))
    middle_F, level = weight_N @ x_NF / weight_N.sum(), weight_N @ y_N / weight_N.sum()
    away_NF = x_NF - middle_F
    gram_FF, design = away_NF.T @ (weight_N[:, None] * away_NF), (weight_N**2).sum() / weight_N.sum()
    for at, strength in enumerate(RIDGES[:-1]):
        inverse_FF = np.linalg.inv(gram_FF + strength * np.eye(12))
        coef_F = inverse_FF @ away_NF.T @ (weight_N * (y_N - level))
        share = torch.nn.functional.one_hot(torch.tensor(at), len(RIDGES))[:, None].double()
        assert ridge.coef(products, share)[:, 0].numpy() == pytest.approx(coef_F, abs=1e-8)
        hat_N = weight_N * (np.einsum("nf,fg,ng->n", away_NF, inverse_FF, away_NF) + 1 / weight_N.sum())
        error_N = (y_N - level - away_NF @ coef_F) / (1 - hat_N)
        assert ridge.errors(tensor(y_N[:, None]), mean, products, at)[:, 0].numpy() == pytest.approx(error_N, abs=1e-7)
        away_PF = x_PF - middle_F
        variance_P = design * np.einsum("pf,fg,pg->p", away_PF, inverse_FF, away_PF)
        assert ridge.variance(tensor(x_PF), at).numpy() == pytest.approx(variance_P, rel=1e-7)
        found_FF = gram_FF @ inverse_FF
        learned, left = (float(one) for one in ridge.learned(tensor(x_PF), at))
        assert learned == pytest.approx(design * np.einsum("pf,fg,pg->p", x_PF, inverse_FF @ found_FF, x_PF).mean())
        kept_PF = x_PF @ (np.eye(12) - found_FF)
        assert left == pytest.approx((kept_PF**2).sum() / (x_PF**2).sum())
    assert ridge.variance(tensor(x_PF), len(RIDGES) - 1).numpy() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dims", [(2, 3), (7, 8)], ids=["more rows than eigenvectors", "fewer"])
def test_an_echo_is_what_rows_heard_of_one_another_summed_pair_by_pair(dims):
    # refits equal it only up to second order, which would hide a wrong weight or leverage
    rng = np.random.default_rng(3)
    query, w = np.append(np.arange(20), [0, 3, 3, 7]), rng.uniform(0.5, 3.0, 24)
    mine, features = np.array([0, 2, 3, 5, 8, 11, 15, 20, 21, 22]), [rng.normal(size=(20, d))[query] for d in dims]
    share = rng.dirichlet(np.ones(2 * len(RIDGES))).reshape(2, -1)

    def told(x, w, ridge):
        """(N, N): the weight of each row's outcome in the prediction of another row."""
        x = x - w @ x / w.sum()
        return x @ np.linalg.inv(x.T @ (w[:, None] * x) + min(ridge, 1e300) * np.eye(x.shape[1])) @ x.T + 1 / w.sum()

    h = sum(share[s, i] * told(x, w, ridge) for s, x in enumerate(features) for i, ridge in enumerate(RIDGES))
    ridges = [[Ridge(tensor(x[at]), tensor(w[at]), repeated(tensor(query[at]))) for x in features]
              for at in (np.arange(24), mine)]  # fmt: skip
    found = echoes(ridges[0], tensor(share), ridges[1], torch.as_tensor(mine))
    whole = np.bincount(query, w)[query]
    for slope, x in enumerate(features):
        for i, ridge in enumerate(RIDGES):
            own = told(x[mine], w[mine], ridge) * w[mine]
            for a, row in enumerate(mine):
                others = query[mine] != query[row]
                heard = h[mine, row] * whole[row] / (1 - whole[mine] * np.diag(h)[mine])
                expected = (own[a] * heard)[others].sum() / (1 - own[a][~others].sum())
                assert float(found[slope][a, i]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("configs", "most"), [(2, 0.5), (2, 0.8), (3, 1 / 3)])
def test_what_other_configs_would_have_done_is_predicted_without_the_query_too(configs, most):
    # regression: other configs' deviations were learned from residuals of a shared fit that held the row's own noise
    # and what did well by luck seemed the better choice there. Of logs of two equal configs 17 % passed the gate
    told = []
    for seed in range(30):
        rng, queries = np.random.default_rng(seed), 400
        propensity = np.full(configs, (1.0 - most) / (configs - 1))
        propensity[0] = most
        x, config = rng.normal(size=(queries, 30)), rng.choice(configs, size=queries, p=propensity)
        noise = rng.normal(size=queries)
        y = torch.as_tensor(noise + (config == 1) * (x @ (0.25 * rng.normal(size=30))))
        weight = torch.as_tensor(1.0 / propensity[config])
        every = torch.arange(queries)
        rows = Rows(every, torch.as_tensor(config), weight.sqrt(), weight / weight.mean(), queries, configs)
        found = fit([Kernel(torch.as_tensor(x), rows)], y)
        assert found.deviates
        ran_Q = found.unseen_QC[every, rows.config_N]
        others_Q = (found.unseen_QC.sum(1) - ran_Q) / (configs - 1)
        told.append(float(((ran_Q - others_Q) * torch.as_tensor(noise)).mean()))
    # 0.05, 0.04 and 0.03 before
    assert abs(np.mean(told)) <= max(0.01, 2 * np.std(told) / len(told) ** 0.5)


def test_deviations_of_a_log_are_found_beside_a_strong_signal_that_all_configs_share():
    # regression: each row's own outcome echoed in its neighbours' residuals; in 5 of 8 worlds no deviations were found,
    # and in the others they were twice as large as predicted
    missed = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        x, config = rng.normal(size=(1000, 120)), rng.integers(4, size=1000)
        true = x @ rng.normal(size=(120, 4)) * 0.05
        shared = x @ rng.normal(size=120) * 0.2
        rows = rows_of(np.arange(1000), config, 1000, 4)
        y = true[np.arange(1000), config] + shared + rng.normal(size=1000)
        found = fit([Kernel(tensor(x), rows)], tensor(y))
        said = x @ found.coefs[0].numpy()
        said, true = (v - v.mean(1, keepdims=True) for v in (said, true))
        missed.append(((said - true) ** 2).sum() / (true**2).sum())
    assert np.mean(missed) < 0.8


def test_of_rows_of_one_query_and_config_the_last_is_kept_whatever_threads_do():
    rng = np.random.default_rng(3)
    query, config = np.concatenate([np.arange(60), np.arange(40)]), np.arange(100) % 2
    y, features = rng.normal(size=100) + config, [tensor(rng.normal(size=(60, 4))) for _ in range(2)]
    here = fit([Kernel(x, rows_of(query, config, 60, 2)) for x in features], tensor(y))
    with pretended() as operations:
        there = rows_of(query, config, 60, 2)
        columns = ("query_N", "config_N", "weight_N", "importance_N")
        there = replace(there, **{name: getattr(there, name).to("cuda") for name in columns})
        found = fit([Kernel(x.to("cuda"), there) for x in features], tensor(y).to("cuda"))
        unseen_QC, raced = found.unseen_QC.cpu(), operations.raced
    assert raced == 0 and torch.equal(unseen_QC, here.unseen_QC)


def test_noise_leaves_only_the_mean_and_a_signal_survives():
    rng = np.random.default_rng(1)
    x, noise = rng.normal(size=(400, 5)), rng.normal(size=(400, 1))
    signal = 2 * x[:, :1] + 0.1 * noise
    ridge = [Ridge(tensor(x), tensor(np.ones(400)))]
    share, [flat] = average([Task(ridge, tensor(noise))], 400.0)
    assert float(share[0, RIDGES.index(300.0) :].sum()) > 0.5
    assert float((flat.unseen_NC - tensor(noise).mean()).std()) < 0.15
    _, [steep] = average([Task(ridge, tensor(signal))], 400.0)
    assert steep.coefs[0][0, 0].item() == pytest.approx(2.0, rel=0.02)


def test_slopes_and_ridges_count_by_their_leave_one_out_errors():
    # computed slope by slope and ridge by ridge, for two groups that share the weights
    rng, rows = np.random.default_rng(8), 12.0
    weights = rng.uniform(0.2, 3.0, (2, 40))
    groups = []
    for w in weights:
        features = [rng.normal(size=(40, 3)) + 1.0 for _ in range(2)]
        y = features[0][:, :1] * [1.0, -0.5] + 2.0 + rng.normal(size=(40, 2))
        groups.append(([Ridge(tensor(x), tensor(w)) for x in features], features, y))
    share, found = average([Task(ridges, tensor(y)) for ridges, _, y in groups], rows)
    loss, errors = np.zeros((2, len(RIDGES))), np.zeros((2, 2, len(RIDGES), 40, 2))
    for g, (ridges, _, y) in enumerate(groups):
        for s, ridge in enumerate(ridges):
            for i in range(len(RIDGES)):
                errors[g, s, i] = ridge.errors(tensor(y), *ridge.solve(tensor(y)), i).numpy()
                loss[s, i] += (weights[g][:, None] * errors[g, s, i] ** 2).sum()
    expected = loss ** (-rows / 2) / (loss ** (-rows / 2)).sum()
    assert expected.max() < 0.5
    np.testing.assert_allclose(share, expected, rtol=1e-4)
    for g, (_, features, y) in enumerate(groups):
        w, one = weights[g], found[g]
        np.testing.assert_allclose(one.unseen_NC, y - np.einsum("si,sinc->nc", expected, errors[g]), rtol=1e-4)
        coefs = []
        for s, x in enumerate(features):
            away = x - w @ x / w.sum()
            coefs.append(sum(
                expected[s, i] * np.linalg.solve(away.T @ (w[:, None] * away) + min(ridge, 1e300) * np.eye(3),
                                                 away.T @ (w[:, None] * (y - w @ y / w.sum())))
                for i, ridge in enumerate(RIDGES)
            ))  # fmt: skip
        np.testing.assert_allclose(np.stack(one.coefs), coefs, rtol=1e-4)
        at_means = sum(w @ x / w.sum() @ coef for x, coef in zip(features, coefs, strict=True))
        np.testing.assert_allclose(one.base_C, w @ y / w.sum() - at_means, rtol=1e-4)


def test_canonical_coordinates_have_uncorrelated_noise_and_signal_and_lead_back():
    rng = np.random.default_rng(4)
    signal = rng.normal(size=(500, 2)) @ rng.normal(size=(2, 4))
    noise = rng.normal(size=(500, 4)) @ rng.normal(size=(4, 4))
    to, back = canonical(tensor(signal + noise), tensor(signal))
    assert (to @ back).numpy() == pytest.approx(np.eye(4), abs=1e-9)
    assert torch.cov((tensor(noise) @ to).T).numpy() == pytest.approx(np.eye(4), abs=1e-9)
    whole = torch.cov((tensor(signal + noise) @ to).T).numpy()
    assert np.abs(whole - np.diag(np.diag(whole))).max() < 1e-9
    # outcomes that always equal each other have no noise between them
    same = tensor(np.repeat(signal[:, :1] + noise[:, :1], 3, axis=1))
    to, back = canonical(same, tensor(np.repeat(signal[:, :1], 3, axis=1)))
    assert (same @ to @ back).numpy() == pytest.approx(same.numpy(), abs=1e-6)


def test_what_tells_configs_apart_has_a_ridge_of_its_own():
    # regression: all configs share a strong signal, and with the ridge that suits it, noise was taken for differences
    rng = np.random.default_rng(5)
    x, n, configs = rng.normal(size=(300, 60)), 300, 4
    shared = x @ rng.normal(size=60)
    y = shared[:, None] + rng.normal(size=(n, configs))
    ridges = [Ridge(tensor(x), tensor(np.ones(n)))]
    _, [together] = average([Task(ridges, tensor(y))], float(n))
    rows = rows_of(np.repeat(np.arange(n), configs), np.tile(np.arange(configs), n), n, configs)
    found = fit([Kernel(tensor(x), rows)], tensor(y.ravel()))

    def spread(coef):
        return float((coef - coef.mean(1, keepdim=True)).square().mean())

    assert spread(found.coefs[0]) < 0.2 * spread(together.coefs[0])
    assert found.coefs[0].mean(1).numpy() == pytest.approx(together.coefs[0].mean(1).numpy(), abs=0.1)


def test_a_query_of_a_full_table_is_predicted_in_coordinates_that_do_not_know_it():
    # regression: the coordinates were fitted to the noise of all queries, and half of the predicted noise came true
    rng = np.random.default_rng(6)
    n, configs, told = 400, 9, []
    x = rng.normal(size=(n, 60))
    ridges = [Ridge(tensor(x), tensor(np.ones(n)))]
    for _ in range(20):
        y = rng.normal(size=(n, configs))
        unseen = average_coordinates(ridges, tensor(y))[1].unseen_NC.numpy()
        away = unseen - unseen.mean(0)
        told.append((away * (y - y.mean(0))).sum())
    assert np.mean(told) < 2 * np.std(told) / np.sqrt(len(told))
    moved = y.copy()
    moved[3] += rng.normal(size=configs)
    after = average_coordinates(ridges, tensor(moved))[1].unseen_NC.numpy()
    # equal up to the influence on the weights of the first regression
    assert np.abs(after[3] - unseen[3]).max() < 0.01
    assert np.abs(after - unseen)[np.arange(n) % FOLDS != 3 % FOLDS].max() > 0.01


def test_an_unseen_prediction_does_not_know_its_row():
    # row 7's outcome is moved by 0.5: its own prediction must stay, up to the influence on the averaging weights
    rng = np.random.default_rng(2)
    x = rng.normal(size=(200, 6))
    config, y = rng.integers(3, size=200), x[:, 0] + 0.1 * rng.normal(size=200)
    rows = rows_of(np.arange(200), config, 200, 3)
    before = fit([Kernel(tensor(x), rows)], tensor(y))
    moved = y.copy()
    moved[7] += 0.5
    after = fit([Kernel(tensor(x), rows)], tensor(moved))
    assert float(abs(after.unseen_N[7] - before.unseen_N[7])) < 0.02
    others = torch.arange(200) != 7
    assert float((after.unseen_N - before.unseen_N)[others].abs().max()) > 1e-6


def test_configs_that_differ_by_place_are_told_from_those_that_do_not():
    rng = np.random.default_rng(3)
    x, n = rng.normal(size=(1500, 3)), 1500
    config = rng.integers(2, size=n)
    level = np.array([0.2, 0.4])[config]
    rows = rows_of(np.arange(n), config, n, 2)
    same = fit([Kernel(tensor(x), rows)], tensor(level + x[:, 1] + 0.3 * rng.normal(size=n)))
    crossing = fit([Kernel(tensor(x), rows)], tensor(level + x[:, 0] * (2 * config - 1) + 0.3 * rng.normal(size=n)))
    assert crossing.deviates
    slope = (crossing.coefs[0][0, 1] - crossing.coefs[0][0, 0]).item()
    assert slope == pytest.approx(2.0, abs=0.1)
    apart = (same.coefs[0][:, 1] - same.coefs[0][:, 0]).abs().max().item()
    assert apart < 0.1
    assert (same.base_C[1] - same.base_C[0]).item() == pytest.approx(0.2, abs=0.06)


def test_what_the_shared_regression_leaves_to_all_configs_is_no_deviation():
    # regression: a ridge leaves some of what configs share, both deviations learned it and predicted unseen rows
    # better; the field deviated in half of the logs of two equal configs, and 8 % of them passed the gate
    deviates = 0
    for seed in range(30):
        rng, n = np.random.default_rng(seed), 400
        kind = rng.integers(14, size=n)
        x = rng.normal(size=(14, 32))[kind] + 0.5 * rng.normal(size=(n, 32))
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        y = 0.1 * rng.normal(size=14)[kind] + 0.05 * rng.normal(size=n)
        rows = rows_of(np.arange(n), rng.integers(2, size=n), n, 2)
        kernel = np.exp(4 * (x @ x[:60].T - 1))
        features = kernel @ inv(sqrtm(kernel[:60]))
        deviates += fit([Kernel(tensor(features), rows)], tensor(y)).deviates
    assert deviates <= 8


@pytest.mark.parametrize("apart", [0.0, 1.0])
def test_a_full_table_is_predicted_with_and_without_deviations(apart):
    rng, n = np.random.default_rng(4), 300
    x = 1.0 + rng.normal(size=(n, 3))
    true_QC = np.array([0.2, 0.4]) + x[:, [1]] + apart * x[:, [0]] * np.array([-1.0, 1.0])
    rows = rows_of(np.repeat(np.arange(n), 2), np.tile([0, 1], n), n, 2)
    found = fit([Kernel(tensor(x), rows)], tensor((true_QC + 0.1 * rng.normal(size=(n, 2))).ravel()))
    assert found.deviates == (apart > 0)
    for predicted_QC in (found.base_C + tensor(x) @ found.coefs[0], found.unseen_QC):
        np.testing.assert_allclose(predicted_QC, true_QC, atol=0.1)


def test_a_constant_outcome_is_its_level():
    rows = rows_of(np.repeat(np.arange(20), 2), np.tile([0, 1], 20), 20, 2)
    constant = fit([Kernel(torch.randn(20, 3, dtype=torch.float64), rows)], tensor(np.tile([1.5, 4.0], 20)))
    assert not constant.deviates
    assert constant.base_C.tolist() == [1.5, 4.0]
    assert not constant.coefs[0].any()
    # as if one of all 40 rows deviated by the 2.5 between the levels
    np.testing.assert_allclose(constant.level_CC, np.diag([2.5**2 / 40 / 20] * 2))


def table(seed, n=1500, configs=3, effect=0.3, full=False, propensity=True):
    """Config 1 is better by `effect` where x[0] > 0 and worse elsewhere; config 0 is the default."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 12)).astype(np.float32)
    x[:, 0] += 1.5 * np.sign(x[:, 0])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    query = np.repeat(np.arange(n), configs) if full else np.arange(n)
    config = np.tile(np.arange(configs), n) if full else rng.integers(configs, size=n)
    better = effect * np.sign(x[query, 0]) * (config == 1)
    quality = np.clip(0.5 + better + 0.1 * rng.normal(size=len(query)), 0, 1).astype(np.float32)
    columns = {
        "id": np.arange(len(query), dtype=np.uint64), "x_QD": x, "query_id": np.arange(n, dtype=np.uint64),
        "query_row": query, "query_time": np.arange(n), "timestamp": query.astype(np.int64),
        "ef_search": (16 * (1 + config)).astype(np.uint32), "precision": quality, "recall": quality,
        "latency_us": np.full(len(query), 1000), "cost": np.ones(len(query), np.float32),
    }  # fmt: skip
    if propensity and not full:
        columns["propensity"] = np.full(len(query), 1 / configs, np.float32)
    return assemble(columns, [], ParamsConfig(default={"ef_search": 16}), Source())


def trained(trajectories, **judging):
    config = TrainConfig(device=DeviceConfig("cpu"), cluster=ClusterConfig(checkpoint_every=0))
    config.judge = JudgeConfig(**{"latency_weight": 0.0, "cost_weight": 0.0, **judging})
    return learn(trajectories, config)


@pytest.fixture(scope="module")
def bank():
    return trained(table(0)).bank()


@pytest.mark.parametrize(("full", "propensity"), [(True, False), (False, True), (False, False)])
def test_a_planted_boundary_is_followed_on_unseen_queries(full, propensity):
    bank = trained(table(5, full=full, propensity=propensity)).bank()
    x = table(6).x_QD
    config = bank.optimized_params_batch(x)["ef_search"]
    sure = np.abs(x[:, 0]) > 0.3
    assert (config[sure & (x[:, 0] > 0)] == 32).mean() > 0.97
    # where x[0] < 0, configs 0 and 2 are equal
    assert (config[sure & (x[:, 0] < 0)] != 32).mean() > 0.97


def test_where_nothing_differs_the_default_stands():
    acted = [
        (trained(table(seed, n=600, effect=0.0)).bank().optimized_params_batch(table(9).x_QD)["ef_search"] != 16).mean()
        for seed in range(100, 112)
    ]
    assert np.count_nonzero(acted) <= 1


OBJECTIVES = [
    {"objective": "utility"}, {"objective": "utility", "latency_weight": 0.05},
    {"objective": "floor", "target": 0.45}, {"objective": "floor", "target": 0.9},
    {"objective": "bound", "max_latency_us": 5000.0},
]  # fmt: skip


@pytest.mark.parametrize("judging", OBJECTIVES, ids=str)
def test_a_config_that_never_ran_is_no_answer(judging):
    # regression: a training slice may lack a config; its prediction was the mean of all others with zero uncertainty,
    # and two in three queries got it where the default was bad
    trajectories = table(0)
    quick = np.where(trajectories.config_id == 2, 10, trajectories.latency_us)
    trajectories = replace(trajectories, latency_us=quick)
    bank = trained(trajectories.select_queries(trajectories.config_id != 2), **judging).bank()
    found = bank.optimized_params_batch(trajectories.x_QD)["ef_search"]
    assert len(bank.configs) == 3 and (found != 48).all()
    assert judging.get("target") == 0.45 or (found == 32).any()  # the default reaches this target
    alone = [bank.optimized_params(x).params.ef_search for x in trajectories.x_QD[:20]]
    assert alone == found[:20].tolist()


def test_nothing_beats_a_default_that_never_ran(caplog):
    trajectories = table(0)
    learned = trained(trajectories.select_queries(trajectories.config_id != 0))
    found = learned.bank().optimized_params_batch(trajectories.x_QD)
    assert (found["ef_search"] == 16).all() and (found["confidence"] == 0).all()
    assert np.isnan(found["expected_quality"]).all()
    assert "stands everywhere" in caplog.text


def test_a_floor_needs_no_default():
    trajectories = table(0)
    bank = trained(trajectories.select_queries(trajectories.config_id != 0), objective="floor", target=0.45).bank()
    found = bank.optimized_params_batch(trajectories.x_QD)["ef_search"]
    assert (found != 16).all()


def test_a_floor_takes_what_is_cheapest_for_the_query_itself():
    # one leaf, so that only the field tells the halves apart. Config 1 costs 1.6 in one and 2.4 in the other, less in
    # both than what else reaches the target; at its mean of 2 it would lose the first, at twice its deviation the other
    trajectories = table(3, n=900, effect=0.0)
    config, right = trajectories.config_id, trajectories.x_QD[:, 0] > 0
    cost = np.select([config == 0, config == 1], [1.8, np.where(right, 1.6, 2.4)], 2.6)
    quality = np.where((config == 0) & ~right, 0.0, 0.8) + np.random.default_rng(3).normal(scale=0.01, size=900)
    given = TrainConfig(device=DeviceConfig("cpu"), cluster=ClusterConfig(k=1, checkpoint_every=0))
    given.judge = JudgeConfig(objective="floor", target=0.77)
    told = {"precision": quality.astype(np.float32), "recall": quality.astype(np.float32)}
    bank = learn(replace(trajectories, cost=cost.astype(np.float32), **told), given).bank()
    x = table(4, n=200).x_QD
    assert bank.data.field is not None
    assert (bank.optimized_params_batch(x)["ef_search"] == 32).mean() > 0.97
    assert np.mean([bank.optimized_params(one).params.ef_search == 32 for one in x[:50]]) > 0.95


def test_one_and_many_answers_agree(bank):
    assert bank.data.field is not None
    x = np.concatenate([table(7, n=200).x_QD, np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32)])
    many = bank.optimized_params_batch(x)
    for row in range(0, 250, 7):
        one = bank.optimized_params(x[row])
        assert one.config_id == many["config_id"][row]
        assert one.confidence == pytest.approx(many["confidence"][row], abs=1e-4)
        assert one.expected_gain == pytest.approx(many["expected_gain"][row], abs=1e-4)
        assert one.expected_quality == pytest.approx(many["expected_quality"][row], abs=1e-4)


def test_a_batch_in_parts_is_answered_as_a_whole(bank, monkeypatch):
    x = table(7, n=200).x_QD
    whole = bank.optimized_params_batch(x)
    monkeypatch.setattr("rb_gpu.batch.VOTE_ROWS", 90)
    monkeypatch.setattr("rb_gpu.batch.FIELD_ROWS", 40)
    parts = bank.optimized_params_batch(x)
    for name in ("config_id", "pattern_id"):
        np.testing.assert_array_equal(parts[name], whole[name])
    for name in ("confidence", "expected_gain", "expected_quality"):
        np.testing.assert_allclose(parts[name], whole[name], atol=1e-5)


def test_a_query_gets_its_leaves_and_the_field(bank):
    # computed by hand: the leaves' gains, plus the field's prediction for the query relative to those leaves
    data, x = bank.data, table(8, n=1).x_QD[0]
    field, default = data.field, data.default
    cosine = data.arrays["centroids"][: data.leaves] @ x
    near = np.argsort(-cosine)[: data.lookup.top_k]
    near = near[cosine[near] >= data.lookup.floor]
    share = np.exp(data.lookup.beta * (cosine[near] - cosine[near].max()))
    share /= share.sum()
    direction = data.objective.direction
    said = np.einsum("f,fco->co", phi(field, places(field, x[None])[0] @ field.landmarks.T), field.coef) @ direction
    expected_C = share @ (field.mean[near] @ direction)
    gain_C = said - said[default] - (expected_C - expected_C[default]) + share @ data.arrays["gain"][near]
    answer = bank.optimized_params(x)
    expected = 0.0 if answer.config_id == default else gain_C[answer.config_id]
    assert answer.expected_gain == pytest.approx(expected, abs=2e-4)
    assert answer.config_id == (gain_C.argmax() if gain_C.max() > data.arrays["margin"].max() else default)


def test_a_confidence_is_that_of_a_normal_gain_and_reaches_the_least_one_asked_for(bank):
    # makes gains so uncertain that choices are in doubt
    arrays = bank.data.arrays | {"field_test_sd": bank.data.arrays["field_test_sd"] + np.float32(0.12)}
    data = replace(bank.data, arrays=arrays, lookup=replace(bank.data.lookup, min_probability=0.9))
    doubtful, x = ReasoningBank(data), table(9, n=200).x_QD
    many = doubtful.optimized_params_batch(x)
    acted = many["config_id"] != data.default
    assert 20 < acted.sum() < 180 and np.ptp(many["confidence"][acted]) > 0.03
    for row in np.flatnonzero(acted)[:40]:
        cosine = arrays["centroids"][: data.leaves] @ x[row]
        near = np.argsort(-cosine)[: data.lookup.top_k]
        near = near[cosine[near] >= data.lookup.floor]
        share = np.exp(data.lookup.beta * (cosine[near] - cosine[near].max()))
        sd_C = share / share.sum() @ arrays["field_test_sd"][near]
        one = doubtful.optimized_params(x[row])
        expected = norm.cdf(one.expected_gain / sd_C[one.config_id])
        assert one.confidence == pytest.approx(expected, abs=1e-4) and expected > 0.9 - 1e-4
        assert many["confidence"][row] == pytest.approx(expected, abs=1e-4)


def test_no_margin_near_a_leaf_and_one_near_none(bank):
    # regression: a query unlike all others got the config that is best by a tiny margin over all queries
    arrays = bank.data.arrays
    others = np.arange(len(bank.configs)) != bank.data.default
    lead = arrays["field_test"] - arrays["gain"]
    assert (arrays["margin"] == 0).all() and np.abs(lead[:-1][:, others]).max() < 1e-6
    assert (lead[-1, others] < -1e-4).all()


def test_a_place_unlike_all_queries_is_not_predicted_beyond_them(bank):
    # regression: a leaf's centroid is nearer to many landmarks than any query is; unbounded, the field predicted +0.7
    # for it
    data, field = bank.data, bank.data.field
    x = table(0).x_QD
    widest = np.abs(bank.optimized_params_batch(x)["expected_gain"]).max()
    centres = bank.optimized_params_batch(data.arrays["centroids"])["expected_gain"]
    marks = field.landmarks @ field.axes
    far = bank.optimized_params_batch(np.concatenate([marks, -marks]))["expected_gain"]
    spread = (field.gain_high - field.gain_low).max()
    assert max(np.abs(centres).max(), np.abs(far).max()) <= widest + spread
    said = phi(field, places(field, x) @ field.landmarks.T) @ field.coef[..., 0]
    assert said.min(0) == pytest.approx(field.low[:, 0], abs=1e-3)
    assert said.max(0) == pytest.approx(field.high[:, 0], abs=1e-3)


def test_the_trained_tradeoff_gives_the_trained_answers(bank):
    x = table(7, n=300).x_QD
    assert (bank.optimized_params_batch(x)["config_id"] == bank.optimized_params_batch(x, 0.0)["config_id"]).all()


@cache
def unproven(dear: bool) -> ReasoningBank:
    trajectories = world("95 % of traffic on the default", 1500, np.random.default_rng([3, 2]))
    if dear:
        cost = np.where(trajectories.config_id == 0, 0.1, 1.0).astype(np.float32)
        trajectories = replace(trajectories, cost=cost)
    config = TrainConfig(judge=JudgeConfig(latency_weight=0.0, cost_weight=0.0), seed=3)
    config.index.kind = "off"
    return learn(trajectories, config).bank()


@pytest.mark.parametrize("tradeoff", [Tradeoff(0.0, 0.0), Tradeoff(0.3, 0.0), 0.3])
def test_what_was_not_shown_to_pay_is_not_done_under_another_tradeoff(tradeoff):
    # regression: no config differs; the default stood under the trained trade-off, but 18 % of the queries left it
    # under any other
    bank = unproven(dear=False)
    x = np.random.default_rng(0).normal(size=(500, bank.dim)).astype(np.float32)
    for one in (None, tradeoff):
        answers = bank.optimized_params_batch(x, one)
        assert (answers["config_id"] == bank.data.default).all() and (answers["confidence"] == 0).all()
    assert bank.optimized_params(x[0], tradeoff).config_id == bank.data.default


def test_a_cheaper_config_is_taken_once_cost_surely_outweighs_what_is_not_known_of_it():
    bank = unproven(dear=True)
    x = np.random.default_rng(0).normal(size=(500, bank.dim)).astype(np.float32)
    picks = [bank.optimized_params_batch(x, weight)["config_id"] for weight in (0.0, 0.01, 2.0)]
    assert (picks[0] == bank.data.default).all() and (picks[1] == bank.data.default).all()
    cheap = int(bank.configs.ef_search.argmin())
    assert (picks[2] == cheap).all()


def test_export_keeps_the_field(bank, tmp_path):
    bank.export(tmp_path / "bank.json")
    read = ReasoningBank.from_export(tmp_path / "bank.json")
    assert set(FIELD_ARRAYS) <= set(read.data.arrays)
    x = table(7, n=100).x_QD
    for name, column in bank.optimized_params_batch(x).items():
        assert (read.optimized_params_batch(x)[name] == column).all()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("field_coef", lambda a: a[:-1]),
        ("field_coef", lambda a: np.full_like(a, np.inf)),
        ("field_landmarks", lambda a: 2 * a),
        ("field_axes", lambda a: 2 * a),
        ("field_axes", lambda a: a[:-1]),
        ("field_centre", lambda a: a + 1),
        ("field_centre", lambda a: a[:-1]),
        ("field_slopes", lambda a: 3 * a[::-1]),
        ("field_slopes", lambda a: 100 * a),
        ("field_slopes", lambda a: a[:1]),
        ("field_gain_variance", lambda a: -1 - a),
        ("field_test", lambda a: np.full_like(a, np.nan)),
        ("field_mean", None),
    ],
)
def test_a_damaged_field_is_refused(bank, name, damage):
    arrays = dict(bank.data.arrays)
    changed = None if damage is None else damage(arrays.pop(name))
    if changed is None:
        arrays.pop(name)
    else:
        arrays[name] = changed
    with pytest.raises(ArtifactError):
        ReasoningBank(replace(bank.data, arrays=arrays))


@pytest.mark.parametrize("slope", [SLOPE_BOUNDS[0], 2.0, SLOPE_BOUNDS[1] / 2])
def test_a_lookup_is_told_the_kernel_regression_within_what_training_queries_were_told(bank, slope):
    bank = ReasoningBank(
        replace(bank.data, arrays=bank.data.arrays | {"field_slopes": np.array([slope, 2 * slope])})
    )  # at the greatest slope, float32 must still hold the kernels without their constant factor
    data, field, lookup = bank.data, bank.data.field, bank._state.field
    direction, default, configs = data.objective.direction, data.default, len(data.configs)
    rng = np.random.default_rng(0)
    x_BD = np.concatenate([field.landmarks[:20] @ field.axes, rng.normal(size=(20, data.dim))])
    cosine_BM = places(field, x_BD) @ field.landmarks.T.astype(np.float64)
    kernels_BF = np.concatenate([np.exp(slope * (cosine_BM - 1.0)) for slope in field.slopes], axis=1)
    predicted_BC = kernels_BF @ (field.coef.astype(np.float64) @ direction)
    ends = [end * direction for end in (field.gain_low, field.gain_high)]
    low_C, high_C = np.minimum(*ends).sum(1), np.maximum(*ends).sum(1)
    expected_BC = np.clip(predicted_BC - predicted_BC[:, [default]], low_C, high_C)
    x_BD = x_BD.astype(np.float32)
    scale_B = 1.0 / np.linalg.norm(x_BD, axis=1)
    assert lookup.shifts(x_BD, scale_B)[:, :configs] == pytest.approx(expected_BC, abs=1e-5)
    assert lookup.shift(7 * x_BD[3], scale_B[3] / 7)[:configs] == pytest.approx(expected_BC[3], abs=1e-5)
    assert (low_C < expected_BC).any() and ((expected_BC == low_C).any() or slope != 2.0)  # some are clipped


@pytest.mark.parametrize("full", [False, True])
def test_a_deviation_s_variance_is_a_gaussian_process_s_under_the_likeliest_model(full):
    rng = np.random.default_rng(0)
    x_QF, configs = rng.normal(size=(40, 3)), 2
    query = np.repeat(np.arange(40), configs) if full else np.arange(40)
    config = np.tile([0, 1], 40) if full else rng.integers(configs, size=40)
    weight = np.ones(len(query)) if full else rng.uniform(0.5, 2, 40)
    weight = weight / weight.mean()
    rows = rows_of(query, config, 40, configs, weight)
    for differing in (0.0, 1.0):  # even if configs do not seem to deviate, the variance is positive
        y = differing * x_QF[query, 0] * (config == 1) + 0.3 * rng.normal(size=len(query))
        fitted = fit([Kernel(tensor(x_QF), rows), Kernel(tensor(x_QF[:, :2]), rows)], tensor(y))
        assert fitted.deviates == (differing > 0)
        place_PF = rng.normal(size=(6, 3))
        slope, likeliest = divmod(int(fitted.share_SL.argmax()), len(RIDGES))
        dims, ridge = (3, 2)[slope], RIDGES[likeliest]
        leverage_PC = fitted.leverage([tensor(place_PF), tensor(place_PF[:, :2])]).numpy()
        for c in range(configs):
            w = np.ones(40) if full else weight[config == c]
            mine = x_QF[:, :dims] if full else x_QF[query[config == c], :dims]
            mean = np.average(mine, axis=0, weights=w)
            inner, away = ((mine - mean) * w[:, None]).T @ (mine - mean), place_PF[:, :dims] - mean
            shrunk = np.linalg.inv(inner + min(ridge, 1e300) * np.eye(dims)) * (w**2).sum() / w.sum()
            assert leverage_PC[:, c] == pytest.approx(np.einsum("pf,fg,pg->p", away, shrunk, away))


def wide(seed, n=1500, dim=150):
    """The same world with more dimensions than the landmarks have axes; most of them hold little variance."""
    small = table(seed, n=n)
    rng = np.random.default_rng(seed)
    turn_DD = np.linalg.qr(np.random.default_rng(99).normal(size=(dim, dim)))[0]
    noise = 0.03 * rng.normal(size=(n, dim - 12))
    x_QD = (np.concatenate([small.x_QD, noise], axis=1) @ turn_DD).astype(np.float32)
    return replace(small, x_QD=x_QD / np.linalg.norm(x_QD, axis=1, keepdims=True))


def test_landmarks_lie_on_the_axes_along_which_queries_spread_most():
    x_QD = wide(0).x_QD + 3.0  # a common shift does not matter
    found = _axes(torch.from_numpy(x_QD), torch.Generator().manual_seed(0), torch.device("cpu"))
    axes_RD, centre_R = (one.numpy() for one in found)
    assert centre_R == pytest.approx(axes_RD @ x_QD.mean(0), abs=1e-4)
    x_QD -= x_QD.mean(0)
    assert axes_RD.shape == (AXES, 150)
    assert axes_RD @ axes_RD.T == pytest.approx(np.eye(AXES), abs=1e-5)
    values, vectors = np.linalg.eigh(x_QD.T.astype(np.float64) @ x_QD)
    # all twelve axes of the world, and of the other, nearly equal ones, a choice that holds almost the most variance
    assert np.square(axes_RD @ vectors[:, -12:]).sum() == pytest.approx(12, abs=1e-4)
    held = np.square(x_QD @ axes_RD.T).sum()
    assert 0.995 * values[-AXES:].sum() < held <= values[-AXES:].sum() * (1 + 1e-5)


def test_choices_are_tried_on_more_queries_than_regressions_see(monkeypatch):
    # regression: with a million rows and 120 configs, the gate saw only 4 rows per cell and found nothing that pays off
    def tried(n):
        monkeypatch.setattr(landmarks, "MAX_QUERIES", 400)
        monkeypatch.setattr(landmarks, "TRIAL_QUERIES", n)
        log, leaf_Q, weight_N = table(3), np.arange(1500) % 7, torch.ones(1500)
        objective = Objective("utility", "f1", 0.0, 0.0, 1.0, 1.0, 0.95, None, None)
        unit_QD = torch.nn.functional.normalize(torch.as_tensor(log.x_QD), dim=1)
        found = landmarks.fit_field(unit_QD, leaf_Q, log, weight_N, objective, 0, torch.device("cpu"))
        return found.trial, found.unseen_NO

    (few, _), (many, unseen_NO) = tried(400), tried(1000)
    assert few.rows.queries == 400 and many.rows.queries == 1000
    f1 = OUTCOMES.index("f1")
    at_N = torch.nonzero((unseen_NO[:, f1][:, None] == many.fits[f1].unseen_N).any(1)).squeeze(1)
    # one config per query: the prediction for the logged config equals the row's prediction, up to the common part
    assert len(at_N) == 1000
    gap_N = many.fits[f1].unseen_QC[many.rows.query_N, many.rows.config_N] - many.fits[f1].unseen_N
    fitted_N = torch.isin(many.fits[f1].unseen_N, few.fits[f1].unseen_N)
    assert int(fitted_N.sum()) == 400 and float(gap_N[~fitted_N].abs().max()) < 1e-9
    assert torch.equal(many.leaf_Q[many.rows.query_N], at_N % 7)


def test_few_dims_are_all_axes():
    x_QD = torch.from_numpy(table(0, n=50).x_QD)
    axes_RD, centre_R = _axes(x_QD, torch.Generator(), torch.device("cpu"))
    assert torch.equal(axes_RD, torch.eye(12)) and torch.allclose(centre_R, x_QD.mean(0))


def test_how_far_a_query_lies_from_the_mean_is_seen():
    # regression: two features next to a large constant one; after scaling to norm 1, only the direction from the mean
    # was visible, not the distance
    rng = np.random.default_rng(0)
    log = table(0, n=1000)
    around_Q2 = 0.01 * rng.normal(size=(1000, 2))
    outer_Q = np.linalg.norm(around_Q2, axis=1) > 0.012
    found = np.where(outer_Q == (log.config_id == 1), 0.9, 0.1).astype(np.float32)
    x_QD = np.concatenate([np.ones((1000, 1)), around_Q2], axis=1).astype(np.float32)
    bank = trained(replace(log, x_QD=x_QD, precision=found, recall=found)).bank()
    assert bank.data.field is not None
    picked = bank.optimized_params_batch(x_QD)["config_id"]
    assert ((picked == 1) == outer_Q).mean() > 0.95


def test_queries_in_a_narrow_cone_are_told_what_they_would_be_told_elsewhere():
    # for many embedders all pairs of queries have cosines over 0.8, where kernels with the usual slopes are flat
    plain, narrow = wide(0), wide(0)
    lift_D = np.zeros(150, np.float32)
    lift_D[:] = np.linalg.svd(plain.x_QD.astype(np.float64), full_matrices=True)[2][-1]
    narrow = replace(plain, x_QD=(plain.x_QD + 2 * lift_D) / np.sqrt(np.float32(5)))
    told = []
    for one in (plain, narrow):
        leaf_Q, objective = (
            np.arange(len(one.query_id)) % 7,
            Objective("utility", "f1", 0.0, 0.0, 1.0, 1.0, 0.95, None, None),
        )
        weight_N = torch.ones(len(one.query_row), dtype=torch.float64)
        told.append(
            landmarks.fit_field(torch.from_numpy(one.x_QD), leaf_Q, one, weight_N, objective, 0, torch.device("cpu"))
        )
    assert (told[0].slopes_S == told[1].slopes_S).all()
    assert told[1].unseen_NO.numpy() == pytest.approx(told[0].unseen_NO.numpy(), abs=0.02)


@pytest.fixture(scope="module")
def wide_bank():
    return trained(wide(0)).bank()


def test_a_wide_world_is_learned_on_its_axes(wide_bank):
    bank = wide_bank
    field, held_out = bank.data.field, wide(5, n=500)
    assert field.axes.shape == (AXES + 1, 150) and field.landmarks.shape[1] == AXES + 1
    batch = bank.optimized_params_batch(held_out.x_QD)
    better = table(5, n=500).x_QD[:, 0] > 0
    assert (batch["config_id"][better] == 1).mean() > 0.95 and (batch["config_id"][~better] != 1).mean() > 0.95
    for i in range(20):
        one = bank.optimized_params(3 * held_out.x_QD[i])
        assert one.config_id == batch["config_id"][i]
        assert one.expected_gain == pytest.approx(batch["expected_gain"][i], abs=1e-5)


def test_a_query_off_all_axes_is_answered(wide_bank):
    bank = wide_bank
    field = bank._state.field
    middle_D = field.axes_RD.T @ field.centre_R
    off_D = np.linalg.svd(field.axes_RD)[2][-1].astype(np.float32)
    off_D += middle_D - field.axes_RD.T @ (field.axes_RD @ off_D)
    ones = np.ones(1, np.float32)
    for x_D in (off_D, middle_D):
        assert np.isfinite(field.shift(x_D, 1.0)).all() and np.isfinite(field.shifts(x_D[None], ones)).all()
    # only rounding remains of the first direction; the zero vector must give no direction instead of NaN
    field.centre_R = np.zeros_like(field.centre_R)
    nothing_D = np.zeros(150, np.float32)
    assert field.shifts(nothing_D[None], ones)[0] == pytest.approx(field.shift(nothing_D, 1.0))
    assert np.isfinite(bank.optimized_params(off_D).expected_quality)


def test_queries_that_no_axis_reaches_are_learned_from():
    # embeddings of one word each: as many axes as words, most of which are rare
    rng = np.random.default_rng(0)
    word_Q = np.minimum(rng.geometric(0.03, size=2000) - 1, 149)
    trajectories = replace(table(0, n=2000), x_QD=np.eye(150, dtype=np.float32)[word_Q])
    bank = trained(trajectories).bank()
    assert bank.data.field is not None
    assert np.isfinite(bank.optimized_params_batch(np.eye(150, dtype=np.float32))["expected_quality"]).all()


def test_queries_that_repeat_need_no_more_landmarks_than_are_distinct():
    # regression: 2,000 queries asked for 250 landmarks, but k-means makes only 200 of 200 distinct embeddings, and
    # training ended in a traceback
    x_QD = np.eye(200, dtype=np.float32)[np.arange(2000) % 200]
    bank = trained(replace(table(0, n=2000), x_QD=x_QD)).bank()
    assert bank.data.field is not None and len(bank.data.field.landmarks) == 200
    assert np.isfinite(bank.optimized_params_batch(x_QD[:200])["expected_quality"]).all()


@pytest.mark.parametrize("judging", OBJECTIVES, ids=str)
def test_a_log_in_which_no_config_ran_three_times_is_learned_from(judging):
    # regression: no config had rows enough for a deviation of its own, and training ended in a traceback of torch.stack
    trajectories = table(0, n=2000, configs=60)
    order = np.argsort(trajectories.config_id, kind="stable")
    first = np.searchsorted(trajectories.config_id[order], np.arange(60))
    twice = np.zeros(2000, bool)
    twice[order[np.concatenate([first, first + 1])]] = True
    trajectories = trajectories.select_queries(twice)
    assert (np.bincount(trajectories.config_id) == 2).all()
    bank = trained(trajectories, **judging).bank()
    assert np.isfinite(bank.optimized_params_batch(trajectories.x_QD)["confidence"]).all()


@pytest.mark.parametrize("judging", OBJECTIVES, ids=str)
def test_queries_in_one_direction_have_no_field(judging):
    # regression: with cluster.metric=l2, embeddings that differ in length only ended in a traceback of the landmarks
    trajectories = table(0, n=400)
    x_QD = np.linspace(1, 4, 400, dtype=np.float32)[:, None] * trajectories.x_QD[:1].round(1)
    for metric, k in (("l2", 4), ("cosine", 1)):
        config = TrainConfig(device=DeviceConfig("cpu"), cluster=ClusterConfig(k=k, metric=metric))
        config.judge = JudgeConfig(**judging)
        bank = learn(replace(trajectories, x_QD=x_QD), config).bank()
        assert bank.data.field is None and np.isfinite(bank.optimized_params(x_QD[0]).confidence)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.8, 0.975, 0.9999])
def test_normal_quantile(share):
    from scipy.stats import norm

    assert normal_quantile(share) == pytest.approx(norm.ppf(share), abs=1e-9)
