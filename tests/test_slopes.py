"""How steep the field's kernels are, in worlds whose outcomes change at a known scale."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from rb_gpu.field import SLOPE_BOUNDS  # noqa: E402
from rb_gpu.learn.field import Kernel  # noqa: E402
from rb_gpu.learn.rows import Rows  # noqa: E402
from rb_gpu.learn.slopes import USUAL, two_slopes  # noqa: E402

QUERIES = 400


def world(log):
    """Places on a circle, two configs, and rows: both configs for every query, or a random one."""
    rng = np.random.default_rng(0)
    angle_Q = np.sort(rng.uniform(0, 2 * np.pi, QUERIES))
    config_N = rng.integers(2, size=QUERIES) if log else np.tile([0, 1], QUERIES)
    query_N = np.arange(QUERIES) if log else np.repeat(np.arange(QUERIES), 2)
    ones_N = torch.ones(len(query_N), dtype=torch.float64)
    rows = Rows(torch.as_tensor(query_N), torch.as_tensor(config_N), ones_N, ones_N, QUERIES, 2)
    asked = []

    def kernel_of(slope):
        asked.append(slope)
        mark_M = np.linspace(0, 2 * np.pi, 100, endpoint=False)
        kernel_MM = np.exp(slope * (np.cos(mark_M[:, None] - mark_M) - 1)) + 1e-3 * np.eye(100)
        kernel_QM = np.exp(slope * (np.cos(angle_Q[:, None] - mark_M) - 1))
        return Kernel(torch.as_tensor(np.linalg.solve(np.linalg.cholesky(kernel_MM), kernel_QM.T).T), rows)

    def outcome(waves, noise=0.3):
        way_N = np.where(config_N == 1, 1.0, -1.0) if waves else 0.0
        return torch.as_tensor(way_N * np.sin(waves * angle_Q[query_N]) + noise * rng.normal(size=len(query_N)))

    return kernel_of, outcome, asked


@pytest.mark.parametrize("log", [False, True])
def test_kernels_are_as_steep_as_outcomes_change(log):
    kernel_of, outcome, asked = world(log)
    found = [list(two_slopes(kernel_of, outcome(waves))) for waves in (1, 3, 9)]
    assert all(pair[1] == 2 * pair[0] for pair in found)
    steepest = [pair[1] for pair in found]
    assert steepest == sorted(steepest) and steepest[0] <= 2.0 and steepest[2] >= 32.0
    assert SLOPE_BOUNDS[0] <= min(asked) and max(asked) <= SLOPE_BOUNDS[1]


@pytest.mark.parametrize("log", [False, True])
def test_where_nothing_is_predicted_the_usual_slopes_stand(log):
    kernel_of, outcome, asked = world(log)
    assert tuple(two_slopes(kernel_of, outcome(0))) == tuple(asked) == USUAL
    assert tuple(two_slopes(kernel_of, torch.ones_like(outcome(0)))) == USUAL


def test_a_slope_is_solved_once():
    kernel_of, outcome, asked = world(False)
    found = two_slopes(kernel_of, outcome(9))
    assert len(asked) == len(set(asked)) and set(found) <= set(asked)
