"""The suites cluster, seed and whole at a tiny size: every contestant is measured or reported as missing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from jobs.tables import cluster_tables
from rb_gpu.bench import cluster, kmeans_peers
from rb_gpu.bench.plot import plot_cases
from rb_gpu.errors import ConfigError
from rb_gpu.learn.job_config import PEERS

SETTINGS = {
    "points": ["emb"], "n": 1500, "dim": 40, "clusters": [20], "iterations": 3, "rounds": 1, "seed": 0,
    "peers": ["plain torch", "sequential torch"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    # products of size 3072 would take as long as the rest of a tiny run
    monkeypatch.setattr(cluster, "PEAK_SIZE", 256)


@pytest.mark.parametrize(
    ("suite", "peer"), [("cluster", "plain torch"), ("seed", "sequential torch"), ("whole", "faiss")]
)
def test_contestants_are_measured_on_the_same_points(suite: str, peer: str, tmp_path: Path) -> None:
    if peer == "faiss":
        pytest.importorskip("faiss")
    result = json.loads(json.dumps(cluster.measure(suite, SETTINGS | {"peers": [peer]})))
    rows = result["cases"][0]["rows"]
    assert set(rows) == ({"ours", "ours, lean", peer} if suite == "cluster" else {"ours", peer})
    assert all(row["seconds"] > 0 for row in rows.values())
    assert result["cases"][0]["exact_share"] == 1.0
    if suite == "cluster":  # the same start leads to the same result
        assert rows["ours"]["inertia"] == pytest.approx(rows[peer]["inertia"], rel=1e-3)
        assert rows["ours"]["share_of_sgemm_peak"] > 0
    table = cluster_tables(result)
    assert "emb 1,500 x 40, k=20" in table and peer in table
    pytest.importorskip("matplotlib")
    assert plot_cases(result, tmp_path / "plot.png")


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(module: str, settings: dict, **_: object) -> dict:
        if settings["name"] == "faiss":
            return {"missing": "faiss"}
        np.save(settings["out"], np.load(settings["x"])[: settings["k"]])
        return {"seconds": 1.0}

    monkeypatch.setattr(cluster, "in_process", fake)
    result = cluster.measure("seed", SETTINGS | {"peers": ["faiss"]})
    assert result["cases"][0]["rows"]["faiss"] == "faiss is not installed"
    assert "faiss is not installed" in cluster_tables(result)


def test_every_peer_of_the_settings_is_known() -> None:
    known = {name for suite in kmeans_peers.CONTESTANTS.values() for name in suite if not name.startswith("ours")}
    assert known == set(PEERS)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"points": ["nothing.npy"]}, "nothing.npy"), ({"clusters": [2000]}, "1500"), ({"dim": 20}, "30 intrinsic")],
)
def test_what_cannot_be_measured_is_an_error(change: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        cluster.measure("cluster", SETTINGS | change)


def test_blobs_lie_about_as_many_centres() -> None:
    x = cluster.points("blobs", {"n": 4000, "dim": 24, "seed": 0})
    assert x.shape == (4000, 24) and x.dtype == np.float32
    found = kmeans_peers.whole_ours(x, 32, 0)
    assert cluster.inertia(x, found)[0] == pytest.approx(4 * 24 * 4000, rel=0.05)


def test_points_of_a_file_are_its_rows(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    np.testing.assert_array_equal(cluster.points(str(tmp_path / "x.npy"), {"n": 20}), x[:20].astype(np.float32))
