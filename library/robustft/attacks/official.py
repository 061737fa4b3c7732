"""A second opinion: AutoAttack as the package ``pyautoattack`` ships it, behind our interface.

F. Croce and M. Hein, 2020, arXiv 2003.01690; the package carries the authors' attack code.
"""

import functools
import importlib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from robustft.attacks.autoattack import AutoAttackResult, Version
from robustft.attacks.problem import Problem
from robustft.errors import ConfigError

__all__ = ["official_autoattack"]

logger = logging.getLogger(__name__)

MIN_CLASSES = {"dlr": 3, "dlr-targeted": 4}  # with fewer the package fails with an index error
TILES = 5  # along the height, where Square starts for L2 and L1


def official_autoattack(
    problem: Problem,
    *,
    version: Version,
    plan: Mapping[str, Mapping[str, Any]],
    batch_size: int,
    seed: int,
) -> AutoAttackResult:
    """Run the package's attacks one after the other, each on the samples still standing.

    Args:
        problem: the batch, with the margin as its loss.
        version: name of the plan, for messages.
        plan: what ``attack_plan`` gave; each of its attacks runs with the package's class for it.
        batch_size: samples that the package sees at once, >= 1.
        seed: what the package seeds the global generators with before each attack on each batch;
            their states are put back afterwards.

    Returns:
        As ``autoattack``. ``robust`` and ``loss`` come from classifying the returned points once
        more, clipped to [0, 1], and the counts from watching the model. L1 points may exceed
        ``eps`` by the rounding of float32 sums (relative 1e-5), as the package's arithmetic does.

    Raises:
        ConfigError: the package is not installed, or cannot attack such a model or such inputs.

    Note:
        The order, the rounds over what is standing and the re-classification are those of the
        package's own driver. Left out are its checks of the model, which only warn, and which an
        evaluation makes itself. It computes in float32 whatever the inputs are. Targets are capped
        at the number of classes - 1 (said in the log), where the package fails. A result depends
        on ``batch_size``, because noise is drawn by position in the batch.
    """
    package = _package()
    loss, robust, num_classes = _classify_clean(problem, batch_size)
    _check_fit(problem, version=version, plan=plan, num_classes=num_classes)
    points = problem.inputs.clone()
    num_forwards, num_backwards = 1, 0
    total_forwards, total_backwards = len(robust), 0
    standing: dict[str, int] = {}
    for name, step in plan.items():
        forwards = backwards = 0
        alive = robust.nonzero().flatten()
        for rows in torch.split(alive, batch_size) if len(alive) else ():
            part = problem.take(rows)
            watched = _Watched(part)
            attack = _attack(package, watched, step, num_classes=num_classes, seed=seed)
            found = _perturb(attack, part).to(points.dtype).clamp(0, 1)
            new_loss, survived = part.measure(found)
            forwards = max(forwards, watched.calls + 1)
            backwards = max(backwards, watched.backward_calls)
            total_forwards += watched.samples + len(rows)
            total_backwards += watched.backward_samples
            broken = ~survived
            points[rows[broken]] = found[broken]
            loss[rows[broken]] = new_loss[broken]
            robust[rows[broken]] = False
        num_forwards += forwards
        num_backwards += backwards
        standing[name] = int(robust.sum())
    return AutoAttackResult(
        inputs=points.to(problem.dtype),
        robust=robust,
        loss=loss,
        num_forwards=num_forwards,
        num_backwards=num_backwards,
        total_forwards=total_forwards,
        total_backwards=total_backwards,
        standing=standing,
    )


class _Watched:
    """The model as the package sees it: passes are counted, gradients reach the input only."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.calls = self.samples = self.backward_calls = self.backward_samples = 0

    def __call__(self, points: Tensor) -> Tensor:
        self.calls += 1
        self.samples += len(points)
        if torch.is_grad_enabled() and points.requires_grad:
            logits: Tensor = _ToInput.apply(points, self)
            return logits
        with torch.no_grad():
            # A copy, because Square writes into the logits.
            return self.problem.logits(points).float().clone()


class _ToInput(torch.autograd.Function):
    """A forward whose gradient ends at the input.

    FAB calls plain ``backward()``, which would add to the ``.grad`` of every parameter that a
    function given as the model holds; and the package fails on logits that do not depend on the
    input, whose gradient is zero here.
    """

    @staticmethod
    def forward(ctx: Any, points: Tensor, watched: _Watched) -> Tensor:
        ctx.watched = watched
        with torch.enable_grad():
            ctx.points = points.detach().requires_grad_()
            ctx.logits = watched.problem.logits(ctx.points).float()
        logits: Tensor = ctx.logits.detach().clone()
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.watched.backward_calls += 1
        ctx.watched.backward_samples += len(ctx.points)
        if not ctx.logits.requires_grad:
            return torch.zeros_like(ctx.points), None
        # Retained because untargeted FAB goes back once for every class.
        (gradient,) = torch.autograd.grad(
            ctx.logits, ctx.points, gradients[0], retain_graph=True, materialize_grads=True
        )
        return gradient, None


def _package() -> Any:
    """Return the package, with its attack modules loaded."""
    try:
        return importlib.import_module("pyautoattack.autoattack")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != "pyautoattack":
            raise
        raise ConfigError(
            "backend 'pyautoattack' needs the extra: pip install 'robustft[autoattack]'"
        ) from error


def _attack(
    package: Any, model: _Watched, step: Mapping[str, Any], *, num_classes: int, seed: int
) -> Any:
    """Return the package's attack for one entry of a plan."""
    threat = model.problem.threat
    common = {
        "norm": threat.norm,
        "eps": threat.eps,
        "seed": seed,
        "device": model.problem.inputs.device,
        "n_restarts": step.get("num_restarts", 1),
    }
    targets = min(step.get("num_targets", 1), num_classes - 1)
    if step["attack"] == "square":
        return package.SquareAttack(
            model, n_queries=step["num_queries"], p_init=0.8, resc_schedule=False, **common
        )
    common["n_iter"] = step["num_steps"]
    if step["attack"] == "fab":
        targeted = step.get("targeted", True)
        return package.FABAttack_PT(model, targeted=targeted, n_target_classes=targets, **common)
    common |= {
        "eot_iter": step.get("eot_steps", 1),
        "use_largereps": step.get("large_eps_schedule", False),
        # Of its own and silent: it would warn of zero gradients at misclassified points too.
        "logger": logging.Logger("pyautoattack", level=logging.CRITICAL),
    }
    if step["loss"] == "dlr-targeted":
        return package.APGDAttack_targeted(model, n_target_classes=targets, **common)
    return package.APGDAttack(model, loss=step["loss"], **common)


def _perturb(attack: Any, part: Problem) -> Tensor:
    """Return the points that the package finds, detached, and leave the global generators alone."""
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if initialized else ()
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        found: Tensor = attack.perturb(part.inputs.float(), part.labels)
    return found.detach()


def _classify_clean(problem: Problem, batch_size: int) -> tuple[Tensor, Tensor, int]:
    """Return margins, correctness and the number of classes at the clean inputs."""
    losses, masks, num_classes = [], [], 0
    every = torch.arange(len(problem.labels), device=problem.labels.device)
    for rows in torch.split(every, batch_size):
        part = problem.take(rows)
        with torch.no_grad():
            logits = problem.logits(part.inputs)
        losses.append(problem.loss(logits, part.labels))
        masks.append(logits.argmax(dim=1) == part.labels)
        num_classes = logits.shape[1]
    return torch.cat(losses), torch.cat(masks), num_classes


def _check_fit(
    problem: Problem, *, version: Version, plan: Mapping[str, Mapping[str, Any]], num_classes: int
) -> None:
    square = any(step["attack"] == "square" for step in plan.values())
    if square and not _square_fits(problem):
        raise ConfigError(
            f"the Square attack of backend 'pyautoattack' cannot start at {problem.threat.norm} "
            f"inputs {list(problem.inputs.shape)}, because it is made for images and does not tile "
            "all sizes: use backend='native'"
        )
    needed = max(MIN_CLASSES.get(step.get("loss", ""), 2) for step in plan.values())
    if len(problem.labels) and num_classes < needed:
        raise ConfigError(
            f"version {version!r} of backend 'pyautoattack' needs at least {needed} classes, and "
            f"the model has {num_classes}: use backend='native'"
        )
    wanted = max(step.get("num_targets", 1) for step in plan.values())
    if len(problem.labels) and num_classes <= wanted:
        _log_fewer_targets(wanted, num_classes)


def _square_fits(problem: Problem) -> bool:
    """Return whether the package's first tiles lie within the images (L2, L1)."""
    if problem.inputs.ndim != 4:
        return False
    if problem.threat.norm == "Linf":
        return True
    height, width = problem.inputs.shape[2:]
    side = height // TILES
    margin = (height - TILES * side) // 2
    # Tiles of a single pixel that lie outside are empty and do no harm.
    return side == 1 or (
        side > 1 and all(margin + size // side * side <= size for size in (height, width))
    )


@functools.cache
def _log_fewer_targets(num_targets: int, num_classes: int) -> None:
    logger.warning(
        "the plan has %d targets and the model has %d classes: every other class is a target",
        num_targets,
        num_classes,
    )
