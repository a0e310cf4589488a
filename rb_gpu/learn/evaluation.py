"""What a published artifact is worth on a table that it did not see, beside what else learns from its own table."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf

from rb_gpu.bank import ReasoningBank
from rb_gpu.errors import DataError
from rb_gpu.learn.config import DataConfig, ParamsConfig, TrainConfig
from rb_gpu.learn.job_config import EvaluateConfig, to_object
from rb_gpu.learn.pipeline import choices_beside
from rb_gpu.learn.policy import Evaluation, best_single, value_bank
from rb_gpu.learn.trajectories import Trajectories, load
from rb_gpu.params import AUTO_TIER

log = logging.getLogger(__name__)


def evaluate_artifact(config: EvaluateConfig, quarantine: Path | None = None) -> Evaluation:
    """The policy table of a published artifact on a table that it did not see. Raises ArtifactError, DataError."""
    bank = ReasoningBank.load(config.artifact)
    data = bank.data
    params = ParamsConfig(**data.facts["config"]["params"])
    if params.tiers == "auto" and data.tiers != (AUTO_TIER,):
        params.tiers = list(data.tiers)
    params.default = bank.default.as_dict()

    def read(given: DataConfig, key: str, quarantine: Path | None) -> Trajectories:
        table = load(given, params, quarantine)
        if table.x_QD.shape[1] != data.dim:
            raise DataError(
                f"{key}={table.source.path} has {table.x_QD.shape[1]} dimensions, artifact={config.artifact} has "
                f"{data.dim}; embed the queries with {data.embedder}"
            )
        return table

    table = read(config.data, "data.path", quarantine)
    others = None
    if config.eval.baseline_names:
        training = read(config.training, "training.path", None)
        learning = to_object(DictConfig(OmegaConf.merge(OmegaConf.structured(TrainConfig), data.facts["config"])))
        picked = choices_beside(config.eval.baseline_names, training, table.x_QD, data.objective, learning)
        ids = [table.configs.id_of(one) for one in training.configs]
        known = np.array([-1 if one is None else one for one in ids])
        others = {name: known[choice] for name, choice in picked.items()}
    best = data.configs[best_single(data.evidence, data.objective)]
    single = table.configs.id_of(best)
    evaluation = value_bank(bank, table, -1 if single is None else single, config.eval, config.seed, None, others)
    for warning in evaluation.warnings:
        log.warning("%s", warning)
    return evaluation
