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
