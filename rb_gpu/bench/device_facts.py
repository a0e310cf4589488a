"""Describes a device for the suite gpu: its properties, the peak rates it reaches, and whether its labels are right.

Suffixes: N points, K centroids, D dims.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rb_gpu.bench.roofline import Card
from rb_gpu.errors import ConfigError
from rb_gpu.learn.arrays import HOST, Arrays, on_gpu, student_tail, weighted_quantiles
from rb_gpu.learn.assign_device import DeviceAssignment
from rb_gpu.learn.devices import free_memory
from rb_gpu.learn.kmeans import nearest

# sizes of the timed operations: side of the square matrix products, and bytes of the copies
PRODUCT_SIZE = {"cuda": 8192, "cpu": 512}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**22}
ROUNDS = 5
# the check of labels: every eighth centroid has a twin, too near for float32 products to tell the two apart
CHECK_ROWS, CHECK_CLUSTERS, CHECK_DIMS, TWIN = 20_000, 700, 96, 1e-6
ARRAY_SIZES = (10_000, 100_000, 1_000_000)
TOPICS, WIDTH, CHUNK_ROWS = 2000, 0.5, 2**20


def timed(device: torch.device, call: Callable[[], object]) -> float:
    """Wall seconds of a call, including the time until the device has finished all of its work."""
    _finish(device)
    started = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def facts(device: torch.device) -> dict[str, Any]:
    """Name, memory in bytes and compute capability of the card, and the versions of the driver, CUDA and torch."""
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "driver": driver()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"card": card.name, "memory_bytes": card.total_memory, "capability": f"{card.major}.{card.minor}"}
    else:
        found |= {"card": "no GPU", "memory_bytes": free_memory(), "capability": "-"}
    return found


def driver() -> str:
    """The version of NVIDIA's driver, or a dash if nvidia-smi is not installed."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "-"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout  # noqa: S603 - fixed arguments
    return (said.splitlines() or ["-"])[0]


def measured_card(device: torch.device, memory_bytes: int) -> Card:
    """The rates that this device reaches in large matrix products and copies, each the best of ROUNDS runs."""
    side, count = PRODUCT_SIZE[device.type], COPY_BYTES[device.type] // 4
    left, right = torch.randn(2, side, side, device=device).unbind()
    with _tf32():
        tf32 = _best(device, lambda: left @ right)
    single = _best(device, lambda: left @ right)
    left, right = left.bfloat16(), right.bfloat16()
    half = _best(device, lambda: left @ right)
    here, there = torch.zeros(count, device=device), torch.empty(count, device=device)
    memory = _best(device, lambda: there.copy_(here))
    host = torch.zeros(count, pin_memory=device.type == "cuda")
    bus = _best(device, lambda: there.copy_(host, non_blocking=True))
    work = 2 * side**3 / 1e12
    # a copy within device memory both reads and writes every byte
    return Card("measured", work / single, work / tf32, work / half, 8e-9 * count / memory, 4e-9 * count / bus,
                memory_bytes / 1e9)  # fmt: skip


def _best(device: torch.device, call: Callable[[], object]) -> float:
    return min(timed(device, call) for _ in range(ROUNDS))


@contextmanager
def _tf32() -> Iterator[None]:
    """Lets float32 matrix products run in tf32 inside the block."""
    matmul: Any = torch.backends.cuda.matmul
    name, fast = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    before = getattr(matmul, name)
    setattr(matmul, name, fast)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def planted(n: int, dim: int, seed: int, device: torch.device, where: torch.device) -> Tensor:
    """Points (n, D) float32 around 2,000 topic centres, generated on `device` in chunks and stored on `where`."""
    generator = torch.Generator(device).manual_seed(seed)
    centres = torch.randn(TOPICS, dim, generator=generator, device=device)
    x_ND = torch.empty(n, dim, device=where)
    for start in range(0, n, CHUNK_ROWS):
        rows = min(CHUNK_ROWS, n - start)
        topic = torch.randint(TOPICS, (rows,), generator=generator, device=device)
        noise = torch.randn(rows, dim, generator=generator, device=device)
        x_ND[start : start + rows] = centres[topic] + WIDTH * noise
    return x_ND


def agreement(device: torch.device, engine: str, precision: str, seed: int) -> dict[str, Any]:
    """Compares an engine's labels with the CPU's exact ones: how many differ, and the largest excess distance of a
    differing label, in units of the error bound that the engine guarantees (assign_device.py). An excess of at most 1
    means that the bound holds.
    """
    host = torch.device("cpu")
    x_ND = planted(CHECK_ROWS, CHECK_DIMS, seed, host, host)
    centroids_KD = x_ND[:CHECK_CLUSTERS].clone()
    centroids_KD[::8] = centroids_KD[1::8][: len(centroids_KD[::8])] + TWIN
    exact_N, _ = nearest(x_ND, centroids_KD, host)
    middle_D = x_ND.median(dim=0).values
    assignment = DeviceAssignment(x_ND.to(device), middle_D.to(device), engine=engine, precision=precision)
    assignment.assign(centroids_KD.to(device))
    found_N = assignment.labels_N.cpu()
    return {"engine": engine, "precision": precision, "points": len(x_ND), **excess(
        x_ND, centroids_KD, middle_D, found_N, exact_N, engine)}  # fmt: skip


def excess(
    x_ND: Tensor, centroids_KD: Tensor, middle_D: Tensor, found_N: Tensor, exact_N: Tensor, engine: str
) -> dict[str, Any]:
    """Number of differing labels, and the largest excess of half a squared distance in units of the engine's bound."""
    differ = torch.nonzero(found_N != exact_N).squeeze(1)
    x, dims = x_ND[differ].double(), x_ND.shape[1]
    found, exact = (centroids_KD[labels[differ]].double() for labels in (found_N, exact_N))
    found_d2, exact_d2 = ((x - c).square().sum(1) for c in (found, exact))
    if engine == "triton":
        bound = 2 * (dims + 2) * 2.0**-53 * found_d2
    else:
        norms = torch.maximum((found - middle_D).square().sum(1), (exact - middle_D).square().sum(1))
        bound = (2 * dims + 8) * 2.0**-24 * ((x - middle_D).square().sum(1) + norms)
    worst = float(((found_d2 - exact_d2) / 2 / bound).max()) if len(differ) else 0.0
    return {"differ": len(differ), "worst_over_bound": worst}


def array_functions(device: torch.device, arrays: Callable[[], Arrays] = on_gpu) -> list[dict[str, Any]]:
    """Times the functions that torch lacks, in SciPy on the host and in CuPy on the device, with tensors as input and
    output. Each row has both times in milliseconds and the largest difference; one row with a note if CuPy is missing.
    """
    try:
        there = arrays()
    except ConfigError as error:
        return [{"note": str(error)}]
    functions: dict[str, Callable[[Any, Any, Arrays], Any]] = {
        "student's t": student_tail,
        "weighted quantiles": lambda x_N, v_N, on: weighted_quantiles(x_N, v_N, (0.5, 0.95, 0.99), on),
    }
    generator, rows = torch.Generator().manual_seed(0), []
    for n in ARRAY_SIZES:
        x_N = torch.randn(n, dtype=torch.float64, generator=generator)
        v_N = torch.randint(1, 1000, (n,), generator=generator).double()
        for name, function in functions.items():
            host_ms, expected = _array_call(function, x_N, v_N, HOST)
            device_ms, found = _array_call(function, x_N.to(device), v_N.to(device), there)
            apart = float((found.cpu() - expected).abs().max())
            rows.append({"function": name, "n": n, "host_ms": host_ms, "device_ms": device_ms, "apart": apart})
    return rows


def _array_call(
    function: Callable[[Any, Any, Arrays], Any], x_N: Tensor, v_N: Tensor, on: Arrays
) -> tuple[float, Tensor]:
    """Milliseconds of a second, warm call, and the result of the first."""

    def call() -> Tensor:
        return on.tensor(function(on.of(x_N), on.of(v_N), on))

    found = call()
    return 1e3 * timed(x_N.device, call), found
