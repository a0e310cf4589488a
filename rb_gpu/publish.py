"""Writes an artifact durably, and either completely or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from rb_gpu.artifact import (
    BANK_FILE,
    FILE_NAME,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SCHEMA_VERSION,
    SIGNATURE_FILE,
    signature,
)
from rb_gpu.bank_data import BankData, check_bank
from rb_gpu.errors import ArtifactError
from rb_gpu.tensor_file import tensors_content


def file_digest(content: bytes) -> dict[str, Any]:
    """sha256 and size of a file's content, in the manifest's form."""
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def write_artifact(
    folder: str | Path, data: BankData, extra_files: dict[str, bytes], hmac_key: bytes | None = None
) -> dict[str, Any]:
    """Writes a complete artifact at `folder`, which must not exist: into a temporary sibling, fsynced, then renamed.

    extra_files: content by name (index.faiss, router.safetensors, report.html). hmac_key: signs the manifest. Returns
    the manifest. Raises ArtifactError if the bank is inconsistent or the folder exists, OSError if the disk refuses;
    nothing is left behind in either case.
    """
    folder = Path(folder)
    check_bank(data)
    for name in extra_files:
        if not FILE_NAME.fullmatch(name) or name in (MANIFEST, SIGNATURE_FILE, BANK_FILE):
            raise ArtifactError(f"{name!r} cannot be the name of a further file of an artifact; choose another")
    if os.path.lexists(folder):
        raise ArtifactError(f"{folder} exists; artifacts are immutable, publish under another version")
    files = {BANK_FILE: tensors_content(data.arrays), **extra_files}
    head = {"schema_version": SCHEMA_VERSION, "version": folder.name, **data.head()}
    # the facts of a loaded bank are a whole manifest, whose head may differ from this one
    facts = {name: value for name, value in data.facts.items() if name not in head}
    digests = {name: file_digest(content) for name, content in files.items()}
    manifest = head | facts | {"files": digests}
    files[MANIFEST] = (json.dumps(manifest, indent=1, allow_nan=False, default=_plain) + "\n").encode()
    if len(files[MANIFEST]) > MAX_MANIFEST_BYTES:
        raise ArtifactError(f"the manifest has {len(files[MANIFEST])} bytes, over {MAX_MANIFEST_BYTES}; shorten facts")
    if hmac_key is not None:
        files[SIGNATURE_FILE] = signature(hmac_key, files[MANIFEST])
    temporary = folder.parent / f".tmp-{folder.name}-{os.getpid()}"
    temporary.mkdir(parents=True)
    place = temporary
    try:
        for name, content in files.items():
            with (temporary / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                # read-only, because services map the file: a write to it would change their memory
                os.fchmod(file.fileno(), 0o444)
        sync_path(temporary)
        place = temporary.rename(folder)
        sync_path(folder.parent)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return manifest


def sync_path(path: Path) -> None:
    """Makes a file's content, or a folder's entries, durable (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def without_nan(value: Any) -> Any:
    """The value with every NaN or infinite number replaced by None, since JSON has neither."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no place in a manifest")
