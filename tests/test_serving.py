"""A bank inside a service: signatures, bad queries, reloads, threads, forks, mapped files."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import A, B, make_bank, queries_near, trajectory
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from rb_gpu import ArtifactError, ReasoningBank, Registry, UserFeedback, load_artifact, verify_artifact
from rb_gpu.artifact import read_key
from rb_gpu.bank_data import BankData
from rb_gpu.publish import write_artifact
from rb_gpu.tensor_file import map_tensors, tensors_content

KEY, OTHER = b"0123456789abcdef", b"fedcba9876543210"


def wait_for(condition: Any, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


# Signatures


def test_a_signed_artifact_is_read_with_its_key_alone(data: BankData, tmp_path: Path) -> None:
    write_artifact(tmp_path / "v", data, {}, KEY)
    assert ReasoningBank.load(tmp_path / "v", hmac_key=KEY).dim == data.dim
    assert ReasoningBank.load(tmp_path / "v").dim == data.dim
    for load_it in (load_artifact, verify_artifact):
        load_it(tmp_path / "v", KEY)
        with pytest.raises(ArtifactError, match=r"not signed with the key of registry\.hmac_key_file"):
            load_it(tmp_path / "v", OTHER)


@pytest.mark.parametrize("damage", ["manifest", "signature", "no signature", "link"])
def test_a_forged_artifact_is_refused_by_a_service_with_a_key(data: BankData, tmp_path: Path, damage: str) -> None:
    write_artifact(tmp_path / "v", data, {}, KEY)
    path = tmp_path / "v" / ("manifest.json" if damage == "manifest" else "manifest.sig")
    if damage == "manifest":
        path.write_bytes(path.read_bytes().replace(b'"embedder": "none"', b'"embedder": "nune"'))
    elif damage == "signature":
        path.write_bytes(b"0" * 64 + b"\n")
    else:
        path.rename(tmp_path / "kept")
        if damage == "link":
            path.symlink_to(tmp_path / "kept")
    assert ReasoningBank.load(tmp_path / "v").dim == data.dim
    with pytest.raises(ArtifactError, match=r"manifest"):
        ReasoningBank.load(tmp_path / "v", hmac_key=KEY)


def test_a_registry_with_a_key_serves_what_is_signed(data: BankData, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(KEY + b"\n")
    registry = Registry.open(str(tmp_path / "artifacts"), 10, str(tmp_path / "key"))
    write_artifact(registry.path / A, data, {}, registry.hmac_key)
    write_artifact(registry.path / B, data, {})
    registry.promote(A, "")
    with pytest.raises(ArtifactError, match=r"manifest\.sig cannot be read"):
        registry.promote(B, "")
    assert registry.champion() == A
    bank = ReasoningBank.load(registry.path / "champion", hmac_key=KEY)
    Registry(registry.path).promote(B, "")
    assert not bank.reload_if_changed() and bank.version == A and "manifest.sig" in str(bank.reload_error)


def test_a_key_that_is_missing_or_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"registry\.hmac_key_file=.*cannot be read"):
        read_key(tmp_path / "nowhere")
    (tmp_path / "short").write_bytes(b"secret\n")
    with pytest.raises(ArtifactError, match="has 6 bytes, under 16"):
        read_key(tmp_path / "short")


# Queries


@pytest.mark.parametrize("mode", ["vote", "interpolate"])
@pytest.mark.parametrize(
    ("query", "reason"),
    [
        (np.full(16, np.nan), "NaN"),
        (np.zeros(16, np.float32), "norm 0"),
        (np.full(16, np.inf, np.float32), "infinity"),
        (np.ones(15), r"shape \(15,\), expected \(16,\)"),
        (np.ones((2, 16)), r"shape \(2, 16\), expected \(16,\)"),
        (np.array([]), r"shape \(0,\)"),
        (["a"] * 16, "not an array of numbers"),
        (None, "not an array of numbers"),
        # regression: the value under the mask was used
        (np.ma.masked_values([2.0, *range(15)], 2.0), "some are masked"),
    ],
)
def test_a_bad_query_raises_or_gets_the_default(bank: ReasoningBank, query: Any, reason: str, mode: str) -> None:
    with pytest.raises(ValueError, match=reason):
        bank.optimized_params(query, mode=mode)
    answer = bank.optimized_params(query, mode=mode, on_error="default")
    assert answer.params == bank.default and answer.confidence == 0.0 and not answer.source.has_pattern
    with pytest.raises(ValueError, match=reason):
        raise ValueError(answer.reason)
    assert bank.stats().total_lookups == 1


def test_a_masked_array_that_hides_nothing_is_a_query(bank: ReasoningBank) -> None:
    queries = queries_near(bank.data, 3)
    assert bank.optimized_params(np.ma.masked_invalid(queries[1])) == bank.optimized_params(queries[1])
    hidden = np.ma.masked_greater(queries, queries.max() - 1e-3)
    with pytest.raises(ValueError, match="some are masked"):
        bank.optimized_params_batch(hidden)


def test_on_error_hides_no_mistake_of_the_caller(bank: ReasoningBank) -> None:
    for wrong in ({"mode": "guess"}, {"on_error": "ignore"}, {"tradeoff": "cheap"}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            bank.optimized_params(np.ones(bank.dim), **{"on_error": "default"} | wrong)


@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1.0, 1e10, 1e30])
def test_the_length_of_a_query_does_not_matter(bank: ReasoningBank, scale: float) -> None:
    for query in queries_near(bank.data, 40):
        expected, found = bank.optimized_params(query), bank.optimized_params((query * scale).astype(np.float32))
        assert found.config_id == expected.config_id
        assert found.confidence == pytest.approx(expected.confidence, abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), leaves=st.integers(1, 40), configs=st.integers(1, 9), top_k=st.integers(1, 30))
def test_one_query_is_answered_like_a_batch(seed: int, leaves: int, configs: int, top_k: int) -> None:
    data = make_bank(leaves, configs, 8, seed)
    bank = ReasoningBank(replace(data, lookup=replace(data.lookup, top_k=top_k)))
    queries = queries_near(bank.data, 12, seed)
    batch = bank.optimized_params_batch(queries)
    for i, query in enumerate(queries):
        answer = bank.optimized_params(query)
        assert answer.config_id == batch["config_id"][i]
        assert (answer.source.pattern_id if answer.source.has_pattern else -1) == batch["pattern_id"][i]
        assert answer.confidence == pytest.approx(batch["confidence"][i], abs=1e-5)
        assert answer.expected_quality == pytest.approx(batch["expected_quality"][i], abs=1e-5)
        assert answer.expected_gain == pytest.approx(batch["expected_gain"][i], abs=1e-5)


# Reloads


def test_a_bad_artifact_is_reported_once_and_read_again_only_after_a_while(
    registry: Registry, caplog: Any, monkeypatch: Any
) -> None:
    from rb_gpu import source

    bank, reads = ReasoningBank.load(registry.path / "champion"), []
    read = source.load_artifact
    monkeypatch.setattr(source, "load_artifact", lambda *a: (reads.append(1), read(*a))[1])
    registry.promote(B, "")
    (registry.path / B / "bank.safetensors").write_bytes(b"x")
    with caplog.at_level(logging.ERROR):
        assert not any(bank.reload_if_changed() for _ in range(50))
    assert len(reads) == 1 and caplog.text.count("kept the artifact in use") == 1
    assert "bank.safetensors" in str(bank.reload_error) and bank.version == A
    monkeypatch.setattr(source, "RETRY_S", 0.0)
    assert not bank.reload_if_changed() and len(reads) == 2
    registry.promote(A, "")
    assert not bank.reload_if_changed() and bank.reload_error is None


def test_a_good_artifact_that_comes_while_a_bad_one_is_read_is_taken_at_the_next_look(
    registry: Registry, monkeypatch: Any
) -> None:
    # regression: it was taken for the bad one, and was not loaded for RETRY_S
    from rb_gpu import source

    bank, read = ReasoningBank.load(registry.path / "champion"), source.load_artifact
    write_artifact(registry.path / "20260103T000000-00000c", make_bank(seed=7), {})
    registry.promote(B, "")
    (registry.path / B / "bank.safetensors").unlink()

    def slow(*arguments: Any) -> Any:
        monkeypatch.undo()
        registry.promote("20260103T000000-00000c", "")
        return read(*arguments)

    monkeypatch.setattr(source, "load_artifact", slow)
    assert not bank.reload_if_changed() and "bank.safetensors" in str(bank.reload_error)
    assert bank.reload_if_changed() and bank.version == "20260103T000000-00000c" and bank.reload_error is None


def test_nothing_new_costs_one_stat(registry: Registry, monkeypatch: Any) -> None:
    bank, calls = ReasoningBank.load(registry.path / "champion"), []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda *a, **k: (calls.append(a), stat(*a, **k))[1])
    for name in ("open", "lstat", "readlink"):
        monkeypatch.setattr(os, name, None)
    assert not bank.reload_if_changed()
    assert len(calls) == 1


def test_a_link_switched_from_one_image_to_another_is_followed(registry: Registry, monkeypatch: Any) -> None:
    # regression: images are built with all times 0 and with equal inode numbers, so that the new one was not noticed
    def of_image(path: str) -> Any:
        return SimpleNamespace(st_dev=Path(path).stat().st_ino, st_ino=1, st_mtime_ns=0, st_size=4096)

    monkeypatch.setattr("rb_gpu.source.os", SimpleNamespace(stat=of_image, path=os.path, fspath=os.fspath))
    bank = ReasoningBank.load(registry.path / "champion")
    assert not bank.reload_if_changed()
    (registry.path / "champion").unlink()
    (registry.path / "champion").symlink_to(B)
    assert bank.reload_if_changed() and bank.version == B


def test_an_artifact_asked_for_a_trade_off_is_unmapped_once_replaced(registry: Registry) -> None:
    # regression: a state under a trade-off was in a reference cycle, so that old maps stayed until a full garbage
    # collection
    bank = ReasoningBank.load(registry.path / "champion")
    bank.optimized_params(np.ones(bank.dim), 0.5)
    (other,) = map(weakref.ref, bank._state.tradeoffs.values())
    gc.disable()
    try:
        registry.promote(B, "")
        assert bank.reload_if_changed() and other() is None
    finally:
        gc.enable()


def test_a_link_that_is_gone_keeps_the_bank_and_says_so(registry: Registry) -> None:
    bank = ReasoningBank.load(registry.path / "champion")
    (registry.path / "champion").unlink()
    assert not bank.reload_if_changed() and "is gone" in str(bank.reload_error)
    assert bank.optimized_params(np.ones(bank.dim)).params in list(bank.configs)


def test_a_process_that_changes_its_folder_goes_on_following(registry: Registry, monkeypatch: Any) -> None:
    # regression: a path relative to the starting folder counted as gone for ever
    monkeypatch.chdir(registry.path.parent)
    bank = ReasoningBank.load(f"{registry.path.name}/champion")
    monkeypatch.chdir("/")
    registry.promote(B, "")
    assert bank.reload_if_changed() and bank.version == B and bank.reload_error is None


def test_a_watcher_serves_what_is_promoted(registry: Registry) -> None:
    bank = ReasoningBank.load(registry.path / "champion")
    bank.watch(0.02)
    bank.watch(0.01)  # takes the place of the first, which `close` would not stop
    registry.promote(B, "")
    assert wait_for(lambda: bank.version == B)
    bank.close()
    registry.promote(A, "")
    time.sleep(0.1)
    assert bank.version == B
    with pytest.raises(ValueError, match=r"interval_s=0 .*try 1\.0"):
        bank.watch(0)


def test_an_interval_is_a_number(registry: Registry) -> None:
    # regression: the thread died of a wait for np.float32 seconds, and a string was a bare TypeError
    bank = ReasoningBank.load(registry.path / "champion")
    with pytest.raises(ValueError, match="interval_s='1' is not a positive number of seconds; try"):
        bank.watch("1")  # type: ignore[arg-type]
    bank.watch(np.float32(0.02))
    registry.promote(B, "")
    assert wait_for(lambda: bank.version == B)
    bank.close()


def test_a_bad_interval_leaves_the_watcher_at_work(registry: Registry) -> None:
    # regression: the old watcher was stopped before the new interval was checked
    bank = ReasoningBank.load(registry.path / "champion")
    bank.watch(0.02)
    with pytest.raises(ValueError, match="interval_s=0"):
        bank.watch(0)
    registry.promote(B, "")
    assert wait_for(lambda: bank.version == B)
    bank.close()


def test_a_watcher_outlives_a_failed_look_but_not_its_bank(registry: Registry, monkeypatch: Any) -> None:
    class Failing(ReasoningBank):
        fails = True

        def reload_if_changed(self) -> bool:
            if self.fails:
                raise RuntimeError("for once")
            return super().reload_if_changed()

    banks, reported = [Failing.load(registry.path / "champion")], []
    monkeypatch.setattr("rb_gpu.watcher.log.exception", reported.append)
    banks[0].watch(0.02)
    assert wait_for(lambda: len(reported) > 1)
    Failing.fails = False
    registry.promote(B, "")
    assert wait_for(lambda: banks[0].version == B)
    watcher = next(thread for thread in threading.enumerate() if thread.name == "rb_gpu watcher")
    banks.clear()
    gc.collect()
    watcher.join(5)
    assert not watcher.is_alive()


def test_close_waits_for_a_look_in_progress(registry: Registry, monkeypatch: Any) -> None:
    bank = ReasoningBank.load(registry.path / "champion")
    begun, ended = threading.Event(), threading.Event()

    def slow() -> bool:
        begun.set()
        time.sleep(0.1)
        ended.set()
        return False

    monkeypatch.setattr(bank._source, "changed", slow)
    bank.watch(0.01)
    assert begun.wait(10)
    bank.close()
    assert ended.is_set()


def test_a_file_system_that_hangs_does_not_keep_a_bank_open(
    registry: Registry, tmp_path: Path, monkeypatch: Any
) -> None:
    # regression: close waited for a check that hung in stat, and only then closed the log
    bank = ReasoningBank.load(registry.path / "champion", log=tmp_path / "log.sqlite")
    hangs, recovers = threading.Event(), threading.Event()

    def stat() -> bool:
        hangs.set()
        return not recovers.wait(60)

    monkeypatch.setattr(bank._source, "changed", stat)
    monkeypatch.setattr("rb_gpu.watcher.STOP_S", 0.1)
    bank.watch(0.02)
    assert hangs.wait(10)
    closing = threading.Thread(target=bank.close, daemon=True)
    closing.start()
    closing.join(20)
    closed = not closing.is_alive()
    recovers.set()
    assert closed and bank._watcher is None
    closing.join()


# Threads and processes


def test_every_lookup_of_every_thread_is_counted(bank: ReasoningBank) -> None:
    query = queries_near(bank.data, 2)[1]

    def look_up() -> None:
        for _ in range(500):
            bank.optimized_params(query)

    threads = [threading.Thread(target=look_up) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = bank.stats()
    assert stats.total_lookups == 4000
    assert stats.avg_recommendation_confidence == pytest.approx(bank.optimized_params(query).confidence)


def test_counts_of_ended_threads_do_not_pile_up(bank: ReasoningBank) -> None:
    # regression: every thread that ever asked left a list: 10 MB after 60,000, and stats() took 7 ms
    query = queries_near(bank.data, 2)[1]
    for _ in range(300):
        thread = threading.Thread(target=bank.optimized_params, args=(query,))
        thread.start()
        thread.join()
    assert bank.stats().total_lookups == 300
    assert len(bank._counts._threads) < 5


def _ask(bank: ReasoningBank, query: np.ndarray, out: Any) -> None:
    bank.record_trajectory(trajectory(9, query, feedback=UserFeedback(5)))
    out.put((bank.optimized_params(query), bank.stats().total_feedback))


def _load_and_ask(path: str, query: np.ndarray, out: Any) -> None:
    _ask(ReasoningBank.load(path), query, out)


def test_forked_children_answer_though_threads_held_locks(registry: Registry) -> None:
    bank = ReasoningBank.load(registry.path / "champion")
    bank.watch(0.05)
    query = bank.data.arrays["centroids"][0]
    expected = bank.optimized_params(query)
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    # as if other threads held the locks
    with bank._lock, bank._reloading, bank._state.ratings.lock, bank._counts.lock:
        child = context.Process(target=_ask, args=(bank, query, out))
        child.start()
    assert out.get(timeout=20) == (expected, 1)
    child.join(20)
    assert child.exitcode == 0


def _follow(bank: ReasoningBank, ready: Any, out: Any) -> None:
    ready.set()
    wait_for(lambda: bank.version == B)
    out.put(bank.version)


def test_a_forked_child_goes_on_watching(registry: Registry) -> None:
    bank = ReasoningBank.load(registry.path / "champion")
    bank.watch(0.05)
    context = multiprocessing.get_context("fork")
    out, ready = context.Queue(), context.Event()
    child = context.Process(target=_follow, args=(bank, ready, out))
    child.start()
    ready.wait(20)
    registry.promote(B, "")
    assert out.get(timeout=20) == B
    child.join(20)


def test_spawned_children_answer_alike(registry: Registry) -> None:
    bank = ReasoningBank.load(registry.path / "champion")
    query = bank.data.arrays["centroids"][0]
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    child = context.Process(target=_load_and_ask, args=(str(registry.path / "champion"), query, out))
    child.start()
    assert out.get(timeout=60)[0] == bank.optimized_params(query)
    child.join(20)


# Mapped files


def test_a_bank_is_searched_in_the_mapped_file(tmp_path: Path) -> None:
    write_artifact(tmp_path / "v", make_bank(400, 3, 64), {})
    bank = ReasoningBank.load(tmp_path / "v")
    for array in bank.data.arrays.values():
        assert not array.flags.owndata and not array.flags.writeable
    assert np.shares_memory(bank._state.search._unit_PD, bank.data.arrays["centroids"])  # type: ignore[attr-defined]
    with Path("/proc/self/maps").open() as maps:
        assert any(str((tmp_path / "v" / "bank.safetensors").resolve()) in line for line in maps)


names = st.text("abcdefgh_0123456789", min_size=1, max_size=6)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
dtypes = st.sampled_from(["float64", "float32", "float16", "int64", "int32", "uint8", "uint64", "bool"])


tables = st.dictionaries(names, st.tuples(dtypes, shapes), max_size=6)


def arrays_of(kinds: dict[str, Any]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.random(shape) * 100).astype(dtype) for name, (dtype, shape) in kinds.items()}


@settings(max_examples=60, deadline=None)
@given(tables)
def test_what_safetensors_writes_is_mapped_as_it_reads_it(kinds: dict[str, Any]) -> None:
    arrays = arrays_of(kinds)
    content = save(arrays)
    found = map_tensors(content)
    expected = load(content)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


@settings(max_examples=60, deadline=None)
@given(tables)
def test_safetensors_reads_what_is_written_for_the_map(kinds: dict[str, Any]) -> None:
    arrays = arrays_of(kinds)
    content = tensors_content(arrays)
    assert content == tensors_content(dict(reversed(arrays.items())))
    for found in (load(content), map_tensors(content)):
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array, strict=True)


@pytest.mark.parametrize("configs", range(1, 9))
def test_leaves_begin_at_a_cache_line_of_the_map(configs: int, tmp_path: Path) -> None:
    # regression: products with leaves that are not aligned took a fifth longer
    write_artifact(tmp_path / "v", make_bank(7, configs, 48), {})
    bank = ReasoningBank.load(tmp_path / "v")
    assert bank._state.search._unit_PD.ctypes.data % 64 == 0  # type: ignore[attr-defined]


def test_an_array_that_safetensors_has_no_name_for_is_refused() -> None:
    with pytest.raises(ValueError, match="array a is of complex64"):
        tensors_content({"a": np.zeros(2, np.complex64)})


def _file(header: bytes, body: bytes = bytes(64)) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "longer than the file"),
        ((2**62).to_bytes(8, "little") + b"{}", "longer than the file"),
        (_file(b"[]   "), "not an object"),
        (_file(b"{nope}  "), "not JSON"),
        (_file(b"[" * 100_000), "not JSON"),
        (_file(b"{}      "), "longer than its arrays"),
        (_file(b'{"a":{"dtype":"F64","shape":[9],"data_offsets":[0,72]}}'), "not where"),
        (_file(b'{"a":{"dtype":"F64","shape":[4611686018427387904,4],"data_offsets":[0,64]}}'), "not where"),
        (_file(b'{"a":{"dtype":"F64","shape":[8],"data_offsets":[0,56]}}'), "not where"),
        (_file(b'{"a":{"dtype":"F64","shape":[-8],"data_offsets":[0,64]}}'), "damaged"),
        (_file(b'{"a":{"dtype":"F64","shape":[8.0],"data_offsets":[0,64]}}'), "damaged"),
        (_file(b'{"a":{"dtype":"O64","shape":[8],"data_offsets":[0,64]}}'), "damaged"),
        (_file(b'{"a":{"dtype":"F64","shape":[8],"data_offsets":[8,72]}}'), "not where"),
        (_file(b'{"a":{"dtype":"F64","shape":[8],"data_offsets":[0,64,1]}}'), "damaged"),
        (_file(b'{"a":{"dtype":"F64","shape":[NaN],"data_offsets":[0,64]}}'), "not JSON"),
        (_file(b'{"a":3}'), "damaged"),
        (
            _file(
                b'{"a":{"dtype":"U8","shape":[64],"data_offsets":[0,64]},'
                b'"b":{"dtype":"U8","shape":[32],"data_offsets":[32,64]}}'
            ),
            "not where",
        ),
        (_file(b'{"a":{"dtype":"F64","shape":[8],"data_offsets":[0,64]}}   '), "aligned"),
    ],
)
def test_a_header_that_lies_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        map_tensors(content)
