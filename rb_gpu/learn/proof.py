"""The gate before any choice: tests whether the choices of the field and its leaves beat the default on unseen queries.

Where they do not, the default stands everywhere. All tests are cross-fitted: levels and choices are computed without
the fold on which they are valued.
Suffixes: Q queries, N rows, P leaves, C configs, O outcomes, G draws, F folds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import t as students_t
from torch import Tensor

from rb_gpu.evidence import ROUNDING
from rb_gpu.learn.estimators import RARE_ROWS, rare_size
from rb_gpu.learn.field import Fit
from rb_gpu.learn.ladder import settled, to_default
from rb_gpu.learn.ridge import FOLDS, TINY, folds_in_turn
from rb_gpu.learn.rows import Rows
from rb_gpu.objective import Objective

DRAWS = 64
# of the scores of single configs, as they are if none is better
SCORE_DRAWS = 4000
# 5 % less an allowance for folds that share rows: without it 5 to 6 % of simulated logs without a better config passed
FAMILY_ERROR = 0.04
# level of the test whether choices by place beat the same choices made regardless of place. The field of a log deviates
# from place to place only if that improves the predictions of unseen rows; in simulations it wrongly does so in 0 to 6
# logs of 100. The field of a full table does in 1 of 10; leaves, which are all that is left if the field of a log does
# not deviate, appear to in every one. These two need a stricter level
LOG_PLACE_ERROR, FULL_PLACE_ERROR = 0.05, 0.01
# level of the test whether they also beat the default. If the default is the best config everywhere, but by more in
# some places, choices by place do beat the same ones regardless of it: at LIKELIER, one such log in five passed
PLACE_GAIN_ERROR = 0.1
# level that any positive estimate passes, however uncertain
LIKELIER = 0.5
# with fewer rows of the default its variance is unknown, and so is whether anything beats it
LEAST_DEFAULT = 2
# floor of 1 − h: a row that makes up most of its config's mean has an almost meaningless leave-one-out residual
LEAST_KEPT = 0.1
# added to a covariance's diagonal, as a share of its mean, so that it stays positive definite despite rounding
JITTER = 1e-7


@dataclass(frozen=True)
class Pseudo:
    """Pseudo-outcomes: the leave-one-query-out predictions, and the rows' residuals from them.

    away_QC: predicted utility, up to a term that all configs share. leaf_Q: leaf of each query. left_N: residual of
    each row's utility, on a full table less that of the query's row of the default. share_N: importance weights, which
    sum to Q over the rows of each config. rounding: a gain in utility up to this may be mere rounding. size: of rare
    deviations in left_N (`rare_size`).
    """

    away_QC: Tensor
    leaf_Q: Tensor
    left_N: Tensor
    share_N: Tensor
    rounding: float
    size: float


def pays(
    fits: dict[int, Fit], rows: Rows, y_NO: Tensor, leaf_Q: Tensor, objective: Objective, default: int, seed: int,
    in_use: bool = True,
) -> bool:  # fmt: skip
    """Whether choices by the field and the leaves leaf_Q (Q,), or one choice for all queries, beat the default. If
    nothing does, it is true in 0 to 5 % of simulated logs (`tests.null_worlds`). All queries with a negative leaf count
    as one more leaf.

    Folds of a small log disagree about the single best config. So what is valued is not that but a random choice, of
    each config with its posterior probability of being the best (Thompson 1933): near equals are then valued by the
    rows of all of them. The two tests (choices by query, one choice for all) are dependent and are joined by the Cauchy
    combination (Liu & Xie 2020), where configs are no ladder with a third, of all single configs (`_any_single`). On a
    full table every query informs about every config, and one test replaces both: whether some named config beats the
    default. There the folds' probabilities all depend on the same noise of the default, and too many tables without any
    difference passed.

    Where the default is better on the whole, random choices lose by all remaining uncertainty, and small logs cannot
    show that it is worse in places. There it suffices that choices by place beat the same choices dealt out regardless
    of place, as in the heterogeneity test of Chernozhukov, Demirer, Duflo & Fernández-Val (2018), and that they beat
    the default at a weaker level. in_use: whether a service runs the default. If instead it is the best single config
    of an experiment, standing in because nothing surely beat the first default, only the heterogeneity test is made;
    where the field of a log deviates from place to place, any positive estimate passes it. False if the default has
    fewer than LEAST_DEFAULT rows.
    """
    if int((rows.config_N == default).sum()) < LEAST_DEFAULT:
        return False
    direction_O = torch.from_numpy(objective.direction).to(y_NO)
    weighed_O = torch.zeros_like(direction_O)
    weighed_O[list(fits)] = direction_O[list(fits)]
    own_N = torch.stack([direction_O[o] * one.unseen_N for o, one in fits.items()]).sum(0)
    total_C = rows.by_config(rows.importance_N).clamp(min=TINY)
    share_N = rows.importance_N / total_C[rows.config_N]
    left_N = y_NO @ weighed_O - own_N
    left_C = rows.by_config(share_N * left_N)
    # leave-one-out residuals: a config's level is a mean that contains the row itself (MacKinnon & White 1985)
    left_N = (left_N - left_C[rows.config_N]) / (1.0 - share_N).clamp(min=LEAST_KEPT) + left_C[rows.config_N]
    away_QC = torch.stack([direction_O[o] * one.unseen_QC for o, one in fits.items()]).sum(0)
    if rows.full:
        # what makes a query hard for all configs does not tell which is better: take differences to the default
        left_QC = left_N.new_zeros(rows.queries, rows.configs)
        left_QC[rows.query_N, rows.config_N] = left_N
        left_N = left_N - left_QC[rows.query_N, default]
    size = float((y_NO.abs() @ weighed_O.abs()).mean())
    if float(left_N.abs().max()) <= ROUNDING * size:
        return _predicted_lead(away_QC, rows, default) > ROUNDING * size
    rare = rare_size(left_N.cpu().numpy())
    leaf_Q = torch.where(leaf_Q < 0, leaf_Q.max() + 1, leaf_Q)
    pseudo = Pseudo(away_QC, leaf_Q, left_N, share_N * rows.queries, ROUNDING * size, rare)
    generator = torch.Generator().manual_seed(seed)
    by_query_QC, alike_QC = _shares(pseudo, rows, default, generator)
    default_C = torch.zeros_like(by_query_QC[0])
    default_C[default] = 1.0
    by_query, alike = (_p_value(shares_QC - default_C, pseudo, rows) for shares_QC in (by_query_QC, alike_QC))
    by_place = _p_value(_from_place_to_place(by_query_QC), pseudo, rows)
    by_field = not rows.full and any(one.deviates for one in fits.values())
    place_error = (LOG_PLACE_ERROR if in_use else LIKELIER) if by_field else FULL_PLACE_ERROR
    if not in_use:
        return by_place < place_error
    if by_place < place_error and by_query < PLACE_GAIN_ERROR:
        return True
    if rows.full:
        return _surest_single(pseudo, rows, default) < FAMILY_ERROR
    tests = [by_query, alike]
    if rows.apart_CC is None:
        tests.append(_any_single(pseudo, rows, default, seed))
    # a p-value above .5 counts as .5: one test that sees a loss must not cancel the gain that the other sees
    joined = sum(math.tan((0.5 - min(p, 0.5)) * math.pi) for p in tests) / len(tests)
    return joined > math.tan((0.5 - FAMILY_ERROR) * math.pi)


def _predicted_lead(away_QC: Tensor, rows: Rows, default: int) -> float:
    """Mean over queries of the predicted gain of the best config that ran more than once over the default.

    Used if every row equals its leave-one-out prediction: with as many queries as a field has, that is no coincidence.
    """
    tried_C = torch.bincount(rows.config_N, minlength=rows.configs) >= LEAST_DEFAULT
    return float((away_QC[:, tried_C].max(1).values - away_QC[:, default]).mean())


def _shares(pseudo: Pseudo, rows: Rows, default: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Posterior probability of each config of being the best, (Q, C) twice: by query, and one set for all queries."""
    by_query_QC, alike_QC = torch.zeros_like(pseudo.away_QC), torch.zeros_like(pseudo.away_QC)
    fold_Q = folds_in_turn(rows.queries, alike_QC.device)
    fold_N = fold_Q[rows.query_N]
    for fold in range(FOLDS):
        mine_Q, weight_N = fold_Q == fold, rows.importance_N * (fold_N != fold)
        mean_C = pseudo.away_QC[~mine_Q].mean(0)
        total_C = rows.by_config(weight_N)
        left_C = rows.by_config(weight_N * pseudo.left_N) / total_C.clamp(min=TINY)
        error_N = weight_N * (pseudo.left_N - left_C[rows.config_N])
        error_C = rows.by_config(error_N.square()) / total_C.square().clamp(min=TINY)
        known_C = (total_C > 0) & (error_C > 0)
        seen_C = torch.bincount(rows.config_N[weight_N > 0], minlength=rows.configs)
        unsure_C = torch.where(known_C, error_C, torch.inf)
        # kept finite, as all differences are to the default: without rows in the other folds its prediction stands
        unsure_C[default] = error_C[default]
        all_C, all_CC = settled(mean_C + left_C, unsure_C, seen_C, None if rows.full else rows.apart_CC)
        gain_C, apart_C = all_C - all_C[default], to_default(all_CC, default)
        # the default's difference to itself has variance 0, which would get infinite weight
        apart_C[default] = 2.0 * all_CC[default, default]
        kept_C = torch.zeros_like(gain_C)
        kept_C[known_C] = shrinkage(gain_C[known_C], apart_C[known_C])
        level_C = torch.where(known_C, kept_C * gain_C, -torch.inf)
        # a tiny lead, so that a config which is no better leaves the default in place
        level_C[default] = ROUNDING * float(pseudo.left_N.std())
        root_CC = _root(torch.where(torch.isfinite(unsure_C * unsure_C[:, None]), all_CC, 0.0))
        noise_GC = torch.randn(DRAWS, rows.configs + 1, generator=generator, dtype=torch.float64).to(gain_C)
        noise_GC[:, default] = noise_GC[:, -1]
        noise_GC = noise_GC[:, :-1] @ root_CC.T
        noise_GC = noise_GC - noise_GC[:, [default]]
        noise_GC = noise_GC * kept_C.sqrt()
        noise_GC[:, default] = 0.0
        leaf_PC, spread_PC = _leaves(pseudo, rows, weight_N, left_C)
        mine_leaf_Q = pseudo.leaf_Q[mine_Q]
        local_QC = pseudo.away_QC[mine_Q] - mean_C + leaf_PC[mine_leaf_Q]
        local_QC = local_QC - local_QC[:, [default]]
        best_QC, by_leaf = torch.zeros_like(local_QC), bool((spread_PC > 0).any())
        for noise_C in noise_GC:
            guess_QC = local_QC + level_C + noise_C
            if by_leaf:
                noise_PC = torch.randn(spread_PC.shape, generator=generator, dtype=torch.float64).to(gain_C) * spread_PC
                guess_QC = guess_QC + (noise_PC - noise_PC[:, [default]])[mine_leaf_Q]
            best_Q = guess_QC.argmax(1, keepdim=True)
            best_QC.scatter_add_(1, best_Q, torch.ones_like(best_Q, dtype=best_QC.dtype))
        by_query_QC[mine_Q] = best_QC / DRAWS
        best_G = (level_C + noise_GC).argmax(1)
        alike_C = torch.bincount(best_G, minlength=rows.configs).to(alike_QC) / DRAWS
        # no masked assignment: under deterministic algorithms, torch before 2.8 cannot broadcast its value on a GPU
        alike_QC = torch.where(mine_Q[:, None], alike_C, alike_QC)
    return by_query_QC, alike_QC


def _root(covariance_CC: Tensor) -> Tensor:
    """A Cholesky factor (C, C), also of a singular matrix: some levels may be exact or linearly dependent."""
    rounding = JITTER * covariance_CC.diagonal().mean() + TINY
    root_CC: Tensor = torch.linalg.cholesky(covariance_CC + rounding * torch.eye(len(covariance_CC)).to(covariance_CC))
    return root_CC


def _leaves(pseudo: Pseudo, rows: Rows, weight_N: Tensor, left_C: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation, (P, C) both, of each config's mean residual in each leaf less its overall
    one left_C (C,), under the weights weight_N: shrunk towards 0 as far as chance explains it.

    Where configs are many and have few rows each, leaves show together what the field cannot locate.
    """
    leaves = int(pseudo.leaf_Q.max()) + 1
    cell_N = pseudo.leaf_Q[rows.query_N] * rows.configs + rows.config_N
    away_N = pseudo.left_N - left_C[rows.config_N]

    def by_cell(v_N: Tensor) -> Tensor:
        return v_N.new_zeros(leaves * rows.configs).index_add_(0, cell_N, v_N).view(leaves, rows.configs)

    total_PC = by_cell(weight_N)
    mean_PC = by_cell(weight_N * away_N) / total_PC.clamp(min=TINY)
    # pooled over each config's rows, as a single cell has too few
    variance_C = rows.by_config(weight_N * away_N.square()) / rows.by_config(weight_N).clamp(min=TINY)
    error_PC = variance_C * by_cell(weight_N.square()) / total_PC.square().clamp(min=TINY)
    known_PC = (total_PC > 0) & (error_PC > 0)
    kept_PC = torch.zeros_like(mean_PC)
    kept_PC[known_PC] = shrinkage(mean_PC[known_PC], error_PC[known_PC])
    return kept_PC * mean_PC, (kept_PC * error_PC).sqrt()


def _surest_single(pseudo: Pseudo, rows: Rows, default: int) -> float:
    """The least p-value of any one config for all queries against the default, Bonferroni-corrected over configs."""
    p_values = []
    for c in range(rows.configs):
        if c != default:
            moved_QC = torch.zeros_like(pseudo.away_QC)
            moved_QC[:, c], moved_QC[:, default] = 1.0, -1.0
            p_values.append(_p_value(moved_QC, pseudo, rows))
    return min(p_values, default=1.0) * len(p_values)


def _any_single(pseudo: Pseudo, rows: Rows, default: int, seed: int) -> float:
    """P-value of the test whether any one config for all queries beats the default, by the sum of the squared positive
    scores (Kudô 1963). Its distribution if none does is drawn, as all scores share the noise of the default.

    Where configs are many and each has few rows, no single one is surely better, but together they may show that some
    are. A config's few rows may agree by chance, so its variance is at least the one of all but the default together.
    That one's error makes the scores Student's, and so does that of the default's own.
    """
    count_C = torch.bincount(rows.config_N, minlength=rows.configs)
    other_C = torch.arange(rows.configs, device=count_C.device) != default
    tried_C = other_C & (count_C >= LEAST_DEFAULT)
    freedom = int((count_C - 1)[tried_C].sum())
    if freedom == 0:
        return 1.0
    # by query, as rows of one query share what sets it apart
    cell_N, share_N = rows.query_N * rows.configs + rows.config_N, pseudo.share_N / rows.queries
    # without the root, the variances of leave-one-out residuals would be too large (MacKinnon & White 1985, HC2)
    moved_N = share_N * pseudo.left_N * (1.0 - share_N).clamp(min=LEAST_KEPT).sqrt()
    moved_QC, share_QC = (
        pseudo.away_QC.new_zeros(rows.queries * rows.configs).index_add_(0, cell_N, v_N).view(-1, rows.configs)
        for v_N in (moved_N, share_N)
    )
    noise_C, square_C = moved_QC.square().sum(0), share_QC.square().sum(0)
    heaviest = share_QC[:, tried_C].square().square().sum() / square_C[tried_C].sum()
    scatter = (noise_C[tried_C].sum() + RARE_ROWS * heaviest * pseudo.size**2) / square_C[tried_C].sum()
    lacking_C = (scatter * square_C - noise_C).clamp(min=0.0)
    noise_C = noise_C + lacking_C
    away_QC = pseudo.away_QC[:, tried_C] - pseudo.away_QC[:, [default]]
    left_C = rows.by_config(share_N * pseudo.left_N)
    gain_C = away_QC.mean(0) + left_C[tried_C] - left_C[default]
    own_CC = (away_QC / rows.queries + moved_QC[:, tried_C]).T.cov().view(len(gain_C), -1) * rows.queries
    own_CC = own_CC + torch.diag(lacking_C[tried_C])
    variance_C = own_CC.diagonal() + noise_C[default]
    # without scatter, chance is unknown, and the gain proves nothing
    error_C = torch.where(variance_C > 0, variance_C, torch.inf).sqrt()
    rng = np.random.default_rng(seed)
    drawn_GC = torch.from_numpy(rng.normal(size=(SCORE_DRAWS, len(gain_C)))).to(gain_C) @ _root(own_CC).T
    spread_G = torch.from_numpy(rng.chisquare(freedom, SCORE_DRAWS) / freedom).to(gain_C)
    shared_G = torch.from_numpy(rng.standard_t(int(count_C[default]) - 1, SCORE_DRAWS)).to(gain_C)
    drawn_GC = drawn_GC / spread_G.sqrt()[:, None] - shared_G[:, None] * noise_C[default].sqrt()
    sum_G, found = (((v / error_C).clamp(min=0.0).square()).sum(-1) for v in (drawn_GC, gain_C))
    return 1.0 - float((sum_G < found).sum()) / (1 + SCORE_DRAWS)


def _from_place_to_place(shares_QC: Tensor) -> Tensor:
    """Each query's choice probabilities less their mean over its fold."""
    fold_Q = folds_in_turn(len(shares_QC), shares_QC.device)
    sum_FC = shares_QC.new_zeros(FOLDS, shares_QC.shape[1]).index_add_(0, fold_Q, shares_QC)
    count_F = torch.bincount(fold_Q, minlength=FOLDS).clamp(min=1)
    return shares_QC - (sum_FC / count_F[:, None])[fold_Q]


def _p_value(moved_QC: Tensor, pseudo: Pseudo, rows: Rows) -> float:
    """P-value of a one-sided t test that moving choice probability from config to config, moved_QC, gains utility.

    The estimate is doubly robust where each query ran one config (Dudík, Langford & Li 2011). Degrees of freedom are
    Satterthwaite's, since the variance of a config with few rows is itself uncertain. 1 where nothing is gained.
    """
    weight_N = moved_QC[rows.query_N, rows.config_N] * pseudo.share_N
    moved_N = weight_N * pseudo.left_N
    gain_Q = (moved_QC * pseudo.away_QC).sum(1).index_add(0, rows.query_N, moved_N)
    variance_C = rows.by_config(moved_N.square())
    freedom_C = (torch.bincount(rows.config_N, minlength=rows.configs) - 1).clamp(min=1)
    freedom = float(variance_C.sum().square() / (variance_C.square() / freedom_C).sum().clamp(min=TINY))
    # a config whose few rows all succeeded shows no variance, so that of rare failures is added
    heaviest_C = rows.by_config(weight_N.square().square()) / rows.by_config(weight_N.square()).clamp(min=TINY)
    rare = RARE_ROWS * float(heaviest_C.sum()) * pseudo.size**2 / rows.queries
    gain, error = float(gain_Q.mean()), math.sqrt((float(gain_Q.var()) + rare) / rows.queries)
    if gain <= pseudo.rounding or freedom == 0.0:
        return 1.0
    if error == 0.0:
        return 0.0
    return float(students_t.sf(gain / error, freedom))


def shrinkage(effect_C: Tensor, error_C: Tensor) -> Tensor:
    """Shrinkage factor of each effect, given error variances error_C, when all are shrunk towards 0 by one τ²: as in
    rb_gpu.posterior.
    """
    weight_C = 1.0 / error_C
    tau2 = ((weight_C * effect_C.square()).sum() - len(effect_C)).clamp(min=0) / weight_C.sum().clamp(min=TINY)
    return tau2 / (tau2 + error_C)
