"""The contestants of the suites cluster, seed, whole and classic. Runs one of the first three in a process of its own.

`python -m rb_gpu.bench.kmeans_peers` reads the settings as JSON on its standard input and prints the time and memory
as JSON. Every contestant first solves a small problem, so that compilation and thread starts are not timed. Those of
`cluster` take points (N, D), a start (K, D) and a number of iterations; those of the other suites take points, K and a
seed. All return centroids (K, D). Suffixes: N points, K clusters, D dims.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.bench.runner import answer

Matrix = npt.NDArray[np.float32]
Table = npt.NDArray[Any]
WARM_ROWS, WARM_K = 12_000, 256


def ours(x: Matrix, start: Matrix, iterations: int, code_budget: int | None = None) -> Matrix:
    """rb_gpu.learn.kmeans from the given start; a code_budget of 0 is cluster.memory=lean."""
    from rb_gpu.learn.kmeans import kmeans

    result = kmeans(x, len(start), init=start, max_iter=iterations, epsilon=0.0, device="cpu", code_budget=code_budget)
    return np.asarray(result.centroids)


def faiss(x: Matrix, start: Matrix, iterations: int) -> Matrix:
    """faiss.Kmeans from the given start, on all points instead of its default sample."""
    import faiss as library

    model = library.Kmeans(
        x.shape[1], len(start), niter=iterations, max_points_per_centroid=10**9, min_points_per_centroid=1
    )
    model.train(x, init_centroids=start)
    return np.asarray(model.centroids)


def scikit_learn(x: Matrix, start: Matrix, iterations: int) -> Matrix:
    """sklearn.cluster.KMeans from the given start, with its default algorithm, Lloyd's."""
    from sklearn.cluster import KMeans

    return np.asarray(KMeans(len(start), init=start, n_init=1, max_iter=iterations, tol=0).fit(x).cluster_centers_)


def scikit_learn_intelex(x: Matrix, start: Matrix, iterations: int) -> Matrix:
    """sklearnex.cluster.KMeans (Intel's extension) from the given start, with Lloyd's algorithm."""
    from sklearnex.cluster import KMeans

    return np.asarray(KMeans(len(start), init=start, n_init=1, max_iter=iterations, tol=0).fit(x).cluster_centers_)


def superkmeans(x: Matrix, start: Matrix, iterations: int) -> Matrix:
    """SuperKMeans without its hierarchical mode; it cannot take a start and draws its own at random."""
    from superkmeans import SuperKMeans

    model = SuperKMeans(
        len(start), x.shape[1], hierarchical=False, iters=iterations, sampling_fraction=1.0,
        max_points_per_cluster=10**9, early_termination=False, tol=0.0,
    )  # fmt: skip
    return np.asarray(model.train(x))


def plain_torch(x: Matrix, start: Matrix, iterations: int) -> Matrix:
    """Lloyd's algorithm in plain torch: matrix products and argmin in tiles, sums by index_add_."""
    import torch

    points, centroids = torch.from_numpy(x), torch.from_numpy(start).clone()
    for _ in range(iterations):
        half_K = centroids.square().sum(1) / 2
        labels = torch.cat([(half_K - rows @ centroids.T).argmin(1) for rows in torch.split(points, 8192)])
        sums = torch.zeros_like(centroids).index_add_(0, labels, points)
        counts = torch.bincount(labels, minlength=len(centroids))[:, None]
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    return centroids.numpy()


def seed_ours(x: Matrix, k: int, seed: int) -> Matrix:
    """rb_gpu.learn.kmeans_plus_plus: exact D² sampling, in blocks of seeds."""
    from rb_gpu.learn.kmeans import kmeans_plus_plus

    return np.asarray(kmeans_plus_plus(x, k, seed=seed, device="cpu")[0])


def seed_sequential(x: Matrix, k: int, seed: int) -> Matrix:
    """Exact D² sampling in torch, one seed after the other."""
    import torch

    points, generator = torch.from_numpy(x), torch.Generator().manual_seed(seed)
    norm_N = points.square().sum(1)
    rows = [int(torch.randint(len(x), (1,), generator=generator))]
    d2_N = torch.full((len(x),), torch.inf)
    while len(rows) < k:
        last = points[rows[-1]]
        d2_N = torch.minimum(d2_N, (norm_N + last.dot(last) - 2 * (points @ last)).clamp_(min=0))
        running_N = d2_N.cumsum(0, dtype=torch.float64)
        target = torch.rand((), dtype=torch.float64, generator=generator) * running_N[-1]
        rows.append(min(len(x) - 1, int(torch.searchsorted(running_N, target))))
    return x[rows]


def seed_faiss(x: Matrix, k: int, seed: int) -> Matrix:
    """Faiss's k-means++ seeding, without iterations."""
    import faiss as library

    model = library.Kmeans(
        x.shape[1], k, niter=0, seed=seed + 1, max_points_per_centroid=10**9, min_points_per_centroid=1,
        init_method=library.ClusteringInitMethod_KMEANS_PLUS_PLUS,
    )  # fmt: skip
    model.train(x)
    return np.asarray(model.centroids)


def whole_ours(x: Matrix, k: int, seed: int) -> Matrix:
    """rb_gpu.learn.kmeans with default settings."""
    from rb_gpu.learn.kmeans import kmeans

    return np.asarray(kmeans(x, k, seed=seed, device="cpu").centroids)


def whole_scikit_learn(x: Matrix, k: int, seed: int) -> Matrix:
    """sklearn.cluster.KMeans with default settings: greedy k-means++, one start, Lloyd's algorithm."""
    from sklearn.cluster import KMeans

    return np.asarray(KMeans(k, random_state=seed).fit(x).cluster_centers_)


def whole_faiss(x: Matrix, k: int, seed: int) -> Matrix:
    """faiss.Kmeans with default settings: a random start, 25 iterations on a sample of at most 256 points a cluster."""
    import faiss as library

    model = library.Kmeans(x.shape[1], k, seed=seed + 1)
    model.train(x)
    return np.asarray(model.centroids)


def scikit_learn_starts(n_init: int, x: Table, k: int, seed: int) -> Table:
    """sklearn.cluster.KMeans, the best of n_init starts; its default is 1 with greedy k-means++."""
    from sklearn.cluster import KMeans

    return np.asarray(KMeans(k, n_init=n_init, random_state=seed).fit(x).cluster_centers_)


def faiss_starts(n_init: int, x: Table, k: int, seed: int) -> Table:
    """faiss.Kmeans on all points, the best of n_init starts of 25 iterations."""
    import faiss as library

    model = library.Kmeans(
        x.shape[1], k, nredo=n_init, seed=seed + 1, max_points_per_centroid=10**9, min_points_per_centroid=1
    )
    model.train(x.astype(np.float32))
    return np.asarray(model.centroids)


CLUSTER: dict[str, Callable[[Matrix, Matrix, int], Matrix]] = {
    "ours": ours,
    "ours, lean": partial(ours, code_budget=0),
    "faiss": faiss,
    "scikit-learn": scikit_learn,
    "scikit-learn-intelex": scikit_learn_intelex,
    "SuperKMeans": superkmeans,
    "plain torch": plain_torch,
}
SEED: dict[str, Callable[[Matrix, int, int], Matrix]] = {
    "ours": seed_ours,
    "sequential torch": seed_sequential,
    "faiss": seed_faiss,
}
WHOLE: dict[str, Callable[[Matrix, int, int], Matrix]] = {
    "ours": whole_ours,
    "scikit-learn": whole_scikit_learn,
    "faiss": whole_faiss,
}
CLASSIC: dict[str, Callable[[Table, int, int], Table]] = {
    "ours": whole_ours,
    "scikit-learn": partial(scikit_learn_starts, 1),
    "scikit-learn x10": partial(scikit_learn_starts, 10),
    "faiss": partial(faiss_starts, 1),
    "faiss x10": partial(faiss_starts, 10),
}
CONTESTANTS: dict[str, dict[str, Any]] = {"cluster": CLUSTER, "seed": SEED, "whole": WHOLE}


def resident(which: str) -> int:
    """Resident memory of this process in bytes: now for `which` VmRSS, at its peak for VmHWM; 0 without /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(which)), 0)


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Times one call and saves its centroids to settings["out"]. Returns its seconds (for `cluster` also the peak
    memory over that before the call), or the name of the library that is missing.
    """
    try:
        return _timed(settings)
    except ImportError as error:
        return {"missing": str(error.name)}


def _timed(settings: dict[str, Any]) -> dict[str, Any]:
    x = np.array(np.load(settings["x"], mmap_mode="r")[: settings["n"]])
    k, rng = settings["k"], np.random.default_rng([7, settings["seed"]])
    few = x[:WARM_ROWS]
    if settings["suite"] != "cluster":
        call = CONTESTANTS[settings["suite"]][settings["name"]]
        call(few, WARM_K, 0)
        started = time.perf_counter()
        centroids = call(x, k, settings["seed"])
    else:
        fit, start = CLUSTER[settings["name"]], x[rng.choice(len(x), k, replace=False)].copy()
        fit(few, few[:WARM_K].copy(), 2)
        before = resident("VmRSS")
        with suppress(OSError):  # resets VmHWM, so that the peak is that of this call
            Path("/proc/self/clear_refs").write_text("5")
        started = time.perf_counter()
        centroids = fit(x, start, settings["iterations"])
    seconds = time.perf_counter() - started
    peak = resident("VmHWM")
    np.save(settings["out"], np.ascontiguousarray(centroids, dtype=np.float32))
    over = {} if settings["suite"] != "cluster" else {"peak_bytes_over_start": peak - before}
    return {"seconds": seconds, **over}


if __name__ == "__main__":
    answer(run)
