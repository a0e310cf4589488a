"""The suite load measures every format, and everything it compares reads the same matrix."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from rb_gpu.bench import load


def test_every_format_is_measured_beside_pyarrow_memcpy_and_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    # imports in a new interpreter take seconds, so that only one Arrow and one Parquet format is measured
    fresh = load.fresh_median
    monkeypatch.setattr(
        load, "fresh_median", lambda code, n: fresh(code, n) if ".arrow" in code or "parquet_list" in code else 1.0
    )
    result = json.loads(json.dumps(load.run({"n": 3000, "dim": 16, "rounds": 2, "seed": 0})))
    assert result["suite"] == "load" and result["matrix_bytes"] == 3000 * 16 * 4 and result["memcpy_gb_per_s"] > 0
    kinds = ("fixed_size_list", "list", "fixed_size_binary")
    assert list(result["formats"]) == ["arrow", *(f"parquet {kind}" for kind in kinds)]
    for row in result["formats"].values():
        assert all(row[name] > 0 for name in ("gb_per_s", "of_memcpy", "read_of_memcpy", "of_pyarrow", "of_list"))
        assert row["peak_rss_of_matrix"] is None or row["peak_rss_of_matrix"] > 0
    assert result["formats"][load.LIST]["of_list"] == 1.0


def test_a_format_that_is_read_wrongly_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "read_bare", lambda path, dim: (np.zeros((3000, dim), np.float32), None))
    with pytest.raises(RuntimeError, match=r"was read wrongly$"):
        load.run({"n": 3000, "dim": 16, "rounds": 1, "seed": 0})


def test_files_have_several_batches_or_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "ROW_GROUP", 100)
    x = np.random.default_rng(0).normal(size=(250, 8)).astype(np.float32)
    for path in load.write_tables(tmp_path, x).values():
        np.testing.assert_array_equal(load.load_table(path).x_QD, x)
        np.testing.assert_array_equal(load.read_bare(path, 8)[0], x)
