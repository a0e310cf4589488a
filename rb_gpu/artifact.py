"""The artifact: an immutable directory that a job publishes and a service loads. Verifies and loads it, without
pickle.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import stat
from pathlib import Path
from typing import Any

from rb_gpu.bank_data import BankData, LookupSettings, check_bank
from rb_gpu.errors import ArtifactError
from rb_gpu.objective import Objective
from rb_gpu.tensor_file import map_tensors, no_constant

SCHEMA_VERSION = 4
MANIFEST = "manifest.json"
SIGNATURE_FILE = "manifest.sig"
BANK_FILE = "bank.safetensors"
INDEX_FILE = "index.faiss"
ROUTER_FILE = "router.safetensors"
REPORT_FILE = "report.html"
MAX_MANIFEST_BYTES = 2**20
LEAST_KEY_BYTES = 16
# allowed file names in an artifact: no folders, no hidden files
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def read_key(path: str | Path, setting: str = "registry.hmac_key_file") -> bytes:
    """The key in a file, stripped of surrounding white space. setting: the setting that names the file, for messages.
    Raises ArtifactError if the key is missing or too short.
    """
    try:
        key = Path(path).read_bytes().strip()
    except OSError as error:
        raise ArtifactError(f"{setting}={path} cannot be read ({error.strerror}); check it") from error
    if len(key) < LEAST_KEY_BYTES:
        raise ArtifactError(
            f"{setting}={path}: the key has {len(key)} bytes, under {LEAST_KEY_BYTES}; make it of random bytes"
        )
    return key


def signature(key: bytes, manifest: bytes) -> bytes:
    """The content of manifest.sig: hexadecimal HMAC-SHA256 (RFC 2104) of the manifest's bytes."""
    import hmac  # imported late, like hashlib below: OpenSSL is a tenth of this package's import

    return hmac.new(key, manifest, "sha256").hexdigest().encode() + b"\n"


def read_manifest(folder: Path, hmac_key: bytes | None = None) -> dict[str, Any]:
    """The manifest of an artifact. Raises ArtifactError if it is missing, damaged, of another schema or, when a key is
    given, not signed with it.
    """
    path = folder / MANIFEST
    content = bytes(map_file(path, MAX_MANIFEST_BYTES))
    if hmac_key is not None:
        import hmac

        signed = bytes(map_file(folder / SIGNATURE_FILE, 1024))
        if not hmac.compare_digest(signed, signature(hmac_key, content)):
            raise ArtifactError(f"{path} is not signed with the key of registry.hmac_key_file; restore it or roll back")
    try:
        manifest = json.loads(content, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); give the directory that a job published") from error
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        found = manifest.get("schema_version") if isinstance(manifest, dict) else None
        raise ArtifactError(
            f"{path} has schema_version={found}, this rb_gpu reads {SCHEMA_VERSION}; train again or change rb_gpu"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or BANK_FILE not in files:
        raise ArtifactError(f"{path} lists no {BANK_FILE}; the artifact is incomplete")
    for name, entry in files.items():
        if not FILE_NAME.fullmatch(name) or not isinstance(entry, dict):
            raise ArtifactError(f"{path} lists the file {name!r}, which no job writes; restore it or roll back")
    return manifest


def map_file(path: Path, most: int | None = None, size: Any = None) -> Any:
    """The bytes of a regular file, memory-mapped. most: largest allowed size. size: exact size that it must have.

    The file must not change while it is mapped: artifacts are replaced, never modified. Raises ArtifactError.
    """
    try:
        # opened without following a link or waiting on a pipe, so that the file that is checked is the one that is
        # mapped
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ArtifactError(f"{path} is not a regular file; restore it or roll back")
            if size is not None and status.st_size != size:
                raise ArtifactError(
                    f"{path} has {status.st_size} bytes, not the manifest's {size}; restore it or roll back"
                )
            if most is not None and status.st_size > most:
                raise ArtifactError(
                    f"{path} has {status.st_size} bytes, over the limit of {most}; this is not an artifact"
                )
            # an empty file cannot be mapped
            return mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ) if status.st_size else b""
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ELOOP:
            raise ArtifactError(f"{path} is a link, not a regular file; restore it or roll back") from error
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"{path} cannot be read ({reason}); give the directory that a job published") from error


def read_file(folder: Path, manifest: dict[str, Any], name: str) -> Any:
    """The bytes of one of the artifact's files, memory-mapped, or None if the manifest does not list it. Raises
    ArtifactError unless it is a regular file inside the folder with the size and sha256 of the manifest.
    """
    entry = manifest["files"].get(name)
    if entry is None:
        return None
    size = entry.get("size")
    if type(size) is not int:
        raise ArtifactError(f"{folder / MANIFEST} gives the size of {name} as {size!r}; restore it or roll back")
    import hashlib

    content = map_file(folder / name, size=size)
    if hashlib.sha256(content).hexdigest() != entry.get("sha256"):
        raise ArtifactError(f"{folder / name} differs from its sha256 in the manifest; restore it or roll back")
    return content


def load_artifact(folder: str | Path, hmac_key: bytes | None = None) -> tuple[BankData, dict[str, Any]]:
    """The bank of an artifact, and its manifest. Checks schema, sizes, hashes, shapes, ranges, cross-references and,
    when a key is given, the signature. The arrays are views of the memory-mapped file, so that processes share its
    pages.

    Raises ArtifactError with the reason.
    """
    folder = Path(os.path.realpath(folder))  # resolved once, as a link may be switched meanwhile
    manifest = read_manifest(folder, hmac_key)
    content = read_file(folder, manifest, BANK_FILE)
    try:
        if not isinstance(manifest["tiers"], list):
            raise TypeError("tiers are not a list")
        data = BankData(
            arrays=map_tensors(content),
            tiers=tuple(str(t) for t in manifest["tiers"]),
            default=int(manifest["default_config"]),
            metric=str(manifest["metric"]),
            embedder=str(manifest["embedder"]),
            method=str(manifest["method"]),
            grade=str(manifest["grade"]),
            objective=Objective(**manifest["objective"]),
            lookup=LookupSettings(**manifest["lookup"]),
            facts=manifest,
        )
        check_bank(data)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ArtifactError(f"{folder}: the bank cannot be read ({error!r}); train again or roll back") from error
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error}") from error
    if isinstance(content, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        # the checks have read every page; from here on only the pages that lookups touch stay resident
        content.madvise(mmap.MADV_DONTNEED)
    if manifest.get("dim") != data.dim:
        raise ArtifactError(f"{folder}: manifest says dim={manifest.get('dim')}, the centroids have {data.dim}")
    return data, manifest


def verify_artifact(folder: str | Path, hmac_key: bytes | None = None) -> dict[str, Any]:
    """Checks every file of an artifact, and its bank. Returns the manifest. Raises ArtifactError with the reason."""
    folder = Path(os.path.realpath(folder))
    _, manifest = load_artifact(folder, hmac_key)
    for name in manifest["files"]:
        read_file(folder, manifest, name)
    return manifest
