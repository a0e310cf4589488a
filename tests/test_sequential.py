"""Sequential p-values: null worlds that are tested on each of 60 nights, planted effects, and the mixture by
quadrature.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from rb_gpu.evidence import LATENCY_BINS, OUTCOMES, Evidence
from rb_gpu.learn.sequential import MIXTURE, TUNED_ROWS, sequential_p
from rb_gpu.learn.verdicts import compare, holm, sequential

QUALITY = np.array([float(name == "f1") for name in OUTCOMES])
NIGHTS, ALPHA = 60, 0.05


def worlds(n: np.ndarray, total: np.ndarray, squares: np.ndarray, paired: bool) -> Evidence:
    """Evidence of (worlds, configs) cells from their rows, sums and sums of squares; config 0 is the default."""
    shape = (*n.shape, len(OUTCOMES))
    mean, comoment = np.zeros(shape), np.zeros((*shape, len(OUTCOMES)))
    mean[..., 0] = total / n
    comoment[..., 0, 0] = np.maximum(squares - total**2 / n, 0.0)
    w, nothing = n.astype(float), np.zeros(n.shape)
    cells = {"rows": n, "w": w, "w2": w, "mean": mean, "comoment": comoment}
    empty = {"rows": n * 0, "w": nothing, "w2": nothing, "mean": 0 * mean, "comoment": 0 * comoment}
    return Evidence(
        **cells,
        precision=nothing,
        recall=nothing,
        latency_us=nothing,
        latency_hist=np.zeros((*n.shape, LATENCY_BINS)),
        **{f"pair_{name}": value for name, value in (cells if paired else empty).items()},
    )


def night_by_night(draw, nightly: np.ndarray, paired: bool) -> tuple[np.ndarray, np.ndarray]:
    """Holm's fixed-n and sequential p-values (NIGHTS, worlds, configs); `draw` gives one night's sums and sums of
    squares.
    """
    n, total, squares, fixed, peeked = 0, 0.0, 0.0, [], []
    for _ in range(NIGHTS):
        one, square = draw()
        n, total, squares = n + nightly, total + one, squares + square
        comparison = compare(worlds(n, total, squares, paired), QUALITY, 0, 3)
        fixed.append(holm(comparison.p_value))
        peeked.append(sequential(comparison, None))
    return np.stack(fixed), np.stack(peeked)


def normal_sums(rng: np.random.Generator, n: np.ndarray, effect: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    mean = effect + rng.normal(size=n.shape) / np.sqrt(n)
    return n * mean, rng.chisquare(np.maximum(n - 1, 1e-9)) + n * mean**2


def ever(p: np.ndarray) -> np.ndarray:
    return np.nanmin(np.where(np.isnan(p), 1.0, p), axis=(0, 2)) < ALPHA


def most(worlds: int) -> float:
    """The share of null worlds that an error rate of ALPHA exceeds only once in a thousand tests."""
    return stats.binom.ppf(0.999, worlds, ALPHA) / worlds


@pytest.mark.parametrize("configs", [2, 6])
@pytest.mark.parametrize("nightly", [2, 40])
def test_a_null_world_is_rarely_rejected_on_any_of_sixty_nights(configs, nightly):
    rng = np.random.default_rng(configs * 100 + nightly)
    n = np.full((2000, configs), nightly)
    fixed, peeked = night_by_night(lambda: normal_sums(rng, n), n, paired=configs == 2)
    assert ever(peeked).mean() <= most(2000)
    assert ever(fixed).mean() > 2 * ALPHA  # peeking at the fixed test does mislead in these worlds


@pytest.mark.parametrize(("rate", "nightly"), [(0.05, [40, 40, 20]), (0.5, [95, 3, 2]), (0.95, [95, 3, 2])])
def test_bernoulli_outcomes_and_unequal_traffic_too(rate, nightly):
    # a few rows that all succeed have zero variance, which Welch's test takes as certainty
    rng = np.random.default_rng(7)
    n = np.broadcast_to(nightly, (2000, 3)).copy()

    def draw() -> tuple[np.ndarray, np.ndarray]:
        hits = rng.binomial(n, rate).astype(float)
        return hits, hits

    fixed, peeked = night_by_night(draw, n, paired=False)
    assert ever(peeked).mean() <= most(2000)
    assert ever(fixed).mean() > 2 * ALPHA


@pytest.mark.parametrize("effect", [0.05, 0.1, 0.3])
def test_a_planted_effect_is_found_with_a_few_times_the_rows(effect):
    # the fixed test at level .05 detects it with probability .8 at `enough` rows
    enough = ((stats.norm.isf(ALPHA) + stats.norm.isf(0.2)) / effect) ** 2
    rng = np.random.default_rng(1)
    n = np.full((1000, 2), max(3, round(6 * enough / NIGHTS)))
    _, peeked = night_by_night(lambda: normal_sums(rng, n, effect), n, paired=True)
    first = np.where(ever(peeked), (peeked[..., 1] < ALPHA).argmax(0) + 1, np.inf) * n[0, 0]
    assert 1.0 <= np.quantile(first, 0.8) / enough <= 4.0
    assert np.median(first) / enough <= 2.5


@pytest.mark.parametrize(("z", "size"), [(0.0, 50.0), (2.0, 10.0), (3.0, 250.0), (4.5, 3000.0), (-1.0, 100.0)])
def test_it_is_the_half_normal_mixture_of_likelihood_ratios(z, size):
    def mixed(drift: float) -> float:
        return (
            2 * stats.norm.pdf(drift, scale=np.sqrt(MIXTURE)) * np.exp(drift * z * np.sqrt(size) - drift**2 * size / 2)
        )

    top = 12 * np.sqrt(MIXTURE)
    ratio, _ = integrate.quad(mixed, 0, top, points=[max(z, 0.0) / np.sqrt(size)], limit=500)
    assert sequential_p(np.array(z), np.array(size)) == pytest.approx(min(1.0, 1 / ratio), rel=1e-6)


def test_the_boundary_is_tightest_at_its_tuned_rows():
    # the z that gives p = ALPHA at TUNED_ROWS rows, for mixtures around the chosen one
    def threshold(scale: float) -> float:
        return optimize.brentq(lambda z: sequential_p(np.array(z), np.array(scale * TUNED_ROWS)) - ALPHA, 1.7, 9.0)

    scales = np.array([0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 2.0])
    assert abs(np.argmin([threshold(scale) for scale in scales]) - 3) <= 1


def test_extremes_and_unknowns():
    p = sequential_p(np.array([1e9, -1e9, np.nan, 35.0]), np.array([100.0, 100.0, 100.0, 1e7]))
    assert p[0] == 0.0 and p[1] == 1.0 and np.isnan(p[2]) and 0 < p[3] < 1e-250
    evidence = worlds(np.full((1, 2), 50), np.full((1, 2), 25.0), np.full((1, 2), 25.0), paired=False)
    assert np.isnan(sequential(compare(evidence, QUALITY, 0, 3), half_life=7.0)).all()
