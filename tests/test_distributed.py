"""Several processes on disjoint rows come to the bits of one process on all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rb_gpu.learn.distributed import Ranks
from rb_gpu.learn.kmeans import kmeans

SCRIPT = Path(__file__).parent / "ranks_kmeans.py"


@pytest.mark.parametrize(("processes", "metric"), [(2, "cosine"), (3, "l2")])
def test_ranks_end_on_the_bits_of_one_process(tmp_path, processes, metric):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(30, 12))[rng.integers(30, size=4000)] + 0.8 * rng.normal(size=(4000, 12))).astype(np.float32)
    weight = rng.exponential(size=len(x)).astype(np.float32)
    weight[::50] = 0
    np.savez(tmp_path / "data.npz", x=x, weight=weight)
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone",
        str(SCRIPT), str(tmp_path / "data.npz"), str(tmp_path / "out.npz"), "37", metric, "5",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.load(tmp_path / "out.npz")
    alone = kmeans(x, 37, metric=metric, seed=5, weight=weight, n_init=2, device="cpu")
    assert found["centroids"].tobytes() == alone.centroids.tobytes()
    assert np.array_equal(found["labels"], alone.labels)
    assert float(found["inertia"]) == alone.inertia
    assert int(found["n_iter"]) == alone.n_iter


def test_alone_every_call_is_the_identity():
    ranks = Ranks()
    values = np.arange(3.0)
    assert ranks.place(7) == (0, 7)
    assert ranks.largest(2.5) == ranks.sum_of(2.5) == 2.5
    assert ranks.of_first(values) is values
