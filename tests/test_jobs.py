"""The jobs as a person runs them: from logs to a lookup, and the error message of each mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from typed import run

from rb_gpu import ReasoningBank, Registry, SearchParams, verify_artifact
from rb_gpu.errors import RbGpuError
from rb_gpu.learn import landmarks, learn
from rb_gpu.learn.config import (
    ClusterConfig,
    DataConfig,
    EvalConfig,
    IndexConfig,
    JudgeConfig,
    ParamsConfig,
    RegistryConfig,
    RouterConfig,
    TrainConfig,
)
from rb_gpu.learn.job_config import SynthesizeConfig
from rb_gpu.learn.stages import Stages
from rb_gpu.learn.synthesize import synthesize
from rb_gpu.learn.training import train
from rb_gpu.learn.trajectories import load

ROOT = Path(__file__).resolve().parent.parent
# all runs but the first fit the field on this many queries: at real size its regressions dominate the time
FEWER = 2**13


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "out"
    synthesize(SynthesizeConfig(out=str(folder), n=30_000, dim=64, patterns=16, configs=4, seed=1))
    return folder


def truth_of(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The planted pattern of each row, by id, and the planted best ef_search of each pattern."""
    rows = pq.read_table(folder / "truth.parquet").sort_by("id")
    return rows["pattern"].to_numpy(), np.load(folder / "truth.npz")["best_ef_search"]


@pytest.mark.slow
def test_at_real_size_planted_patterns_and_their_best_configs_are_found(tmp_path, monkeypatch):
    folder = tmp_path / "planted"
    synthesize(SynthesizeConfig(out=str(folder), n=200_000, dim=128, patterns=64, configs=6))
    table = load(DataConfig(path=str(folder / "trajectories.parquet")), ParamsConfig())
    pattern, best = truth_of(folder)
    for k, seen in (("auto", landmarks.MAX_QUERIES), (64, FEWER)):
        monkeypatch.setattr(landmarks, "MAX_QUERIES", seen)
        learned = learn(table, TrainConfig(cluster=ClusterConfig(k=k)))
        assert adjusted_rand_score(pattern[table.query_id], learned.label_Q) >= 0.98
        bank = learned.bank()
        right = []
        for leaf in range(learned.data.leaves):
            planted_here = np.bincount(pattern[table.query_id][learned.label_Q == leaf]).argmax()
            verdict = bank.verdicts[int(learned.data.arrays["pattern_id"][leaf])]
            right.append(verdict.recommended_params.ef_search == best[planted_here])
        assert np.mean(right) >= 0.95


@pytest.mark.slow
def test_at_real_size_equal_configs_get_no_verdicts(tmp_path, monkeypatch):
    monkeypatch.setattr(landmarks, "MAX_QUERIES", FEWER)
    shares = {"eb": [], "welch": []}
    for seed in (0, 3):
        folder = tmp_path / f"null{seed}"
        synthesize(SynthesizeConfig(out=str(folder), n=200_000, dim=128, patterns=64, effect=0.0, seed=seed))
        table = load(DataConfig(path=str(folder / "trajectories.parquet")), ParamsConfig())
        for method in shares:
            judging = JudgeConfig(method=method)
            learned = learn(table, TrainConfig(cluster=ClusterConfig(k=64), judge=judging))
            shares[method].append(learned.data.facts["counts"]["verdicts"] / learned.data.leaves)
    assert max(map(max, shares.values())) < 0.05


def test_learning_twice_gives_the_same_bits(planted):
    table = load(DataConfig(path=str(planted / "trajectories.parquet"), capacity=4000), ParamsConfig())
    first, second = (learn(table, TrainConfig()).data.arrays for _ in range(2))
    assert {k: v.tobytes() for k, v in first.items()} == {k: v.tobytes() for k, v in second.items()}


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_every_index_and_metric_publishes_a_whole_artifact(planted, tmp_path, metric):
    stages = Stages(sharing=True)  # the trainings differ only in the index
    for kind in ("off", "flat", "ivf", "hnsw"):
        data = DataConfig(path=str(planted / "trajectories.parquet"), capacity=4000)
        config = TrainConfig(
            data=data, index=IndexConfig(kind=kind), cluster=ClusterConfig(metric=metric),
            registry=RegistryConfig(path=str(tmp_path / kind)),
        )  # fmt: skip
        published = train(config, stages=stages)
        assert ("index.faiss" in verify_artifact(published.folder)["files"]) == (kind != "off"), kind
        bank = ReasoningBank.load(tmp_path / kind / "champion", search="exact" if kind == "off" else "index")
        assert isinstance(bank.optimized_params(np.ones(64)).params, SearchParams), kind


def test_the_whole_way_as_typed(planted, tmp_path):
    data = [f"data.path={planted / 'trajectories.parquet'}", "data=files", "data.capacity=8000"]
    command = [sys.executable, "-m", "jobs.train", *data, "router=fastgrnn", "router.epochs=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert first.returncode == 0, first.stderr
    assert "best single config" in first.stdout
    assert "promoted" in first.stdout
    bank = ReasoningBank.load(tmp_path / "artifacts/champion")
    centres = np.load(planted / "truth.npz")["centres"]
    _, best = truth_of(planted)
    answers = bank.optimized_params_batch(centres)
    assert (answers["ef_search"] == best).mean() >= 0.9
    listed = run("registry", cwd=tmp_path)
    assert "serving" in listed.stdout
    refused = run("train", *data, "judge.method=reference", "gate.min_gain=0.5", cwd=tmp_path)
    assert refused.returncode == 3, refused.stderr
    assert "NOT promoted" in refused.stdout
    assert len(run("registry", "action=list", cwd=tmp_path).stdout.splitlines()) == 3
    assert "files are intact" in run("registry", "action=verify", cwd=tmp_path).stdout
    inspected = json.loads(run("registry", "action=inspect", cwd=tmp_path).stdout)
    assert inspected["counts"]["patterns"] == bank.data.leaves
    told, stats = inspected["statistics"], bank.stats()
    assert (told["total_trajectories"], told["total_verdicts"]) == (stats.total_trajectories, stats.total_verdicts)
    assert told["total_patterns"] == stats.total_patterns and told["pattern_hit_rate"] > 0.5
    assert told["avg_improvement_percent"] == pytest.approx(stats.avg_improvement_percent)
    newest = Registry(tmp_path / "artifacts").versions()[-1]
    told_apart = run("registry", "action=diff", f"version={newest}", cwd=tmp_path).stdout
    assert "judge.method" in told_apart and "by lineage" in told_apart
    evaluated = run("evaluate", f"data.path={planted / 'trajectories.parquet'}", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "bank's gain over it" in evaluated.stdout
    beside = [f"data.path={planted / 'trajectories.parquet'}", "eval.baselines=[LinUCB,reference]"]
    unread = run("evaluate", *beside, cwd=tmp_path)
    assert unread.returncode == 1 and "training.path=None is not a table that" in unread.stdout + unread.stderr
    compared = run("evaluate", *beside, f"training.path={planted / 'trajectories.parquet'}", cwd=tmp_path)
    assert "\nLinUCB " in compared.stdout and "\nreference " in compared.stdout, compared.stderr
    nothing = run("registry", "action=rollback", cwd=tmp_path)
    assert nothing.returncode == 1
    assert "nothing to roll back to" in nothing.stdout + nothing.stderr


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["cluster.kk=3"], "cluster.kk"),
        (["cluster.max_iter=many"], "cluster.max_iter"),
        (["cluster.k=0"], "cluster.k=0"),
        (["judge.method=guess"], "judge.method=guess is not one of eb, welch, reference"),
        (["data=files", "data.path=nowhere.parquet"], "data.path=nowhere.parquet does not exist"),
    ],
)
def test_a_mistyped_setting_fails_before_anything_is_written(tmp_path, overrides, says):
    failed = run("train", *overrides, f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert failed.returncode == 1
    assert says in failed.stdout + failed.stderr
    assert "Traceback" not in failed.stderr
    assert not list(tmp_path.glob("artifacts/2*"))


def test_a_damaged_champion_is_not_replaced_unseen(planted, tmp_path):
    # regression: the candidate was compared with the default instead, and could replace something better
    data = DataConfig(path=str(planted / "trajectories.parquet"), capacity=4000)
    config = TrainConfig(data=data, registry=RegistryConfig(path=str(tmp_path)))
    stages = Stages(sharing=True)
    first = train(config, stages=stages)
    bank_file = first.folder / "bank.safetensors"
    bank_file.write_bytes(bank_file.read_bytes()[:-1])
    second = train(config, stages=stages)
    assert not second.decision.promote
    assert "champion cannot be read" in second.decision.reason
    assert (tmp_path / "champion").resolve() == first.folder.resolve()


def write(path: Path, rows: int = 200, dim: int = 4, **columns) -> str:
    rng = np.random.default_rng(0)
    embedding = columns.pop("query_embedding", rng.normal(size=(rows, dim)).astype(np.float32))
    data = {
        "id": np.arange(rows, dtype=np.uint64),
        "query_embedding": pa.FixedSizeListArray.from_arrays(pa.array(embedding.ravel()), dim),
        "ef_search": rng.choice([16, 64], rows).astype(np.uint32),
        "precision": rng.random(rows, dtype=np.float32),
        "recall": rng.random(rows, dtype=np.float32),
        "latency_us": np.full(rows, 1000, np.uint64),
        "timestamp": np.arange(rows),
    } | columns
    pq.write_table(pa.table({k: v for k, v in data.items() if v is not None}), path)
    return str(path)


MISTAKES = {
    "missing column": (lambda p: {"path": write(p / "t.parquet", latency_us=None)}, {}, "has no column latency_us"),
    "mixed dimensions": (
        lambda p: {"path": [write(p / "a.parquet"), write(p / "b.parquet", dim=5)]}, {}, "4 dimensions in .* and 5 in"),
    "empty table": (lambda p: {"path": write(p / "t.parquet", rows=0)}, {}, "has no rows"),
    "all rows bad": (
        lambda p: {"path": write(p / "t.parquet", recall=np.full(200, 2.0))}, {}, "none is left.*recall is outside"),
    "one distinct embedding": (
        lambda p: {"path": write(p / "t.parquet", query_embedding=np.ones((200, 4), np.float32))},
        {}, "are identical"),
    "k over n": (
        lambda p: {"path": write(p / "t.parquet")}, {"cluster": ClusterConfig(k=5000)},
        "cluster.k=5000 exceeds the 160 queries.*lower cluster.k or set cluster.k=auto"),
    "k over the distinct embeddings": (
        lambda p: {"path": write(p / "t.parquet", query_embedding=np.eye(4, dtype=np.float32)[np.arange(200) % 4])},
        {"cluster": ClusterConfig(k=9)}, "cluster.k=9 exceeds the 4 distinct embeddings"),
    "unknown tier": (
        lambda p: {"path": write(p / "t.parquet", model_tier=["small"] * 199 + ["huge"]), "max_bad_fraction": 0.0},
        {"params": ParamsConfig(tiers=["small"])}, "unknown model_tier"),
    "corrupt Parquet": (lambda p: {"path": corrupt(p / "t.parquet")}, {}, "cannot be read"),
    "unwritable output": (
        lambda p: {"path": write(p / "t.parquet")}, {"registry": RegistryConfig(path="/proc/artifacts")},
        "registry.path=/proc/artifacts cannot be written"),
    "default outside the tiers": (
        lambda p: {"path": write(p / "t.parquet", model_tier=["small"] * 200)},
        {"params": ParamsConfig(default={"ef_search": 64})}, "params.default.model_tier=auto is not one of the tiers"),
}  # fmt: skip


def corrupt(path: Path) -> str:
    write(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return str(path)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_nothing_half_written_stays(tmp_path, mistake):
    data, settings, says = MISTAKES[mistake]
    registry = tmp_path / "artifacts"
    settings = {"registry": RegistryConfig(path=str(registry))} | settings
    with pytest.raises(RbGpuError, match=says):
        train(TrainConfig(data=DataConfig(**data(tmp_path)), **settings))
    left = [] if not registry.exists() else [f.name for f in registry.iterdir() if f.name != ".lock"]
    assert left == []


def test_the_bundled_sample_is_small_enough_and_loads():
    sample = ROOT / "rb_gpu/sample"
    assert sum(f.stat().st_size for f in sample.iterdir()) <= 8 * 2**20
    table = load(
        DataConfig(path=str(sample / "outcomes.parquet"), queries=str(sample / "queries.parquet")), ParamsConfig()
    )
    assert (len(table), len(table.query_id), len(table.configs)) == (120_000, 8_000, 15)
    assert (np.bincount(table.query_row) == 15).all()


def test_torchs_default_dtype_changes_no_bit_of_a_training(tmp_path):
    # regression: tensor factories and integer divisions without a dtype followed the default dtype: a RuntimeError, or
    # another bias of the router
    synthesize(SynthesizeConfig(out=str(tmp_path / "planted"), n=3000, dim=8, patterns=8, configs=3, seed=2))
    trained = []
    for dtype in (torch.float32, torch.float64):
        config = TrainConfig(
            data=DataConfig(path=str(tmp_path / "planted" / "trajectories.parquet")), cluster=ClusterConfig(k=8),
            router=RouterConfig(kind="fastgrnn", epochs=3), eval=EvalConfig(baselines="all"),
            registry=RegistryConfig(path=str(tmp_path / str(dtype))),
        )  # fmt: skip
        torch.set_default_dtype(dtype)
        try:
            trained.append(train(config))
        finally:
            torch.set_default_dtype(torch.float32)
    narrow, wide = trained
    assert repr(wide.evaluation) == repr(narrow.evaluation)
    for name in ("bank.safetensors", "index.faiss", "router.safetensors"):
        assert (wide.folder / name).read_bytes() == (narrow.folder / name).read_bytes(), name
