"""Which device the batch side runs on, how much memory is free, and tiles that fit; nothing falls back in silence."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from rb_gpu.errors import ConfigError

log = logging.getLogger(__name__)

# tf32 and bf16 products came with Ampere
LEAST_CAPABILITY = (8, 0)
# numbers of one tile: they stay in a CPU's outer cache, and keep a GPU busy
TILE_SCORES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
MEMINFO, OWN_GROUPS, CGROUP = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
CACHE = ("inactive_file ", "total_inactive_file ")
# what is taken as free where the system does not tell
UNTOLD_MEMORY = 2**32


def resolve_device(kind: str) -> torch.device:
    """The torch device of `device.kind`: auto takes CUDA where there is one. Raises ConfigError where it is missing."""
    if kind not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={kind} is not one of auto, cpu, cuda; choose one of them")
    available = torch.cuda.is_available()
    if kind == "cuda" and not available:
        built = (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
            if torch.version.cuda
            else (f"torch {torch.__version__} is a CPU build")
        )
        raise ConfigError(
            f"device=cuda, but no CUDA device is available ({built}); install the driver and a CUDA build "
            "(pip install rb_gpu[gpu]), or set device=cpu"
        )
    return torch.device("cuda" if kind == "cuda" or (kind == "auto" and available) else "cpu")


def resolve_engine(engine: str, device: torch.device) -> str:
    """The assignment engine of `cluster.engine` on this device: triton or torch; auto takes Triton where it can run.

    Raises ConfigError where Triton was asked for and cannot.
    """
    if device.type != "cuda":
        if engine == "triton":
            raise ConfigError(
                f"cluster.engine=triton, but device={device}; set device.kind=cuda or cluster.engine=auto"
            )
        return "torch"
    lacking = ""
    if not _triton_found():
        lacking = "triton 3.4 or later is not installed; pip install 'triton>=3.4', or set cluster.engine=torch"
    elif torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        lacking = "the GPU is older than Ampere; set cluster.engine=torch"
    if engine == "triton" and lacking:
        raise ConfigError(f"cluster.engine=triton, but {lacking}")
    chosen = "torch" if engine == "torch" or lacking else "triton"
    log.info("assignment by %s%s", chosen, f" ({lacking})" if engine == "auto" and lacking else "")
    return chosen


def _triton_found() -> bool:
    try:
        # what came with 3.4
        return find_spec("triton.knobs") is not None
    except ModuleNotFoundError:
        return False


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices in float32 meanwhile, whatever the process allows: bounds rely on it."""
    # a thread's own setting, which the threads that it starts do not take over
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False), _precise_products():
        yield


@contextmanager
def _precise_products() -> Iterator[None]:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        # torch before 2.9
        allowed = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(allowed)
        return
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@contextmanager
def reproducible(wanted: bool) -> Iterator[None]:
    """Meanwhile, where it is wanted, every sum on a GPU adds up in one order: what runs again gives the same bits.

    Torch raises RuntimeError at what it cannot do so. cuBLAS keeps to it from its first product on, with a workspace of
    fixed size.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def tiles(n: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows whose (rows, width) float32 numbers fit one tile of the device."""
    rows = tile_rows(width, device)
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def tile_rows(width: int, device: torch.device) -> int:
    """How many rows of `width` float32 numbers fit one tile of the device."""
    return max(256, TILE_SCORES[device.type] // max(width, 1))


def free_memory() -> int:
    """Bytes of host memory that may still be taken: what the machine has free, within the containers' limits."""
    if MEMINFO.is_file():
        lines = [line.split() for line in MEMINFO.read_text().splitlines()]
        free = next((int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"), UNTOLD_MEMORY)
    else:
        free = UNTOLD_MEMORY
    return max(0, min([free, *_left_in_groups()]))


def _left_in_groups() -> Iterator[int]:
    """What the control groups of this process leave it, each of them and each above it; both versions of Linux's."""
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        lines = []
    of_kind = {kinds: path for _, kinds, path in (line.split(":", 2) for line in lines)}
    for base, kind, limit_file, used_file in (
        (CGROUP, "", "memory.max", "memory.current"),
        (CGROUP / "memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        own = PurePosixPath(of_kind.get(kind, "/").lstrip("/"))
        # the path is the host's where the container has no names of its own; its root is then this process's group
        for group in {base / own, *(base / above for above in own.parents), base}:
            try:
                limit, used = ((group / name).read_text().strip() for name in (limit_file, used_file))
                cache = [line.split()[1] for line in (group / "memory.stat").read_text().splitlines()
                         if line.startswith(CACHE)]  # fmt: skip
            except OSError:
                continue
            if limit != "max":
                # pages of files that nobody has used lately are given up for others
                yield int(limit) - int(used) + max(map(int, cache), default=0)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread of the CPU meanwhile: products of floats then round alike whatever the number of cores, and
    under torchrun, which gives each rank one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
