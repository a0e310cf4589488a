"""Which published version a training continues from, and which pattern ids are still free."""

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
    """The bank that `train.parent` names; None if it names none, if nothing is served yet, or, with a warning, if the
    champion is damaged or has another metric, dim or embedder (the gate will report that too).

    Raises RegistryError, ArtifactError or ConfigError if a version that was named explicitly cannot be a parent.
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
        log.warning("%s cannot be read (%s); it is ignored, and pattern ids are new", key, error)
        return None
    unlike = differences(data, config.cluster.metric, dim, config.data.embedder)
    if unlike and named != CHAMPION:
        raise ConfigError(f"{key} does not fit: its {', its '.join(unlike)}; name another version, or {NO_PARENT}")
    if unlike:
        log.warning("%s does not fit: its %s; it is ignored, and pattern ids are new", key, ", its ".join(unlike))
        return None
    return data


def free_pattern_id(registry: Registry) -> int:
    """The least id above those of all patterns of any version here and of the patterns they descend from."""
    free = 0
    for _, manifest in registry.manifests():
        # versions from before ids were kept numbered their patterns from 0
        levels = ((manifest or {}).get("counts") or {}).get("levels") or []
        free = max(free, int((manifest or {}).get("next_pattern_id", sum(levels))))
    return free
