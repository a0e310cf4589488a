"""Renders report.html of an artifact: what the bank is worth, how certain that is, and its verdicts.

The page is self-contained: it needs no network, holds its style and its script, and its content security policy lets
nothing else run. The templates escape everything that comes from data.
"""

from __future__ import annotations

import shlex
from typing import Any

from rb_gpu.bank import ReasoningBank
from rb_gpu.learn.projection import Projection
from rb_gpu.learn.report import answer, curves, latency, patterns, run, worth
from rb_gpu.learn.report.formats import count, date
from rb_gpu.learn.report.page import script_digest, templates


def render_report(
    bank: ReasoningBank, facts: dict[str, Any], version: str, promoted: bool, projection: Projection
) -> str:
    """The page as HTML. facts: those of the manifest, with evaluation, gate and drift. version: the artifact's name.
    promoted: whether the artifact is served from now on; promotion may be left to a person even if the gate passes.
    """
    environment = templates()
    registry = shlex.quote(f"registry.path={facts['config']['registry']['path']}")
    evaluation, counts, data, drift = (facts[name] for name in ("evaluation", "counts", "data", "drift"))
    context = {
        "script_digest": script_digest(environment),
        "version": version,
        "counted": f"{count(counts['trajectories'])} trajectories",
        "oldest": date(data["oldest_timestamp"]),
        "newest": date(data["newest_timestamp"]),
        "held_out": count(evaluation["queries"]),
        "promote": f"python -m jobs.registry action=promote version={version} {registry}",
        "rollback": f"python -m jobs.registry action=rollback {registry}",
        "answer": answer.answer(bank, facts),
        "default": bank.configs.describe(bank.data.default),
        "promoted": promoted,
        "passes": facts["gate"]["promote"],
        "doubts": worth.doubts(evaluation),
        "policy_tables": worth.policy_tables(evaluation),
        "tradeoffs": curves.tradeoff_figure(bank, evaluation["tradeoffs"]),
        "reliability": curves.reliability_figure(evaluation["calibration"]),
        "pattern_counts": patterns.pattern_counts(facts),
        "map": patterns.map_figure(bank, projection),
        "verdicts": patterns.verdict_table(bank),
        "tree": patterns.tree(bank),
        "left_out": patterns.left_out(bank),
        "graded": patterns.VERDICT_GRADES.get(bank.data.grade, bank.data.grade),
        "latency": latency.latency_figures(bank),
        "drift": drift,
        "newest_queries": count(drift["newest_queries"]),
        "training_queries": count(drift["training_queries"]),
        "drift_tables": run.drift_tables(drift),
        "data_tables": run.data_tables(data),
        "no_bad_rows": not data["bad_rows"],
        "lineage": facts["lineage"],
        "lineage_table": None if facts["lineage"] is None else run.lineage_table(facts["lineage"]),
        "router": run.router_figure(facts["router"]),
        "device": facts["device"],
        "packages": ", ".join(f"{name} {installed}" for name, installed in facts["packages"].items()),
        "timings": run.timing_table(facts),
        "settings": run.settings_tables(facts["config"]),
        "found": run.found_table(bank, facts),
    }
    context["sections"] = _sections(context)
    return environment.get_template("page.html").render(context)


def _sections(context: dict[str, Any]) -> list[tuple[str, str]]:
    """Id and name of each section on the page, in order."""
    named = {
        "policies": "Policies", "tradeoffs": "Quality over cost", "calibration": "Confidence", "map": "Map",
        "verdicts": "Verdicts", "tree": "Hierarchy", "latency": "Latency", "drift": "Drift", "data": "Data",
        "lineage": "Lineage", "router": "Router", "run": "Time and memory", "settings": "Settings",
    }  # fmt: skip
    missing = {"tradeoffs": context["tradeoffs"], "calibration": context["reliability"], "router": context["router"]}
    return [(key, name) for key, name in named.items() if missing.get(key, True) is not None]
