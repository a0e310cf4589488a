"""Which version a training starts from, and which ids are free."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import A, B, make_bank

from rb_gpu.errors import ArtifactError, ConfigError, RegistryError
from rb_gpu.learn.config import DataConfig, TrainConfig
from rb_gpu.learn.parent import find_parent, free_pattern_id
from rb_gpu.learn.version_config import RetrainConfig
from rb_gpu.publish import write_artifact
from rb_gpu.registry import Registry

BANK = make_bank()
NONE_SERVED = "29990101T000000-000000"


def settings(parent: str, embedder: str = "none") -> TrainConfig:
    return TrainConfig(data=DataConfig(embedder=embedder), train=RetrainConfig(parent))


def test_a_first_training_has_no_parent(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "artifacts")
    assert find_parent(registry, settings("champion"), BANK.dim) is None
    assert free_pattern_id(registry) == 0
    with pytest.raises(RegistryError, match=NONE_SERVED):
        find_parent(registry, settings(NONE_SERVED), BANK.dim)


def test_the_parent_is_what_is_served_or_what_is_named(registry: Registry) -> None:
    assert find_parent(registry, settings("champion"), BANK.dim).facts["version"] == A
    assert find_parent(registry, settings(B), BANK.dim).facts["version"] == B
    assert find_parent(registry, settings("none"), BANK.dim) is None


def test_an_unlike_champion_is_left_with_a_warning_and_an_unlike_version_is_an_error(registry, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        assert find_parent(registry, settings("champion", "e5"), BANK.dim + 1) is None
    assert "its embedder is none, not e5; it is ignored" in caplog.text and f"its dim is {BANK.dim}, not" in caplog.text
    with pytest.raises(ConfigError, match=f"^train.parent={B} does not fit: its embedder is none, not e5; "):
        find_parent(registry, settings(B, "e5"), BANK.dim)


def test_a_damaged_champion_is_left_with_a_warning_and_a_damaged_version_is_an_error(registry, caplog) -> None:
    for version in (A, B):
        path = registry.path / version / "bank.safetensors"
        content = path.read_bytes()
        path.chmod(0o644)
        path.write_bytes(content[:-1])
    with caplog.at_level(logging.WARNING):
        assert find_parent(registry, settings("champion"), BANK.dim) is None
    assert "train.parent=champion cannot be read (" in caplog.text
    with pytest.raises(ArtifactError, match=B):
        find_parent(registry, settings(B), BANK.dim)


def test_no_id_is_free_that_any_version_has_had(registry: Registry) -> None:
    # a candidate that waits for a person to promote it: the ids that it assigned are taken too
    version = "20260103T000000-000003"
    born = replace(BANK, facts=BANK.facts | {"next_pattern_id": 9000})
    assert born.next_pattern_id == 9000
    write_artifact(registry.path / version, born, {})
    assert free_pattern_id(registry) == 9000
    # manifests of older versions have only counts; one that cannot be read is skipped
    (registry.path / version / "manifest.json").chmod(0o644)
    (registry.path / version / "manifest.json").write_text("{")
    path = registry.path / A / "manifest.json"
    manifest = json.loads(path.read_text())
    path.chmod(0o644)
    path.write_text(json.dumps(manifest | {"counts": {"levels": [30, 9, 2]}}))
    assert free_pattern_id(registry) == 41


@pytest.mark.parametrize("bad", [-1, 2**63, 1.5, "7", True, None])
def test_a_next_id_that_is_none_is_refused(tmp_path: Path, bad: object) -> None:
    with pytest.raises(ArtifactError, match="next_pattern_id"):
        write_artifact(tmp_path / A, replace(BANK, facts=BANK.facts | {"next_pattern_id": bad}), {})
