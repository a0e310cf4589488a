"""The first screen: is the bank better, by how much, how certain is that, should it be served, and what may be wrong.

`evaluation` has the fields of policy.Evaluation as plain values of the manifest; None stands for an unknown number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rb_gpu.bank import ReasoningBank
from rb_gpu.learn.charts import whisker
from rb_gpu.learn.policy import SINGLE
from rb_gpu.learn.report.formats import (
    UNKNOWN,
    change,
    count,
    counted,
    interval,
    milliseconds,
    number,
    percent,
    short,
    signed,
)
from rb_gpu.learn.report.pieces import Check
from rb_gpu.objective import Objective
from rb_gpu.registry import CHAMPION

GRADES = {
    "exact": "exact: every query was tried under every config that a policy picks",
    "dr": "doubly robust estimates from one logged config per query and its propensity",
    "associational": "associational: no propensities were logged, so confounding may bias them",
}


def served_before(evaluation: dict[str, Any]) -> str:
    """What a promotion would replace: the champion, or the default if there is no champion."""
    return CHAMPION if CHAMPION in evaluation["bank_gains"] else "default"


def formula(objective: Objective, has_cost: bool) -> str:
    """The objective as a sentence, with units. has_cost: whether the log has the cost of answers."""
    quality = f"quality ({objective.quality}, 0 to 1)"
    if objective.kind == "bound":
        bounds = [
            *([f"p95 latency ≤ {short(objective.max_latency_us)} µs"] if objective.max_latency_us is not None else []),
            *([f"mean cost ≤ {short(objective.max_cost)}"] if objective.max_cost is not None else []),
        ]
        return f"Utility is {quality}; configs must satisfy {' and '.join(bounds)}."
    if objective.kind == "floor":
        by_latency = f"log2(latency / {short(objective.latency_ref_us)} µs)"
        spent = f"cost / {short(objective.cost_ref, 4)}" if has_cost else by_latency
        target = f"{quality} reaches {objective.target:g}"
        return f"Utility is − {spent}: the bank looks for the cheapest config whose {target}."
    terms = []
    if objective.latency_weight:
        terms.append(f" − {objective.latency_weight:g} × log2(latency / {short(objective.latency_ref_us)} µs)")
    if objective.cost_weight and has_cost:
        terms.append(f" − {objective.cost_weight:g} × cost / {short(objective.cost_ref, 4)}")
    return f"Utility is {quality}{''.join(terms)}."


@dataclass(frozen=True)
class Answer:
    """The texts of the first screen. state: good, bad or none; the colour of `better`. served: what a promotion would
    replace. whisker: drawing of the gain and its interval, empty if there is none to draw. amounts: (name, before and
    after, change). others: comparisons with other policies. unknown: why there is no value. reasons: the gate's.
    """

    state: str
    better: str
    headline: str
    served: str
    gain: str
    interval: str
    whisker: Markup
    amounts: list[tuple[str, str, str]]
    unknown: str | None
    grade: str
    acted: str
    others: list[str]
    reasons: list[str]
    checks: list[Check]
    formula: str


def answer(bank: ReasoningBank, facts: dict[str, Any]) -> Answer:
    """Is it better, by how much, how certain is that, and what did the gate decide?"""
    evaluation, gate = facts["evaluation"], facts["gate"]
    served = served_before(evaluation)
    gain = evaluation["bank_gains"][served]
    values = {value["name"]: value for value in evaluation["values"]}
    before, after = values[served], values["bank"]
    broken, kind = evaluation["broken"], bank.data.objective.kind
    unchanged = served == "default" and not after["acted"]
    associational = evaluation["grade"] == "associational"
    misled = set(evaluation["misled"])
    doubted = bool(misled & {"bank", served}) and not unchanged
    if doubted:
        gain = {"gain": None, "low": None, "high": None}
    low, high = gain["low"], gain["high"]
    if facts["counts"]["configs"] == 1:
        state, word, headline = "none", "No choice", "Nothing to choose from: the log has one config"
    elif doubted:
        state, word, headline = "none", "Unknown", "No valid estimate: the logged propensities do not fit the log"
    elif "bank" in broken:
        state, word, headline = "bad", "No", f"The bank does not meet the required {kind}"
    elif served in broken:
        state, word, headline = "good", "Yes", f"Meets the required {kind}, which the {served} does not"
    elif low is None or high is None:
        state, word, headline = "none", "Unknown", "Not known yet whether this bank is better"
    elif unchanged:
        state, word, headline = "none", "No change", "The default stands for every held-out query"
    elif low > 0 and associational:
        state, word, headline = "none", "Looks so", f"Looks better than the {served}, by association alone"
    elif low > 0:
        state, word, headline = "good", "Yes", f"Better than the {served}"
    elif high < 0:
        state, word, headline = "bad", "No", f"Worse than the {served}"
    else:
        state, word, headline = "none", "Cannot tell", f"Not significantly different from the {served}"
    ends = (min(low or 0.0, 0.0), max(high or 0.0, 0.0))
    return Answer(
        state=state,
        better=word,
        headline=headline,
        served=served,
        gain="Unknown" if gain["gain"] is None else f"{signed(gain['gain'])} utility",
        interval="Unknown" if low is None else interval(low, high),
        whisker=whisker(low, gain["gain"], high, ends, 0.0) if ends[1] > ends[0] else Markup(),
        amounts=_amounts(before, after),
        unknown=after["unknown"] or before["unknown"] or (evaluation["warnings"][0] if doubted else None),
        grade=GRADES[evaluation["grade"]],
        acted=percent(after["acted"]),
        others=[
            f"{_sure(other, associational)} the {name}: {signed(other['gain'])} "
            f"({interval(other['low'], other['high'])})"
            for name, other in evaluation["bank_gains"].items()
            if name in ("default", SINGLE)
            and name != served
            and other["gain"] is not None
            and not {"bank", name} & misled
        ],
        reasons=gate["refusals"] or [gate["reason"]],
        checks=checks(bank, facts),
        formula=formula(bank.data.objective, before["cost"] is not None or after["cost"] is not None),
    )


def _sure(gain: dict[str, Any], associational: bool) -> str:
    verb = "looks" if associational else "is"
    if gain["low"] > 0:
        return f"{verb} better than"
    return f"{verb} worse than" if gain["high"] < 0 else "is not significantly different from"


def _amounts(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, before and after with the unit, change) of quality, cost and p95 latency, if known for both policies."""
    rows = [
        ("quality", number(before["quality"]), number(after["quality"]), change(before["quality"], after["quality"])),
        ("cost", short(before["cost"], 4), short(after["cost"], 4), change(before["cost"], after["cost"])),
        (
            "p95 latency",
            f"{milliseconds(before['latency_p95_us'])} ms",
            f"{milliseconds(after['latency_p95_us'])} ms",
            change(before["latency_p95_us"], after["latency_p95_us"]),
        ),
    ]
    return [(name, f"{old} → {new}", moved) for name, old, new, moved in rows if moved != UNKNOWN]


def checks(bank: ReasoningBank, facts: dict[str, Any]) -> list[Check]:
    """What a careful reader would check before trusting the answer."""
    evaluation, gate = facts["evaluation"], facts["config"]["gate"]
    values = {value["name"]: value for value in evaluation["values"]}
    served = served_before(evaluation)
    after, before = values["bank"], values[served]
    calibration, harm = evaluation["calibration"], after["harm"]["sure"]
    bad, total = sum(facts["data"]["bad_rows"].values()), facts["data"]["total_rows"]
    p95 = (before["latency_p95_us"], after["latency_p95_us"])
    ratio = p95[1] / p95[0] if p95[0] and p95[1] else None
    warnings = len(facts["drift"]["warnings"])
    suspect = len(evaluation["warnings"])
    unchecked = (
        "unknown: needs propensities"
        if evaluation["grade"] == "associational"
        else "unknown: it acts in too few patterns, or too few rows tried what it picks"
    )
    return [
        Check(
            "bad" if evaluation["grade"] == "associational" or suspect else "good",
            "Evidence",
            f"{evaluation['grade']} values; {bank.data.grade} verdicts"
            + (f"; {suspect} warning{'s' * (suspect > 1)}" if suspect else ""),
            "worth",
        ),
        Check(
            "bad" if warnings else "good",
            "Drift",
            f"{warnings} warning{'s' * (warnings > 1)}" if warnings else "none beyond chance",
            "drift",
        ),
        Check(
            "none" if calibration is None else "good" if calibration["ece"] <= calibration["chance"] else "bad",
            "Confidence",
            unchecked
            if calibration is None
            else f"calibration error {number(calibration['ece'], 3)}, chance gives up to "
            f"{number(calibration['chance'], 3)}",
            "policies" if calibration is None else "calibration",
        ),
        Check(
            "none" if harm is None else "bad" if harm > gate["max_harm_rate"] else "good",
            "Surely harmed",
            unchecked
            if harm is None
            else f"{percent(harm)} of the {counted(after['harm']['patterns'], 'pattern')} in which it acts",
            "policies",
        ),
        Check(
            "none" if evaluation["coverage"] is None else
            "bad" if evaluation["coverage"] < gate["min_coverage"] else "good",
            "Coverage",
            f"{percent(evaluation['coverage'])} of queries near a pattern",
            "map",
        ),
        Check(
            "none" if ratio is None else "bad" if ratio > gate["max_p95_latency_ratio"] else "good",
            "p95 latency",
            "unknown" if ratio is None else
            f"{ratio:.2f} × that of the {served}, up to {gate['max_p95_latency_ratio']:g} × allowed",
            "latency",
        ),
        Check("bad" if bad else "good", "Bad rows", f"{count(bad)} of {count(total)}", "data"),
    ]  # fmt: skip
