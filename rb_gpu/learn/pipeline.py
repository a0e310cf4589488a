"""The learning pipeline: the only file that knows the order of the stages; training.py is the job around it.

Suffixes: Q queries, N rows, K clusters, P leaves, D dims.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rb_gpu.bank import ReasoningBank
from rb_gpu.bank_data import BankData
from rb_gpu.errors import ConfigError
from rb_gpu.learn.abstention import out_of_reach, why_default_stands
from rb_gpu.learn.assemble import assemble, confidence_of
from rb_gpu.learn.baselines import LEARNERS, Training, unit
from rb_gpu.learn.checkpoint import Checkpoint
from rb_gpu.learn.checks import is_auto
from rb_gpu.learn.clustering import cluster_queries, drop_labels
from rb_gpu.learn.config import IndexConfig, RouterConfig, TrainConfig
from rb_gpu.learn.decay import auto_half_life
from rb_gpu.learn.default import is_experiment, settle_default
from rb_gpu.learn.devices import full_precision, reproducible, resolve_device
from rb_gpu.learn.distributed import Ranks
from rb_gpu.learn.evidence import row_weights
from rb_gpu.learn.hierarchy import prune
from rb_gpu.learn.index import build_index, open_faiss, similarity_floor
from rb_gpu.learn.leaves import LeafMaking, believed
from rb_gpu.learn.lessons import gather_lessons
from rb_gpu.learn.lineage import differences, inherit, parent_leaves
from rb_gpu.learn.past import gather_past, tell, with_past, with_ratings
from rb_gpu.learn.progress import Watch
from rb_gpu.learn.recorded import from_trajectories
from rb_gpu.learn.router import Lessons, train_router
from rb_gpu.learn.stages import Stages, digest
from rb_gpu.learn.trajectories import Trajectories
from rb_gpu.learn.tuning import tune_lookup
from rb_gpu.learn.valuation import Choice
from rb_gpu.learn.verdicts import chosen_p, judge, resolve_objective, verdict_matrices
from rb_gpu.objective import Objective
from rb_gpu.params import ConfigTable
from rb_gpu.router import FastGRNNRouter
from rb_gpu.types import QueryTrajectory

log = logging.getLogger(__name__)

# cluster settings that affect only memory and checkpoints, not a bit of the result: stage keys ignore them
HOW: dict[str, Any] = {"memory": "auto", "memory_budget": None, "checkpoint_every": 0}


@dataclass(frozen=True)
class LearnedBank:
    """What `learn` returns. label_Q: leaf of each training query. seconds: wall time of each stage."""

    data: BankData
    index: bytes | None
    router: FastGRNNRouter | None
    label_Q: npt.NDArray[np.int64]
    seconds: dict[str, float]

    def bank(self) -> ReasoningBank:
        """A bank that is ready to answer queries."""
        return ReasoningBank(self.data, self.index)


def learn(
    trajectories: Trajectories | Sequence[QueryTrajectory],
    config: TrainConfig,
    checkpoint: Checkpoint | None = None,
    ranks: Ranks | None = None,
    parent: BankData | None = None,
    first_id: int = 0,
    stages: Stages | None = None,
    watch: Watch | None = None,
) -> LearnedBank:
    """Runs the whole job without input or output: cluster, consolidate, sum, judge, build hierarchy and index.

    It is a pure function: the same trajectories, config and device give the same bits. trajectories: a table, as
    `trajectories.load` reads it, or a list of QueryTrajectory. ranks: processes that call `cluster_queries` on the same
    trajectories and share its work. parent: a bank of the same metric, dim and embedder
    to continue from: its centroids seed the clustering, its patterns keep their ids, and its evidence from older rows
    is added (lineage.py, past.py). first_id: the least id for a new pattern. stages: a cache of stage results that the
    members of a sweep share. watch: records seconds and memory per stage. Raises DataError, ConfigError.
    """
    if not isinstance(trajectories, Trajectories):
        trajectories = from_trajectories(trajectories, config.params)
    if parent is not None:
        unlike = differences(parent, config.cluster.metric, trajectories.x_QD.shape[1], config.data.embedder)
        if unlike:
            raise ConfigError(f"parent: its {', its '.join(unlike)}; give a bank that fits these trajectories")
    with full_precision(), reproducible(config.device.deterministic):
        found = (ranks or Ranks(), stages or Stages(), watch or Watch())
        return _learned(trajectories, config, checkpoint, parent, first_id, *found)


def _learned(
    trajectories: Trajectories, config: TrainConfig, checkpoint: Checkpoint | None, parent: BankData | None,
    first_id: int, ranks: Ranks, stages: Stages, watch: Watch,
) -> LearnedBank:  # fmt: skip
    device = resolve_device(config.device.kind)
    open_faiss(config.index, device)
    rows = rows_read(trajectories, config)
    with watch.stage("cluster"):
        version = None if parent is None else parent.facts.get("version")
        half_life, engine = config.judge.half_life, config.cluster.engine
        x_QD, weight_Q, label_Q = stages.of(
            "cluster",
            [rows, version, half_life, config.prune.min_support, config.seed, asdict(replace(config.cluster, **HOW))],
            lambda: cluster_queries(trajectories, config, checkpoint, ranks, parent),
        )
        before_Q = stages.of("parent", [rows, version], lambda: parent_leaves(parent, x_QD, device, engine))
    with watch.stage("judge"):
        judging, decay = config.judge, None
        if is_auto(judging.half_life):
            decay = auto_half_life(trajectories, label_Q, judging, config.quality, device)
            judging = replace(judging, half_life=decay.half_life_days)
        weight_N = row_weights(trajectories, judging.half_life)
        read = [rows, half_life, judging.half_life, asdict(config.hierarchy)]
        making = LeafMaking(x_QD, weight_Q, weight_N, config, device, stages, read)
        leaves = making.gathered(label_Q, trajectories)
        objective = resolve_objective(judging, config.quality, trajectories, leaves.evidence)
        leaves = making.with_field(leaves, trajectories, objective)
        unused, held_back = is_experiment(trajectories, objective), leaves.field is not None and not leaves.pays
        if unused and not held_back:
            log.warning("params.default=auto: no config was logged twice as often as any other, so gains are over the "
                        "most logged one (of several, the cheapest): %s; set params.default to what runs today",
                        trajectories.configs.describe(trajectories.configs.default))  # fmt: skip
        if unused and held_back:
            trajectories = settle_default(trajectories, leaves.evidence, objective)
            leaves = making.gathered(label_Q, trajectories)
            objective = resolve_objective(judging, config.quality, trajectories, leaves.evidence)
            leaves = making.with_field(leaves, trajectories, objective, in_use=False)
        default = trajectories.configs.default
        past = gather_past(parent, before_Q, trajectories, leaves.evidence, judging.half_life)
        leaves = with_past(leaves, past)
        judging = replace(judging, min_probability=leaves.least_probability(judging))
        beliefs = believed(leaves, objective, default, config)
        verdicts = judge(leaves.evidence, trajectories.configs, objective, beliefs, judging)
        confidence_P = confidence_of(verdict_matrices(verdicts, beliefs, judging.method)[1], default)
        kept_P = prune(leaves.evidence.rows.sum(1), confidence_P, 1, config.prune.min_confidence)
        if not kept_P.all():
            if not kept_P.any():
                raise ConfigError(
                    f"prune.min_confidence={config.prune.min_confidence:g} removes all {len(kept_P)} patterns "
                    f"(the highest confidence is {confidence_P.max():.3f}); lower it"
                )
            gone_p = chosen_p(leaves.evidence, trajectories.configs, objective, judging, verdicts.config_id)[~kept_P]
            pays, leaves = leaves.pays, making.gathered(drop_labels(leaves.label_Q, kept_P), trajectories)
            leaves = with_past(making.with_field(leaves, trajectories, objective, pays), past)
            beliefs = believed(leaves, objective, default, config)
            # the multiplicity correction counts every test, including those of the pruned patterns
            verdicts = (
                judge(leaves.evidence, trajectories.configs, objective, beliefs, judging, gone_p)
                if judging.method == "eb"
                else verdicts.of(kept_P)
            )
        abstains = bool(verdicts.stands.all())
        why = why_default_stands(leaves, beliefs, objective, default, judging) if abstains else None
        unmet = out_of_reach(beliefs, objective, judging)
        tuned = tune_lookup(making, leaves, trajectories, objective, judging)
    with watch.stage("index"):
        data = assemble(trajectories, config, leaves, objective, beliefs, verdicts, 0.0)
        data = with_ratings(data, past, leaves.label_Q)
        data = inherit(data, leaves.label_Q, parent, before_Q, first_id, tell(past, leaves))
        leaves_PD = data.arrays["centroids"][: data.leaves]
        index, floor = stages.of(
            "index",
            [rows, digest(leaves_PD), asdict(config.index), config.lookup.floor, tuned.top_k],
            lambda: _searched(x_QD, leaves_PD, trajectories, config, tuned.top_k, device),
        )
        data = replace(data, lookup=replace(data.lookup, top_k=tuned.top_k, beta=tuned.beta, floor=floor))
    router, routing = None, None
    if config.router.kind == "fastgrnn":
        with watch.stage("router"):
            lessons = gather_lessons(x_QD, trajectories, data, weight_N, config, device)
            router, routing = _routed(lessons, trajectories.configs, config, device)
    issued = int((~verdicts.stands).sum())
    facts = _facts(data, trajectories, config, issued) | {
        "why_default_stands": why,
        "lookup_tuning": asdict(tuned),
        "half_life": None if decay is None else asdict(decay),
        "router": routing,
        "device": str(device),
    }
    if why is not None:
        log.warning("%s stands everywhere: %s", trajectories.configs.describe(default), why)
    if unmet is not None:
        log.warning(unmet)
    log.info(
        "%d patterns, %d verdicts, the default stands on %d (default: %s)",
        data.leaves, issued, data.leaves - issued, trajectories.configs.describe(default),
    )  # fmt: skip
    return LearnedBank(replace(data, facts=data.facts | facts), index, router, leaves.label_Q, watch.seconds)


def _routed(
    lessons: Lessons, configs: ConfigTable, config: TrainConfig, device: torch.device
) -> tuple[FastGRNNRouter, dict[str, Any]]:
    """The router as a service will load it, and the record of its training."""
    drawn = torch.Generator(device=device).manual_seed(config.seed)
    taught = train_router(lessons, configs, config.router, drawn, device)
    log.info("router: best of %d epochs is %d, validation loss %.4f", len(taught.valid_loss), taught.best_epoch,
             taught.valid_loss[taught.best_epoch])  # fmt: skip
    told = {name: getattr(taught, name) for name in ("train_loss", "valid_loss", "best_epoch", "calibrated_on")}
    return FastGRNNRouter.from_bytes(taught.router.to_bytes(config.router.int8)), told


def _facts(data: BankData, trajectories: Trajectories, config: TrainConfig, issued: int) -> dict[str, Any]:
    """Manifest facts about rows, settings and result. issued: patterns whose verdict is not the default."""
    return {
        "index": {"kind": config.index.kind},
        "counts": {
            "trajectories": len(trajectories),
            "queries": len(trajectories.query_id),
            "configs": len(trajectories.configs),
            "patterns": data.leaves,
            "verdicts": issued,
            "default_stands": data.leaves - issued,
            "levels": np.bincount(data.arrays["level"]).tolist(),
        },
        "data": {
            **asdict(trajectories.source),
            "oldest_timestamp": int(trajectories.timestamp.min()),
            "newest_timestamp": int(trajectories.timestamp.max()),
        },
        "config": asdict(config),
    }


def _searched(
    x_QD: torch.Tensor, leaves_PD: npt.NDArray[np.float32], trajectories: Trajectories, config: TrainConfig, top_k: int,
    device: torch.device,
) -> tuple[bytes | None, float]:  # fmt: skip
    """The serialized index of the leaves (None if index.kind is off), and the lookup's similarity floor."""
    asked = config.lookup.floor
    floor = similarity_floor(x_QD, leaves_PD, device, config.cluster.engine) if is_auto(asked) else float(asked)
    return build_index(leaves_PD, config.index, trajectories.x_QD, top_k, device), floor


def rows_read(trajectories: Trajectories, config: TrainConfig) -> list[Any]:
    """Identifies the training rows in stage keys: the table's fingerprint, how many queries of it, and the metric."""
    newest = int(trajectories.query_time.max())
    return [trajectories.source.fingerprint, len(trajectories.query_id), newest, config.cluster.metric]


def choices_beside(
    names: Sequence[str], training: Trajectories, x_BD: npt.NDArray[np.float32], objective: Objective,
    config: TrainConfig,
) -> dict[str, Choice]:  # fmt: skip
    """What each named baseline of config.BASELINE_NAMES chooses for queries (B, D), as training config ids."""
    found: dict[str, Choice] = {}
    if not names:
        return found
    table, unit_BD = Training.of(training, objective), unit(x_BD)
    for name in names:
        log.info("baseline: %s", name)
        if name in LEARNERS:
            predict = LEARNERS[name](table, np.random.default_rng(config.seed))
            found[name] = predict(table, unit_BD).argmax(1).astype(np.int64)
        else:
            judging = replace(config.judge, method="reference")
            own = replace(config, judge=judging, index=IndexConfig(kind="off"), router=RouterConfig())
            found[name] = learn(training, own).bank().optimized_params_batch(x_BD)["config_id"]
    return found
