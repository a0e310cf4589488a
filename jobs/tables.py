"""Terminal tables for evaluations and for the results of the benchmark suites."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from rb_gpu.learn.policy import Evaluation
from rb_gpu.learn.tradeoffs import Tradeoffs

from .columns import amount, number, render


def evaluation_tables(evaluation: Evaluation) -> str:
    """The policy table, then the estimators side by side if values are estimated, and the reason for each policy that
    has no value.
    """
    out = [policy_table(evaluation)]
    if any(value.estimates for value in evaluation.values):
        out.append(_estimator_table(evaluation))
    unknown = [f"{value.name}: {value.unknown}" for value in evaluation.values if value.unknown is not None]
    if unknown:
        out.append("no value\n" + "\n".join(unknown))
    return "\n\n".join(out)


def policy_table(evaluation: Evaluation) -> str:
    """The value of each policy on held-out queries, and the bank's gain over it with a 95 % interval.

    harm: share of the patterns in which the policy deviates from the default whose estimated gain over the default is
    negative; sure harm: share whose gain is significantly negative. If there is an oracle, the table shows the share of
    the oracle's gap that is closed and the regret; else ess, the effective sample size of the value's weights.
    """
    known = any(value.name == "oracle" for value in evaluation.values)
    head = (
        "policy", "utility", "quality", "cost", "p95 ms", *(("gap closed", "regret") if known else ("ess",)), "acted",
        "harm", "sure harm", "bank's gain over it [95 %]",
    )  # fmt: skip
    rows = []
    for value in evaluation.values:
        gain = evaluation.bank_gains.get(value.name)
        against_oracle = (number(100 * value.captured, ".1f", " %"), number(value.regret, ".4f"))
        rows.append(
            (
                value.name,
                number(value.utility, "z.4f"),
                number(value.quality, "z.4f"),
                amount(value.cost, 4),
                amount(value.latency_p95_us / 1000),
                *(against_oracle if known else (number(value.ess, ",.0f"),)),
                number(100 * value.acted, ".1f", " %"),
                number(100 * value.harm.negative, ".0f", " %"),
                number(100 * value.harm.sure, ".0f", " %"),
                "" if gain is None else _interval(gain.gain, gain.low, gain.high, "+.4f"),
            )
        )
    return render(head, rows)


def _interval(value: float, low: float, high: float, form: str) -> str:
    return f"{value:{form}} [{low:{form}}, {high:{form}}]" if math.isfinite(value) else "-"


def _estimator_table(evaluation: Evaluation) -> str:
    names = next(list(value.estimates) for value in evaluation.values if value.estimates)
    rows = [
        (
            value.name,
            f"{value.matched:,}",
            number(value.ess, ",.1f"),
            _interval(value.utility, value.low, value.high, "z.4f"),
            *(number(value.estimates.get(name, float("nan")), "z.4f") for name in names),
        )
        for value in evaluation.values
    ]
    head = ("utility by estimator", "rows", "ess", "self-normalised dr [95 %]", *names)
    return render(head, rows)


def tradeoff_table(tradeoffs: Tradeoffs) -> str:
    """Quality over cost: the bank at every cost weight, and the single configs on the convex hull, which no mix of
    other configs beats.
    """
    rows = [(f"bank, cost weight {one.name}", one) for one in tradeoffs.bank]
    rows += [(one.name, one) for one in tradeoffs.configs if one.on_hull]
    areas = [
        (name, number(area.aiq, ".4f"), number(area.apgr, ".3f"))
        for name, area in (("bank", tradeoffs.bank_area), ("mixes of single configs", tradeoffs.configs_area))
    ]
    curve = [(name, amount(one.cost, 4), number(one.quality, ".4f")) for name, one in rows]
    return (
        f"{render(('quality over cost', 'cost', 'quality'), curve)}\n\n"
        f"{render(('over that range of cost', 'AIQ', 'APGR'), areas)}"
    )


def lookup_tables(result: dict[str, Any]) -> str:
    """Tables of the suite lookup: p50 and recall by bank size and contestant; batches, threads and a new process."""
    sizes = result["sizes"]
    names = list(sizes[0]["rows"])
    names.sort(key=lambda name: not name.startswith("ours"))
    rows = []
    for size in sizes:
        cells = [f"{size['patterns']:,} ({size['search']})"]
        for name in names:
            row = size["rows"][name]
            exact = isinstance(row, dict) and row["recall"] >= 0.99995
            cells.append(
                row if isinstance(row, str) else f"{row['p50_us']:.0f}" + ("" if exact else f" ({row['recall']:.3f})")
            )
        rows.append(cells)
    head = f"p50 in microseconds of one query (recall@5 where under 1), D={result['settings']['dim']}, one thread\n"
    out = [head + render(["patterns", *names], rows)]
    rows = [
        (
            f"{size['patterns']:,}",
            f"{size['rows'][names[0]]['p99_us']:.0f}",
            f"{size['batch_queries_per_s']:,.0f}",
            f"{100 * size['batch_share_of_product']:.0f} %",
            f"{size['one_thread_queries_per_s']:,.0f}",
            f"{size['threads_queries_per_s']:,.0f}",
        )
        for size in sizes
    ]
    many = f"{result['settings']['threads']} threads/s"
    out.append(render(("patterns", "p99 us", "batch/s", "of the product", "one thread/s", many), rows))
    once = result["process"]
    out.append(
        f"a new process, 1,024 patterns, {once['artifact_bytes'] / 2**20:.1f} MiB: import {once['import_ms']:.0f} ms "
        f"over NumPy's, load {once['load_ms']:.1f} ms, first answer {once['first_answer_us']:.0f} us, resident memory "
        f"{100 * once['resident_over_file_size']:+.0f} % of the file size over it"
    )
    return "\n\n".join(out)


def cluster_tables(result: dict[str, Any]) -> str:
    """Table of the suites cluster, seed and whole: seconds and inertia relative to ours, by data, k and contestant."""
    facts = result["machine"]
    iterations = f"{result['settings']['iterations']} Lloyd iterations"
    what = {"seed": "seeding", "whole": "whole calls with default settings", "cluster": iterations}[result["suite"]]
    rows = []
    for case in result["cases"]:
        ours = case["rows"]["ours"]
        for name, row in case["rows"].items():
            label = (f"{Path(case['data']).name} {case['n']:,} x {case['dim']}, k={case['k']:,}", name)
            if isinstance(row, str):
                rows.append((*label, row, "", "", "", "", ""))
                continue
            rows.append(
                (
                    *label,
                    f"{row['seconds']:.2f}" if row["seconds"] >= 0.1 else f"{row['seconds']:.2g}",
                    f"{row['seconds'] / ours['seconds']:.2f}",
                    f"{row['inertia'] / ours['inertia']:.5f}",
                    f"{row['gflops']:,.0f}" if "gflops" in row else "",
                    f"{100 * row['share_of_sgemm_peak']:.0f} %" if "gflops" in row else "",
                    f"{row['peak_bytes_over_start'] / 2**20:,.0f}" if "gflops" in row else "",
                )
            )
    head = ("data", "contestant", "seconds", "over ours", "inertia over ours", "GFLOP/s", "of sgemm peak", "peak MiB")
    exact = min(case["exact_share"] for case in result["cases"])
    notes = [
        f"{what}, medians of {result['settings']['rounds']} interleaved rounds, {facts['cores']} cores, "
        f"{facts['processor']}; sgemm peak {facts['sgemm_peak_gflops']:.0f} GFLOP/s",
        f"labels that float64 brute force confirms: {100 * exact:.4g} %; faiss runs with "
        + (" ".join(f"{k}={v}" for k, v in facts["faiss_environment"].items()) or "the kernels it picks"),
    ]
    return "\n".join(notes) + "\n\n" + render(head, rows)


def classic_tables(result: dict[str, Any]) -> str:
    """Table of the suite classic: inertia over the best of all runs, median and worst, and time relative to ours."""
    names, rows = list(result["cases"][0]["rows"]), []
    for case in result["cases"]:
        best = min(min(row["inertia"]) for row in case["rows"].values())
        ours = median(case["rows"]["ours"]["seconds"])
        cells = [f"{case['data']} {case['n']:,} x {case['dim']}, k={case['k']}", f"{1e3 * ours:.3g} ms"]
        for row in case["rows"].values():
            over = [100 * (one / best - 1) for one in row["inertia"]]
            cells.append(f"{median(over):.2f} / {max(over):.2f} / {median(row['seconds']) / ours:.2f}")
        rows.append(cells)
    note = (
        f"% of inertia over the best of all runs, median / worst of {result['settings']['rounds']} seeds / CPU time "
        f"over ours; x10: best of 10 starts; one thread, {result['machine']['processor']}"
    )
    return "\n".join([note, *result["missing"].values()]) + "\n\n" + render(("data", "ours takes", *names), rows)


def growth_tables(result: dict[str, Any]) -> str:
    """Tables of the suite growth: milliseconds of an iteration at every size, and the exponent of the fitted power."""
    said = []
    for one in result["series"]:
        other = "clusters" if one["axis"] == "points" else "points"
        head = (one["axis"], *(f"{size:,}" for size in one["sizes"]), "slope")
        row = ("ms an iteration", *(f"{1e3 * s:,.0f}" for s in one["seconds"]), f"{one['slope']:.2f}")
        title = f"{Path(one['data']).name}, {one['dim']} dims, {one['fixed']:,} {other}"
        said.append(f"{title}\n\n{render(head, [row])}")
    return "\n\n".join(said)


def load_tables(result: dict[str, Any]) -> str:
    """Table of the suite load: GB/s by format, speed relative to memcpy, pyarrow and the list column; peak memory."""
    settings = result["settings"]
    rows = [
        (
            name,
            f"{row['gb_per_s']:.2f}",
            f"{100 * row['of_memcpy']:.0f} %",
            f"{100 * row['read_of_memcpy']:.0f} %",
            f"{row['of_pyarrow']:.2f}",
            f"{row['of_list']:.2f}",
            "" if row["peak_rss_of_matrix"] is None else f"{row['peak_rss_of_matrix']:.2f}",
        )
        for name, row in result["formats"].items()
    ]
    head = (
        "format", "GB/s", "of memcpy", "read and checked", "times pyarrow", "times the list", "peak RSS over matrix"
    )  # fmt: skip
    return (
        f"a whole load of {settings['n']:,} x {settings['dim']} float32: read and checked (a column), joined, "
        f"its configs found, its fingerprint taken; medians of {settings['rounds']} interleaved rounds; memcpy "
        f"{result['memcpy_gb_per_s']:.2f} GB/s\n\n" + render(head, rows)
    )


def decision_tables(result: dict[str, Any]) -> str:
    """Tables of the suite decisions: gains over the best single config with 95 % intervals, how often each method
    leads, the cost of a given mean recall, and the cost and recall under a recall floor.
    """
    seeds = f"means of {result['settings']['rounds']} seeds"
    out = [_gain_table(result["cases"], seeds)] if result["cases"] else []
    if result["matched_recall"]:
        out.append(_matched_recall_table(result["matched_recall"], seeds))
    out += [_floor_table(name, rows, seeds) for name, rows in result["floor"].items()]
    return "\n\n".join(out)


def router_tables(result: dict[str, Any]) -> str:
    """Tables of the suite router: gains over the best single config; each router's size, latency and training time."""
    names = [name for name in result["cases"][0]["methods"] if name not in ("best single config", "default")]
    rows = []
    for case in result["cases"]:
        setting = f"{case['set']}, {case['cost_weight']:g}, {case['log']}, {case['queries']:,}"
        for name in names:
            one = case["methods"][name]
            rows.append((setting, name, f"{one['gain']:+.4f}", f"[{one['low']:+.4f}, {one['high']:+.4f}]"))
            setting = ""
    costs = [
        (name, f"{one['bytes'] / 1000:.1f}", f"{one['pass_us']:.0f}", f"{one['train_s']:.1f}")
        for name, one in result["routers"].items()
    ]
    gains = render(("set, cost weight, log, queries", "method", "gain", "95 %"), rows)
    return f"{gains}\n\n{render(('router', 'kB', 'us a pass', 's of training'), costs)}"


def sweep_tables(result: dict[str, Any]) -> str:
    """Table of the suite sweep: seconds of one job and of each sweep, and the ratio of the two."""
    rows = []
    for case in result["cases"]:
        for name, taken in case["seconds"].items():
            ratio = number(case["ratio"].get(name, math.nan), ".2f")
            rows.append((f"{case['data']}: {name}", f"{taken:.1f}", ratio))
    head = ("data: what ran", "seconds", "over one job")
    rounds = result["settings"]["rounds"]
    return f"whole processes, medians of {rounds} interleaved rounds\n\n{render(head, rows)}"


def _gain_table(cases: list[dict[str, Any]], seeds: str) -> str:
    rivals = [name for name in cases[0]["methods"] if name not in ("best single config", "oracle", "bank", "default")]
    head = ("set, cost weight, log", "queries", "bank [95 %]", "of headroom", *rivals, "default", "oracle")
    rows = []
    for case in cases:
        found = case["methods"]
        bank = found["bank"]
        rows.append(
            (
                f"{case['set']}, {case['cost_weight']:g}, {case['log']}",
                f"{case['queries']:,}",
                f"{bank['gain']:+.4f} [{bank['low']:+.4f}, {bank['high']:+.4f}]",
                f"{100 * bank['captured']:.0f} %",
                *(f"{found[name]['gain']:+.4f}" for name in (*rivals, "default", "oracle")),
            )
        )
    rows.append(
        (
            "mean over settings",
            "",
            *(
                f"{_mean(case['methods']['bank'][key] for case in cases):{form}}"
                for key, form in (("gain", "+.4f"), ("captured", ".0%"))
            ),
            *(
                f"{_mean(case['methods'][name]['gain'] for case in cases):+.4f}"
                for name in (*rivals, "default", "oracle")
            ),
        )
    )
    notes = []
    for name in ("bank", *rivals):
        others = [one for one in ("bank", *rivals) if one != name]
        best = sum(
            case["methods"][name]["gain"] >= max(0.0, *(case["methods"][one]["gain"] for one in others))
            for case in cases
        )
        below = sum(case["methods"][name]["high"] < 0 for case in cases)
        ahead = sum(case["methods"][name]["ahead"] > 0 for case in cases)
        notes.append((name, str(best), str(below), "" if name == "bank" else str(ahead)))
    return (
        f"gain of utility over the best single config of the same training data, on held-out queries; {seeds}\n\n"
        f"{render(head, rows)}\n\nof {len(cases)} settings\n"
        + render(("method", "best of all", "surely below the best single config", "surely above the bank"), notes)
    )


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _matched_recall_table(sets: dict[str, dict[str, dict[str, float]]], seeds: str) -> str:
    methods = [name for name in next(iter(sets.values())) if name not in ("fixed", "bank")]
    rows = []
    for name, found in sets.items():
        for method in ("fixed", "bank", *methods):
            row = found[method]
            change = f"{100 * row['change']:+.1f} % [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
            known = math.isfinite(row["change"])
            rows.append(
                (
                    name if method == "fixed" else "",
                    method,
                    number(row["cost"], ",.0f"),
                    "" if method == "fixed" else change if known else "-",
                    number(100 * row["bad"], ".1f", " %"),
                )
            )
    head = ("set", "method", "cost", "over fixed [95 %]", "queries under recall 0.8")
    return f"cost at mean recall 0.95, full tables; {seeds}\n\n{render(head, rows)}"


def _floor_table(name: str, found: dict[str, dict[str, float]], seeds: str) -> str:
    keys = [key for key in next(iter(found.values())) if key != "cost"]
    rows = [(method, f"{row['cost']:,.0f}", *(f"{row[key]:.3f}" for key in keys)) for method, row in found.items()]
    what = f"{name}: judge.objective=floor judge.target=0.95, recall by kind of query; {seeds}"
    return f"{what}\n\n{render(('method', 'cost', *keys), rows)}"
