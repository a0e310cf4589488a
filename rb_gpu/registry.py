"""The registry: a folder of artifact versions, a link to the champion, one job at a time.

artifacts/20261123T061500-3f2a91/   versions, immutable
artifacts/champion                  a relative link, switched by an atomic replace
artifacts/history.jsonl             one line per promotion: when, which, why
"""

from __future__ import annotations

import calendar
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rb_gpu.artifact import MANIFEST, read_key, read_manifest, verify_artifact
from rb_gpu.errors import ArtifactError, RegistryError
from rb_gpu.publish import sync_path

CHAMPION = "champion"
HISTORY = "history.jsonl"
LOCK = ".lock"
VERSION = re.compile(r"\d{8}T\d{6}-[0-9a-f]{6}")
STAMP = "%Y%m%dT%H%M%S"


@dataclass(frozen=True)
class Registry:
    """The artifact versions below `path`. `retain` keeps the last `keep`, and always the champion and the one before
    it.

    hmac_key: if given, only versions signed with it are served.
    """

    path: Path
    keep: int = 10
    hmac_key: bytes | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))  # a string is accepted too, as everywhere else
        if isinstance(self.keep, bool) or not isinstance(self.keep, int) or self.keep < 1:
            raise RegistryError(f"keep={self.keep!r} is not an integer >= 1; keep one version or more")

    @classmethod
    def open(cls, path: str, keep: int, hmac_key_file: str | None) -> Registry:
        """The registry of a job's `registry` settings. Raises ArtifactError if the key cannot be read."""
        return cls(Path(path), keep, None if hmac_key_file is None else read_key(hmac_key_file))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the registry for one job, and removes what a killed job left. Raises RegistryError if another job holds
        the lock.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / LOCK).open("a+")
        except OSError as error:
            raise self._unwritable(error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise RegistryError(
                    f"registry.path={self.path} is in use by another job (process {file.read().strip() or 'unknown'}); "
                    "wait for it, or choose another registry.path"
                ) from None
            try:
                os.ftruncate(file.fileno(), 0)
                os.write(file.fileno(), str(os.getpid()).encode())
            except OSError as error:
                raise self._unwritable(error) from error
            for stale in self.path.glob(".tmp-*"):
                shutil.rmtree(stale) if stale.is_dir() and not stale.is_symlink() else stale.unlink()
            yield

    def _unwritable(self, error: OSError) -> RegistryError:
        return RegistryError(
            f"registry.path={self.path} cannot be written ({error.strerror}); free space, or choose another"
        )

    def versions(self) -> list[str]:
        """All versions, oldest first."""
        if not self.path.is_dir():
            return []
        return sorted(entry.name for entry in self.path.iterdir() if VERSION.fullmatch(entry.name))

    def new_version(self) -> str:
        """A name that sorts after all earlier ones: UTC seconds, at least one more than the newest's, then random
        digits.
        """
        seconds = int(time.time())
        if versions := self.versions():
            seconds = max(seconds, calendar.timegm(time.strptime(versions[-1][:15], STAMP)) + 1)
        return f"{time.strftime(STAMP, time.gmtime(seconds))}-{os.urandom(3).hex()}"

    def champion(self) -> str | None:
        """The version that is served, or None."""
        link = self.path / CHAMPION
        return link.readlink().name if link.is_symlink() else None

    def folder(self, version: str) -> Path:
        """The folder of a version; "champion" means the version that is served. Raises RegistryError if it is
        unknown.
        """
        name = self.champion() if version == CHAMPION else version
        if not isinstance(version, str):
            raise RegistryError(f"version={version!r} is not the name of a version; action=list shows all")
        if name is None:
            raise RegistryError(f"version={version}: nothing is served yet in {self.path}; promote a version first")
        if not VERSION.fullmatch(name) or not (self.path / name / MANIFEST).is_file():
            shown = ", ".join(self.versions()[-5:]) or "none"
            raise RegistryError(f"version={version} is not in {self.path} (newest: {shown}); action=list shows all")
        return self.path / name

    def promote(self, version: str, reason: str) -> None:
        """Serves a version from now on, after verifying all its files. Raises ArtifactError or RegistryError."""
        folder = self.folder(version)
        verify_artifact(folder, self.hmac_key)
        self._switch(folder.name, {"version": folder.name, "before": self.champion(), "reason": reason})

    def _switch(self, version: str, entry: dict[str, Any]) -> None:
        temporary = self.path / f".tmp-{CHAMPION}-{os.getpid()}"
        try:
            # written before the switch: a crash between the two then leaves a line without effect, not a champion
            # without a line
            with (self.path / HISTORY).open("a+b") as file:
                # a line that a crash cut short must not swallow this one
                if file.tell() > 0:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        file.write(b"\n")
                file.write(json.dumps({"time": int(time.time()), **entry}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(version)
            temporary.replace(self.path / CHAMPION)
            sync_path(self.path)
        except OSError as error:
            raise RegistryError(
                f"{self.path / CHAMPION} cannot be switched ({error.strerror}); free space, or make it a link"
            ) from error

    def history(self) -> list[dict[str, Any]]:
        """All promotions and rollbacks, oldest first; a line torn by a crash is skipped."""
        out = []
        path = self.path / HISTORY
        for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                out.append(entry)
        return out

    def rollback(self) -> str:
        """Serves the version that was served before the champion, and returns it. Repeated calls go further back, never
        forth. Raises RegistryError.
        """
        champion, before = self.champion(), self._predecessor()
        if before is None:
            raise RegistryError(f"{self.path} has nothing to roll back to; action=list shows the versions to promote")
        try:
            verify_artifact(self.folder(before), self.hmac_key)
        except (ArtifactError, RegistryError) as error:
            raise RegistryError(
                f"{champion} stays: {before}, which was served before it, cannot be served ({error}); choose another "
                "by action=list and action=promote version=VERSION"
            ) from error
        entry = {"version": before, "before": champion, "reason": f"rolled back from {champion}", "rollback": True}
        self._switch(before, entry)
        return before

    def _predecessor(self) -> str | None:
        """The version served before the champion, ignoring those that were rolled back."""
        served: list[str] = []
        for entry in [*self.history(), {"before": self.champion()}]:
            before, version = entry.get("before"), entry.get("version")
            if before and before not in served:  # the line of its own promotion is lost
                served.append(before)
            while before and served[-1] != before:  # after a crash between the line and its switch
                served.pop()
            if entry.get("rollback"):
                served = served[:-1]
            elif version and served[-1:] != [version]:
                served.append(version)
        return served[-2] if len(served) > 1 else None

    def retain(self) -> list[str]:
        """Removes the oldest versions beyond `keep`. Returns those removed."""
        kept = (self.champion(), self._predecessor())
        old = [version for version in self.versions()[: -self.keep] if version not in kept]
        for version in old:
            # renamed first, so that an interrupted removal leaves no version with missing files
            doomed = self.path / f".tmp-removed-{version}"
            (self.path / version).rename(doomed)
            shutil.rmtree(doomed)
        return old

    def manifests(self) -> list[tuple[str, dict[str, Any] | None]]:
        """Each version with its manifest, or None if that cannot be read."""
        out: list[tuple[str, dict[str, Any] | None]] = []
        for version in self.versions():
            try:
                out.append((version, read_manifest(self.path / version)))
            except ArtifactError:
                out.append((version, None))
        return out
