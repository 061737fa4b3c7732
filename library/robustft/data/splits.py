"""Stratified, seeded choices of rows that depend on instance ids alone.

Rows are put into a random order per class by a hash of (seed, purpose, instance id); a choice takes
the first ones of each class. So a choice does not depend on the order of the rows, and a smaller
one is part of a larger one of the same purpose, up to the rounding of shares.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from robustft.data.random import derive_seed, hash_bits
from robustft.errors import ConfigError

__all__ = ["choose", "class_shares"]

Positions = NDArray[np.int64]


def choose(
    labels: NDArray[np.int64], ids: NDArray[np.int64], size: int, *, seed: int, purpose: str
) -> tuple[Positions, Positions]:
    """Choose ``size`` rows with the class shares of the whole.

    Args:
        labels: int64 ``[n]``.
        ids: int64 ``[n]`` instance ids.
        size: 0 to n.
        seed: any integer.
        purpose: other purposes give unrelated choices.

    Returns:
        Positions chosen and positions left, both ascending.

    Raises:
        ConfigError: there are fewer than ``size`` rows.
    """
    if not 0 <= size <= len(labels):
        raise ConfigError(f"cannot choose {size} of {len(labels)} examples")
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    keys = hash_bits(derive_seed(seed, "split", purpose), torch.from_numpy(ids), (1,))
    # By class, then by hash; the id decides the (next to impossible) tie.
    order = np.lexsort((ids, keys[:, 0].numpy(), inverse))
    first = np.concatenate(([0], np.cumsum(counts)[:-1]))
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - np.repeat(first, counts)
    chosen = rank < class_shares(counts, size)[inverse]
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def class_shares(counts: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Divide ``size`` among classes in proportion to ``counts``, by largest remainder.

    Example:
        >>> class_shares(np.array([600, 300, 100]), 11)
        array([7, 3, 1])
    """
    total = int(counts.sum())
    if total == 0:
        return np.zeros_like(counts)
    # In whole numbers, so that no rounding of floats decides; ties go to the earlier class.
    shares, remainders = np.divmod(counts * size, total)
    extra = np.argsort(-remainders, kind="stable")[: size - int(shares.sum())]
    shares[extra] += 1
    result: NDArray[np.int64] = shares
    return result
