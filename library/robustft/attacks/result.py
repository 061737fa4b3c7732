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
        num_forwards: forward passes of a sample that no restart, target or attack breaks.
        num_backwards: the same for backward passes to the input.
        total_forwards: forward passes over single samples, summed over the batch: less than
            ``n * num_forwards`` where broken samples were attacked no further.
        total_backwards: the same for backward passes to the input.
    """

    inputs: Tensor
    robust: Tensor
    loss: Tensor
    num_forwards: int
    num_backwards: int
    total_forwards: int
    total_backwards: int
