"""Normalisation as the first layer, so that every model takes pixels in [0, 1]."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustft.errors import ConfigError

__all__ = ["Normalized", "bare", "unwrapped"]


class Normalized(nn.Module):
    """``network((inputs - mean) / std)``: the form in which robustft holds every image model.

    ``mean`` and ``std`` are persistent buffers, so each checkpoint carries its own normalisation
    and attacks work in [0, 1] pixel units whatever the network was trained with.

    Args:
        network: takes normalised inputs ``[n, channels, height, width]``, returns logits.
        mean, std: one number per channel, in [0, 1] pixel units; ``std`` > 0.

    Raises:
        ConfigError: ``mean`` and ``std`` differ in length or a ``std`` is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean:
            raise ConfigError(
                f"mean and std need one number per channel each, got {list(mean)} and {list(std)}"
            )
        if not all(value > 0 for value in std):
            raise ConfigError(f"every std must be above 0, got {list(std)}")
        self.network = network
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def normalize(self, inputs: Tensor) -> Tensor:
        """Return ``(inputs - mean) / std``."""
        return (inputs - self.mean) / self.std

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits ``[n, classes]`` of inputs in [0, 1]."""
        logits: Tensor = self.network(self.normalize(inputs))
        return logits


def unwrapped(model: nn.Module) -> nn.Module:
    """Return ``model`` without the wrappers of DDP (``.module``) and ``torch.compile``."""
    while True:
        compiled = getattr(model, "_orig_mod", None)
        if isinstance(compiled, nn.Module):
            model = compiled
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def bare(model: nn.Module) -> nn.Module:
    """Return the network inside the wrappers and the normalisation: layer names start there.

    A model that is not :class:`Normalized` is returned as it is, without its wrappers.
    """
    model = unwrapped(model)
    return unwrapped(model.network) if isinstance(model, Normalized) else model
