"""Robust instances, last step: training on a group of instances, or on all with a group treated.

What images and texts have in common: who is treated (``plan``), by what loss (``treated_loss``),
in as many updates as the whole split has (``SteadyLoader``), with records on the way (``run``).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustft.data.base import Split
from robustft.methods.base import Result, Row
from robustft.methods.instance_config import GroupConfig, TrainingOptions
from robustft.methods.instance_losses import InstanceMask, MitigationConfig, mitigated_loss
from robustft.methods.instance_recording import Collection
from robustft.methods.instance_selection import Aggregates, confounding, reliability, split_groups
from robustft.methods.instance_statistics import InstanceStatistics
from robustft.training.context import RunContext
from robustft.training.loaders import Batch
from robustft.training.loop import Batches, BatchLoss, Best

__all__ = ["Plan", "SteadyLoader", "plan", "run", "steps_of", "treated_loss"]

# The group.


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What training does with which instances.

    Args:
        split: the examples to train on (of text where the task is).
        mask: which of them are treated.
        size: how many are.
        level: of flooding, in nats.
        notes: how far the score can be trusted, for metrics.
        source: which statistics it is of, for reports.
    """

    split: Split
    mask: InstanceMask
    size: int
    level: float
    notes: dict[str, float]
    source: dict[str, str | int]


def plan(config: TrainingOptions, context: RunContext) -> Plan:
    """Return the examples to train on and those whose loss is treated, both from statistics.

    Raises:
        ConfigError: the statistics are of other examples, or the group cannot be made.
        DataError: the statistics are incomplete or damaged.
    """
    split, group = context.task.splits["train"], config.group
    level, notes, source = config.mitigation.level, dict[str, float](), dict[str, str | int]()
    ids, chosen = split.ids, np.ones(len(split), dtype=np.bool_)
    if group.statistics is not None:
        statistics = InstanceStatistics(group.statistics, split=split)
        name = group.perturbation or next(iter(statistics.manifest.perturbations))
        ids, chosen = statistics.ids, np.ones(len(split), dtype=np.bool_)
        source = {"perturbation": name, "records": len(statistics.records)}
        if group.which != "all":
            aggregates = statistics.aggregate(name, only_correct=group.only_correct)
            chosen = split_groups(
                aggregates,
                group.metric,
                share=group.share,
                groups=(group.which,),
                balance=group.balance,
                num_classes=context.task.num_classes,
                seed=group.seed,
            )[group.which]
            notes = _trust(statistics, aggregates, name, group)
        if config.mitigation.level_quantile is not None:
            losses = statistics.column("clean_loss", perturbation=name, record=-1)[chosen]
            level = float(np.quantile(losses.astype(np.float64), config.mitigation.level_quantile))
    mask = InstanceMask(ids, chosen, device=context.device)
    mask.require(split.ids)
    if config.use == "subset" and group.which != "all":
        split = split.take(np.flatnonzero(np.isin(split.ids, ids[chosen])))
    return Plan(split, mask, int(chosen.sum()), level, notes, source)


def _trust(
    statistics: InstanceStatistics, aggregates: Aggregates, perturbation: str, group: GroupConfig
) -> dict[str, float]:
    """Return how far the score can be trusted: what a report shows beside the group."""
    mixed = confounding(aggregates, group.metric)
    notes = {"score/clean_loss": mixed["clean_loss"], "score/label": mixed["label"]}
    if len(statistics.records) > 1:
        halves = statistics.halves(perturbation, only_correct=group.only_correct)
        notes["score/split_half"] = reliability(halves, group.metric)
    return {label: value for label, value in notes.items() if math.isfinite(value)}


def _choices(
    config: TrainingOptions, plan: Plan, epoch: int
) -> dict[str, str | float | int | bool]:
    """Return what a report must name: score, group, share, size and remedy."""
    found: dict[str, str | float | int | bool] = {"epoch": epoch, "group": config.group.which}
    if config.group.which != "all":
        found |= {
            **plan.source,
            "score": config.group.metric,
            "share": config.group.share,
            "use": config.use,
        }
    found |= {"group_size": plan.size, "mitigation": config.mitigation.kind}
    if config.mitigation.kind == "flooding":
        found["level"] = plan.level
    if config.mitigation.kind == "soft_label":
        found["confidence"] = config.mitigation.confidence
    return found


# Batches and losses.


def steps_of(config: TrainingOptions, context: RunContext) -> int:
    """Return the number of updates of an epoch: those of the whole split, whatever the group."""
    return -(-len(context.task.splits["train"]) // config.batch_size)


class SteadyLoader:
    """Batches of a part of the data, as many per epoch as the whole has.

    Passes over the part follow one another, each shuffled and augmented anew, and an epoch is
    ``num_steps`` of their batches. With the whole split it gives what its loader gives.

    Args:
        loader: batches of the part.
        num_steps: of an epoch.
        augment: (batch, number of the pass) -> inputs in place of the batch's; None: these.
    """

    def __init__(
        self,
        loader: Batches,
        num_steps: int,
        *,
        augment: Callable[[Batch, int], Tensor] | None = None,
    ) -> None:
        self._loader, self._num_steps, self._augment = loader, num_steps, augment

    def __len__(self) -> int:
        return self._num_steps

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield this worker's shares of the epoch's global batches, augmented."""
        length = len(self._loader)
        first = epoch * self._num_steps
        for turn in itertools.count(first // length):
            begin, end = turn * length, (turn + 1) * length
            window = slice(max(first - begin, 0), min(first + self._num_steps - begin, length))
            for batch in itertools.islice(self._loader.epoch(turn), window.start, window.stop):
                if self._augment is None:
                    yield batch
                else:
                    yield dataclasses.replace(batch, inputs=self._augment(batch, turn))
            if end >= first + self._num_steps:
                return


def treated_loss(
    mitigation: MitigationConfig,
    context: RunContext,
    plan: Plan,
    *,
    shown: Callable[[Batch, torch.Generator], Tensor] | None = None,
) -> BatchLoss:
    """Return the loss of a step, the group's mitigated.

    Args:
        mitigation: what is done to the group.
        context: of the run.
        plan: who is in the group.
        shown: (batch, noise of this step) -> what the network is shown; None: the inputs.
    """

    def loss(network: nn.Module, batch: Batch, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        logits = network(batch.inputs if shown is None else shown(batch, noise))
        chosen = plan.mask.of(batch.ids)
        mean = None
        if mitigation.scope == "batch":
            mean = _mean_of_chosen(context, batch, logits.detach(), chosen)
        losses = mitigated_loss(
            mitigation, logits, batch.labels, chosen, level=plan.level, mean=mean
        )
        return losses.mean(), logits

    return loss


def _mean_of_chosen(context: RunContext, batch: Batch, logits: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean cross-entropy of the chosen instances of the global batch, ``[]``."""
    losses = functional.cross_entropy(logits, batch.labels, reduction="none")
    # A share of no images stands in the step only to keep the workers together.
    kept = chosen & (torch.arange(len(chosen), device=chosen.device) < batch.count)
    sums = torch.stack([losses[kept].sum(), kept.sum().to(losses.dtype)])
    total, count = context.sum(sums).unbind()
    return total / count.clamp(min=1)


# Training.


def run(
    config: TrainingOptions,
    context: RunContext,
    plan: Plan,
    *,
    collection: Collection | None,
    train_epoch: Callable[[int], Row],
    measure: Callable[[], Mapping[str, float]],
) -> Result:
    """Train the prepared network epoch by epoch, with evaluations, records and checkpoints.

    Args:
        config: how long, and what is kept.
        context: of the run; its engine is prepared.
        plan: what is trained on.
        collection: makes the records; None: nothing is measured.
        train_epoch: trains an epoch (0-based), in train mode, and returns its row.
        measure: returns "val/clean", "val/robust" and "val/loss" of the network as it is.

    Raises:
        DataError: the statistics that were collected are incomplete.
    """
    best, epoch_rows = Best(), list[Row]()
    saved = context.resume()
    if saved is not None:
        context.engine.load_state(saved["engine"])
        best, epoch_rows = Best.load(saved["best"]), list(saved["epochs"])
    if collection is not None and saved is None:
        collection.visit(0)
    for epoch in range(len(epoch_rows), config.epochs):
        metrics = dict(train_epoch(epoch))
        if epoch + 1 == config.epochs or (epoch + 1) % config.eval_every == 0:
            metrics.update(measure())
            score = metrics["val/robust"] if config.keep == "best" else float(epoch)
            best.offer(score, epoch=epoch + 1, state=context.engine.state)
        if collection is not None and collection.due(epoch + 1):
            collection.visit(epoch + 1)
        epoch_rows.append({"epoch": epoch + 1, **metrics})
        context.report(
            metrics,
            step=epoch + 1,
            total=config.epochs,
            checkpoint=lambda: {
                "engine": context.engine.state(),
                "best": best.state(),
                "epochs": list(epoch_rows),
            },
        )
    tables: dict[str, Sequence[Row]] = {"epochs": epoch_rows}
    if collection is not None:
        tables["statistics"] = collection.finish()
    kept = epoch_rows[best.epoch - 1]
    return Result(
        state=best.model,
        metrics={
            **{name: kept[name] for name in ("val/clean", "val/robust", "val/loss")},
            "updates": float(config.epochs * steps_of(config, context)),
            **plan.notes,
        },
        choices=_choices(config, plan, best.epoch),
        tables=tables,
    )
