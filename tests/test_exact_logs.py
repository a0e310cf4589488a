"""Logs of a deterministic service: distinct queries repeat, and every repeat under one config comes out the same."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from rb_gpu.learn import learn
from rb_gpu.learn.config import ClusterConfig, IndexConfig, JudgeConfig, ParamsConfig, TrainConfig
from rb_gpu.learn.pipeline import LearnedBank
from rb_gpu.learn.trajectories import Source, Trajectories, assemble

CONFIGS, DEFAULT = 3, 1


def logged(
    worth_QC: np.ndarray, x_QD: np.ndarray, config_N: np.ndarray, query_N: np.ndarray, propensity: bool = True
) -> Trajectories:
    """Rows of these queries under these configs, each worth exactly what its config is to its query."""
    found_N = worth_QC[query_N, config_N].astype(np.float32)
    columns = {
        "id": np.arange(len(query_N), dtype=np.uint64), "query_id": np.arange(len(x_QD), dtype=np.uint64),
        "x_QD": x_QD.astype(np.float32), "query_row": query_N, "query_time": np.arange(len(x_QD)),
        "timestamp": np.arange(len(query_N)), "ef_search": (config_N + 1).astype(np.uint32), "precision": found_N,
        "recall": found_N, "latency_us": np.full(len(query_N), 1000),
    }  # fmt: skip
    if propensity:
        columns["propensity"] = np.full(len(query_N), 1.0 / CONFIGS, np.float32)
    return assemble(columns, [], ParamsConfig(default={"ef_search": DEFAULT + 1}), Source())


def repeats(worth_KC: np.ndarray, rows: int, log: str) -> Trajectories:
    """Log of K distinct embeddings, `rows` rows of each config on each.

    log: "one config", a query id for each row; "every config", for each round of all; "one id", for each embedding.
    """
    kinds = len(worth_KC)
    kind_N, config_N = (v.ravel() for v in np.meshgrid(np.arange(kinds), np.arange(CONFIGS), indexing="ij"))
    kind_N, config_N = np.tile(kind_N, rows), np.tile(config_N, rows)
    index_N = np.arange(len(kind_N))
    query_N = {"one config": index_N, "every config": index_N // CONFIGS, "one id": kind_N}[log]
    kind_Q = kind_N[np.unique(query_N, return_index=True)[1]]
    return logged(worth_KC[kind_Q], np.eye(kinds)[kind_Q], config_N, query_N, log == "one config")


def learned(trajectories: Trajectories, kinds: int, method: str = "eb", seed: int = 0) -> LearnedBank:
    config = TrainConfig(
        cluster=ClusterConfig(k=kinds), judge=JudgeConfig(method=method, latency_weight=0.0), seed=seed,
        index=IndexConfig(kind="off"),
    )  # fmt: skip
    return learn(trajectories, config)


def answers(bank: LearnedBank, kinds: int) -> tuple[list[int], np.ndarray]:
    """The config that each distinct embedding is answered with, and how sure that is."""
    found = bank.bank().optimized_params_batch(np.eye(kinds, dtype=np.float32))
    return (found["ef_search"].astype(int) - 1).tolist(), found["confidence"]


LOGS = ["one config", "every config", "one id"]


@pytest.mark.parametrize("log", LOGS)
@pytest.mark.parametrize("kinds", [3, 12])
def test_what_is_better_in_every_repeat_is_chosen(kinds, log):
    # without a spread all was unknown: the default stood, without a word, where 100 rows of a cell were all against it
    right = np.arange(kinds) % CONFIGS
    chosen, confidence = answers(learned(repeats(np.eye(CONFIGS)[right], 100, log), kinds), kinds)
    assert chosen == right.tolist()
    assert (confidence[right != DEFAULT] > 0.99).all()


@pytest.mark.parametrize("log", LOGS)
def test_a_config_that_is_better_by_as_much_everywhere_is_chosen(log):
    # its level was predicted without an error, which was taken for no knowledge, and so no choice was sure to pay
    worth_KC = np.tile([0.2, 0.2, 0.3], (12, 1))
    chosen, confidence = answers(learned(repeats(worth_KC, 30, log), 12), 12)
    assert chosen == [2] * 12 and (confidence > 0.99).all()


@pytest.mark.parametrize("full", [False, True])
def test_queries_need_not_repeat(full):
    x_QD = np.random.default_rng(0).normal(size=(300, 8))
    query_N = np.repeat(np.arange(300), CONFIGS if full else 1)
    config_N = np.arange(len(query_N)) % CONFIGS
    worth_QC = np.tile([0.0, 0.0, 1.0], (300, 1))
    bank = learned(logged(worth_QC, x_QD, config_N, query_N, not full), 8)
    found = bank.bank().optimized_params_batch(x_QD.astype(np.float32))
    assert (found["ef_search"] == 3).all() and (found["confidence"] > 0.99).all()


@pytest.mark.parametrize("log", LOGS)
@pytest.mark.parametrize("constant", [DEFAULT, 2])
def test_one_config_that_never_varies_among_others_that_do(log, constant):
    trajectories = repeats(np.tile([0.4, 0.4, 0.6], (12, 1)), 30, log)
    noise_N = 0.1 * np.random.default_rng(1).normal(size=len(trajectories))
    noise_N[trajectories.config_id == trajectories.configs.ef_search.tolist().index(constant + 1)] = 0.0
    trajectories.precision[:] += noise_N
    trajectories.recall[:] += noise_N
    chosen, confidence = answers(learned(trajectories, 12), 12)
    assert chosen == [2] * 12 and (confidence > 0.95).all()


def test_what_answers_as_the_default_does_is_not_taken_for_it():
    # the last bits of its gain were those of a better one
    worth_KC = np.where(np.arange(12)[:, None] % 3 == 0, [0.0, 0.0, 1.0], [1.0, 1.0, 0.0])
    chosen, _ = answers(learned(repeats(worth_KC, 40, "every config"), 12), 12)
    assert chosen == [2, 1, 1] * 4


@pytest.mark.parametrize("effect", [0.0, 0.1])
def test_few_queries_often_repeated_are_not_as_many_pairs_as_rows(effect):
    # each row was compared with the last one of the default's, whose noise they shared: a bank acted in 2 of 3 worlds
    acted = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        worth_QC = np.repeat(0.5 + 0.2 * rng.normal(size=(12, 1)), CONFIGS, 1) + np.array([0.0, 0.0, effect])
        query_N = np.repeat(np.arange(12), 10 * CONFIGS)
        trajectories = logged(worth_QC, rng.normal(size=(12, 8)), np.arange(360) % CONFIGS, query_N, False)
        noise_N = 0.1 * rng.normal(size=360)
        trajectories.precision[:] += noise_N
        trajectories.recall[:] += noise_N
        found = learned(trajectories, 3, seed=seed).bank().optimized_params_batch(trajectories.x_QD)
        acted.append((found["ef_search"] != DEFAULT + 1).any())
    assert np.mean(acted) <= 0.1 if effect == 0.0 else np.mean(acted) >= 0.3


@pytest.mark.parametrize(
    ("worth", "rows", "method", "reason"),
    [
        ([0.7, 0.7, 0.7], 40, "eb", "no pattern has two configs with different utilities"),
        ([0.1, 0.1, 0.9], 1, "eb", "no pattern ran a config twice, so the scatter of outcomes is unknown"),
        ([0.1, 0.9, 0.1], 3, "eb", "in no pattern is a config better by judge.margin with a probability of 0.8"),
        ([0.1, 0.9, 0.1], 40, "eb", "no choice of configs was shown to beat the default on unseen queries"),
        ([0.1, 0.1, 0.9], 40, "welch", "judge.method=welch has no test: in no pattern have the default and another"),
    ],
)
def test_where_the_default_stands_everywhere_the_log_says_why(worth, rows, method, reason, caplog):
    with caplog.at_level(logging.WARNING, "rb_gpu"):
        bank = learned(repeats(np.tile(worth, (3, 1)), rows, "one config"), 3, method)
    assert answers(bank, 3)[0] == [DEFAULT] * 3
    assert bank.data.facts["why_default_stands"].startswith(reason)
    assert [f"stands everywhere: {reason}" in message for message in caplog.messages].count(True) == 1


def test_a_default_that_never_ran_is_named_as_the_reason():
    trajectories = repeats(np.tile([0.1, 0.5, 0.9], (3, 1)), 40, "one config")
    ran = trajectories.config_id != trajectories.configs.default
    trajectories = trajectories.select_queries(ran)
    bank = learned(trajectories, 3)
    assert bank.data.facts["why_default_stands"] == "it never ran, so nothing can be compared with it"
