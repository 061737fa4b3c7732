"""TWINS: robust fine-tuning with two batch normalisations, one of which stays as pre-trained.

Liu, Xu, Ji, Chan, "TWINS: A Fine-Tuning Framework for Improved Transferability of Adversarial
Robustness and Generalization", 2023, arXiv 2303.11135. Every BatchNorm becomes two: the frozen
one always normalises with the statistics of pre-training, the adaptive one with those of the
batch. Half of each batch passes through either; only the adaptive one is left at the end.
"""

import copy
import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustft.errors import ConfigError
from robustft.methods.base import Result
from robustft.methods.common import AttackConfig
from robustft.methods.fine_tuning import (
    BothForwards,
    FineTuning,
    HeadInit,
    Keep,
    KeepSplit,
    LrControl,
    craft_batch,
    divergence,
    start_model,
    unwrapped_state,
)
from robustft.methods.halving import HalvingConfig
from robustft.models import bare, batch_norms
from robustft.training.augment import AugmentConfig
from robustft.training.checks import require_at_least, require_choice, require_range
from robustft.training.context import RunContext
from robustft.training.loaders import Batch
from robustft.training.loop import BatchLoss
from robustft.training.optimizers import OptimizerConfig
from robustft.training.schedules import ScheduleConfig

__all__ = ["TwinBatchNorm", "TwinsConfig", "add_twins", "export_adaptive", "train"]

Objective = Literal["trades", "at"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TwinsConfig:
    """TWINS; the defaults are those of the published script for CIFAR."""

    objective: Objective = "trades"
    """"trades": CE of natural images and divergence; "at": CE of adversarial images."""
    frozen_weight: float = 1.0
    """Weight of the frozen half's loss (lambda_tw), >= 0; published 1.0 for CIFAR, 0.4 for
    Caltech-256, 0.3 where a script names none."""
    beta: float = 6.0
    """Weight of the divergence, >= 0. A half's divergence is summed and divided by the size of
    the whole batch, as published, so that in effect it is half of this."""
    epochs: int = 60
    """Passes over the training split, >= 1."""
    lr: float = 0.003
    """Learning rate before the schedule, > 0; of the first epochs with "halving"."""
    batch_size: int = 128
    """Images in a global batch, over all workers, >= 1."""
    seed: int = 0
    """Seed of order, augmentation, start noise and a fresh head, >= 0."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(weight_decay=1e-5)
    )
    """The optimiser; published weight decay 1e-5 for CIFAR, 1e-3 for Caltech-256."""
    lr_control: LrControl = "schedule"
    """"schedule"; or "halving", AutoLoRa's automatic rate."""
    schedule: ScheduleConfig = dataclasses.field(
        default_factory=lambda: ScheduleConfig(name="multistep", milestones=(30.0, 50.0))
    )
    """Of the learning rate, in fractional epochs; unused with "halving"."""
    halving: HalvingConfig = dataclasses.field(default_factory=HalvingConfig)
    """When "halving" divides the rate."""
    augment: AugmentConfig = dataclasses.field(
        default_factory=lambda: AugmentConfig(padding_mode="zero")
    )
    """Crops and flips."""
    attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    """PGD on the cross-entropy of the adaptive network in training."""
    val_attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    """PGD on the selection split, which chooses the epoch."""
    head: str | None = None
    """Name of the classifier; None: the last layer."""
    head_init: HeadInit = "keep"
    """"keep": the start's head; "fresh": new weights; "zeros"."""
    keep: Keep = "best"
    """"best": the epoch with the highest robust accuracy on ``keep_split``; "last"."""
    keep_split: KeepSplit = "val"
    """What chooses the epoch; "test" (published) makes results leaky."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "epochs", "batch_size")
        require_at_least(self, 0, "seed")
        require_range(self, 0, math.inf, "frozen_weight", "beta")
        require_range(self, 0, math.inf, "lr", open_low=True)
        require_choice(self, "objective", Objective)
        require_choice(self, "lr_control", LrControl)
        require_choice(self, "head_init", HeadInit)
        require_choice(self, "keep", Keep)
        require_choice(self, "keep_split", KeepSplit)


class TwinBatchNorm(nn.Module):
    """A frozen and an adaptive batch normalisation for the two halves of a batch.

    In training the first ``n // 2`` samples are normalised with the pre-trained statistics, the
    others as usual; otherwise all of them are normalised by the adaptive one. Both have weights and
    biases of their own, and both train those.

    Args:
        adaptive: the pre-trained layer; becomes the child ``adaptive``, a copy ``frozen``.

    Note:
        The published code cuts an odd batch in a way that fails. Here the odd sample is in the
        adaptive half, which is never empty.
    """

    def __init__(self, adaptive: nn.BatchNorm2d) -> None:
        super().__init__()
        self.adaptive = adaptive
        self.frozen = copy.deepcopy(adaptive)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the normalised ``inputs``, of the same shape."""
        if not self.training:
            outputs: Tensor = self.adaptive(inputs)
            return outputs
        half = len(inputs) // 2
        frozen = functional.batch_norm(
            inputs[:half],
            self.frozen.running_mean,
            self.frozen.running_var,
            self.frozen.weight,
            self.frozen.bias,
            training=False,
            eps=self.frozen.eps,
        )
        return torch.cat([frozen, self.adaptive(inputs[half:])])


def add_twins(model: nn.Module) -> nn.Module:
    """Give every BatchNorm of ``model`` its twin, in place, and return it.

    Raises:
        ConfigError: it has no BatchNorm.
    """
    norms: dict[str, Any] = batch_norms(model)
    if not norms:
        raise ConfigError(
            "twins needs BatchNorm, and the network has none: choose one that has, such as a "
            "ResNet, or another method"
        )
    network = bare(model)
    for name, norm in norms.items():
        parent, _, child = name.rpartition(".")
        network.get_submodule(parent).add_module(child, TwinBatchNorm(norm))
    return model


def export_adaptive(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the model with its adaptive BatchNorm alone."""
    return unwrapped_state(model, {TwinBatchNorm: "adaptive"})


def train(config: TwinsConfig, context: RunContext) -> Result:
    """Fine-tune against the task's first threat model; return the adaptive network.

    With L_frozen and L_adaptive the losses of the two halves of a batch, minimise
    ``frozen_weight * L_frozen + L_adaptive``.

    Raises:
        ConfigError: the network has no BatchNorm, or its head is needed and not found.
        CheckpointError: the checkpoint to resume from is no checkpoint of this model.
        NonFiniteLossError: training diverged.
    """
    model = add_twins(start_model(config, context)).to(context.device)
    trades = config.objective == "trades"
    network = BothForwards(model) if trades else model
    run = FineTuning(config, context, network, plain=model, export=export_adaptive)
    loss = _loss(config, context, model)
    passes = config.attack.num_steps + (2 if trades else 1)
    for epoch in run.remaining():
        run.finish_epoch(epoch, run.train_epoch(epoch, loss, passes=(passes, passes)))
    return run.result({"objective": config.objective})


def _loss(config: TwinsConfig, context: RunContext, model: nn.Module) -> BatchLoss:
    def loss(network: nn.Module, batch: Batch, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        # In eval mode, hence the adaptive network.
        adversarial = craft_batch(model, batch, context=context, attack=config.attack, noise=noise)
        if config.objective == "at":
            logits = network(adversarial)
            errors = functional.cross_entropy(logits, batch.labels, reduction="none")
            return _weighted(config, errors), logits
        natural_logits, logits = network(batch.inputs, adversarial)
        errors = functional.cross_entropy(natural_logits, batch.labels, reduction="none")
        distances = divergence(natural_logits, logits)
        return _weighted(config, errors, distances), logits

    return loss


def _weighted(config: TwinsConfig, errors: Tensor, distances: Tensor | None = None) -> Tensor:
    """Return the loss from per-sample terms ``[n]``, the frozen half first."""
    size = len(errors)
    half = size // 2
    # Of a single sample the frozen half is empty, and its mean would be NaN.
    frozen, adaptive = errors[:half].sum() / max(half, 1), errors[half:].mean()
    if distances is not None:
        frozen = frozen + config.beta * distances[:half].sum() / size
        adaptive = adaptive + config.beta * distances[half:].sum() / size
    return config.frozen_weight * frozen + adaptive
