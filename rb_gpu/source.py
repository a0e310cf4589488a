"""Where a bank comes from: an artifact directory or a link to one, read whole, and read again once it changed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from rb_gpu.artifact import INDEX_FILE, MANIFEST, load_artifact, read_file
from rb_gpu.bank_data import BankData
from rb_gpu.errors import ArtifactError

# a bad artifact is tried again after so long: the copy of one may be under way, and its manifest may be there first
RETRY_S = 5.0


class ArtifactSource:
    """An artifact directory, or a link to one that a registry switches. hmac_key: it must be signed with that."""

    def __init__(self, path: str | Path, hmac_key: bytes | None = None) -> None:
        # the process may change its folder; a link stays one, since it is followed anew at each read
        self.path, self._hmac_key = Path(path).absolute(), hmac_key
        self._manifest = os.fspath(self.path / MANIFEST)
        self._seen: tuple[int, ...] | None = None
        self._reading: tuple[int, ...] | None = None
        self._failed: tuple[int, ...] | None = None
        self._failed_at = 0.0
        self.error: str | None = None

    def changed(self) -> bool:
        """Whether there is something to read that was not read before: one stat. Raises OSError where it is gone."""
        found = _fingerprint(self._manifest)
        if found == self._seen:
            self.error = None  # whatever was bad is gone again
            return False
        return found != self._failed or time.monotonic() - self._failed_at >= RETRY_S

    def read(self) -> tuple[BankData, Any]:
        """The bank and the content of its index, both of the one folder that the link leads to now.

        Raises ArtifactError; call `accept` once it is served, or `refuse`.
        """
        folder, self._reading = Path(os.path.realpath(self.path)), None
        try:
            self._reading = _fingerprint(os.fspath(folder / MANIFEST))
        except OSError as error:
            raise ArtifactError(
                f"{folder} holds no {MANIFEST} ({error.strerror}); run jobs.train or check the path"
            ) from error
        data, manifest = load_artifact(folder, self._hmac_key)
        return data, read_file(folder, manifest, INDEX_FILE)

    def accept(self) -> None:
        """What was read last is served."""
        self._seen, self._failed, self.error = self._reading, None, None

    def refuse(self, reason: str) -> bool:
        """What was read last is not served; whether this is news."""
        news = self.error != reason
        # not what the link leads to by now, which nobody has looked at
        self.error, self._failed, self._failed_at = reason, self._reading, time.monotonic()
        return news


def _fingerprint(manifest: str) -> tuple[int, ...]:
    """What changes when the link is switched or the artifact is replaced."""
    status = os.stat(manifest)  # noqa: PTH116 - a third of a Path's time, and this runs before lookups
    # of two mounted images the file's number, time and size may be the same
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
