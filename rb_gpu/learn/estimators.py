"""What a policy would have earned, from a log that another one wrote: off-policy estimators of plain arrays.

A round is one logged row. The policy is deterministic: it picks one config per round. Each estimator gives a value and
every round's influence on it, so that the difference of two policies on one log has the differences of their
influences, and its interval is a paired one.
Suffixes: N rounds, C configs, Q queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LEVEL = 0.95
# of Σ 1/p over a config's rows: off by more standard errors it is no chance, by less of the rounds it does no harm
ODD_SIGMAS, ODD_SHARE = 5.0, 0.1
# in so many logs of true propensities rows of the lowest ones are called too many
FLOOR_ERROR = 1e-4
# failures that an interval counts besides those that came up (Agresti & Coull 1998): without them, what a sample does
# not show is taken for impossible
RARE_ROWS = 2.0
# matched weights that add up to fewer rounds by more standard errors leave some rounds unseen
UNSEEN_SIGMAS = 2.0
# rounds of which so many are expected to match, or fewer, show none in 1 - LEVEL of logs or more
UNSEEN_ROUNDS = -math.log(1.0 - LEVEL)


@dataclass(frozen=True)
class Estimate:
    """A value, the mean of score_N (N,); influence_N (N,) is N times what leaving a round out takes from the value (the
    jackknife's, Efron & Stein 1981), to first order.
    """

    value: float
    score_N: Floats
    influence_N: Floats

    def over(self, other: Estimate) -> Estimate:
        """The difference of two values on the same rounds."""
        return Estimate(self.value - other.value, self.score_N - other.score_N, self.influence_N - other.influence_N)

    def interval(self, query_N: Ints, size: float, unseen: float) -> tuple[float, float]:
        """Of LEVEL, where the rounds of one query (query_N, from 0) stand or fall together.

        size: effective rounds, as few of which make the error itself unsure: Student's t. unseen: a standard error
        besides (`unseen_error`). NaN where size is 1 or less. The influences add up to 0, so that those of a query
        that holds a share h of the rounds come to 1 - h of their variance, and to next to nothing where it holds most:
        h of what its rounds have one by one is added, over the share that any query has.
        """
        influence_Q, share_Q = np.bincount(query_N, self.influence_N), np.bincount(query_N) / len(query_N)
        queries = int((share_Q > 0).sum())
        if not (size > 1 and queries > 1 and math.isfinite(self.value)):
            return float("nan"), float("nan")
        together = queries / (queries - 1) * float(influence_Q @ influence_Q)
        alone = float(np.maximum(share_Q - 1.0 / queries, 0.0) @ np.bincount(query_N, self.influence_N**2))
        error = math.hypot(math.sqrt(together + alone) / len(query_N), unseen)
        half = float(stats.t.ppf(0.5 + 0.5 * LEVEL, size - 1)) * error
        return self.value - half, self.value + half


def matched_weights(chosen_N: Ints, choice_N: Ints, pscore_N: Floats) -> Floats:
    """(N,) 1 / pscore where the log chose what the policy picks, else 0.

    chosen_N, choice_N: config ids of the log and of the policy. pscore_N: with what probability the log chose chosen_N.
    Raises ValueError where shapes differ, or a pscore is outside (0, 1].
    """
    for name, value in (("choice_N", choice_N), ("pscore_N", pscore_N)):
        if value.shape != chosen_N.shape:
            raise ValueError(f"{name} has shape {value.shape}, chosen_N {chosen_N.shape}; give one of each a round")
    if not ((pscore_N > 0) & (pscore_N <= 1)).all():
        raise ValueError("pscore_N has values outside (0, 1]; give the probability of the logged choice")
    return np.where(chosen_N == choice_N, 1.0 / pscore_N, 0.0)


def ips(reward_N: Floats, chosen_N: Ints, choice_N: Ints, pscore_N: Floats) -> Estimate:
    """Inverse propensity scoring, mean of w·r (Horvitz & Thompson 1952): unbiased, and of the largest variance."""
    return mean_of(matched_weights(chosen_N, choice_N, pscore_N) * reward_N)


def snips(reward_N: Floats, chosen_N: Ints, choice_N: Ints, pscore_N: Floats) -> Estimate:
    """Self-normalised inverse propensity scoring, Σw·r / Σw (Swaminathan & Joachims 2015). NaN where nothing matched.

    With pscores of 1 it is the plain mean of the rows that tried what the policy picks.
    """
    return _ratio(matched_weights(chosen_N, choice_N, pscore_N), reward_N)


def direct_method(predicted_NC: Floats, choice_N: Ints) -> Estimate:
    """Mean of what a model of the outcome says of the policy's picks: as good as the model is.

    Raises ValueError where choice_N is not a config of predicted_NC.
    """
    return mean_of(_of(predicted_NC, choice_N))


def doubly_robust(reward_N: Floats, chosen_N: Ints, choice_N: Ints, pscore_N: Floats, predicted_NC: Floats) -> Estimate:
    """The direct method plus the mean of w·(r − predicted) (Dudík, Langford & Li 2011): right where either the
    propensities or the model are. The model must not have seen the round that it predicts.
    """
    weight_N = matched_weights(chosen_N, choice_N, pscore_N)
    return mean_of(_of(predicted_NC, choice_N) + weight_N * (reward_N - _of(predicted_NC, chosen_N)))


def self_normalised_doubly_robust(
    reward_N: Floats, chosen_N: Ints, choice_N: Ints, pscore_N: Floats, predicted_NC: Floats
) -> Estimate:
    """The direct method plus Σw·(r − predicted) / Σw (weighted doubly robust of Thomas & Brunskill 2016, of one step):
    to doubly robust what SNIPS is to IPS. NaN where nothing matched.
    """
    said = direct_method(predicted_NC, choice_N)
    left = _ratio(matched_weights(chosen_N, choice_N, pscore_N), reward_N - _of(predicted_NC, chosen_N))
    return Estimate(said.value + left.value, said.score_N + left.score_N, said.influence_N + left.influence_N)


def _of(predicted_NC: Floats, config_N: Ints) -> Floats:
    configs = predicted_NC.shape[1]
    if not ((config_N >= 0) & (config_N < configs)).all():
        raise ValueError(f"a choice is outside [0, {configs}), the configs of predicted_NC; leave such policies out")
    return predicted_NC[np.arange(len(config_N)), config_N]


def mean_of(score_N: Floats) -> Estimate:
    """The plain mean of scores (N,)."""
    value = float(score_N.mean())
    return Estimate(value, score_N, score_N - value)


def _ratio(weight_N: Floats, y_N: Floats) -> Estimate:
    total, rounds = float(weight_N.sum()), len(y_N)
    if total == 0:
        nothing = np.full(rounds, np.nan)
        return Estimate(float("nan"), nothing, nothing)
    value = float(weight_N @ y_N) / total
    # without this round; nothing is left of the only one that matched
    rest_N = np.where(weight_N < total, total - weight_N, np.nan)
    return Estimate(value, rounds * weight_N * y_N / total, rounds * weight_N * (y_N - value) / rest_N)


def effective_size(weight_N: Floats) -> float:
    """Kish's (Σw)² / Σw²: how many rounds of equal weight say as much; 0 where all weights are 0."""
    squares = float(weight_N @ weight_N)
    return float(weight_N.sum()) ** 2 / squares if squares > 0 else 0.0


def unseen_error(weight_N: Floats, left_N: Floats, most_N: Floats) -> float:
    """Standard error of Σw·left / Σw for the rounds that no matched one stands for, 0 where that is but chance.

    Matched weights add up to N. Where they add up to far less, rounds of small propensity did not come up, or some had
    none: a share of rounds is missing, and so is their part in the influences. Of few such rounds the sum does not
    tell, but their propensities do. most_N: the largest propensity that each round's pick may have had; the rounds of
    smallest ones, of which UNSEEN_ROUNDS are expected to match, are missing but for what matched ones among them stand
    for. What is left of the missing may be off by the spread of what is left of the others.
    """
    total, rounds = float(weight_N.sum()), len(weight_N)
    if total == 0:
        return 0.0
    missing = 1.0 - total / rounds
    chance = math.sqrt(max(float(weight_N @ (weight_N - 1.0)), 0.0)) / rounds
    if missing <= UNSEEN_SIGMAS * chance:
        missing = 0.0
    order = np.argsort(most_N, kind="stable")
    rare = order[np.cumsum(most_N[order]) <= UNSEEN_ROUNDS]
    missing = max(missing, (len(rare) - float(weight_N[rare].sum())) / rounds)
    away_N = left_N - float(weight_N @ left_N) / total
    return missing * math.sqrt(float(weight_N @ away_N**2) / total)


def rare_size(away_N: Floats) -> float:
    """How large the rare ones among deviations from a mean are, by which their variance may be off: 1 where few of many
    are ±1 and the rest 0; 0 where they are normal or lighter, of which Student's t counts all that is not known.

    From what their fourth moment has more than that of normal ones: Var(s²) = (μ₄ − σ⁴) / N.
    """
    variance = float(away_N @ away_N) / max(len(away_N), 1)
    fourth = float((away_N**2) @ (away_N**2)) / max(len(away_N), 1)
    return math.sqrt(max(fourth / variance - 3.0 * variance, 0.0)) if variance > 0 else 0.0


def rare_error(weight_N: Floats, size: float) -> float:
    """Standard error of Σw·y / Σw for what did not come up, or by chance did too seldom: RARE_ROWS of the rounds that
    decide it, each off by `size`. A few rounds that all succeed have no variance of their own.
    """
    total, squares = float(weight_N.sum()), float(weight_N @ weight_N)
    if total == 0:
        return 0.0
    return size * math.sqrt(RARE_ROWS * float((weight_N**2) @ (weight_N**2)) / squares) / total


def odd_propensities(chosen_N: Ints, pscore_N: Floats, configs: int) -> dict[int, float]:
    """Σ 1/p over each tried config's rounds, as a share of all rounds, where that is off 1 by far more than chance.

    Its expectation is 1 where every round could have chosen the config. Its variance is estimated by Σ (1/p)(1/p − 1)
    over the config's own rounds. Configs without a round are left out.
    """
    rounds, weight_N = len(chosen_N), 1.0 / pscore_N
    share_C = np.bincount(chosen_N, weight_N, configs) / rounds
    error_C = np.sqrt(np.bincount(chosen_N, weight_N * (weight_N - 1.0), configs)) / rounds
    away_C = np.abs(share_C - 1.0)
    odd_C = (share_C > 0) & (away_C > ODD_SHARE) & (away_C > ODD_SIGMAS * error_C)
    return {int(c): float(share_C[c]) for c in np.flatnonzero(odd_C)}


def too_seldom(share: float, pscore_N: Floats) -> bool:
    """Whether a config that `odd_propensities` names may have been chosen too seldom for its rows to tell.

    Its Σ 1/p comes to `share` of the rounds; the others show none of it by chance where it had a propensity of
    UNSEEN_ROUNDS over their number or less, which is likely where the log holds one so low.
    """
    return bool(share < 1.0 and float(pscore_N.min()) * len(pscore_N) * (1.0 - share) <= UNSEEN_ROUNDS)


def floored(pscore_N: Floats, configs: int) -> tuple[int, float, float] | None:
    """How many rows have a propensity that is not theirs, since it is low; up to which; and how many have one so low in
    true logs at most, in expectation. None where these are no more than chance explains.

    Each round holds at most `configs` propensities of q or less, of which each comes up with probability q or less:
    fewer than rounds · configs · q rows. More are told by a Poisson test, where they are few of the rows (many are
    odd_propensities'), and weigh as much as ODD_SHARE of the rounds.
    """
    rounds, sorted_N = len(pscore_N), np.sort(pscore_N)
    count = np.flatnonzero(np.diff(sorted_N, append=np.inf)) + 1
    low = sorted_N[count - 1]
    most = rounds * configs * low
    surplus = (count - most) / low
    odd = (count <= ODD_SHARE * rounds) & (surplus > ODD_SHARE * rounds)
    odd &= stats.poisson.sf(count - 1, most) < FLOOR_ERROR
    if not odd.any():
        return None
    worst = int(np.where(odd, surplus, -np.inf).argmax())
    return int(count[worst]), float(low[worst]), float(most[worst])
