"""Slow scalar implementations of the reference document's formulas, against which the fast implementation is tested.

"Reference" is the SONA ReasoningBank document, "design" is this project's design page. Nothing of rb_gpu is imported.
The loops compute in float64 where the reference has float32: pass values that float32 can represent, and compare with
a tolerance. If a test depends on a tie in rounding or voting, use weights that are exact in binary, because sums are
taken in the order given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

Points = Sequence[Sequence[float]]


class Params(NamedTuple):
    """SearchParams (reference section 2), hashable, so that it is also the `ParamKey` of section 5."""

    ef_search: int
    n_probes: int
    model_tier: str
    context_tokens: int
    temperature: float


@dataclass(frozen=True, eq=False)
class Trajectory:
    """QueryTrajectory (reference section 2), flat, without retrieved_ids and feedback, which no statistic reads."""

    id: int
    embedding: Sequence[float]
    ef_search: int = 100
    n_probes: int = 8
    model_tier: str = "auto"
    context_tokens: int = 2048
    temperature: float = 0.7
    precision: float = 1.0
    recall: float = 1.0
    latency_us: int = 1000
    timestamp: int = 0

    @property
    def params(self) -> Params:
        """The five search parameters."""
        return Params(self.ef_search, self.n_probes, self.model_tier, self.context_tokens, self.temperature)


class Moments(NamedTuple):
    """Additive statistics of one cell; `m2` is the sum of w * (x - mean)^2."""

    n: int
    sum_w: float
    sum_w2: float
    mean: float
    m2: float


def f1(p: float, r: float) -> float:
    """F1 with 1e-6 added to the denominator, by which reference section 5 selects: just below F1; 0 if both are 0."""
    return 2.0 * p * r / (p + r + 1e-6)


def f1_exact(p: float, r: float) -> float:
    """F1 without the 1e-6; 0 if both are 0 (design section 7, Evidence)."""
    return 0.0 if p + r == 0.0 else 2.0 * p * r / (p + r)


def product(p: float, r: float) -> float:
    """Precision * recall: the weight of reference section 4, the tested quality and the baseline of section 5."""
    return p * r


def round_half_away(value: float) -> int:
    """Rust's `f32::round` (reference section 4): halves away from zero."""
    whole = math.floor(abs(value))
    whole += abs(value) - whole >= 0.5
    return int(math.copysign(whole, value))


def snap(value: float, tried: Sequence[float]) -> float:
    """The tried value nearest to `value`; of two equally near ones the smaller (design section 9 row 2)."""
    return min(sorted(set(tried)), key=lambda t: abs(t - value))


def vote(names: Sequence[str], weights: Sequence[float], order: Sequence[str]) -> str:
    """The name with the largest sum of weights; ties go to the one that comes first in `order` (tiers, cheapest first).

    Raises KeyError for a name that `order` lacks, ValueError without votes.
    """
    totals = dict.fromkeys(order, 0.0)
    for name, weight in zip(names, weights, strict=True):
        totals[name] += weight  # a name outside `order` is a KeyError
    best = None
    for name in order:
        if name in names and (best is None or totals[name] > totals[best]):
            best = name
    if best is None:
        raise ValueError("no votes")
    return best


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Sum of w * x over the sum of w; the unweighted mean if all weights are 0 (design section 9 row 10)."""
    total = weighted = plain = 0.0
    for value, weight in zip(values, weights, strict=True):
        total += weight
        weighted += value * weight
        plain += value
    return weighted / total if total > 0.0 else plain / len(values)


# Clustering


def squared_distance(a: Sequence[float], b: Sequence[float]) -> float:
    """The square of reference section 4's `euclidean_distance`, which the reference uses but does not define."""
    total = 0.0
    for x, y in zip(a, b, strict=True):
        total += (float(x) - float(y)) ** 2
    return total


def kmeans_plus_plus(points: Points, k: int, uniform: Sequence[float]) -> tuple[list[list[float]], list[int]]:
    """D^2 seeding (reference section 4); returns (centroids, indices of the points that they are).

    `uniform` has k numbers in [0, 1). The reference's `gen_range` is read as floor(uniform[0] * n). Each later number
    gives the threshold uniform * total, and the first point whose cumulative sum of d^2 reaches it (>=) is taken. As in
    the reference, if all distances are 0 or the uniform number is 0, that is point 0, whatever its distance (design
    section 9 row 12). The total and the cumulative sum are added in the same order here, so that the threshold of a
    uniform number below 1 is always reached.
    """
    indices = [int(uniform[0] * len(points))]
    for u in uniform[1:k]:
        squares = [min(squared_distance(p, points[c]) for c in indices) for p in points]
        total = 0.0
        for square in squares:
            total += square
        cumulative, selected = 0.0, 0
        for i, square in enumerate(squares):
            cumulative += square
            if cumulative >= u * total:
                selected = i
                break
        indices.append(selected)
    return [[float(v) for v in points[i]] for i in indices], indices


def assign(points: Points, centroids: Points) -> list[int]:
    """The nearest centroid of each point, the lower index on ties (reference section 4, strict `<`)."""
    labels = []
    for p in points:
        distances = [squared_distance(p, c) for c in centroids]
        labels.append(distances.index(min(distances)))
    return labels


def lloyd(
    points: Points, centroids: Points, max_iter: int, to_the_letter: bool = False
) -> tuple[list[list[float]], list[int], int]:
    """Lloyd's iteration (reference section 4): (centroids, labels, n_iter), n_iter counting assignment steps.

    It stops before the update if no assignment changed; epsilon is unused, as in the reference. The reference does not
    define `compute_centroids` for an empty cluster; here such a cluster keeps its centroid (the design re-seeds it
    instead). If max_iter ends the loop, the labels are those before the last update, as in the reference; the design
    wants labels that match the final centroids, which `assign` gives. `to_the_letter` also starts from the reference's
    all-zero assignments: if the first step assigns every point to cluster 0, as always for k = 1, that counts as
    converged, and the result is the seed instead of the mean.
    """
    current = [[float(v) for v in c] for c in centroids]
    labels = [0 if to_the_letter else -1] * len(points)
    n_iter = 0
    for _ in range(max_iter):
        n_iter += 1
        old, labels = labels, assign(points, current)
        if labels == old:
            break
        for c in range(len(current)):
            members = [p for p, label in zip(points, labels, strict=True) if label == c]
            if members:
                current[c] = [sum(float(m[d]) for m in members) / len(members) for d in range(len(current[c]))]
    return current, labels, n_iter


def inertia(points: Points, centroids: Points, labels: Sequence[int]) -> float:
    """Sum of squared distances to the assigned centroids (design section 7; the reference has none)."""
    return sum(squared_distance(p, centroids[label]) for p, label in zip(points, labels, strict=True))


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Cosine similarity (used but not defined in reference section 7); 0 if a norm is 0."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    norms = math.sqrt(float(x @ x)) * math.sqrt(float(y @ y))
    return float(x @ y) / norms if norms > 0.0 else 0.0


def _labels(clusters: Sequence[Sequence[int]], n: int) -> list[int]:
    labels = [0] * n
    for label, members in enumerate(sorted(clusters, key=min)):
        for i in members:
            labels[i] = label
    return labels


def complete_linkage(points: Points, threshold: float) -> list[int]:
    """Consolidation by complete linkage (design section 9 row 13); labels are numbered by first member.

    Reference section 7 merges every pair with cosine > 0.95 from a list that goes stale. Here the similarity of two
    clusters is that of their least similar pair of members; the most similar clusters merge first, while that cosine is
    > threshold (strict). Ties go to the pair with the lowest first members. Cosines are between the original points,
    not merged centroids.
    """
    similarity = [[cosine(a, b) for b in points] for a in points]
    clusters = [[i] for i in range(len(points))]
    while True:
        best, pair = threshold, None
        for a in range(len(clusters)):
            for b in range(a + 1, len(clusters)):
                worst = min(similarity[i][j] for i in clusters[a] for j in clusters[b])
                if worst > best:
                    best, pair = worst, (a, b)
        if pair is None:
            return _labels(clusters, len(points))
        clusters[pair[0]] += clusters.pop(pair[1])


def ward(points: Points, weights: Sequence[float], n_clusters: int) -> list[int]:
    """Weighted Ward linkage (reference section 7, `Linkage::Ward`; weighted by support: design section 7).

    The pair with the least w_a * w_b / (w_a + w_b) * |c_a - c_b|^2 merges into its weighted mean, until n_clusters are
    left; ties go to the pair with the lowest indices. The reference does not define `clusters_at_level`; the design
    reads it as a number of clusters. Points are not normalised, neither before nor after a merge. Labels are numbered
    by first member.
    """
    clusters = [([i], [float(v) for v in p], float(w)) for i, (p, w) in enumerate(zip(points, weights, strict=True))]
    while len(clusters) > n_clusters:
        least, pair = math.inf, (0, 1)
        for a in range(len(clusters)):
            for b in range(a + 1, len(clusters)):
                (_, ca, wa), (_, cb, wb) = clusters[a], clusters[b]
                cost = wa * wb / (wa + wb) * squared_distance(ca, cb)
                if cost < least:
                    least, pair = cost, (a, b)
        members_b, cb, wb = clusters.pop(pair[1])
        members_a, ca, wa = clusters[pair[0]]
        centre = [(wa * x + wb * y) / (wa + wb) for x, y in zip(ca, cb, strict=True)]
        clusters[pair[0]] = (members_a + members_b, centre, wa + wb)
    return _labels([members for members, _, _ in clusters], len(points))


# Patterns


def create_pattern(trajectories: Sequence[Trajectory], pattern_id: int = 0, now: int = 0) -> dict[str, Any]:
    """`create_pattern_from_cluster` (reference section 4): weights p * r, their mean as confidence, tier auto, 2048
    tokens.

    If the total weight is 0, which is 0 / 0 in the reference, the means are unweighted (design section 9 row 10). The
    centroid, an argument in the reference, is the mean embedding, as it is after convergence. `now` replaces the clock.
    The mean latency is rounded down.
    """
    n = len(trajectories)
    weights = [product(t.precision, t.recall) for t in trajectories]
    dim = len(trajectories[0].embedding)
    return {
        "id": pattern_id,
        "centroid": [sum(float(t.embedding[d]) for t in trajectories) / n for d in range(dim)],
        "optimal_params": Params(
            ef_search=round_half_away(weighted_mean([t.ef_search for t in trajectories], weights)),
            n_probes=round_half_away(weighted_mean([t.n_probes for t in trajectories], weights)),
            model_tier="auto",
            context_tokens=2048,
            temperature=weighted_mean([t.temperature for t in trajectories], weights),
        ),
        "confidence": min(max(sum(weights) / n, 0.0), 1.0),
        "support_count": n,
        "avg_precision": sum(t.precision for t in trajectories) / n,
        "avg_recall": sum(t.recall for t in trajectories) / n,
        "avg_latency_us": sum(t.latency_us for t in trajectories) // n,
        "created_at": now,
        "updated_at": now,
        "abstraction_level": 0,
        "children": [],
    }


def create_pattern_corrected(
    trajectories: Sequence[Trajectory],
    tiers: Sequence[str],
    quality: Callable[[float, float], float] = product,
    pattern_id: int = 0,
    now: int = 0,
) -> dict[str, Any]:
    """`create_pattern` as corrected by design section 9 rows 2, 5, 10 and section 7's Pattern paragraph.

    The tier is chosen by quality-weighted vote (ties: first in `tiers`; one vote each if all weights are 0), and the
    context is snapped to a value tried in the cluster. The key `quality` replaces `confidence`, which needs verdicts;
    it is still the mean of p * r. The design does not say whether "quality-weighted" means p * r or the configured
    quality: the weights are the `quality` argument, p * r by default. Recency weights are not applied.
    """
    pattern = create_pattern(trajectories, pattern_id, now)
    weights = [quality(t.precision, t.recall) for t in trajectories]
    contexts = [t.context_tokens for t in trajectories]
    voices = weights if sum(weights) > 0.0 else [1.0] * len(weights)
    pattern["quality"] = pattern.pop("confidence")
    pattern["optimal_params"] = Params(
        ef_search=round_half_away(weighted_mean([t.ef_search for t in trajectories], weights)),
        n_probes=round_half_away(weighted_mean([t.n_probes for t in trajectories], weights)),
        model_tier=vote([t.model_tier for t in trajectories], voices, tiers),
        context_tokens=int(snap(weighted_mean(contexts, weights), contexts)),
        temperature=weighted_mean([t.temperature for t in trajectories], weights),
    )
    return pattern


# Verdicts


def weighted_moments(values: Sequence[float], weights: Sequence[float]) -> Moments:
    """n, sum w, sum w^2, weighted mean and M2 in two passes (design section 7, Evidence); mean and M2 are 0 if sum w
    is 0.
    """
    sum_w = sum_w2 = sum_wx = m2 = 0.0
    for x, w in zip(values, weights, strict=True):
        sum_w += w
        sum_w2 += w * w
        sum_wx += w * x
    mean = sum_wx / sum_w if sum_w > 0.0 else 0.0
    for x, w in zip(values, weights, strict=True):
        m2 += w * (x - mean) ** 2
    return Moments(len(values), sum_w, sum_w2, mean, m2)


def _mean_and_variance(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample variance; the variance of equal values is exactly 0, so that rounding cannot pass for spread."""
    if min(values) == max(values):
        return values[0], 0.0
    mean = sum(values) / len(values)
    return mean, sum((v - mean) ** 2 for v in values) / (len(values) - 1)


def welch(a: Sequence[float], b: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
    """Welch's t of mean(a) - mean(b) - margin and the Welch-Satterthwaite degrees of freedom.

    Reference section 5 uses `welch_t_test` without defining it. Fewer than two values on a side, or zero variance on
    both sides, give NaN (design section 9 row 9), even if the means differ.
    """
    if len(a) < 2 or len(b) < 2:
        return math.nan, math.nan
    (mean_a, var_a), (mean_b, var_b) = _mean_and_variance(a), _mean_and_variance(b)
    va, vb = var_a / len(a), var_b / len(b)
    if va + vb == 0.0:
        return math.nan, math.nan
    t = (mean_a - mean_b - margin) / math.sqrt(va + vb)
    share = va / (va + vb)  # dividing by the sum first keeps tiny variances from underflowing
    return t, 1.0 / (share**2 / (len(a) - 1) + (1.0 - share) ** 2 / (len(b) - 1))


def welch_two_sided(a: Sequence[float], b: Sequence[float]) -> float:
    """The p-value of reference section 5's `compute_significance`, read as two-sided; NaN as in `welch`."""
    t, df = welch(a, b)
    return 2.0 * float(stats.t.sf(abs(t), df))


def welch_one_sided(a: Sequence[float], b: Sequence[float], margin: float = 0.0) -> float:
    """p-value against mean(a) <= mean(b) + margin (design section 7, `welch`); NaN as in `welch`."""
    t, df = welch(a, b, margin)
    return float(stats.t.sf(t, df))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (design section 7). NaN stays NaN and does not count as a test; the design
    does not define this case.
    """
    order = sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=lambda i: p[i])
    adjusted, running = [math.nan] * len(p), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p[i]))
        adjusted[i] = running
    return adjusted


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """Benjamini-Hochberg's step-up adjusted p-values (design section 7). NaN stays NaN and does not count as a test."""
    order = sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=lambda i: p[i])
    adjusted, running = [math.nan] * len(p), 1.0
    for rank in range(len(order), 0, -1):
        i = order[rank - 1]
        running = min(running, p[i] * len(order) / rank)
        adjusted[i] = running
    return adjusted


def judge_reference(
    trajectories: Sequence[Trajectory], min_samples: int, alpha: float, default_ef_search: int
) -> dict[str, Any] | None:
    """`VerdictJudge::judge` (reference section 5) to the letter, with its flaws (design section 9 rows 6 to 8).

    Where the reference is undefined: `ParamKey` is read as all five parameters exactly. Equal mean F1, which the
    reference leaves to the order of a hash map, goes to the config seen first. `welch_t_test` is two-sided, so that a
    best group that is significantly worse than the whole also gets a verdict. A NaN p-value gives None (design row 9),
    and so does a best group with zero mean F1, whose consistency would be 0 / 0. A default with quality 0 gives the
    improvement None instead of infinity.
    """
    if len(trajectories) < min_samples:
        return None
    groups: dict[Params, list[Trajectory]] = {}
    for t in trajectories:
        groups.setdefault(t.params, []).append(t)
    best = None
    for key, group in groups.items():
        if len(group) < 3:
            continue
        quality = sum(f1(t.precision, t.recall) for t in group) / len(group)
        if best is None or quality > best[1]:
            best = (key, quality, group)
    if best is None:
        return None
    key, quality, group = best
    p_value = welch_two_sided(
        [product(t.precision, t.recall) for t in group], [product(t.precision, t.recall) for t in trajectories]
    )
    if math.isnan(p_value) or p_value > alpha or quality == 0.0:
        return None
    variance = sum((f1(t.precision, t.recall) - quality) ** 2 for t in group) / len(group)
    consistency = 1.0 / (1.0 + math.sqrt(variance) / quality)
    defaults = [product(t.precision, t.recall) for t in trajectories if t.ef_search == default_ef_search]
    default = sum(defaults) / len(defaults) if defaults else 0.5
    return {
        "config": key,
        "confidence": quality * consistency,
        "support_count": len(group),
        "avg_improvement": (quality - default) / default if default > 0.0 else None,
        "p_value": p_value,
        "consistency": consistency,
    }


def paule_mandel(effects: Sequence[float], variances: Sequence[float]) -> float:
    """Paule and Mandel's tau^2 (design section 7, `eb`): the root of Q(tau^2) = k - 1, found by bisection.

    0 if Q(0) <= k - 1 or k < 2. Variances must be finite and positive; the caller leaves out other cells.
    """
    if len(effects) < 2:
        return 0.0

    def excess(tau2: float) -> float:
        weights = [1.0 / (v + tau2) for v in variances]
        mean = weighted_mean(effects, weights)
        return sum(w * (e - mean) ** 2 for w, e in zip(weights, effects, strict=True)) - (len(effects) - 1)

    if excess(0.0) <= 0.0:
        return 0.0
    low, high = 0.0, max(variances)
    while excess(high) > 0.0:
        high *= 2.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        if excess(middle) > 0.0:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def empirical_bayes_posterior(
    effect: float, variance: float, prior_mean: float, prior_variance: float
) -> tuple[float, float]:
    """Normal posterior (mean, variance) of one cell's effect (design section 7, `eb`).

    A prior variance of 0 (tau^2 = 0) gives the prior; an infinite variance on one side gives the other side. If both
    are 0 or both infinite, the result is undefined and NaN here. The prior mean is taken as known exactly; its
    uncertainty must be included in prior_variance.
    """
    if variance == prior_variance and (variance == 0.0 or math.isinf(variance)):
        return math.nan, math.nan
    if math.isinf(variance):
        return prior_mean, prior_variance
    if math.isinf(prior_variance):
        return effect, variance
    shrink = variance / (variance + prior_variance)
    return shrink * prior_mean + (1.0 - shrink) * effect, shrink * prior_variance


# Lookup


def interpolate(
    matches: Sequence[tuple[Params, float, float]], tiers: Sequence[str], tried_contexts: Sequence[int]
) -> tuple[Params, float] | None:
    """Weighted mean of (params, similarity, quality) matches (reference section 3, design section 9 rows 1, 2, 4).

    weight = max(similarity, 0) * quality, which is the reference's similarity * confidence with its confidence renamed
    quality. Sums start from zero, results are rounded once, the tier is chosen by vote, the context is snapped. Counts
    are clamped to >= 1 and temperature to [0, 2], where a mean of valid settings is anyway. Returns the params and the
    reference's confidence, total weight / matches; or None, meaning the default, without any match or weight.
    """
    weights = [max(similarity, 0.0) * quality for _, similarity, quality in matches]
    if not sum(weights) > 0.0:
        return None
    rows = [params for params, _, _ in matches]
    params = Params(
        ef_search=max(round_half_away(weighted_mean([r.ef_search for r in rows], weights)), 1),
        n_probes=max(round_half_away(weighted_mean([r.n_probes for r in rows], weights)), 1),
        model_tier=vote([r.model_tier for r in rows], weights, tiers),
        context_tokens=int(snap(weighted_mean([r.context_tokens for r in rows], weights), tried_contexts)),
        temperature=min(max(weighted_mean([r.temperature for r in rows], weights), 0.0), 2.0),
    )
    return params, sum(weights) / len(matches)


def blend(router: Params, bank_params: Params, confidence: float, max_influence: float = 0.3) -> Params:
    """Reference section 6: above confidence 0.5, temperature and context go confidence * 0.3 of the way to the bank's.

    The context is truncated as in the reference, so that even equal contexts may come out one token short. ef_search,
    n_probes and tier stay the router's.
    """
    if not confidence > 0.5:
        return router
    b = confidence * max_influence
    return router._replace(
        temperature=(1.0 - b) * router.temperature + b * bank_params.temperature,
        context_tokens=int((1.0 - b) * router.context_tokens + b * bank_params.context_tokens),
    )


def blend_ramped(
    router: Params,
    bank_params: Params,
    confidence: float,
    tried_contexts: Sequence[int],
    max_influence: float = 0.3,
) -> Params:
    """`blend` with design section 9 row 19's ramp and section 7's snapped context.

    "0.3 * confidence ramped from confidence 0.5" is read as 0.3 * confidence * (confidence - 0.5) / 0.5: 0 at 0.5 and
    0.3 at 1. If nothing is blended the router's context stays, whether it was tried or not; the design does not say.
    """
    if not confidence > 0.5:
        return router
    b = max_influence * confidence * (confidence - 0.5) / 0.5
    return router._replace(
        temperature=router.temperature + b * (bank_params.temperature - router.temperature),
        context_tokens=int(
            snap(router.context_tokens + b * (bank_params.context_tokens - router.context_tokens), tried_contexts)
        ),
    )


def fastgrnn_cell(
    x: Sequence[float],
    h: Sequence[float],
    W: Points,
    U: Points,
    b_gate: Sequence[float],
    b_candidate: Sequence[float],
    zeta: float,
    nu: float,
) -> list[float]:
    """One step of FastGRNN (Kusupati et al. 2018), which reference section 6 names without defining it.

    W is (H, D), U is (H, H), both shared by the gate and the candidate; zeta and nu are given before their sigmoid.
    """

    def sigmoid(v: float) -> float:
        return 1.0 / (1.0 + math.exp(-v)) if v >= 0.0 else math.exp(v) / (1.0 + math.exp(v))

    state = []
    for i in range(len(h)):
        total = 0.0
        for j in range(len(x)):
            total += float(W[i][j]) * float(x[j])
        for j in range(len(h)):
            total += float(U[i][j]) * float(h[j])
        z = sigmoid(total + float(b_gate[i]))
        c = math.tanh(total + float(b_candidate[i]))
        state.append(z * float(h[i]) + (sigmoid(zeta) * (1.0 - z) + sigmoid(nu)) * c)
    return state
