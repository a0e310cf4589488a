"""Off-policy estimators on plain arrays: what a policy would have earned, from a log that another policy wrote.

A round is one logged row. The policy is deterministic: it picks one config per round. Each estimator returns a value
and every round's influence on it, so the difference of two policies on one log has the differences of their influences,
and its interval is a paired one. w are matched weights, r rewards, p propensities.
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
# Σ 1/p over a config's rows is odd if it is off by more standard errors (no chance) and by more of the rounds (matters)
ODD_SIGMAS, ODD_SHARE = 5.0, 0.1
# significance level of `floored`, by a Poisson test: how often it flags rows of low propensities that are correct
FLOOR_ERROR = 1e-4
# failures that an interval adds to those observed (Agresti & Coull 1998): without them, what a sample does not contain
# is taken to be impossible
RARE_ROWS = 2.0
# if matched weights add up to fewer rounds than expected by more standard errors, some rounds went unseen
UNSEEN_SIGMAS = 2.0
# rounds of which at most this many are expected to match show none at all in at least 1 - LEVEL of logs (Poisson)
UNSEEN_ROUNDS = -math.log(1.0 - LEVEL)


@dataclass(frozen=True)
class Estimate:
    """A value, which is the mean of score_N (N,). influence_N (N,): to first order, N times the fall of the value when
    a round is left out (the jackknife's, Efron & Stein 1981).
    """

    value: float
    score_N: Floats
    influence_N: Floats

    def over(self, other: Estimate) -> Estimate:
        """The difference of two values on the same rounds, this one less the other."""
        return Estimate(self.value - other.value, self.score_N - other.score_N, self.influence_N - other.influence_N)

    def interval(self, query_N: Ints, size: float, unseen: float) -> tuple[float, float]:
        """The confidence interval of level LEVEL, clustered by query: query_N is the query of each round, from 0.

        size: effective number of rounds; few of them make the error itself uncertain, hence Student's t. unseen: a
        further standard error (`unseen_error`). NaN where size is 1 or less. Influences sum to 0, so those of a query
        with a share h of the rounds show only 1 - h of their variance, and almost none where it holds most rounds. To
        make up for that, h, less the share of an average query, times its rounds' squared influences is added.
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

    chosen_N, choice_N: config ids of the log and of the policy. pscore_N: probability with which the log chose
    chosen_N. Raises ValueError where shapes differ, or a pscore is outside (0, 1].
    """
    for name, value in (("choice_N", choice_N), ("pscore_N", pscore_N)):
        if value.shape != chosen_N.shape:
            raise ValueError(f"{name} has shape {value.shape}, chosen_N {chosen_N.shape}; give one of each a round")
    if not ((pscore_N > 0) & (pscore_N <= 1)).all():
        raise ValueError("pscore_N has values outside (0, 1]; give the probability of the logged choice")
    return np.where(chosen_N == choice_N, 1.0 / pscore_N, 0.0)


def ips(reward_N: Floats, chosen_N: Ints, choice_N: Ints, pscore_N: Floats) -> Estimate:
    """Inverse propensity scoring, the mean of w·r (Horvitz & Thompson 1952): unbiased, with the largest variance."""
    return mean_of(matched_weights(chosen_N, choice_N, pscore_N) * reward_N)


def snips(reward_N: Floats, chosen_N: Ints, choice_N: Ints, pscore_N: Floats) -> Estimate:
    """Self-normalised inverse propensity scoring, Σw·r / Σw (Swaminathan & Joachims 2015). NaN where nothing matched.

    With pscores of 1 it is the plain mean of the rows that tried what the policy picks.
    """
    return _ratio(matched_weights(chosen_N, choice_N, pscore_N), reward_N)


def direct_method(predicted_NC: Floats, choice_N: Ints) -> Estimate:
    """Mean of the model's predictions for the policy's picks: only as good as the model is.

    Raises ValueError where choice_N is not a config of predicted_NC.
    """
    return mean_of(_of(predicted_NC, choice_N))


def doubly_robust(reward_N: Floats, chosen_N: Ints, choice_N: Ints, pscore_N: Floats, predicted_NC: Floats) -> Estimate:
    """The direct method plus the mean of w·(r − predicted) (Dudík, Langford & Li 2011): consistent if either the
    propensities or the model are right. The model must not have seen the round that it predicts.
    """
    weight_N = matched_weights(chosen_N, choice_N, pscore_N)
    return mean_of(_of(predicted_NC, choice_N) + weight_N * (reward_N - _of(predicted_NC, chosen_N)))


def self_normalised_doubly_robust(
    reward_N: Floats, chosen_N: Ints, choice_N: Ints, pscore_N: Floats, predicted_NC: Floats
) -> Estimate:
    """The direct method plus Σw·(r − predicted) / Σw (the weighted doubly robust estimator of Thomas & Brunskill 2016,
    of one step): to doubly robust what SNIPS is to IPS. NaN where nothing matched.
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
    # total without this round; undefined for the only round that matched
    rest_N = np.where(weight_N < total, total - weight_N, np.nan)
    return Estimate(value, rounds * weight_N * y_N / total, rounds * weight_N * (y_N - value) / rest_N)


def effective_size(weight_N: Floats) -> float:
    """Kish's (Σw)² / Σw²: the number of rounds of equal weight that tell as much; 0 where all weights are 0."""
    squares = float(weight_N @ weight_N)
    return float(weight_N.sum()) ** 2 / squares if squares > 0 else 0.0


def unseen_error(weight_N: Floats, left_N: Floats, most_N: Floats) -> float:
    """Standard error of Σw·left / Σw due to rounds that no matched round represents; 0 where chance explains them.

    Matched weights are expected to add up to N. If they add up to far less, rounds of small propensity did not come up,
    or some had propensity 0: a share of the rounds is missing, and with it their part in the influences. If such rounds
    are few, the sum does not show it, but their propensities do. most_N: the largest propensity that each round's pick
    may have had. The rounds of the smallest ones, of which UNSEEN_ROUNDS are expected to match, count as missing but
    for the share that matched ones among them represent. The missing share is taken to be off by the standard deviation
    of the matched residuals left_N.
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
    """Size of the rare values among deviations from a mean, which a variance estimate may miss: 1 if few of many are ±1
    and the rest 0; 0 if the deviations are normal or have lighter tails, where Student's t covers the uncertainty.

    It is the excess of their fourth moment over the normal one: Var(s²) = (μ₄ − σ⁴) / N.
    """
    variance = float(away_N @ away_N) / max(len(away_N), 1)
    fourth = float((away_N**2) @ (away_N**2)) / max(len(away_N), 1)
    return math.sqrt(max(fourth / variance - 3.0 * variance, 0.0)) if variance > 0 else 0.0


def rare_error(weight_N: Floats, size: float) -> float:
    """Standard error of Σw·y / Σw for rare outcomes that did not come up, or by chance too seldom: RARE_ROWS of the
    rounds that decide it, each off by `size`. Needed since a few rounds that all succeed show no variance.
    """
    total, squares = float(weight_N.sum()), float(weight_N @ weight_N)
    if total == 0:
        return 0.0
    return size * math.sqrt(RARE_ROWS * float((weight_N**2) @ (weight_N**2)) / squares) / total


def odd_propensities(chosen_N: Ints, pscore_N: Floats, configs: int) -> dict[int, float]:
    """Σ 1/p over each tried config's rounds, as a share of all rounds, for configs where it is off 1 by far more than
    chance.

    Its expectation is 1 if every round could have chosen the config. Its variance is estimated by Σ (1/p)(1/p − 1) over
    the config's own rounds, divided by the share where that is below 1: rounds that did not come up are missing in both
    sums. Configs without a round are left out.
    """
    rounds, weight_N = len(chosen_N), 1.0 / pscore_N
    share_C = np.bincount(chosen_N, weight_N, configs) / rounds
    squares_C = np.bincount(chosen_N, weight_N * (weight_N - 1.0), configs) / np.clip(share_C, 1e-300, 1.0)
    error_C = np.sqrt(squares_C) / rounds
    away_C = np.abs(share_C - 1.0)
    odd_C = (share_C > 0) & (away_C > ODD_SHARE) & (away_C > ODD_SIGMAS * error_C)
    return {int(c): float(share_C[c]) for c in np.flatnonzero(odd_C)}


def too_seldom(share: float, pscore_N: Floats) -> bool:
    """Whether a config that `odd_propensities` returned may merely have been chosen too seldom for its rows to tell.

    Its Σ 1/p amounts to `share` of the rounds. The rest, n rounds, may show no row of it by chance if its propensity
    there was at most UNSEEN_ROUNDS / n; that is taken to be possible if the least propensity of the log is so low.
    """
    return bool(share < 1.0 and float(pscore_N.min()) * len(pscore_N) * (1.0 - share) <= UNSEEN_ROUNDS)


def floored(pscore_N: Floats, configs: int) -> tuple[int, float, float] | None:
    """Detects propensities that are too low to be true: how many rows have one, the largest of these, and at most how
    many rows are expected to have one so low in a correct log. None where chance explains them.

    Each round has at most `configs` propensities of q or less, each of which comes up with probability q or less: fewer
    than rounds · configs · q rows are expected. A Poisson test detects more than that, if they are few of the rows
    (many are a case for odd_propensities) and their surplus weighs as much as ODD_SHARE of the rounds.
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
