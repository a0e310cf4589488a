"""Kills trainings at random moments: does the champion keep answering, and does the next training succeed?

    python tests/soak_kill.py --kills 200

Half of the kills come anywhere in a training, half while it publishes, promotes and removes the oldest version. After
each kill the champion must load and give bit-identical answers, or be a new, complete version. The next training must
succeed without manual repair and leave no temporary files behind. Trainings are forked from one process that has
imported everything already, so that kills rarely hit imports. Exits with 1 if any of this fails.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import faiss  # noqa: F401 - imported before the forks, like everything that a training needs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from rb_gpu import ReasoningBank, Registry, verify_artifact
from rb_gpu.learn import kernels  # noqa: F401
from rb_gpu.learn.config import (
    ClusterConfig,
    DataConfig,
    EvalConfig,
    IndexConfig,
    JudgeConfig,
    ParamsConfig,
    TrainConfig,
)
from rb_gpu.learn.training import train
from rb_gpu.learn.version_config import GateConfig, RegistryConfig

ROWS, DIM, CENTRES = 3000, 16, 12
EF_SEARCH = (16, 64, 256)
# label of a kill that came after the training had ended
LATE = "too late"
QUERIES = np.random.default_rng(1).normal(size=(64, DIM)).astype(np.float32)


def write_log(path: Path) -> None:
    """Writes a table of queries around CENTRES centres; each centre has one best config."""
    rng = np.random.default_rng(0)
    kind, config = rng.integers(CENTRES, size=ROWS), rng.integers(len(EF_SEARCH), size=ROWS)
    x = rng.normal(size=(CENTRES, DIM))[kind] + 0.2 * rng.normal(size=(ROWS, DIM))
    quality = np.clip(0.5 + 0.2 * (kind % len(EF_SEARCH) == config) + 0.1 * rng.normal(size=ROWS), 0, 1)
    columns = {
        "id": np.arange(ROWS, dtype=np.uint64),
        "query_embedding": pa.FixedSizeListArray.from_arrays(pa.array(x.astype(np.float32).ravel()), DIM),
        "ef_search": np.array(EF_SEARCH, np.uint32)[config],
        "precision": quality.astype(np.float32),
        "recall": quality.astype(np.float32),
        "latency_us": np.full(ROWS, 1000, np.uint64),
        "timestamp": np.arange(ROWS),
        "propensity": np.full(ROWS, 1 / len(EF_SEARCH), np.float32),
    }
    pq.write_table(pa.table(columns), path)


def settings(folder: Path) -> TrainConfig:
    """The settings of a short training that is always promoted."""
    return TrainConfig(
        data=DataConfig(path=str(folder / "log.parquet")),
        params=ParamsConfig(default={"ef_search": 64}),
        cluster=ClusterConfig(k=24, checkpoint_every=1),
        judge=JudgeConfig(method="welch"),
        index=IndexConfig(kind="hnsw"),
        eval=EvalConfig(bootstrap=100),
        gate=GateConfig(min_gain=-1.0, min_rows=1, max_harm_rate=1.0, min_coverage=0.0, max_drift=1.0),
        registry=RegistryConfig(path=str(folder / "artifacts"), keep=3),
    )


def start(config: TrainConfig) -> int:
    """Forks a training and returns its process id; it exits with 0 if its version was promoted."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        published = train(config)
        code = 0 if published is not None and published.decision.promote else 3
    finally:
        os._exit(code)


def killed(config: TrainConfig, seconds: float, only_publishing: bool) -> bool:
    """Starts a training and kills it after `seconds`; returns whether it was still running then.

    only_publishing: count the seconds from the training's first temporary file instead of its start.
    """
    child = start(config)
    while only_publishing and not is_publishing(Path(config.registry.path)):
        if os.waitid(os.P_PID, child, os.WNOHANG | os.WEXITED | os.WNOWAIT) is not None:
            break
        time.sleep(0.0002)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def finished(config: TrainConfig) -> tuple[int, float, float]:
    """Runs a training to its end: its exit code, its seconds, and the seconds since its first temporary file."""
    begun = time.monotonic()
    child, publishing = start(config), None
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        now = time.monotonic()
        if publishing is None and is_publishing(Path(config.registry.path)):
            publishing = now
        if done:
            return os.waitstatus_to_exitcode(status), now - begun, now - (publishing or now)
        time.sleep(0.0005)


def is_publishing(registry: Path) -> bool:
    """Whether a version is being written, judged by its temporary folder."""
    return any(registry.glob(".tmp-2*"))


def answers(folder: Path) -> dict[str, list[object]]:
    """A version's answers to QUERIES. Raises ArtifactError if it is damaged."""
    return {name: column.tolist() for name, column in
            ReasoningBank.load(folder, search="exact").optimized_params_batch(QUERIES).items()}  # fmt: skip


def soak(folder: Path, kills: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Numbers of kills by the stage that they hit, and descriptions of everything that went wrong."""
    rng, stages, wrong = random.Random(seed), Counter[str](), []
    write_log(folder / "log.parquet")
    config, registry = settings(folder), Registry(folder / "artifacts")
    finished(config)  # warms up: compiles the numba kernels
    code, whole, tail = finished(config)
    if code:
        return stages, [f"a training that nothing disturbed ended with {code}"]
    number = 0
    while stages.total() - stages[LATE] < kills:
        number += 1
        before, versions = registry.champion(), set(registry.versions())
        said = answers(registry.path / "champion")
        if not killed(config, rng.uniform(0, tail if number % 2 else whole), only_publishing=number % 2 == 1):
            stages[LATE] += 1
        elif is_publishing(registry.path):
            stages["while it wrote"] += 1
        elif registry.champion() != before:
            stages["once promoted"] += 1
        else:
            stages["between writing and promotion" if set(registry.versions()) - versions else "before writing"] += 1
        champion = registry.champion()
        try:
            verify_artifact(registry.path / "champion")
            if champion == before and answers(registry.path / "champion") != said:
                wrong.append(f"kill {number}: {champion} answers otherwise")
            answers(registry.path / "champion")
        except Exception as error:
            wrong.append(f"kill {number}: the champion {champion} does not load: {error}")
        code, whole, tail = finished(config)
        left = [path.name for path in registry.path.glob(".tmp-*")]
        if code or left or registry.champion() in (champion, before):
            wrong.append(f"kill {number}: the next training ended with {code}, left {left}")
    return stages, wrong


def main() -> int:
    """Runs the soak and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        stages, wrong = soak(Path(name), options.kills, options.seed)
    came = ", ".join(f"{count} {stage}" for stage, count in stages.most_common())
    print(f"kills in {time.monotonic() - started:.0f} s: {came}; failures: {wrong or 'none'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
