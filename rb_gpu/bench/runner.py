"""What every suite measures with: interleaved rounds, a process with a clean environment, facts of the machine."""

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

# what pins old OpenBLAS builds to slow kernels
SLOW_KERNELS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def interleaved(
    contestants: Mapping[str, Callable[[int], npt.NDArray[np.float64]]], rounds: int, seed: int, *, warm: bool = True
) -> dict[str, npt.NDArray[np.float64]]:
    """Samples of every contestant, one row a round. Each round runs all of them in another order, so that what slows
    the machine for a while slows them alike; round 0 warms up and is dropped, unless every call warms up by itself
    (warm=False). A contestant is given its round.
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
    """Microseconds of each call (len(inputs),)."""
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
    """The environment of this process, with so many threads for products, which choose their kernels by themselves."""
    kept = {name: value for name, value in os.environ.items() if name not in SLOW_KERNELS}
    return kept | dict.fromkeys(THREADS, str(threads))


def in_process(module: str, settings: Any, threads: int, environment: Mapping[str, str] | None = None) -> Any:
    """What `python -m MODULE` prints as JSON on its last line, given `settings` as JSON on its standard input.

    A process of its own, since libraries read their number of threads once; `environment` comes on top. Raises
    RuntimeError where it fails.
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
    """The other side of `in_process`: runs on the JSON of the standard input and prints its result as JSON."""
    logging.basicConfig(level=logging.WARNING)
    sys.stdout.write(json.dumps(run(json.load(sys.stdin))) + "\n")


def fresh_median(code: str, repeats: int) -> float:
    """Median of the number that `code` prints, over so many new interpreters.

    The first compiles what has changed, as an installer does: where the environment forbids that, all of them would.
    """
    command, environment = [sys.executable, "-c", code], clean_environment(1)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    numbers = [
        float(subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True).stdout)  # noqa: S603
        for _ in range(repeats)
    ]
    return statistics.median(numbers)


def optional(module: str) -> Any:
    """A peer's module, None where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def machine() -> dict[str, Any]:
    """Processor, cores, kernels of NumPy's products, versions of what is compared."""
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
