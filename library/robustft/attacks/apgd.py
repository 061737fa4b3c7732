"""APGD: projected gradient ascent with momentum whose step size adapts to each sample.

F. Croce and M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", 2020, arXiv 2003.01690, algorithm 1; for L1 "Mind the box: l1-APGD for
sparse adversarial attacks on image classifiers", 2021, arXiv 2103.01208 (its steps are in
``sparse.py``). Where the papers and the official code differ, this is the code.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from robustft.attacks.losses import TARGETED_LOSSES, LossFunction
from robustft.attacks.mode import Model, attack_mode
from robustft.attacks.problem import Problem, check_count
from robustft.attacks.projections import l2_norm
from robustft.attacks.restarts import over_restarts
from robustft.attacks.result import AttackResult
from robustft.attacks.sparse import SparseRule, inside
from robustft.attacks.steps import ascent_direction, boundary_start, normalized
from robustft.attacks.targets import check_targets, over_targets
from robustft.errors import ConfigError, UnknownNameError
from robustft.threat import Norm, ThreatModel

__all__ = ["Keep", "apgd", "check_steps"]

Keep = Literal["adversarial", "best_loss"]

FIRST_WINDOW = 0.22  # fractions of num_steps, of the official code
SMALLEST_WINDOW = 0.06
WINDOW_DECREASE = 0.03
RHO = 0.75  # share of steps that must raise the loss, or the step is halved
MOMENTUM = 0.75  # weight of the new step against the previous move
FIRST_STEP = 2.0  # in units of eps
DEFAULT_TARGETS = 9
LARGE_EPS = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))  # (units of eps, share of the steps)


def apgd(
    model: Model,
    inputs: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    eps: float | str,
    num_steps: int = 100,
    loss: str | LossFunction = "ce",
    num_restarts: int = 1,
    num_targets: int | None = None,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    sample_ids: Tensor | None = None,
    first_check_compat: bool = True,
    keep: Keep = "adversarial",
    check_clean: bool = False,
    eot_steps: int = 1,
    large_eps_schedule: bool = False,
    initial_sparsity: float = 0.2,
    l1_compat_rounding: bool = False,
) -> AttackResult:
    """Attack without tuned parameters: num_steps + 1 forwards, num_steps input backwards.

    Args:
        model: pixels in [0, 1] -> logits; normalisation is its first layer.
        inputs: ``[n, ...]`` in [0, 1].
        labels: int64 ``[n]``.
        norm: "Linf", "L2" or "L1".
        eps: radius in [0, 1] pixel units.
        num_steps: >= 1.
        loss: "ce", "dlr", "margin" or a function of (logits, labels); "dlr-targeted" and
            "ce-targeted" run the attack once for each target class (APGD-T).
        num_restarts: >= 1; a restart sees only the samples that are still robust.
        num_targets: classes that a targeted loss aims at, those with the largest clean logits
            after the label's; default 9, at most the number of classes - 1.
        start: starting points ``[n, ...]`` of the first restart instead of random ones on the
            ball's boundary; ``start=inputs`` is the attack used in training.
        generator: gives the seed by one draw; None is seed 0.
        sample_ids: int64 ``[n]``, stable ids that the noise depends on; default the positions.
        first_check_compat: count the first iterate as an increase if its loss is above 0, as the
            official code does by reading a row of its history that is still zero; otherwise if
            it is above the start's loss. Linf and L2.
        keep: "adversarial": return the latest misclassified iterate, or the one with the highest
            loss where there is none. "best_loss": return the iterate with the highest loss and
            give every restart all samples (for training).
        check_clean: classify the clean inputs first (1 F more); misclassified ones are returned
            unchanged, as the official driver does. Evaluations have done this already.
        eot_steps: gradients averaged in each step, >= 1, for models with noise inside.
        large_eps_schedule: L1 only: 30 % of the steps at 3 eps, 30 % at 2 eps and the rest at
            eps, with 2 forwards more ("Mind the box"); AutoAttack's L1 attacks use it.
        initial_sparsity: L1 only: share of the coordinates that the first step changes, in
            (0, 1]; 0.2 for evaluation, 0.05 in training. A start other than the inputs has its
            own sparsity.
        l1_compat_rounding: L1 only: form new points in the official code's order of operations,
            whose rounding residues it counts as changed coordinates. For comparison with it.

    Returns:
        ``robust`` is False where *any* iterate was misclassified (with ``large_eps_schedule``:
        any in the last stage, which alone is in the ball); ``loss`` is the highest loss of any
        such iterate.

    Raises:
        ConfigError: an argument cannot be used.

    Note:
        The official code computes one more gradient, which it does not use, and returns the clean
        input where it found no adversarial; here the point of highest loss is returned. Its L1
        attack changes a single coordinate in the first step if it starts at the clean input; here
        ``initial_sparsity`` holds there.
    """
    targeted = _check_options(
        norm, loss, num_targets, start, num_steps, keep, check_clean, large_eps_schedule
    )
    if not 0 < initial_sparsity <= 1:
        raise ConfigError(f"initial_sparsity = {initial_sparsity} must be in (0, 1]")
    check_count("num_restarts", num_restarts)
    check_count("eot_steps", eot_steps)
    with attack_mode(model):
        problem = Problem.build(
            "apgd",
            model,
            inputs,
            labels,
            norm=norm,
            eps=eps,
            loss="margin" if targeted else loss,
            generator=generator,
            sample_ids=sample_ids,
        )
        run = functools.partial(
            _run_large_eps if large_eps_schedule else _run,
            num_steps=num_steps,
            first_check_compat=first_check_compat,
            keep=keep,
            eot_steps=eot_steps,
            initial_sparsity=initial_sparsity,
            l1_compat_rounding=l1_compat_rounding,
        )
        stages = len(LARGE_EPS) if large_eps_schedule else 1
        passes = (num_steps * eot_steps + stages, num_steps * eot_steps)
        if targeted:
            return over_targets(
                problem,
                run,
                loss=TARGETED_LOSSES[str(loss)],
                num_targets=check_targets(num_targets, DEFAULT_TARGETS),
                num_restarts=num_restarts,
                passes=passes,
                start=start,
                check_clean=check_clean,
            )
        return over_restarts(
            problem,
            run,
            num_restarts=num_restarts,
            start=start,
            passes=passes,
            everywhere=keep == "best_loss",
            check_clean=check_clean,
        )


def _check_options(
    norm: Norm,
    loss: str | LossFunction,
    num_targets: int | None,
    start: Tensor | None,
    num_steps: int,
    keep: Keep,
    check_clean: bool,
    large_eps_schedule: bool,
) -> bool:
    """Refuse options that do not go together; return whether the loss is a targeted one."""
    check_count("num_steps", num_steps)
    if keep not in get_args(Keep):
        raise UnknownNameError("value of keep", str(keep), get_args(Keep))
    if check_clean and keep == "best_loss":
        raise ConfigError("check_clean has no meaning with keep='best_loss', which attacks all")
    targeted = isinstance(loss, str) and loss in TARGETED_LOSSES
    if num_targets is not None and not targeted:
        raise ConfigError("num_targets needs a targeted loss: loss='dlr-targeted'")
    if targeted and keep == "best_loss":
        raise ConfigError("keep='best_loss' needs a loss without targets: use 'ce' or 'dlr'")
    if large_eps_schedule and norm != "L1":
        raise ConfigError(f"large_eps_schedule belongs to norm 'L1', and the norm is {norm!r}")
    if large_eps_schedule and (start is not None or min(_stage_steps(num_steps)) < 1):
        raise ConfigError(
            "large_eps_schedule needs its own start, and 3 steps or at least 5, for its 3 stages"
        )
    return targeted


def check_steps(num_steps: int) -> dict[int, int]:
    """Return {1-based step after which progress is checked: steps since the check before}.

    Note:
        The paper rounds fractions of ``num_steps`` up; the official code, followed here, works
        with truncated whole windows. Both agree at 100 steps and differ for few steps.
    """
    window = max(int(FIRST_WINDOW * num_steps), 1)
    smallest = max(int(SMALLEST_WINDOW * num_steps), 1)
    decrease = max(int(WINDOW_DECREASE * num_steps), 1)
    checks, step = {}, window
    while step <= num_steps:
        checks[step] = window
        window = max(window - decrease, smallest)
        step += window
    return checks


class StepRule(Protocol):
    """How one kind of norm moves the points and adapts to the progress of each sample."""

    def advance(self, points: Tensor, previous: Tensor, gradient: Tensor, step: int) -> Tensor:
        """Return the points after 1-based step ``step``."""

    def review(self, record: "Record", loss: Tensor, step: int) -> Tensor | None:
        """Look at the losses after ``step``; at a check return the samples that go back to best."""


@dataclasses.dataclass(slots=True)
class Record:
    """What a run has found so far. Tensors are replaced, never written to, so none is aliased."""

    best: Tensor
    best_loss: Tensor
    adversarial: Tensor
    robust: Tensor

    def update(self, points: Tensor, loss: Tensor, correct: Tensor) -> Tensor:
        """Take in one iterate; return where its loss is the highest so far, bool ``[n]``."""
        improved = loss > self.best_loss
        self.best = points.where(_over(points, improved), self.best)
        self.best_loss = loss.where(improved, self.best_loss)
        self.adversarial = self.adversarial.where(_over(points, correct), points)
        self.robust = self.robust & correct
        return improved


class MomentumRule:
    """Linf and L2: steps with momentum, halved where a sample makes no progress."""

    def __init__(
        self, problem: Problem, first_loss: Tensor, *, num_steps: int, first_check_compat: bool
    ) -> None:
        self.inputs, self.threat = problem.inputs, problem.threat
        self.low = (self.inputs - self.threat.eps).clamp(min=0)
        self.high = (self.inputs + self.threat.eps).clamp(max=1)
        self.checks = check_steps(num_steps)
        # In the inputs' precision: the losses may come from a model that computes in another.
        one_per_sample = (len(first_loss), *[1] * (self.inputs.ndim - 1))
        self.step_sizes = self.inputs.new_full(one_per_sample, FIRST_STEP * self.threat.eps)
        self.last_loss = torch.zeros_like(first_loss) if first_check_compat else first_loss
        self.increases = torch.zeros_like(first_loss)
        self.best_at_check = first_loss
        # True switches the second condition off at the first check.
        self.reduced_at_check = torch.ones_like(first_loss, dtype=torch.bool)

    def advance(self, points: Tensor, previous: Tensor, gradient: Tensor, step: int) -> Tensor:
        weight = 1.0 if step == 1 else MOMENTUM
        direction = ascent_direction(gradient, self.threat.norm)
        ahead = self._project(points + self.step_sizes * direction)
        move = points - previous
        return self._project(points + (ahead - points) * weight + move * (1 - weight))

    def review(self, record: Record, loss: Tensor, step: int) -> Tensor | None:
        self.increases = self.increases + (loss > self.last_loss)
        self.last_loss = loss
        if step not in self.checks:
            return None
        oscillates = self.increases <= RHO * self.checks[step]
        stagnates = ~self.reduced_at_check & (self.best_at_check >= record.best_loss)
        reduced = oscillates | stagnates
        self.increases = torch.zeros_like(loss)
        self.reduced_at_check, self.best_at_check = reduced, record.best_loss
        halved = self.step_sizes / 2
        self.step_sizes = halved.where(_over(self.step_sizes, reduced), self.step_sizes)
        return reduced

    def _project(self, points: Tensor) -> Tensor:
        if self.threat.norm == "Linf":
            return torch.clamp(points, self.low, self.high)
        delta = points - self.inputs
        length = l2_norm(delta).clamp(max=self.threat.eps)
        return (self.inputs + normalized(delta) * length).clamp(0, 1)


def _run(
    problem: Problem,
    restart: int,
    start: Tensor | None,
    *,
    num_steps: int,
    first_check_compat: bool,
    keep: Keep,
    eot_steps: int,
    initial_sparsity: float,
    l1_compat_rounding: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    points = boundary_start(problem, restart=restart) if start is None else start
    previous = points
    loss, correct, gradient = problem.differentiate(points, repetitions=eot_steps)
    best_gradient = gradient
    record = Record(best=points, best_loss=loss, adversarial=points, robust=correct)
    rule: StepRule
    if problem.threat.norm == "L1":
        rule = SparseRule(
            problem,
            start,
            num_steps=num_steps,
            initial_sparsity=initial_sparsity,
            compat_rounding=l1_compat_rounding,
        )
    else:
        rule = MomentumRule(
            problem, loss, num_steps=num_steps, first_check_compat=first_check_compat
        )
    for step in range(1, num_steps):
        points, previous = rule.advance(points, previous, gradient, step), points
        loss, correct, gradient = problem.differentiate(points, repetitions=eot_steps)
        improved = record.update(points, loss, correct)
        best_gradient = gradient.where(_over(points, improved), best_gradient)
        back = rule.review(record, loss, step)
        if back is not None:
            points = record.best.where(_over(points, back), points)
            gradient = best_gradient.where(_over(points, back), gradient)
    # Nothing follows the last step, so that it needs neither a gradient nor a review.
    points = rule.advance(points, previous, gradient, num_steps)
    record.update(points, *problem.measure(points))
    if keep == "adversarial":
        best = record.best.where(_over(points, record.robust), record.adversarial)
    else:
        best = record.best
    return best, record.robust, record.best_loss


def _run_large_eps(
    problem: Problem,
    restart: int,
    start: Tensor | None,
    *,
    num_steps: int,
    keep: Keep,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attack in a larger ball first, shrinking it twice; each stage starts at the best point."""
    radii = [factor * problem.threat.eps for factor, _ in LARGE_EPS]
    steps = _stage_steps(num_steps)
    stages = [
        dataclasses.replace(problem, threat=ThreatModel(problem.threat.norm, radius))
        for radius in radii
    ]
    points = boundary_start(stages[0], restart=restart)
    for stage, count in zip(stages[:-1], steps[:-1], strict=True):
        points = inside(stage, points, compat_rounding=options["l1_compat_rounding"])
        points, _, _ = _run(stage, restart, points, num_steps=count, keep="best_loss", **options)
    points = inside(problem, points, compat_rounding=options["l1_compat_rounding"])
    return _run(problem, restart, points, num_steps=steps[-1], keep=keep, **options)


def _stage_steps(num_steps: int) -> list[int]:
    """Return the steps of each stage: shares rounded up, and the rest (none if there are 4)."""
    steps = [math.ceil(share * num_steps) for _, share in LARGE_EPS[:-1]]
    return [*steps, num_steps - sum(steps)]


def _over(values: Tensor, mask: Tensor) -> Tensor:
    """Shape a mask over samples so that it broadcasts over ``values``."""
    return mask.view(-1, *[1] * (values.ndim - 1))
