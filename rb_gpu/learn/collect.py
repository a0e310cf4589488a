"""Makes real trajectories: searches a corpus under every config of a grid and measures quality, latency and cost.

Similarity is cosine, i.e. the inner product of normalised rows. Suffixes: M corpus rows, Q queries, B queries of one
block, U distinct rows, C configs, D dims, k = top_k.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss as faiss_module
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rb_gpu.errors import ConfigError
from rb_gpu.learn.checks import is_auto
from rb_gpu.learn.corpus import Matrix, Queries, open_vectors, read_queries, unit_chunks, unit_rows, warn_of_norms
from rb_gpu.learn.folders import new_folder
from rb_gpu.learn.job_config import CollectConfig

log = logging.getLogger(__name__)

# Faiss ships type stubs that lack SWIG's generated names and contradict others
faiss: Any = faiss_module

# similarities of copies of a vector that float32 rounded differently differ by less than this
TIE_TOLERANCE = 1e-6
# a query runs under its next config only after this many other queries, so that the first run does not warm the caches
BLOCK_QUERIES = 256
WARM_UP_QUERIES = 32
# fewest and most training rows per IVF cell that Faiss's k-means asks for
TRAIN_ROWS_PER_CELL = (39, 256)
# in a table with rows of both indexes, the value of the parameter that a row's index does not have
NOT_USED = 1


@dataclass(frozen=True)
class _Corpus:
    """vectors_MD: unmodified, as stored in the file. name: `key=path` for messages."""

    vectors_MD: npt.NDArray[np.floating]
    name: str

    def similarity(self, unit_D: Matrix, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Of one query with the rows `ids` (any shape), summed in float64; -inf where an id is -1.

        Each kind of search sums float32 in its own order, with differences of up to dim · 2^-23: compared by their own
        scores, copies found by an index would seem farther away than those found by the exact search.
        """
        row_U, place = np.unique(ids, return_inverse=True)
        found_U = np.full(len(row_U), -np.inf)
        real_U = row_U >= 0
        unit_UD = unit_rows(self.vectors_MD[row_U[real_U]], self.name, row_U[real_U])
        found_U[real_U] = unit_UD.astype(np.float64) @ unit_D.astype(np.float64)
        return found_U[place].reshape(ids.shape)


@dataclass(frozen=True)
class ConfigMeans:
    """Means over all queries of one config, but the median latency, because a few searches that the machine delays can
    make a mean twenty times as long. The parameter of the other index is NOT_USED.
    """

    ef_search: int
    n_probes: int
    precision: float
    recall: float
    latency_p50_us: float
    cost: float


@dataclass(frozen=True)
class CollectSummary:
    """What was written: OUT/queries.parquet with `queries` rows and OUT/outcomes.parquet with `rows` rows."""

    out: Path
    base_rows: int
    dim: int
    queries: int
    rows: int
    configs: tuple[ConfigMeans, ...]


@dataclass(frozen=True)
class _Arm:
    """One config: a Faiss index, search parameters, its statistics, and the comparisons that these do not count."""

    index: Any
    parameters: Any
    stats: Any
    uncounted: int
    ef_search: int = NOT_USED
    n_probes: int = NOT_USED


@dataclass(frozen=True)
class _Measured:
    """Measurements of one block: ids (B, C, k) int64, -1 where fewer were found; the others are (B, C)."""

    ids: npt.NDArray[np.int64]
    precision: Matrix
    recall: Matrix
    latency_us: npt.NDArray[np.uint64]
    cost: Matrix


def collect(config: CollectConfig) -> CollectSummary:
    """Runs every query under every config, one query per call on one thread, and writes the two-table form.

    OUT/queries.parquet: query_id, query_embedding (half precision if that is lossless, else float), timestamp.
    OUT/outcomes.parquet: id, query_id, ef_search, n_probes, precision, recall, latency_us, cost, retrieved_ids.
    ef_search applies to the HNSW index and n_probes to the IVF index; if both run, HNSW rows have n_probes=1 and IVF
    rows ef_search=1, and if only one runs the other column is left out. cost: distance computations, including those
    with IVF's cell centres. A retrieved id is relevant if its similarity is at least the k-th best one less 1e-6, so
    that it does not matter which of two copies a search finds. recall = relevant / k; precision = relevant / retrieved,
    0 if nothing was retrieved. Equal settings give equal ids and costs on the same machine and Faiss version; latency
    is as measured.

    Raises DataError (missing or unreadable file, other dimension, bad row) and ConfigError (top_k or n_probes too
    large, OUT exists).
    """
    rng = np.random.default_rng(config.seed)
    name = f"base={config.base}"
    vectors_MD = open_vectors(config.base, "base")
    m, dim = vectors_MD.shape
    if config.top_k > m:
        raise ConfigError(f"top_k={config.top_k} exceeds the {m} rows of {name}; lower it")
    config, nlist = _with_cells(config, m)
    warn_of_norms(vectors_MD, name)
    queries = read_queries(config.queries, dim, config.max_queries, rng)
    with new_folder(config.out) as folder:
        log.info("exact search of %d queries in %d vectors of %d dims", len(queries), m, dim)
        corpus = _Corpus(vectors_MD, name)
        kth_Q = _kth_similarity(queries.unit_QD, corpus, config.top_k)
        arms = _build(config, vectors_MD, name, nlist, rng)
        pq.write_table(_query_table(queries), folder / "queries.parquet")
        means = _run(config, arms, queries, corpus, kth_Q, rng, folder / "outcomes.parquet")
    return CollectSummary(Path(config.out), m, dim, len(queries), len(queries) * len(arms), means)


def _with_cells(config: CollectConfig, m: int) -> tuple[CollectConfig, int]:
    """The config and the number of IVF cells. auto means 4·sqrt(M), as Faiss's guidelines advise, but no more cells
    than can be filled; since the user did not choose that number, n_probes above it are dropped rather than refused.
    """
    if not config.ivf_n_probes:
        return config, 0
    enough = max(1, m // TRAIN_ROWS_PER_CELL[0])
    nlist = min(round(4 * math.sqrt(m)), enough) if is_auto(config.ivf_nlist) else int(config.ivf_nlist)
    if nlist > m:
        raise ConfigError(f"ivf_nlist={nlist} exceeds the {m} rows of base={config.base}; lower it")
    fit = [n_probes for n_probes in config.ivf_n_probes if n_probes <= nlist]
    if fit == config.ivf_n_probes:
        return config, nlist
    if not fit or not is_auto(config.ivf_nlist):
        raise ConfigError(
            f"ivf_n_probes={list(config.ivf_n_probes)} exceeds the {nlist} cells of the index; "
            "lower it or raise ivf_nlist"
        )
    log.warning("ivf_n_probes=%s: %s are left out, since ivf_nlist=auto makes %d cells of %d rows; set ivf_nlist for "
                "more", config.ivf_n_probes, sorted({*config.ivf_n_probes} - {*fit}), nlist, m)  # fmt: skip
    return replace(config, ivf_n_probes=fit), nlist


def _kth_similarity(unit_QD: Matrix, corpus: _Corpus, k: int) -> npt.NDArray[np.float64]:
    """The k-th best similarity of each query (Q,), by exact search."""
    best_Qk, row_Qk = np.full((len(unit_QD), k), -np.inf, np.float32), np.full((len(unit_QD), k), -1)
    start = 0
    for chunk_TD in unit_chunks(corpus.vectors_MD, corpus.name):
        found, row = faiss.knn(unit_QD, chunk_TD, min(k, len(chunk_TD)), metric=faiss.METRIC_INNER_PRODUCT)
        found, row = np.concatenate([best_Qk, found], axis=1), np.concatenate([row_Qk, row + start], axis=1)
        order_Qk = np.argsort(-found, axis=1, kind="stable")[:, :k]
        best_Qk, row_Qk = np.take_along_axis(found, order_Qk, 1), np.take_along_axis(row, order_Qk, 1)
        start += len(chunk_TD)
    return np.array([corpus.similarity(*pair).min() for pair in zip(unit_QD, row_Qk, strict=True)])


def _build(
    config: CollectConfig,
    vectors_MD: npt.NDArray[np.floating],
    name: str,
    nlist: int,
    rng: np.random.Generator,
) -> list[_Arm]:
    """The configs of both grids, HNSW first."""
    m, dim = vectors_MD.shape
    arms: list[_Arm] = []
    start = time.perf_counter()
    if config.hnsw_ef_search:
        hnsw = faiss.IndexHNSWFlat(dim, config.hnsw_m, faiss.METRIC_INNER_PRODUCT)
        hnsw.hnsw.efConstruction = config.hnsw_ef_construction
        for chunk_TD in unit_chunks(vectors_MD, name):
            hnsw.add(chunk_TD)
        for ef_search in config.hnsw_ef_search:
            parameters = faiss.SearchParametersHNSW(efSearch=ef_search)
            arms.append(_Arm(hnsw, parameters, faiss.cvar.hnsw_stats, 0, ef_search=ef_search))
        log.info("built HNSW in %.1f s", time.perf_counter() - start)
    start = time.perf_counter()
    if config.ivf_n_probes:
        ivf = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, nlist, faiss.METRIC_INNER_PRODUCT)
        ivf.cp.seed = int(rng.integers(2**31))
        ivf.cp.min_points_per_centroid = 1  # a small corpus has fewer; Faiss would only warn about it
        sample = np.sort(rng.choice(m, min(m, nlist * TRAIN_ROWS_PER_CELL[1]), replace=False))
        ivf.train(unit_rows(vectors_MD[sample], name, sample))
        for chunk_TD in unit_chunks(vectors_MD, name):
            ivf.add(chunk_TD)
        for n_probes in config.ivf_n_probes:
            parameters = faiss.SearchParametersIVF(nprobe=n_probes)
            arms.append(_Arm(ivf, parameters, faiss.cvar.indexIVF_stats, nlist, n_probes=n_probes))
        log.info("built IVF of %d cells in %.1f s", nlist, time.perf_counter() - start)
    return arms


def _run(
    config: CollectConfig,
    arms: list[_Arm],
    queries: Queries,
    corpus: _Corpus,
    kth_Q: npt.NDArray[np.float64],
    rng: np.random.Generator,
    path: Path,
) -> tuple[ConfigMeans, ...]:
    """Measures block after block and writes each as one row group; returns the means of each config."""
    left_out = ([] if config.hnsw_ef_search else ["ef_search"]) + ([] if config.ivf_n_probes else ["n_probes"])
    schema = pa.schema([f for f in _OUTCOMES if f.name not in left_out])
    sums, latencies = np.zeros((3, len(arms))), []
    with _one_thread(), pq.ParquetWriter(path, schema) as writer:
        _measure(arms, queries.unit_QD[:WARM_UP_QUERIES], corpus, kth_Q[:WARM_UP_QUERIES], config.top_k, rng)
        for start in range(0, len(queries), BLOCK_QUERIES):
            block = slice(start, start + BLOCK_QUERIES)
            measured = _measure(arms, queries.unit_QD[block], corpus, kth_Q[block], config.top_k, rng)
            table = _outcome_table(measured, arms, queries.query_id[block], first_id=start * len(arms))
            writer.write_table(table.select(schema.names))
            per_arm = (measured.precision, measured.recall, measured.cost)
            sums += [np.sum(a, axis=0, dtype=np.float64) for a in per_arm]
            latencies.append(measured.latency_us)
            log.info("%d of %d queries", min(block.stop, len(queries)), len(queries))
    precision, recall, cost = (sums / len(queries)).tolist()
    p50_us = np.median(np.concatenate(latencies), axis=0).tolist()
    columns = zip(arms, precision, recall, p50_us, cost, strict=True)
    return tuple(ConfigMeans(arm.ef_search, arm.n_probes, *of_arm) for arm, *of_arm in columns)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def _measure(
    arms: list[_Arm],
    unit_BD: Matrix,
    corpus: _Corpus,
    kth_B: npt.NDArray[np.float64],
    k: int,
    rng: np.random.Generator,
) -> _Measured:
    """Runs every query of a block under every config, in a random order of configs so that drift of the machine affects
    all of them.

    Latency is rounded to microseconds, at least 1.
    """
    shape = (len(unit_BD), len(arms))
    ids = np.empty((*shape, k), np.int64)
    latency_ns, cost = np.empty(shape, np.int64), np.empty(shape, np.float32)
    for c in rng.permutation(len(arms)):
        arm = arms[c]
        for b in range(len(unit_BD)):
            query = unit_BD[b : b + 1]
            arm.stats.reset()
            start = time.perf_counter_ns()
            _, found = arm.index.search(query, k, params=arm.parameters)
            latency_ns[b, c] = time.perf_counter_ns() - start
            cost[b, c] = arm.stats.ndis + arm.uncounted
            ids[b, c] = found[0]
    retrieved = ids >= 0
    similarity = np.stack([corpus.similarity(*pair) for pair in zip(unit_BD, ids, strict=True)])
    relevant = (similarity >= kth_B[:, None, None] - TIE_TOLERANCE).sum(axis=2)
    return _Measured(
        ids,
        (relevant / np.maximum(retrieved.sum(axis=2), 1)).astype(np.float32),
        (relevant / k).astype(np.float32),
        np.maximum(np.rint(latency_ns / 1000), 1).astype(np.uint64),
        cost,
    )


_OUTCOMES = pa.schema(
    [
        ("id", pa.uint64()),
        ("query_id", pa.uint64()),
        ("ef_search", pa.uint32()),
        ("n_probes", pa.uint32()),
        ("precision", pa.float32()),
        ("recall", pa.float32()),
        ("latency_us", pa.uint64()),
        ("cost", pa.float32()),
        ("retrieved_ids", pa.list_(pa.string())),
    ]
)


def _outcome_table(
    measured: _Measured, arms: list[_Arm], query_id_B: npt.NDArray[np.uint64], first_id: int
) -> pa.Table:
    """The block's rows; all configs of a query follow each other."""
    rows = measured.recall.size
    retrieved = measured.ids.reshape(rows, -1) >= 0
    offsets = np.concatenate([[0], np.cumsum(retrieved.sum(axis=1))]).astype(np.int32)
    found = pa.array(measured.ids.reshape(rows, -1)[retrieved]).cast(pa.string())
    columns = {
        "id": np.arange(first_id, first_id + rows),
        "query_id": np.repeat(query_id_B, len(arms)),
        "ef_search": np.tile([a.ef_search for a in arms], len(query_id_B)),
        "n_probes": np.tile([a.n_probes for a in arms], len(query_id_B)),
        "precision": measured.precision.ravel(),
        "recall": measured.recall.ravel(),
        "latency_us": measured.latency_us.ravel(),
        "cost": measured.cost.ravel(),
        "retrieved_ids": pa.ListArray.from_arrays(pa.array(offsets), found),
    }
    return pa.table([pa.array(columns[f.name]).cast(f.type) for f in _OUTCOMES], schema=_OUTCOMES)


def _query_table(queries: Queries) -> pa.Table:
    half_QD = queries.x_QD.astype(np.float16)
    x_QD = half_QD if np.array_equal(half_QD.astype(np.float32), queries.x_QD) else queries.x_QD
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(x_QD.ravel()), x_QD.shape[1])
    return pa.table({"query_id": queries.query_id, "query_embedding": embedding, "timestamp": queries.timestamp})
