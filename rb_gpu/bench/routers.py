"""The suite router: the router, the bank, and both combined, compared with models of similar size on held-out queries.

Suffixes: Q queries, N rows, B queries to answer, C configs.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.bench.decisions import Floats, Run, Setting, case_of, draw, quietly, settings_of
from rb_gpu.bench.runner import each_call_us
from rb_gpu.bench.sets import fold_of, outcomes_of
from rb_gpu.learn.baselines import Training
from rb_gpu.learn.config import JudgeConfig, RouterConfig, TrainConfig
from rb_gpu.learn.lessons import routed
from rb_gpu.learn.pipeline import choices_beside, learn
from rb_gpu.learn.policy import SINGLE
from rb_gpu.learn.stages import Stages
from rb_gpu.learn.trajectories import Trajectories
from rb_gpu.learn.valuation import held_out_outcomes
from rb_gpu.learn.verdicts import resolve_objective
from rb_gpu.objective import Objective

log = logging.getLogger(__name__)

ROUTERS = {
    "router": RouterConfig(kind="fastgrnn"),
    "thin router": RouterConfig(kind="fastgrnn", sparsity=0.9, int8=True),
    "router of the log": RouterConfig(kind="fastgrnn", target="log"),
}
CALLS = 500


def perceptron(
    training: Trajectories, objective: Objective, x_BD: npt.NDArray[np.float32], seed: int
) -> npt.NDArray[np.int64]:
    """The config (B,) that scikit-learn's multi-layer perceptron, with as many hidden units as the router, picks.

    On a full table it learns the utilities of all configs from the embedding; on a log, the utility of one config from
    the embedding and the one-hot config.
    """
    from sklearn.neural_network import MLPRegressor

    rows, configs = held_out_outcomes(training, objective), len(training.configs)
    model = MLPRegressor(hidden_layer_sizes=(RouterConfig().hidden,), early_stopping=True, random_state=seed)
    if len(training) == configs * len(training.query_id):
        model.fit(training.x_QD, outcomes_of(training, objective).utility_QC)
        return np.asarray(model.predict(x_BD).argmax(1))
    one_hot = np.eye(configs, dtype=np.float32)
    model.fit(np.concatenate([training.x_QD[rows.query_row], one_hot[rows.config_id]], axis=1), rows.utility)
    asked = (np.concatenate([x_BD, np.tile(one_hot[c], (len(x_BD), 1))], axis=1) for c in range(configs))
    return np.asarray(np.stack([model.predict(one) for one in asked], axis=1).argmax(1))


def _one(
    training: Trajectories, held_out: Trajectories, cost_weight: float, seed: int
) -> tuple[dict[str, Floats], dict[str, tuple[int, float, float]]]:
    """For each method, the utility (B,) of its choice on every held-out query; for each router its size in bytes, the
    seconds of its training and the median microseconds of a forward pass.
    """
    config = TrainConfig(seed=seed, judge=JudgeConfig(latency_weight=0.0, cost_weight=cost_weight))
    config.index.kind = "off"
    queries = len(held_out.query_id)
    picked, costs = {}, {}
    stages = Stages(sharing=True)  # all routers learn from the same bank, which is trained once
    for name, asked in ROUTERS.items():
        learned = learn(training, replace(config, router=asked), stages=stages)
        bank, router = learned.bank(), learned.router
        if router is None:
            raise RuntimeError(f"no router was trained for {name}")
        routes = routed(router, bank, held_out, 1)
        picked[name], picked[f"{name} and bank"] = routes["router"], routes["router and bank"]
        pass_us = float(np.median(each_call_us(router.heads, list(held_out.x_QD[:CALLS]))))
        costs[name] = len(router.to_bytes(asked.int8)), learned.seconds["router"], pass_us
    objective = resolve_objective(config.judge, config.quality, training, bank.data.evidence)
    utility_BC = outcomes_of(held_out, objective).utility_QC
    single = int(Training.of(training, objective).means.argmax())
    picked |= {
        SINGLE: np.full(queries, single),
        **choices_beside(("nearest neighbours", "ridge per config"), training, held_out.x_QD, objective, config),
        "perceptron": perceptron(training, objective, held_out.x_QD, seed),
        "bank": bank.optimized_params_batch(held_out.x_QD)["config_id"],
        "default": np.full(queries, training.configs.default),
    }
    # a blend of parameters that was never tried has no known value; value the router's own choice instead
    for name in ROUTERS:
        blend = picked[f"{name} and bank"]
        picked[f"{name} and bank"] = np.where(blend < 0, picked[name], blend)
    worth = {name: utility_BC[np.arange(queries), choice] for name, choice in picked.items()}
    return worth | {"oracle": utility_BC.max(1)}, costs


def _run(setting: Setting, seed: int) -> tuple[Run, dict[str, tuple[int, float, float]]]:
    training, held_out = fold_of(setting.folder, setting.name, seed)
    drawn = draw(training, setting.log, setting.size, np.random.default_rng(seed))
    worth, costs = _one(drawn, held_out, setting.cost_weight, seed)
    return Run(len(drawn.query_id), held_out.query_id, worth), costs


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Gains over the best single config for every data set, cost weight, log policy and size, as means over seeds with
    95 % bootstrap intervals over held-out queries; and each router's size, training time and latency.
    """
    seeds = range(settings["rounds"])
    asked = settings_of(settings)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), quietly) as pool:
        runs = [[pool.submit(_run, setting, seed) for seed in seeds] for setting in asked]
        cases, costs = [], []
        for setting, futures in zip(asked, runs, strict=True):
            found = [future.result() for future in futures]
            cases.append(case_of(setting, [run for run, _ in found]))
            costs += [cost for _, cost in found]
            log.info("%s", cases[-1])
    names = ("bytes", "train_s", "pass_us")
    routers = {
        router: dict(zip(names, np.median([cost[router] for cost in costs], axis=0).tolist(), strict=True))
        for router in ROUTERS
    }
    return {"suite": "router", "settings": settings, "cases": cases, "routers": routers}
