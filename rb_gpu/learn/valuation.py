"""What any choice of configs is worth on held-out rows, as far as the log allows, and when it has no value.

Three grades: `exact` where every query was tried under every pick, `dr` (cross-fitted self-normalised doubly robust)
where propensities were logged, else `associational`: the mean of the rows that happened to try what is picked.
Suffixes: Q queries, N rows, C configs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from rb_gpu.evidence import OUTCOMES
from rb_gpu.learn import estimators
from rb_gpu.learn.estimators import (
    Estimate,
    effective_size,
    matched_weights,
    rare_error,
    rare_size,
    unseen_error,
)
from rb_gpu.learn.evidence import outcomes
from rb_gpu.learn.outcome_model import cross_fitted, folds
from rb_gpu.learn.propensities import Propensities
from rb_gpu.learn.trajectories import Trajectories
from rb_gpu.objective import Objective
from rb_gpu.params import ConfigTable

Floats = npt.NDArray[np.float64]
Choice = npt.NDArray[np.int64]

# the outcomes of a choice that are estimated
COLUMNS = ("utility", "quality", "cost")
# fewest effective rows for a value: otherwise a few rows decide it, and their spread does not show its error
LEAST_SIZE = 10.0
# outcomes whose relative difference is smaller count as equal
ROUNDING = 1e-6


@dataclass(frozen=True)
class Outcomes:
    """Rows of Q queries as plain columns, (N,) each; utility and quality under the bank's objective.

    x_QD: embeddings. query_id, session_Q: (Q,). propensity, session_Q: None where not logged.
    """

    x_QD: npt.NDArray[np.float32]
    query_id: npt.NDArray[np.uint64]
    query_row: npt.NDArray[np.int64]
    config_id: npt.NDArray[np.int64]
    propensity: Floats | None
    utility: Floats
    quality: Floats
    latency_us: Floats
    cost: Floats
    configs: ConfigTable
    session_Q: npt.NDArray[np.uint64] | None = None

    @property
    def queries(self) -> int:
        """Q."""
        return len(self.query_id)

    @property
    def default(self) -> int:
        """The config that runs when nothing is known."""
        return self.configs.default

    @property
    def weight(self) -> Floats:
        """(N,) 1 / propensity, 1 where not logged."""
        return np.ones(len(self.query_row)) if self.propensity is None else 1.0 / self.propensity

    @cached_property
    def cluster(self) -> Choice:
        """(Q,) the cluster of each query, from 0: its session if known, as what one user asks in a row is alike, else
        the query alone.
        """
        if self.session_Q is None:
            return np.arange(self.queries)
        alone = self.session_Q == 0
        names = np.where(alone, np.arange(self.queries, dtype=np.uint64), self.session_Q)
        found: Choice = np.unique(np.stack([alone, names]), axis=1, return_inverse=True)[1].ravel()
        return found

    def by_query(self, values_N: Floats) -> Floats:
        """(Q,) sums of values_N over the rows of each query."""
        return np.bincount(self.query_row, weights=values_N, minlength=self.queries).astype(np.float64)

    @cached_property
    def predicted(self) -> Floats:
        """(T, Q, C) each of COLUMNS for each query under each config, predicted from the rows of other queries."""
        y_NT = np.stack([getattr(self, column) for column in COLUMNS], axis=1)
        fold_Q = folds(self.query_id)
        return cross_fitted(
            self.x_QD, fold_Q, self.query_row, self.config_id, np.sqrt(self.weight), y_NT, len(self.configs)
        )


def held_out_outcomes(trajectories: Trajectories, objective: Objective) -> Outcomes:
    """The columns on which every policy of a table is valued."""
    y_NO = outcomes(trajectories, torch.device("cpu")).numpy()
    quality = y_NO @ objective.quality_direction
    cost = y_NO[:, OUTCOMES.index("cost")]
    latency_us = trajectories.latency_us.astype(np.float64)
    propensity = trajectories.propensity
    return Outcomes(
        x_QD=trajectories.x_QD,
        query_id=trajectories.query_id,
        query_row=trajectories.query_row,
        config_id=trajectories.config_id,
        propensity=None if propensity is None else propensity.astype(np.float64),
        utility=objective.utility(quality, latency_us, cost),
        quality=quality,
        latency_us=latency_us,
        cost=cost,
        configs=trajectories.configs,
        session_Q=trajectories.session,
    )


class Valuation:
    """Values choices (Q,) on one set of rows under one grade. A choice holds config ids of the table, or -1 for a
    config that the table does not have.
    """

    def __init__(self, rows: Outcomes, compared: Iterable[Choice]) -> None:
        """compared: choices whose values will be compared. The grade is exact if every query tried the pick of each of
        them; choices that pick a config without any row are ignored for that.
        """
        self.rows = rows
        self.tried_C = np.bincount(rows.config_id, minlength=len(rows.configs)) > 0
        known = [choice_Q for choice_Q in compared if not self._missing(choice_Q)]
        complete = len(known) > 0 and all(self._everywhere(choice_Q) for choice_Q in known)
        self.grade = "exact" if complete else "associational" if rows.propensity is None else "dr"

    def _hit(self, choice_Q: Choice) -> Floats:
        hit_N: Floats = (self.rows.config_id == choice_Q[self.rows.query_row]).astype(np.float64)
        return hit_N

    def _everywhere(self, choice_Q: Choice) -> bool:
        return bool((self.rows.by_query(self._hit(choice_Q)) > 0).all())

    def _missing(self, choice_Q: Choice) -> dict[int, float]:
        """Configs that are picked but that no row tried, each with the share of queries on which it is picked."""
        return {int(c): float((choice_Q == c).mean()) for c in np.unique(choice_Q) if c < 0 or not self.tried_C[c]}

    def weights(self, choice_Q: Choice) -> Floats:
        """(N,) weights of the rows that tried the pick: 1 / propensity (dr), 1 (associational), or 1 over the number of
        such rows of the query (exact); 0 for other rows.
        """
        if self.grade == "dr":
            return matched_weights(self.rows.config_id, choice_Q[self.rows.query_row], self._pscore)
        hit = self._hit(choice_Q)
        if self.grade == "associational":
            return hit
        return np.asarray(hit / np.maximum(self.rows.by_query(hit), 1.0)[self.rows.query_row])

    def refusal(self, choice_Q: Choice) -> str | None:
        """Why this choice has no value here; None if it has one."""
        missing = self._missing(choice_Q)
        if missing:
            worst = max(missing, key=missing.__getitem__)
            name = "a config that the table does not have" if worst < 0 else self.rows.configs.describe(worst)
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            share = 100 * sum(missing.values())
            return f"no held-out row tried {name}{others}, picked on {share:.3g} % of queries; log rows with it"
        if self.grade == "exact":
            return None if self._everywhere(choice_Q) else "not every query tried what it picks; log the missing rows"
        weight_N = self.weights(choice_Q)
        size = effective_size(weight_N)
        if size < LEAST_SIZE:
            floored = self.doubts is not None and self.doubts.too_low(weight_N)
            remedy = "correct the propensities that a warning names" if floored else "explore more evenly"
            return (
                f"the held-out rows that tried what it picks count as much as {size:.1f} equally weighted ones, under "
                f"{LEAST_SIZE:g}; log more queries, or {remedy}"
            )
        return None

    def estimate(self, column: str, choice_Q: Choice) -> Estimate:
        """The estimate of one of COLUMNS, over rounds whose queries are `round_query`."""
        y_N = getattr(self.rows, column)
        if self.grade == "exact":
            return estimators.mean_of(self.rows.by_query(self.weights(choice_Q) * y_N))
        choice_N = choice_Q[self.rows.query_row]
        if self.grade == "associational":
            return estimators.snips(y_N, self.rows.config_id, choice_N, np.ones(len(y_N)))
        return estimators.self_normalised_doubly_robust(
            y_N, self.rows.config_id, choice_N, self._pscore, self._predicted(column)
        )

    @property
    def round_query(self) -> Choice:
        """(rounds,) query of each score of an estimate: one round per query if exact, else one per row."""
        return np.arange(self.rows.queries) if self.grade == "exact" else self.rows.query_row

    def interval(self, choice_Q: Choice, other_Q: Choice | None = None) -> tuple[float, float]:
        """95 % interval of a choice's utility, or of its difference to another choice's, for the grade dr.

        If too few rows tried what they differ in, no estimate is trusted: the interval then is all that is possible
        within the range of logged utilities. Sessions of unequal length count as fewer (Carter, Schnepel & Steigerwald
        2017).
        """
        utility, row = self.estimate("utility", choice_Q), self.rows.query_row
        differs_N = np.ones(len(row), dtype=np.bool_)
        compared = [self.weights(choice_Q)]
        if other_Q is not None:
            utility = utility.over(self.estimate("utility", other_Q))
            differs_N = (choice_Q != other_Q)[row]
            compared.append(self.weights(other_Q))
        share = float(differs_N.mean())
        size = min(effective_size(weight_N[differs_N]) for weight_N in compared)
        if size < LEAST_SIZE:
            reach = share * float(np.ptp(self.rows.utility))
            return 0.0 - reach, reach
        left_N = self._unexplained
        unseen = [
            share * unseen_error(weight_N[differs_N], left_N[differs_N], self._most(weight_N)[differs_N])
            for weight_N in compared
        ]
        cluster_R = self.rows.cluster[self.round_query]
        if self.rows.session_Q is not None:
            size = min(size, effective_size(np.bincount(cluster_R).astype(np.float64)))
        return utility.interval(cluster_R, size, math.hypot(*unseen, self.rare(choice_Q, other_Q)))

    def rare(self, choice_Q: Choice, other_Q: Choice | None = None) -> float:
        """Standard error of a choice's utility, or of its difference to another choice's, due to outcomes that were too
        rare to come up (`rare_error`).
        """
        differs_Q = np.ones(self.rows.queries, dtype=np.bool_) if other_Q is None else choice_Q != other_Q
        share = float(differs_Q.mean())
        if share == 0.0:
            return 0.0
        if self.grade != "exact":
            size, differs_N = _size(self._unexplained, self.rows.utility), differs_Q[self.rows.query_row]
            both = [choice_Q] if other_Q is None else [choice_Q, other_Q]
            return share * math.hypot(*(rare_error(self.weights(one)[differs_N], size) for one in both))
        sizes = []
        for y_N in (self.rows.utility, self.rows.quality):
            value_Q = self.rows.by_query(self.weights(choice_Q) * y_N)
            if other_Q is not None:
                value_Q = value_Q - self.rows.by_query(self.weights(other_Q) * y_N)
            sizes.append(_size(value_Q[differs_Q] - value_Q[differs_Q].mean(), y_N))
        return share * rare_error(np.ones(int(differs_Q.sum())), max(sizes))

    def _most(self, weight_N: Floats) -> Floats:
        """(N,) the largest propensity that the pick may have had: the row's own if it matched; if not, 1 less the
        propensity of what ran; infinite if another row of its query matched.
        """
        matched_Q = self.rows.by_query(weight_N) > 0
        other_N = np.where(matched_Q[self.rows.query_row], np.inf, 1.0 - self._pscore)
        return np.where(weight_N > 0, self._pscore, other_N)

    @cached_property
    def _unexplained(self) -> Floats:
        """Each row's utility less its cross-fitted prediction or, if the grade is not dr, less its config's mean."""
        config_N, utility_N = self.rows.config_id, self.rows.utility
        if self.grade == "dr":
            return np.asarray(utility_N - self._predicted("utility")[np.arange(len(config_N)), config_N])
        mean_C = np.bincount(config_N, utility_N) / np.maximum(np.bincount(config_N), 1)
        return np.asarray(utility_N - mean_C[config_N])

    def beside(self, choice_Q: Choice) -> dict[str, float]:
        """Utility by simpler estimators; empty unless the grade is dr."""
        if self.grade != "dr":
            return {}
        logged = (self.rows.utility, self.rows.config_id, choice_Q[self.rows.query_row], self._pscore)
        predicted_NC = self._predicted("utility")
        return {
            "dr, not normalised": estimators.doubly_robust(*logged, predicted_NC).value,
            "snips": estimators.snips(*logged).value,
            "ips": estimators.ips(*logged).value,
            "direct method": estimators.direct_method(predicted_NC, logged[2]).value,
        }

    @cached_property
    def doubts(self) -> Propensities | None:
        """The logged propensities beside the rows; None unless the grade is dr."""
        if self.grade != "dr":
            return None
        return Propensities(self.rows.config_id, self._pscore, self.rows.configs)

    def misled(self, choice_Q: Choice) -> bool:
        """Whether the value of a choice rests on propensities that contradict the rows."""
        return self.doubts is not None and self.doubts.mislead(choice_Q)

    def warnings(self) -> list[str]:
        """What is wrong with the logged propensities, as far as they show it themselves."""
        return [] if self.doubts is None else self.doubts.warnings()

    @property
    def _pscore(self) -> Floats:
        if self.rows.propensity is None:
            raise ValueError("propensity was not logged; only the grade dr asks for it")
        return self.rows.propensity

    def _predicted(self, column: str) -> Floats:
        predicted: Floats = self.rows.predicted[COLUMNS.index(column)][self.rows.query_row]
        return predicted


def _size(away: Floats, y_N: Floats) -> float:
    """`rare_size` of deviations of outcomes y_N (N,). 1, the range of a quality in [0, 1], if the deviations are all 0,
    since nothing then shows how far off a rare one could be.
    """
    return rare_size(away) if np.abs(away).max() > ROUNDING * np.abs(y_N).max() else 1.0
