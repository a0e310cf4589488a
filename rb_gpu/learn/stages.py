"""What stages made, kept for the members of a sweep: a stage that reads the same runs once.

A key holds all that a stage reads: settings, and a digest of its data. A test trains with every setting changed in turn
and demands the bits of a job of its own.
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

# a table may fill half of the memory, and what is foretold of every held-out query under every config a part of it; a
# clustering takes eight bytes a query
KEPT = {"load": 1, "outcomes": 1}
OTHERS_KEPT = 4


class Stages:
    """Results of stages by what they read. Without `sharing` every call makes anew and nothing is held."""

    def __init__(self, sharing: bool = False) -> None:
        self.sharing = sharing
        self._made: dict[str, OrderedDict[str, Any]] = {}

    def of(self, stage: str, read: Any, make: Callable[[], Made]) -> Made:
        """What `make` returns, or returned when the stage last read the same; callers must not change it in place.

        read: what JSON can write. The least recently used results go first.
        """
        if not self.sharing:
            return make()
        key = json.dumps(read, sort_keys=True, default=str)
        made = self._made.setdefault(stage, OrderedDict())
        if key in made:
            log.info("%s: as an earlier run of this sweep left it", stage)
        else:
            while len(made) >= KEPT.get(stage, OTHERS_KEPT):
                made.popitem(last=False)
            made[key] = make()
        made.move_to_end(key)
        found: Made = made[key]
        return found


def digest(array: npt.NDArray[Any]) -> str:
    """sha256 of an array's type, shape and content."""
    head = f"{array.dtype}{array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def files_read(data: DataConfig) -> list[tuple[str, int, str]]:
    """Name, size and time of change of every file that `data` names: what changes where one is written anew.

    A SQLite log's newest rows lie in the file beside it. What a version of a Delta table or Lance dataset holds never
    changes, and the version stands in the settings.
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
