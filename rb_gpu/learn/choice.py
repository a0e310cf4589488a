"""Chooses the assignment method on the CPU: the one that takes the least time on a sample of the points.

The choice affects the running time, never a label or a distance. Suffixes: S points of a trial, K centroids, D dims.
"""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor

from rb_gpu.learn.assign import LARGEST_TILE, Assignment
from rb_gpu.learn.assign_device import DeviceAssignment
from rb_gpu.learn.coarse import Basis, coded_blocks, principal_bases, project
from rb_gpu.learn.products import FLOAT32, MOST_DIMS, integer_product

log = logging.getLogger(__name__)

# multiplications per assignment below which choosing takes longer than it saves
SMALL_WORK = 2**30
WIDTHS = (32, 64, 128, 256)
SAMPLE_ROWS = 2048
TRIAL_ROWS, TRIALS = 1024, 2
# a trial stops if these few rows take this many times as long as with the fastest method so far
PROBE_ROWS, HOPELESS = 128, 2
# the current method is replaced only by one that takes less than this share of its time, as short trials are noisy
BETTER = 0.85
# the number of iterations within which coding all points must pay for itself
WORTH_ITERATIONS = 10


def choose(points: Assignment | DeviceAssignment, centroids_KD: Tensor) -> None:
    """Switches points to the method that is fastest on a sample of them with these centroids (K, D) float32.

    The candidates are all products and several bases of codes; coding all points anew must pay for itself within
    WORTH_ITERATIONS. On a GPU there is only one method, and nothing is done.
    """
    if isinstance(points, DeviceAssignment):
        return
    n, dims = points.x_ND.shape
    if n * dims * len(centroids_KD) < SMALL_WORK:
        return
    started = time.perf_counter()
    # ties between copies of a centroid would fall back to float64 and distort the timing
    trial = Trial(points, torch.unique(centroids_KD, dim=0))
    if points.candidates is None:
        points.candidates = bases_of(points)
    kept = None if points.direct else points.basis
    taken: dict[Basis | None, float] = {}
    for basis in [*points.candidates, None]:
        taken[basis] = trial.seconds_per_row(basis, basis is kept)
    best = min(taken, key=taken.__getitem__)
    if best is kept or taken[best] > BETTER * taken[kept]:
        return
    points.use(best)
    codes = (
        "codes made as points are read"
        if points.codes is None
        else f"{points.basis.row_bytes * n / 2**20:.0f} MiB of codes"
    )
    log.info(
        "%s: %.1f us a point; chosen and coded in %.2f s", "all products" if best is None else f"{best}, {codes}",
        taken[best] * 1e6, time.perf_counter() - started,
    )  # fmt: skip


def bases_of(points: Assignment) -> list[Basis]:
    """The alternatives to all products: codes of all dims, and of increasing numbers of principal axes."""
    (n, dims), middle_D, product = points.x_ND.shape, points.basis.middle_D, integer_product() or FLOAT32
    bases = [Basis(middle_D, product=product)] if product.integers and dims <= MOST_DIMS else []
    widths = [width for width in WIDTHS if width <= 0.75 * dims and width % product.depth == 0]
    if widths:
        sample_SD = points.x_ND[:: max(1, n // SAMPLE_ROWS)][:SAMPLE_ROWS]
        bases += principal_bases(sample_SD, middle_D, widths, product)
    return bases


class Trial(Assignment):
    """Randomly drawn points with their true labels, on which one worker times the methods.

    They are not evenly spaced rows, because the centroids may be such rows, and any bound separates a point from the
    others when the point itself is a centroid.
    """

    def __init__(self, of: Assignment, centroids_KD: Tensor) -> None:
        rows_S = torch.randint(len(of.x_ND), (TRIAL_ROWS,), generator=torch.Generator().manual_seed(0))
        x_SD = of.x_ND[rows_S.sort().values]
        super().__init__(x_SD, of.basis.middle_D, of.crew, 0)
        self.assign(centroids_KD)
        self._loose = True
        self.centroids_KD, self.of, self.few_seconds = centroids_KD, of, torch.inf

    def seconds_per_row(self, basis: Basis | None, coded: bool) -> float:
        """The least time per row of one assignment with known labels, plus a 1/WORTH_ITERATIONS share of the time to
        code the points unless they are coded already; codes are kept only if those of all points would be. Infinity
        where the probe rows took far longer than before.
        """
        rows = len(self.x_ND)
        self._code_budget = self.of.room() // max(1, len(self.of.x_ND) // rows)
        started = time.perf_counter()
        self.use(basis)
        coding = 0.0 if coded or self.codes is None else (time.perf_counter() - started) / WORTH_ITERATIONS
        if basis is None and self.by_differences(len(self.centroids_KD)):
            compare = self.following(
                self.centroids_KD, torch.zeros(len(self.centroids_KD), dtype=torch.float64), len(self.of.x_ND)
            )
        elif basis is None:
            compare = self.comparing(self.centroids_KD, 0, len(self.of.x_ND), refresh=False)
        else:
            blocks = coded_blocks(*project(self.centroids_KD, basis), 0, basis)
            step = LARGEST_TILE if self.codes is not None else self.coded_rows()

        def seconds(stop: int) -> float:
            started = time.perf_counter()
            if basis is None:
                self._next_N.zero_()
                compare(0, stop)
            else:
                for at in range(0, stop, step):
                    self.tile(at, min(at + step, stop), blocks, self.centroids_KD, False)
            return time.perf_counter() - started

        few = seconds(min(PROBE_ROWS, rows))
        if few > HOPELESS * self.few_seconds:
            return torch.inf
        self.few_seconds = min(self.few_seconds, few)
        return (min(seconds(rows) for _ in range(TRIALS)) + coding) / rows
