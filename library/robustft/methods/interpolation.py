"""RiFT's third step: the straight line between robust and fine-tuned weights, and where to stop.

Zhu, Hu, Wang, Xie, Yang, 2023, arXiv 2308.02533, algorithm 1, lines 22-29. ``rift.interpolated``
takes the step, after RiFT's own fine-tuning or any other method.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from robustft.data.base import Split
from robustft.errors import ConfigError
from robustft.methods.common import AttackConfig, craft
from robustft.models.start import Start
from robustft.threat import ThreatModel
from robustft.training.checks import require_at_least, require_choice, require_range
from robustft.training.loaders import rows
from robustft.training.precision import full_float32
from robustft.training.seeding import generator

__all__ = [
    "CurveConfig",
    "CurveWork",
    "InterpolateConfig",
    "RobustMetric",
    "check_curve",
    "curve_point",
    "interpolate",
    "require_line",
    "select_alpha",
]

ROUNDING = 1e-9
"""Slack in comparisons of accuracies: far below one image, far above float rounding."""

State = Mapping[str, Tensor]
RobustMetric = Literal["min_over_runs", "worst_case"]


class CurveConfig(Protocol):
    """The options of the interpolation: ``InterpolateConfig``, or RiFT's own of the same names."""

    @property
    def alphas(self) -> tuple[float, ...]: ...
    @property
    def tolerance(self) -> float: ...
    @property
    def curve_attack(self) -> AttackConfig: ...
    @property
    def curve_runs(self) -> int: ...
    @property
    def robust_metric(self) -> RobustMetric: ...
    @property
    def fresh_noise(self) -> bool: ...
    @property
    def eval_batch_size(self) -> int: ...
    @property
    def seed(self) -> int: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class InterpolateConfig:
    """RiFT's interpolation where the fine-tuning is another method's; names are RiFT's."""

    alphas: tuple[float, ...] = tuple(index / 10 for index in range(11))
    """Points of the interpolation, ascending from 0, at most 1."""
    tolerance: float = 0.001
    """How far robust accuracy may fall below the start's: a fraction, 0 to 1 (0.001 = 0.1
    points)."""
    curve_attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    """PGD that measures robustness along the interpolation, against the first threat model."""
    curve_runs: int = 3
    """Independent PGD runs per point, >= 1."""
    robust_metric: RobustMetric = "min_over_runs"
    """"min_over_runs": the lowest of the runs' accuracies (paper); "worst_case": an image counts
    if it survives every run (never higher)."""
    fresh_noise: bool = False
    """Published quirk: every point of the curve draws its own start noise."""
    eval_batch_size: int = 512
    """Images at a time, >= 1."""
    seed: int = 0
    """Of the attack's start noise, >= 0."""

    def __post_init__(self) -> None:
        check_curve(self)


def check_curve(config: CurveConfig) -> None:
    """Raise ConfigError if an option of the interpolation is out of range."""
    require_at_least(config, 1, "curve_runs", "eval_batch_size")
    require_at_least(config, 0, "seed")
    require_range(config, 0, 1, "tolerance")
    require_choice(config, "robust_metric", RobustMetric)
    alphas = config.alphas
    ascending = all(a < b for a, b in itertools.pairwise(alphas))
    if not alphas or alphas[0] != 0 or alphas[-1] > 1 or not ascending:
        raise ConfigError(
            f"alphas = {alphas!r}: must ascend from 0 and end at most at 1, e.g. [0, 0.5, 1]"
        )


def interpolate(state_a: State, state_b: State, alpha: float) -> dict[str, Tensor]:
    """Return ``(1 - alpha) * a + alpha * b`` of two state dicts (algorithm 1, line 24).

    Exact where it can be: alpha = 0 gives a, alpha = 1 gives b's floating-point entries, and an
    entry that is equal in both comes back bit for bit. BatchNorm's running statistics are
    interpolated like weights. Integer and boolean entries are always a's.

    Args:
        state_a, state_b: the same keys and shapes.
        alpha: in [0, 1].

    Returns:
        A new state dict that shares no memory with either.

    Raises:
        ConfigError: alpha outside [0, 1], or keys or shapes differ.

    Note:
        The authors' code also multiplies ``num_batches_tracked``, truncating it on loading.

    Example:
        >>> import torch
        >>> interpolate({"w": torch.tensor(1.0)}, {"w": torch.tensor(3.0)}, 0.25)
        {'w': tensor(1.5000)}
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha = {alpha!r}: must be a number >= 0 and <= 1")
    shapes_a = {name: value.shape for name, value in state_a.items()}
    shapes_b = {name: value.shape for name, value in state_b.items()}
    if shapes_a != shapes_b:
        different = sorted(
            name for name in {*shapes_a, *shapes_b} if shapes_a.get(name) != shapes_b.get(name)
        )
        raise ConfigError(
            f"cannot interpolate: the states differ in {', '.join(different)}; "
            "both must be of the same architecture"
        )
    return {
        name: (
            torch.lerp(a.detach(), state_b[name].detach().to(a), alpha)
            if alpha > 0 and a.is_floating_point()
            else a.detach().clone()
        )
        for name, a in state_a.items()
    }


def select_alpha(
    curve: Sequence[Mapping[str, float] | Sequence[float]], *, tolerance: float
) -> float:
    """Return the alpha with the highest clean accuracy among those that stay robust.

    Robust means: not more than ``tolerance`` below the robust accuracy at alpha 0. Of equally
    clean points the more robust one wins, then the smaller alpha. 0 if no point qualifies.

    Args:
        curve: rows with "alpha", "clean" and "robust", or (alpha, clean, robust) tuples, alpha 0
            among them; accuracies in one unit, on the *selection* split.
        tolerance: in the accuracies' unit, >= 0: 0.001 for 0.1 points of fractions.

    Raises:
        ConfigError: no row has alpha 0, or the tolerance is negative.

    Example:
        >>> select_alpha([(0, 0.80, 0.500), (0.5, 0.82, 0.4995), (1, 0.84, 0.45)], tolerance=1e-3)
        0.5
    """
    if not tolerance >= 0:
        raise ConfigError(f"tolerance = {tolerance!r}: must be a number >= 0")
    points = [
        (row["alpha"], row["clean"], row["robust"]) if isinstance(row, Mapping) else tuple(row)[:3]
        for row in curve
    ]
    at_start = [robust for alpha, _, robust in points if alpha == 0]
    if not at_start:
        raise ConfigError("the curve has no point at alpha 0, which the others are compared with")
    # Accuracies are counts over n; the slack decides "equal" as exact integers would.
    floor = at_start[0] - tolerance - ROUNDING
    qualified = [
        (round(clean / ROUNDING), round(robust / ROUNDING), -alpha)
        for alpha, clean, robust in points
        if robust >= floor and clean == clean
    ]
    return float(-max(qualified)[2]) + 0.0 if qualified else 0.0


def require_line(start: Start) -> None:
    """Raise ConfigError unless ``start`` can be the robust end of an interpolation."""
    if start.state is None or start.fresh_head:
        what = "fresh weights" if start.state is None else "a new head"
        raise ConfigError(
            f"the start has {what}, and an interpolation goes back to a robust model of the task: "
            "start from one, or leave the interpolation out"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CurveWork:
    """What measuring a point of the interpolation needs, wherever it runs.

    Args:
        start: the robust model.
        tuned: entries of the fine-tuned state that differ from the start's.
        split: the selection split.
        threat, config: the attack, its runs and noise.
        device: where it computes.
    """

    start: Start
    tuned: Mapping[str, Tensor]
    split: Split
    threat: ThreatModel
    config: CurveConfig
    device: str


@full_float32()
def curve_point(work: CurveWork, alpha: float) -> dict[str, Any]:
    """Return clean and robust accuracy (fractions) at one alpha: the unit of fan-out.

    Start noise depends on (seed, run, instance id), not on alpha, unless ``fresh_noise``: points
    are compared under common noise, since 0.1 points are less than what noise alone changes.
    """
    config, device = work.config, torch.device(work.device)
    model = work.start.build()
    state = model.state_dict()
    model.load_state_dict(interpolate(state, {**state, **work.tuned}, alpha))
    model.to(device).requires_grad_(False)
    noise = ("curve", str(alpha)) if config.fresh_noise else ("curve",)
    clean = torch.zeros((), dtype=torch.int64, device=device)
    survivors = torch.zeros((), dtype=torch.int64, device=device)
    by_run = torch.zeros(config.curve_runs, dtype=torch.int64, device=device)
    for begin in range(0, len(work.split), config.eval_batch_size):
        end = min(begin + config.eval_batch_size, len(work.split))
        positions = np.arange(begin, end, dtype=np.int64)
        inputs, labels, ids = rows(work.split, positions, device=device)
        clean += _correct(model, inputs, labels).sum()
        survived = torch.ones_like(labels, dtype=torch.bool)
        for run in range(config.curve_runs):
            adversarial = craft(
                model,
                inputs,
                labels,
                ids=ids,
                threat=work.threat,
                attack=config.curve_attack,
                start_noise=generator(config.seed, *noise, run),
            )
            correct = _correct(model, adversarial, labels)
            by_run[run] += correct.sum()
            survived &= correct
        survivors += survived.sum()
    count = len(work.split)
    min_over_runs, worst_case = int(by_run.min()) / count, int(survivors) / count
    return {
        "alpha": alpha,
        "clean": int(clean) / count,
        "robust": worst_case if config.robust_metric == "worst_case" else min_over_runs,
        "pgd_min_over_runs": min_over_runs,
        "pgd_worst_case": worst_case,
    }


@torch.no_grad()
def _correct(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    correct: Tensor = model(inputs).argmax(1) == labels
    return correct
