"""Progress of a job, as records of one logger: stages with their seconds and memory, and steps inside them.

The logger `rb_gpu.progress` has only a null handler and does not propagate, so that library calls are silent; a job
adds handlers that draw bars, print lines, or write events. Every record carries `event`, a JSON-serializable dict.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

log = logging.getLogger(__name__)
channel = logging.getLogger("rb_gpu.progress")
channel.propagate = False
channel.addHandler(logging.NullHandler())


def tell(kind: str, **facts: Any) -> None:
    """Emits one event: kind is stage_start, stage_end or step. Costs almost nothing if there are no handlers."""
    if len(channel.handlers) > 1:
        channel.info(kind, extra={"event": {"event": kind, **facts}})


def step(task: str, done: int, total: int | None, unit: str) -> None:
    """Reports that `done` of `total` units of a task are done; total is None where it is unknown."""
    tell("step", task=task, done=done, total=total, unit=unit)


def peak_memory_mb() -> float:
    """The peak resident memory of this process so far, in MiB; 0 where the system does not report it."""
    if sys.platform == "win32":
        return 0.0
    import resource

    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(kib / (2**20 if sys.platform == "darwin" else 2**10), 1)


def gpu_facts() -> dict[str, float]:
    """Peak memory since the last call (MiB) and utilisation now (percent) of the current GPU; empty while this process
    uses none.
    """
    # a job on the CPU must not start CUDA, for which another process's GPU may have no room
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}
    facts = {"gpu_memory_mb": round(torch.cuda.max_memory_allocated() / 2**20, 1)}
    torch.cuda.reset_peak_memory_stats()
    try:
        facts["gpu_utilisation_percent"] = float(torch.cuda.utilization())
    # torch queries NVML through another package, which raises plain exceptions and cannot measure a MIG slice
    except Exception as error:
        log.debug("no GPU utilisation (%s); pip install nvidia-ml-py where that is missing", error)
    return facts


@dataclass
class Watch:
    """Wall seconds of each stage, and the process's peak memory (MiB) by its end; logged when the stage ends."""

    seconds: dict[str, float] = field(default_factory=dict)
    memory_mb: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times one stage."""
        start = time.perf_counter()
        tell("stage_start", stage=name)
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        self.memory_mb[name] = peak_memory_mb()
        log.info("%-12s %8.2f s %9.0f MiB", name, self.seconds[name], self.memory_mb[name])
        facts = gpu_facts()
        tell("stage_end", stage=name, seconds=self.seconds[name], memory_mb=self.memory_mb[name], **facts)
