"""The suites cluster, seed and whole: k-means compared with other libraries, each call in a process of its own, in
interleaved rounds. `cluster` times Lloyd iterations, `seed` the seeding, `whole` a full call with default settings.

Suffixes: N points, K clusters, D dims.
"""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rb_gpu.bench.kmeans_peers import CONTESTANTS
from rb_gpu.bench.runner import in_process, interleaved, machine
from rb_gpu.errors import ConfigError
from rb_gpu.learn.kmeans import nearest

Matrix = npt.NDArray[np.float32]
TOPICS, INTRINSIC, BLOBS = 2000, 30, 32
EXACT_ROWS = 2000
PEAK_SIZE, PEAK_ROUNDS = 3072, 7


def emb(n: int, dim: int, seed: int) -> Matrix:
    """(n, D) float32 unit rows that resemble sentence embeddings: 2,000 topics of heavy-tailed sizes, 30 intrinsic
    dimensions, and a little noise in all D.
    """
    rng = np.random.default_rng([2, seed])
    share = rng.pareto(1.1, TOPICS) + 0.05
    topic = rng.choice(TOPICS, n, p=share / share.sum())
    centre = rng.standard_normal((TOPICS, INTRINSIC))
    width = 0.55 * np.exp(0.3 * rng.standard_normal(TOPICS))
    z = (centre[topic] + width[topic, None] * rng.standard_normal((n, INTRINSIC))).astype(np.float32)
    axes = np.linalg.qr(rng.standard_normal((dim, INTRINSIC)))[0].astype(np.float32)
    x = z @ axes.T + np.float32(0.02 * INTRINSIC**0.5) * rng.standard_normal((n, dim), dtype=np.float32)
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), dtype=np.float32)


def gauss(n: int, dim: int, seed: int) -> Matrix:
    """(n, D) float32 independent normal numbers: no structure, the worst case for algorithms that prune by bounds."""
    return np.random.default_rng([1, seed]).standard_normal((n, dim), dtype=np.float32)


def blobs(n: int, dim: int, seed: int) -> Matrix:
    """(n, D) float32 points in 32 round clusters, the usual demo data; some clusters overlap if D is small."""
    rng = np.random.default_rng([3, seed])
    centre = rng.uniform(-10, 10, (BLOBS, dim))
    return np.asarray(centre[rng.integers(BLOBS, size=n)] + 2 * rng.standard_normal((n, dim)), dtype=np.float32)


def points(name: str, settings: dict[str, Any]) -> Matrix:
    """The points (n, D) float32 named by `emb`, `gauss` (with D/3 dims), `blobs` or the path of a .npy file.

    Raises ConfigError for any other name, for a .npy file that is not 2-D, and for emb with D < 30.
    """
    if name == "blobs":
        return blobs(settings["n"], settings["dim"], settings["seed"])
    if name in ("emb", "gauss"):
        dim = settings["dim"] if name == "emb" else max(2, settings["dim"] // 3)
        if name == "emb" and dim < INTRINSIC:
            raise ConfigError(f"dim={dim} is below the {INTRINSIC} intrinsic dims of points=emb; raise it")
        return (emb if name == "emb" else gauss)(settings["n"], dim, settings["seed"])
    try:
        x = np.load(name, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"points={name} is neither emb, gauss, blobs nor a .npy file ({error}); name one of them"
        ) from error
    if x.ndim != 2:
        raise ConfigError(f"points={name} has shape {x.shape}; store an (N, D) matrix")
    return np.array(x[: settings["n"]], dtype=np.float32)


def sgemm_peak() -> float:
    """GFLOP/s of torch's float32 matrix product, the best of PEAK_ROUNDS runs on square matrices."""
    left, right = torch.randn(2, PEAK_SIZE, PEAK_SIZE).unbind()
    taken = []
    for _ in range(PEAK_ROUNDS):
        started = time.perf_counter()
        torch.mm(left, right)
        taken.append(time.perf_counter() - started)
    return 2 * PEAK_SIZE**3 / min(taken) / 1e9


def inertia(x_ND: Matrix, centroids_KD: Matrix) -> tuple[float, float]:
    """Σ ||x − c||² over the nearest centroids, and the share of the checked rows (about EXACT_ROWS) whose nearest
    centroid agrees with a float64 brute-force search.
    """
    x, centroids = torch.from_numpy(x_ND), torch.from_numpy(centroids_KD)
    labels_N, d2_N = nearest(x, centroids, torch.device("cpu"))
    rows = slice(None, None, max(1, len(x) // EXACT_ROWS))
    differences = (
        (x[i].double() - centroids.double()).square().sum(1).argmin() == labels_N[i] for i in range(len(x))[rows]
    )
    right = [bool(same) for same in differences]
    return float(d2_N.sum(dtype=torch.float64)), float(np.mean(right))


def best_kernels() -> dict[str, str]:
    """Environment variables that make the OpenBLAS inside faiss-cpu use this processor's widest vector instructions."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.is_file() else ""
    kind = "SKYLAKEX" if "avx512f" in flags else "HASWELL" if "avx2" in flags else ""
    return {"OPENBLAS_CORETYPE": kind} if kind else {}


def one_case(x: Matrix, name: str, k: int, suite: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Times all contestants on one matrix and one k; the median seconds and inertia of each, as a row of the result."""
    np.save(folder / "x.npy", x)
    known = CONTESTANTS[suite]
    contestants = [one for one in known if one.startswith("ours") or one in settings["peers"]]
    rows: dict[str, Any] = {}
    memory: dict[str, int] = {}
    quality: dict[str, tuple[float, float]] = {}

    def call(contestant: str, environment: dict[str, str], turn: int) -> npt.NDArray[np.float64]:
        given = {
            "suite": suite, "name": contestant, "x": str(folder / "x.npy"), "n": len(x), "k": k,
            "iterations": settings["iterations"],
            "seed": settings["seed"] if suite == "cluster" else turn, "out": str(folder / f"{contestant}.npy"),
        }  # fmt: skip
        found = in_process("rb_gpu.bench.kmeans_peers", given, threads=os.cpu_count() or 1, environment=environment)
        if "missing" in found:
            rows[contestant] = f"{found['missing']} is not installed"
            return np.array([np.nan, np.nan])
        memory[contestant] = max(memory.get(contestant, 0), found.get("peak_bytes_over_start", 0))
        if suite != "cluster" or turn == 1:
            quality[contestant] = inertia(x, np.load(folder / f"{contestant}.npy"))
        return np.array([found["seconds"], quality[contestant][0]])

    calls = {
        contestant: partial(call, contestant, best_kernels() if contestant == "faiss" else {})
        for contestant in contestants
    }
    taken = interleaved(calls, settings["rounds"], settings["seed"], warm=False)
    for contestant, samples in taken.items():
        if contestant in rows:
            continue
        seconds = float(np.median(samples[:, 0]))
        row = {"seconds": seconds, "all_seconds": samples[:, 0].tolist(), "inertia": float(np.median(samples[:, 1]))}
        if suite == "cluster":
            row["gflops"] = 2 * x.size * k * settings["iterations"] / seconds / 1e9
            row["peak_bytes_over_start"] = memory[contestant]
        rows[contestant] = row
    return {
        "data": name, "n": len(x), "dim": x.shape[1], "k": k,
        "exact_share": min(share for _, share in quality.values()),
        "rows": {contestant: rows[contestant] for contestant in contestants},
    }  # fmt: skip


def measure(suite: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Runs the suite on every data set and every number of clusters.

    Raises ConfigError for unusable data or more clusters than rows, and RuntimeError if a contestant fails.
    """
    cases = []
    with tempfile.TemporaryDirectory(prefix="rb_gpu-benchmark-") as folder:
        for name in settings["points"]:
            x = points(name, settings)
            for k in settings["clusters"]:
                if k > len(x):
                    raise ConfigError(f"clusters={k} exceeds the {len(x)} rows of points={name}; lower it")
                cases.append(one_case(x, name, k, suite, settings, Path(folder)))
    peak = sgemm_peak()
    for case in cases:
        for row in case["rows"].values():
            if isinstance(row, dict) and "gflops" in row:
                row["share_of_sgemm_peak"] = row["gflops"] / peak
    facts = {**machine(), "sgemm_peak_gflops": peak, "faiss_environment": best_kernels()}
    return {"suite": suite, "settings": settings, "machine": facts, "cases": cases}
