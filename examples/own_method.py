"""A method of your own: fine-tuning on a mixture of clean and adversarial examples.

The loss is (1 - weight) CE(f(x)) + weight CE(f(x')), where x' is what PGD makes of x (I.
Goodfellow, J. Shlens, C. Szegedy, "Explaining and harnessing adversarial examples", 2014, arXiv
1412.6572, section 6, with one step of FGSM in place of PGD).

A method is a frozen config and one function ``train(config, context) -> Result``. It sees no Ray
and no MLflow: the context says where it computes, who the other workers are, where to resume.

Command: ``python examples/own_method.py``. Time: seconds.
"""

import dataclasses
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional

import robustft as rft
from robustft.methods.common import AttackConfig, craft, validate
from robustft.training.augment import AugmentConfig
from robustft.training.checks import require_at_least, require_range
from robustft.training.loaders import Batch, Loader
from robustft.training.loop import Best, epoch_metrics, run_epoch, share_buffers
from robustft.training.optimizers import OptimizerConfig, build_optimizer
from robustft.training.schedules import ScheduleConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MixedConfig:
    """Every hyper-parameter: each is an option, a searchable field, and an MLflow parameter."""

    weight: float = 0.5
    """Share of the adversarial loss, from 0 to 1."""
    epochs: int = 5
    """Passes over the training split, >= 1."""
    lr: float = 0.02
    """Learning rate before the schedule, > 0."""
    batch_size: int = 64
    """Images in a global batch, over all workers, >= 1."""
    seed: int = 0
    """Seed of order, augmentation and start noise, >= 0."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """The optimiser."""
    schedule: ScheduleConfig = dataclasses.field(
        default_factory=lambda: ScheduleConfig(name="cosine")
    )
    """Of the learning rate."""
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    """Crops and flips."""
    attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    """PGD in training and on the selection split."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "epochs", "batch_size")
        require_at_least(self, 0, "seed")
        require_range(self, 0, 1, "weight")
        require_range(self, 0, float("inf"), "lr", open_low=True)


def train(config: MixedConfig, context: rft.RunContext) -> rft.Result:
    """Fine-tune all weights; keep the epoch that is most robust on the selection split."""
    model = context.start.build().to(context.device)
    optimizer = build_optimizer(config.optimizer, model.named_parameters(), lr=config.lr)
    # The engine wraps the model for several workers; here and in tests it does nothing.
    network = context.engine.prepare(model, optimizer)
    loader = Loader(
        context.task.splits["train"],
        batch_size=config.batch_size,
        seed=config.seed,
        device=context.device,
        rank=context.rank,
        world_size=context.world_size,
    )

    def loss(wrapped: nn.Module, batch: Batch, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        adversarial = craft(
            context.engine.module,
            batch.inputs,
            batch.labels,
            ids=batch.ids,
            threat=context.task.threat,
            attack=config.attack,
            start_noise=noise,
        )
        # One forward for both, so that BatchNorm sees the mixture.
        clean_logits, logits = wrapped(torch.cat([batch.inputs, adversarial])).chunk(2)
        clean = functional.cross_entropy(clean_logits, batch.labels)
        robust = functional.cross_entropy(logits, batch.labels)
        return (1 - config.weight) * clean + config.weight * robust, logits

    best, rows = Best(), list[dict[str, float]]()
    saved = context.resume()
    if saved is not None:
        context.engine.load_state(saved["engine"])
        best, rows = Best.load(saved["best"]), list(saved["epochs"])
    for epoch in range(len(rows), config.epochs):
        network.train()
        trained = run_epoch(config, context, network, loader, loss, epoch=epoch)
        share_buffers(context.engine.module, context)
        metrics = epoch_metrics(trained, accuracy="train/robust")
        metrics |= validate(
            context.engine.module,
            context,
            attack=config.attack,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        best.offer(metrics["val/robust"], epoch=epoch + 1, state=context.engine.state)
        rows.append({"epoch": epoch + 1, **metrics})
        context.report(
            metrics,
            step=epoch + 1,
            total=config.epochs,
            checkpoint=lambda: {
                "engine": context.engine.state(),
                "best": best.state(),
                "epochs": list(rows),
            },
        )
    kept = rows[best.epoch - 1]
    return rft.Result(
        state=best.model,
        metrics={name: kept[name] for name in ("val/clean", "val/robust")},
        choices={"epoch": best.epoch},
        tables={"epochs": rows},
    )


METHOD = rft.Method(
    name="mixed",
    config=MixedConfig,
    train=train,
    paper="Goodfellow, Shlens, Szegedy, 2014, arXiv 1412.6572",
)


def run(*, epochs: int = 3, limit: int = 1000) -> str:
    """Train it from fresh weights on some embedded pictures and return what it reached."""
    rft.METHODS[METHOD.name] = METHOD  # now `experiment_from_dict` and `rft.METHODS` know it
    task = rft.load_task(rft.TaskConfig(limit_train=limit, limit_val=200))
    start = rft.Start(
        architecture="small_resnet",
        num_classes=task.num_classes,
        image_shape=task.image_shape,
        mean=task.mean,
        std=task.std,
    )
    config = MixedConfig(epochs=epochs, lr=0.1, attack=AttackConfig(num_steps=3))
    result = train(config, rft.LocalContext(task=task, start=start))
    return "\n".join(f"{name} {value:.3f}" for name, value in result.metrics.items()) + "\n"


if __name__ == "__main__":
    sys.stdout.write(run())
