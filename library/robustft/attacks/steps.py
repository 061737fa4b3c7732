"""Pieces of a step that several attacks share: directions of ascent and starting points."""

import torch
from torch import Tensor

from robustft.attacks.noise import normal, uniform
from robustft.attacks.problem import Problem
from robustft.attacks.projections import l2_norm, project
from robustft.threat import Norm

__all__ = ["ascent_direction", "boundary_start", "normalized", "uniform_start"]

NORM_OFFSET = 1e-12  # of the official AutoAttack code: a zero gradient gives a zero step


def normalized(values: Tensor) -> Tensor:
    """Divide each sample by its L2 norm."""
    return values / (l2_norm(values) + NORM_OFFSET)


def ascent_direction(gradient: Tensor, norm: Norm) -> Tensor:
    """Return the unit direction that raises the loss fastest: the sign (Linf) or g / ||g|| (L2)."""
    return gradient.sign() if norm == "Linf" else normalized(gradient)


def uniform_start(problem: Problem, *, restart: int) -> Tensor:
    """Return points drawn uniformly from the ball, clipped to the box."""
    inputs, threat = problem.inputs, problem.threat
    shape, keys = inputs.shape[1:], problem.keys(restart)
    if threat.norm == "Linf":
        delta = _symmetric(uniform(keys, shape, dtype=inputs.dtype)) * threat.eps
    else:
        # The radius of a uniform point in d dimensions is distributed as U^(1/d).
        radius_keys = problem.keys(restart, purpose="radius")
        radii = uniform(radius_keys, torch.Size([1]), dtype=inputs.dtype) ** (1 / shape.numel())
        delta = normalized(normal(keys, shape, dtype=inputs.dtype)) * threat.eps
        delta = delta * radii.view(-1, *[1] * len(shape))
    return (inputs + delta).clamp(0, 1)


def boundary_start(problem: Problem, *, restart: int) -> Tensor:
    """Return random points that touch the ball's boundary, clipped to the box (APGD's start).

    Linf: uniform noise over its own largest entry; L2: a Gaussian direction; L1: Gaussian noise
    projected on ball and box.
    """
    inputs, threat = problem.inputs, problem.threat
    shape, keys = inputs.shape[1:], problem.keys(restart)
    if threat.norm == "Linf":
        noise = _symmetric(uniform(keys, shape, dtype=inputs.dtype))
        largest = noise.abs().flatten(1).amax(dim=1)
        noise = noise / largest.view(-1, *[1] * len(shape))
    elif threat.norm == "L1":
        noise = normal(keys, shape, dtype=inputs.dtype)
        return (inputs + project(noise, inputs, norm="L1", eps=threat.eps)).clamp(0, 1)
    else:
        noise = normalized(normal(keys, shape, dtype=inputs.dtype))
    return (inputs + threat.eps * noise).clamp(0, 1)


def _symmetric(values: Tensor) -> Tensor:
    return 2 * values - 1
