"""The standard normal distribution, without SciPy."""

from __future__ import annotations

import math

import numpy as np

from rb_gpu.evidence import Floats

_erf = np.frompyfunc(math.erf, 1, 1)


def normal_cdf(z: Floats) -> Floats:
    """Standard normal distribution function, elementwise."""
    return 0.5 * (1.0 + np.asarray(_erf(z / math.sqrt(2.0)), dtype=np.float64))


def normal_quantile(share: float) -> float:
    """The value below which a standard normal variable falls with probability `share`, by bisection; ±40 at 0 and 1."""
    low, high = -40.0, 40.0
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if 0.5 * math.erfc(-middle / math.sqrt(2.0)) < share else (low, middle)
    return high


def as_normal(t: Floats, freedom: Floats) -> Floats:
    """The standard normal quantile, above 0, that is exceeded as often as t >= 0 by Student's t with `freedom` degrees
    of freedom (Wallace 1959, off by a tenth of the tail at most from 2 on); elementwise. 0 without any freedom.
    """
    finite = np.where(np.isfinite(freedom), np.maximum(freedom, 1e-9), 1.0)
    squared = np.where(np.isfinite(freedom), finite * np.log1p(t**2 / finite), t**2)
    shrunk = np.where(np.isfinite(freedom), (8.0 * finite + 1.0) / (8.0 * finite + 3.0), 1.0)
    return np.asarray(shrunk * np.sqrt(squared))
