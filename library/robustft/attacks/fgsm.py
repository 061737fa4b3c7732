"""FGSM: one step along the gradient, from the input or from a random point.

I. Goodfellow, J. Shlens, C. Szegedy, "Explaining and harnessing adversarial examples", 2014,
arXiv 1412.6572; with a random start (RS-FGSM): E. Wong, L. Rice, J. Z. Kolter, "Fast is better than
free: revisiting adversarial training", 2020, arXiv 2001.03994, algorithm 3.
"""

import torch
from torch import Tensor

from robustft.attacks.losses import LossFunction
from robustft.attacks.mode import Model, attack_mode
from robustft.attacks.problem import Problem, check_step_size
from robustft.attacks.projections import project
from robustft.attacks.result import AttackResult
from robustft.attacks.steps import ascent_direction, uniform_start
from robustft.threat import Norm

__all__ = ["fgsm"]

RANDOM_START_STEP = 1.25  # in units of eps; larger steps overfit catastrophically at eps 12/255


def fgsm(
    model: Model,
    inputs: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    eps: float | str,
    step_size: float | str | None = None,
    random_start: bool = False,
    loss: str | LossFunction = "ce",
    generator: torch.Generator | None = None,
    sample_ids: Tensor | None = None,
    report: bool = True,
) -> AttackResult:
    """Attack with one step: 1 forward, 1 input backward, and 1 forward to report.

    Args:
        model: pixels in [0, 1] -> logits; normalisation is its first layer.
        inputs: ``[n, ...]`` in [0, 1].
        labels: int64 ``[n]``.
        norm: "Linf" (step along the gradient's sign) or "L2" (along the normalised gradient).
        eps: radius in [0, 1] pixel units.
        step_size: same units; default eps, or 1.25 eps with a random start.
        random_start: start uniformly in the ball (RS-FGSM).
        loss: "ce", "dlr", "margin" or a function of (logits, labels).
        generator: gives the seed by one draw; None is seed 0.
        sample_ids: int64 ``[n]``, stable ids that the noise depends on; default the positions.
        report: evaluate the returned points. Without it, ``robust`` and ``loss`` are those of the
            point at which the gradient was taken, and the forward is saved (for training).

    Raises:
        ConfigError: an argument cannot be used.
    """
    with attack_mode(model):
        problem = Problem.build(
            "fgsm",
            model,
            inputs,
            labels,
            norm=norm,
            eps=eps,
            loss=loss,
            generator=generator,
            sample_ids=sample_ids,
            norms=("Linf", "L2"),
        )
        threat = problem.threat
        if step_size is None:
            step_size = threat.eps * (RANDOM_START_STEP if random_start else 1.0)
        points = uniform_start(problem, restart=0) if random_start else problem.inputs
        values, robust, gradient = problem.differentiate(points)
        step = check_step_size(step_size) * ascent_direction(gradient, threat.norm)
        delta = points - problem.inputs + step
        delta = project(delta, problem.inputs, norm=threat.norm, eps=threat.eps)
        points = problem.inputs + delta
        if report:
            values, robust = problem.measure(points)
    return AttackResult(
        inputs=points.to(problem.dtype),
        robust=robust,
        loss=values,
        num_forwards=1 + report,
        num_backwards=1,
        total_forwards=(1 + report) * len(points),
        total_backwards=len(points),
    )
