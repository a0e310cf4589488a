"""The Triton kernels without a GPU: in Triton's interpreter, and compiled for three generations of cards."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from rb_gpu.errors import ConfigError  # noqa: E402
from rb_gpu.learn import triton_assign, triton_kernels, triton_sums  # noqa: E402

# bytes of shared memory that one program may use on A100, H100 and B200; on A10, L4 and workstation cards
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
LEAST_SHARED = 101_376
DIMS = (128, 384, 1024)
KINDS = {
    "*i64": ("order_ptr", "start_ptr", "stop_ptr", "sum_ptr", "labels_ptr"),
    "*i32": ("rows_ptr", "count_ptr"),
    "*fp64": ("weight_ptr",),
    "i32": ("n", "k", "n_class", "k_class", "first_label"),
}


def test_in_the_interpreter():
    # in a new process, because Triton decides when it is imported whether it compiles
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests / "interpreted.py")]
    ran = subprocess.run(command, cwd=tests, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-6000:]


def compiled(job: tuple[int, int, str, str, dict[str, int], int, int], folder: Path) -> tuple[int, int]:
    """Bytes of shared memory that a compiled kernel uses, and bytes of registers that it spills."""
    capability, dims, name, precision, blocks, warps, stages = job
    kernel = getattr(triton_kernels, name)
    width = triton_assign.width_of(dims)
    named = {"D": dims, "WIDTH": width, "SUM_BLOCK": triton_assign.SUM_COLUMNS, "PRECISION": precision, **blocks}
    constants = {argument: value for argument, value in named.items() if argument in kernel.arg_names}
    kinds = {argument: kind for kind, arguments in KINDS.items() for argument in arguments}
    kinds |= {"code_ptr": "*bf16" if precision == "bf16" else "*fp32"}
    signature = {
        argument: "constexpr"
        if argument in constants
        else kinds.get(argument, "*fp32" if "_ptr" in argument else "fp32")
        for argument in kernel.arg_names
    }
    # torch allocates memory at multiples of 16 bytes
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": name != "piece_kernel"}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    binary = folder / f"{os.getpid()}.cubin"
    binary.write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    # these kernels use the stack only for spills
    spilled = sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    assert "REG:" in usage
    return built.metadata.shared, spilled


def every_job() -> list[tuple]:
    """Each kernel in each block shape that may be chosen, for each card and number of dims; 384 dims only for one card:
    they use the same blocks as 1024, only fewer of them.
    """
    jobs = []
    for capability, shared in SHARED.items():
        for dims in DIMS if capability == 90 else (128, 1024):
            for precision in ("tf32", "bf16", "ieee"):
                shapes = triton_assign.shapes_within(
                    triton_assign.block_shapes(),
                    triton_assign.width_of(dims),
                    precision,
                    shared,
                    divmod(capability, 10),
                )
                jobs += [
                    (capability, dims, "nearest_kernel", precision, shape.kwargs, shape.num_warps, shape.num_stages)
                    for shape in shapes
                ]
                settle = triton_assign.settle_shape(triton_assign.width_of(dims), precision)
                jobs.append((capability, dims, "settle_kernel", precision, settle, 4, 3))
            jobs.append((capability, dims, "piece_kernel", "", triton_sums.SUM_SHAPE, 4, 3))
    return jobs


def test_no_kernel_spills_or_claims_more_shared_memory_than_there_is(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    jobs = every_job()
    assert [len([job for job in jobs if job[:2] == (90, dims)]) for dims in DIMS] == [13, 11, 11]
    with ProcessPoolExecutor() as pool:
        for job, (shared, spilled) in zip(jobs, pool.map(partial(compiled, folder=tmp_path), jobs), strict=True):
            assert spilled == 0, job
            assert shared <= SHARED[job[0]], job


def test_a_planted_spill_is_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    absurd = {"BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_D": 32}
    _, spilled = compiled((80, 384, "nearest_kernel", "tf32", absurd, 1, 1), tmp_path)
    assert spilled > 0


class Driver:
    """Triton's driver of an H100 on which every run of a kernel takes as long as the ones before took together."""

    utils = SimpleNamespace(get_device_properties=lambda _device: {"max_shared_mem": SHARED[90]})

    def __init__(self) -> None:
        self.runs: list[tuple[str, dict[str, Any]]] = []

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_benchmarker(self) -> Any:
        return lambda call, quantiles: (call(), [float(len(self.runs))] * 3)[1]

    def run(self, kernel: Any, *arguments: Any, **named: Any) -> None:
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        assert set(kernel.arg_names) <= set(given)
        assert all(size > 0 for size in (named["grid"](given) if callable(named["grid"]) else named["grid"]))
        self.runs.append((kernel.fn.__name__, given))


def test_block_shapes_are_tuned_once_and_kept_on_disk(tmp_path, monkeypatch):
    # the tuner itself, which the interpreter goes around, with kernels that do nothing
    driver, active = Driver(), triton.runtime.driver
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(active, "_active" if hasattr(active, "_active") else "active", driver)
    monkeypatch.setattr(triton.JITFunction, "run", lambda kernel, *given, **named: driver.run(kernel, *given, **named))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    tuned = triton_assign.nearest_kernel
    monkeypatch.setattr(tuned, "cache", {})
    monkeypatch.setattr(tuned, "cache_results", True)
    x = torch.randn(300, 128)

    def runs(precision: str, k: int) -> list[tuple[int, ...]]:
        """Block shapes of the runs of nearest_kernel for the first k points as centroids."""
        driver.runs.clear()
        d2, labels = torch.full((300,), torch.inf), torch.full((300,), -1)
        triton_assign.lower_exactly(x, x[0], d2, labels, x[:k], 0, precision)
        assert driver.runs[-1][0] == "settle_kernel" and bool((labels == -1).all())
        return [tuple(given[f"BLOCK_{letter}"] for letter in "NKD") for name, given in driver.runs[:-1]]

    assert runs("tf32", 200) == [(64, 64, 128), (64, 64, 128), (128, 64, 128), (128, 128, 128), (64, 64, 128)]
    assert runs("tf32", 129) == [(64, 64, 128)] and len(runs("tf32", 257)) == len(runs("bf16", 200)) == 5
    assert runs("ieee", 200)[-1] == (32, 64, 16)
    # another process
    tuned.cache.clear()
    assert runs("tf32", 200) == [(64, 64, 128)]


def test_no_function_calls_itself():
    # regression: Triton 3.4, which torch 2.8 has, followed the calls of a recursive function until Python's stack was
    # full
    called = {
        name: {call.func.id for call in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(found.fn))))
               if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}
        for name, found in vars(triton_kernels).items() if isinstance(found, triton.JITFunction)
    }  # fmt: skip
    assert "_tree" in called["_squared_distance"]
    assert not [name for name, names in called.items() if name in names]


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_every_width_has_a_tile_on_every_card(capability):
    # regression: for 65 to 128 dims no tile fitted into the 99 KiB of an L4, and a job with default settings failed
    # there
    shared = SHARED.get(10 * capability[0] + capability[1], LEAST_SHARED)
    for width in {triton_assign.width_of(dims) for dims in range(1, 4097)}:
        for precision in ("tf32", "bf16", "ieee"):
            assert triton_assign.shapes_within(triton_assign.block_shapes(), width, precision, shared, capability)


def test_an_l4_holds_the_tiles_that_it_may_choose(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for precision in ("tf32", "bf16"):
        shapes = triton_assign.shapes_within(triton_assign.block_shapes(), 128, precision, LEAST_SHARED, (8, 9))
        for shape in shapes:
            job = (89, 128, "nearest_kernel", precision, shape.kwargs, shape.num_warps, shape.num_stages)
            shared, spilled = compiled(job, tmp_path)
            assert shared <= LEAST_SHARED and spilled == 0, job


def test_shared_memory_that_holds_no_tile_is_named():
    with pytest.raises(ConfigError, match=r"no tile of 384 dims in 1000 bytes.*cluster.engine=torch"):
        triton_assign.shapes_within(triton_assign.block_shapes(), 384, "tf32", 1000, (8, 0))
