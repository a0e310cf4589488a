"""Validates the inputs of k-means and converts them to float32 tensors, in a frame where float32 represents them well.

Suffixes: N points on this rank, K centroids, D dims, S points of a sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rb_gpu.learn.devices import tiles
from rb_gpu.learn.distances import normalise_
from rb_gpu.learn.distributed import Ranks
from rb_gpu.learn.shard import Shard, peaks
from rb_gpu.learn.workers import Workers

Array = npt.NDArray[Any] | Tensor

MIDDLE_ROWS = 1024
# dtypes that float32 would round; 8 and 16 bits fit exactly
WIDE = (torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64)
# range of the largest |x| in which squares, products of squares and their differences stay within float32's range
LEAST_PEAK, MOST_PEAK = 2.0**-40, 2.0**40
# float64's exponent range, with room for factors
MOST_EXPONENT = 1000
# largest distance from the frame's origin at which squared distances to points, and their doubles, stay finite
FARTHEST = 2.0**62
# rows that one worker converts at a time: the float64 intermediates stay in a cache
CONVERTED_ROWS = 256


class _Writable:
    """Presents a read-only array as writable: torch warns about read-only arrays, and Python's warning filters cannot
    be changed for a single thread.
    """

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def tensor_of(name: str, array: Array) -> Tensor:
    """The array as a tensor of real numbers that shares its memory where possible; it must not be written to.

    Raises ValueError where it is sparse, complex, or of objects.
    """
    tensor: Tensor = array if isinstance(array, Tensor) else torch.from_numpy(_real_values(name, array))
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name} is sparse ({tensor.layout}); give {name}.to_dense()")
    if tensor.is_complex():
        raise ValueError(f"{name} is of dtype {tensor.dtype}; give real numbers, such as {name}.real")
    return tensor.detach()


def _real_values(name: str, array: Any) -> npt.NDArray[Any]:
    """The array as torch accepts it: contiguous, in native byte order, of at most 64 bits, and nominally writable."""
    if hasattr(array, "tocsr"):
        raise ValueError(f"{name} is sparse ({type(array).__name__}); give {name}.toarray()")
    values = np.ascontiguousarray(array)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{name} is of dtype {values.dtype}; give real numbers, such as {name}.astype('float32')")
    kind = np.dtype(np.float64) if values.dtype.itemsize > 8 else values.dtype.newbyteorder("=")
    # NumPy takes a reversed axis of length 1 for contiguous, torch refuses its negative stride
    values = values.astype(kind, copy=min(values.strides, default=0) < 0)
    return values if values.flags.writeable else np.asarray(_Writable(values))


@dataclass(frozen=True)
class Frame:
    """Float32 points represent x = origin + point / scale. origin (D,) float64, or None: 0 and float32 results."""

    origin_D: Tensor | None = None
    scale: float = 1.0

    def into(self, x_ND: Tensor) -> Tensor:
        """Rows x (N, D) as points of the frame, float32."""
        if self.origin_D is not None:
            return ((x_ND.double() - self.origin_D.to(x_ND.device)) * self.scale).float()
        return x_ND.float() if self.scale == 1 else (x_ND.double() * self.scale).float()

    def out(self, points_ND: Tensor) -> Tensor:
        """What points (N, D) float32 represent: float64 where there is an origin, else float32."""
        if self.origin_D is not None:
            return points_ND.double() / self.scale + self.origin_D.to(points_ND.device)
        return points_ND if self.scale == 1 else (points_ND.double() / self.scale).float()

    def points(self, x_ND: Tensor, crew: Workers | None) -> Tensor:
        """`into` for many rows; returns them unchanged if they are float32 already and the frame is the identity."""
        if x_ND.dtype == torch.float32 and self.scale == 1 and x_ND.is_contiguous():
            return x_ND
        out_ND = torch.empty(x_ND.shape, dtype=torch.float32, device=x_ND.device)

        def rows(_worker: int, start: int, stop: int) -> None:
            out_ND[start:stop] = self.into(x_ND[start:stop])

        if crew is None:
            for tile in tiles(len(x_ND), 4 * x_ND.shape[1], x_ND.device):
                rows(0, tile.start, tile.stop)
        else:
            crew.each(len(x_ND), CONVERTED_ROWS, rows)
        return out_ND


@dataclass(frozen=True)
class Points:
    """Points (N, D) float32, the largest |coordinate| and the norm of each (N,), and the frame that they are in."""

    x_ND: Tensor
    peak_N: Tensor
    norm_N: Tensor
    frame: Frame


def framed(
    x_ND: Tensor, metric: str, crew: Workers | None, where: torch.device, budget: int | None, ranks: Ranks
) -> Points:
    """The points x (N, D) of any real dtype in a frame of their own, the same on all ranks: centred on a middle where
    float32 would round away their differences, and scaled by a power of two where its range is too small.

    Raises ValueError on NaN and infinity.
    """
    frame = Frame()
    if x_ND.dtype in WIDE:
        weight_N = torch.ones(len(x_ND), dtype=torch.float32, device=x_ND.device)
        sample_SD = Shard(x_ND, weight_N, ranks).sample(MIDDLE_ROWS).double()
        frame = Frame(median_of(sample_SD) if metric == "l2" else torch.zeros_like(sample_SD[0]))
    points = _measured(x_ND, frame, crew, where, budget)
    largest = float(points.peak_N.max())
    if metric == "l2":
        if frame.origin_D is not None and not 0 < largest < math.inf:
            largest = _reach(x_ND, frame.origin_D)
        scale = scale_for(ranks.largest(largest))
        if scale != 1:
            points = _measured(x_ND, replace(frame, scale=scale), crew, where, budget)
    if not bool(torch.isfinite(points.peak_N).all()):
        raise ValueError("x holds NaN, infinity or values whose distances overflow float64; drop those rows first")
    return points


def _measured(x_ND: Tensor, frame: Frame, crew: Workers | None, where: torch.device, budget: int | None) -> Points:
    points_ND = frame.points(x_ND, crew)
    if crew is not None or budget is None or points_ND.numel() * 4 <= budget:
        points_ND = points_ND.to(where)
    return Points(points_ND, *peaks(points_ND, crew, where, budget), frame)


def _reach(x_ND: Tensor, origin_D: Tensor) -> float:
    """The largest |x − origin| in float64, where it over- or underflows in float32."""
    spans = tiles(len(x_ND), 4 * x_ND.shape[1], x_ND.device)
    return max(float((x_ND[tile].double() - origin_D).abs().max()) for tile in spans)


def scale_for(peak: float) -> float:
    """The power of two that scales numbers up to `peak` to about 1 if float32 could not square them; else 1."""
    if LEAST_PEAK <= peak <= MOST_PEAK or peak == 0 or not math.isfinite(peak):
        return 1.0
    return 2.0 ** -max(-MOST_EXPONENT, min(MOST_EXPONENT, math.frexp(peak)[1]))


def median_of(sample_SD: Tensor) -> Tensor:
    """The median of each dim (D,), robust to outliers."""
    middle = (len(sample_SD) - 1) // 2
    # on the host, torch's sort takes as long as ten iterations of a small table, and np.partition is ten times slower
    # than np.sort if most values are equal, as in counts
    if sample_SD.device.type == "cpu":
        return torch.from_numpy(np.sort(sample_SD.T.contiguous().numpy(), axis=1)[:, middle].copy())
    # torch's own median is not deterministic on a GPU
    return sample_SD.sort(dim=0).values[middle]


def checked_matrix(x: Array) -> Tensor:
    """X (N, D) as a tensor. Raises ValueError where it is not a matrix of real numbers."""
    points = tensor_of("x", x)
    if points.ndim != 2 or points.shape[0] == 0 or points.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(points.shape)}; give a non-empty (N, D) matrix")
    return points


def checked_counts(**counts: int) -> tuple[int, ...]:
    """The counts as Python integers. Raises ValueError where one is not an integer >= 1."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name}={value!r} is not an integer >= 1; give one")
    return tuple(int(value) for value in counts.values())


def generator_of(seed: int, device: torch.device) -> torch.Generator:
    """A generator with this seed. Raises ValueError where torch does not accept the seed."""
    try:
        return torch.Generator(device=device).manual_seed(index(seed))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"seed={seed!r} is not an integer from -2^63 to 2^64 - 1; give one") from error


def checked_weight(weight: Array | None, n: int, ranks: Ranks) -> tuple[Tensor, float]:
    """Weights (n,) float32, and the power of two that they were scaled by, the same on all ranks."""
    if weight is None:
        return torch.ones(n, dtype=torch.float32), 1.0
    weights = tensor_of("weight", weight).double()
    right = weights.shape == (n,) and bool((torch.isfinite(weights) & (weights >= 0)).all())
    largest = ranks.largest(float(weights.max()) if right else math.nan)
    if not right or not largest > 0:
        raise ValueError(f"weight has shape {tuple(weights.shape)}; give {n} finite numbers >= 0, one of them positive")
    scale = scale_for(largest)
    return (weights * scale).float(), scale


def checked_start(name: str, given: Array, points: Points, metric: str, device: torch.device) -> Tensor:
    """Centroids (K, D) float32 in the points' frame, on the device; of norm 1 for cosine.

    Raises ValueError where they are not a finite matrix of that shape, or too far from the points.
    """
    dims = points.x_ND.shape[1]
    start = tensor_of(name, given).to(device)
    if start.ndim != 2 or start.shape[1] != dims or len(start) == 0 or not bool(torch.isfinite(start.double()).all()):
        raise ValueError(f"{name} has shape {tuple(start.shape)}; give finite (K, {dims}) centroids")
    if metric == "cosine":
        return normalise_(start.float().clone())
    start_KD = points.frame.into(start).contiguous()
    far = float(start_KD.double().norm(dim=1).max())
    if not far <= FARTHEST:
        bound = FARTHEST / points.frame.scale
        raise ValueError(
            f"{name} reaches {float(start.double().abs().max()):.3g}, but distances to x overflow from {bound:.3g} on; "
            "give centroids near the points"
        )
    return start_KD
