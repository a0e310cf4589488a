"""Codes of points and centroids: a cheap product of codes bounds every distance from below, with a proven error.

With y = x − middle, axes V (D, P) orthonormal up to `defect`, and codes ŷ of V'y (int8, one scale a row, or float32):
    x·c = Vy·Vc + (rest of y)·(rest of c),   Vy·Vc = ŷ·ĉ + (Vy − ŷ)·Vc + ŷ·(Vc − ĉ),
and Cauchy–Schwarz bounds every term except ŷ·ĉ, which is the product of the codes:
    ||x − c||²/2 >= half_x + half_c − (scale_x·scale_c·product + norm_x·spread_c + rest_x·rest_c),
    spread_c = ε·(norm_c + error_c) + error_c,   ε = the largest error/norm of the tile's points.
Float32 rounding is bounded too (Higham 2002, section 3.1) and subtracted from half_x and half_c: `Basis.slack`.

Suffixes: N points, T points of one tile, C centroids, D dims, P dims of the code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rb_gpu.learn.kernels import ROUNDOFF, centre_rows, code_rows
from rb_gpu.learn.products import FLOAT32, GROUP, Product, columns_of
from rb_gpu.learn.vectors import LANES

# centroids of one block: their codes stay in a core's second-level cache
BLOCK = 1024
SUBSPACE_STEPS = 2


@dataclass(frozen=True, eq=False)
class Basis:
    """How points are coded: centred on middle (D,), projected on axes (D, P; None: unprojected), as int8 or float32."""

    middle_D: Tensor
    axes_DP: Tensor | None = None
    product: Product = FLOAT32
    defect: float = 0.0

    @property
    def width(self) -> int:
        """P, the dims of a code."""
        return len(self.middle_D) if self.axes_DP is None else int(self.axes_DP.shape[1])

    @property
    def stored(self) -> int:
        """Stored dims of a code, including the zeros that pad it to whole steps of the product."""
        return self.product.padded(self.width)

    @property
    def slack(self) -> float:
        """Bound on the rounding error of a half squared distance, as a share of half_x + half_c."""
        dims = len(self.middle_D)
        projected = 0.0 if self.axes_DP is None else 2 * dims * self.width**0.5 * ROUNDOFF + self.defect
        return projected + (2 * dims + self.width + 64) * ROUNDOFF

    @property
    def row_bytes(self) -> int:
        """Bytes that the codes of one point take."""
        return self.stored * self.product.code.itemsize + 5 * 4

    def __str__(self) -> str:
        return f"{self.product} products over {'all' if self.axes_DP is None else 'the leading'} {self.width} axes"


class Codes:
    """Codes of rows (rows, P'), padded as the product requires, and five float32 columns (rows,): scale, norm of the
    decoded row, error of the code, norm of what lies outside the axes (rest), and half the squared norm less the slack.
    `columns` are these five as NumPy for the kernels. GROUP rows of readable memory follow the last row.
    """

    def __init__(self, rows: int, basis: Basis) -> None:
        self.code = torch.empty(rows + GROUP, basis.stored, dtype=basis.product.code)[:rows]
        self.scale, self.norm, self.error, self.rest, self.half = torch.empty(5, rows, dtype=torch.float32).unbind()
        self.columns = tuple(c.numpy() for c in (self.scale, self.norm, self.error, self.rest, self.half))


def project(x_TD: Tensor, basis: Basis) -> tuple[Tensor, Tensor]:
    """The values to code (T, P) for rows x, and half their squared norms about the middle (T,)."""
    y_TD, half_T = torch.empty_like(x_TD), torch.empty(len(x_TD), dtype=torch.float32)
    centre_rows(x_TD.numpy(), basis.middle_D.numpy(), y_TD.numpy(), half_T.numpy())
    return (y_TD if basis.axes_DP is None else y_TD @ basis.axes_DP), half_T


def encode(y_TP: Tensor, half_T: Tensor, basis: Basis, out: Codes, at: int) -> None:
    """Writes the codes of the output of `project` to rows at, at + 1, ... of `out`."""
    rows = slice(at, at + len(y_TP))
    if basis.product.integers:
        square_T = torch.empty(len(y_TP), dtype=torch.float32)
        columns = (column[rows].numpy() for column in (out.code, out.scale, out.norm, out.error))
        code_rows(y_TP.numpy(), basis.product.zero, square_T.numpy(), *columns)
    else:
        square_T = y_TP.square().sum(1)
        out.code[rows], out.scale[rows], out.norm[rows], out.error[rows] = y_TP, 1, 0, 0
    if basis.axes_DP is None:
        out.rest[rows] = 0
    else:
        outside_T = (2 * half_T - square_T).clamp_(min=0)
        out.rest[rows] = torch.sqrt(outside_T + 2 * basis.slack * half_T)
    out.half[rows] = half_T * (1 - basis.slack)


@dataclass(frozen=True, eq=False)
class CodedBlock:
    """Centroids from row `first` on, padded to whole kernel masks by infinitely far ones: their codes, the same codes
    arranged as the columns of a product, and the initial values of its sums.
    """

    first: int
    codes: Codes
    columns: Tensor
    begin_C: Tensor

    @staticmethod
    def of(y_CP: Tensor, half_C: Tensor, first: int, basis: Basis) -> CodedBlock:
        """Codes centroids from the output of `project`."""
        count = len(y_CP)
        codes = Codes(-(-count // LANES) * LANES, basis)
        codes.code[count:] = 0
        for column in (codes.scale, codes.norm, codes.error, codes.rest):
            column[count:] = 0
        encode(y_CP, half_C, basis, codes, 0)
        codes.half[count:] = torch.inf
        return CodedBlock(first, codes, *columns_of(codes.code, basis.product))


def coded_blocks(y_KP: Tensor, half_K: Tensor, first: int, basis: Basis) -> list[CodedBlock]:
    """Blocks of coded centroids from the output of `project`; the first centroid is row `first`."""
    return [
        CodedBlock.of(y_KP[at : at + BLOCK], half_K[at : at + BLOCK], first + at, basis)
        for at in range(0, len(y_KP), BLOCK)
    ]


def principal_bases(sample_SD: Tensor, middle_D: Tensor, widths: list[int], product: Product) -> list[Basis]:
    """A basis over the leading principal axes of the sample about the middle, for each width (ascending).

    Computed by subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4): any orthonormal axes give valid
    bounds, those of the leading subspace give tight ones. Within the subspace the axes are rotated at random, so that
    no coordinate dominates and one scale per row suits them all.
    """
    y_SD = sample_SD - middle_D
    generator = torch.Generator().manual_seed(0)
    axes_DP = torch.randn(y_SD.shape[1], widths[-1], dtype=torch.float32, generator=generator)
    for _ in range(SUBSPACE_STEPS):
        axes_DP, _ = torch.linalg.qr(y_SD.T @ (y_SD @ axes_DP))
    seen_SP = y_SD @ axes_DP
    _, turn_PP = torch.linalg.eigh((seen_SP.T @ seen_SP).double())
    ordered_DP = axes_DP.double() @ turn_PP.flip(1)
    bases = []
    for width in widths:
        random_PP, _ = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))
        axes_DP = (ordered_DP[:, :width] @ random_PP).float().contiguous()
        gram_PP = axes_DP.double().T @ axes_DP.double()
        # the bound needs the spectral norm, which the Frobenius norm never underestimates
        defect = float((gram_PP - torch.eye(width, dtype=torch.float64)).norm())
        bases.append(Basis(middle_D, axes_DP, product, defect))
    return bases
