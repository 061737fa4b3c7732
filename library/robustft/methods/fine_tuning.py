"""What AutoLoRa and the baselines it is compared with share: one epoch after another, on a head.

Each method has its own modules and losses; how an epoch is trained, measured, kept and resumed is
the same for all of them, so that a difference between two methods is one of the methods.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from robustft.attacks import pgd
from robustft.attacks.noise import normal, run_seed, sample_keys
from robustft.errors import CheckpointError, ConfigError
from robustft.methods.base import Result, Row
from robustft.methods.common import AttackConfig, validate
from robustft.methods.halving import HalvingConfig
from robustft.models import batch_norms
from robustft.models.heads import find_head
from robustft.training.augment import AugmentConfig
from robustft.training.context import RunContext
from robustft.training.loaders import Batch, Loader
from robustft.training.loop import (
    BatchLoss,
    Best,
    cpu_state,
    epoch_metrics,
    run_epoch,
    share_buffers,
)
from robustft.training.optimizers import OptimizerConfig, build_optimizer
from robustft.training.schedules import ScheduleConfig
from robustft.training.seeding import derive_seed

__all__ = [
    "PASSES",
    "BothForwards",
    "FineTuning",
    "FineTuningConfig",
    "HeadInit",
    "Keep",
    "KeepSplit",
    "LrControl",
    "craft_batch",
    "divergence",
    "find_head",
    "start_model",
    "unwrapped_state",
]

HeadInit = Literal["keep", "fresh", "zeros"]
Keep = Literal["best", "last"]
KeepSplit = Literal["val", "test"]
LrControl = Literal["halving", "schedule"]

PASSES = ("passes/forwards", "passes/backwards")

NUM_NAMED = 3
"""How many entries an error message names; the others are counted."""


class FineTuningConfig(Protocol):
    """The fields of a method's config that are read here."""

    @property
    def epochs(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def lr_control(self) -> LrControl: ...
    @property
    def schedule(self) -> ScheduleConfig: ...
    @property
    def halving(self) -> HalvingConfig: ...
    @property
    def augment(self) -> AugmentConfig: ...
    @property
    def val_attack(self) -> AttackConfig: ...
    @property
    def head(self) -> str | None: ...
    @property
    def head_init(self) -> HeadInit: ...
    @property
    def keep(self) -> Keep: ...
    @property
    def keep_split(self) -> KeepSplit: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Pace:
    """``robustft.training.loop.LoopConfig`` of one epoch."""

    epochs: int
    lr: float
    seed: int
    schedule: ScheduleConfig
    augment: AugmentConfig


# The model.


def start_model(config: FineTuningConfig, context: RunContext) -> nn.Module:
    """Return the starting model on the CPU, its head as ``config.head_init`` says.

    Raises:
        ConfigError: the head is needed and not found.
    """
    model = context.start.build()
    if config.head_init != "keep":
        _, head = find_head(model, config.head, num_classes=context.start.num_classes)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would reseed the accelerators too, and fork_rng restores the CPU.
            torch.default_generator.manual_seed(derive_seed(config.seed, "head"))
            head.reset_parameters()
        if config.head_init == "zeros":
            nn.init.zeros_(head.weight)
            if head.bias is not None:
                nn.init.zeros_(head.bias)
    return model


def unwrapped_state(model: nn.Module, wrappers: Mapping[type[nn.Module], str]) -> dict[str, Tensor]:
    """Return the state dict that ``model`` would have without its wrapping modules.

    Args:
        model: holds wrapping modules at any depth, none inside another.
        wrappers: class of a wrapping module -> name of the child that takes its place; everything
            else that the wrapping module holds is dropped.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, module in model.named_modules():
        child = wrappers.get(type(module))
        if child is None:
            continue
        outside = f"{name}." if name else ""
        inside = f"{outside}{child}."
        held = {entry: state.pop(entry) for entry in list(state) if entry.startswith(outside)}
        state |= {
            outside + entry.removeprefix(inside): value
            for entry, value in held.items()
            if entry.startswith(inside)
        }
    return state


class BothForwards(nn.Module):
    """Natural and adversarial logits in one call, so that data parallelism wraps it once.

    Args:
        model: the network.
        dual_bn: gives natural images copies of its BatchNorm layers, weights and statistics.

    Raises:
        ConfigError: ``dual_bn`` and a network without BatchNorm.
    """

    def __init__(self, model: nn.Module, *, dual_bn: bool = False) -> None:
        super().__init__()
        self.model = model
        norms = batch_norms(model) if dual_bn else {}
        if dual_bn and not norms:
            raise ConfigError("dual_bn = True: the network has no BatchNorm; leave it False")
        names = {id(module): name for name, module in model.named_modules()}
        self._places = [names[id(norm)] for norm in norms.values()]
        self.natural_norms = nn.ModuleList(copy.deepcopy(norm) for norm in norms.values())

    def natural(self, inputs: Tensor) -> Tensor:
        """Return the logits ``[n, classes]`` of natural inputs."""
        own = {
            f"{place}.{name}": value
            for place, norm in zip(self._places, self.natural_norms, strict=True)
            for name, value in norm.state_dict(keep_vars=True).items()
        }
        logits: Tensor = functional_call(self.model, own, (inputs,))
        return logits

    def forward(self, inputs: Tensor, adversarial: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of natural and of adversarial inputs."""
        natural_logits = self.natural(inputs)
        return natural_logits, self.model(adversarial)


# Losses and attacks.


def divergence(clean_logits: Tensor, logits: Tensor) -> Tensor:
    """Return KL(softmax(clean_logits) || softmax(logits)) per sample, ``[n]``, in nats.

    Nothing is detached: gradients reach both arguments.
    """
    terms = functional.kl_div(
        functional.log_softmax(logits, 1),
        functional.log_softmax(clean_logits, 1),
        reduction="none",
        log_target=True,
    )
    return terms.sum(1)


def craft_batch(
    model: nn.Module,
    batch: Batch,
    *,
    context: RunContext,
    attack: AttackConfig,
    noise: torch.Generator,
    start_deviation: float | None = None,
    clean_logits: Tensor | None = None,
) -> Tensor:
    """Return the last iterate of PGD from a start, and on a loss, of choice.

    Args:
        model: the bare model; attacked in eval mode.
        batch: clean inputs, labels and ids.
        context: gives the threat model.
        attack: steps; its ``random_start`` is the uniform one.
        noise: of the start.
        start_deviation: standard deviation of a Gaussian start in [0, 1] pixel units; None: as
            ``attack`` says.
        clean_logits: if given, KL(clean || adversarial) is climbed instead of the cross-entropy.

    Note:
        The authors' Gaussian start may leave the box until the first step; here it is clipped.
    """
    threat, start = context.task.threat, None
    if start_deviation is not None:
        keys = sample_keys(
            run_seed(noise, batch.inputs.device),
            stream="trades/start",
            restart=0,
            sample_ids=batch.ids,
        )
        offsets = normal(keys, batch.inputs.shape[1:], dtype=batch.inputs.dtype)
        start = (batch.inputs + start_deviation * offsets).clamp(0, 1)
    return pgd(
        model,
        batch.inputs,
        batch.labels,
        norm=threat.norm,
        eps=threat.eps,
        step_size=attack.step(threat),
        num_steps=attack.num_steps,
        random_start=attack.random_start,
        start=start,
        loss="ce" if clean_logits is None else lambda logits, _: divergence(clean_logits, logits),
        generator=noise,
        sample_ids=batch.ids,
        report=False,
    ).inputs


# The loop.


class FineTuning:
    """The epochs of a run: trained, measured on the selection split, kept, resumed.

    ::

        run = FineTuning(config, context, model)
        for epoch in run.remaining():
            run.finish_epoch(epoch, run.train_epoch(epoch, batch_loss, passes=(11, 11)))
        return run.result()

    Learning rate: ``config.schedule``, or AutoLoRa's halving, whose decisions follow from
    accuracies that are sums over ranks, and are thus the same on every rank.

    Args:
        config: see ``FineTuningConfig``.
        context: where it runs; continues from its checkpoint.
        model: what the engine wraps and steps; parameters that stay as they are have been frozen.
        plain: the part of it (default: all) that is attacked, measured and returned.
        export: returns the state dict of ``plain`` in the layout of ``Start.build()``.

    Attributes:
        rows: one per finished epoch.
        network: ``model`` as the engine has wrapped it.
        loader: the training batches.

    Raises:
        CheckpointError: the checkpoint is that of another kind of model.
    """

    def __init__(
        self,
        config: FineTuningConfig,
        context: RunContext,
        model: nn.Module,
        *,
        plain: nn.Module | None = None,
        export: Callable[[nn.Module], Mapping[str, Tensor]] = nn.Module.state_dict,
    ) -> None:
        self._config, self._context, self._export = config, context, export
        self._plain = model if plain is None else plain
        optimizer = build_optimizer(config.optimizer, model.named_parameters(), lr=config.lr)
        self.network = context.engine.prepare(model, optimizer)
        self.loader = Loader(
            context.task.splits["train"],
            batch_size=config.batch_size,
            seed=config.seed,
            device=context.device,
            rank=context.rank,
            world_size=context.world_size,
        )
        self.rows: list[Row] = []
        self._spent = [0, 0]
        self._control = config.halving.controller(config.lr)
        self._kept = Best()
        # What a halving goes back to: usually the very weights that are kept.
        same = (config.keep, config.keep_split, config.halving.split) == ("best", "val", "val")
        self._restart = self._kept if same else Best()
        self._resume()

    def _resume(self) -> None:
        saved = self._context.resume()
        if saved is None:
            return
        _require_same_layout(saved["engine"]["model"], self._context.engine.module)
        self._context.engine.load_state(saved["engine"])
        self.rows = list(saved["epochs"])
        kept, restart = Best.load(saved["kept"]), saved["restart"]
        self._restart = kept if restart is None else Best.load(restart)
        self._kept = kept
        if self._halves:
            for row in self.rows:
                self._control.update(row[self._control_metric])

    @property
    def _halves(self) -> bool:
        return self._config.lr_control == "halving"

    @property
    def _control_metric(self) -> str:
        return "val/robust" if self._config.halving.split == "val" else "control/robust"

    def remaining(self) -> Iterator[int]:
        """Yield the 0-based epochs that are still to be trained."""
        while len(self.rows) < self._config.epochs and not (
            self._halves and self._control.finished
        ):
            yield len(self.rows)

    def train_epoch(
        self,
        epoch: int,
        batch_loss: BatchLoss,
        *,
        passes: tuple[int, int],
        training: bool = True,
        accuracy_name: str = "train/robust",
    ) -> dict[str, float]:
        """Take the steps of an epoch.

        Args:
            epoch: 0-based.
            batch_loss: the method's loss.
            passes: forwards and backwards of an image in a step, those of its attack included.
            training: mode of the network; False leaves its BatchNorm statistics alone.
            accuracy_name: what the accuracy of the returned logits is called.

        Returns:
            "train/loss", the accuracy, "lr", and of ROSE's optimiser what its masks did.
        """
        self.network.train(training)
        config, halves = self._config, self._halves
        pace = _Pace(
            epochs=config.epochs,
            lr=self._control.lr if halves else config.lr,
            seed=config.seed,
            schedule=ScheduleConfig() if halves else config.schedule,
            augment=config.augment,
        )
        trained = run_epoch(pace, self._context, self.network, self.loader, batch_loss, epoch=epoch)
        share_buffers(self._context.engine.module, self._context)
        self.spend("train", *passes)
        return epoch_metrics(trained, accuracy=accuracy_name)

    def spend(self, split: str, forwards: int, backwards: int = 0) -> None:
        """Count passes over each image of a split; an epoch reports what it has taken in all."""
        size = len(self._context.task.splits[split])
        self._spent[0] += forwards * size
        self._spent[1] += backwards * size

    def finish_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Measure, keep the best weights, let the controller decide, report, save."""
        context = self._context
        row: Row = {"epoch": epoch + 1, **metrics, **self._measure()}
        row |= dict(zip(PASSES, self._spent, strict=True))
        self._spent = [0, 0]
        state = context.engine.model_state
        score = row[f"{self._config.keep_split}/robust"]
        score = score if self._config.keep == "best" else float(epoch)
        self._kept.offer(score, epoch=epoch + 1, state=state)
        if self._halves:
            decision = self._control.update(row[self._control_metric])
            if self._restart is not self._kept:
                self._restart.offer(row[self._control_metric], epoch=epoch + 1, state=state)
            row |= {"halving/condition": decision.condition, "halving/best": self._restart.epoch}
            if decision.halved:
                self._go_back()
        self.rows.append(row)
        context.report(
            {name: value for name, value in row.items() if name != "epoch"},
            step=epoch + 1,
            total=self._config.epochs,
            checkpoint=lambda: {
                "engine": context.engine.state(),
                "kept": self._kept.state(),
                "restart": None if self._restart is self._kept else self._restart.state(),
                "epochs": list(self.rows),
            },
        )

    def result(self, choices: Mapping[str, Any] | None = None) -> Result:
        """Return the kept epoch, its weights exported."""
        context = self._context
        context.engine.load_state({**context.engine.state(), "model": self._kept.model})
        kept = self.rows[self._kept.epoch - 1]
        return Result(
            state=cpu_state(dict(self._export(self._plain))),
            metrics={
                **{name: kept[name] for name in ("val/clean", "val/robust")},
                **{name: sum(row[name] for row in self.rows) for name in PASSES},
            },
            choices={
                "epoch": self._kept.epoch,
                "halvings": sum(bool(row.get("halving/condition")) for row in self.rows),
                "leaky": context.task.leaky or self._config.keep_split == "test",
                **(choices or {}),
            },
            tables={"epochs": self.rows},
        )

    def _measure(self) -> dict[str, float]:
        measured = self._accuracies("val")
        if self._config.keep_split == "test":
            measured["test/robust"] = self._accuracies("test")["val/robust"]
        if self._halves and self._config.halving.split == "train":
            measured["control/robust"] = self._accuracies("train")["val/robust"]
        return measured

    def _accuracies(self, split: str) -> dict[str, float]:
        context, task = self._context, self._context.task
        if split != "val":
            context = copy.copy(context)
            context.task = dataclasses.replace(
                task, splits={**task.splits, "val": task.splits[split]}
            )
        attack = self._config.val_attack
        self.spend(split, attack.num_steps + 2, attack.num_steps)
        return validate(
            self._plain,
            context,
            attack=attack,
            batch_size=self._config.batch_size,
            seed=self._config.seed,
        )

    def _go_back(self) -> None:
        """Load the best weights; the optimiser keeps its momentum unless told to forget it."""
        engine = self._context.engine
        engine.load_state({**engine.state(), "model": self._restart.model})
        if self._config.halving.reset_momentum:
            engine.optimizer.state.clear()


def _require_same_layout(saved: Mapping[str, Tensor], module: nn.Module) -> None:
    expected = module.state_dict()
    odd = [
        name
        for name in sorted(saved.keys() | expected.keys())
        if name not in saved or name not in expected or saved[name].shape != expected[name].shape
    ]
    if odd:
        more = f" and {len(odd) - NUM_NAMED} others" if len(odd) > NUM_NAMED else ""
        raise CheckpointError(
            f"the checkpoint is that of another kind of model ({', '.join(odd[:NUM_NAMED])}{more} "
            "do not fit): resume with the method, model and rank that wrote it, or start anew"
        )
