"""How steep the field's kernels are: as unseen rows have it, for embedders and corpora differ by more than tenfold.

Suffix: N rows.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rb_gpu.field import SLOPE_BOUNDS
from rb_gpu.learn.field import Kernel, likelihoods

# where the search begins
USUAL = (2.0, 4.0)
# by how much the outermost slope tried must be likelier than the one before it for a further one to be tried: where
# nothing is foretold all are alike
LIKELIER = 2.0


def two_slopes(kernel_of: Callable[[float], Kernel], y_N: Tensor) -> dict[float, Kernel]:
    """Two kernels by slope, the second twice as steep: the likeliest one for y (N,), and the likelier one beside it.

    From the usual ones on towards the likelier, each twice or half the last, as long as the outermost is the likeliest:
    by the leave-one-out errors of what tells configs apart (`likelihoods`). A scale at which the usual slopes show
    nothing is not found.
    """
    tried = {slope: kernel_of(slope) for slope in USUAL}
    share = _shares(tried, y_N)
    step = 2.0 if share[USUAL[1]] > share[USUAL[0]] else 0.5
    while True:
        outer, inner = sorted(tried, reverse=step > 1.0)[:2]
        beyond = outer * step
        if share[outer] <= LIKELIER * share[inner] or not SLOPE_BOUNDS[0] <= beyond <= SLOPE_BOUNDS[1]:
            break
        tried = {outer: tried[outer], inner: tried[inner], beyond: kernel_of(beyond)}
        share = _shares(tried, y_N)
    first = max(sorted(tried)[:-1], key=lambda slope: share[slope] + share[2.0 * slope])
    return {slope: tried[slope] for slope in (first, 2.0 * first)}


def _shares(tried: dict[float, Kernel], y_N: Tensor) -> dict[float, float]:
    return dict(zip(tried, likelihoods(list(tried.values()), y_N).tolist(), strict=True))
