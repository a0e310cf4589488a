"""Which device the batch side runs on, how much memory is free, and tiles that fit; nothing falls back in silence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch

from rb_gpu.errors import ConfigError

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
