"""Merging restarts, with scripted runs: what each restart finds is written down."""

import torch
from torch import Tensor

from robustft.attacks.problem import Problem
from robustft.attacks.restarts import over_restarts

# Per restart, for samples 0 to 3: still robust, loss. The point found in restart r is (r + 1) / 10.
FOUND = [
    ([True, True, False, True], [1.0, 2.0, 3.0, 1.0]),
    ([False, True, True, True], [0.5, 1.0, 9.0, 4.0]),
    ([True, True, True, False], [9.0, 2.5, 9.0, 2.0]),
]


def merged(*, everywhere: bool) -> tuple[list[float], list[bool], list[float], list[list[int]]]:
    problem = Problem.build(
        "pgd",
        lambda inputs: inputs,
        torch.zeros(4, 2),
        torch.zeros(4, dtype=torch.int64),
        norm="Linf",
        eps=1,
        loss="ce",
        generator=None,
        sample_ids=None,
    )
    seen = []

    def run(part: Problem, restart: int, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        rows = part.sample_ids
        seen.append(rows.tolist())
        robust, loss = FOUND[restart]
        points = torch.full_like(part.inputs, (restart + 1) / 10)
        return points, torch.tensor(robust)[rows], torch.tensor(loss)[rows]

    result = over_restarts(
        problem, run, num_restarts=3, start=None, passes=(4, 3), everywhere=everywhere
    )
    assert (result.num_forwards, result.num_backwards) == (12, 9)
    restarts = (result.inputs[:, 0] * 10).round().tolist()
    return restarts, result.robust.tolist(), result.loss.tolist(), seen


def test_a_broken_sample_keeps_the_point_that_broke_it_even_with_a_lower_loss() -> None:
    restarts, robust, loss, seen = merged(everywhere=False)
    assert seen == [[0, 1, 2, 3], [0, 1, 3], [1, 3]]
    assert restarts == [2, 3, 1, 3]
    assert robust == [False, True, False, False]
    assert loss == [1.0, 2.5, 3.0, 4.0]


def test_everywhere_the_highest_loss_wins() -> None:
    restarts, robust, loss, seen = merged(everywhere=True)
    assert seen == [[0, 1, 2, 3]] * 3
    assert restarts == [3, 3, 2, 2]
    assert robust == [False, True, False, False]
    assert loss == [9.0, 2.5, 9.0, 4.0]
