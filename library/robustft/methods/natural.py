"""Natural fine-tuning of a robust model: what RiFT and other repairs have to beat.

The loss is the cross-entropy of natural images. What is trained ("mode"):

* "full": every weight;
* "last-layer": the classifier, on features that stay as they are (linear probing);
* "lp-ft": first the classifier, then every weight, so that a head that does not fit yet does not
  distort the features. Kumar, Raghunathan, Jones, Ma, Liang, "Fine-Tuning can Distort Pretrained
  Features and Underperform Out-of-Distribution", ICLR 2022, arXiv 2202.10054;
* "wise-ft": every weight, then a point between start and result. Wortsman et al., "Robust
  fine-tuning of zero-shot models", CVPR 2022, arXiv 2109.01903.

Fine-tuning and interpolation are steps 2 and 3 of RiFT (``rift.fine_tune``, ``rift.interpolated``),
so that a difference from RiFT is one of what is trained.
"""

import dataclasses
import math
from typing import Literal

from robustft.methods.base import Result
from robustft.methods.common import AttackConfig
from robustft.methods.fine_tuning import PASSES, find_head
from robustft.methods.interpolation import InterpolateConfig, require_line
from robustft.methods.rift import fine_tune, interpolated
from robustft.training.augment import AugmentConfig
from robustft.training.checks import require_at_least, require_choice, require_range
from robustft.training.context import RunContext
from robustft.training.optimizers import OptimizerConfig
from robustft.training.schedules import ScheduleConfig

__all__ = ["NaturalConfig", "ProbeConfig", "train"]

Mode = Literal["full", "last-layer", "lp-ft", "wise-ft"]
BnMode = Literal["frozen", "update"]
Keep = Literal["best", "last"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """The first stage of "lp-ft", in which the classifier alone is trained."""

    epochs: int = 5
    """Passes over the training split, >= 1."""
    lr: float = 0.01
    """Learning rate before the schedule, > 0."""
    schedule: ScheduleConfig = dataclasses.field(
        default_factory=lambda: ScheduleConfig(name="cosine")
    )
    """Of the learning rate."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "epochs")
        require_range(self, 0, math.inf, "lr", open_low=True)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NaturalConfig:
    """Natural fine-tuning; optimiser, schedule and length are by default those of RiFT."""

    mode: Mode = "full"
    """"full": every weight; "last-layer": the classifier; "lp-ft": the classifier, then every
    weight; "wise-ft": every weight, then a point on the line back to the start."""
    epochs: int = 10
    """Passes over the training split, >= 1; of "lp-ft" those after its probe."""
    lr: float = 0.001
    """Learning rate before the schedule, > 0."""
    batch_size: int = 128
    """Images in a global batch, over all workers, >= 1."""
    seed: int = 0
    """Seed of order, augmentation and start noise, >= 0."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """The optimiser; each stage of "lp-ft" has its own."""
    schedule: ScheduleConfig = dataclasses.field(
        default_factory=lambda: ScheduleConfig(name="halfway")
    )
    """Of the learning rate."""
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    """Crops and flips."""
    bn_mode: BnMode = "update"
    """BatchNorm where every weight is trained. "update": batch statistics used, running ones
    updated; "frozen": running statistics used and kept. A classifier is always trained with it
    frozen: its features are to stay as they are."""
    probe: ProbeConfig = dataclasses.field(default_factory=ProbeConfig)
    """First stage of "lp-ft"."""
    interpolate: InterpolateConfig = dataclasses.field(default_factory=InterpolateConfig)
    """Points of "wise-ft", and what chooses among them."""
    head: str | None = None
    """Name of the classifier; None: the last layer."""
    val_attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    """PGD on the selection split after each epoch; "wise-ft" measures along its line instead."""
    keep: Keep = "best"
    """"best": the epoch with the highest clean accuracy on "val"; "last". "lp-ft" keeps one of each
    stage."""
    eval_batch_size: int = 512
    """Images at a time where no weight changes, >= 1."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "epochs", "batch_size", "eval_batch_size")
        require_at_least(self, 0, "seed")
        require_range(self, 0, math.inf, "lr", open_low=True)
        require_choice(self, "mode", Mode)
        require_choice(self, "bn_mode", BnMode)
        require_choice(self, "keep", Keep)


def train(config: NaturalConfig, context: RunContext) -> Result:
    """Fine-tune on natural images; robustness is measured, and in "wise-ft" demanded.

    Raises:
        ConfigError: the classifier is needed and not found, or "wise-ft" has no robust start.
        NonFiniteLossError: training diverged.

    Note:
        Kumar et al. solve for the probe by logistic regression on stored features; here it is
        trained like everything else. Wortsman et al. fix alpha = 0.5 or choose it on accuracy;
        here RiFT's rule does: the cleanest point that stays robust. They interpolate networks
        without BatchNorm; here its running statistics are interpolated like weights.
    """
    head, everything = dataclasses.replace(config, bn_mode="frozen"), (config, ("all",))
    stages: list[tuple[NaturalConfig, tuple[str, ...]]] = [everything]
    if config.mode in ("last-layer", "lp-ft"):
        name, _ = find_head(
            context.start.build(), config.head, num_classes=context.start.num_classes
        )
        stages = [(head, (name,))]
    if config.mode == "lp-ft":
        probe = {f.name: getattr(config.probe, f.name) for f in dataclasses.fields(ProbeConfig)}
        stages = [(dataclasses.replace(head, **probe), (name,)), everything]
    if config.mode == "wise-ft":
        require_line(context.start)
    tuned = fine_tune(
        stages, context, attack=None if config.mode == "wise-ft" else config.val_attack
    )
    kept = tuned.rows[tuned.epoch - 1]
    measured: dict[str, float] = {
        name: kept[name] for name in ("val/clean", "val/robust") if name in kept
    }
    result = Result(
        state=tuned.state,
        metrics={**measured, **{name: sum(row[name] for row in tuned.rows) for name in PASSES}},
        choices={
            "mode": config.mode,
            "lr": config.lr,
            "epoch": tuned.epoch,
            "leaky": context.task.leaky,
        },
        tables={"epochs": tuned.rows},
    )
    if config.mode == "wise-ft":
        return interpolated(config.interpolate, context, result)
    return result
