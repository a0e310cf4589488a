"""Export and import: the same bank again, bit by bit, or an ArtifactError."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fuzz_exports
import jsonschema
import numpy as np
import pytest
from conftest import queries_near

import rb_gpu
from rb_gpu.bank import ReasoningBank
from rb_gpu.bank_data import ARRAYS, BankData
from rb_gpu.errors import ArtifactError


@pytest.fixture(scope="module")
def exported(data: BankData, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("export") / "patterns.json"
    ReasoningBank(data).export(path)
    return path.read_text()


@pytest.mark.parametrize("which", ["made", "learned"])
def test_the_bank_comes_back_bit_by_bit(data: BankData, which: str, request: Any, tmp_path: Path) -> None:
    bank = ReasoningBank(data) if which == "made" else request.getfixturevalue("learned").bank.bank()
    bank.export(tmp_path / "patterns.json")
    again = ReasoningBank.from_export(tmp_path / "patterns.json")
    assert any(np.isnan(array).any() for array in bank.data.arrays.values() if array.dtype.kind == "f")
    for name, array in bank.data.arrays.items():
        np.testing.assert_array_equal(again.data.arrays[name], array, err_msg=name, strict=True)
        assert np.signbit(array[array == 0]).tolist() == np.signbit(again.data.arrays[name][array == 0]).tolist()
    assert replace(again.data, arrays={}, facts={}) == replace(bank.data, arrays={}, facts={})
    queries = queries_near(bank.data, 100)
    answers, same = bank.optimized_params_batch(queries), again.optimized_params_batch(queries)
    for name, column in answers.items():
        np.testing.assert_array_equal(same[name], column, err_msg=name)
    assert again.optimized_params(queries[0], 0.3) == bank.optimized_params(queries[0], 0.3)
    assert again.next_pattern_id == bank.next_pattern_id
    assert again.stats().total_trajectories == bank.stats().total_trajectories > 0


SCHEMA = json.loads((Path(rb_gpu.__file__).parent / "export.schema.json").read_text())


def schema_errors(document: Any) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(document)]


@pytest.mark.parametrize("which", ["made", "learned"])
def test_every_export_fits_the_published_schema(data: BankData, which: str, request: Any, tmp_path: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    found = data if which == "made" else request.getfixturevalue("learned").bank.data
    arrays = found.arrays | {"verdict_effect_low": found.arrays["verdict_effect_low"].copy()}
    arrays["verdict_effect_low"][:3] = -np.inf, np.inf, np.nan
    ReasoningBank(replace(found, arrays=arrays)).export(tmp_path / "x.json")
    document = json.loads((tmp_path / "x.json").read_text())
    assert schema_errors(document) == []
    # the schema describes every field: none may be left out, and none added
    for key in document:
        assert schema_errors({name: value for name, value in document.items() if name != key})
    for section in ("patterns", "verdicts", "configs"):
        assert schema_errors(document | {section: [document[section][0] | {"more": 1}]})
    assert ("field_coef" in document["cells"]) == (found.field is not None)


# what no schema can express: that two lengths agree, or that an index exists
BEYOND_SCHEMA = {
    "a pattern too many", "a centroid is short", "every centroid is short", "cells are ragged",
    "an id is free and given", "default is outside", "dim is another", "parent is itself",
}  # fmt: skip


def test_an_endless_interval_comes_back(data: BankData, tmp_path: Path) -> None:
    # regression: with a floor whose default was never tried, intervals are infinite, and the export was refused as no
    # JSON
    arrays = {name: array.copy() for name, array in data.arrays.items()}
    arrays["verdict_effect_low"][:3] = -np.inf, np.inf, np.nan
    ReasoningBank(replace(data, arrays=arrays)).export(tmp_path / "x.json")
    again = ReasoningBank.from_export(tmp_path / "x.json").data.arrays["verdict_effect_low"]
    np.testing.assert_array_equal(again, arrays["verdict_effect_low"], strict=True)
    assert "Infinity" not in (tmp_path / "x.json").read_text()  # no JSON parser but Python's reads that


def test_a_learned_floor_without_default_is_exported(learned: SimpleNamespace, tmp_path: Path) -> None:
    from rb_gpu.learn import learn
    from rb_gpu.learn.config import JudgeConfig

    other = learned.trajectories.config_id != learned.trajectories.configs.default
    queries = np.zeros(len(learned.trajectories.query_id), bool)
    queries[learned.trajectories.query_row[other]] = True
    judge = JudgeConfig(objective="floor", target=0.7)
    bank = learn(learned.trajectories.select_queries(queries), replace(learned.config, judge=judge)).bank()
    assert np.isinf(bank.data.arrays["verdict_effect_low"]).any()
    bank.export(tmp_path / "x.json")
    ReasoningBank.from_export(tmp_path / "x.json")


def test_the_same_bank_gives_the_same_bytes(data: BankData, exported: str, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(exported)
    ReasoningBank.from_export(tmp_path / "one.json").export(tmp_path / "two.json")
    ReasoningBank(data).export(tmp_path / "three.json")
    assert (tmp_path / "three.json").read_text() == exported
    # facts such as index.kind belong to the artifact; what the export has is exported again
    assert (tmp_path / "two.json").read_text() == exported


def test_threads_that_export_to_one_path_do_not_meet(data: BankData, exported: str, tmp_path: Path) -> None:
    # regression: they shared a temporary file, which the first renamed under the others: FileNotFoundError
    bank = ReasoningBank(data)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(bank.export, tmp_path / "bank.json") for _ in range(24)]:
            done.result()
    assert (tmp_path / "bank.json").read_text() == exported
    assert [path.name for path in tmp_path.iterdir()] == ["bank.json"]


def test_a_retired_id_is_never_given_again_after_an_import(data: BankData, tmp_path: Path) -> None:
    """Regression: the export lacked the next id, so that an import continued from the largest id that
    was still there.
    """
    ReasoningBank(replace(data, facts={**data.facts, "next_pattern_id": 500})).export(tmp_path / "bank.json")
    assert ReasoningBank.from_export(tmp_path / "bank.json").next_pattern_id == 500
    document = json.loads((tmp_path / "bank.json").read_text())
    for wrong in (-1, 1.5, "many", None):
        refused(tmp_path / "bank.json", json.dumps(document | {"next_pattern_id": wrong}), "next_pattern_id")


def test_it_reads_as_what_it_says(data: BankData, exported: str) -> None:
    document = json.loads(exported)
    assert (document["format"], document["format_version"]) == ("rb_gpu.bank", 5)
    assert len(document["patterns"]) == 16 and len(document["verdicts"]) == 12 and len(document["configs"]) == 5
    pattern = ReasoningBank(data).patterns[document["patterns"][3]["id"]]
    assert document["patterns"][3]["support_count"] == pattern.support_count
    assert document["patterns"][3]["centroid"] == pattern.centroid.tolist()


def test_a_failing_disk_keeps_the_old_export(data: BankData, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "patterns.json"
    path.write_text("old")

    def replace_(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", replace_)
    with pytest.raises(OSError, match="No space left"):
        ReasoningBank(data).export(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def refused(path: Path, content: str | bytes, reason: str) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ArtifactError, match=reason):
        ReasoningBank.from_export(path)


@pytest.mark.parametrize("version", [0, 1, 2, 3, 4, 6, None, "5"])
def test_other_versions_are_refused(exported: str, tmp_path: Path, version: Any) -> None:
    document = json.loads(exported) | {"format_version": version}
    refused(tmp_path / "x.json", json.dumps(document), "format_version")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"format": "other"}', b"\xff\xfe", b"[" * 200_000, b"3", b'"rb_gpu.bank"']
)
def test_what_is_no_export_is_refused(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path / "x.json", content, r"x\.json")


def test_a_missing_export_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(ArtifactError, match="cannot be read"):
            ReasoningBank.from_export(path)


def test_every_cut_is_refused(exported: str, tmp_path: Path) -> None:
    for size in np.random.default_rng(0).integers(0, len(exported.rstrip()) - 1, size=20):
        refused(tmp_path / "x.json", exported[:size], r"x\.json")


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no patterns": lambda d: d.pop("patterns"),
    "patterns are a number": lambda d: d.update(patterns=3),
    "patterns are empty": lambda d: d.update(patterns=[]),
    "a pattern is null": lambda d: d["patterns"].insert(0, None),
    "a pattern too many": lambda d: d["patterns"].append(d["patterns"][0]),
    "a field is missing": lambda d: d["patterns"][0].pop("quality"),
    "a quality is text": lambda d: d["patterns"][0].update(quality="good"),
    "a quality is null": lambda d: d["patterns"][0].update(quality=None),
    "a quality is a list": lambda d: d["patterns"][0].update(quality=[1]),
    "a count is null": lambda d: d["patterns"][0].update(support_count=None),
    "a count is a fraction": lambda d: d["patterns"][0].update(support_count=1.5),
    "a count is text": lambda d: [p.update(support_count="7") for p in d["patterns"]],
    "a count is true": lambda d: [p.update(support_count=True) for p in d["patterns"]],
    "a count is negative": lambda d: d["configs"][0].update(ef_search=-1),
    "a count is huge": lambda d: d["configs"][0].update(ef_search=2**40),
    "an id is huge": lambda d: d["patterns"][0].update(id=10**30),
    "a temperature overflows": lambda d: d["configs"][0].update(temperature=1e300),
    "a centroid is short": lambda d: d["patterns"][0]["centroid"].pop(),
    "every centroid is short": lambda d: [p["centroid"].pop() for p in d["patterns"]],
    "cells are a list": lambda d: d.update(cells=[]),
    "cells lack one": lambda d: d["cells"].pop("score"),
    "cells are ragged": lambda d: d["cells"]["score"][0].pop(),
    "a cell is infinite": lambda d: d["cells"]["score"][0].__setitem__(0, "inf"),
    "a cell is true": lambda d: d["cells"]["score"][0].__setitem__(0, True),
    "a cell is a number in a text": lambda d: d["cells"]["score"][0].__setitem__(0, "0.5"),
    "tiers are text": lambda d: d.update(tiers="ab"),
    "tiers are numbers": lambda d: d.update(tiers=[1, 2]),
    "default is infinite": lambda d: d.update(default_config=float("inf")),
    "default is outside": lambda d: d.update(default_config=17),
    "objective is null": lambda d: d.update(objective=None),
    "objective has another key": lambda d: d["objective"].update(more=1),
    "objective is text": lambda d: d["objective"].update(cost_ref="1"),
    "lookup is incomplete": lambda d: d["lookup"].pop("beta"),
    "counts are a list": lambda d: d.update(counts=[1]),
    "evaluation is text": lambda d: d.update(evaluation="good"),
    "dim is another": lambda d: d.update(dim=3),
    "an id is free and given": lambda d: d.update(next_pattern_id=d["patterns"][0]["id"]),
    "the embedder has no name": lambda d: d.update(embedder=None),
    "a word nobody reads": lambda d: d["patterns"][0].update(supportcount=7),
    "a key nobody reads": lambda d: d.update(next_patern_id=500),
    "cells nobody reads": lambda d: d["cells"].update(scores=d["cells"]["score"]),
    "a quality is a number in a text": lambda d: d["patterns"][0].update(quality="0.5"),
    "a quality is true": lambda d: d["patterns"][0].update(quality=True),
    "parent is itself": lambda d: d["patterns"][0].update(parent=0),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.filterwarnings("error")
def test_damage_is_an_artifact_error(exported: str, tmp_path: Path, damage: Callable[[dict[str, Any]], Any]) -> None:
    # regression: fractions were cut off, text was read as numbers, and a string of tiers was split into its letters
    document = json.loads(exported)
    damage(document)
    refused(tmp_path / "x.json", json.dumps(document), r"x\.json")
    name = next(name for name, one in DAMAGE.items() if one is damage)
    assert bool(schema_errors(json.loads(json.dumps(document)))) == (name not in BEYOND_SCHEMA)


def test_mutated_exports_are_refused_or_right(learned: SimpleNamespace, tmp_path: Path) -> None:
    """Regression: unknown keys, numbers as text and an embedder that is no string were silently accepted."""
    counts, wrong = fuzz_exports.run(300, 1, tmp_path, (learned.bank.bank(),))
    assert wrong == [] and min(counts["refused"], counts["imported"]) > 20


def test_every_array_is_in_it(exported: str) -> None:
    document = json.loads(exported)
    fields = sum(len(document[section][0]) for section in ("patterns", "verdicts", "configs"))
    assert fields + len(document["cells"]) == len(ARRAYS)
