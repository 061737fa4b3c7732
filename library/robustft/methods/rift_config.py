"""Every option of RiFT (robustft.methods.rift)."""

import dataclasses
import math
from typing import Literal, Protocol

from robustft.errors import ConfigError
from robustft.methods.common import AttackConfig
from robustft.methods.criticality import Projection
from robustft.methods.instance_config import GroupConfig
from robustft.methods.interpolation import RobustMetric, check_curve
from robustft.training.augment import AugmentConfig
from robustft.training.checks import require_at_least, require_choice, require_range
from robustft.training.loop import LoopConfig
from robustft.training.optimizers import OptimizerConfig
from robustft.training.schedules import ScheduleConfig

__all__ = ["PREPARE_FIELDS", "BnMode", "Keep", "RiftConfig", "TuneConfig", "official"]

BnMode = Literal["frozen", "update", "recalibrate_only"]
Keep = Literal["best", "last"]
MrcSplit = Literal["val", "train", "test"]

OFFICIAL_STEP = 2 / 225
"""The published code's PGD step, a slip of the pen for 2/255."""


class TuneConfig(LoopConfig, Protocol):
    """The fields of a method's config that ``rift.fine_tune`` reads; see ``RiftConfig``."""

    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def bn_mode(self) -> BnMode: ...
    @property
    def keep(self) -> Keep: ...
    @property
    def eval_batch_size(self) -> int: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RiftConfig:
    """Robust critical fine-tuning: criticality, fine-tuning, interpolation.

    Note:
        ``bn_mode`` is "frozen" by default, where the published code behaves like "update": there,
        fine-tuning one layer also re-estimates the running statistics of every BatchNorm on clean
        batches, so more than one module changes. "frozen" makes the method what the paper says.
    """

    modules: str | tuple[str, ...] = "mrc-1"
    """What is fine-tuned: exact layer names (a list, or joined by commas), or one of "mrc-K" (the
    layer with the K-th lowest criticality), "top-K" (the K lowest jointly), "most-critical",
    "last", "all" (every parameter), "bn" (scales and shifts of every BatchNorm)."""
    lr: float = 0.001
    """Learning rate of fine-tuning before the schedule, > 0; small ones usually win."""
    epochs: int = 10
    """Passes of fine-tuning over the clean training split, >= 1."""
    batch_size: int = 128
    """Images in a global batch of fine-tuning, over all workers, >= 1."""
    seed: int = 0
    """Seed of fine-tuning's order and augmentation, >= 0."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """The optimiser of fine-tuning."""
    schedule: ScheduleConfig = dataclasses.field(
        default_factory=lambda: ScheduleConfig(name="halfway")
    )
    """Of fine-tuning; published: times 0.1 once, at epoch epochs // 2."""
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    """Crops and flips in fine-tuning."""
    bn_mode: BnMode = "frozen"
    """BatchNorm in fine-tuning. "frozen": running statistics used and kept; "update": batch
    statistics used, running ones updated (published code); "recalibrate_only": no weight changes,
    only the running statistics, on clean data (the control experiment)."""
    keep: Keep = "best"
    """"best": the fine-tuned weights with the highest clean accuracy on "val"; "last"."""
    group: GroupConfig = dataclasses.field(default_factory=GroupConfig)
    """Instances that are fine-tuned on, by the statistics of an earlier run of method "instances".
    An epoch is one pass over them: fewer updates than over the whole split."""

    mrc_eps: float = 0.1
    """Radius of the weight ball relative to the layer's norm, > 0."""
    mrc_lr: float = 1.0
    """Step size of the ascent on the weight, > 0."""
    mrc_epochs: int = 10
    """Epochs of the ascent, >= 1."""
    mrc_batch_size: int = 512
    """Images per step of the ascent, >= 1. Changes the value: compare at equal sizes only."""
    mrc_projection: Projection = "epoch"
    """Pull back into the ball after each "epoch" (published) or each "step" (steadier)."""
    mrc_split: MrcSplit = "val"
    """Images the criticality is measured on; "test" (published for CIFAR) makes results leaky."""
    mrc_examples: int | None = None
    """How many of them, drawn by ``mrc_seed``, >= 1; None: all. 5,000 to 10,000 suffice."""
    mrc_attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    """PGD that makes the stored adversarial examples, once."""
    mrc_start_at_zero: bool = False
    """Published quirk: the maximum starts at 0 instead of the base loss, and NaN is ignored."""
    mrc_prefix_cache: bool = True
    """Whether activations before the perturbed layer are computed once and kept."""
    mrc_cache_mib: int = 4096
    """Memory for them, MiB, >= 0; a layer that needs more recomputes them instead."""
    mrc_seed: int = 0
    """Seed of the stored examples' start noise, of their choice and of the shuffles, >= 0."""
    eligible: tuple[str, ...] = ("*",)
    """Shell-style patterns of layer names that may be chosen: ["*.conv2"]."""
    tie_tolerance: float = 0.01
    """Criticalities closer than this, in nats, count as equal; >= 0."""

    alphas: tuple[float, ...] = tuple(index / 10 for index in range(11))
    """Points of the interpolation, ascending from 0, at most 1."""
    tolerance: float = 0.001
    """How far robust accuracy may fall below the start's: a fraction, 0 to 1 (0.001 = 0.1
    points)."""
    curve_attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    """PGD that measures robustness along the interpolation."""
    curve_runs: int = 3
    """Independent PGD runs per point, >= 1."""
    robust_metric: RobustMetric = "min_over_runs"
    """"min_over_runs": the lowest of the runs' accuracies (paper); "worst_case": an image counts
    if it survives every run (never higher)."""
    fresh_noise: bool = False
    """Published quirk: every point of the curve draws its own start noise."""
    eval_batch_size: int = 512
    """Images at a time where no weight changes, >= 1."""

    def __post_init__(self) -> None:
        require_at_least(
            self,
            1,
            "epochs",
            "batch_size",
            "mrc_epochs",
            "mrc_batch_size",
        )
        require_at_least(self, 0, "mrc_seed", "mrc_cache_mib")
        require_range(self, 0, math.inf, "lr", "mrc_eps", "mrc_lr", open_low=True)
        require_range(self, 0, math.inf, "tie_tolerance")
        require_choice(self, "bn_mode", BnMode)
        require_choice(self, "keep", Keep)
        require_choice(self, "mrc_projection", Projection)
        require_choice(self, "mrc_split", MrcSplit)
        if self.mrc_examples is not None:
            require_at_least(self, 1, "mrc_examples")
        if not self.selection_names:
            raise ConfigError("modules is empty: name a layer or a rule such as 'mrc-1'")
        if not self.eligible:
            raise ConfigError("eligible is empty: '*' makes every layer eligible")
        check_curve(self)

    @property
    def selection_names(self) -> tuple[str, ...]:
        """``modules`` as a tuple of names."""
        parts = self.modules.split(",") if isinstance(self.modules, str) else self.modules
        return tuple(part.strip() for part in parts if part.strip())


PREPARE_FIELDS = (
    "mrc_eps",
    "mrc_lr",
    "mrc_epochs",
    "mrc_batch_size",
    "mrc_projection",
    "mrc_split",
    "mrc_examples",
    "mrc_attack",
    "mrc_start_at_zero",
    "mrc_prefix_cache",
    "mrc_cache_mib",
    "mrc_seed",
    "eligible",
    "tie_tolerance",
    "eval_batch_size",
)
"""Fields on which the shared preparation (stored examples, criticality, ranking) depends."""


def official(**changes: object) -> RiftConfig:
    """Return the configuration that behaves like the published code, with ``changes``.

    The published choices were also made on the test split: give the task
    ``selection="official"`` as well, and results are marked leaky.
    """
    attack = AttackConfig(step_size=OFFICIAL_STEP)
    published = RiftConfig(
        bn_mode="update",
        mrc_split="test",
        mrc_attack=attack,
        mrc_start_at_zero=True,
        tie_tolerance=0.0,
        curve_attack=attack,
        curve_runs=1,
        fresh_noise=True,
    )
    return dataclasses.replace(published, **changes)  # type: ignore[arg-type]
