"""Measures speed and memory next to other libraries, all in one run.

python -m jobs.benchmark suite=lookup
python -m jobs.benchmark suite=cluster points=[emb,gauss] clusters=[256,1024]
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rb_gpu.bench import classic, cluster, decisions, gpu, growth, load, lookup, roofline, routers, sweeps
from rb_gpu.bench.plot import plot_cases, plot_decisions, plot_growth, plot_load, plot_lookup
from rb_gpu.learn.job_config import BenchmarkConfig

from .common import EXIT_ERROR, job, run_folder
from .device_tables import gpu_tables, roofline_tables
from .tables import (
    classic_tables,
    cluster_tables,
    decision_tables,
    growth_tables,
    load_tables,
    lookup_tables,
    router_tables,
    sweep_tables,
)

Suite = tuple[
    Callable[[dict[str, Any]], dict[str, Any]], Callable[[dict[str, Any]], str], Callable[[dict[str, Any], Path], bool]
]


def no_picture(_result: dict[str, Any], _path: Path) -> bool:
    """The plot function of suites that have no plot: draws nothing and returns False."""
    return False


SUITES: dict[str, Suite] = {
    "lookup": (lookup.measure, lookup_tables, plot_lookup),
    "cluster": (partial(cluster.measure, "cluster"), cluster_tables, plot_cases),
    "seed": (partial(cluster.measure, "seed"), cluster_tables, plot_cases),
    "whole": (partial(cluster.measure, "whole"), cluster_tables, plot_cases),
    "classic": (classic.measure, classic_tables, no_picture),
    "growth": (growth.measure, growth_tables, plot_growth),
    "load": (load.measure, load_tables, plot_load),
    "decisions": (decisions.measure, decision_tables, plot_decisions),
    "router": (routers.measure, router_tables, plot_decisions),
    "sweep": (sweeps.measure, sweep_tables, no_picture),
    "roofline": (roofline.measure, roofline_tables, no_picture),
    "gpu": (gpu.measure, gpu_tables, no_picture),
}


def run(config: BenchmarkConfig) -> int:
    """Runs the suites, prints their tables, and writes the results as JSON and PNG into the run's folder.

    Returns 1 if a measurement of rb_gpu failed or its GPU labels exceed the error bound, else 0.
    """
    folder, right = run_folder(), True
    for name in [name for name in SUITES if name != "gpu"] if config.suite == "all" else [config.suite]:
        measure, tables, plot = SUITES[name]
        result = measure(asdict(config))
        path = folder / f"benchmark_{name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(tables(result))
        drawn = plot(result, path.with_suffix(".png"))
        print(f"\n{path}" + (f" and {path.with_suffix('.png').name}" if drawn else ""))
        right &= all(one["worst_over_bound"] <= 1 for one in result.get("labels", ())) and not result.get("failed")
    return 0 if right else EXIT_ERROR


main = job("benchmark", __doc__, run)

if __name__ == "__main__":
    main()
