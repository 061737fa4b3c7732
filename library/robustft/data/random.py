"""Randomness that depends on what it is for, not on the order in which it is drawn.

Seeds are derived by hashing (seed, purpose, ...); per-example numbers are a counter-based hash of
(seed, instance id, position). A batch cut differently, or spread over more workers, therefore
sees the same crops and the same noise.
"""

import hashlib
import math

import torch
from torch import Tensor

__all__ = ["INCREMENT", "derive_seed", "hash_bits", "mix", "shift_right", "uniform"]

# SplitMix64 (Steele, Lea and Flood, 2014): the golden-ratio increment and the two multipliers of
# its finaliser, written as signed 64-bit integers because torch has no unsigned arithmetic.
INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)


def derive_seed(seed: int, *purpose: int | str) -> int:
    """Return a seed in [0, 2**63) for one purpose; other purposes give unrelated seeds.

    Args:
        seed: the run's seed.
        purpose: words and numbers that say what the seed is for: ("order", epoch).
    """
    text = repr((int(seed), *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def hash_bits(seed: int, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return 64 well-mixed bits for each of ``prod(shape)`` positions of each id.

    Args:
        seed: in [0, 2**63), from ``derive_seed``.
        ids: int64 ``[n]`` instance ids; the numbers are made on their device.
        shape: shape of one example's numbers.

    Returns:
        int64 ``[n, *shape]``.
    """
    positions = torch.arange(1, math.prod(shape) + 1, device=ids.device)
    streams = mix(mix(ids + INCREMENT) ^ seed)
    counters = streams[:, None] + positions * INCREMENT
    return mix(counters).reshape(len(ids), *shape)


def uniform(
    seed: int, ids: Tensor, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return numbers uniform in [0, 1), ``[n, *shape]``; arguments as in ``hash_bits``."""
    digits = 53 if dtype == torch.float64 else 24
    bits = shift_right(hash_bits(seed, ids, shape), 64 - digits)
    return bits.to(dtype) * 2.0**-digits


def shift_right(values: Tensor, places: int) -> Tensor:
    """Shift as if unsigned: torch's ``>>`` repeats the sign bit."""
    return (values >> places) & ((1 << (64 - places)) - 1)


def mix(values: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser to int64 values; products wrap, as they must."""
    values = (values ^ shift_right(values, 30)) * _MULTIPLIER_1
    values = (values ^ shift_right(values, 27)) * _MULTIPLIER_2
    return values ^ shift_right(values, 31)
