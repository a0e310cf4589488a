"""The clustering stage: from trajectories to the consolidated leaf of each query.

Suffixes: Q queries, N rows, K clusters, P leaves, D dims.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from rb_gpu.bank_data import BankData
from rb_gpu.errors import ConfigError, DataError
from rb_gpu.learn.checkpoint import Checkpoint
from rb_gpu.learn.checks import is_auto
from rb_gpu.learn.config import TrainConfig
from rb_gpu.learn.devices import resolve_device, tiles
from rb_gpu.learn.distances import normalised
from rb_gpu.learn.distributed import Ranks
from rb_gpu.learn.evidence import row_weights
from rb_gpu.learn.hierarchy import consolidate
from rb_gpu.learn.kmeans import kmeans
from rb_gpu.learn.lineage import warm_start
from rb_gpu.learn.trajectories import Trajectories

log = logging.getLogger(__name__)

# a mean cosine of two queries above this means a narrow cone, where a similarity that is high elsewhere says little
NARROW = 0.5
# about how many queries it is estimated from
NARROW_QUERIES = 2**14
# the least mean number of rows per cell with cluster.k=auto
ROWS_PER_CELL = 10


def auto_k(queries: int, rows: int, configs: int) -> int:
    """√queries clusters, fewer where a (pattern, config) cell would hold under ROWS_PER_CELL rows on average."""
    return max(1, min(round(math.sqrt(queries)), rows // (ROWS_PER_CELL * configs)))


def cluster_queries(
    trajectories: Trajectories,
    config: TrainConfig,
    checkpoint: Checkpoint | None,
    ranks: Ranks,
    parent: BankData | None = None,
) -> tuple[torch.Tensor, torch.Tensor, npt.NDArray[np.int64]]:
    """The clustered points (Q, D), their weights (Q,), and the consolidated leaf of each query (Q,).

    A query's weight is the sum of its rows' weights, decayed if judge.half_life is a number. If it is auto, the
    half-life is chosen given the patterns, which are therefore clustered without decay. parent: a bank whose centroids
    the clustering starts from; only rank 0's is used, so other ranks need none.
    """
    cluster, queries = config.cluster, len(trajectories.query_id)
    x_QD = torch.from_numpy(trajectories.x_QD)
    if cluster.metric == "cosine":
        x_QD = normalised(x_QD)
    half_life = None if is_auto(config.judge.half_life) else config.judge.half_life
    decay_N = row_weights(replace(trajectories, propensity=None), half_life).numpy()
    weight_Q = torch.from_numpy(np.bincount(trajectories.query_row, weights=decay_N)).float()
    source = trajectories.source.path or "memory"
    alike = not any(bool((x_QD[tile] != x_QD[0]).any()) for tile in tiles(queries, x_QD.shape[1], x_QD.device))
    if alike and cluster.k != 1:  # one cluster is then all that was asked for
        raise DataError(
            f"data.path={source}: all {queries} query embeddings are identical; check the embedder's output"
        )
    k = clusters_asked(trajectories, config)
    k, warm = ranks.of_first(warm_start(parent, k, trajectories, config))
    share = ranks.share(queries)
    result = kmeans(
        x_QD[share], k, max_iter=cluster.max_iter, epsilon=cluster.epsilon, n_init=cluster.n_init,
        metric=cluster.metric, seed=config.seed, device=config.device.kind, weight=weight_Q[share],
        memory_budget=config.device.memory_budget,
        code_budget=0 if cluster.memory == "lean" else cluster.memory_budget, checkpoint=checkpoint,
        ranks=ranks, warm=warm, engine=cluster.engine, precision=cluster.precision,
    )  # fmt: skip
    found = len(result.centroids)
    if found < k and not is_auto(cluster.k):
        raise ConfigError(
            f"cluster.k={k} exceeds the {found} distinct embeddings in data.path={source}; "
            "lower cluster.k or set cluster.k=auto"
        )
    device = resolve_device(config.device.kind)
    merged_K = consolidate(result.centroids.cpu().numpy(), cluster.merge_similarity, device)
    leaves = int(merged_K.max()) + 1
    log.info("k-means: k=%d, %d updates, inertia %.6g; %d leaves after merging cosine > %g",
             found, result.n_iter, result.inertia, leaves, cluster.merge_similarity)  # fmt: skip
    if leaves < found:
        _warn_of_cone(x_QD, found, leaves, cluster.merge_similarity)
    label_Q = merged_K[ranks.joined(result.labels).cpu().numpy()]
    rows_P = np.bincount(label_Q, weights=np.bincount(trajectories.query_row), minlength=leaves)
    kept_P = rows_P >= config.prune.min_support
    if not kept_P.any():
        raise ConfigError(
            f"prune.min_support={config.prune.min_support} removes all patterns (the largest has {int(rows_P.max())} "
            "rows); lower it, or lower cluster.k"
        )
    return x_QD, weight_Q, drop_labels(label_Q, kept_P)


def clusters_asked(trajectories: Trajectories, config: TrainConfig) -> int:
    """The number of clusters. Raises ConfigError where there are fewer queries."""
    queries = len(trajectories.query_id)
    if is_auto(config.cluster.k):
        rows, configs = len(trajectories), len(trajectories.configs)
        k, root = auto_k(queries, rows, configs), round(math.sqrt(queries))
        thin = f", lowered so that the {rows:,} rows give each config {ROWS_PER_CELL} per cluster on average"
        log.info("cluster.k=auto: k=%d, the square root of %s queries%s", k, f"{queries:,}", thin if k < root else "")
        return k
    if int(config.cluster.k) > queries:
        raise ConfigError(
            f"cluster.k={config.cluster.k} exceeds the {queries} queries to learn from in "
            f"data.path={trajectories.source.path or 'memory'}; lower cluster.k or set cluster.k=auto"
        )
    return int(config.cluster.k)


def _warn_of_cone(x_QD: torch.Tensor, found: int, leaves: int, similarity: float) -> None:
    """Warns if queries of all kinds lie in a narrow cone, as with some embedders, where merging may mix kinds."""
    few = x_QD[:: max(1, len(x_QD) // NARROW_QUERIES)]
    usual = float(torch.nn.functional.normalize(few, dim=1).double().mean(0).square().sum())
    if usual > NARROW:
        as_near = usual + similarity * (1.0 - usual)
        # two significant digits of 1 − as_near, but no more digits than float32 has
        digits = min(max(3, 1 - math.floor(math.log10(max(1.0 - as_near, 1e-7)))), 7)
        log.warning("cluster.merge_similarity=%g merged %d clusters into %d patterns, but the mean cosine of two "
                    "queries is %.*f, so different kinds may have merged; set cluster.merge_similarity=%.*f, which is "
                    "as close for this embedder, or 1 to merge none",
                    similarity, found, leaves, digits - 1, usual, digits, as_near)  # fmt: skip


def drop_labels(label_Q: npt.NDArray[np.int64], kept_P: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Labels renumbered over the patterns that are kept; -1 for the others."""
    new_P = np.where(kept_P, np.cumsum(kept_P) - 1, -1)
    return np.where(label_Q < 0, -1, new_P[np.maximum(label_Q, 0)])
