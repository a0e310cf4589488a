"""Configs that ran only at certain times of day are reported; randomly chosen configs are not."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from soak_kill import settings

torch = pytest.importorskip("torch")

from rb_gpu.learn.timing import told_by_time  # noqa: E402
from rb_gpu.learn.training import train  # noqa: E402
from rb_gpu.learn.trajectories import Trajectories  # noqa: E402
from tests.null_worlds import CONFIGS, world  # noqa: E402

DAY = 86_400
MONDAY = 1_789_948_800  # 2026-09-21


def log_of(seed: int, days: float, rows: int = 1500, **columns: np.ndarray) -> Trajectories:
    """A log without propensities over `days` days, with random configs unless they are given."""
    by_lot = world("no config differs", rows, np.random.default_rng(seed))
    time = (MONDAY + days * DAY * np.arange(rows) / rows).astype(np.int64)
    return replace(by_lot, propensity=None, timestamp=time, **columns)


def shifted(on: np.ndarray, seed: int = 0) -> np.ndarray:
    """Config 4 in six of ten rows where `on`, elsewhere in one of ten."""
    rng = np.random.default_rng(seed)
    other = rng.integers(4, size=len(on))
    return np.where(rng.random(len(on)) < np.where(on, 0.6, 0.1), 4, other)


@pytest.mark.parametrize("days", [0.2, 5.0, 40.0])
def test_a_lot_is_not_told(days):
    # the false alarm rate is at most one in a hundred: none in these twenty
    assert not [seed for seed in range(20) if told_by_time(log_of(seed, days), seed)]


def test_a_night_shift_is_told_with_its_config_and_hours():
    # regression: it was only marked associational, like a log of random configs
    hour = log_of(0, 13.0).timestamp % DAY // 3600
    table = log_of(0, 13.0, config_id=shifted((hour < 6) | (hour >= 21)))
    [warning] = told_by_time(table, 0)
    assert "the config that ran depends on time (p 0.002): ef_search=5 in " in warning and "log propensities" in warning
    assert warning.count(" h UTC") == 2 and " % of the rows from " in warning
    shares = [float(part.split()[0]) for part in warning.split(" in ")[1:3]]
    assert shares == [pytest.approx(60, abs=15), pytest.approx(10, abs=8)]
    assert told_by_time(replace(table, propensity=np.full(1500, 0.5, np.float32)), 0) == []


def test_a_roll_out_and_a_weekend_are_told():
    part = np.arange(1500) / 1500
    [rolled] = told_by_time(log_of(0, 5.0, config_id=shifted(part > 0.6)), 0)
    assert "of the rows from 2026-09-2" in rolled and "% from 2026-09-2" in rolled
    day = (log_of(0, 40.0).timestamp - MONDAY) // DAY % 7
    [weekend] = told_by_time(log_of(0, 40.0, config_id=shifted(day >= 5)), 0)
    assert " of the rows on S" in weekend and "days; if queries change" in weekend


def test_rows_of_a_query_or_a_session_are_one_choice():
    # 40 queries, each of which ran 25 times under its config; regression: their times told which query it was
    rows = np.arange(1000)
    query, lot = rows // 25, np.random.default_rng(1).integers(CONFIGS, size=40)
    table = log_of(1, 13.0, rows=1000, config_id=lot[query])
    assert told_by_time(table, 0)
    assert told_by_time(replace(table, session=(1 + query).astype(np.uint64)), 0) == []
    one = table.select_queries(np.arange(1000) < 40)
    assert told_by_time(replace(table, query_row=query, x_QD=one.x_QD, query_id=one.query_id), 0) == []


def test_where_every_query_ran_under_all_there_was_no_choice():
    rows = np.arange(1500)
    assert told_by_time(log_of(0, 5.0, query_row=rows // CONFIGS, config_id=rows % CONFIGS), 0) == []


def test_training_says_so_in_its_log_and_its_report(tmp_path, caplog, monkeypatch):
    hour = log_of(0, 13.0).timestamp % DAY // 3600
    table = log_of(0, 13.0, config_id=shifted(hour < 8))
    table = replace(table, query_time=table.timestamp, auto_default=True)
    monkeypatch.setattr("rb_gpu.learn.training.load", lambda *_: table)
    published = train(settings(tmp_path))
    [warning] = [one for one in published.evaluation.warnings if "the config that ran depends on time" in one]
    assert warning in caplog.text
    assert json.loads((published.folder / "manifest.json").read_text())["evaluation"]["warnings"] == [warning]
    assert warning[1:] in (published.folder / "report.html").read_text()
    # nobody runs its default
    assert "params.default=auto took the default from an experiment" in published.decision.reason
