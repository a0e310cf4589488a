"""Where a bank comes from: an artifact directory, or a link to one, which is read whole and read again when it
changes.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from rb_gpu.artifact import INDEX_FILE, MANIFEST, load_artifact, read_file
from rb_gpu.bank_data import BankData
from rb_gpu.errors import ArtifactError

# a bad artifact is retried after this long: it may still be being copied, with its manifest copied first
RETRY_S = 5.0


class ArtifactSource:
    """An artifact directory, or a link to one that a registry switches. hmac_key: if given, artifacts must be signed
    with it.
    """

    def __init__(self, path: str | Path, hmac_key: bytes | None = None) -> None:
        # absolute, as the process may change its working directory; not resolved, as a link is followed anew at each
        # read
        self.path, self._hmac_key = Path(path).absolute(), hmac_key
        self._manifest = os.fspath(self.path / MANIFEST)
        self._seen: tuple[int, ...] | None = None
        self._reading: tuple[int, ...] | None = None
        self._failed: tuple[int, ...] | None = None
        self._failed_at = 0.0
        self.error: str | None = None

    def changed(self) -> bool:
        """Whether there is an artifact that was not read before; costs one stat. Raises OSError if it is gone."""
        found = _fingerprint(self._manifest)
        if found == self._seen:
            self.error = None  # the bad artifact was taken back
            return False
        return found != self._failed or time.monotonic() - self._failed_at >= RETRY_S

    def read(self) -> tuple[BankData, Any]:
        """The bank and the content of its index, both from the one folder that the link points to now.

        The caller then calls `accept` if they are served, or `refuse` if not. Raises ArtifactError.
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
        """Notes that the artifact read last is now served."""
        self._seen, self._failed, self.error = self._reading, None, None

    def refuse(self, reason: str) -> bool:
        """Notes that the artifact read last is not served, and why. Returns whether the reason is new."""
        news = self.error != reason
        # marks what was read, not what the link points to by now, which nobody has checked
        self.error, self._failed, self._failed_at = reason, self._reading, time.monotonic()
        return news


def _fingerprint(manifest: str) -> tuple[int, ...]:
    """Numbers of the manifest that change when the link is switched or the artifact is replaced."""
    status = os.stat(manifest)  # noqa: PTH116 - a third of a Path's time, and this runs before lookups
    # the device is included because two mounted images may share inode, time and size
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
