"""Square attack: random search over square windows, from the model's scores alone.

M. Andriushchenko, F. Croce, N. Flammarion, M. Hein, "Square Attack: a query-efficient black-box
adversarial attack via random search", 2020, arXiv 1912.00049, algorithms 1 to 3; L1 as in F. Croce
and M. Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers", 2021,
arXiv 2103.01208. Where papers and official code differ, this is the code.
"""

import bisect
import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from robustft.attacks.losses import margin
from robustft.attacks.mode import Model, attack_mode
from robustft.attacks.noise import uniform
from robustft.attacks.problem import Problem, check_count
from robustft.attacks.projections import lp_norm, project
from robustft.attacks.restarts import over_restarts
from robustft.attacks.result import AttackResult
from robustft.attacks.steps import normalized
from robustft.data.random import mix
from robustft.errors import ConfigError
from robustft.threat import Norm

__all__ = ["square", "window_share", "window_side"]

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Last iterations before the share of pixels in a window is halved."""

SCHEDULE_LENGTH = 10_000  # the iterations that HALVINGS are meant for
TILES = 5  # along the shorter side of the image, at the start of L2 and L1
DECAY = {"L2": 2, "L1": 4}  # a bump falls off like a sum of 1 / (distance + 1) ^ DECAY
SMALLEST_SIDE = {"Linf": 1, "L2": 3, "L1": 3}
L1_RADIUS = 1 - 1e-6  # in units of eps
LENGTH_OFFSET = 1e-12  # of the official code: keeps a division by a length away from zero
CANCELLED = 1e-6  # a sum of two unit vectors that is shorter than this has no direction
LONGEST_BLOCK = 16  # iterations between two looks at which samples are broken


def square(
    model: Model,
    inputs: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    eps: float | str,
    num_queries: int = 5000,
    num_restarts: int = 1,
    p_init: float = 0.8,
    rescale_schedule: bool = False,
    generator: torch.Generator | None = None,
    sample_ids: Tensor | None = None,
    check_clean: bool = False,
) -> AttackResult:
    """Attack without gradients: ``num_queries + 1`` forwards of a sample that does not break.

    A random square window of the perturbation is painted anew, and the new point is kept where it
    raises the margin. The windows become smaller from stage to stage.

    Args:
        model: pixels in [0, 1] -> logits; normalisation is its first layer.
        inputs: ``[n, channels, height, width]`` in [0, 1].
        labels: int64 ``[n]``.
        norm: "Linf", "L2" or "L1".
        eps: radius in [0, 1] pixel units.
        num_queries: >= 1; random windows that are tried in a restart.
        num_restarts: >= 1; a restart sees only the samples that are still robust.
        p_init: share of the image's pixels in the first windows, in (0, 1].
        rescale_schedule: stretch the schedule of window sizes, which is made for 10,000 queries,
            to ``num_queries``. AutoAttack does not.
        generator: gives the seed by one draw; None is seed 0.
        sample_ids: int64 ``[n]``, stable ids that the noise depends on; default the positions.
        check_clean: classify the clean inputs first (1 F more); misclassified ones are returned
            unchanged, as the official driver does. Evaluations have done this already.

    Returns:
        The points with the highest margin that were found; ``loss`` is that margin, >= 0 where
        misclassified.

    Raises:
        ConfigError: an argument cannot be used, or the inputs are no images.

    Note:
        The official code draws one window position for the whole batch, and in Linf the signs
        too; here every sample has its own, so that it does not depend on its batch.

        A window never reaches the last row and the last column, unless it is as high or as wide
        as the image: its corner is the integer part of U * (height - side), U < 1, as in the
        official code.

        The official code stops at a margin of 0. A tie that the model still resolves in favour of
        the label is not misclassified here, and the attack goes on.

        The first tiles of L2 and L1 are as many as fit, in both directions, and centred. The
        official code places them as if there were 5 x 5. That is the same at 28, 32 or 224 pixels
        a side; at 8 it leaves the first row and column out, and at 14 or 24, and below 5, it fails.

        Where a new bump cancels what it is added to, the official code continues with the
        direction of the rounding errors; here the bump takes its place.
    """
    check_count("num_queries", num_queries)
    check_count("num_restarts", num_restarts)
    if not 0 < p_init <= 1:
        raise ConfigError(f"p_init must be a share of the pixels in (0, 1], got {p_init!r}")
    total_forwards = 0

    def counted(points: Tensor) -> Tensor:
        nonlocal total_forwards
        total_forwards += len(points)
        return model(points)

    with attack_mode(model), torch.no_grad():
        problem = Problem.build(
            "square",
            counted,
            inputs.contiguous(),  # windows are flat positions
            labels,
            norm=norm,
            eps=eps,
            loss=margin,
            generator=generator,
            sample_ids=sample_ids,
        )
        if problem.inputs.ndim != 4:
            raise ConfigError(
                "square needs images [n, channels, height, width], got inputs "
                f"{list(problem.inputs.shape)}"
            )
        shares = [
            window_share(iteration, num_queries, p_init=p_init, rescale=rescale_schedule)
            for iteration in range(num_queries)
        ]
        result = over_restarts(
            problem,
            functools.partial(_run, shares=shares),
            num_restarts=num_restarts,
            start=None,
            passes=(num_queries + 1, 0),
            check_clean=check_clean,
        )
    # Merging restarts assumes that every sample that is attacked meets every query.
    return dataclasses.replace(result, total_forwards=total_forwards)


def window_share(iteration: int, num_queries: int, *, p_init: float, rescale: bool) -> float:
    """Return the share p of the image's pixels in the window of a 0-based iteration."""
    if rescale:
        iteration = int(iteration / num_queries * SCHEDULE_LENGTH)
    return p_init / float(2 ** bisect.bisect_left(HALVINGS, iteration))


def window_side(share: float, height: int, width: int, *, norm: Norm) -> int:
    """Return the side of a square window with a share of the image's pixels.

    L2 and L1 windows have an odd side of at least 3, so that a bump has a centre; no window is
    larger than the shorter side of the image.
    """
    side = max(round(math.sqrt(share * height * width)), SMALLEST_SIDE[norm])
    if norm != "Linf" and side % 2 == 0:
        side += 1
    return min(side, height, width)


def _run(
    problem: Problem, restart: int, start: Tensor | None, *, shares: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one restart. ``start`` is None: the attack has its own starting points."""
    height, width = problem.inputs.shape[2:]
    norm = problem.threat.norm
    search = _SEARCHES[norm](problem, restart)
    points = search.points.clone()
    loss, correct = problem.measure(points)
    best_loss, robust = loss.clone(), correct.clone()
    rows = torch.arange(len(loss), device=loss.device)
    sides = [window_side(share, height, width, norm=norm) for share in shares]
    for block in _blocks(sides):
        left = correct.nonzero().flatten()
        if len(left) < len(rows):
            points[rows], best_loss[rows], robust[rows] = search.points, loss, correct
            rows, loss, correct = rows[left], loss[left], correct[left]
            search.take(left)
        if len(rows) == 0:
            break
        search.draw(block, sides[block.start])
        for step in range(len(block)):
            new_loss, new_correct = search.problem.measure(search.propose(step))
            accepted = correct & ((new_loss > loss) | ~new_correct)
            search.settle(accepted)
            loss, correct = new_loss.where(accepted, loss), correct & new_correct
    points[rows], best_loss[rows], robust[rows] = search.points, loss, correct
    return points, robust, best_loss


def _blocks(sides: list[int]) -> Iterator[range]:
    """Cut the iterations into runs of one side, short ones first.

    Most samples that break do so at once: the samples are looked at after 1, 3, 7 and 15
    iterations, and then every ``LONGEST_BLOCK``.
    """
    start, length = 0, 1
    while start < len(sides):
        stop = start + 1
        while stop < min(start + length, len(sides)) and sides[stop] == sides[start]:
            stop += 1
        yield range(start, stop)
        start, length = stop, min(2 * length, LONGEST_BLOCK)


class _Search(ABC):
    """The points of the samples that are still attacked, and how windows change them.

    All samples have windows of the same side, so that a window is ``[n, channels * side * side]``
    flat positions, and reading and writing it costs nothing that grows with the image.

    Args:
        problem: these samples.
        restart: 0-based number of the restart.
        points: where they start, ``[n, channels, height, width]``.
    """

    num_windows: int
    """In one proposal."""

    def __init__(self, problem: Problem, restart: int, points: Tensor) -> None:
        self.problem, self.restart, self.points = problem, restart, points

    @property
    def clean(self) -> Tensor:
        """The clean inputs, ``[n, pixels]``."""
        return self.problem.inputs.flatten(1)

    def take(self, rows: Tensor) -> None:
        """Continue with the samples ``rows`` only, int64 ``[m]``."""
        self.problem, self.points = self.problem.take(rows), self.points[rows]

    def draw(self, iterations: range, side: int) -> None:
        """Draw the windows of some iterations; the noise of each depends on its number alone."""
        channels, height, width = self.points.shape[1:]
        device = self.points.device
        keys = self.problem.keys(self.restart, purpose="windows")
        keys = mix(keys ^ torch.arange(iterations.start, iterations.stop, device=device)[:, None])
        shape = torch.Size([2 * self.num_windows + channels + 1])
        noise = uniform(keys.flatten(), shape, dtype=self.points.dtype).view(*keys.shape, -1)
        tops = (noise[:, :, : self.num_windows] * (height - side)).long()
        lefts = (noise[:, :, self.num_windows : 2 * self.num_windows] * (width - side)).long()
        corners = tops * width + lefts
        self.corners: Tensor = corners.transpose(1, 2).unsqueeze(3)  # [iterations, windows, n, 1]
        self.signs = _signs(noise[:, :, -channels - 1 : -1]).unsqueeze(3)
        self.turns = (noise[:, :, -1] > 0.5).long()
        down, across = torch.arange(side, device=device)[:, None], torch.arange(side, device=device)
        channel = torch.arange(channels, device=device)[:, None, None]
        self.cells: Tensor = ((channel * height + down) * width + across).flatten()

    def window(self, step: int, number: int) -> Tensor:
        """Return the flat positions of a window of each sample, int64 ``[n, cells]``."""
        return self.corners[step, number] + self.cells

    @abstractmethod
    def propose(self, step: int) -> Tensor:
        """Return the points that the ``step``-th windows of those drawn lead to."""

    @abstractmethod
    def settle(self, accepted: Tensor) -> None:
        """Move to the points last proposed where they are ``accepted``, bool ``[n]``."""


class _LinfSearch(_Search):
    """Every perturbed value is +eps or -eps, with one sign per channel of a window.

    The official code adds 2 eps times the sign and projects, which puts every value of the window
    on that side of the ball, wherever it was.
    """

    num_windows = 1

    def __init__(self, problem: Problem, restart: int) -> None:
        super().__init__(problem, restart, _stripes(problem, restart))

    def propose(self, step: int) -> Tensor:
        flat = self.points.view_as(self.clean)
        self.index = self.window(step, 0)
        self.old = flat.gather(1, self.index)
        clean = self.clean.gather(1, self.index).view(*self.signs.shape[1:3], -1)
        self.new = (clean + self.signs[step] * self.problem.threat.eps).clamp_(0, 1).flatten(1)
        flat.scatter_(1, self.index, self.new)
        return self.points

    def settle(self, accepted: Tensor) -> None:
        kept = self.new.where(accepted[:, None], self.old)
        self.points.view_as(self.clean).scatter_(1, self.index, kept)


@dataclasses.dataclass(frozen=True, slots=True)
class _Erased:
    """Two windows that were set to the clean values: where, and what was there, ``[n, cells]``.

    ``second_old`` was read after the first window had been erased.
    """

    first: Tensor
    second: Tensor
    first_old: Tensor
    second_old: Tensor
    first_clean: Tensor
    second_clean: Tensor


class _BumpSearch(_Search):
    """L2 and L1: a second window gives up its perturbation, and the first one takes the budget."""

    num_windows = 2

    def draw(self, iterations: range, side: int) -> None:
        super().draw(iterations, side)
        bump = _bump(side, self.problem.threat.norm, like=self.points)
        self.bumps = torch.stack([bump, bump.T]).flatten(1)

    def erase(self, points: Tensor, step: int) -> _Erased:
        """Set the windows of ``points``, ``[n, pixels]``, to the clean values, in place."""
        first, second = self.window(step, 0), self.window(step, 1)
        first_clean, second_clean = self.clean.gather(1, first), self.clean.gather(1, second)
        first_old = points.gather(1, first)
        points.scatter_(1, first, first_clean)
        # Only now, so that the cells that both windows share count once.
        second_old = points.gather(1, second)
        points.scatter_(1, second, second_clean)
        return _Erased(first, second, first_old, second_old, first_clean, second_clean)

    def refill(self, erased: _Erased, spare: Tensor, step: int) -> Tensor:
        """Return the first window's new perturbation, ``[n, cells]``, which is not clipped yet.

        It points to the middle between a bump of random sign and the old perturbation.

        Args:
            erased: the two windows.
            spare: ``[n, 1]``, what the whole perturbation is below the budget.
            step: which of the windows drawn.
        """
        shape = self.signs.shape[1:3]  # [n, channels]
        old = (erased.first_old - erased.first_clean).view(*shape, -1)
        given_up = (erased.second_old - erased.second_clean).view(*shape, -1)
        used = self.budget_of(old)
        bumps = self.bumps[self.turns[step], None] * self.signs[step]
        direction = bumps + old / (self.length_of(used) + LENGTH_OFFSET)
        length = self.length_of(self.budget_of(direction))
        direction = torch.where(length > CANCELLED, direction / (length + LENGTH_OFFSET), bumps)
        budget = spare[:, None] / shape[1] + used + self.budget_of(given_up)
        return (direction * self.length_of(budget.clamp(min=0))).flatten(1)

    def budget_of(self, values: Tensor) -> Tensor:
        """Return what adds up to the budget over the last dimension: squares in L2, sizes in L1."""
        parts = values.square() if self.problem.threat.norm == "L2" else values.abs()
        return parts.sum(-1, keepdim=True)

    def length_of(self, budget: Tensor) -> Tensor:
        return budget.sqrt() if self.problem.threat.norm == "L2" else budget


class _L2Search(_BumpSearch):
    """The first window takes what both windows held and what the ball has to spare.

    The official code divides the result by its length over eps. That is 1 up to rounding: the
    squares outside of the windows, those given up and those to spare add up to eps^2. Without the
    division nothing changes outside of the windows, and rounding errors do not build up, because
    what is to spare may be negative.
    """

    def __init__(self, problem: Problem, restart: int) -> None:
        delta = normalized(_tiles(problem, restart)) * problem.threat.eps
        super().__init__(problem, restart, (problem.inputs + delta).clamp(0, 1))

    def propose(self, step: int) -> Tensor:
        flat = self.points.view_as(self.clean)
        spare = self.problem.threat.eps**2 - self.budget_of(flat - self.clean)
        self.erased = self.erase(flat, step)
        self.new = (self.erased.first_clean + self.refill(self.erased, spare, step)).clamp_(0, 1)
        flat.scatter_(1, self.erased.first, self.new)
        return self.points

    def settle(self, accepted: Tensor) -> None:
        flat, erased, accepted = self.points.view_as(self.clean), self.erased, accepted[:, None]
        # The second window first: its old values lack what the first one held.
        second = erased.second_clean.where(accepted, erased.second_old)
        flat.scatter_(1, erased.second, second)
        flat.scatter_(1, erased.first, self.new.where(accepted, erased.first_old))


class _L1Search(_BumpSearch):
    """Each channel of the first window takes the budget of all; the projection shrinks the rest.

    It shrinks values outside of the windows too, so that whole points are proposed.
    """

    def __init__(self, problem: Problem, restart: int) -> None:
        delta = _project_l1(_tiles(problem, restart), problem)
        super().__init__(problem, restart, problem.inputs + delta)
        self.proposed = self.points.clone()

    def take(self, rows: Tensor) -> None:
        super().take(rows)
        self.proposed = self.points.clone()

    def propose(self, step: int) -> Tensor:
        flat = self.proposed.copy_(self.points).view_as(self.clean)
        spare = self.problem.threat.eps - self.budget_of(flat - self.clean)
        erased = self.erase(flat, step)
        delta = flat - self.clean
        delta.scatter_(1, erased.first, self.refill(erased, spare, step) * self.points.shape[1])
        delta = _project_l1(delta.view_as(self.points), self.problem)
        return torch.add(self.problem.inputs, delta, out=self.proposed)

    def settle(self, accepted: Tensor) -> None:
        # Weights of exactly 0 and 1 give exactly one or the other, faster than a mask does.
        weights = accepted.view(-1, 1, 1, 1).to(self.points.dtype)
        self.points.lerp_(self.proposed, weights)


_SEARCHES: dict[Norm, Callable[[Problem, int], _Search]] = {
    "Linf": _LinfSearch,
    "L2": _L2Search,
    "L1": _L1Search,
}


def _project_l1(delta: Tensor, problem: Problem) -> Tensor:
    return project(delta, problem.inputs, norm="L1", eps=problem.threat.eps * L1_RADIUS)


def _stripes(problem: Problem, restart: int) -> Tensor:
    """Return the start of Linf: +eps or -eps for each sample, channel and column, clipped."""
    channels, _, width = problem.inputs.shape[1:]
    keys, shape = problem.keys(restart), torch.Size([channels, 1, width])
    signs = _signs(uniform(keys, shape, dtype=problem.inputs.dtype))
    return (problem.inputs + problem.threat.eps * signs).clamp(0, 1)


def _tiles(problem: Problem, restart: int) -> Tensor:
    """Return the perturbation that L2 and L1 start from: bumps side by side, not scaled yet."""
    size, channels, height, width = problem.inputs.shape
    side = max(min(height, width) // TILES, 1)
    rows, columns = height // side, width // side
    keys, shape = problem.keys(restart), torch.Size([channels + 1, rows, columns])
    noise = uniform(keys, shape, dtype=problem.inputs.dtype)
    bump = _bump(side, problem.threat.norm, like=noise)
    bumps = torch.stack([bump, bump.T])[(noise[:, -1] > 0.5).long()]
    tiles = _signs(noise[:, :-1])[..., None, None] * bumps.unsqueeze(1)
    image = tiles.transpose(3, 4).reshape(size, channels, rows * side, columns * side)
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    right, bottom = width - columns * side - left, height - rows * side - top
    return functional.pad(image, (left, right, top, bottom))


def _bump(side: int, norm: Norm, *, like: Tensor) -> Tensor:
    """Return eta of the paper, ``[side, side]`` of length 1: a hill above and a valley below."""
    upper = side // 2
    bump = torch.cat(
        [_hill(upper, side, norm, like=like), -_hill(side - upper, side, norm, like=like)]
    )
    return bump / lp_norm(bump[None], norm)[0]


def _hill(height: int, width: int, norm: Norm, *, like: Tensor) -> Tensor:
    """Return nested squares around the middle, each 1 / k^DECAY high, scaled to length 1."""
    middles = (height // 2, width // 2)
    down, across = (
        (torch.arange(size, device=like.device) - middle).abs()
        for size, middle in zip((height, width), middles, strict=True)
    )
    distances = torch.maximum(down.unsqueeze(1), across)
    steps = torch.arange(1, max(middles) + 2, device=like.device, dtype=like.dtype)
    heights = (steps ** -DECAY[norm]).flip(0).cumsum(0).flip(0)
    hill = heights[distances]
    return hill / lp_norm(hill[None], norm)[0]


def _signs(noise: Tensor) -> Tensor:
    """Turn uniform noise, which is never 1/2, into +1 and -1."""
    return (2 * noise - 1).sign()
