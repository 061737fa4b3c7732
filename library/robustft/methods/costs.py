"""What a method costs, in passes of single examples, computed before anything is trained.

Passes through the whole network are the cost that does not depend on the machine. A budget in
passes is how methods are compared fairly, and how a search is planned. Each formula is read off its
method's loop; tests count the passes of short runs and compare.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from robustft.errors import ConfigError
from robustft.methods import method_name

__all__ = ["COSTS", "Passes", "Sizes", "criticality_passes", "passes_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class Passes:
    """Passes of single examples through the whole network."""

    forwards: float = 0.0
    backwards: float = 0.0

    @property
    def total(self) -> float:
        return self.forwards + self.backwards

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.forwards + other.forwards, self.backwards + other.backwards)

    def times(self, count: float) -> "Passes":
        return Passes(count * self.forwards, count * self.backwards)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What the cost of a method depends on besides its config.

    Args:
        train, val: examples.
        norms: threat models of the task.
        layers: convolutions and linear layers of the network.
    """

    train: int
    val: int
    norms: int = 1
    layers: int = 1


def passes_of(config: Any, sizes: Sizes) -> Passes:
    """Return what one training costs, the method's own validation included.

    A pass is one example once forward or once backward through the network, also where only a part
    of it is trained or attacked examples are left out because they are wrong already: an upper
    bound there ("last-layer", "e-at"), exact elsewhere. AutoLoRa may stop early.

    Raises:
        ConfigError: the cost of the method is not known.
    """
    counted = COSTS.get(method_name(config))
    if counted is None:
        raise ConfigError(
            f"what {method_name(config)} costs is not known here: add it to COSTS, with its test"
        )
    return counted(config, sizes)


def criticality_passes(config: Any, sizes: Sizes) -> Passes:
    """Return what RiFT's module robust criticality costs, which all trials of a search share.

    Args:
        config: of method "rift".
        sizes: its val is what criticality is measured on, its layers are all that are measured.
    """
    count = min(config.mrc_examples or sizes.val, sizes.val)
    steps = config.mrc_attack.num_steps
    # Of every layer: what comes before it, the loss before, and after each epoch of ascent.
    layer = Passes(2) + Passes(2, 1).times(config.mrc_epochs)
    return Passes(steps, steps).times(count) + layer.times(count * sizes.layers)


def _validations(config: Any) -> int:
    """Return how often a method looks at val: every ``eval_every`` epochs, and at the end."""
    return -(-int(config.epochs) // int(config.eval_every))


def _attacked(steps: int) -> Passes:
    """Return what ``validate`` costs an example: clean, PGD, and its answer."""
    return Passes(steps + 2, steps)


def _adversarial(config: Any, sizes: Sizes) -> Passes:
    steps = config.attack.num_steps
    training = Passes(steps + 1, steps + 1).times(sizes.train * config.epochs)
    return training + _attacked(config.val_attack.num_steps).times(sizes.val * _validations(config))


def _trades(config: Any, sizes: Sizes) -> Passes:
    # The clean logits that the attack climbs away from, and both inputs of the update.
    return _adversarial(config, sizes) + Passes(2, 1).times(sizes.train * config.epochs)


def _rift(config: Any, sizes: Sizes) -> Passes:
    tuning = Passes(1, 1).times(sizes.train * config.epochs) + Passes(sizes.val * config.epochs)
    return tuning + _line(config, sizes)


def _line(config: Any, sizes: Sizes) -> Passes:
    """Return what measuring the points of an interpolation costs."""
    steps = config.curve_attack.num_steps
    point = Passes(1) + Passes(steps + 1, steps).times(config.curve_runs)
    return point.times(sizes.val * len(config.alphas))


def _natural(config: Any, sizes: Sizes) -> Passes:
    epochs = config.epochs + (config.probe.epochs if config.mode == "lp-ft" else 0)
    training = Passes(1, 1).times(sizes.train * epochs)
    if config.mode == "wise-ft":
        return training + Passes(1).times(sizes.val * epochs) + _line(config.interpolate, sizes)
    return training + _attacked(config.val_attack.num_steps).times(sizes.val * epochs)


def _multinorm(config: Any, sizes: Sizes) -> Passes:
    steps, norms = config.num_steps, 1 if config.sampled else sizes.norms
    training = Passes(steps + 1, steps).times(norms) + Passes(1, 1)
    apgd = Passes(config.val_steps + 1, config.val_steps)
    looked = Passes(1) + apgd.times(sizes.norms)
    before = looked if config.val_start else Passes(1)
    return (
        training.times(sizes.train * config.epochs)
        + looked.times(sizes.val * _validations(config))
        + before.times(sizes.val)
    )


def _autolora(config: Any, sizes: Sizes) -> Passes:
    steps = config.attack.num_steps
    weights = Passes(config.fixed_lambdas is None)
    training = Passes(steps + 2, steps + 2) + weights
    looked = _attacked(config.val_attack.num_steps)
    return training.times(sizes.train * config.epochs) + looked.times(sizes.val * config.epochs)


def _instances(config: Any, sizes: Sizes) -> Passes:
    steps = config.attack.num_steps if config.training == "adversarial" else 0
    training = Passes(steps + 1, steps + 1).times(sizes.train * config.epochs)
    looked = _attacked(config.val_attack.num_steps) + Passes(1)
    return training + looked.times(sizes.val * _validations(config)) + _records(config, sizes)


def _records(config: Any, sizes: Sizes) -> Passes:
    """Return what statistics cost: attacks from the example itself share the first gradient."""
    if config.collect.folder is None:
        return Passes()
    attacks = [one for one in config.collect.perturbations if not isinstance(one, str)]
    free = sum(one.start_size > 0 for one in attacks)
    steps = sum(one.num_steps for one in attacks)
    shared = max(0, len(attacks) - free - 1)
    fixed = len(config.collect.perturbations) - len(attacks)
    record = Passes(1 + steps + free + fixed, steps - shared)
    return record.times(sizes.train * (1 + math.ceil(config.epochs / config.collect.every)))


def _text_instances(config: Any, sizes: Sizes) -> Passes:
    training = Passes(1, 1).times(sizes.train * config.epochs)
    steps = config.val_attack.num_steps
    looked = Passes(steps + 1, steps)
    return training + looked.times(sizes.val * _validations(config)) + _records(config, sizes)


def _rose(config: Any, sizes: Sizes) -> Passes:
    loss = config.text_loss
    known = {"ce": 1, "two_pass": 2, "r_drop": 2, "freelb": loss.freelb_steps}
    if loss.name not in known:
        raise ConfigError(f"what the loss {loss.name} costs is not known here: add it to _rose")
    step = Passes(known[loss.name], known[loss.name])
    if config.uses_first_order:
        # Two gradients of the disagreement; its two passes are the loss's own if it has them.
        step += Passes(0 if loss.name in ("two_pass", "r_drop") else 2, 2)
    return (step.times(sizes.train) + Passes(1).times(sizes.val)).times(config.epochs)


COSTS: dict[str, Callable[[Any, Sizes], Passes]] = {
    "at": _adversarial,
    "trades": _trades,
    "rift": _rift,
    "fine-tune": _natural,
    "multinorm": _multinorm,
    "autolora": _autolora,
    "instances": _instances,
    "rose": _rose,
    "text-instances": _text_instances,
}
