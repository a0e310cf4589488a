"""The suite load: reading and checking, and full loading, of every table format, compared with a bare read by pyarrow
and with memcpy, in one run.

Suffixes: N rows, D dims.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rb_gpu.bench.runner import answer, fresh_median, in_process, interleaved, machine, seconds
from rb_gpu.learn.config import DataConfig, ParamsConfig
from rb_gpu.learn.quarantine import BadRows
from rb_gpu.learn.tables import Reading, Table, read_table
from rb_gpu.learn.trajectories import OUTCOME_OPTIONAL, OUTCOME_REQUIRED, QUERY_REQUIRED, Trajectories, load

Matrix = npt.NDArray[np.float32]

ROW_GROUP = 65_536
LIST = "parquet list"

# prints the peak memory of a load in multiples of the matrix; a small table is loaded first, so that the memory of
# imports and threads is not counted
PEAK = (
    "from pathlib import Path; from rb_gpu.learn.config import DataConfig, ParamsConfig\n"
    "from rb_gpu.learn.trajectories import load\n"
    "def status(key):\n"
    "    lines = Path('/proc/self/status').read_text().splitlines()\n"
    "    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024\n"
    "load(DataConfig(path={small!r}), ParamsConfig()); before = status('VmRSS')\n"
    "table = load(DataConfig(path={large!r}), ParamsConfig())\n"
    "print((status('VmHWM') - before) / table.x_QD.nbytes)"
)


def embedding_columns(x_ND: Matrix) -> dict[str, pa.Array]:
    """x_ND as an Arrow array of each format's column type, without copies if Arrow allows it."""
    n, dim = x_ND.shape
    flat, offsets = pa.array(x_ND.ravel()), pa.array(np.arange(n + 1, dtype=np.int64) * dim)
    fixed = pa.FixedSizeListArray.from_arrays(flat, dim)
    binary = pa.FixedSizeBinaryArray.from_buffers(pa.binary(4 * dim), n, [None, pa.py_buffer(x_ND)])
    lists = pa.LargeListArray.from_arrays(offsets, flat)
    return {"arrow": fixed, "parquet fixed_size_list": fixed, LIST: lists, "parquet fixed_size_binary": binary}


def write_tables(folder: Path, x_ND: Matrix) -> dict[str, Path]:
    """Writes one table with embeddings x_ND in each format and returns the paths. Without compression and dictionaries,
    which only cost time on embeddings.
    """
    n = len(x_ND)
    others = {
        "id": np.arange(n, dtype=np.uint64),
        "precision": np.full(n, 0.5, np.float32),
        "recall": np.full(n, 0.5, np.float32),
        "latency_us": np.arange(n, dtype=np.uint64) % 1000,
        "timestamp": np.arange(n) + 1_700_000_000,
        "ef_search": (16 << (np.arange(n) % 5)).astype(np.uint32),
    }
    paths = {}
    for name, column in embedding_columns(x_ND).items():
        table = pa.table({**others, "query_embedding": column})
        paths[name] = folder / f"{name.replace(' ', '_')}{len(x_ND)}{'.arrow' if name == 'arrow' else '.parquet'}"
        if name == "arrow":
            with pa.OSFile(str(paths[name]), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=ROW_GROUP)
        else:
            pq.write_table(table, paths[name], row_group_size=ROW_GROUP, compression="none", use_dictionary=False)
    return paths


def read_checked(path: Path) -> Table:
    """The table with every row read, decoded and checked, and the embeddings in one matrix."""
    return read_table(str(path), (*OUTCOME_REQUIRED, *QUERY_REQUIRED), OUTCOME_OPTIONAL, BadRows(), Reading())


def load_table(path: Path) -> Trajectories:
    """Loads a table as a job does: reads, checks, joins, finds the configs and computes the fingerprint."""
    return load(DataConfig(path=str(path)), ParamsConfig())


def read_bare(path: Path, dim: int) -> tuple[Matrix, pa.Table]:
    """The same columns read by pyarrow alone, with all its threads and without checks: the matrix (N, D), the table."""
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all() if path.suffix == ".arrow" else pq.read_table(path)
    parts = []
    for column in table["query_embedding"].chunks:
        if pa.types.is_fixed_size_binary(column.type):
            values = np.frombuffer(column.buffers()[1], np.float32, len(column) * dim, column.offset * 4 * dim)
        else:
            values = column.flatten().to_numpy()
        parts.append(values.reshape(-1, dim))
    return parts[0] if len(parts) == 1 and path.suffix != ".arrow" else np.concatenate(parts), table


def _seconds(call: Callable[[], object], _: int) -> npt.NDArray[np.float64]:
    return seconds(call)


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Times every format, pyarrow's read of it and memcpy in interleaved rounds, then measures peak memory in new
    processes. Raises RuntimeError if a format is not read back exactly.
    """
    n, dim, rounds, seed = (settings[key] for key in ("n", "dim", "rounds", "seed"))
    x_ND = np.random.default_rng(seed).standard_normal((n, dim), dtype=np.float32)
    with tempfile.TemporaryDirectory(prefix="rb_gpu-benchmark-") as name:
        paths, small = write_tables(Path(name), x_ND), write_tables(Path(name), x_ND[:10])
        for path in paths.values():
            if not np.array_equal(load_table(path).x_QD, x_ND) or not np.array_equal(read_bare(path, dim)[0], x_ND):
                raise RuntimeError(f"{path.name} was read wrongly")
        calls: dict[str, Callable[[], object]] = {"memcpy": x_ND.copy}
        calls |= {name: partial(load_table, path) for name, path in paths.items()}
        calls |= {f"read, {name}": partial(read_checked, path) for name, path in paths.items()}
        calls |= {f"pyarrow, {name}": partial(read_bare, path, dim) for name, path in paths.items()}
        taken_s = interleaved({name: partial(_seconds, call) for name, call in calls.items()}, rounds, seed)
        formats = {}
        for name, path in paths.items():
            peak = PEAK.format(small=str(small[name]), large=str(path))
            formats[name] = {
                "gb_per_s": x_ND.nbytes / 1e9 / float(np.median(taken_s[name])),
                "of_memcpy": float(np.median(taken_s["memcpy"] / taken_s[name])),
                "read_of_memcpy": float(np.median(taken_s["memcpy"] / taken_s[f"read, {name}"])),
                "of_pyarrow": float(np.median(taken_s[f"pyarrow, {name}"] / taken_s[name])),
                "of_list": float(np.median(taken_s[LIST] / taken_s[name])),
                # only Linux has /proc
                "peak_rss_of_matrix": fresh_median(peak, 1) if Path("/proc/self/status").exists() else None,
            }
    memcpy = x_ND.nbytes / 1e9 / float(np.median(taken_s["memcpy"]))
    return {
        "suite": "load", "settings": settings, "machine": machine(), "matrix_bytes": x_ND.nbytes,
        "memcpy_gb_per_s": memcpy, "formats": formats,
    }  # fmt: skip


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Calls `run` in a process of its own with one thread. Raises RuntimeError if it fails."""
    result: dict[str, Any] = in_process("rb_gpu.bench.load", settings, threads=1)
    return result


if __name__ == "__main__":
    answer(run)
