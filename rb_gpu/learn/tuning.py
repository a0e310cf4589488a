"""Tunes lookup.top_k=auto and lookup.beta=auto: how many patterns vote, and how steeply weights fall with distance.

Suffixes: Q queries, N rows, B queries of one fold that are valued, K nearest leaves, G settings tried.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from rb_gpu.bank_data import BankData
from rb_gpu.batch import decide, look, weigh
from rb_gpu.evidence import Evidence
from rb_gpu.learn.assemble import USUAL_BETA, USUAL_TOP_K, Leaves, assemble
from rb_gpu.learn.checks import is_auto
from rb_gpu.learn.config import JudgeConfig
from rb_gpu.learn.estimators import Estimate, snips
from rb_gpu.learn.evidence import gather_evidence
from rb_gpu.learn.leaves import LeafMaking, believed
from rb_gpu.learn.outcome_model import FOLDS, folds
from rb_gpu.learn.trajectories import Trajectories
from rb_gpu.learn.valuation import Choice, held_out_outcomes
from rb_gpu.learn.verdicts import judge
from rb_gpu.objective import Objective
from rb_gpu.vote import BankState, queries_of

log = logging.getLogger(__name__)

TOP_KS = (1, 3, 5, 10, 20)
BETAS = (0.0, 8.0, 16.0, 32.0, 64.0)
# about how many queries are valued: in a large table one fold holds them, and the other folds need no further pass
MAX_QUERIES = 2048
# standard errors by which a setting must beat the usual one: at one, the best of so many would do so by chance
ERRORS = 2.0


@dataclass(frozen=True)
class Tuned:
    """The result of tuning: top_k and beta, with their gain in mean utility over the usual setting on queries whose
    evidence was left out, and its standard error; both 0 where the usual setting stands. settings: number tried.
    """

    top_k: int
    beta: float
    gain: float
    error: float
    settings: int


def tune_lookup(
    making: LeafMaking, leaves: Leaves, trajectories: Trajectories, objective: Objective, judging: JudgeConfig
) -> Tuned:
    """The setting of highest cross-validated value: evidence of the other folds answers the queries of a fold.

    The usual setting stands unless another beats it by ERRORS standard errors of the paired difference, so that noise
    does not decide; and wherever a setting cannot change an answer, or the objective is not a utility. The clusters are
    not cross-fitted but come from all queries. With a field the usual setting stands too: the field has seen the rows
    that would value a setting, so that the setting which follows it most closely would appear to be the best.
    """
    config = making.config
    asked = config.lookup
    ks = TOP_KS if is_auto(asked.top_k) else (int(asked.top_k),)
    betas = BETAS if is_auto(asked.beta) else (float(asked.beta),)
    usual = (USUAL_TOP_K if is_auto(asked.top_k) else ks[0], USUAL_BETA if is_auto(asked.beta) else betas[0])
    # with one pattern every slope is the same
    tried = [usual] + [(k, b) for k in ks for b in (betas if k > 1 else betas[:1]) if (k, b) != usual]
    stands = Tuned(*usual, 0.0, 0.0, len(tried))
    if len(tried) == 1:
        return stands
    if objective.kind != "utility" or len(leaves.mass_P) == 1 or leaves.field is not None:
        log.info("lookup: top_k=%d, beta=%g; tuned only for a utility, several patterns and no field", *usual)
        return stands
    fold_Q = folds(trajectories.query_id)
    choice_GQ = np.zeros((len(tried), len(fold_Q)), dtype=np.int64)
    valued = _valued(fold_Q, leaves.label_Q >= 0)
    valued_Q = np.zeros(len(fold_Q), dtype=bool)
    read = making.field_read(leaves, trajectories, objective)
    parts = making.stages.of(
        "folds", [read, list(valued)], lambda: _without_each(making, leaves, list(valued), trajectories)
    )
    for mine, evidence in zip(valued.values(), parts, strict=True):
        part = replace(leaves, evidence=evidence)
        beliefs = believed(part, objective, trajectories.configs.default, config)
        verdicts = judge(part.evidence, trajectories.configs, objective, beliefs, judging)
        data = assemble(trajectories, config, part, objective, beliefs, verdicts, -1.0)
        choice_GQ[:, mine] = _choices(data, trajectories.x_QD[mine], tried)
        valued_Q[mine] = True
    return _best(choice_GQ[:, valued_Q], trajectories.select_queries(valued_Q), objective, tried)


def _valued(fold_Q: npt.NDArray[np.int64], known_Q: npt.NDArray[np.bool_]) -> dict[int, npt.NDArray[np.int64]]:
    """The folds that are valued and the queries of each: as few folds as hold MAX_QUERIES together."""
    found: dict[int, npt.NDArray[np.int64]] = {}
    for fold in range(FOLDS):
        mine = np.flatnonzero(known_Q & (fold_Q == fold))
        if len(mine) and sum(map(len, found.values())) < MAX_QUERIES:
            found[fold] = mine[:: max(1, len(mine) // MAX_QUERIES)]
    return found


def _without_each(
    making: LeafMaking, leaves: Leaves, left_out: list[int], trajectories: Trajectories
) -> list[Evidence]:
    """The leaves' evidence without each of the folds left_out. Evidence is additive, so one pass is enough."""
    patterns, fold_Q = len(leaves.mass_P), folds(trajectories.query_id)
    part_Q = np.full(len(fold_Q), len(left_out))
    for i, fold in enumerate(left_out):
        part_Q[fold_Q == fold] = i
    label_Q = torch.from_numpy(np.where(leaves.label_Q < 0, -1, part_Q * patterns + leaves.label_Q))
    cells = (len(left_out) + 1) * patterns
    whole = gather_evidence(trajectories, label_Q, cells, making.weight_N, making.device)
    found = []
    for i in range(len(left_out)):
        group = np.tile(np.arange(patterns), len(left_out) + 1)
        group[i * patterns : (i + 1) * patterns] = -1
        found.append(whole.regroup(group, patterns))
    return found


def _choices(data: BankData, x_BD: npt.NDArray[np.float32], tried: list[tuple[int, float]]) -> Choice:
    """(G, B) the configs that a bank answers with under every setting."""
    state = BankState(data, None, "exact")
    rows_BK, cosine_BK, said_BE = look(state, queries_of(x_BD, state.dim, 2), max(k for k, _ in tried))
    out_GB = np.empty((len(tried), len(x_BD)), dtype=np.int64)
    for g, (top_k, beta) in enumerate(tried):
        settings = replace(data.lookup, top_k=top_k, beta=beta)
        voters = weigh(rows_BK[:, :top_k].copy(), cosine_BK[:, :top_k], said_BE, settings)
        _, out_GB[g], *_ = decide(state, voters)
    return out_GB


def _best(choice_GQ: Choice, table: Trajectories, objective: Objective, tried: list[tuple[int, float]]) -> Tuned:
    """The best setting by self-normalised inverse propensity scoring, which is exact on a full table; the first setting
    unless another one beats it by ERRORS standard errors.
    """
    rows = held_out_outcomes(table, objective)

    def value(choice_Q: Choice) -> Estimate:
        return snips(rows.utility, rows.config_id, choice_Q[rows.query_row], 1.0 / rows.weight)

    usual, best = value(choice_GQ[0]), Tuned(*tried[0], 0.0, 0.0, len(tried))
    for setting, choice_Q in zip(tried[1:], choice_GQ[1:], strict=True):
        if (choice_Q == choice_GQ[0]).all():
            continue
        difference = value(choice_Q).over(usual)
        error = float(np.linalg.norm(rows.by_query(difference.influence_N))) / len(rows.query_row)
        if difference.value > max(ERRORS * error, best.gain):
            best = Tuned(*setting, difference.value, error, len(tried))
    log.info("lookup: top_k=%d, beta=%g; %+.4f (standard error %.4f) over the usual setting, best of %d settings tried",
             best.top_k, best.beta, best.gain, best.error, len(tried))  # fmt: skip
    return best
