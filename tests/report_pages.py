"""Reports of real trainings on small planted tables, for tests that parse them or open them in a browser."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from rb_gpu.bank import ReasoningBank
from rb_gpu.learn.config import ClusterConfig, DataConfig, JudgeConfig, RegistryConfig, RouterConfig, TrainConfig
from rb_gpu.learn.job_config import SynthesizeConfig
from rb_gpu.learn.projection import project
from rb_gpu.learn.report import render_report
from rb_gpu.learn.synthesize import synthesize
from rb_gpu.learn.training import train
from rb_gpu.learn.version_config import GateConfig

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pages:
    """Paths of three reports. promoted: of a first training. refused: of a second training, with a champion, a router,
    and a gate that nothing passes. plain: of a training with Welch's tests, without costs and propensities. bank,
    manifest: those of the first training.
    """

    promoted: Path
    refused: Path
    plain: Path
    bank: ReasoningBank
    manifest: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """A copy of the first training's manifest, which a test may change."""
        return copy.deepcopy(self.manifest)


def make_pages(folder: Path) -> Pages:
    """Trains three times. Raises ValueError unless the first training is promoted and the second refused."""
    synthesize(SynthesizeConfig(out=str(folder / "planted"), n=8000, dim=32, patterns=24, configs=6, seed=1))
    table = pq.read_table(folder / "planted/trajectories.parquet")
    pq.write_table(table.drop_columns(["cost", "propensity"]), folder / "plain.parquet")
    config = TrainConfig(
        data=DataConfig(path=str(folder / "planted/trajectories.parquet")),
        cluster=ClusterConfig(k=32),
        registry=RegistryConfig(path=str(folder / "artifacts")),
    )
    first = train(config)
    config.gate, config.router = GateConfig(min_gain=0.9), RouterConfig(kind="fastgrnn", epochs=4)
    second = train(config)
    plain = train(TrainConfig(
        data=DataConfig(path=str(folder / "plain.parquet")), cluster=ClusterConfig(k=16),
        judge=JudgeConfig(method="welch", objective="bound", max_latency_us=1e6),
        registry=RegistryConfig(path=str(folder / "others")),
    ))  # fmt: skip
    if first is None or second is None or plain is None or not first.decision.promote or second.decision.promote:
        raise ValueError("the first training is to be promoted, the second refused")
    return Pages(
        first.folder / "report.html",
        second.folder / "report.html",
        plain.folder / "report.html",
        ReasoningBank.load(first.folder),
        json.loads((first.folder / "manifest.json").read_text()),
    )


def page_of(
    bank: ReasoningBank, facts: dict[str, Any], version: str = "20260101T000000-000000", promoted: bool = True
) -> str:
    """The report (HTML) of any bank, with random queries around its leaves."""
    rng = np.random.default_rng(0)
    centroids, support = (bank.data.arrays[name][: bank.data.leaves] for name in ("centroids", "support"))
    label = rng.integers(bank.data.leaves, size=500)
    x = (centroids[label] + 0.1 * rng.normal(size=(500, bank.dim))).astype(np.float32)
    return render_report(bank, facts, version, promoted, project(x, label, centroids, support, 0, CPU))
