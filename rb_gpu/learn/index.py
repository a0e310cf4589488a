"""The Faiss pattern index over unit leaf centroids (inner product is cosine). Suffixes: P leaves, D dims."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.errors import ConfigError
from rb_gpu.learn.config import IndexConfig, is_auto
from rb_gpu.learn.hierarchy import unit_rows


def build_index(leaves_PD: npt.NDArray[np.float32], config: IndexConfig) -> bytes | None:
    """The serialised index, None where index.kind is off. Raises ConfigError where Faiss is missing or nlist > P."""
    if config.kind == "off":
        return None
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            f"index.kind={config.kind} needs Faiss; pip install 'rb_gpu[cpu]' (or [gpu]), or set index.kind=off"
        ) from error
    unit_PD = np.ascontiguousarray(unit_rows(leaves_PD))
    index = _empty_index(faiss, len(unit_PD), unit_PD.shape[1], config)
    if not index.is_trained:
        index.train(unit_PD)
    index.add(unit_PD)
    return bytes(faiss.serialize_index(index).tobytes())


def _empty_index(faiss: Any, leaves: int, dim: int, config: IndexConfig) -> Any:
    if config.kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, config.m, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = config.ef_construction
        index.hnsw.efSearch = config.ef_search
        return index
    if config.kind == "ivf":
        nlist = max(1, math.isqrt(leaves)) if is_auto(config.nlist) else int(config.nlist)
        if nlist > leaves:
            raise ConfigError(f"index.nlist={nlist} exceeds the {leaves} patterns; lower it or set index.nlist=auto")
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, nlist, faiss.METRIC_INNER_PRODUCT)
        # patterns are few already: every one is a training point, and Faiss's advice on more does not apply
        index.cp.min_points_per_centroid = 1
        index.nprobe = config.nprobe
        return index
    return faiss.IndexFlatIP(dim)
