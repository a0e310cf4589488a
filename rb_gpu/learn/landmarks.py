"""The stage that learns the field: chooses landmarks among the queries and predicts every config's outcomes from a
query's kernels with them.

Suffixes: Q queries, N rows, M landmarks, F = M times the slopes, D dims, R of their projection, P leaves, U = P + 1
leaves and all queries together, C configs, O outcomes, S slopes, T some of the queries.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rb_gpu.evidence import OUTCOMES, Evidence
from rb_gpu.field import Field
from rb_gpu.learn.devices import tiles
from rb_gpu.learn.evidence import outcomes
from rb_gpu.learn.field import Fit, Kernel, fit
from rb_gpu.learn.field_variance import Inside, variances
from rb_gpu.learn.floor import Unseen
from rb_gpu.learn.kmeans import kmeans
from rb_gpu.learn.ladder import MOST_CONFIGS, distances
from rb_gpu.learn.progress import step
from rb_gpu.learn.proof import pays as pays_unseen
from rb_gpu.learn.rows import Rows
from rb_gpu.learn.slopes import two_slopes
from rb_gpu.learn.trajectories import Trajectories
from rb_gpu.objective import Objective

log = logging.getLogger(__name__)

LANDMARKS = 512
# axes on which the landmarks lie: more hardly improve the predictions, and every lookup multiplies with all of them.
# With the lift (`_lifted`) they fill whole cache lines
AXES = 63
# rounds of subspace iteration: few suffice, since only the span of the axes matters, not each single one
POWERS = 6
QUERIES_PER_LANDMARK = 8
LEAST_LANDMARKS = 4
# most queries that the regressions use: far more than their coefficients need
MAX_QUERIES = 2**15
# most queries on which choices are tested: with many configs, effects of leaves show only in many rows
TRIAL_QUERIES = 2**17
# added to the landmarks' own kernel of 1: keeps the coefficients small enough for float32
NUGGET = 1e-3


@dataclass(frozen=True)
class Trial:
    """The input of the test whether choices pay: the fits by outcome, without their regressions; the rows and their
    outcomes (N, O); and the leaves of the queries (Q,). For queries that the regressions did not use, unseen_QC always
    includes what all configs share, on which no choice depends.
    """

    fits: dict[int, Fit]
    rows: Rows
    y_NO: Tensor
    leaf_Q: Tensor


@dataclass(frozen=True)
class FittedField:
    """The result of `fit_field`; attributes that rb_gpu.field.Field has too mean the same here.

    unseen_NO: (N, O) float64, leave-one-query-out prediction of each row; 0 for outcomes that are not predicted.
    unseen: for a floor, the predicted quality of queries; else None. trial: the input of the test whether its choices
    pay.
    """

    slopes_S: npt.NDArray[np.float64]
    axes_RD: npt.NDArray[np.float32]
    centre_R: npt.NDArray[np.float32]
    landmarks_MR: npt.NDArray[np.float32]
    coef_FCO: npt.NDArray[np.float32]
    base_CO: npt.NDArray[np.float64]
    level_variance_CO: npt.NDArray[np.float64]
    bounds: tuple[npt.NDArray[np.float64], ...]
    mean_UCO: npt.NDArray[np.float64]
    gain_variance_UCO: npt.NDArray[np.float64]
    quality_variance_UC: npt.NDArray[np.float64]
    unseen_NO: Tensor
    unseen: Unseen | None
    trial: Trial

    def pays(self, objective: Objective, default: int, seed: int, in_use: bool) -> bool:
        """Whether its choices for unseen queries beat the default (rb_gpu.learn.proof); a floor always passes."""
        trial = self.trial
        return objective.kind != "utility" or pays_unseen(
            trial.fits, trial.rows, trial.y_NO, trial.leaf_Q, objective, default, seed, in_use
        )

    def field(self, evidence: Evidence, left: Evidence) -> Field:
        """The field, with the moments of its residuals in each leaf, `left`, as `with_residuals` takes them."""
        low, high, gain_low, gain_high = self.bounds
        bare = Field(
            self.slopes_S, self.axes_RD, self.centre_R, self.landmarks_MR, self.coef_FCO, self.base_CO,
            self.level_variance_CO, low, high, gain_low, gain_high, self.mean_UCO, self.gain_variance_UCO,
            self.quality_variance_UC, left.mean, left.comoment, left.pair_mean, left.pair_comoment,
        )  # fmt: skip
        return with_residuals(bare, evidence, left)


def with_residuals(field: Field, evidence: Evidence, left: Evidence) -> Field:
    """The field with these moments of its residuals.

    left: residual moments under weights that no few rows dominate (`tempered`); effective sizes stay those of
    `evidence`. Such weights are biased, so each config's mean over all leaves is subtracted: the levels, estimated with
    importance weights, are already right.
    """
    overall = left.pooled().mean
    scale = (evidence.w / np.maximum(left.w, 1e-300))[..., None, None]
    pair_scale = (evidence.pair_w / np.maximum(left.pair_w, 1e-300))[..., None, None]
    return field._replace(
        residual_mean=left.mean - overall,
        residual_comoment=left.comoment * scale,
        residual_pair_mean=left.pair_mean,
        residual_pair_comoment=left.pair_comoment * pair_scale,
    )


def fit_field(
    unit_QD: Tensor,
    label_Q: npt.NDArray[np.int64],
    trajectories: Trajectories,
    weight_N: Tensor,
    objective: Objective,
    seed: int,
    device: torch.device,
) -> FittedField | None:
    """Fits the outcomes that the objective weighs. None with fewer than two configs, too few queries for landmarks,
    or queries that all lie in one direction.

    unit_QD: embeddings of norm 1. weight_N: (N,) weights of the evidence, decay over propensity. label_Q: (Q,) leaf of
    each query; queries with a negative one count for no leaf. Of the objective only kind and quality are read.
    """
    queries, configs = len(unit_QD), len(trajectories.configs)
    generator = torch.Generator().manual_seed(seed)
    chosen_Q, tried_Q = torch.zeros(2, queries, dtype=torch.bool)
    drawn = torch.randperm(queries, generator=generator)
    chosen_Q[drawn[:MAX_QUERIES]], tried_Q[drawn[:TRIAL_QUERIES]] = True, True
    unit_CD = unit_QD[chosen_Q]
    landmarks = min(LANDMARKS, len(unit_CD) // QUERIES_PER_LANDMARK)
    if landmarks < LEAST_LANDMARKS or configs < 2:
        return None
    axes_RD, centre_R = _lifted(unit_CD, *_axes(unit_CD, generator, device), device)
    place_CR = _places(unit_CD, axes_RD, centre_R, device)
    if not bool(place_CR.any()):  # all queries lie in one direction
        return None
    found = kmeans(place_CR, landmarks, seed=seed, metric="cosine", device=device.type, engine="torch").centroids
    landmarks_MR = torch.nn.functional.normalize(torch.as_tensor(found), dim=1).to(device)
    landmarks = len(landmarks_MR)  # fewer where there are not as many distinct queries

    rows, in_fit_N = _rows(chosen_Q, trajectories, weight_N, device)
    if configs > MOST_CONFIGS:
        log.info("field: %d configs, over the %d that can learn from similar ones; each learns from its own rows",
                 configs, MOST_CONFIGS)  # fmt: skip
    y_NO = outcomes(trajectories, device)
    quality, *others = (OUTCOMES.index(name) for name in (objective.quality, "log2_latency", "cost"))
    y_of = {o: y_NO[in_fit_N, o] for o in (quality, *others)}
    by_slope = two_slopes(lambda slope: _kernel(place_CR, landmarks_MR, slope, rows), y_of[quality])
    slopes, features = list(by_slope), [kernel.features for kernel in by_slope.values()]
    factors = [_factor(landmarks_MR, slope) for slope in slopes]
    fits = {o: fit(list(by_slope.values()), y_N) for o, y_N in y_of.items()}
    default = trajectories.configs.default
    unseen = None
    if objective.kind == "floor":
        quality_QC = fits[quality].unseen_QC.cpu().numpy()
        unseen = Unseen(quality_QC, label_Q[chosen_Q.numpy()])
    differing = [OUTCOMES[o] for o, one in fits.items() if one.deviates]
    log.info("field: %d landmarks, %d queries, slopes %g and %g; differences between configs vary by query in %s",
             landmarks, len(unit_CD), *slopes, ", ".join(differing) or "nothing")  # fmt: skip
    label = torch.from_numpy(label_Q).to(device)
    leaves = int(label_Q.max()) + 1
    inside = Inside.of(place_CR, label[chosen_Q.to(device)], leaves, features)
    del features, by_slope

    all_rows = torch.from_numpy(trajectories.query_row).to(device)
    config_N = torch.from_numpy(trajectories.config_id).to(device)
    unseen_NO = torch.zeros_like(y_NO)
    base_CO = torch.zeros(configs, len(OUTCOMES), dtype=torch.float64, device=device)
    coef_SMCO = base_CO.new_zeros(len(slopes), landmarks, configs, len(OUTCOMES))
    for o, one in fits.items():
        unseen_NO[in_fit_N, o] = one.unseen_N
        base_CO[:, o] = one.base_C
        # convert to coefficients of the raw kernels: whitening all queries' kernels would take longer than the rest
        for s, (factor, coef) in enumerate(zip(factors, one.coefs, strict=True)):
            coef_SMCO[s, ..., o] = torch.linalg.solve_triangular(factor.T, coef, upper=True)
    tried_rows, in_trial_N = _rows(tried_Q, trajectories, weight_N, device)
    tried_at_Q = torch.cumsum(tried_Q, 0) - 1
    away = {o: base_CO.new_empty(tried_rows.queries, configs) for o in fits}
    for o, one in fits.items():
        away[o][tried_at_Q[chosen_Q].to(device)] = one.unseen_QC
    mass_U = base_CO.new_zeros(leaves + 1)
    sums = [base_CO.new_zeros(leaves + 1, landmarks) for _ in slopes]
    order = torch.argsort(all_rows, stable=True)
    bounds = torch.searchsorted(all_rows[order], torch.arange(queries + 1, device=device))
    reach = [torch.full_like(base_CO, bound) for bound in (torch.inf, -torch.inf, torch.inf, -torch.inf)]
    for tile in tiles(queries, 4 * landmarks * len(slopes), device):
        step("field", min(tile.stop, queries), queries, "queries")
        kernels = _kernels(_places(unit_QD[tile], axes_RD, centre_R, device), landmarks_MR, slopes)
        slot = torch.where(label[tile] < 0, leaves, label[tile])
        mass_U.index_add_(0, slot, torch.ones_like(slot, dtype=torch.float64))
        for total, x in zip(sums, kernels, strict=True):
            total.index_add_(0, slot, x)
        said_TCO = _said(kernels, coef_SMCO)
        mine = order[int(bounds[tile.start]) : int(bounds[min(tile.stop, queries)])]
        mine = mine[~in_fit_N[mine]]
        unseen_NO[mine] = said_TCO[all_rows[mine] - tile.start, config_N[mine]] + base_CO[config_N[mine]]
        more = torch.nonzero((tried_Q & ~chosen_Q)[tile]).squeeze(1)
        place, more = tried_at_Q[tile][more].to(device), more.to(device)
        for o, away_QC in away.items():
            away_QC[place] = said_TCO[more, :, o] + base_CO[:, o]
        for at, values in ((0, said_TCO), (2, said_TCO - said_TCO[:, [default]])):
            reach[at] = torch.minimum(reach[at], values.amin(0))
            reach[at + 1] = torch.maximum(reach[at + 1], values.amax(0))
    for total in (mass_U, *sums):
        total[-1] = total.sum(0)
    kernel_means = [total / mass_U.clamp(min=1)[:, None] for total in sums]
    mean_UCO = _said(kernel_means, coef_SMCO)
    means = _whitened(kernel_means, factors)
    level_variance_CO, gain_variance_UCO, quality_variance_UC = variances(
        fits, rows, y_NO[in_fit_N], means, inside, default, quality
    )
    trial = {
        o: replace(one, coefs=[], ridges={}, unseen_N=unseen_NO[in_trial_N, o], unseen_QC=away[o])
        for o, one in fits.items()
    }
    return FittedField(
        np.array(slopes),
        axes_RD.cpu().numpy(),
        centre_R.cpu().numpy(),
        landmarks_MR.cpu().numpy(),
        coef_SMCO.flatten(0, 1).float().cpu().numpy(),
        base_CO.cpu().numpy(),
        level_variance_CO.cpu().numpy(),
        tuple(bound.cpu().numpy() for bound in reach),
        mean_UCO.cpu().numpy(),
        gain_variance_UCO.cpu().numpy(),
        quality_variance_UC.cpu().numpy(),
        unseen_NO,
        unseen,
        Trial(trial, tried_rows, y_NO[in_trial_N], label[tried_Q.to(device)]),
    )


def _axes(unit_QD: Tensor, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """(R, D) orthonormal float32 axes along which queries spread most, by subspace iteration (Halko, Martinsson & Tropp
    2011, algorithm 4.4), or all D if there are at most AXES; and the queries' mean on them (R,).
    """
    dim = unit_QD.shape[1]
    mean_D = unit_QD.mean(0, dtype=torch.float64).to(device)
    if dim <= AXES:
        return torch.eye(dim, dtype=torch.float32, device=device), mean_D.float()
    axes_DR: Tensor = torch.linalg.qr(torch.randn(dim, AXES, generator=generator, dtype=torch.float64)).Q.to(device)
    for _ in range(POWERS):
        moved_DR = torch.zeros_like(axes_DR)
        for tile in tiles(len(unit_QD), 2 * dim, device):
            x_TD = unit_QD[tile].to(device) - mean_D.float()
            moved_DR += (x_TD.T @ (x_TD @ axes_DR.float())).double()
        axes_DR = torch.linalg.qr(moved_DR).Q
    axes_RD: Tensor = axes_DR.T.float().contiguous()
    return axes_RD, (axes_DR.T @ mean_D).float()


def _lifted(unit_QD: Tensor, axes_RD: Tensor, centre_R: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Axes and centre with one more coordinate, the lift, which is the same for all queries: the standard deviation of
    their distances from the mean. With it, a place scaled to norm 1 still shows its distance from the mean.

    In few dims that distance is as informative as the direction, and near the mean the direction is noise. In many dims
    all queries lie about equally far away, and the lift changes little.
    """
    distance_Q = torch.empty(len(unit_QD), dtype=torch.float64, device=device)
    for tile in tiles(len(unit_QD), len(axes_RD), device):
        distance_Q[tile] = (unit_QD[tile].to(device) @ axes_RD.T - centre_R).double().norm(dim=1)
    lift = distance_Q.std(correction=0).float()
    return torch.cat([axes_RD, torch.zeros_like(axes_RD[:1])]), torch.cat([centre_R, -lift.view(1)])


def _places(unit_TD: Tensor, axes_RD: Tensor, centre_R: Tensor, device: torch.device) -> Tensor:
    """(T, R) projections on the axes relative to the centre, with the lift, scaled to norm 1."""
    place_TR: Tensor = torch.nn.functional.normalize(unit_TD.to(device) @ axes_RD.T - centre_R, dim=1)
    return place_TR


def _factor(landmarks_MR: Tensor, slope: float) -> Tensor:
    """Cholesky factor (M, M) float64 of the kernel matrix of the landmarks."""
    x = landmarks_MR.double()
    kernel = torch.exp(slope * (x @ x.T - 1.0))
    kernel.diagonal().add_(NUGGET)
    factor: Tensor = torch.linalg.cholesky(kernel)
    return factor


def _kernels(place_TR: Tensor, landmarks_MR: Tensor, slopes: Sequence[float]) -> list[Tensor]:
    """(T, M) float64 kernels of places with the landmarks, one matrix per slope."""
    cosine = (place_TR @ landmarks_MR.T).double()
    return [torch.exp(slope * (cosine - 1.0)) for slope in slopes]


def _kernel(place_QR: Tensor, landmarks_MR: Tensor, slope: float, rows: Rows) -> Kernel:
    [features] = _whitened(_kernels(place_QR, landmarks_MR, [slope]), [_factor(landmarks_MR, slope)])
    return Kernel(features, rows)


def _whitened(kernels: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """(T, M) float64 features per slope: kernels whitened so that a ridge penalty is a Gaussian process prior."""
    return [
        torch.linalg.solve_triangular(factor, kernel.T, upper=False).T
        for kernel, factor in zip(kernels, factors, strict=True)
    ]


def _said(kernels: Sequence[Tensor], coef_SMCO: Tensor) -> Tensor:
    """(T, C, O) predictions, less the base, from the kernels (T, M) of every slope."""
    said = torch.stack([x @ w_MCO.flatten(1) for x, w_MCO in zip(kernels, coef_SMCO, strict=True)]).sum(0)
    return said.reshape(len(said), *coef_SMCO.shape[2:])


def _rows(chosen_Q: Tensor, trajectories: Trajectories, weight_N: Tensor, device: torch.device) -> tuple[Rows, Tensor]:
    """The rows of the chosen queries, and a mask (N,) that selects them from all rows."""
    query_N = torch.from_numpy(trajectories.query_row)
    in_fit_N = chosen_Q[query_N]
    importance = weight_N[in_fit_N].double()
    weight = tempered(weight_N, trajectories)[in_fit_N]
    new_Q = torch.cumsum(chosen_Q, 0) - 1
    rows = Rows(
        new_Q[query_N[in_fit_N]].to(device),
        torch.from_numpy(trajectories.config_id)[in_fit_N].to(device),
        (weight / weight.mean()).to(device),
        (importance / importance.mean()).to(device),
        int(chosen_Q.sum()),
        len(trajectories.configs),
        distances(trajectories.configs, device),
    )
    return rows, in_fit_N.to(device)


def tempered(weight_N: Tensor, trajectories: Trajectories) -> Tensor:
    """(N,) weights with 1/√propensity in place of 1/propensity: a compromise between no propensity weights, which are
    biased towards what the log favours, and full ones, which a few rows dominate (Shimodaira 2000).
    """
    weight_N = weight_N.double()
    if trajectories.propensity is None:
        return weight_N
    return weight_N * torch.from_numpy(trajectories.propensity).double().sqrt()
