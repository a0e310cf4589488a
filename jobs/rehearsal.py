"""The text that `dry_run=true` prints."""

from __future__ import annotations

from rb_gpu.learn.config import TrainConfig
from rb_gpu.learn.rehearsal import Rehearsal
from rb_gpu.learn.report.formats import counted

from .columns import render

SHOWN_CONFIGS = 20


def told(found: Rehearsal, config: TrainConfig) -> str:
    """Describes the table, the resolved settings, the time and memory the job would need, and what it would publish."""
    bad = sum(found.bad_rows.values())
    reasons = "".join(f"\n  {count:,}: {reason}" for reason, count in found.bad_rows.items())
    logged = ", ".join(name if there else f"no {name}" for name, there in found.columns.items())
    shown = "".join(f"\n  {name}" for name in found.configs[:SHOWN_CONFIGS])
    more = len(found.configs) - SHOWN_CONFIGS
    place = (
        "in memory"
        if found.embedding_bytes <= found.memory_budget
        else "in a file, as they exceed device.memory_budget"
    )
    total = sum(found.seconds.values())
    times = render(
        ("stage", "seconds"), [*((k, f"{v:,.1f}") for k, v in found.seconds.items()), ("all", f"{total:,.1f}")]
    )
    files = ["bank.safetensors", "report.html", *(["index.faiss"] if config.index.kind != "off" else []),
             *(["router.safetensors"] if config.router.kind != "off" else [])]  # fmt: skip
    removed = (
        f"; {', '.join(found.removed)} would be removed (registry.keep={config.registry.keep})" if found.removed else ""
    )
    return "\n\n".join(
        [
            f"{found.path}: {counted(found.files, 'file')}, {counted(found.total_rows, 'row')}, {bad:,} of them "
            f"bad{reasons}",
            f"{found.rows:,} rows of {found.queries:,} queries, {found.dim} dimensions; the newest {found.held_out:,} "
            f"queries would be held out; logged: {logged}",
            f"{counted(len(found.configs), 'config')}{shown}" + (f"\n  and {more} more" if more > 0 else ""),
            f"on {found.device}: about {total:,.0f} s with {found.k:,} clusters, extrapolated from a sample of the "
            f"queries; loading as measured, evaluation and report not included\n\n{times}",
            f"embeddings {_size(found.embedding_bytes)}, {place}; {_size(found.free_bytes)} are free",
            f"would publish {', '.join(files)} into {config.registry.path}{removed}; the gate would compare it with "
            f"{found.served or 'the default, as nothing is served yet'}; pattern ids "
            + (f"would come from {found.parent}" if found.parent else "would start anew"),
            "dry_run=true: nothing was written",
        ]
    )


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
