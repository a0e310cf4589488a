"""The suite sweep: the time of a sweep relative to one job, for whole processes from start to exit."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.bench.runner import clean_environment, interleaved, machine, seconds
from rb_gpu.learn.job_config import SynthesizeConfig
from rb_gpu.learn.synthesize import synthesize

log = logging.getLogger(__name__)

# size of the planted table
PATTERNS, CONFIGS = 256, 6
JUDGES = ("judge.method=eb,welch", "judge.min_probability=0.5,0.6,0.7,0.8")
SIZES = ("cluster.k=64,128,256,512",)
ONE, EIGHT_JUDGES, FOUR_SIZES = "one job", "8 settings of the judge", "4 numbers of clusters"
SWEEPS = {EIGHT_JUDGES: JUDGES, FOUR_SIZES: SIZES}


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of one job and of each of SWEEPS, on the sample and on `n` planted rows of dimension `dim`, as medians
    over rounds.
    """
    with tempfile.TemporaryDirectory(prefix="rb_gpu-sweep-") as scratch:
        folder = Path(scratch)
        size = {"n": settings["n"], "dim": settings["dim"], "patterns": PATTERNS, "configs": CONFIGS}
        synthesize(SynthesizeConfig(out=str(folder / "planted"), **size, seed=settings["seed"]))
        planted = ["data=files", f"data.path={folder / 'planted' / 'trajectories.parquet'}"]
        cases = {"sample": [], f"{settings['n']:,} x {settings['dim']}": planted}
        return {
            "suite": "sweep",
            "settings": settings,
            "machine": machine(),
            "cases": [{"data": name, **_case(folder, data, settings)} for name, data in cases.items()],
        }


def _case(folder: Path, data: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    def contestant(overrides: Sequence[str]) -> Any:
        def call(turn: int) -> npt.NDArray[np.float64]:
            log.info("%s, round %d", " ".join(overrides) or ONE, turn)
            # flags must come before all settings
            flags = [one for one in overrides if one == "-m"]
            return seconds(lambda: _job(folder, [*flags, *data, *(one for one in overrides if one != "-m")]))

        return call

    every = {ONE: contestant(()), **{name: contestant(("-m", *swept)) for name, swept in SWEEPS.items()}}
    found = interleaved(every, settings["rounds"], settings["seed"])
    medians = {name: float(np.median(taken)) for name, taken in found.items()}
    return {"seconds": medians, "ratio": {name: medians[name] / medians[ONE] for name in SWEEPS}}


def _job(folder: Path, overrides: Sequence[str]) -> None:
    """Runs one training with a registry of its own. Raises RuntimeError if it fails; a refusal by the gate is no
    failure.
    """
    with tempfile.TemporaryDirectory(dir=folder) as own:
        places = [f"registry.path={own}/artifacts", f"hydra.run.dir={own}/run", f"hydra.sweep.dir={own}/sweep"]
        done = subprocess.run(  # noqa: S603 - this interpreter and a module of this package
            [sys.executable, "-m", "rb_gpu.jobs.train", *overrides, *places],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            env=clean_environment(os.cpu_count() or 1),
        )  # fmt: skip
        if done.returncode not in (0, 3):
            raise RuntimeError(f"jobs.train {' '.join(overrides)} ended with {done.returncode}:\n{done.stdout[-2000:]}")
