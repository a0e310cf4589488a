"""Checks the light side in an environment that has only the base install.

.ci/run calls it as `python tests/base_lookup.py ARTIFACT`. Exits with 1 if a check fails.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

import rb_gpu

ARTIFACT = Path(sys.argv[1])


def nothing_else_is_installed() -> None:
    for name in ("torch", "safetensors", "scipy", "faiss", "hydra", "omegaconf", "pyarrow"):
        assert importlib.util.find_spec(name) is None, name


def the_artifact_answers() -> None:
    bank = rb_gpu.ReasoningBank.load(ARTIFACT)
    queries = np.random.default_rng(0).normal(size=(64, bank.dim)).astype(np.float32)
    centroids = bank.data.arrays["centroids"][: bank.data.leaves]
    for some in (queries, centroids):
        batch = bank.optimized_params_batch(some)
        for i, query in enumerate(some):
            answer = bank.optimized_params(query)
            assert bank.configs[int(batch["config_id"][i])] == answer.params
            assert 0.0 <= answer.confidence <= 1.0
    best = bank.find_similar_patterns(centroids[3], k=2)[0]
    assert best.similarity > 0.999
    assert best.pattern.id == int(bank.data.arrays["pattern_id"][3])


def the_export_answers_alike() -> None:
    bank = rb_gpu.ReasoningBank.load(ARTIFACT)
    with tempfile.TemporaryDirectory() as folder:
        bank.export(Path(folder) / "patterns.json")
        again = rb_gpu.ReasoningBank.from_export(Path(folder) / "patterns.json")
    queries = bank.data.arrays["centroids"][: bank.data.leaves]
    for name, column in bank.optimized_params_batch(queries).items():
        assert np.array_equal(column, again.optimized_params_batch(queries)[name]), name


def the_batch_side_says_what_to_install() -> None:
    try:
        importlib.import_module("rb_gpu.learn")
    except ImportError as error:
        assert "pip install 'rb_gpu[cpu]'" in str(error)  # noqa: PT017 - no pytest in the base install
    else:
        raise AssertionError("rb_gpu.learn was imported without its extra")


CHECKS: list[Callable[[], None]] = [
    nothing_else_is_installed,
    the_artifact_answers,
    the_export_answers_alike,
    the_batch_side_says_what_to_install,
]

if __name__ == "__main__":
    failed = 0
    for check in CHECKS:
        try:
            check()
        except AssertionError as error:
            failed += 1
            sys.stdout.write(f"FAILED {check.__name__}: {error}\n")
    sys.stdout.write(f"base install: {len(CHECKS) - failed} passed, {failed} failed\n")
    sys.exit(1 if failed else 0)
