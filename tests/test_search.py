"""Nearest leaves: exact search against brute force, Faiss indexes against exact search."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_bank, queries_near

from rb_gpu import search as module
from rb_gpu.bank import ReasoningBank
from rb_gpu.bank_data import BankData
from rb_gpu.errors import ArtifactError
from rb_gpu.publish import write_artifact
from rb_gpu.search import EXACT_BATCH_QUERIES, ExactSearch, in_lines, open_search
from rb_gpu.tensor_file import CACHE_LINE


def unit(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), dtype=np.float32)


def brute_force(cosine_BP: np.ndarray, k: int) -> list[list[int]]:
    """The k best columns of each row; equal ones in the order of their columns."""
    return [sorted(range(len(row)), key=lambda column: (-row[column], column))[:k] for row in cosine_BP.tolist()]


@pytest.mark.parametrize("k", [1, 2, 5, 39, 40, 41, 1000])
def test_exact_search_is_a_brute_force(k: int) -> None:
    rng = np.random.default_rng(k)
    leaves, queries = unit(rng.normal(size=(40, 8))), unit(rng.normal(size=(30, 8)))
    rows, cosine = ExactSearch(leaves).nearest(queries, k)
    assert rows.shape == cosine.shape == (30, min(k, 40)) and rows.dtype == np.int64 and cosine.dtype == np.float32
    assert rows.tolist() == brute_force(queries.astype(np.float64) @ leaves.T.astype(np.float64), k)
    np.testing.assert_allclose(cosine, np.take_along_axis(queries @ leaves.T, rows, 1), atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_equally_near_leaves_come_in_the_order_of_rows(seed: int) -> None:
    # regression: a partition took any of the leaves that are as near as the last one
    rng = np.random.default_rng(seed)
    leaves = np.eye(4, dtype=np.float32)[rng.integers(4, size=50)]  # cosines are exact, and hardly ever distinct
    queries = np.array([[1, 0, 0, 0], [0.5, 0.5, 0.5, 0.5], [0.5, -0.5, 0.5, -0.5]], np.float32)
    for k in (1, 3, 17, 49, 50, 60):
        rows, _ = ExactSearch(leaves).nearest(queries, k)
        assert rows.tolist() == brute_force(queries @ leaves.T, k)


def test_tiles_change_nothing_of_what_is_found(monkeypatch: Any) -> None:
    rng = np.random.default_rng(0)
    leaves, queries = unit(rng.normal(size=(40, 8))), unit(rng.normal(size=(1000, 8)))
    whole, products = ExactSearch(leaves).nearest(queries, 5)
    monkeypatch.setattr(module, "TILE_CELLS", 40 * 130)
    monkeypatch.setattr(module, "RANKED_CELLS", 40 * 64)  # two rankings per tile and a bit, and a smaller last tile
    rows, cosine = ExactSearch(leaves).nearest(queries, 5)
    np.testing.assert_array_equal(rows, whole)
    np.testing.assert_allclose(cosine, products, rtol=1e-6)
    assert whole.tolist() == brute_force(queries.astype(np.float64) @ leaves.T.astype(np.float64), 5)


def test_one_leaf_is_always_found() -> None:
    rows, cosine = ExactSearch(np.array([[0, 1]], np.float32)).nearest(np.array([[1, 0], [0, -1]], np.float32), 5)
    assert rows.tolist() == [[0], [0]] and cosine.tolist() == [[0], [-1]]


# Faiss


def index_of(leaves_PD: np.ndarray, **settings: Any) -> bytes:
    pytest.importorskip("faiss")
    pytest.importorskip("torch")
    from rb_gpu.learn.config import IndexConfig
    from rb_gpu.learn.index import build_index

    index = build_index(leaves_PD, IndexConfig(**settings), leaves_PD, 5)
    assert index is not None
    return index


@pytest.fixture(scope="module")
def clustered() -> tuple[np.ndarray, np.ndarray]:
    """2,000 leaves of 32 dims around 60 centres, and queries near them: (leaves, queries), both of norm 1."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(60, 32))
    leaves = unit(centres[rng.integers(60, size=2000)] + 0.7 * rng.normal(size=(2000, 32)))
    return leaves, unit(leaves[rng.integers(2000, size=300)] + 0.05 * rng.normal(size=(300, 32)))


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_an_index_read_back_finds_what_exact_search_finds(clustered: Any, kind: str) -> None:
    leaves, queries = clustered
    search = open_search(leaves, index_of(leaves, kind=kind), kind, "index")
    rows, cosine = search.nearest(queries, 5)
    exact, exact_cosine = ExactSearch(leaves).nearest(queries, 5)
    recall = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(rows.tolist(), exact.tolist(), strict=True)])
    assert search.name == kind and recall >= (1.0 if kind == "flat" else 0.95)
    np.testing.assert_allclose(cosine, (queries[:, None] * leaves[rows]).sum(-1), atol=1e-5)
    assert (np.diff(cosine, axis=1) <= 0).all() and cosine[0, 0] == pytest.approx(exact_cosine[0, 0], abs=1e-5)
    assert search.nearest(queries[:3], 5000)[0].shape == (3, 2000)


def test_the_settings_of_an_index_are_read_back(clustered: Any) -> None:
    leaves, queries = clustered
    exact = ExactSearch(leaves).nearest(queries, 5)[0]

    def recall(**settings: Any) -> float:
        rows = open_search(leaves, index_of(leaves, **settings), "x", "index").nearest(queries, 5)[0]
        return float(np.mean([len(set(a) & set(b)) / 5 for a, b in zip(rows.tolist(), exact.tolist(), strict=True)]))

    assert recall(kind="ivf", nprobe=1) < recall(kind="ivf", nprobe=8) < recall(kind="ivf", nprobe=44) == 1.0
    assert recall(kind="hnsw", m=2, ef_construction=4, ef_search=1) < recall(kind="hnsw", m=4, ef_search=64)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_the_breadth_of_a_search_is_the_least_that_finds_enough(clustered: Any, kind: str) -> None:
    faiss = pytest.importorskip("faiss")
    leaves, _ = clustered
    breadth = []
    for recall in (0.5, 0.995):
        content = index_of(leaves, kind=kind, recall=recall, m=4)
        index = faiss.deserialize_index(np.frombuffer(content, np.uint8))
        breadth.append(index.hnsw.efSearch if kind == "hnsw" else index.nprobe)
        rows, _ = open_search(leaves, content, kind, "index").nearest(leaves, 5)
        exact, _ = ExactSearch(leaves).nearest(leaves, 5)
        assert (rows[:, :, None] == exact[:, None, :]).any(2).mean() >= recall - 0.01
    assert breadth[0] < breadth[1]


def test_a_breadth_never_exceeds_what_a_loader_takes_and_too_low_a_recall_is_told(
    clustered: Any, monkeypatch: Any, caplog: Any
) -> None:
    faiss = pytest.importorskip("faiss")
    # regression: the breadth could be 1.5 times the loader's bound, and every service refused the index
    monkeypatch.setattr("rb_gpu.learn.index.MAX_BREADTH", 5)
    leaves, _ = clustered
    content = index_of(leaves, kind="hnsw", m=2, ef_construction=4, recall=1.0)
    index = faiss.deserialize_index(np.frombuffer(content, np.uint8))
    assert index.hnsw.efSearch == 5
    (record,) = [record for record in caplog.records if record.name == "rb_gpu.learn.index"]
    assert record.levelname == "WARNING" and "(index.recall=1)" in record.message


@pytest.mark.parametrize("kind", ["exact", "ivf", "hnsw", "flat"])
def test_one_query_is_searched_like_a_batch(clustered: Any, kind: str) -> None:
    leaves, queries = clustered
    search = ExactSearch(leaves) if kind == "exact" else open_search(leaves, index_of(leaves, kind=kind), kind, "index")
    for k in (1, 5, 40):
        rows, cosine = search.nearest(queries[:50], k)
        for i, query in enumerate(queries[:50]):
            one, near = search.nearest_one(query, k)
            assert one == rows[i].tolist()
            np.testing.assert_allclose(near, cosine[i], rtol=1e-5)


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_a_bank_answers_alike_by_index(data: BankData, kind: str) -> None:
    indexed = replace(data, facts=data.facts | {"index": {"kind": kind}})
    by_index = ReasoningBank(indexed, index_of(data.arrays["centroids"][:12], kind=kind), search="index")
    assert by_index.search_name == kind and ReasoningBank(data).search_name == "exact"
    queries = queries_near(data, 200)
    exact, found = ReasoningBank(data).optimized_params_batch(queries), by_index.optimized_params_batch(queries)
    np.testing.assert_array_equal(exact["config_id"], found["config_id"])
    np.testing.assert_allclose(exact["confidence"], found["confidence"], rtol=1e-4)


def test_a_large_batch_is_searched_exactly_where_a_product_is_faster_than_the_index(data: BankData) -> None:
    index = index_of(data.arrays["centroids"][:12], kind="hnsw")
    asked, chosen = (ReasoningBank(data, index, search=search) for search in ("index", "auto"))
    assert asked._state.search_many is asked._state.search
    chosen._state.search = asked._state.search  # as auto would choose for more leaves than these
    queries = queries_near(data, EXACT_BATCH_QUERIES)
    expected, found = ReasoningBank(data).optimized_params_batch(queries), chosen.optimized_params_batch(queries)
    for name, column in expected.items():
        np.testing.assert_array_equal(found[name], column)
    chosen._state.search_many = None  # type: ignore[assignment]
    assert len(chosen.optimized_params_batch(queries[1:])["config_id"]) == EXACT_BATCH_QUERIES - 1


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_more_patterns_than_an_index_was_tuned_for_are_all_found(kind: str) -> None:
    # regression: k=500 of 1,500 gave 282 rows, and not the nearest
    data = make_bank(leaves=1000, dim=8)
    leaves = data.arrays["centroids"][:1000]
    bank = ReasoningBank(data, index_of(leaves, kind=kind, m=4), search="index")
    for query in queries_near(data, 5):
        expected = np.argsort(-leaves @ query, kind="stable")
        for k in (1, data.lookup.top_k + 1, 500, 2000):
            found = [match.pattern.id - 100 for match in bank.find_similar_patterns(query, k)]
            assert found == expected[:k].tolist()


BATCH_AFTER_FORK = """
import os, signal, sys
import numpy as np
from rb_gpu.bank import ReasoningBank

bank = ReasoningBank.load(sys.argv[1], search="index")
queries = np.tile(bank.data.arrays["centroids"][:12], (10, 1))
before = bank.optimized_params_batch(queries)
child = os.fork()
if child == 0:
    signal.alarm(20)
    after = bank.optimized_params_batch(queries)
    os._exit(0 if all((before[name] == after[name]).all() for name in before) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_a_child_forked_after_a_batch_can_search_one_too(data: BankData, tmp_path: Path, kind: str) -> None:
    # regression: it waited for ever for the threads that OpenMP had started in its parent
    index = index_of(data.arrays["centroids"][:12], kind=kind)
    write_artifact(tmp_path / "v", replace(data, facts=data.facts | {"index": {"kind": kind}}), {"index.faiss": index})
    ran = subprocess.run(
        [sys.executable, "-c", BATCH_AFTER_FORK, str(tmp_path / "v")],
        env=os.environ | {"OMP_NUM_THREADS": "2"}, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0


def test_rows_that_an_inverted_file_does_not_find_have_no_vote(data: BankData) -> None:
    leaves = data.arrays["centroids"][:12]
    index = index_of(leaves, kind="ivf", nlist=12, nprobe=1)
    low = replace(data, lookup=replace(data.lookup, floor=-1.0))
    bank = ReasoningBank(low, index, search="index")
    rows, cosine = bank._state.search.nearest(leaves, 3)
    assert (rows[:, 0] == np.arange(12)).all() and (rows[:, 1:] == -1).all() and (cosine[:, 1:] == -1).all()
    single = replace(low, lookup=replace(low.lookup, top_k=1))
    expected, found = ReasoningBank(single).optimized_params_batch(leaves), bank.optimized_params_batch(leaves)
    for name in ("config_id", "pattern_id"):
        np.testing.assert_array_equal(found[name], expected[name])
    np.testing.assert_allclose(found["confidence"], expected["confidence"], rtol=1e-5)
    assert [m.pattern.id for m in bank.find_similar_patterns(leaves[4], 3)] == [104]
    bank.optimized_params(leaves[4], mode="interpolate")


def test_copied_leaves_begin_at_a_cache_line() -> None:
    rng = np.random.default_rng(0)
    kept = []  # keeps all copies alive, so that none reuses the memory of another
    for size in range(1, 40):
        values = rng.normal(size=(size, 7))
        kept.append(in_lines(values))
        assert kept[-1].ctypes.data % CACHE_LINE == 0
        np.testing.assert_array_equal(kept[-1], values.astype(np.float32))


def test_an_index_of_other_patterns_is_refused(data: BankData) -> None:
    leaves = data.arrays["centroids"][:12]
    for wrong, reason in ((leaves[:11], "holds 11 patterns of 16"), (leaves[:, :8], "holds 12 patterns of 8")):
        with pytest.raises(ArtifactError, match=reason):
            ReasoningBank(data, index_of(wrong.copy()), search="index")


def test_an_index_that_is_damaged_or_of_another_metric_is_refused(data: BankData) -> None:
    faiss = pytest.importorskip("faiss")
    euclidean, untrained = faiss.IndexFlatL2(16), faiss.IndexIVFFlat(faiss.IndexFlatIP(16), 16, 2, 0)
    euclidean.add(data.arrays["centroids"][:12])
    whole = index_of(data.arrays["centroids"][:12])
    distances, empty = (faiss.serialize_index(index).tobytes() for index in (euclidean, untrained))
    for content in (b"", b"x", b"IxFI", whole[:20], whole[:-1], distances, empty):
        # regression: distances were taken as cosines
        with pytest.raises(ArtifactError, match="train again"):
            ReasoningBank(data, content, search="index")


def test_an_index_too_large_for_memory_is_an_artifact_error(data: BankData, monkeypatch: Any) -> None:
    # regression: a flipped bit in a length, with a matching hash, raised MemoryError
    faiss = pytest.importorskip("faiss")

    def deserialize(content: np.ndarray) -> None:
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr(faiss, "deserialize_index", deserialize)
    with pytest.raises(ArtifactError, match="bad_alloc"):
        ReasoningBank(data, index_of(data.arrays["centroids"][:12], kind="flat"), search="index")


def test_an_index_that_points_outside_itself_is_refused(data: BankData) -> None:
    # regression: ids out of range raised IndexError in the lookup, and links out of range a segmentation fault
    faiss = pytest.importorskip("faiss")
    leaves = data.arrays["centroids"][:12].copy()
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(16), 16, 1, faiss.METRIC_INNER_PRODUCT)
    index.train(leaves)
    index.add_with_ids(leaves, np.where(np.arange(12) < 6, np.arange(12), 2**40))
    with pytest.raises(ArtifactError, match="a list points outside"):
        ReasoningBank(data, faiss.serialize_index(index).tobytes(), search="index")
    graph = faiss.deserialize_index(np.frombuffer(index_of(leaves, kind="hnsw"), np.uint8))
    links = faiss.vector_to_array(graph.hnsw.neighbors)
    links[3] = 12
    faiss.copy_array_to_vector(links, graph.hnsw.neighbors)
    with pytest.raises(ArtifactError, match="a neighbour points outside"):
        ReasoningBank(data, faiss.serialize_index(graph).tobytes(), search="index")


@pytest.mark.parametrize("kind", ["OnDisk", "IHNf", "IxF2"])
def test_an_index_of_a_kind_that_no_job_writes_is_refused(data: BankData, kind: str) -> None:
    content = kind.encode()[:4] + index_of(data.arrays["centroids"][:12], kind="flat")[4:]
    with pytest.raises(ArtifactError, match="which no job writes"):
        ReasoningBank(data, content, search="index")


def test_a_wanted_index_that_is_not_there_is_an_error(data: BankData, tmp_path: Path) -> None:
    write_artifact(tmp_path / "v", data, {})
    with pytest.raises(ArtifactError, match=r"has no index\.faiss"):
        ReasoningBank.load(tmp_path / "v", search="index")
    assert ReasoningBank.load(tmp_path / "v", search="exact").search_name == "exact"


def test_without_faiss_auto_is_exact_and_both_say_what_to_install(
    data: BankData, monkeypatch: Any, caplog: Any
) -> None:
    import_ = builtins.__import__

    def refuse(name: str, *args: Any) -> Any:
        if name == "faiss":
            raise ImportError("No module named 'faiss'", name="faiss")
        return import_(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(module, "EXACT_CELLS", 0)
    assert ReasoningBank(data, b"an index").search_name == "exact"
    assert "pip install 'rb_gpu[index]'" in caplog.text
    with pytest.raises(ArtifactError, match=r"pip install 'rb_gpu\[index\]'"):
        ReasoningBank(data, b"an index", search="index")


def test_auto_takes_the_index_of_a_large_bank(monkeypatch: Any) -> None:
    data = make_bank(leaves=30)
    index = index_of(data.arrays["centroids"][:30])
    assert ReasoningBank(data, index).search_name == "exact"
    monkeypatch.setattr(module, "EXACT_CELLS", 30 * (16 + module.RANKING_DIMS) - 1)
    assert ReasoningBank(data, index).search_name == "flat"
    assert ReasoningBank(data).search_name == "exact"


@pytest.mark.parametrize(("leaves", "dim"), [(2048, 128), (1024, 384), (585, 768), (315, 1536)])
def test_which_search_answers_sooner(leaves: int, dim: int) -> None:
    # regression: from 1 MiB on the index was used, which took 10 us longer at 700 x 384 and 20 us at 300 x 1,536
    assert module.product_is_faster(leaves, dim) and not module.product_is_faster(leaves + 1, dim)


def test_an_artifact_keeps_its_index(learned: Any, tmp_path: Path) -> None:
    write_artifact(tmp_path / "v", learned.bank.data, {"index.faiss": learned.bank.index})
    bank = ReasoningBank.load(tmp_path / "v", search="index")
    assert bank.search_name == "hnsw"
    np.testing.assert_array_equal(bank.optimized_params_batch(learned.centres)["config_id"], learned.best)
    (tmp_path / "v" / "index.faiss").write_bytes(learned.bank.index[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"index\.faiss differs"):
        ReasoningBank.load(tmp_path / "v", search="index")
