"""The artifact: an immutable directory that a job publishes and a service loads. Write, verify, load; no pickle.

Suffixes: A patterns of all levels (leaves first), P leaves, U = P + 1 leaves and what stands for no leaf, C configs,
D dims, O outcomes, B latency bins.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from rb_gpu.errors import ArtifactError
from rb_gpu.evidence import LATENCY_BINS, OUTCOMES, Evidence
from rb_gpu.params import ConfigTable
from rb_gpu.posterior import Objective

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
BANK_FILE = "bank.safetensors"
INDEX_FILE = "index.faiss"
ROUTER_FILE = "router.safetensors"
REPORT_FILE = "report.html"
MAX_MANIFEST_BYTES = 64 * 2**20

# every array of bank.safetensors: dtype, and axes named as in this file's legend
ARRAYS: dict[str, tuple[str, str]] = {
    "centroids": ("float32", "AD"),
    "pattern_id": ("uint64", "A"),
    "level": ("uint8", "A"),
    "parent": ("int64", "A"),
    "support": ("int64", "A"),
    "precision": ("float32", "A"),
    "recall": ("float32", "A"),
    "latency_us": ("int64", "A"),
    "quality": ("float32", "A"),
    "confidence": ("float32", "A"),
    "created_at": ("int64", "A"),
    "updated_at": ("int64", "A"),
    "rating_count": ("int64", "A"),
    "rating_score": ("float64", "A"),
    "optimal_ef_search": ("uint32", "A"),
    "optimal_n_probes": ("uint32", "A"),
    "optimal_tier": ("uint32", "A"),
    "optimal_context_tokens": ("uint32", "A"),
    "optimal_temperature": ("float32", "A"),
    "config_ef_search": ("uint32", "C"),
    "config_n_probes": ("uint32", "C"),
    "config_tier": ("uint32", "C"),
    "config_context_tokens": ("uint32", "C"),
    "config_temperature": ("float32", "C"),
    "margin": ("float64", "C"),
    "score": ("float32", "UC"),
    "probability": ("float32", "UC"),
    "gain": ("float32", "UC"),
    "expected_quality": ("float32", "UC"),
    "verdict_config": ("int64", "P"),
    "verdict_stands": ("uint8", "P"),
    "verdict_support": ("int64", "P"),
    "verdict_confidence": ("float64", "P"),
    "verdict_probability": ("float64", "P"),
    "verdict_effect": ("float64", "P"),
    "verdict_effect_low": ("float64", "P"),
    "verdict_effect_high": ("float64", "P"),
    "verdict_p_value": ("float64", "P"),
    "verdict_p_adjusted": ("float64", "P"),
    "verdict_improvement": ("float64", "P"),
    "verdict_consistency": ("float64", "P"),
    "evidence_rows": ("int64", "PC"),
    "evidence_w": ("float64", "PC"),
    "evidence_w2": ("float64", "PC"),
    "evidence_mean": ("float64", "PCO"),
    "evidence_comoment": ("float64", "PCOO"),
    "evidence_precision": ("float64", "PC"),
    "evidence_recall": ("float64", "PC"),
    "evidence_latency_us": ("float64", "PC"),
    "evidence_latency_hist": ("float64", "PCB"),
    "evidence_pair_rows": ("int64", "PC"),
    "evidence_pair_w": ("float64", "PC"),
    "evidence_pair_w2": ("float64", "PC"),
    "evidence_pair_mean": ("float64", "PCO"),
    "evidence_pair_comoment": ("float64", "PCOO"),
}


@dataclass(frozen=True)
class LookupSettings:
    """How an answer is put together: nearest patterns, softmax slope, least cosine, least probability.

    likeliest: where no config is probable enough, the most probable runs in place of the default. auto_margin: whether
    another trade-off works out its own margin.
    """

    top_k: int
    beta: float
    floor: float
    min_probability: float
    likeliest: bool
    auto_margin: bool


@dataclass(frozen=True)
class BankData:
    """Everything a bank answers from. arrays: as in ARRAYS. metric, embedder: what its embeddings are.

    method, grade: how its verdicts were judged. facts: further JSON of the manifest (counts, held-out results, config,
    data, timings), for people and for the gate.
    """

    arrays: dict[str, npt.NDArray[Any]]
    tiers: tuple[str, ...]
    default: int
    metric: str
    embedder: str
    method: str
    grade: str
    objective: Objective
    lookup: LookupSettings
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def dim(self) -> int:
        """D, the length of a query embedding."""
        return int(self.arrays["centroids"].shape[1])

    @property
    def leaves(self) -> int:
        """P, the number of patterns at level 0."""
        return len(self.arrays["verdict_config"])

    @property
    def configs(self) -> ConfigTable:
        """The C configs."""
        columns = {
            f.name: self.arrays[f"config_{f.name}"] for f in fields(ConfigTable) if f"config_{f.name}" in self.arrays
        }
        return ConfigTable(**columns, tiers=self.tiers, default=self.default)

    @property
    def evidence(self) -> Evidence:
        """The evidence of the leaves."""
        return Evidence(**{f.name: self.arrays[f"evidence_{f.name}"] for f in fields(Evidence)})

    def parents(self) -> list[npt.NDArray[np.int64]]:
        """For each level from the leaves, the row of each node's parent within the level above."""
        level, parent = self.arrays["level"], self.arrays["parent"]
        starts = [int(np.searchsorted(level, one)) for one in range(int(level.max()) + 2)]
        return [parent[start:stop] - stop for start, stop in pairwise(starts[:-1])]

    def head(self) -> dict[str, Any]:
        """What the manifest says of the bank besides its arrays."""
        return {
            "metric": self.metric,
            "dim": self.dim,
            "embedder": self.embedder,
            "tiers": list(self.tiers),
            "default_config": self.default,
            "method": self.method,
            "grade": self.grade,
            "objective": asdict(self.objective),
            "lookup": asdict(self.lookup),
        }


def check_bank(data: BankData) -> None:
    """Raises ArtifactError where an array is missing or its dtype, shape, range or cross-reference is wrong."""
    arrays = data.arrays
    missing = set(ARRAYS) ^ set(arrays)
    if missing:
        raise ArtifactError(f"{BANK_FILE}: array {min(missing)} is missing or unknown; train the artifact again")
    sizes = {"O": len(OUTCOMES), "B": LATENCY_BINS}
    for name, (dtype, axes) in ARRAYS.items():
        array = arrays[name]
        if array.dtype != dtype or array.ndim != len(axes):
            raise ArtifactError(f"{BANK_FILE}: {name} is {array.dtype} {array.shape}, not {dtype} by {axes}")
        for axis, size in zip(axes, array.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ArtifactError(f"{BANK_FILE}: {name} has {size} along {axis}, others {sizes[axis]}")
    a, p, c = sizes["A"], sizes["P"], sizes["C"]

    def require(ok: bool | np.bool_, what: str) -> None:
        if not ok:
            raise ArtifactError(f"{BANK_FILE}: {what}; the artifact is damaged, train it again or roll back")

    require(sizes["U"] == p + 1, "score has not one row more than there are leaves")
    require(p >= 1 and c >= 1 and sizes["D"] >= 1 and a >= p, "no patterns, configs or dimensions")
    for name in ("centroids", "score", "probability", "gain", "expected_quality", "confidence", "margin"):
        require(np.isfinite(arrays[name]).all(), f"{name} is not finite")
    require((np.square(arrays["centroids"][:p]).sum(1) > 0).all() or data.metric != "cosine", "a centroid has norm 0")
    level, parent = arrays["level"], arrays["parent"]
    require(len(np.unique(arrays["pattern_id"])) == a, "pattern_id repeats")
    require((np.diff(level.astype(np.int64)) >= 0).all() and (level[:p] == 0).all(), "level is out of order")
    require((level[p:] > 0).all(), "a leaf stands among the levels above")
    top = parent == -1
    require(((parent < a) & (parent >= -1)).all(), "parent points outside")
    require((level[parent[~top]] == level[~top] + 1).all(), "a parent is not one level above its child")
    require((top == (level == level.max())).all(), "parent is missing below the top level")
    for name, bound in (("verdict_config", c), ("config_tier", len(data.tiers)), ("optimal_tier", len(data.tiers))):
        require(((arrays[name] >= 0) & (arrays[name] < bound)).all(), f"{name} points outside")
    require(0 <= data.default < c, f"default_config={data.default} is outside 0 .. {c - 1}")
    require(((arrays["probability"] >= 0) & (arrays["probability"] <= 1)).all(), "probability is outside [0, 1]")
    for prefix in ("config", "optimal"):
        for column in ("ef_search", "n_probes", "context_tokens"):
            require((arrays[f"{prefix}_{column}"] >= 1).all(), f"{prefix}_{column} is below 1")
        temperature = arrays[f"{prefix}_temperature"]
        require(((temperature >= 0) & (temperature <= 2)).all(), f"{prefix}_temperature is outside [0, 2]")
    require((arrays["evidence_rows"] >= 0).all() and (arrays["support"] >= 0).all(), "a count is negative")


def file_digest(content: bytes) -> dict[str, Any]:
    """sha256 and size of a file's content, as the manifest keeps them."""
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def write_artifact(folder: Path, data: BankData, extra_files: dict[str, bytes]) -> dict[str, Any]:
    """Writes a complete artifact at `folder`, which must not exist: to a temporary sibling, fsynced, then renamed.

    extra_files: name to content (index.faiss, router.safetensors, report.html). Returns the manifest. Raises
    ArtifactError where the bank is inconsistent or the folder exists, OSError where the disk refuses; nothing
    half-written stays in either case.
    """
    check_bank(data)
    if folder.exists():
        raise ArtifactError(f"{folder} exists; artifacts are immutable, publish under another version")
    files = {BANK_FILE: save_tensors({k: np.ascontiguousarray(v) for k, v in data.arrays.items()}), **extra_files}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "version": folder.name,
        **data.head(),
        **data.facts,
        "files": {name: file_digest(content) for name, content in files.items()},
    }
    files[MANIFEST] = (json.dumps(manifest, indent=1, allow_nan=False, default=_plain) + "\n").encode()
    temporary = folder.parent / f".tmp-{folder.name}-{os.getpid()}"
    temporary.mkdir(parents=True)
    try:
        for name, content in files.items():
            with (temporary / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(temporary)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def sync_folder(folder: Path) -> None:
    """Makes a folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no place in a manifest")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact. Raises ArtifactError where it is missing, damaged, or of another schema."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ArtifactError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes; this is no artifact")
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); give the directory that a job published") from error
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        found = manifest.get("schema_version") if isinstance(manifest, dict) else None
        raise ArtifactError(
            f"{path} has schema_version={found}, this rb_gpu reads {SCHEMA_VERSION}; train again or change rb_gpu"
        )
    return manifest


def read_file(folder: Path, manifest: dict[str, Any], name: str) -> bytes | None:
    """Content of one of the artifact's files, None where it has no such file. Raises ArtifactError unless it is as
    the manifest says: a plain file inside the folder, of the right size and sha256.
    """
    entry = manifest.get("files", {}).get(name)
    if entry is None:
        return None
    path = folder / name
    try:
        if path.is_symlink() or path.stat().st_size != entry["size"]:
            raise ArtifactError(f"{path} is a link or has not the {entry['size']} bytes that the manifest names")
        content = path.read_bytes()
    except (OSError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); restore it or roll back") from error
    if hashlib.sha256(content).hexdigest() != entry.get("sha256"):
        raise ArtifactError(f"{path} differs from its sha256 in the manifest; restore it or roll back")
    return content


def load_artifact(folder: str | Path) -> tuple[BankData, dict[str, Any]]:
    """The bank of an artifact and its manifest, checked: schema, sizes, hashes, shapes, ranges, cross-references.

    Raises ArtifactError with the reason.
    """
    folder = Path(folder).resolve()
    manifest = read_manifest(folder)
    content = read_file(folder, manifest, BANK_FILE)
    if content is None:
        raise ArtifactError(f"{folder / MANIFEST} names no {BANK_FILE}; the artifact is incomplete")
    try:
        arrays = load_tensors(content)
        data = BankData(
            arrays=arrays,
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
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder}: the bank cannot be read ({error!r}); train again or roll back") from error
    check_bank(data)
    if manifest.get("dim") != data.dim:
        raise ArtifactError(f"{folder}: manifest says dim={manifest.get('dim')}, the centroids have {data.dim}")
    return data, manifest


def verify_artifact(folder: str | Path) -> dict[str, Any]:
    """Checks every file of an artifact and its bank; returns the manifest. Raises ArtifactError with the reason."""
    folder = Path(folder).resolve()
    _, manifest = load_artifact(folder)
    for name in manifest["files"]:
        if Path(name).name != name:
            raise ArtifactError(f"{folder}: the manifest names {name!r}, outside the artifact")
        read_file(folder, manifest, name)
    return manifest
