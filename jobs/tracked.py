"""What is reported to an experiment tracker about a training and about a member of a sweep."""

from __future__ import annotations

from dataclasses import asdict

from rb_gpu.artifact import REPORT_FILE
from rb_gpu.learn.config import TrainConfig
from rb_gpu.learn.sweep import Member
from rb_gpu.learn.track import Run
from rb_gpu.learn.training import Published


def run_of(published: Published, config: TrainConfig) -> Run:
    """The tracker's run for a published training: the value of every policy, the bank's gains, counts, seconds and
    memory by stage as metrics, and the report as an attached file.
    """
    manifest, evaluation = published.manifest, published.evaluation
    metrics: dict[str, float] = {}
    for value in evaluation.values:
        name = value.name.replace(" ", "_")
        metrics |= {f"{name}/{key}": getattr(value, key) for key in ("utility", "quality", "cost", "latency_p95_us")}
    for name, gain in evaluation.bank_gains.items():
        over = f"gain_over_{name.replace(' ', '_')}"
        metrics |= {over: gain.gain, f"{over}/low": gain.low, f"{over}/high": gain.high}
    metrics |= {f"counts/{k}": v for k, v in manifest["counts"].items() if isinstance(v, int)}
    metrics |= {f"seconds/{k}": v for k, v in manifest["seconds"].items()}
    metrics |= {f"memory_mb/{k}": v for k, v in manifest["memory_mb"].items()}
    tags = {
        "version": published.folder.name,
        "promoted": str(published.decision.promote),
        "reason": published.decision.reason,
        "parent": str(manifest["parent"]),
    }
    return Run(published.folder.name, asdict(config), metrics, tags, (published.folder / REPORT_FILE,))


def run_of_member(member: Member, sweep: str, config: TrainConfig) -> Run:
    """The tracker's run for a sweep member: the numbers of its row in the sweep's table."""
    known = ("utility", "low", "high", "gain", "gain_low", "gain_high", "seconds", "memory_mb", "patterns", "verdicts")
    tags = {"sweep": sweep, "overrides": " ".join(member.overrides), "error": member.error or ""}
    metrics = {name: float(getattr(member, name)) for name in known}
    return Run(f"{sweep}-{member.folder}", asdict(config), metrics, tags)
