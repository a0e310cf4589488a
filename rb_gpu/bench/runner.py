"""Measuring tools that the suites share: interleaved rounds, processes with a clean environment, machine facts."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# environment variables that could pin old OpenBLAS builds to slow kernels
SLOW_KERNELS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def interleaved(
    contestants: Mapping[str, Callable[[int], npt.NDArray[np.float64]]], rounds: int, seed: int, *, warm: bool = True
) -> dict[str, npt.NDArray[np.float64]]:
    """Samples of every contestant, one row per round.

    Each round runs all contestants in a new random order, so that a temporary slowdown of the machine affects them
    alike. A contestant is called with the number of its round. Round 0 warms up and is dropped; with warm=False there
    is no round 0, for contestants that warm up by themselves.
    """
    order = list(contestants)
    samples: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in contestants}
    shuffle = random.Random(seed)
    for turn in range(0 if warm else 1, rounds + 1):
        shuffle.shuffle(order)
        for name in order:
            found = contestants[name](turn)
            if turn:
                samples[name].append(found)
    return {name: np.array(found) for name, found in samples.items()}


def each_call_us(call: Callable[[Any], object], inputs: list[Any]) -> npt.NDArray[np.float64]:
    """Microseconds that `call` takes on each input (len(inputs),)."""
    clock, taken = time.perf_counter_ns, []
    for value in inputs:
        start = clock()
        call(value)
        taken.append(clock() - start)
    return np.array(taken) / 1e3


def seconds(call: Callable[[], object]) -> npt.NDArray[np.float64]:
    """Wall seconds of one call (1,)."""
    start = time.perf_counter()
    call()
    return np.array([time.perf_counter() - start])


def clean_environment(threads: int) -> dict[str, str]:
    """The environment of this process, with `threads` BLAS threads and without variables that pin BLAS kernels."""
    kept = {name: value for name, value in os.environ.items() if name not in SLOW_KERNELS}
    return kept | dict.fromkeys(THREADS, str(threads))


def in_process(module: str, settings: Any, threads: int, environment: Mapping[str, str] | None = None) -> Any:
    """Runs `python -m MODULE` with `settings` as JSON on its standard input; returns the JSON on its last output line.

    It needs a new process because libraries read their number of threads only once. `environment` is added to
    clean_environment(threads). Raises RuntimeError if the process fails.
    """
    done = subprocess.run(  # noqa: S603 - this interpreter and a module of this package
        [sys.executable, "-m", module],
        input=json.dumps(settings),
        stdout=subprocess.PIPE,
        text=True,
        env=clean_environment(threads) | dict(environment or {}),
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{module} ended with {done.returncode}; its messages are above")
    return json.loads(done.stdout.splitlines()[-1])


def answer(run: Callable[[Any], Any]) -> None:
    """The other side of `in_process`: calls `run` on the JSON from standard input and prints its result as JSON."""
    logging.basicConfig(level=logging.WARNING)
    sys.stdout.write(json.dumps(run(json.load(sys.stdin))) + "\n")


def fresh_median(code: str, repeats: int) -> float:
    """Median of the number that `code` prints, over `repeats` new interpreters.

    Bytecode caching is enabled even if the environment forbids it: only the first interpreter then compiles what has
    changed, as an installer would, instead of every one of them.
    """
    command, environment = [sys.executable, "-c", code], clean_environment(1)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    numbers = [
        float(subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True).stdout)  # noqa: S603
        for _ in range(repeats)
    ]
    return statistics.median(numbers)


def optional(module: str) -> Any:
    """A peer's module, or None if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def machine() -> dict[str, Any]:
    """The processor, number of cores, BLAS kernels in use, and versions of the compared libraries."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    versions = {}
    for name in (
        "numpy",
        "faiss-cpu",
        "hnswlib",
        "usearch",
        "safetensors",
        "torch",
        "numba",
        "scikit-learn",
        "scikit-learn-intelex",
        "superkmeans",
        "pyarrow",
    ):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    threadpoolctl = optional("threadpoolctl")
    kernels = [] if threadpoolctl is None else threadpoolctl.threadpool_info()
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "kernels": sorted({f"{k['internal_api']} {k.get('architecture', '')}".strip() for k in kernels}),
        "versions": versions,
    }
