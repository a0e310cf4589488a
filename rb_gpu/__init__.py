"""rb_gpu: which parameters a query should use, how sure that is, and how much better than the default they are.

This root package imports only numpy and the standard library; `rb_gpu.learn` is the batch side.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rb_gpu.bank import ReasoningBank
from rb_gpu.errors import ArtifactError, ConfigError, DataError, RbGpuError, RegistryError
from rb_gpu.params import ConfigTable, ModelTier, SearchParams
from rb_gpu.types import (
    LearnedPattern,
    OptimizedParams,
    ParamSource,
    PatternMatch,
    QueryTrajectory,
    ReasoningBankStats,
    Tradeoff,
    UserFeedback,
    Verdict,
    VerdictEvidence,
)

if TYPE_CHECKING:
    from rb_gpu.artifact import load_artifact, verify_artifact
    from rb_gpu.publish import write_artifact
    from rb_gpu.registry import Registry
    from rb_gpu.router import FastGRNNRouter, RouterDecision
    from rb_gpu.trajectory_log import TrajectoryLog

# names that a lookup does not need are imported on first access
_LATER = {
    "FastGRNNRouter": "router",
    "Registry": "registry",
    "RouterDecision": "router",
    "TrajectoryLog": "trajectory_log",
    "load_artifact": "artifact",
    "verify_artifact": "artifact",
    "write_artifact": "publish",
}

__all__ = [
    "ArtifactError",
    "ConfigError",
    "ConfigTable",
    "DataError",
    "FastGRNNRouter",
    "LearnedPattern",
    "ModelTier",
    "OptimizedParams",
    "ParamSource",
    "PatternMatch",
    "QueryTrajectory",
    "RbGpuError",
    "ReasoningBank",
    "ReasoningBankStats",
    "Registry",
    "RegistryError",
    "RouterDecision",
    "SearchParams",
    "Tradeoff",
    "TrajectoryLog",
    "UserFeedback",
    "Verdict",
    "VerdictEvidence",
    "load_artifact",
    "verify_artifact",
    "write_artifact",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
