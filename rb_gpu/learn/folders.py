"""Creates output folders atomically: a new folder appears complete or not at all."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rb_gpu.errors import ConfigError
from rb_gpu.publish import sync_path

log = logging.getLogger(__name__)

SUFFIX = ".partial"


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Yields a temporary sibling of `out` to write files into; on success it is fsynced and renamed to `out`.

    If the block raises, nothing is left. A killed process leaves no `out`, only a hidden `.NAME.*.partial` beside it,
    which a later run names in a warning. Raises ConfigError where `out` exists or its parent is not writable.
    """
    target = Path(out).absolute()
    _refuse_existing(target)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}{SUFFIX}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        leftovers = [p for p in target.parent.iterdir() if p.name.startswith(f".{target.name}.") and p.suffix == SUFFIX]
        partial.mkdir()
    except OSError as error:
        raise ConfigError(f"out={out} cannot be made ({error.strerror}); choose a folder that you may write") from error
    for left in leftovers:
        # not removed here, because it may belong to a run in progress
        log.warning("%s was left by a killed run, or another run is writing it; delete it once none is", left)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync_path(path)
        _refuse_existing(target)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_path(target.parent)


def _refuse_existing(target: Path) -> None:
    # lexists: a dangling link counts as existing too
    if os.path.lexists(target):
        raise ConfigError(f"out={target} already exists; choose another out, or delete it first")
