"""Caches stage results for the members of a sweep, so that a stage with the same inputs runs once.

A key contains all that a stage reads: settings, and a digest of its data. A test changes every setting in turn and
requires the result to be bit-identical to that of a standalone job.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from rb_gpu.errors import DataError
from rb_gpu.learn.data_config import VERSIONED, DataConfig
from rb_gpu.learn.places import list_paths

log = logging.getLogger(__name__)

Made = TypeVar("Made")

# results kept per stage: a table may fill half of the memory, and predictions for every held-out query under every
# config a part of it; a clustering takes only eight bytes per query
KEPT = {"load": 1, "outcomes": 1}
OTHERS_KEPT = 4


class Stages:
    """Stage results, keyed by what the stage read. Without `sharing` every call recomputes and nothing is kept."""

    def __init__(self, sharing: bool = False) -> None:
        self.sharing = sharing
        self._made: dict[str, OrderedDict[str, Any]] = {}

    def of(self, stage: str, read: Any, make: Callable[[], Made]) -> Made:
        """Returns make(), or the cached result if the stage last read the same; callers must not modify it in place.

        read: a JSON-serializable description of all inputs. The least recently used results are evicted first.
        """
        if not self.sharing:
            return make()
        key = json.dumps(read, sort_keys=True, default=str)
        made = self._made.setdefault(stage, OrderedDict())
        if key in made:
            log.info("%s: reused from an earlier run of this sweep", stage)
        else:
            while len(made) >= KEPT.get(stage, OTHERS_KEPT):
                made.popitem(last=False)
            made[key] = make()
        made.move_to_end(key)
        found: Made = made[key]
        return found


def digest(array: npt.NDArray[Any]) -> str:
    """sha256 of an array's dtype, shape and content."""
    head = f"{array.dtype}{array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def files_read(data: DataConfig) -> list[tuple[str, int, str]]:
    """Name, size and modification time of every file that `data` names; these change where a file is rewritten.

    The newest rows of a SQLite log lie in the -wal file beside it. A version of a Delta table or Lance dataset never
    changes, and the version is part of the settings, so such tables list nothing.
    """
    found: list[tuple[str, int, str]] = []
    if data.format in VERSIONED:
        return found
    for key, path in (("data.path", data.path), ("data.queries", data.queries)):
        for filesystem, name in [] if path is None else list_paths(path, key, data.s3):
            for each in (name, f"{name}-wal"):
                info = filesystem.get_file_info(each)
                if info.is_file:
                    found.append((each, int(info.size), str(info.mtime_ns)))
                elif each == name:
                    raise DataError(f"{key}={name} is gone; check the path")
    return found
