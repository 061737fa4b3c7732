"""Parts of a training loop: one epoch of steps, and the best epoch so far."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from robustft.errors import NonFiniteLossError
from robustft.training.augment import AugmentConfig, augment
from robustft.training.context import RunContext, State
from robustft.training.loaders import Batch
from robustft.training.mask_log import EpochMasks
from robustft.training.optimizers import set_lr
from robustft.training.schedules import ScheduleConfig, schedule_epoch
from robustft.training.seeding import generator, seed_epoch

__all__ = [
    "BatchLoss",
    "Batches",
    "Best",
    "LoopConfig",
    "cpu_state",
    "epoch_metrics",
    "pieces",
    "run_epoch",
    "share_buffers",
]

_logger = logging.getLogger(__name__)

BatchLoss: TypeAlias = Callable[[nn.Module, Batch, torch.Generator], tuple[Tensor, Tensor]]
"""(wrapped network, augmented batch, noise of this step) -> (mean loss, logits it is made of)."""


class Batches(Protocol):
    """What ``run_epoch`` needs of a ``Loader``."""

    def __len__(self) -> int: ...
    def epoch(self, epoch: int) -> Iterator[Batch]: ...


class LoopConfig(Protocol):
    """The fields of a method's config that ``run_epoch`` reads."""

    @property
    def epochs(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def schedule(self) -> ScheduleConfig: ...
    @property
    def augment(self) -> AugmentConfig: ...


def run_epoch(
    config: LoopConfig,
    context: RunContext,
    network: nn.Module,
    loader: Batches,
    batch_loss: BatchLoss,
    *,
    epoch: int,
    update: bool = True,
) -> dict[str, float]:
    """Take one step per batch of an epoch; return its mean loss, accuracy and last rate.

    Everything random follows from (seed, epoch, step, instance id), so an epoch can be repeated
    from a checkpoint of the one before. Sums stay on the device; the host reads them once. Each
    batch is computed in as many parts, and in the precision, that the engine's options say.

    Args:
        config: length, rate, seed, schedule and augmentation.
        context: gives the engine, which has been prepared, and the other ranks.
        network: what ``engine.prepare`` returned, in the mode the method wants.
        loader: the training batches.
        batch_loss: the method's loss on a batch.
        epoch: 0-based.
        update: False only runs the batches forward, for what BatchNorm picks up on the way; the
            engine then needs no optimiser.

    Returns:
        "loss" (mean over examples), "accuracy" (fraction, of the logits the loss is made of), "lr";
        and of ROSE's optimiser what ``EpochMasks`` says, "mask/kept" and others.

    Raises:
        NonFiniteLossError: the epoch's loss is NaN or infinite; every rank raises.
    """
    engine = context.engine
    seed_epoch(config.seed, epoch, context.rank)
    totals = torch.zeros(3, dtype=torch.float64, device=context.device)
    rate = config.lr if update else 0.0
    masks = EpochMasks(engine.optimizer if update else None)
    for step, batch in enumerate(loader.epoch(epoch)):
        if update:
            rate = set_lr(
                engine.optimizer,
                config.schedule,
                lr=config.lr,
                epoch=schedule_epoch(
                    config.schedule, epoch=epoch, step=step, num_steps=len(loader)
                ),
                num_epochs=config.epochs,
            )
        inputs = augment(
            batch.inputs, batch.ids, config=config.augment, seed=config.seed, epoch=epoch
        )
        batch = dataclasses.replace(batch, inputs=inputs)
        parts = list(pieces(batch, engine.options.accumulate if update else 1))
        for number, part in enumerate(parts, 1):
            # Anew for each part: what is drawn belongs to (seed, instance id).
            noise = generator(config.seed, "step", epoch, step)
            if update:
                with engine.computing(synchronise=number == len(parts)):
                    loss, logits = batch_loss(network, part, noise)
                engine.backward(loss * part.scale)
            else:
                with torch.no_grad():
                    loss, logits = batch_loss(network, part, noise)
            if part.count:
                totals[0] += loss.detach() * part.count
                totals[1] += (logits.detach().argmax(1) == part.labels).sum()
                totals[2] += part.count
        if update:
            engine.step()
            masks.add_step()
    loss_sum, correct, count = context.sum(totals).tolist()
    mean_loss = loss_sum / count
    if not math.isfinite(mean_loss):
        raise NonFiniteLossError(
            f"the training loss became {mean_loss} in epoch {epoch + 1}: lower lr = {config.lr:g}, "
            "or start from other weights"
        )
    return {"loss": mean_loss, "accuracy": correct / count, "lr": rate, **masks.metrics()}


def epoch_metrics(trained: Mapping[str, float], *, accuracy: str) -> dict[str, float]:
    """Return what ``run_epoch`` returned under the names that a method reports.

    Args:
        trained: of ``run_epoch``.
        accuracy: what its accuracy is called: "train/robust", "train/clean".
    """
    names = {"loss": "train/loss", "accuracy": accuracy}
    return {names.get(name, name): value for name, value in trained.items()}


def pieces(batch: Batch, count: int) -> Iterator[Batch]:
    """Yield a share in exactly ``count`` parts whose scaled mean losses add up to the whole's.

    Workers must agree on the number of backwards, so a part may be a row at weight zero.
    """
    if count == 1:
        yield batch
        return
    for rows in torch.arange(len(batch.labels), device=batch.labels.device).tensor_split(count):
        size = len(rows)
        chosen = rows if size else torch.zeros_like(batch.labels[:1])
        yield Batch(
            inputs=batch.inputs[chosen],
            labels=batch.labels[chosen],
            ids=batch.ids[chosen],
            scale=batch.scale * size / len(batch.labels),
            count=size if batch.count else 0,
        )


@dataclasses.dataclass(slots=True)
class Best:
    """The epoch to keep: its score, 1-based number and weights (in the host's memory)."""

    score: float = -math.inf
    epoch: int = 0
    model: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def offer(self, score: float, *, epoch: int, state: Callable[[], State]) -> None:
        """Keep an epoch if its score is higher than any before it; ties go to the earlier one.

        Args:
            score: higher is better.
            epoch: 1-based.
            state: ``engine.model_state``; called on every rank, for sharded engines gather in it.
        """
        if score > self.score:
            self.score, self.epoch, self.model = score, epoch, cpu_state(state()["model"])

    def state(self) -> State:
        """Return what ``load`` reads."""
        return {"score": self.score, "epoch": self.epoch, "model": dict(self.model)}

    @classmethod
    def load(cls, state: State) -> "Best":
        """Restore what ``state`` returned."""
        return cls(float(state["score"]), int(state["epoch"]), dict(state["model"]))


def cpu_state(model: dict[str, Any]) -> dict[str, Tensor]:
    """Return a copy of a state dict in the host's memory."""
    return {name: value.detach().to("cpu", copy=True) for name, value in model.items()}


def share_buffers(model: nn.Module, context: RunContext) -> None:
    """Give every rank rank 0's buffers (BatchNorm statistics drift apart between ranks)."""
    if context.world_size == 1:
        return
    groups: dict[torch.dtype, list[Tensor]] = {}
    for buffer in model.buffers():
        groups.setdefault(buffer.dtype, []).append(buffer)
    for buffers in groups.values():
        flat = torch.cat([buffer.detach().reshape(-1) for buffer in buffers])
        flat = context.sum(flat if context.rank == 0 else torch.zeros_like(flat))
        pieces = torch.split(flat, [buffer.numel() for buffer in buffers])
        for buffer, piece in zip(buffers, pieces, strict=True):
            buffer.copy_(piece.reshape(buffer.shape))
