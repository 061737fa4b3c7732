"""Randomness of attacks: one value per (seed, attack, restart, sample, element).

Each value is a hash of its coordinates (SplitMix64, see ``robustft.data.random``), so that a sample
meets the same noise in whatever batch, shard or order it is attacked, on whatever device, and no
global generator moves.
"""

import hashlib

import torch
from torch import Tensor

from robustft.data.random import INCREMENT, mix, shift_right

__all__ = ["normal", "run_seed", "sample_keys", "uniform"]

UNIFORM_BITS = 23  # with half a step added these are exact in float32, symmetric, never 0 or 1


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
    key = mix(seed + INCREMENT)
    key = mix(key ^ int.from_bytes(digest, "little", signed=True))
    key = mix(key ^ restart)
    return mix(key ^ sample_ids)


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
    elements = torch.arange(1, shape.numel() + 1, device=keys.device) * INCREMENT
    return mix(keys.unsqueeze(1) + elements).view(-1, *shape)


def _fraction(bits: Tensor, *, shift: int) -> Tensor:
    steps = (shift_right(bits, shift) if shift else bits) & ((1 << UNIFORM_BITS) - 1)
    return (steps.float() + 0.5) * 2.0**-UNIFORM_BITS
