"""The Poisson bootstrap compared with scipy's, and its checks of bad input."""

import numpy as np
import pytest
from scipy import stats

from rb_gpu.learn.bootstrap import COUNTS, QUERIES_AT_ONCE, resampled_means


def test_counts_are_those_of_poisson() -> None:
    share = np.bincount(COUNTS) / len(COUNTS)
    np.testing.assert_allclose(share, stats.poisson.pmf(np.arange(len(share)), 1.0), atol=2 / len(COUNTS))
    assert COUNTS.mean() == 1.0


@pytest.mark.parametrize("queries", [30, 400, 3 * QUERIES_AT_ONCE + 7])
def test_interval_of_a_ratio_is_that_of_scipy(queries: int) -> None:
    rng = np.random.default_rng(queries)
    weight_Q = rng.integers(1, 5, size=queries).astype(float)
    total_Q = weight_Q * rng.gamma(2.0, size=queries)
    ours = np.quantile(resampled_means(total_Q[:, None], weight_Q[:, None], 20_000, 0), (0.025, 0.5, 0.975))
    theirs = stats.bootstrap(
        (total_Q, weight_Q), lambda total, weight, axis: total.sum(axis) / weight.sum(axis),
        paired=True, n_resamples=20_000, method="percentile", random_state=1, batch=500,
    )  # fmt: skip
    low, high = theirs.confidence_interval
    # the two distributions differ by terms of order 1/Q, the draws by the noise of a quantile
    assert np.abs(ours[[0, 2]] - (low, high)).max() < (high - low) * (0.02 + 1.0 / queries)
    assert abs(ours[1] - total_Q.sum() / weight_Q.sum()) < (high - low) * (0.02 + 1.0 / queries)


def test_columns_share_their_queries() -> None:
    rng = np.random.default_rng(3)
    total_Q = rng.normal(size=500)
    drawn = resampled_means(np.stack([total_Q, total_Q + 1.0], axis=1), np.ones((500, 2)), 300, 0)
    np.testing.assert_allclose(drawn[:, 1] - drawn[:, 0], 1.0, atol=1e-12)


def test_a_resample_without_weight_is_unknown_and_the_others_are_not() -> None:
    weight_QM = np.zeros((4, 1))
    weight_QM[0] = 1.0
    drawn = resampled_means(weight_QM * 2.0, weight_QM, 1000, 0)
    missing = np.isnan(drawn).mean()
    assert abs(missing - np.exp(-1.0)) < 0.06
    np.testing.assert_array_equal(drawn[~np.isnan(drawn)], 2.0)


def test_interval_covers() -> None:
    """95 % intervals of the mean of 200 skewed values contain the truth about as often as they claim."""
    rng = np.random.default_rng(7)
    samples = 600
    values_QM = rng.exponential(size=(200, samples))
    low, high = np.quantile(resampled_means(values_QM, np.ones_like(values_QM), 1000, 0), (0.025, 0.975), axis=0)
    covered = int(((low <= 1.0) & (high >= 1.0)).sum())
    # the percentile interval of a skewed mean covers slightly less than 95 %: 0.925 to 0.95
    assert stats.binom.ppf(1e-4, samples, 0.925) <= covered <= stats.binom.ppf(1 - 1e-4, samples, 0.96)
