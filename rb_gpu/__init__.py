"""rb_gpu: which parameters should this query use, how sure is that, and how much better than the default.

The root imports numpy, safetensors and the standard library only; `rb_gpu.learn` is the batch side.
"""

from rb_gpu.artifact import load_artifact, verify_artifact, write_artifact
from rb_gpu.bank import ReasoningBank
from rb_gpu.errors import ArtifactError, ConfigError, DataError, RbGpuError, RegistryError
from rb_gpu.params import ConfigTable, ModelTier, SearchParams
from rb_gpu.registry import Registry
from rb_gpu.router import FastGRNNRouter, RouterDecision
from rb_gpu.trajectory_log import TrajectoryLog
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
