"""The page of a sweep: a sortable table of all runs with their gains drawn, and which run is best."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rb_gpu.learn.charts import bar, whisker
from rb_gpu.learn.report.formats import UNKNOWN, count, interval, number, short, signed
from rb_gpu.learn.report.page import script_digest, templates
from rb_gpu.learn.report.pieces import Table
from rb_gpu.learn.sweep import Member, best_of, told_apart, verdict


def render_sweep(name: str, members: Sequence[Member]) -> str:
    """The page as HTML, self-contained like the artifact's report. name: of the sweep's folder."""
    environment = templates()
    best, settings = best_of(members), told_apart(members)
    valued = [one for one in members if one.error is None]
    return environment.get_template("sweep.html").render(
        script_digest=script_digest(environment),
        name=name,
        headline=f"{len(valued)} of {len(members)} runs succeeded"
        + ("" if best is None else f"; best: {settings[best.folder]}"),
        said=verdict(members),
        runs=_table(members),
        served=next((one.served for one in valued), "default"),
        failed=[(one.folder, one.error) for one in members if one.error is not None],
    )


def _table(members: Sequence[Member]) -> Table:
    settings = told_apart(members)
    known = [one for one in members if math.isfinite(one.gain)]
    ends = (min([0.0, *(one.gain_low for one in known)]), max([1e-9, *(one.gain_high for one in known)]))
    slowest = max([one.seconds for one in members if math.isfinite(one.seconds)], default=0.0)
    rows = [
        (
            settings[one.folder],
            signed(one.gain),
            interval(one.gain_low, one.gain_high) if one in known else UNKNOWN,
            whisker(one.gain_low, one.gain, one.gain_high, ends, 0.0) if one in known else "",
            number(one.utility),
            "failed" if one.error is not None else "promotes" if one.promote else "refuses",
            count(one.patterns) if one.error is None else UNKNOWN,
            count(one.verdicts) if one.error is None else UNKNOWN,
            short(one.seconds),
            bar(one.seconds, slowest) if math.isfinite(one.seconds) else "",
            count(one.memory_mb),
            one.folder,
        )
        for one in sorted(members, key=lambda one: -one.gain if math.isfinite(one.gain) else math.inf)
    ]
    head = ("settings", "gain", "95 % interval", f"{signed(ends[0], 3)} to {signed(ends[1], 3)}, line at 0", "utility",
            "gate", "patterns", "verdicts", "seconds", "time", "peak MiB", "run")  # fmt: skip
    return Table("Runs by gain", head, rows, words=(5,), drawn=(3, 9), sortable=True)
