"""The state from which an interrupted k-means resumes bit-identically: one safetensors file, replaced atomically."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rb_gpu.learn.distributed import Ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file. every: the number of updates between two saves, >= 1."""

    path: Path
    every: int

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], fingerprint: str) -> None:
        """Replaces the file. A failure to write is only a warning: the job itself can go on."""
        metadata = {"fingerprint": fingerprint, "facts": json.dumps(dict(facts))}
        data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata)
        # a fixed name: leftovers of a killed job are overwritten, as the registry's lock admits one job at a time
        partial = self.path.with_name(f"{self.path.name}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            partial.replace(self.path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            log.warning("cannot write checkpoint %s (%s); a killed job would start over", self.path, error.strerror)

    def load(self, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and facts of the last save with this fingerprint; None where there is none."""
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("fingerprint") != fingerprint:
                    log.info("%s is for other data or settings; starting over", self.path)
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["facts"])  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            log.warning("%s cannot be read (%s); starting over", self.path, error)
            return None

    def clear(self) -> None:
        """Removes the file once the run that it was for is complete."""
        with suppress(OSError):
            self.path.unlink()


def fingerprint(columns: Sequence[Tensor], settings: Mapping[str, Any], ranks: Ranks) -> str:
    """sha256 of the settings and of tensors (n, ...) over the rows of all ranks: identifies a checkpoint."""
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode())
    for rows in columns:
        digest.update(ranks.joined(rows).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
