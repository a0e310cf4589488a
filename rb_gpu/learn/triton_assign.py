"""The exact nearest centroid of every point on a GPU: coarse products in Triton, then float64 for what is in doubt.

`nearest_kernel` streams tiles of centroids past a tile of points, keeps each point's two least bounds in registers, and
writes a label and a distance: O(ND + KD) bytes of traffic, no N x K matrix. Points that it cannot decide are listed,
and `settle_kernel` decides them in float64. Labels are those of float64 distances, with ties going to the lowest label,
whatever the precision and the block shape; labels whose distances differ by less than 2(D + 2)·2^-53 of the distance
may be swapped, as in any float64 sum.

The bound. With y = x − m and z = c − m about the middle m, the score ||z||²/2 − y·z orders the centroids as ||x − c||²
does. The product sees codes ŷ and ẑ (tf32, bf16 or float32; rounded here, so that the tensor cores truncate nothing):
    |y·z − ŷ·ẑ| <= ||y − ŷ||·||ẑ|| + ||y||·||z − ẑ||                                        (Cauchy and Schwarz)
and both residuals are computed from the numbers themselves. Summing the products errs by at most
ACCUMULATED·D·||ŷ||·||ẑ||: products of codes are exact in float32, and tensor cores add them aligned to the largest, cut
to 24 bits or more (Fasi, Higham, Mikaitis & Pranesh 2021): an error below 2^-23 of the sum of |terms| per term, and as
much again for each sum. Float32 rounding of y, z, ||z||²/2 and the score itself adds at most
8·2^-24·||y||·||z|| + 2^-21·||z||²/2. So with
    spread = largest ||z − ẑ||/||z|| + ACCUMULATED·D + 2^-21,   a = ||y − ŷ|| + spread·||y||,   both + (D + 64)·2^-23,
every score is within e = a·||z|| + 2^-21·||z||²/2 of the coarse one. Norms are padded by √D·2^-50, so that e also
covers products of numbers that are flushed to 0 (each errs by at most 2^-126). A point is decided where the least lower
bound plus 2e is below every other lower bound; else all centroids below that value are measured. Where a product of
norms overflows float32, nothing is decided and all centroids are measured.

Suffixes: N points, M new centroids (padded to whole blocks in `Coded`), K centroids, D dims, W padded dims of a code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from rb_gpu.errors import ConfigError
from rb_gpu.learn import triton_kernels as kernels
from rb_gpu.learn.devices import LEAST_CAPABILITY
from rb_gpu.learn.streaming import chunks

# summation error as a share of D·||ŷ||·||ẑ||; without tensor cores every sum is rounded once
ACCUMULATED = {"tf32": 2.0**-22, "bf16": 2.0**-22, "ieee": 2.0**-23}
# the largest tile of centroids: codes are padded to a multiple of this, so that no tile reads beyond them
LARGEST_BLOCK_K = 128
BLACKWELL = (10, 0)
# up to this many dims, points stay in shared memory while the centroids stream past
HELD_DIMS = 128
# dims per step without tensor cores, where products are unrolled
IEEE_DIMS = 16
# columns of the sums of squares: they determine the order of summation and thus the result's bits
SUM_COLUMNS = 32
SETTLE_SHAPE = {"BLOCK_N": 32, "BLOCK_K": 64, "BLOCK_D": 32}
SETTLE_PROGRAMS = 1024
# from this many points on a whole GPU is busy: the fastest block shape may differ from that for fewer points
MANY_POINTS = 2**17


def width_of(dims: int) -> int:
    """Dims that a code is padded to: a power of two up to HELD_DIMS, above that whole blocks of 64."""
    return max(16, triton.next_power_of_2(dims)) if dims <= HELD_DIMS else -(-dims // 64) * 64


def block_shapes() -> list[Any]:
    """The autotuner's candidates: tiles of points and centroids that fill the tensor cores without register spills."""
    # the first shape with two stages is the one that fits an L4's shared memory at 128 dims in tf32
    shapes = [(64, 64, HELD_DIMS, 4, 2), (64, 64, HELD_DIMS, 4, 3), (128, 64, HELD_DIMS, 8, 3),
              (128, 128, HELD_DIMS, 8, 2), (64, 64, 32, 4, 3), (128, 64, 32, 8, 3), (128, 128, 32, 8, 3),
              (32, 64, IEEE_DIMS, 4, 3)]  # fmt: skip
    return [
        triton.Config({"BLOCK_N": n, "BLOCK_K": k, "BLOCK_D": d}, num_warps=warps, num_stages=stages)
        for n, k, d, warps, stages in shapes
    ]


def shapes_within(
    configs: list[Any], width: int, precision: str, shared: int, capability: tuple[int, int]
) -> list[Any]:
    """The block shapes for codes of this width that fit `shared` bytes of shared memory, and the registers.

    Raises ConfigError where none does.
    """
    size, kept = (2 if precision == "bf16" else 4), []
    for config in configs:
        n, k, d = (config.kwargs[name] for name in ("BLOCK_N", "BLOCK_K", "BLOCK_D"))
        held = d == HELD_DIMS
        if (precision == "ieee") != (d == IEEE_DIMS) or (precision != "ieee" and held != (width <= HELD_DIMS)):
            continue
        # on Blackwell, the products of a held 128 x 128 tile move from tensor memory into registers all at once
        if held and k == LARGEST_BLOCK_K and capability >= BLACKWELL:
            continue
        d = min(d, width)
        if (n * d * size if held else config.num_stages * n * d * 4) + config.num_stages * k * d * size <= shared:
            kept.append(triton.Config({**config.kwargs, "BLOCK_D": d}, config.num_warps, config.num_stages))
    if not kept:
        raise ConfigError(
            f"cluster.engine=triton has no tile of {width} dims in {shared} bytes of a GPU's shared memory; "
            "set cluster.engine=torch"
        )
    return kept


def settle_shape(width: int, precision: str) -> dict[str, int]:
    """The block shape of `settle_kernel` for codes of this width."""
    if precision == "ieee":
        return SETTLE_SHAPE | {"BLOCK_K": 32, "BLOCK_D": IEEE_DIMS}
    return SETTLE_SHAPE | {"BLOCK_D": min(width, SETTLE_SHAPE["BLOCK_D"])}


def _fitting(configs: list[Any], _arguments: dict[str, Any], **meta: Any) -> list[Any]:
    """Triton's early_config_prune callback: keeps the shapes that fit the current device."""
    properties = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
    shared = properties["max_shared_mem"]
    return shapes_within(configs, meta["WIDTH"], meta["PRECISION"], shared, torch.cuda.get_device_capability())


nearest_kernel = triton.autotune(
    block_shapes(), ["n_class", "k_class", "WIDTH", "PRECISION"], prune_configs_by={"early_config_prune": _fitting},
    restore_value=["labels_ptr", "d2_ptr", "count_ptr"], cache_results=True,
)(kernels.nearest_kernel)  # fmt: skip


@dataclass(frozen=True)
class Coded:
    """New centroids as the kernels read them, padded to whole blocks by infinitely far ones.

    code (M, WIDTH); low, slack and norm (M,) float32: half the squared norm less its slack, the slack, the padded norm;
    limits (3,): spread, a growth factor that covers rounding of norms, the largest norm.
    """

    code_MW: Tensor
    low_M: Tensor
    slack_M: Tensor
    norm_M: Tensor
    limits_3: Tensor
    pad: float


def coded(new_MD: Tensor, middle_D: Tensor, precision: str) -> Coded:
    """The codes of centroids (M, D) float32 about the middle (D,)."""
    count, dims = new_MD.shape
    pad = dims**0.5 * 2.0**-50
    rows = -(-count // LARGEST_BLOCK_K) * LARGEST_BLOCK_K
    z_MW = torch.zeros(rows, width_of(dims), dtype=torch.float32, device=new_MD.device)
    z_MW[:count, :dims] = new_MD - middle_D
    code_MW = _code(z_MW, precision)
    exact_MW, seen_MW = z_MW.double(), code_MW.double()
    half_M = exact_MW.square().sum(1) / 2
    norm_M = torch.maximum(exact_MW.norm(dim=1), seen_MW.norm(dim=1)) + pad
    rest_M = (exact_MW - seen_MW).norm(dim=1)
    grown = 1 + (dims + 64) * 2.0**-23
    spread = ((rest_M / norm_M).max() + ACCUMULATED[precision] * dims + 2.0**-21) * grown
    low_M = (half_M * (1 - 2.0**-21)).float()
    # a centroid whose norm overflows float32 is never excluded
    low_M = torch.where(low_M.isinf(), -torch.inf, low_M)
    low_M[count:] = torch.inf
    norm_M[count:] = 0
    limits_3 = torch.stack([spread, torch.full_like(spread, grown), norm_M.max()]).float()
    return Coded(code_MW, low_M, (half_M * 2.0**-21).float(), norm_M.float(), limits_3, pad)


def _code(z_MW: Tensor, precision: str) -> Tensor:
    """The same rounding as `triton_kernels._code`."""
    if precision == "bf16":
        return z_MW.bfloat16()
    return ((z_MW.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32) if precision == "tf32" else z_MW


def lower_exactly(
    x_ND: Tensor, middle_D: Tensor, d2_N: Tensor, labels_N: Tensor, centroids_KD: Tensor, first: int,
    precision: str, budget: int | None = None,
) -> None:  # fmt: skip
    """Lowers d2 (N,) float32 and labels (N,) int64 in place by the centroids (K, D) float32 from row `first` on.

    A negative label means that no centroid is known yet. x (N, D) float32 may lie on the host, from where it is
    streamed in chunks; the rest is on the device. precision: of the coarse products: tf32, bf16 or ieee. budget: bytes
    of host points that may be copied to the device at once.
    """
    codes = coded(centroids_KD[first:], middle_D, precision)
    for tile, x_TD in chunks(x_ND, 4 * x_ND.shape[1], middle_D.device, budget=budget):
        _lower(x_TD, middle_D, d2_N[tile], labels_N[tile], centroids_KD, first, codes, precision)


def _lower(
    x_ND: Tensor, middle_D: Tensor, d2_N: Tensor, labels_N: Tensor, centroids_KD: Tensor, first: int, codes: Coded,
    precision: str,
) -> None:  # fmt: skip
    count, dims = x_ND.shape
    width, new = width_of(dims), len(centroids_KD) - first
    rows_N = torch.empty(count, dtype=torch.int32, device=x_ND.device)
    limit_N = torch.empty(count, dtype=torch.float32, device=x_ND.device)
    listed = torch.zeros(1, dtype=torch.int32, device=x_ND.device)
    read = (x_ND, middle_D, centroids_KD.contiguous(), codes.code_MW, codes.low_M)
    written = (labels_N, d2_N, rows_N, limit_N, listed)
    shared = {"D": dims, "WIDTH": width, "SUM_BLOCK": min(SUM_COLUMNS, triton.next_power_of_2(dims)),
              "PRECISION": precision}  # fmt: skip
    launch(
        nearest_kernel, lambda meta: (triton.cdiv(count, meta["BLOCK_N"]),),
        *read, codes.slack_M, codes.norm_M, codes.limits_3, *written,
        # classes by which shapes are tuned: few or many points, and powers of two of centroids
        count, new, int(count >= MANY_POINTS), max(new, LARGEST_BLOCK_K).bit_length(), first, codes.pad,
        2 * (dims + 16) * 2.0**-24, dims * 2.0**-120, **shared,
    )  # fmt: skip
    launch(
        kernels.settle_kernel, (min(SETTLE_PROGRAMS, triton.cdiv(count, SETTLE_SHAPE["BLOCK_N"])),),
        *read, codes.norm_M, codes.limits_3, *written, new, first, codes.pad, **shared,
        **settle_shape(width, precision),
    )  # fmt: skip


def launch(kernel: Any, grid: Any, *arguments: Any, **meta: Any) -> None:
    """Launches a kernel; Triton's interpreter, which cannot tune, uses the first block shape that fits the dims."""
    if triton.knobs.runtime.interpret:
        if kernel is nearest_kernel:
            [shape, *_] = shapes_within(kernel.configs, meta["WIDTH"], meta["PRECISION"], 2**40, LEAST_CAPABILITY)
            kernel, meta = kernel.fn, {**meta, **shape.kwargs}
        meta.pop("enable_fp_fusion", None)
        # the interpreter would multiply the bit patterns of bf16; as float32 the products are the same
        arguments = tuple(a.float() if getattr(a, "dtype", None) == torch.bfloat16 else a for a in arguments)
    kernel[grid](*arguments, **meta)
