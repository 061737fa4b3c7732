"""What every attack returns."""

import dataclasses

from torch import Tensor

__all__ = ["AttackResult"]


@dataclasses.dataclass(frozen=True, slots=True)
class AttackResult:
    """Outcome of an attack on a batch of n samples.

    Args:
        inputs: adversarial inputs, same shape, dtype and device as the clean ones; feasible
            (in the ball and in [0, 1]) and detached.
        robust: bool ``[n]``; True where the model still predicts the label on every point that
            the attack evaluated.
        loss: float ``[n]``; best (largest) value of the attacked loss found per sample.
        num_forwards: forward passes per sample.
        num_backwards: backward passes to the input per sample.
    """

    inputs: Tensor
    robust: Tensor
    loss: Tensor
    num_forwards: int
    num_backwards: int
