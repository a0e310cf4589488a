"""Has the traffic changed? Compares the training queries with the newest slice, each difference with what chance gives.

Three questions: do queries fall into the patterns in other shares, do their embeddings lie elsewhere, and do configs
now perform differently inside the patterns. All are tested as if queries were independent: a burst of similar queries
(one user, one session) is a change to these tests, as it is to a bank that learned before the burst.
Suffixes: Q queries, N (query, config) pairs, P leaves, D dims, F features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

from rb_gpu.learn.distances import label_sums
from rb_gpu.learn.drift_outcomes import ConfigDrift, Utilities, compare_outcomes
from rb_gpu.learn.trajectories import Trajectories
from rb_gpu.learn.valuation import held_out_outcomes
from rb_gpu.objective import Objective

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

# most queries of each side that are compared, drawn at random; more would only find changes too small to matter
MAX_QUERIES = 20_000
# significance level; at .05 a nightly job would raise a false alarm once or twice a month
LEVEL = 0.01
# the usual limits of PSI (Siddiqi 2006), here applied to its excess over chance
MODERATE_PSI, LARGE_PSI = 0.1, 0.25
# least AUC, of a classifier between newest and training queries, that is reported; nearer to 1/2 it does not matter
TELLING_AUC = 0.55
PERMUTATIONS = 999
# number of principal components, and of random frequencies with a sine and a cosine each
FEATURES = 16
TILE_QUERIES = 2048


@dataclass(frozen=True)
class ShareDrift:
    """Population stability index of the shares of queries per leaf; chance: its mean if nothing changed."""

    psi: float
    chance: float
    p_value: float
    reading: str


@dataclass(frozen=True)
class EmbeddingDrift:
    """Two-sample test on embeddings. auc: how well a linear classifier separates newest from training queries."""

    auc: float
    p_value: float


@dataclass(frozen=True)
class Drift:
    """What changed between the training queries and the newest; warnings say what to do."""

    training_queries: int
    newest_queries: int
    shares: ShareDrift
    embeddings: EmbeddingDrift
    outcomes: list[ConfigDrift]
    warnings: list[str] = field(default_factory=list)


def measure_drift(
    training: Trajectories, newest: Trajectories, label_Q: Rows, objective: Objective, seed: int, decays: bool
) -> Drift:
    """Compares at most MAX_QUERIES queries of each side. label_Q: (Q,) leaf of each training query, negative for none.
    decays: whether judge.half_life is set, which then needs no advice.

    Both tables must name the same configs. Time and memory are linear in the queries.
    """
    rng, some_old, some_new = _sampled(training, newest, seed)
    old, new = training.select_queries(some_old), newest.select_queries(some_new)
    embeddings = compare_embeddings(old.x_QD, new.x_QD, rng)
    leaf_old, leaf_new = leaves_of(training.x_QD, label_Q, np.flatnonzero(some_old), new.x_QD)
    patterns = int(label_Q.max()) + 1
    shares = compare_shares(np.bincount(leaf_old, minlength=patterns), np.bincount(leaf_new, minlength=patterns), rng)
    names = [training.configs.describe(config) for config in range(len(training.configs))]
    outcomes = compare_outcomes(_utilities(old, objective, leaf_old), _utilities(new, objective, leaf_new), names)
    return Drift(
        training_queries=len(training.query_id),
        newest_queries=len(newest.query_id),
        shares=shares,
        embeddings=embeddings,
        outcomes=outcomes,
        warnings=_warnings(shares, embeddings, outcomes, decays),
    )


def measure_embeddings(training: Trajectories, newest: Trajectories, seed: int) -> EmbeddingDrift:
    """The embedding part of `measure_drift` alone, which depends neither on patterns nor on the objective."""
    rng, some_old, some_new = _sampled(training, newest, seed)
    return compare_embeddings(training.x_QD[some_old], newest.x_QD[some_new], rng)


def _sampled(
    training: Trajectories, newest: Trajectories, seed: int
) -> tuple[np.random.Generator, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """The generator after the draw, and a mask of the drawn queries of each side."""
    rng = np.random.default_rng(seed)
    return rng, _sample(len(training.query_id), rng), _sample(len(newest.query_id), rng)


def _sample(queries: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    some = np.zeros(queries, dtype=bool)
    some[rng.choice(queries, min(queries, MAX_QUERIES), replace=False)] = True
    return some


def leaves_of(
    x_QD: npt.NDArray[np.float32], label_Q: Rows, old: Rows, new_QD: npt.NDArray[np.float32]
) -> tuple[Rows, Rows]:
    """The leaf of highest cosine for the training queries in rows `old`, and for the newest queries.

    A training query has pulled its leaf's mean towards itself, and the newest have not, so each query is compared with
    leaf means that leave it out. If training queries were counted in the leaf that they are members of, the leaves made
    for them would fit their shares and hide small changes (at ten queries a leaf, p-values are still slightly too
    large).
    """
    labels = torch.from_numpy(label_Q)
    sums, _ = label_sums(
        torch.from_numpy(x_QD), torch.ones(len(x_QD), dtype=torch.float32), labels, int(label_Q.max()) + 1
    )
    sums_PD = sums.numpy()
    unit_PD = (sums_PD / np.maximum(np.linalg.norm(sums_PD, axis=1, keepdims=True), 1e-300)).astype(np.float32)

    def place(x: npt.NDArray[np.float32], own: Rows) -> Rows:
        cosine = x @ unit_PD.T  # times the query's norm, which ranks the leaves the same
        member = np.flatnonzero(own >= 0)
        rest = sums_PD[own[member]] - x[member]
        norm = np.linalg.norm(rest, axis=1)
        alone = norm <= 1e-6 * np.linalg.norm(sums_PD[own[member]], axis=1)
        without = np.einsum("qd,qd->q", x[member], rest) / np.maximum(norm, 1e-300)
        cosine[member, own[member]] = np.where(alone, -np.inf, without)
        return np.asarray(cosine.argmax(1))

    def places(x: npt.NDArray[np.float32], own: Rows) -> Rows:
        starts = range(0, len(x), TILE_QUERIES)
        return np.concatenate([place(x[s : s + TILE_QUERIES], own[s : s + TILE_QUERIES]) for s in starts])

    return places(x_QD[old], label_Q[old]), places(new_QD, np.full(len(new_QD), -1))


def psi(old_P: npt.NDArray[np.int64], new_P: npt.NDArray[np.int64]) -> Floats:
    """Population stability index Σ (p − q)·ln(p / q) over the last axis of counts (..., P).

    Half a query is added to every cell (Jeffreys' prior), so that an empty one does not give infinity.
    """
    p, q = ((counts + 0.5) / (counts.sum(-1, keepdims=True) + 0.5 * counts.shape[-1]) for counts in (old_P, new_P))
    return np.asarray(((p - q) * np.log(p / q)).sum(-1))


def compare_shares(old_P: Rows, new_P: Rows, rng: np.random.Generator) -> ShareDrift:
    """PSI of two counts of queries per leaf (P,), compared with random reassignments of the same queries to the sides.

    Where cells are full, PSI / (1/n + 1/m) is chi-squared with P − 1 degrees of freedom, so PSI has the mean
    (P − 1)·(1/n + 1/m) (Yurdakul & Naranjo 2020): with many patterns and few queries chance alone exceeds the usual
    limits .1 and .25. The permutation distribution is exact with empty cells too: given both totals, the counts are
    multivariate hypergeometric.
    """
    total_P = old_P + new_P
    held = total_P > 0
    old_P, new_P, total_P = old_P[held], new_P[held], total_P[held]
    value = float(psi(old_P, new_P))
    dealt = rng.multivariate_hypergeometric(total_P, int(new_P.sum()), size=PERMUTATIONS, method="marginals")
    by_chance = psi(total_P - dealt, dealt)
    chance = float(by_chance.mean())
    p_value = (1 + int((by_chance >= value * (1 - 1e-12)).sum())) / (PERMUTATIONS + 1)
    beyond = value - chance if p_value <= LEVEL else 0.0
    reading = "large" if beyond > LARGE_PSI else "moderate" if beyond >= MODERATE_PSI else "stable"
    return ShareDrift(value, chance, p_value, reading)


def compare_embeddings(
    old_QD: npt.NDArray[np.float32], new_QD: npt.NDArray[np.float32], rng: np.random.Generator
) -> EmbeddingDrift:
    """Tests whether the mean embeddings of the sides differ: `hotelling` on features of the queries' directions.

    The features are leading principal components, which hold what is easiest to see, and random Fourier features of the
    Gaussian kernel (Rahimi & Recht 2007; width the median distance), whose means change almost surely with any change
    of distribution (Chwialkowski, Ramdas, Sejdinovic & Gretton 2015). They are computed on both sides pooled, without
    knowing which side a query is from, so the test is valid. Linear in the queries. NaN for fewer than 30 queries, or a
    single direction.
    """
    x = np.concatenate([old_QD, new_QD])
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
    x -= x.mean(0, dtype=np.float64)
    total, dim = x.shape
    count = min(FEATURES, total // 30)
    pairs = rng.integers(total, size=(2, 2000))
    width = float(np.median(np.linalg.norm(x[pairs[0]] - x[pairs[1]], axis=1)))
    if count == 0 or width == 0:
        return EmbeddingDrift(math.nan, math.nan)
    axes = rng.normal(size=(dim, min(2 * count, dim)))
    for _ in range(3):  # subspace iteration (Halko, Martinsson & Tropp 2011)
        axes = np.linalg.qr(x.T @ (x @ axes))[0]
    components = x @ axes
    turn = np.linalg.eigh(components.T @ components)[1][:, -count:]
    angle = x @ (rng.normal(size=(dim, count)) / width)
    features = np.concatenate([components @ turn, np.cos(angle), np.sin(angle)], axis=1)
    return hotelling(features[: len(old_QD)], features[len(old_QD) :])


def hotelling(old_QF: Floats, new_QF: Floats) -> EmbeddingDrift:
    """Hotelling's (1931) two-sample T² on features, and the AUC of the linear discriminant between the sides.

    V = T² / (T² + N − 2) is the share of scatter between the sides. Its law is Beta(F / 2, (N − 1 − F) / 2), whose mean
    F / (N − 1) holds however the features are distributed. auc: Φ(Δ / √2), with an unbiased estimate of Mahalanobis'
    Δ² (a classifier two-sample test, Lopez-Paz & Oquab 2017, that needs no training).
    """
    n, m = len(old_QF), len(new_QF)
    total = n + m
    features = np.concatenate([old_QF, new_QF])
    features = features - features.mean(0)
    features /= np.maximum(features.std(0), 1e-300)
    scatter, turn = np.linalg.eigh(features.T @ features)
    known = scatter > 1e-9 * scatter[-1]
    whitened = features @ (turn[:, known] / np.sqrt(scatter[known]))
    between = whitened[:n].mean(0) - whitened[n:].mean(0)
    rank, share = int(known.sum()), float(n * m / total * between @ between)
    p_value = float(stats.beta.sf(share, rank / 2, (total - 1 - rank) / 2))
    t2 = (total - 2) * share / max(1.0 - share, 1e-12)
    apart = t2 * total / (n * m) * (total - rank - 3) / (total - 2) - rank * total / (n * m)
    return EmbeddingDrift(float(stats.norm.cdf(math.sqrt(max(apart, 0.0) / 2))), p_value)


def _utilities(table: Trajectories, objective: Objective, leaf_Q: Rows) -> Utilities:
    rows = held_out_outcomes(table, objective)
    pair_N, which = np.unique(rows.query_row * len(table.configs) + rows.config_id, return_inverse=True)
    value = np.bincount(which, weights=rows.utility) / np.bincount(which)
    return Utilities(value, leaf_Q[pair_N // len(table.configs)], pair_N % len(table.configs))


def _warnings(shares: ShareDrift, embeddings: EmbeddingDrift, outcomes: list[ConfigDrift], decays: bool) -> list[str]:
    said = []
    if shares.reading != "stable":
        said.append(
            f"the patterns' shares of the queries have changed (PSI {shares.psi:.2f}, by chance {shares.chance:.2f}, p "
            f"{shares.p_value:.3g}: a {shares.reading} change); train more often, and read the held-out value as that "
            "of the newest traffic only"
        )
    if embeddings.p_value <= LEVEL and embeddings.auc >= TELLING_AUC:
        said.append(
            f"the newest queries' embeddings differ from the training queries' (classifier's AUC {embeddings.auc:.2f}, "
            f"p {embeddings.p_value:.3g}); check that the same embedder made both, and log the new kind of query under "
            "several configs before the next training"
        )
    changed = [config for config in outcomes if config.q_value <= LEVEL]
    if changed:
        worst = max(changed, key=lambda config: abs(config.change))
        decay = "" if decays else "set judge.half_life=auto so that old rows weigh less, and "
        said.append(
            f"utility within patterns has changed (for {len(changed)} of {len(outcomes)} configs, most for "
            f"{worst.config}: {worst.change:+.4f}, q {worst.q_value:.3g}); {decay}look for what changed in the "
            "service, or for another kind of query in the same patterns"
        )
    return said
