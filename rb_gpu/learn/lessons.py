"""Gathers what the router learns from: logged queries with the steps before them, their outcomes, the bank's beliefs.

Suffixes: Q queries, N rows, T steps, D dims, F numeric features, C configs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from rb_gpu.bank import ReasoningBank
from rb_gpu.bank_data import BankData
from rb_gpu.batch import expected_gains, vote
from rb_gpu.errors import ConfigError
from rb_gpu.learn.config import TrainConfig
from rb_gpu.learn.router import Lessons
from rb_gpu.learn.trajectories import Trajectories
from rb_gpu.learn.valuation import held_out_outcomes
from rb_gpu.router import FastGRNNRouter
from rb_gpu.vote import BankState

# most cells of (query, config), and most embeddings: more teach a net of this size nothing and cost time
MOST_CELLS, MOST_STEPS = 2**25, 2**17
# mixed queries per logged one: the bank answers any query, and they keep the router from memorising a few logged ones
BETWEEN = 4
VALIDATION_SHARE = 0.1


def gather_lessons(
    x_QD: torch.Tensor, trajectories: Trajectories, bank: BankData, weight_N: torch.Tensor, config: TrainConfig,
    device: torch.device,
) -> Lessons:  # fmt: skip
    """The lessons of a training table. x_QD: its embeddings, on any device. weight_N: (N,) decayed weights of the rows.

    A large table is sampled at random by the job's seed. Raises ConfigError if the settings need what the table or the
    bank does not have.
    """
    asked, configs = config.router, len(trajectories.configs)
    if asked.steps > 1 and trajectories.session is None:
        raise ConfigError(f"router.steps={asked.steps}: the table has no column session; add it, or set router.steps=1")
    believes = bank.method == "eb" and bank.objective.kind == "utility"
    if asked.target == "bank" and not believes:
        raise ConfigError(
            f"router.target=bank needs judge.method=eb and judge.objective=utility, this bank has {bank.method} and "
            f"{bank.objective.kind}; set router.target=log"
        )
    more = asked.steps > 1 or trajectories.feature_QF is not None
    from_bank = asked.target == "bank" or (asked.target == "auto" and believes and not more)
    order_Q = np.argsort(trajectories.query_time, kind="stable")
    most = min(MOST_CELLS // configs, MOST_STEPS // asked.steps)
    rng = np.random.default_rng(config.seed)
    if most < len(order_Q):
        order_Q = order_Q[np.sort(rng.choice(len(order_Q), most, replace=False))]
    if from_bank:
        # the last ones validate: beliefs do not depend on time, and an imitation must be validated everywhere
        order_Q = rng.permutation(order_Q)
    step_QT = last_steps(trajectories.session, trajectories.query_time, asked.steps)[order_Q]
    used, place = np.unique(step_QT, return_inverse=True)
    start = int(used[0] < 0)
    used = used[start:]
    x = x_QD[torch.from_numpy(used)].to(device=device, dtype=torch.float32)
    if trajectories.feature_QF is not None:
        x = torch.cat([x, torch.from_numpy(trajectories.feature_QF[used]).to(device)], dim=1)
    utility_QC, weight_QC = _outcomes(trajectories, bank, weight_N.cpu().numpy().astype(np.float64), order_Q)
    validating, belief = max(1, int(VALIDATION_SHARE * len(order_Q))), None
    if from_bank:
        asked_QD = x_QD[torch.from_numpy(order_Q)].cpu().numpy()
        between = 0 if more else min(BETWEEN * len(order_Q), most - len(order_Q))
        if between:
            asked_QD = np.concatenate([_between(asked_QD[:-validating], between, rng), asked_QD])
            x = torch.from_numpy(asked_QD).to(device)
            place = np.arange(len(asked_QD))
            start, step_QT = 0, place[:, None]
            nothing_QC = np.zeros((between, configs), np.float32)
            utility_QC, weight_QC = (np.concatenate([nothing_QC, table]) for table in (utility_QC, weight_QC))
        belief = _beliefs(bank, asked_QD)
    return Lessons(
        x_XI=x,
        step_QT=torch.from_numpy(place.reshape(step_QT.shape) - start).to(device),
        utility_QC=torch.from_numpy(utility_QC).to(device),
        weight_QC=torch.from_numpy(weight_QC).to(device),
        belief_QC=None if belief is None else torch.from_numpy(belief).to(device),
        validating=validating,
        features=0 if trajectories.feature_QF is None else trajectories.feature_QF.shape[1],
    )


def _between(x_QD: npt.NDArray[np.float32], count: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """(count, D) random mixes of two logged queries (mixup, Zhang et al. 2018)."""
    one, other = rng.integers(len(x_QD), size=(2, count))
    share = rng.random((count, 1), dtype=np.float32)
    x_BD: npt.NDArray[np.float32] = share * x_QD[one] + (1 - share) * x_QD[other]
    # the mix of two opposite queries may be 0
    nothing = ~x_BD.any(1)
    x_BD[nothing] = x_QD[one[nothing]]
    return x_BD


def last_steps(
    session_Q: npt.NDArray[np.uint64] | None, time_Q: npt.NDArray[np.int64], steps: int
) -> npt.NDArray[np.int64]:
    """(Q, T) the last T queries of each query's session up to itself, oldest first; -1 before the session's start.

    Queries of one session are ordered by time, and in the table's order if their times are equal. Session 0 means none.
    """
    queries = len(time_Q)
    found_QT = np.full((queries, steps), -1, dtype=np.int64)
    found_QT[:, -1] = np.arange(queries)
    if session_Q is None or steps == 1:
        return found_QT
    order = np.lexsort((time_Q, session_Q))
    ordered = session_Q[order]
    begins = np.r_[True, ordered[1:] != ordered[:-1]] | (ordered == 0)
    first = np.maximum.accumulate(np.where(begins, np.arange(queries), 0))
    for back in range(1, steps):
        before = np.arange(queries) - back
        there = before >= first
        found_QT[order[there], steps - 1 - back] = order[before[there]]
    return found_QT


def _outcomes(
    trajectories: Trajectories, bank: BankData, weight_N: npt.NDArray[np.float64], order_Q: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Mean utility of each query under each config, 0 where it did not run, and its rows' weight; (Q, C) each."""
    queries, configs = len(order_Q), len(trajectories.configs)
    place = np.full(len(trajectories.query_id), -1)
    place[order_Q] = np.arange(queries)
    row_N = place[trajectories.query_row]
    ours = row_N >= 0
    cell = row_N[ours] * configs + trajectories.config_id[ours]
    utility_N = held_out_outcomes(trajectories, bank.objective).utility[ours]
    weight = np.bincount(cell, weight_N[ours], queries * configs)
    total = np.bincount(cell, weight_N[ours] * utility_N, queries * configs)
    mean = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
    return (mean.astype(np.float32).reshape(queries, configs), weight.astype(np.float32).reshape(queries, configs))


def _beliefs(bank: BankData, x_QD: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(Q, C) the gain over the default that the bank expects of each config on each query.

    A config that the bank chooses on none of them is put at least a standard deviation below the default: the router
    must not choose what was not shown to pay.
    """
    state = BankState(bank, None, "exact")
    gain_QC = expected_gains(state, x_QD)
    chosen = np.zeros(gain_QC.shape[1], dtype=bool)
    chosen[vote(state, x_QD)[1]] = True
    chosen[bank.default] = True
    gain_QC = np.where(np.isfinite(gain_QC), gain_QC, np.float32(0))
    spread = max(float(gain_QC.std()), 1e-3)
    gain_QC[:, ~chosen] = np.minimum(gain_QC[:, ~chosen], 0) - spread
    return gain_QC.astype(np.float32)


def routed(
    router: FastGRNNRouter, bank: ReasoningBank, table: Trajectories, steps: int
) -> dict[str, npt.NDArray[np.int64]]:
    """Config ids (Q,) that the router alone, and the router blended with the bank, pick for each query of a table; -1
    for a setting that was never tried, which a blend may be. A session's earlier queries are those in the table.
    """
    numbers_QF = np.zeros((len(table.query_id), 0), np.float32) if table.feature_QF is None else table.feature_QF
    alone, blended = [], []
    for steps_T in last_steps(table.session, table.query_time, steps):
        seen = steps_T[steps_T >= 0]
        x_TD = table.x_QD[seen]
        decision = router.forward_with_reasoning(
            np.concatenate([x_TD, numbers_QF[seen]], axis=1), bank, query_embedding=x_TD[-1]
        )
        alone.append(router.configs.id_of(decision.router_params))
        blended.append(decision.config_id)
    found = {"router": alone, "router and bank": blended}
    return {name: np.array([-1 if one is None else one for one in ids]) for name, ids in found.items()}
