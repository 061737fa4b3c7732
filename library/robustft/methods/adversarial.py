"""Adversarial training: the starting points of the fine-tuning methods.

"at": Madry, Makelov, Schmidt, Tsipras, Vladu, 2018, arXiv 1706.06083, with the hyper-parameters of
Pang et al., "Bag of Tricks for Adversarial Training", 2021, arXiv 2010.00467.
"trades": Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan, 2019, arXiv 1901.08573, equation 5, algorithm 1.
"""

import dataclasses
import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustft.attacks import pgd
from robustft.attacks.noise import normal, run_seed, sample_keys
from robustft.errors import ConfigError
from robustft.methods.base import Result, Row
from robustft.methods.common import AttackConfig, craft, eval_mode, validate
from robustft.training.augment import AugmentConfig
from robustft.training.checks import require_at_least, require_choice, require_range
from robustft.training.context import RunContext
from robustft.training.loaders import Batch, Loader
from robustft.training.loop import BatchLoss, Best, epoch_metrics, run_epoch, share_buffers
from robustft.training.optimizers import OptimizerConfig, build_optimizer
from robustft.training.schedules import ScheduleConfig

__all__ = ["ATConfig", "TradesConfig", "craft_trades", "train_at", "train_trades"]

Keep = Literal["best", "last"]
CraftMode = Literal["eval", "train"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ATConfig:
    """Adversarial training; the defaults are the published ones for CIFAR."""

    epochs: int = 110
    """Passes over the training split, >= 1."""
    lr: float = 0.1
    """Learning rate before the schedule, > 0."""
    batch_size: int = 128
    """Images in a global batch, over all workers, >= 1."""
    seed: int = 0
    """Seed of order, augmentation and start noise, >= 0."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """The optimiser."""
    schedule: ScheduleConfig = dataclasses.field(
        default_factory=lambda: ScheduleConfig(name="multistep", milestones=(100.0, 105.0))
    )
    """The learning rate's schedule, in fractional epochs."""
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    """Crops and flips."""
    attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    """PGD in training."""
    craft_mode: CraftMode = "eval"
    """BatchNorm while crafting: "eval" uses running statistics, "train" the batch's own."""
    val_attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    """PGD on the selection split, which chooses the epoch."""
    eval_every: int = 1
    """Epochs between evaluations, >= 1; the last epoch is always evaluated."""
    keep: Keep = "best"
    """"best": the epoch with the highest robust accuracy on "val"; "last": the last epoch."""

    def __post_init__(self) -> None:
        _check(self)
        require_choice(self, "craft_mode", CraftMode)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TradesConfig:
    """TRADES; the defaults are those of the paper for CIFAR-10."""

    epochs: int = 76
    """Passes over the training split, >= 1."""
    lr: float = 0.1
    """Learning rate before the schedule, > 0."""
    beta: float = 6.0
    """Weight of the robust term (1/lambda in the paper), >= 0."""
    batch_size: int = 128
    """Images in a global batch, over all workers, >= 1."""
    seed: int = 0
    """Seed of order, augmentation and start noise, >= 0."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(weight_decay=2e-4)
    )
    """The optimiser."""
    schedule: ScheduleConfig = dataclasses.field(
        default_factory=lambda: ScheduleConfig(name="multistep", milestones=(75.0,))
    )
    """The learning rate's schedule, in fractional epochs."""
    augment: AugmentConfig = dataclasses.field(
        default_factory=lambda: AugmentConfig(padding_mode="zero")
    )
    """Crops and flips."""
    attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    """Steps on the KL divergence; ``random_start`` is the Gaussian start below. Paper, CIFAR-10:
    step 0.007 at eps 0.031, a little less than our eps / 4."""
    start_deviation: float = 0.001
    """Standard deviation of the Gaussian start noise in [0, 1] pixel units, > 0."""
    val_attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    """PGD on the selection split, which chooses the epoch."""
    eval_every: int = 1
    """Epochs between evaluations, >= 1; the last epoch is always evaluated."""
    keep: Keep = "best"
    """"best": the epoch with the highest robust accuracy on "val"; "last": the last epoch."""

    def __post_init__(self) -> None:
        _check(self)
        require_range(self, 0, math.inf, "beta")
        require_range(self, 0, math.inf, "start_deviation", open_low=True)
        if not self.attack.random_start:
            raise ConfigError(
                "attack.random_start = False: the KL divergence has no gradient at the clean "
                "point, so TRADES needs its Gaussian start; leave it True"
            )


TrainingConfig: TypeAlias = ATConfig | TradesConfig


def _check(config: TrainingConfig) -> None:
    require_at_least(config, 1, "epochs", "batch_size", "eval_every")
    require_at_least(config, 0, "seed")
    require_range(config, 0, math.inf, "lr", open_low=True)
    require_choice(config, "keep", Keep)


def train_at(config: ATConfig, context: RunContext) -> Result:
    """Minimise the cross-entropy at PGD's last iterate (Madry et al., equation 2.1).

    The task's first threat model is trained against, also where the task has several.
    """

    def batch_loss(
        network: nn.Module, batch: Batch, noise: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        module = context.engine.module
        adversarial = craft(
            # A bound method is attacked in whatever mode its module is; a module in eval mode.
            module if config.craft_mode == "eval" else module.__call__,
            batch.inputs,
            batch.labels,
            ids=batch.ids,
            threat=context.task.threat,
            attack=config.attack,
            start_noise=noise,
        )
        logits = network(adversarial)
        return functional.cross_entropy(logits, batch.labels), logits

    return _train(config, context, batch_loss)


def train_trades(config: TradesConfig, context: RunContext) -> Result:
    """Minimise CE(f(x), y) + beta * KL(f(x) || f(x')) with x' maximising the second term.

    Note:
        The authors' code runs the clean batch through the network twice per update (so BatchNorm
        sees it twice); here it is run once. Its start noise may leave the box until the first
        step; here it is clipped at once.
    """

    def batch_loss(
        network: nn.Module, batch: Batch, noise: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        adversarial = craft_trades(config, context, batch, noise)
        clean_logits = network(batch.inputs)
        logits = network(adversarial)
        robust_term = _divergence(clean_logits, logits).mean()
        loss = functional.cross_entropy(clean_logits, batch.labels) + config.beta * robust_term
        return loss, logits

    return _train(config, context, batch_loss)


def craft_trades(
    config: TradesConfig, context: RunContext, batch: Batch, noise: torch.Generator
) -> Tensor:
    """Return inputs that maximise KL(f(x) || f(x')), from a small Gaussian start (algorithm 1)."""
    module, threat = context.engine.module, context.task.threat
    with eval_mode(module), torch.no_grad():
        clean_logits = module(batch.inputs)
    keys = sample_keys(
        run_seed(noise, batch.inputs.device),
        stream="trades/start",
        restart=0,
        sample_ids=batch.ids,
    )
    offsets = normal(keys, batch.inputs.shape[1:], dtype=batch.inputs.dtype)
    return pgd(
        module,
        batch.inputs,
        batch.labels,
        norm=threat.norm,
        eps=threat.eps,
        step_size=config.attack.step(threat),
        num_steps=config.attack.num_steps,
        start=(batch.inputs + config.start_deviation * offsets).clamp(0, 1),
        loss=lambda logits, _: _divergence(clean_logits, logits),
        report=False,
    ).inputs


def _divergence(clean_logits: Tensor, logits: Tensor) -> Tensor:
    """Return KL(softmax(clean_logits) || softmax(logits)) per sample, in nats."""
    terms = functional.kl_div(
        functional.log_softmax(logits, 1),
        functional.log_softmax(clean_logits, 1),
        reduction="none",
        log_target=True,
    )
    return terms.sum(1)


def _train(config: TrainingConfig, context: RunContext, batch_loss: BatchLoss) -> Result:
    """Run the epochs, keep the one that "val" likes best, continue from a checkpoint."""
    model = context.start.build().to(context.device)
    optimizer = build_optimizer(config.optimizer, model.named_parameters(), lr=config.lr)
    network = context.engine.prepare(model, optimizer)
    loader = Loader(
        context.task.splits["train"],
        batch_size=config.batch_size,
        seed=config.seed,
        device=context.device,
        rank=context.rank,
        world_size=context.world_size,
    )
    best, epoch_rows = Best(), list[Row]()
    saved = context.resume()
    if saved is not None:
        context.engine.load_state(saved["engine"])
        best, epoch_rows = Best.load(saved["best"]), list(saved["epochs"])

    for epoch in range(len(epoch_rows), config.epochs):
        network.train()
        trained = run_epoch(config, context, network, loader, batch_loss, epoch=epoch)
        share_buffers(context.engine.module, context)
        metrics = epoch_metrics(trained, accuracy="train/robust")
        last = epoch + 1 == config.epochs
        if last or (epoch + 1) % config.eval_every == 0:
            measured = validate(
                context.engine.module,
                context,
                attack=config.val_attack,
                batch_size=config.batch_size,
                seed=config.seed,
            )
            metrics.update(measured)
            score = measured["val/robust"] if config.keep == "best" else float(epoch)
            best.offer(score, epoch=epoch + 1, state=context.engine.model_state)
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
    kept = epoch_rows[best.epoch - 1]
    return Result(
        state=best.model,
        metrics={name: kept[name] for name in ("val/clean", "val/robust")},
        choices={"epoch": best.epoch},
        tables={"epochs": epoch_rows},
    )
