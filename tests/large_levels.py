"""Measures time and memory of merging leaves and of building the hierarchy, at 65,536 patterns.

`python -m tests.large_levels --patterns 65536 --dim 128` runs each case in a new process, which measures its own peak
of resident memory. Leaves are noise around a number of centres, and their supports are log-normal. In a "cone", chains
of cosines over the threshold connect all leaves, but few leaves are near all others.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import numpy as np
import torch

from rb_gpu.learn.hierarchy import build_hierarchy, consolidate, level_counts

THRESHOLD = 0.95
# number of centres (0: one per 16 patterns), and the noise around them relative to their norm
SHAPES = {"far": (256, 1.0), "groups": (0, 0.15), "cone": (1, 0.25)}


def leaves(patterns: int, dim: int, shape: str) -> np.ndarray:
    """(P, D) leaf centroids of norm 1."""
    rng = np.random.default_rng(0)
    centres, noise = SHAPES[shape]
    centre = rng.normal(size=(centres or patterns // 16, dim)).astype(np.float32)
    x = centre[rng.integers(len(centre), size=patterns)]
    x += noise * rng.normal(size=x.shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def measure(case: str, patterns: int, dim: int) -> str:
    """Runs one case; returns a line with its seconds, its peak memory over that at the start, and what it found."""
    stage, _, shape = case.partition(", ")
    x, device = leaves(patterns, dim, shape), torch.device("cpu")
    support = np.exp(np.random.default_rng(1).normal(size=patterns))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    if stage == "merge":
        found = f"{consolidate(x, THRESHOLD, device).max() + 1:,} left"
    else:
        parents = build_hierarchy(x, support, level_counts(patterns, "auto"), device)
        found = "levels of " + " ".join(f"{len(np.unique(parent)):,}" for parent in parents)
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return f"{case:24} {seconds:7.1f} s  {peak / 1024:7,.0f} MiB over the start's  {found}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patterns", type=int, default=65_536)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--case", help="one of them, in this process")
    options = parser.parse_args()
    if options.case:
        sys.stdout.write(measure(options.case, options.patterns, options.dim))
        return
    matrix = options.patterns**2 * 4 / 2**30
    sys.stdout.write(f"{options.patterns:,} leaves x {options.dim}; a float32 matrix of them has {matrix:.1f} GiB\n")
    sys.stdout.flush()
    for case in (*(f"merge, {shape}" for shape in SHAPES), "levels, far"):
        subprocess.run([sys.executable, "-m", "tests.large_levels", *sys.argv[1:], "--case", case], check=True)


if __name__ == "__main__":
    main()
