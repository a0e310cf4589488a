"""Pattern indexes built on a GPU and searched on a CPU: CAGRA graphs (Ootomo et al. 2024), inverted lists by k-means.

Builds of Faiss's Python module define different names, so a build's capabilities are detected by attribute.
Suffixes: P leaves, D dims.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.errors import ConfigError

log = logging.getLogger(__name__)

Matrix = npt.NDArray[np.float32]

# the building GPU, or the first of several: rank 0, which builds the index, uses this one
FIRST_GPU = 0
# for each kind, the names that a Faiss build must define, what such a build is called, and how to install it
CUVS = ("GpuIndexCagra", "Faiss with cuVS", "pip install 'rb_gpu[gpu]'")
GPU = ("StandardGpuResources", "Faiss for GPUs", "pip install 'rb_gpu[gpu]', or 'rb_gpu[gpu-cu12]' for CUDA 12")
NEEDS = {"cagra": (GPU, CUVS), "ivf": (GPU,)}
# with fewer links per node and level, HNSW has no upper levels
LEAST_LINKS = 2


def check_capable(faiss: Any, kind: str) -> None:
    """Raises ConfigError where this Faiss build lacks what index.kind needs on a GPU."""
    for name, build, remedy in NEEDS.get(kind, ()):
        if not hasattr(faiss, name):
            raise ConfigError(
                f"index.kind={kind} on a GPU needs {build}, and Faiss {faiss.__version__} here has no {name}; "
                f"pip uninstall faiss-cpu, then {remedy}, or set index.kind=hnsw, which the CPU builds"
            )


def cagra(faiss: Any, unit_PD: Matrix, m: int, ef_construction: int) -> Any:
    """An IndexHNSWCagra on the CPU: level 0 is CAGRA's graph with 2m links per node; the CPU adds the upper levels.

    Raises ConfigError where P is too small.
    """
    leaves, dim = unit_PD.shape
    # a node can have at most as many links as there are other nodes
    links = min(m, (leaves - 1) // 2)
    if links < LEAST_LINKS:
        raise ConfigError(
            f"index.kind=cagra makes a graph of {2 * LEAST_LINKS + 1} patterns or more, and there are {leaves}; "
            "set index.kind=flat"
        )
    config = faiss.GpuIndexCagraConfig()
    config.device = FIRST_GPU
    config.graph_degree = 2 * links
    config.intermediate_graph_degree = min(2 * config.graph_degree, leaves - 1)
    resources = faiss.StandardGpuResources()
    on_gpu = faiss.GpuIndexCagra(resources, dim, faiss.METRIC_INNER_PRODUCT, config)
    on_gpu.train(unit_PD)
    index = faiss.IndexHNSWCagra()
    index.hnsw.efConstruction = ef_construction
    on_gpu.copyTo(index)
    return index


def inverted_file(faiss: Any, empty: Any, unit_PD: Matrix) -> Any:
    """Trains the empty IndexIVFFlat on the first GPU, fills it on all GPUs by shards, and returns it as a CPU index."""
    resources = faiss.StandardGpuResources()
    on_gpu = faiss.index_cpu_to_gpu(resources, FIRST_GPU, empty)
    on_gpu.cp.min_points_per_centroid = empty.cp.min_points_per_centroid
    on_gpu.train(unit_PD)
    if faiss.get_num_gpus() > 1:
        options = faiss.GpuMultipleClonerOptions()
        options.shard = True
        on_gpu = faiss.index_cpu_to_all_gpus(faiss.index_gpu_to_cpu(on_gpu), co=options)
        log.info("index: lists in shards on %d GPUs", faiss.get_num_gpus())
    on_gpu.add(unit_PD)
    return faiss.index_gpu_to_cpu(on_gpu)
