"""What the methods share: the attack they train with, and accuracies on the selection split."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from robustft.attacks import Model, pgd
from robustft.data.base import Split
from robustft.threat import ThreatModel
from robustft.training.checks import require_at_least, require_range
from robustft.training.context import RunContext
from robustft.training.loaders import rows
from robustft.training.seeding import generator

__all__ = [
    "AttackConfig",
    "craft",
    "eval_mode",
    "shard",
    "validate",
]

STEPS_TO_RADIUS = 4
"""Default step = eps / 4: the 2/255 at eps 8/255 of adversarial training (Madry et al., 2018)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttackConfig:
    """PGD as a method uses it; norm and radius come from the task's threat model."""

    num_steps: int = 10
    """Gradient steps, >= 1."""
    step_size: float | None = None
    """Length of a step in [0, 1] pixel units, > 0. None: eps / 4 (2/255 at eps 8/255)."""
    random_start: bool = True
    """Whether it starts at a random point of the ball."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_steps")
        if self.step_size is not None:
            require_range(self, 0, math.inf, "step_size", open_low=True)

    def step(self, threat: ThreatModel) -> float:
        """Return the step in [0, 1] pixel units against ``threat``."""
        return self.step_size if self.step_size is not None else threat.eps / STEPS_TO_RADIUS


def craft(
    model: Model,
    inputs: Tensor,
    labels: Tensor,
    *,
    ids: Tensor,
    threat: ThreatModel,
    attack: AttackConfig,
    start_noise: torch.Generator,
) -> Tensor:
    """Return the last iterate of PGD on the cross-entropy; a module is attacked in eval mode.

    One forward and one backward a step and nothing else: training does not pay for a report.
    """
    return pgd(
        model,
        inputs,
        labels,
        norm=threat.norm,
        eps=threat.eps,
        step_size=attack.step(threat),
        num_steps=attack.num_steps,
        random_start=attack.random_start,
        generator=start_noise,
        sample_ids=ids,
        report=False,
    ).inputs


def shard(split: Split, context: RunContext) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the positions of ``split`` that this rank looks at."""
    return np.arange(context.rank, len(split), context.world_size, dtype=np.int64)


def validate(
    model: nn.Module,
    context: RunContext,
    *,
    attack: AttackConfig | None,
    batch_size: int,
    seed: int,
) -> dict[str, float]:
    """Return accuracies on the selection split, as fractions: "val/clean" and "val/robust".

    The start noise depends on (seed, instance id) alone, so that epochs, ranks and models are
    compared under the same noise.

    Args:
        model: the bare model; left in the mode it was in.
        context: gives the split, the threat model and the other ranks.
        attack: PGD for "val/robust", or None to leave it out.
        batch_size: images at a time on each rank.
        seed: of the start noise.
    """
    split = context.task.splits["val"]
    positions = shard(split, context)
    correct = torch.zeros(2, dtype=torch.int64, device=context.device)
    with eval_mode(model):
        for begin in range(0, len(positions), batch_size):
            inputs, labels, ids = rows(
                split, positions[begin : begin + batch_size], device=context.device
            )
            points = [inputs]
            if attack is not None:
                points.append(
                    craft(
                        model,
                        inputs,
                        labels,
                        ids=ids,
                        threat=context.task.threat,
                        attack=attack,
                        start_noise=generator(seed, "validate"),
                    )
                )
            with torch.no_grad():
                for row, point in enumerate(points):
                    correct[row] += (model(point).argmax(1) == labels).sum()
    counts = context.sum(correct).tolist()
    accuracies = {"val/clean": counts[0] / len(split)}
    if attack is not None:
        accuracies["val/robust"] = counts[1] / len(split)
    return accuracies


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode and, at the end, each back into the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
