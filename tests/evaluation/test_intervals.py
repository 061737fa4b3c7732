"""Intervals against scipy, published values and the properties that make them trustworthy."""

import math

import numpy as np
import pytest
from scipy import stats

from robustft.evaluation.intervals import (
    mcnemar,
    mean_interval,
    paired_bootstrap,
    t_quantile,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (81, 100), (5363, 10_000)]
)
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_wilson_equals_scipy(successes: int, n: int, confidence: float) -> None:
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson(successes, n, confidence) == pytest.approx(tuple(expected), abs=1e-12)


def test_wilson_at_the_ends_is_exactly_zero_and_one() -> None:
    assert wilson(0, 17)[0] == 0.0
    assert wilson(17, 17)[1] == 1.0
    assert 0.0 < wilson(0, 17)[1] < 0.5


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, n)


@pytest.mark.parametrize("dof", [1, 2, 3, 4, 5, 9, 10, 99, 100, 1999, 9999])
@pytest.mark.parametrize("confidence", [0.01, 0.5, 0.95, 0.9999])
def test_t_quantile_equals_scipy(dof: int, confidence: float) -> None:
    expected = stats.t.ppf((1 + confidence) / 2, dof)
    assert t_quantile(confidence, dof) == pytest.approx(expected, rel=1e-9)


def test_t_quantile_has_the_textbook_values() -> None:
    assert [round(t_quantile(0.95, dof), 3) for dof in (1, 2, 4)] == [12.706, 4.303, 2.776]


def test_mean_interval_equals_scipy() -> None:
    seeds = [83.31, 83.52, 83.44]
    expected = stats.t.interval(0.95, df=2, loc=np.mean(seeds), scale=stats.sem(seeds))
    assert mean_interval(seeds) == pytest.approx(expected, rel=1e-10)


def test_mean_interval_of_one_seed_claims_nothing() -> None:
    assert mean_interval([0.83]) == (-math.inf, math.inf)


def test_mean_interval_of_equal_values_is_a_point() -> None:
    assert mean_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_confidence_is_checked(confidence: float) -> None:
    for call in (
        lambda: wilson(1, 2, confidence),
        lambda: mean_interval([1.0, 2.0], confidence),
        lambda: paired_bootstrap([0, 1], [1, 1], confidence=confidence),
    ):
        with pytest.raises(ValueError, match="confidence"):
            call()


def test_mean_interval_needs_values() -> None:
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def outcomes(n: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    before = generator.random(n) < 0.54
    flipped = generator.random(n) < 0.05
    return before, before ^ flipped


def test_paired_bootstrap_of_masks_equals_scipy_within_its_own_noise() -> None:
    before, after = outcomes()
    difference = after.astype(float) - before.astype(float)
    expected = stats.bootstrap(
        (difference,), np.mean, n_resamples=10_000, method="percentile", rng=1, batch=500
    ).confidence_interval
    assert paired_bootstrap(before, after) == pytest.approx(tuple(expected), abs=6e-4)


def test_paired_bootstrap_agrees_with_the_normal_limit_for_means() -> None:
    generator = np.random.default_rng(3)
    before = generator.random(4000)
    after = before + generator.normal(0.02, 0.1, 4000)
    difference = after - before
    error = difference.std(ddof=1) / math.sqrt(4000)
    expected = (difference.mean() - 1.96 * error, difference.mean() + 1.96 * error)
    low_high = paired_bootstrap(before, after, num_resamples=2000)
    assert low_high == pytest.approx(expected, abs=0.15 * error)


def test_pairing_is_what_makes_it_sharp() -> None:
    before, after = outcomes()
    low, high = paired_bootstrap(before, after)
    shuffled = np.random.default_rng(1).permutation(after)
    wide_low, wide_high = paired_bootstrap(before, shuffled)
    assert high - low < 0.5 * (wide_high - wide_low)


def test_paired_bootstrap_is_seeded_and_exact_for_identical_models() -> None:
    before, after = outcomes()
    assert paired_bootstrap(before, after, seed=4) == paired_bootstrap(before, after, seed=4)
    assert paired_bootstrap(before, after, seed=4) != paired_bootstrap(before, after, seed=5)
    assert paired_bootstrap(before, before) == (0.0, 0.0)


def masks(lost: int, gained: int) -> tuple[np.ndarray, np.ndarray]:
    before = np.array([True] * lost + [False] * gained + [True, False])
    after = np.array([False] * lost + [True] * gained + [True, False])
    return before, after


@pytest.mark.parametrize(
    ("lost", "gained"), [(0, 1), (3, 9), (9, 3), (12, 12), (150, 101), (2600, 2400)]
)
def test_mcnemar_equals_the_binomial_test(lost: int, gained: int) -> None:
    result = mcnemar(*masks(lost, gained))
    assert (result.lost, result.gained) == (lost, gained)
    expected = stats.binomtest(lost, lost + gained).pvalue
    assert result.p_value == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_identical_models() -> None:
    before, _ = outcomes()
    assert mcnemar(before, before) == (0, 0, 1.0)


def test_paired_outcomes_must_match() -> None:
    with pytest.raises(ValueError, match="equally long"):
        mcnemar(np.ones(3, dtype=bool), np.ones(4, dtype=bool))
    with pytest.raises(ValueError, match="equally long"):
        paired_bootstrap([], [])
