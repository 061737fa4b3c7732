"""Robust instances, first step: measure every training instance, clean and perturbed.

Method: "Characterizing the Impacts of Instances on Robustness" (Findings of ACL 2023,
2023.findings-acl.146), authors' code ``ruizheng20/robust_data``, here for images. A model is
measured in eval mode and left exactly as it was: modes, flags, gradients and random state. Only the
gradient to the input is computed, of the sum over instances, so that no number depends on the batch
or on how many workers share the work.

With K updates from the instance itself a perturbation costs K + 1 forwards and K backwards to the
input, the clean pass included: its gradient is that of the first update. The authors' code takes
K + 2 forwards and K + 1 full backwards, about three times the work.

Note:
    The authors measure clean with dropout off and perturbed with dropout on, let the number of
    updates be K - 1, and normalise the gradient of the batch's mean loss with a floor, so that
    confident instances barely move. None of that is kept; ``legacy_steps`` gives K - 1 updates.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustft.attacks import attack_mode
from robustft.attacks.losses import margin
from robustft.attacks.projections import l2_norm
from robustft.data.base import Split
from robustft.data.random import derive_seed, uniform
from robustft.errors import ConfigError
from robustft.methods.instance_perturbations import (
    IDENTITY,
    PATCH_IDENTITY,
    EmbeddingPerturbation,
    GradientPerturbation,
    PatchPerturbation,
    Perturbation,
    perturbation_parameters,
)
from robustft.methods.instance_transforms import check_pixels, transform
from robustft.models.patches import patch_model
from robustft.training.loaders import rows
from robustft.training.precision import full_float32

__all__ = [
    "Collected",
    "MakeSurface",
    "Surface",
    "Target",
    "collect",
    "collect_batches",
    "image_surface",
    "log_odds",
    "patch_surface",
    "pixel_surface",
    "shard_positions",
]

Target = Literal["gold", "pred"]
Inputs = Tensor | Mapping[str, Tensor]

# What a model is shown.


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Surface:
    """A batch as a perturbation sees it.

    Args:
        base: what is perturbed, float ``[n, ...]``: pixels, or embeddings of patches or words.
        forward: perturbed base -> logits ``[n, classes]``; all other model inputs (masks, token
            types) are the same in every call, the clean one included.
        unit_box: whether the base must stay in [0, 1].
        free: bool, broadcastable to ``base``: what may be perturbed; None: everything.
    """

    base: Tensor
    forward: Callable[[Tensor], Tensor]
    unit_box: bool
    free: Tensor | None = None


def pixel_surface(model: nn.Module, inputs: Inputs) -> Surface:
    """Return images as a surface: the one place where an image model is called.

    Raises:
        ConfigError: the batch is a mapping, as text is.
        DataError: the images are not float in [0, 1].
    """
    if not isinstance(inputs, Tensor):
        raise ConfigError("pixels can be perturbed in images only: give another surface for text")
    check_pixels(inputs, "clean")
    dtype = _dtype_of(model)

    def forward(point: Tensor) -> Tensor:
        logits: Tensor = model(point.to(dtype))
        return logits

    return Surface(base=inputs, forward=forward, unit_box=True)


def patch_surface(model: nn.Module, inputs: Inputs) -> Surface:
    """Return the patch embeddings of images as a surface.

    Raises:
        ConfigError: the model is not known to have any, or the batch is a mapping.
        DataError: the images are not float in [0, 1].
    """
    pixels = pixel_surface(model, inputs).base.to(_dtype_of(model))
    embedded = patch_model(model)
    with torch.no_grad():
        base = embedded.embed(pixels)
    return embedding_surface(base, lambda point: embedded.from_embeddings(point, pixels))


def embedding_surface(
    base: Tensor, forward: Callable[[Tensor], Tensor], *, free: Tensor | None = None
) -> Surface:
    """Return embeddings ``[n, length, width]`` as a surface on which steps are taken in float32.

    Those of a half-precision model would be rounded away.
    """
    given, taken = base.dtype, torch.promote_types(base.dtype, torch.float32)
    return Surface(
        base=base.to(taken),
        forward=lambda point: forward(point.to(given)),
        unit_box=False,
        free=free,
    )


MakeSurface = Callable[[Any, Any], Surface]
"""(bare model, inputs) -> what a perturbation sees."""


def image_surface(perturbation: Perturbation) -> MakeSurface:
    """Return how a perturbation sees images.

    Raises:
        ConfigError: it is one of word embeddings.
    """
    if isinstance(perturbation, EmbeddingPerturbation):
        raise ConfigError(
            "an EmbeddingPerturbation is for text: perturb images in pixels, or in patch "
            "embeddings with a PatchPerturbation (per: image or patch)"
        )
    in_patches = isinstance(perturbation, PatchPerturbation) or perturbation == PATCH_IDENTITY
    return patch_surface if in_patches else pixel_surface


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((value.dtype for value in model.parameters()), torch.float32)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Collected:
    """What a shard's instances measured.

    Args:
        columns: ``[m]`` each, one row per instance and perturbation: as ``StatisticsFolder``
            writes them.
        num_forwards, num_backwards: passes of single instances. With G gradient perturbations of
            K updates from zero, C transformations and N instances: (1 + G K + C) N forwards and
            ((K - 1) G + 1) N backwards, the first gradient being common to all (G > 0). A random
            start takes one more of either. Pixels and patches have a clean pass and a first
            gradient each. A row that only keeps ranks in step is counted too.
    """

    columns: dict[str, NDArray[np.generic]]
    num_forwards: int
    num_backwards: int


# Measuring.


def collect(
    model: nn.Module,
    split: Split,
    *,
    perturbations: Sequence[Perturbation],
    record: int = 0,
    batch_size: int = 256,
    target: Target = "gold",
    seed: int = 0,
    device: torch.device | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Collected:
    """Measure one worker's share of a split of images.

    Args:
        model: the bare model, pixels in [0, 1] -> logits; left as it was.
        split: the examples.
        perturbations: what is done to them; codes in the result are positions in this sequence.
        record: number of the record; only random starts depend on it.
        batch_size: images at a time; it never changes the result.
        target: "gold" labels, or the clean "pred"iction, which losses are measured against.
        seed: of random starts and transformations.
        device: where the model is; None: the CPU.
        rank, world_size: which share; each has the same number of passes.

    Raises:
        ConfigError: a perturbation is unknown or makes no sense for such images.
        DataError: images are not in [0, 1], clean or perturbed.
    """
    device = device or torch.device("cpu")
    # Steps of a half-precision model are taken in float32: its own would round them away.
    dtype = torch.float64 if _dtype_of(model) == torch.float64 else torch.float32
    positions, valid = shard_positions(split, rank=rank, world_size=world_size)

    def batches() -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        for first in range(0, len(positions), batch_size):
            images, labels, ids = rows(split, positions[first : first + batch_size], device=device)
            yield images.to(dtype), labels, ids

    return collect_batches(
        model,
        batches(),
        count=valid,
        perturbations=perturbations,
        record=record,
        target=target,
        seed=seed,
    )


def shard_positions(split: Split, *, rank: int, world_size: int) -> tuple[NDArray[np.int64], int]:
    """Return the rank's positions, every world_size-th in id order, and how many of them count.

    Ranks that would have one row fewer get the first row once more, which does not count: all make
    the same number of passes, as a model whose parameters are spread over ranks needs.
    """
    if len(split) == 0:
        raise ConfigError("the split is empty: there is nothing to measure")
    order = np.argsort(split.ids, kind="stable")
    mine = order[rank::world_size]
    longest = -(-len(split) // world_size)
    padding = np.repeat(order[:1], longest - len(mine))
    return np.concatenate([mine, padding]).astype(np.int64), len(mine)


@full_float32()
def collect_batches(
    model: nn.Module,
    batches: Iterable[tuple[Inputs, Tensor, Tensor]],
    *,
    count: int,
    perturbations: Sequence[Perturbation],
    surface_of: Callable[[Perturbation], MakeSurface] = image_surface,
    record: int = 0,
    target: Target = "gold",
    seed: int = 0,
) -> Collected:
    """Measure batches of (inputs, labels, ids), of which the first ``count`` rows are kept.

    The core of ``collect``: ``surface_of`` says what a batch looks like to a perturbation.
    """
    perturbation_parameters(perturbations)
    spaces: dict[MakeSurface, list[tuple[int, Perturbation]]] = {}
    for code, perturbation in enumerate(perturbations):
        spaces.setdefault(surface_of(perturbation), []).append((code, perturbation))
    parts: list[dict[str, NDArray[np.generic]]] = []
    passes = _Passes()
    devices = {value.device.index for value in model.parameters() if value.is_cuda}
    with torch.random.fork_rng(devices=[index for index in devices if index is not None]):
        left = count
        for inputs, labels, ids in batches:
            measured: list[dict[str, NDArray[np.generic]]] = []
            with attack_mode(model), _same_attention():
                for surface, chosen in spaces.items():
                    batch = _Batch(surface(model, inputs), labels, ids, target, passes)
                    measured += batch.measure(chosen, record=record, seed=seed)
            kept = min(len(labels), left)
            left -= kept
            parts.extend(
                {name: column[:kept] for name, column in part.items()} for part in measured
            )
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Collected(columns=columns, num_forwards=passes.forwards, num_backwards=passes.backwards)


@contextlib.contextmanager
def _same_attention() -> Iterator[None]:
    """Let ``nn.MultiheadAttention`` compute alike with and without gradients.

    Its fast path, which only passes without gradients take, rounds otherwise: the control would not
    be exactly 0.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@dataclasses.dataclass(slots=True)
class _Passes:
    """Passes of single instances so far."""

    forwards: int = 0
    backwards: int = 0


class _Batch:
    """A batch being measured: its surface, its targets, and what the clean pass gave."""

    def __init__(
        self, surface: Surface, labels: Tensor, ids: Tensor, target: Target, passes: _Passes
    ) -> None:
        base = surface.base.detach().clone()
        self.surface = dataclasses.replace(surface, base=base)
        self.labels, self.ids, self.target, self.passes = labels, ids, target, passes

    def measure(
        self, perturbations: Sequence[tuple[int, Perturbation]], *, record: int, seed: int
    ) -> list[dict[str, NDArray[np.generic]]]:
        """Return the rows of every (code, perturbation)."""
        clean_logits, targets, gradient = self._clean([one for _, one in perturbations])
        clean = _numbers(clean_logits, self.labels, targets)
        found = []
        for code, perturbation in perturbations:
            point = self._perturbed(perturbation, targets, gradient, record=record, seed=seed)
            with torch.no_grad():
                perturbed = _numbers(self._forward(point), self.labels, targets)
            values = {
                "instance_id": self.ids,
                "perturbation": torch.full_like(self.ids, code),
                "label": self.labels,
                **{f"clean_{name}": value for name, value in clean.items()},
                **{f"pert_{name}": value for name, value in perturbed.items()},
                "delta_norm": self._length(perturbation, point),
            }
            found.append({name: value.cpu().numpy() for name, value in values.items()})
        return found

    def _clean(self, perturbations: Sequence[Perturbation]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return clean logits, targets and, if any perturbation starts there, the gradient."""
        needed = any(
            isinstance(one, GradientPerturbation) and one.updates and not one.start_size
            for one in perturbations
        )
        if not needed:
            with torch.no_grad():
                logits = self._forward(self.surface.base)
            return logits, self._targets(logits), None
        base = self.surface.base.clone().requires_grad_()
        logits = self._forward(base)
        targets = self._targets(logits.detach())
        return logits.detach(), targets, self._backward(logits, targets, base)

    def _targets(self, logits: Tensor) -> Tensor:
        return self.labels if self.target == "gold" else logits.argmax(dim=1)

    def _perturbed(
        self,
        perturbation: Perturbation,
        targets: Tensor,
        gradient: Tensor | None,
        *,
        record: int,
        seed: int,
    ) -> Tensor:
        base = self.surface.base
        if isinstance(perturbation, GradientPerturbation):
            return self._climb(perturbation, targets, gradient, record=record, seed=seed)
        if perturbation in (IDENTITY, PATCH_IDENTITY):
            # Through the same computation as every other perturbation, by a step of length 0.
            return base + torch.zeros_like(base)
        if not self.surface.unit_box:
            raise ConfigError(f"{perturbation!r} transforms images: use it on those only")
        with torch.no_grad():
            return transform(base, perturbation, sample_ids=self.ids, seed=seed)

    def _climb(
        self,
        perturbation: GradientPerturbation,
        targets: Tensor,
        gradient: Tensor | None,
        *,
        record: int,
        seed: int,
    ) -> Tensor:
        """Return the last point of the ascent."""
        base = self.surface.base
        free = torch.ones_like(base)
        if self.surface.free is not None:
            free = free * self.surface.free
        delta = torch.zeros_like(base)
        if perturbation.start_size:
            # Counted entry by entry: the padding behind a sentence does not change its noise.
            key = derive_seed(seed, "instance start", perturbation.name, record)
            noise = 2 * uniform(key, self.ids, tuple(base.shape[1:]), dtype=base.dtype) - 1
            delta = self._boxed(perturbation.start(noise, free))
        for update in range(perturbation.updates):
            if update > 0 or perturbation.start_size or gradient is None:
                point = (base + delta).requires_grad_()
                gradient = self._backward(self._forward(point), targets, point)
            step = perturbation.step * perturbation.uphill(gradient * free)
            delta = self._boxed(perturbation.within(delta + step))
        return (base + delta).clamp(0, 1) if self.surface.unit_box else base + delta

    def _boxed(self, delta: Tensor) -> Tensor:
        """Move a perturbation into the box; it lies in its ball, and only becomes shorter."""
        if not self.surface.unit_box:
            return delta
        return torch.clamp(delta, -self.surface.base, 1 - self.surface.base)

    def _length(self, perturbation: Perturbation, point: Tensor) -> Tensor:
        """Return the L2 length of a perturbation, ``[n]``; NaN for a transformation."""
        if isinstance(perturbation, str) and perturbation not in (IDENTITY, PATCH_IDENTITY):
            return torch.full(self.ids.shape, math.nan, device=self.ids.device)
        return l2_norm(point - self.surface.base).flatten()

    def _forward(self, point: Tensor) -> Tensor:
        self.passes.forwards += len(self.ids)
        logits = self.surface.forward(point)
        if logits.dtype not in (torch.float32, torch.float64):
            logits = logits.float()
        return logits

    def _backward(self, logits: Tensor, targets: Tensor, point: Tensor) -> Tensor:
        """Return the gradient of the ascent's objective, the sum over instances.

        Only the direction per instance is used, and that of the cross-entropy is the one of
        ``log_odds``, whose size does not vanish where the model is sure.
        """
        self.passes.backwards += len(self.ids)
        (gradient,) = torch.autograd.grad(log_odds(logits, targets).sum(), point)
        return gradient


def log_odds(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log((1 - p) / p) of the target's probability p, ``[n]``.

    Its gradient is that of the cross-entropy, -log p, divided by 1 - p: the same direction for each
    instance. In float32 the cross-entropy's is exactly 0 where p rounds to 1, and the instance
    would look robust because it cannot be attacked.
    """
    rows_ = targets.unsqueeze(1)
    others = logits.scatter(1, rows_, -math.inf).logsumexp(dim=1)
    return others - logits.gather(1, rows_).squeeze(1)


def _numbers(logits: Tensor, labels: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return what is stored of a pass, ``[n]`` each."""
    gold = labels.unsqueeze(1)
    return {
        "loss": nn.functional.cross_entropy(logits, targets, reduction="none"),
        "logit": logits.gather(1, gold).squeeze(1),
        "margin": -margin(logits, labels),
        "prob": logits.softmax(dim=1).gather(1, gold).squeeze(1),
        "pred": logits.argmax(dim=1),
    }
