"""PGD: projected gradient ascent with a fixed step.

A. Madry, A. Makelov, L. Schmidt, D. Tsipras, A. Vladu, "Towards deep learning models resistant to
adversarial attacks", 2017, arXiv 1706.06083.
"""

import functools

import torch
from torch import Tensor

from robustft.attacks.losses import LossFunction
from robustft.attacks.mode import Model, attack_mode
from robustft.attacks.problem import Problem, check_count, check_step_size
from robustft.attacks.projections import into_ball_l2
from robustft.attacks.restarts import over_restarts
from robustft.attacks.result import AttackResult
from robustft.attacks.steps import ascent_direction, uniform_start
from robustft.errors import ConfigError
from robustft.threat import Norm

__all__ = ["pgd"]

DEFAULT_REACH = 2.5  # in units of eps: what num_steps default steps add up to


def pgd(
    model: Model,
    inputs: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    eps: float | str,
    step_size: float | str | None = None,
    num_steps: int = 10,
    num_restarts: int = 1,
    random_start: bool = True,
    start: Tensor | None = None,
    loss: str | LossFunction = "ce",
    generator: torch.Generator | None = None,
    sample_ids: Tensor | None = None,
    report: bool = True,
) -> AttackResult:
    """Attack with ``num_steps`` steps: as many forwards and input backwards, + 1 F to report.

    Args:
        model: pixels in [0, 1] -> logits; normalisation is its first layer.
        inputs: ``[n, ...]`` in [0, 1].
        labels: int64 ``[n]``.
        norm: "Linf" or "L2".
        eps: radius in [0, 1] pixel units.
        step_size: same units; default 2.5 eps / num_steps, usual in evaluation. Training recipes
            name theirs, e.g. "2/255".
        num_steps: >= 1.
        num_restarts: >= 1; a restart sees only the samples that are still robust.
        random_start: start uniformly in the ball, otherwise at the input.
        start: starting points ``[n, ...]`` of the first restart, instead of either.
        loss: "ce", "dlr", "margin" or a function of (logits, labels); with one restart it may
            close over tensors of the batch.
        generator: gives the seed by one draw; None is seed 0.
        sample_ids: int64 ``[n]``, stable ids that the noise depends on; default the positions.
        report: evaluate the returned points. Without it, ``robust`` and ``loss`` are those of the
            last point at which a gradient was taken, and the forward is saved (for training).

    Returns:
        The *last* iterate of each run; with several restarts the one that was misclassified, or
        else the one with the highest loss. ``robust`` and ``loss`` belong to last iterates.

    Raises:
        ConfigError: an argument cannot be used, or makes restarts or the report meaningless.

    Note:
        Iterates on the way are evaluated for their gradients, but do not count as attacks, so
        that the numbers are those of the common implementations (robust accuracy "under PGD-10"
        is that of the last iterate there). APGD counts every iterate.
    """
    check_count("num_steps", num_steps)
    check_count("num_restarts", num_restarts)
    if num_restarts > 1 and not random_start:
        raise ConfigError(
            "num_restarts > 1 needs random_start=True: without it every restart is the same"
        )
    if num_restarts > 1 and not report:
        raise ConfigError("num_restarts > 1 needs report=True to know which samples are robust")
    with attack_mode(model):
        problem = Problem.build(
            "pgd",
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
        if step_size is None:
            step_size = DEFAULT_REACH * problem.threat.eps / num_steps
        run = functools.partial(
            _run,
            step_size=check_step_size(step_size),
            num_steps=num_steps,
            random_start=random_start,
            report=report,
        )
        return over_restarts(
            problem,
            run,
            num_restarts=num_restarts,
            start=start,
            passes=(num_steps + report, num_steps),
        )


def _run(
    problem: Problem,
    restart: int,
    start: Tensor | None,
    *,
    step_size: float,
    num_steps: int,
    random_start: bool,
    report: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs, threat = problem.inputs, problem.threat
    if start is not None:
        points = start
    elif random_start:
        points = uniform_start(problem, restart=restart)
    else:
        points = inputs
    for _ in range(num_steps):
        loss, robust, gradient = problem.differentiate(points)
        delta = points + step_size * ascent_direction(gradient, threat.norm) - inputs
        if threat.norm == "Linf":
            delta = delta.clamp(-threat.eps, threat.eps)
        else:
            delta = into_ball_l2(delta, threat.eps)
        # Ball, then box: clipping towards the centre's box only shortens delta.
        points = (inputs + delta).clamp(0, 1)
    if report:
        loss, robust = problem.measure(points)
    return points, robust, loss
