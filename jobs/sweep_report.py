"""Rebuilds the table of a sweep from the folders of its runs.

python -m jobs.sweep_report folder=outputs/train-sweep/2026-11-28_03-00-00_000000
python -m jobs.sweep_report folder=night1
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from rb_gpu.learn.job_config import SweepReportConfig
from rb_gpu.learn.report.sweep import render_sweep
from rb_gpu.learn.sweep import Member, read_members, told_apart, verdict

from .columns import number, render, terminal_width
from .common import job

TABLE_FILE, PAGE_FILE = "sweep.txt", "sweep.html"


def run(config: SweepReportConfig) -> int:
    """Prints the table and writes it into the sweep's folder."""
    folder = Path(config.folder)
    print(show(folder, read_members(folder)))
    return 0


def show(folder: Path, members: Sequence[Member]) -> str:
    """Writes the table and an HTML page with plots into the sweep's folder.

    Returns the table with the best run, followed by the paths of both files.
    """
    # the file may be read on other terminals, so that its lines are not fitted to this one
    (folder / TABLE_FILE).write_text(f"{_told(members, sys.maxsize)}\n")
    (folder / PAGE_FILE).write_text(render_sweep(folder.resolve().name, members))
    return f"{_told(members, terminal_width())}\n\n{folder / TABLE_FILE} and {PAGE_FILE}"


def _told(members: Sequence[Member], room: int) -> str:
    failed = [f"run {one.folder} failed: {one.error}" for one in members if one.error is not None]
    return "\n\n".join([_table(members, room), *failed, verdict(members)])


def _table(members: Sequence[Member], room: int) -> str:
    head = ("run, settings", "gain [95 %]", "utility", "patterns", "verdicts", "gate", "seconds", "peak MiB")
    settings = told_apart(members)
    rows = []
    for one in sorted(members, key=lambda one: -one.gain if math.isfinite(one.gain) else math.inf):
        name = f"{one.folder:>3}  {settings[one.folder]}"
        if one.error is not None:
            rows.append((name, "failed", *[""] * (len(head) - 2)))
            continue
        gain = f"{one.gain:+.4f} [{one.gain_low:+.4f}, {one.gain_high:+.4f}]" if math.isfinite(one.gain) else "unknown"
        gate = "promotes" if one.promote else "refuses"
        rows.append((name, gain, number(one.utility, ".4f"), f"{one.patterns:,}", f"{one.verdicts:,}",
                     gate, f"{one.seconds:.2f}", f"{one.memory_mb:,.0f}"))  # fmt: skip
    served = next((one.served for one in members if one.error is None), "default")
    return f"gain of utility over the {served} on held-out queries\n\n{render(head, rows, room)}"


main = job("sweep_report", __doc__, run)

if __name__ == "__main__":
    main()
