"""The typed settings of versions: which one a training continues from, which are kept, and which may be served."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rb_gpu.learn.checks import check, check_count, check_share
from rb_gpu.registry import VERSION


@dataclass
class GateConfig:
    """When a candidate is promoted. The 95 % lower bound of its gain over what is served now must exceed min_gain.

    max_p95_latency_ratio: largest p95 latency relative to what is served; max_harm_rate: of the patterns in which it
    acts, the largest share that may be surely harmed, unless the champion harms at least as large a share;
    min_coverage: least share of the held-out queries that are near a pattern; max_drift: largest AUC of a classifier
    that separates held-out from training queries (0.5: indistinguishable, 1: perfectly separated); min_rows: least
    number of held-out rows that tried what the candidate picks.
    """

    min_gain: float = -0.005
    min_rows: int = 100
    max_p95_latency_ratio: float = 5.0
    max_harm_rate: float = 0.2
    min_coverage: float = 0.5
    max_drift: float = 0.95

    def __post_init__(self) -> None:
        check("gate.min_gain", self.min_gain, math.isfinite(self.min_gain), "a finite number", "use -0.005")
        check_count("gate.min_rows", self.min_rows)
        ratio = self.max_p95_latency_ratio
        check("gate.max_p95_latency_ratio", ratio, ratio > 0, "a number > 0", "use 5, or inf for no bound")
        check_share("gate.max_harm_rate", self.max_harm_rate)
        check_share("gate.min_coverage", self.min_coverage)
        check("gate.max_drift", self.max_drift, 0.5 <= self.max_drift <= 1, "in [0.5, 1]", "use 0.95; 1 bounds nothing")


@dataclass
class RegistryConfig:
    """Where artifacts are stored, how many versions are kept, and the file of the signing key (null: unsigned)."""

    path: str = "artifacts"
    keep: int = 10
    hmac_key_file: str | None = None

    def __post_init__(self) -> None:
        check("registry.path", repr(self.path), bool(self.path), "a folder", "set registry.path=artifacts")
        check_count("registry.keep", self.keep, 2)
        check("registry.hmac_key_file", repr(self.hmac_key_file), self.hmac_key_file != "", "a file", "use null")


@dataclass
class RetrainConfig:
    """What a training continues from. parent: champion (what is served, if anything), none, or a version."""

    parent: str = "champion"

    def __post_init__(self) -> None:
        ok = self.parent in ("champion", "none") or VERSION.fullmatch(self.parent) is not None
        check("train.parent", self.parent, ok, "champion, none or a version", "action=list of jobs.registry shows them")
