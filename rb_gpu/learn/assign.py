"""The exact nearest centroid of every point, on the CPU: coarse products in tiles, then only the distances in doubt;
or, where centroids or dims are few, all products.

No float N x K matrix is ever held. Points stay where they are, memory-mapped files too; what is added is `Codes`, where
they fit the budget, or nothing, where every tile is coded as it is read. What is chosen here changes the time and never
a label or a distance.

Suffixes: N points, T points of one tile, K centroids, S points of a trial, D dims, P dims of a code.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rb_gpu.learn.bounded import lower_rows
from rb_gpu.learn.coarse import Basis, CodedBlock, Codes, coded_blocks, encode, principal_bases, project
from rb_gpu.learn.devices import free_memory
from rb_gpu.learn.direct import Columns, first_rows, least_gaps, nearer_rows
from rb_gpu.learn.kernels import ROUNDOFF, nearer_halves, own_distances, widen
from rb_gpu.learn.products import FLOAT32, GROUP, MOST_DIMS, integer_product
from rb_gpu.learn.vectors import LANES
from rb_gpu.learn.workers import Workers

log = logging.getLogger(__name__)

LEAST_TILE, LARGEST_TILE = 64, 2048
# numbers that one worker multiplies in a turn at least: another worker wakes, or another turn begins, in as long
LEAST_TURN = 2**19
# numbers of the points that are coded at once: they stay in a core's second cache
CODED_NUMBERS = 2**18
# spans of one worker where no tile must stay in a cache: enough to even out what each takes
TURNS = 8
# multiplications of one assignment below which a choice takes longer than it saves
SMALL_WORK = 2**30
# centroids that are lowered by all their products where points would have to be coded for it
FEW = 32
WIDTHS = (32, 64, 128, 256)
SAMPLE_ROWS = 2048
TRIAL_ROWS, TRIALS = 1024, 2
# a trial ends where these few rows take so many times as long as with what was tried before
PROBE_ROWS, HOPELESS = 128, 2
# what is in use stays unless another takes less than this share of its time: trials are short
BETTER = 0.85
# points a centroid from which on the way from each to the next is taken: as a share of all products it is nothing
GAPS = 32
# share of the free memory that codes of the points take where nothing else is said
CODE_SHARE = 0.25
# iterations over which coding all points must pay
WORTH_ITERATIONS = 10


@dataclass
class Work:
    """Distances that were computed in full, of those that there are."""

    computed: int = 0
    all: int = 0

    @property
    def share(self) -> float:
        """Computed / all."""
        return self.computed / max(1, self.all)


class Assignment:
    """labels (N,) int64 and d2 (N,) float32: each point's nearest centroid so far, -1 and infinity before the first.

    x_ND: (N, D) float32 in host memory, only read. middle_D: any point amid the data. code_budget: bytes that codes of
    all points may take; 0 keeps none, None takes CODE_SHARE of the free memory. direct: whether all products are taken
    at once; else basis tells which.
    """

    def __init__(self, x_ND: Tensor, middle_D: Tensor, crew: Workers, code_budget: int | None) -> None:
        self.x_ND, self.crew, self._code_budget = x_ND, crew, code_budget
        self.labels_N = torch.full((len(x_ND),), -1, dtype=torch.int64)
        self.d2_N = torch.full((len(x_ND),), torch.inf, dtype=torch.float32)
        self.basis, self.direct = Basis(middle_D), True
        self.work = Work()
        self._candidates: list[Basis] | None = None
        self._codes: Codes | None = None
        self._loose = False

    def reset(self) -> None:
        """Forgets labels and distances."""
        self.labels_N.fill_(-1)
        self.d2_N.fill_(torch.inf)
        self._loose = False

    def lower(self, centroids_KD: Tensor, first: int) -> None:
        """Lowers labels and distances by the centroids (K, D) float32 from row `first` on; the earlier are known."""
        self._run(centroids_KD, first, refresh=False)

    def assign(self, centroids_KD: Tensor, moved_K: Tensor | None = None) -> None:
        """The exact assignment to these centroids (K, D) float32; the labels so far, where any, are first guesses.

        moved_K: how far each centroid lies from the one that labels and d2 are of. d2 may then be too large until
        `settle`: the point of a label that no other is as near to need not be read.
        """
        if moved_K is None:
            self._loose = False
            self._run(centroids_KD, 0, refresh=bool(self.labels_N[0] >= 0))
            return
        # the triangle inequality, and what rounding may take from it: d2 errs by D + 2 units, its root by half of that
        more = 1 + (2 * self.x_ND.shape[1] + 8) * ROUNDOFF
        labels, moved, d2 = self.labels_N.numpy(), moved_K.float().numpy(), self.d2_N.numpy()

        def rows(_worker: int, start: int, stop: int) -> None:
            widen(start, stop, labels, moved, more, d2)

        self.crew.each(len(d2), self._turn(1), rows)
        self._loose = True
        self._run(centroids_KD, 0, refresh=False)

    def settle(self, centroids_KD: Tensor) -> None:
        """Makes d2 exact, which is that to these centroids (K, D) float32 of the last assignment."""
        if self._loose:
            x, centroids, labels, d2 = (t.numpy() for t in (self.x_ND, centroids_KD, self.labels_N, self.d2_N))

            def span(_worker: int, start: int, stop: int) -> None:
                own_distances(x, start, stop, centroids, labels, d2)

            self.crew.each(len(x), LARGEST_TILE, span)
            self._loose = False

    def _at_once(self, count: int) -> bool:
        """Whether all products with so many centroids are taken."""
        return self.direct or (self._codes is None and count <= FEW)

    def _run(self, centroids_KD: Tensor, first: int, *, refresh: bool) -> None:
        count = len(centroids_KD) - first
        self.work.all += len(self.x_ND) * count
        if self._at_once(count):
            compared_W = [0] * self.crew.count
            compare = self._comparing(centroids_KD, first, len(self.x_ND), refresh=refresh)

            def rows(worker: int, start: int, stop: int) -> None:
                compared_W[worker] += compare(start, stop)

            self.crew.each(len(self.x_ND), self._turn(count), rows)
            self.work.computed += sum(compared_W) * count
            return
        blocks = coded_blocks(*project(centroids_KD[first:], self.basis), first, self.basis)
        step = LARGEST_TILE if self._codes is not None else self._coded_rows()
        computed = [0] * self.crew.count

        def span(worker: int, start: int, stop: int) -> None:
            for at in range(start, stop, step):
                computed[worker] += self._tile(at, min(at + step, stop), blocks, centroids_KD, refresh)

        self.crew.each(len(self.x_ND), LARGEST_TILE, span)
        self.work.computed += sum(computed)

    def _turn(self, count: int) -> int:
        """Points of one worker's turn, where each takes all products with so many centroids."""
        least = max(LEAST_TILE, LEAST_TURN // (self.x_ND.shape[1] * count))
        return max(least, -(-len(self.x_ND) // (TURNS * self.crew.count)))

    def _gaps(self, columns: Columns, centroids_KD: Tensor, count: int) -> npt.NDArray[np.float32]:
        """What `nearer_rows` asks of each centroid (K,): 0 where it is no small share of what so many points take."""
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

    def _comparing(self, centroids_KD: Tensor, first: int, of: int, *, refresh: bool) -> Callable[[int, int], int]:
        """What lowers rows start to stop by all products with the centroids from row `first` on, and says with how many
        points; of: the points that this is done for.
        """
        x, middle, centroids, labels, d2 = (
            t.numpy() for t in (self.x_ND, self.basis.middle_D, centroids_KD, self.labels_N, self.d2_N)
        )
        columns = Columns(centroids[first:], middle)
        given = middle, columns.columns_BDW, columns.half_C, columns.slack, first, centroids
        if labels[0] < 0:

            def unknown(start: int, stop: int) -> int:
                first_rows(x, start, stop, *given, labels, d2, columns.bounds(), columns.about())
                return stop - start

            return unknown
        # asked for by points whose label is a guess or a bound: not by those whose d2 is known
        gap2_K = self._gaps(columns, centroids_KD, of if first == 0 and (refresh or self._loose) else 0)
        known = refresh, self._loose, gap2_K, labels, d2

        def guessed(start: int, stop: int) -> int:
            return int(nearer_rows(x, start, stop, *given, *known, *columns.masks(), columns.about()))

        return guessed

    def _tile(self, start: int, stop: int, blocks: list[CodedBlock], centroids_KD: Tensor, refresh: bool) -> int:
        """Lowers rows start to stop by the blocks and says how many distances that took."""
        codes, code_start = self._codes, start
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
        """Of the halves 2l and 2l + 1 of each point's cluster l, the nearer, and its squared distance, in place."""
        arrays = [t.numpy() for t in (halves_2KD, self.labels_N, half_N, d2_N)]

        def span(_worker: int, start: int, stop: int) -> None:
            nearer_halves(self.x_ND.numpy(), start, stop, *arrays)

        self.crew.each(len(self.x_ND), LARGEST_TILE, span)

    def choose(self, centroids_KD: Tensor) -> None:
        """Takes what answers fastest on a sample of the points against these centroids (K, D) float32: all products,
        or a basis, which must pay for coding all points anew within WORTH_ITERATIONS.
        """
        n, dims = self.x_ND.shape
        if n * dims * len(centroids_KD) < SMALL_WORK:
            return
        started = time.perf_counter()
        # a point compared with copies would be so in float64
        trial = _Trial(self, torch.unique(centroids_KD, dim=0))
        if self._candidates is None:
            self._candidates = self._bases(dims)
        kept = None if self.direct else self.basis
        taken: dict[Basis | None, float] = {}
        for basis in [*self._candidates, None]:
            taken[basis] = trial.seconds_per_row(basis, basis is kept)
        best = min(taken, key=taken.__getitem__)
        if best is kept or taken[best] > BETTER * taken[kept]:
            return
        self.use(best)
        codes = (
            "codes made as points are read"
            if self._codes is None
            else f"{self.basis.row_bytes * n / 2**20:.0f} MiB of codes"
        )
        log.info(
            "%s: %.1f us a point; chosen and coded in %.2f s", "all products" if best is None else f"{best}, {codes}",
            taken[best] * 1e6, time.perf_counter() - started,
        )  # fmt: skip

    def _bases(self, dims: int) -> list[Basis]:
        """What may be chosen but all products: codes of all dims, or of ever more axes."""
        middle_D, product = self.basis.middle_D, integer_product() or FLOAT32
        bases = [Basis(middle_D, product=product)] if product.integers and dims <= MOST_DIMS else []
        widths = [width for width in WIDTHS if width <= 0.75 * dims and width % product.depth == 0]
        if widths:
            sample_SD = self.x_ND[:: max(1, len(self.x_ND) // SAMPLE_ROWS)][:SAMPLE_ROWS]
            bases += principal_bases(sample_SD, middle_D, widths, product)
        return bases

    def room(self) -> int:
        """Bytes that codes of all points may take."""
        if self._code_budget is None:
            self._code_budget = int(CODE_SHARE * free_memory())
        return self._code_budget

    def use(self, basis: Basis | None) -> None:
        """All products from now on, or codes by this basis: all points at once, where that fits the budget and is no
        plain copy.
        """
        self.direct, self._codes = basis is None, None
        if basis is None:
            return
        self.basis, n = basis, len(self.x_ND)
        if basis.row_bytes * n > self.room() or not (basis.product.integers or basis.axes_DP is not None):
            return
        codes = Codes(n, basis)

        def span(_worker: int, start: int, stop: int) -> None:
            encode(*project(self.x_ND[start:stop], basis), basis, codes, start)

        self.crew.each(n, self._coded_rows(), span)
        self._codes = codes

    def _coded_rows(self) -> int:
        return min(LARGEST_TILE, max(LEAST_TILE, CODED_NUMBERS // self.x_ND.shape[1]))


class _Trial(Assignment):
    """Points drawn at random and their true labels, on which ways to assign are timed by one worker.

    Not evenly spaced ones: centroids may be that, and a point that is a centroid is told from others by any bound.
    """

    def __init__(self, of: Assignment, centroids_KD: Tensor) -> None:
        rows_S = torch.randint(len(of.x_ND), (TRIAL_ROWS,), generator=torch.Generator().manual_seed(0))
        x_SD = of.x_ND[rows_S.sort().values]
        super().__init__(x_SD, of.basis.middle_D, of.crew, 0)
        self.assign(centroids_KD)
        self._loose = True
        self.centroids_KD, self.of, self.few_seconds = centroids_KD, of, torch.inf

    def seconds_per_row(self, basis: Basis | None, coded: bool) -> float:
        """The least time of one assignment, labels known, with codes kept where all points' would be; and of coding
        them, unless they are coded, its share of WORTH_ITERATIONS. Infinity where few rows took far longer than before.
        """
        rows = len(self.x_ND)
        self._code_budget = self.of.room() // max(1, len(self.of.x_ND) // rows)
        started = time.perf_counter()
        self.use(basis)
        coding = 0.0 if coded or self._codes is None else (time.perf_counter() - started) / WORTH_ITERATIONS
        if basis is None:
            compare = self._comparing(self.centroids_KD, 0, len(self.of.x_ND), refresh=False)
        else:
            blocks = coded_blocks(*project(self.centroids_KD, basis), 0, basis)
            step = LARGEST_TILE if self._codes is not None else self._coded_rows()

        def seconds(stop: int) -> float:
            started = time.perf_counter()
            if basis is None:
                compare(0, stop)
            else:
                for at in range(0, stop, step):
                    self._tile(at, min(at + step, stop), blocks, self.centroids_KD, False)
            return time.perf_counter() - started

        few = seconds(min(PROBE_ROWS, rows))
        if few > HOPELESS * self.few_seconds:
            return torch.inf
        self.few_seconds = min(self.few_seconds, few)
        return (min(seconds(rows) for _ in range(TRIALS)) + coding) / rows
