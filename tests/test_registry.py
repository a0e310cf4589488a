"""The registry: what is served is always a verified artifact, whatever crashes when."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_bank

from rb_gpu.bank import ReasoningBank
from rb_gpu.bank_data import BankData
from rb_gpu.errors import ArtifactError, RegistryError
from rb_gpu.publish import write_artifact
from rb_gpu.registry import Registry

HERE = Path(__file__).parent
A, B, C, D, E = (f"2026010{day}T000000-{day:06x}" for day in range(1, 6))


@pytest.fixture
def registry(tmp_path: Path, data: BankData) -> Registry:
    """A registry with versions A, B and C, none of them served."""
    for version in (A, B, C):
        write_artifact(tmp_path / "artifacts" / version, data, {"report.html": b"<p>"})
    return Registry(tmp_path / "artifacts", keep=2)


def names(registry: Registry) -> set[str]:
    return {path.name for path in registry.path.iterdir()}


def test_versions_come_oldest_first_and_nothing_else_is_one(registry: Registry) -> None:
    (registry.path / "notes").mkdir()
    (registry.path / ".tmp-x").mkdir()
    assert registry.versions() == [A, B, C] and registry.champion() is None
    assert Registry(registry.path / "nowhere").versions() == []
    assert Registry(str(registry.path)).versions() == registry.versions()


def test_new_versions_sort_after_all_before_them(tmp_path: Path) -> None:
    # regression: two versions of the same second were sorted by their random digits
    registry = Registry(tmp_path)
    made = []
    for _ in range(20):
        made.append(registry.new_version())
        (tmp_path / made[-1]).mkdir()
    assert sorted(made) == made == registry.versions()


def test_what_is_no_version_or_count_is_told(registry: Registry) -> None:
    # regression: TypeErrors of a pattern and of a slice; keep=-1 removed all versions but the newest
    with pytest.raises(RegistryError, match="version=7 is not the name of a version; action=list shows all"):
        registry.promote(7, "")  # type: ignore[arg-type]
    for keep in (0, -1, "2"):
        with pytest.raises(RegistryError, match=f"keep={keep!r} is not an integer >= 1; keep one version or more"):
            Registry(registry.path, keep)  # type: ignore[arg-type]


def test_promote_serves_a_version(registry: Registry) -> None:
    registry.promote(A, "first")
    assert registry.champion() == A and registry.folder("champion").name == A
    assert (registry.path / "champion").readlink() == Path(A)  # the link is relative, so that the folder can be moved
    ReasoningBank.load(registry.path / "champion")
    registry.promote(B, "better")
    assert [(e["version"], e["before"], e["reason"]) for e in registry.history()] == [
        (A, None, "first"),
        (B, A, "better"),
    ]


def test_promote_verifies_every_file_first(registry: Registry) -> None:
    registry.promote(A, "first")
    (registry.path / B / "report.html").write_bytes(b"<q>")
    (registry.path / C / "bank.safetensors").write_bytes(b"")
    for version in (B, C):
        with pytest.raises(ArtifactError):
            registry.promote(version, "worse")
    assert registry.champion() == A and len(registry.history()) == 1


def test_the_link_is_there_at_every_moment_of_a_promote(registry: Registry) -> None:
    registry.promote(A, "first")
    stop, seen = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            seen.append(os.path.exists(registry.path / "champion"))  # noqa: PTH110 - the fastest reader

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(40):
        registry.promote((A, B)[i % 2], "")
    stop.set()
    reader.join()
    assert len(seen) > 1000 and all(seen)


@pytest.mark.parametrize("version", ["20990101T000000-000000", "champion", "../x", "", "latest", A + "\n"])
def test_unknown_versions_are_an_error(registry: Registry, version: str) -> None:
    for act in (registry.folder, lambda v: registry.promote(v, "")):
        with pytest.raises(RegistryError, match="version="):
            act(version)
    assert registry.champion() is None


def test_a_champion_that_is_no_link_is_an_error(registry: Registry) -> None:
    # regression: IsADirectoryError
    (registry.path / "champion").mkdir()
    with pytest.raises(RegistryError, match="make it a link"):
        registry.promote(A, "")


def test_promote_that_cannot_write_its_history_changes_nothing(registry: Registry, monkeypatch: Any) -> None:
    # regression: the link was switched before the history was written, so that a rollback had nothing to go back to
    registry.promote(A, "first")

    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RegistryError, match="No space left"):
        registry.promote(B, "second")
    assert registry.champion() == A


def test_rollback_goes_back_step_by_step_and_never_forth(registry: Registry) -> None:
    # regression: a second rollback served the bad version again
    for version in (A, B, C):
        registry.promote(version, "")
    assert registry.rollback() == B == registry.champion()
    assert registry.rollback() == A == registry.champion()
    with pytest.raises(RegistryError, match="nothing to roll back to"):
        registry.rollback()
    registry.promote(C, "mended")
    assert registry.rollback() == A


def test_rollback_skips_a_version_promoted_twice(registry: Registry) -> None:
    for version in (A, B, B):
        registry.promote(version, "")
    assert registry.rollback() == A


def test_rollback_never_serves_again_what_it_undid(registry: Registry) -> None:
    # regression: A, B, A was rolled back to B, A, B, A and so on
    for version in (A, B, A):
        registry.promote(version, "")
    assert [registry.rollback(), registry.rollback()] == [B, A]
    with pytest.raises(RegistryError, match="nothing to roll back to"):
        registry.rollback()
    for version in (B, C):
        registry.promote(version, "")
    assert registry.rollback() == B
    registry.promote(C, "mended")
    registry.promote(A, "")
    assert [registry.rollback() for _ in range(3)] == [C, B, A]


def test_a_switch_that_a_crash_left_undone_is_not_rolled_back_to(registry: Registry, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def undone(act: Callable[[], object]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "symlink_to", full)
            with pytest.raises(RegistryError, match="No space left"):
                act()

    registry.promote(A, "")
    undone(lambda: registry.promote(B, ""))
    assert registry.champion() == A and len(registry.history()) == 2
    registry.promote(C, "")
    undone(registry.rollback)
    assert registry.champion() == C and registry.rollback() == A


def test_rollback_refuses_a_damaged_predecessor(registry: Registry) -> None:
    registry.promote(A, "")
    registry.promote(B, "")
    (registry.path / A / "bank.safetensors").write_bytes(b"")
    # regression: the message said "roll back" to somebody who just did
    with pytest.raises(RegistryError, match=f"{B} stays: {A}, which .* action=promote version=VERSION"):
        registry.rollback()
    assert registry.champion() == B


def test_a_torn_line_of_the_history_costs_no_other(registry: Registry) -> None:
    # regression: the line after a torn one was appended to it, and both were lost
    registry.promote(A, "")
    history = registry.path / "history.jsonl"
    history.write_text(history.read_text() + '7\n{"time": 17, "versi')
    registry.promote(B, "")
    assert [entry["version"] for entry in registry.history()] == [A, B]
    assert registry.rollback() == A


@pytest.mark.parametrize(("before", "lines"), [(b"", 1), (b"{", 2), (b"\n", 2)])
def test_a_history_of_one_byte_is_gone_on_with(registry: Registry, before: bytes, lines: int) -> None:
    (registry.path / "history.jsonl").write_bytes(before)
    registry.promote(A, "")
    assert [entry["version"] for entry in registry.history()] == [A]
    assert (registry.path / "history.jsonl").read_bytes().count(b"\n") == lines


def test_a_switch_is_on_the_disk_before_it_is_reported(registry: Registry, monkeypatch: Any) -> None:
    # after a power cut, a directory entry that was not synced is gone, although the history says that it was made
    synced = []
    monkeypatch.setattr("rb_gpu.registry.sync_path", lambda path: synced.append((path, registry.champion())))
    registry.promote(A, "")
    assert synced == [(registry.path, A)]


def test_retention_keeps_the_newest_the_champion_and_its_predecessor(registry: Registry, data: BankData) -> None:
    registry.promote(A, "")
    registry.promote(B, "")
    for version in (D, E):
        write_artifact(registry.path / version, data, {})
    assert registry.retain() == [C]
    assert registry.versions() == [A, B, D, E]
    registry.rollback()
    assert registry.retain() == [B] and registry.versions() == [A, D, E]


def test_manifests_show_damage(registry: Registry) -> None:
    (registry.path / B / "manifest.json").write_bytes(b"{")
    found = registry.manifests()
    assert [version for version, manifest in found if manifest is None] == [B]
    assert [version for version, _ in found] == [A, B, C]


# Locking and crashes


def python(code: str, *args: Path | str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=60, check=False)


OPEN = """
import sys
from pathlib import Path
from rb_gpu.registry import Registry
with Registry(Path(sys.argv[1])).locked():
    print("entered")
"""


def test_a_second_job_is_refused_while_the_first_runs(registry: Registry) -> None:
    with registry.locked():
        second = python(OPEN, registry.path)
        assert second.returncode == 1 and f"process {os.getpid()}" in second.stderr
        assert "in use by another job" in second.stderr
    assert python(OPEN, registry.path).stdout == "entered\n"


def test_the_lock_of_a_dead_job_is_free(registry: Registry) -> None:
    killed = python(OPEN + "    import os, signal; os.kill(os.getpid(), signal.SIGKILL)", registry.path)
    assert killed.returncode == -signal.SIGKILL
    with registry.locked():
        pass


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match="choose another"), Registry(tmp_path / "file" / "artifacts").locked():
        pass


def test_what_killed_jobs_left_is_cleared(registry: Registry) -> None:
    before = names(registry)
    (registry.path / ".tmp-20260101T000000-aaaaaa-7").mkdir()
    (registry.path / ".tmp-20260101T000000-aaaaaa-7" / "bank.safetensors").write_bytes(b"half")
    (registry.path / ".tmp-champion-7").symlink_to(A)
    (registry.path / ".tmp-removed-x").write_text("")
    with registry.locked():
        pass
    assert names(registry) == before | {".lock"} and registry.versions() == [A, B, C]


KILLED = """
import os, signal, sys
from pathlib import Path
from conftest import make_bank
from rb_gpu.publish import write_artifact
from rb_gpu.registry import Registry

registry, left = Registry(Path(sys.argv[1])), int(sys.argv[2])
sync = os.fsync

def fsync(descriptor):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)

os.fsync = fsync
with registry.locked():
    write_artifact(registry.path / registry.new_version(), make_bank(seed=1), {"report.html": b"<p>"})
"""


@pytest.mark.parametrize("syncs", range(4))
def test_a_job_killed_while_it_writes_harms_nothing(registry: Registry, data: BankData, syncs: int) -> None:
    """Killed after the bank, the report, the manifest, and just before the rename."""
    registry.promote(A, "")
    killed = python(KILLED, registry.path, str(syncs))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [name for name in names(registry) if name.startswith(".tmp-")] and registry.versions() == [A, B, C]
    assert ReasoningBank.load(registry.path / "champion").data.facts["version"] == A
    with registry.locked():
        version = registry.new_version()
        write_artifact(registry.path / version, make_bank(seed=2), {})
        registry.promote(version, "")
    assert not [name for name in names(registry) if name.startswith(".tmp-")]
    assert registry.champion() == version and registry.rollback() == A


def test_the_history_is_lines_of_json(registry: Registry) -> None:
    registry.promote(A, "ä")
    registry.promote(B, "")
    lines = (registry.path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["version"] for line in lines] == [A, B]
