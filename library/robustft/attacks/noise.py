"""Randomness of attacks: one value per (seed, attack, restart, sample, element).

Each value is a hash of its coordinates (SplitMix64: G. Steele, D. Lea and C. Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014), so that a sample meets the same noise in
whatever batch, shard or order it is attacked, on whatever device, and no global generator moves.
"""

import hashlib

import torch
from torch import Tensor

__all__ = ["normal", "run_seed", "sample_keys", "uniform"]

UNIFORM_BITS = 23  # with half a step added these are exact in float32, symmetric, never 0 or 1


def _signed(value: int) -> int:
    """Return the int64 with the same 64 bits."""
    return value - (1 << 64) if value >> 63 else value


GOLDEN = _signed(0x9E3779B97F4A7C15)  # the constants of SplitMix64
FIRST_FACTOR = _signed(0xBF58476D1CE4E5B9)
SECOND_FACTOR = _signed(0x94D049BB133111EB)


def run_seed(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Return the seed of one call, int64 ``[]`` on ``device``.

    None is seed 0: the same noise in every call. A generator is advanced by one draw, wherever
    the attack runs and however large the batch is.
    """
    if generator is None:
        return torch.zeros((), dtype=torch.int64, device=device)
    limit = torch.iinfo(torch.int64).max
    return torch.randint(limit, (), generator=generator, device=generator.device).to(device)


def sample_keys(seed: Tensor, *, stream: str, restart: int, sample_ids: Tensor) -> Tensor:
    """Return one key per sample, int64 ``[n]``, from which ``uniform`` and ``normal`` draw.

    Args:
        seed: int64 ``[]``.
        stream: name of the attack and of the purpose.
        restart: 0-based number of the restart.
        sample_ids: int64 ``[n]``, stable ids of the samples.
    """
    digest = hashlib.blake2b(stream.encode(), digest_size=8).digest()
    key = _mix(seed + GOLDEN)
    key = _mix(key ^ int.from_bytes(digest, "little", signed=True))
    key = _mix(key ^ restart)
    return _mix(key ^ sample_ids)


def uniform(keys: Tensor, shape: torch.Size, *, dtype: torch.dtype) -> Tensor:
    """Return uniform values in (0, 1), ``[n, *shape]``, on the keys' device."""
    return _fraction(_bits(keys, shape), shift=64 - UNIFORM_BITS).to(dtype)


def normal(keys: Tensor, shape: torch.Size, *, dtype: torch.dtype) -> Tensor:
    """Return standard normal values, ``[n, *shape]``, on the keys' device (Box and Muller)."""
    bits = _bits(keys, shape)
    radius = _fraction(bits, shift=64 - UNIFORM_BITS).log().mul(-2).sqrt()
    angle = _fraction(bits, shift=0) * (2 * torch.pi)
    return (radius * angle.cos()).to(dtype)


def _bits(keys: Tensor, shape: torch.Size) -> Tensor:
    elements = torch.arange(1, shape.numel() + 1, device=keys.device) * GOLDEN
    return _mix(keys.unsqueeze(1) + elements).view(-1, *shape)


def _fraction(bits: Tensor, *, shift: int) -> Tensor:
    steps = _shift(bits, shift) & ((1 << UNIFORM_BITS) - 1)
    return (steps.float() + 0.5) * 2.0**-UNIFORM_BITS


def _mix(values: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser; int64 products wrap, as they must."""
    values = (values ^ _shift(values, 30)) * FIRST_FACTOR
    values = (values ^ _shift(values, 27)) * SECOND_FACTOR
    return values ^ _shift(values, 31)


def _shift(values: Tensor, places: int) -> Tensor:
    """Shift right without the sign (int64 shifts copy it)."""
    if places == 0:
        return values
    return (values >> places) & ((1 << (64 - places)) - 1)
