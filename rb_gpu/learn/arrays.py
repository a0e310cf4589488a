"""Functions that torch lacks, computed where the numbers lie: by NumPy and SciPy on the host, by CuPy on a GPU.

Both libraries use the same names, so that one line of code runs on either; torch tensors are exchanged with them
without a copy (DLPack). What the judge computes today lies on the host; `suite=gpu` of the benchmark measures both.
Suffix: N numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from rb_gpu.errors import ConfigError


@dataclass(frozen=True)
class Arrays:
    """xp: numpy or cupy. special: scipy.special or cupyx.scipy.special."""

    xp: Any
    special: Any

    def of(self, tensor: Tensor) -> Any:
        """An array that shares the tensor's memory."""
        return self.xp.from_dlpack(tensor.detach())

    def tensor(self, array: Any) -> Tensor:
        """A tensor that shares the array's memory."""
        tensor: Tensor = from_dlpack(array)
        return tensor


HOST = Arrays(np, special)


def on_gpu() -> Arrays:
    """Arrays of CuPy. Raises ConfigError where it is not installed."""
    try:
        import cupy
        import cupyx.scipy.special
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed; pip install 'rb_gpu[gpu]', or 'rb_gpu[gpu-cu12]' for CUDA 12"
        ) from error
    return Arrays(cupy, cupyx.scipy.special)


def student_tail(t_N: Any, freedom_N: Any, arrays: Arrays = HOST) -> Any:
    """P(T > t) under Student's t with ν = freedom; NaN where an argument is.

    Computed from the regularised incomplete beta function I (Abramowitz & Stegun 26.5.27): as half of I_x(ν/2, 1/2)
    with x = ν / (ν + t²), or of 1 − I_{1−x}(1/2, ν/2) where |t| < 1, because x near 1 preserves few digits of t. The
    relative error is at most 1e-8 up to ν = 1e8.
    """
    where = arrays.xp.where
    square_N, half_N = t_N * t_N, freedom_N / 2
    near_N = square_N < 1
    share_N = where(near_N, square_N, freedom_N) / (freedom_N + square_N)
    beta_N = arrays.special.betainc(where(near_N, 0.5, half_N), where(near_N, half_N, 0.5), share_N)
    tail_N = where(near_N, 1 - beta_N, beta_N) / 2
    return where(t_N < 0, 1 - tail_N, tail_N)


def weighted_quantiles(values_N: Any, weight_N: Any, levels: Sequence[float], arrays: Arrays = HOST) -> Any:
    """For each level, the least value (N,) at or below which lies that share of the weight; NaN without values."""
    if len(values_N) == 0:
        return arrays.xp.full(len(levels), np.nan)
    order_N = arrays.xp.argsort(values_N, kind="stable")
    running_N = arrays.xp.cumsum(weight_N[order_N]) / weight_N.sum()
    at = arrays.xp.searchsorted(running_N, arrays.xp.asarray(levels, dtype=running_N.dtype))
    return values_N[order_N][arrays.xp.minimum(at, len(values_N) - 1)]
