"""The benchmark job at a tiny size: all measurements are there, a missing peer is named, and answers are right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("faiss")

from jobs.tables import lookup_tables
from rb_gpu.bank_data import check_bank
from rb_gpu.bench import lookup
from rb_gpu.bench.plot import plot_lookup
from rb_gpu.bench.runner import clean_environment, fresh_median, in_process, interleaved

SETTINGS = {
    "patterns": [40, 1500], "dim": 240, "configs": 3, "distinct_queries": 60, "rounds": 2, "batch": 100, "threads": 2,
    "seed": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def result() -> dict:
    found = lookup.optional
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup, "optional", lambda name: None if name in ("hnswlib", "usearch.index") else found(name))
        patch.setattr(lookup, "FRESH_STARTS", 1)
        return json.loads(json.dumps(lookup.run(SETTINGS)))


def test_every_contestant_is_measured_or_named_as_missing(result: dict) -> None:
    assert [size["search"] for size in result["sizes"]] == ["exact", "hnsw"]
    for size in result["sizes"]:
        rows = size["rows"]
        assert rows["hnswlib"] == rows["usearch"] == "not installed"
        for name in (
            "ours, whole answer",
            lookup.WITH_FIELD,
            "ours, search",
            "numpy exact",
            "faiss flat",
            "faiss HNSW",
        ):
            assert 0 < rows[name]["p50_us"] <= rows[name]["p99_us"] and rows[name]["recall"] > 0.95
        assert rows["numpy exact"]["recall"] == 1.0
        assert size["batch_queries_per_s"] > 0 and size["threads_queries_per_s"] > 0
    assert result["process"]["load_ms"] > 0 and result["process"]["import_ms"] > 0


def test_the_table_and_the_plot_show_it(result: dict, tmp_path: Path) -> None:
    table = lookup_tables(result)
    assert "40 (exact)" in table and "1,500 (hnsw)" in table and "not installed" in table
    pytest.importorskip("matplotlib")
    assert plot_lookup(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_says_what_it_lacks(result: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rb_gpu.bench.plot.optional", lambda name: None)
    assert not plot_lookup(result, tmp_path / "plot.png") and not (tmp_path / "plot.png").exists()


def test_embeddings_are_unit_rows_that_differ_by_seed() -> None:
    one, other = lookup.embeddings(50, 24, 1), lookup.embeddings(50, 24, 2)
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1.0, rtol=1e-5)
    assert not np.allclose(one, other)
    for landmarks in (None, other[:, :20] / np.linalg.norm(other[:, :20], axis=1, keepdims=True)):
        bank = lookup.bank_of(one, 4, "off", 0, landmarks)
        check_bank(bank)
        assert (bank.field is None) == (landmarks is None)


def test_rounds_are_interleaved_and_the_first_is_dropped() -> None:
    calls = []
    found = interleaved(
        {name: lambda turn, name=name: (calls.append(name), np.array([turn]))[1] for name in "abc"}, 4, 0
    )
    assert [sorted(calls[i : i + 3]) for i in range(0, 15, 3)] == [["a", "b", "c"]] * 5
    assert len({tuple(calls[i : i + 3]) for i in range(0, 15, 3)}) > 1
    assert all(samples.ravel().tolist() == [1, 2, 3, 4] for samples in found.values())


def test_without_any_peer_the_bank_is_measured_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "optional", lambda name: None)
    size = lookup.one_size(tmp_path, 1500, SETTINGS)
    missing = [name for name, row in size["rows"].items() if row == "not installed"]
    assert size["search"] == "exact" and missing == ["faiss flat", "faiss HNSW", "hnswlib", "usearch"]
    assert size["rows"]["ours, whole answer"]["recall"] == 1.0


def test_the_truth_is_that_of_a_full_sort() -> None:
    centroids, queries = lookup.embeddings(300, 24, 1), lookup.embeddings(250, 24, 2)
    rows = np.argsort(-(queries.astype(np.float64) @ centroids.astype(np.float64).T), axis=1)[:, : lookup.TOP_K]
    np.testing.assert_array_equal(np.sort(lookup.truly_nearest(centroids, queries), axis=1), np.sort(rows, axis=1))


def test_a_child_measures_with_its_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    assert "OPENBLAS_CORETYPE" not in clean_environment(1) and clean_environment(3)["OMP_NUM_THREADS"] == "3"
    with pytest.raises(RuntimeError, match=r"rb_gpu\.nowhere ended with 1"):
        in_process("rb_gpu.nowhere", {}, 1)


def test_new_processes_may_keep_what_they_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    # regression: if the environment forbids bytecode files, the import time included compilation: 35 ms instead of 18
    # ms
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert fresh_median("import sys; print(float(sys.dont_write_bytecode))", 1) == 0.0
