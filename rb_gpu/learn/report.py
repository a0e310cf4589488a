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
        f"<p><b class={style}>{word}</b>: {escape(gate['reason'])}.</p>",
        *(f"<p>{_sentence(name, gain)}</p>" for name, gain in gains.items() if name != "oracle"),
        f"<p class=soft>{counts['patterns']} patterns from {counts['trajectories']:,} trajectories of "
        f"{counts['queries']:,} queries; {counts['verdicts']} have a better config than the default, on "
        f"{counts['default_stands']} the default stands. Evidence: {escape(bank.data.grade)}; held-out values: "
        f"{escape(evaluation['grade'])}, {evaluation['queries']:,} queries.</p>",
    ]
    values = _table(
        ("policy", "utility", "quality", "cost", "p50 ms", "p95 ms", "gap closed", "acted"),
        [
            (
                value["name"], _number(value["utility"]), _number(value["quality"]), _number(value["cost"], 4),
                _number(value["latency_p50_us"], 3, 1e-3), _number(value["latency_p95_us"], 3, 1e-3),
                _percent(value["captured"]), _percent(value["acted"]),
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
        f"<h2>Held-out value</h2>{values}<h2>Has the traffic changed?</h2>{drift}<h2>Verdicts</h2>{verdicts}"
        f"<h2>Data</h2>{quality}<h2>Timings</h2>{timings}"
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
