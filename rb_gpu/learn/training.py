"""The job around learning: load, learn, evaluate on the newest queries, publish, and promote if the gate allows it.

Suffixes: Q queries, D dims.
"""

from __future__ import annotations

import logging
import platform
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rb_gpu.artifact import INDEX_FILE, REPORT_FILE, ROUTER_FILE
from rb_gpu.bank import ReasoningBank
from rb_gpu.bank_data import BankData
from rb_gpu.errors import ArtifactError
from rb_gpu.learn.checkpoint import Checkpoint
from rb_gpu.learn.clustering import cluster_queries
from rb_gpu.learn.config import TrainConfig
from rb_gpu.learn.default import is_experiment
from rb_gpu.learn.devices import reproducible, resolve_device
from rb_gpu.learn.distances import normalise_
from rb_gpu.learn.distributed import Ranks, launched
from rb_gpu.learn.drift import measure_drift, measure_embeddings
from rb_gpu.learn.gate import Decision, champion_beside, decide
from rb_gpu.learn.lake import pinned
from rb_gpu.learn.lessons import routed
from rb_gpu.learn.parent import find_parent, free_pattern_id
from rb_gpu.learn.pipeline import LearnedBank, choices_beside, learn, rows_read
from rb_gpu.learn.policy import Evaluation, best_single, improvement_percent, value_bank
from rb_gpu.learn.progress import Watch
from rb_gpu.learn.projection import project
from rb_gpu.learn.report import render_report
from rb_gpu.learn.room import Room
from rb_gpu.learn.stages import Stages, files_read
from rb_gpu.learn.timing import told_by_time
from rb_gpu.learn.trajectories import Trajectories, load, split_by_time
from rb_gpu.learn.valuation import held_out_outcomes
from rb_gpu.publish import without_nan, write_artifact
from rb_gpu.registry import Registry

log = logging.getLogger(__name__)

# in the registry's folder, where the registry's lock keeps other jobs away from it
CHECKPOINT_FILE = "kmeans.checkpoint"


@dataclass(frozen=True)
class Published:
    """The result of `train`: the artifact's folder, its manifest, the policy table and the gate's decision."""

    folder: Path
    manifest: dict[str, Any]
    evaluation: Evaluation
    decision: Decision


@dataclass(frozen=True)
class Candidate:
    """A learned bank with its evaluation on the held-out queries, before anything is written."""

    learned: LearnedBank
    bank: ReasoningBank
    training: Trajectories
    held_out: Trajectories
    evaluation: Evaluation
    decision: Decision
    parent: BankData | None


def train(
    config: TrainConfig, quarantine: Path | None = None, stages: Stages | None = None, promote: bool = True
) -> Published | None:
    """Loads, learns, evaluates, publishes, and promotes if the gate allows it. Raises RbGpuError.

    Under torchrun every rank clusters its share of the queries; rank 0 does the rest, and the others return None.
    stages: a sweep's cache of stage results. promote: if false, the choice is left to a person.
    """
    with launched(resolve_device(config.device.kind)) as ranks, reproducible(config.device.deterministic):
        config = replace(config, data=pinned(config.data, ranks))
        if ranks.rank == 0:
            registry, watch = Registry.open(**asdict(config.registry)), Watch()
            with registry.locked():
                candidate = _candidate(config, registry, quarantine, ranks, stages or Stages(), watch)
                return _publish(candidate, config, registry, watch, promote)
        room = _room(config, ranks)
        training, _ = split_by_time(load(config.data, config.params, room=room), config.eval.holdout)
        cluster_queries(_normalised(training, config, room.ranks), config, _checkpoint(config), ranks)
        return None


def measure(config: TrainConfig, quarantine: Path | None, stages: Stages, watch: Watch) -> Candidate:
    """What a job with these settings would publish, and what the gate would decide. Raises RbGpuError.

    Nothing is written to the registry, which stays open to other jobs, and results that only the report shows are not
    computed.
    """
    registry = Registry.open(**asdict(config.registry))
    data, cluster = pinned(config.data, Ranks()), replace(config.cluster, checkpoint_every=0)
    alone = replace(config, data=data, cluster=cluster)
    return _candidate(alone, registry, quarantine, Ranks(), stages, watch, brief=True)


def _room(config: TrainConfig, ranks: Ranks) -> Room:
    """device.memory_budget limits GPU memory where there is a GPU; host memory then has the default limit of Room."""
    host = resolve_device(config.device.kind).type == "cpu"
    return Room(config.device.memory_budget if host else None, config.device.scratch, ranks.of_node())


def _normalised(training: Trajectories, config: TrainConfig, node: Ranks) -> Trajectories:
    """Normalises in place for cosine: these rows belong to the job, and only their directions are used from here on.

    node: the processes that share the rows.
    """
    if config.cluster.metric == "cosine":
        normalise_(torch.from_numpy(training.x_QD[node.share(len(training.x_QD))]))
        node.wait()
    return training


def _checkpoint(config: TrainConfig) -> Checkpoint | None:
    every = config.cluster.checkpoint_every
    return Checkpoint(Path(config.registry.path) / CHECKPOINT_FILE, every) if every else None


def _loaded(config: TrainConfig, quarantine: Path | None, ranks: Ranks) -> tuple[Trajectories, Trajectories]:
    """The training rows, normalised where the metric is cosine, and the held-out rows."""
    room = _room(config, ranks)
    everything = load(config.data, config.params, quarantine, room)
    training, held_out = split_by_time(everything, config.eval.holdout)
    log.info("%d rows, %d queries, %d configs, dim %d; newest %d queries held out", len(everything),
             len(everything.query_id), len(everything.configs), everything.x_QD.shape[1],
             len(held_out.query_id))  # fmt: skip
    return _normalised(training, config, room.ranks), held_out


def _candidate(
    config: TrainConfig, registry: Registry, quarantine: Path | None, ranks: Ranks, stages: Stages, watch: Watch,
    brief: bool = False,
) -> Candidate:  # fmt: skip
    """brief: skip what neither the gate nor the policy table needs."""
    with watch.stage("load"):
        files = files_read(config.data) if stages.sharing else []
        read = [files, asdict(config.data), asdict(config.params), config.eval.holdout, config.cluster.metric]
        training, held_out = stages.of("load", read, lambda: _loaded(config, quarantine, ranks))
        parent = find_parent(registry, config, training.x_QD.shape[1])
    first_id = free_pattern_id(registry)
    learned = learn(training, config, _checkpoint(config), ranks, parent, first_id, stages, watch)
    with watch.stage("evaluate"):
        bank = learned.bank()
        # learning may have settled on another default than the table's, if none was given
        held_out = replace(held_out, configs=replace(held_out.configs, default=bank.data.default))
        champion, refusals = champion_beside(registry, bank)
        single = best_single(bank.data.evidence, bank.data.objective)
        others = choices_beside(config.eval.baseline_names, training, held_out.x_QD, bank.data.objective, config)
        if learned.router is not None:
            others |= routed(learned.router, bank, held_out, config.router.steps)
        # cached with the predictions of an outcome model, which cost more than all else in this stage
        rows = stages.of(
            "outcomes",
            [*read, bank.data.default, asdict(bank.data.objective)],
            lambda: held_out_outcomes(held_out, bank.data.objective),
        )
        evaluation = value_bank(bank, held_out, single, config.eval, config.seed, champion, others, brief, rows)
        timed = stages.of("timing", [*read, config.seed], lambda: told_by_time(training, config.seed))
        evaluation = replace(evaluation, warnings=[*evaluation.warnings, *timed])
        for warning in evaluation.warnings:
            log.warning("%s", warning)
        drift = stages.of(
            "drift",
            [rows_read(training, config), config.seed],
            lambda: measure_embeddings(training, held_out, config.seed),
        )
        experiment = is_experiment(training, bank.data.objective)
        decision = decide(evaluation, config.gate, drift, refusals, experiment)
    return Candidate(learned, bank, training, held_out, evaluation, decision, parent)


def _publish(candidate: Candidate, config: TrainConfig, registry: Registry, watch: Watch, promote: bool) -> Published:
    learned, evaluation, decision = candidate.learned, candidate.evaluation, candidate.decision
    with watch.stage("report"):
        objective = candidate.bank.data.objective
        drift = measure_drift(
            candidate.training, candidate.held_out, learned.label_Q, objective, config.seed,
            decays=config.judge.half_life is not None,
        )  # fmt: skip
        for warning in drift.warnings:
            log.warning("drift: %s", warning)
        arrays, leaves = learned.data.arrays, learned.data.leaves
        projection = project(
            candidate.training.x_QD, learned.label_Q, arrays["centroids"][:leaves], arrays["support"][:leaves],
            config.seed, resolve_device(config.device.kind),
        )  # fmt: skip
    facts = {
        **learned.data.facts,
        "evaluation": {**asdict(evaluation), "improvement_percent": improvement_percent(evaluation)},
        "gate": asdict(decision),
        "drift": asdict(drift),
        "parent": None if candidate.parent is None else candidate.parent.facts["version"],
        "seconds": watch.seconds,
        "memory_mb": watch.memory_mb,
        "packages": package_versions(),
    }
    data = replace(learned.data, facts=without_nan(facts))
    folder = registry.path / registry.new_version()
    promoted = promote and decision.promote
    files = {REPORT_FILE: render_report(candidate.bank, data.facts, folder.name, promoted, projection).encode()}
    if learned.index is not None:
        files[INDEX_FILE] = learned.index
    if learned.router is not None:
        files[ROUTER_FILE] = learned.router.to_bytes()
    try:
        manifest = write_artifact(folder, data, files, registry.hmac_key)
    except OSError as error:
        raise ArtifactError(
            f"registry.path={registry.path} cannot be written ({error.strerror}); free space or choose another"
        ) from error
    if promoted:
        registry.promote(folder.name, decision.reason)
    registry.retain()
    return Published(folder, manifest, evaluation, decision)


def package_versions() -> dict[str, str]:
    """The versions of Python and of the packages that determine a result."""
    names = ("rb_gpu", "torch", "numpy", "scipy", "pyarrow", "safetensors", "hydra-core")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
