"""The suite gpu on the CPU at tiny sizes: its plan, its measurements and its tables."""

from __future__ import annotations

import json
import sys
import time
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from pretend import pretended

from jobs import benchmark
from jobs.device_tables import gpu_tables
from rb_gpu.bench import device_facts, gpu, gpu_peers
from rb_gpu.bench.device_facts import agreement, array_functions, excess, measured_card, planted
from rb_gpu.bench.roofline import Card
from rb_gpu.errors import ConfigError
from rb_gpu.learn import devices
from rb_gpu.learn.arrays import HOST
from rb_gpu.learn.job_config import BenchmarkConfig
from rb_gpu.learn.progress import channel

CPU = torch.device("cpu")
SETTINGS = {"gpu_rows": [3000, 1200], "gpu_clusters": [5, 40, 2000], "gpu_dim": 16, "gpu_budget_s": 300,
            "iterations": 2, "seed": 0}  # fmt: skip


def test_without_a_gpu_it_says_what_is_needed():
    if torch.cuda.is_available():
        pytest.skip("a CUDA device")
    with pytest.raises(ConfigError, match="install the driver and a CUDA build"):
        gpu.measure(SETTINGS)


def test_sizes_are_what_card_and_host_can_hold():
    rows = [1_000_000, 10_000_000, 100_000_000]
    h100 = gpu.sizes(rows, 128, 80 * 10**9, 500 * 10**9)
    # 51 GB would fit on the card, but are streamed from the host, as on every other card
    assert h100 == [(1_000_000, False), (10_000_000, False), (100_000_000, True)]
    l4 = gpu.sizes(rows, 128, 24 * 10**9, 50 * 10**9)
    assert l4[:2] == h100[:2] and l4[2] == (25 * 10**9 // 512, True)
    assert gpu.sizes(rows, 128, 6 * 10**9, 50 * 10**9)[1:] == [(10_000_000, True), (13_320_568, True)]


def test_a_label_outside_the_bound_is_told_from_one_inside():
    x = planted(500, 32, 0, CPU, CPU)
    centroids = x[:20].clone()
    centroids[1] = centroids[0] + 1e-7
    exact = torch.cdist(x.double(), centroids.double()).argmin(1)
    middle = x.median(0).values
    assert excess(x, centroids, middle, exact, exact, "torch") == {"differ": 0, "worst_over_bound": 0.0}
    twins = torch.where(exact == 0, 1, torch.where(exact == 1, 0, exact))
    near = excess(x, centroids, middle, twins, exact, "torch")
    assert near["differ"] > 0 and near["worst_over_bound"] <= 1
    # within float32's error bound, but outside of float64's
    assert excess(x, centroids, middle, twins, exact, "triton")["worst_over_bound"] > 1
    wrong = exact.clone()
    wrong[7] = (wrong[7] + 5) % 20
    assert excess(x, centroids, middle, wrong, exact, "torch")["worst_over_bound"] > 1


def test_the_torch_engine_keeps_its_bound():
    found = agreement(CPU, "torch", "ieee", 3)
    assert found["worst_over_bound"] <= 1 and found["points"] == 20_000


def test_rates_are_those_of_products_and_copies():
    card = measured_card(CPU, 10**9)
    assert card.memory_gb == 1 and all(rate > 0 for rate in vars(card).values() if isinstance(rate, float))


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "STREAMED_ROWS", 3000)
        patch.setitem(sys.modules, "cuvs", None)
        patch.setitem(sys.modules, "flash_kmeans", None)
        # real timings of such short calls would be noise
        clock = iter(range(1, 10**9))
        patch.setattr(gpu, "timed", lambda device, call: (call(), 1e-3 * next(clock))[1])
        return json.loads(json.dumps(gpu.run(SETTINGS, CPU)))


def test_every_size_and_contestant_is_measured_or_says_why_not(result):
    found = {(one["n"], one["k"], one["contestant"]): one for one in result["iterations"]}
    assert {(n, k) for n, k, _ in found} == {(1200, 5), (1200, 40), (3000, 5), (3000, 40), (3000, 2000)}
    assert (
        "not installed" in found[1200, 5, "cuVS"]["note"] and "not installed" in found[1200, 5, "flash-kmeans"]["note"]
    )
    one = found[1200, 40, "ours, torch"]
    assert one["tflops"] == pytest.approx(2e-9 * 1200 * 16 * 40 / one["ms"])
    assert one["of_product"] == pytest.approx(one["tflops"] / result["card"]["fp32_tflops"])
    if find_spec("faiss") is not None:
        assert found[1200, 40, "faiss"]["inertia"] == pytest.approx(one["inertia"], rel=1e-3)
    # peers cannot stream
    assert {name for n, _, name in found if n == 3000} == {"ours, torch"}
    assert {one["streamed"] for one in result["clusterings"] if one["n"] == 3000} == {True}
    assert all(one["seconds"] > 0 and one["updates"] >= 1 for one in result["clusterings"])
    assert [one["n"] for one in result["jobs"]] == [1200, 3000] and result["jobs"][0]["patterns"] >= 1
    assert set(result["jobs"][0]["stages_s"]) >= {"cluster", "judge", "index"}


def test_it_runs_where_points_and_results_lie_on_a_device(monkeypatch):
    monkeypatch.setattr(gpu, "STREAMED_ROWS", 300)
    monkeypatch.setattr(gpu, "resolve_engine", lambda *_: "torch")
    monkeypatch.setattr(devices, "_triton_found", lambda: False)
    job = gpu.Bench._job
    monkeypatch.setattr(gpu.Bench, "_job", lambda self, n: job(self, n) if n == 200 else None)
    clock = iter(range(1, 10**9))
    monkeypatch.setattr(gpu, "timed", lambda device, call: (call(), 1e-3 * next(clock))[1])
    for name, size in (("PRODUCT_SIZE", 64), ("COPY_BYTES", 2**12)):
        monkeypatch.setitem(getattr(device_facts, name), "cuda", size)
    with pretended() as operations:
        result = gpu.run(SETTINGS | {"gpu_rows": [200, 300], "gpu_clusters": [5]}, torch.device("cuda"))
    assert result["failed"] == [] and result["labels"][0]["worst_over_bound"] <= 1 and not operations.serial
    assert [one["streamed"] for one in result["clusterings"] if "seconds" in one] == [False, True]
    assert result["jobs"][0]["patterns"] >= 1


def test_the_table_shows_it(result):
    table = gpu_tables(result)
    assert "no GPU" in table and "1,200 x 16, 40" in table and "3,000 x 16, 40 streamed" in table
    assert (
        "flash_kmeans is not installed" in table
        and "labels compared with the CPU's" in table
        and "yes" in table
        and "NO" not in table
    )
    wrong = result | {"labels": [result["labels"][0] | {"worst_over_bound": 1.5}]}
    assert "NO" in gpu_tables(wrong)
    assert find_spec("cupy") is not None or "cupy is not installed; pip install 'rb_gpu[gpu]'" in table
    arrays = array_functions(CPU, lambda: HOST)
    assert {one["apart"] for one in arrays} == {0.0} and all(one["device_ms"] > 0 for one in arrays)
    assert "student's t, 1,000,000" in gpu_tables(result | {"arrays": arrays})
    sheet = vars(Card("H200", 67, 494, 989, 4800, 64, 141))
    assert "sheet of H200: fp32 67, tf32 494, bf16 989 TFLOP/s" in gpu_tables(result | {"sheet": sheet})


@pytest.mark.parametrize(("worst", "code"), [(1.0, 0), (1.01, 1)])
def test_wrong_labels_fail_the_job_and_are_kept(result, monkeypatch, tmp_path, worst, code):
    found = result | {"labels": [result["labels"][0] | {"worst_over_bound": worst}]}
    monkeypatch.setattr(benchmark, "run_folder", lambda: tmp_path)
    monkeypatch.setitem(benchmark.SUITES, "gpu", (lambda _: found, gpu_tables, benchmark.no_picture))
    assert benchmark.run(BenchmarkConfig(suite="gpu")) == code
    assert json.loads((tmp_path / "benchmark_gpu.json").read_text())["labels"] == found["labels"]


def test_what_the_budget_has_no_time_for_is_left_out():
    result = gpu.run(SETTINGS | {"gpu_budget_s": 0, "gpu_clusters": [5]}, CPU)
    assert result["iterations"] == [] and {one["note"] for one in result["clusterings"]} == {gpu.LEFT_OUT}
    card = Card("slow", 1e-9, 1e-9, 1e-9, 1e-3, 1e-3, 1)
    bench = gpu.Bench(SETTINGS, CPU, card, gpu.Clock(30, time.perf_counter()), [("torch", "ieee", "fp32")])
    bench.case(1200, False)
    assert {one["note"] for one in (*bench.iterations, *bench.clusterings)} == {gpu.LEFT_OUT}
    assert "left out" in gpu_tables(result)


def test_what_is_measured_is_logged_at_once(caplog):
    # a peer's segmentation fault would take with it all that had been measured before
    caplog.set_level("INFO", logger="rb_gpu.bench.gpu")
    row = {"contestant": "ours"}
    with gpu.told(row):
        row |= {"ms": 1.5}
    assert caplog.messages == ["{'contestant': 'ours', 'ms': 1.5}"]


def test_what_outruns_the_budget_is_stopped(monkeypatch):
    # regression: a clustering of 100M streamed points with many repairs could take ten minutes after the last of eight
    card = Card("c", 1, 1, 1, 100, 10, 1)
    bench = gpu.Bench(SETTINGS, CPU, card, gpu.Clock(0, time.perf_counter()), [])
    monkeypatch.setattr(gpu.Clock, "allows", lambda *_: True)
    before = channel.handlers[:]
    with gpu.Deadline(bench.clock).watched():
        bench._clustering(planted(2000, 16, 0, CPU, CPU), 40, False, None)
        bench._job(1200)
    assert [one["note"] for one in (*bench.clusterings, *bench.jobs)] == [gpu.STOPPED] * 2
    assert not any(one.get("failed") for one in (*bench.clusterings, *bench.jobs)) and channel.handlers == before


def test_times_of_points_on_the_card_do_not_predict_those_of_streamed_ones(monkeypatch):
    clock = iter(range(1, 10**9))
    monkeypatch.setattr(gpu, "timed", lambda device, call: (call(), 1e-9 * next(clock))[1])
    card = Card("slow", 1e-5, 1e-5, 1e-5, 1, 1, 1)
    bench = gpu.Bench(SETTINGS, CPU, card, gpu.Clock(9, time.perf_counter()), [])
    x = planted(5000, 16, 0, CPU, CPU)
    bench.slack["ours", False] = bench.slack["clustering", False] = 1e-9
    for streamed in (False, True):
        bench._iteration("ours", "fp32", gpu.ours("torch", "ieee", None), x, x[:40], streamed)
        bench._clustering(x, 40, streamed, None)
    notes = [one.get("note") for one in (*bench.iterations, *bench.clusterings)]
    assert notes == [None, gpu.LEFT_OUT] * 2


def test_of_points_from_the_host_only_the_engine_that_runs_by_itself_is_timed(monkeypatch):
    # regression: four engines took the time that clusterings of 100M points needed
    card = Card("c", 1, 1, 1, 100, 10, 1)
    bench = gpu.Bench(SETTINGS | {"gpu_clusters": [5]}, CPU, card, gpu.Clock(300, time.perf_counter()), [*gpu.ENGINES])
    for name in ("_clustering", "_job"):
        monkeypatch.setattr(bench, name, lambda *_: None)
    monkeypatch.setattr(bench, "_iteration", lambda name, *_: bench.iterations.append({"contestant": name}))
    bench.case(100, True)
    assert [one["contestant"] for one in bench.iterations] == ["ours, triton tf32"]
    bench.case(100, False)
    assert len(bench.iterations) == 1 + len(gpu.ENGINES) + len(gpu.PEERS)


def test_a_card_that_is_too_small_for_a_contestant_is_told():
    card = Card("c", 1, 1, 1, 100, 10, 1)
    bench = gpu.Bench(SETTINGS, CPU, card, gpu.Clock(300, time.perf_counter()), [])

    def fit(*_: Any) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    x = planted(100, 16, 0, CPU, CPU)
    bench._iteration("large", "tf32", fit, x, x[:5], False)
    assert bench.iterations[0]["note"] == "out of the card's memory"


def test_what_fails_costs_neither_the_others_nor_what_was_measured(monkeypatch):
    # regression: a peer's error ended the suite, and all results were lost, because they are written at its end
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")

    small = SETTINGS | {"gpu_rows": [1200], "gpu_clusters": [5]}
    monkeypatch.setattr(gpu, "PEERS", {"faiss": broken})
    monkeypatch.setattr(gpu, "array_functions", broken)
    clock = iter(range(1, 10**9))
    monkeypatch.setattr(gpu, "timed", lambda device, call: (call(), 1e-3 * next(clock))[1])
    monkeypatch.setattr(gpu.Bench, "_job", lambda self, n: None)
    result = gpu.run(small, CPU)
    said = "failed: RuntimeError: CUDA error: an illegal memory access was encountered"
    assert [one.get("note") for one in result["iterations"]] == [None, said] and result["failed"] == []
    assert result["clusterings"][0]["seconds"] > 0 and result["arrays"][0]["note"] == said
    assert said in gpu_tables(result)
    # a failure of rb_gpu itself is reported too
    monkeypatch.undo()
    for name in ("kmeans", "agreement", "synthesize"):
        monkeypatch.setattr(gpu, name, broken)
    result = gpu.run(small, CPU)
    assert result["failed"] == [said, said] and result["jobs"][0]["note"] == said
    assert "NO" in gpu_tables(result)


def test_points_that_cannot_be_made_cost_only_their_size(monkeypatch):
    # regression: after a fault the card makes no more points, and the error ended the suite without its results
    def made(n: int, *more: Any) -> torch.Tensor:
        if n > 1000:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return planted(n, *more)

    monkeypatch.setattr(gpu, "planted", made)
    monkeypatch.setattr(gpu, "PEERS", {})
    monkeypatch.setattr(gpu.Bench, "_job", lambda self, n: None)
    result = gpu.run(SETTINGS | {"gpu_rows": [500, 1200], "gpu_clusters": [5]}, CPU)
    assert [one.get("note") for one in result["clusterings"]][1:] == [*result["failed"]]
    assert result["failed"] == ["failed: RuntimeError: CUDA error: unspecified launch failure"]
    assert result["failed"][0] in gpu_tables(result)


def test_rates_and_labels_are_those_of_float32_in_an_image_that_allows_tf32(monkeypatch):
    # as NVIDIA's images do with TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1; regression: right labels were reported as wrong
    seen = []

    def asked(*_: Any) -> Any:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return Card("c", 1, 1, 1, 100, 10, 1) if len(seen) == 1 else {"worst_over_bound": 0.0}

    for name in ("measured_card", "agreement"):
        monkeypatch.setattr(gpu, name, asked)
    torch.set_float32_matmul_precision("high")
    try:
        gpu.run(SETTINGS | {"gpu_rows": [], "gpu_clusters": []}, CPU)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["ieee", "ieee"]


@pytest.mark.parametrize(("failed", "code"), [([], 0), (["failed: RuntimeError"], 1)])
def test_ours_that_fails_fails_the_job(result, monkeypatch, tmp_path, failed, code):
    monkeypatch.setattr(benchmark, "run_folder", lambda: tmp_path)
    found = result | {"failed": failed}
    monkeypatch.setitem(benchmark.SUITES, "gpu", (lambda _: found, gpu_tables, benchmark.no_picture))
    assert benchmark.run(BenchmarkConfig(suite="gpu")) == code


def lloyd(x: torch.Tensor, centroids: torch.Tensor, iterations: int) -> torch.Tensor:
    for _ in range(iterations):
        labels = torch.cdist(x, centroids).argmin(1)
        sums = torch.zeros_like(centroids).index_add_(0, labels, x)
        centroids = sums / torch.bincount(labels, minlength=len(centroids))[:, None]
    return centroids


def test_peers_are_called_by_their_signatures(monkeypatch):
    x = planted(900, 16, 1, CPU, CPU)
    start = x[:7].clone()

    def batch_kmeans_Euclid(x, n_clusters, max_iters=100, tol=0.0, init_centroids=None, verbose=False):
        assert x.ndim == init_centroids.ndim == 3 and n_clusters == init_centroids.shape[1]
        init_centroids.copy_(lloyd(x[0], init_centroids[0], max_iters)[None])
        return None, init_centroids, max_iters

    class KMeansParams:
        def __init__(self, metric=None, *, n_clusters=None, init_method=None, max_iter=None, tol=None):
            assert init_method == "Array" and tol == 0.0
            self.n_clusters, self.max_iter = n_clusters, max_iter

    def fit(params, X, centroids=None, sample_weights=None, resources=None):
        assert len(centroids) == params.n_clusters
        return SimpleNamespace(centroids=lloyd(X, centroids, params.max_iter).numpy(), inertia=0.0, n_iter=1)

    flash, cuvs = ModuleType("flash_kmeans"), ModuleType("cuvs.cluster.kmeans")
    flash.batch_kmeans_Euclid, cuvs.KMeansParams, cuvs.fit = batch_kmeans_Euclid, KMeansParams, fit
    for name, module in {"flash_kmeans": flash, "cuvs": ModuleType("cuvs"), "cuvs.cluster": ModuleType("cuvs.cluster"),
                         "cuvs.cluster.kmeans": cuvs}.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    kept, mine = start.clone(), gpu_peers.ours("torch", "ieee", None)(x, start, 3)
    for name, peer in gpu_peers.PEERS.items():
        if name != "faiss":
            np.testing.assert_allclose(peer(x, start, 3), mine, rtol=1e-4, atol=1e-5, err_msg=name)
            assert torch.equal(start, kept), name
