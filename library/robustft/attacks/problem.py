"""A batch under attack: what the inner functions of every attack share."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from robustft.attacks.losses import LossFunction, TargetedLoss, resolve_loss
from robustft.attacks.mode import Model, attack_mode
from robustft.attacks.noise import run_seed, sample_keys
from robustft.attacks.projections import lp_norm, project
from robustft.data.random import mix
from robustft.errors import ConfigError
from robustft.threat import NORMS, Norm, ThreatModel, parse_number

__all__ = ["Problem", "check_count", "check_step_size", "zero_gradient"]

START_TOLERANCE = (
    1e-5  # relative: a start that is out of the ball by rounding only is kept as it is
)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Model, data, threat and randomness of one attack call.

    Args:
        attack: name of the attack; its noise depends on it.
        model: gives logits.
        inputs: clean inputs ``[n, ...]`` in [0, 1], in the dtype of the step arithmetic: float64
            stays, everything else is float32.
        labels: int64 ``[n]``.
        threat: norm and radius.
        loss: what is maximised.
        seed: int64 ``[]``.
        sample_ids: int64 ``[n]``.
        dtype: what the model is given.
        highest_label: the largest label, or None where looking would cost a synchronisation.
        targets: int64 ``[n]``, the classes that a targeted loss drives the samples to.
        targeted_loss: what is maximised instead of ``loss`` if there are targets.
    """

    attack: str
    model: Model
    inputs: Tensor
    labels: Tensor
    threat: ThreatModel
    loss: LossFunction
    seed: Tensor
    sample_ids: Tensor
    dtype: torch.dtype
    highest_label: int | None = None
    targets: Tensor | None = None
    targeted_loss: TargetedLoss | None = None

    @classmethod
    def build(
        cls,
        attack: str,
        model: Model,
        inputs: Tensor,
        labels: Tensor,
        *,
        norm: Norm,
        eps: float | str,
        loss: str | LossFunction,
        generator: torch.Generator | None,
        sample_ids: Tensor | None,
        norms: Sequence[Norm] = NORMS,
    ) -> "Problem":
        """Check the arguments of an attack and bring them into working form.

        ``norms`` are those that the attack supports.

        Raises:
            ConfigError: an argument cannot be used; the sentence says which and why.
        """
        threat = ThreatModel(norm, eps)  # type: ignore[arg-type]  # it converts "8/255" itself
        if threat.norm not in norms:
            raise ConfigError(
                f"{attack} does not support norm {threat.norm!r}: use "
                f"{' or '.join(map(repr, norms))} here, or apgd, whose {threat.norm} step is made "
                "for it"
            )
        _check_batch(inputs, labels, sample_ids)
        device, dtype = inputs.device, inputs.dtype
        if sample_ids is None:
            sample_ids = torch.arange(len(inputs), device=device)
        # Clones: tensors made under inference_mode cannot take part in autograd.
        return cls(
            attack=attack,
            model=model,
            inputs=inputs.detach().clone().to(_working_dtype(dtype)),
            labels=labels.detach().clone().to(device, torch.int64),
            threat=threat,
            loss=resolve_loss(loss),
            seed=run_seed(generator, device),
            sample_ids=sample_ids.to(device, torch.int64),
            dtype=dtype,
            highest_label=int(labels.max()) if device.type == "cpu" and len(labels) else None,
        )

    def take(self, rows: Tensor) -> "Problem":
        """Return the problem of the samples ``rows``, int64 ``[m]``."""
        return dataclasses.replace(
            self,
            inputs=self.inputs[rows],
            labels=self.labels[rows],
            sample_ids=self.sample_ids[rows],
            targets=None if self.targets is None else self.targets[rows],
        )

    def aimed(self, targets: Tensor, loss: TargetedLoss) -> "Problem":
        """Return the problem of maximising ``loss`` towards ``targets``, int64 ``[n]``."""
        return dataclasses.replace(self, targets=targets, targeted_loss=loss)

    def keys(self, restart: int, *, purpose: str = "start") -> Tensor:
        """Return the keys of the samples' noise, int64 ``[n]``; each target has its own."""
        stream = f"{self.attack}/{purpose}"
        ids = self.sample_ids if self.targets is None else mix(self.sample_ids) ^ self.targets
        return sample_keys(self.seed, stream=stream, restart=restart, sample_ids=ids)

    def given_start(self, start: Tensor) -> Tensor:
        """Return the caller's starting points, clipped to the box and moved into the ball.

        Raises:
            ConfigError: ``start`` has another shape than the inputs.
        """
        if start.shape != self.inputs.shape:
            raise ConfigError(
                f"start must have the shape of inputs {list(self.inputs.shape)}, "
                f"got {list(start.shape)}"
            )
        start = start.detach().clone().to(self.inputs).clamp(0, 1)
        delta = start - self.inputs
        lengths = delta.abs() if self.threat.norm == "Linf" else lp_norm(delta, self.threat.norm)
        outside = lengths > self.threat.eps * (1 + START_TOLERANCE) + torch.finfo(delta.dtype).eps
        inside = project(delta, self.inputs, norm=self.threat.norm, eps=self.threat.eps)
        return (self.inputs + inside).where(outside, start)

    def measure(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss ``[n]`` and correctness, bool ``[n]``, at ``points``: one forward."""
        with torch.no_grad():
            return self._evaluate(points)

    def differentiate(
        self, points: Tensor, *, repetitions: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, correctness and the loss's gradient: one forward, one input backward.

        The gradient is that of the *sum* over samples, so that samples do not interact. It is zero
        where the logits do not depend on the input. For models with noise inside, it is the mean
        over ``repetitions`` (expectation over transformation); loss and correctness are those of
        the last one, as in the official AutoAttack.
        """
        if repetitions > 1:
            found = [self.differentiate(points) for _ in range(repetitions)]
            gradients = torch.stack([gradient for _, _, gradient in found])
            return found[-1][0], found[-1][1], gradients.mean(dim=0)
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            loss, correct = self._evaluate(points)
            if not loss.requires_grad:
                return loss, correct, torch.zeros_like(points)
            (gradient,) = torch.autograd.grad(loss.sum(), points, materialize_grads=True)
        return loss.detach(), correct, gradient.detach()

    def logits(self, points: Tensor) -> Tensor:
        """Return the model's logits ``[n, classes]`` in the working precision.

        Raises:
            ConfigError: these are no logits of the problem's classes.
        """
        logits = self.model(points.to(self.dtype))
        if logits.ndim != 2 or logits.shape[0] != len(points) or logits.shape[1] < 2:
            raise ConfigError(
                f"the model must return logits [{len(points)}, classes] with at least 2 classes, "
                f"got {list(logits.shape)}"
            )
        if self.highest_label is not None and self.highest_label >= logits.shape[1]:
            raise ConfigError(
                f"labels go up to {self.highest_label}, but the model has {logits.shape[1]} "
                "classes: the model belongs to other data"
            )
        return logits.to(_working_dtype(logits.dtype))

    def _evaluate(self, points: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(points)
        if self.targets is None or self.targeted_loss is None:
            loss = self.loss(logits, self.labels)
        else:
            loss = self.targeted_loss(logits, self.labels, self.targets)
        return loss, logits.argmax(dim=1) == self.labels


def zero_gradient(
    model: Model, inputs: Tensor, labels: Tensor, *, loss: str | LossFunction = "dlr"
) -> Tensor:
    """Return bool ``[n]``: correctly classified, but with no gradient at all to the input.

    Attacks by gradient are blind there, and their robust accuracy means nothing: one of the
    warning signs of the official AutoAttack.

    Note:
        The official check looks at the random start of APGD and counts misclassified points too,
        whose DLR gradient is often zero for no bad reason; this one looks at correct clean points.
    """
    with attack_mode(model):
        problem = Problem.build(
            "zero_gradient",
            model,
            inputs,
            labels,
            norm="Linf",
            eps=0.0,
            loss=loss,
            generator=None,
            sample_ids=None,
        )
        _, correct, gradient = problem.differentiate(problem.inputs)
    return correct & ~gradient.flatten(1).any(dim=1)


def check_count(name: str, value: int) -> int:
    """Return ``value`` if it is a whole number >= 1.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number >= 1, got {value!r}")
    return value


def check_step_size(value: float | str) -> float:
    """Return a step size (fractions such as "2/255" are read) if it is finite and >= 0.

    Raises:
        ConfigError: it is not.
    """
    step_size = parse_number(value)
    if not (math.isfinite(step_size) and step_size >= 0):
        raise ConfigError(f"step_size must be a finite number >= 0, got {value!r}")
    return step_size


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_batch(inputs: Tensor, labels: Tensor, sample_ids: Tensor | None) -> None:
    if not inputs.is_floating_point() or inputs.ndim < 2:
        raise ConfigError(
            f"inputs must be floating point [n, ...] in [0, 1], got {inputs.dtype} "
            f"{list(inputs.shape)}"
        )
    if labels.is_floating_point() or labels.shape != inputs.shape[:1]:
        raise ConfigError(
            f"labels must be class indices [{len(inputs)}], got {labels.dtype} {list(labels.shape)}"
        )
    if sample_ids is not None and sample_ids.shape != labels.shape:
        raise ConfigError(
            f"sample_ids must be [{len(inputs)}], one per input, got {list(sample_ids.shape)}"
        )
    # Only on the CPU, where looking at values costs no synchronisation with a device.
    if inputs.device.type == "cpu" and labels.numel() and labels.min() < 0:
        raise ConfigError(f"labels must be class indices >= 0, got {labels.min()}")
    if inputs.device.type == "cpu" and inputs.numel():
        low, high = inputs.aminmax()
        # Written so that NaN, which compares as False, is caught as well.
        if not (low >= 0 and high <= 1):
            raise ConfigError(
                f"inputs must lie in [0, 1], got {low:.3g} to {high:.3g}: make normalisation the "
                "first layer of the model"
            )
