"""Which published version a training goes on from, and which pattern ids are still free."""

from __future__ import annotations

import logging

from rb_gpu.artifact import load_artifact
from rb_gpu.bank_data import BankData
from rb_gpu.errors import ArtifactError, ConfigError
from rb_gpu.learn.config import TrainConfig
from rb_gpu.learn.lineage import differences
from rb_gpu.registry import CHAMPION, Registry

log = logging.getLogger(__name__)

NO_PARENT = "none"


def find_parent(registry: Registry, config: TrainConfig, dim: int) -> BankData | None:
    """The bank that `train.parent` names; None where it names none, where nothing is served yet, or, with a warning,
    where the champion is damaged or of another metric, dim or embedder (the gate will say so too).

    Raises RegistryError, ArtifactError or ConfigError where a version that was named cannot be a parent.
    """
    named = config.train.parent
    if named == NO_PARENT or (named == CHAMPION and registry.champion() is None):
        return None
    key = f"train.parent={named}"
    try:
        data, _ = load_artifact(registry.folder(named), registry.hmac_key)
    except ArtifactError as error:
        if named != CHAMPION:
            raise
        log.warning("%s cannot be gone on from (%s); ids of patterns start anew", key, error)
        return None
    unlike = differences(data, config.cluster.metric, dim, config.data.embedder)
    if unlike and named != CHAMPION:
        raise ConfigError(f"{key} cannot be gone on from: its {', its '.join(unlike)}; name another, or {NO_PARENT}")
    if unlike:
        log.warning("%s cannot be gone on from: its %s; ids of patterns start anew", key, ", its ".join(unlike))
        return None
    return data


def free_pattern_id(registry: Registry) -> int:
    """The least id that no pattern of any version here has had, nor one that they descend from."""
    free = 0
    for _, manifest in registry.manifests():
        # before ids were kept, they were numbered from 0
        levels = ((manifest or {}).get("counts") or {}).get("levels") or []
        free = max(free, int((manifest or {}).get("next_pattern_id", sum(levels))))
    return free
