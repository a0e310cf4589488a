"""An interrupted k-means resumes to a bit-identical result, and never from a checkpoint of another problem."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from rb_gpu.learn import lloyd, starts
from rb_gpu.learn.checkpoint import Checkpoint
from rb_gpu.learn.kmeans import kmeans
from rb_gpu.learn.lloyd import Solver


class Killed(BaseException):
    """Stands for a kill by a signal: a BaseException that nothing catches."""


@pytest.fixture
def x() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(40, 6))[rng.integers(40, size=3000)] * 2 + rng.normal(size=(3000, 6))).astype(np.float32)


SETTINGS = {"k": 40, "n_init": 2, "epsilon": 0.0, "seed": 3, "max_iter": 60}


def saves_of(x: np.ndarray, path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int | None) -> int:
    """Runs until the save with number `stop_at` raises Killed; returns the number of saves."""
    real, count = Solver._save, 0

    def save(self, *arguments):
        nonlocal count
        real(self, *arguments)
        count += 1
        if count == stop_at:
            raise Killed

    monkeypatch.setattr(Solver, "_save", save)
    try:
        kmeans(x, checkpoint=Checkpoint(path, 3), **SETTINGS)
    except Killed:
        pass
    finally:
        monkeypatch.setattr(Solver, "_save", real)
    return count


def test_it_goes_on_to_the_same_bits_from_every_save(x, tmp_path, monkeypatch):
    whole = kmeans(x, **SETTINGS)
    path = tmp_path / "kmeans.checkpoint"
    total = saves_of(x, path, monkeypatch, None)
    assert total > 8 and not path.exists(), "a finished run leaves none"
    for stop_at in range(1, total + 1):
        saves_of(x, path, monkeypatch, stop_at)
        assert path.exists()
        resumed = kmeans(x, checkpoint=Checkpoint(path, 3), **SETTINGS)
        assert resumed.centroids.tobytes() == whole.centroids.tobytes(), stop_at
        assert np.array_equal(resumed.labels, whole.labels)
        assert (resumed.inertia, resumed.n_iter) == (whole.inertia, whole.n_iter)
        assert not path.exists()


def test_a_small_run_goes_on_from_every_update_to_no_more_repairs_than_it_has(tmp_path, monkeypatch):
    # regression: a save after the run had ended, or after its repairs were used up, allowed one more repair on resuming
    monkeypatch.setattr(lloyd, "MAX_REPAIRS", 1)
    monkeypatch.setattr(starts, "SMALL_WORK", 0)
    rng = np.random.default_rng(1)
    points = (6 * rng.normal(size=(20, 2))[rng.integers(20, size=400)] + rng.normal(size=(400, 2))).astype(np.float32)
    asked, path, real = {"k": 20, "seed": 4, "epsilon": 0.0}, tmp_path / "kmeans.checkpoint", Solver._save
    whole, saves, repaired = kmeans(points, **asked), 0, 0

    def save(self, *arguments):
        nonlocal saves, repaired
        real(self, *arguments)
        saves, repaired = saves + 1, repaired + self._progress.repairs
        if saves == stop_at:
            raise Killed

    monkeypatch.setattr(Solver, "_save", save)
    for stop_at in range(1, 200):
        saves = 0
        try:
            kmeans(points, checkpoint=Checkpoint(path, 1), **asked)
            break
        except Killed:
            resumed = kmeans(points, checkpoint=Checkpoint(path, 1), **asked)
        assert resumed.centroids.tobytes() == whole.centroids.tobytes(), stop_at
        assert (resumed.inertia, resumed.n_iter) == (whole.inertia, whole.n_iter), stop_at
    assert stop_at > 8 and repaired > 0


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"k": 41}, {"max_iter": 61}, {"weight": 2.0}, {"x": 1.0}, {"one": 1.0}, {"warm": 3}]
)
def test_a_checkpoint_of_other_data_or_settings_is_left(x, tmp_path, monkeypatch, caplog, change):
    path = tmp_path / "kmeans.checkpoint"
    saves_of(x, path, monkeypatch, 2)
    caplog.set_level(logging.INFO)
    other = dict(SETTINGS) | {k: v for k, v in change.items() if k in SETTINGS}
    weight = np.full(len(x), change["weight"]) if "weight" in change else None
    points = x + np.float32(change.get("x", 0.0))
    points[1234, 5] += np.float32(change.get("one", 0.0))  # the smallest possible change of the data
    warm = points[: change["warm"]] if "warm" in change else None
    fresh = kmeans(points, weight=weight, warm=warm, **other)
    resumed = kmeans(points, weight=weight, warm=warm, checkpoint=Checkpoint(path, 3), **other)
    assert "other data or settings" in caplog.text
    assert resumed.centroids.tobytes() == fresh.centroids.tobytes()


def test_a_damaged_checkpoint_is_left_and_named(x, tmp_path, monkeypatch, caplog):
    path = tmp_path / "kmeans.checkpoint"
    saves_of(x, path, monkeypatch, 2)
    path.write_bytes(path.read_bytes()[:-100])
    resumed = kmeans(x, checkpoint=Checkpoint(path, 3), **SETTINGS)
    assert "cannot be read" in caplog.text
    assert resumed.centroids.tobytes() == kmeans(x, **SETTINGS).centroids.tobytes()


def test_a_checkpoint_that_cannot_be_written_is_a_warning(x, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    result = kmeans(x, checkpoint=Checkpoint(tmp_path / "file" / "kmeans.checkpoint", 3), **SETTINGS)
    assert "cannot write checkpoint" in caplog.text
    assert result.inertia == kmeans(x, **SETTINGS).inertia
