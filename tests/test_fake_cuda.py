"""The GPU code without a GPU, on tensors that simulate a device (pretend.py).

Torch's own fake tensors have no values for data-dependent control flow, and a build without CUDA cannot index those
that claim to be on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from pretend import GPU, Devices, MixedError, OnDevice, pretended

from rb_gpu.artifact import verify_artifact
from rb_gpu.learn import assign_device, devices, learn, progress
from rb_gpu.learn.assign_device import DeviceAssignment
from rb_gpu.learn.checkpoint import Checkpoint
from rb_gpu.learn.config import (
    ClusterConfig,
    DataConfig,
    DeviceConfig,
    IndexConfig,
    JudgeConfig,
    ParamsConfig,
    PruneConfig,
    RegistryConfig,
    RouterConfig,
    TrainConfig,
)
from rb_gpu.learn.kmeans import kmeans, nearest
from rb_gpu.learn.lloyd import Solver
from rb_gpu.learn.projection import project
from rb_gpu.learn.training import train
from rb_gpu.learn.trajectories import Trajectories, load

X = np.random.default_rng(0).normal(size=(1500, 12)).astype(np.float32)


def test_mixed_tensors_are_refused_and_waits_are_counted():
    with pretended() as operations:
        there = torch.ones(3, device="cuda")
        assert isinstance(there, OnDevice) and there.device.type == (there + 1)[:2].device.type == "cuda"
        for mixed in (
            lambda: there + torch.ones(3),
            lambda: torch.cat([there, torch.ones(3)]),
            lambda: there.index_add_(0, torch.tensor([0]), there[:1]),
            lambda: torch.ones(3)[torch.zeros(1, dtype=torch.int64, device="cuda")],
        ):
            with pytest.raises(MixedError):
                mixed()
        with pytest.raises(TypeError, match="cuda:0 device type tensor to numpy"):
            there.numpy()
        assert not operations.waits
        reads = (
            lambda: float(there.sum()),
            there.tolist,
            there.cpu,
            lambda: torch.nonzero(there),
            lambda: there[there > 0],
        )
        for count, read in enumerate(reads, 1):
            read()
            assert sum(operations.waits.values()) == count


def test_what_only_a_gpu_refuses_is_refused():
    with pretended(), devices.reproducible(True):
        there, mask = torch.ones(4, 3, device="cuda"), torch.tensor([True, False, True, True], device="cuda")
        for mixed in (
            lambda: torch.stack([there[0, 0], torch.ones(())]),
            lambda: torch.ones(()).add_(there[0, 0]),
            lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
            lambda: there.normal_(generator=torch.Generator()),
            lambda: torch.rand(3, generator=torch.Generator(device="cuda")),
        ):
            with pytest.raises(MixedError):
                mixed()
        with pytest.raises(NotImplementedError, match="int64"):
            there.long() @ there.long().T
        with pytest.raises(RuntimeError, match="9 vs 3"):
            there[mask] = there[0]
        there[mask] = 2.0
        there[mask] = there[mask] * torch.ones(())
        there.normal_(generator=torch.Generator(device="cuda"))


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_from_one_start_the_device_comes_to_the_bits_of_the_host(metric):
    here = kmeans(X, 30, init=X[:30], device="cpu", metric=metric)
    with pretended():
        there = kmeans(X, 30, init=X[:30], device="cuda", metric=metric, engine="torch")
        seeded, streamed = (
            kmeans(X, 30, device="cuda", metric=metric, engine="torch", seed=1, memory_budget=budget)
            for budget in (None, 2**14)
        )
    assert here.centroids.tobytes() == there.centroids.tobytes()
    assert np.array_equal(here.labels, there.labels)
    assert there.inertia == pytest.approx(here.inertia, rel=1e-6)
    assert seeded.centroids.tobytes() == streamed.centroids.tobytes()


def test_copies_among_the_starts_are_drawn_anew_on_the_device_too():
    start = np.concatenate([X[:20], np.repeat(X[:1], 10, axis=0)])
    with pretended():
        found = kmeans(X, 30, init=start, device="cuda", engine="torch")
        streamed = kmeans(X, 30, init=start, device="cuda", engine="torch", memory_budget=2**14)
    assert (np.bincount(found.labels, minlength=30) > 0).all()
    assert found.centroids.tobytes() == streamed.centroids.tobytes()


def waits_of(iterations: int, engine: str = "torch") -> int:
    with pretended() as operations:
        found = kmeans(X, 30, init=X[:30], device="cuda", epsilon=0.0, max_iter=iterations, engine=engine)
    assert found.n_iter == iterations
    return sum(operations.waits.values())


def test_the_host_waits_once_an_iteration(monkeypatch):
    assert waits_of(14) - waits_of(4) <= 10
    # a planted extra wait is detected
    real = DeviceAssignment.assign
    monkeypatch.setattr(DeviceAssignment, "assign", lambda self, *c: (real(self, *c), self.d2_N.max().item())[0])
    assert waits_of(14) - waits_of(4) == 20


def test_no_running_sum_is_left_to_one_thread_a_column():
    # regression: sums of 10M x 128 points took seconds per iteration in torch, and longer than the product in Triton
    with pretended() as operations:
        kmeans(X, 30, device="cuda", engine="torch")
        assert not operations.serial
        torch.ones(5, 3, device="cuda").cumsum(0)
        torch.ones(5, device="cuda").cumsum(0)
    assert operations.serial == [(5, 3)]


def test_a_planted_mix_up_is_caught(monkeypatch):
    real = assign_device.lower_distances
    monkeypatch.setattr(
        assign_device, "lower_distances", lambda x, middle, *more: real(x, middle.cpu(), *more)
    )  # fmt: skip
    with pretended(), pytest.raises(MixedError):
        kmeans(X, 5, device="cuda", engine="torch")


def test_the_whole_job_runs_on_the_device(learned):
    # every stage, including the field and the router; what is on the host stays there, and nothing is mixed
    config = replace(
        learned.config, device=DeviceConfig("cuda", deterministic=True), router=RouterConfig("fastgrnn", epochs=2),
        cluster=replace(learned.config.cluster, engine="torch"),
    )  # fmt: skip
    with pretended() as operations:
        there = learn(learned.trajectories, config)
    here = learned.bank
    assert there.data.facts["device"].startswith("cuda")
    assert np.array_equal(there.label_Q, here.label_Q)
    for name in ("verdict_config", "evidence_rows", "parent"):
        assert np.array_equal(there.data.arrays[name], here.data.arrays[name]), name
    np.testing.assert_allclose(there.data.arrays["gain"], here.data.arrays["gain"], atol=1e-9)
    assert there.router is not None
    assert not operations.unordered and not operations.serial and operations.raced == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and pytest -m cuda")
def test_a_deterministic_job_on_a_card_gives_the_same_bits_twice(learned):
    # what the simulated device takes on trust: that torch has a deterministic algorithm for every operation
    config = replace(
        learned.config, device=DeviceConfig("cuda", deterministic=True), router=RouterConfig("fastgrnn", epochs=2)
    )
    one, other = (learn(learned.trajectories, config) for _ in range(2))
    for name, array in one.data.arrays.items():
        assert array.tobytes() == other.data.arrays[name].tobytes(), name
    assert one.router.to_bytes() == other.router.to_bytes()
    # seeds are drawn by the card's own generator, but the planted patterns are the same
    pairs = np.unique(np.stack([one.label_Q, learned.bank.label_Q]), axis=1)
    assert pairs.shape[1] == one.data.leaves == learned.bank.data.leaves


def test_points_beyond_a_small_card_stay_on_the_host_without_being_told_to(monkeypatch, caplog):
    # regression: with device.memory_budget=null, 30 GB of embeddings ended a job on an L4
    monkeypatch.setattr(devices, "LEAST_ROOM", 2**14)
    caplog.set_level("INFO")
    found = []
    for memory in (2**36, devices.WORK_BYTES):
        with pretended(memory):
            found.append(kmeans(X, 30, device="cuda", engine="torch"))
    assert caplog.text.count("points stay on the host") == 1
    assert found[0].centroids.tobytes() == found[1].centroids.tobytes()


@pytest.mark.parametrize(("metric", "dim", "budget"), [("l2", 8, None), ("l2", 8, 2**17), ("cosine", 40, None)])
def test_a_clustering_takes_no_more_of_a_card_than_is_kept_for_it(metric, dim, budget, monkeypatch):
    # regression: on a card that points fill but for what `points_room` keeps free, a repair ran out of memory, at 140
    # bytes a point instead of 128; and with cosine, points that were not of norm 1 took twice their room
    monkeypatch.setitem(devices.TILE_SCORES, "cuda", 2**14)
    rng = np.random.default_rng(0)
    n, centres = 40_000, rng.normal(size=(60, dim)) * 4
    x = (centres[rng.integers(60, size=n)] + rng.normal(size=(n, dim))).astype(np.float32)
    given = x.copy()
    with pretended() as operations:
        kmeans(x, 60, device="cuda", engine="torch", metric=metric, max_iter=4, memory_budget=budget)
    assert np.array_equal(x, given)
    points = 0 if budget else x.nbytes
    assert points < operations.memory.peak < points + n * devices.BYTES_OF_A_POINT


def test_a_checkpoint_takes_no_second_copy_of_the_points_to_the_host(tmp_path, monkeypatch):
    monkeypatch.setitem(devices.TILE_SCORES, "cuda", 256 * X.shape[1])
    taken: list[tuple[int, ...]] = []
    real = Devices.moved

    def moved(self, tensor, target):
        if isinstance(tensor, OnDevice) and torch.device(target).type == "cpu":
            taken.append(tuple(tensor.shape))
        return real(self, tensor, target)

    real_save = Solver._save

    def save(self, *arguments):
        real_save(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(Devices, "moved", moved)
    checkpoint, settings = Checkpoint(tmp_path / "c", 2), {"engine": "torch", "device": "cuda", "epsilon": 0.0}
    with pretended():
        whole = kmeans(X, 30, **settings)
        monkeypatch.setattr(Solver, "_save", save)
        with pytest.raises(KeyboardInterrupt):
            kmeans(X, 30, checkpoint=checkpoint, **settings)
        monkeypatch.setattr(Solver, "_save", real_save)
        assert checkpoint.path.exists()
        resumed = kmeans(X, 30, checkpoint=checkpoint, **settings)
    assert resumed.centroids.tobytes() == whole.centroids.tobytes() and np.array_equal(resumed.labels, whole.labels)
    assert (256, 12) in taken and max(rows for rows, *columns in taken if columns == [12]) == 256


@pytest.mark.parametrize("error", [ModuleNotFoundError, RuntimeError, type("NVMLError_NotSupported", (Exception,), {})])
def test_a_part_of_a_gpu_that_has_no_utilisation_ends_no_job(monkeypatch, error):
    # NVML refuses this for a MIG instance with an error of its own, at the end of the first stage
    def utilization() -> int:
        raise error("Not Supported")

    with pretended():
        monkeypatch.setattr(torch.cuda, "utilization", utilization)
        assert progress.gpu_facts() == {"gpu_memory_mb": 0.0}


SAMPLE = Path(progress.__file__).parents[1] / "sample"
FILES = DataConfig(path=str(SAMPLE / "outcomes.parquet"), queries=str(SAMPLE / "queries.parquet"))


@pytest.fixture(scope="module")
def full() -> Trajectories:
    """500 queries of the sample, each under every config."""
    table = load(FILES, ParamsConfig())
    return table.select_queries(np.arange(len(table.query_id)) % 16 == 0)


@pytest.fixture(scope="module")
def log(full) -> Trajectories:
    """One config per query, drawn at random."""
    drawn_Q = np.random.default_rng(0).integers(len(full.configs), size=len(full.query_id))
    rows = full.config_id == drawn_Q[full.query_row]
    columns = ("query_row", "config_id", "precision", "recall", "latency_us", "cost", "rating", "timestamp", "id")
    kept = {name: getattr(full, name)[rows] for name in columns}
    return replace(full, **kept, propensity=np.full(rows.sum(), 1.0 / len(full.configs), np.float32))


@pytest.mark.parametrize(
    "settings",
    [
        {"judge": JudgeConfig(method="welch", half_life="auto")},
        {"judge": JudgeConfig(method="reference", half_life=30.0)},
        {"judge": JudgeConfig(objective="bound", max_latency_us=5000.0), "cluster": ClusterConfig(k=60, n_init=2)},
        {"judge": JudgeConfig(objective="floor", target=0.7), "prune": PruneConfig(min_confidence=0.3)},
        {"cluster": ClusterConfig(k=12, metric="l2"), "router": RouterConfig("fastgrnn", epochs=1, target="log")},
    ],
    ids=["welch", "reference", "bound", "floor", "l2"],
)
def test_a_log_under_every_method_and_objective(log, settings):
    config = replace(TrainConfig(), device=DeviceConfig("cpu"), cluster=ClusterConfig(k=12), index=IndexConfig("off"))
    config = replace(config, **settings)
    here = learn(log, config)
    # a budget that keeps the points on the host
    device = DeviceConfig("cuda", memory_budget=2**20, deterministic=True)
    with pretended() as operations:
        there = learn(log, replace(config, device=device, cluster=replace(config.cluster, engine="torch")))
    assert np.array_equal(there.label_Q, here.label_Q)
    np.testing.assert_allclose(there.data.arrays["gain"], here.data.arrays["gain"], atol=1e-9)
    assert not operations.unordered and not operations.serial and operations.raced == 0


def test_a_job_on_the_cpu_leaves_the_gpu_alone(monkeypatch):
    # regression: asking for a GPU's statistics starts CUDA, which takes memory of a card that may be full
    def started() -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", started)
    with progress.Watch().stage("load"):
        assert progress.gpu_facts() == {}


def test_the_job_around_learning(tmp_path):
    # loading, checkpoints, evaluation and the map of the report
    queries, rows = (pq.read_table(SAMPLE / f"{name}.parquet") for name in ("queries", "outcomes"))
    queries = queries.slice(0, 400)
    pq.write_table(queries, tmp_path / "queries.parquet")
    pq.write_table(rows.filter(pc.is_in(rows["query_id"], queries["query_id"])), tmp_path / "outcomes.parquet")
    files = DataConfig(path=str(tmp_path / "outcomes.parquet"), queries=str(tmp_path / "queries.parquet"))
    config = replace(
        TrainConfig(), data=files, index=IndexConfig("off"), judge=JudgeConfig(method="welch"),
        device=DeviceConfig("cuda", deterministic=True), registry=RegistryConfig(path=str(tmp_path / "artifacts")),
        cluster=ClusterConfig(k=8, engine="torch", checkpoint_every=1),
    )  # fmt: skip
    with pretended():
        published = train(config)
    assert published is not None
    assert verify_artifact(published.folder)["device"].startswith("cuda")


def test_what_a_full_table_a_parent_and_a_decay_take_runs_on_the_device(full):
    # more dims than axes, a pruned router, a drawn map: code that had not run on simulated device tensors before
    table = full
    config = replace(
        TrainConfig(), device=DeviceConfig("cpu"), cluster=ClusterConfig(k=12), index=IndexConfig("flat"),
        judge=JudgeConfig(half_life="auto"), router=RouterConfig("fastgrnn", epochs=1, sparsity=0.5),
    )  # fmt: skip
    first = learn(table, replace(config, router=RouterConfig()))
    parent = replace(first.data, facts=first.data.facts | {"version": "v"})
    here = learn(table, config, parent=parent, first_id=1000)
    config = replace(
        config, device=DeviceConfig("cuda", deterministic=True), cluster=ClusterConfig(k=12, engine="torch")
    )
    with pretended() as operations:
        there = learn(table, config, parent=parent, first_id=1000)
        with devices.reproducible(True):
            arrays = (there.data.arrays[name][: there.data.leaves] for name in ("centroids", "support"))
            project(table.x_QD, there.label_Q, *arrays, 0, GPU)
    assert np.array_equal(there.label_Q, here.label_Q)
    np.testing.assert_allclose(there.data.arrays["gain"], here.data.arrays["gain"], atol=1e-9)
    assert not operations.unordered and not operations.serial and operations.raced == 0


def test_the_nearest_on_the_device():
    with pretended():
        there = nearest(torch.from_numpy(X), torch.from_numpy(X[:40]), torch.device("cuda"), "torch")
    here = nearest(torch.from_numpy(X), torch.from_numpy(X[:40]), torch.device("cpu"))
    assert torch.equal(there[0], here[0])


@pytest.mark.parametrize("x", [X.astype(np.float64) + 1e7, X * np.float32(2.0**70), X.astype(np.float64) * 2.0**300])
def test_offsets_and_scales_on_the_device(x):
    here = kmeans(x, 30, init=x[:30], device="cpu")
    with pretended():
        there = kmeans(x, 30, init=x[:30], device="cuda", engine="torch")
        streamed = kmeans(x, 30, init=x[:30], device="cuda", engine="torch", memory_budget=2**14)
    assert here.centroids.tobytes() == there.centroids.tobytes() == streamed.centroids.tobytes()
    assert there.inertia == pytest.approx(here.inertia, rel=1e-6)
