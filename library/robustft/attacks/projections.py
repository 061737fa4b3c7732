"""Projections of a perturbation on the threat set: a norm ball intersected with the pixel box.

The L1 projection is exact, as in F. Croce and M. Hein, "Mind the box: l1-APGD for sparse
adversarial attacks on image classifiers", 2021, arXiv 2103.01208: projecting on the L1 ball and
clipping afterwards would leave part of the budget unused.
"""

import math

import torch
from torch import Tensor

from robustft.threat import Norm, ThreatModel

__all__ = ["into_ball_l2", "l2_norm", "lp_norm", "project"]

EXTRA_HALVINGS = 12  # beyond the mantissa: 35 in float32, enough to land on the right segment


def project(delta: Tensor, inputs: Tensor, *, norm: Norm, eps: float | str) -> Tensor:
    """Return ``delta`` moved into the ball of radius ``eps`` and into the box around ``inputs``.

    Linf and L1 are the exact (Euclidean) projections on the intersection. L2 is the ball first
    and the box second, which stays in the ball because clipping to a box that contains the
    centre only shrinks coordinates.

    Args:
        delta: perturbations ``[n, ...]``, float32 or float64.
        inputs: clean inputs, same shape, in [0, 1].
        norm: "Linf", "L2" or "L1".
        eps: radius in [0, 1] pixel units; "8/255" is accepted.

    Returns:
        Perturbations with ``||delta|| <= eps`` (L2, L1: up to float rounding) and
        ``inputs + delta`` in [0, 1].

    Raises:
        ConfigError: norm or eps cannot be used.

    Example:
        >>> inputs = torch.tensor([[0.1, 0.1, 0.1, 0.1]])
        >>> project(torch.tensor([[1.0, 1.0, -1.0, -1.0]]), inputs, norm="L1", eps=1.0)
        tensor([[ 0.4000,  0.4000, -0.1000, -0.1000]])
    """
    threat = ThreatModel(norm, eps)  # type: ignore[arg-type]  # it converts "8/255" itself
    if threat.norm == "L1":
        return _project_l1(delta, inputs, threat.eps)
    if threat.norm == "L2":
        delta = into_ball_l2(delta, threat.eps)
    else:
        delta = delta.clamp(-threat.eps, threat.eps)
    # Clamping delta, not inputs + delta, makes the projection idempotent to the last bit.
    return torch.clamp(delta, -inputs, 1 - inputs)


def l2_norm(values: Tensor) -> Tensor:
    """Return the L2 norm of each sample, shaped ``[n, 1, ...]`` so that it broadcasts."""
    norms = values.flatten(1).square().sum(1).sqrt()
    return norms.view(-1, *[1] * (values.ndim - 1))


def lp_norm(values: Tensor, norm: Norm) -> Tensor:
    """Return the norm of each sample, shaped ``[n, 1, ...]`` so that it broadcasts."""
    if norm == "L2":
        return l2_norm(values)
    sizes = values.flatten(1).abs()
    norms = sizes.amax(1) if norm == "Linf" and sizes.shape[1] else sizes.sum(1)
    return norms.view(-1, *[1] * (values.ndim - 1))


def into_ball_l2(delta: Tensor, eps: float) -> Tensor:
    """Scale each sample down to L2 norm ``eps`` where it is longer."""
    norms = l2_norm(delta).clamp(min=torch.finfo(delta.dtype).tiny)
    return delta * (eps / norms).clamp(max=1)


def _project_l1(delta: Tensor, inputs: Tensor, eps: float) -> Tensor:
    """Solve ``sum_i min(max(|v_i| - lam, 0), room_i) = eps`` for ``lam`` in each sample.

    Bisection needs no sort and no host sync; one Newton step on the segment that it found makes
    the result exact, because the sum is piecewise linear in ``lam``.
    """
    if delta.numel() == 0:
        return delta.clone()
    moves = delta.abs().flatten(1)
    rooms = torch.where(delta > 0, 1 - inputs, inputs).flatten(1)
    low = torch.zeros_like(moves[:, :1])
    high = moves.amax(dim=1, keepdim=True)
    for _ in range(EXTRA_HALVINGS - round(math.log2(torch.finfo(delta.dtype).eps))):
        middle = (low + high) / 2
        too_long = _shrunk(moves, rooms, middle).sum(1, keepdim=True) > eps
        low, high = middle.where(too_long, low), high.where(too_long, middle)
    cut = _newton(moves, rooms, (low + high) / 2, eps)
    active = torch.minimum(moves, rooms).sum(1, keepdim=True) > eps
    moves = _shrunk(moves, rooms, cut.where(active, 0.0))
    return delta.sign() * moves.view_as(delta)


def _shrunk(moves: Tensor, rooms: Tensor, cut: Tensor) -> Tensor:
    return torch.minimum((moves - cut).clamp(min=0), rooms)


def _newton(moves: Tensor, rooms: Tensor, cut: Tensor, eps: float) -> Tensor:
    """Solve the linear equation of the segment that holds ``cut``; flat segments keep it."""
    rest = moves - cut
    full = rest >= rooms
    free = (rest > 0) & ~full
    count = free.sum(1, keepdim=True)
    total = torch.where(full & (rest > 0), rooms, 0).sum(1, keepdim=True)
    total = total + torch.where(free, moves, 0).sum(1, keepdim=True)
    return torch.where(count > 0, (total - eps) / count.clamp(min=1), cut).clamp(min=0)
