"""Selects the device of the batch side, measures free memory, and sizes tiles; no silent fallbacks."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from rb_gpu.errors import ConfigError

log = logging.getLogger(__name__)

# tf32 and bf16 products came with Ampere
LEAST_CAPABILITY = (8, 0)
# numbers of one tile: on a CPU they stay in the outer cache, on a GPU they keep it busy
TILE_SCORES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
# bytes of GPU memory reserved for tiles and NCCL, and per point for labels, distances and sorting
WORK_BYTES, BYTES_OF_A_POINT = 4 * 2**30, 128
# for every this many bytes of points, one byte is reserved too: for Triton's sums over pieces of clusters
BYTES_OF_A_SUM = 32
# the least room that points get there: two chunks while streaming from the host
LEAST_ROOM = 2**27
MEMINFO, OWN_GROUPS, CGROUP = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
CACHE = ("inactive_file ", "total_inactive_file ")
# assumed free where the system does not report it
UNTOLD_MEMORY = 2**32


def resolve_device(kind: str) -> torch.device:
    """The torch device of `device.kind`; auto is CUDA where available. Raises ConfigError where CUDA is missing."""
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
    if kind == "cpu" or not available:
        return torch.device("cpu")
    # read once, at the process's first GPU product: if it is unset by then, later ones cannot be made reproducible
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device("cuda")


def resolve_engine(engine: str, device: torch.device) -> str:
    """The assignment engine of `cluster.engine` on this device: triton or torch; auto is Triton where it can run.

    Raises ConfigError where Triton is requested and cannot run.
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
    elif engine != "torch" and (fault := _triton_fault()):
        lacking = f"{fault}; set cluster.engine=torch"
    if engine == "triton" and lacking:
        raise ConfigError(f"cluster.engine=triton, but {lacking}")
    chosen = "torch" if engine == "torch" or lacking else "triton"
    missed = engine == "auto" and bool(lacking)
    log.log(logging.WARNING if missed else logging.INFO, "assignment by %s%s", chosen, f" ({lacking})" * missed)
    return chosen


def _triton_found() -> bool:
    try:
        # added in Triton 3.4
        return find_spec("triton.knobs") is not None
    except ModuleNotFoundError:
        return False


@cache
def _triton_fault() -> str:
    """Why Triton cannot run here, "" if it can. It compiles a part of itself on first use, which this triggers."""
    try:
        import triton

        triton.runtime.driver.active.utils  # noqa: B018 - built on first access
    # no compiler, no Python headers, no libcuda, no writable folder: each raises another exception
    except Exception as error:
        said = [*str(error).splitlines(), ""][0]
        return f"Triton does not start ({said}); it needs a C compiler and Python's headers (gcc, python3-dev)"
    return ""


class _Shared:
    """A process-wide setting that concurrent calls share: the first user makes it, the last one undoes it."""

    def __init__(self, begin: Callable[[], Callable[[], None]]) -> None:
        """begin: makes the setting and returns a function that undoes it."""
        self._begin, self._lock, self._users = begin, threading.Lock(), 0
        self._undo: Callable[[], None] | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps the setting in force inside the context."""
        with self._lock:
            if self._users == 0:
                self._undo = self._begin()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0 and self._undo is not None:
                    self._undo()


def _precise_products() -> Callable[[], None]:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        # torch before 2.9
        allowed = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        return lambda: torch.set_float32_matmul_precision(allowed)
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"

    def undo() -> None:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision

    return undo


def _ordered_sums() -> Callable[[], None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    return lambda: torch.use_deterministic_algorithms(before)


_PRECISE, _ORDERED = _Shared(_precise_products), _Shared(_ordered_sums)
_THREADS = threading.Lock()


@contextmanager
def full_precision() -> Iterator[None]:
    """Computes float32 matrix products in full float32 inside the context, which bounds rely on."""
    # autocast is a per-thread setting that is not inherited by threads started inside
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False), _PRECISE.held():
        yield


@contextmanager
def reproducible(wanted: bool) -> Iterator[None]:
    """If wanted, makes every GPU sum inside the context add up in a fixed order, so that a rerun gives the same bits.

    Torch raises RuntimeError for operations that cannot do so. cuBLAS needs a workspace of fixed size for it, see
    `resolve_device`.
    """
    with _ORDERED.held() if wanted else nullcontext():
        yield


def tiles(n: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows for which (rows, width) float32 numbers fit one tile of the device."""
    rows = tile_rows(width, device)
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def tile_rows(width: int, device: torch.device) -> int:
    """How many rows of `width` float32 numbers fit one tile of the device."""
    return max(256, TILE_SCORES[device.type] // max(width, 1))


def points_room(rows: int, device: torch.device) -> int:
    """Bytes of GPU memory that `rows` points may take: what is free or cached by torch, less the working memory that
    they need.
    """
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    left = free + kept - WORK_BYTES - BYTES_OF_A_POINT * rows
    return max(LEAST_ROOM, left * BYTES_OF_A_SUM // (BYTES_OF_A_SUM + 1))


def free_memory() -> int:
    """Bytes of host memory that may still be allocated: what the machine has available, within the cgroups' limits."""
    if MEMINFO.is_file():
        lines = [line.split() for line in MEMINFO.read_text().splitlines()]
        free = next((int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"), UNTOLD_MEMORY)
    else:
        free = UNTOLD_MEMORY
    return max(0, min([free, *_left_in_groups()]))


def _left_in_groups() -> Iterator[int]:
    """Bytes left under each memory limit of this process's control groups and their parents, for cgroup v1 and v2."""
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
        # without a cgroup namespace the path is the host's, and the root of the mount is then this process's group
        for group in {base / own, *(base / above for above in own.parents), base}:
            try:
                limit, used = ((group / name).read_text().strip() for name in (limit_file, used_file))
                cache = [line.split()[1] for line in (group / "memory.stat").read_text().splitlines()
                         if line.startswith(CACHE)]  # fmt: skip
            except OSError:
                continue
            if limit != "max":
                # the page cache of files not used lately is reclaimed on demand
                yield int(limit) - int(used) + max(map(int, cache), default=0)


@contextmanager
def own_threads() -> Iterator[None]:
    """Inside the context, a thread that calls `set_own_threads` changes its own thread count only.

    Torch keeps a count per thread, and a process-wide one that threads new to torch begin with; setting the former
    overwrites the latter. Without this context, new threads would stay on one thread for ever.
    """
    with _THREADS, ThreadPoolExecutor(1) as newcomer:
        before = newcomer.submit(torch.get_num_threads).result()
        try:
            yield
        finally:
            newcomer.submit(torch.set_num_threads, before).result()


def set_own_threads(count: int) -> None:
    """Sets torch's thread count for this thread, which afterwards no longer takes up the process-wide count."""
    torch.get_num_threads()
    torch.set_num_threads(count)


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one CPU thread inside the context: float products then round alike whatever the number of cores,
    and as they do under torchrun, which gives each rank one thread.
    """
    threads = torch.get_num_threads()
    with own_threads():
        set_own_threads(1)
    try:
        yield
    finally:
        with own_threads():
            set_own_threads(threads)
