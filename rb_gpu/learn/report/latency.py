"""Latency under the recommended configs compared with the default's, from the histograms in the evidence.

Each pattern is weighted by all its trajectories, whatever config they ran under, so that both curves describe the same
traffic. Suffixes: P leaves, B latency bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rb_gpu.bank import ReasoningBank
from rb_gpu.evidence import BINS_PER_OCTAVE, LATENCY_BINS, Floats
from rb_gpu.learn.charts import Frame, linear_axis, log_axis, stroke
from rb_gpu.learn.report.formats import latency, milliseconds, percent
from rb_gpu.learn.report.patterns import verdict_styles
from rb_gpu.learn.report.pieces import Figure, Table

QUANTILES = (0.5, 0.95, 0.99)
CONFIGS = 4
EDGES_US = np.exp2(np.arange(LATENCY_BINS + 1) / BINS_PER_OCTAVE)


@dataclass(frozen=True)
class Mixture:
    """The latency of several patterns together. name: which patterns. default_B, chosen_B: share of their traffic in
    each bin, under the default and under the recommended configs; each sums to 1.
    """

    name: str
    default_B: Floats
    chosen_B: Floats


def mixtures(bank: ReasoningBank) -> list[Mixture]:
    """One mixture of all patterns, then one for each of the most recommended configs, of the patterns in which it is
    recommended. Only patterns with trajectories under both configs count; empty if there are none.
    """
    arrays, leaves, default = bank.data.arrays, bank.data.leaves, bank.data.default
    hist_PCB, chosen_P = arrays["evidence_latency_hist"], arrays["verdict_config"]
    rows_P = np.arange(leaves)
    pair = hist_PCB[:, default], hist_PCB[rows_P, chosen_P]
    total_P, other_P = (one.sum(1) for one in pair)
    support_P = arrays["support"][:leaves].astype(np.float64)
    both_P = (total_P > 0) & (other_P > 0) & (support_P > 0)
    groups = [(f"All {both_P.sum():,} patterns", both_P)]
    for config_id in list(verdict_styles(bank).patterns)[:CONFIGS]:
        acts_P = both_P & (chosen_P == config_id) & (arrays["verdict_stands"] == 0)
        groups.append((f"{bank.configs.describe(config_id)} ({acts_P.sum():,} patterns)", acts_P))
    found = []
    for name, in_P in groups:
        if in_P.any():
            weight_P = support_P[in_P] / support_P[in_P].sum()
            default_B, chosen_B = (
                weight_P @ (hist_PB[in_P] / sum_P[in_P, None])
                for hist_PB, sum_P in zip(pair, (total_P, other_P), strict=True)
            )
            found.append(Mixture(name, default_B, chosen_B))
    return found


def quantile_us(share_B: Floats, level: float) -> float:
    """The latency in µs below which a share `level` lies; log-linear inside a bin, as Evidence.latency_quantile is."""
    running = np.concatenate([[0.0], np.cumsum(share_B)])
    octaves = np.interp(level * running[-1], running, np.arange(LATENCY_BINS + 1) / BINS_PER_OCTAVE)
    return float(np.exp2(octaves))


def latency_figures(bank: ReasoningBank) -> list[Figure]:
    """One histogram per mixture, all on the same scale."""
    found = mixtures(bank)
    if not found:
        return []
    held = np.flatnonzero(sum(one.default_B + one.chosen_B for one in found) > 0)
    first, last = max(0, int(held[0]) - 1), min(LATENCY_BINS, int(held[-1]) + 2)
    edges = EDGES_US[first : last + 1].tolist()
    top = max(float(max(one.default_B.max(), one.chosen_B.max())) for one in found)
    return [_figure(one, edges, slice(first, last), top) for one in found]


def _figure(one: Mixture, edges_us: list[float], bins: slice, top: float) -> Figure:
    frame = Frame(
        log_axis("latency, half-octave bins", edges_us[0], edges_us[-1], latency),
        linear_axis("share of trajectories", [0.0, top], percent0),
        height=250.0,
    )
    frame.steps(edges_us, one.default_B[bins].tolist(), "theirs", filled=True)
    frame.steps(edges_us, one.chosen_B[bins].tolist(), "ours")
    rows = [
        (name, *(milliseconds(quantile_us(share_B, level)) for level in QUANTILES))
        for name, share_B in (("default", one.default_B), ("as recommended", one.chosen_B))
    ]
    head = ("config", *(f"p{100 * level:g} ms" for level in QUANTILES))
    return Figure(
        one.name,
        frame.render(f"Latency. {one.name}", "Share of trajectories by latency under the default and as recommended."),
        ((stroke("theirs area"), "default"), (stroke("ours"), "as recommended")),
        table=Table(f"Quantiles of latency. {one.name}", head, rows),
    )


def percent0(share: float) -> str:
    """A share as a whole percentage, for an axis."""
    return percent(share, 0)
