"""Learning-rate schedules: pure functions from the fractional epoch to a factor on the rate."""

import bisect
import dataclasses
import itertools
import math
from typing import Literal

from robustft.errors import ConfigError
from robustft.training.checks import require_choice, require_range

__all__ = ["ScheduleConfig", "lr_factor", "schedule_epoch"]

ScheduleName = Literal[
    "constant",
    "multistep",
    "halfway",
    "cosine",
    "cyclic",
    "piecewise-ft",
    "piecewise",
    "piecewise-weights",
    "piecewise-imagenet",
    "superconverge",
    "static",
]

STEP_COUNTED = ("piecewise-ft", "piecewise", "piecewise-weights", "superconverge", "static")
"""Schedules that E-AT's authors read with the coming step counted as done."""

THIRDS = (1 / 3, 2 / 3)
PIECEWISE = (1 / 2, 3 / 4)  # shares of the run, of E-AT's code
SUPERCONVERGE_PEAK = 2 / 5  # share of the run, rounded down to a whole epoch
STATIC_DROP = 70  # epochs; of RAMP's training from scratch, which lasts 80
DROP = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """How the learning rate changes over the epochs.

    The names from "piecewise-ft" on are those of E-AT's code (Croce and Hein, 2022, arXiv
    2105.12508) and of RAMP, which continues it; they drop the rate to a tenth, then a hundredth.
    """

    name: ScheduleName = "constant"
    """"constant"; "multistep": times gamma at each milestone; "halfway": times gamma once, at epoch
    epochs // 2; "cosine": to 0 at the last epoch; "cyclic": linearly from 0 to the full rate at
    ``peak``, then linearly to 0; "piecewise-ft": drops at 1/3 and 2/3 of the run; "piecewise": at
    1/2 and 3/4; "piecewise-weights": after each of ``weights``; "piecewise-imagenet": at 1/3 and
    2/3 of every epoch (made for one); "superconverge": linearly from 0 to the full rate at epoch
    floor(2 epochs / 5), then linearly to 0; "static": a tenth after epoch 70."""
    milestones: tuple[float, ...] = ()
    """Epochs, >= 0 and ascending, of "multistep"."""
    gamma: float = 0.1
    """Factor of "multistep" and "halfway", 0 < gamma <= 1."""
    peak: float = 0.4
    """Share of the run at which "cyclic" is highest, between 0 and 1."""
    weights: tuple[float, ...] = ()
    """Lengths of the parts of "piecewise-weights", each > 0, in any unit: (2, 1, 1) is half of the
    run and two quarters."""

    def __post_init__(self) -> None:
        require_choice(self, "name", ScheduleName)
        require_range(self, 0, 1, "gamma", open_low=True)
        require_range(self, 0, 1, "peak", open_low=True, open_high=True)
        ascending = all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        if not ascending or any(not epoch >= 0 for epoch in self.milestones):
            raise ConfigError(
                f"milestones = {self.milestones!r}: must be ascending epochs, each >= 0"
            )
        if not all(math.isfinite(weight) and weight > 0 for weight in self.weights):
            raise ConfigError(f"weights = {self.weights!r}: each must be a number > 0")
        if (self.name == "piecewise-weights") != bool(self.weights):
            raise ConfigError(
                f"weights = {self.weights!r} with name = {self.name!r}: weights belong to "
                "'piecewise-weights' and it needs them, e.g. [2, 1, 1]"
            )


def lr_factor(config: ScheduleConfig, epoch: float, num_epochs: int) -> float:
    """Return the factor on the learning rate at a fractional epoch.

    Args:
        config: the schedule.
        epoch: a value of ``schedule_epoch``, in [0, num_epochs].
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
    if config.name == "piecewise-ft":
        return float(DROP ** bisect.bisect_right(THIRDS, progress))
    if config.name == "piecewise":
        return float(DROP ** bisect.bisect_right(PIECEWISE, progress))
    if config.name == "piecewise-imagenet":
        return float(DROP ** bisect.bisect_right(THIRDS, epoch % 1))
    if config.name == "piecewise-weights":
        total = sum(config.weights)
        ends = [end / total for end in itertools.accumulate(config.weights)]
        # Left of an end and on it still belong to the part before.
        return float(DROP ** bisect.bisect_left(ends[:-1], progress))
    if config.name == "superconverge":
        peak = math.floor(SUPERCONVERGE_PEAK * num_epochs)
        if epoch < peak:
            return epoch / peak
        return (num_epochs - epoch) / (num_epochs - peak)
    if config.name == "static":
        return DROP if epoch > STATIC_DROP else 1.0
    return 1.0


def schedule_epoch(config: ScheduleConfig, *, epoch: int, step: int, num_steps: int) -> float:
    """Return the fractional epoch at which the rate of a step is read.

    The epochs done when the step begins; for the schedules of E-AT's code those done when it ends,
    so that the last step of an epoch already has the next epoch's rate.

    Args:
        config: the schedule.
        epoch, step: 0-based numbers of the epoch and of the step in it.
        num_steps: steps per epoch.
    """
    return epoch + (step + (config.name in STEP_COUNTED)) / num_steps
