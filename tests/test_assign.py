"""Labels of the assignment equal those of float64 brute force, for every shape of data and every way to compute."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rb_gpu.learn import assign, bounded, choice, coarse, differences, direct, kernels, products, row_kernels, vectors
from rb_gpu.learn.assign import Assignment
from rb_gpu.learn.assign_device import DeviceAssignment
from rb_gpu.learn.coarse import Basis, CodedBlock, Codes, encode, principal_bases, project
from rb_gpu.learn.direct import Columns
from rb_gpu.learn.products import (
    AMX,
    FEATURES,
    FLOAT32,
    GROUP,
    VNNI,
    Product,
    begin_products,
    end_products,
    group_products,
    integer_product,
)
from rb_gpu.learn.vectors import LANES, WIDTH, compiled
from rb_gpu.learn.workers import Workers, workers


def brute_force(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """(N, K) squared distances in float64, computed from differences."""
    rows = [(x[i : i + 64, None].double() - centroids[None].double()).square().sum(2) for i in range(0, len(x), 64)]
    return torch.cat(rows)


# the integer products that this machine can run, including those that a lesser machine would choose
INTEGERS = [p for p in (AMX, VNNI) if p is integer_product() or (p is VNNI and "+avx512vnni" in FEATURES)]
PRODUCTS = [FLOAT32, *INTEGERS]


def bases(x: torch.Tensor, middle: torch.Tensor) -> list[Basis | None]:
    """Every way to assign; None computes all products at once."""
    dims = x.shape[1]
    widths = sorted({1, dims // 3, dims // 2, dims} - {0}) if dims <= 100 else [1, 32, 96]
    found = [Basis(middle), *principal_bases(x, middle, widths, FLOAT32)]
    return [None, *(replace(basis, product=product) for basis in found for product in PRODUCTS)]


def uneven(seed: int, n: int, k: int, dims: int, scale: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and centroids whose dimensions differ in spread by orders of magnitude, far from the origin."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.rand(dims, generator=g).pow(6) * 2.0 ** (scale / 2)
    return tuple(torch.randn(rows, dims, generator=g) * spread + offset for rows in (n, k))


def using(way: str | Product, x: torch.Tensor, crew: Workers, code_budget: int = 0) -> Assignment:
    """An assignment that computes all products at once (way "direct"), or tiles of the given product."""
    points = Assignment(x, x.mean(0), crew, code_budget)
    points.use(None if way == "direct" else Basis(x.mean(0), product=way))
    return points


@compiled()
def multiplied(code_NP, columns, begin_C, count, product_GL):
    """The products of all codes with all columns, computed group by group, as `bounded` reads them."""
    out = np.zeros((count, len(begin_C)), np.float64)
    begin_products(code_NP[0, 0])
    step = code_NP.strides[0]
    for at in range(0, count, GROUP):
        points = min(GROUP, count - at)
        for z in range(0, len(begin_C), LANES):
            group_products(
                code_NP[0, 0], points, code_NP.ctypes.data + at * step, step, columns.ctypes.data + z * step,
                WIDTH * step, begin_C.ctypes.data + 4 * z, product_GL.ctypes.data,
            )  # fmt: skip
            out[at : at + points, z : z + LANES] = product_GL[:points]
    end_products(code_NP[0, 0])
    return out


def shapes() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Points and centroids of many kinds, by name."""
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g)

    plain, low = normal(900, 24), normal(900, 5) @ normal(5, 60)
    zeros = normal(300, 8)
    zeros[::3] = zeros[::3].mean(0)
    outlier = torch.cat([normal(300, 6), torch.full((1, 6), 1e12)])
    sparse = torch.where(normal(400, 50) > 1.5, normal(400, 50), 0)
    return {
        "plain": (plain, plain[:150]),
        "low rank": (low, low[::9] + 0.01 * normal(100, 60)),
        "far from the origin": (plain + 1e4, plain[:70] + 1e4),
        "duplicates": (plain[:40].repeat(10, 1), plain[:40].repeat(2, 1)),
        "zeros": (zeros, torch.cat([zeros[:20], zeros.mean(0)[None], torch.zeros(2, 8)])),
        "one huge outlier": (outlier, outlier[-30:]),
        "one dimension": (normal(500, 1), normal(65, 1)),
        "many dimensions": (normal(130, 4096), normal(70, 4096)),
        "as many centroids as points": (plain[:200], plain[:200]),
        "one centroid": (plain, plain[:1]),
        "sparse": (sparse, sparse[:128]),
        "tiny": (plain * 1e-12, plain[:64] * 1e-12),
        "all the same": (torch.ones(100, 7), torch.ones(3, 7)),
    }


@pytest.mark.parametrize("name", shapes())
@pytest.mark.parametrize("kept", [True, False], ids=["codes kept", "coded as read"])
def test_labels_are_those_of_float64_brute_force(name, kept):
    x, centroids = shapes()[name]
    truth = brute_force(x, centroids)
    middle = x[::7].mean(0)
    distances = None
    with workers() as crew:
        for basis in bases(x[:200], middle):
            points = Assignment(x, middle, crew, 2**40 if kept else 0)
            points.use(basis)
            points.assign(centroids)
            assert torch.equal(points.labels_N, truth.argmin(1)), f"{name}: {basis}"
            np.testing.assert_allclose(points.d2_N, truth.min(1).values, rtol=1e-4)
            distances = points.d2_N.clone() if distances is None else distances
            assert torch.equal(points.d2_N, distances), f"{name}: {basis} tells other distances"
            # the result does not depend on the labels before
            points.labels_N.copy_(torch.randint(len(centroids), (len(x),)))
            points.assign(centroids)
            assert torch.equal(points.labels_N, truth.argmin(1)), f"{name} again: {basis}"


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(1, 90), st.integers(1, 70), st.integers(1, 40),
    st.floats(-30, 30), st.sampled_from([0.0, 1e-6, 1.0, 300.0]), st.sampled_from([FLOAT32, AMX, VNNI]),
)  # fmt: skip
def test_no_bound_exceeds_the_true_distance(seed, n, k, dims, scale, offset, product):
    # checks the proof in `coarse`: every lower bound, evaluated exactly, is below the float64 distance
    x, c = uneven(seed, n, k, dims, scale, offset)
    middle = x.mean(0)
    width = max(1, dims // 2)
    for basis in (Basis(middle, product=product), *principal_bases(x, middle, [width], product)):
        codes = Codes(n, basis)
        encode(*project(x, basis), basis, codes, 0)
        block = CodedBlock.of(*project(c, basis), 0, basis).codes
        zero = product.zero
        products = (codes.code.double() - zero) @ (block.code[:k].double() - zero).T
        widest = (codes.error / codes.norm.clamp(min=1e-45)).double().nan_to_num().max()
        spread_c = block.error + widest * (block.norm + block.error)
        upper = codes.scale[:, None].double() * block.scale[:k].double() * products
        upper += codes.norm[:, None].double() * spread_c[:k].double() + codes.rest[:, None].double() * block.rest[:k]
        bound = codes.half[:, None].double() + block.half[:k].double() - upper
        true = (x[:, None].double() - c[None].double()).square().sum(2) / 2
        assert bool((bound <= true + 1e-30).all()), f"{basis}: {float((bound - true).max())}"


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(1, 90), st.integers(1, 150), st.integers(1, 40),
    st.floats(-30, 30), st.sampled_from([0.0, 1e-6, 1.0, 300.0]), st.floats(0, 1),
)  # fmt: skip
def test_all_products_at_once_never_lose_the_nearest(seed, n, k, dims, scale, offset, near):
    # only float64 can tell centroids apart that are near copies of each other
    x, c = uneven(seed, n, k, dims, scale, offset)
    g = torch.Generator().manual_seed(seed)
    copied = torch.rand(k, generator=g) < near
    c[copied] = (c[torch.randint(k, (k,), generator=g)] * (1 + 2.0**-23 * torch.randn(k, 1, generator=g)))[copied]
    truth = brute_force(x, c)
    with workers() as crew:
        for middle in (x.mean(0), torch.zeros(dims)):
            points = Assignment(x, middle, crew, 0)
            points.assign(c)
            assert torch.equal(points.labels_N, truth.argmin(1))
            points.reset()
            for first, stop in ((0, k // 2 + 1), (k // 2 + 1, k)):
                if first < stop:
                    points.lower(c[:stop], first)
            assert torch.equal(points.labels_N, truth.argmin(1))


@pytest.mark.parametrize("way", ["direct", *PRODUCTS], ids=str)
def test_blocks_and_tiles_do_not_change_a_bit(monkeypatch, way):
    x, centroids = shapes()["plain"]
    with workers() as crew:
        whole = using(way, x, crew, 2**40)
        whole.assign(centroids)
        for block, tile, turns in ((64, 5, 100), (100, 4, 1), (1024, 2048, 7)):
            monkeypatch.setattr(coarse, "BLOCK", block)
            monkeypatch.setattr(assign, "LARGEST_TILE", tile)
            monkeypatch.setattr(assign, "LEAST_TILE", min(tile, 64))
            monkeypatch.setattr(assign, "LEAST_TURN", 1)
            monkeypatch.setattr(assign, "TURNS", turns)
            parts = using(way, x, crew, 2**40)
            parts.assign(centroids)
            assert torch.equal(parts.labels_N, whole.labels_N)
            assert torch.equal(parts.d2_N, whole.d2_N)


@pytest.mark.parametrize("way", ["direct", *PRODUCTS], ids=str)
@pytest.mark.parametrize("kept", [2**40, 0])
def test_centroids_that_come_one_after_the_other_end_where_all_at_once_do(way, kept):
    x, centroids = shapes()["plain"]
    with workers() as crew:
        once, later = using(way, x, crew, kept), using(way, x, crew, kept)
        once.assign(centroids)
        for first, stop in ((0, 1), (1, 2), (2, 9), (9, 150)):
            later.lower(centroids[:stop], first)
    assert torch.equal(once.labels_N, later.labels_N)
    assert torch.equal(once.d2_N, later.d2_N)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(1, 300), st.integers(1, 150), st.integers(1, 150), st.floats(-30, 30),
    st.sampled_from([0.0, 1.0, 300.0]), st.lists(st.sampled_from([0.0, 1e-7, 1e-3, 0.1, 10.0]), min_size=1, max_size=4),
    st.sampled_from([0, 10**9]),
)  # fmt: skip
def test_centroids_that_move_need_not_be_compared_with_all_points(seed, n, k, dims, scale, offset, steps, gaps):
    # some of the centroids move by each of the given steps; bounds remain from earlier places. GAPS=0 and 10^9 force
    # the distances between centroids to be used or not, even where computing them takes longer than they save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assign, "GAPS", gaps)
        patch.setattr(differences, "GAPS", gaps)
        moved_and_compared(seed, n, k, dims, scale, offset, steps)


def moved_and_compared(seed, n, k, dims, scale, offset, steps):
    x, c = uneven(seed, n, k, dims, scale, offset)
    g = torch.Generator().manual_seed(seed)
    ways = [None, *(Basis(x.mean(0), product=product) for product in PRODUCTS)]
    places = [c]
    for step in steps:
        moves = torch.rand(k, 1, generator=g) < 0.5
        places.append(places[-1] + moves * step * torch.randn(k, dims, generator=g) * c.std(correction=0))
    with workers() as crew:
        for way in ways:
            points, anew = (Assignment(x, x.mean(0), crew, 2**40) for _ in range(2))
            points.use(way)
            points.assign(c)
            for before, now in pairwise(places):
                points.assign(now, (now - before).double().norm(dim=1))
                true = brute_force(x, now)
                assert torch.equal(points.labels_N, true.argmin(1)), way
                if len(points._next_N) > 0:
                    true[torch.arange(n), points.labels_N] = torch.inf
                    assert bool((points._next_N <= true.min(1).values.sqrt()).all()), "a bound is too large"
            points.settle(now)
            anew.assign(now)
            assert torch.equal(points.d2_N, anew.d2_N), way
            # move back and then forward again: bounds from before must be forgotten
            points.assign(c)
            anew.reset()
            anew.assign(c)
            assert torch.equal(points.labels_N, anew.labels_N) and torch.equal(points.d2_N, anew.d2_N), way
            points.assign(now, (now - c).double().norm(dim=1))
            assert torch.equal(points.labels_N, brute_force(x, now).argmin(1)), way


@pytest.mark.parametrize("dims", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_bounds_hold_where_centroids_come_straight_at_the_points(seed, dims):
    # on a line a centroid can come nearer by exactly its movement, which is the most that the bounds allow for
    g = torch.Generator().manual_seed(seed)
    x, c = torch.rand(2000, dims, generator=g), torch.rand(5, dims, generator=g)
    with workers() as crew:
        points = using("direct", x, crew)
        points.assign(c)
        seen, rows = points.work.computed, 0
        for _ in range(60):
            step = 10 ** (-3 * torch.rand(5, 1, generator=g)) * torch.randn(5, dims, generator=g) / 10
            c, before = c + step, c
            points.assign(c, (c - before).double().norm(dim=1))
            rows += len(x)
            true = brute_force(x, c)
            assert torch.equal(points.labels_N, true.argmin(1))
            true[torch.arange(len(x)), points.labels_N] = torch.inf
            assert bool((points._next_N <= true.min(1).values.sqrt()).all()), "a bound is too large"
        assert points.work.computed - seen < 0.7 * 5 * rows, "bounds bear labels out"


def test_a_point_that_stays_where_it_is_need_not_be_read():
    # in clusters far apart, bounds alone decide every label: no distance is computed except where the codes leave a
    # doubt
    g = torch.Generator().manual_seed(0)
    c = torch.randn(70, 40, generator=g) * 100
    x = c.repeat(5, 1) + torch.randn(350, 40, generator=g)
    with workers() as crew:
        points = using(integer_product() or FLOAT32, x, crew, 2**40)
        points.assign(c)
        seen = points.work.computed
        points.assign(c + 0.1, torch.full((70,), 0.1 * 40**0.5))
        assert points.work.computed == seen
        known = points.d2_N.clone()
        points.settle(c + 0.1)
    true = (x - c.repeat(5, 1) - 0.1).square().sum(1)
    assert bool((known >= true).all()) and bool((known > 1.001 * true).any())
    torch.testing.assert_close(points.d2_N, true, rtol=1e-5, atol=0)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(1, 200), st.integers(1, 150), st.floats(-30, 30),
    st.sampled_from([0.0, 1.0, 300.0]), st.booleans(),
)  # fmt: skip
def test_half_the_way_to_the_next_centroid_is_never_too_long(seed, k, dims, scale, offset, copies):
    c, _ = uneven(seed, k, 1, dims, scale, offset)
    if copies:
        c = torch.cat([c, c[: k // 2 + 1]])
    with workers() as crew:
        points = Assignment(c, c.mean(0), crew, 0)
        columns = Columns(c.numpy(), points.basis.middle_D.numpy())
        gap2 = torch.from_numpy(points._gaps(columns, c, 10**9))
        assert not points._gaps(columns, c, 0).any(), "where points are few it is not asked for"
    true = brute_force(c, c)
    true[torch.eye(len(c), dtype=torch.bool)] = torch.inf
    nearest = true.min(1).values / 4
    assert bool((gap2.double() <= nearest).all())
    size = (c - points.basis.middle_D).double().square().sum(1)
    known = nearest > 0.01 * size.max()
    np.testing.assert_allclose(gap2[known].double(), nearest[known], rtol=0.05)


def test_a_point_near_its_centroid_is_not_compared():
    g = torch.Generator().manual_seed(0)
    c = 10 * torch.randn(20, 3, generator=g)
    x = c.repeat(50, 1) + 0.1 * torch.randn(1000, 3, generator=g)
    with workers() as crew:
        points = using("direct", x, crew)
        points.assign(c)
        seen = points.work.computed
        points.assign(c + 0.01, torch.full((20,), 0.02))
        assert points.work.computed == seen
        assert torch.equal(points.labels_N, torch.arange(20).repeat(50))
        points.settle(c + 0.01)
    torch.testing.assert_close(points.d2_N, (x - c.repeat(50, 1) - 0.01).square().sum(1), rtol=1e-4, atol=0)


def test_the_twin_for_a_gpu_agrees():
    for name in ("plain", "low rank", "far from the origin", "zeros", "one huge outlier", "one dimension"):
        x, centroids = shapes()[name]
        with workers() as crew:
            here = Assignment(x, x.median(0).values, crew, 0)
            here.assign(centroids)
        there = DeviceAssignment(x, x.median(0).values)
        there.assign(centroids)
        # plain float32 products may pick either of two centroids that are almost equally near
        np.testing.assert_allclose(there.d2_N, here.d2_N, rtol=1e-3, atol=1e-6, err_msg=name)
        halves = torch.cat([centroids, centroids.flip(0)])[: 2 * len(centroids)]
        ours, theirs = ((torch.empty(len(x), dtype=torch.int64), torch.empty(len(x))) for _ in range(2))
        there.labels_N.copy_(here.labels_N)
        here.nearer_halves(halves, *ours)
        there.nearer_halves(halves, *theirs)
        np.testing.assert_allclose(theirs[1], ours[1], rtol=1e-4)


def test_every_way_that_may_be_chosen_gives_the_same_labels(monkeypatch, caplog):
    # the cheapest way depends on the machine; here the test chooses it
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 30, generator=g) @ torch.randn(30, 96, generator=g)
    monkeypatch.setattr(choice, "SMALL_WORK", 0)
    caplog.set_level("INFO")
    asked = []

    def cost(_trial: object, basis: Basis | None, coded: bool) -> float:
        asked.append((basis, coded))
        return 1.0 if str(basis) == cheap else 2.0

    with workers() as crew:
        points = Assignment(x, x.mean(0), crew, 2**40)
        choice.choose(points, x[:200])
        ways = [*points.candidates, None]
        monkeypatch.setattr(choice.Trial, "seconds_per_row", cost)
        for way in ways:
            cheap = str(way)
            before = None if points.direct else points.basis
            asked.clear()
            choice.choose(points, x[:200])
            assert [basis for basis, _ in asked] == ways
            assert [basis for basis, coded in asked if coded] == [before], "what is in use has its codes"
            assert points.direct == (way is None) and (way is None or points.basis is way)
            assert (points.codes is not None) == (way is not None and (way.product.integers or way.axes_DP is not None))
            points.assign(x[:200])
            assert torch.equal(points.labels_N[:200], torch.arange(200))
        assert "all products" in caplog.text


def test_what_a_trial_takes_is_known_unless_it_is_hopeless():
    x = torch.randn(600, 40, generator=torch.Generator().manual_seed(0))
    with workers() as crew:
        points = Assignment(x, x.mean(0), crew, 2**40)
        trial = choice.Trial(points, x[:70])
        for basis in bases(x, x.mean(0)):
            trial.few_seconds = torch.inf
            assert 0 < trial.seconds_per_row(basis, False) < torch.inf
            trial.few_seconds = 0.0
            assert trial.seconds_per_row(basis, False) == torch.inf


@pytest.mark.parametrize("k", [64, 1000, 1024, 2048, 4096])
def test_a_trial_is_of_points_that_are_no_centroids(k):
    # regression: before any seed, centroids are evenly spaced points, and the trial used the same points, each at
    # distance 0 from its own centroid, so that 32 of 384 axes seemed enough: k-means++ on 117,659 embeddings took 3.2 s
    # instead of 0.6 s, and 6.9 s with 4,096 clusters
    x = torch.randn(40_960, 4, generator=torch.Generator().manual_seed(0))
    with workers() as crew:
        centroids = x[:: len(x) // k][:k]
        trial = choice.Trial(Assignment(x, x.mean(0), crew, 0), centroids)
    assert float((trial.d2_N == 0).float().mean()) <= 2 * k / len(x)


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
@pytest.mark.parametrize("width", [1, 2, 3, 24, 64, 65, 384, 4096])
def test_products_of_codes_are_exact(product, width):
    # the largest codes, whose pairwise sums of products exceed 16 bits; a number of rows that fills no whole group;
    # scales of 1
    g, largest = torch.Generator().manual_seed(width), 127 if product.integers else 15
    x, c = (torch.randint(-largest, largest + 1, (rows, width), generator=g).float() for rows in (71, 130))
    x[:, 0], c[:, 0] = largest, -largest
    x[:3], c[:2], c[2] = largest, largest, -largest
    basis = Basis(torch.zeros(width), product=product)
    codes = Codes(len(x), basis)
    encode(*project(x, basis), basis, codes, 0)
    block = CodedBlock.of(*project(c, basis), 0, basis)
    room = block.begin_C.new_empty(GROUP, LANES).numpy()
    found = multiplied(codes.code.numpy(), block.columns.numpy(), block.begin_C.numpy(), len(x), room)
    np.testing.assert_array_equal(found[:, :130], x.double() @ c.double().T)


@pytest.mark.parametrize("features", ["+amx-int8,+avx512f,+avx512vnni", "+amx-int8,+avx512f", "+avx512vnni", "+avx2"])
def test_tiles_that_linux_refuses_are_not_used(monkeypatch, caplog, features):
    # using the tiles without permission would kill the process
    monkeypatch.setattr(products, "FEATURES", frozenset(features.split(",")))
    monkeypatch.setattr(products.sys, "platform", "linux")
    monkeypatch.setattr(products.platform, "machine", lambda: "x86_64")
    for answer in (0, -1):
        monkeypatch.setattr(products.ctypes, "CDLL", lambda _, a=answer: SimpleNamespace(syscall=lambda *_: a))
        caplog.clear()
        found, amx = integer_product.__wrapped__(), "amx" in features
        assert found is (AMX if amx and answer == 0 else VNNI if "vnni" in features else None)
        assert ("refuses the tile registers" in caplog.text) == (amx and answer != 0)


def test_codes_whose_product_could_overflow_are_not_tried(monkeypatch):
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    with workers() as crew:
        points = Assignment(x, x.mean(0), crew, 0)
        assert any(basis.axes_DP is None for basis in choice.bases_of(points)) == bool(INTEGERS)
        monkeypatch.setattr(choice, "MOST_DIMS", 39)
        assert all(basis.axes_DP is not None for basis in choice.bases_of(points))
    assert 127**2 * products.MOST_DIMS < 2**31 <= 127**2 * (products.MOST_DIMS + 1)


@pytest.mark.parametrize("way", ["direct", *PRODUCTS], ids=str)
def test_squared_distances_that_overflow_find_no_centroid_that_is_none(way):
    # the padding of a block of 64 centroids is infinitely far away, and so are these centroids in float32
    x = torch.rand(200, 30, generator=torch.Generator().manual_seed(0)) * 4e18
    with workers() as crew:
        points = using(way, x, crew, 2**40)
        points.assign(-x[:70])
        points.assign(-x[:70], torch.zeros(70))
    assert set(points.labels_N.tolist()) <= set(range(70))


@pytest.mark.parametrize("way", ["direct", *PRODUCTS], ids=str)
def test_float32_ties_are_decided_in_float64(way):
    # two centroids whose distances round to the same float32; the second is nearer by a relative 1e-9
    x = torch.tensor([[1.0, 0.0]])
    far, near = torch.tensor([3.0, 0.0]), torch.tensor([3.0 - 2**-22, 2**-11 * 1.2])
    d2 = (x[0].double() - torch.stack([far, near]).double()).square().sum(1)
    for order in ((far, near), (near, far)):
        centroids = torch.stack(order)
        with workers() as crew:
            points = using(way, x, crew)
            points.assign(centroids)
        assert int(points.labels_N[0]) == int(brute_force(x, centroids)[0].argmin()), d2


def test_kernels_without_a_place_for_their_cache_still_run(monkeypatch, caplog):
    real = vectors.numba.njit

    def refusing(cache=False, **options):
        if cache:
            raise RuntimeError("no locator available")
        return real(**options)

    monkeypatch.setattr(vectors.numba, "njit", refusing)
    assert vectors.compiled()(lambda a: a + 1)(1) == 2
    assert "every process" in caplog.text


@pytest.mark.parametrize(
    "module", [bounded, differences, direct, kernels, row_kernels], ids=lambda module: module.__name__
)
def test_kernels_take_the_address_of_arguments_alone(module):
    # regression: numba frees an array after its last use by name, so that the bounds were once written to freed memory
    for function in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(function, ast.FunctionDef):
            arguments = {argument.arg for argument in function.args.args}
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and node.attr == "ctypes":
                    assert isinstance(node.value, ast.Name), f"{function.name}: an array without a name"
                    assert node.value.id in arguments, f"{function.name}: {node.value.id} is its own"
