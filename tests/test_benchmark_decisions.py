"""The suite decisions: logs are drawn with the stated propensities, baselines find what is planted, and a small run
values every method.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

torch = pytest.importorskip("torch")

from jobs.tables import decision_tables  # noqa: E402
from rb_gpu.bench import decisions, searches  # noqa: E402
from rb_gpu.bench.plot import plot_decisions  # noqa: E402
from rb_gpu.bench.sets import FOLDS, fold_of, kinds, tables, whole_tables  # noqa: E402
from rb_gpu.errors import DataError  # noqa: E402
from rb_gpu.learn.config import BASELINE_NAMES, SAMPLE_FOLDER  # noqa: E402
from rb_gpu.learn.policy import SINGLE  # noqa: E402

WORDNET = Path(__file__).parents[2] / "shared/data/ann_wordnet"


@pytest.mark.parametrize("policy", ["uniform", "skewed", "confounded"])
def test_logs_have_the_propensities_they_say(policy: str):
    training, _ = tables("sample")["sample"]
    drawn = [decisions.draw(training, policy, 0, np.random.default_rng(seed)) for seed in range(3)]
    for one in drawn:
        assert len(one) == len(one.query_id) == len(training.query_id) and one.propensity is not None
        # Σ 1/p over a config's rows estimates the number of queries under every policy
        counted = np.bincount(one.config_id, 1.0 / one.propensity, len(one.configs))
        assert counted.mean() == pytest.approx(len(one.query_id), rel=0.05)
        share = np.bincount(one.config_id, minlength=len(one.configs)) / len(one)
        assert share[one.configs.default] == share.max()
        assert share.max() == pytest.approx(0.72, abs=0.02) if policy == "skewed" else share.max() < 0.3


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # a quarter of the sample's queries: the part at matched recall, which uses the whole table, takes most of the time
    folder = tmp_path_factory.mktemp("quarter")
    for path in SAMPLE_FOLDER.glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.filter(table["query_id"].to_numpy() % 4 == 0), folder / path.name)
    settings = {"cost_weights": [0.2], "logs": ["uniform", "skewed"], "sizes": [600], "rounds": 1}
    return json.loads(json.dumps(decisions.measure(settings | {"sets": [str(folder)]})))


def test_a_small_run_values_every_method(result: dict[str, Any]):
    assert [(case["log"], case["queries"]) for case in result["cases"]] == [("uniform", 600), ("skewed", 600)]
    for case in result["cases"]:
        gains = {name: found["gain"] for name, found in case["methods"].items()}
        assert gains["best single config"] == 0.0
        assert max(gains.values()) == gains["oracle"]
        assert gains["bank"] >= gains["default"] - 0.01
        assert set(BASELINE_NAMES) < set(gains)
    text = decision_tables(result)
    assert "surely above the bank" in text
    assert "of 2 settings" in text and "mean over settings" in text and "cost at mean recall 0.95" in text


def test_every_query_is_held_out_by_one_of_five_seeds():
    [(name, whole)] = whole_tables("sample").items()
    held = []
    for seed in range(FOLDS):
        training, held_out = fold_of("sample", name, seed)
        assert not set(training.query_id) & set(held_out.query_id)
        assert len(training.query_id) + len(held_out.query_id) == len(whole.query_id)
        held += held_out.query_id.tolist()
    assert sorted(held) == sorted(whole.query_id.tolist())
    again = fold_of("sample", name, FOLDS)[1]
    assert again.query_id.tolist() == fold_of("sample", name, 0)[1].query_id.tolist()


def test_a_query_that_two_runs_held_out_counts_once():
    def run(ids: list[int], bank: list[float], ridge: list[float]) -> decisions.Run:
        zero = np.zeros(len(ids))
        worth = {SINGLE: zero, "bank": np.array(bank), "ridge": np.array(ridge), "oracle": zero + 2.0}
        return decisions.Run(100, np.array(ids, np.uint64), worth)

    setting = decisions.Setting("sample", "sample", 0.2, "full", 0)
    once = run([1, 2], [0.5, 0.7], [0.6, 0.9])
    methods = decisions.case_of(setting, [once, run([3], [0.0], [0.1])])["methods"]
    assert methods["bank"]["gain"] == pytest.approx(0.4) and methods["bank"]["captured"] == pytest.approx(0.2)
    twice = decisions.case_of(setting, [once, run([3], [0.0], [0.1]), run([2, 1], [0.9, 0.3], [0.9, 0.6])])["methods"]
    assert twice["bank"]["gain"] == pytest.approx(0.4)
    # the leads are .2 at most and .1 at least on each query, while the bank's own interval holds 0
    assert methods["bank"]["ahead"] == 0.0 and 0.1 - 1e-9 <= methods["ridge"]["ahead"] <= 0.2
    assert methods["bank"]["low"] == 0.0


def test_a_mean_recall_costs_what_its_choices_cost(result: dict[str, Any]):
    [found] = result["matched_recall"].values()
    assert set(found) == {"fixed", "bank", "oracle", *BASELINE_NAMES} - {"reference"}
    assert found["fixed"]["change"] == 0.0
    for name, row in found.items():
        assert found["oracle"]["cost"] <= row["cost"], name
        assert row["low"] <= row["change"] <= row["high"], name
    assert found["bank"]["high"] < 0


def test_a_curve_is_read_between_its_points():
    # two settings: recall 0.9 at cost 10 and recall 1 at cost 30; a third costs more than it is worth
    held_out = searches.Outcomes(
        np.zeros((2, 3)), np.array([[0.9, 1.0, 0.95], [0.9, 1.0, 0.7]]), np.array([[10.0, 30.0, 29.0]] * 2)
    )
    curve = searches.curve(np.array([[0, 0], [1, 1], [2, 2]]), held_out)
    assert curve.at(np.ones(2), 0.95) == pytest.approx((20.0, 0.0))
    assert curve.at(np.ones(2), 0.9)[0] == pytest.approx(10.0)
    assert np.isnan(curve.at(np.ones(2), 0.85)).all()
    # counting the second query alone: the third setting finds 0.7 there, and is still never chosen
    assert curve.at(np.array([0.0, 1.0]), 0.95) == pytest.approx((20.0, 0.0))


@pytest.mark.skipif(not WORDNET.exists(), reason="needs ../shared/data/ann_wordnet")
def test_kinds_of_queries_are_those_of_the_file():
    [(training, _), *_] = tables(str(WORDNET)).values()
    found = kinds(str(WORDNET), training)
    assert found is not None and len(found) == len(training.query_id) and len(np.unique(found)) == 4
    assert kinds("sample", tables("sample")["sample"][0]) is None


def test_the_picture_is_drawn(result: dict[str, Any], tmp_path: Path):
    pytest.importorskip("matplotlib")
    assert plot_decisions(result, tmp_path / "plot.png") and (tmp_path / "plot.png").stat().st_size > 1000


def test_a_folder_without_tables_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"has no outcomes\*\.parquet"):
        tables(str(tmp_path))
