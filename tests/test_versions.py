"""Two versions compared, and the tree of one, on banks with planted differences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import A, B, make_bank

from jobs.registry import run
from jobs.versions import difference, listing, tree
from rb_gpu.artifact import load_artifact
from rb_gpu.bank_data import BankData
from rb_gpu.errors import ConfigError, RegistryError
from rb_gpu.learn.comparison import STANDS, compare
from rb_gpu.learn.job_config import RegistryJobConfig
from rb_gpu.learn.version_config import RegistryConfig
from rb_gpu.publish import write_artifact
from rb_gpu.registry import Registry


def version(data: BankData, name: str, lineage: dict[str, Any] | None = None, **judge: Any) -> BankData:
    config = {"seed": 0, "judge": {"method": "eb", "min_probability": 0.8} | judge, "params": {"default": {}}}
    facts = {"version": name, "config": config, "lineage": lineage, "parent": (lineage or {}).get("parent")}
    return replace(data, facts=data.facts | facts)


@pytest.fixture
def banks() -> tuple[BankData, BankData]:
    """The second bank has pattern 900 in place of 103, the default on one leaf that had a verdict, and another
    probability.
    """
    before = make_bank(seed=1)
    arrays = {name: array.copy() for name, array in before.arrays.items()}
    acts = int(np.flatnonzero((arrays["verdict_stands"] == 0) & (arrays["pattern_id"][:12] != 103))[0])
    arrays["pattern_id"][arrays["pattern_id"] == 103] = 900
    arrays["verdict_stands"][acts], arrays["verdict_config"][acts] = 1, before.default
    counts = {"kept": 15, "split": 1, "merged": 0, "born": 0, "retired": 1}
    after = version(replace(before, arrays=arrays), B, {"parent": A, "counts": counts}, min_probability=0.7)
    return version(before, A), replace(after, facts=after.facts | {"acts": acts})


def test_what_was_planted_is_all_that_is_found(banks: tuple[BankData, BankData]) -> None:
    before, after = banks
    found = compare(before, after)
    assert (found.gone, found.new, len(found.kept)) == ([103], [900], len(before.arrays["pattern_id"]) - 1)
    assert found.leaves_kept == 11 and found.configs_gone == found.configs_new == []
    assert found.settings == [("judge.min_probability", "0.8", "0.7")]
    (changed,) = found.verdicts
    acts = after.facts["acts"]
    assert changed.pattern_id == before.arrays["pattern_id"][acts] and changed.config[1] == STANDS
    assert changed.gain[0] == pytest.approx(float(before.arrays["verdict_effect"][acts]), nan_ok=True)
    assert np.isnan(changed.gain[1])
    assert found.fates == {"kept": 15, "split": 1, "merged": 0, "born": 0, "retired": 1}
    # in the reverse direction the lineage says nothing
    assert compare(after, before).fates is None and compare(before, before).verdicts == []


def test_configs_are_told_apart_by_all_that_either_varies(banks: tuple[BankData, BankData]) -> None:
    before, after = banks
    arrays = after.arrays | {"config_n_probes": after.arrays["config_n_probes"] + np.uint32(1)}
    found = compare(before, replace(after, arrays=arrays))
    assert len(found.configs_new) == len(after.configs) and len(set(found.configs_new) & set(found.configs_gone)) == 0
    assert found.default[0] in found.configs_gone and found.default[1] in found.configs_new


def test_a_terminal_shows_both_sides(banks: tuple[BankData, BankData]) -> None:
    before, after = banks
    shown = difference(before, after)
    assert A in shown.splitlines()[0] and B in shown.splitlines()[0]
    assert "15 kept, 1 gone, 1 new; by lineage 15 kept, 1 split" in shown
    assert "of 11 leaves in both versions, 1 have a different verdict" in shown
    assert shown.endswith("judge.min_probability     0.8    0.7")


def test_a_version_does_not_differ_from_itself(banks: tuple[BankData, BankData]) -> None:
    shown = difference(banks[0], banks[0])
    assert "no setting differs" in shown and "both have the same configs" in shown and "0 gone, 0 new" in shown


def test_the_tree_shows_every_pattern_once_below_its_parent(banks: tuple[BankData, BankData]) -> None:
    data = banks[0]
    lines = tree(data).splitlines()[1:]
    depth = [len(line) - len(line.lstrip("│├└─ ")) for line in lines]
    ids = [int(line.lstrip("│├└─ ").split()[0]) for line in lines]
    assert sorted(ids) == sorted(data.arrays["pattern_id"].tolist())
    row_of = {int(one): row for row, one in enumerate(data.arrays["pattern_id"])}
    for place, one in enumerate(ids):
        parent = int(data.arrays["parent"][row_of[one]])
        above = [ids[i] for i in range(place) if depth[i] == depth[place] - 3]
        assert (parent < 0) == (depth[place] == 0)
        assert parent < 0 or above[-1] == data.arrays["pattern_id"][parent]


def test_the_job_finds_the_parent_by_itself(banks, tmp_path, capsys) -> None:
    registry = Registry(tmp_path / "artifacts")
    for name, data in zip((A, B), banks, strict=True):
        write_artifact(registry.path / name, data, {})
    registry.promote(B, "")
    where = RegistryConfig(path=str(registry.path))
    assert run(RegistryJobConfig(action="diff", registry=where)) == 0
    alone = capsys.readouterr().out
    assert run(RegistryJobConfig(action="diff", version=B, other=A, registry=where)) == 0
    assert capsys.readouterr().out == alone and "by lineage" in alone
    with pytest.raises(RegistryError, match=f"version={A} has no parent"):
        run(RegistryJobConfig(action="diff", version=A, registry=where))
    assert run(RegistryJobConfig(action="tree", registry=where)) == 0
    assert capsys.readouterr().out.rstrip("\n") == tree(load_artifact(registry.path / B)[0])
    with pytest.raises(ConfigError, match="other"):
        RegistryJobConfig(action="list", other=A)


def test_who_promotes_another_embedder_by_hand_is_told(
    registry: Registry, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    # regression: a service that reloads it kept sending the old embedder's queries, and nobody was warned
    settings = RegistryConfig(str(registry.path))
    run(RegistryJobConfig(action="promote", version=B, registry=settings))
    assert not caplog.records
    other = "20260103T000000-00000c"
    write_artifact(registry.path / other, replace(make_bank(), embedder="e5"), {})
    run(RegistryJobConfig(action="promote", version=other, registry=settings))
    assert "its embedder is e5, not none as in the served version" in caplog.text
    assert capsys.readouterr().out.endswith(f"serving {other}\n")


def test_a_champion_that_is_gone_is_told(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    # regression: the list looked as if nothing was served
    settings = RegistryConfig(str(registry.path))
    run(RegistryJobConfig(registry=settings))
    assert "does not exist" not in capsys.readouterr().out
    (registry.path / A).rename(registry.path / "away")
    run(RegistryJobConfig(registry=settings))
    assert f"champion points to {A}, which does not exist" in capsys.readouterr().out


def test_the_list_says_what_the_gate_said(tmp_path: Path) -> None:
    # regression: after a night without a promotion the list showed the new version's gain, and not that it was refused
    registry, data = Registry(tmp_path), make_bank()
    for version, gate in zip((A, B), ({"promote": True}, {"promote": False}), strict=True):
        write_artifact(registry.path / version, replace(data, facts=data.facts | {"gate": gate}), {})
    head, first, second = listing(registry).splitlines()[:3]
    assert (head.split()[-1], first.split()[-1], second.split()[-1]) == ("gate", "promotes", "refuses")


def test_a_mistyped_path_makes_no_registry(tmp_path: Path) -> None:
    # regression: promote and rollback created the folder before they reported that it holds no version
    settings = RegistryConfig(str(tmp_path / "artefacts"))
    for action, named in (("promote", A), ("rollback", None)):
        with pytest.raises(RegistryError, match=r"registry\.path=.*artefacts is not a folder"):
            run(RegistryJobConfig(action, named, registry=settings))
    assert not (tmp_path / "artefacts").exists()


@pytest.mark.parametrize("action", ["list", "rollback"])
def test_a_version_that_an_action_would_not_read_is_refused(action: str) -> None:
    # regression: action=rollback version=X served the previous version, whatever X is
    with pytest.raises(ConfigError, match=f"version={A} is not for action={action}"):
        RegistryJobConfig(action, A)
