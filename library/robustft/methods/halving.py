"""AutoLoRa's automatic learning rate: halve it and go back to the best weights.

Xu, Zhang, Kankanhalli, "AutoLoRa: A Parameter-Free Automated Robust Fine-Tuning Framework", 2024,
arXiv 2310.01818, after the step-size rule of Auto-PGD (Croce and Hein, 2020, arXiv 2003.01690).
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal

from robustft.errors import ConfigError
from robustft.training.checks import require_choice, require_range

__all__ = ["Decision", "HalvingConfig", "HalvingController"]

ControlSplit = Literal["val", "train"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HalvingConfig:
    """When the learning rate is halved; the defaults are published for 224 px and 60 epochs."""

    checkpoints: tuple[int, ...] = tuple(range(0, 60, 4))
    """Ascending epochs; at the end of the epoch after each (but the first, 0) the rate is
    checked. Published for 32 px: 0, 16, 24, 28, 36, 40, 42, 44, 46, 48, 50 of 50 epochs."""
    rho: float = 0.75
    """Share of the epochs between two checks in which the accuracy must have risen, 0 to 1."""
    factor: float = 2.0
    """What the rate is divided by, > 1."""
    min_lr: float = 1e-5
    """Training ends when the rate falls below this, >= 0."""
    split: ControlSplit = "val"
    """Robust accuracy on this split decides. Published for 32 px: "train", the whole of it, which
    costs an attack on every training image and cannot see overfitting."""
    reset_momentum: bool = False
    """Whether the optimiser forgets its state when the best weights come back; published: no."""

    def __post_init__(self) -> None:
        require_range(self, 0, 1, "rho")
        require_range(self, 1, math.inf, "factor", open_low=True)
        require_range(self, 0, math.inf, "min_lr")
        require_choice(self, "split", ControlSplit)
        _with_zero(self.checkpoints)

    def controller(self, lr: float) -> "HalvingController":
        """Return a controller that starts at the rate ``lr``."""
        return HalvingController(
            lr, self.checkpoints, rho=self.rho, factor=self.factor, min_lr=self.min_lr
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """What follows from an epoch's accuracy.

    Args:
        improved: it is the highest so far: store the weights.
        condition: why the rate was divided and the best weights must come back. 1: the accuracy
            rose in too few epochs since the last check; 2: it rose, but to no new best; 0: the rate
            stays.
    """

    improved: bool
    condition: Literal[0, 1, 2]

    @property
    def halved(self) -> bool:
        return self.condition != 0


class HalvingController:
    """Learning rate from the history of validation accuracies.

    With W the checkpoints and acc(e) the accuracy after epoch e = 1, 2, ..., the k-th check is at
    the end of epoch W[k] + 1, for k >= 1. The rate is divided by ``factor`` if

    1. acc rose in fewer than ``rho * (W[k] - W[k-1])`` of the epochs W[k-1] + 2 to W[k] + 1; or
    2. it rose often enough, but k >= 2 and the best accuracy is that of the last check.

    Everything follows from the accuracies: replaying them restores the controller, and ranks that
    see the same accuracies decide the same.

    Args:
        start_lr: rate of the first epochs, > 0.
        checkpoints: W, ascending whole numbers from 0 (which may be left out).
        rho, factor, min_lr: see ``HalvingConfig``.

    Raises:
        ConfigError: a value is out of range.

    Note:
        The published code has Auto-PGD's further guard "unless the rate was just halved", but
        compares so that it never acts; it is left out. It compares in float32, we in float64.

    Example:
        >>> controller = HalvingController(0.01, (0, 2, 4))
        >>> for accuracy in (0.5, 0.4, 0.3):
        ...     decision = controller.update(accuracy)
        >>> controller.lr, decision.condition
        (0.005, 1)
    """

    def __init__(
        self,
        start_lr: float,
        checkpoints: Sequence[int],
        rho: float = 0.75,
        factor: float = 2.0,
        min_lr: float = 1e-5,
    ) -> None:
        if not (math.isfinite(start_lr) and start_lr > 0):
            raise ConfigError(f"start_lr = {start_lr!r}: must be a number > 0")
        settings = HalvingConfig(
            checkpoints=tuple(checkpoints), rho=rho, factor=factor, min_lr=min_lr
        )
        self.lr = start_lr
        self._checkpoints = _with_zero(settings.checkpoints)
        self._settings = settings
        self._history: list[float] = []

    @property
    def finished(self) -> bool:
        """True once the rate is below ``min_lr``."""
        return self.lr < self._settings.min_lr

    def update(self, val_accuracy: float) -> Decision:
        """Take the accuracy of the epoch that has ended; ``lr`` is then that of the next one."""
        improved = val_accuracy > max(self._history, default=-math.inf)
        self._history.append(val_accuracy)
        condition = self._condition()
        if condition:
            self.lr /= self._settings.factor
        return Decision(improved, condition)

    def _condition(self) -> Literal[0, 1, 2]:
        now = len(self._history) - 1
        if now == 0 or now not in self._checkpoints:
            return 0
        check = self._checkpoints.index(now)
        last = self._checkpoints[check - 1]
        accuracies = self._history
        rises = sum(accuracies[j] > accuracies[j - 1] for j in range(last + 1, now + 1))
        if rises < self._settings.rho * (now - last):
            return 1
        if check >= 2 and max(accuracies) == max(accuracies[: last + 1]):
            return 2
        return 0


def _with_zero(checkpoints: tuple[int, ...]) -> tuple[int, ...]:
    """Return the checkpoints with the leading 0 that may be left out."""
    whole = all(isinstance(epoch, int) and not isinstance(epoch, bool) for epoch in checkpoints)
    full = checkpoints if checkpoints[:1] == (0,) else (0, *checkpoints)
    if not whole or not all(a < b for a, b in itertools.pairwise(full)):
        raise ConfigError(
            f"checkpoints = {checkpoints!r}: must be ascending whole epochs, e.g. (0, 4, 8)"
        )
    return full
