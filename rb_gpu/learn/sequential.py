"""Always-valid p-values, which stay valid if someone looks every night, from the statistics of the fixed-n test.

Suffixes: P patterns, C configs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import special

Floats = npt.NDArray[np.float64]

# Rows of each of two equal samples at which the boundary of level .05 is tightest. It is fixed before any data are
# seen, as the proof demands. From a tenth to some hundred times as many rows, an effect that the fixed-n test detects
# with probability .8 is detected with two to three times its rows.
TUNED_ROWS = 250
LEVEL = 0.05
# Mixture precision per row, so that the boundary is tightest at TUNED_ROWS (Waudby-Smith et al. 2021, appendix, after
# Howard et al. 2021, 3.5); the one-sided boundary of level α is nearly the two-sided one of 2α.
_LOG = -2.0 * np.log(2.0 * LEVEL)
MIXTURE = float((_LOG + np.log(_LOG) + 1.0) / TUNED_ROWS)


def sequential_p(z: Floats, size: Floats) -> Floats:
    """Always-valid one-sided p-values, elementwise; NaN stays NaN.

    z: effect so far over its standard error. size: effective rows, σ² over the squared standard error, with σ² the
    variance of one difference (for two samples, the sum of their variances).

    The half-normal mixture of likelihood ratios (Robbins 1970; Howard, Ramdas, McAuliffe & Sekhon 2021; the mSPRT of
    Johari, Pekelis & Walsh 2017) M = 2·(1 + r)^(−1/2)·exp(z²r / (2(1 + r)))·Φ(z·√(r / (1 + r))), r = MIXTURE·size, is a
    supermartingale for every true effect <= 0, so that P(1/M ever <= α) <= α (Ville 1939): at every number of rows,
    under any stopping rule, and for the running minimum over nights. Variances are estimated, so this holds only
    asymptotically (Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas 2021, arXiv 2103.06476), but exactly for symmetric
    differences if z is standardised by their squares about 0 (de la Peña 1999).
    """
    r = MIXTURE * size
    share = r / (1.0 + r)
    log_ratio = np.log(2.0) - 0.5 * np.log1p(r) + 0.5 * z * z * share + special.log_ndtr(z * np.sqrt(share))
    return np.asarray(np.exp(-np.maximum(log_ratio, 0.0)))
