"""Plots of the suites' results, which need matplotlib (optional dependency group "bench").

Each function writes a PNG to `path` and returns True, or returns False if matplotlib is not installed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rb_gpu.bench.runner import optional

log = logging.getLogger(__name__)


def plot_lookup(result: dict[str, Any], path: Path) -> bool:
    """p50 of one query over the number of patterns, both on log scales."""

    def draw(panels: Sequence[Any]) -> None:
        cases = [(size["patterns"], size["rows"]) for size in result["sizes"]]
        _lines(panels[0], cases, "p50_us", xlabel="patterns", ylabel="p50 of one query (µs), one thread")

    return _picture(path, 1, (7, 4.5), draw)


def plot_cases(result: dict[str, Any], path: Path) -> bool:
    """Seconds over the number of clusters, both on log scales, with a panel for each data set."""
    names = list(dict.fromkeys(case["data"] for case in result["cases"]))

    def draw(panels: Sequence[Any]) -> None:
        for axes, name in zip(panels, names, strict=True):
            cases = [case for case in result["cases"] if case["data"] == name]
            title = f"{Path(name).name}: {cases[0]['n']:,} x {cases[0]['dim']}"
            points = [(case["k"], case["rows"]) for case in cases]
            _lines(axes, points, "seconds", xlabel="clusters", ylabel="seconds", title=title)

    return _picture(path, len(names), (5 * len(names), 4.5), draw)


def plot_growth(result: dict[str, Any], path: Path) -> bool:
    """Milliseconds of an iteration over points and over clusters, with the fitted slopes in the legend."""
    grown = list(dict.fromkeys(series["axis"] for series in result["series"]))

    def draw(panels: Sequence[Any]) -> None:
        for axes, along in zip(panels, grown, strict=True):
            for one in (series for series in result["series"] if series["axis"] == along):
                label = f"{Path(one['data']).name}, {one['dim']} dims: slope {one['slope']:.2f}"
                axes.plot(one["sizes"], [1e3 * s for s in one["seconds"]], marker="o", label=label)
            axes.set(xscale="log", yscale="log", xlabel=along, ylabel="milliseconds of one iteration")
            axes.grid(alpha=0.3)
            axes.legend()

    return _picture(path, len(grown), (5.5 * len(grown), 4.5), draw)


def plot_load(result: dict[str, Any], path: Path) -> bool:
    """GB/s of every format's full load, next to memcpy."""

    def draw(panels: Sequence[Any]) -> None:
        speeds = {name: row["gb_per_s"] for name, row in reversed(result["formats"].items())}
        speeds["memcpy"] = result["memcpy_gb_per_s"]
        panels[0].barh(list(speeds), list(speeds.values()))
        panels[0].set(xlabel="GB/s of embeddings, whole loads")

    return _picture(path, 1, (7, 3.2), draw)


def plot_decisions(result: dict[str, Any], path: Path) -> bool:
    """The bank's gain in every setting with its interval, and the other methods' gains as points."""

    def draw(panels: Sequence[Any]) -> None:
        cases, axes = result["cases"][::-1], panels[0]
        for name in cases[0]["methods"]:
            if name in ("best single config", "oracle", "default"):
                continue
            found = [case["methods"][name] for case in cases]
            gains = [one["gain"] for one in found]
            if name == "bank":
                reach = [[one["gain"] - one["low"] for one in found], [one["high"] - one["gain"] for one in found]]
                axes.errorbar(gains, range(len(cases)), xerr=reach, fmt="D", color="black", capsize=3, label=name)
            else:
                axes.plot(gains, range(len(cases)), "o", alpha=0.7, label=name)
        labels = [f"{c['set']}, λ={c['cost_weight']:g}, {c['log']} {c['queries']:,}" for c in cases]
        axes.set_yticks(range(len(cases)), labels, fontsize=7)
        axes.axvline(0.0, color="grey", linewidth=0.8)
        axes.set(xlabel="gain of utility over the best single config, held-out queries")
        axes.legend(fontsize=7)

    return _picture(path, 1, (8, 1.5 + 0.28 * len(result["cases"])), draw)


def _picture(path: Path, panels: int, size: tuple[float, float], draw: Callable[[Sequence[Any]], None]) -> bool:
    """Lets `draw` draw on a row of panels and writes the figure (size in inches); False without matplotlib."""
    if optional("matplotlib") is None:
        log.warning("no plot without matplotlib: pip install 'rb_gpu[bench]'")
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure.subplots(1, panels, squeeze=False)[0])
    figure.savefig(path, dpi=150)
    return True


def _lines(axes: Any, cases: Sequence[tuple[int, dict[str, Any]]], key: str, **labels: str) -> None:
    """Draws a line per contestant on log scales, ours thicker. cases: (x, row by contestant); key: field to plot."""
    for name in cases[0][1]:
        points = [(x, rows[name][key]) for x, rows in cases if isinstance(rows[name], dict)]
        if points:
            width = 3 if name.startswith("ours") else 1.2
            axes.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=width)
    axes.set(xscale="log", yscale="log", **labels)
    axes.set_xticks([x for x, _ in cases], [f"{x:,}" for x, _ in cases], minor=False)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend()
