"""What a file holds is what is read: all good rows, none of the bad ones, and only the columns that are needed."""

from __future__ import annotations

import resource
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rb_gpu.errors import DataError
from rb_gpu.learn import room, tables
from rb_gpu.learn.config import DataConfig, ParamsConfig
from rb_gpu.learn.quarantine import BadRows
from rb_gpu.learn.sources import Source, of_batches
from rb_gpu.learn.tables import Reading, Table, check_sources, read_table
from rb_gpu.learn.trajectories import load

D = 4
REQUIRED = ("id", "precision", "recall", "latency_us", "query_embedding", "timestamp")
OPTIONAL = ("ef_search", "model_tier", "temperature", "context_tokens", "cost", "rating", "propensity", "query_id")
KINDS = {
    "id": pa.uint64(),
    "query_id": pa.uint64(),
    "query_embedding": pa.list_(pa.float32()),
    "ef_search": pa.uint64(),
    "context_tokens": pa.int64(),
    "model_tier": pa.string(),
    "temperature": pa.float64(),
    "precision": pa.float64(),
    "recall": pa.float32(),
    "latency_us": pa.uint64(),
    "cost": pa.float64(),
    "rating": pa.float32(),
    "timestamp": pa.int64(),
    "propensity": pa.float64(),
}


def good(n: int = 60, first_id: int = 1000, **changed: Any) -> dict[str, list[Any]]:
    """Columns of n good rows; ids count from first_id, timestamps from 0."""
    rng = np.random.default_rng(first_id)
    return {
        "id": list(range(first_id, first_id + n)),
        "query_id": list(range(first_id, first_id + n)),
        "query_embedding": rng.integers(1, 9, (n, D)).astype(float).tolist(),
        "ef_search": [64] * n,
        "context_tokens": [2048] * n,
        "model_tier": ["small"] * n,
        "temperature": [0.7] * n,
        "precision": rng.random(n).tolist(),
        "recall": [0.5] * n,
        "latency_us": [1000] * n,
        "cost": [1.5] * n,
        "rating": [None] * n,
        "timestamp": list(range(n)),
        "propensity": [0.25] * n,
    } | changed


def arrow(columns: dict[str, list[Any]]) -> pa.Table:
    return pa.table({name: pa.array(values, KINDS.get(name)) for name, values in columns.items()})


def write(path: Path, columns: dict[str, list[Any]] | pa.Table, row_group_size: int = 25, **options: Any) -> str:
    table = columns if isinstance(columns, pa.Table) else arrow(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=row_group_size, **options)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema, **options) as writer:
            writer.write_table(table, max_chunksize=row_group_size)
    return str(path)


def read(path: str | list[str], bad: BadRows | None = None, **options: Any) -> Table:
    return read_table(path, REQUIRED, OPTIONAL, BadRows() if bad is None else bad, Reading(**options))


def refused(path: str | list[str], **options: Any) -> list[tuple[str, int, int, str]]:
    bad = BadRows()
    read(path, bad, **options)
    return list(bad)


def error(path: str | list[str], **options: Any) -> str:
    with pytest.raises(DataError) as raised:
        read(path, **options)
    return str(raised.value)


# ---- where rows are stored

FILES = ("x.parquet", "x.pq", "x.arrow", "x.ipc", "x.feather", "X.PARQUET")


@pytest.mark.parametrize("name", FILES)
def test_every_suffix_is_read_by_its_format(name, tmp_path):
    path = tmp_path / name
    write(tmp_path / f"made{'.parquet' if path.suffix.lower() in ('.parquet', '.pq') else '.arrow'}", good())
    next(tmp_path.glob("made*")).rename(path)
    table = read(str(path))
    expected = good()
    assert table.columns["id"].tolist() == expected["id"]
    assert table.columns["query_embedding"].tolist() == expected["query_embedding"]
    assert table.total_rows == 60 and table.files == [str(path)]


EMBEDDINGS = {
    **{f"fixed_size_list<{k}>": pa.list_(k, D) for k in (pa.float16(), pa.float32(), pa.float64())},
    **{f"list<{k}>": pa.list_(k) for k in (pa.float16(), pa.float32(), pa.float64())},
    "large_list<float>": pa.large_list(pa.float32()),
    "fixed_size_binary": pa.binary(4 * D),
}


@pytest.mark.parametrize("kind", EMBEDDINGS.values(), ids=EMBEDDINGS)
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_every_embedding_type_of_every_format_is_the_same_matrix(kind, suffix, tmp_path):
    rows: list[Any] = good()["query_embedding"]
    rows[30] = None
    x = np.array([r or [0.0] * D for r in rows], np.float32)
    if pa.types.is_fixed_size_binary(kind):
        column = pa.array([None if r is None else np.float32(r).tobytes() for r in rows], kind)
    else:
        half = pa.types.is_float16(kind.value_type)
        column = pa.array([None if r is None else [np.float16(v) if half else v for v in r] for r in rows], kind)
    table = arrow(good()).set_column(2, "query_embedding", column)
    bad = BadRows()
    columns = read(write(tmp_path / f"x{suffix}", table), bad).columns
    np.testing.assert_array_equal(columns["query_embedding"], np.delete(x, 30, axis=0))
    assert columns["query_embedding"].dtype == np.float32
    assert list(bad) == [(str(tmp_path / f"x{suffix}"), 30, 1030, "query_embedding has not 4 values")]


def test_directory_glob_list_and_uri_are_read_in_the_order_of_their_names(tmp_path):
    (tmp_path / "day" / "hour").mkdir(parents=True)
    a = write(tmp_path / "day" / "a.parquet", good(3, 100))
    b = write(tmp_path / "day" / "b.arrow", good(3, 200))
    c = write(tmp_path / "day" / "hour" / "c.parquet", good(3, 300))
    (tmp_path / "day" / "README.txt").write_text("not a table")
    day = tmp_path / "day"
    for path, firsts in (
        (str(day), (100, 200, 300)),
        (f"{day}/", (100, 200, 300)),
        (day.as_uri(), (100, 200, 300)),
        (f"{day}/*.parquet", (100,)),
        (f"{day}/**/*.parquet", (100, 300)),
        ([c, a], (300, 100)),
        ([f"{day}/*.arrow", f"{day}/hour"], (200, 300)),
        (Path(b).as_uri(), (200,)),
    ):
        assert read(path).columns["id"].tolist() == [first + i for first in firsts for i in range(3)], path


def test_relative_paths(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", good(3))
    monkeypatch.chdir(tmp_path)
    for path in ("a.parquet", "./a.parquet", ".", "./", "*.parquet"):
        assert len(read(path).columns["id"]) == 3, path


def test_directory_takes_suffixes_in_capitals(tmp_path):
    # regression: X.PARQUET was read when named, but skipped when its directory was
    write(tmp_path / "a.parquet", good(3, 100))
    Path(write(tmp_path / "b.parquet", good(3, 200))).rename(tmp_path / "B.PARQUET")
    assert len(read(str(tmp_path)).columns["id"]) == 6


def test_hidden_and_unfinished_files_of_a_directory_are_left_out(tmp_path):
    # regression: files that Spark had not yet committed, or that were still being copied, were read
    for name in ("a.parquet", "_temporary/0/b.parquet", ".c.parquet", "_d.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, good(3))
    assert read(str(tmp_path)).files == [str(tmp_path / "a.parquet")]


def test_folder_whose_name_looks_like_a_pattern(tmp_path):
    # regression: "matches no file"
    (tmp_path / "run[1]").mkdir()
    assert len(read(write(tmp_path / "run[1]" / "a.parquet", good(3))).columns["id"]) == 3


def test_more_files_than_a_process_may_hold_open(tmp_path):
    # regression: every file stayed open; from about a thousand files on, the last were "damaged or of another format"
    for i in range(60):
        write(tmp_path / f"{i:02}.{'parquet' if i % 2 else 'arrow'}", good(2, 10 * i))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = {int(fd.name) for fd in Path("/dev/fd").iterdir()}
    free = [fd for fd in range(len(held) + 21) if fd not in held]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[20], hard))
    try:
        assert len(read(str(tmp_path)).columns["id"]) == 120
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_empty_files_among_others_are_passed_over(tmp_path):
    empty = write(tmp_path / "a.parquet", arrow(good(1)).slice(1).drop_columns(["cost"]))
    full = write(tmp_path / "b.parquet", good(3))
    table = read([empty, full])
    # regression: an optional column that only the empty file lacked was taken as absent
    assert len(table.columns["id"]) == 3 and "cost" in table.columns


def test_column_of_some_files_only_is_taken_as_absent_and_said(tmp_path, caplog):
    one = write(tmp_path / "a.parquet", good(3, 10))
    two = write(tmp_path / "b.parquet", arrow(good(3, 20)).drop_columns(["cost"]))
    assert "cost" not in read([one, two]).columns
    # regression: the message did not say which of a hundred files lacks it
    assert f"cost is in some files only and is taken as absent in all; {two} lacks it (1 of 2 files)" in caplog.text


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_columns_that_folders_name_are_read(suffix, tmp_path):
    # regression: they were taken as absent; a table partitioned by ef_search silently had one config, the default
    for ef in (32, 64):
        for tier, folder in (("small", "small"), ("größe 2/3", "gr%C3%B6%C3%9Fe%202%2F3")):
            one = arrow(good(3, 100 * ef + len(tier))).drop_columns(["ef_search", "model_tier"])
            path = tmp_path / f"day=2026-11-01/ef_search={ef}/model_tier={folder}/part-0{suffix}"
            path.parent.mkdir(parents=True)
            write(path, one)
    table = read(str(tmp_path), newest=11)
    names = np.array(table.tier_names)[table.columns["model_tier"]]
    assert table.columns["ef_search"].tolist() == [32] * 5 + [64] * 6
    assert names.tolist() == ["größe 2/3"] * 2 + ["small"] * 3 + ["größe 2/3"] * 3 + ["small"] * 3


def test_column_in_the_file_goes_before_that_of_its_folder(tmp_path):
    (tmp_path / "ef_search=7").mkdir()
    assert set(read(write(tmp_path / "ef_search=7/x.parquet", good())).columns["ef_search"]) == {64}


def test_folders_of_nulls_and_of_what_is_no_number(tmp_path):
    one = arrow(good(3)).drop_columns(["ef_search"])
    for folder in ("__HIVE_DEFAULT_PARTITION__", "fast"):
        (tmp_path / f"ef_search={folder}").mkdir()
    null = write(tmp_path / "ef_search=__HIVE_DEFAULT_PARTITION__/x.parquet", one)
    assert {reason for *_, reason in refused(null)} == {"ef_search is null or not a number"}
    fast = write(tmp_path / "ef_search=fast/x.parquet", one)
    assert error(fast).startswith(f"data.path={fast}: the folder ef_search=fast holds no int64; rename it, or store ")


@pytest.mark.parametrize("name", ["efSearch", "EF_SEARCH", "Ef Search"])
def test_column_that_is_spelt_otherwise_is_named(name, tmp_path, caplog):
    # regression: every row was taken as one of the default, which may never have run, and such a bank was promoted
    table = arrow(good(3))
    path = write(
        tmp_path / "x.parquet", table.rename_columns([name if c == "ef_search" else c for c in table.schema.names])
    )
    assert "ef_search" not in read(path).columns
    assert f"column {name} of {path} is not read; did you mean ef_search?" in caplog.text
    assert "cost" not in caplog.text


@pytest.mark.parametrize("name", ["rating", "session"])
def test_column_that_rows_may_lack_is_none_in_files_without_it(name, tmp_path, caplog):
    # regression: a rating or session in only some files was dropped from all of them
    one = write(tmp_path / "a.parquet", {n: v for n, v in good(2, 10).items() if n != name})
    two = write(tmp_path / "b.parquet", good(2, 20, **{name: [3, 4]}))
    table = read_table([one, two], REQUIRED, (name,), BadRows(), Reading())
    assert table.columns[name].tolist() == [0, 0, 3, 4]
    assert f"{name} is in some files only and is taken as none in the others" in caplog.text


# ---- only what is needed is read


@pytest.mark.parametrize(
    ("there", "meant"),
    [
        ("efsearch", "ef_search"), ("ef", "ef_search"), ("model", "model_tier"),
        ("costs", "cost"), ("query", None), ("text", None), ("search_params", None),
    ],
)  # fmt: skip
def test_a_column_that_is_nearly_one_of_ours_is_told_of(there, meant, tmp_path, caplog):
    # regression: a mistyped ef_search was never read, and all rows had one config
    columns = good() | {there: [1] * 60}
    for name in ("ef_search", "n_probes", "model_tier", "cost", "query_id"):
        columns.pop(name, None)
    read(write(tmp_path / "log.parquet", columns))
    told = f"column {there} of {tmp_path / 'log.parquet'} is not read; did you mean {meant}?"
    assert (told in caplog.text) if meant else ("did you mean" not in caplog.text)


def test_only_needed_columns_are_asked_for(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", good() | {"retrieved_ids": [["a"] * 50] * 60, "prompt": ["x" * 999] * 60})
    asked: list[list[str]] = []
    original = pq.ParquetFile.iter_batches

    def spy(self, *args, columns=None, **options):
        asked.append(columns)
        return original(self, *args, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    read(path, newest=10)
    assert {column for columns in asked for column in columns} == {*REQUIRED, *OPTIONAL}
    assert None not in asked


def damage_column(path: str, column: str) -> None:
    """Overwrites the column's bytes in every row group of a Parquet file."""
    meta = pq.read_metadata(path)
    with Path(path).open("r+b") as file:
        for group in range(meta.num_row_groups):
            for i in range(meta.num_columns):
                chunk = meta.row_group(group).column(i)
                if chunk.path_in_schema.split(".")[0] == column:
                    file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
                    file.write(b"\xff" * chunk.total_compressed_size)


def test_unreadable_column_that_is_not_needed_is_ignored(tmp_path):
    path = write(tmp_path / "x.parquet", good() | {"prompt": ["x" * 99] * 60})
    damage_column(path, "prompt")
    assert len(read(path).columns["id"]) == 60


@pytest.mark.parametrize("column", ["query_embedding", "recall", "timestamp", "model_tier"])
@pytest.mark.parametrize("newest", [None, 10])
def test_unreadable_column_that_is_needed_is_an_error_that_names_the_file(column, newest, tmp_path):
    # regression: the first pass over timestamps, which `capacity` needs, raised Arrow's own error
    path = write(tmp_path / "x.parquet", good())
    damage_column(path, column)
    message = error(path, newest=newest)
    assert message.startswith(f"data.path={path} cannot be read to its end (") and "damaged" in message


def invalid_offsets(kind: pa.DataType, values: pa.Array) -> pa.Array:
    """Two rows, the first of which extends far beyond the 8 values."""
    offsets = pa.py_buffer(np.array([0, 2**30, 8], np.int32))
    if pa.types.is_list(kind):
        return pa.Array.from_buffers(kind, 2, [None, offsets], children=[values])
    return pa.Array.from_buffers(kind, 2, [None, offsets, values.buffers()[1]])


def test_ipc_with_offsets_beyond_its_values_is_an_error_and_no_crash(tmp_path):
    # regression: Arrow trusts the offsets of a memory-mapped file; reading them crashed or read foreign memory
    column = invalid_offsets(pa.list_(pa.float32()), pa.array(range(8), pa.float32()))
    table = arrow(good(2)).set_column(2, "query_embedding", column)
    assert "cannot be read to its end" in error(write(tmp_path / "x.arrow", table))


def test_ipc_column_that_is_not_needed_is_not_even_decoded(tmp_path):
    prompt = invalid_offsets(pa.string(), pa.array(range(2), pa.int32()))
    path = write(tmp_path / "x.arrow", arrow(good(2)).append_column("prompt", prompt))
    assert len(read(path).columns["id"]) == 2


def test_compressed_ipc(tmp_path):
    table = arrow(good())
    path = write(tmp_path / "x.feather", table, options=pa.ipc.IpcWriteOptions(compression="zstd"))
    assert read(path).columns["id"].tolist() == good()["id"]


def test_ipc_is_memory_mapped(tmp_path, monkeypatch):
    mapped: list[str] = []
    original = pa.memory_map
    monkeypatch.setattr(pa, "memory_map", lambda name, *a: mapped.append(name) or original(name, *a))
    path = write(tmp_path / "x.arrow", good())
    read(path)
    assert path in mapped


# ---- bad rows

REASONS = [
    ("id", None, "id is null or not a number"),
    ("query_id", None, "query_id is null or not a number"),
    ("precision", None, "precision is null or not a number"),
    ("precision", np.nan, "precision is null or not a number"),
    ("precision", -0.001, "precision is outside [0, 1]"),
    ("precision", 1.001, "precision is outside [0, 1]"),
    ("recall", np.inf, "recall is null or not a number"),
    ("recall", 1.5, "recall is outside [0, 1]"),
    ("latency_us", None, "latency_us is null or not a number"),
    # -1 as uint64, a common code for "unknown"; regression: it wrapped to a latency of -1
    ("latency_us", 2**64 - 1, "latency_us is outside [0, 9223372036854775807]"),
    ("query_embedding", None, "query_embedding has not 4 values"),
    ("query_embedding", [1.0, 2.0, 3.0], "query_embedding has not 4 values"),
    ("query_embedding", [1.0] * 5, "query_embedding has not 4 values"),
    ("query_embedding", [], "query_embedding has not 4 values"),
    ("query_embedding", [1.0, np.nan, 1.0, 1.0], "query_embedding is not finite"),
    ("query_embedding", [1.0, np.inf, 1.0, 1.0], "query_embedding is not finite"),
    ("query_embedding", [1.0, None, 1.0, 1.0], "query_embedding is not finite"),
    ("query_embedding", [0.0, 0.0, -0.0, 0.0], "query_embedding has norm 0"),
    ("timestamp", None, "timestamp is null or not a number"),
    # milliseconds; regression: the decay of old rows, in days, would have been a thousand times too fast
    ("timestamp", 1_700_000_000_000, "timestamp is outside [-62135596800, 253402300799] in UTC seconds"),
    ("ef_search", 0, "ef_search is outside [1, 4294967295]"),
    ("ef_search", 2**32, "ef_search is outside [1, 4294967295]"),
    ("context_tokens", -5, "context_tokens is outside [1, 4294967295]"),
    ("temperature", 2.01, "temperature is outside [0, 2.0]"),
    ("temperature", -0.01, "temperature is outside [0, 2.0]"),
    ("temperature", np.nan, "temperature is null or not a number"),
    ("cost", -1.0, "cost is outside [0, 1e+24]"),
    ("cost", 1e32, "cost is outside [0, 1e+24]"),  # regression: a damaged artifact at the job's end
    ("cost", 1e39, "cost is null or not a number"),
    ("rating", 0, "rating is outside [1, 5]"),
    ("rating", 6, "rating is outside [1, 5]"),
    ("rating", 3.5, "rating is not an integer"),  # regression: read as 3
    ("propensity", 0.0, "propensity is outside (0, 1]"),
    ("propensity", 1.01, "propensity is outside (0, 1]"),
    ("propensity", None, "propensity is null or not a number"),
    ("model_tier", None, "model_tier is null"),
    ("model_tier", "", "model_tier is null"),
    ("model_tier", "huge", "unknown model_tier (params.tiers=['small', 'large'])"),
    ("id", 1007, "duplicate id"),
]


@pytest.mark.parametrize(("column", "value", "reason"), REASONS, ids=str)
@pytest.mark.parametrize("row", [12, 40])
def test_bad_row_is_set_aside_with_file_row_id_and_reason(column, value, reason, row, tmp_path):
    columns = good()
    columns[column][row] = value
    first = write(tmp_path / "a.parquet", good(30, 1))
    path = write(tmp_path / "x.parquet", columns)  # row groups of 25 rows: row 40 is in the second one
    bad = BadRows()
    table = read([first, path], bad, tiers=["small", "large"])
    assert list(bad) == [(path, row, columns["id"][row] or 0, reason)]
    assert bad.by_reason() == {reason: 1}
    assert table.columns["id"].tolist() == good(30, 1)["id"] + [i for i in good()["id"] if i != 1000 + row]
    assert (table.file_id == np.repeat([0, 1], [30, 59])).all()
    assert table.file_row[30:].tolist() == [i for i in range(60) if i != row]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("batch_rows", [7, 100])
def test_rows_are_counted_through_row_groups_and_batches(suffix, batch_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BATCH_ROWS", batch_rows)
    columns = good()
    rows = [0, 6, 7, 24, 25, 49, 50, 59]
    for row in rows:
        columns["recall"][row] = 2.0
    bad = refused(write(tmp_path / f"x{suffix}", columns))
    assert [(row, i) for _, row, i, _ in bad] == [(row, 1000 + row) for row in rows]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("precision", [0.0, 1.0, 1 + 1e-12]),
        ("temperature", [0.0, 2.0]),
        ("latency_us", [0, 2**63 - 1]),
        ("ef_search", [1, 2**32 - 1]),
        ("cost", [0.0, 1e24]),
        ("rating", [1, 5, None, np.nan]),
        ("propensity", [1e-30, 1.0]),
        ("timestamp", [-62_135_596_800, 253_402_300_799]),
        ("id", [0, 2**64 - 1]),
        ("query_embedding", [[1e-30] * D, [1e30] * D]),
    ],
)
def test_values_at_the_bounds_are_good(column, values, tmp_path):
    columns = good(len(values))
    columns[column] = values
    assert refused(write(tmp_path / "x.parquet", columns)) == []


def test_row_that_is_bad_in_many_ways_counts_once_under_its_first_reason(tmp_path):
    columns = good()
    columns["precision"][3], columns["recall"][3], columns["query_embedding"][3] = np.nan, 2.0, [0.0] * D
    path = write(tmp_path / "x.parquet", columns)
    assert refused(path) == [(path, 3, 1003, "precision is null or not a number")]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_reason_and_id_do_not_depend_on_the_order_of_columns(suffix, tmp_path):
    # id is the last column: if columns were checked in file order, the id would not be known yet
    columns = good()
    columns["precision"][3], columns["recall"][3] = np.nan, 2.0
    path = write(tmp_path / f"x{suffix}", dict(reversed(columns.items())))
    assert refused(path) == [(path, 3, 1003, "precision is null or not a number")]


def test_first_of_equal_ids_stays_whichever_files_they_are_in(tmp_path):
    one, two = good(5, 10), good(5, 20)
    two["id"] = [20, 12, 22, 12, 10]
    paths = [write(tmp_path / "a.parquet", one), write(tmp_path / "b.parquet", two)]
    bad = BadRows()
    table = read(paths, bad)
    assert [(row, i) for file, row, i, _ in bad if file == paths[1]] == [(1, 12), (3, 12), (4, 10)]
    assert bad.by_reason() == {"duplicate id": 3}
    assert table.columns["id"].tolist() == [10, 11, 12, 13, 14, 20, 22]
    # every column lost the same rows
    kept = one["precision"] + [two["precision"][0], two["precision"][2]]
    np.testing.assert_allclose(table.columns["precision"], kept, rtol=1e-6)


def test_bad_row_does_not_make_a_later_good_one_of_the_same_id_a_duplicate(tmp_path):
    columns = good(5)
    columns["id"][3] = columns["id"][1]
    columns["recall"][1] = np.nan
    path = write(tmp_path / "x.parquet", columns)
    assert refused(path) == [(path, 1, 1001, "recall is null or not a number")]


def test_rows_are_dropped_in_place_over_several_blocks(tmp_path, monkeypatch):
    # regression: removing one repeated id copied every column, which took twice the memory
    monkeypatch.setattr(room, "MOVE_ROWS", 7)
    columns = good()
    for row in (0, 8, 9, 30, 59):
        columns["id"][row] = columns["id"][row - 1] if row else 1001
    table = read(write(tmp_path / "x.parquet", columns))
    rows = [0, *(r for r in range(2, 60) if r not in (8, 9, 30, 59))]
    assert table.columns["query_embedding"].tolist() == [columns["query_embedding"][r] for r in rows]
    assert table.file_row.tolist() == rows


def test_queries_file_names_its_bad_rows_by_query_id(tmp_path):
    columns = {c: good(5)[c] for c in ("query_id", "query_embedding", "timestamp")}
    columns["query_embedding"][2] = [0.0] * D
    columns["query_id"][4] = 1001
    path = write(tmp_path / "x.parquet", columns)
    bad = BadRows()
    read_table(path, tuple(columns), (), bad, Reading(unique="query_id"))
    # regression: ids were 0, and a repeated query was not noticed
    assert list(bad) == [(path, 2, 1002, "query_embedding has norm 0"), (path, 4, 1001, "duplicate query_id")]


def test_signed_id_can_be_quarantined(tmp_path):
    # regression: OverflowError, because the quarantine has uint64
    table = arrow(good(3)).set_column(0, "id", pa.array([-1, 5, 6], pa.int64()))
    table = table.set_column(table.schema.get_field_index("recall"), "recall", pa.array([np.nan, 0.5, 0.5]))
    bad = BadRows()
    read(write(tmp_path / "x.parquet", table), bad)
    bad.write(tmp_path / "quarantine.parquet")
    assert pq.read_table(tmp_path / "quarantine.parquet")["id"].to_pylist() == [2**64 - 1]


def test_quarantine_file_holds_every_bad_row(tmp_path):
    columns = good()
    columns["recall"][3] = columns["recall"][41] = 7.0
    columns["cost"][10] = -1.0
    path = write(tmp_path / "x.parquet", columns)
    bad = BadRows()
    read(path, bad)
    bad.write(tmp_path / "new" / "folder" / "quarantine.parquet")
    rows = pq.read_table(tmp_path / "new" / "folder" / "quarantine.parquet")
    assert rows.schema.names == ["file", "row", "id", "reason"]
    assert sorted(zip(*rows.to_pydict().values(), strict=True), key=lambda r: r[1]) == [
        (path, 3, 1003, "recall is outside [0, 1]"),
        (path, 10, 1010, "cost is outside [0, 1e+24]"),
        (path, 41, 1041, "recall is outside [0, 1]"),
    ]
    BadRows().write(tmp_path / "none.parquet")
    assert pq.read_table(tmp_path / "none.parquet").num_rows == 0


def bad_rows(n: int, reason: str = "r") -> BadRows:
    bad = BadRows()
    bad.add("/logs/x.parquet", np.arange(n), np.arange(n).astype(np.uint64), reason)
    return bad


def test_max_bad_fraction_is_exact():
    for n in range(1, 100):
        # 29 of 100 is 0.29, although 0.29 * 100 is less than 29 in floating point
        bad_rows(n).check(100, n / 100, "x")
        bad_rows(n).check(100, float(f"0.{n:02}"), "x")
        with pytest.raises(DataError):
            bad_rows(n).check(100, float(f"0.{n - 1:02}9"), "x")


def test_too_many_bad_rows_is_an_error_that_counts_reasons_and_shows_the_first_offenders():
    bad = bad_rows(7, "recall is outside [0, 1]")
    bad.add("/logs/y.parquet", np.array([3]), np.array([33], np.uint64), "duplicate id")
    with pytest.raises(DataError) as raised:
        bad.check(100, 0.05, "logs")
    assert str(raised.value) == (
        "data.path=logs: 8 of 100 rows are bad, over data.max_bad_fraction=0.05 "
        "(recall is outside [0, 1]: 7, duplicate id: 1); first: "
        + "; ".join(f"x.parquet row {i} (id {i}): recall is outside [0, 1]" for i in range(5))
        + "; correct the log or raise data.max_bad_fraction"
    )
    # if all rows are bad, raising the allowed share does not help
    with pytest.raises(DataError, match=r"none is left to learn from.*; correct the log$"):
        bad.check(8, 0.05, "logs")


@pytest.mark.parametrize("column", ["propensity", "cost"])
def test_a_column_that_was_logged_for_part_of_the_time_is_told_what_to_do(column, tmp_path):
    # regression: the only advice was to raise the bound, which silently trains on the rows that have it
    path = write(tmp_path / "x.parquet", good(60) | {column: [None] * 40 + [0.5] * 20})
    settings = DataConfig(path=path)
    with pytest.raises(
        DataError, match=rf"; if {column} was logged in some rows only, leave out the others \(data.cap"
    ):
        load(settings, ParamsConfig())
    # what it advises works
    assert len(load(replace(settings, capacity=20), ParamsConfig())) == 20


def test_all_rows_bad_is_an_error_whatever_is_allowed():
    with pytest.raises(DataError, match=r"^data\.path=x: 4 of 4 rows are bad, and none is left to learn from \(r: 4\)"):
        bad_rows(4).check(4, 1.0, "x")
    bad_rows(3).check(4, 1.0, "x")


# ---- capacity


def in_memory(parts: list[list[int]], batch_rows: int) -> list[Source]:
    """One source per part, of rows with these timestamps and consecutive ids."""
    sources, first = [], 0
    for part in parts:
        batches = arrow(good(len(part), first, timestamp=part)).combine_chunks().to_batches(batch_rows)
        sources.append(of_batches(f"part{len(sources)}", arrow(good(1)).schema, batches))
        first += len(part)
    return sources


@given(
    parts=st.lists(st.lists(st.integers(0, 5), max_size=12), min_size=1, max_size=3).filter(any),
    newest=st.integers(1, 30),
    batch_rows=st.integers(1, 5),
)
def test_capacity_keeps_the_newest_rows_and_of_equal_ones_the_last(parts, newest, batch_rows):
    bad = BadRows()
    table = check_sources(in_memory(parts, batch_rows), "x", REQUIRED, OPTIONAL, bad, Reading(newest=newest))
    times = [t for part in parts for t in part]
    # like a ring buffer: a row pushes out the oldest one, of equal ones the one that came first
    kept = sorted(sorted(range(len(times)), key=lambda i: (times[i], i))[-newest:])
    assert table.columns["id"].tolist() == kept
    assert table.columns["timestamp"].tolist() == [times[i] for i in kept]
    assert table.total_rows == len(kept) and not len(bad)


def test_bad_rows_older_than_the_capacity_do_not_count(tmp_path):
    columns = good()
    columns["recall"][5] = columns["recall"][55] = np.nan
    path = write(tmp_path / "x.parquet", columns)
    assert [row for _, row, _, _ in refused(path, newest=20)] == [55]


def test_row_of_a_bad_timestamp_pushes_no_good_row_out(tmp_path):
    # regression: a timestamp in milliseconds was the newest of all
    columns = good()
    columns["timestamp"][3] = 1_700_000_000_000
    columns["timestamp"][4] = None
    table = read(write(tmp_path / "x.parquet", columns), newest=20)
    assert table.columns["timestamp"].tolist() == list(range(40, 60))


# ---- clear errors


def without(column: str) -> pa.Table:
    return arrow(good(5)).drop_columns([column])


@pytest.mark.parametrize("column", REQUIRED)
def test_missing_column(column, tmp_path):
    path = write(tmp_path / "x.parquet", without(column))
    assert error(path) == f"data.path={path} has no column {column}; add it (the table needs {', '.join(REQUIRED)})"


def test_missing_column_of_one_file_of_many_names_that_file(tmp_path):
    write(tmp_path / "a.parquet", good(5))
    path = write(tmp_path / "b.parquet", without("recall"))
    assert error(str(tmp_path)).startswith(f"data.path={path} has no column recall; ")


def test_column_that_is_there_twice(tmp_path):
    # regression: Arrow's KeyError
    path = write(tmp_path / "x.parquet", arrow(good(5)).append_column("recall", pa.array([0.5] * 5)))
    assert error(path) == f"data.path={path} has 2 columns recall; leave one"


def test_column_of_a_wrong_type(tmp_path):
    table = arrow(good(2)).set_column(0, "id", pa.array(["a", "b"]))
    path = write(tmp_path / "x.parquet", table)
    assert error(path) == f"data.path={path}: column id is string; store ids as uint64"


def test_no_thread_outlives_an_error(tmp_path):
    table = arrow(good(2000)).set_column(12, "timestamp", pa.array(["a"] * 2000))
    path = write(tmp_path / "x.parquet", table)
    with pytest.raises(DataError) as raised:
        read(path)
    assert raised.value.__traceback__ is not None  # a traceback whose frames would keep the reader alive
    assert not [t for t in threading.enumerate() if t.name.startswith(("reader", "block"))]


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float32(), 5)], ids=str)
def test_dimension_that_differs_between_files_names_both(kind, tmp_path):
    a = write(tmp_path / "a.parquet", good(5))
    wide = arrow(good(5)).set_column(2, "query_embedding", pa.array([[1.0] * 5] * 5, kind))
    b = write(tmp_path / "b.arrow", wide)
    assert error(str(tmp_path)) == (
        f"data.path: query_embedding has 4 dimensions in {a} and 5 in {b}; train on one embedder's files at a time"
    )


def test_embeddings_that_begin_with_a_batch_of_nulls(tmp_path, monkeypatch):
    # regression: only the first batch was asked for the dimension: "null in every row"
    monkeypatch.setattr(tables, "CHUNK_BYTES", 0)  # batches of 256 rows
    columns = good(600)
    columns["query_embedding"][:300] = [None] * 300
    table = read(write(tmp_path / "x.parquet", columns))
    assert table.columns["query_embedding"].shape == (300, D)


def test_embeddings_that_are_all_null(tmp_path):
    path = write(tmp_path / "x.parquet", good(5) | {"query_embedding": [None, [], None, None, None]})
    assert error(path) == f"data.path={path}: query_embedding is null in every row; export the embeddings"


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_empty_table(suffix, tmp_path):
    path = write(tmp_path / f"x{suffix}", arrow(good(5)).slice(5))
    assert error(path) == f"data.path={path} has no rows; check the log's export"


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather", ".sqlite", ".db"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"garbage " * 1000], ids=["empty", "short", "garbage"])
def test_file_that_is_no_table(suffix, content, tmp_path):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    message = error(str(path))
    assert message.startswith(f"data.path={path}") and ";" in message


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_file(suffix, share, tmp_path):
    path = Path(write(tmp_path / f"x{suffix}", good()))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    message = error(str(path))
    assert message.startswith(f"data.path={path} cannot be read (")
    assert message.endswith("it is damaged or of another format")


@pytest.mark.parametrize("name", ["x.csv", "x", "x.parquet.gz"])
def test_unknown_suffix(name, tmp_path):
    (tmp_path / name).write_text("id")
    known = ".parquet, .pq, .arrow, .ipc, .feather, .sqlite, .sqlite3, .db"
    said = (
        f"data.path={tmp_path / name} has no known suffix; use one of {known} (jobs/README.md turns a CSV into Parquet)"
    )
    assert error(str(tmp_path / name)) == said


def test_nothing_there(tmp_path):
    assert error(f"{tmp_path}/no.parquet").startswith(f"data.path={tmp_path}/no.parquet does not exist; give ")
    assert error(f"file://{tmp_path}/no.parquet").startswith(f"data.path={tmp_path}/no.parquet does not exist; give ")
    assert error(f"{tmp_path}/*.parquet") == f"data.path={tmp_path}/*.parquet matches no file; check the pattern"
    assert error(str(tmp_path)).startswith(f"data.path={tmp_path} holds no .parquet, ")
    full = write(tmp_path / "a.parquet", good(5))
    assert error([full, f"{tmp_path}/no.parquet"]).startswith(f"data.path={tmp_path}/no.parquet does not exist; ")


@pytest.mark.parametrize("uri", ["nosuch://bucket/x.parquet", "file://host with space/x.parquet"])
def test_uri_that_arrow_does_not_know(uri):
    # regression: Arrow's own error, without the setting's name
    assert error(uri).startswith(f"data.path={uri} cannot be opened (")


def test_the_key_is_that_of_the_table(tmp_path):
    for make, path in ((None, f"{tmp_path}/no.parquet"), (b"x", f"{tmp_path}/x.parquet"), (b"x", f"{tmp_path}/x.db")):
        if make:
            Path(path).write_bytes(make)
        assert error(path, key="data.queries").startswith(f"data.queries={path}")
