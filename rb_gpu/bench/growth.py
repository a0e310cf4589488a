"""The suite growth: how the time of one Lloyd iteration grows with the number of points and of clusters.

Suffixes: N points, K clusters.
"""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.bench.cluster import points
from rb_gpu.bench.runner import in_process, interleaved, machine
from rb_gpu.errors import ConfigError

# number of clusters in the series over points; the series over clusters has `n` points
CLUSTERS = 1024
# untimed iterations before the timed ones; they include one-time work and the first, most expensive assignment
BEFORE = 3


def slope(sizes: list[int], seconds: list[float]) -> float:
    """The exponent b of the power law seconds = a·size^b, fitted by least squares on logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Median seconds of an iteration at every size, for every data set, in interleaved rounds.

    Raises ConfigError if a data set leaves fewer than two sizes in both series, and RuntimeError if a call fails.
    """
    axes = {
        "points": (CLUSTERS, settings["growth_rows"], [(n, CLUSTERS) for n in settings["growth_rows"]]),
        "clusters": (
            settings["n"],
            settings["growth_clusters"],
            [(settings["n"], k) for k in settings["growth_clusters"]],
        ),
    }
    wanted = list(dict.fromkeys(size for _, _, cases in axes.values() for size in cases))
    series = []
    with tempfile.TemporaryDirectory(prefix="rb_gpu-benchmark-") as folder:
        path = Path(folder) / "x.npy"
        for name in settings["points"]:
            x = points(name, settings | {"n": max(n for n, _ in wanted)})
            dim, most = x.shape[1], len(x)
            np.save(path, x)
            del x
            # for a file with fewer rows, keep only the sizes that it can provide
            calls = {f"{n} {k}": partial(_iteration, path, n, k, settings) for n, k in wanted if k <= n <= most}
            if not any(sum(f"{n} {k}" in calls for n, k in cases) > 1 for _, _, cases in axes.values()):
                raise ConfigError(
                    f"growth_rows={settings['growth_rows']} and growth_clusters={settings['growth_clusters']} leave no "
                    f"two sizes of points={name}, which has {most} rows; give two of either, up to that many"
                )
            samples = interleaved(calls, settings["rounds"], settings["seed"], warm=False)
            for axis, (fixed, grown, cases) in axes.items():
                found = [(size, f"{n} {k}") for size, (n, k) in zip(grown, cases, strict=True) if f"{n} {k}" in samples]
                if len(found) > 1:
                    sizes, seconds = [size for size, _ in found], [float(np.median(samples[key])) for _, key in found]
                    series.append({"data": name, "dim": dim, "axis": axis, "fixed": fixed, "sizes": sizes,
                                   "seconds": seconds, "slope": slope(sizes, seconds)})  # fmt: skip
    return {"suite": "growth", "settings": settings, "machine": machine(), "series": series}


def _iteration(path: Path, n: int, k: int, settings: dict[str, Any], turn: int) -> npt.NDArray[np.float64]:
    """Seconds of one iteration (1,): the time difference of a long and a short call, each in its own process, divided
    by the difference of their iterations.
    """
    seconds = []
    for iterations in (BEFORE, BEFORE + settings["iterations"]):
        given = {
            "suite": "cluster", "name": "ours", "x": str(path), "n": n, "k": k, "iterations": iterations, "seed": turn,
            "out": str(path.with_name("centroids.npy")),
        }  # fmt: skip
        found = in_process("rb_gpu.bench.kmeans_peers", given, threads=os.cpu_count() or 1)
        seconds.append(found["seconds"])
    return np.array([(seconds[1] - seconds[0]) / settings["iterations"]])
