"""Sessions that keep their config: they are found, no others are, and their rows count as one choice each."""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rb_gpu.learn import learn
from rb_gpu.learn.config import DataConfig, IndexConfig, JudgeConfig, ParamsConfig, TrainConfig
from rb_gpu.learn.sessions import kept_choices, one_of_each
from rb_gpu.learn.trajectories import Trajectories, load

CONFIGS = 6


@pytest.mark.parametrize("main", [1 / 6, 0.7])
def test_configs_that_a_session_keeps_are_noticed_and_no_others(main):
    rng = np.random.default_rng(0)
    session, rounds = rng.integers(200, size=1200).astype(np.uint64), np.arange(1200)
    # which config runs mostly depends on the session, and each session mostly asks for one kind of query
    p_NC = np.full((1200, CONFIGS), (1.0 - main) / 5)
    p_NC[rounds, (session % CONFIGS).astype(int)] = main
    called = []
    for _ in range(300):
        chosen = (p_NC.cumsum(1) < rng.random((1200, 1))).sum(1)
        called.append(kept_choices(session, chosen, p_NC[rounds, chosen]) is not None)
    assert sum(called) <= 1
    kept = rng.choice(CONFIGS, size=200)[session.astype(int)]
    assert kept_choices(session, kept, np.full(1200, 1 / CONFIGS)) == pytest.approx(CONFIGS)
    # session 0 is no session
    assert kept_choices(np.zeros(1200, np.uint64), kept, np.full(1200, 1 / CONFIGS)) is None
    # alternating is no repeating, however unlikely
    assert kept_choices(session, rounds % CONFIGS, np.full(1200, 1 / CONFIGS)) is None


def test_wrong_propensities_do_not_make_a_session():
    # 1/p of a default that runs five times as often as logged comes to far more than 1 in any two rows
    rng = np.random.default_rng(0)
    session = rng.integers(200, size=1200).astype(np.uint64)
    chosen = np.where(rng.random(1200) < 0.8, 0, rng.integers(CONFIGS, size=1200))
    assert kept_choices(session, chosen, np.full(1200, 1 / CONFIGS)) is None


def test_one_query_of_each_session_is_used_and_all_without_a_session():
    session_Q = np.repeat(np.arange(101, dtype=np.uint64), 10)
    config_Q = np.random.default_rng(0).integers(CONFIGS, size=101)[session_Q.astype(int)]
    query_id = np.arange(5000, 5000 + len(session_Q), dtype=np.uint64)
    # the second row of every other query ran another config on purpose
    query_N = np.sort(np.concatenate([np.arange(1010), np.arange(0, 1010, 2)]))
    first_N = np.diff(query_N, prepend=-1) > 0
    config_N = np.where(first_N, config_Q[query_N], (config_Q[query_N] + 1) % CONFIGS)
    pscore_N = np.full(len(query_N), 1 / CONFIGS, np.float32)
    keep_Q = one_of_each(session_Q, query_id, query_N, config_N, pscore_N)
    assert np.bincount(session_Q[keep_Q].astype(int)).tolist() == [10] + [1] * 100
    # not always the first or last one, whose queries may be unlike the others
    assert 2.0 < (np.flatnonzero(keep_Q)[10:] % 10).mean() < 7.0
    # shuffling the table keeps the same queries
    order = np.random.default_rng(1).permutation(1010)
    again_Q = one_of_each(
        session_Q[order], query_id[order], np.arange(1010), config_Q[order], np.full(1010, 1 / CONFIGS, np.float32)
    )
    assert set(query_id[order][again_Q]) == set(query_id[keep_Q])


def logged_in_sessions(path, seed: int, effect: float = 0.0) -> Trajectories:
    """4,000 rows of 400 sessions, each of which keeps one config and has an effect of its own on quality."""
    rng = np.random.default_rng(seed)
    session = np.repeat(np.arange(1, 401), 10)
    config = rng.integers(CONFIGS, size=401)[session]
    quality = 0.5 + 0.15 * rng.normal(size=401)[session] + 0.1 * rng.normal(size=4000) + effect * (config == 3)
    quality = np.clip(quality, 0, 1).astype(np.float32)
    embedding = rng.normal(size=(401, 8))[session] + 0.5 * rng.normal(size=(4000, 8))
    pq.write_table(
        pa.table({
            "id": np.arange(4000), "query_embedding": list(embedding.astype(np.float32)), "ef_search": 16 << config,
            "precision": quality, "recall": quality, "latency_us": np.full(4000, 1000), "timestamp": np.arange(4000),
            "propensity": np.full(4000, 1 / CONFIGS, np.float32), "session": session,
        }),
        path,
    )  # fmt: skip
    return load(DataConfig(path=str(path)), ParamsConfig(default={"ef_search": 16}))


def acts(table: Trajectories) -> bool:
    config = TrainConfig(judge=JudgeConfig(latency_weight=0.0), index=IndexConfig(kind="off"))
    return bool((learn(table, config).bank().optimized_params_batch(table.x_QD)["ef_search"] != 16).any())


def test_sessions_without_a_better_config_leave_the_default(tmp_path, caplog):
    # regression: rows of a session counted as independent. In 20 of 20 such logs the bank acted, with a mean confidence
    # of .86
    with caplog.at_level(logging.WARNING, "rb_gpu"):
        tables = [logged_in_sessions(tmp_path / "log.parquet", seed) for seed in range(8)]
    assert caplog.text.count("one query of each is used, 400 of 4000 queries in all") == 8
    assert [len(one) for one in tables] == [400] * 8
    assert sum(acts(one) for one in tables) <= 1
    np.testing.assert_array_equal(np.unique(tables[0].session), np.arange(1, 401))


def test_sessions_still_show_what_is_better(tmp_path):
    assert acts(logged_in_sessions(tmp_path / "log.parquet", 0, effect=0.2))


def test_embeddings_stay_with_their_queries(tmp_path):
    table = logged_in_sessions(tmp_path / "log.parquet", 0)
    written = pq.read_table(tmp_path / "log.parquet")["query_embedding"].to_pylist()
    np.testing.assert_array_equal(table.x_QD, np.array(written, np.float32)[table.query_id.astype(int)])
