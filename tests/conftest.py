"""Banks, artifacts and fixtures that the tests share; only `learned` and `pages` need torch."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # parallel workers, and the jobs that they start, use one core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rb_gpu.bank import ReasoningBank
from rb_gpu.bank_data import ARRAYS, BankData, LookupSettings
from rb_gpu.evidence import LATENCY_BINS, OUTCOMES, Evidence
from rb_gpu.objective import Objective
from rb_gpu.params import SearchParams
from rb_gpu.posterior import believe
from rb_gpu.publish import write_artifact
from rb_gpu.registry import Registry
from rb_gpu.types import QueryTrajectory

TIERS = ("small", "large")
A, B = "20260101T000000-00000a", "20260102T000000-00000b"
OBJECTIVE = Objective("utility", "f1", 0.02, 0.2, 1000.0, 4.0, 0.95, None, None)
FEW_QUERIES = 2**9
LOOKUP = LookupSettings(top_k=3, beta=8.0, floor=0.5, min_probability=0.8, likeliest=False, auto_margin=True)


def pytest_configure(config: pytest.Config) -> None:
    # all other tests run on the CPU or simulate a GPU: hide a real one, which device=auto would use in them and in jobs
    if config.option.markexpr.strip() != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # slow tests first, so that no worker starts a long test when the other is about to finish
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def make_bank(
    leaves: int = 12, configs: int = 5, dim: int = 16, seed: int = 0, rows: int = 40, objective: Objective = OBJECTIVE
) -> BankData:
    """A bank judged by empirical Bayes, made with NumPy alone: random cell means, and one better config in two of three
    leaves.
    """
    rng = np.random.default_rng(seed)
    default = 1 % configs
    evidence = _evidence(rng, leaves, configs, rows, default)
    level = np.repeat([0, 1, 2], [leaves, -(-leaves // 4), 1]).astype(np.uint8)
    nodes = len(level)
    parent = np.concatenate([leaves + np.arange(leaves) // 4, np.full(nodes - leaves - 1, nodes - 1), [-1]])
    beliefs = believe(
        evidence, [np.arange(leaves) // 4, np.zeros(nodes - leaves - 1, np.int64)], objective, default, "auto"
    )
    chosen = beliefs.choose(LOOKUP.min_probability, default, False)[:-1]
    centroids = rng.normal(size=(nodes, dim))
    unknown = np.full(leaves, np.nan)
    arrays: dict[str, Any] = {
        "centroids": centroids / np.linalg.norm(centroids, axis=1, keepdims=True),
        "pattern_id": np.arange(nodes) + 100,
        "level": level,
        "parent": parent,
        "support": rng.integers(1, 500, nodes),
        "rating_count": rng.integers(0, 9, nodes),
        "created_at": np.full(nodes, 1_700_000_000),
        "updated_at": np.full(nodes, 1_700_000_000),
        "latency_us": rng.integers(100, 9000, nodes),
        **{name: rng.random(nodes) for name in ("precision", "recall", "quality", "confidence")},
        "optimal_ef_search": rng.integers(16, 512, nodes),
        "optimal_n_probes": rng.integers(1, 32, nodes),
        "optimal_tier": rng.integers(0, len(TIERS), nodes),
        "optimal_context_tokens": rng.integers(500, 9000, nodes),
        "optimal_temperature": rng.random(nodes),
        "config_ef_search": 16 * 2 ** (np.arange(configs) % 8),
        "config_n_probes": 1 + np.arange(configs),
        "config_tier": np.arange(configs) * len(TIERS) // configs,
        "config_context_tokens": 1024 * (1 + np.arange(configs) % 3),
        "config_temperature": np.linspace(0.1, 0.9, configs),
        "margin": beliefs.margin,
        "score": beliefs.score,
        "probability": beliefs.probability,
        "gain": beliefs.gain,
        "expected_quality": beliefs.quality,
        **{name: unknown for name in ARRAYS if name.startswith("verdict_")},
        "verdict_config": chosen,
        "verdict_stands": chosen == default,
        "verdict_support": evidence.rows[np.arange(leaves), chosen],
        "verdict_probability": beliefs.probability[np.arange(leaves), chosen],
        **{f"evidence_{name}": array for name, array in evidence._asdict().items()},
    }
    arrays["rating_score"] = arrays["rating_count"] / 2
    return BankData(
        arrays={name: np.ascontiguousarray(arrays[name], dtype=dtype) for name, (dtype, _) in ARRAYS.items()},
        tiers=TIERS,
        default=default,
        metric="cosine",
        embedder="none",
        method="eb",
        grade="associational",
        objective=objective,
        lookup=LOOKUP,
        facts={
            "counts": {"trajectories": int(evidence.rows.sum()), "patterns": leaves},
            "evaluation": {"improvement_percent": 12.5},
            "index": {"kind": "flat"},
        },
    )


def _evidence(rng: np.random.Generator, leaves: int, configs: int, rows: int, default: int) -> Evidence:
    cells, outcomes = (leaves, configs), len(OUTCOMES)
    better = (default + 1 + rng.integers(configs - 1, size=leaves)) % configs if configs > 1 else np.zeros(leaves, int)
    effect = 0.2 * ((better[:, None] == np.arange(configs)) & (np.arange(leaves) % 3 > 0)[:, None])
    quality = 0.5 + effect + 0.02 * rng.normal(size=cells)
    n = rng.poisson(rows, cells) + 3
    mean = np.stack(
        [
            quality,
            quality**2,
            10 + 0.1 * rng.normal(size=cells),
            np.broadcast_to(1.0 + 0.1 * np.arange(configs), cells),
        ],
        -1,
    )
    w = n.astype(np.float64)
    histogram = np.zeros((*cells, LATENCY_BINS))
    histogram[..., 20] = w
    nothing = np.zeros((*cells, outcomes))
    return Evidence(
        rows=n,
        w=w,
        w2=w,
        mean=mean,
        comoment=w[..., None, None] * np.diag([0.01, 0.01, 0.5, 0.02]),
        precision=quality,
        recall=quality,
        latency_us=2.0 ** mean[..., 2],
        latency_hist=histogram,
        pair_rows=np.zeros(cells, np.int64),
        pair_w=np.zeros(cells),
        pair_w2=np.zeros(cells),
        pair_mean=nothing,
        pair_comoment=np.zeros((*cells, outcomes, outcomes)),
    )


def queries_near(data: BankData, count: int, seed: int = 1, noise: float = 0.3) -> np.ndarray:
    """Queries (count, D) float32: most are near a random leaf, every eighth is anywhere."""
    rng = np.random.default_rng(seed)
    near = data.arrays["centroids"][rng.integers(data.leaves, size=count)]
    near = near + noise * rng.normal(size=near.shape) / np.sqrt(data.dim / 4)
    near[::8] = rng.normal(size=near[::8].shape)
    return near.astype(np.float32)


def trajectory(trajectory_id: int, query: np.ndarray, **fields: Any) -> QueryTrajectory:
    """A trajectory with default parameters and outcomes; `fields` override them."""
    values: dict[str, Any] = {"precision": 0.5, "recall": 0.25, "latency_us": 1000, "timestamp": 1_700_000_000}
    return QueryTrajectory(trajectory_id, query, fields.pop("params", SearchParams()), **values | fields)


@pytest.fixture(scope="session")
def data() -> BankData:
    return make_bank()


@pytest.fixture
def bank(data: BankData) -> ReasoningBank:
    return ReasoningBank(data)


@pytest.fixture
def artifact(data: BankData, tmp_path: Path) -> Path:
    """A published artifact for this test alone, which it may read or damage."""
    folder = tmp_path / "registry" / "20260101T000000-000000"
    write_artifact(folder, data, {"report.html": b"<p>"})
    return folder


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """A registry with version A, which is the champion, and version B, which prefers other configs."""
    for version, seed in ((A, 0), (B, 5)):
        write_artifact(tmp_path / "artifacts" / version, make_bank(seed=seed), {})
    registry = Registry(tmp_path / "artifacts")
    registry.promote(A, "")
    return registry


@pytest.fixture
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits the field on few queries, for tests that do not look at it: its regressions dominate the training time."""
    monkeypatch.setattr("rb_gpu.learn.landmarks.MAX_QUERIES", FEW_QUERIES)


@pytest.fixture(scope="session")
def learned() -> SimpleNamespace:
    """The result of `learn` on 4,000 rows with 8 planted patterns and 5 configs: bank, trajectories, config, the
    patterns' centres, and the planted best config of each.
    """
    pytest.importorskip("torch")
    from rb_gpu.learn import learn
    from rb_gpu.learn.config import ClusterConfig, DeviceConfig, TrainConfig
    from rb_gpu.learn.recorded import from_trajectories

    rng = np.random.default_rng(7)
    centres = np.linalg.qr(rng.normal(size=(16, 16)))[0][:8]
    settings = [
        SearchParams(16 * 2**c, 1 + c, TIERS[c >= 3], 1024 * (1 + c % 3), round(0.1 + 0.2 * c, 2)) for c in range(5)
    ]
    best = rng.permutation(8) % 5
    pattern, arm = rng.integers(8, size=4000), rng.integers(5, size=4000)
    x = (centres[pattern] + 0.08 * rng.normal(size=(4000, 16))).astype(np.float32)
    quality = np.clip(0.5 + 0.25 * (arm == best[pattern]) + 0.08 * rng.normal(size=4000), 0, 1)
    rows = [
        trajectory(
            i, x[i], params=settings[arm[i]], precision=float(quality[i]), recall=float(quality[i]),
            latency_us=int(1000 * (1 + arm[i])), cost=float(1 + arm[i]), timestamp=1_700_000_000 + i,
        )
        for i in range(4000)
    ]  # fmt: skip
    trajectories = from_trajectories(rows)
    config = replace(TrainConfig(), cluster=ClusterConfig(k=8, n_init=4), device=DeviceConfig("cpu"))
    bank = learn(trajectories, config)
    planted = np.array([trajectories.configs.id_of(settings[b]) for b in best])
    return SimpleNamespace(bank=bank, trajectories=trajectories, config=config, centres=centres, best=planted)


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Reports of real trainings (report_pages.Pages)."""
    pytest.importorskip("torch")
    from report_pages import make_pages

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rb_gpu.learn.landmarks.MAX_QUERIES", FEW_QUERIES)
        return make_pages(tmp_path_factory.mktemp("pages"))
