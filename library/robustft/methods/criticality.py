"""Module robust criticality (MRC): how much robust loss a small move of one layer can cost.

Zhu, Hu, Wang, Xie, Yang, "Improving Generalization of Adversarial Training via Robust Critical
Fine-Tuning", 2023, arXiv 2308.02533, definition 3.1 and algorithm 1 (lines 1-19).
"""

import copy
import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from robustft.errors import ConfigError, NonFiniteLossError, UnknownNameError
from robustft.models import part_of, parts, resolve_layer, weight_layers
from robustft.models.start import Start
from robustft.training.checks import require_at_least, require_choice, require_range
from robustft.training.precision import full_float32
from robustft.training.seeding import generator

__all__ = [
    "Criticality",
    "CriticalityConfig",
    "CriticalityWork",
    "Projection",
    "criticality_of_layer",
    "eligible_layers",
    "module_robust_criticality",
    "rank_layers",
]

Projection = Literal["epoch", "step"]

_Forward = Callable[[Tensor], Tensor]

BYTES_PER_MIB = 1024**2
DEFAULT_CACHE_MIB = 4096
POINTS = 100.0


@dataclasses.dataclass(frozen=True, slots=True)
class Criticality:
    """What moving one layer's weight within its ball costs.

    Args:
        value: MRC in nats, >= 0: largest mean cross-entropy found minus that of the unmoved model.
            Infinite where the ascent made the loss NaN or infinite.
        accuracy_drop: by how many percentage points accuracy on the stored adversarial examples
            is lower at that largest loss; all of it where the value is infinite.
        movement: ``||w - w0|| / ||w0||`` of the weight at that largest loss; NaN where the weight
            itself overflowed.
    """

    value: float
    accuracy_drop: float
    movement: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CriticalityConfig:
    """How the ascent on the weight is done; a value is comparable only at equal settings."""

    eps: float = 0.1
    """Radius of the ball relative to the norm of the layer's weight, > 0."""
    lr: float = 1.0
    """Step size of the ascent, > 0."""
    num_epochs: int = 10
    """Epochs over the stored examples, >= 1."""
    batch_size: int = 512
    """Stored examples per step, >= 1."""
    projection: Projection = "epoch"
    """Pull back into the ball after each "epoch" or after each "step"."""
    start_at_zero: bool = False
    """Published quirk: the maximum starts at 0, so a NaN loss gives *minus* the base loss."""
    prefix_cache: bool = True
    """Whether activations before the layer's part of the model are computed once and kept."""
    cache_mib: int = DEFAULT_CACHE_MIB
    """Memory for them, MiB, >= 0; where more is needed they are recomputed."""
    seed: int = 0
    """Seed of the shuffles, >= 0; they are the same for every layer."""

    def __post_init__(self) -> None:
        require_range(self, 0, math.inf, "eps", "lr", open_low=True)
        require_at_least(self, 1, "num_epochs", "batch_size")
        require_at_least(self, 0, "cache_mib", "seed")
        require_choice(self, "projection", Projection)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CriticalityWork:
    """What every layer's task needs, wherever it runs.

    Args:
        start: the model.
        inputs: stored adversarial examples, float32 ``[n, channels, height, width]``.
        labels: int64 ``[n]``.
        config: the ascent.
        device: where the task computes ("cpu", "cuda").
    """

    start: Start
    inputs: NDArray[np.float32]
    labels: NDArray[np.int64]
    config: CriticalityConfig
    device: str


def module_robust_criticality(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    layers: Sequence[str] | None = None,
    eps: float = 0.1,
    lr: float = 1.0,
    num_epochs: int = 10,
    batch_size: int = 512,
    projection: Projection = "epoch",
    seed: int = 0,
    start_at_zero: bool = False,
    prefix_cache: bool = True,
    cache_mib: int = DEFAULT_CACHE_MIB,
) -> dict[str, Criticality]:
    """Return the criticality of each layer: the paper's MRC, relaxed as in its algorithm 1.

    For one layer at a time, gradient ascent on the mean cross-entropy of *stored* adversarial
    examples moves the layer's ``weight`` (not its bias) within the ball
    ``||w - w0||_2 <= eps * ||w0||_2``; the largest loss after any epoch counts. The value is a
    heuristic for ranking: it is neither an upper nor a lower bound of the exact one.

    ``model`` and its buffers are not touched (the work is done on a copy, in eval mode).

    Args:
        model: takes inputs, returns logits ``[n, classes]``.
        inputs: adversarial examples against ``model``, ``[n, channels, height, width]`` in [0, 1],
            in the model's dtype and on its device.
        labels: int64 ``[n]``.
        layers: exact names of convolution or linear layers; None: all.
        eps, lr, num_epochs, batch_size, projection, seed, start_at_zero, prefix_cache, cache_mib:
            see ``CriticalityConfig``.

    Returns:
        layer name -> criticality, in the order of ``layers``.

    Raises:
        UnknownNameError: no layer is called that; the nearest is proposed.
        ConfigError: an option out of its range, or no examples.
        NonFiniteLossError: the loss is NaN or infinite before any weight has moved.

    Note:
        Where paper and published code differ we follow the code, since the published numbers come
        from it: sequential SGD steps, projection after each epoch around the *initial* weight, no
        stop after the first projection, largest instead of last loss. Unlike the code, the maximum
        starts at the loss of the unmoved weight (which is in the ball, so the value is never
        negative), and a loss that overflows counts as infinitely critical; there, NaN compares
        false and makes the most critical layer look least critical (``start_at_zero`` repeats it).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> values = module_robust_criticality(
        ...     model, torch.rand(8, 1, 2, 2), torch.arange(8) % 3, num_epochs=2)
        >>> list(values), values["1"].value > 0
        (['1'], True)
    """
    config = CriticalityConfig(
        eps=eps,
        lr=lr,
        num_epochs=num_epochs,
        batch_size=batch_size,
        projection=projection,
        start_at_zero=start_at_zero,
        prefix_cache=prefix_cache,
        cache_mib=cache_mib,
        seed=seed,
    )
    if len(labels) == 0 or len(inputs) != len(labels):
        raise ConfigError(
            f"criticality needs as many labels as inputs and at least one, got {len(inputs)} "
            f"inputs and {len(labels)} labels"
        )
    names = list(weight_layers(model)) if layers is None else list(layers)
    for name in names:
        resolve_layer(model, name)
    scratch = copy.deepcopy(model).eval().requires_grad_(False)
    return {name: _ascend(scratch, name, inputs, labels, config) for name in names}


def criticality_of_layer(work: CriticalityWork, layer: str) -> dict[str, Any]:
    """Return one layer's criticality as a JSON-able dict: the unit of fan-out.

    Nothing in it depends on which other layers are measured, where, or in which order.
    """
    device = torch.device(work.device)
    model = work.start.build().to(device).eval().requires_grad_(False)
    inputs = torch.from_numpy(np.array(work.inputs)).to(device)
    labels = torch.from_numpy(np.array(work.labels)).to(device)
    resolve_layer(model, layer)
    return dataclasses.asdict(_ascend(model, layer, inputs, labels, work.config))


@full_float32()
def _ascend(
    model: nn.Module, name: str, inputs: Tensor, labels: Tensor, config: CriticalityConfig
) -> Criticality:
    """Climb on one layer's weight, which is restored at the end; ``model`` is ours to use."""
    weight = resolve_layer(model, name).weight
    assert isinstance(weight, nn.Parameter)
    features, forward = _cached_prefix(model, name, inputs, config)
    original = weight.detach().clone()
    radius = config.eps * original.double().norm()
    base_loss, base_accuracy = _loss_and_accuracy(forward, features, labels, config.batch_size)
    if not math.isfinite(base_loss):
        raise NonFiniteLossError(
            f"the starting model's loss is {base_loss} on the stored adversarial examples, so no "
            "layer's criticality means anything: start from other weights"
        )
    best_loss, best_accuracy, movement = base_loss, base_accuracy, 0.0
    if config.start_at_zero:
        best_loss = 0.0
    weight.requires_grad_(True)
    try:
        for epoch in range(config.num_epochs):
            order = torch.randperm(len(labels), generator=generator(config.seed, "mrc", epoch))
            for chosen in torch.split(order.to(labels.device), config.batch_size):
                loss = functional.cross_entropy(forward(features[chosen]), labels[chosen])
                (gradient,) = torch.autograd.grad(loss, weight, materialize_grads=True)
                with torch.no_grad():
                    weight.add_(gradient, alpha=config.lr)
                    if config.projection == "step":
                        _pull_back(weight, original, radius)
            if config.projection == "epoch":
                _pull_back(weight, original, radius)
            loss_now, accuracy = _loss_and_accuracy(forward, features, labels, config.batch_size)
            if not math.isfinite(loss_now) and not config.start_at_zero:
                best_loss, best_accuracy = math.inf, 0.0
                movement = _movement(weight, original)
                break
            if loss_now > best_loss:
                best_loss, best_accuracy = loss_now, accuracy
                movement = _movement(weight, original)
    finally:
        weight.requires_grad_(False)
        weight.copy_(original)
    return Criticality(best_loss - base_loss, (base_accuracy - best_accuracy) * POINTS, movement)


def _cached_prefix(
    model: nn.Module, name: str, inputs: Tensor, config: CriticalityConfig
) -> tuple[Tensor, _Forward]:
    """Return what enters the layer's part of the model, and the rest of the model.

    Inputs and earlier weights are fixed and BatchNorm is in eval mode, so what enters the part
    never changes while the layer's weight does: exact, not an approximation.
    """
    position = part_of(model, name) if config.prefix_cache else 0
    if position == 0:
        return inputs, model
    pieces = [run for _, run in parts(model)]
    prefix, suffix = _chain(pieces[:position]), _chain(pieces[position:])
    with torch.no_grad():
        sample = prefix(inputs[:1].clone())
        needed = sample.numel() * sample.element_size() * len(inputs)
        if needed > config.cache_mib * BYTES_PER_MIB:
            return inputs, model
        features = sample.new_empty(len(inputs), *sample.shape[1:])
        for begin in range(0, len(inputs), config.batch_size):
            end = begin + config.batch_size
            features[begin:end] = prefix(inputs[begin:end].clone())
    return features, suffix


def _chain(pieces: Sequence[_Forward]) -> _Forward:
    def run(values: Tensor) -> Tensor:
        for piece in pieces:
            values = piece(values)
        return values

    return run


def _pull_back(weight: Tensor, original: Tensor, radius: Tensor) -> None:
    """Move ``weight`` onto the ball's surface if it is outside; no host sync.

    In float64, where the square of a far-flung float32 weight does not overflow: an infinite
    distance would put the weight back to its start, and make the layer look harmless.
    """
    with torch.no_grad():
        delta = weight.double() - original
        distance = delta.norm()
        scaled = original + delta * (radius / distance)
        weight.copy_(torch.where(distance > radius, scaled, weight))


def _movement(weight: Tensor, original: Tensor) -> float:
    distance = (weight.detach().double() - original).norm()
    moved, norm = torch.stack([distance, original.double().norm()]).tolist()
    return float(moved / norm) if norm else 0.0


def _loss_and_accuracy(
    forward: _Forward, features: Tensor, labels: Tensor, batch_size: int
) -> tuple[float, float]:
    """Return mean cross-entropy (nats) and accuracy (fraction) over all stored examples."""
    sums = torch.zeros(2, dtype=torch.float64, device=labels.device)
    with torch.no_grad():
        for begin in range(0, len(labels), batch_size):
            target = labels[begin : begin + batch_size]
            # A copy: a part may begin with an in-place ReLU.
            logits = forward(features[begin : begin + batch_size].clone())
            losses = functional.cross_entropy(logits, target, reduction="none")
            sums[0] += losses.sum(dtype=torch.float64)
            sums[1] += (logits.argmax(1) == target).sum()
    loss, correct = (sums / len(labels)).tolist()
    return loss, correct


def eligible_layers(layers: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the layers that match any shell-style pattern, in order.

    Raises:
        UnknownNameError: a pattern matches no layer.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in layers):
            raise UnknownNameError("layer or pattern of layers", pattern, layers)
    return [name for name in layers if any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def rank_layers(
    values: Mapping[str, float],
    *,
    eligible: Sequence[str] | None = None,
    tie_tolerance: float = 0.01,
) -> list[str]:
    """Return the eligible layers from least to most critical.

    The next layer is the one with the smallest criticality among those left; layers within
    ``tie_tolerance`` of it count as equal, and of equals the one nearest the network's middle
    comes first, then the earlier one (the authors advise middle layers).

    Args:
        values: layer -> criticality in nats, in the network's order; may be infinite.
        eligible: which of them may be chosen; None: all.
        tie_tolerance: in nats, >= 0.
    """
    index = {name: position for position, name in enumerate(values)}
    middle = (len(values) - 1) / 2
    left = list(values) if eligible is None else [name for name in values if name in eligible]
    ranked: list[str] = []
    while left:
        limit = min(values[name] for name in left) + tie_tolerance
        ties = [name for name in left if values[name] <= limit]
        chosen = min(ties, key=lambda name: (abs(index[name] - middle), index[name]))
        ranked.append(chosen)
        left.remove(chosen)
    return ranked
