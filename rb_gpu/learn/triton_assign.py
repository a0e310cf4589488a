"""The exact nearest centroid of every point on a GPU: coarse products in Triton, then float64 for what is in doubt.

`nearest_kernel` streams tiles of centroids past a tile of points, keeps the two least bounds of each point in registers
and writes a label and a distance: O(ND + KD) bytes of traffic, no N x K matrix. What it cannot decide it lists, and
`settle_kernel` decides that in float64. Labels are those of float64 distances, of equal ones the lowest, whatever the
precision and the shape of the blocks; two labels that are nearer than 2(D + 2)·2^-53 of the distance may be taken for
each other, as by any float64 sum.

The bound. With y = x − m and z = c − m about the middle m, the score ||z||²/2 − y·z orders the centroids as ||x − c||²
does. The product sees codes ŷ and ẑ (tf32, bf16 or float32; rounded here, so that the tensor cores drop nothing):
    |y·z − ŷ·ẑ| <= ||y − ŷ||·||ẑ|| + ||y||·||z − ẑ||                                        (Cauchy and Schwarz)
and both rests are taken from the numbers themselves. Adding the products up errs by at most ACCUMULATED·D·||ŷ||·||ẑ||:
products of codes are exact in float32, and tensor cores add them aligned to the largest, cut to 24 bits or more (Fasi,
Higham, Mikaitis & Pranesh 2021): less than 2^-23 of the sum of |terms| for each term, and as much again for each sum.
What float32 rounds of y, z, ||z||²/2 and the score itself is at most 8·2^-24·||y||·||z|| + 2^-21·||z||²/2. So with
    spread = largest ||z − ẑ||/||z|| + ACCUMULATED·D + 2^-21,   a = ||y − ŷ|| + spread·||y||,   both + (D + 64)·2^-23,
every score is within e = a·||z|| + 2^-21·||z||²/2 of the coarse one. Norms are padded by √D·2^-50, so that e also
covers products of numbers that are flushed to 0 (each errs by at most 2^-126). A point is decided where the least lower
bound plus 2e is below every other lower bound; else all centroids below that sum are measured. Norms whose product
leaves float32 decide nothing: then all are measured.

Suffixes: N points, M new centroids, K centroids, D dims.
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

# of D·||ŷ||·||ẑ||: what adding up may err; without tensor cores every sum rounds once
ACCUMULATED = {"tf32": 2.0**-22, "bf16": 2.0**-22, "ieee": 2.0**-23}
# tiles of centroids never reach beyond this many padded rows
LARGEST_BLOCK_K = 128
BLACKWELL = (10, 0)
# points of at most so many dims lie in shared memory while the centroids pass
HELD_DIMS = 128
# dims at a time without tensor cores, whose products are written out one by one
IEEE_DIMS = 16
# columns of the sums of squares: part of the result's bits
SUM_COLUMNS = 32
SETTLE_SHAPE = {"BLOCK_N": 32, "BLOCK_K": 64, "BLOCK_D": 32}
SETTLE_PROGRAMS = 1024
# points whose tiles keep a whole card busy: what is fastest on fewer need not be so on these
MANY_POINTS = 2**17


def width_of(dims: int) -> int:
    """Dims that a code is padded to: a power of two where points are held, else whole blocks of 64."""
    return max(16, triton.next_power_of_2(dims)) if dims <= HELD_DIMS else -(-dims // 64) * 64


def block_shapes() -> list[Any]:
    """What is timed: tiles of points and of centroids that fill the tensor cores without spilling registers."""
    # of two stages, the first is the one that an L4's shared memory holds of 128 dims in tf32
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
    """Of the block shapes, those for codes of this width that fit so many bytes of shared memory, and the registers.

    Raises ConfigError where none does.
    """
    size, kept = (2 if precision == "bf16" else 4), []
    for config in configs:
        n, k, d = (config.kwargs[name] for name in ("BLOCK_N", "BLOCK_K", "BLOCK_D"))
        held = d == HELD_DIMS
        if (precision == "ieee") != (d == IEEE_DIMS) or (precision != "ieee" and held != (width <= HELD_DIMS)):
            continue
        # the products of a held 128 x 128 tile leave Blackwell's special memory into registers all at once
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
    """As Triton's autotuner asks: those for the current device."""
    properties = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
    shared = properties["max_shared_mem"]
    return shapes_within(configs, meta["WIDTH"], meta["PRECISION"], shared, torch.cuda.get_device_capability())


nearest_kernel = triton.autotune(
    block_shapes(), ["n_class", "k_class", "WIDTH", "PRECISION"], prune_configs_by={"early_config_prune": _fitting},
    restore_value=["labels_ptr", "d2_ptr", "count_ptr"], cache_results=True,
)(kernels.nearest_kernel)  # fmt: skip


@dataclass(frozen=True)
class Coded:
    """New centroids as the kernels read them, padded to whole blocks by ones that are infinitely far.

    code (M, WIDTH); low, slack and norm (M,) float32: the half squared norm less its slack, the slack, the padded norm;
    limits (3,): spread, what norms grow by, the largest norm.
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
    # whose norm leaves float32 is never excluded
    low_M = torch.where(low_M.isinf(), -torch.inf, low_M)
    low_M[count:] = torch.inf
    norm_M[count:] = 0
    limits_3 = torch.stack([spread, torch.full_like(spread, grown), norm_M.max()]).float()
    return Coded(code_MW, low_M, (half_M * 2.0**-21).float(), norm_M.float(), limits_3, pad)


def _code(z_MW: Tensor, precision: str) -> Tensor:
    """As `triton_kernels._code`."""
    if precision == "bf16":
        return z_MW.bfloat16()
    return ((z_MW.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32) if precision == "tf32" else z_MW


def lower_exactly(
    x_ND: Tensor, middle_D: Tensor, d2_N: Tensor, labels_N: Tensor, centroids_KD: Tensor, first: int,
    precision: str, budget: int | None = None,
) -> None:  # fmt: skip
    """Lowers d2 (N,) float32 and labels (N,) int64 in place by the centroids (K, D) float32 from row `first` on.

    Labels below 0 are of points that know no centroid yet. x (N, D) float32 may lie on the host, and then comes in
    chunks; the rest is on the device. precision: tf32, bf16 or ieee, of the coarse products. budget: bytes of points
    from the host that may lie on the device.
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
        # shapes are timed once for each power of two of centroids, for few points and for many
        count, new, int(count >= MANY_POINTS), max(new, LARGEST_BLOCK_K).bit_length(), first, codes.pad,
        2 * (dims + 16) * 2.0**-24, dims * 2.0**-120, **shared,
    )  # fmt: skip
    launch(
        kernels.settle_kernel, (min(SETTLE_PROGRAMS, triton.cdiv(count, SETTLE_SHAPE["BLOCK_N"])),),
        *read, codes.norm_M, codes.limits_3, *written, new, first, codes.pad, **shared,
        **settle_shape(width, precision),
    )  # fmt: skip


def launch(kernel: Any, grid: Any, *arguments: Any, **meta: Any) -> None:
    """Runs a kernel; in Triton's interpreter, which times nothing, in the first block shape for its dims."""
    if triton.knobs.runtime.interpret:
        if kernel is nearest_kernel:
            [shape, *_] = shapes_within(kernel.configs, meta["WIDTH"], meta["PRECISION"], 2**40, LEAST_CAPABILITY)
            kernel, meta = kernel.fn, {**meta, **shape.kwargs}
        meta.pop("enable_fp_fusion", None)
        # it would multiply the bits of bf16 numbers; as float32 their products are the same
        arguments = tuple(a.float() if getattr(a, "dtype", None) == torch.bfloat16 else a for a in arguments)
    kernel[grid](*arguments, **meta)
