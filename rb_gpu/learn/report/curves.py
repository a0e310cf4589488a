"""Two figures from the held-out queries: quality over cost, and the calibration of confidence.

The inputs have the fields of tradeoffs.Tradeoffs and calibration.Calibration as plain values of the manifest.
"""

from __future__ import annotations

import math
from typing import Any

from rb_gpu.bank import ReasoningBank
from rb_gpu.learn.calibration import LEAST_QUERIES
from rb_gpu.learn.charts import Frame, linear_axis, stroke, swatch
from rb_gpu.learn.report.formats import number, short
from rb_gpu.learn.report.pieces import Figure, Table

NORMAL_95 = 1.959964


def tradeoff_figure(bank: ReasoningBank, tradeoffs: dict[str, Any] | None) -> Figure | None:
    """Quality over cost: the bank at every cost weight, compared with single configs and their mixes. None if costs are
    unknown.
    """
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
            (stroke("theirs"), "best mixes of configs that ignore the query"),
        ),
        f"Up and to the left is better. Where the bank's line lies above the dashed one, choosing by query pays off. "
        f"Mean quality over the range of cost (AIQ): {said}. APGR, the average performance gap recovered, is 0 for the "
        "quality of the cheapest config and 1 for that of the most expensive one.",
        Table("Points of the curves", ("curve", "point", "cost", "quality", "on the hull"), rows, (1,),
              sortable=True),
    )  # fmt: skip


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share observed in n trials (Wilson 1927)."""
    z2 = NORMAL_95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = NORMAL_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def reliability_figure(calibration: dict[str, Any] | None) -> Figure | None:
    """Reliability diagram: observed shares over predicted probabilities; a calibrated confidence lies on the diagonal.
    None if too few patterns act.
    """
    if calibration is None:
        return None
    predicted, seen, patterns = calibration["predicted"], calibration["seen"], calibration["patterns"]
    bins = len(predicted)
    sizes = [patterns // bins + (one < patterns % bins) for one in range(bins)]
    ends = [wilson(share, n) for share, n in zip(seen, sizes, strict=True)]
    frame = Frame(
        linear_axis("predicted probability that a pattern beats the default", [0.0, 1.0]),
        linear_axis("observed share of patterns that do", [0.0, 1.0]),
        height=340.0,
    )
    frame.line([0, 1], [0, 1], "theirs")
    frame.whiskers(predicted, [low for low, _ in ends], [high for _, high in ends], "ours")
    frame.dots(predicted, seen, "ours", [f"predicted {told:.2f}, observed {came:.2f}, {n} patterns"
                                        for told, came, n in zip(predicted, seen, sizes, strict=True)])  # fmt: skip
    kept = calibration["ece"] <= calibration["chance"]
    said = (
        f"Expected calibration error (ECE) {number(calibration['ece'], 3)}: {'within' if kept else 'over'} "
        f"{number(calibration['chance'], 3)}, the 95 % quantile by chance alone if every probability is right. Brier "
        f"score {number(calibration['brier'], 3)}."
    )
    rows = [
        (str(one + 1), str(n), number(told, 3), number(came, 3), f"{low:.2f} to {high:.2f}")
        for one, (n, told, came, (low, high)) in enumerate(zip(sizes, predicted, seen, ends, strict=True))
    ]
    return Figure(
        "Is the confidence calibrated?",
        frame.render("Reliability of confidence", said),
        (
            (
                swatch("circle", "ours"),
                f"a tenth of the {patterns} patterns with {LEAST_QUERIES} or more queries it acts on, 95 % interval",
            ),
            (stroke("theirs"), "perfect calibration"),
        ),
        said,
        Table("Reliability by group", ("group", "patterns", "predicted", "observed", "95 % interval"), rows),
    )
