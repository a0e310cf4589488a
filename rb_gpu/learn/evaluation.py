"""What a published artifact is worth on a table that it did not see, beside baselines that learn from its own table."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf

from rb_gpu.bank import ReasoningBank
from rb_gpu.errors import DataError
from rb_gpu.evidence import OUTCOMES
from rb_gpu.learn.config import DataConfig, ParamsConfig, TrainConfig
from rb_gpu.learn.job_config import EvaluateConfig, to_object
from rb_gpu.learn.pipeline import choices_beside
from rb_gpu.learn.policy import Evaluation, best_single, value_bank
from rb_gpu.learn.timing import told_by_time
from rb_gpu.learn.trajectories import Trajectories, load
from rb_gpu.params import AUTO_TIER, PARAMETERS

log = logging.getLogger(__name__)

# how many configs a warning names
NAMED = 3


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
    check_cost(bank, table, config.artifact)
    for warning in doubts(bank, table):
        log.warning("data.path=%s: %s", table.source.path, warning)
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
    for warning in [*evaluation.warnings, *told_by_time(table, config.seed)]:
        log.warning("%s", warning)
    return evaluation


def check_cost(bank: ReasoningBank, table: Trajectories, artifact: str) -> None:
    """Raises DataError if the artifact's utility includes a cost that the table lacks."""
    objective, cost = bank.data.objective, bank.data.evidence.mean[..., OUTCOMES.index("cost")]
    if table.cost is None and objective.kind == "utility" and objective.cost_weight > 0 and (cost > 0).any():
        raise DataError(
            f"data.path={table.source.path} has no column cost, which the utility of artifact={artifact} subtracts by "
            f"judge.cost_weight={objective.cost_weight:g}; log it, or evaluate one trained with judge.cost_weight=0"
        )


def doubts(bank: ReasoningBank, table: Trajectories) -> list[str]:
    """Warnings about what in the table does not fit the artifact."""
    said = []
    newest = (bank.data.facts.get("data") or {}).get("newest_timestamp")
    old = 0 if newest is None else int((table.query_time <= newest).sum())
    if old:
        said.append(
            f"{old:,} of {len(table.query_id):,} queries are no newer than the artifact's newest training query; if "
            "they are the same queries, the values are too optimistic; give newer rows"
        )
    missing = [bank.configs.describe(i) for i, params in enumerate(bank.configs) if table.configs.id_of(params) is None]
    if missing:
        named = ", ".join(missing[:NAMED]) + (f" and {len(missing) - NAMED} more" if len(missing) > NAMED else "")
        values = {name: [{getattr(one, name) for one in side.configs} for side in (table, bank)] for name in PARAMETERS}
        alike = [f"all rows have {name}={next(iter(here))}" for name, (here, learned) in values.items()
                 if len(here) == 1 < len(learned)]  # fmt: skip
        told = "".join(f"; {one}: is that column missing?" for one in alike)
        said.append(f"no row tried {named}, so a policy that picks one of these has no value{told}")
    return said
