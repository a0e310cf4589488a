"""Indexes that are built on GPUs: the calls to Faiss, checked by a module that has its signatures and works on the CPU.

The signatures are those of faiss/gpu/GpuIndexCagra.h, GpuCloner.h, GpuClonerOptions.h and python/gpu_wrappers.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("faiss")
pytest.importorskip("torch")

import faiss
import torch

from rb_gpu.errors import ArtifactError, ConfigError
from rb_gpu.learn import learn
from rb_gpu.learn.config import IndexConfig
from rb_gpu.learn.index import build_index, open_faiss
from rb_gpu.search import ExactSearch, open_search

CUDA = torch.device("cuda")


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def leaves() -> np.ndarray:
    rng = np.random.default_rng(0)
    return unit(rng.normal(size=(40, 24))[rng.integers(40, size=700)] + 0.7 * rng.normal(size=(700, 24)))


class Resources:
    pass


class CagraConfig:
    """GpuIndexCagraConfig: slots refuse unknown fields, as SWIG does."""

    __slots__ = ("device", "graph_degree", "intermediate_graph_degree")


class Cagra:
    """GpuIndexCagra(provider, dims, metric, config); it keeps no copy of its training data."""

    def __init__(self, provider: Resources, dims: int, metric: int, config: CagraConfig) -> None:
        assert isinstance(provider, Resources) and isinstance(config, CagraConfig) and metric == 0
        self.dims, self.config, self.x = dims, config, None

    def train(self, x: np.ndarray) -> None:
        assert x.dtype == np.float32 and x.flags.c_contiguous and x.shape[1] == self.dims
        assert self.config.graph_degree <= self.config.intermediate_graph_degree < len(x)
        self.x = x

    def copyTo(self, index: Any) -> None:
        """As in GpuIndexCagra.cu: flat storage, M is half of the graph's degree, upper levels by the CPU's add."""
        assert type(index) is faiss.IndexHNSWCagra and not index.base_level_only
        built = faiss.IndexHNSWCagra(self.dims, self.config.graph_degree // 2, faiss.METRIC_INNER_PRODUCT)
        built.hnsw.efConstruction = index.hnsw.efConstruction
        built.add(self.x)
        storage = faiss.IndexFlatIP(self.dims)
        storage.add(self.x)
        index.d, index.ntotal, index.metric_type, index.hnsw = self.dims, len(self.x), 0, built.hnsw
        index.storage, index.own_fields, index.keep_max_size_level0 = storage, True, True
        storage.this.disown()


class OnGpu:
    """A GPU copy of an IndexIVFFlat."""

    def __init__(self, index: Any) -> None:
        self.index = faiss.clone_index(index)
        # like GpuIndexIVF::copyFrom, it does not copy the clustering's settings
        self.cp = SimpleNamespace(min_points_per_centroid=39)

    def train(self, x: np.ndarray) -> None:
        assert self.cp.min_points_per_centroid == 1 and not self.index.is_trained
        self.index.train(x)

    def add(self, x: np.ndarray) -> None:
        self.index.add(x)


class Shards:
    """IndexShards, whose ids count through all shards."""

    def __init__(self, index: Any, count: int) -> None:
        assert index.is_trained and index.ntotal == 0
        self.parts = [OnGpu(index) for _ in range(count)]

    def add(self, x: np.ndarray) -> None:
        bounds = [len(x) * i // len(self.parts) for i in range(len(self.parts) + 1)]
        for part, start, stop in zip(self.parts, bounds, bounds[1:], strict=False):
            part.index.add_with_ids(x[start:stop], np.arange(start, stop))


class Module:
    """Faiss's CPU build, plus what the GPU builds add."""

    def __init__(self, gpus: int, without: str = "") -> None:
        self.gpus, self.asked = gpus, []
        self.names = {
            "StandardGpuResources": Resources,
            "GpuIndexCagraConfig": CagraConfig,
            "GpuIndexCagra": Cagra,
            "GpuMultipleClonerOptions": lambda: SimpleNamespace(shard=False),
            "get_num_gpus": lambda: gpus,
            "index_cpu_to_gpu": self.index_cpu_to_gpu,
            "index_cpu_to_all_gpus": self.index_cpu_to_all_gpus,
            "index_gpu_to_cpu": self.index_gpu_to_cpu,
        }
        self.names.pop(without, None)

    def __getattr__(self, name: str) -> Any:
        # the CPU build has wrappers for some of these names, which call what it lacks
        if name in self.names:
            return self.names[name]
        if name.startswith(("Gpu", "Standard")):
            raise AttributeError(name)
        return getattr(faiss, name)

    def index_cpu_to_gpu(self, provider: Resources, device: int, index: Any, options: Any = None) -> OnGpu:
        assert isinstance(provider, Resources) and device == 0 and options is None
        self.asked.append("to gpu")
        return OnGpu(index)

    def index_cpu_to_all_gpus(self, index: Any, co: Any = None, ngpu: int = -1) -> Shards:
        assert co.shard and ngpu == -1
        self.asked.append("to all")
        return Shards(index, self.gpus)

    def index_gpu_to_cpu(self, gpu_index: Any) -> Any:
        self.asked.append("to cpu")
        if isinstance(gpu_index, OnGpu):
            return faiss.clone_index(gpu_index.index)
        whole = faiss.clone_index(gpu_index.parts[0].index)
        for part in gpu_index.parts[1:]:
            whole.merge_from(part.index, 0)
        return whole


def use(monkeypatch: Any, gpus: int = 1, without: str = "") -> Module:
    module = Module(gpus, without)
    monkeypatch.setitem(sys.modules, "faiss", module)
    return module


def built(leaves: np.ndarray, **settings: Any) -> bytes:
    content = build_index(leaves, IndexConfig(**settings), leaves, 5, CUDA)
    assert content is not None
    return content


def recall(leaves: np.ndarray, content: bytes, kind: str) -> float:
    rows, _ = open_search(leaves, content, kind, "index").nearest(leaves[:200], 5)
    exact, _ = ExactSearch(leaves).nearest(leaves[:200], 5)
    return float((rows[:, :, None] == exact[:, None, :]).any(2).mean())


def test_a_graph_of_a_gpu_is_read_and_searched_by_the_cpu_build(monkeypatch, leaves):
    with monkeypatch.context() as patch:
        use(patch)
        content = built(leaves, kind="cagra", m=8, ef_construction=77, recall=0.99)
    assert content[:4] == b"IHc2"
    graph = faiss.deserialize_index(np.frombuffer(content, np.uint8))
    assert type(graph) is faiss.IndexHNSWCagra and graph.hnsw.efConstruction == 77
    assert graph.hnsw.nb_neighbors(0) == 16 and graph.hnsw.max_level > 0
    assert recall(leaves, content, "cagra") >= 0.99
    search = open_search(leaves, content, "cagra", "index")
    assert search.nearest_one(leaves[3], 5)[0] == search.nearest(leaves[3:4], 5)[0][0].tolist()


def test_a_small_graph_asks_for_no_more_links_than_there_are_nodes(monkeypatch, leaves):
    use(monkeypatch)
    assert recall(leaves[:9], built(leaves[:9], kind="cagra"), "cagra") == 1.0
    with pytest.raises(ConfigError, match=r"5 patterns or more, and there are 4; set index\.kind=flat"):
        built(leaves[:4], kind="cagra")


@pytest.mark.parametrize(("gpus", "asked"), [(1, ["to gpu", "to cpu"]), (3, ["to gpu", "to cpu", "to all", "to cpu"])])
def test_inverted_lists_of_gpus_are_those_of_the_cpu(monkeypatch, leaves, gpus, asked):
    on_cpu = build_index(leaves, IndexConfig(kind="ivf"), leaves, 5)
    with monkeypatch.context() as patch:
        module = use(patch, gpus)
        content = built(leaves, kind="ivf")
    assert module.asked == asked
    assert recall(leaves, content, "ivf") == recall(leaves, on_cpu, "ivf") >= 0.99
    assert gpus > 1 or content == on_cpu


@pytest.mark.parametrize("kind", ["cagra", "ivf"])
def test_faiss_finds_the_memory_that_the_points_had(monkeypatch, leaves, kind):
    # regression: torch keeps freed memory, and Faiss, which asks the driver, found the card full after hours of
    # clustering
    module, told = use(monkeypatch), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: told.append("emptied"))
    monkeypatch.setitem(module.names, "StandardGpuResources", lambda: told.append("asked") or Resources())
    built(leaves, kind=kind)
    assert told == ["emptied", "asked"]


@pytest.mark.parametrize(
    ("kind", "without", "said"),
    [("cagra", "GpuIndexCagra", r"Faiss with cuVS.*pip install 'rb_gpu\[gpu\]'"),
     ("cagra", "StandardGpuResources", r"Faiss for GPUs"),
     ("ivf", "StandardGpuResources", r"pip uninstall faiss-cpu, then pip install 'rb_gpu\[gpu\]'.*index\.kind=hnsw")],
)  # fmt: skip
def test_a_build_that_lacks_something_is_an_error_with_the_line_that_cures_it(monkeypatch, leaves, kind, without, said):
    use(monkeypatch, without=without)
    with pytest.raises(ConfigError, match=said):
        open_faiss(IndexConfig(kind=kind), CUDA)


def test_the_cpu_build_lacks_them_and_a_cpu_builds_no_cagra(leaves):
    for kind in ("cagra", "ivf"):
        with pytest.raises(ConfigError, match=r"here has no StandardGpuResources"):
            build_index(leaves, IndexConfig(kind=kind), leaves, 5, CUDA)
    with pytest.raises(ConfigError, match=r"the job runs on cpu; set device=cuda"):
        build_index(leaves, IndexConfig(kind="cagra"), leaves, 5)
    # an index that the CPU builds is built there, even if there is a GPU
    assert build_index(leaves, IndexConfig(kind="hnsw"), leaves, 5, CUDA) is not None


def cagra_of(leaves: np.ndarray, metric: int = 0, numbers: int = 0, **fields: Any) -> bytes:
    index = faiss.IndexHNSWCagra(leaves.shape[1], 4, metric, numbers)
    index.add(leaves)
    for name, value in fields.items():
        setattr(index, name, value)
    return faiss.serialize_index(index).tobytes()


def test_a_graph_of_another_kind_is_refused(leaves):
    def opened(content: bytes) -> Any:
        return open_search(leaves, content, "cagra", "index")

    whole = cagra_of(leaves)
    opened(whole)
    for content, reason in [
        (cagra_of(leaves, metric=1), "not for inner products"),
        (cagra_of(leaves, base_level_only=True), "no upper levels"),
        (cagra_of(leaves, num_base_level_search_entrypoints=0), "no upper levels"),
        (cagra_of(leaves, numbers=faiss.Float16), "not float32"),
        (cagra_of(leaves[:-1]), "holds 699 patterns"),
        (whole[:-1], "truncated"),
        (whole + b"x", "longer than its index"),
        (whole[: whole.index(b"IxFI")] + b"IxF2" + whole[whole.index(b"IxFI") + 4 :], "not float32"),
    ]:
        with pytest.raises(ArtifactError, match=reason):
            opened(content)
    graph = faiss.deserialize_index(np.frombuffer(whole, np.uint8))
    links = faiss.vector_to_array(graph.hnsw.neighbors)
    links[3] = len(leaves)
    faiss.copy_array_to_vector(links, graph.hnsw.neighbors)
    with pytest.raises(ArtifactError, match="a neighbour points outside"):
        opened(faiss.serialize_index(graph).tobytes())


def test_what_an_index_lacks_is_said_before_anything_is_learned(learned, monkeypatch):
    def clustered(*_: Any) -> None:
        pytest.fail("hours of clustering would be lost")

    monkeypatch.setattr("rb_gpu.learn.pipeline.cluster_queries", clustered)
    with pytest.raises(ConfigError, match=r"index\.kind=cagra is built on a GPU"):
        learn(learned.trajectories, replace(learned.config, index=IndexConfig(kind="cagra")))
