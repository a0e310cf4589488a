"""How the bank was made, from the manifest's facts: drift, data, time and memory, lineage, router and settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from markupsafe import Markup

from rb_gpu.bank import ReasoningBank
from rb_gpu.learn.charts import Frame, bar, linear_axis, stroke, swatch
from rb_gpu.learn.config import TrainConfig
from rb_gpu.learn.drift import LEVEL
from rb_gpu.learn.report.formats import UNKNOWN, count, date, number, percent, short, signed
from rb_gpu.learn.report.pieces import Figure, Table
from rb_gpu.params import AUTO_TIER

Facts = dict[str, Any]


def drift_tables(drift: Facts) -> list[Table]:
    """Drift of the patterns' shares and of the embeddings, next to chance; then each config's change in utility."""
    shares, embeddings = drift["shares"], drift["embeddings"]
    asked = [
        ("Have the patterns' shares of the queries changed?", f"PSI {number(shares['psi'], 3)}",
         f"PSI {number(shares['chance'], 3)} on average", short(shares["p_value"]), shares["reading"]),
        ("Have the embeddings changed?", f"AUC {number(embeddings['auc'], 3)} of a classifier", "AUC 0.5",
         short(embeddings["p_value"]), ""),
    ]  # fmt: skip
    largest = max((abs(config["change"] or 0.0) for config in drift["outcomes"]), default=0.0)
    changed = [
        (
            config["config"], signed(config["change"]),
            bar(abs(config["change"] or 0.0), largest, "" if (config["q_value"] or 1.0) <= LEVEL else "hollow"),
            short(config["q_value"]), short(config["p_shift"]), short(config["p_patterns"]), count(config["queries"]),
        )
        for config in drift["outcomes"]
    ]  # fmt: skip
    return [
        Table("Drift of traffic", ("question", "measured", "by chance", "p", "reading"), asked, words=(1, 2, 4)),
        Table(
            "Change in utility within patterns, by config",
            ("config", "change (utility)", "size (filled: q ≤ 0.01)", "q", "p all patterns", "p some patterns",
             "queries"),
            changed, drawn=(2,), sortable=True,
        ),
    ]  # fmt: skip


def data_tables(data: Facts) -> list[Table]:
    """What was read, and the bad rows by reason."""
    bad, total = data["bad_rows"], data["total_rows"]
    files = data["files"]
    listed = "; ".join(files[:8]) + (f"; and {len(files) - 8} more" if len(files) > 8 else "")
    facts = [
        ("path", data["path"] or UNKNOWN), ("files", f"{count(len(files))}: {listed}" if files else UNKNOWN),
        ("rows read", count(total)), ("bad rows", f"{count(sum(bad.values()))} ({percent(_share(bad, total), 3)})"),
        ("time of the training rows",
         f"{date(data['oldest_timestamp'])} to {date(data['newest_timestamp'])} UTC"),
        ("fingerprint of the good rows", data["fingerprint"] or UNKNOWN),
    ]  # fmt: skip
    tables = [Table("What was read", ("fact", "value"), facts, words=(1,))]
    if bad:
        most = max(bad.values())
        rows = [(reason, count(rows), bar(rows, most), percent(rows / total, 3)) for reason, rows in bad.items()]
        head = ("reason", "rows", "size", "of all rows")
        tables.append(Table("Bad rows by reason", head, rows, drawn=(2,), sortable=True))
    return tables


def _share(bad: dict[str, int], total: int) -> float | None:
    return sum(bad.values()) / total if total else None


def timing_table(facts: Facts) -> Table:
    """Wall seconds of each stage, and the peak memory if it was measured."""
    seconds, memory = facts["seconds"], facts.get("memory_mb") or {}
    total, longest = sum(seconds.values()), max(seconds.values(), default=0.0)
    most = max(memory.values(), default=0.0)
    rows: list[tuple[str, ...]] = []
    for stage, taken in seconds.items():
        cells: tuple[str, ...] = (stage, number(taken, 2), bar(taken, longest), percent(taken / (total or 1)))
        if memory:
            used = memory.get(stage)
            cells += (count(used), bar(used or 0.0, most))
        rows.append(cells)
    head: tuple[str, ...] = ("stage", "seconds", "time", "share of time")
    if memory:
        head += ("peak memory so far, MiB", "memory")
    return Table("Time and memory by stage", head, rows, drawn=(2, 5))


def lineage_table(lineage: Facts) -> Table:
    """How many patterns were kept, split, merged, born and retired, and their ids."""

    def pairs(groups: dict[str, list[int]], arrow: str) -> str:
        return "; ".join(f"{one} {arrow} {', '.join(map(str, others))}" for one, others in groups.items())

    listed = {
        "kept": ", ".join(map(str, lineage["kept"])),
        "split": pairs(lineage["split"], "→"),
        "merged": pairs(lineage["merged"], "←"),
        "born": ", ".join(map(str, lineage["born"])),
        "retired": ", ".join(map(str, lineage["retired"])),
    }
    counts = lineage["counts"]
    most = max(counts.values(), default=0)
    rows = [
        (fate, count(counts[fate]), bar(counts[fate], most), Markup("<span class=ids>{}</span>").format(ids))
        for fate, ids in listed.items()
    ]
    return Table("Patterns of all levels compared with the parent's", ("fate", "patterns", "size", "ids, at most 100"),
                 rows, words=(3,), drawn=(2,))  # fmt: skip


def router_figure(router: Facts | None) -> Figure | None:
    """The router's training and validation loss by epoch. None if there is no router."""
    if router is None:
        return None
    train, valid, best = router["train_loss"], router["valid_loss"], router["best_epoch"]
    known = [loss for loss in train + valid if loss is not None]
    frame = Frame(linear_axis("epoch", [0, max(len(valid) - 1, 1)]), linear_axis("loss", [0.0, *known]))
    for losses, style in ((train, "theirs"), (valid, "ours")):
        points = [(epoch, loss) for epoch, loss in enumerate(losses) if loss is not None]
        frame.line([epoch for epoch, _ in points], [loss for _, loss in points], style)
    frame.dots([best], [valid[best]], "ours", [f"epoch {best}: loss {short(valid[best])}"])
    outcomes = router["calibrated_on"]
    calibrated = f"calibrated on {count(outcomes)} outcomes" if outcomes else "not calibrated: too few known outcomes"
    return Figure(
        "How the router learned",
        frame.render("Loss of the router by epoch", f"Best epoch {best}, loss {short(valid[best])}."),
        (
            (stroke("theirs"), "training queries"),
            (stroke("ours"), "validation queries"),
            (swatch("circle", "ours"), f"best epoch, {best}, whose weights are used"),
        ),
        "Loss: mean squared error of utilities, in squared standard deviations. Validation loss "
        f"{short(valid[best])}. The router's confidence is {calibrated}.",
    )


def settings_tables(config: Facts) -> tuple[Table, Table]:
    """The settings that differ from the schema's defaults, and all settings."""
    usual, now = (dict(_flat(one)) for one in (asdict(TrainConfig()), config))
    changed = [(key, value, usual.get(key, UNKNOWN)) for key, value in now.items() if value != usual.get(key)]
    return (
        Table("Settings that differ from their defaults", ("setting", "value", "default"), changed, words=(1, 2)),
        Table("All settings", ("setting", "value"), list(now.items()), words=(1,)),
    )


def found_table(bank: ReasoningBank, facts: Facts) -> Table:
    """The values that the job chose for settings that are auto."""
    config, lookup, objective = facts["config"], bank.data.lookup, bank.data.objective
    margin = bank.data.arrays["margin"]
    least, most = short(float(margin.min())), short(float(margin.max()))
    half_life = facts["half_life"]
    found = {
        "params.tiers": "" if bank.data.tiers == (AUTO_TIER,) else ", ".join(bank.data.tiers),
        "params.default": bank.configs.describe(bank.data.default),
        "cluster.k": f"{count(bank.data.leaves)} patterns",
        "judge.margin": least if least == most else f"{least} to {most}, by config",
        "judge.min_probability": number(lookup.min_probability, 3),
        "judge.half_life": "" if half_life is None else _days(half_life["half_life_days"]),
        "lookup.top_k": count(lookup.top_k),
        "lookup.beta": short(lookup.beta),
        "lookup.floor": f"cosine {number(lookup.floor, 3)}",
    }
    asked = dict(_flat(config))
    rows = [(key, value) for key, value in found.items() if asked.get(key) == "auto" and value]
    rows.append(("latency and cost references", f"{short(objective.latency_ref_us, 4)} µs and "
                 f"{short(objective.cost_ref, 4)}"))  # fmt: skip
    return Table("Chosen by the job", ("setting", "value"), rows, words=(1,))


def _days(half_life: float | None) -> str:
    return "no decay" if half_life is None else f"{short(half_life)} days"


def _flat(config: Facts) -> Iterator[tuple[str, str]]:
    for group, value in config.items():
        if isinstance(value, dict):
            yield from ((f"{group}.{key}", _text(one)) for key, one in value.items())
        else:
            yield group, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_text, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
