"""Seeds and generators, each for one purpose."""

import torch

from robustft.data.random import derive_seed

__all__ = ["derive_seed", "generator", "seed_epoch"]


def generator(seed: int, *purpose: int | str) -> torch.Generator:
    """Return a CPU generator for one purpose: ``generator(seed, "attack", epoch, step)``."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Seed torch's global generators at the start of an epoch.

    Only layers that draw by themselves (dropout, stochastic depth) read them. Seeding once an
    epoch makes a resumed run repeat what the undisturbed one drew, with no state to save.
    """
    torch.manual_seed(derive_seed(seed, "layers", epoch, rank))
