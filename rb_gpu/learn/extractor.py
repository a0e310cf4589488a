"""The two classes of the reference document (sections 4 and 5) for trajectory objects, built on the array stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from rb_gpu.bank_data import BankData
from rb_gpu.learn.assemble import UNPROVEN, Leaves, assemble
from rb_gpu.learn.config import ClusterConfig, JudgeConfig, ParamsConfig, PruneConfig, QualityConfig, TrainConfig
from rb_gpu.learn.evidence import gather_evidence, row_weights
from rb_gpu.learn.pipeline import learn
from rb_gpu.learn.recorded import checked, from_trajectories
from rb_gpu.learn.trajectories import Trajectories
from rb_gpu.learn.verdicts import judge, resolve_objective
from rb_gpu.params import SearchParams
from rb_gpu.posterior import believe
from rb_gpu.types import LearnedPattern, QueryTrajectory, Verdict
from rb_gpu.views import VerdictView


@dataclass(frozen=True)
class PatternExtractor:
    """Learns leaf patterns by k-means++ on the trajectories' embeddings; clusters of fewer than 3 rows are dropped.

    k: number of clusters, at most the number of distinct embeddings. epsilon: as in `kmeans`. merge_similarity: 1
    merges no clusters.
    """

    k: int
    max_iter: int = 100
    epsilon: float = 1e-4
    seed: int = 0
    metric: str = "cosine"
    merge_similarity: float = 1.0

    def extract(self, trajectories: Sequence[QueryTrajectory]) -> list[LearnedPattern]:
        """The patterns, in the order of their ids. Raises DataError, ConfigError."""
        table = from_trajectories(trajectories)
        distinct = len(np.unique(table.x_QD, axis=0))
        cluster = ClusterConfig(
            k=self.k,
            metric=self.metric,
            max_iter=self.max_iter,
            epsilon=self.epsilon,
            merge_similarity=self.merge_similarity,
        )
        cluster = replace(cluster, k=min(self.k, distinct))
        learned = learn(table, TrainConfig(cluster=cluster, prune=PruneConfig(min_support=3), seed=self.seed))
        bank = learned.bank()
        return [pattern for pattern in bank.patterns.values() if pattern.abstraction_level == 0]


@dataclass(frozen=True)
class VerdictJudge:
    """Judges one pattern from its trajectories. method: reference (the document's own), welch or eb."""

    min_samples: int = 10
    alpha: float = 0.05
    method: str = "reference"
    default: SearchParams = field(default_factory=SearchParams)
    quality: str = "f1"

    def judge(self, pattern: LearnedPattern, trajectories: Sequence[QueryTrajectory]) -> Verdict | None:
        """The verdict, or None where the evidence is insufficient and the default stands.

        Raises TypeError where the pattern or the default is of another type, DataError, ConfigError.
        """
        for name, value, kind in (("pattern", pattern, LearnedPattern), ("default", self.default, SearchParams)):
            if not isinstance(value, kind):
                raise TypeError(f"{name}={value!r} is not a {kind.__name__}; give one")
        trajectories = checked(trajectories)
        tiers = sorted({t.search_params.model_tier for t in trajectories} | {self.default.model_tier})
        table = from_trajectories(trajectories, ParamsConfig(tiers=tiers, default=self.default.as_dict()))
        config = TrainConfig(
            judge=JudgeConfig(
                method=self.method,
                min_probability=UNPROVEN,
                alpha=self.alpha,
                min_samples=self.min_samples,
                latency_weight=0.0,
                cost_weight=0.0,
            ),
            quality=QualityConfig(self.quality),
        )
        data = _one_pattern(table, config)
        verdict = VerdictView(data)[0]
        if verdict.default_stands:
            return None
        return Verdict(
            pattern_id=pattern.id,
            recommended_params=verdict.recommended_params,
            confidence=verdict.confidence,
            evidence=verdict.evidence,
            config_id=verdict.config_id,
            default_stands=False,
        )


def _one_pattern(table: Trajectories, config: TrainConfig) -> BankData:
    """A bank of one leaf that holds every row."""
    device = torch.device("cpu")
    label_Q = np.zeros(len(table.query_id), dtype=np.int64)
    weight_N = row_weights(table, config.judge.half_life)
    evidence = gather_evidence(table, torch.from_numpy(label_Q), 1, weight_N, device)
    leaves = Leaves(
        label_Q, table.x_QD.sum(0, keepdims=True, dtype=np.float64), np.array([float(len(label_Q))]), evidence, []
    )
    objective = resolve_objective(config.judge, config.quality, table, evidence)
    beliefs = believe(evidence, [], objective, table.configs.default, config.judge.margin)
    verdicts = judge(evidence, table.configs, objective, beliefs, config.judge)
    return assemble(table, config, leaves, objective, beliefs, verdicts, -1.0)
