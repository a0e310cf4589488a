"""The suite decisions: logs are drawn as said, baselines find what is planted, a small run values every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jobs.tables import decision_tables  # noqa: E402
from rb_gpu.bench import decisions  # noqa: E402
from rb_gpu.bench.baselines import Training, choices, hard_clusters, nearest_neighbours  # noqa: E402
from rb_gpu.bench.plot import plot_decisions  # noqa: E402
from rb_gpu.errors import DataError  # noqa: E402


def planted(seed: int, n: int = 600) -> Training:
    """Config 1 is best where x[0] > 0, config 2 elsewhere, config 0 in between everywhere."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 4)).astype(np.float32)
    x[:, 0] += 2 * np.sign(x[:, 0])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    config = rng.integers(3, size=n)
    sign = np.where(x[:, 0] > 0, 1.0, -1.0)
    utility = 0.5 + 0.2 * sign * np.array([0.0, 1.0, -1.0])[config] + 0.1 * rng.normal(size=n)
    return Training(x, np.arange(n), config, np.full(n, 3.0), utility, 3)


def test_every_baseline_finds_a_planted_boundary():
    x = planted(1).x_QD
    best = np.where(x[:, 0] > 0, 1, 2)
    for name, choice in choices(planted(0), x, 0).items():
        share = (choice == best).mean()
        assert share < 0.7 if name == "best single config" else share > 0.95, name


def test_neighbours_and_clusters_are_plain_means():
    training = planted(2, 60)
    prior = 5.0 * 3.0 * training.means
    scores = nearest_neighbours(training, training.x_QD[:1], 7)[0]
    near = np.argsort(-(training.x_QD @ training.x_QD[0]))[:7]
    for c in range(3):
        rows = near[training.config_N[near] == c]
        expected = (3.0 * training.utility_N[rows].sum() + prior[c]) / (3.0 * len(rows) + 15.0)
        assert scores[c] == pytest.approx(expected)
    assert hard_clusters(training, training.x_QD, 1) == pytest.approx(
        np.tile(
            [
                (3 * training.utility_N[training.config_N == c].sum() + prior[c])
                / (3 * (training.config_N == c).sum() + 15)
                for c in range(3)
            ],
            (60, 1),
        )
    )


@pytest.mark.parametrize("policy", ["uniform", "skewed", "confounded"])
def test_logs_have_the_propensities_they_say(policy: str):
    training, _ = decisions.tables("sample")["sample"]
    drawn = [decisions.draw(training, policy, 0, np.random.default_rng(seed)) for seed in range(3)]
    for one in drawn:
        assert len(one) == len(one.query_id) == len(training.query_id) and one.propensity is not None
        # Σ 1/p over a config's rows estimates the number of queries, whatever the policy
        counted = np.bincount(one.config_id, 1.0 / one.propensity, len(one.configs))
        assert counted.mean() == pytest.approx(len(one.query_id), rel=0.05)
        share = np.bincount(one.config_id, minlength=len(one.configs)) / len(one)
        assert share[one.configs.default] == share.max()
        assert share.max() == pytest.approx(0.72, abs=0.02) if policy == "skewed" else share.max() < 0.3


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    settings = {"sets": ["sample"], "cost_weights": [0.2], "logs": ["uniform", "skewed"], "sizes": [600], "rounds": 1}
    return json.loads(json.dumps(decisions.measure(settings)))


def test_a_small_run_values_every_method(result: dict[str, Any]):
    assert [(case["log"], case["queries"]) for case in result["cases"]] == [("uniform", 600), ("skewed", 600)]
    for case in result["cases"]:
        gains = {name: found["gain"] for name, found in case["methods"].items()}
        assert gains["best single config"] == 0.0
        assert max(gains.values()) == gains["oracle"]
        assert gains["bank"] >= gains["default"] - 0.01
    assert "the bank is best of all in" in decision_tables(result)


def test_the_picture_is_drawn(result: dict[str, Any], tmp_path: Path):
    pytest.importorskip("matplotlib")
    assert plot_decisions(result, tmp_path / "plot.png") and (tmp_path / "plot.png").stat().st_size > 1000


def test_a_folder_without_tables_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"has no outcomes\*\.parquet"):
        decisions.tables(str(tmp_path))
