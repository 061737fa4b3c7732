"""Options of method "instances" (robustft.methods.instances), and what those for text share."""

import dataclasses
import math
from typing import Annotated, Literal, Protocol

import tyro

from robustft.data.storage import is_uri
from robustft.errors import ConfigError
from robustft.methods.common import AttackConfig
from robustft.methods.instance_collector import Target
from robustft.methods.instance_losses import MitigationConfig
from robustft.methods.instance_perturbations import (
    GradientPerturbation,
    PatchPerturbation,
    Perturbation,
    perturbation_parameters,
)
from robustft.methods.instance_selection import PUBLISHED_SCORE
from robustft.training.augment import AugmentConfig
from robustft.training.checks import require_at_least, require_choice, require_range
from robustft.training.optimizers import OptimizerConfig
from robustft.training.schedules import ScheduleConfig

__all__ = [
    "CollectConfig",
    "CollectOptions",
    "GroupConfig",
    "InstancesConfig",
    "TrainingOptions",
    "check_collecting",
    "check_treatment",
]

When = Literal["in_loop", "offline"]
Use = Literal["subset", "loss"]
Which = Literal["robust", "swing", "non-robust", "random", "all"]
Training = Literal["clean", "adversarial"]
Keep = Literal["best", "last"]
# The command line takes the kind of an attack from the preset, and only its fields as options.
ImageAttack = Annotated[GradientPerturbation | PatchPerturbation, tyro.conf.AvoidSubcommands]


class CollectOptions(Protocol):
    """What is measured, where and when, whatever the instances are."""

    @property
    def folder(self) -> str | None: ...
    @property
    def when(self) -> When: ...
    @property
    def every(self) -> int: ...
    @property
    def perturbations(self) -> tuple[Perturbation, ...]: ...
    @property
    def target(self) -> Target: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def shards(self) -> int: ...


def check_collecting(options: CollectOptions) -> None:
    """Raise ConfigError unless the options can be measured by."""
    require_choice(options, "when", When)
    require_choice(options, "target", Target)
    require_at_least(options, 1, "every", "batch_size", "shards")
    require_at_least(options, 0, "seed")
    if options.folder is not None:
        _require_folder("collect.folder", options.folder)
        perturbation_parameters(options.perturbations)


def _require_folder(field: str, place: str) -> None:
    """Raise ConfigError for a URI: records are renamed into place, as only files can be."""
    if is_uri(place):
        raise ConfigError(
            f"{field} = {place!r}: statistics of instances are files of a folder, so a URI cannot "
            "hold them: name a folder that all workers see, a local disk or NFS"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CollectConfig:
    """What is measured during training, and where it is written."""

    folder: str | None = None
    """Folder for the statistics, which all workers see; None: nothing is measured."""
    when: When = "in_loop"
    """"in_loop": between epochs, by the workers of the run; "offline": training only saves its
    weights there, and they are measured afterwards, spread over checkpoints and shards."""
    every: int = 1
    """Epochs between records, >= 1. The start and the final model are always measured."""
    attacks: tuple[ImageAttack, ...] = (GradientPerturbation(),)
    """Worst-case perturbations, of pixels; with ``per`` of the patch embeddings of a vision
    transformer."""
    transforms: tuple[str, ...] = ()
    """Transformations of fixed strength, "<family>-<weak, medium or strong>" (blur, rotate,
    translate_horizontal, red_shift, ..., shot_noise and all other common corruptions), and the
    controls: "identity" and, of patch embeddings, "identity-patches"."""
    target: Target = "gold"
    """What losses are measured against: the "gold" label or the clean "pred"iction."""
    batch_size: int = 256
    """Images at a time, >= 1; it never changes the result."""
    seed: int = 0
    """Of random starts and transformations, >= 0."""
    shards: int = 4
    """Parts per checkpoint of "offline", >= 1: what can run side by side."""

    def __post_init__(self) -> None:
        check_collecting(self)

    @property
    def perturbations(self) -> tuple[Perturbation, ...]:
        return (*self.attacks, *self.transforms)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GroupConfig:
    """Which instances are treated differently, by the statistics of an earlier run."""

    statistics: str | None = None
    """Folder of the statistics; needed by every group but "all"."""
    perturbation: str | None = None
    """Name of the perturbation whose statistics count; None: the first in the folder."""
    metric: str = PUBLISHED_SCORE
    """Score, most robust first; e.g. "difficulty_corrected_r", "loss_diff_mean_r"."""
    which: Which = "all"
    """"robust", "swing", "non-robust", "random" (the control) or "all"."""
    share: float = 0.3
    """Of the training split, in (0, 1]; published: .3."""
    balance: bool = True
    """The same number of instances from every class."""
    only_correct: bool = False
    """Score by records in which the clean prediction is right, only."""
    seed: int = 0
    """Of the random group, >= 0."""

    def __post_init__(self) -> None:
        require_choice(self, "which", Which)
        require_range(self, 0, 1, "share", open_low=True)
        require_at_least(self, 0, "seed")
        if self.statistics is not None:
            _require_folder("group.statistics", self.statistics)
        if self.which != "all" and self.statistics is None:
            raise ConfigError(
                f"which = {self.which!r}: name the folder of an earlier run's statistics"
            )


class TrainingOptions(Protocol):
    """What training with or for statistics is told, whatever the instances are."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def eval_every(self) -> int: ...
    @property
    def keep(self) -> Keep: ...
    @property
    def group(self) -> GroupConfig: ...
    @property
    def use(self) -> Use: ...
    @property
    def mitigation(self) -> MitigationConfig: ...


def check_treatment(config: TrainingOptions) -> None:
    """Raise ConfigError if the group and what is done to it contradict each other."""
    require_choice(config, "keep", Keep)
    require_choice(config, "use", Use)
    if config.use == "subset" and config.mitigation.kind != "none":
        raise ConfigError(
            "use = 'subset' trains on the group alone: leave mitigation.kind at 'none', or set "
            "use = 'loss'"
        )
    if config.use == "loss" and config.group.which != "all" and config.mitigation.kind == "none":
        raise ConfigError(
            f"group.which = {config.group.which!r} has no effect: choose mitigation.kind "
            "'flooding' or 'soft_label', or use = 'subset'"
        )
    if config.mitigation.level_quantile is not None and config.group.statistics is None:
        raise ConfigError("mitigation.level_quantile needs group.statistics")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class InstancesConfig:
    """Training with statistics per instance, or with what an earlier run's statistics say."""

    training: Training = "clean"
    """"clean": cross-entropy on images as they are; "adversarial": on PGD's last iterate."""
    epochs: int = 10
    """Length of the run, >= 1; an epoch has as many updates as one over the whole split."""
    lr: float = 0.05
    """Learning rate before the schedule, > 0."""
    batch_size: int = 128
    """Images in a global batch, over all workers, >= 1."""
    seed: int = 0
    """Seed of order, augmentation and attack noise, >= 0."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """The optimiser."""
    schedule: ScheduleConfig = dataclasses.field(
        default_factory=lambda: ScheduleConfig(name="cosine")
    )
    """The learning rate's schedule, fitted to the updates that are made."""
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    """Crops and flips; instances are measured without."""
    attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    """PGD of "adversarial" training."""
    val_attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    """PGD on the selection split."""
    eval_every: int = 1
    """Epochs between evaluations, >= 1; the last epoch is always evaluated."""
    keep: Keep = "last"
    """"last", as published; "best": the epoch with the highest robust accuracy on "val"."""
    collect: CollectConfig = dataclasses.field(default_factory=CollectConfig)
    """Statistics to write."""
    group: GroupConfig = dataclasses.field(default_factory=GroupConfig)
    """Instances to treat differently."""
    use: Use = "loss"
    """"subset": train on the group alone; "loss": on everything, the group with ``mitigation``."""
    mitigation: MitigationConfig = dataclasses.field(default_factory=MitigationConfig)
    """What is done to the loss of the group."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "epochs", "batch_size", "eval_every")
        require_at_least(self, 0, "seed")
        require_range(self, 0, math.inf, "lr", open_low=True)
        require_choice(self, "training", Training)
        check_treatment(self)
