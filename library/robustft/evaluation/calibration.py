"""Calibration: does a model that says "90 % sure" err in one case of ten?"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["calibration_error", "calibration_interval"]


def calibration_error(
    confidence: NDArray[Any], correct: NDArray[np.bool_], *, num_bins: int = 15
) -> float:
    """Return the expected calibration error: how far confidence is from accuracy, in [0, 1].

    Examples are sorted into bins of equal width by their confidence; the error is the mean over
    examples of ``|accuracy - mean confidence|`` of their bin (C. Guo, G. Pleiss, Y. Sun and K. Q.
    Weinberger, "On calibration of modern neural networks", 2017, arXiv 1706.04599, equation 3).

    Args:
        confidence: ``[n]`` in [0, 1]: the largest softmax probability of each example.
        correct: bool ``[n]``.
        num_bins: >= 1; bin b of B holds confidences in (b / B, (b + 1) / B].

    Raises:
        ValueError: the arrays are empty or differ in length.
    """
    bins, gaps = _gaps(confidence, correct, num_bins)
    return _error(bins, gaps, num_bins)


def calibration_interval(
    confidence: NDArray[Any],
    correct: NDArray[np.bool_],
    *,
    num_bins: int = 15,
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the basic bootstrap interval of ``calibration_error`` over examples.

    Note:
        Resampling adds noise to every bin, and noise adds to a sum of absolute values: the
        percentiles of the resampled errors lie too high. The basic interval reflects them at the
        estimate (B. Efron and R. Tibshirani, 1993), which takes that bias off.
    """
    bins, gaps = _gaps(confidence, correct, num_bins)
    generator = np.random.default_rng(seed)
    n = len(gaps)
    drawn = (generator.integers(n, size=n) for _ in range(num_resamples))
    errors = np.array([_error(bins[rows], gaps[rows], num_bins) for rows in drawn])
    tail = (1 - level) / 2
    low, high = np.quantile(errors, (tail, 1 - tail))
    estimate = _error(bins, gaps, num_bins)
    return float(np.clip(2 * estimate - high, 0, 1)), float(np.clip(2 * estimate - low, 0, 1))


def _gaps(
    confidence: NDArray[Any], correct: NDArray[np.bool_], num_bins: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the bin of each example, and what it adds to its bin's sum of differences."""
    values = np.asarray(confidence, dtype=np.float64)
    if values.ndim != 1 or values.shape != np.shape(correct) or len(values) == 0:
        shapes = f"{values.shape} and {np.shape(correct)}"
        raise ValueError(f"confidence and correct must be equally long lists, got shapes {shapes}")
    bins = np.clip(np.ceil(values * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    return bins, np.asarray(correct, dtype=np.float64) - values


def _error(bins: NDArray[np.int64], gaps: NDArray[np.float64], num_bins: int) -> float:
    sums = np.bincount(bins, weights=gaps, minlength=num_bins)
    return float(np.abs(sums).sum()) / len(gaps)
