"""An artifact's files are written completely or not at all, and loading one with any fault raises an error that names
the reason.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_bank
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from rb_gpu.artifact import load_artifact, verify_artifact
from rb_gpu.bank import ReasoningBank
from rb_gpu.bank_data import ARRAYS, BankData, check_bank
from rb_gpu.errors import ArtifactError
from rb_gpu.publish import write_artifact

Arrays = dict[str, np.ndarray]


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def forge(folder: Path, name: str, content: bytes) -> None:
    """Replaces a file and updates its size and hash in the manifest."""
    (folder / name).write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: entry}))


def refused(folder: Path, reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason):
        load_artifact(folder)
    with pytest.raises(ArtifactError, match=reason):
        ReasoningBank.load(folder)


# Writing


def test_a_folder_may_be_a_string(data: BankData, tmp_path: Path) -> None:
    # regression: AttributeError: 'str' object has no attribute 'name'
    assert write_artifact(f"{tmp_path}/v1", data, {})["version"] == "v1"
    assert ReasoningBank.load(f"{tmp_path}/v1").version == "v1"


def test_round_trip_is_exact(data: BankData, artifact: Path) -> None:
    loaded, manifest = load_artifact(artifact)
    assert loaded.arrays.keys() == data.arrays.keys()
    for name, array in data.arrays.items():
        np.testing.assert_array_equal(loaded.arrays[name], array, err_msg=name, strict=True)
    assert replace(loaded, arrays={}, facts={}) == replace(data, arrays={}, facts={})
    assert manifest["version"] == artifact.name and manifest["counts"] == data.facts["counts"]
    assert verify_artifact(artifact) == manifest and set(manifest["files"]) == {"bank.safetensors", "report.html"}


def test_a_bank_that_was_loaded_and_changed_is_written_as_it_is_now(artifact: Path) -> None:
    # regression: facts is the old manifest, which overwrote the version, lookup and tiers of the new one
    loaded, _ = load_artifact(artifact)
    changed = replace(loaded, lookup=replace(loaded.lookup, top_k=1))
    manifest = write_artifact(artifact.with_name("other"), changed, {})
    assert manifest["version"] == "other"
    assert load_artifact(artifact.with_name("other"))[0].lookup.top_k == 1


@pytest.mark.parametrize("failing", range(5))
def test_full_disk_leaves_nothing(data: BankData, tmp_path: Path, monkeypatch: Any, failing: int) -> None:
    # regression: the syncs of the bank, report, manifest, temporary folder and parent may each fail; after a failure of
    # the last one, which follows the rename, the artifact stayed
    calls = iter(range(5))
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if next(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        write_artifact(tmp_path / "new", data, {"report.html": b"<p>"})
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_appears_whole(data: BankData, tmp_path: Path) -> None:
    torn, versions = [], [tmp_path / f"v{i}" for i in range(30)]

    def read() -> None:
        for folder in versions:
            while not folder.exists():
                pass
            try:
                verify_artifact(folder)
            except ArtifactError as error:
                torn.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    for folder in versions:
        write_artifact(folder, data, {"report.html": b"<p>"})
    reader.join()
    assert torn == []


def test_interrupt_leaves_nothing(data: BankData, tmp_path: Path, monkeypatch: Any) -> None:
    def fsync(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        write_artifact(tmp_path / "new", data, {})
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_is_never_overwritten(data: BankData, artifact: Path) -> None:
    before = {path.name: path.read_bytes() for path in artifact.iterdir()}
    with pytest.raises(ArtifactError, match="immutable"):
        write_artifact(artifact, data, {})
    assert {path.name: path.read_bytes() for path in artifact.iterdir()} == before
    dangling = artifact.with_name("dangling")
    dangling.symlink_to("nowhere")
    with pytest.raises(ArtifactError, match="immutable"):
        write_artifact(dangling, data, {})
    assert sorted(path.name for path in artifact.parent.iterdir()) == [artifact.name, "dangling"]


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "manifest.json", "bank.safetensors"])
def test_further_files_cannot_leave_the_folder_or_replace_the_bank(data: BankData, tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="choose another"):
        write_artifact(tmp_path / "new", data, {name: b""})
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_bank_is_not_written(data: BankData, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="default_config=99"):
        write_artifact(tmp_path / "new", replace(data, default=99), {})
    assert list(tmp_path.iterdir()) == []


# Loading


def test_the_bank_is_read_without_pickle(artifact: Path, monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(np, "load", refuse)
    ReasoningBank.load(artifact)


def test_missing_files_are_named(artifact: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere")
    (artifact / "bank.safetensors").rename(tmp_path / "away")
    refused(artifact, "bank.safetensors cannot be read")
    (artifact / "manifest.json").unlink()
    refused(artifact, "manifest.json")


def test_every_truncation_is_refused(artifact: Path) -> None:
    path = artifact / "bank.safetensors"
    content = path.read_bytes()
    for size in (0, 1, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        refused(artifact, "bytes, not the manifest's")
        forge(artifact, path.name, content[:size])
        refused(artifact, "the bank cannot be read")
        edit_manifest(artifact, lambda m: m["files"]["bank.safetensors"].update(size=len(content)))


def test_any_flipped_bit_is_refused(artifact: Path) -> None:
    path = artifact / "bank.safetensors"
    content = bytearray(path.read_bytes())
    for bit in np.random.default_rng(0).integers(len(content) * 8, size=200):
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="differs from its sha256"):
            load_artifact(artifact)
        content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    load_artifact(artifact)


def test_a_flipped_bit_that_the_manifest_vouches_for_gives_a_bank_or_an_artifact_error(artifact: Path) -> None:
    content = bytearray((artifact / "bank.safetensors").read_bytes())
    header = int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(1)
    for bit in [*range(64), *rng.integers(64, 8 * header, size=200), *rng.integers(len(content) * 8, size=100)]:
        content[bit // 8] ^= 1 << bit % 8
        forge(artifact, "bank.safetensors", bytes(content))
        try:
            bank = ReasoningBank.load(artifact)
        except ArtifactError:
            pass
        else:
            bank.optimized_params_batch(np.eye(bank.dim))
        content[bit // 8] ^= 1 << bit % 8


def test_links_out_of_the_folder_are_refused(artifact: Path, tmp_path: Path) -> None:
    for name in ("bank.safetensors", "manifest.json"):
        (artifact / name).rename(tmp_path / name)
        (artifact / name).symlink_to(tmp_path / name)
        refused(artifact, f"{name} is a link, not a regular file")
        (artifact / name).unlink()
        (tmp_path / name).rename(artifact / name)
    load_artifact(artifact)


def test_a_link_is_refused_even_if_the_manifest_has_its_size(artifact: Path, tmp_path: Path) -> None:
    path = artifact / "bank.safetensors"
    path.rename(tmp_path / "bank")
    path.symlink_to(tmp_path / "bank")
    edit_manifest(artifact, lambda m: m["files"][path.name].update(size=path.lstat().st_size))
    refused(artifact, "not a regular file")


def test_a_pipe_in_place_of_the_manifest_does_not_hang(artifact: Path) -> None:
    # regression: the pipe was opened, and a reader of a pipe waits for a writer
    (artifact / "manifest.json").unlink()
    os.mkfifo(artifact / "manifest.json")
    refused(artifact, "not a regular file")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", "", "a\0b", "\ud800", "sub/x", ".hidden"])
def test_the_manifest_cannot_name_files_elsewhere(artifact: Path, name: str) -> None:
    # regression: load_artifact did not check the names, and verify_artifact raised ValueError for a NUL or lone
    # surrogate
    edit_manifest(artifact, lambda m: m["files"].update({name: {"sha256": "0" * 64, "size": 0}}))
    refused(artifact, "lists the file")
    with pytest.raises(ArtifactError):
        verify_artifact(artifact)


def test_verify_reads_the_files_that_loading_does_not(artifact: Path) -> None:
    (artifact / "report.html").write_bytes(b"<q>")
    load_artifact(artifact)
    with pytest.raises(ArtifactError, match=r"report\.html differs"):
        verify_artifact(artifact)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'"x"', b"[" * 200_000, b"7", b"{}"])
def test_what_is_no_manifest_is_refused(artifact: Path, content: bytes) -> None:
    (artifact / "manifest.json").write_bytes(content)
    refused(artifact, "manifest.json")


@pytest.mark.parametrize("version", [0, 3, 5, "4", None, [4]])
def test_other_schemas_are_refused(artifact: Path, version: Any) -> None:
    edit_manifest(artifact, lambda m: m.update(schema_version=version))
    refused(artifact, "schema_version")


HUGE = 10**400
MANIFESTS: list[tuple[str, Any]] = [
    ("files", None), ("files", []), ("files", {}), ("files", {"bank.safetensors": 3}),
    ("files", {"bank.safetensors": {}}), ("files", {"bank.safetensors": {"size": "1", "sha256": 1}}),
    ("dim", 15), ("dim", None), ("tiers", "ab"), ("tiers", []), ("tiers", ["a", "a"]), ("tiers", ["a"]), ("tiers", 3),
    ("tiers", ["", "b"]), ("default_config", 5), ("default_config", -1), ("default_config", float("inf")),
    ("default_config", "x"), ("default_config", HUGE), ("metric", "dot"), ("method", 3), ("objective", None),
    ("objective", {}), ("objective.kind", "most"), ("objective.quality", "cost"), ("objective.cost_ref", 0),
    ("objective.latency_weight", "1"), ("objective.latency_weight", -1), ("objective.target", None),
    ("objective.max_cost", "x"), ("objective.extra", 1), ("lookup", []), ("lookup.top_k", 0), ("lookup.top_k", 2.5),
    ("lookup.top_k", True), ("lookup.beta", HUGE), ("lookup.beta", 1e300), ("lookup.beta", float("nan")),
    ("lookup.floor", None),
    ("lookup.min_probability", 2), ("lookup.likeliest", 1), ("lookup.auto_margin", "no"), ("counts", []),
    ("counts.trajectories", "many"), ("evaluation", 3), ("evaluation.improvement_percent", "x"), ("index", None),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), MANIFESTS, ids=lambda x: str(x)[:30])
def test_a_wrong_setting_is_refused(artifact: Path, key: str, value: Any) -> None:
    # regression: most of these passed and failed only in the first lookup, or raised another exception in the loader
    def edit(manifest: dict[str, Any]) -> None:
        *above, last = key.split(".")
        for name in above:
            manifest = manifest[name]
        manifest[last] = value

    edit_manifest(artifact, edit)
    refused(artifact, artifact.name)


def put(name: str, index: Any, value: Any) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[name][index] = value

    return change


def cast(name: str, dtype: str) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update({name: arrays[name].astype(dtype)})


def cut(name: str, index: Any) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update({name: np.ascontiguousarray(arrays[name][index])})


# the bank of the fixture `data`: leaves 0..11, level 1 is 12..14, level 2 is 15; 5 configs, 2 tiers
FORGERIES: dict[str, Callable[[Arrays], Any]] = {
    "array is missing": lambda arrays: arrays.pop("gain"),
    "array is unknown": lambda arrays: arrays.update(extra=np.zeros(1)),
    "shape: fewer rows": cut("score", np.s_[:-1]),
    "shape: one more axis": cut("score", np.s_[None]),
    "shape: no dims": cut("centroids", np.s_[:, :0]),
    "shape: more verdicts than patterns": cut("level", np.s_[:3]),
    "shape: no patterns": lambda arrays: arrays.update(
        {
            name: array[:1] if name in ("score", "probability", "gain", "expected_quality") else array[:0]
            for name, array in arrays.items()
            if ARRAYS[name][1][0] in "APU"
        }
    ),
    "dtype: float64": cast("centroids", "float64"),
    "dtype: float16": cast("centroids", "float16"),
    "dtype: big numbers cut": cast("verdict_config", "int8"),
    "dtype: bool": cast("verdict_stands", "bool"),
    "NaN centroid": put("centroids", (0, 0), np.nan),
    "infinite centroid of a level above": put("centroids", (15, 0), np.inf),
    "zero centroid": put("centroids", 0, 0),
    "NaN score": put("score", (12, 0), np.nan),
    "NaN quality": put("quality", 0, np.nan),
    "NaN evidence": put("evidence_mean", (0, 0, 0), np.nan),
    "endless gain under another trade-off": put("evidence_mean", (0, 0, 0), -1e300),
    "NaN margin": put("margin", 0, np.nan),
    "probability over 1": put("probability", (0, 0), 1.5),
    "confidence below 0": put("confidence", 0, -0.5),
    "negative weight": put("evidence_w", (0, 0), -1),
    "negative rows": put("evidence_rows", (0, 0), -1),
    "more votes than ratings": put("rating_score", 0, 99.0),
    "parent of itself": put("parent", 0, 0),
    "parents in a circle": put("parent", np.s_[12:14], [13, 12]),
    "parent two levels above": put("parent", 0, 15),
    "parent outside": put("parent", 0, 16),
    "parent below -1": put("parent", 15, -2),
    "orphan": put("parent", 0, -1),
    "parent above the top": put("parent", 15, 12),
    "childless parent": put("parent", np.s_[:12], 12),
    "level out of order": put("level", 3, 1),
    "leaf above": put("level", np.s_[12:], 0),
    "level missing": put("level", 15, 3),
    "pattern_id twice": put("pattern_id", 3, 100),
    "pattern_id over int64": put("pattern_id", 3, 2**63),
    "verdict_config outside": put("verdict_config", 0, 5),
    "verdict_config below 0": put("verdict_config", 0, -1),
    "verdict_stands 2": put("verdict_stands", 0, 2),
    "another config stands as default": put("verdict_stands", 1, 1),
    "tier outside": put("config_tier", 0, 2),
    "optimal tier outside": put("optimal_tier", 0, 2),
    "ef_search 0": put("config_ef_search", 0, 0),
    "optimal n_probes 0": put("optimal_n_probes", 0, 0),
    "temperature 3": put("config_temperature", 0, 3),
    "temperature NaN": put("optimal_temperature", 0, np.nan),
}


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_wrong_array_with_the_right_hash_is_refused(
    data: BankData, artifact: Path, change: Callable[[Arrays], Any]
) -> None:
    assert data.arrays["verdict_stands"][1] == 0
    arrays = {name: array.copy() for name, array in data.arrays.items()}
    change(arrays)
    forge(artifact, "bank.safetensors", save(arrays))
    refused(artifact, "train it again or roll back")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(sorted(ARRAYS)),
    seed=st.integers(0, 2**32 - 1),
    value=st.sampled_from([0.0, -0.0, -1.0, 1.0, 3.0, 2.0**31, 2.0**62, 1e30, 1e300, np.nan, np.inf, -np.inf]),
)
def test_a_bank_that_passes_the_checks_answers(data: BankData, name: str, seed: int, value: float) -> None:
    """Any number anywhere either is refused, or breaks no lookup, view or trade-off."""
    arrays = {key: array.copy() for key, array in data.arrays.items()}
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        arrays[name].reshape(-1)[rng.integers(arrays[name].size)] = np.float64(value).astype(arrays[name].dtype)
    try:
        check_bank(replace(data, arrays=arrays))
    except ArtifactError:
        return
    with np.errstate(all="ignore"):
        bank = ReasoningBank(replace(data, arrays=arrays))
        queries = data.arrays["centroids"][:12]
        bank.optimized_params_batch(queries)
        bank.optimized_params(queries[3], mode="interpolate")
        bank.optimized_params(queries[3], tradeoff=0.5)
        assert len(list(bank.patterns.values())) == 16 and len(list(bank.verdicts.values())) == 12
        bank.satisfaction(int(arrays["pattern_id"][0]))
        bank.stats()


def test_banks_of_one_pattern_or_one_config_are_whole(tmp_path: Path) -> None:
    for i, (leaves, configs) in enumerate([(1, 1), (1, 4), (5, 1)]):
        write_artifact(tmp_path / f"v{i}", make_bank(leaves, configs), {})
        bank = ReasoningBank.load(tmp_path / f"v{i}")
        assert len(bank.optimized_params_batch(np.eye(bank.dim))["config_id"]) == bank.dim
