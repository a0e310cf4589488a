"""What an expert would try first in place of a bank: nearest neighbours, hard clusters, ridge regression per config.

Each is tuned on its training data by cross-validated policy value (self-normalised inverse propensity scoring, which is
exact on a full table), and shrinks thin cells to the config's mean.
Suffixes: Q queries, N rows, B queries to answer, C configs, K clusters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rb_gpu.learn.field import Ridge, average
from rb_gpu.learn.kmeans import kmeans

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Matrix = npt.NDArray[np.float32]

FOLDS = 5
# rows that a config's mean counts for in a thin cell
PRIOR_ROWS = 5.0
NEIGHBOURS = (10, 20, 50, 100, 200, 400)
CLUSTERS = (4, 8, 16, 32, 64, 128)
TILE = 1024


@dataclass(frozen=True)
class Training:
    """x_QD: embeddings of norm 1. query_N, config_N: of each row. weight_N: 1 / propensity. utility_N. configs: C."""

    x_QD: Matrix
    query_N: Ints
    config_N: Ints
    weight_N: Floats
    utility_N: Floats
    configs: int

    @property
    def means(self) -> Floats:
        """(C,) mean utility of each config; of the worst row where it was never tried."""
        weight = np.bincount(self.config_N, self.weight_N, self.configs)
        total = np.bincount(self.config_N, self.weight_N * self.utility_N, self.configs)
        return np.where(weight > 0, total / np.maximum(weight, 1e-300), self.utility_N.min())

    def sums(self) -> tuple[Floats, Floats]:
        """Σw·u and Σw, (Q, C), of every query and config."""
        cell = self.query_N * self.configs + self.config_N
        shape, cells = (len(self.x_QD), self.configs), len(self.x_QD) * self.configs
        total: Floats = np.bincount(cell, self.weight_N * self.utility_N, cells).astype(np.float64).reshape(shape)
        weight: Floats = np.bincount(cell, self.weight_N, cells).astype(np.float64).reshape(shape)
        return total, weight

    def part(self, keep_Q: npt.NDArray[np.bool_]) -> Training:
        """The queries where keep_Q, with their rows."""
        rows = keep_Q[self.query_N]
        new_Q = np.cumsum(keep_Q) - 1
        return Training(
            self.x_QD[keep_Q], new_Q[self.query_N[rows]], self.config_N[rows], self.weight_N[rows],
            self.utility_N[rows], self.configs,
        )  # fmt: skip

    def value(self, choice_Q: Ints) -> float:
        """Mean utility of a choice, from the rows that tried what it picks."""
        hit = self.config_N == choice_Q[self.query_N]
        weight = self.weight_N[hit].sum()
        return float(self.weight_N[hit] @ self.utility_N[hit] / weight) if weight > 0 else -np.inf


def _shrunk(total: Floats, weight: Floats, training: Training) -> Floats:
    scale = training.weight_N.mean()
    mean: Floats = (total + PRIOR_ROWS * scale * training.means) / (weight + PRIOR_ROWS * scale)
    return mean


def nearest_neighbours(training: Training, x_BD: Matrix, k: int) -> Floats:
    """(B, C) mean utility over the k nearest training queries."""
    k = min(k, len(training.x_QD))
    total_QC, weight_QC = training.sums()
    parts = []
    for start in range(0, len(x_BD), TILE):
        cosine = x_BD[start : start + TILE] @ training.x_QD.T
        near = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
        parts.append(_shrunk(total_QC[near].sum(1), weight_QC[near].sum(1), training))
    return np.concatenate(parts)


def hard_clusters(training: Training, x_BD: Matrix, k: int) -> Floats:
    """(B, C) mean utility of the nearest of k clusters."""
    found = kmeans(training.x_QD, min(k, len(training.x_QD)), metric="cosine", device="cpu")
    centroids_KD, label_Q = np.asarray(found.centroids), np.asarray(found.labels).astype(np.int64)
    cell, clusters = label_Q[training.query_N] * training.configs + training.config_N, len(centroids_KD)
    shape, cells = (clusters, training.configs), clusters * training.configs
    total: Floats = np.bincount(cell, training.weight_N * training.utility_N, cells).astype(np.float64).reshape(shape)
    weight: Floats = np.bincount(cell, training.weight_N, cells).astype(np.float64).reshape(shape)
    mean: Floats = _shrunk(total, weight, training)[(x_BD @ centroids_KD.T).argmax(1)]
    return mean


def ridge_per_config(training: Training, x_BD: Matrix) -> Floats:
    """(B, C) utility by a ridge regression of each config on the embedding, averaged over ridges by leave-one-out."""
    out = np.tile(training.means, (len(x_BD), 1))
    for c in range(training.configs):
        rows = np.flatnonzero(training.config_N == c)
        if len(rows) > FOLDS:
            x = torch.from_numpy(training.x_QD[training.query_N[rows]].astype(np.float64))
            y, w = (torch.from_numpy(v[rows]) for v in (training.utility_N, training.weight_N))
            _, [fitted] = average([([Ridge(x, w / w.mean())], y[:, None])], float(len(rows)))
            out[:, c] = x_BD.astype(np.float64) @ fitted.coefs[0][:, 0].numpy() + float(fitted.base_C[0])
    return out


def _tuned(
    predict: Callable[[Training, Matrix, int], Floats], grid: tuple[int, ...], training: Training, seed: int
) -> int:
    """The setting whose choices are worth most on folds of the training queries."""
    fold_Q = np.random.default_rng(seed).integers(FOLDS, size=len(training.x_QD))
    values = []
    for setting in grid:
        choice_Q = np.zeros(len(fold_Q), dtype=np.int64)
        for fold in range(FOLDS):
            inside = training.part(fold_Q != fold)
            choice_Q[fold_Q == fold] = predict(inside, training.x_QD[fold_Q == fold], setting).argmax(1)
        values.append(training.value(choice_Q))
    return grid[int(np.argmax(values))]


def choices(training: Training, x_BD: Matrix, seed: int) -> dict[str, Ints]:
    """What each baseline picks for queries (B, D) of norm 1."""
    neighbours = _tuned(nearest_neighbours, NEIGHBOURS, training, seed)
    clusters = _tuned(hard_clusters, CLUSTERS, training, seed)
    return {
        "best single config": np.full(len(x_BD), int(training.means.argmax())),
        "nearest neighbours": nearest_neighbours(training, x_BD, neighbours).argmax(1),
        "hard clusters": hard_clusters(training, x_BD, clusters).argmax(1),
        "ridge per config": ridge_per_config(training, x_BD).argmax(1),
    }
