"""Robust instances: what is done to an instance, in pixels or in embeddings, while it is measured.

A perturbation knows its name, its steps and its ball; the model that gives the gradients is the
collector's (``instance_collector``). One of pixels and one of embeddings differ in what has a
length: an image, a sentence, or every token by itself.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from robustft.attacks.projections import into_ball_l2
from robustft.attacks.steps import normalized
from robustft.errors import ConfigError
from robustft.methods.instance_transforms import check_transform
from robustft.threat import ThreatModel
from robustft.training.checks import require_at_least, require_choice, require_range

__all__ = [
    "IDENTITY",
    "PATCH_IDENTITY",
    "EmbeddingPerturbation",
    "GradientPerturbation",
    "PatchPerturbation",
    "Perturbation",
    "perturbation_parameters",
]

Norm = Literal["Linf", "L2"]
Direction = Literal["steepest", "largest"]

IDENTITY = "identity"
"""The control that changes nothing: its differences are exactly 0, or something is wrong."""
PATCH_IDENTITY = "identity-patches"
"""The same control for the patch embeddings of an image."""

REACH = 2.5  # in units of eps: what all default steps add up to


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GradientPerturbation:
    """Steps up the loss, to the worst the model can be shown near an instance."""

    norm: Norm = "Linf"
    """"Linf" or "L2"."""
    eps: float | None = 8 / 255
    """Radius in [0, 1] pixel units, > 0; None: not projected, as published (images stay in [0, 1]
    all the same)."""
    num_steps: int = 10
    """Number of updates, >= 1."""
    step_size: float | None = None
    """Length of a step, > 0. None: 2.5 eps / num_steps; needed without ``eps`` (published .08)."""
    direction: Direction = "steepest"
    """Of "Linf": "steepest" is the sign of the gradient; "largest" (published) divides it by its
    largest entry. L2 always divides it by its length."""
    start_size: float = 0.0
    """Random start, >= 0: uniform noise of this size in every entry (Linf), or divided by the root
    of their number (L2; published .05). 0: at the instance itself."""
    legacy_steps: bool = False
    """Published count: one update fewer than ``num_steps``."""

    def __post_init__(self) -> None:
        require_choice(self, "norm", Norm)
        require_choice(self, "direction", Direction)
        require_at_least(self, 1, "num_steps")
        require_range(self, 0, math.inf, "start_size")
        for name in ("eps", "step_size"):
            if getattr(self, name) is not None:
                require_range(self, 0, math.inf, name, open_low=True)
        if self.eps is None and self.step_size is None:
            raise ConfigError("eps = None: give step_size, the length of a step")
        if self.direction == "largest" and self.norm != "Linf":
            raise ConfigError("direction = 'largest' belongs to norm = 'Linf'")

    @property
    def updates(self) -> int:
        return self.num_steps - self.legacy_steps

    @property
    def step(self) -> float:
        """Length of a step."""
        if self.step_size is not None:
            return self.step_size
        assert self.eps is not None
        return REACH * self.eps / self.num_steps

    @property
    def name(self) -> str:
        """Such as "px-linf-k10-8/255", or without projection "px-l2-k8-step0.08"."""
        size = "" if self.eps is None else str(ThreatModel(self.norm, self.eps)).partition(" ")[2]
        return self._named("px", size)

    def uphill(self, gradient: Tensor) -> Tensor:
        """Return the direction of a step, ``[n, ...]`` as the gradient."""
        rows = self._rows(gradient)
        if self.norm == "L2":
            found = normalized(rows)
        elif self.direction == "steepest":
            found = rows.sign()
        else:
            largest = rows.flatten(1).abs().amax(dim=1).view(-1, *[1] * (rows.ndim - 1))
            found = rows / largest.clamp(min=torch.finfo(rows.dtype).tiny)
        return found.reshape(gradient.shape)

    def within(self, delta: Tensor) -> Tensor:
        """Return a perturbation ``[n, ...]`` moved into the ball, if there is one."""
        if self.eps is None:
            return delta
        if self.norm == "Linf":
            return delta.clamp(-self.eps, self.eps)
        return into_ball_l2(self._rows(delta), self.eps).reshape(delta.shape)

    def start(self, values: Tensor, free: Tensor) -> Tensor:
        """Return the random start that uniform ``values`` on (-1, 1) make.

        Args:
            values: ``[n, ...]``.
            free: of the same shape, 1 where noise may be and 0 elsewhere.
        """
        values = values * free
        if self.norm == "L2":
            # Of length start_size / sqrt(3) on average, however many entries there are.
            rows = self._rows(values)
            count = self._rows(free).flatten(1).sum(1).clamp(min=1)
            values = (rows / count.sqrt().view(-1, *[1] * (rows.ndim - 1))).reshape(values.shape)
        return self.within(self.start_size * values)

    def _rows(self, values: Tensor) -> Tensor:
        """Return ``values`` with what has a length as rows."""
        return values

    def _named(self, space: str, size: str, *extras: str) -> str:
        parts = [
            *extras,
            *(["largest"] if self.direction == "largest" else []),
            *(["legacy"] if self.legacy_steps else []),
            *([f"start{self.start_size:g}"] if self.start_size else []),
        ]
        size = size if self.eps is not None else f"step{self.step:g}"
        return "-".join([space, self.norm.lower(), f"k{self.num_steps}", size, *parts])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingPerturbation(GradientPerturbation):
    """Steps up the loss in the word embeddings of a sentence, special tokens included."""

    norm: Norm = "L2"
    """"L2" (published default) or "Linf"."""
    eps: float | None = 0.6
    """Radius in the units of the embeddings, > 0 (MiniLM's have a mean length of 1.07); None: not
    projected, as published. The published steps reach .61 at most."""
    num_steps: int = 8
    """Number of updates, >= 1."""
    step_size: float | None = None
    """Length of a step, > 0. None: 2.5 eps / num_steps; needed without ``eps`` (published .08)."""
    per: Literal["sentence", "token"] = "sentence"
    """What has a length: "sentence" (published), all its embeddings as one vector, so that those of
    a long sentence move less; "token": every embedding by itself."""

    def __post_init__(self) -> None:
        GradientPerturbation.__post_init__(self)
        require_choice(self, "per", Literal["sentence", "token"])

    @property
    def name(self) -> str:
        """Such as "emb-l2-k8-0.6", "emb-linf-k8-0.01-token", "emb-l2-k8-step0.08-legacy"."""
        return self._named("emb", f"{self.eps or 0:g}", *(["token"] if self.per == "token" else []))

    def _rows(self, values: Tensor) -> Tensor:
        return values.flatten(0, 1) if self.per == "token" else values


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PatchPerturbation(GradientPerturbation):
    """Steps up the loss in the patch embeddings of an image: what an EmbeddingPerturbation is to
    text.

    ``per`` has to be given: among attacks on images it tells this one from one in pixels.
    """

    norm: Norm = "L2"
    """"L2" or "Linf"."""
    eps: float | None = 0.6
    """Radius in the units of the embeddings, > 0, which belong to a model; None: not projected."""
    num_steps: int = 8
    """Number of updates, >= 1."""
    step_size: float | None = None
    """Length of a step, > 0. None: 2.5 eps / num_steps; needed without ``eps``."""
    per: Literal["image", "patch"]
    """What has a length: "image", all its embeddings as one vector, or every "patch" by itself."""

    def __post_init__(self) -> None:
        GradientPerturbation.__post_init__(self)
        require_choice(self, "per", Literal["image", "patch"])

    @property
    def name(self) -> str:
        """Such as "patch-l2-k8-0.6", or with a length for every patch "patch-l2-k8-0.6-each"."""
        return self._named(
            "patch", f"{self.eps or 0:g}", *(["each"] if self.per == "patch" else [])
        )

    def _rows(self, values: Tensor) -> Tensor:
        return values.flatten(0, 1) if self.per == "patch" else values


Perturbation = GradientPerturbation | str
"""A gradient perturbation, the name of a transformation ("blur-weak"), or a control."""


def perturbation_parameters(perturbations: Sequence[Perturbation]) -> dict[str, dict[str, Any]]:
    """Return name -> parameters, in order: what a manifest says of them.

    Raises:
        ConfigError: there is none, a name is unknown, or two have the same name.
    """
    found: dict[str, dict[str, Any]] = {}
    for perturbation in perturbations:
        if isinstance(perturbation, GradientPerturbation):
            name = perturbation.name
            parameters = {"kind": "gradient", **dataclasses.asdict(perturbation)}
            parameters |= {"updates": perturbation.updates, "step": perturbation.step}
        elif perturbation in (IDENTITY, PATCH_IDENTITY):
            name, parameters = perturbation, {"kind": IDENTITY}
        else:
            name = perturbation
            family, strength = check_transform(name)
            parameters = {"kind": "transform", "family": family, "strength": strength}
        if name in found:
            raise ConfigError(f"two perturbations are called {name!r}: leave one out")
        found[name] = parameters
    if not found:
        raise ConfigError("there is nothing to measure: name at least one perturbation")
    return found
