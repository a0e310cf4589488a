"""Exact nearest-centroid assignment on the CPU.

Where many centroids and dims make it worthwhile, cheap products of low-precision codes bound every distance from below
tile by tile, and only the distances that the bounds leave in doubt are computed; otherwise all products are computed.
No float N x K matrix is ever held. Points stay where they are, even in memory-mapped files; the only extra memory is
`Codes`, if they fit the budget (else each tile is coded as it is read). The method in use affects the running time,
never a label or a distance.

Suffixes: N points, T points of one tile, K centroids, D dims, P dims of a code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rb_gpu.learn.bounded import lower_rows
from rb_gpu.learn.coarse import Basis, CodedBlock, Codes, coded_blocks, encode, project
from rb_gpu.learn.devices import free_memory
from rb_gpu.learn.differences import GAPS, following, lowering
from rb_gpu.learn.direct import Columns, first_rows, least_gaps, nearer_rows
from rb_gpu.learn.kernels import ROUNDOFF, nearer_halves, own_distances, widen
from rb_gpu.learn.products import GROUP
from rb_gpu.learn.vectors import LANES
from rb_gpu.learn.workers import Workers

LEAST_TILE, LARGEST_TILE = 64, 2048
# fewest multiplications that one worker does in a turn: as long as it takes to wake a worker or begin another turn
LEAST_TURN = 2**19
# numbers of the points coded at once: they stay in a core's second-level cache
CODED_NUMBERS = 2**18
# turns per worker where no tile must stay in a cache: enough to even out their durations
TURNS = 8
# up to this many centroids, all products are computed where points would first have to be coded
FEW = 32
# dims up to which differences take no longer than products: for any number of centroids, and for few of them
FEW_DIMS, FEWS_DIMS = 32, 128
# share of the free memory that codes of the points take by default
CODE_SHARE = 0.25


@dataclass
class Work:
    """How many distances were computed in full, of all point-centroid pairs."""

    computed: int = 0
    all: int = 0

    @property
    def share(self) -> float:
        """The fraction computed / all."""
        return self.computed / max(1, self.all)


class Assignment:
    """labels (N,) int64 and d2 (N,) float32: each point's nearest centroid so far; initially -1 and infinity.

    x_ND: (N, D) float32 in host memory, never modified. middle_D: any point in the middle of the data. code_budget:
    bytes that codes of all points may take; 0 keeps none, None allows CODE_SHARE of the free memory. direct: whether
    all products are computed; otherwise basis says how codes bound them. candidates: bases already built for these
    points (see `choice`).
    """

    def __init__(self, x_ND: Tensor, middle_D: Tensor, crew: Workers, code_budget: int | None) -> None:
        self.x_ND, self.crew, self._code_budget = x_ND, crew, code_budget
        self.labels_N = torch.full((len(x_ND),), -1, dtype=torch.int64)
        self.d2_N = torch.full((len(x_ND),), torch.inf, dtype=torch.float32)
        self.basis, self.direct = Basis(middle_D), True
        self.work = Work()
        self.codes: Codes | None = None
        self.candidates: list[Basis] | None = None
        self._loose, self._next_N = False, torch.empty(0, dtype=torch.float32)

    def reset(self) -> None:
        """Discards labels and distances."""
        self.labels_N.fill_(-1)
        self.d2_N.fill_(torch.inf)
        self._loose = False

    def lower(self, centroids_KD: Tensor, first: int) -> None:
        """Lowers labels and distances by the centroids (K, D) float32 from row `first` on; earlier ones are done."""
        self._run(centroids_KD, first, refresh=False)

    def assign(self, centroids_KD: Tensor, moved_K: Tensor | None = None) -> None:
        """Assigns exactly to these centroids (K, D) float32; existing labels serve as first guesses.

        moved_K: how far each centroid moved since labels and d2 were computed. With it, d2 may be an upper bound until
        `settle` is called: a point whose label the bounds confirm is not read.
        """
        known = bool(self.labels_N[0] >= 0)
        if known and self._at_once(len(centroids_KD)) and self.by_differences(len(centroids_KD)):
            self._follow(centroids_KD, moved_K)
            return
        if moved_K is None:
            self._loose = False
            self._run(centroids_KD, 0, refresh=known)
            return
        # triangle inequality with room for rounding: d2 has a relative error of D + 2 units, its root of half that
        more = 1 + (2 * self.x_ND.shape[1] + 8) * ROUNDOFF
        labels, moved, d2 = self.labels_N.numpy(), moved_K.float().numpy(), self.d2_N.numpy()

        def rows(_worker: int, start: int, stop: int) -> None:
            widen(start, stop, labels, moved, more, d2)

        self.crew.each(len(d2), self._turn(1), rows)
        self._loose = True
        self._run(centroids_KD, 0, refresh=False)

    def settle(self, centroids_KD: Tensor) -> None:
        """Makes d2 exact after `assign`; centroids (K, D) float32 are those of that last assignment."""
        if self._loose:
            x, centroids, labels, d2 = (t.numpy() for t in (self.x_ND, centroids_KD, self.labels_N, self.d2_N))

            def span(_worker: int, start: int, stop: int) -> None:
                own_distances(x, start, stop, centroids, labels, d2)

            self.crew.each(len(x), LARGEST_TILE, span)
            self._loose = False

    def _at_once(self, count: int) -> bool:
        """Whether all products with this many centroids are computed (no codes)."""
        return self.direct or (self.codes is None and count <= FEW)

    def by_differences(self, count: int) -> bool:
        """Whether computing all products with this many centroids uses `differences` instead of `direct`."""
        return self.x_ND.shape[1] <= (FEWS_DIMS if count <= FEW else FEW_DIMS)

    def _run(self, centroids_KD: Tensor, first: int, *, refresh: bool) -> None:
        count, self._next_N = len(centroids_KD) - first, self._next_N[:0]
        if self._at_once(count):
            self._each(self.comparing(centroids_KD, first, len(self.x_ND), refresh=refresh), count)
            return
        self.work.all += len(self.x_ND) * count
        blocks = coded_blocks(*project(centroids_KD[first:], self.basis), first, self.basis)
        step = LARGEST_TILE if self.codes is not None else self.coded_rows()
        computed = [0] * self.crew.count

        def span(worker: int, start: int, stop: int) -> None:
            for at in range(start, stop, step):
                computed[worker] += self.tile(at, min(at + step, stop), blocks, centroids_KD, refresh)

        self.crew.each(len(self.x_ND), LARGEST_TILE, span)
        self.work.computed += sum(computed)

    def _follow(self, centroids_KD: Tensor, moved_K: Tensor | None) -> None:
        """Assigns by differences from known labels; moved_K: how far centroids moved, None if unrelated."""
        anywhere, self._loose = moved_K is None, True
        if moved_K is None:
            self._next_N = self._next_N[:0]
            self.d2_N.fill_(torch.inf)
            moved_K = torch.zeros(len(centroids_KD), dtype=torch.float64)
        self._each(self.following(centroids_KD, moved_K, len(self.x_ND)), len(centroids_KD))
        if anywhere:
            self.settle(centroids_KD)

    def _each(self, compare: Callable[[int, int], int], count: int) -> None:
        """Runs `compare` over all points; it returns how many points it compared with all `count` centroids."""
        compared_W = [0] * self.crew.count

        def rows(worker: int, start: int, stop: int) -> None:
            compared_W[worker] += compare(start, stop)

        self.crew.each(len(self.x_ND), self._turn(count), rows)
        self.work.all += len(self.x_ND) * count
        self.work.computed += sum(compared_W) * count

    def following(self, centroids_KD: Tensor, moved_K: Tensor, of: int) -> Callable[[int, int], int]:
        """A function that assigns rows start to stop to centroids that moved by moved_K; see `differences.following`.

        of: the number of points that it will be used for.
        """
        if len(self._next_N) == 0:
            self._next_N = torch.zeros(len(self.x_ND), dtype=torch.float32)
        x, centroids, moved = (t.numpy() for t in (self.x_ND, centroids_KD, moved_K))
        states = self.labels_N.numpy(), self.d2_N.numpy(), self._next_N.numpy()
        return following(x, centroids, moved, *states, of)

    def _turn(self, count: int) -> int:
        """Points per turn of a worker, where each point is compared with all `count` centroids."""
        least = max(LEAST_TILE, LEAST_TURN // (self.x_ND.shape[1] * count))
        return max(least, -(-len(self.x_ND) // (TURNS * self.crew.count)))

    def _gaps(self, columns: Columns, centroids_KD: Tensor, count: int) -> npt.NDArray[np.float32]:
        """The gap2 (K,) of `nearer_rows`; zeros (no pruning) where it would cost too much for `count` points."""
        gap2_K = np.zeros(len(centroids_KD), np.float32)
        if GAPS * len(centroids_KD) <= count:
            centroids, middle = centroids_KD.numpy(), self.basis.middle_D.numpy()

            def rows(_worker: int, start: int, stop: int) -> None:
                least_gaps(
                    centroids, start, stop, middle, columns.columns_BDW, columns.half_C, columns.slack, gap2_K,
                    columns.bounds(), columns.about(),
                )  # fmt: skip

            self.crew.each(len(centroids_KD), LEAST_TILE, rows)
        return gap2_K

    def comparing(self, centroids_KD: Tensor, first: int, of: int, *, refresh: bool) -> Callable[[int, int], int]:
        """A function that lowers rows start to stop by all products with centroids from row `first` on, and returns the
        number of points compared. of: the number of points that it will be used for.
        """
        x, middle, centroids, labels, d2 = (
            t.numpy() for t in (self.x_ND, self.basis.middle_D, centroids_KD, self.labels_N, self.d2_N)
        )
        if self.by_differences(len(centroids) - first):
            return lowering(x, centroids, first, labels, d2)
        columns = Columns(centroids[first:], middle)
        given = middle, columns.columns_BDW, columns.half_C, columns.slack, first, centroids
        if labels[0] < 0:

            def unknown(start: int, stop: int) -> int:
                first_rows(x, start, stop, *given, labels, d2, columns.bounds(), columns.about())
                return stop - start

            return unknown
        # gaps help points whose label is a guess or whose d2 is an upper bound, not those whose d2 is exact
        gap2_K = self._gaps(columns, centroids_KD, of if first == 0 and (refresh or self._loose) else 0)
        known = refresh, self._loose, gap2_K, labels, d2

        def guessed(start: int, stop: int) -> int:
            return int(nearer_rows(x, start, stop, *given, *known, *columns.masks(), columns.about()))

        return guessed

    def tile(self, start: int, stop: int, blocks: list[CodedBlock], centroids_KD: Tensor, refresh: bool) -> int:
        """Lowers rows start to stop by the blocks; returns the number of distances computed."""
        codes, code_start = self.codes, start
        if codes is None:
            codes, code_start = Codes(stop - start, self.basis), 0
            encode(*project(self.x_ND[start:stop], self.basis), self.basis, codes, 0)
        x, centroids, labels, d2 = (t.numpy() for t in (self.x_ND, centroids_KD, self.labels_N, self.d2_N))
        computed = 0
        if refresh:
            own_distances(x, start, stop, centroids, labels, d2)
            computed = stop - start
        for block in blocks:
            product_GL, spread_C = block.begin_C.new_empty(GROUP, LANES), torch.empty_like(block.codes.half)
            computed += lower_rows(
                block.columns.numpy(), block.begin_C.numpy(), *block.codes.columns, block.first,
                codes.code.numpy(), *codes.columns, code_start, x, start, stop, centroids, labels, d2, self._loose,
                product_GL.numpy(), spread_C.numpy(),
            )  # fmt: skip
        return computed

    def nearer_halves(self, halves_2KD: Tensor, half_N: Tensor, d2_N: Tensor) -> None:
        """Writes the nearer of the halves 2l and 2l + 1 of each point's cluster l, and its squared distance."""
        arrays = [t.numpy() for t in (halves_2KD, self.labels_N, half_N, d2_N)]

        def span(_worker: int, start: int, stop: int) -> None:
            nearer_halves(self.x_ND.numpy(), start, stop, *arrays)

        self.crew.each(len(self.x_ND), LARGEST_TILE, span)

    def room(self) -> int:
        """Bytes that codes of all points may take."""
        if self._code_budget is None:
            self._code_budget = int(CODE_SHARE * free_memory())
        return self._code_budget

    def use(self, basis: Basis | None) -> None:
        """Switches to all products (None) or to codes by this basis; all points are coded at once if that fits the
        budget and the codes are more than a plain copy of the points.
        """
        self.direct, self.codes = basis is None, None
        if basis is None:
            return
        self.basis, n = basis, len(self.x_ND)
        if basis.row_bytes * n > self.room() or not (basis.product.integers or basis.axes_DP is not None):
            return
        codes = Codes(n, basis)

        def span(_worker: int, start: int, stop: int) -> None:
            encode(*project(self.x_ND[start:stop], basis), basis, codes, start)

        self.crew.each(n, self.coded_rows(), span)
        self.codes = codes

    def coded_rows(self) -> int:
        """Points that are coded at once."""
        return min(LARGEST_TILE, max(LEAST_TILE, CODED_NUMBERS // self.x_ND.shape[1]))
