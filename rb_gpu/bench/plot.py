"""A picture of a suite's result; matplotlib comes with the extra bench."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rb_gpu.bench.runner import optional

log = logging.getLogger(__name__)


def plot_lookup(result: dict[str, Any], path: Path) -> bool:
    """p50 over the number of patterns, both on log scales; False where matplotlib is not installed."""
    if optional("matplotlib") is None:
        log.warning("no plot without matplotlib: pip install 'rb_gpu[bench]'")
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    sizes = result["sizes"]
    for name in sizes[0]["rows"]:
        points = [(s["patterns"], s["rows"][name]["p50_us"]) for s in sizes if isinstance(s["rows"][name], dict)]
        if points:
            ours = name.startswith("ours")
            axes.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=3 if ours else 1.2)
    axes.set(xscale="log", yscale="log", xlabel="patterns", ylabel="p50 of one query (µs), one thread")
    axes.set_xticks([s["patterns"] for s in sizes], [f"{s['patterns']:,}" for s in sizes], minor=False)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    return True


def plot_cases(result: dict[str, Any], path: Path) -> bool:
    """Seconds over k, both on log scales, a panel for each data; False where matplotlib is not installed."""
    if optional("matplotlib") is None:
        log.warning("no plot without matplotlib: pip install 'rb_gpu[bench]'")
        return False
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(case["data"] for case in result["cases"]))
    figure = Figure(figsize=(5 * len(names), 4.5), layout="constrained")
    for axes, data in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        cases = [case for case in result["cases"] if case["data"] == data]
        for name in cases[0]["rows"]:
            points = [(c["k"], c["rows"][name]["seconds"]) for c in cases if isinstance(c["rows"][name], dict)]
            if points:
                width = 3 if name.startswith("ours") else 1.2
                axes.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=width)
        title = f"{Path(data).name}: {cases[0]['n']:,} x {cases[0]['dim']}"
        axes.set(xscale="log", yscale="log", xlabel="clusters", ylabel="seconds", title=title)
        axes.set_xticks([c["k"] for c in cases], [f"{c['k']:,}" for c in cases], minor=False)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)
    return True


def plot_load(result: dict[str, Any], path: Path) -> bool:
    """GB/s of every format beside memcpy; False where matplotlib is not installed."""
    if optional("matplotlib") is None:
        log.warning("no plot without matplotlib: pip install 'rb_gpu[bench]'")
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    speeds = {"memcpy": result["memcpy_gb_per_s"]}
    speeds |= {name: row["gb_per_s"] for name, row in result["formats"].items()}
    axes.barh(list(speeds)[::-1], list(speeds.values())[::-1])
    axes.set(xlabel="GB/s of embeddings, read and checked")
    figure.savefig(path, dpi=150)
    return True
