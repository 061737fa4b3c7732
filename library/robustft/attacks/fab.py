"""FAB: find the nearest misclassified point by stepping along the decision boundary.

F. Croce and M. Hein, "Minimally distorted adversarial examples with a fast adaptive boundary
attack", 2020, arXiv 1907.02044, and its targeted version FAB-T of "Reliable evaluation of
adversarial robustness with an ensemble of diverse parameter-free attacks", 2020, arXiv 2003.01690.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from robustft.attacks.hyperplane import project_on_hyperplane
from robustft.attacks.losses import logit_gap
from robustft.attacks.mode import Model, attack_mode
from robustft.attacks.noise import normal, uniform
from robustft.attacks.problem import Problem, check_count
from robustft.attacks.projections import lp_norm
from robustft.attacks.restarts import over_restarts
from robustft.attacks.result import AttackResult
from robustft.attacks.targets import check_targets, over_targets
from robustft.errors import ConfigError
from robustft.threat import Norm

__all__ = ["fab"]

DEFAULT_TARGETS = 9
DUAL: dict[Norm, Norm] = {"Linf": "L1", "L2": "L2", "L1": "Linf"}
SHORTEST_MOVE = 1e-8  # of the official code: keeps the bias defined on the boundary itself
NORM_OFFSET = 1e-12  # of the official code: a zero gradient gives the farthest boundary
START_RADIUS = 0.5  # in units of eps: where the restarts after the first begin
SMALLEST_GAP = 1e-5  # in units of the start's gap: nearer to the boundary than that is on it


def fab(
    model: Model,
    inputs: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    eps: float | str,
    num_steps: int = 100,
    num_restarts: int = 1,
    num_targets: int | None = None,
    targeted: bool = True,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    generator: torch.Generator | None = None,
    sample_ids: Tensor | None = None,
    check_clean: bool = False,
) -> AttackResult:
    """Look for the nearest misclassified point; a sample is broken if it is within ``eps``.

    Each step linearises the classifier at the current point, moves to the decision boundary of the
    linear model within the box, a little drawn towards the clean input and a little beyond, and
    pulls the point back towards the clean input if it is misclassified. ``eps`` plays no part in
    that but for the starts of further restarts, so no step size depends on it.

    Args:
        model: pixels in [0, 1] -> logits; normalisation is its first layer.
        inputs: ``[n, ...]`` in [0, 1].
        labels: int64 ``[n]``.
        norm: "Linf", "L2" or "L1".
        eps: radius in [0, 1] pixel units.
        num_steps: >= 1.
        num_restarts: >= 1; the first starts at the clean input, the others at random points
            eps / 2 from it. A restart sees only the samples that are still robust.
        num_targets: >= 1, default 9: the classes that the targeted attack drives each sample to,
            by their clean logits; at most the number of classes - 1 are used.
        targeted: FAB-T, with 2 forwards and 1 input backward for each step and target. Otherwise
            FAB, which goes for the nearest boundary of all: 2 forwards and, for each class but the
            label, 1 backward for each step.
        alpha_max: in [0, 1], largest weight of the clean input's own projection.
        eta: >= 1, how far the steps go beyond the boundary.
        beta: in [0, 1], what is kept of the distance of misclassified points.
        generator: gives the seed by one draw; None is seed 0.
        sample_ids: int64 ``[n]``, stable ids that the noise depends on; default the positions.
        check_clean: leave out the samples that are misclassified as they are. The results are the
            same without it, since the clean input is the first point that is looked at.

    Returns:
        For broken samples the nearest misclassified point (any class counts) of the restart and
        target that broke it, for all others the clean input. ``loss`` is the largest gap between
        the logit of the target (FAB: of any other class) and that of the label, over the points
        within ``eps``.

    Raises:
        ConfigError: an argument cannot be used.

    Note:
        The official code looks for misclassification only after a step; here the points at which
        gradients are taken count as well: they are evaluated anyway, and are nearer by ``beta``.
        It also takes points that lie on the boundary up to rounding; here the nearest point is
        taken that stays misclassified in another batch. And it runs all restarts of a target
        before the next target, here it is the reverse.
    """
    check_count("num_steps", num_steps)
    check_count("num_restarts", num_restarts)
    _check_between("alpha_max", alpha_max, 0, 1)
    _check_between("eta", eta, 1, math.inf)
    _check_between("beta", beta, 0, 1)
    if not targeted and num_targets is not None:
        raise ConfigError("num_targets has no meaning with targeted=False, which uses all classes")
    num_targets = check_targets(num_targets, DEFAULT_TARGETS)
    run = functools.partial(
        _run,
        linearize=_towards_target if targeted else _towards_nearest,
        num_steps=num_steps,
        alpha_max=alpha_max,
        eta=eta,
        beta=beta,
    )
    with attack_mode(model):
        problem = Problem.build(
            "fab",
            model,
            inputs,
            labels,
            norm=norm,
            eps=eps,
            loss="margin",
            generator=generator,
            sample_ids=sample_ids,
        )
        if targeted:
            return over_targets(
                problem,
                run,
                loss=logit_gap,
                num_targets=num_targets,
                num_restarts=num_restarts,
                passes=(2 * num_steps, num_steps),
                check_clean=check_clean,
            )
        with torch.no_grad():  # One forward more, for the number of classes.
            num_classes = problem.logits(problem.inputs).shape[1]
        result = over_restarts(
            problem,
            run,
            num_restarts=num_restarts,
            start=None,
            passes=(2 * num_steps, (num_classes - 1) * num_steps),
            check_clean=check_clean,
        )
        return dataclasses.replace(
            result,
            num_forwards=result.num_forwards + 1,
            total_forwards=result.total_forwards + len(problem.labels),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Boundary:
    """The linear model of a decision boundary at some points.

    ``gap + <slope, u - point>`` is the logit of another class minus that of the label at u.
    """

    loss: Tensor
    correct: Tensor
    gap: Tensor
    slope: Tensor


Linearize = Callable[[Problem, Tensor], Boundary]


def _towards_target(problem: Problem, points: Tensor) -> Boundary:
    gap, correct, slope = problem.differentiate(points)
    return Boundary(loss=gap, correct=correct, gap=gap, slope=slope)


def _towards_nearest(problem: Problem, points: Tensor) -> Boundary:
    """Linearise the boundaries to all classes; keep the nearest in each sample."""
    points = points.detach().requires_grad_()
    labels = problem.labels
    with torch.enable_grad():
        logits = problem.logits(points)
    num_classes = logits.shape[1]
    correct = logits.argmax(dim=1) == labels
    loss = problem.loss(logits.detach(), labels)
    best_gap = torch.zeros_like(loss)
    best_slope = torch.zeros_like(points)
    nearest = torch.full_like(loss, math.inf)
    # Each sample counts the classes from its label on, which spares the backward of the label.
    for shift in range(1, num_classes):
        with torch.enable_grad():
            gap = logit_gap(logits, labels, (labels + shift) % num_classes)
            slope = _gradient(gap, points, last=shift == num_classes - 1)
        gap = gap.detach()
        distance = gap.abs() / (lp_norm(slope, DUAL[problem.threat.norm]).flatten() + NORM_OFFSET)
        nearer = distance < nearest
        nearest = distance.where(nearer, nearest)
        best_gap = gap.where(nearer, best_gap)
        best_slope = slope.where(_over(slope, nearer), best_slope)
    return Boundary(loss=loss, correct=correct, gap=best_gap, slope=best_slope)


def _gradient(values: Tensor, points: Tensor, *, last: bool) -> Tensor:
    if not values.requires_grad:
        return torch.zeros_like(points)
    (gradient,) = torch.autograd.grad(
        values.sum(), points, retain_graph=not last, materialize_grads=True
    )
    return gradient.detach()


class Record:
    """The nearest misclassified points so far. Tensors are replaced, so that none is aliased."""

    def __init__(self, problem: Problem) -> None:
        self.inputs, self.threat = problem.inputs, problem.threat
        self.points = problem.inputs
        self.distances = self.inputs.new_full((len(self.inputs),), math.inf)
        self.loss = -self.distances
        self.smallest_gap: Tensor | None = None

    def update(self, points: Tensor, loss: Tensor, correct: Tensor) -> None:
        """Take in one iterate.

        Steps that come from the far side can end on the boundary itself, where the next batch size
        or machine may well say "correct" again: such points are not taken.
        """
        if self.smallest_gap is None:
            self.smallest_gap = SMALLEST_GAP * loss.abs()
        distances = lp_norm(points - self.inputs, self.threat.norm).flatten()
        self.loss = torch.maximum(self.loss, loss.where(distances <= self.threat.eps, -math.inf))
        wrong = ~correct & (loss.abs() >= self.smallest_gap)
        nearer = wrong & (distances < self.distances)
        self.distances = distances.where(nearer, self.distances)
        self.points = points.where(_over(points, nearer), self.points)

    def outcome(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return points, robust mask and loss."""
        robust = self.distances > self.threat.eps
        return self.inputs.where(_over(self.inputs, robust), self.points), robust, self.loss


def _run(
    problem: Problem,
    restart: int,
    start: Tensor | None,
    *,
    linearize: Linearize,
    num_steps: int,
    alpha_max: float,
    eta: float,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One restart, on its way from its own start: ``fab`` takes none from the caller."""
    points = problem.inputs if restart == 0 else _random_start(problem, restart)
    record = Record(problem)
    for _ in range(num_steps):
        boundary = linearize(problem, points)
        record.update(points, boundary.loss, boundary.correct)
        points = _step(problem, points, boundary, alpha_max=alpha_max, eta=eta)
        loss, correct = problem.measure(points)
        record.update(points, loss, correct)
        # Weight 1 keeps a point to the last bit.
        kept = points.new_full(correct.shape, beta).masked_fill(correct, 1)
        points = problem.inputs.lerp(points, _over(points, kept))
    return record.outcome()


def _step(
    problem: Problem, points: Tensor, boundary: Boundary, *, alpha_max: float, eta: float
) -> Tensor:
    """Project the points and the clean inputs on the boundary and go between the two."""
    norm = problem.threat.norm
    both = torch.stack([points, problem.inputs]).flatten(2)
    slope = boundary.slope.flatten(1)
    gap = boundary.gap.to(slope.dtype)
    clean_gap = gap + (slope * (both[1] - both[0])).sum(dim=1)
    moves = project_on_hyperplane(both, slope, torch.stack([gap, clean_gap]), norm=norm)
    lengths = lp_norm(moves.flatten(0, 1), norm).view(2, -1, 1).clamp(min=SHORTEST_MOVE)
    alpha = (lengths[0] / lengths.sum(dim=0)).clamp(max=alpha_max)
    ahead = both + eta * moves
    return ahead[0].lerp(ahead[1], alpha).clamp(0, 1).view_as(points)


def _random_start(problem: Problem, restart: int) -> Tensor:
    """Return points at distance eps / 2 (before the box clips them) in a random direction."""
    inputs, threat = problem.inputs, problem.threat
    draw = uniform if threat.norm == "Linf" else normal
    noise = draw(problem.keys(restart), inputs.shape[1:], dtype=inputs.dtype)
    if threat.norm == "Linf":
        noise = 2 * noise - 1
    radius = START_RADIUS * threat.eps
    return (inputs + noise * (radius / lp_norm(noise, threat.norm))).clamp(0, 1)


def _check_between(name: str, value: float, low: float, high: float) -> None:
    if not (low <= value <= high and math.isfinite(value)):
        limits = f">= {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ConfigError(f"{name} must be a finite number {limits}, got {value!r}")


def _over(values: Tensor, mask: Tensor) -> Tensor:
    """Shape a mask over samples so that it broadcasts over ``values``."""
    return mask.view(-1, *[1] * (values.ndim - 1))
