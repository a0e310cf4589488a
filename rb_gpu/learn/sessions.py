"""Sessions that keep their config, as where a service draws it once per user.

Their rows count as one choice each: taken for independent, they make chance differences between sessions look like
effects of configs. So one query of each session is learned from and valued.
Suffixes: N rows, Q queries, R rounds (the first row of each query), M rounds that follow another of their session.
"""

from __future__ import annotations

import logging
import math

import numpy as np
import numpy.typing as npt

from rb_gpu.learn.estimators import ODD_SHARE, ODD_SIGMAS, Floats, Ints, matched_weights
from rb_gpu.learn.outcome_model import mixed

log = logging.getLogger(__name__)

Sessions = npt.NDArray[np.uint64]


def kept_choices(session_R: Sessions, chosen_R: Ints, pscore_R: Floats) -> float | None:
    """Detects choices that are kept within a session: the mean of 1/p over the rounds that follow another of their
    session, counting those that choose another config than it as 0. None where chance explains it.

    If the config is drawn anew with p in every round, 1/p makes up for the rarity of a repeat and 1 is expected,
    whatever p depends on; if p is not the true probability, about what pairs of any two rounds show. The variance is
    estimated as in `odd_propensities`. Rounds are in the order of time; session 0 means none.
    """
    order = np.argsort(session_R, kind="stable")
    follows = (np.diff(session_R[order]) == 0) & (session_R[order[1:]] > 0)
    before_M, after_M = order[:-1][follows], order[1:][follows]
    weight_M = matched_weights(chosen_R[after_M], chosen_R[before_M], pscore_R[after_M])
    if len(weight_M) == 0:
        return None
    share = float(weight_M.mean())
    error = math.sqrt(float(weight_M @ np.maximum(weight_M - 1.0, 0.0))) / len(weight_M)
    any_two = float(np.bincount(chosen_R) @ np.bincount(chosen_R, 1.0 / pscore_R)) / len(chosen_R) ** 2
    return share if share - any_two > max(ODD_SHARE, ODD_SIGMAS * error) else None


def one_of_each(
    session_Q: Sessions, query_id: Sessions, query_N: Ints, config_N: Ints, pscore_N: npt.NDArray[np.float32]
) -> npt.NDArray[np.bool_] | None:
    """(Q,) the queries to use if sessions keep their config: one of every session, and all without a session. None if
    sessions do not. Which one depends on the ids alone.
    """
    # a query's further rows may have been tried on purpose
    first_R = np.unique(query_N, return_index=True)[1]
    share = kept_choices(session_Q[query_N[first_R]], config_N[first_R], pscore_N[first_R].astype(np.float64))
    if share is None:
        return None
    order = np.lexsort((mixed(query_id), session_Q))
    keep_Q: npt.NDArray[np.bool_] = session_Q == 0
    keep_Q[order[np.diff(session_Q[order], prepend=np.uint64(0)) != 0]] = True
    log.warning(
        "sessions keep their config (1/propensity of those that a session repeats comes to %.2f of its later queries, "
        "1 is expected), so that a session is one choice: one query of each is used, %d of %d queries in all; draw the "
        "config anew for every query to use all, and for a router to see a session's earlier ones",
        share, keep_Q.sum(), len(keep_Q),
    )  # fmt: skip
    return keep_Q
