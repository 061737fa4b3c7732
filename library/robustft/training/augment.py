"""Random crops and flips as one gather over a batch, decided per example and epoch."""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from robustft.data.random import derive_seed, uniform
from robustft.errors import ConfigError
from robustft.training.checks import require_at_least, require_choice, require_range

__all__ = ["AugmentConfig", "augment"]

PaddingMode = Literal["reflect", "zero"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """What is done to the clean training images."""

    crop_padding: int = 4
    """Pixels added on each side before a random crop to the old size; >= 0; 0 = no crop."""
    padding_mode: PaddingMode = "reflect"
    """"reflect" or "zero"."""
    flip: float = 0.5
    """Probability of a horizontal flip, 0 to 1."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "crop_padding")
        require_choice(self, "padding_mode", PaddingMode)
        require_range(self, 0, 1, "flip")


def augment(inputs: Tensor, ids: Tensor, *, config: AugmentConfig, seed: int, epoch: int) -> Tensor:
    """Return randomly cropped and flipped copies of ``inputs``.

    What happens to an example depends on (seed, epoch, its id) alone: not on its batch, its rank
    or the number of ranks.

    Args:
        inputs: float ``[n, channels, height, width]``; not changed.
        ids: int64 ``[n]`` instance ids on the same device.
        config: see ``AugmentConfig``.
        seed: the run's seed.
        epoch: 0-based.

    Raises:
        ConfigError: reflect padding as wide as the image.
    """
    padding = config.crop_padding
    count, channels, height, width = inputs.shape
    if config.padding_mode == "reflect" and padding >= min(height, width):
        raise ConfigError(
            f"crop_padding = {padding}: reflect padding must be below the image size "
            f"{min(height, width)}"
        )
    draws = uniform(derive_seed(seed, "augment", epoch), ids, (3,), dtype=torch.float64)
    shifts = (draws[:, :2] * (2 * padding + 1)).long() - padding
    rows = shifts[:, :1] + torch.arange(height, device=inputs.device)
    columns = torch.arange(width, device=inputs.device).expand(count, width)
    columns = torch.where(draws[:, 2:] < config.flip, width - 1 - columns, columns)
    columns = columns + shifts[:, 1:2]

    if config.padding_mode == "reflect":
        rows, columns = _reflect(rows, height), _reflect(columns, width)
    inside_rows = (rows >= 0) & (rows < height)
    inside_columns = (columns >= 0) & (columns < width)
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    source = (rows[:, :, None] * width + columns[:, None, :]).reshape(count, 1, height * width)
    gathered = inputs.flatten(2).gather(2, source.expand(count, channels, height * width))
    outputs = gathered.reshape(inputs.shape)
    if config.padding_mode == "zero":
        outputs = outputs * (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]
    return outputs


def _reflect(index: Tensor, size: int) -> Tensor:
    """Mirror positions outside [0, size) without repeating the edge."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)
