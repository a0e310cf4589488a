"""One table, however it is stored: rows are joined to their queries, parameters to configs, and one config is the
default.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rb_gpu.errors import ConfigError, DataError
from rb_gpu.learn import sources
from rb_gpu.learn.blocks import block_threads, row_hashes
from rb_gpu.learn.config import DataConfig, ParamsConfig
from rb_gpu.learn.recorded import from_trajectories
from rb_gpu.learn.trajectories import Trajectories, _fingerprint, load, split_by_time
from rb_gpu.params import SearchParams
from rb_gpu.trajectory_log import TrajectoryLog
from rb_gpu.types import QueryTrajectory, UserFeedback

D = 4
EARLY = 1_700_000_000
PARAMETERS = ("ef_search", "n_probes", "context_tokens", "model_tier", "temperature")
few_examples = settings(max_examples=40, deadline=None)


def make(i: int, **fields: Any) -> QueryTrajectory:
    """The trajectory with id i; parameters and all other fields may be given by name."""
    params = SearchParams(**{"model_tier": "small"} | {n: fields.pop(n) for n in PARAMETERS if n in fields})
    q = fields.get("query_id", i)  # rows that share it are one query
    values: dict[str, Any] = {
        "query_embedding": np.float32([1 + q % 7, q % 5, 1, -q % 3]),
        "search_params": params,
        "precision": 0.5,
        "recall": 0.25,
        "latency_us": 1000,
        "timestamp": EARLY + i,
    }
    return QueryTrajectory(id=i, **values | fields)


def query(q: int) -> dict[str, Any]:
    """The fields that all rows of one query share."""
    return {"query_id": 500 + q, "query_embedding": np.float32([q + 1, q % 3, 0, 1]), "timestamp": EARLY + q}


# 60 rows of 20 queries, each tried under three configs; 500 + q is no row's id
LOG = [
    make(
        i,
        **query(i // 3),
        ef_search=[32, 64, 128][i % 3],
        n_probes=4 + i % 2,
        model_tier=["large", "small"][i % 2],
        context_tokens=1024 * (1 + i % 2),
        temperature=[0.0, 0.7, 2.0][i % 3],
        precision=i / 64,
        recall=1 - i / 64,
        latency_us=1000 + i,
        cost=0.5 * (1 + i % 3),
        propensity=0.125 * (1 + i % 3),
        feedback=UserFeedback(1 + i % 5) if i % 4 == 0 else None,
    )
    for i in range(60)
]


def outcomes(log: list[QueryTrajectory]) -> dict[str, pa.Array]:
    """The columns of a table except those that belong to the query."""
    columns: dict[str, Any] = {
        "id": pa.array([t.id for t in log], pa.uint64()),
        "query_id": pa.array([t.id if t.query_id is None else t.query_id for t in log], pa.uint64()),
        **{name: pa.array([getattr(t.search_params, name) for t in log]) for name in PARAMETERS},
        "precision": pa.array([t.precision for t in log], pa.float32()),
        "recall": pa.array([t.recall for t in log], pa.float32()),
        "latency_us": pa.array([t.latency_us for t in log], pa.uint64()),
        "rating": pa.array([t.feedback and t.feedback.rating for t in log], pa.int8()),
    }
    for name in ("cost", "propensity"):
        if log and getattr(log[0], name) is not None:
            columns[name] = pa.array([getattr(t, name) for t in log], pa.float32())
    return columns


def of_query(log: list[QueryTrajectory]) -> dict[str, pa.Array]:
    return {
        "query_embedding": pa.array([t.query_embedding.tolist() for t in log], pa.list_(pa.float32(), D)),
        "timestamp": pa.array([t.timestamp for t in log], pa.timestamp("s")),
    }


def one_table(log: list[QueryTrajectory], *absent: str) -> pa.Table:
    return pa.table(outcomes(log) | of_query(log)).drop_columns(list(absent))


def parquet(path: Path, table: pa.Table, row_group_size: int = 25, **options: Any) -> str:
    pq.write_table(table, path, row_group_size=row_group_size, **options)
    return str(path)


def ipc(path: Path, table: pa.Table) -> str:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=25)
    return str(path)


def sqlite(path: Path, log: list[QueryTrajectory]) -> str:
    with TrajectoryLog(path) as written:
        assert all(written.record(t) for t in log)
    return str(path)


def split_files(folder: Path, table: pa.Table) -> str:
    folder.mkdir()
    parquet(folder / "a.parquet", table.slice(0, 7))
    ipc(folder / "b.arrow", table.slice(7, 30))
    parquet(folder / "c.parquet", table.slice(37))
    return str(folder)


def two_tables(folder: Path, log: list[QueryTrajectory], *absent: str) -> dict[str, str]:
    """data.path and data.queries; the queries are stored in reverse order."""
    folder.mkdir(exist_ok=True)
    first = list({t.query_id: t for t in reversed(log)}.values())
    queries = pa.table({"query_id": pa.array([t.query_id for t in first], pa.uint64())} | of_query(first))
    return {
        "path": parquet(folder / "outcomes.parquet", pa.table(outcomes(log)).drop_columns(list(absent))),
        "queries": parquet(folder / "queries.parquet", queries),
    }


def read(path: Any, params: dict[str, Any] | None = None, quarantine: Path | None = None, **data: Any) -> Trajectories:
    return load(DataConfig(path=path, **data), ParamsConfig(**params or {}), quarantine)


def rows_of(table: Trajectories) -> dict[int, dict[str, Any]]:
    """Everything known about each row, by id."""
    columns = ("precision", "recall", "latency_us", "cost", "rating", "timestamp", "propensity")
    return {
        int(table.id[i]): {c: None if getattr(table, c) is None else getattr(table, c)[i].item() for c in columns}
        | {"x": table.x_QD[q].tolist(), "query": int(table.query_id[q]), "query_time": int(table.query_time[q])}
        | table.configs[table.config_id[i]].as_dict()
        for i, q in enumerate(table.query_row)
    }


def assert_same(one: Trajectories, other: Trajectories) -> None:
    """Asserts that the tables are equal to the last bit, in the same order."""
    for part, its in ((one, other), (one.configs, other.configs)):
        for field in fields(part):
            a, b = getattr(part, field.name), getattr(its, field.name)
            if isinstance(a, np.ndarray):
                assert a.dtype == b.dtype, field.name
                np.testing.assert_array_equal(a, b, err_msg=field.name)
            elif field.name not in ("configs", "source"):
                assert a == b, field.name
    assert one.source.fingerprint == other.source.fingerprint


# ---- every source gives the same table

SOURCES = {
    "parquet": lambda folder: parquet(folder / "x.parquet", one_table(LOG)),
    "arrow": lambda folder: ipc(folder / "x.arrow", one_table(LOG)),
    "directory": lambda folder: split_files(folder / "day", one_table(LOG)),
    "glob": lambda folder: split_files(folder / "day", one_table(LOG)) + "/*",
    "list": lambda folder: (
        (day := split_files(folder / "day", one_table(LOG))) and [f"{day}/a.parquet", f"{day}/[bc].*"]
    ),
    "uri": lambda folder: Path(parquet(folder / "x.parquet", one_table(LOG))).as_uri(),
    "sqlite": lambda folder: sqlite(folder / "x.sqlite", LOG),
    "mixed": lambda folder: [parquet(folder / "x.parquet", one_table(LOG[:31])), sqlite(folder / "x.db", LOG[31:])],
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_table_as_the_trajectories_themselves(source, tmp_path):
    table = read(SOURCES[source](tmp_path))
    assert_same(table, from_trajectories(LOG))
    assert table.source.total_rows == 60 and table.source.bad_rows == {}


def test_table_holds_what_was_logged(tmp_path):
    rows = rows_of(read(parquet(tmp_path / "x.parquet", one_table(LOG))))
    assert list(rows) == [t.id for t in LOG]
    for t in LOG:
        assert rows[t.id] == {
            "precision": t.precision,
            "recall": t.recall,
            "latency_us": t.latency_us,
            "cost": t.cost,
            "propensity": t.propensity,
            "rating": t.feedback.rating if t.feedback else 0,
            "timestamp": t.timestamp,
            "query": t.query_id,
            "query_time": t.timestamp,
            "x": t.query_embedding.tolist(),
            **t.search_params.as_dict(),
            "temperature": t.search_params.temperature,
        }


def test_embedding_of_a_query_is_held_once(tmp_path):
    table = read(parquet(tmp_path / "x.parquet", one_table(LOG)))
    assert table.x_QD.shape == (20, D)
    assert table.query_id.tolist() == [500 + q for q in range(20)]  # in the order of the file
    assert table.query_row.tolist() == [i // 3 for i in range(60)]


def test_rows_without_query_id_are_queries_of_their_own(tmp_path):
    table = read(parquet(tmp_path / "x.parquet", one_table(LOG, "query_id")))
    assert table.query_id.tolist() == table.id.tolist() and table.query_row.tolist() == list(range(60))
    np.testing.assert_array_equal(table.x_QD, [t.query_embedding for t in LOG])


def test_query_id_that_stands_for_several_embeddings_is_a_bad_row(tmp_path):
    # regression: with a session's id as query_id, the embeddings of nine in ten rows were silently dropped
    x = np.random.default_rng(0).normal(size=(40, D)).astype(np.float32)
    log = [make(i, query_id=i // 10, query_embedding=x[i]) for i in range(40)]
    path = parquet(tmp_path / "t.parquet", one_table(log))
    with pytest.raises(
        DataError, match=r"36 of 40 rows are bad.*query_id stands for another embedding, as a session's would"
    ):
        read(path)
    table = read(path, max_bad_fraction=1.0)
    assert len(table) == 4 and table.source.bad_rows == {
        "query_id stands for another embedding, as a session's would": 36
    }


def test_few_rows_that_hold_nearly_all_cost_are_told(tmp_path, caplog):
    """Ten rows with a cost of 1e12 among 10,000 of a few hundred. Regression: the bank abstained everywhere without a
    message.
    """
    log = [make(i, ef_search=[32, 64][i % 2], cost=float(100 + i % 7)) for i in range(400)]
    read(parquet(tmp_path / "even.parquet", one_table(log)))
    assert "a few rows make up nearly all" not in caplog.text
    log[33] = make(33, ef_search=64, cost=1e12)
    read(parquet(tmp_path / "odd.parquet", one_table(log)))
    assert (
        "cost: for 1 configs a few rows make up nearly all of it (ef_search=64: 200 rows count as much as 1.0"
        in caplog.text
    )
    assert "1e+12, has id 33" in caplog.text and "judge.cost_weight=0" in caplog.text


def test_one_query_embedded_twice_is_one_query(tmp_path):
    log = [make(i, query_id=i // 2) for i in range(40)]
    twins = [make(i, query_id=i // 2, query_embedding=log[i - i % 2].query_embedding * (1 + 1e-4 * (i % 2)))
             for i in range(40)]  # fmt: skip
    assert len(read(parquet(tmp_path / "t.parquet", one_table(twins))).query_id) == 20


def merged(tmp_path, propensity, **params):
    rng = np.random.default_rng(0)
    temperature = rng.choice([0.7, 0.72, 1.0], size=1500, p=[0.45, 0.05, 0.5])
    log = [make(i, query_id=i, temperature=float(t), propensity=propensity[float(t)])
           for i, t in enumerate(temperature)]  # fmt: skip
    return read(parquet(tmp_path / "t.parquet", one_table(log)), params)


def test_propensities_of_settings_that_became_one_config_are_refused(tmp_path):
    # regression: each row kept its own propensity, so that the merged config counted like two, and a worse one was
    # promoted
    with pytest.raises(ConfigError, match=r"temperature_step=0\.05 makes one config of temperature 0\.7 to 0\.72"):
        merged(tmp_path, {0.7: 0.45, 0.72: 0.05, 1.0: 0.5})
    assert len(merged(tmp_path, {0.7: 0.5, 0.72: 0.5, 1.0: 0.5}).configs) == 2
    assert len(merged(tmp_path, {0.7: 0.45, 0.72: 0.05, 1.0: 0.5}, temperature_step=0.01).configs) == 3


def test_query_time_is_that_of_its_newest_row():
    log = [make(i, **query(0) | {"timestamp": EARLY + when}) for i, when in enumerate([5, 9, 2])]
    assert from_trajectories(log).query_time.tolist() == [EARLY + 9]


# ---- two tables that share query_id


def test_two_tables_equal_one(tmp_path):
    one = read(parquet(tmp_path / "x.parquet", one_table(LOG)))
    two = read(**two_tables(tmp_path, LOG))
    assert rows_of(one) == rows_of(two)
    assert list(one.configs) == list(two.configs) and one.configs.default == two.configs.default
    assert len(two.x_QD) == 20 and two.source.total_rows == 80
    assert two.source.files == (str(tmp_path / "outcomes.parquet"), str(tmp_path / "queries.parquet"))


@few_examples
@given(
    times=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    queries=st.lists(st.integers(0, 5), min_size=1, max_size=25),
    capacity=st.integers(1, 30),
)
def test_capacity_keeps_the_same_newest_rows_of_two_tables_and_of_one(times, queries, capacity, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    log = [
        make(i, **query(q % len(times)) | {"timestamp": EARLY + times[q % len(times)]}, ef_search=10 + i % 2)
        for i, q in enumerate(queries)
    ]
    one = read(parquet(folder / "x.parquet", one_table(log), 7), capacity=capacity)
    two = read(**two_tables(folder, log), capacity=capacity)
    newest = sorted(sorted(range(len(log)), key=lambda i: (log[i].timestamp, i))[-capacity:])
    assert one.id.tolist() == two.id.tolist()
    assert sorted(one.id) == newest
    assert rows_of(one) == rows_of(two)
    assert sorted(two.query_id) == sorted({log[i].query_id for i in newest})  # no query without rows


def test_query_without_rows_is_left_out(tmp_path):
    both = two_tables(tmp_path, LOG)
    parquet(tmp_path / "outcomes.parquet", pa.table(outcomes(LOG)).slice(30))
    table = read(**both)
    assert sorted(table.query_id) == [500 + q for q in range(10, 20)] and len(table.x_QD) == 10


def test_row_whose_query_is_missing_or_bad_is_quarantined_where_it_stands(tmp_path):
    both = two_tables(tmp_path, LOG)
    queries = pq.read_table(both["queries"])
    x = queries["query_embedding"].to_pylist()
    x[3] = [0.0] * D  # query 516: the queries are in reverse order
    queries = queries.set_column(1, "query_embedding", pa.array(x, pa.list_(pa.float32(), D)))
    parquet(tmp_path / "queries.parquet", queries.slice(0, 19))  # without query 500
    log = pa.table(outcomes(LOG))
    folder = tmp_path / "outcomes"
    folder.mkdir()
    first, second = parquet(folder / "a.parquet", log.slice(0, 30)), parquet(folder / "b.parquet", log.slice(30))
    table = read(str(folder), None, tmp_path / "bad.parquet", queries=both["queries"], max_bad_fraction=0.5)
    bad = pq.read_table(tmp_path / "bad.parquet").to_pylist()
    reason = "query_id is not in data.queries, or is bad there"
    # regression: the row number counted the good rows of all files, and the file was given as the directory
    assert [tuple(row.values()) for row in bad] == [
        (both["queries"], 3, 516, "query_embedding has norm 0"),
        *[(first, i, i, reason) for i in range(3)],
        *[(second, i, 30 + i, reason) for i in range(18, 21)],
    ]
    assert table.id.tolist() == [i for i in range(60) if i // 3 not in (0, 16)]
    assert table.source.bad_rows == {reason: 6, "query_embedding has norm 0": 1}


def test_query_that_is_there_twice_is_a_bad_row(tmp_path):
    # regression: the second one was silently dropped
    both = two_tables(tmp_path, LOG)
    queries = pq.read_table(both["queries"])
    parquet(tmp_path / "queries.parquet", pa.concat_tables([queries, queries.slice(2, 1)]))
    assert read(**both, max_bad_fraction=0.05).source.bad_rows == {"duplicate query_id": 1}


@pytest.mark.parametrize(("table", "column"), [("queries", "timestamp"), ("path", "query_id"), ("path", "recall")])
def test_missing_column_of_two_tables_names_the_key(table, column, tmp_path):
    both = two_tables(tmp_path, LOG)
    parquet(Path(both[table]), pq.read_table(both[table]).drop_columns([column]))
    with pytest.raises(DataError, match=rf"^data\.{table}={both[table]} has no column {column}; add it"):
        read(**both)


def test_two_tables_that_share_no_query(tmp_path):
    both = two_tables(tmp_path, LOG)
    queries = pq.read_table(both["queries"])
    parquet(tmp_path / "queries.parquet", queries.set_column(0, "query_id", pa.array(range(20), pa.uint64())))
    with pytest.raises(DataError, match=r"query_id is not in data\.queries.*; correct the log"):
        read(**both)
    with pytest.raises(DataError, match=r"no row is left to learn from; check data\.queries' query_id"):
        read(**both, max_bad_fraction=1.0)


# ---- bad rows


@pytest.fixture
def one_bad_row_of_twenty(tmp_path) -> str:
    table = one_table(LOG[:20])
    recall = [7.0 if i == 13 else 0.5 for i in range(20)]
    table = table.set_column(table.schema.get_field_index("recall"), "recall", pa.array(recall))
    return parquet(tmp_path / "x.parquet", table, row_group_size=10)


def test_bad_rows_up_to_the_bound_are_set_aside(one_bad_row_of_twenty, tmp_path):
    table = read(one_bad_row_of_twenty, None, tmp_path / "bad.parquet", max_bad_fraction=0.05)
    assert len(table) == 19 and 13 not in table.id
    assert table.source.total_rows == 20 and table.source.bad_rows == {"recall is outside [0, 1]": 1}
    assert pq.read_table(tmp_path / "bad.parquet")["row"].to_pylist() == [13]


def test_bad_rows_over_the_bound_stop_the_job_but_are_quarantined(one_bad_row_of_twenty, tmp_path):
    with pytest.raises(DataError) as raised:
        read(one_bad_row_of_twenty, None, tmp_path / "bad.parquet", max_bad_fraction=0.049)
    message = str(raised.value)
    assert message.startswith(
        f"data.path={one_bad_row_of_twenty}: 1 of 20 rows are bad, over data.max_bad_fraction=0.049"
    )
    assert "x.parquet row 13 (id 13): recall is outside [0, 1]" in message
    assert pq.read_table(tmp_path / "bad.parquet").num_rows == 1


def test_unknown_tier_is_a_bad_row_that_names_the_setting(tmp_path):
    path = parquet(tmp_path / "x.parquet", one_table(LOG))
    with pytest.raises(DataError, match=r"30 of 60 rows are bad.*unknown model_tier \(params\.tiers=\['small'\]\): 30"):
        read(path, {"tiers": ["small"]})
    kept = read(path, {"tiers": ["small"]}, max_bad_fraction=0.5)
    assert kept.id.tolist() == [i for i in range(60) if i % 2]


def test_no_path_is_an_error_that_says_what_to_give():
    with pytest.raises(ConfigError, match=r"^data\.path is not set; give data\.path="):
        read(None)


# ---- the trajectory log


def test_log_of_several_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BATCH_ROWS", 7)
    assert_same(read(sqlite(tmp_path / "x.sqlite", LOG)), from_trajectories(LOG))


def test_log_without_costs_has_none(tmp_path):
    table = read(sqlite(tmp_path / "x.sqlite", [make(i) for i in range(5)]))
    assert table.cost is None and table.propensity is None and not table.rating.any()


def test_cost_of_some_rows_of_a_log_makes_the_others_bad_however_they_are_batched(tmp_path, monkeypatch):
    # regression: a batch without any cost made the column absent; one with some costs made its other rows bad
    path = sqlite(tmp_path / "x.sqlite", [make(i, cost=None if i < 10 else 1.0) for i in range(40)])
    for batch_rows in (4, 10, 100):
        monkeypatch.setattr(sources, "BATCH_ROWS", batch_rows)
        table = read(path, max_bad_fraction=0.25)
        assert table.id.tolist() == list(range(10, 40)) and table.cost is not None
        assert table.source.bad_rows == {"cost is null or not a number": 10}


def test_bad_row_of_a_log_is_quarantined(tmp_path):
    log = [make(i, **{"recall": float("nan")} if i == 3 else {}) for i in range(9)]
    log[5] = make(5, query_embedding=np.ones(3, np.float32))
    path = sqlite(tmp_path / "x.sqlite", log)
    read(path, None, tmp_path / "bad.parquet", max_bad_fraction=0.5)
    bad = [tuple(row.values()) for row in pq.read_table(tmp_path / "bad.parquet").to_pylist()]
    assert sorted(bad) == [
        (path, 3, 3, "recall is null or not a number"),
        (path, 5, 5, "query_embedding has not 4 values"),
    ]


def test_empty_log(tmp_path):
    path = sqlite(tmp_path / "x.sqlite", [])
    with pytest.raises(DataError, match=rf"^data\.path={path} has no rows; "):
        read(path)


def test_idle_host_among_others(tmp_path):
    # regression: one empty log stopped the job for all hosts
    sqlite(tmp_path / "idle.sqlite", [])
    sqlite(tmp_path / "busy.sqlite", LOG)
    assert_same(read(str(tmp_path)), from_trajectories(LOG))


def test_database_that_is_no_log_names_the_key(tmp_path):
    with sqlite3.connect(tmp_path / "x.db") as connection:
        connection.execute("CREATE TABLE t (a)")
    with pytest.raises(
        DataError, match=rf"^data\.path={tmp_path}/x\.db: the database is not an rb_gpu trajectory log; "
    ):
        read(str(tmp_path / "x.db"))


# ---- trajectories in memory


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        # regression: all of these were learned from, or stopped with NumPy's error
        ({"precision": float("nan")}, r"^trajectories\[3\] \(id 3\): precision is null or not a number; drop it"),
        ({"recall": 1.5}, r"^trajectories\[3\] \(id 3\): recall is outside \[0, 1\]; "),
        ({"query_embedding": np.zeros(D, np.float32)}, r"^trajectories\[3\] \(id 3\): query_embedding has norm 0; "),
        ({"query_embedding": np.full(D, np.nan)}, r"^trajectories\[3\] \(id 3\): query_embedding is not finite; "),
        (
            {"query_embedding": np.ones(3)},
            r"^trajectories\[3\] \(id 3\): query_embedding has shape \(3,\), not \(4,\); ",
        ),
        ({"query_embedding": np.ones((1, D))}, r"^trajectories\[3\] .*has shape \(1, 4\), not \(4,\); "),
        ({"model_tier": "huge"}, r"^trajectories\[3\] \(id 3\): unknown model_tier \(params\.tiers=\['small'\]\); "),
        ({"latency_us": -1}, r"^trajectories\[3\] \(id 3\): latency_us is outside \[0, "),
        ({"propensity": 0.0}, r"^trajectories\[3\] \(id 3\): propensity is outside \(0, 1\]; "),
    ],
)
def test_trajectory_that_breaks_the_rules_is_an_error_that_names_it(wrong, message):
    log = [make(i, propensity=0.5) for i in range(6)]
    log[3] = make(3, **{"propensity": 0.5} | wrong)
    with pytest.raises(DataError, match=message):
        from_trajectories(log, ParamsConfig(tiers=["small"]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"search_params": {"ef_search": 64}}, r"trajectories\[1\]: search_params=.* is not a SearchParams; give"),
        ({"feedback": 5}, r"trajectories\[1\]: feedback=5 is not a UserFeedback; give"),
        ({"id": -1}, r"trajectories\[1\]: id=-1 is outside \["),
        ({"query_id": -1}, "trajectories: a query_id is of a wrong type .*; correct it"),
        ({"precision": "high"}, "trajectories: a precision is of a wrong type .*'high'.*; correct it"),
        ({"latency_us": [5]}, "trajectories: a latency_us is of a wrong type .*; correct it"),
        ({"query_embedding": ["a"] * 3}, "trajectories: a query_embedding is of a wrong type .*; correct it"),
    ],
)
def test_trajectory_of_a_wrong_type_is_an_error_that_names_the_field(wrong, message):
    # regression: AttributeError, OverflowError and ArrowInvalid without the field
    log = [make(i)._replace(query_embedding=[1.0, 0.0, 0.0]) for i in range(3)]
    log[1] = log[1]._replace(**wrong)
    with pytest.raises(DataError, match=f"^{message}"):
        from_trajectories(log)


def test_what_are_no_trajectories_is_told():
    with pytest.raises(DataError, match=r"^trajectories\[0\]: trajectory is of type int, not QueryTrajectory; give"):
        from_trajectories([7])
    with pytest.raises(DataError, match=r"^trajectories=7 are no sequence; give a list"):
        from_trajectories(7)


def test_repeated_id_in_memory_is_an_error():
    with pytest.raises(DataError, match=r"^trajectories\[1\] \(id 7\): duplicate id; "):
        from_trajectories([make(7), make(7)])


def test_no_trajectories():
    with pytest.raises(DataError, match=r"^no trajectories were given; "):
        from_trajectories([])


def test_cost_that_only_some_trajectories_have_is_not_known():
    table = from_trajectories([make(0, cost=1.0), make(1)])
    assert table.cost is None


# ---- tiers


def tiers_of(*logged: tuple[str, float | None, int], **params: Any) -> tuple[str, ...]:
    """The tiers of a log of (tier, cost, latency)."""
    log = [make(i, model_tier=tier, cost=cost, latency_us=us) for i, (tier, cost, us) in enumerate(logged)]
    return from_trajectories(log, ParamsConfig(**params)).configs.tiers


def test_tiers_are_in_the_order_of_their_mean_cost():
    assert tiers_of(("b", 1.0, 9), ("a", 3.0, 1), ("b", 2.0, 9), ("c", 0.5, 9), ("a", 0.0, 1)) == ("c", "a", "b")


def test_tiers_without_cost_are_in_the_order_of_their_mean_latency():
    assert tiers_of(("a", None, 30), ("b", None, 10), ("c", None, 25), ("a", None, 10)) == ("b", "a", "c")


def test_tiers_of_equal_cost_are_in_the_order_of_their_latency():
    # regression: the name decided
    assert tiers_of(("a", 1.0, 30), ("b", 1.0, 10), ("c", 1.0, 20)) == ("b", "c", "a")
    assert tiers_of(("b", 1.0, 10), ("a", 1.0, 10)) == ("a", "b")


def test_configured_tiers_keep_their_order_and_those_never_tried():
    assert tiers_of(("b", 1.0, 10), ("a", 9.0, 10), tiers=["a", "b", "c"]) == ("a", "b", "c")


def test_tier_of_bad_rows_only_is_no_tier(tmp_path):
    log = [make(i, model_tier="ghost" if i == 3 else "small", recall=2.0 if i == 3 else 0.5) for i in range(9)]
    table = read(parquet(tmp_path / "x.parquet", one_table(log)), max_bad_fraction=0.2)
    assert table.configs.tiers == ("small",)


def test_codes_follow_the_order_of_tiers(tmp_path):
    rows = rows_of(read(parquet(tmp_path / "x.parquet", one_table(LOG))))
    assert [rows[t.id]["model_tier"] for t in LOG] == [t.search_params.model_tier for t in LOG]


# ---- absent columns


def test_absent_parameters_mean_the_default(tmp_path, caplog):
    path = parquet(tmp_path / "x.parquet", one_table(LOG, *PARAMETERS, "cost", "propensity", "rating"))
    table = read(path)
    assert list(table.configs) == [SearchParams(temperature=0.7)]
    assert table.cost is None and table.propensity is None and not table.rating.any()
    assert (table.config_id == 0).all()
    assert "every row ran SearchParams(ef_search=100," in caplog.text and "nothing to choose from" in caplog.text


def test_absent_parameters_mean_the_configured_default(tmp_path):
    path = parquet(tmp_path / "x.parquet", one_table(LOG, "n_probes", "temperature", "model_tier", "context_tokens"))
    default = {"ef_search": 64, "n_probes": 3, "temperature": 0.5, "model_tier": "base", "context_tokens": 99}
    table = read(path, {"default": default})
    assert [p.ef_search for p in table.configs] == [32, 64, 128]
    assert table.configs[table.configs.default].as_dict() == default
    assert table.configs.tiers == ("base",)


@pytest.mark.parametrize("name", ["ef_search", "model_tier", "temperature"])
def test_parameter_that_came_later_keeps_its_values_and_means_the_default_before(name, tmp_path, caplog):
    # regression: it was taken as absent from all files, and rows with other n_probes were learned as the default's
    default = {"ef_search": 7, "model_tier": "small", "temperature": 0.5} | (
        {"model_tier": "old"} if name == "model_tier" else {}
    )
    parquet(tmp_path / "a.parquet", one_table(LOG[:30], name))
    parquet(tmp_path / "b.parquet", one_table(LOG[30:]))
    both = rows_of(read(str(tmp_path), {"default": default}))
    whole = rows_of(read(parquet(tmp_path / "whole.pq", one_table(LOG))))
    assert {both[i][name] for i in range(30)} == {default[name]}
    assert [both[i][name] for i in range(30, 60)] == [whole[i][name] for i in range(30, 60)]
    assert f"{name} is in some files only and is taken as {default[name]} in the others" in caplog.text


def test_absent_tier_needs_a_default_among_the_configured_tiers(tmp_path):
    path = parquet(tmp_path / "x.parquet", one_table(LOG, "model_tier"))
    with pytest.raises(
        ConfigError, match=r"^params\.default\.model_tier=auto is not one of params\.tiers=\['a', 'b'\] "
    ):
        read(path, {"tiers": ["a", "b"]})
    table = read(path, {"tiers": ["a", "b"], "default": {"model_tier": "b"}})
    assert {p.model_tier for p in table.configs} == {"b"} and table.configs.tiers == ("a", "b")


# ---- the default


def default_of(log: list[QueryTrajectory], **params: Any) -> SearchParams:
    configs = from_trajectories(log, ParamsConfig(**params)).configs
    return configs[configs.default]


def test_default_is_the_config_most_logged():
    log = [make(i, ef_search=[10, 20, 20, 30][i % 4], cost=float(i % 4 == 1)) for i in range(20)]
    assert default_of(log).ef_search == 20


def test_default_of_equal_counts_is_the_cheapest():
    log = [make(i, ef_search=10 + i % 3, cost=[3.0, 1.0, 2.0][i % 3], latency_us=[1, 2, 3][i % 3]) for i in range(9)]
    assert default_of(log).ef_search == 11


def test_default_of_equal_counts_and_costs_is_the_fastest():
    for cost in (1.0, None):
        log = [make(i, ef_search=10 + i % 3, cost=cost, latency_us=[30, 20, 10][i % 3]) for i in range(9)]
        assert default_of(log).ef_search == 12


def test_configured_default_that_was_tried_is_its_row():
    log = [make(i, ef_search=10 + i % 3) for i in range(9)]
    table = from_trajectories(log, ParamsConfig(default={"ef_search": 12, "model_tier": "small"}))
    assert len(table.configs) == 3 and table.configs.default == 2


def test_configured_default_that_was_never_tried_is_appended_and_said(caplog):
    log = [make(i, ef_search=10 + i % 3) for i in range(9)]
    before = from_trajectories(log)
    table = from_trajectories(log, ParamsConfig(default={"ef_search": 5, "model_tier": "small"}))
    assert [p.ef_search for p in table.configs] == [10, 11, 12, 5] and table.configs.default == 3
    assert table.config_id.tolist() == before.config_id.tolist()
    assert "was never tried" in caplog.text


def test_configured_default_is_quantised_as_the_table_is():
    log = [make(i, temperature=0.7, context_tokens=2000) for i in range(3)]
    params = {"temperature": 0.71, "context_tokens": 2100, "model_tier": "small"}
    table = from_trajectories(log, ParamsConfig(default=params, temperature_step=0.1, context_step=500))
    assert len(table.configs) == 1 and table.configs[0].context_tokens == 2000


@pytest.mark.parametrize("tiers", ["auto", ["small", "large"]])
def test_configured_default_of_an_unknown_tier(tiers):
    with pytest.raises(
        ConfigError, match=r"^params\.default\.model_tier=huge is not one of the tiers \[.*'small'.*\]; set"
    ):
        from_trajectories([make(0)], ParamsConfig(tiers=tiers, default={"model_tier": "huge"}))


# ---- configs


def test_temperature_and_context_are_quantised():
    log = [
        make(i, temperature=t, context_tokens=c) for i, (t, c) in enumerate([(0.69, 900), (0.71, 1100), (0.8, 2000)])
    ]
    table = from_trajectories(log, ParamsConfig(temperature_step=0.05, context_step=1000))
    assert [(round(p.temperature, 6), p.context_tokens) for p in table.configs] == [(0.7, 1000), (0.8, 2000)]
    assert table.config_id.tolist() == [0, 0, 1]


def test_too_many_configs():
    log = [make(i, context_tokens=1 + i) for i in range(4097)]
    with pytest.raises(
        ConfigError, match=r"4097 distinct configs, over the limit of 4096; context_tokens alone has 4097"
    ):
        from_trajectories(log)
    assert len(from_trajectories(log[1:]).configs) == 4096
    assert len(from_trajectories(log, ParamsConfig(context_step=100)).configs) == 41


@few_examples
@given(
    rows=st.lists(
        st.tuples(
            st.integers(1, 3),
            st.sampled_from("abc"),
            st.sampled_from([0.1, 0.2, 0.3]),
            st.integers(1, 3),
            st.integers(0, 3),
        ),
        min_size=1,
        max_size=25,
    ),
    random=st.randoms(),
)
def test_order_of_rows_does_not_matter(rows, random):
    log = [
        make(i, ef_search=ef, model_tier=tier, cost=cost, latency_us=us, **query(q))
        for i, (ef, tier, cost, us, q) in enumerate(rows)
    ]
    one, other = from_trajectories(log), from_trajectories(random.sample(log, len(log)))
    assert one.configs.tiers == other.configs.tiers and one.configs.default == other.configs.default
    assert list(one.configs) == list(other.configs)
    assert rows_of(one) == rows_of(other)


@pytest.mark.parametrize("seconds", [1, 7], ids=["times of their own", "equal times"])
def test_stored_order_does_not_matter_to_a_bit(seconds, tmp_path):
    # regression: sums differed in their last digits, and queries with equal times were held out in file order: the same
    # log in other files had another fingerprint and another bank
    log = [
        make(i, **query(i // 3) | {"timestamp": EARLY + i // 3 // seconds}, ef_search=32 << i % 3) for i in range(60)
    ]
    table = one_table(log)
    expected = read(parquet(tmp_path / "x.parquet", table))
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(log))
        folder = tmp_path / str(seed)
        assert_same(expected, read(split_files(folder, table.take(order))))
        for path in folder.iterdir():
            path.rename(path.with_stem(chr(ord("z") - ord(path.stem[0]) + ord("a"))))
        assert_same(expected, read(str(folder)))
        two = two_tables(tmp_path / f"two{seed}", [log[i] for i in order])
        assert_same(expected, read(**two))


def test_of_a_query_embedded_twice_the_same_embedding_stays_in_any_order(tmp_path):
    # regression: the embedding was that of the row which came first in the files
    x = [np.float32([i // 3 + 1, 1, 0, 1 + i % 3 / 99]) for i in range(30)]
    log = [make(i, **query(i // 3) | {"query_embedding": x[i]}) for i in range(30)]
    expected = read(parquet(tmp_path / "x.parquet", one_table(log)))
    assert_same(expected, read(parquet(tmp_path / "y.parquet", one_table(log[::-1]))))
    assert set(expected.x_QD[:, 3]) == {1.0}


# ---- what it came from


def test_fingerprint_is_that_of_the_content():
    def changed(**fields: Any) -> str:
        log = [make(i, cost=1.0, propensity=0.5, **fields if i == 3 else {}) for i in range(6)]
        return from_trajectories(log).source.fingerprint

    assert changed() == changed()
    # regression: it did not depend on cost, propensity, rating and the configs' parameters
    others = [
        {"precision": 0.75},
        {"latency_us": 1001},
        {"timestamp": EARLY},
        {"query_id": 99},
        {"query_embedding": np.ones(D, np.float32)},
        {"feedback": UserFeedback(2)},
        {"ef_search": 101},
        {"ef_search": 102},
    ]
    assert len({changed(), *(changed(**other) for other in others)}) == len(others) + 1
    base = {"cost": 1.0, "propensity": 0.5}
    for name in base:
        log = [make(i, **base | {name: 0.25}) for i in range(6)]
        assert from_trajectories(log).source.fingerprint != changed()


@pytest.mark.parametrize("lists", [False, True])
def test_hashes_follow_their_embeddings_through_bad_rows_repeats_and_time(tmp_path, lists):
    rng = np.random.default_rng(9)
    n, q = 300, 60
    query = rng.permutation(np.repeat(np.arange(q), n // q)).astype(np.uint64)
    x = rng.normal(size=(q, D)).astype(np.float32)
    x[[4, 30]] = 0
    outcomes = {
        "id": np.arange(n, dtype=np.uint64), "query_id": query, "precision": np.full(n, 0.5), "recall": np.full(n, 0.5),
        "latency_us": np.full(n, 9), "ef_search": rng.integers(1, 4, n),
    }  # fmt: skip
    kind = pa.list_(pa.float32()) if lists else pa.list_(pa.float32(), D)
    times = EARLY + rng.permutation(q)
    per_query = {
        "query_id": np.arange(q, dtype=np.uint64),
        "query_embedding": pa.array(list(x), kind),
        "timestamp": times,
    }
    rows = outcomes | {"query_embedding": pa.array(list(x[query]), kind), "timestamp": times[query]}
    pq.write_table(pa.table(outcomes), tmp_path / "outcomes.parquet")
    pq.write_table(pa.table(per_query), tmp_path / "queries.parquet")
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    joined = read(str(tmp_path / "outcomes.parquet"), queries=str(tmp_path / "queries.parquet"), max_bad_fraction=0.5)
    one = read(str(tmp_path / "rows.parquet"), max_bad_fraction=0.5)
    newest = read(str(tmp_path / "rows.parquet"), max_bad_fraction=0.5, capacity=90)
    for loaded in (joined, one, newest):
        with block_threads() as pool:
            again = _fingerprint(loaded, row_hashes(loaded.x_QD, pool))
        assert loaded.source.fingerprint == again
    assert len(joined.x_QD) == q - 2 and not np.array_equal(joined.query_id, np.arange(q - 2))


def test_source_says_what_was_read(tmp_path):
    folder = split_files(tmp_path / "day", one_table(LOG))
    source = read(folder, capacity=45).source
    assert source.path == folder and source.total_rows == 45
    assert source.files == tuple(f"{folder}/{name}" for name in ("a.parquet", "b.arrow", "c.parquet"))


# ---- split by time


@few_examples
@given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), min_size=2, max_size=40),
    holdout=st.floats(0.05, 0.95),
)
def test_split_never_cuts_a_query_and_holds_out_the_newest(rows, holdout):
    table = from_trajectories([make(i, query_id=q, timestamp=EARLY + t) for i, (q, t) in enumerate(rows)])
    n = len(table.query_id)
    expected = round(holdout * n)
    if not 0 < expected < n:
        with pytest.raises(DataError, match=r"^eval\.holdout=.+; log more queries or change eval\.holdout$"):
            split_by_time(table, holdout)
        return
    learn, held = split_by_time(table, holdout)
    assert len(held.query_id) == expected and len(learn.query_id) == n - expected
    assert not set(learn.query_id) & set(held.query_id)
    assert sorted([*learn.id, *held.id]) == list(range(len(rows)))
    assert learn.query_time.max() <= held.query_time.min()
    assert rows_of(learn) | rows_of(held) == rows_of(table)
    assert learn.configs is held.configs is table.configs


def test_select_queries_keeps_every_row_of_each():
    table = from_trajectories(LOG)
    keep = np.arange(20) % 3 == 1
    part = table.select_queries(keep)
    assert part.id.tolist() == [i for i in range(60) if i // 3 % 3 == 1]
    assert rows_of(part).items() <= rows_of(table).items()
    assert rows_of(table.select_queries(np.ones(20, bool))) == rows_of(table)


# ---- memory

MEASURE = """
import sys
from pathlib import Path
from rb_gpu.learn.config import DataConfig, ParamsConfig
from rb_gpu.learn.trajectories import load

def status(key):  # ru_maxrss would begin with what the parent held when it made this process
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024

load(DataConfig(path=sys.argv[1]), ParamsConfig())
before = status("VmRSS")
table = load(DataConfig(path=sys.argv[2]), ParamsConfig())
print(len(table), table.x_QD.nbytes, status("VmHWM") - before)
"""


def embeddings_as(kind: str, x: np.ndarray) -> pa.Array:
    n, dim = x.shape
    if kind == "list":
        return pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * dim), pa.array(x.ravel()))
    if kind == "fixed_size_binary":
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(4 * dim), n, [None, pa.py_buffer(x)])
    return pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), dim)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("suffix", "kind"), [(".parquet", "list"), (".parquet", "fixed_size_binary"), (".arrow", "fixed_size_list")]
)
def test_a_large_file_takes_the_memory_of_its_matrix_and_a_few_chunks(suffix, kind, tmp_path):
    n, dim = 200_000, 128
    x = np.random.default_rng(0).random((n, dim), dtype=np.float32)
    ids = np.arange(n, dtype=np.uint64)
    ids[1] = 0  # one bad row; regression: it made a copy of the whole table
    large = pa.table(
        {
            "id": ids,
            "query_embedding": embeddings_as(kind, x),
            "precision": np.full(n, 0.5, np.float32),
            "recall": np.full(n, 0.5, np.float32),
            "latency_us": np.full(n, 1000),
            "timestamp": np.arange(n),
        }
    )
    path, small = str(tmp_path / f"large{suffix}"), str(tmp_path / f"small{suffix}")
    for name, table in ((path, large), (small, large.slice(2, 10))):
        if suffix == ".parquet":
            # one row group, which Arrow would read as a whole; no dictionary, like the floats of a real log
            parquet(Path(name), table, row_group_size=n, use_dictionary=False)
        else:
            # one batch, which Arrow would copy as a whole, and whose mapped pages would stay in memory
            with pa.OSFile(name, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, small, path], capture_output=True, text=True, timeout=120, check=True
    )
    rows, matrix, peak = map(int, done.stdout.split())
    chunk = sources.BATCH_ROWS * dim * 4
    assert rows == n - 1 and abs(matrix - n * dim * 4) < 1000
    # measured: 0.9 chunks for Arrow files, 2.3 for binary and 3.1 to 3.3 for lists; a second matrix would be 3 more
    assert peak < matrix + 4.5 * chunk


# ---- chunks


def bad_here_and_there(n: int = 300, dim: int = 6) -> pa.Table:
    """n rows of n queries, some of which are bad in each way that an embedding can be."""
    x = np.random.default_rng(3).normal(size=(n, dim)).astype(np.float32)
    x[7], x[100, 2], x[201, 0], x[250] = 0, np.nan, np.inf, 1e30  # the last is good: only its square is infinite
    x[251] = 1e-30
    columns = outcomes([make(i, ef_search=10 + i % 3) for i in range(n)])
    del columns["query_id"]
    table = pa.table(columns | {"timestamp": pa.array(range(n), pa.int64())})
    return table.append_column("query_embedding", embeddings_as("fixed_size_list", x))


@pytest.mark.parametrize("kind", ["fixed_size_list", "list", "fixed_size_binary"])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_table_does_not_depend_on_how_it_is_cut_into_batches_and_blocks(suffix, kind, tmp_path, monkeypatch):
    table = bad_here_and_there()
    at = table.schema.get_field_index("query_embedding")
    x = np.concatenate([chunk.values.to_numpy() for chunk in table["query_embedding"].chunks]).reshape(300, 6)
    table = table.set_column(at, "query_embedding", embeddings_as(kind, x))
    path = tmp_path / f"x{suffix}"
    if suffix == ".parquet":
        parquet(path, table, row_group_size=70)
    elif suffix == ".arrow":
        ipc(path, table)
    else:  # compressed, like Feather files
        with pa.OSFile(str(path), "wb") as file:
            options = pa.ipc.IpcWriteOptions(compression="zstd")
            with pa.ipc.new_file(file, table.schema, options=options) as writer:
                writer.write_table(table)
    whole = read(str(path), max_bad_fraction=0.5)
    assert whole.id.tolist() == [i for i in range(300) if i not in (7, 100, 201)]
    np.testing.assert_array_equal(whole.x_QD, np.delete(x, [7, 100, 201], axis=0))
    for rows, block_bytes in ((1, 1), (7, 100), (64, 48)):
        monkeypatch.setattr("rb_gpu.learn.tables.BATCH_ROWS", rows)
        monkeypatch.setattr(sources, "BATCH_ROWS", rows)
        monkeypatch.setattr("rb_gpu.learn.blocks.BLOCK_BYTES", block_bytes)
        cut = read(str(path), max_bad_fraction=0.5)
        assert_same(cut, whole)
        assert cut.source == whole.source


@pytest.mark.parametrize("dim", [1, 5, 6])
def test_fingerprint_tells_apart_tables_that_differ_anywhere(dim):
    # regression: in sums of whole words, sign changes in pairs cancelled
    x = np.random.default_rng(4).normal(size=(9, dim)).astype(np.float32) + 3
    others = [x]
    for row in (1, 8):
        for column in range(dim):
            for changed in (np.nextafter(x[row, column], np.float32(9)), -x[row, column]):
                others.append(x.copy())
                others[-1][row, column] = changed
            for second in range(column):
                others.append(x.copy())
                others[-1][row, [column, second]] *= -1
    others.append(x.copy())
    others[-1][[2, 3]] = x[[3, 2]]
    found = [
        from_trajectories([make(i, query_embedding=row) for i, row in enumerate(rows)]).source.fingerprint
        for rows in others
    ]
    assert len(set(found)) == len(others)
    again = from_trajectories([make(i, query_embedding=row) for i, row in enumerate(x)])
    assert again.source.fingerprint == found[0]
