"""Intervals and paired tests: how far a measured accuracy can be trusted.

Over examples use :func:`wilson` (right or wrong) or :func:`mean_interval` (a mean per example);
over seeds :func:`mean_interval`; for two models on the same examples :func:`paired_bootstrap` and
:func:`mcnemar`, which are far sharper than comparing two separate intervals.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["McNemar", "mcnemar", "mean_interval", "paired_bootstrap", "t_quantile", "wilson"]

BISECTIONS = 200
"""Upper bound only: an interval of length pi / 2 cannot be halved in float64 that often."""
BOOTSTRAP_CELLS = 1 << 20
"""Counts drawn at a time: 8 MiB whatever the number of examples is."""


class McNemar(NamedTuple):
    """Examples on which two models disagree, and how surprising their imbalance is.

    Args:
        lost: right before, wrong after.
        gained: wrong before, right after.
        p_value: two-sided exact p, in (0, 1]; 1 where the models never disagree.
    """

    lost: int
    gained: int
    p_value: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion (Wilson, 1927), without continuity correction.

    It stays within [0, 1] and is sound for small ``n`` and for proportions near 0 and 1, where the
    normal approximation is not.

    Args:
        successes: 0 to ``n``.
        n: number of trials, >= 1.
        confidence: in (0, 1).

    Returns:
        ``(low, high)``.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> low, high = wilson(81, 100)
        >>> round(low, 4), round(high, 4)
        (0.7222, 0.8749)
    """
    _check_confidence(confidence)
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    centre = share + z * z / (2 * n)
    margin = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends the exact bounds are 0 and 1; rounding would miss them by an ulp.
    low = 0.0 if successes == 0 else (centre - margin) / scale
    high = 1.0 if successes == n else (centre + margin) / scale
    return low, high


def mean_interval(
    values: Sequence[float] | NDArray[Any], confidence: float = 0.95
) -> tuple[float, float]:
    """Return Student's t interval of the mean of ``values`` (seeds, or means per example).

    Args:
        values: independent measurements, at least one.
        confidence: in (0, 1).

    Returns:
        ``(low, high)``; ``(-inf, inf)`` for a single value, which says nothing about its spread.

    Raises:
        ValueError: no values, or ``confidence`` out of range.
    """
    _check_confidence(confidence)
    data = np.asarray(values, dtype=np.float64).ravel()
    n = len(data)
    if n == 0:
        raise ValueError("an interval of a mean needs at least one value")
    if n == 1:
        return -math.inf, math.inf
    mean = float(data.mean())
    error = float(data.std(ddof=1)) / math.sqrt(n)
    margin = t_quantile(confidence, n - 1) * error
    return mean - margin, mean + margin


def t_quantile(confidence: float, dof: int) -> float:
    """Return t with ``P(|T| <= t) = confidence`` for Student's t with ``dof`` degrees of freedom.

    For whole degrees of freedom the distribution is a finite sum of powers of ``cos(theta)``,
    ``theta = atan(t / sqrt(dof))`` (Abramowitz and Stegun, 1964, 26.7.3 and 26.7.4); it grows
    with theta, so bisection finds the quantile to rounding.

    Args:
        confidence: in (0, 1).
        dof: >= 1.
    """
    _check_confidence(confidence)
    if dof < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {dof}")
    odd = dof % 2 == 1
    k = np.arange(1, (dof - 1) // 2 if odd else dof // 2)
    ratios: NDArray[np.float64] = 2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k)
    # cos, 2/3 cos^3, 2*4/(3*5) cos^5, ... for odd dof; 1, 1/2 cos^2, 1*3/(2*4) cos^4, ... for even.
    factors = np.cumprod(np.append(1.0, ratios))
    if dof == 1:
        factors = np.zeros_like(factors)
    powers = 2 * np.arange(len(factors)) + (1 if odd else 0)

    def probability(theta: float) -> float:
        total = math.sin(theta) * float(np.sum(factors * math.cos(theta) ** powers))
        return 2 / math.pi * (theta + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if probability(middle) < confidence:
            low = middle
        else:
            high = middle
    return math.tan((low + high) / 2) * math.sqrt(dof)


def paired_bootstrap(
    before: Sequence[float] | NDArray[Any],
    after: Sequence[float] | NDArray[Any],
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of ``mean(after) - mean(before)`` over examples.

    Both models saw the same examples, so whole pairs are resampled (Efron and Tibshirani, 1993).

    Args:
        before: per-example outcomes ``[n]``: bool masks, or means in [0, 1].
        after: the other model's outcomes on the same examples, in the same order.
        confidence: in (0, 1).
        num_resamples: >= 1.
        seed: of the resampling.

    Returns:
        ``(low, high)`` in the unit of the outcomes.
    """
    _check_confidence(confidence)
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
    old, new = _pair(before, after)
    # Drawing n differences with replacement is drawing how often each distinct one occurs; masks
    # have three distinct ones, so this costs nothing even for 10,000 examples.
    values, counts = np.unique(new - old, return_counts=True)
    n = len(old)
    generator = np.random.default_rng(seed)
    chunk = max(1, BOOTSTRAP_CELLS // len(values))
    means = np.concatenate(
        [
            generator.multinomial(n, counts / n, size=min(chunk, num_resamples - first)) @ values
            for first in range(0, num_resamples, chunk)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(means / n, (tail, 1 - tail))
    return float(low), float(high)


def mcnemar(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> McNemar:
    """Return McNemar's exact test (1947) that two models are right equally often.

    Under the null hypothesis each disagreement goes either way with probability 1/2.

    Args:
        before: bool ``[n]``, True where the first model was right.
        after: the same for the second model, on the same examples in the same order.
    """
    old, new = _pair(before, after)
    lost = int(np.sum((old == 1) & (new == 0)))
    gained = int(np.sum((old == 0) & (new == 1)))
    total = lost + gained
    # Integers keep the sum exact; floats would underflow from about 1,075 disagreements on.
    term = cumulated = 1
    for k in range(1, min(lost, gained) + 1):
        term = term * (total - k + 1) // k
        cumulated += term
    p_value = 1.0 if lost == gained else min(1.0, cumulated / (1 << total - 1))
    return McNemar(lost, gained, p_value)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")


def _pair(
    before: Sequence[float] | NDArray[Any], after: Sequence[float] | NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    old = np.asarray(before, dtype=np.float64)
    new = np.asarray(after, dtype=np.float64)
    if old.ndim != 1 or old.shape != new.shape or len(old) == 0:
        shapes = f"{old.shape} and {new.shape}"
        raise ValueError(f"paired outcomes must be two equally long lists, got shapes {shapes}")
    return old, new
