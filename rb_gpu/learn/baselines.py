"""What an expert would try first instead of a bank; each learns from a table and picks a config for every query.

They work on full tables (every query under every config) and on logs of one config per query, with rows weighted by
1 / propensity if logged. Hyperparameters are tuned by cross-validated policy value (self-normalised inverse propensity
scoring, which is exact on a full table). Cells with few rows are shrunk to the config's mean.
Suffixes: Q training queries, N rows, B queries to answer, D dims, C configs, K clusters, G settings tried, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rb_gpu.learn.kmeans import kmeans
from rb_gpu.learn.ridge import Ridge, Task, average
from rb_gpu.learn.trajectories import Trajectories
from rb_gpu.learn.valuation import Choice, held_out_outcomes
from rb_gpu.objective import Objective

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Matrix = npt.NDArray[np.float32]

FOLDS = 5
# rows that a config's mean counts for in a cell
PRIOR_ROWS = 5.0
NEIGHBOURS = (10, 20, 50, 100, 200, 400)
# one cluster is the best single config
CLUSTERS = (1, 4, 8, 16, 32, 64, 128)
TILE = 1024
# published settings of Avengers-Pro: clusters, nearest ones that vote, and β of their softmax weights
SOFT_CLUSTERS, SOFT_NEAREST, SOFT_BETA = 60, 4, 9.0
PENALTIES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
LOGISTIC_STEPS = 40


@dataclass(frozen=True)
class Training:
    """x_QD: embeddings of norm 1. query_N, config_N: of each row. weight_N: 1 / propensity. utility_N. configs: C."""

    x_QD: Matrix
    query_N: Ints
    config_N: Ints
    weight_N: Floats
    utility_N: Floats
    configs: int

    @classmethod
    def of(cls, trajectories: Trajectories, objective: Objective) -> Training:
        """A table's rows under an objective."""
        rows = held_out_outcomes(trajectories, objective)
        x_QD = unit(trajectories.x_QD)
        return cls(x_QD, rows.query_row, rows.config_id, rows.weight, rows.utility, len(trajectories.configs))

    @property
    def means(self) -> Floats:
        """(C,) weighted mean utility of each config; that of the worst row for a config that was never tried."""
        weight = np.bincount(self.config_N, self.weight_N, self.configs)
        total = np.bincount(self.config_N, self.weight_N * self.utility_N, self.configs)
        return np.where(weight > 0, total / np.maximum(weight, 1e-300), self.utility_N.min())

    def sums(self, group_Q: Ints, groups: int) -> tuple[Floats, Floats]:
        """Σw·u and Σw, (groups, C), over the queries of each group."""
        cell_N, cells = group_Q[self.query_N] * self.configs + self.config_N, groups * self.configs
        total: Floats = np.bincount(cell_N, self.weight_N * self.utility_N, cells).astype(np.float64)
        weight: Floats = np.bincount(cell_N, self.weight_N, cells).astype(np.float64)
        return total.reshape(groups, self.configs), weight.reshape(groups, self.configs)

    def shrunk(self, total: Floats, weight: Floats) -> Floats:
        """Means of cells (…, C) from their sums, with PRIOR_ROWS further rows at the config's mean."""
        scale = self.weight_N.mean()
        mean: Floats = (total + PRIOR_ROWS * scale * self.means) / (weight + PRIOR_ROWS * scale)
        return mean

    def part(self, keep_Q: npt.NDArray[np.bool_]) -> Training:
        """The queries where keep_Q is true, with their rows."""
        rows = keep_Q[self.query_N]
        new_Q = np.cumsum(keep_Q) - 1
        return Training(
            self.x_QD[keep_Q], new_Q[self.query_N[rows]], self.config_N[rows], self.weight_N[rows],
            self.utility_N[rows], self.configs,
        )  # fmt: skip

    def value(self, choice_Q: Choice) -> float:
        """Mean utility of a choice, from the rows that tried what it picks; -inf if there are none."""
        hit = self.config_N == choice_Q[self.query_N]
        weight = self.weight_N[hit].sum()
        return float(self.weight_N[hit] @ self.utility_N[hit] / weight) if weight > 0 else -np.inf


# (B, C) expected utility of queries x (B, D) of norm 1
Predict = Callable[[Training, Matrix], Floats]


def unit(x_QD: Matrix) -> Matrix:
    """Rows of norm 1."""
    normed: Matrix = x_QD / np.linalg.norm(x_QD, axis=1, keepdims=True)
    return normed


def nearest_neighbours(training: Training, x_BD: Matrix, ks: Sequence[int]) -> Floats:
    """(G, B, C) mean utility over the k nearest training queries, for each of the increasing ks."""
    queries = len(training.x_QD)
    total_QC, weight_QC = training.sums(np.arange(queries), queries)
    ends = [min(k, queries) for k in ks]
    out = np.empty((len(ks), len(x_BD), training.configs))
    for start in range(0, len(x_BD), TILE):
        cosine = x_BD[start : start + TILE] @ training.x_QD.T
        near = np.argpartition(-cosine, ends[-1] - 1, axis=1)[:, : ends[-1]]
        near = np.take_along_axis(near, np.argsort(-np.take_along_axis(cosine, near, 1), axis=1, kind="stable"), 1)
        total = weight = np.zeros((len(near), training.configs))
        for g, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            total = total + total_QC[near[:, begin:end]].sum(1)
            weight = weight + weight_QC[near[:, begin:end]].sum(1)
            out[g, start : start + TILE] = training.shrunk(total, weight)
    return out


def hard_clusters(training: Training, x_BD: Matrix, centroids_KD: Matrix) -> Floats:
    """(B, C) mean utility in the cluster that each query falls into (Avengers, arXiv 2505.19797)."""
    total, weight = training.sums((training.x_QD @ centroids_KD.T).argmax(1), len(centroids_KD))
    mean_KC = training.shrunk(total, weight)
    predicted: Floats = mean_KC[(x_BD @ centroids_KD.T).argmax(1)]
    return predicted


def ridge_per_config(training: Training, x_BD: Matrix) -> Floats:
    """(B, C) utility by a ridge regression per config on the embedding, averaged over ridges by leave-one-out error."""
    out = np.tile(training.means, (len(x_BD), 1))
    for c in range(training.configs):
        rows = np.flatnonzero(training.config_N == c)
        if len(rows) > FOLDS:
            x = torch.from_numpy(training.x_QD[training.query_N[rows]].astype(np.float64))
            y, w = (torch.from_numpy(v[rows]) for v in (training.utility_N, training.weight_N))
            _, [fitted] = average([Task([Ridge(x, w / w.mean())], y[:, None])], float(len(rows)))
            out[:, c] = x_BD.astype(np.float64) @ fitted.coefs[0][:, 0].numpy() + float(fitted.base_C[0])
    return out


def linucb(training: Training, x_BD: Matrix) -> Floats:
    """(B, C) x·θ of disjoint LinUCB (Li, Chu, Langford & Schapire 2010, algorithm 1) after it has seen the whole log.

    A_c = I + Σ x·xᵀ and b_c = Σ u·x do not depend on the order of rows, and α only decides what to try next, which the
    log has decided already: so the final greedy θ = A⁻¹·b is the same for every order and α. x has a leading constant.
    """

    def features(x: Matrix) -> Floats:
        return np.hstack([np.ones((len(x), 1)), x.astype(np.float64)])

    x_QF, out = features(training.x_QD), np.tile(training.means, (len(x_BD), 1))
    for c in range(training.configs):
        rows = training.config_N == c
        if rows.any():
            x_NF = x_QF[training.query_N[rows]]
            theta = np.linalg.solve(np.eye(x_NF.shape[1]) + x_NF.T @ x_NF, x_NF.T @ training.utility_N[rows])
            out[:, c] = features(x_BD) @ theta
    return out


def centroids(x_QD: Matrix, k: int, rng: np.random.Generator) -> Matrix:
    """(K, D) of norm 1, by k-means on the sphere."""
    found = kmeans(x_QD, min(k, len(x_QD)), metric="cosine", device="cpu", seed=int(rng.integers(2**31)))
    return np.asarray(found.centroids)


def tune(predict: Callable[[Training, Matrix], Floats], training: Training, rng: np.random.Generator) -> int:
    """Index of the setting worth most in cross-validation on the training queries; predict returns (G, B, C)."""
    fold_Q = rng.integers(FOLDS, size=len(training.x_QD))
    parts = [predict(training.part(fold_Q != fold), training.x_QD[fold_Q == fold]).argmax(2) for fold in range(FOLDS)]
    choice_GQ = np.empty((len(parts[0]), len(fold_Q)), dtype=np.int64)
    choice_GQ[:, np.argsort(fold_Q, kind="stable")] = np.concatenate(parts, axis=1)
    return int(np.argmax([training.value(choice_Q) for choice_Q in choice_GQ]))


def tuned_neighbours(training: Training, rng: np.random.Generator) -> Predict:
    """nearest_neighbours with the best k."""
    k = NEIGHBOURS[tune(lambda inside, x: nearest_neighbours(inside, x, NEIGHBOURS), training, rng)]
    return lambda table, x: nearest_neighbours(table, x, (k,))[0]


def tuned_clusters(training: Training, rng: np.random.Generator) -> Predict:
    """hard_clusters with the best number of clusters. All folds use the clusters of all queries: no outcome enters."""
    found = [centroids(training.x_QD, k, rng) for k in CLUSTERS]
    best = tune(lambda inside, x: np.stack([hard_clusters(inside, x, c) for c in found]), training, rng)
    return lambda table, x: hard_clusters(table, x, found[best])


def rank_votes(training: Training, x_BD: Matrix, centroids_KD: Matrix) -> Floats:
    """(B, C) votes of the nearest clusters' rankings (Avengers-Pro, arXiv 2508.12631, with its published settings).

    A cluster gives its best config 1, the next 1/2, then 1/3, …, weighted by the softmax of −β·cosine distance over the
    nearest clusters. Ranks are by utility, in place of the paper's α·quality + (1 − α)·(1 − cost), each scaled to
    [0, 1].
    """
    total, weight = training.sums((training.x_QD @ centroids_KD.T).argmax(1), len(centroids_KD))
    order_KC = np.argsort(-training.shrunk(total, weight), axis=1, kind="stable")
    vote_KC = 1.0 / (1.0 + np.argsort(order_KC, axis=1))
    cosine = (x_BD @ centroids_KD.T).astype(np.float64)
    near = np.argsort(-cosine, axis=1, kind="stable")[:, :SOFT_NEAREST]
    weight_BK = np.exp(SOFT_BETA * (np.take_along_axis(cosine, near, 1) - 1.0))
    votes: Floats = (weight_BK[:, :, None] * vote_KC[near]).sum(1)
    return votes


def soft_clusters(training: Training, rng: np.random.Generator) -> Predict:
    """rank_votes over clusters of the training queries."""
    centroids_KD = centroids(training.x_QD, SOFT_CLUSTERS, rng)
    return lambda table, x: rank_votes(table, x, centroids_KD)


def logistic_per_config(training: Training, x_BD: Matrix, penalty: float) -> Floats:
    """(B, C) utility by a logistic regression per config on the embedding, with utility scaled to [0, 1] as the target.

    penalty: on the squared slopes, relative to C times the mean cross-entropy of a row.
    """
    low, high = float(training.utility_N.min()), float(training.utility_N.max())
    scale = max(high - low, 1e-12)
    share_N = torch.from_numpy((training.utility_N - low) / scale).float()
    weight_N = torch.from_numpy(training.weight_N / training.weight_N.mean()).float()
    query_N, config_N = torch.from_numpy(training.query_N), torch.from_numpy(training.config_N)
    x_QD = torch.from_numpy(training.x_QD)
    slope_DC = torch.zeros(x_QD.shape[1], training.configs, dtype=torch.float32, requires_grad=True)
    base_C = torch.zeros(training.configs, dtype=torch.float32, requires_grad=True)
    optimiser = torch.optim.LBFGS([slope_DC, base_C], max_iter=LOGISTIC_STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        logit_N = (x_QD @ slope_DC + base_C)[query_N, config_N]
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(logit_N, share_N, weight_N)
        total: torch.Tensor = training.configs * entropy + 0.5 * penalty * slope_DC.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        predicted = low + scale * torch.sigmoid(torch.from_numpy(x_BD) @ slope_DC + base_C).double().numpy()
    tried_C = np.bincount(training.config_N, minlength=training.configs) > 0
    return np.where(tried_C, predicted, training.means)


def tuned_logistic(training: Training, rng: np.random.Generator) -> Predict:
    """logistic_per_config with the best penalty."""

    def all_penalties(inside: Training, x_BD: Matrix) -> Floats:
        return np.stack([logistic_per_config(inside, x_BD, penalty) for penalty in PENALTIES])

    best = PENALTIES[tune(all_penalties, training, rng)]
    return lambda table, x: logistic_per_config(table, x, best)


# each learns from training data a function that predicts (soft clusters: votes on) any utility of such tables
LEARNERS: dict[str, Callable[[Training, np.random.Generator], Predict]] = {
    "nearest neighbours": tuned_neighbours,
    "hard clusters": tuned_clusters,
    "soft clusters": soft_clusters,
    "ridge per config": lambda training, rng: ridge_per_config,
    "logistic per config": tuned_logistic,
    "LinUCB": lambda training, rng: linucb,
}
