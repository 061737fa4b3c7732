"""Attacks: pure functions ``(model, inputs, labels, *, norm, eps, ...) -> AttackResult``.

Inputs are ``[n, channels, height, width]`` in [0, 1], the model gives logits, radii are in the same
units as the inputs. Attacks leave the model's modes, flags and gradients and the global random
state as they found them, and a sample's result does not depend on the batch it comes in.
"""

from collections.abc import Callable
from typing import Literal

from robustft.attacks.apgd import apgd
from robustft.attacks.autoattack import AutoAttackResult, attack_plan, autoattack, run_step
from robustft.attacks.fab import fab
from robustft.attacks.fgsm import fgsm
from robustft.attacks.losses import LOSSES, TARGETED_LOSSES, LossFunction
from robustft.attacks.mode import Model, attack_mode
from robustft.attacks.pgd import pgd
from robustft.attacks.problem import zero_gradient
from robustft.attacks.projections import project
from robustft.attacks.result import AttackResult
from robustft.attacks.square import square

__all__ = [
    "ATTACKS",
    "LOSSES",
    "TARGETED_LOSSES",
    "AttackName",
    "AttackResult",
    "AutoAttackResult",
    "LossFunction",
    "Model",
    "apgd",
    "attack_mode",
    "attack_plan",
    "autoattack",
    "fab",
    "fgsm",
    "pgd",
    "project",
    "run_step",
    "square",
    "zero_gradient",
]

AttackName = Literal["apgd", "autoattack", "fab", "fgsm", "pgd", "square"]

ATTACKS: dict[AttackName, Callable[..., AttackResult]] = {
    "apgd": apgd,
    "autoattack": autoattack,
    "fab": fab,
    "fgsm": fgsm,
    "pgd": pgd,
    "square": square,
}
