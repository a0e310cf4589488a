"""The suite lookup: the latency of a whole answer of the bank, next to libraries that only search, on the same patterns
and queries in one run.

Suffixes: P patterns, Q queries, D dims, K neighbours, M landmarks, R projection axes of the landmarks.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu import ReasoningBank
from rb_gpu.bank_data import ARRAYS, BankData, LookupSettings
from rb_gpu.bench.runner import answer, each_call_us, fresh_median, in_process, interleaved, machine, optional, seconds
from rb_gpu.evidence import LATENCY_BINS, OUTCOMES
from rb_gpu.field import FIELD_ARRAYS
from rb_gpu.objective import Objective
from rb_gpu.publish import write_artifact
from rb_gpu.search import product_is_faster

Matrix = npt.NDArray[np.float32]
Search = Callable[[Matrix], npt.NDArray[np.int64]]

TOP_K = 5
M, EF_CONSTRUCTION, EF_SEARCH = 32, 200, 64
SMALL_BANK = 1024
WITH_FIELD = "ours, with a field"
FRESH_STARTS = 9
EXACT_QUERIES = 100

IMPORT = "import numpy, time; t = time.perf_counter(); import rb_gpu; print((time.perf_counter() - t) * 1e3)"
# modules that the load itself imports count towards its time and memory
LOAD = (
    "import gc, resource, time; from rb_gpu import ReasoningBank; import numpy as np\n"
    "def resident(): return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()\n"
    "gc.collect(); before = resident(); t = time.perf_counter(); bank = ReasoningBank.load({path!r})\n"
    "loaded = time.perf_counter(); bank.optimized_params(np.ones(bank.dim, np.float32)); first = time.perf_counter()\n"
    "print({what})"
)


def embeddings(count: int, dim: int, seed: int) -> Matrix:
    """(count, D) float32 unit rows that resemble sentence embeddings: 200 topics, 30 intrinsic dims, a little noise.

    The topics and the intrinsic subspace are the same for every seed; the noise is in all D dimensions.
    """
    shared, rng = np.random.default_rng(0), np.random.default_rng([1, seed])
    intrinsic = min(30, dim)
    basis_ID = np.linalg.qr(shared.normal(size=(dim, intrinsic)))[0].T
    topics = shared.normal(size=(200, intrinsic))
    x = (topics[rng.integers(200, size=count)] + 0.6 * rng.normal(size=(count, intrinsic))) @ basis_ID
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x += 0.3 * rng.normal(size=x.shape) / np.sqrt(dim)
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), dtype=np.float32)


def bank_of(centroids_PD: Matrix, configs: int, kind: str, seed: int, landmarks_MR: Matrix | None = None) -> BankData:
    """A bank over the given leaf centroids with random scores per config, so that votes differ between queries.

    landmarks_MR: if given, the bank also has a field, the kernel regression on landmarks (rb_gpu/field.py).
    """
    rng, (patterns, dim) = np.random.default_rng(seed), centroids_PD.shape
    sizes = {"A": patterns, "P": patterns, "U": patterns + 1, "C": configs, "D": dim, "O": len(OUTCOMES)}
    sizes["B"] = LATENCY_BINS
    arrays: dict[str, npt.NDArray[Any]] = {
        name: np.zeros([sizes[axis] for axis in axes], dtype) for name, (dtype, axes) in ARRAYS.items()
    }
    arrays |= {
        "centroids": centroids_PD,
        "pattern_id": np.arange(patterns, dtype=np.uint64),
        "parent": np.full(patterns, -1),
        "config_ef_search": np.arange(1, configs + 1, dtype=np.uint32) * 16,
        "verdict_stands": np.ones(patterns, np.uint8),
        "evidence_rows": np.ones((patterns, configs), np.int64),
    }
    for name in ("score", "probability", "gain", "expected_quality"):
        arrays[name] = rng.random((patterns + 1, configs), dtype=np.float32)
    for prefix in ("config", "optimal"):
        for column in ("ef_search", "n_probes", "context_tokens"):
            arrays[f"{prefix}_{column}"] = np.maximum(arrays[f"{prefix}_{column}"], 1)
    if landmarks_MR is not None:
        landmarks, axes = landmarks_MR.shape
        sizes |= {"M": landmarks, "S": 2, "F": 2 * landmarks, "R": axes}
        arrays |= {
            name: np.zeros([sizes[axis] for axis in axes], dtype) for name, (dtype, axes) in FIELD_ARRAYS.items()
        }
        arrays["field_slopes"] = np.array([2.0, 4.0])
        arrays["field_axes"] = np.linalg.qr(rng.normal(size=(dim, axes)))[0].T.astype(np.float32)
        arrays["field_landmarks"] = landmarks_MR
        arrays["field_coef"] = rng.normal(0.0, 0.01, arrays["field_coef"].shape).astype(np.float32)
        for name, far in (("low", -1.0), ("high", 1.0), ("gain_low", -1.0), ("gain_high", 1.0), ("test_sd", 0.1)):
            arrays[f"field_{name}"][:] = far
    return BankData(
        arrays=arrays,
        tiers=("auto",),
        default=0,
        metric="cosine",
        embedder="none",
        method="eb",
        grade="associational",
        objective=Objective("utility", "f1", 0.02, 0.2, 1000.0, 1.0, 0.95, None, None),
        lookup=LookupSettings(TOP_K, 16.0, -1.0, 0.5, False, True),
        facts={"index": {"kind": kind}},
    )


def searches(centroids_PD: Matrix) -> dict[str, Search | None]:
    """The peers' searches by name: each maps a unit query (D,) to its TOP_K rows; None if a peer is not installed."""
    peers: dict[str, Search | None] = {"numpy exact": _numpy(centroids_PD)}
    faiss, hnswlib, usearch = optional("faiss"), optional("hnswlib"), optional("usearch.index")
    patterns, dim = centroids_PD.shape
    for name in ("faiss flat", "faiss HNSW", "hnswlib", "usearch"):
        peers[name] = None
    if faiss is not None:
        flat, graph = faiss.IndexFlatIP(dim), faiss.IndexHNSWFlat(dim, M, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction, graph.hnsw.efSearch = EF_CONSTRUCTION, EF_SEARCH
        flat.add(centroids_PD)
        graph.add(centroids_PD)
        peers["faiss flat"] = lambda q: flat.search(q[None], TOP_K)[1][0]
        peers["faiss HNSW"] = lambda q: graph.search(q[None], TOP_K)[1][0]
    if hnswlib is not None:
        index = hnswlib.Index(space="ip", dim=dim)
        index.init_index(max_elements=patterns, M=M, ef_construction=EF_CONSTRUCTION)
        index.add_items(centroids_PD)
        index.set_ef(EF_SEARCH)
        index.set_num_threads(1)
        peers["hnswlib"] = lambda q: index.knn_query(q, TOP_K)[0][0]
    if usearch is not None:
        other = usearch.Index(
            ndim=dim, metric="ip", connectivity=M, expansion_add=EF_CONSTRUCTION, expansion_search=EF_SEARCH
        )
        other.add(np.arange(patterns), centroids_PD)
        peers["usearch"] = lambda q: other.search(q, TOP_K).keys
    return peers


def _numpy(centroids_PD: Matrix) -> Search:
    def search(query: Matrix) -> npt.NDArray[np.int64]:
        cosine = centroids_PD @ query
        rows = np.argpartition(-cosine, TOP_K)[:TOP_K]
        return rows[np.argsort(-cosine[rows])]

    return search


def publish(folder: Path, centroids_PD: Matrix, queries_QD: Matrix, configs: int, seed: int) -> tuple[Path, Path]:
    """Writes two artifacts, without and with a field, and returns their folders. They have an HNSW index as a job would
    build it, unless an exact product is faster at this size or Faiss is missing.
    """
    from rb_gpu.learn.config import IndexConfig
    from rb_gpu.learn.index import build_index
    from rb_gpu.learn.landmarks import AXES, LANDMARKS

    kind = "off" if product_is_faster(*centroids_PD.shape) or optional("faiss") is None else "hnsw"
    index = build_index(centroids_PD, IndexConfig(kind=kind), queries_QD, TOP_K)
    files = {} if index is None else {"index.faiss": index}
    landmarks = embeddings(LANDMARKS, min(AXES + 1, centroids_PD.shape[1]), 2 * seed + 10**8)
    for name, beside in (("bank", None), ("field", landmarks)):
        write_artifact(folder / name, bank_of(centroids_PD, configs, kind, seed, beside), files)
    return folder / "bank", folder / "field"


@contextmanager
def all_cores() -> Iterator[None]:
    """Lets Faiss use all cores inside the block, as hnswlib and usearch do by default, so that indexes are built with
    all cores; afterwards Faiss searches with one thread.
    """
    faiss = optional("faiss")
    if faiss is None:
        yield
        return
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    yield
    faiss.omp_set_num_threads(1)


def truly_nearest(centroids_PD: Matrix, queries_QD: Matrix) -> npt.NDArray[np.int64]:
    """The rows (Q, K) of the TOP_K largest cosines, computed in float64, unordered; in small batches to save memory."""
    wide_DP = centroids_PD.astype(np.float64).T
    parts = np.split(queries_QD.astype(np.float64), range(EXACT_QUERIES, len(queries_QD), EXACT_QUERIES))
    return np.concatenate([np.argpartition(-(part @ wide_DP), TOP_K - 1)[:, :TOP_K] for part in parts])


def one_size(folder: Path, patterns: int, settings: dict[str, Any]) -> dict[str, Any]:
    """p50, p99 and recall of every contestant at one number of patterns, and the bank's throughput with batches and
    threads.
    """
    dim, rounds, seed = settings["dim"], settings["rounds"], settings["seed"]
    centroids = embeddings(patterns, dim, 2 * seed)
    queries = embeddings(settings["distinct_queries"], dim, 2 * seed + 1)
    tuning = embeddings(1000, dim, 2 * seed + 10**6)  # the index is tuned on other queries than it is measured on
    with all_cores():
        published = publish(folder / str(patterns), centroids, tuning, settings["configs"], seed)
        bank, fielded = (ReasoningBank.load(path) for path in published)
        peers = searches(centroids)
    exact = truly_nearest(centroids, queries)
    ours: Search = lambda q: np.array([match.pattern.id for match in bank.find_similar_patterns(q, TOP_K)])  # noqa: E731
    calls: dict[str, Callable[[Matrix], Any]] = {name: search for name, search in peers.items() if search is not None}
    similar = partial(bank.find_similar_patterns, k=TOP_K)
    whole = {"ours, whole answer": bank.optimized_params, WITH_FIELD: fielded.optimized_params}
    calls = {**whole, "ours, search": similar, **calls}
    # every round uses other queries, so that none is answered from a cache
    blocks = [list(block) for block in np.array_split(queries, rounds)]

    def percentiles(call: Callable[[Matrix], Any], turn: int) -> npt.NDArray[np.float64]:
        return np.quantile(each_call_us(call, blocks[turn % rounds]), [0.5, 0.99])

    taken_us = interleaved({name: partial(percentiles, call) for name, call in calls.items()}, rounds, seed)
    rows: dict[str, Any] = {name: "not installed" for name, search in peers.items() if search is None}
    for name, percentiles_us in taken_us.items():
        search = ours if name.startswith("ours") else calls[name]
        found = np.array([search(query) for query in queries]).astype(np.int64)
        rows[name] = {
            "p50_us": float(np.median(percentiles_us[:, 0])),
            "p99_us": float(np.median(percentiles_us[:, 1])),
            "recall": float((found[:, :, None] == exact[:, None, :]).any(2).mean()),
        }
    return {"patterns": patterns, "search": bank.search_name, "rows": rows, **_many(bank, centroids, settings)}


def _many(bank: ReasoningBank, centroids_PD: Matrix, settings: dict[str, Any]) -> dict[str, Any]:
    """Queries per second of a batch, of the bare matrix product of the same size, of one thread and of many threads."""
    batch = embeddings(settings["batch"], settings["dim"], settings["seed"] + 10**7)
    some = list(batch[:2000])

    def by_threads(count: int) -> None:
        def look_up(share: list[Matrix]) -> None:
            for query in share:
                bank.optimized_params(query)

        workers = [threading.Thread(target=look_up, args=(some[i::count],)) for i in range(count)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    many = settings["threads"]
    taken = interleaved(
        {
            "product": lambda _: seconds(lambda: batch @ centroids_PD.T),
            "batch": lambda _: seconds(lambda: bank.optimized_params_batch(batch)),
            "one thread": lambda _: seconds(lambda: by_threads(1)),
            "threads": lambda _: seconds(lambda: by_threads(many)),
        },
        settings["rounds"],
        settings["seed"],
    )
    median = {name: float(np.median(found)) for name, found in taken.items()}
    return {
        "product_queries_per_s": len(batch) / median["product"],
        "batch_queries_per_s": len(batch) / median["batch"],
        "batch_share_of_product": float(np.median(taken["product"] / taken["batch"])),
        "one_thread_queries_per_s": len(some) / median["one thread"],
        "threads_queries_per_s": len(some) / median["threads"],
    }


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Measures all sizes, then the import, load, memory and first answer, each in new processes."""
    with tempfile.TemporaryDirectory(prefix="rb_gpu-benchmark-") as name:
        folder = Path(name)
        sizes = [one_size(folder, patterns, settings) for patterns in settings["patterns"]]
        small = embeddings(SMALL_BANK, settings["dim"], settings["seed"])
        path = folder / "small"
        write_artifact(path, bank_of(small, settings["configs"], "off", settings["seed"]), {})
        size = sum(file.stat().st_size for file in path.iterdir())

        def fresh(what: str) -> float:
            return fresh_median(LOAD.format(path=str(path), what=what), FRESH_STARTS)

        once = {
            "import_ms": fresh_median(IMPORT, FRESH_STARTS),
            "load_ms": fresh("(loaded - t) * 1e3"),
            "first_answer_us": fresh("(first - loaded) * 1e6"),
            "artifact_bytes": size,
            "resident_over_file_size": fresh(f"(resident() - before) / {size} - 1"),
        }
    return {"suite": "lookup", "settings": settings, "machine": machine(), "sizes": sizes, "process": once}


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Calls `run` in a process of its own with one BLAS thread. Raises RuntimeError if it fails."""
    result: dict[str, Any] = in_process("rb_gpu.bench.lookup", settings, threads=1)
    return result


if __name__ == "__main__":
    answer(run)
