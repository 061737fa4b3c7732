"""Robust instances for text: which training sentences carry robustness, and what to do about it.

"Characterizing the Impacts of Instances on Robustness", Findings of ACL 2023 (paper
2023.findings-acl.146); authors' code ``ruizheng20/robust_data``. The method, its artifact, scores,
groups and remedies are those of :mod:`robustft.methods.instances`; here are its options for text,
and the fine-tuning around them: AdamW, a rate that rises and falls linearly, clipped gradients.

Every run makes the same number of updates, whatever share of the data it trains on. Robust accuracy
on the selection split is that under a perturbation of word embeddings, the cheapest attack on text.
"""

import dataclasses
import math
from typing import cast

import numpy as np
import torch
from torch import nn

from robustft.data.base import content_digest
from robustft.data.text import TextSplit, TextTask
from robustft.errors import NonFiniteLossError
from robustft.methods.base import Result, Row
from robustft.methods.instance_collector import Target
from robustft.methods.instance_config import (
    GroupConfig,
    Keep,
    Use,
    When,
    check_collecting,
    check_treatment,
)
from robustft.methods.instance_losses import MitigationConfig
from robustft.methods.instance_perturbations import (
    IDENTITY,
    EmbeddingPerturbation,
    Perturbation,
)
from robustft.methods.instance_recording import Collection, Subject
from robustft.methods.instance_text import collect_text
from robustft.methods.instance_training import SteadyLoader, plan, run, steps_of, treated_loss
from robustft.methods.rose import linear_rate
from robustft.models.text import TextModel, TextStart
from robustft.training.checks import require_at_least, require_range
from robustft.training.context import RunContext
from robustft.training.loop import BatchLoss, pieces
from robustft.training.mask_log import EpochMasks
from robustft.training.optimizers import OptimizerConfig, build_optimizer, set_lr
from robustft.training.schedules import ScheduleConfig
from robustft.training.seeding import derive_seed, generator
from robustft.training.text_loader import TextLoader

__all__ = ["TextCollectConfig", "TextInstancesConfig", "collect_checkpoints", "train"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TextCollectConfig:
    """What is measured during training, and where it is written."""

    folder: str | None = None
    """Folder for the statistics, which all workers see; None: nothing is measured."""
    when: When = "in_loop"
    """"in_loop": between epochs, by the workers of the run; "offline": training only saves its
    weights there, and they are measured afterwards, spread over checkpoints and shards."""
    every: int = 1
    """Epochs between records, >= 1. The start and the final model are always measured."""
    attacks: tuple[EmbeddingPerturbation, ...] = (EmbeddingPerturbation(),)
    """Perturbations of the word embeddings."""
    control: bool = True
    """Whether "identity" is measured too, which changes nothing and costs one forward."""
    target: Target = "gold"
    """What losses are measured against: the "gold" label or the clean "pred"iction."""
    batch_size: int = 256
    """Texts at a time, >= 1; it changes results by rounding at most."""
    seed: int = 0
    """Of random starts, >= 0."""
    shards: int = 4
    """Parts per checkpoint of "offline", >= 1: what can run side by side."""

    def __post_init__(self) -> None:
        check_collecting(self)

    @property
    def perturbations(self) -> tuple[Perturbation, ...]:
        return (*self.attacks, *([IDENTITY] if self.control else []))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TextInstancesConfig:
    """Fine-tuning of a text classifier with statistics per sentence, or with what they say.

    The defaults are those of the authors' scripts for SST-2 with flooding.
    """

    epochs: int = 3
    """Length of the run, >= 1; an epoch has as many updates as one over the whole split."""
    lr: float = 2e-5
    """Learning rate at its highest, > 0."""
    lr_warmup: float = 0.1
    """Share of all steps in which the rate rises linearly from 0, in [0, 1); then it falls linearly
    to 0."""
    batch_size: int = 32
    """Texts in a global batch, over all workers, >= 1."""
    seed: int = 0
    """Seed of order and dropout, >= 0."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(name="adamw", weight_decay=0.01, decayed="weights")
    )
    """The optimiser; published: AdamW without decay of biases and normalisation."""
    clip_norm: float | None = 1.0
    """L2 norm to which the whole gradient is clipped, > 0. None: not clipped."""
    val_attack: EmbeddingPerturbation = dataclasses.field(default_factory=EmbeddingPerturbation)
    """Perturbation of "val/robust"."""
    eval_every: int = 1
    """Epochs between evaluations, >= 1; the last epoch is always evaluated."""
    keep: Keep = "last"
    """"last", as published; "best": the epoch with the highest robust accuracy on "val"."""
    collect: TextCollectConfig = dataclasses.field(default_factory=TextCollectConfig)
    """Statistics to write."""
    group: GroupConfig = dataclasses.field(default_factory=GroupConfig)
    """Sentences to treat differently."""
    use: Use = "loss"
    """"subset": train on the group alone; "loss": on everything, the group with ``mitigation``."""
    mitigation: MitigationConfig = dataclasses.field(default_factory=MitigationConfig)
    """What is done to the loss of the group."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "epochs", "batch_size", "eval_every")
        require_at_least(self, 0, "seed")
        require_range(self, 0, math.inf, "lr", open_low=True)
        require_range(self, 0, 1, "lr_warmup", open_high=True)
        if self.clip_norm is not None:
            require_range(self, 0, math.inf, "clip_norm", open_low=True)
        check_treatment(self)


def collection_of(config: TextInstancesConfig, context: RunContext) -> Collection:
    """Return the records of a run on text.

    Raises:
        ConfigError: no folder is named, or it holds statistics of another run.
    """
    start, split = cast(TextStart, context.start), _task(context).splits["train"]
    # Where and what is measured does not change the run; when decides which record is which.
    training = dataclasses.replace(config, collect=TextCollectConfig(every=config.collect.every))
    columns = (split.tokens, split.token_types, split.offsets, split.labels, split.ids)
    subject = Subject(
        measure=collect_text,
        options=config.collect,
        model=start.model,
        run=training,
        content=[content_digest(*columns), start.model, start.config or {}, start.num_classes],
    )
    steps = steps_of(config, context)
    return Collection(subject, context, epochs=config.epochs, num_steps=steps)


def collect_checkpoints(config: TextInstancesConfig, context: RunContext) -> None:
    """Measure the checkpoints that a run with ``collect.when = "offline"`` has saved.

    Raises:
        ConfigError: there are no checkpoints, or they are of another run.
    """
    collection_of(config, context).measure_saved()


def train(config: TextInstancesConfig, context: RunContext) -> Result:
    """Fine-tune a text classifier (``context.task`` a TextTask, ``context.start`` a TextStart).

    Every training sentence is measured on the way if ``config.collect`` says so.

    Returns:
        metrics "val/clean", "val/robust", "val/loss" (nats), "updates", and how far the score of
        the group can be trusted; tables "epochs" and, with statistics, "statistics".

    Raises:
        ConfigError: the statistics are of other examples, or the group cannot be made of them.
        DataError: the statistics are incomplete or damaged.
        NonFiniteLossError: training diverged.
    """
    chosen = plan(config, context)
    model = cast(TextModel, context.start.build()).to(context.device)
    optimizer = build_optimizer(config.optimizer, model.named_parameters(), lr=config.lr)
    network = context.engine.prepare(model, optimizer)
    part = TextLoader(
        cast(TextSplit, chosen.split),
        batch_size=config.batch_size,
        seed=config.seed,
        device=context.device,
        pad_id=model.pad_id,
        rank=context.rank,
        world_size=context.world_size,
    )
    loader = SteadyLoader(part, steps_of(config, context))
    loss = treated_loss(config.mitigation, context, chosen)

    def train_epoch(epoch: int) -> Row:
        network.train()
        return dict(_run_epoch(config, context, network, loader, loss, epoch=epoch))

    result = run(
        config,
        context,
        chosen,
        collection=collection_of(config, context) if config.collect.folder else None,
        train_epoch=train_epoch,
        measure=lambda: _measure(config, context),
    )
    choices = {**result.choices, "leaky": _task(context).leaky}
    return dataclasses.replace(result, choices=choices)


def _run_epoch(
    config: TextInstancesConfig,
    context: RunContext,
    network: nn.Module,
    loader: SteadyLoader,
    batch_loss: BatchLoss,
    *,
    epoch: int,
) -> dict[str, float]:
    """Take the steps of an epoch (0-based); return "train/loss", "train/clean", "lr" and masks.

    Each batch is computed in as many parts, and in the precision, that the engine's options say.
    """
    engine, num_steps = context.engine, len(loader)
    totals = torch.zeros(3, dtype=torch.float64, device=context.device)
    masks, rate = EpochMasks(engine.optimizer), 0.0
    for step, batch in enumerate(loader.epoch(epoch)):
        done = epoch * num_steps + step
        factor = linear_rate(done, config.epochs * num_steps, warmup=config.lr_warmup)
        rate = set_lr(
            engine.optimizer,
            ScheduleConfig(),
            lr=config.lr * factor,
            epoch=epoch,
            num_epochs=config.epochs,
        )
        # Dropout of a resumed run is that of the undisturbed one, measured or not.
        torch.manual_seed(derive_seed(config.seed, "layers", epoch, step, context.rank))
        parts = list(pieces(batch, engine.options.accumulate))
        for number, part in enumerate(parts, 1):
            noise = generator(config.seed, "step", epoch, step)
            with engine.computing(synchronise=number == len(parts)):
                loss, logits = batch_loss(network, part, noise)
            engine.backward(loss * part.scale)
            if part.count:
                totals[0] += loss.detach() * part.count
                totals[1] += (logits.detach().argmax(1) == part.labels).sum()
                totals[2] += part.count
        if config.clip_norm is not None:
            engine.clip(engine.module.parameters(), config.clip_norm)
        engine.step()
        masks.add_step()
    loss_sum, correct, count = context.sum(totals).tolist()
    if not math.isfinite(loss_sum):
        raise NonFiniteLossError(
            f"the training loss became {loss_sum} in epoch {epoch + 1}: lower lr = {config.lr:g}, "
            "or start from other weights"
        )
    trained = {"train/loss": loss_sum / count, "train/clean": correct / count, "lr": rate}
    return trained | masks.metrics()


def _measure(config: TextInstancesConfig, context: RunContext) -> dict[str, float]:
    """Return "val/clean", "val/robust" and "val/loss", the clean cross-entropy in nats.

    A sentence counts as robust if it is right, and right after ``val_attack``.
    """
    split = _task(context).splits["val"]
    columns = collect_text(
        cast(TextModel, context.engine.module),
        split,
        perturbations=[config.val_attack],
        batch_size=config.collect.batch_size,
        seed=config.seed,
        device=context.device,
        rank=context.rank,
        world_size=context.world_size,
    ).columns
    clean = columns["clean_pred"] == columns["label"]
    robust = clean & (columns["pert_pred"] == columns["label"])
    sums = [
        float(np.sum(values, dtype=np.float64)) for values in (clean, robust, columns["clean_loss"])
    ]
    totals = context.sum(torch.tensor(sums, dtype=torch.float64, device=context.device))
    names = ("val/clean", "val/robust", "val/loss")
    return dict(zip(names, (totals / len(split)).tolist(), strict=True))


def _task(context: RunContext) -> TextTask:
    return cast(TextTask, context.task)
