"""What `fit_field` returns, recomputed with NumPy from its intermediate results: by query, by leaf and at the ends."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conftest import make_bank  # noqa: E402
from test_field import table  # noqa: E402

from rb_gpu.evidence import OUTCOMES  # noqa: E402
from rb_gpu.learn import devices, landmarks  # noqa: E402
from rb_gpu.learn.landmarks import NUGGET, fit_field, with_residuals  # noqa: E402
from rb_gpu.objective import Objective  # noqa: E402

QUERIES, SEEN, TRIED, LEAVES, DEFAULT = 600, 200, 300, 5, 2
PRODUCT = OUTCOMES.index("product")


def objective(kind: str) -> Objective:
    return Objective(kind, "product", 0.0, 0.0, 1.0, 1.0, 0.95, 0.4 if kind == "floor" else None, None)


@pytest.fixture(scope="module")
def world() -> SimpleNamespace:
    """A log whose default is config 2, of which the regressions see a third, and the results of `fit_field` on it."""
    rng = np.random.default_rng(0)
    log = table(3, n=QUERIES)
    log = replace(
        log, configs=replace(log.configs, default=DEFAULT), recall=np.sqrt(log.recall), cost=rng.random(QUERIES),
        propensity=rng.uniform(0.1, 0.9, QUERIES).astype(np.float32),
    )  # fmt: skip
    leaf_Q, weight_N = rng.integers(-1, LEAVES, QUERIES), rng.uniform(0.5, 3.0, QUERIES)
    unit_QD = log.x_QD / np.linalg.norm(log.x_QD, axis=1, keepdims=True)
    told = {}
    real, slopes = landmarks.variances, landmarks.two_slopes
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(devices.TILE_SCORES, "cpu", 1)  # tiles of 256 queries
        for name, value in {"MAX_QUERIES": SEEN, "TRIAL_QUERIES": TRIED, "LANDMARKS": 16}.items():
            patch.setattr(landmarks, name, value)
        names = ("fits", "rows", "y_NO", "means", "inside", "default", "quality")
        patch.setattr(
            landmarks, "variances", lambda *given: told.update(zip(names, given, strict=True)) or real(*given)
        )
        patch.setattr(
            landmarks, "two_slopes", lambda kernel_of, y_N: told.update(slopes_y_N=y_N) or slopes(kernel_of, y_N)
        )
        given = torch.from_numpy(unit_QD), leaf_Q, log, torch.from_numpy(weight_N)
        floor = fit_field(*given, objective("floor"), 1, torch.device("cpu"))
        found = fit_field(*given, objective("utility"), 1, torch.device("cpu"))
    place_QR = unit_QD.astype(np.float64) @ found.axes_RD.T - found.centre_R
    cosine_QM = place_QR / np.linalg.norm(place_QR, axis=1, keepdims=True) @ found.landmarks_MR.T
    kernels_QF = np.concatenate([np.exp(slope * (cosine_QM - 1.0)) for slope in found.slopes_S], axis=1)
    said_QCO = np.einsum("qf,fco->qco", kernels_QF, found.coef_FCO.astype(np.float64))
    drawn = torch.randperm(QUERIES, generator=torch.Generator().manual_seed(1)).numpy()
    seen_Q, tried_Q = (np.isin(np.arange(QUERIES), drawn[:count]) for count in (SEEN, TRIED))
    return SimpleNamespace(**locals())


def test_rows_of_queries_that_no_regression_saw_are_predicted_by_it_and_others_without_themselves(world):
    said_NO = world.said_QCO[np.arange(QUERIES), world.log.config_id] + world.found.base_CO[world.log.config_id]
    fitted, found = (
        [PRODUCT, *(OUTCOMES.index(name) for name in ("log2_latency", "cost"))],
        world.found.unseen_NO.numpy(),
    )
    assert sorted(world.told["fits"]) == sorted(fitted) and not found[:, OUTCOMES.index("f1")].any()
    new = ~world.seen_Q
    np.testing.assert_allclose(found[new][:, fitted], said_NO[new][:, fitted], atol=1e-4)
    for o in fitted:
        assert np.array_equal(found[world.seen_Q, o], world.told["fits"][o].unseen_N)
    assert np.abs(found - said_NO)[world.seen_Q][:, PRODUCT].max() > 1e-3


def test_slopes_are_chosen_by_the_quality_that_the_objective_asks_for(world):
    assert torch.equal(world.told["slopes_y_N"], world.told["y_NO"][:, PRODUCT])


def test_a_trial_has_the_rows_and_leaves_of_its_queries(world):
    trial, at = world.found.trial, np.flatnonzero(world.tried_Q)
    assert trial.rows.queries == TRIED and np.array_equal(trial.leaf_Q, world.leaf_Q[at])
    product_N = world.log.precision.astype(np.float64) * world.log.recall
    assert np.array_equal(trial.y_NO[:, PRODUCT], product_N[at])
    says_QC = world.said_QCO[at][..., PRODUCT] + world.found.base_CO[:, PRODUCT]
    new, one = ~world.seen_Q[at], trial.fits[PRODUCT]
    np.testing.assert_allclose(one.unseen_QC[new], says_QC[new], atol=1e-4)
    assert np.array_equal(one.unseen_QC[~new], world.told["fits"][PRODUCT].unseen_QC)
    assert np.array_equal(one.unseen_N, world.found.unseen_NO[at, PRODUCT])


def test_rows_weigh_by_the_root_of_the_propensity_and_stand_for_all_queries_by_importance(world):
    for rows, chosen_Q in ((world.told["rows"], world.seen_Q), (world.found.trial.rows, world.tried_Q)):
        weight, importance = world.weight_N * np.sqrt(world.log.propensity), world.weight_N
        for found_N, v_N in ((rows.weight_N, weight[chosen_Q]), (rows.importance_N, importance[chosen_Q])):
            np.testing.assert_allclose(found_N, v_N / v_N.mean(), rtol=1e-6)
        assert np.array_equal(rows.query_N, np.arange(chosen_Q.sum()))
        assert np.array_equal(rows.config_N, world.log.config_id[chosen_Q])
    unlogged = replace(world.log, propensity=None)
    assert np.array_equal(landmarks.tempered(torch.from_numpy(world.weight_N), unlogged), world.weight_N)


def test_leaves_are_told_the_mean_over_all_their_queries_and_all_queries_come_last(world):
    members = [world.leaf_Q == leaf for leaf in range(LEAVES)] + [np.ones(QUERIES, bool)]
    mean_UCO = np.stack([world.said_QCO[of].mean(0) for of in members])
    np.testing.assert_allclose(world.found.mean_UCO, mean_UCO, atol=1e-4)
    kernel_UF = np.stack([world.kernels_QF[of].mean(0) for of in members])
    cosine_MM = world.found.landmarks_MR.astype(np.float64) @ world.found.landmarks_MR.T
    count = len(cosine_MM)
    for s, (slope, mean) in enumerate(zip(world.found.slopes_S, world.told["means"], strict=True)):
        # whitening by any root of the landmarks' kernel matrix gives the same products
        prior = np.exp(slope * (cosine_MM - 1.0)) + NUGGET * np.eye(count)
        mine = kernel_UF[:, s * count : (s + 1) * count]
        np.testing.assert_allclose(mean @ mean.T, mine @ np.linalg.solve(prior, mine.T), rtol=1e-3, atol=1e-5)
    leaf_Q = np.where(world.leaf_Q < 0, LEAVES, world.leaf_Q)[world.seen_Q]
    assert np.array_equal(world.told["inside"].leaf_Q, leaf_Q)
    assert (world.told["default"], world.told["quality"]) == (DEFAULT, PRODUCT)


def test_what_is_said_ends_where_it_did_for_any_query(world):
    over_QCO = world.said_QCO - world.said_QCO[:, [DEFAULT]]
    expected = world.said_QCO.min(0), world.said_QCO.max(0), over_QCO.min(0), over_QCO.max(0)
    for found, ends in zip(world.found.bounds, expected, strict=True):
        np.testing.assert_allclose(found, ends, atol=1e-4)


def test_a_floor_has_the_leaves_of_the_queries_that_regressions_saw_and_is_not_tried(world, monkeypatch):
    assert world.found.unseen is None
    assert np.array_equal(world.floor.unseen.label_Q, world.leaf_Q[world.seen_Q])
    assert world.floor.unseen.quality_QC.shape == (SEEN, 3)
    asked = []
    monkeypatch.setattr(landmarks, "pays_unseen", lambda *given: asked.append(given[-4:]) or False)
    assert all(world.floor.pays(objective(kind), DEFAULT, 7, True) for kind in ("floor", "bound")) and not asked
    assert not world.found.pays(objective("utility"), DEFAULT, 7, False)
    assert asked == [(objective("utility"), DEFAULT, 7, False)]


def test_too_few_queries_or_one_config_have_no_field(world):
    weight = torch.from_numpy(world.weight_N)

    def tried(keep, log=world.log):
        part = log.select_queries(keep)
        unit_QD = torch.from_numpy(world.unit_QD[keep])
        return fit_field(
            unit_QD, world.leaf_Q[keep], part, weight[: len(part)], objective("utility"), 1, unit_QD.device
        )

    first = np.arange(QUERIES)
    assert tried(first < 31) is None and tried(first < 32) is not None
    assert len(tried(first < 48).landmarks_MR) == 6
    assert tried(first < 48, table(3, n=QUERIES, configs=1)) is None
    assert tried(first < 48, table(3, n=QUERIES, configs=2)) is not None


def test_residuals_keep_the_sizes_of_importance_and_lose_what_a_config_has_in_all_leaves():
    evidence, left = (make_bank(seed=seed, leaves=6, configs=3).evidence for seed in (0, 1))
    rng = np.random.default_rng(0)
    left = left._replace(
        w=rng.uniform(1.0, 9.0, left.w.shape), pair_w=rng.uniform(1.0, 9.0, left.w.shape),
        pair_mean=rng.normal(size=left.mean.shape), pair_comoment=rng.random(left.comoment.shape),
    )  # fmt: skip
    evidence = evidence._replace(pair_w=rng.uniform(1.0, 9.0, left.w.shape))
    names = ("residual_mean", "residual_comoment", "residual_pair_mean", "residual_pair_comoment")
    field = SimpleNamespace(_replace=lambda **changed: changed)
    found = with_residuals(field, evidence, left)
    assert set(found) == set(names)
    for c in range(3):
        overall = np.average(left.mean[:, c], axis=0, weights=left.w[:, c])
        for p in range(6):
            np.testing.assert_allclose(found["residual_mean"][p, c], left.mean[p, c] - overall)
            np.testing.assert_allclose(
                found["residual_comoment"][p, c], left.comoment[p, c] / left.w[p, c] * evidence.w[p, c]
            )
            pairs = left.pair_comoment[p, c] / left.pair_w[p, c] * evidence.pair_w[p, c]
            np.testing.assert_allclose(found["residual_pair_comoment"][p, c], pairs)
    np.testing.assert_array_equal(found["residual_pair_mean"], left.pair_mean)
