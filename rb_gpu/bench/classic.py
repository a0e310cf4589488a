"""The suite classic: quality and time of k-means on small classical tables, next to scikit-learn and faiss.

Tables are scikit-learn's bundled ones and generators of well-known synthetic families (Fränti & Sieranoja 2018,
"K-means properties on six clustering benchmark datasets"), so that no network is needed. All calls run in one process
with one thread. Suffixes: N points, K clusters, D dims.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.bench.cluster import best_kernels
from rb_gpu.bench.kmeans_peers import CLASSIC
from rb_gpu.bench.runner import answer, in_process, interleaved, machine, optional

Table = npt.NDArray[Any]
BUNDLED = {"iris": 3, "wine": 3, "breast_cancer": 2, "digits": 10}
SPREADS, MANY = (0.025, 0.045, 0.065), (20, 35, 50)
# rows whose differences from all centroids are held at once
ROWS = 1000


def _bundled(name: str, *, standardised: bool) -> Table:
    from sklearn import datasets

    x: Table = getattr(datasets, f"load_{name}")().data
    return (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1) if standardised else x


def _apart(rng: np.random.Generator, k: int, least: float) -> Table:
    """K centres (K, 2) in the unit square, none closer than `least` to another."""
    centres: list[Table] = []
    while len(centres) < k:
        centre = rng.random(2)
        if all(np.linalg.norm(centre - other) >= least for other in centres):
            centres.append(centre)
    return np.array(centres)


def _about(rng: np.random.Generator, centre_KD: Table, size: Any, spread: Any) -> Table:
    """Round Gaussian clusters: `size` points, one number or (K,), about each centre, with standard deviation spread."""
    label_N = np.repeat(np.arange(len(centre_KD)), size)
    spread_N1 = np.broadcast_to(spread, len(centre_KD))[label_N, None]
    return np.asarray(centre_KD[label_N] + spread_N1 * rng.standard_normal((len(label_N), centre_KD.shape[1])))


def _gaussians(k: int, least: float, size: int, spread: float, rng: np.random.Generator) -> Table:
    return _about(rng, _apart(rng, k, least), size, spread)


def _unbalance(rng: np.random.Generator) -> Table:
    """Three dense clusters of 2,000 points, and five sparse ones of 100 points far from them."""
    dense = np.array([[0.15, 0.35], [0.165, 0.365], [0.18, 0.35]])
    sparse = np.array([[0.44, 0.3], [0.44, 0.4], [0.49, 0.35], [0.54, 0.3], [0.54, 0.4]])
    return _about(rng, np.concatenate([dense, sparse]), [2000] * 3 + [100] * 5, [0.0025] * 3 + [0.009] * 5)


def _circles(rng: np.random.Generator) -> Table:
    angle_N, radius_N = rng.uniform(0, 2 * np.pi, 1000), np.repeat([0.5, 1.0], 500)
    ring_ND = radius_N[:, None] * np.stack([np.cos(angle_N), np.sin(angle_N)], axis=1)
    return np.asarray(ring_ND + 0.05 * rng.standard_normal((1000, 2)))


def _outliers(rng: np.random.Generator) -> Table:
    """Ten Gaussian clusters, and 1 % of the points uniform in a square 40 times as wide."""
    x_ND = _about(rng, _apart(rng, 10, 0.15), 200, 0.04)
    return np.concatenate([x_ND, rng.uniform(-20, 20, (20, 2))])


def _heavy_tails(rng: np.random.Generator) -> Table:
    """Eight clusters of Student's t with two degrees of freedom, whose variance is infinite."""
    return np.asarray(5 * rng.standard_normal((8, 4))[rng.integers(8, size=3000)] + rng.standard_t(2, (3000, 4)))


def _counts(rng: np.random.Generator) -> Table:
    """Integer counts of 30 features, Poisson about eight profiles of gamma-distributed means."""
    return rng.poisson(rng.gamma(0.5, 4, (8, 30))[rng.integers(8, size=3000)])


def _bits(rng: np.random.Generator) -> Table:
    """Rows of 40 bits, most of them 0, drawn from ten profiles of beta-distributed probabilities."""
    return (rng.random((2000, 40)) < rng.beta(0.3, 1.5, (10, 40))[rng.integers(10, size=2000)]).astype(np.int8)


def _grid(rng: np.random.Generator) -> Table:
    """A hundred clusters on a square grid, as in birch1."""
    return _about(rng, np.stack(np.divmod(np.arange(100), 10), axis=1), 100, 0.22)


def tables() -> Iterator[tuple[str, Table, int]]:
    """Name, points (N, D) of any real dtype, and K of each table; always the same bits. Without scikit-learn, its
    bundled tables are left out.
    """
    for name, k in BUNDLED.items() if optional("sklearn") is not None else ():
        yield name, _bundled(name, standardised=False), k
        yield f"{name}, standardised", _bundled(name, standardised=True), k
    drawn: dict[str, tuple[Callable[[np.random.Generator], Table], int]] = {
        **{f"S-like, spread {spread}": (partial(_gaussians, 15, 0.17, 333, spread), 15) for spread in SPREADS},
        **{f"A-like, {k} clusters": (partial(_gaussians, k, 0.56 / k**0.5, 150, 0.15 / k**0.5), k) for k in MANY},
        "birch1-like": (_grid, 100),
        "unbalance": (_unbalance, 8),
        "dim032-like": (lambda rng: _about(rng, rng.uniform(0, 255, (16, 32)), 64, 6), 16),
        "two circles": (_circles, 6),
        "1 % outliers": (_outliers, 10),
        "heavy tails": (_heavy_tails, 8),
        "counts": (_counts, 8),
        "sparse bits": (_bits, 10),
    }
    for number, (name, (draw, k)) in enumerate(drawn.items()):
        yield name, draw(np.random.default_rng([11, number])), k


def inertia(x_ND: Table, centroids_KD: Table) -> float:
    """Σ ||x − c||² over the nearest centroids, from float64 differences."""
    x_ND, centroids_KD = x_ND.astype(np.float64), centroids_KD.astype(np.float64)
    return sum(
        float(((x_ND[start : start + ROWS, None] - centroids_KD) ** 2).sum(2).min(1).sum())
        for start in range(0, len(x_ND), ROWS)
    )


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Runs all contestants on every table, one seed a round; returns CPU seconds and inertia of each round by table."""
    names = [name for name in CLASSIC if name == "ours" or name.removesuffix(" x10") in settings["peers"]]
    warm = np.random.default_rng(0).standard_normal((500, 4))
    missing: dict[str, str] = {}
    if optional("sklearn") is None:
        missing["bundled"] = "scikit-learn's bundled tables are left out: pip install 'rb_gpu[bench]'"
    for name in names:
        try:
            CLASSIC[name](warm, 3, 0)
        except ImportError as error:
            missing[name] = f"{error.name} is not installed"

    def call(name: str, x: Table, k: int, turn: int) -> npt.NDArray[np.float64]:
        # CPU time, which with one thread is what an idle machine takes
        started = time.process_time()
        centroids = CLASSIC[name](x, k, turn)
        return np.array([time.process_time() - started, inertia(x, centroids)])

    cases = []
    for title, x, k in tables():
        calls = {name: partial(call, name, x, k) for name in names if name not in missing}
        samples = interleaved(calls, settings["rounds"], settings["seed"])
        rows = {name: dict(zip(("seconds", "inertia"), found.T.tolist(), strict=True))
                for name, found in samples.items()}  # fmt: skip
        cases.append({"data": title, "n": len(x), "dim": x.shape[1], "k": k, "rows": rows})
    return {"cases": cases, "missing": missing}


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """The result of `run` in a clean process with one thread, with settings and machine."""
    found = in_process("rb_gpu.bench.classic", settings, threads=1, environment=best_kernels())
    return {"suite": "classic", "settings": settings, "machine": machine(), **found}


if __name__ == "__main__":
    answer(run)
