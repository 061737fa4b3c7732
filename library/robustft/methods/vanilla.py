"""Vanilla robust fine-tuning ("rft"): the baseline of AutoLoRa, with the modes of RobustSSL.

All images pass through the same weights. What is trained and on what ("mode"):

* "slf", standard linear: the head, on natural images, the rest as it is;
* "alf", adversarial linear: the head, on adversarial images;
* "aff", adversarial full: everything, by one of three losses ("variant").

Shafahi, Saadatpanah, Zhu, Ghiasi, Studer, Jacobs, Goldstein, "Adversarially robust transfer
learning", 2020, arXiv 1905.08232; the variants are those of the code of RobustSSL (Xu et al.) and
of TWINS (Liu, Xu, Ji, Chan, 2023, arXiv 2303.11135).
"""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustft.errors import ConfigError
from robustft.methods.base import Result
from robustft.methods.common import AttackConfig, eval_mode
from robustft.methods.fine_tuning import (
    BothForwards,
    FineTuning,
    HeadInit,
    Keep,
    KeepSplit,
    LrControl,
    craft_batch,
    divergence,
    find_head,
    start_model,
)
from robustft.methods.halving import HalvingConfig
from robustft.training.augment import AugmentConfig
from robustft.training.checks import require_at_least, require_choice, require_range
from robustft.training.context import RunContext
from robustft.training.loaders import Batch
from robustft.training.loop import BatchLoss
from robustft.training.optimizers import OptimizerConfig
from robustft.training.schedules import ScheduleConfig

__all__ = ["RftConfig", "train"]

Mode = Literal["slf", "alf", "aff"]
Variant = Literal["trades-kl", "trades-ce", "at"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RftConfig:
    """Vanilla robust fine-tuning; the defaults are RobustSSL's for 32 px and mode "aff"."""

    mode: Mode = "aff"
    """"slf": head only, natural images; "alf": head only, adversarial images; "aff": everything,
    adversarial images. Where only the head is trained, BatchNorm uses its running statistics."""
    variant: Variant = "trades-kl"
    """Loss of "aff". "trades-kl": CE(z) + beta KL(z || z'), the attack climbs the divergence;
    "trades-ce": the same loss, the attack climbs the cross-entropy; "at": CE(z')."""
    beta: float = 6.0
    """Weight of the divergence, >= 0; unused by "at"."""
    dual_bn: bool = False
    """Whether natural images have BatchNorm layers of their own, dropped at the end; needs a
    "trades" variant."""
    epochs: int = 25
    """Passes over the training split, >= 1."""
    lr: float = 0.1
    """Learning rate before the schedule, > 0; of the first epochs with "halving"."""
    batch_size: int = 128
    """Images in a global batch, over all workers, >= 1."""
    seed: int = 0
    """Seed of order, augmentation, start noise and a fresh head, >= 0."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(weight_decay=2e-4)
    )
    """The optimiser."""
    lr_control: LrControl = "schedule"
    """"schedule"; or "halving", AutoLoRa's automatic rate."""
    schedule: ScheduleConfig = dataclasses.field(
        default_factory=lambda: ScheduleConfig(name="multistep", milestones=(15.0, 20.0))
    )
    """Of the learning rate, in fractional epochs; unused with "halving"."""
    halving: HalvingConfig = dataclasses.field(default_factory=HalvingConfig)
    """When "halving" divides the rate."""
    augment: AugmentConfig = dataclasses.field(
        default_factory=lambda: AugmentConfig(padding_mode="zero")
    )
    """Crops and flips."""
    attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    """PGD in training; "trades-kl" starts it by ``start_deviation`` instead."""
    start_deviation: float = 0.001
    """Standard deviation of the Gaussian start of "trades-kl" in [0, 1] pixel units, > 0."""
    val_attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    """PGD on the selection split, which chooses the epoch."""
    head: str | None = None
    """Name of the classifier; None: the last layer."""
    head_init: HeadInit = "keep"
    """"keep": the start's head; "fresh": new weights; "zeros" (RobustSSL)."""
    keep: Keep = "best"
    """"best": the epoch with the highest robust accuracy on ``keep_split``; "last"."""
    keep_split: KeepSplit = "val"
    """What chooses the epoch; "test" (published) makes results leaky."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "epochs", "batch_size")
        require_at_least(self, 0, "seed")
        require_range(self, 0, math.inf, "beta")
        require_range(self, 0, math.inf, "lr", "start_deviation", open_low=True)
        require_choice(self, "mode", Mode)
        require_choice(self, "variant", Variant)
        require_choice(self, "lr_control", LrControl)
        require_choice(self, "head_init", HeadInit)
        require_choice(self, "keep", Keep)
        require_choice(self, "keep_split", KeepSplit)
        if self.dual_bn and (self.mode != "aff" or self.variant == "at"):
            raise ConfigError(
                "dual_bn = True: natural images are trained on only in mode 'aff' with a 'trades' "
                "variant; choose those or leave it False"
            )


def train(config: RftConfig, context: RunContext) -> Result:
    """Fine-tune against the task's first threat model.

    Raises:
        ConfigError: the head is needed and not found, or ``dual_bn`` without BatchNorm.
        CheckpointError: the checkpoint to resume from is no checkpoint of this model.
        NonFiniteLossError: training diverged.

    Note:
        RobustSSL computes the natural logits that its attack climbs away from anew in every step;
        in eval mode they are the same every time, so here it is done once.
    """
    model = start_model(config, context)
    linear = config.mode != "aff"
    if linear:
        _, head = find_head(model, config.head, num_classes=context.start.num_classes)
        model.requires_grad_(False)
        head.requires_grad_(True)
    model.to(context.device)
    if linear or config.variant == "at":
        loss = _one_forward(config, context, model)
        run = FineTuning(config, context, model)
    else:
        both = BothForwards(model, dual_bn=config.dual_bn).to(context.device)
        loss = _two_forwards(config, context, both)
        run = FineTuning(config, context, both, plain=model)
    name = "train/clean" if config.mode == "slf" else "train/robust"
    for epoch in run.remaining():
        trained = run.train_epoch(
            epoch, loss, passes=_passes(config), training=not linear, accuracy_name=name
        )
        run.finish_epoch(epoch, trained)
    variant = {} if linear else {"variant": config.variant}
    return run.result({"mode": config.mode, **variant})


def _passes(config: RftConfig) -> tuple[int, int]:
    """Return forwards and backwards of an image in a step; one of the head alone counts as one."""
    steps = config.attack.num_steps
    if config.mode == "slf":
        return 1, 1
    if config.mode == "alf" or config.variant == "at":
        return steps + 1, steps + 1
    # "trades-kl": one more for the logits that the attack climbs away from.
    return steps + 2 + (config.variant == "trades-kl"), steps + 2


def _one_forward(config: RftConfig, context: RunContext, model: nn.Module) -> BatchLoss:
    """Return CE of natural ("slf") or adversarial images."""

    def loss(network: nn.Module, batch: Batch, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        inputs = batch.inputs
        if config.mode != "slf":
            inputs = craft_batch(model, batch, context=context, attack=config.attack, noise=noise)
        logits = network(inputs)
        return functional.cross_entropy(logits, batch.labels), logits

    return loss


def _two_forwards(config: RftConfig, context: RunContext, both: BothForwards) -> BatchLoss:
    """Return CE(z) + beta KL(z || z')."""
    by_divergence = config.variant == "trades-kl"

    def loss(network: nn.Module, batch: Batch, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        clean_logits = None
        if by_divergence:
            with eval_mode(both), torch.no_grad():
                clean_logits = both.natural(batch.inputs)
        adversarial = craft_batch(
            both.model,
            batch,
            context=context,
            attack=config.attack,
            noise=noise,
            start_deviation=config.start_deviation if by_divergence else None,
            clean_logits=clean_logits,
        )
        natural_logits, logits = network(batch.inputs, adversarial)
        natural = functional.cross_entropy(natural_logits, batch.labels)
        distance = divergence(natural_logits, logits).mean()
        return natural + config.beta * distance, logits

    return loss
