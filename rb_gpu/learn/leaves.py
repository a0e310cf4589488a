"""Builds the leaves from cluster labels: their evidence, the hierarchy above them, and the field.

Suffixes: Q queries, N rows, P leaves, D dims.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rb_gpu.field import Field
from rb_gpu.learn.assemble import Leaves
from rb_gpu.learn.config import TrainConfig
from rb_gpu.learn.devices import one_thread
from rb_gpu.learn.distances import label_sums, normalised
from rb_gpu.learn.evidence import gather_evidence
from rb_gpu.learn.floor import spend
from rb_gpu.learn.hierarchy import build_hierarchy, level_counts
from rb_gpu.learn.landmarks import FittedField, fit_field, tempered
from rb_gpu.learn.stages import Stages, digest
from rb_gpu.learn.trajectories import Trajectories
from rb_gpu.objective import Objective
from rb_gpu.posterior import Beliefs, believe


@dataclass(frozen=True)
class LeafMaking:
    """All that leaves are made from besides their labels.

    x_QD: queries. weight_Q: (Q,) their weights. weight_N: (N,) float64 weights of the rows. stages: the cache that
    keeps fields and evidence. read: its key for the data, a digest of the rows and of how they were weighted.
    """

    x_QD: torch.Tensor
    weight_Q: torch.Tensor
    weight_N: torch.Tensor
    config: TrainConfig
    device: torch.device
    stages: Stages
    read: Any

    def gathered(self, label_Q: npt.NDArray[np.int64], trajectories: Trajectories) -> Leaves:
        """Leaves by the labels (Q,) of their queries: embedding sums, evidence, and the parents on each level above."""

        def make() -> Leaves:
            labels, patterns = torch.from_numpy(label_Q).to(self.device), int(label_Q.max()) + 1
            sums, mass = label_sums(self.x_QD, self.weight_Q.to(self.device), labels, patterns)
            sums_PD, mass_P = sums.cpu().numpy(), mass.cpu().numpy()
            evidence = gather_evidence(trajectories, labels, patterns, self.weight_N, self.device)
            means_PD = sums_PD / np.maximum(mass_P, 1e-300)[:, None]
            counts = level_counts(patterns, self.config.hierarchy.counts)
            return Leaves(label_Q, sums_PD, mass_P, evidence, build_hierarchy(means_PD, mass_P, counts, self.device))

        return self.stages.of("evidence", [self.read, digest(label_Q), trajectories.configs.default], make)

    def field_read(self, leaves: Leaves, trajectories: Trajectories, objective: Objective) -> list[Any]:
        """The cache key of a field: all that it depends on."""
        default = trajectories.configs.default
        method = self.config.judge.method == "eb"
        return [self.read, digest(leaves.label_Q), default, objective.kind, objective.quality, self.config.seed, method]

    def with_field(
        self,
        leaves: Leaves,
        trajectories: Trajectories,
        objective: Objective,
        pays: bool | None = None,
        in_use: bool = True,
    ) -> Leaves:
        """The leaves with a field, if one can be learned: only for judge.method=eb, a utility or a floor, and enough
        queries.

        pays: whether an earlier test on these rows showed that choices pay; None to test now. in_use: whether a service
        runs the default, as `proof.pays` takes it.
        """
        seed, default = self.config.seed, trajectories.configs.default
        if self.config.judge.method != "eb" or objective.kind == "bound":
            return leaves
        unit_QD = normalised(self.x_QD)

        def fit() -> tuple[FittedField, Field] | None:
            found = fit_field(unit_QD, leaves.label_Q, trajectories, self.weight_N, objective, seed, self.device)
            if found is None:
                return None
            labels = torch.from_numpy(leaves.label_Q).to(self.device)
            even_N = tempered(self.weight_N, trajectories)
            left = gather_evidence(trajectories, labels, len(leaves.mass_P), even_N, self.device, found.unseen_NO)
            return found, found.field(leaves.evidence, left)

        with one_thread():
            told = self.stages.of("field", self.field_read(leaves, trajectories, objective), fit)
            if told is None:
                return leaves
            found, field = told
            if pays is None:
                pays = found.pays(objective, default, seed, in_use)
        return replace(leaves, field=field, pays=pays, unseen=found.unseen)


def believed(leaves: Leaves, objective: Objective, default: int, config: TrainConfig) -> Beliefs:
    """The posterior beliefs of the leaves. With a field that was not shown to pay, no config passes min_probability."""
    beliefs = believe(leaves.evidence, leaves.parents, objective, default, config.judge.margin, leaves.field)
    if leaves.unseen is not None:
        least = leaves.least_probability(config.judge)
        return spend(beliefs, leaves.unseen, objective.target, least, default)
    return beliefs if leaves.field is None or leaves.pays else beliefs.held_back()
