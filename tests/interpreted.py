"""Tests of the Triton kernels in Triton's interpreter against float64; test_triton.py runs them in a new process."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from pretend import OnDevice, pretended
from test_assign import brute_force, shapes

from rb_gpu.learn import triton_assign, triton_kernels, triton_sums
from rb_gpu.learn.assign import Assignment
from rb_gpu.learn.assign_device import DeviceAssignment
from rb_gpu.learn.kmeans import kmeans
from rb_gpu.learn.segments import run_sums, runs
from rb_gpu.learn.workers import workers

PRECISIONS = ("tf32", "bf16", "ieee")


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def cases() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Points and centroids by name: those of the CPU's tests, odd shapes, near ties, numbers near float32's limits."""
    found = {name: (x[-90:], c[-70:]) for name, (x, c) in shapes().items() if name != "many dimensions"}
    x = normal(80, 20)
    for n, k, dims in ((1, 1, 1), (1, 200, 5), (65, 1, 7), (70, 66, 385), (129, 130, 128)):
        found[f"{n} x {k} x {dims}"] = (normal(n, dims), normal(k, dims, seed=1))
    # differences that coarse products cannot resolve, in both orders, and one that float32 distances cannot
    near = torch.cat([x[:40], x[:40] + 1e-5 * normal(40, 20, seed=2), x[:40].flip(0)])
    found |= {
        "near ties": (x, near[torch.randperm(120, generator=torch.Generator().manual_seed(3))]),
        "ties of float32": (torch.tensor([[1.0, 0.0]] * 9), torch.tensor([[3.0, 0.0], [3 - 2**-22, 2**-11 * 1.2]] * 3)),
        "1e18": (x[:30] * 1e18, x[:20] * 1e18),
        "1e-30": (x[:30] * 1e-30, x[:20] * 1e-30),
        "an outlier of 1e30": (torch.cat([x, torch.full((1, 20), 1e30)]), x[:40]),
        "centroids of 1e30": (x[:30], torch.cat([x[:20], torch.full((2, 20), 1e30)])),
        "infinitely many alike": (torch.zeros(30, 3), torch.zeros(66, 3)),
    }
    return found


def assigned(
    x: torch.Tensor, centroids: torch.Tensor, precision: str = "tf32", middle: torch.Tensor | None = None
) -> DeviceAssignment:
    points = DeviceAssignment(x, x[::7].mean(0) if middle is None else middle, engine="triton", precision=precision)
    points.assign(centroids)
    return points


# the cases for the other precisions, which only change the bound
FEW = ("plain", "duplicates", "near ties", "70 x 66 x 385", "an outlier of 1e30")


@pytest.mark.parametrize(
    ("name", "precision"), [(name, "tf32") for name in cases()] + [(n, p) for n in FEW for p in ("bf16", "ieee")]
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_labels_are_those_of_float64_brute_force(name, precision):
    x, centroids = cases()[name]
    truth = brute_force(x, centroids)
    points = assigned(x, centroids, precision)
    assert torch.equal(points.labels_N, truth.argmin(1))
    torch.testing.assert_close(points.d2_N, truth.min(1).values.float(), rtol=1e-5, atol=1e-38)
    assert bool((points.d2_N[truth.min(1).values == 0] == 0).all())


def test_it_is_the_assignment_of_the_cpu():
    for name in ("plain", "low rank", "duplicates", "zeros", "one huge outlier", "sparse"):
        x, centroids = cases()[name]
        with workers() as crew:
            here = Assignment(x, x.median(0).values, crew, 0)
            here.assign(centroids)
        there = assigned(x, centroids, middle=x.median(0).values)
        assert torch.equal(there.labels_N, here.labels_N), name
        torch.testing.assert_close(there.d2_N, here.d2_N, rtol=1e-5, atol=1e-12)


def test_centroids_that_come_in_blocks_end_where_all_at_once_do():
    x, centroids = cases()["near ties"]
    once = assigned(x, centroids)
    later = DeviceAssignment(x, once.middle_D, engine="triton")
    for first, stop in ((0, 1), (1, 2), (2, 70), (70, 120)):
        later.lower(centroids[:stop], first)
    assert torch.equal(once.labels_N, later.labels_N)
    assert torch.equal(once.d2_N, later.d2_N)


def test_the_torch_engine_differs_only_within_its_bound():
    for name in ("plain", "near ties", "far from the origin"):
        x, centroids = cases()[name]
        exact, plain = assigned(x, centroids), DeviceAssignment(x, x[::7].mean(0))
        plain.assign(centroids)
        differs = exact.labels_N != plain.labels_N
        assert name != "near ties" or differs.any()
        x_norm, one, other = (
            (t.double() - exact.middle_D).square().sum(1)
            for t in (x, centroids[exact.labels_N], centroids[plain.labels_N])
        )
        bound = (2 * x.shape[1] + 8) * 2.0**-24 * (x_norm + torch.maximum(one, other))
        truth = brute_force(x, centroids)
        margin = truth.gather(1, plain.labels_N[:, None])[:, 0] - truth.min(1).values
        assert bool((margin / 2 <= bound).all()), name


def listed(monkeypatch: pytest.MonkeyPatch, x: torch.Tensor, centroids: torch.Tensor, precision: str) -> float:
    """The share of points whose nearest centroid the coarse products leave in doubt."""
    counts = []
    real = triton_assign.launch

    def launch(kernel, grid, *arguments, **meta):
        real(kernel, grid, *arguments, **meta)
        counts.append(arguments)

    monkeypatch.setattr(triton_assign, "launch", launch)
    assigned(x, centroids, precision)
    monkeypatch.undo()
    [count] = [t for t in counts[0] if getattr(t, "shape", None) == (1,) and t.dtype == torch.int32]
    return int(count) / len(x)


def test_few_points_are_in_doubt(monkeypatch):
    x, centroids = shapes()["plain"]
    x = x[:400]
    shares = {precision: listed(monkeypatch, x, centroids, precision) for precision in PRECISIONS}
    assert shares["ieee"] < 0.01 < shares["tf32"] + 0.01 < 0.05 < shares["bf16"] < 0.3, shares


def test_block_shapes_do_not_change_a_bit(monkeypatch):
    every, fitting = triton_assign.block_shapes(), triton_assign.shapes_within
    for name in ("near ties", "70 x 66 x 385"):
        x, centroids = cases()[name]
        found = []
        for shape in fitting(every, triton_assign.width_of(x.shape[1]), "tf32", 2**40, (8, 0)):
            monkeypatch.setattr(triton_assign, "shapes_within", lambda *_, shape=shape: [shape])
            found.append(assigned(x, centroids))
        assert len(found) == (4 if x.shape[1] <= triton_assign.HELD_DIMS else 3)
        for other in found[1:]:
            assert torch.equal(other.labels_N, found[0].labels_N)
            assert torch.equal(other.d2_N, found[0].d2_N)


def test_block_shapes_timed_on_few_points_are_not_those_of_many(monkeypatch):
    # regression: shapes tuned on the first small table were cached, on disk too, and used for every large one
    asked = []
    monkeypatch.setattr(triton_assign, "launch", lambda kernel, grid, *given, **_: asked.append((kernel, given)))
    for n in (1000, 2000, triton_assign.MANY_POINTS, 2 * triton_assign.MANY_POINTS):
        assigned(torch.zeros(n, 1), torch.zeros(3, 1))
    tuned = triton_assign.nearest_kernel
    at = [tuned.arg_names.index(name) for name in tuned.keys if name.endswith("_class")]
    keys = [tuple(given[i] for i in at) for kernel, given in asked if kernel is tuned]
    assert keys[0] == keys[1] != keys[2] == keys[3]


@triton.jit
def scores_kernel(
    x_ptr, middle_ptr, code_ptr, low_ptr, slack_ptr, norm_ptr, limits_ptr, out_ptr, upper_ptr, n, k, pad,
    D: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK).to(tl.int64)
    column = tl.arange(0, BLOCK)
    alive = row < n
    _norm, a = triton_kernels._reach(x_ptr, middle_ptr, row, alive, limits_ptr, pad, D, WIDTH, 16, PRECISION)
    low = triton_kernels._lower_bounds(
        x_ptr, middle_ptr, 0, code_ptr, low_ptr, norm_ptr, row, alive, a, 0, D, WIDTH, PRECISION, False, BLOCK, 16
    )
    twice = 2.0 * (a[:, None] * tl.load(norm_ptr + column)[None, :] + tl.load(slack_ptr + column)[None, :])
    tl.store(out_ptr + row[:, None] * BLOCK + column[None, :], low)
    tl.store(upper_ptr + row[:, None] * BLOCK + column[None, :], low + twice * 1.001 + tl.abs(low) * 2.0**-21)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_score_is_within_its_bounds(precision):
    # checks the proof in triton_assign numerically, in float64
    for seed in range(25):
        g = torch.Generator().manual_seed(seed)
        dims = int(torch.randint(1, 90, (1,), generator=g))
        spread = torch.rand(dims, generator=g).pow(6) * 2.0 ** float(60 * torch.rand(1, generator=g) - 50)
        x, c = (torch.randn(64, dims, generator=g) * spread + (seed % 3) * 300 * spread for _ in range(2))
        c[::5] = x[::5] * (1 + 2.0**-12)
        middle = x.mean(0)
        codes = triton_assign.coded(c, middle, precision)
        low, upper = torch.empty(64, 64), torch.empty(64, 64)
        meta = {"D": dims, "WIDTH": triton_assign.width_of(dims), "PRECISION": precision, "BLOCK": 64}
        triton_assign.launch(
            scores_kernel, (1,), x, middle, codes.code_MW, codes.low_M, codes.slack_M, codes.norm_M, codes.limits_3,
            low, upper, 64, 64, codes.pad, **meta,
        )  # fmt: skip
        y, z = x.double() - middle, c.double() - middle
        true = z.square().sum(1) / 2 - y @ z.T
        assert bool((low.double() <= true).all() and (true <= upper.double()).all()), seed
        norms = (y.norm(dim=1)[:, None] + 1e-12) * (z.norm(dim=1) + 1e-12)
        assert bool(((upper - low).double() < 0.03 * norms + 1e-5 * z.square().sum(1)).all()), seed


@pytest.mark.parametrize(("n", "k", "dims"), [(1, 1, 1), (700, 3, 5), (900, 40, 130), (50, 200, 33)])
def test_sums_of_runs_are_those_of_integers(n, k, dims):
    x = normal(n, dims) * torch.logspace(-20, 5, dims)
    # one large cluster, some empty, and units up to 2^61
    labels = (torch.rand(n, generator=torch.Generator().manual_seed(1)).pow(3) * k).long()
    weight = torch.rand(n, generator=torch.Generator().manual_seed(2)).double() * 2.0**52 / float(x.abs().max())
    units = (x.double() * weight[:, None]).round().long()
    truth = torch.zeros(k, dims, dtype=torch.int64).index_add_(0, labels, units)
    for engine in ("torch", "triton"):
        assert torch.equal(run_sums(x, weight, *runs(labels, k), engine), truth), engine


def waits_of(iterations: int, x: torch.Tensor) -> int:
    with pretended() as operations:
        kmeans(x, 5, init=x[:5], device="cuda", epsilon=0.0, max_iter=iterations)
    return sum(operations.waits.values())


def test_kmeans_by_triton_comes_to_the_bits_of_the_host_and_waits_once_an_iteration(monkeypatch, caplog):
    real = triton_assign.launch

    def launch(kernel, grid, *arguments, **meta):
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        assert all(isinstance(t, OnDevice) and t.is_contiguous() for t in tensors)
        real(kernel, grid, *(a.held if isinstance(a, OnDevice) else a for a in arguments), **meta)

    monkeypatch.setattr(triton_assign, "launch", launch)
    monkeypatch.setattr(triton_sums, "launch", launch)
    x = normal(90, 6)
    caplog.set_level("INFO")
    with pretended() as operations:
        there = kmeans(x, 5, init=x[:5], device="cuda", max_iter=6)
        seeded, streamed = (kmeans(x, 5, device="cuda", memory_budget=b, max_iter=2) for b in (None, 2**11))
    here = kmeans(x, 5, init=x[:5], device="cpu", max_iter=6)
    assert "assignment by triton" in caplog.text and not operations.serial
    assert torch.equal(there.centroids, here.centroids) and torch.equal(there.labels, here.labels)
    assert torch.equal(seeded.centroids, streamed.centroids)
    assert waits_of(5, x) - waits_of(2, x) <= 3


# by name: the kernel's code, the faulty code that replaces it, and the case that must fail
FAULTS = {
    "of equal ones the last": ("(d2 < best)", "(d2 <= best)", "duplicates"),
    "products are believed": ("least + doubled * 1.001", "least + 0.0 * doubled", "near ties"),
    "only the new are measured": ("known, own, float", "known & (own < 0), own, float", "in blocks"),
    "the last tile is forgotten": (
        "for start in range(0, k, BLOCK_K)",
        "for start in range(0, k - 1, BLOCK_K)",
        "65th",
    ),
}


def plant(old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the kernels by a copy with a fault, until monkeypatch is undone."""
    source = Path(triton_kernels.__file__).read_text()
    assert old in source
    path = folder / "planted_kernels.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("planted_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(triton_assign, "kernels", module)
    tuned = triton.autotune(triton_assign.block_shapes(), [])(module.nearest_kernel)
    monkeypatch.setattr(triton_assign, "nearest_kernel", tuned)


def right(case: str) -> bool:
    """Whether the labels of a case agree with brute force."""
    if case == "65th":
        x, centroids = normal(30, 20), torch.cat([normal(64, 20, seed=1) + 9, normal(1, 20, seed=2)])
    else:
        x, centroids = cases()["near ties" if case == "in blocks" else case]
    points = DeviceAssignment(x, x.mean(0), engine="triton")
    for first, stop in (
        ((0, len(centroids) // 2), (len(centroids) // 2, len(centroids)))
        if case == "in blocks"
        else ((0, len(centroids)),)
    ):
        points.lower(centroids[:stop], first)
    return torch.equal(points.labels_N, brute_force(x, centroids).argmin(1))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, tmp_path, monkeypatch):
    old, new, case = FAULTS[fault]
    assert right(case)
    plant(old, new, tmp_path, monkeypatch)
    assert not right(case)
