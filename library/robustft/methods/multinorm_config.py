"""Every option of multi-norm training (robustft.methods.multinorm)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, get_args

from robustft.data.base import Task
from robustft.errors import ConfigError, UnknownNameError
from robustft.methods.multinorm_attacks import SparseStep
from robustft.methods.norm_sampler import SamplerSchedule, check_norms
from robustft.threat import NORMS, Norm, ThreatModel
from robustft.training.augment import AugmentConfig
from robustft.training.checks import require_at_least, require_choice, require_range
from robustft.training.optimizers import OptimizerConfig
from robustft.training.schedules import ScheduleConfig

__all__ = ["MultiNormConfig"]

Scheme = Literal["error_weighted", "uniform", "alternate", "max", "avg", "msd"]
Attack = Literal["apgd", "none"]
Keep = Literal["best", "last"]

EXTREME: tuple[Norm, ...] = ("Linf", "L1")
"""The two norms whose balls' convex hull holds the L2 ball in between (``hull_l2_radius``)."""
EVERY: tuple[Norm, ...] = ("Linf", "L1", "L2")
"""The order of the compared methods; where losses tie, MAX takes the first."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MultiNormConfig:
    """Multi-norm training and fine-tuning; the defaults are those published for CIFAR-10.

    Radii are those of the task's threat models.

    Note:
        The published code keeps the last epoch (``keep="last"``), and without ``--attack=apgd`` it
        silently trains on clean images; here that has to be said: ``attack="none"``.
    """

    scheme: Scheme = "error_weighted"
    """Which norm attacks a batch. One, drawn by robust error ("error_weighted": E-AT), uniformly
    ("uniform": SAT) or in turn ("alternate"); or every norm: the highest loss per image ("max"),
    the mean of the losses ("avg"), the best of all norms at each step ("msd")."""
    norms: tuple[Norm, ...] | None = None
    """Norms to train with. None: Linf and L1 for "error_weighted" and "alternate", all of the
    task's for the others, as in the paper."""
    attack: Attack = "apgd"
    """"apgd", or "none": clean training, for comparison only."""
    num_steps: int = 10
    """Steps of the attack in training, >= 1."""
    steps_per_norm: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Other numbers of steps for some norms, as {Linf: 5, L1: 15} on ImageNet; not for "msd"."""
    msd_step_size: float | None = None
    """Length of a step of "msd" in units of each norm's eps, > 0. None: 2.5 / num_steps.
    Published: 0.1 (L1: 1/12) with 50 steps."""
    msd_l1_step: SparseStep = "exact"
    """"exact": the L1 step of the training APGD, projected on ball and box at once; "published":
    5 to 20 coordinates, projected on the ball and clipped to the box afterwards."""
    epochs: int = 3
    """Passes over the training split, >= 1; published: 3 on CIFAR-10, 1 on ImageNet."""
    lr: float = 0.05
    """Highest learning rate, > 0. Published for CIFAR-10: 0.05 for ResNet-18, 0.01 for larger."""
    batch_size: int = 128
    """Images in a global batch, over all workers, >= 1."""
    seed: int = 0
    """Seed of order, augmentation and the draw of norms, >= 0."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """The optimiser; published from scratch: ``decayed="weights"``."""
    schedule: ScheduleConfig = dataclasses.field(
        default_factory=lambda: ScheduleConfig(name="piecewise-ft")
    )
    """The learning rate's schedule."""
    augment: AugmentConfig = dataclasses.field(
        default_factory=lambda: AugmentConfig(padding_mode="zero")
    )
    """Crops and flips."""
    val_steps: int = 20
    """APGD steps per norm on the selection split, >= 1; it starts at the clean image."""
    val_batch_size: int = 512
    """Images at a time on the selection split, >= 1; it never changes the result."""
    val_start: bool = True
    """Whether a trained start is attacked too, for the curves' epoch 0."""
    eval_every: int = 1
    """Epochs between evaluations, >= 1; the last epoch is always evaluated."""
    keep: Keep = "best"
    """"best": the epoch with the highest union accuracy on "val"; "last": the last epoch."""
    legacy_group_lr: bool = False
    """Published defect: biases and normalisation train at the constant rate 1.0 and only the
    weights follow the schedule. Needs ``optimizer.decayed="weights"``."""

    def __post_init__(self) -> None:
        require_at_least(
            self,
            1,
            "num_steps",
            "epochs",
            "batch_size",
            "val_steps",
            "val_batch_size",
            "eval_every",
        )
        require_at_least(self, 0, "seed")
        require_range(self, 0, math.inf, "lr", open_low=True)
        require_choice(self, "scheme", Scheme)
        require_choice(self, "attack", Attack)
        require_choice(self, "msd_l1_step", SparseStep)
        require_choice(self, "keep", Keep)
        if self.msd_step_size is not None:
            require_range(self, 0, math.inf, "msd_step_size", open_low=True)
        if self.norms is not None:
            check_norms(self.norms)
        for norm, count in self.steps_per_norm.items():
            if norm not in NORMS:
                raise UnknownNameError("norm in steps_per_norm", norm, NORMS)
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ConfigError(f"steps_per_norm.{norm} = {count!r}: a whole number >= 1")
        if self.steps_per_norm and self.scheme == "msd":
            raise ConfigError("steps_per_norm has no effect on 'msd', one attack: use num_steps")
        if self.legacy_group_lr and self.optimizer.decayed != "weights":
            raise ConfigError("legacy_group_lr = True: needs optimizer.decayed = 'weights'")

    @property
    def sampled(self) -> bool:
        """Whether one norm is drawn for each batch."""
        return self.scheme in get_args(SamplerSchedule)

    def threats(self, task: Task) -> tuple[ThreatModel, ...]:
        """Return what is trained against, in order.

        Raises:
            ConfigError: the task gives no radius for a norm.
        """
        known = {threat.norm: threat for threat in task.threat_models}
        extreme = self.scheme in ("error_weighted", "alternate")
        norms = self.norms or (EXTREME if extreme else tuple(n for n in EVERY if n in known))
        missing = [norm for norm in norms if norm not in known]
        if missing:
            raise ConfigError(
                f"norms = {', '.join(norms)}: the task gives no eps for {', '.join(missing)}; add "
                f"e.g. {{norm: {missing[0]}, eps: ...}} to task.threat_models or leave it out of "
                "norms"
            )
        return tuple(known[norm] for norm in norms)
