"""The suite sweep: the commands it runs, and the table it makes."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")

from jobs.tables import sweep_tables
from rb_gpu.bench import sweeps

SETTINGS = {"n": 300, "dim": 8, "rounds": 1, "seed": 0}


def test_ratios_are_of_whole_sweeps_over_one_job(monkeypatch):
    ran = []

    def fake(_folder, overrides):
        ran.append(overrides)

    durations = iter([1.0, 1.5, 2.0] * 10)
    monkeypatch.setattr(sweeps, "_job", fake)
    monkeypatch.setattr(sweeps, "interleaved", lambda every, *_: {n: [call(0)] for n, call in every.items()})
    monkeypatch.setattr(sweeps, "seconds", lambda call: call() or next(durations))
    result = json.loads(json.dumps(sweeps.measure(SETTINGS)))
    assert [case["ratio"] for case in result["cases"]] == [{sweeps.EIGHT_JUDGES: 1.5, sweeps.FOUR_SIZES: 2.0}] * 2
    assert ran[:3] == [[], ["-m", *sweeps.JUDGES], ["-m", *sweeps.SIZES]]
    # Hydra rejects a flag between settings
    assert [run[:2] for run in ran[3:]] == [["data=files", ran[3][1]], *[["-m", "data=files"]] * 2]
    assert "sample: 8 settings of the judge" in sweep_tables(result)


def test_a_run_that_fails_is_told_with_its_last_words(tmp_path):
    with pytest.raises(RuntimeError, match=r"ended with 1:[\s\S]*data.path=nowhere"):
        sweeps._job(tmp_path, ["data=files", "data.path=nowhere"])
