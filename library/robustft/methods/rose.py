"""ROSE: robust selective fine-tuning of pre-trained language models.

Jiang, Zhou, Lin, Li, Zhou, Jiang, "ROSE: Robust Selective Fine-tuning for Pre-trained Language
Models", EMNLP 2022, arXiv 2210.09658, with the released code where the paper leaves things open.

In every step, each eligible parameter tensor gets a risk, and only the less risky ones move:

* "first": the norm of the gradient of KL(P || Q) + KL(Q || P), where P and Q are the predictions of
  two dropout passes; this gradient chooses, the update is that of the task's loss;
* "second": | ||(1 - beta1) g|| / ||m|| - 1 |, how far the gradient is from its running average;
* "ensemble": gamma of the first mask, 1 - gamma of the second.

``RoseAdamW`` is the optimiser and chooses; the function ``train`` here is the loop around it, also
for the baselines, which are other losses (``text_losses``) or masks (``child_tuning``) in place of
ROSE's.
"""

import math
from collections.abc import Iterator, Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from robustft.data.text import TextSplit, TextTask
from robustft.errors import ConfigError, NonFiniteLossError
from robustft.methods.base import Result, Row
from robustft.methods.child_tuning import ChildTuning
from robustft.methods.common import eval_mode
from robustft.methods.fine_tuning import PASSES
from robustft.methods.rose_config import RoseConfig
from robustft.methods.text_losses import (
    TextLoss,
    WithEmbeddings,
    build_text_loss,
    kl_term,
)
from robustft.models.text import TextModel
from robustft.training.context import RunContext, State
from robustft.training.loaders import Batch
from robustft.training.loop import Best, pieces
from robustft.training.mask_log import MaskLog
from robustft.training.optimizers import set_lr
from robustft.training.rose_adamw import RoseAdamW, StepRecord
from robustft.training.rose_masks import MaskOptions
from robustft.training.schedules import ScheduleConfig
from robustft.training.seeding import derive_seed, generator
from robustft.training.text_loader import TextLoader, text_rows

__all__ = [
    "MaskOptions",
    "RoseAdamW",
    "RoseConfig",
    "StepRecord",
    "dropout_rates",
    "linear_rate",
    "set_dropout",
    "train",
]

PERTURBING = ("r3f", "freelb", "smart")
"""Losses that need the model wrapped in ``WithEmbeddings``."""
PAIR = 2
"""Forwards, and backwards, of the disagreement of two dropout passes."""
NUM_TOTALS = 7
"""Sums of an epoch over texts: loss, correct, texts; disagreement, texts it was measured on;
forwards, backwards."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train(config: RoseConfig, context: RunContext) -> Result:
    """Fine-tune a text classifier (``context.task`` a TextTask, ``context.start`` a TextStart).

    Returns:
        metrics "val/clean", "passes/forwards" and "passes/backwards" (texts, of training and
        validation); table "epochs", with what the masks did, and table "mask_frequency", how
        often each tensor was kept.

    Raises:
        ConfigError: nothing is eligible, the model has no dropout to disagree by, or the device
            does not do the precision.
        NonFiniteLossError: training diverged.
    """
    run = _Run(config, context)
    while len(run.rows) < config.epochs:
        run.finish_epoch(run.train_epoch(len(run.rows)))
    return run.result()


# Pieces.


def set_dropout(model: nn.Module, rate: float) -> None:
    """Set every dropout probability of ``model``, whatever it was.

    Args:
        model: changed in place: its ``nn.Dropout`` layers, and numbers called "...dropout..." that
            attention modules keep for themselves.
        rate: in [0, 1).
    """
    for module, attribute in _dropouts(model):
        setattr(module, attribute, rate)


def dropout_rates(model: nn.Module) -> list[float]:
    """Return every dropout probability of ``model``."""
    return [float(getattr(module, attribute)) for module, attribute in _dropouts(model)]


def _dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            yield module, "p"
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                yield module, name


def linear_rate(step: int, num_steps: int, *, warmup: float = 0.0) -> float:
    """Return the factor on the learning rate of a step: linearly up from 0, linearly down to 0.

    The first step after the warm-up has the full rate, the last of the run 1 / (steps without
    warm-up) of it.

    Args:
        step: 0-based, over the whole run.
        num_steps: of the whole run.
        warmup: share of the steps in which the rate rises, in [0, 1).
    """
    rising = round(warmup * num_steps)
    if step < rising:
        return step / rising
    return (num_steps - step) / (num_steps - rising)


class _FirstOrder:
    """The gradients of the disagreement of a step, in buffers of their own.

    ``torch.autograd.grad`` leaves ``.grad`` alone and does not wake the hooks of data parallelism,
    so the loss's backward through the same graph is synchronised as always.

    Args:
        parameters: name -> the eligible parameters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._grads: list[Tensor] = []

    def add(self, pair: tuple[Tensor, Tensor], weight: float, *, keep_graph: bool) -> Tensor:
        """Add the gradients of a batch; return its disagreement, ``[]``, without a gradient.

        Args:
            pair: logits ``[n, classes]`` of two dropout passes.
            weight: factor on the gradients; 0 for rows that only stand in.
            keep_graph: whether the loss is yet to be differentiated.
        """
        disagreement = kl_term(*pair)
        grads = torch.autograd.grad(
            disagreement * weight,
            list(self._parameters.values()),
            retain_graph=keep_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        # Not in place: autograd may return one tensor for two parameters.
        self._grads = list(torch._foreach_add(self._grads, grads) if self._grads else grads)
        return disagreement.detach()

    def hand_over(self, optimizer: RoseAdamW, config: RoseConfig, context: RunContext) -> None:
        """Give the optimiser the gradients, or their norms, of all ranks together."""
        norms = config.first_order_reduce == "norm"
        values = self._grads
        if norms:
            squares = torch.stack(torch._foreach_norm(self._grads)) ** 2
            values = list(context.sum(squares).sqrt().unbind())
        elif context.world_size > 1:
            flat = context.sum(torch.cat([grad.flatten() for grad in self._grads]))
            parts = torch.split(flat, [grad.numel() for grad in self._grads])
            pairs = zip(parts, self._grads, strict=True)
            values = [part.view_as(grad) for part, grad in pairs]
        optimizer.hand_over(dict(zip(self._parameters, values, strict=True)), norms=norms)


class _Run:
    """A run: its model, optimiser, batches and what it has recorded so far."""

    def __init__(self, config: RoseConfig, context: RunContext) -> None:
        self._config, self._context = config, context
        if config.precision == "fp16" and context.device.type != "cuda":
            raise ConfigError(
                f"precision = 'fp16' needs CUDA, and this is {context.device.type}: choose 'bf16' "
                "or 'float32'"
            )
        self._task = cast(TextTask, context.task)
        model = cast(TextModel, context.start.build())
        if config.kl_dropout is not None:
            set_dropout(model, config.kl_dropout)
        if config.uses_first_order and not any(dropout_rates(model)):
            raise ConfigError(
                f"variant = {config.variant!r} compares two dropout passes, and the model has no "
                "dropout: set kl_dropout = 0.1"
            )
        model.to(context.device)
        self._model = model
        parameters = {n: value for n, value in model.named_parameters() if value.requires_grad}
        self._optimizer = RoseAdamW(
            parameters.items(),
            lr=config.lr,
            variant=config.variant,
            upper=config.upper,
            lower=config.lower,
            gamma=config.gamma,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            warmup_steps=config.warmup_steps,
            eligible=config.eligible,
            mask=config.mask,
            seed=config.seed,
            options=config.options,
        )
        self._eligible = {
            name: value
            for name, value in parameters.items()
            if self._optimizer.is_eligible(name, value)
        }
        self._perturbs = config.text_loss.name in PERTURBING
        wrapped = WithEmbeddings(model) if self._perturbs else model
        self._network = context.engine.prepare(wrapped, self._optimizer)
        self._loss: TextLoss = build_text_loss(config.text_loss, context.engine.module)
        self._child = ChildTuning(config.child_tuning, context.engine.module, seed=config.seed)
        self._scaler = torch.amp.GradScaler(context.device.type, enabled=config.precision == "fp16")
        self._loader = TextLoader(
            self._task.splits["train"],
            batch_size=config.batch_size,
            seed=config.seed,
            device=context.device,
            pad_id=self._model.pad_id,
            rank=context.rank,
            world_size=context.world_size,
        )
        self._log = MaskLog({name: value.numel() for name, value in self._eligible.items()})
        self._best = Best()
        self.rows: list[Row] = []
        saved = context.resume()
        if saved is None:
            self._seed("child")
            self._child.prepare(self._network, context.engine, self._loader.epoch(0))
        else:
            self._load_state(saved)

    def _seed(self, *purpose: int | str) -> None:
        """Seed what dropout reads, so that a resumed run draws what the undisturbed one drew."""
        torch.manual_seed(derive_seed(self._config.seed, "layers", *purpose, self._context.rank))

    def _autocast(self) -> torch.autocast:
        dtype = _DTYPES.get(self._config.precision)
        return torch.autocast(self._context.device.type, dtype=dtype, enabled=dtype is not None)

    # An epoch.

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Take the steps of an epoch (0-based) and return what it trained on and masked."""
        config, context = self._config, self._context
        self._network.train()
        self._log.start_epoch()
        num_steps = len(self._loader)
        totals = torch.zeros(NUM_TOTALS, dtype=torch.float64, device=context.device)
        rate = 0.0
        for step, batch in enumerate(self._loader.epoch(epoch)):
            done = epoch * num_steps + step
            factor = linear_rate(done, config.epochs * num_steps, warmup=config.lr_warmup)
            rate = set_lr(
                self._optimizer,
                ScheduleConfig(),
                lr=config.lr * factor,
                epoch=epoch,
                num_epochs=config.epochs,
            )
            self._seed(epoch, step)
            self._take_step(batch, epoch, step, totals)
        sums = context.sum(totals).tolist()
        loss, correct, count, disagreement, compared, forwards, backwards = sums
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"the training loss became {loss} in epoch {epoch + 1}: lower lr = "
                f"{config.lr:g}, or start from other weights"
            )
        metrics = {"train/loss": loss / count, "train/clean": correct / count, "lr": rate}
        if compared:
            metrics["train/kl"] = disagreement / compared
        metrics |= {"passes/forwards": forwards, "passes/backwards": backwards}
        return metrics | self._log.metrics()

    def _take_step(self, batch: Batch, epoch: int, step: int, totals: Tensor) -> None:
        """Take one step and add what was seen to the epoch's sums."""
        config, scaler = self._config, self._scaler
        first = _FirstOrder(self._eligible) if self._optimizer.wants_first_order else None
        forwards, backwards = self._loss.passes
        for piece in pieces(batch, config.accumulate):
            noise = generator(config.seed, "step", epoch, step)
            terms = self._loss.terms(self._network, piece, noise)
            # Any factor on the disagreement gives the same mask; without one fp16 underflows.
            weight = scaler.get_scale() / config.batch_size if piece.count else 0.0
            pair, seen = None, False
            while True:
                with self._autocast():
                    term = next(terms, None)
                if term is None:
                    break
                if first is not None and term.pair is not None:
                    pair = term.pair
                    _add_disagreement(totals, piece, first.add(pair, weight, keep_graph=True))
                self._context.engine.backward(scaler.scale(term.loss) * piece.scale)
                _add_loss(totals, piece, term.loss, None if seen else term.logits)
                seen = True
            extra = 0
            if first is not None and pair is None:
                # Afterwards, so that the loss has the dropout that it has without ROSE.
                with self._autocast():
                    module = self._context.engine.module
                    pair = module(piece.inputs), module(piece.inputs)
                _add_disagreement(totals, piece, first.add(pair, weight, keep_graph=False))
                extra = PAIR
            totals[5] += piece.count * (forwards + extra)
            totals[6] += piece.count * (backwards + (PAIR if first is not None else 0))
        self._update(epoch * len(self._loader) + step, first)

    def _update(self, step: int, first: _FirstOrder | None) -> None:
        """Unscale, clip, mask, step: the second-order risk needs true, clipped gradients."""
        engine = self._context.engine
        self._scaler.unscale_(self._optimizer)
        if self._config.clip_norm is not None:
            engine.clip(engine.module.parameters(), self._config.clip_norm)
        self._child.apply(step)
        if first is not None:
            first.hand_over(self._optimizer, self._config, self._context)
        engine.step()
        self._loss.after_step(engine.module)
        self._scaler.update()
        if self._optimizer.record is not None:
            self._log.add(self._optimizer.record)

    def finish_epoch(self, metrics: dict[str, float]) -> None:
        """Measure, keep the best weights, report, save."""
        context, config = self._context, self._config
        epoch = len(self.rows) + 1
        metrics["val/clean"] = self._accuracy(self._task.splits["val"])
        metrics["passes/forwards"] += len(self._task.splits["val"])
        score = metrics["val/clean"] if config.keep == "best" else float(epoch)
        self._best.offer(score, epoch=epoch, state=self._model_state)
        self.rows.append({"epoch": epoch, **metrics})
        context.report(metrics, step=epoch, total=config.epochs, checkpoint=self._state)

    def _accuracy(self, split: TextSplit) -> float:
        """Return the accuracy on a split as a fraction, without dropout and in float32."""
        context = self._context
        rows = np.arange(context.rank, len(split), context.world_size, dtype=np.int64)
        rows = rows[np.argsort(split.lengths[rows], kind="stable")]
        correct = torch.zeros((), dtype=torch.int64, device=context.device)
        with eval_mode(self._model), torch.no_grad():
            for begin in range(0, len(rows), self._config.batch_size):
                inputs, labels, _ = text_rows(
                    split,
                    rows[begin : begin + self._config.batch_size],
                    device=context.device,
                    pad_id=self._model.pad_id,
                )
                correct += (self._model(inputs).argmax(1) == labels).sum()
        return int(context.sum(correct).item()) / len(split)

    # State.

    def _model_state(self) -> State:
        """Return the model's weights in the layout of ``Start.build()``."""
        weights = self._context.engine.model_state()["model"]
        prefix = "model." if self._perturbs else ""
        return {"model": {name.removeprefix(prefix): value for name, value in weights.items()}}

    def _state(self) -> State:
        return {
            "engine": self._context.engine.state(),
            "best": self._best.state(),
            "epochs": list(self.rows),
            "masks": self._log.state(),
            "loss": self._loss.state(),
            "child": self._child.state(),
            "scaler": self._scaler.state_dict(),
        }

    def _load_state(self, saved: State) -> None:
        self._context.engine.load_state(saved["engine"])
        self._best, self.rows = Best.load(saved["best"]), list(saved["epochs"])
        self._log.load_state(saved["masks"])
        self._loss.load_state(saved["loss"])
        self._child.load_state(saved["child"])
        self._scaler.load_state_dict(saved["scaler"])

    def result(self) -> Result:
        """Return the kept epoch."""
        kept = self.rows[self._best.epoch - 1]
        return Result(
            state=self._best.model,
            metrics={
                "val/clean": kept["val/clean"],
                **{name: sum(row[name] for row in self.rows) for name in PASSES},
            },
            choices={
                "epoch": self._best.epoch,
                "variant": self._config.variant,
                "loss": self._config.text_loss.name,
                "leaky": self._task.leaky,
            },
            tables={"epochs": self.rows, "mask_frequency": self._log.table()},
        )


def _add_loss(totals: Tensor, batch: Batch, loss: Tensor, logits: Tensor | None) -> None:
    """Add a term to the epoch's sums, and its accuracy if logits are given."""
    if not batch.count:
        return
    totals[0] += loss.detach() * batch.count
    if logits is not None:
        totals[1] += (logits.detach().argmax(1) == batch.labels).sum()
        totals[2] += batch.count


def _add_disagreement(totals: Tensor, batch: Batch, disagreement: Tensor) -> None:
    if batch.count:
        totals[3] += disagreement
        totals[4] += batch.count
