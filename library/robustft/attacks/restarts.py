"""Restarts: run an attack several times and keep what broke the model."""

from collections.abc import Callable

import torch
from torch import Tensor

from robustft.attacks.problem import Problem
from robustft.attacks.result import AttackResult

__all__ = ["Run", "over_restarts"]

Run = Callable[[Problem, int, Tensor | None], tuple[Tensor, Tensor, Tensor]]
"""``run(problem, restart, start) -> (points, robust, loss)``: one restart on some samples."""


def over_restarts(
    problem: Problem,
    run: Run,
    *,
    num_restarts: int,
    start: Tensor | None,
    passes: tuple[int, int],
    everywhere: bool = False,
    check_clean: bool = False,
) -> AttackResult:
    """Run an attack several times and merge what the runs found.

    A later restart sees only the samples that no earlier one has broken. A sample's point is the
    one that broke it, or, as long as none does, the one with the highest loss.

    Args:
        problem: the batch.
        run: one restart.
        num_restarts: >= 1.
        start: starting points of restart 0; the others start at random.
        passes: forwards and backwards of one run.
        everywhere: every restart sees all samples, and the highest loss wins.
        check_clean: classify the clean inputs first and return the misclassified unchanged.
    """
    points, rows = problem.inputs, torch.arange(len(problem.labels), device=problem.labels.device)
    robust = torch.ones_like(problem.labels, dtype=torch.bool)
    loss = torch.full_like(problem.labels, float("-inf"), dtype=problem.inputs.dtype)
    start = None if start is None else problem.given_start(start)
    num_forwards = num_backwards = total_forwards = total_backwards = 0
    if check_clean and len(rows):
        loss, robust = problem.measure(points)
        num_forwards += 1
        total_forwards += len(rows)
    for restart in range(num_restarts):
        if not everywhere and (restart > 0 or check_clean):
            rows = robust.nonzero().flatten()
        if len(rows) == 0:
            break
        whole = len(rows) == len(robust)
        given = None if start is None or restart > 0 else start[rows]
        part = problem if whole else problem.take(rows)
        new_points, new_robust, new_loss = run(part, restart, given)
        loss = loss.to(new_loss.dtype)  # A model may compute in another precision than its inputs.
        better = new_loss > loss[rows]
        if not everywhere:
            better = better | ~new_robust
        shape = (-1, *[1] * (points.ndim - 1))
        merged = new_points.where(better.view(shape), points[rows])
        points = points.index_copy(0, rows, merged)
        robust = robust.index_copy(0, rows, robust[rows] & new_robust)
        loss = loss.index_copy(0, rows, torch.maximum(loss[rows], new_loss))
        num_forwards += passes[0]
        num_backwards += passes[1]
        total_forwards += passes[0] * len(rows)
        total_backwards += passes[1] * len(rows)
    return AttackResult(
        inputs=points.to(problem.dtype),
        robust=robust,
        loss=loss,
        num_forwards=num_forwards,
        num_backwards=num_backwards,
        total_forwards=total_forwards,
        total_backwards=total_backwards,
    )
