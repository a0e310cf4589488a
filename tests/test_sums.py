"""Sums over clusters are bit-identical whoever adds what, and workers report every error."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from pretend import pretended  # noqa: E402

from rb_gpu.learn import devices, sums  # noqa: E402
from rb_gpu.learn.distributed import Ranks  # noqa: E402
from rb_gpu.learn.segments import runs  # noqa: E402
from rb_gpu.learn.shard import Shard  # noqa: E402
from rb_gpu.learn.sums import ClusterSums  # noqa: E402
from rb_gpu.learn.workers import workers  # noqa: E402


@pytest.mark.parametrize("k", [1, 300, 2**15 - 1, 2**15, 70_000])
def test_runs_are_those_of_any_number_of_labels(k):
    labels = torch.randint(k, (5000,), generator=torch.Generator().manual_seed(0))
    labels[:7] = k - 1
    order, bounds = runs(labels, k)
    assert torch.equal(bounds.diff(), torch.bincount(labels, minlength=k))
    assert torch.equal(order, torch.argsort(labels, stable=True))


def test_sums_of_pieces_take_the_share_of_the_points_that_is_kept_for_them(monkeypatch):
    # regression: for 130 GB of points on a card they took all of the 4 GB that were kept for everything
    triton_sums = pytest.importorskip("rb_gpu.learn.triton_sums")
    monkeypatch.setattr(triton_sums, "launch", lambda *_, **__: None)
    n, dims, k = 2**15, 512, 2
    with pretended() as operations:
        x, weight = torch.ones(n, dims, device="cuda"), torch.ones(n, dtype=torch.float64, device="cuda")
        order, bounds = runs((torch.arange(n) % k).to("cuda"), k)
        before = operations.memory.peak
        triton_sums.piece_sums(x, weight, order, bounds)
    taken = operations.memory.peak - before
    assert x.held.nbytes / 64 < taken < x.held.nbytes / devices.BYTES_OF_A_SUM


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 400), st.integers(1, 9), st.integers(1, 40), st.floats(0, 1))
def test_moved_points_are_summed_alike_by_rows_and_by_columns(seed, n, dims, k, moved):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(n, dims)).astype(np.float32) * np.float32(10.0 ** rng.integers(-6, 7)))
    weight = torch.from_numpy(rng.integers(0, 4, n).astype(np.float32))
    weight[0] = 1
    first = torch.from_numpy(rng.integers(k, size=n))
    then = torch.where(torch.from_numpy(rng.random(n) < moved), torch.from_numpy(rng.integers(k, size=n)), first)
    shard, peak = Shard(x, weight, Ranks()), x.abs().amax(1)
    found = []
    with workers() as crew, pytest.MonkeyPatch.context() as patch:
        for own_bytes, rows in ((2**26, 4096), (2**26, 3), (0, 1)):
            patch.setattr(sums, "OWN_BYTES", own_bytes)
            patch.setattr(sums, "OWN_ROWS", rows)
            made = ClusterSums(shard, peak, k, crew)
            made.update(first)
            made.update(then)
            found.append(made)
    units = (x.double() * (weight.double() * found[0].unit)[:, None]).round().to(torch.int64)
    truth = torch.zeros(k, dims, dtype=torch.int64).index_add_(0, then, units)
    for made in found:
        assert torch.equal(made.sums_KD, truth)
        assert torch.equal(made.counts_K, torch.bincount(then[weight > 0], minlength=k))
        assert torch.equal(made.mass_K.double() / made.weight_unit, torch.bincount(then, weight.double(), k))


@pytest.mark.parametrize("bad", [0, 1, 7])
def test_an_error_of_any_worker_is_raised_when_all_have_stopped(bad):
    done = []

    def work(_worker: int, start: int, _stop: int) -> None:
        if start == bad:
            raise RuntimeError(f"slice {start}")
        done.append(start)

    with workers() as crew:
        with pytest.raises(RuntimeError, match=f"slice {bad}"):
            crew.each(8, 1, work)
        before = list(done)
        crew.each(8, 1, lambda _worker, start, _stop: done.append(start))
        assert len(done) == len(before) + 8
