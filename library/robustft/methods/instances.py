"""Robust instances: which training examples carry robustness, and what to do about it.

"Characterizing the Impacts of Instances on Robustness", Findings of ACL 2023 (paper
2023.findings-acl.146); authors' code ``ruizheng20/robust_data``, image extension
``zahragolpa/robust_data``. Three steps:

1. *Collect*: before, during and after training every training instance is measured, clean and
   perturbed (``instance_collector``), into a statistics artifact (``instance_statistics``).
2. *Select*: a score over the records ranks the instances (``instance_selection``); the most robust
   ones are those whose perturbed loss stayed lowest.
3. *Train* again: on a group alone, or on everything with the loss of a group kept above zero by
   flooding or soft labels (``instance_losses``).

Every run makes the same number of updates, whatever share of the data it trains on, and reports the
loss on the selection split beside that on the training examples: the curves in which overfitting
shows. Groups are to be compared with the group "random".
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from robustft.data.base import content_digest
from robustft.methods.base import Result, Row
from robustft.methods.common import craft, eval_mode, shard, validate
from robustft.methods.instance_collector import collect
from robustft.methods.instance_config import CollectConfig, GroupConfig, InstancesConfig
from robustft.methods.instance_losses import flooding_loss, soft_label_loss
from robustft.methods.instance_recording import Collection, Subject
from robustft.methods.instance_selection import select
from robustft.methods.instance_statistics import InstanceStatistics
from robustft.methods.instance_training import SteadyLoader, plan, run, steps_of, treated_loss
from robustft.training.augment import AugmentConfig, augment
from robustft.training.context import RunContext
from robustft.training.loaders import Batch, Loader, rows
from robustft.training.loop import epoch_metrics, run_epoch, share_buffers
from robustft.training.optimizers import build_optimizer

__all__ = [
    "CollectConfig",
    "GroupConfig",
    "InstanceStatistics",
    "InstancesConfig",
    "collect",
    "collect_checkpoints",
    "flooding_loss",
    "select",
    "soft_label_loss",
    "train",
]

STILL = AugmentConfig(crop_padding=0, flip=0.0)


def collection_of(config: InstancesConfig, context: RunContext) -> Collection:
    """Return the records of a run on images.

    Raises:
        ConfigError: no folder is named, or it holds statistics of another run.
    """
    start, split = context.start, context.task.splits["train"]
    # Where and what is measured does not change the run; when decides which record is which.
    training = dataclasses.replace(config, collect=CollectConfig(every=config.collect.every))
    subject = Subject(
        measure=collect,
        options=config.collect,
        model=start.architecture,
        run=training,
        content=[
            content_digest(split.images, split.labels, split.ids),
            start.architecture,
            start.mean,
            start.std,
        ],
    )
    steps = steps_of(config, context)
    return Collection(subject, context, epochs=config.epochs, num_steps=steps)


def collect_checkpoints(config: InstancesConfig, context: RunContext) -> None:
    """Measure the checkpoints that a run with ``collect.when = "offline"`` has saved.

    Raises:
        ConfigError: there are no checkpoints, or they are of another run.
    """
    collection_of(config, context).measure_saved()


def _measure(config: InstancesConfig, context: RunContext) -> dict[str, float]:
    """Return "val/clean", "val/robust" and "val/loss", the clean cross-entropy in nats."""
    model, split = context.engine.module, context.task.splits["val"]
    measured = validate(
        model,
        context,
        attack=config.val_attack,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    positions = shard(split, context)
    total = torch.zeros(1, dtype=torch.float64, device=context.device)
    with eval_mode(model), torch.no_grad():
        for begin in range(0, len(positions), config.batch_size):
            inputs, labels, _ = rows(
                split, positions[begin : begin + config.batch_size], device=context.device
            )
            total += functional.cross_entropy(model(inputs), labels, reduction="sum")
    return {**measured, "val/loss": float(context.sum(total)) / len(split)}


def train(config: InstancesConfig, context: RunContext) -> Result:
    """Train, and measure every training instance on the way if ``config.collect`` says so.

    Raises:
        ConfigError: the statistics are of other examples, or the group cannot be made of them.
        DataError: the statistics are incomplete or damaged.
        NonFiniteLossError: training diverged.
    """
    chosen = plan(config, context)
    model = context.start.build().to(context.device)
    optimizer = build_optimizer(config.optimizer, model.named_parameters(), lr=config.lr)
    network = context.engine.prepare(model, optimizer)
    part = Loader(
        chosen.split,
        batch_size=config.batch_size,
        seed=config.seed,
        device=context.device,
        rank=context.rank,
        world_size=context.world_size,
    )

    def augmented(batch: Batch, turn: int) -> Tensor:
        return augment(batch.inputs, batch.ids, config=config.augment, seed=config.seed, epoch=turn)

    def shown(batch: Batch, noise: torch.Generator) -> Tensor:
        if config.training == "clean":
            return batch.inputs
        return craft(
            context.engine.module,
            batch.inputs,
            batch.labels,
            ids=batch.ids,
            threat=context.task.threat,
            attack=config.attack,
            start_noise=noise,
        )

    loader = SteadyLoader(part, steps_of(config, context), augment=augmented)
    loss = treated_loss(config.mitigation, context, chosen, shown=shown)
    # The loader has augmented already.
    pace = dataclasses.replace(config, augment=STILL)

    def train_epoch(epoch: int) -> Row:
        network.train()
        trained = run_epoch(pace, context, network, loader, loss, epoch=epoch)
        share_buffers(context.engine.module, context)
        accuracy = "train/clean" if config.training == "clean" else "train/robust"
        return epoch_metrics(trained, accuracy=accuracy)

    return run(
        config,
        context,
        chosen,
        collection=collection_of(config, context) if config.collect.folder else None,
        train_epoch=train_epoch,
        measure=lambda: _measure(config, context),
    )
