"""Logs of few distinct embeddings that are asked again and again, as popular queries are."""

from __future__ import annotations

import numpy as np
import pytest

from rb_gpu.learn import learn
from rb_gpu.learn.config import IndexConfig, JudgeConfig, ParamsConfig, TrainConfig
from rb_gpu.learn.policy import nearest_leaves
from rb_gpu.learn.trajectories import Source, Trajectories, assemble

EMBEDDINGS, TIMES, DIM = 12, 40, 32


def popular(seed: int) -> Trajectories:
    """Every embedding asked TIMES times, each time as a query of its own, under one of two configs at random."""
    rng = np.random.default_rng(seed)
    asked = np.repeat(np.arange(EMBEDDINGS), TIMES)
    rows, config = np.arange(len(asked)), rng.integers(2, size=len(asked))
    quality = (0.4 + 0.02 * asked + 0.1 * config * (1 + asked % 3)).astype(np.float32)
    columns = {
        "id": rows.astype(np.uint64), "query_id": rows.astype(np.uint64), "query_row": rows, "query_time": rows,
        "x_QD": rng.normal(size=(EMBEDDINGS, DIM)).astype(np.float32)[asked], "timestamp": rows,
        "ef_search": (config + 1).astype(np.uint32), "precision": quality, "recall": quality,
        "latency_us": np.full(len(asked), 1000), "propensity": np.full(len(asked), 0.5, np.float32),
    }  # fmt: skip
    return assemble(columns, [], ParamsConfig(default={"ef_search": 1}), Source())


@pytest.mark.parametrize("seed", range(4))
def test_an_embedding_of_the_training_is_near_its_own_pattern(seed):
    # the automatic floor was the rounded cosine of an embedding with itself, and a lookup that rounds otherwise took
    # the embedding for an unknown one: whole patterns were answered with the default
    table = popular(seed)
    judging = JudgeConfig(latency_weight=0.0, cost_weight=0.0)
    bank = learn(table, TrainConfig(judge=judging, index=IndexConfig(kind="off"))).bank()
    for scale in (1.0, 3.7):
        asked = scale * table.x_QD[::TIMES]
        assert (nearest_leaves(bank, asked)[1] >= bank.data.lookup.floor).all()
        assert (bank.optimized_params_batch(asked)["ef_search"] == 2).all()
        assert [bank.optimized_params(query).params.ef_search for query in asked] == [2] * EMBEDDINGS


def test_an_embedding_that_shares_a_pattern_is_near_it():
    # regression: where two popular embeddings share a pattern, the automatic floor was their rounded cosine to it, and
    # half of the lookups, which round otherwise, took both for unknown
    table = popular(0)
    table.x_QD[TIMES : 2 * TIMES] = table.x_QD[0] + 0.1 * table.x_QD[TIMES]
    bank = learn(table, TrainConfig(judge=JudgeConfig(latency_weight=0.0), index=IndexConfig(kind="off"))).bank()
    assert bank.data.leaves < EMBEDDINGS
    rng = np.random.default_rng(0)
    for asked in np.float32(rng.uniform(0.1, 10, 50))[:, None, None] * table.x_QD[::TIMES]:
        assert (bank.optimized_params_batch(asked)["pattern_id"] >= 0).all()
        assert all(bank.optimized_params(query).source.has_pattern for query in asked)
