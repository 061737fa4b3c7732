"""Learning-rate schedules: pure functions from the fractional epoch to a factor on the rate."""

import dataclasses
import math
from typing import Literal

from robustft.errors import ConfigError
from robustft.training.checks import require_choice, require_range

__all__ = ["ScheduleConfig", "lr_factor"]

ScheduleName = Literal["constant", "multistep", "halfway", "cosine", "cyclic"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """How the learning rate changes over the epochs."""

    name: ScheduleName = "constant"
    """"constant"; "multistep": times gamma at each milestone; "halfway": times gamma once, at epoch
    epochs // 2; "cosine": to 0 at the last epoch; "cyclic": linearly from 0 to the full rate at
    ``peak``, then linearly to 0."""
    milestones: tuple[float, ...] = ()
    """Epochs, >= 0 and ascending, of "multistep"."""
    gamma: float = 0.1
    """Factor of "multistep" and "halfway", 0 < gamma <= 1."""
    peak: float = 0.4
    """Share of the run at which "cyclic" is highest, between 0 and 1."""

    def __post_init__(self) -> None:
        require_choice(self, "name", ScheduleName)
        require_range(self, 0, 1, "gamma", open_low=True)
        require_range(self, 0, 1, "peak", open_low=True, open_high=True)
        ascending = all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        if not ascending or any(not epoch >= 0 for epoch in self.milestones):
            raise ConfigError(
                f"milestones = {self.milestones!r}: must be ascending epochs, each >= 0"
            )


def lr_factor(config: ScheduleConfig, epoch: float, num_epochs: int) -> float:
    """Return the factor on the learning rate at a fractional epoch.

    Args:
        config: the schedule.
        epoch: epochs done so far, in [0, num_epochs): epoch index + step / steps per epoch.
        num_epochs: length of the whole run.
    """
    progress = epoch / num_epochs
    if config.name == "multistep":
        return float(config.gamma ** sum(epoch >= milestone for milestone in config.milestones))
    if config.name == "halfway":
        return config.gamma if epoch >= num_epochs // 2 else 1.0
    if config.name == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if config.name == "cyclic":
        rising = progress / config.peak
        return min(rising, (1.0 - progress) / (1.0 - config.peak))
    return 1.0
