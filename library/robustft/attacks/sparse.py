"""The L1 steps of APGD: few coordinates at a time, and the exact projection on ball and box.

F. Croce and M. Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers",
2021, arXiv 2103.01208, algorithm 1. Where the paper and the official code differ, this is the code.
"""

from typing import Protocol

import torch
from torch import Tensor

from robustft.attacks.problem import Problem
from robustft.attacks.projections import project

__all__ = ["SparseRule", "inside", "sparse_direction"]

CHECK_INTERVAL = 0.04  # fraction of num_steps, of the official code
SPARSER = 0.95  # below this share of changed coordinates a sample starts again at its best point
SPARSITY_DECREASE = 1.5
STEP_DECREASE = 1.5
SMALLEST_STEP = 0.1  # in units of eps
COUNT_OFFSET = 1e-10  # of the official code: a zero gradient gives a zero step


class HasBest(Protocol):
    """The part of a run's record that the L1 rule reads."""

    best: Tensor


class SparseRule:
    """L1: no momentum; step size and sparsity follow the sparsity of the best point."""

    def __init__(
        self,
        problem: Problem,
        start: Tensor | None,
        *,
        num_steps: int,
        initial_sparsity: float,
        compat_rounding: bool,
    ) -> None:
        inputs = problem.inputs
        self.problem, self.compat_rounding = problem, compat_rounding
        self.interval = max(int(CHECK_INTERVAL * num_steps), 1)
        self.dimension = inputs[:1].numel()
        one_per_sample = (len(inputs), *[1] * (inputs.ndim - 1))
        self.step_sizes = inputs.new_full(one_per_sample, problem.threat.eps)
        # Of the coordinates, the share that a step changes and the number that the best point has.
        self.sparsity = inputs.new_full((len(inputs),), initial_sparsity)
        self.changed = inputs.new_full((len(inputs),), self.dimension)
        if start is not None:
            changed = _num_changed(start, inputs)
            dense = changed == 0  # A start at the input says nothing about sparsity.
            own = changed / self.dimension / SPARSITY_DECREASE
            self.sparsity = self.sparsity.where(dense, own)
            self.changed = self.changed.where(dense, changed)

    def advance(self, points: Tensor, previous: Tensor, gradient: Tensor, step: int) -> Tensor:
        direction = sparse_direction(gradient, self.sparsity)
        ahead = points + self.step_sizes * direction
        return inside(self.problem, ahead, compat_rounding=self.compat_rounding)

    def review(self, record: HasBest, loss: Tensor, step: int) -> Tensor | None:
        if step % self.interval:
            return None
        eps = self.problem.threat.eps
        changed = _num_changed(record.best, self.problem.inputs)
        # 0 / 0, where no step has improved anything, is not a number and not below SPARSER.
        sparser = changed / self.changed < SPARSER
        self.changed = changed
        self.sparsity = changed / self.dimension / SPARSITY_DECREASE
        shrunk = (self.step_sizes / STEP_DECREASE).clamp(SMALLEST_STEP * eps, eps)
        restarts = sparser.view(self.step_sizes.shape)
        self.step_sizes = torch.where(restarts, torch.full_like(shrunk, eps), shrunk)
        return sparser


def sparse_direction(gradient: Tensor, sparsity: Tensor) -> Tensor:
    """Return the signs of the largest gradient entries, scaled to unit L1 norm.

    Args:
        gradient: ``[n, ...]``.
        sparsity: ``[n]``, share of the coordinates to keep, in [0, 1]; at least one is kept.

    Note:
        Entries as large as the smallest kept one are kept too, so that a constant gradient keeps
        all; entries of exactly 0 are never counted.
    """
    flat = gradient.flatten(1)
    dimension = flat.shape[1]
    sizes = flat.abs()
    skipped = ((1 - sparsity) * dimension).clamp(0, dimension - 1).long()
    kept = dimension - skipped
    # Looking at a value costs nothing on the CPU, where it spares most of the sorting.
    most = int(kept.max()) if flat.device.type == "cpu" and len(flat) else dimension
    smallest = sizes.topk(most, dim=1).values.gather(1, kept.unsqueeze(1) - 1)
    signs = flat.sign().where(sizes >= smallest, 0)
    count = signs.abs().sum(dim=1, keepdim=True)
    return (signs / (count + COUNT_OFFSET)).view_as(gradient)


def inside(problem: Problem, points: Tensor, *, compat_rounding: bool = False) -> Tensor:
    """Return ``points`` projected on the problem's ball and box.

    ``compat_rounding`` adds the projection's correction to the point instead of its result to the
    input: equal but for rounding, which leaves residues below 1e-6 where there should be zeros.
    """
    inputs, threat = problem.inputs, problem.threat
    delta = points - inputs
    projected = project(delta, inputs, norm=threat.norm, eps=threat.eps)
    if compat_rounding:
        return inputs + delta + (projected - delta)
    return (inputs + projected).clamp(0, 1)


def _num_changed(points: Tensor, inputs: Tensor) -> Tensor:
    """Return the number of coordinates in which each point differs, in the inputs' dtype."""
    return (points != inputs).flatten(1).sum(dim=1).to(inputs.dtype)
