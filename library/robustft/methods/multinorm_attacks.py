"""The attacks of multi-norm training (robustft.methods.multinorm): APGD in one norm, and MSD."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from robustft.attacks import AttackResult, Model, apgd, attack_mode, project
from robustft.attacks.problem import Problem
from robustft.attacks.sparse import sparse_direction
from robustft.attacks.steps import ascent_direction
from robustft.threat import Norm, ThreatModel

__all__ = ["SparseStep", "multi_steepest_descent", "train_apgd"]

SparseStep = Literal["exact", "published"]

MSD_ORDER: tuple[Norm, ...] = ("L1", "L2", "Linf")
"""Where losses tie, the last is taken."""

TRAIN_SPARSITY = 0.05  # share of coordinates in the first L1 step, of E-AT's code
MSD_COORDINATES = (5, 20)  # fewest and most in a published L1 step


def train_apgd(
    model: Model, inputs: Tensor, labels: Tensor, *, threat: ThreatModel, num_steps: int
) -> AttackResult:
    """Attack from the clean image by APGD and return each image's point of highest loss.

    num_steps + 1 forwards and num_steps input backwards; deterministic. The point may be the clean
    image. ``robust`` is True where every iterate, the clean image included, is correct.
    """
    return apgd(
        model,
        inputs,
        labels,
        norm=threat.norm,
        eps=threat.eps,
        num_steps=num_steps,
        start=inputs,
        keep="best_loss",
        initial_sparsity=TRAIN_SPARSITY,
    )


def multi_steepest_descent(
    model: Model,
    inputs: Tensor,
    labels: Tensor,
    *,
    threats: Sequence[ThreatModel],
    num_steps: int,
    step_size: float,
    l1_step: SparseStep = "exact",
    noise: torch.Generator | None = None,
) -> AttackResult:
    """Climb in the union of several balls: at each step the norm that raises the loss most (MSD).

    Maini, Wong, Kolter, 2020, algorithm 2. From one gradient a step is made in every norm, and each
    image goes to the candidate with the highest loss: num_steps * (1 + norms) forwards and
    num_steps input backwards. The point of highest loss, which may be the clean image, is returned.

    Args:
        model: pixels in [0, 1] -> logits.
        inputs: ``[n, ...]`` in [0, 1].
        labels: int64 ``[n]``.
        threats: the balls.
        num_steps: >= 1.
        step_size: length of a step in units of each ball's eps.
        l1_step: see ``MultiNormConfig.msd_l1_step``.
        noise: draws the number of coordinates of each "published" L1 step.

    Note:
        A candidate is a step from the common point, projected on the ball of its own norm; so the
        point may leave one ball for another, as in the authors' code.
    """
    ordered = sorted(threats, key=lambda threat: MSD_ORDER.index(threat.norm))
    first, like = ordered[0], inputs
    with attack_mode(model):
        problem = Problem.build(
            "msd",
            model,
            inputs,
            labels,
            norm=first.norm,
            eps=first.eps,
            loss="ce",
            generator=None,
            sample_ids=None,
        )
        inputs = points = best = problem.inputs
        best_loss, robust, gradient = problem.differentiate(points)
        for step in range(num_steps):
            if step > 0:
                _, _, gradient = problem.differentiate(points)
            chosen, chosen_loss = points, torch.full_like(best_loss, -math.inf)
            for threat in ordered:
                candidate = _msd_step(
                    points, inputs, gradient, threat, step_size * threat.eps, l1_step, noise
                )
                loss, correct = problem.measure(candidate)
                robust = robust & correct
                better = loss >= chosen_loss
                chosen = candidate.where(_over(better, points), chosen)
                chosen_loss = loss.where(better, chosen_loss)
            points = chosen
            improved = chosen_loss > best_loss
            best = points.where(_over(improved, points), best)
            best_loss = chosen_loss.where(improved, best_loss)
    forwards = num_steps * (1 + len(ordered))
    return AttackResult(
        inputs=best.to(like.dtype),
        robust=robust,
        loss=best_loss,
        num_forwards=forwards,
        num_backwards=num_steps,
        total_forwards=forwards * len(labels),
        total_backwards=num_steps * len(labels),
    )


def _msd_step(
    points: Tensor,
    inputs: Tensor,
    gradient: Tensor,
    threat: ThreatModel,
    length: float,
    l1_step: SparseStep,
    noise: torch.Generator | None,
) -> Tensor:
    """Return ``points`` after a step of ``length`` in one norm, inside that norm's ball."""
    if threat.norm != "L1":
        ahead = points + length * ascent_direction(gradient, threat.norm)
    elif l1_step == "exact":
        share = gradient.new_full((len(gradient),), TRAIN_SPARSITY)
        ahead = points + length * sparse_direction(gradient, share)
    else:
        low, high = MSD_COORDINATES
        count = int(torch.randint(low, high + 1, (), generator=noise))
        each = length / count
        moved = points + each * gradient.sign()
        # Coordinates that would leave the box are left out before the largest are taken.
        free = gradient.where((moved >= 0) & (moved <= 1), 0).flatten(1)
        smallest = free.abs().topk(min(count, free.shape[1]), dim=1).values[:, -1:]
        taken = (free.abs() >= smallest) & (free != 0)
        delta = points + each * (free.sign() * taken).view_as(points) - inputs
        # In the middle of a box that is wide enough the projection is that on the ball alone.
        scale = 2 * (1 + length)
        middle = torch.full_like(delta, 0.5)
        inside = project(delta / scale, middle, norm="L1", eps=threat.eps / scale) * scale
        return (inputs + inside).clamp(0, 1)
    return inputs + project(ahead - inputs, inputs, norm=threat.norm, eps=threat.eps)


def _over(mask: Tensor, values: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (values.ndim - 1))
