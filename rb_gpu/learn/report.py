"""The self-contained report.html of an artifact: what the bank is worth, how sure that is, and its verdicts."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from rb_gpu.bank import ReasoningBank

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #fff; --line: #d0d7de; --good: #116329;
  --bad: #a40e26 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b1; --paper: #0d1117; --line: #30363d;
  --good: #56d364; --bad: #ff7b72 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 62rem; padding: 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.good { color: var(--good) } .bad { color: var(--bad) } .soft { color: var(--soft) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100% }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left }
"""


def render_report(bank: ReasoningBank, facts: dict[str, Any]) -> str:
    """A page without network, script or font of its own. facts: the manifest's, with evaluation and gate."""
    evaluation, gate, counts = facts["evaluation"], facts["gate"], facts["counts"]
    style, word = ("good", "Promoted") if gate["promote"] else ("bad", "Not promoted")
    gains = evaluation["bank_gains"]
    lines = [
        *(f"<p><b class={style}>{word}</b>: {escape(reason)}.</p>" for reason in gate["refusals"] or [gate["reason"]]),
        *(f"<p>{_sentence(name, gain)}</p>" for name, gain in gains.items() if name != "oracle"),
        f"<p class=soft>{counts['patterns']} patterns from {counts['trajectories']:,} trajectories of "
        f"{counts['queries']:,} queries; {counts['verdicts']} have a better config than the default, on "
        f"{counts['default_stands']} the default stands. Evidence: {escape(bank.data.grade)}; held-out values: "
        f"{escape(evaluation['grade'])}, {evaluation['queries']:,} queries.</p>",
    ]
    values = _table(
        ("policy", "utility", "95 % interval", "quality", "cost", "p50 ms", "p95 ms", "gap closed", "regret", "acted",
         "ess", "harm", "sure harm"),
        [
            (
                value["name"], _number(value["utility"]), f"{_number(value['low'])} to {_number(value['high'])}",
                _number(value["quality"]), _number(value["cost"], 4), _number(value["latency_p50_us"], 3, 1e-3),
                _number(value["latency_p95_us"], 3, 1e-3), _percent(value["captured"]), _number(value["regret"]),
                _percent(value["acted"]), f"{value['ess']:,.0f}", _percent(value["harm"]["negative"]),
                _percent(value["harm"]["sure"]),
            )
            for value in evaluation["values"]
        ],
    )  # fmt: skip
    verdicts = _table(
        ("pattern", "support", "config", "gain", "95 % interval", "P(better)", "p adjusted", "p any night"),
        [
            (
                str(pattern_id), f"{bank.patterns[pattern_id].support_count:,}",
                "default" if verdict.default_stands else bank.configs.describe(verdict.config_id),
                _number(verdict.evidence.effect),
                f"{_number(verdict.evidence.effect_low)} to {_number(verdict.evidence.effect_high)}",
                _number(verdict.evidence.probability, 3), _number(verdict.evidence.p_adjusted, 3),
                _number(verdict.evidence.p_sequential, 3),
            )
            for pattern_id, verdict in bank.verdicts.items()
        ],
    )  # fmt: skip
    drift = _drift(facts["drift"])
    bad = facts["data"]["bad_rows"]
    quality = _table(("reason", "rows"), [(k, f"{v:,}") for k, v in bad.items()]) if bad else "<p>No bad rows.</p>"
    timings = _table(("stage", "seconds"), [(k, f"{v:.2f}") for k, v in facts["seconds"].items()])
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>rb_gpu report</title><style>{STYLE}</style><main><h1>Is the new bank better?</h1>{''.join(lines)}"
        f"<h2>Held-out value</h2>{values}{_doubts(evaluation)}"
        f"{_tradeoffs(evaluation['tradeoffs'])}{_calibration(evaluation['calibration'])}"
        f"<h2>Has the traffic changed?</h2>{drift}<h2>Verdicts</h2>{verdicts}"
        f"<h2>What became of the patterns</h2>{_lineage(facts['lineage'])}"
        f"{_router(facts['router'])}<h2>Data</h2>{quality}<h2>Timings</h2>{timings}"
        "</main></html>\n"
    )


def _sentence(name: str, gain: dict[str, float | None]) -> str:
    if gain["low"] is None or gain["high"] is None or gain["gain"] is None:
        return f"Against the {escape(name)}: unknown, no held-out row tried it."
    sure = "better" if gain["low"] > 0 else "worse" if gain["high"] < 0 else "not distinguishable"
    style = {"better": "good", "worse": "bad"}.get(sure, "soft")
    return (
        f"Against the {escape(name)}: <b class={style}>{sure}</b>, {gain['gain']:+.4f} "
        f"(95 % interval {gain['low']:+.4f} to {gain['high']:+.4f})."
    )


def _doubts(evaluation: dict[str, Any]) -> str:
    """What the values rest on: bad propensities, policies without a value, and the plainer estimators."""
    warnings = [*evaluation["warnings"]]
    warnings += [f"{one['name']} has no value: {one['unknown']}" for one in evaluation["values"] if one["unknown"]]
    said = "".join(f"<p><b class=bad>{escape(warning)}</b>.</p>" for warning in warnings)
    said += (
        "<p class=soft>harm: share of the patterns in which the policy acts that look worse than under the default; "
        "about half do by chance where nothing differs. sure harm: those that surely are, Holm's test at 5 %.</p>"
    )
    estimated = [value for value in evaluation["values"] if value["estimates"]]
    if not estimated:
        return said
    head = ("utility by estimator", "self-normalised dr", *estimated[0]["estimates"])
    rows = [(one["name"], *(_number(v) for v in (one["utility"], *one["estimates"].values()))) for one in estimated]
    return said + _table(head, rows)


def _tradeoffs(tradeoffs: dict[str, Any] | None) -> str:
    """Quality over cost as a curve: the bank under every weight of cost, beside single configs and their mixes."""
    if tradeoffs is None:
        return ""
    every = tradeoffs["bank"] + tradeoffs["configs"]
    low_cost, high_cost = min(one["cost"] for one in every), max(one["cost"] for one in every)
    low, high = min(one["quality"] for one in every), max(one["quality"] for one in every)

    def at(one: dict[str, Any]) -> tuple[float, float]:
        x = 60 + 520 * (one["cost"] - low_cost) / (high_cost - low_cost)
        return x, 270 - 250 * (one["quality"] - low) / max(high - low, 1e-300)

    def line(points: list[dict[str, Any]], colour: str) -> str:
        places = [at(one) for one in points if one["on_hull"]]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        return f"<polyline points='{corners}' fill=none stroke={colour} />"

    def dots(points: list[dict[str, Any]], colour: str) -> str:
        out = []
        for one in points:
            x, y = at(one)
            title = f"{escape(one['name'])}: cost {_number(one['cost'], 4)}, quality {_number(one['quality'])}"
            out.append(f"<circle cx={x:.1f} cy={y:.1f} r=3 fill={colour}><title>{title}</title></circle>")
        return "".join(out)

    areas = _table(
        ("over that range of cost", "AIQ", "APGR"),
        [
            (name, _number(area["aiq"]), _number(area["apgr"], 3))
            for name, area in (("bank", tradeoffs["bank_area"]), ("mixes of configs", tradeoffs["configs_area"]))
        ],
    )
    ours, theirs = "var(--good)", "var(--soft)"
    return (
        "<h2>Quality over cost</h2><svg viewBox='0 0 600 310' role=img aria-label='quality over cost' "
        "font-size=12 fill=currentColor>"
        f"{line(tradeoffs['configs'], theirs)}{line(tradeoffs['bank'], ours)}"
        f"{dots(tradeoffs['configs'], theirs)}{dots(tradeoffs['bank'], ours)}"
        f"<text x=2 y=20>{_number(high, 3)}</text><text x=2 y=274>{_number(low, 3)}</text>"
        f"<text x=60 y=300>{_number(low_cost, 3)}</text>"
        f"<text x=580 y=300 text-anchor=end>{_number(high_cost, 3)}</text>"
        "<text x=320 y=300 text-anchor=middle>cost</text></svg>"
        "<p class=soft>Green: the bank under other weights of cost, as <code>tradeoff</code> asks for at lookup. Grey: "
        f"single configs, and the best mixes of them that look at no query.</p>{areas}"
    )


def _calibration(calibration: dict[str, Any] | None) -> str:
    """Foretold probabilities beside the shares that came, on the diagonal where confidence keeps its word."""
    if calibration is None:
        return ""
    pairs = zip(calibration["foretold"], calibration["seen"], strict=True)
    dots = "".join(
        f"<circle cx={60 + 240 * foretold:.1f} cy={260 - 240 * seen:.1f} r=4 fill=var(--good)>"
        f"<title>foretold {foretold:.2f}, came {seen:.2f}</title></circle>"
        for foretold, seen in pairs
    )
    style = "good" if calibration["ece"] <= calibration["chance"] else "bad"
    return (
        "<h2>Does confidence keep its word?</h2>"
        f"<p>Of {calibration['patterns']} patterns that act on held-out queries: calibration error (ECE) "
        f"<b class={style}>{_number(calibration['ece'], 3)}</b>, up to {_number(calibration['chance'], 3)} by chance "
        f"alone where every probability is right; Brier score {_number(calibration['brier'], 3)}.</p>"
        "<svg viewBox='0 0 600 310' role=img aria-label='share that came over probability foretold' font-size=12 "
        "fill=currentColor><polyline points='60,260 300,20' fill=none stroke=var(--soft) />"
        f"{dots}<text x=54 y=264 text-anchor=end>0</text><text x=54 y=26 text-anchor=end>1</text>"
        "<text x=60 y=280>0</text><text x=300 y=280 text-anchor=end>1</text>"
        "<text x=180 y=300 text-anchor=middle>probability foretold</text></svg>"
        "<p class=soft>Ten groups of patterns by the probability with which their held-out mean was foretold to beat "
        "the default's by the margin, and the share of which did. It follows from the confidence and from how noisy "
        "the held-out mean is.</p>"
    )


def _drift(drift: dict[str, Any]) -> str:
    """What changed between the training queries and the newest, each number beside what chance alone gives."""
    shares, embeddings = drift["shares"], drift["embeddings"]
    warnings = drift["warnings"] or ["nothing beyond what chance gives"]
    style = "bad" if drift["warnings"] else "good"
    table = _table(
        ("config", "queries", "change of utility", "p all patterns", "p some patterns", "q"),
        [
            (
                config["config"], f"{config['queries']:,}", _number(config["change"]), _number(config["p_shift"], 3),
                _number(config["p_patterns"], 3), _number(config["q_value"], 3),
            )
            for config in drift["outcomes"]
        ],
    )  # fmt: skip
    return (
        f"{''.join(f'<p><b class={style}>{escape(warning)}</b>.</p>' for warning in warnings)}"
        f"<p>{drift['newest_queries']:,} newest queries beside {drift['training_queries']:,} that were learned from. "
        f"Shares of the patterns: PSI {_number(shares['psi'], 3)}, {_number(shares['chance'], 3)} by chance alone, p "
        f"{_number(shares['p_value'], 3)}, {escape(shares['reading'])}. Embeddings: told apart with AUC "
        f"{_number(embeddings['auc'], 3)} (.5 is not at all), p {_number(embeddings['p_value'], 3)}.</p>{table}"
    )


def _lineage(lineage: dict[str, Any] | None) -> str:
    """How many patterns of all levels stayed, split, merged, were born and ended since the parent, and which."""
    if lineage is None:
        return "<p>No parent: every pattern is new.</p>"

    def pairs(groups: dict[str, list[int]], arrow: str) -> str:
        return "; ".join(f"{one} {arrow} {', '.join(map(str, others))}" for one, others in groups.items())

    shown = {
        "kept": ", ".join(map(str, lineage["kept"])),
        "split": pairs(lineage["split"], "→"),
        "merged": pairs(lineage["merged"], "←"),
        "born": ", ".join(map(str, lineage["born"])),
        "retired": ", ".join(map(str, lineage["retired"])),
    }
    counts = lineage["counts"]
    listed = "".join(f"<p class=soft>{fate}: {ids}</p>" for fate, ids in shown.items() if ids)
    return (
        f"<p>Beside {escape(str(lineage['parent'] or 'the parent'))}, patterns of all levels; ids are listed up to a "
        f"hundred of a kind. Its evidence of older rows: {escape(lineage['evidence'])}.</p>"
        f"{_table(tuple(counts), [tuple(f'{count:,}' for count in counts.values())])}{listed}"
    )


def _router(router: dict[str, Any] | None) -> str:
    """The router's losses by epoch."""
    if router is None:
        return ""
    highest = max(*router["train_loss"], *router["valid_loss"], 1e-300)

    def line(losses: list[float], colour: str) -> str:
        step = 520 / max(len(losses) - 1, 1)
        corners = " ".join(f"{60 + step * i:.1f},{260 - 240 * loss / highest:.1f}" for i, loss in enumerate(losses))
        return f"<polyline points='{corners}' fill=none stroke={colour} />"

    best, last = router["best_epoch"], len(router["valid_loss"]) - 1
    least = router["valid_loss"][best]
    known = router["calibrated_on"]
    calibrated = f"its confidence is calibrated on {known} outcomes" if known else "too few outcomes to calibrate on"
    return (
        "<h2>How the router learned</h2><svg viewBox='0 0 600 310' role=img aria-label='loss by epoch' font-size=12 "
        f"fill=currentColor>{line(router['train_loss'], 'var(--soft)')}{line(router['valid_loss'], 'var(--good)')}"
        f"<circle cx={60 + 520 * best / max(last, 1):.1f} cy={260 - 240 * least / highest:.1f} r=4 fill=var(--good) />"
        f"<text x=54 y=26 text-anchor=end>{_number(highest, 3)}</text><text x=54 y=264 text-anchor=end>0</text>"
        f"<text x=60 y=280>epoch 0</text><text x=580 y=280 text-anchor=end>{last}</text></svg>"
        "<p class=soft>Mean squared error of utilities, in standard deviations. Grey: queries it learned from. Green: "
        f"queries kept back; the weights are those of epoch {best} (loss {_number(least, 3)}); {calibrated}.</p>"
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    header = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"


def _number(value: float | None, digits: int = 4, scale: float = 1.0) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value * scale:.{digits}g}" if digits < 4 else f"{value * scale:.4f}"


def _percent(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"
