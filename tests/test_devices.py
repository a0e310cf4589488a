"""How much memory is free: what the machine says, within what the container allows."""

from __future__ import annotations

import pytest

from rb_gpu.learn import devices


@pytest.fixture
def machine(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  5000 kB\n")
    monkeypatch.setattr(devices, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    return tmp_path


def test_without_a_container_the_machine_tells(machine):
    assert devices.free_memory() == 5000 * 1024


@pytest.mark.parametrize(("limit", "used", "free"), [("max", 0, 5_120_000), (4000, 1000, 3000), (10, 20, 0)])
def test_a_container_has_no_more_than_its_limit(machine, limit, used, free):
    (machine / "memory.max").write_text(f"{limit}\n")
    (machine / "memory.current").write_text(f"{used}\n")
    assert devices.free_memory() == free


def test_a_system_that_does_not_tell_is_taken_to_have_some(machine):
    (machine / "meminfo").unlink()
    assert devices.free_memory() == devices.UNTOLD_MEMORY
