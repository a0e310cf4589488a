"""The outcome model for doubly robust values: predicts each held-out query from the other held-out queries.

Cross-fitting (Chernozhukov et al. 2018) keeps a round's own noise out of its prediction. The model uses nothing of the
bank: a model that shared the bank's errors would excuse them.
Suffixes: Q queries, N rows, C configs, D dims, F features, T outcomes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from rb_gpu.learn.estimators import effective_size
from rb_gpu.learn.ridge import Ridge, Task, average, repeated

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

FOLDS = 5
# leading principal components of the embeddings that the regressions use
FEATURES = 64
# a config with fewer rows is predicted by its mean alone; every mean gets so many rows at the mean of all configs
LEAST_ROWS = 20
PRIOR_ROWS = 5.0
TILE_QUERIES = 4096


def mixed(id_Q: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Ids as though drawn at random (the finaliser of SplitMix64), whatever order they were given out in."""
    z = id_Q.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return z ^ (z >> np.uint64(31))


def folds(query_id_Q: npt.NDArray[np.uint64]) -> Ints:
    """(Q,) in [0, FOLDS), from the id alone: the order of a table does not matter."""
    return (mixed(query_id_Q) % np.uint64(FOLDS)).astype(np.int64)


def cross_fitted(
    x_QD: npt.NDArray[np.float32], fold_Q: Ints, query_N: Ints, config_N: Ints, weight_N: Floats, y_NT: Floats,
    configs: int,
) -> Floats:  # fmt: skip
    """(T, Q, C) predictions of every outcome for each query under each config, from the rows of the other folds.

    A ridge regression per config on the leading components of the embeddings, averaged over ridges (one of which leaves
    only the config's mean) by leave-one-out error; the mean if the config has few rows. weight_N: 1 / √propensity, a
    compromise between no weights, biased towards what the log favours, and importance weights, which a few rows
    dominate (Shimodaira 2000).
    """
    x_QF = torch.from_numpy(_components(x_QD))
    out_TQC = np.empty((y_NT.shape[1], len(x_QD), configs))
    for fold in range(FOLDS):
        left_Q = fold_Q == fold
        seen_N = ~left_Q[query_N]
        means_TC = _means(config_N[seen_N], weight_N[seen_N], y_NT[seen_N], configs)
        out_TQC[:, left_Q] = means_TC[:, None]
        for c in range(configs):
            rows = np.flatnonzero(seen_N & (config_N == c))
            if len(rows) < LEAST_ROWS:
                continue
            weight = weight_N[rows]
            query = torch.from_numpy(query_N[rows])
            ridge = Ridge(x_QF[query_N[rows]], torch.from_numpy(weight / weight.mean()), repeated(query))
            for t in range(len(out_TQC)):
                _, [fitted] = average([Task([ridge], torch.from_numpy(y_NT[rows, t : t + 1]))], effective_size(weight))
                said = x_QF[left_Q] @ fitted.coefs[0] + fitted.base_C
                out_TQC[t, left_Q, c] = said[:, 0].numpy()
    return out_TQC


def _components(x_QD: npt.NDArray[np.float32]) -> Floats:
    """(Q, F) leading principal components of the directions of the embeddings, computed tile by tile."""
    queries, dims = x_QD.shape
    tiles = [slice(start, start + TILE_QUERIES) for start in range(0, queries, TILE_QUERIES)]

    def directions(tile: slice) -> Floats:
        x_TD = x_QD[tile].astype(np.float64)
        return np.asarray(x_TD / np.linalg.norm(x_TD, axis=1, keepdims=True))

    mean_D, scatter_DD = np.zeros(dims), np.zeros((dims, dims))
    for tile in tiles:
        mean_D += directions(tile).sum(0) / queries
    for tile in tiles:
        about_TD = directions(tile) - mean_D
        scatter_DD += about_TD.T @ about_TD
    axes_DF = np.linalg.eigh(scatter_DD)[1][:, ::-1][:, :FEATURES]
    return np.concatenate([(directions(tile) - mean_D) @ axes_DF for tile in tiles])


def _means(config_N: Ints, weight_N: Floats, y_NT: Floats, configs: int) -> Floats:
    """(T, C) weighted mean of each config, with PRIOR_ROWS further rows at the mean of all configs."""
    if len(config_N) == 0:
        return np.zeros((y_NT.shape[1], configs))
    prior = PRIOR_ROWS * weight_N.mean()
    weight_C = np.bincount(config_N, weight_N, configs)
    overall_T = weight_N @ y_NT / weight_N.sum()
    total_TC = np.stack([np.bincount(config_N, weight_N * y_N, configs) for y_N in y_NT.T])
    means: Floats = (total_TC + prior * overall_T[:, None]) / (weight_C + prior)
    return means
