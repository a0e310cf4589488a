"""Terminal tables about published versions: the list of all, a comparison of two, and the pattern tree of one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from rb_gpu.bank_data import BankData
from rb_gpu.learn.comparison import STANDS, Comparison, compare
from rb_gpu.registry import CHAMPION, Registry

from .columns import amount, number, render

# rows shown of a long list; the printed counts are over the whole list
LISTED = 20
# what the gate said of a version
GATE = {True: "promotes", False: "refuses"}


def listing(registry: Registry) -> str:
    """The table of all versions, oldest first, with the one that is served marked. A note says so if the champion's
    folder is missing.
    """
    champion = registry.champion()
    rows = []
    for version, manifest in registry.manifests():
        mark = "serving" if version == champion else ""
        if manifest is None:
            rows.append((version, mark, "damaged", "", "", "", ""))
            continue
        gain = (manifest.get("evaluation") or {}).get("bank_gains", {}).get("default") or {}
        counts = manifest.get("counts", {})
        rows.append(
            (
                version,
                mark,
                f"{counts.get('trajectories', 0):,}",
                str(counts.get("patterns", "")),
                str(counts.get("verdicts", "")),
                number(float("nan") if gain.get("gain") is None else gain["gain"], "+.4f"),
                GATE.get((manifest.get("gate") or {}).get("promote"), "-"),
            )
        )
    head = ("version", "", "trajectories", "patterns", "verdicts", "gain over default", "gate")
    table = render(head, rows) if rows else f"{registry.path} holds no version; run jobs.train"
    if champion is None or champion in registry.versions():
        return table
    return f"{table}\n{CHAMPION} points to {champion}, which does not exist; restore it, or promote a version"


def statistics(manifest: dict[str, Any]) -> dict[str, Any]:
    """The bank statistics of the reference document's section 8, computed on held-out queries. A running service counts
    its own.
    """
    counts, evaluation = manifest.get("counts") or {}, manifest.get("evaluation") or {}
    bank = next((value for value in evaluation.get("values", []) if value["name"] == "bank"), {})
    return {
        "total_trajectories": counts.get("trajectories"),
        "total_patterns": sum(counts.get("levels", [])),
        "total_verdicts": counts.get("verdicts"),
        "pattern_hit_rate": bank.get("acted"),
        "avg_improvement_percent": evaluation.get("improvement_percent"),
    }


def difference(before: BankData, after: BankData) -> str:
    """Two versions side by side, and what became of the first one's patterns and verdicts in the second."""
    found = compare(before, after)
    parts = [
        _heads(before, after, found),
        _held_out(before, after),
        _patterns(found),
        _verdicts(found),
        _configs(found),
        render(("setting", "before", "after"), found.settings) if found.settings else "no setting differs",
    ]
    return "\n\n".join(parts)


def _heads(before: BankData, after: BankData, found: Comparison) -> str:
    sides = [one.facts for one in (before, after)]
    counts, data = ([one.get(key) or {} for one in sides] for key in ("counts", "data"))
    gates = [one.get("gate") or {} for one in sides]
    rows = [
        ("parent", [one.get("parent") or "none" for one in sides]),
        ("promoted by the gate", [{True: "yes", False: "no"}.get(one.get("promote"), "-") for one in gates]),
        ("data from", [_day(one.get("oldest_timestamp")) for one in data]),
        ("data to", [_day(one.get("newest_timestamp")) for one in data]),
        *((name, [f"{one[name]:,}" if name in one else "-" for one in counts]) for name in ("trajectories", "queries")),
        ("table", [str(one.get("fingerprint", "-"))[:12] for one in data]),
        ("embedder", [before.embedder, after.embedder]),
        ("configs", [str(len(one.configs)) for one in (before, after)]),
        ("default", list(found.default)),
        ("patterns by level", [" ".join(map(str, np.bincount(b.arrays["level"]))) for b in (before, after)]),
        ("verdicts", [str(int((one.arrays["verdict_stands"] == 0).sum())) for one in (before, after)]),
    ]
    return render(("", *(str(one["version"]) for one in sides)), [(name, *cells) for name, cells in rows])


def _day(timestamp: int | None) -> str:
    return "-" if timestamp is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(timestamp))


def _held_out(before: BankData, after: BankData) -> str:
    """The policy tables of both versions side by side, in the order of the later version's table."""
    sides = [one.facts.get("evaluation") or {} for one in (before, after)]
    values = [{value["name"]: value for value in side.get("values", [])} for side in sides]
    form: tuple[tuple[str, Callable[[float], str]], ...] = (
        ("utility", lambda value: number(value, ".4f")),
        ("quality", lambda value: number(value, ".4f")),
        ("latency_p95_us", lambda value: amount(value / 1e3)),
        ("acted", lambda value: number(100 * value, ".1f")),
    )
    rows = []
    for name in [*values[1], *(one for one in values[0] if one not in values[1])]:
        cells = [name]
        for key, shown in form:
            known = [side[name].get(key) if name in side else None for side in values]
            cells += [shown(math.nan if value is None else value) for value in known]
        rows.append(cells)
    head = (
        "held out: policy",
        *(text for name in ("utility", "quality", "p95 ms", "acted %") for text in (name, "after")),
    )
    sizes = [f"{side.get('queries', 0):,} ({side.get('grade', 'not measured')})" for side in sides]
    alike = before.facts.get("objective") == after.facts.get("objective")
    note = f"each on its own held-out queries: {sizes[0]} before, {sizes[1]} after"
    return f"{render(head, rows)}\n{note}" + (
        "" if alike else "; the objectives differ, so the utilities are in different units"
    )


def _patterns(found: Comparison) -> str:
    said = f"patterns of all levels: {len(found.kept)} kept, {len(found.gone)} gone, {len(found.new)} new"
    if found.fates is None:
        said += "; splits and merges are shown only next to a version's own parent"
    else:
        said += "; by lineage " + ", ".join(f"{count} {fate}" for fate, count in found.fates.items())
    for name, ids in (("gone", found.gone), ("new", found.new)):
        if ids:
            said += f"\n{name}: {' '.join(map(str, ids[:LISTED]))}{_more(ids)}"
    return said


def _verdicts(found: Comparison) -> str:
    title = f"of {found.leaves_kept} leaves in both versions, {len(found.verdicts)} have a different verdict"
    if not found.verdicts:
        return title
    rows = [
        (
            str(one.pattern_id),
            *(f"{support:,}" for support in one.support),
            *one.config,
            *(number(gain, "+.4f") for gain in one.gain),
        )
        for one in found.verdicts[:LISTED]
    ]
    head = ("pattern", "support", "after", "verdict", "after", "gain", "after")
    return f"{title}{_more(found.verdicts)}\n\n{render(head, rows)}"


def _configs(found: Comparison) -> str:
    lines = [f"- {name}" for name in found.configs_gone] + [f"+ {name}" for name in found.configs_new]
    return "\n".join(["configs in only one version", *lines]) if lines else "both have the same configs"


def _more(listed: Sequence[object]) -> str:
    return f" (the first {LISTED} are shown)" if len(listed) > LISTED else ""


def tree(data: BankData) -> str:
    """The pattern hierarchy as an indented tree, siblings in order of decreasing support, with the leaves' verdicts."""
    arrays = data.arrays
    order = np.lexsort((arrays["pattern_id"], -arrays["support"]))
    children: dict[int, list[int]] = {}
    for row in order.tolist():
        children.setdefault(int(arrays["parent"][row]), []).append(row)
    rows = []
    for label, row in _branches(children, -1, ""):
        leaf = row < data.leaves
        acts = leaf and not arrays["verdict_stands"][row]
        verdict = data.configs.describe(int(arrays["verdict_config"][row])) if acts else STANDS if leaf else ""
        rows.append(
            (
                f"{label}{arrays['pattern_id'][row]}",
                f"{arrays['support'][row]:,}",
                f"{arrays['quality'][row]:.3f}",
                f"{arrays['confidence'][row]:.2f}",
                verdict,
                number(float(arrays["verdict_effect"][row]) if acts else math.nan, "+.4f") if leaf else "",
            )
        )
    return render(("pattern", "support", "quality", "confidence", "verdict", "gain"), rows)


def _branches(children: dict[int, list[int]], above: int, indent: str) -> Iterator[tuple[str, int]]:
    """Yields (prefix, row) in printing order; the prefix holds the tree lines that lead to the row."""
    below = children.get(above, [])
    for row in below:
        last = row == below[-1]
        root = above < 0
        yield ("" if root else indent + ("└─ " if last else "├─ ")), row
        yield from _branches(children, row, "" if root else indent + ("   " if last else "│  "))
