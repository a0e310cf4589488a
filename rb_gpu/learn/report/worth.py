"""What the bank is worth: the answer of the first screen, the policy table, the curve of cost and quality, calibration.

`evaluation` is what policy.Evaluation holds, as plain values of the manifest: None is a number that is not known.
"""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup

from rb_gpu.bank import ReasoningBank
from rb_gpu.learn.charts import Frame, linear_axis, stroke, swatch, whisker
from rb_gpu.learn.policy import SINGLE
from rb_gpu.learn.report.formats import (
    UNKNOWN,
    change,
    count,
    interval,
    milliseconds,
    number,
    percent,
    short,
    signed,
)
from rb_gpu.learn.report.pieces import Check, Figure, Table
from rb_gpu.objective import Objective
from rb_gpu.registry import CHAMPION

GRADES = {
    "exact": "exact: every query was tried under every pick",
    "dr": "estimated doubly robustly from one config per query and its logged propensity",
    "associational": "associational: no propensities were logged, so that who chose what may mislead",
}
NORMAL_95 = 1.959964
# whose intervals make the scale: what lies far off, as hindsight does, would make all these look alike
COMPARED = ("default", SINGLE, "bank", CHAMPION)


def served_before(evaluation: dict[str, Any]) -> str:
    """What a promotion would replace: the champion, or the default where there is none."""
    return CHAMPION if CHAMPION in evaluation["bank_gains"] else "default"


def formula(objective: Objective) -> str:
    """The objective in words, with its unit."""
    quality = f"quality ({objective.quality}, 0 to 1)"
    if objective.kind == "bound":
        bounds = [
            *([f"p95 latency ≤ {short(objective.max_latency_us)} µs"] if objective.max_latency_us is not None else []),
            *([f"mean cost ≤ {short(objective.max_cost)}"] if objective.max_cost is not None else []),
        ]
        return f"Utility is {quality}; configs must keep {' and '.join(bounds)}."
    if objective.kind == "floor":
        return f"Utility is {quality}; the cheapest config that reaches {objective.target:g} is sought."
    terms = []
    if objective.latency_weight:
        terms.append(f" − {objective.latency_weight:g} × log2(latency / {short(objective.latency_ref_us)} µs)")
    if objective.cost_weight:
        terms.append(f" − {objective.cost_weight:g} × cost / {short(objective.cost_ref, 4)}")
    return f"Utility is {quality}{''.join(terms)}."


def answer(bank: ReasoningBank, facts: dict[str, Any]) -> dict[str, Any]:
    """The first screen: is it better, by how much, how sure, and was it promoted."""
    evaluation, gate = facts["evaluation"], facts["gate"]
    served = served_before(evaluation)
    gain = evaluation["bank_gains"][served]
    values = {value["name"]: value for value in evaluation["values"]}
    before, after = values[served], values["bank"]
    low, high = gain["low"], gain["high"]
    if low is None or high is None:
        state, word, headline = "none", "Unknown", "Nobody can say yet whether this bank is better"
    elif served == "default" and not after["acted"]:
        state, word, headline = "none", "No change", "The default stands for every held-out query"
    elif low > 0:
        state, word, headline = "good", "Yes", f"Better than the {served}"
    elif high < 0:
        state, word, headline = "bad", "No", f"Worse than the {served}"
    else:
        state, word, headline = "none", "Cannot tell", f"Not told apart from the {served}"
    ends = (min(low or 0.0, 0.0), max(high or 0.0, 0.0))
    return {
        "state": state,
        "better": word,
        "headline": headline,
        "served": served,
        "gain": "Unknown" if gain["gain"] is None else f"{signed(gain['gain'])} utility",
        "interval": "Unknown" if low is None else interval(low, high),
        "whisker": whisker(low, gain["gain"], high, ends, 0.0) if ends[1] > ends[0] else Markup(),
        "amounts": _amounts(before, after),
        "unknown": after["unknown"] or before["unknown"],
        "grade": GRADES[evaluation["grade"]],
        "acted": percent(after["acted"]),
        "others": [
            f"{_sure(other)} the {name}: {signed(other['gain'])} ({interval(other['low'], other['high'])})"
            for name, other in evaluation["bank_gains"].items()
            if name in ("default", SINGLE) and name != served and other["gain"] is not None
        ],
        "reasons": gate["refusals"] or [gate["reason"]],
        "min_gain": facts["config"]["gate"]["min_gain"],
        "checks": checks(bank, facts),
        "formula": formula(bank.data.objective),
    }


def _sure(gain: dict[str, Any]) -> str:
    return "better than" if gain["low"] > 0 else "worse than" if gain["high"] < 0 else "not told apart from"


def _amounts(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, from and to with the unit, and the change, of what is known."""
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
    """What a careful reader would look at before trusting the answer."""
    evaluation, gate = facts["evaluation"], facts["config"]["gate"]
    values = {value["name"]: value for value in evaluation["values"]}
    after, before = values["bank"], values[served_before(evaluation)]
    calibration, harm = evaluation["calibration"], after["harm"]["sure"]
    bad, total = sum(facts["data"]["bad_rows"].values()), facts["data"]["total_rows"]
    p95 = (before["latency_p95_us"], after["latency_p95_us"])
    ratio = p95[1] / p95[0] if p95[0] and p95[1] else None
    warnings = len(facts["drift"]["warnings"])
    suspect = len(evaluation["warnings"])
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
            "too few patterns act to tell"
            if calibration is None
            else f"off by {number(calibration['ece'], 3)}, chance gives up to {number(calibration['chance'], 3)}",
            "policies" if calibration is None else "calibration",
        ),
        Check(
            "none" if harm is None else "bad" if harm > gate["max_harm_rate"] else "good",
            "Surely harmed",
            "unknown" if harm is None else f"{percent(harm)} of {after['harm']['patterns']} patterns that act",
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
            "unknown" if ratio is None else f"{ratio:.2f} × before; allowed {gate['max_p95_latency_ratio']:g} ×",
            "latency",
        ),
        Check("bad" if bad else "good", "Bad rows", f"{count(bad)} of {count(total)} read", "data"),
    ]  # fmt: skip


def policy_tables(evaluation: dict[str, Any]) -> list[Table]:
    """Each policy's utility and the bank's gain over it, both drawn; then what it costs and whom it touches."""
    values, gains = evaluation["values"], evaluation["bank_gains"]
    ends = _ends([(value["low"], value["high"]) for value in values if value["name"] in COMPARED])
    gain_ends = _ends([(0.0, 0.0), *((gain["low"], gain["high"]) for name, gain in gains.items() if name in COMPARED)])
    default = next(value["utility"] for value in values if value["name"] == "default")
    worth: list[tuple[str, ...]] = []
    for value in values:
        gain = gains.get(value["name"], {"gain": None, "low": None, "high": None})
        worth.append((
            Markup("<b>{}</b>").format(value["name"]) if value["name"] == "bank" else value["name"],
            number(value["utility"]),
            whisker(value["low"], value["utility"], value["high"], ends, default),
            UNKNOWN if value["low"] is None else f"{number(value['low'])} to {number(value['high'])}",
            signed(gain["gain"]),
            whisker(gain["low"], gain["gain"], gain["high"], gain_ends, 0.0),
            interval(gain["low"], gain["high"]),
        ))  # fmt: skip
    touched = [
        (
            value["name"], number(value["quality"]), short(value["cost"], 4), milliseconds(value["latency_p50_us"]),
            milliseconds(value["latency_p95_us"]), milliseconds(value["latency_p99_us"]), percent(value["captured"]),
            number(value["regret"]), percent(value["acted"]), count(value["ess"]), percent(value["harm"]["negative"]),
            percent(value["harm"]["sure"]),
        )
        for value in values
    ]  # fmt: skip
    tables = [
        Table(
            "Utility of each policy on held-out queries",
            ("policy", "utility", f"{number(ends[0], 3)} to {number(ends[1], 3)}, rule: default", "95 % interval",
             "bank's gain over it", f"{signed(gain_ends[0], 3)} to {signed(gain_ends[1], 3)}, rule: 0",
             "95 % interval of the gain"),
            worth, drawn=(2, 5), sortable=True,
        ),
        Table(
            "Quality, cost, latency and harm of each policy on held-out queries",
            ("policy", "quality", "cost", "p50 ms", "p95 ms", "p99 ms", "gap closed", "regret", "acted",
             "effective rows", "harm", "sure harm"),
            touched, sortable=True,
        ),
    ]  # fmt: skip
    estimated = [value for value in values if value["estimates"]]
    if estimated:
        rows = [
            (value["name"], number(value["utility"]), *(number(one) for one in value["estimates"].values()))
            for value in estimated
        ]
        head = ("policy", "self-normalised dr (used)", *estimated[0]["estimates"])
        tables.append(Table("Utility by other estimators", head, rows, sortable=True))
    return tables


def _ends(intervals: list[tuple[float | None, float | None]]) -> tuple[float, float]:
    """A scale that holds all intervals, and half as much again on both sides for what is near them."""
    known = [end for pair in intervals for end in pair if end is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    room = (high - low) / 2 or 0.5
    return low - room, high + room


def doubts(evaluation: dict[str, Any]) -> list[str]:
    """What is wrong with the propensities, and which policies have no value and why."""
    unknown = [f"{value['name']} has no value: {value['unknown']}" for value in evaluation["values"]
               if value["unknown"]]  # fmt: skip
    return [*evaluation["warnings"], *unknown]


def tradeoff_figure(bank: ReasoningBank, tradeoffs: dict[str, Any] | None) -> Figure | None:
    """Quality over cost: the bank under every weight of cost, beside single configs and their mixes."""
    if tradeoffs is None:
        return None
    ours, theirs = tradeoffs["bank"], tradeoffs["configs"]
    every = ours + theirs
    frame = Frame(
        linear_axis("mean cost of a query, as logged", [point["cost"] for point in every]),
        linear_axis(f"quality ({bank.data.objective.quality}, 0 to 1)", [point["quality"] for point in every]),
    )
    trained = f"{bank.data.objective.cost_weight:g}"
    default = bank.configs.describe(bank.data.default)
    for points, style, shape in ((theirs, "theirs", "square"), (ours, "ours", "circle")):
        hull = [point for point in points if point["on_hull"]]
        frame.line([point["cost"] for point in hull], [point["quality"] for point in hull], style)
        for point in points:
            name = f"bank, cost weight {point['name']}" if points is ours else point["name"]
            title = f"{name}: cost {short(point['cost'], 4)}, quality {number(point['quality'])}"
            is_mark = point["name"] == (trained if points is ours else default)
            at = [point["cost"]], [point["quality"]]
            frame.dots(*at, style + " marked" * is_mark, [title], "diamond" if is_mark else shape, 6 if is_mark else 4)
    areas = {name: tradeoffs[f"{key}_area"] for name, key in (("bank", "bank"), ("mixes of configs", "configs"))}
    said = "; ".join(f"{name} {number(area['aiq'])} (APGR {number(area['apgr'], 3)})" for name, area in areas.items())
    rows = [
        (which, point["name"], short(point["cost"], 4), number(point["quality"]), "yes" if point["on_hull"] else "no")
        for which, points in (("bank at cost weight", ours), ("config", theirs)) for point in points
    ]  # fmt: skip
    return Figure(
        "Quality over cost",
        frame.render("Quality over cost", f"Mean quality over mean cost on held-out queries. Area by curve: {said}."),
        (
            (swatch("circle", "ours"), "bank, by weight of cost"),
            (swatch("diamond", "ours marked"), f"bank as trained, weight {trained}"),
            (swatch("square", "theirs"), "one config for all queries"),
            (swatch("diamond", "theirs marked"), "default"),
            (stroke("theirs"), "best mixes of configs, blind to the query"),
        ),
        f"Up and to the left is better; where the bank's line lies above the dashed one, it pays to look at the query. "
        f"Mean quality over that range of cost (AIQ): {said}.",
        Table("Points of quality over cost", ("curve", "point", "cost", "quality", "on its hull"), rows, (1,),
              sortable=True),
    )  # fmt: skip


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share seen in n (Wilson 1927)."""
    z2 = NORMAL_95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = NORMAL_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def reliability_figure(calibration: dict[str, Any] | None) -> Figure | None:
    """Foretold probabilities beside the shares that came, on the diagonal where confidence keeps its word."""
    if calibration is None:
        return None
    foretold, seen, patterns = calibration["foretold"], calibration["seen"], calibration["patterns"]
    bins = len(foretold)
    sizes = [patterns // bins + (one < patterns % bins) for one in range(bins)]
    ends = [wilson(share, n) for share, n in zip(seen, sizes, strict=True)]
    frame = Frame(
        linear_axis("probability foretold that a pattern beats the default", [0.0, 1.0]),
        linear_axis("share of patterns that did", [0.0, 1.0]),
        height=340.0,
    )
    frame.line([0, 1], [0, 1], "theirs")
    frame.whiskers(foretold, [low for low, _ in ends], [high for _, high in ends], "ours")
    frame.dots(foretold, seen, "ours", [f"foretold {told:.2f}, came {came:.2f}, of {n} patterns"
                                        for told, came, n in zip(foretold, seen, sizes, strict=True)])  # fmt: skip
    kept = calibration["ece"] <= calibration["chance"]
    said = (
        f"Calibration error (ECE) {number(calibration['ece'], 3)}: {'within' if kept else 'over'} the "
        f"{number(calibration['chance'], 3)} that chance alone gives in 95 % of cases where every probability is "
        f"right. Brier score {number(calibration['brier'], 3)}."
    )
    rows = [
        (str(one + 1), str(n), number(told, 3), number(came, 3), f"{low:.2f} to {high:.2f}")
        for one, (n, told, came, (low, high)) in enumerate(zip(sizes, foretold, seen, ends, strict=True))
    ]
    return Figure(
        "Does confidence keep its word?",
        frame.render("Reliability of confidence", said),
        (
            (swatch("circle", "ours"), f"a tenth of the {patterns} patterns that act, with 95 % interval"),
            (stroke("theirs"), "every probability right"),
        ),
        said,
        Table("Reliability by group", ("group", "patterns", "foretold", "came", "95 % interval"), rows),
    )
