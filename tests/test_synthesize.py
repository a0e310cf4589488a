"""The planted truth is in the data: no more, no less."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from scipy import stats

from rb_gpu.errors import ConfigError
from rb_gpu.learn import synthesize as module
from rb_gpu.learn.job_config import PLANTED_QUALITY, SynthesizeConfig, register_schemas, to_object
from rb_gpu.learn.quarantine import BadRows
from rb_gpu.learn.synthesize import BAD_REASONS, BLOCK_ROWS, blocks, plant, synthesize
from rb_gpu.learn.tables import Reading, read_table

ROOT = Path(__file__).resolve().parent.parent
SMALL = SynthesizeConfig(n=40_000, dim=32, patterns=10, configs=4, seed=3)
NUMBERS = ("id", "ef_search", "n_probes", "precision", "recall", "latency_us", "cost", "timestamp", "propensity")


def read(folder):
    table = pq.read_table(folder / "trajectories.parquet")
    columns = {c: table[c].to_numpy() for c in NUMBERS}
    columns["x"] = table["query_embedding"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
    return table, columns


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthesize") / "out"
    config = replace(SMALL, out=str(out))
    summary = synthesize(config)
    table, columns = read(out)
    assert summary.rows == table.num_rows == config.n and summary.bad_rows == {}
    return table, columns, pq.read_table(out / "truth.parquet"), np.load(out / "truth.npz", allow_pickle=False)


def test_truth_matches_the_rows(planted):
    _, columns, rows, truth = planted
    centres, pattern = truth["centres"], rows["pattern"].to_numpy()
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1, atol=1e-6)
    assert (np.triu(centres @ centres.T, 1) <= 0.5).all()
    nearest = np.argmin(((columns["x"][:, None, :] - centres) ** 2).sum(axis=2), axis=1)
    # noise of norm 0.5 moves hardly any row across a border between centres at least 60 degrees apart
    assert (nearest == pattern).mean() > 0.999
    residual = columns["x"] - centres[pattern]
    assert np.sqrt((residual**2).sum(axis=1).mean()) == pytest.approx(0.5, abs=0.005)
    assert rows["bad"].null_count == rows.num_rows
    assert rows["id"].to_pylist() == columns["id"].tolist() == list(range(SMALL.n))


def test_the_truth_holds_nothing_but_what_is_documented(tmp_path, monkeypatch):
    # NumPy before 2.1 reads allow_pickle as one more array
    given: list[str] = []
    real = np.savez
    monkeypatch.setattr(np, "savez", lambda path, **arrays: given.extend(arrays) or real(path, **arrays))
    synthesize(replace(SMALL, n=100, out=str(tmp_path / "out")))
    best = ["best_ef_search", "best_n_probes", "best_model_tier", "best_context_tokens", "best_temperature"]
    assert sorted(given) == sorted([*best, "centres", "share", "effect"])


def test_shares_are_moderately_unequal_and_configs_uniform(planted):
    _, columns, rows, truth = planted
    count = np.bincount(rows["pattern"].to_numpy(), minlength=10)
    assert stats.chisquare(count, truth["share"] * SMALL.n).pvalue > 1e-4
    assert 1.2 < truth["share"].max() / truth["share"].min() <= 3
    tries = np.unique(columns["ef_search"], return_counts=True)[1]
    assert len(tries) == 4 and stats.chisquare(tries).pvalue > 1e-4
    assert (columns["propensity"] == 0.25).all()


def test_best_config_of_every_pattern_has_the_planted_quality(planted):
    _, columns, rows, truth = planted
    pattern = rows["pattern"].to_numpy()
    np.testing.assert_array_equal(columns["precision"], columns["recall"])
    assert set(Counter(truth["best_ef_search"].tolist()).values()) == {2, 3}
    for p in range(10):
        mean = {
            ef: columns["precision"][(pattern == p) & (columns["ef_search"] == ef)].mean()
            for ef in np.unique(columns["ef_search"])
        }
        best = int(truth["best_ef_search"][p])
        assert max(mean, key=mean.get) == best
        assert mean.pop(best) == pytest.approx(PLANTED_QUALITY + 0.1, abs=0.02)
        assert list(mean.values()) == pytest.approx([PLANTED_QUALITY] * 3, abs=0.02)
    is_best = columns["ef_search"] == truth["best_ef_search"][pattern]
    assert columns["precision"][is_best].std() == pytest.approx(0.1, abs=0.003)
    assert columns["precision"][~is_best].std() == pytest.approx(0.1, abs=0.003)


def test_other_columns(planted):
    table, columns, _, truth = planted
    assert {str(truth[f"best_{c}"].dtype.kind) for c in ("ef_search", "n_probes", "context_tokens")} == {"i"}
    assert len(truth["best_temperature"]) == len(truth["best_model_tier"]) == 10
    assert (np.diff(columns["timestamp"]) > 0).all()
    assert np.median(columns["latency_us"]) == pytest.approx(1000, rel=0.02)
    rated = table["rating"].drop_null().to_numpy()
    assert 0.03 < len(rated) / SMALL.n < 0.07 and rated.min() >= 1 and rated.max() <= 5
    assert table.schema.field("query_embedding").type.list_size == 32


@pytest.mark.parametrize("effect", [0.0, 0.1])
def test_configs_differ_in_nothing_but_the_planted_quality(tmp_path, effect):
    synthesize(replace(SMALL, out=str(tmp_path / "out"), effect=effect, quality_noise=0.4))
    _, columns = read(tmp_path / "out")
    rows, truth = pq.read_table(tmp_path / "out" / "truth.parquet"), np.load(tmp_path / "out" / "truth.npz")
    pattern = rows["pattern"].to_numpy()
    p_values = []
    for p in range(10):
        best = columns["ef_search"] == truth["best_ef_search"][p]
        for name in ("precision", "recall", "latency_us", "cost"):
            value = columns[name].astype(float)
            test = stats.ks_2samp(value[(pattern == p) & best], value[(pattern == p) & ~best])
            if effect and name in ("precision", "recall"):
                assert test.pvalue < 1e-3
            else:
                p_values.append(test.pvalue)
    # Bonferroni over all cells; precision and recall of a row are one number
    assert min(p_values) > 0.001 / len(p_values)
    quality = columns["precision"]
    assert quality.min() >= 0 and quality.max() <= 1
    other = columns["ef_search"] != truth["best_ef_search"][pattern]
    # with another distribution than a Beta, noise this wide would be clipped, and clipping would move the mean
    assert quality[~other].mean() == pytest.approx(PLANTED_QUALITY + effect, abs=0.015)
    assert quality[other].mean() == pytest.approx(PLANTED_QUALITY, abs=0.01)
    assert quality[other].std() == pytest.approx(0.4, abs=0.01)


def test_reader_refuses_exactly_the_planted_bad_rows(tmp_path):
    config = replace(SMALL, n=3 * BLOCK_ROWS + 17, out=str(tmp_path / "out"), bad_fraction=0.05)
    summary = synthesize(config)
    assert sum(summary.bad_rows.values()) == round(0.05 * config.n)
    assert set(summary.bad_rows) == set(BAD_REASONS)
    assert max(summary.bad_rows.values()) - min(summary.bad_rows.values()) <= 3
    truth = pq.read_table(tmp_path / "out" / "truth.parquet")
    assert Counter(truth["bad"].drop_null().to_pylist()) == summary.bad_rows
    bad = BadRows()
    required = ("id", "query_embedding", "precision", "recall", "latency_us", "timestamp")
    optional = ("ef_search", "n_probes", "model_tier", "context_tokens", "temperature", "cost", "rating", "propensity")
    read_table(str(tmp_path / "out" / "trajectories.parquet"), required, optional, bad, Reading())
    refused = sorted(row for _, row, _, _ in bad)
    assert refused == np.flatnonzero(truth["bad"].is_valid().to_numpy()).tolist()
    assert len(bad.by_reason()) == len(BAD_REASONS)


def test_every_row_may_be_bad(tmp_path):
    summary = synthesize(replace(SMALL, n=1000, out=str(tmp_path / "out"), bad_fraction=1.0))
    assert sum(summary.bad_rows.values()) == 1000 and "duplicate id" not in summary.bad_rows


def test_same_seed_same_rows_whatever_the_row_groups(tmp_path):
    tables = {}
    for name, chunk_rows, seed in (("a", 65_536, 3), ("b", 3_001, 3), ("c", 65_536, 4)):
        config = replace(SMALL, n=20_000, out=str(tmp_path / name), chunk_rows=chunk_rows, seed=seed, bad_fraction=0.01)
        synthesize(config)
        tables[name] = [pq.read_table(tmp_path / name / f"{t}.parquet") for t in ("trajectories", "truth")]
    # NaN is not equal to itself, so that embeddings and recall are compared by their bytes
    for first, second in zip(tables["a"], tables["b"], strict=True):
        for column in first.column_names:
            a, b = (t[column].combine_chunks() for t in (first, second))
            if column == "query_embedding":
                a, b = a.flatten(), b.flatten()
            if column in ("query_embedding", "recall"):
                np.testing.assert_array_equal(a.to_numpy(), b.to_numpy())
            else:
                assert a.equals(b), column
    assert not tables["a"][0]["precision"].equals(tables["c"][0]["precision"])
    groups = pq.ParquetFile(tmp_path / "b" / "trajectories.parquet").metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [3_001] * 6 + [1_994]


def test_memory_does_not_grow_with_rows(tmp_path):
    peaks = []
    for blocks_ in (4, 16):
        tracemalloc.start()
        out = str(tmp_path / str(blocks_))
        synthesize(replace(SMALL, n=blocks_ * BLOCK_ROWS, dim=64, out=out, chunk_rows=5_000))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    one_block = BLOCK_ROWS * 64 * 4
    assert peaks[1] < 1.2 * peaks[0] < 8 * one_block


def test_many_configs_and_crowded_centres(caplog):
    world = plant(SynthesizeConfig(n=1, dim=2, patterns=40, configs=20))
    assert len({(c.ef_search, c.n_probes) for c in world.configs}) == 20
    assert max(c.ef_search for c in world.configs) == 2048 and max(c.n_probes for c in world.configs) == 3
    assert "centres lie within cosine 0.5" in caplog.text
    # a plane has room for five directions only, so that a single draw would not succeed
    caplog.clear()
    centres = plant(SynthesizeConfig(n=1, dim=2, patterns=4)).centres_PD
    assert (np.triu(centres @ centres.T, 1) <= 0.5).all() and not caplog.text


def test_too_close_is_found_across_tiles(monkeypatch):
    monkeypatch.setattr(module, "COSINE_TILE", 3)
    x = np.eye(8, dtype=np.float32)
    x[[4, 7]] = x[1]
    assert module._too_close(x).tolist() == [4, 7]


def test_blocks_stream_from_the_pure_generator():
    stream = blocks(replace(SMALL, n=10**12), plant(SMALL))
    first = next(stream)
    assert first.num_rows == BLOCK_ROWS and first.schema.names[-2:] == ["pattern", "bad"]
    assert next(stream)["id"][0].as_py() == BLOCK_ROWS


def test_failed_run_leaves_nothing_and_existing_out_is_refused(tmp_path, monkeypatch):
    config = replace(SMALL, n=20_000, out=str(tmp_path / "out"))

    def broken(*args):
        yield next(blocks(config, plant(config)))
        raise RuntimeError

    monkeypatch.setattr(module, "blocks", broken)
    with pytest.raises(RuntimeError):
        synthesize(config)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    synthesize(config)
    with pytest.raises(ConfigError, match="already exists"):
        synthesize(config)


def test_settings_out_of_bounds():
    with pytest.raises(ConfigError, match=r"quality_noise=0.3 is not in \(0, 0.300\), as effect=0.4 allows"):
        SynthesizeConfig(effect=0.4, quality_noise=0.3)
    with pytest.raises(ConfigError, match="seed=-1"):
        SynthesizeConfig(seed=-1)


def test_yaml_says_what_the_schema_says():
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        assert to_object(compose("synthesize")) == SynthesizeConfig()
