"""Reports the results of a run to MLflow or TensorBoard.

This happens after the artifact is published, so that an unreachable tracker undoes nothing.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rb_gpu.errors import ConfigError
from rb_gpu.learn.checks import check, check_choice

log = logging.getLogger(__name__)

KINDS = ("off", "mlflow", "tensorboard")
# MLflow's server refuses longer values
LONGEST_PARAM = 500


@dataclass
class TrackConfig:
    """Where runs are tracked. uri: MLflow's server or store (null: from MLFLOW_TRACKING_URI). experiment: MLflow's name
    of the experiment. folder: TensorBoard's log directory.
    """

    kind: str = "off"
    uri: str | None = None
    experiment: str = "rb_gpu"
    folder: str = "outputs/tensorboard"

    def __post_init__(self) -> None:
        check_choice("track.kind", self.kind, KINDS)
        check("track.experiment", repr(self.experiment), bool(self.experiment), "a name", "use rb_gpu")
        check("track.folder", repr(self.folder), bool(self.folder), "a folder", "use outputs/tensorboard")


@dataclass(frozen=True)
class Run:
    """What is reported about a run. settings: nested dicts. metrics: numbers; those that are not finite are left out.
    tags: strings. files: stored with the run if the tracker stores files.
    """

    name: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    files: tuple[Path, ...] = ()


def check_tracker(config: TrackConfig) -> None:
    """Raises ConfigError, before a job begins, where the tracker's package is missing."""
    if config.kind == "mlflow":
        _package("mlflow", config.kind)
    elif config.kind == "tensorboard":
        _package("torch.utils.tensorboard", config.kind)


def track(run: Run, config: TrackConfig) -> None:
    """Reports a run to the tracker. If that fails, it is only a warning."""
    if config.kind == "off":
        return
    try:
        (_to_mlflow if config.kind == "mlflow" else _to_tensorboard)(run, config)
    except ConfigError:
        raise
    except Exception as error:  # clients and servers of other projects, whose errors have no common base class
        log.warning("track.kind=%s: the run was not tracked (%s); the artifact is not affected", config.kind, error)


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings as pairs of dotted key and text."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)[:LONGEST_PARAM]


def _finite(run: Run) -> dict[str, float]:
    return {name: float(value) for name, value in run.metrics.items() if math.isfinite(value)}


def _to_mlflow(run: Run, config: TrackConfig) -> None:
    mlflow = _package("mlflow", config.kind)
    if config.uri is not None:
        mlflow.set_tracking_uri(config.uri)
    mlflow.set_experiment(config.experiment)
    with mlflow.start_run(run_name=run.name, tags=dict(run.tags)):
        mlflow.log_params(dict(flat(run.settings)))
        mlflow.log_metrics(_finite(run))
        for path in run.files:
            mlflow.log_artifact(str(path))


def _to_tensorboard(run: Run, config: TrackConfig) -> None:
    tensorboard = _package("torch.utils.tensorboard", config.kind)
    with tensorboard.SummaryWriter(str(Path(config.folder) / run.name)) as writer:
        for name, value in _finite(run).items():
            writer.add_scalar(name, value)
        rows = "\n".join(f"| {key} | {value} |" for key, value in flat(run.settings))
        writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}")
        writer.add_text("tags", "\n\n".join(f"{key}: {value}" for key, value in run.tags.items()))


def _package(module: str, kind: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"track.kind={kind} needs a package that is not installed ({error.name}); pip install 'rb_gpu[track]', or "
            "set track=off"
        ) from error
