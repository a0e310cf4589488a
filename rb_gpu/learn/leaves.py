"""The leaves: what clustering, evidence and the field together say of them.

Suffixes: Q queries, N rows, P leaves, D dims.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from rb_gpu.learn.assemble import Leaves
from rb_gpu.learn.config import TrainConfig
from rb_gpu.learn.devices import one_thread
from rb_gpu.learn.distances import label_sums, normalise_, normed
from rb_gpu.learn.evidence import gather_evidence
from rb_gpu.learn.floor import spend
from rb_gpu.learn.hierarchy import build_hierarchy, level_counts
from rb_gpu.learn.landmarks import foretell, tempered
from rb_gpu.learn.trajectories import Trajectories
from rb_gpu.objective import Objective
from rb_gpu.posterior import Beliefs, believe


def gather_leaves(
    x_QD: torch.Tensor,
    weight_Q: torch.Tensor,
    label_Q: npt.NDArray[np.int64],
    trajectories: Trajectories,
    weight_N: torch.Tensor,
    config: TrainConfig,
    device: torch.device,
) -> Leaves:
    """Leaves by the labels (Q,) of their queries: sums, evidence and the levels above."""
    labels, patterns = torch.from_numpy(label_Q).to(device), int(label_Q.max()) + 1
    sums, mass = label_sums(x_QD, weight_Q.to(device), labels, patterns)
    sums_PD, mass_P = sums.cpu().numpy(), mass.cpu().numpy()
    evidence = gather_evidence(trajectories, labels, patterns, weight_N, device)
    means_PD = sums_PD / np.maximum(mass_P, 1e-300)[:, None]
    counts = level_counts(patterns, config.hierarchy.counts)
    parents = build_hierarchy(means_PD, mass_P, counts)
    return Leaves(label_Q, sums_PD, mass_P, evidence, parents)


def foretold(
    x_QD: torch.Tensor,
    leaves: Leaves,
    trajectories: Trajectories,
    weight_N: torch.Tensor,
    objective: Objective,
    config: TrainConfig,
    device: torch.device,
    pays: bool | None = None,
) -> Leaves:
    """The leaves with the field, where it says more than they do; only eb, for a utility or a floor, can use one.

    pays: whether its choices were shown to pay by a test that these rows have had already; None to test.
    """
    if config.judge.method != "eb" or objective.kind == "bound":
        return leaves
    unit_QD = x_QD if normed(x_QD) else normalise_(x_QD.clone())
    with one_thread():
        found = foretell(unit_QD, leaves.label_Q, trajectories, weight_N, objective, config.seed, device, pays)
    if found is None:
        return leaves
    labels = torch.from_numpy(leaves.label_Q).to(device)
    even_N = tempered(weight_N, trajectories)
    left = gather_evidence(trajectories, labels, len(leaves.mass_P), even_N, device, found.unseen_NO)
    return replace(leaves, field=found.field(leaves.evidence, left), foretold_NO=found.unseen_NO, pays=found.pays,
                   unseen=found.unseen)  # fmt: skip


def believed(leaves: Leaves, objective: Objective, default: int, config: TrainConfig) -> Beliefs:
    """The posterior beliefs of the leaves; no config is probable enough where a field was not shown to pay."""
    beliefs = believe(leaves.evidence, leaves.parents, objective, default, config.judge.margin, leaves.field)
    if leaves.unseen is not None:
        least = leaves.least_probability(config.judge)
        return spend(beliefs, leaves.unseen, objective.target, least, default)
    if leaves.field is None or leaves.pays:
        return beliefs
    nothing = np.zeros_like(beliefs.gain)
    return replace(beliefs, probability=nothing, test=nothing - 1.0, test_sd=nothing)
