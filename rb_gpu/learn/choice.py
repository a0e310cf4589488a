"""Which way to assign points on the CPU is in use: what takes least time on a sample of them.

What is chosen changes the time and never a label or a distance. Suffixes: S points of a trial, K centroids, D dims.
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

# multiplications of one assignment below which a choice takes longer than it saves
SMALL_WORK = 2**30
WIDTHS = (32, 64, 128, 256)
SAMPLE_ROWS = 2048
TRIAL_ROWS, TRIALS = 1024, 2
# a trial ends where these few rows take so many times as long as with what was tried before
PROBE_ROWS, HOPELESS = 128, 2
# what is in use stays unless another takes less than this share of its time: trials are short
BETTER = 0.85
# iterations over which coding all points must pay
WORTH_ITERATIONS = 10


def choose(points: Assignment | DeviceAssignment, centroids_KD: Tensor) -> None:
    """Makes points take what answers fastest on a sample of them against these centroids (K, D) float32: all products,
    or a basis, which must pay for coding all points anew within WORTH_ITERATIONS. On a device there is one way.
    """
    if isinstance(points, DeviceAssignment):
        return
    n, dims = points.x_ND.shape
    if n * dims * len(centroids_KD) < SMALL_WORK:
        return
    started = time.perf_counter()
    # a point compared with copies would be so in float64
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
    """What may be chosen but all products: codes of all dims, or of ever more axes."""
    (n, dims), middle_D, product = points.x_ND.shape, points.basis.middle_D, integer_product() or FLOAT32
    bases = [Basis(middle_D, product=product)] if product.integers and dims <= MOST_DIMS else []
    widths = [width for width in WIDTHS if width <= 0.75 * dims and width % product.depth == 0]
    if widths:
        sample_SD = points.x_ND[:: max(1, n // SAMPLE_ROWS)][:SAMPLE_ROWS]
        bases += principal_bases(sample_SD, middle_D, widths, product)
    return bases


class Trial(Assignment):
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
