"""The Faiss pattern index over unit leaf centroids (inner product is cosine). Suffixes: P leaves, D dims, B queries."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rb_gpu.errors import ConfigError
from rb_gpu.index_file import MAX_BREADTH
from rb_gpu.learn.checks import is_auto
from rb_gpu.learn.config import IndexConfig
from rb_gpu.learn.distances import normalise_, normalised
from rb_gpu.learn.hierarchy import unit_rows
from rb_gpu.learn.index_device import cagra, check_capable, inverted_file
from rb_gpu.learn.kmeans import nearest
from rb_gpu.search import ExactSearch, FaissSearch

log = logging.getLogger(__name__)

Matrix = npt.NDArray[np.float32]

HOST = torch.device("cpu")
# number of queries on which the breadth of a search is tuned
TUNING_QUERIES = 1000
# share of training queries that lie farther from every pattern than the automatic floor
FLOOR_QUANTILE = 0.001


def similarity_floor(x_QD: torch.Tensor, leaves_PD: Matrix, device: torch.device, engine: str = "auto") -> float:
    """The cosine to the nearest leaf that all but FLOOR_QUANTILE of the training queries reach in every lookup."""
    _, d2 = nearest(normalised(x_QD), normalise_(torch.from_numpy(leaves_PD.copy())), device, engine)
    # where few embeddings repeat, many queries lie at the quantile itself, but for the rounding of norms and of a
    # float32 product (Higham 2002, section 3.1), which is not the same in every lookup
    rounding: float = (leaves_PD.shape[1] + 4) * float(np.finfo(np.float32).eps)
    return float(np.quantile(np.minimum(1.0 - d2.numpy() / 2.0, 1.0), FLOOR_QUANTILE)) - rounding


def open_faiss(config: IndexConfig, device: torch.device) -> Any:
    """The Faiss module, or None where index.kind is off. Raises ConfigError where Faiss is missing, or its build lacks
    what this kind needs on this device.
    """
    if config.kind == "off":
        return None
    if config.kind == "cagra" and device.type != "cuda":
        raise ConfigError(
            f"index.kind=cagra is built on a GPU, and the job runs on {device.type}; set device=cuda, or "
            "index.kind=hnsw, which the CPU builds"
        )
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            f"index.kind={config.kind} needs Faiss; pip install 'rb_gpu[cpu]' (or [gpu]), or set index.kind=off"
        ) from error
    if device.type == "cuda":
        check_capable(faiss, config.kind)
    return faiss


def build_index(
    leaves_PD: Matrix,
    config: IndexConfig,
    queries_BD: Matrix,
    top_k: int,
    device: torch.device = HOST,
) -> bytes | None:
    """The serialised index, readable by Faiss's CPU build; None where index.kind is off.

    HNSW vectors are stored in 8 bits per dim: the index is a quarter as large and searched in about half the time, and
    the lookup re-ranks its candidates exactly. If its breadth (efSearch, nprobe) is auto, it is the least that finds
    index.recall of the top_k leaves nearest to queries_BD. Raises ConfigError where Faiss is missing or lacks something
    (open_faiss), nlist exceeds P, or P is too small for a graph.
    """
    faiss = open_faiss(config, device)
    if faiss is None:
        return None
    unit_PD = np.ascontiguousarray(unit_rows(leaves_PD))
    index = _filled_index(faiss, unit_PD, config, device)
    if config.kind != "flat":
        stride = max(1, len(queries_BD) // TUNING_QUERIES)
        queries_BD = unit_rows(queries_BD[::stride][:TUNING_QUERIES])
        breadth, recall = _tune(faiss, index, unit_PD, queries_BD, config, top_k)
        level = logging.INFO if recall >= config.recall else logging.WARNING
        log.log(
            level, "index: %s, leaves: %d, breadth %d, recall@%d %.4f (index.recall=%g)",
            config.kind, len(unit_PD), breadth, top_k, recall, config.recall,
        )  # fmt: skip
    return bytes(faiss.serialize_index(index).tobytes())


def _filled_index(faiss: Any, unit_PD: Matrix, config: IndexConfig, device: torch.device) -> Any:
    if device.type == "cuda":
        # Faiss allocates from the driver, while torch's cache still holds the memory that the points had used
        torch.cuda.empty_cache()
    if config.kind == "cagra":
        return cagra(faiss, unit_PD, config.m, config.ef_construction)
    index = _empty_index(faiss, len(unit_PD), unit_PD.shape[1], config)
    if config.kind == "ivf" and device.type == "cuda":
        return inverted_file(faiss, index, unit_PD)
    if not index.is_trained:
        index.train(unit_PD)
    index.add(unit_PD)
    return index


def _empty_index(faiss: Any, leaves: int, dim: int, config: IndexConfig) -> Any:
    if config.kind == "hnsw":
        kind = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexHNSWSQ(dim, kind, config.m, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = config.ef_construction
        return index
    if config.kind == "ivf":
        nlist = max(1, math.isqrt(leaves)) if is_auto(config.nlist) else int(config.nlist)
        if nlist > leaves:
            raise ConfigError(f"index.nlist={nlist} exceeds the {leaves} patterns; lower it or set index.nlist=auto")
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, nlist, faiss.METRIC_INNER_PRODUCT)
        # there are few patterns, so all of them are training points, and Faiss's warning about that does not apply
        index.cp.min_points_per_centroid = 1
        return index
    return faiss.IndexFlatIP(dim)


def _tune(
    faiss: Any, index: Any, unit_PD: Matrix, queries_BD: Matrix, config: IndexConfig, top_k: int
) -> tuple[int, float]:
    """Sets the index's search breadth and returns it with the recall that it reaches."""
    wanted, most = (config.nprobe, index.nlist) if config.kind == "ivf" else (config.ef_search, len(unit_PD))
    most = min(most, MAX_BREADTH)
    exact, _ = ExactSearch(unit_PD).nearest(queries_BD, top_k)
    search = FaissSearch(index, config.kind, unit_PD, faiss.swig_ptr)
    # powers of 2 and the values halfway between them, up to the whole index
    grid = [min(2**i * part // 2, most) for i in range(1, 18) for part in (2, 3)] if is_auto(wanted) else [int(wanted)]
    for breadth in grid:
        if config.kind == "ivf":
            index.nprobe = breadth
        else:
            index.hnsw.efSearch = breadth
        found, _ = search.nearest(queries_BD, top_k)
        recall = float((found[:, :, None] == exact[:, None, :]).any(2).mean())
        if recall >= config.recall or breadth == most:
            break
    return breadth, recall
