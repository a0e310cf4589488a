"""Hostile artifacts, and reloads under load; `fuzz_artifacts` and `soak_reload` define what counts as a failure."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("faiss")
pytest.importorskip("torch")
if not Path("/proc/self/clear_refs").exists():
    pytest.skip("memory is measured by Linux's /proc", allow_module_level=True)

import fuzz_answers
import soak_reload
from fuzz_artifacts import Found, Fuzzer
from fuzz_files import INDEX, Mutant, bases
from fuzz_index import fields_of, mislead
from fuzz_mutations import MUTATIONS

from rb_gpu import ReasoningBank

MUTANTS = 1500
NULL = int.from_bytes(b"null", "little")


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: Any) -> Fuzzer:
    folder = tmp_path_factory.mktemp("fuzz")
    return Fuzzer(bases(folder / "bases"), folder, seed=2)


def test_mutated_artifacts_are_refused_or_answer_right(fuzzer: Fuzzer) -> None:
    found = fuzzer.run(range(MUTANTS), jobs=2)
    assert found.bugs == {}
    assert sum(found.verdicts.values()) == MUTANTS
    # every mutation was tried, and both refused and loaded mutants occur
    assert {kind for kind, _ in found.verdicts} == set(MUTATIONS)
    for verdict in ("refused", "loaded"):
        assert sum(found.verdicts[kind, verdict] for kind in MUTATIONS) > MUTANTS / 10


def field(name: str, value: int) -> Any:
    def change(_rng: Any, content: bytes) -> bytes:
        start, width = fields_of(content)[name][0]
        return content[:start] + (value % 2 ** (8 * width)).to_bytes(width, "little") + content[start + width :]

    return change


# by case: the kind of index, and the change; Faiss checks most of an index when it reads it, but not these fields
FIELDS = {
    "hnsw misled": ("hnsw", lambda rng, content: mislead(rng, content, 28)[0]),
    "cagra misled": ("cagra", lambda rng, content: mislead(rng, content, 32)[0]),
} | {
    f"{kind} {name} {value}": (kind, field(name, value))
    for kind, name, values in [
        ("hnsw", "entry_point", [-1]),
        ("hnsw", "max_level", [3]),
        ("hnsw", "ef_search", [0, -1, 2**24, 2**28, 2**31 - 1]),
        ("hnsw", "storage code", [NULL]),
        ("hnsw", "neighbors size", [2**24]),
        ("hnsw", "storage vectors", [0x7FC00000]),
        ("flat", "code", [NULL]),
        ("flat", "vectors size", [2**24]),
        ("flat", "vectors", [0x7F800000]),
        ("ivf", "nprobe", [0, -1, 2**62]),
        ("ivf", "lists nlist", [2**24]),
        ("ivf", "list length", [2**24]),
        ("cagra", "base only", [1, 255]),
        ("cagra", "entries", [0, 2**31 - 1]),
        ("cagra", "numeric type", [1]),
    ]
    for value in values
}


def test_no_field_of_an_index_ends_the_process(fuzzer: Fuzzer, monkeypatch: Any) -> None:
    names = [name for name in FIELDS for _ in range(10)]

    def mutant(bases: list[Mutant], seed: int, index: int) -> Mutant:
        kind, change = FIELDS[names[index]]
        base = next(each for each in bases if each.base == kind)
        one = Mutant(kind, dict(base.files), names[index])
        one.forge(INDEX, change(np.random.default_rng([seed, index]), one.content(INDEX)))
        return one

    monkeypatch.setattr("fuzz_artifacts.mutant", mutant)
    monkeypatch.setattr("fuzz_artifacts.kind_of", lambda _, index: (names[index], None))
    found = fuzzer.run(range(len(names)))
    assert found.bugs == {}
    assert sum(found.verdicts.values()) == len(names)


# Tests of the fuzzer itself: each plants a loader that is wrong in one way


def bugs(found: Found) -> str:
    return "\n".join(what for _, what in found.bugs)


def test_a_loader_that_skips_the_hash_is_caught(fuzzer: Fuzzer, monkeypatch: Any) -> None:
    class Same:
        def __eq__(self, other: object) -> bool:
            return True

        def __ne__(self, other: object) -> bool:
            return False

        __hash__ = None  # type: ignore[assignment]

    class Hash:
        def update(self, content: bytes) -> None: ...

        def hexdigest(self) -> Same:
            return Same()

    monkeypatch.setattr(hashlib, "sha256", lambda *_args, **_options: Hash())
    found = fuzzer.run(range(300), kinds=frozenset({"bits"}))
    assert "which the manifest does not vouch for" in bugs(found)


def test_a_loader_that_checks_no_reference_is_caught(fuzzer: Fuzzer, monkeypatch: Any) -> None:
    monkeypatch.setattr("rb_gpu.bank_data._check_references", lambda *_: None)
    found = fuzzer.run(range(400), kinds=frozenset({"values"}))
    assert any(kind == "values" for kind, _ in found.bugs)


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (lambda: os.kill(os.getpid(), 11), "killed by SIGSEGV"),
        (lambda: os._exit(3), "exit status 3"),
        (lambda: np.ones(2**23), "memory: more than"),
        (lambda: np.ones(2**28), "for want of memory"),
        (lambda: int("x"), "ValueError"),
        (lambda: [None for _ in iter(lambda: time.process_time() < 1e9, False)], "hang"),
        (lambda: time.sleep(60), "blocked"),
    ],
    ids=["crash", "exit", "memory", "too much memory", "exception", "hang", "wait"],
)
def test_a_loader_that_misbehaves_is_caught(fuzzer: Fuzzer, monkeypatch: Any, plant: Any, told: str) -> None:
    load = ReasoningBank.load
    fuzzer = replace(fuzzer, bases=fuzzer.bases[:1])  # every worker warms up with all of its bases

    def planted(path: Path, **options: Any) -> ReasoningBank:
        if (path / "plant").exists():
            plant()
        return load(path, **options)

    def wrong(_seed: int, index: int) -> tuple[str, str]:
        return "planted", str(index)

    def mutant(bases: list[Mutant], _seed: int, index: int) -> Mutant:
        files = {**bases[0].files, **({"plant": b""} if index == 2 else {})}
        return Mutant("off", files, "planted")

    monkeypatch.setattr(fuzz_answers.ReasoningBank, "load", planted)
    monkeypatch.setattr("fuzz_artifacts.mutant", mutant)
    monkeypatch.setattr("fuzz_artifacts.kind_of", wrong)
    monkeypatch.setattr("fuzz_artifacts.MAX_SECONDS", 0.3)
    # on a busy machine a process may not get 0.3 s of CPU within 2 s
    monkeypatch.setattr("fuzz_artifacts.WAIT_SECONDS", 2.0 if told == "blocked" else 60.0)
    found = fuzzer.run(range(4))
    assert [indices for (_, what), indices in found.bugs.items() if told in what] == [[2]]
    assert found.verdicts == {("planted", "loaded"): 3, ("planted", "BUG"): 1}


def test_a_champion_switched_under_load_is_served_whole() -> None:
    soak = soak_reload.run(seconds=4, reloads=80, threads=4, leaves=40, dim=16)
    assert soak.wrong == []
    assert soak.reloaded == 72 and soak.kept == 8
    assert min(soak.answers.values()) > 0


def test_a_reload_in_two_halves_is_caught(monkeypatch: Any) -> None:
    # returns the parameters of one artifact with the pattern id of another, as a bank would that swaps its state in
    # parts
    answer = ReasoningBank.optimized_params
    before: list[Any] = []

    def torn(self: ReasoningBank, query: np.ndarray) -> Any:
        one = answer(self, query)
        if threading.current_thread() is threading.main_thread():  # the main thread computes the right answers
            return one
        before.append(one)
        other = next((each for each in reversed(before) if each.params.model_tier[0] != one.params.model_tier[0]), one)
        return one._replace(params=other.params)

    monkeypatch.setattr(ReasoningBank, "optimized_params", torn)
    assert soak_reload.run(seconds=0.4, reloads=4, threads=1, leaves=12, dim=8).wrong
