"""Chooses how steep the field's kernels are by leave-one-out error: the best slope differs more than tenfold between
embedders and corpora.

Suffix: N rows.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rb_gpu.field import SLOPE_BOUNDS
from rb_gpu.learn.field import Kernel, likelihoods

# where the search starts
USUAL = (2.0, 4.0)
# the search goes on only if the outermost slope's weight exceeds this many times that of the one before it: where
# nothing can be predicted, all slopes weigh about the same
LIKELIER = 2.0


def two_slopes(kernel_of: Callable[[float], Kernel], y_N: Tensor) -> dict[float, Kernel]:
    """Two kernels by slope, the second twice as steep: of the slopes tried, the adjacent pair of greatest weight.

    The search starts from the usual slopes and doubles or halves towards the likelier one as long as the outermost is
    clearly the likeliest, judged by the leave-one-out error of differences between configs (`likelihoods`). A scale at
    which the usual slopes show nothing is not found.
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
