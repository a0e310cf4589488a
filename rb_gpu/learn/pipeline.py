"""The job: the only file that knows the order of the stages.

Suffixes: Q queries, N rows, K clusters, P leaves, D dims.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rb_gpu.artifact import INDEX_FILE, REPORT_FILE, ROUTER_FILE
from rb_gpu.bank import ReasoningBank
from rb_gpu.bank_data import BankData
from rb_gpu.errors import ArtifactError, ConfigError
from rb_gpu.learn.assemble import assemble, best_probability
from rb_gpu.learn.baselines import BASELINES, Training, unit
from rb_gpu.learn.checkpoint import Checkpoint
from rb_gpu.learn.checks import is_auto
from rb_gpu.learn.clustering import cluster_queries, drop_labels
from rb_gpu.learn.config import IndexConfig, RouterConfig, TrainConfig
from rb_gpu.learn.decay import auto_half_life
from rb_gpu.learn.default import settle_default
from rb_gpu.learn.devices import full_precision, reproducible, resolve_device
from rb_gpu.learn.distances import normalise_
from rb_gpu.learn.distributed import Ranks, launched
from rb_gpu.learn.drift import measure_drift
from rb_gpu.learn.evidence import row_weights
from rb_gpu.learn.gate import Decision, champion_beside, decide
from rb_gpu.learn.hierarchy import prune
from rb_gpu.learn.index import build_index, similarity_floor
from rb_gpu.learn.leaves import believed, foretold, gather_leaves
from rb_gpu.learn.lessons import gather_lessons, routed
from rb_gpu.learn.lineage import differences, inherit, parent_leaves
from rb_gpu.learn.parent import find_parent, free_pattern_id
from rb_gpu.learn.past import gather_past, tell, with_past, with_ratings
from rb_gpu.learn.policy import Evaluation, best_single, improvement_percent, value_bank
from rb_gpu.learn.report import render_report
from rb_gpu.learn.room import Room
from rb_gpu.learn.router import train_router
from rb_gpu.learn.trajectories import Trajectories, load, split_by_time
from rb_gpu.learn.valuation import Choice
from rb_gpu.learn.verdicts import judge, resolve_objective
from rb_gpu.objective import Objective
from rb_gpu.publish import without_nan, write_artifact
from rb_gpu.registry import Registry
from rb_gpu.router import FastGRNNRouter

log = logging.getLogger(__name__)

# in the registry's folder: its lock keeps other jobs away from it
CHECKPOINT_FILE = "kmeans.checkpoint"


@dataclass(frozen=True)
class LearnedBank:
    """What `learn` returns. label_Q: leaf of each training query. seconds: wall time by stage."""

    data: BankData
    index: bytes | None
    router: FastGRNNRouter | None
    label_Q: npt.NDArray[np.int64]
    seconds: dict[str, float]

    def bank(self) -> ReasoningBank:
        """The bank, ready to answer."""
        return ReasoningBank(self.data, self.index)


@dataclass
class Stopwatch:
    """Wall seconds by stage, logged as each one ends."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times one stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        log.info("%-12s %8.2f s", name, self.seconds[name])


def learn(
    trajectories: Trajectories,
    config: TrainConfig,
    checkpoint: Checkpoint | None = None,
    ranks: Ranks | None = None,
    parent: BankData | None = None,
    first_id: int = 0,
) -> LearnedBank:
    """The whole job without input or output: cluster, consolidate, sum, judge, build levels and index.

    A pure function: same trajectories, config and device, same bits. ranks: processes that call `cluster_queries` on
    the same trajectories and share its work. parent: a bank of the same metric, dim and embedder to go on from: its
    centroids start the clustering, its patterns keep their ids, and what it knew of older rows is added (lineage.py,
    past.py). first_id: the least id for a new pattern. Raises DataError, ConfigError.
    """
    if parent is not None:
        unlike = differences(parent, config.cluster.metric, trajectories.x_QD.shape[1], config.data.embedder)
        if unlike:
            raise ConfigError(f"parent: its {', its '.join(unlike)}; give a bank that is like these trajectories")
    with full_precision(), reproducible(config.device.deterministic):
        return _learn(trajectories, config, checkpoint, ranks or Ranks(), parent, first_id)


def _learn(
    trajectories: Trajectories,
    config: TrainConfig,
    checkpoint: Checkpoint | None,
    ranks: Ranks,
    parent: BankData | None,
    first_id: int,
) -> LearnedBank:
    watch = Stopwatch()
    device = resolve_device(config.device.kind)
    with watch.stage("cluster"):
        x_QD, weight_Q, label_Q = cluster_queries(trajectories, config, checkpoint, ranks, parent)
        before_Q = parent_leaves(parent, x_QD, device, config.cluster.engine)
    with watch.stage("judge"):
        judging, half_life = config.judge, None
        if is_auto(judging.half_life):
            half_life = auto_half_life(trajectories, label_Q, judging, config.quality, device)
            judging = replace(judging, half_life=half_life.half_life_days)
        weight_N = row_weights(trajectories, judging.half_life)
        leaves = gather_leaves(x_QD, weight_Q, label_Q, trajectories, weight_N, config, device)
        objective = resolve_objective(judging, config.quality, trajectories, leaves.evidence)
        leaves = foretold(x_QD, leaves, trajectories, weight_N, objective, config, device)
        if leaves.field is not None and not leaves.pays:
            asked, trajectories = trajectories, settle_default(trajectories, leaves.evidence, objective)
            if trajectories is not asked:
                leaves = gather_leaves(x_QD, weight_Q, label_Q, trajectories, weight_N, config, device)
                objective = resolve_objective(judging, config.quality, trajectories, leaves.evidence)
                # what does not beat a poor default is not asked again whether it beats a better one
                leaves = foretold(x_QD, leaves, trajectories, weight_N, objective, config, device, pays=False)
        default = trajectories.configs.default
        past = gather_past(parent, before_Q, trajectories, leaves.evidence, judging.half_life)
        leaves = with_past(leaves, past)
        beliefs = believed(leaves, objective, default, config)
        confidence_P = best_probability(beliefs.probability[:-1], default)
        kept_P = prune(leaves.evidence.rows.sum(1), confidence_P, 1, config.prune.min_confidence)
        if not kept_P.all():
            if not kept_P.any():
                raise ConfigError(
                    f"prune.min_confidence={config.prune.min_confidence:g} removes all {len(kept_P)} patterns "
                    f"(the highest confidence is {confidence_P.max():.3f}); lower it"
                )
            label_Q, pays = drop_labels(leaves.label_Q, kept_P), leaves.pays
            leaves = gather_leaves(x_QD, weight_Q, label_Q, trajectories, weight_N, config, device)
            leaves = with_past(foretold(x_QD, leaves, trajectories, weight_N, objective, config, device, pays), past)
            beliefs = believed(leaves, objective, default, config)
        judging = replace(judging, min_probability=leaves.least_probability(judging))
        verdicts = judge(leaves.evidence, trajectories.configs, objective, beliefs, judging)
    with watch.stage("index"):
        data = assemble(trajectories, config, leaves, objective, beliefs, verdicts, 0.0)
        data = with_ratings(data, past, leaves.label_Q)
        data = inherit(data, leaves.label_Q, parent, before_Q, first_id, tell(past, leaves))
        leaves_PD = data.arrays["centroids"][: data.leaves]
        auto_floor = is_auto(config.lookup.floor)
        floor = (
            similarity_floor(x_QD, leaves_PD, device, config.cluster.engine)
            if auto_floor
            else float(config.lookup.floor)
        )
        index = build_index(leaves_PD, config.index, trajectories.x_QD, config.lookup.top_k)
    router, routing = None, None
    if config.router.kind == "fastgrnn":
        with watch.stage("router"):
            lessons = gather_lessons(x_QD, trajectories, data, weight_N, config, device)
            drawn = torch.Generator(device=device).manual_seed(config.seed)
            taught = train_router(lessons, trajectories.configs, config.router, drawn, device)
            router = FastGRNNRouter.from_bytes(taught.router.to_bytes(config.router.int8))
            routing = {
                name: getattr(taught, name) for name in ("train_loss", "valid_loss", "best_epoch", "calibrated_on")
            }
            log.info("router: best of %d epochs is %d, validation loss %.4f", len(taught.valid_loss),
                     taught.best_epoch, taught.valid_loss[taught.best_epoch])  # fmt: skip
    issued = int((~verdicts.stands).sum())
    facts = {
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
        "half_life": None if half_life is None else asdict(half_life),
        "router": routing,
        "device": str(device),
    }
    log.info(
        "%d patterns, %d verdicts, the default stands on %d (default: %s)",
        data.leaves, issued, data.leaves - issued, trajectories.configs.describe(default),
    )  # fmt: skip
    data = replace(data, lookup=replace(data.lookup, floor=floor), facts=data.facts | facts)
    return LearnedBank(data, index, router, leaves.label_Q, watch.seconds)


def choices_beside(
    names: Sequence[str], training: Trajectories, x_BD: npt.NDArray[np.float32], objective: Objective,
    config: TrainConfig,
) -> dict[str, Choice]:  # fmt: skip
    """What each named one of config.BASELINE_NAMES picks for queries (B, D), as config ids of its training table."""
    found: dict[str, Choice] = {}
    if not names:
        return found
    table, unit_BD = Training.of(training, objective), unit(x_BD)
    for name in names:
        log.info("baseline: %s", name)
        if name in BASELINES:
            found[name] = BASELINES[name](table, unit_BD, np.random.default_rng(config.seed))
        else:
            judging = replace(config.judge, method="reference")
            own = replace(config, judge=judging, index=IndexConfig(kind="off"), router=RouterConfig())
            found[name] = learn(training, own).bank().optimized_params_batch(x_BD)["config_id"]
    return found


@dataclass(frozen=True)
class Published:
    """What `train` did: the artifact's folder, its manifest, the policy table and the gate's decision."""

    folder: Path
    manifest: dict[str, Any]
    evaluation: Evaluation
    decision: Decision


def train(config: TrainConfig, quarantine: Path | None = None) -> Published | None:
    """Loads, learns, evaluates, publishes, and promotes where the gate lets it. Raises RbGpuError.

    Under torchrun every rank clusters its share of the queries, and the first does the rest; the others return None.
    """
    with launched(resolve_device(config.device.kind)) as ranks, reproducible(config.device.deterministic):
        if ranks.rank == 0:
            return _train(config, quarantine, ranks)
        room = _room(config, ranks)
        training, _ = split_by_time(load(config.data, config.params, room=room), config.eval.holdout)
        cluster_queries(_normalised(training, config, room.ranks), config, _checkpoint(config), ranks)
        return None


def _room(config: TrainConfig, ranks: Ranks) -> Room:
    """device.memory_budget is of the GPU's memory where there is one; the host then takes what is free."""
    host = resolve_device(config.device.kind).type == "cpu"
    return Room(config.device.memory_budget if host else None, config.device.scratch, ranks.of_node())


def _normalised(training: Trajectories, config: TrainConfig, node: Ranks) -> Trajectories:
    """In place: these rows are the job's own, and with cosine only their directions are used from here on.

    node: the processes that share the rows.
    """
    if config.cluster.metric == "cosine":
        normalise_(torch.from_numpy(training.x_QD[node.share(len(training.x_QD))]))
        node.wait()
    return training


def _checkpoint(config: TrainConfig) -> Checkpoint | None:
    every = config.cluster.checkpoint_every
    return Checkpoint(Path(config.registry.path) / CHECKPOINT_FILE, every) if every else None


def _train(config: TrainConfig, quarantine: Path | None, ranks: Ranks) -> Published:
    watch = Stopwatch()
    registry = Registry.open(**asdict(config.registry))
    with registry.locked():
        with watch.stage("load"):
            room = _room(config, ranks)
            everything = load(config.data, config.params, quarantine, room)
            training, held_out = split_by_time(everything, config.eval.holdout)
            log.info("%d rows, %d queries, %d configs, dim %d; newest %d queries held out", len(everything),
                     len(everything.query_id), len(everything.configs), everything.x_QD.shape[1],
                     len(held_out.query_id))  # fmt: skip
            parent = find_parent(registry, config, everything.x_QD.shape[1])
        learned = learn(_normalised(training, config, room.ranks), config, _checkpoint(config), ranks, parent,
                        free_pattern_id(registry))  # fmt: skip
        watch.seconds |= learned.seconds
        with watch.stage("evaluate"):
            bank = learned.bank()
            held_out = replace(held_out, configs=replace(held_out.configs, default=bank.data.default))
            champion, refusals = champion_beside(registry, bank)
            single = best_single(bank.data.evidence, bank.data.objective)
            others = choices_beside(config.eval.baseline_names, training, held_out.x_QD, bank.data.objective, config)
            if learned.router is not None:
                others |= routed(learned.router, bank, held_out, config.router.steps)
            evaluation = value_bank(bank, held_out, single, config.eval, config.seed, champion, others)
            for warning in evaluation.warnings:
                log.warning("%s", warning)
            drift = measure_drift(training, held_out, learned.label_Q, bank.data.objective, config.seed)
            for warning in drift.warnings:
                log.warning("drift: %s", warning)
            decision = decide(evaluation, config.gate, drift.embeddings, refusals)
        facts = {
            **learned.data.facts,
            "evaluation": {**asdict(evaluation), "improvement_percent": improvement_percent(evaluation)},
            "gate": asdict(decision),
            "drift": asdict(drift),
            "parent": None if parent is None else parent.facts["version"],
            "seconds": watch.seconds,
            "packages": package_versions(),
        }
        data = replace(learned.data, facts=without_nan(facts))
        files = {REPORT_FILE: render_report(bank, data.facts).encode()}
        if learned.index is not None:
            files[INDEX_FILE] = learned.index
        if learned.router is not None:
            files[ROUTER_FILE] = learned.router.to_bytes()
        folder = registry.path / registry.new_version()
        try:
            manifest = write_artifact(folder, data, files, registry.hmac_key)
        except OSError as error:
            raise ArtifactError(
                f"registry.path={registry.path} cannot be written ({error.strerror}); free space or choose another"
            ) from error
        if decision.promote:
            registry.promote(folder.name, decision.reason)
        registry.retain()
    return Published(folder, manifest, evaluation, decision)


def package_versions() -> dict[str, str]:
    """What ran."""
    names = ("rb_gpu", "torch", "numpy", "scipy", "pyarrow", "safetensors", "hydra-core")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
