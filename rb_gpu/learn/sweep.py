"""Results of a sweep: one small file in each run's folder, and the comparison of the runs."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from rb_gpu.errors import DataError
from rb_gpu.learn.progress import Watch
from rb_gpu.learn.stages import digest
from rb_gpu.learn.training import Candidate
from rb_gpu.learn.verdicts import Z_95
from rb_gpu.publish import without_nan

log = logging.getLogger(__name__)

RESULT_FILE = "result.json"
NAN = float("nan")
# cost references within this ratio count as equal: pruning drops rows, which shifts the dearest config's mean less
SAME_COST = 1.01


@dataclass(frozen=True)
class Member:
    """One run of a sweep. folder: its name in the sweep's folder. error: why the run has no value; None if it has one.

    utility: of the bank on held-out queries, with 95 % interval [low, high]; gain, gain_low, gain_high: the gain over
    the served policy, which `served` names (champion or default). objective: what defines the utility and the gain
    (settings, held-out queries, default); runs are comparable only if it is equal. cost_ref: the cost that
    judge.cost_weight refers to, 1 where cost does not count. promote, reason: the gate's decision. seconds: wall time;
    memory_mb: peak memory of the process by the end of the run, MiB.
    """

    folder: str
    overrides: list[str]
    error: str | None = None
    objective: str = ""
    cost_ref: float = 1.0
    served: str = ""
    utility: float = NAN
    low: float = NAN
    high: float = NAN
    gain: float = NAN
    gain_low: float = NAN
    gain_high: float = NAN
    patterns: int = 0
    verdicts: int = 0
    promote: bool = False
    reason: str = ""
    seconds: float = NAN
    memory_mb: float = NAN


def member_of(candidate: Candidate, folder: str, overrides: list[str], watch: Watch, seconds: float) -> Member:
    """The record of a successful run."""
    evaluation, counts = candidate.evaluation, candidate.learned.data.facts["counts"]
    value, bank = evaluation.value("bank"), candidate.bank.data
    objective = bank.objective
    served = "champion" if "champion" in evaluation.bank_gains else "default"
    gain = evaluation.bank_gains[served]
    # latency_ref_us shifts all utilities alike, which leaves gains unchanged; cost_ref is compared with a tolerance
    meant = {k: v for k, v in asdict(objective).items() if k not in ("cost_ref", "latency_ref_us")}
    held_out = candidate.held_out
    meant |= {"default": held_out.configs[bank.default].as_dict(), "queries": digest(np.sort(held_out.query_id))}
    cost_ref = objective.cost_ref if objective.cost_weight else 1.0
    return Member(
        folder, overrides, None, json.dumps(meant, sort_keys=True), cost_ref, served, value.utility, value.low,
        value.high, gain.gain, gain.low, gain.high, counts["patterns"], counts["verdicts"], candidate.decision.promote,
        candidate.decision.reason, round(seconds, 3), max(watch.memory_mb.values(), default=NAN),
    )  # fmt: skip


def write_member(sweep: Path, member: Member) -> None:
    """Writes the record to the run's folder."""
    (sweep / member.folder / RESULT_FILE).write_text(json.dumps(without_nan(asdict(member)), indent=1) + "\n")


def read_members(sweep: Path) -> list[Member]:
    """All runs of the sweep that left a result, in order of their numbers. Raises DataError if there are none."""
    found = []
    for path in sweep.glob(f"*/{RESULT_FILE}"):
        try:
            kept = json.loads(path.read_text())
            known = {f.name for f in fields(Member)}
            facts: dict[str, Any] = {k: NAN if v is None and k != "error" else v for k, v in kept.items() if k in known}
            found.append(Member(**facts))
        except (ValueError, TypeError, AttributeError) as error:
            log.warning("%s is not a run's result (%s); left out", path, error)
    if not found:
        raise DataError(f"folder={sweep} holds no {RESULT_FILE} of a run; give the folder that a sweep (-m) wrote")
    return sorted(found, key=lambda one: (len(one.folder), one.folder))


def told_apart(members: Sequence[Member]) -> dict[str, str]:
    """For each run, by folder, the overrides that not all runs share."""
    common = set.intersection(*(set(one.overrides) for one in members))
    return {one.folder: " ".join(s for s in one.overrides if s not in common) or "(as configured)" for one in members}


def best_of(members: Sequence[Member]) -> Member | None:
    """The run of highest gain; None where no run has a value, or where their gains differ in units, queries or default
    and so cannot be compared.
    """
    valued = [one for one in members if one.error is None and math.isfinite(one.gain)]
    if not valued or len({(one.objective, one.served) for one in valued}) > 1:
        return None
    costs = [one.cost_ref for one in valued]
    if max(costs) > SAME_COST * min(costs):
        return None
    return max(valued, key=lambda one: one.gain)


def chosen_among(best: Member, members: Sequence[Member]) -> Member:
    """The best run with a wider interval, because it was selected for the highest gain on these very queries.

    Bonferroni correction: simultaneous 95 % intervals for all runs, from the standard error that the interval of one
    run implies.
    """
    runs = sum(one.error is None for one in members)
    half = stats.norm.isf(0.025 / runs) / Z_95
    return replace(
        best,
        gain_low=best.gain + half * (best.gain_low - best.gain),
        gain_high=best.gain + half * (best.gain_high - best.gain),
    )


def verdict(members: Sequence[Member]) -> str:
    """Which run is best and how certain that is, or why there is no answer."""
    valued, best = [one for one in members if one.error is None], best_of(members)
    if not valued:
        return "every run failed; the log in each run's folder says why"
    if best is None:
        return (
            "the runs cannot be ranked: they differ in what defines the utility (judge.cost_weight, judge.objective, "
            "...), in the default (params.default) or in the held-out queries (data, eval.holdout), or none has a "
            "value; compare quality and cost instead"
        )
    wide = chosen_among(best, members)
    runs = f"{len(valued)} run{'s' * (len(valued) > 1)}"
    return (
        f"best: run {best.folder} ({told_apart(members)[best.folder]}), gain {best.gain:+.4f}; corrected for "
        f"choosing the best of {runs}, its 95 % interval is [{wide.gain_low:+.4f}, {wide.gain_high:+.4f}]"
    )
