"""The suite growth at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from jobs.tables import growth_tables
from rb_gpu.bench import growth
from rb_gpu.bench.plot import plot_growth
from rb_gpu.errors import ConfigError

SETTINGS = {
    "points": ["emb"], "dim": 40, "n": 3000, "growth_rows": [1500, 3000], "growth_clusters": [20, 40], "iterations": 2,
    "rounds": 1, "seed": 0,
}  # fmt: skip


def test_slope_is_the_exponent() -> None:
    assert growth.slope([100, 1000, 10000], [3.0, 30.0, 300.0]) == pytest.approx(1.0)
    assert growth.slope([10, 1000], [1.0, 10.0]) == pytest.approx(0.5)


def test_an_iteration_is_what_a_longer_call_takes_longer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def fake(module: str, given: dict, **_: object) -> dict:
        x = np.load(given["x"])[: given["n"]]
        asked.append((len(x), given["k"], given["iterations"]))
        return {"seconds": 5.0 + 1e-6 * len(x) * given["k"] * given["iterations"]}

    monkeypatch.setattr(growth, "in_process", fake)
    monkeypatch.setattr(growth, "CLUSTERS", 20)
    result = json.loads(json.dumps(growth.measure(SETTINGS)))
    points, clusters = result["series"]
    assert (points["axis"], points["sizes"], points["fixed"]) == ("points", [1500, 3000], 20)
    assert (clusters["axis"], clusters["sizes"], clusters["fixed"]) == ("clusters", [20, 40], 3000)
    assert points["seconds"] == pytest.approx([0.03, 0.06]) and clusters["seconds"] == pytest.approx([0.06, 0.12])
    assert points["slope"] == pytest.approx(1.0) and clusters["slope"] == pytest.approx(1.0)
    assert sorted(set(asked)) == [(n, k, i) for n, k in [(1500, 20), (3000, 20), (3000, 40)] for i in (3, 5)]
    assert "1,500  3,000" in growth_tables(result)
    pytest.importorskip("matplotlib")
    assert plot_growth(result, tmp_path / "plot.png")


def test_one_size_grows_nothing() -> None:
    # regression: the single size was measured, and then matplotlib refused a figure without panels
    with pytest.raises(ConfigError, match="leave no two sizes of points=emb, which has 3000 rows"):
        growth.measure(SETTINGS | {"growth_rows": [3000], "growth_clusters": [20]})


def test_sizes_that_a_file_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(3500, 5)).astype(np.float32))
    settings = SETTINGS | {"points": [str(tmp_path / "x.npy")], "growth_rows": [2000, 3000, 9000]}
    monkeypatch.setattr(growth, "CLUSTERS", 10)
    monkeypatch.setattr(growth, "in_process", lambda _, given, **__: {"seconds": 1.0 * given["iterations"]})
    sizes = [one["sizes"] for one in growth.measure(settings)["series"]]
    assert sizes == [[2000, 3000], [20, 40]]
