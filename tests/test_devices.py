"""Free memory within the container's limits; engines, precision and determinism of a device."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rb_gpu.errors import ConfigError
from rb_gpu.learn import devices
from rb_gpu.learn.workers import workers

# a test file that does not import torch
LIGHT = Path(__file__).parent / "test_params.py"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  5000 kB\n")
    monkeypatch.setattr(devices, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    monkeypatch.setattr(devices, "OWN_GROUPS", tmp_path / "own")
    return tmp_path


def test_without_a_container_the_machine_tells(machine):
    assert devices.free_memory() == 5000 * 1024


VERSIONS = {
    "v2": ("", "0::/{}\n", ("memory.max", "memory.current")),
    "v1": ("memory", "1:cpu:/\n4:memory:/{}\n0::/\n", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
}


def limited(machine, version: str, group: str, limit: object, used: int, cache: int = 0) -> None:
    base, _, names = VERSIONS[version]
    folder = machine / base / group
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"cache 77\ninactive_file {cache}\nunevictable 0\n")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("limit", "used", "cache", "free"), [(2**62, 0, 0, 5_120_000), (4000, 1000, 500, 3500), (10, 20, 0, 0)]
)
def test_a_container_has_no_more_than_its_limit(machine, version, limit, used, cache, free):
    limited(machine, version, "", limit, used, cache)
    assert devices.free_memory() == free


def test_a_group_without_a_limit_takes_nothing_away(machine):
    limited(machine, "v2", "", "max", 9)
    assert devices.free_memory() == 5000 * 1024


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("own", "above", "free"), [(4000, 9000, 3000), (9000, 4000, 3000)])
def test_the_least_of_a_process_s_groups_counts(machine, version, own, above, free):
    # regression: a limit on the job alone was not noticed, and the job was killed while loading
    (machine / "own").write_text(VERSIONS[version][1].format("pod/job"))
    limited(machine, version, "pod/job", own, 1000)
    limited(machine, version, "pod", above, 1000)
    assert devices.free_memory() == free


def test_a_path_that_only_the_host_knows_leaves_the_root(machine):
    (machine / "own").write_text("0::/kubepods/besteffort/1234\n")
    limited(machine, "v2", "", 4000, 1000)
    assert devices.free_memory() == 3000


def test_a_system_that_does_not_tell_is_taken_to_have_some(machine):
    (machine / "meminfo").unlink()
    assert devices.free_memory() == devices.UNTOLD_MEMORY


def test_products_are_in_float32_whatever_the_process_allows():
    # a process that allows tf32 or bf16 would otherwise break labels and bounds
    left, right = (torch.randn(64, 64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    exact = left @ right
    torch.set_float32_matmul_precision("medium")
    try:
        before = torch.backends.cuda.matmul.fp32_precision
        with devices.full_precision():
            assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            assert torch.equal(left @ right, exact)
        assert torch.backends.cuda.matmul.fp32_precision == before != "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_sums_are_reproducible_only_where_it_is_wanted():
    for wanted in (False, True):
        with devices.reproducible(wanted):
            assert torch.are_deterministic_algorithms_enabled() is wanted
        assert not torch.are_deterministic_algorithms_enabled()


def test_a_gpu_can_be_asked_to_be_reproducible_after_it_was_not(monkeypatch):
    # torch reads the variable only once, at the first product; regression: a sweep's second member was refused
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.resolve_device("cpu").type == "cpu" and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert devices.resolve_device("auto").type == "cuda" and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert devices.resolve_device("cuda").type == "cuda" and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_points_get_what_is_free_on_a_gpu_less_what_work_with_them_takes(monkeypatch):
    gpu = torch.device("cuda")
    told = {"mem_get_info": (20 * 2**30, 2**35), "memory_reserved": 3 * 2**30, "memory_allocated": 2**30}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert devices.points_room(2**23, gpu) == (20 + 2 - 4 - 1) * 2**30 * 32 // 33
    assert devices.points_room(2**28, gpu) == devices.LEAST_ROOM


@pytest.mark.parametrize(("asked", "hidden"), [([], True), (["-m", "not cuda"], True), (["-m", "cuda"], False)])
def test_a_gpu_is_hidden_from_tests_that_are_not_of_one(asked, hidden):
    # regression: on a GPU node, device=auto used the GPU in all of them, and in the jobs that they start
    own = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    told = "import os, sys, pytest; pytest.main(sys.argv[1:]); print(repr(os.environ.get('CUDA_VISIBLE_DEVICES')))"
    command = [sys.executable, "-c", told, "--collect-only", "-q", "-p", "no:cacheprovider", *asked, str(LIGHT)]
    said = subprocess.run(command, env=own, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == ("''" if hidden else "None")


def test_an_engine_that_cannot_run_is_named(monkeypatch, caplog):
    caplog.set_level("INFO")
    with pytest.raises(ConfigError, match=r"cluster.engine=triton, but device=cpu; set device.kind=cuda"):
        devices.resolve_engine("triton", torch.device("cpu"))
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(devices, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=r"older than Ampere; set cluster.engine=torch"):
        devices.resolve_engine("triton", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(devices, "_triton_fault", lambda: "")
    assert [devices.resolve_engine(name, gpu) for name in ("auto", "triton", "torch")] == ["triton", "triton", "torch"]
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed; pip install 'triton>=3.4'"):
        devices.resolve_engine("triton", gpu)
    assert devices.resolve_engine("auto", gpu) == "torch"
    assert "assignment by torch (triton 3.4 or later is not installed" in caplog.text


@pytest.mark.parametrize(
    "error", [RuntimeError("no C compiler"), subprocess.CalledProcessError(1, "gcc"), PermissionError("no")]
)
def test_triton_that_cannot_compile_itself_leaves_auto_to_torch(monkeypatch, caplog, error):
    # regression: an image without gcc or Python's headers ended every job with default settings
    triton = pytest.importorskip("triton")

    class Driver:
        @property
        def active(self) -> None:
            raise error

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton.runtime, "driver", Driver())
    devices._triton_fault.cache_clear()
    try:
        gpu = torch.device("cuda")
        assert devices.resolve_engine("torch", gpu) == "torch" and not caplog.text
        assert devices.resolve_engine("auto", gpu) == "torch"
        assert f"assignment by torch (Triton does not start ({error}); it needs a C compiler" in caplog.text
        with pytest.raises(ConfigError, match="Triton does not start"):
            devices.resolve_engine("triton", gpu)
    finally:
        devices._triton_fault.cache_clear()


def test_concurrent_calls_leave_the_process_as_it_was():
    # regression: each call saved what another had set, and the last one to end restored that
    before = torch.backends.mkldnn.matmul.fp32_precision
    first, second = devices.full_precision(), devices.full_precision()
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee", "the second still relies on it"
        second.__exit__(None, None, None)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_a_thread_that_comes_to_torch_during_a_call_keeps_its_threads():
    # regression: it started with the one thread that the call had set for the process, and kept it for ever
    def seen() -> int:
        with ThreadPoolExecutor(1) as newcomer:
            return newcomer.submit(torch.get_num_threads).result()

    own = torch.get_num_threads()
    with devices.own_threads():
        devices.set_own_threads(3)
    try:
        expected = seen()
        for busy in (workers, devices.one_thread):
            with busy():
                assert seen() == expected
                assert torch.rand(2**20).sum() > 0 and torch.get_num_threads() == 1
            assert torch.get_num_threads() == 3 and seen() == expected
        inside: list[int] = []
        with workers() as crew:
            crew.each(30, 1, lambda *_: inside.append(int(torch.rand(2**16).sum() > 0) * torch.get_num_threads()))
            assert seen() == expected
        assert set(inside) == {1} and torch.get_num_threads() == 3 and seen() == expected
    finally:
        with devices.own_threads():
            devices.set_own_threads(own)
