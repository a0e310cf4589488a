"""The default of an experiment is what one would choose without a bank; a default that is in use is never replaced."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from rb_gpu.learn import learn  # noqa: E402
from rb_gpu.learn.config import JudgeConfig, ParamsConfig, TrainConfig  # noqa: E402
from rb_gpu.learn.trajectories import Source, Trajectories, assemble  # noqa: E402


def log_of(seed: int, mean_C, share_C, params: ParamsConfig | None = None, n: int = 500) -> Trajectories:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 8)).astype(np.float32)
    config = rng.choice(len(mean_C), size=n, p=share_C)
    quality = np.clip(np.asarray(mean_C)[config] + 0.3 * rng.normal(size=n), 0, 1).astype(np.float32)
    columns = {
        "id": np.arange(n, dtype=np.uint64), "query_id": np.arange(n, dtype=np.uint64), "x_QD": x,
        "query_row": np.arange(n), "query_time": np.arange(n), "timestamp": np.arange(n),
        "ef_search": (16 * (config + 1)).astype(np.uint32), "precision": quality, "recall": quality,
        "latency_us": np.full(n, 1000), "propensity": np.asarray(share_C)[config].astype(np.float32),
    }  # fmt: skip
    return assemble(columns, [], params or ParamsConfig(), Source())


def learned(trajectories: Trajectories):
    config = TrainConfig(judge=JudgeConfig(latency_weight=0.0, cost_weight=0.0))
    config.index.kind = "off"
    return learn(trajectories, config).bank()


def default_of(trajectories: Trajectories) -> int:
    return learned(trajectories).default.ef_search // 16 - 1


# the last of five configs is better, by less than 100 rows of each can show; the first is the most logged
MEANS, SHARES = [0.45, 0.5, 0.5, 0.5, 0.54], [0.24, 0.19, 0.19, 0.19, 0.19]


def test_an_experiment_falls_back_to_the_best_single_config():
    # regression: nobody uses the most logged config of an experiment, so that abstaining cost its disadvantage
    worth = []
    for seed in range(8):
        trajectories = log_of(seed, MEANS, SHARES)
        chosen = learned(trajectories).optimized_params_batch(trajectories.x_QD)["ef_search"] // 16 - 1
        worth.append(np.asarray(MEANS)[chosen].mean())
    assert np.mean(worth) > 0.505 and min(worth) >= 0.495


def test_what_a_service_runs_stays_the_default():
    assert {default_of(log_of(seed, MEANS, [0.6, 0.1, 0.1, 0.1, 0.1])) for seed in range(3)} == {0}


def test_a_given_default_stays():
    # the default was given when the table was read; the settings of `learn` may not say so
    assert default_of(log_of(0, MEANS, SHARES, ParamsConfig(default={"ef_search": 32}))) == 1


def test_few_lucky_rows_make_no_default():
    # the last config ran five times, and was lucky in some of these logs
    means, shares = [0.45, 0.5, 0.5, 0.54, 0.5], [0.3, 0.23, 0.23, 0.23, 0.01]
    logs = [log_of(seed, means, shares) for seed in range(8)]
    plain = [max(range(5), key=lambda c, one=one: one.recall[one.config_id == c].mean()) for one in logs]
    assert 4 in plain and 4 not in {default_of(one) for one in logs}


def test_a_default_that_is_surely_beaten_is_kept_to_be_measured_against(caplog):
    trajectories = log_of(0, [0.2, 0.5, 0.5, 0.5, 0.8], SHARES, n=2000)
    assert default_of(trajectories) == 0
    # a warning tells the reader that nobody said what runs today
    assert (
        "gains are over the most logged one (of several, the cheapest): ef_search=16; set params.default" in caplog.text
    )
    caplog.clear()
    default_of(log_of(0, MEANS, [0.6, 0.1, 0.1, 0.1, 0.1]))
    assert "params.default" not in caplog.text
