"""E-AT: robustness against several norms at the price of one, and fine-tuning between them.

Croce, Hein, "Adversarial Robustness against Multiple and Single lp-Threat Models via Quick
Fine-Tuning of Robust Classifiers", ICML 2022, arXiv 2105.12508. Each batch is attacked in one norm
only, drawn among the extreme ones (Linf and L1) in proportion to the robust error of each so far.
Beside it the methods that it is compared with: SAT (a uniform draw; Madaan, Shin, Hwang, 2021,
arXiv 2006.12135), MAX and AVG (Tramer, Boneh, 2019, arXiv 1904.13000), and MSD (Maini, Wong,
Kolter, 2020, arXiv 1909.04068). With a single norm it is adversarial training by APGD.

The options are in ``multinorm_config``, the draw in ``norm_sampler`` and the attacks in
``multinorm_attacks`` beside this file.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robustft.attacks import apgd
from robustft.data.base import Task
from robustft.errors import ConfigError
from robustft.methods.base import Result, Row
from robustft.methods.common import eval_mode, shard
from robustft.methods.multinorm_attacks import multi_steepest_descent, train_apgd
from robustft.methods.multinorm_config import MultiNormConfig
from robustft.methods.norm_sampler import NormSampler, hull_l2_radius
from robustft.threat import Norm, ThreatModel
from robustft.training.context import RunContext
from robustft.training.loaders import Batch, Loader, rows
from robustft.training.loop import Best, epoch_metrics, run_epoch, share_buffers
from robustft.training.optimizers import FIXED_RATE, build_optimizer

__all__ = [
    "Crafted",
    "MultiNormConfig",
    "NormSampler",
    "craft",
    "hull_l2_radius",
    "multi_steepest_descent",
    "train",
    "train_apgd",
    "validate_norms",
]

_logger = logging.getLogger(__name__)

VAL_SPARSITY = 0.2  # share of coordinates in the first L1 step of an evaluation, of E-AT's code
MSD_REACH = 2.5  # in units of eps: how far all steps of MSD together could go
LEGACY_RATE = 1.0  # what E-AT's code builds its optimiser with
CHANCE_DEVIATIONS = 3.0
PASSES = ("passes/forwards", "passes/backwards")


# What a batch is attacked with.


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Crafted:
    """What a training batch has become.

    Args:
        points: inputs to minimise the loss on; several (AVG) mean the mean of their losses.
        robust: norm -> bool ``[n]``, where each attack left the prediction right.
        forwards, backwards: passes over one image.
    """

    points: tuple[Tensor, ...]
    robust: Mapping[Norm, Tensor]
    forwards: int
    backwards: int


def craft(
    config: MultiNormConfig,
    model: nn.Module,
    batch: Batch,
    *,
    threats: Sequence[ThreatModel],
    sampler: NormSampler,
    noise: torch.Generator,
) -> Crafted:
    """Attack a batch the way ``config.scheme`` says.

    Note:
        MSD runs on the same number of steps as the others, as it was compared in the paper.
    """
    if config.attack == "none":
        return Crafted((batch.inputs,), {}, 0, 0)
    if config.scheme == "msd":
        result = multi_steepest_descent(
            model,
            batch.inputs,
            batch.labels,
            threats=threats,
            num_steps=config.num_steps,
            step_size=config.msd_step_size or MSD_REACH / config.num_steps,
            l1_step=config.msd_l1_step,
            noise=noise,
        )
        return Crafted((result.inputs,), {}, result.num_forwards, result.num_backwards)
    if config.sampled:
        drawn = sampler.draw()
        threats = [threat for threat in threats if threat.norm == drawn]
    results = {
        threat.norm: train_apgd(
            model,
            batch.inputs,
            batch.labels,
            threat=threat,
            num_steps=config.steps_per_norm.get(threat.norm, config.num_steps),
        )
        for threat in threats
    }
    points = tuple(result.inputs for result in results.values())
    if config.scheme == "max":
        losses = torch.stack([result.loss for result in results.values()])
        # argmax takes the first where losses tie.
        winners = losses.argmax(dim=0)
        points = (torch.stack(points)[winners, torch.arange(len(winners), device=winners.device)],)
    return Crafted(
        points,
        {norm: result.robust for norm, result in results.items()},
        sum(result.num_forwards for result in results.values()),
        sum(result.num_backwards for result in results.values()),
    )


# Validation and the loop.


def validate_norms(
    model: nn.Module,
    context: RunContext,
    *,
    threats: Sequence[ThreatModel],
    num_steps: int,
    batch_size: int,
) -> dict[str, float]:
    """Return accuracies on the selection split, as fractions.

    "val/clean"; for each threat model "val/<norm>", right on the clean image and at every iterate
    of an APGD from there; and "val/union", right under all of them. Without threat models only
    "val/clean".

    Args:
        model: the bare model; left in the mode it was in.
        context: gives the split and the other ranks.
        threats: what to attack with.
        num_steps: of APGD.
        batch_size: images at a time on each rank.
    """
    split = context.task.splits["val"]
    positions = shard(split, context)
    totals = torch.zeros(len(threats) + 2, dtype=torch.int64, device=context.device)
    with eval_mode(model):
        for begin in range(0, len(positions), batch_size):
            inputs, labels, _ = rows(
                split, positions[begin : begin + batch_size], device=context.device
            )
            with torch.no_grad():
                clean = model(inputs).argmax(1) == labels
            # What is wrong without an attack is not robust: only the rest is attacked.
            right = clean.nonzero().flatten()
            masks = [clean]
            for threat in threats if len(right) else ():
                found = apgd(
                    model,
                    inputs[right],
                    labels[right],
                    norm=threat.norm,
                    eps=threat.eps,
                    num_steps=num_steps,
                    start=inputs[right],
                    initial_sparsity=VAL_SPARSITY,
                )
                masks.append(clean.index_copy(0, right, found.robust))
            masks += [torch.zeros_like(clean)] * (1 + len(threats) - len(masks))
            totals += torch.stack([*masks, torch.stack(masks).all(dim=0)]).sum(dim=1)
    shares = [count / len(split) for count in context.sum(totals).tolist()]
    names = ["clean", *(threat.norm for threat in threats), *(["union"] if threats else [])]
    return {f"val/{name}": share for name, share in zip(names, shares, strict=False)}


def _at_chance(accuracy: float, task: Task) -> bool:
    """Return whether so low an accuracy on "val" is what guessing gives."""
    chance = 1 / task.num_classes
    deviation = math.sqrt(chance * (1 - chance) / len(task.splits["val"]))
    return accuracy <= chance + CHANCE_DEVIATIONS * deviation


class _Steps:
    """What happens in the steps of an epoch: attack, statistics, loss."""

    def __init__(
        self,
        config: MultiNormConfig,
        context: RunContext,
        *,
        threats: Sequence[ThreatModel],
        sampler: NormSampler,
        num_steps: int,
    ) -> None:
        self.config, self.context, self.threats, self.sampler = config, context, threats, sampler
        self.num_steps = num_steps
        self.passes = [0, 0]
        self.batches_before = dict(sampler.batches)

    def batch_loss(
        self, network: nn.Module, batch: Batch, noise: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        config, context = self.config, self.context
        crafted = craft(
            config,
            context.engine.module,
            batch,
            threats=self.threats,
            sampler=self.sampler,
            noise=noise,
        )
        for norm, robust in crafted.robust.items():
            # A share of no images stands in the step only to keep the workers together.
            correct = robust[: batch.count].sum()
            counts = torch.stack([correct, torch.full_like(correct, batch.count)])
            self.sampler.update(norm, *context.sum(counts))
        updates = len(crafted.points)
        self.passes[0] += (crafted.forwards + updates) * batch.count
        self.passes[1] += (crafted.backwards + updates) * batch.count
        logits = [network(points) for points in crafted.points]
        losses = [cross_entropy(output, batch.labels) for output in logits]
        return torch.stack(losses).mean(), logits[-1]

    def metrics(self) -> dict[str, float]:
        """Return what the epoch's steps have counted, over all ranks."""
        forwards, backwards = self.context.sum(
            torch.tensor(self.passes, dtype=torch.float64, device=self.context.device)
        ).tolist()
        found = dict(zip(PASSES, (forwards, backwards), strict=True))
        errors = self.sampler.errors()
        for norm, before in self.batches_before.items() if errors else ():
            attacked = self.sampler.batches[norm] - before
            found[f"sampler/{norm}_share"] = attacked / self.num_steps
        return found | {f"sampler/{norm}_error": error for norm, error in errors.items()}


def train(config: MultiNormConfig, context: RunContext) -> Result:
    """Train or fine-tune against several norms; algorithm in the module's papers.

    Beside the accuracies of ``validate_norms``, each epoch reports for every norm
    "sampler/<norm>_share" (of the epoch's batches that it attacked) and "sampler/<norm>_error"
    (robust error on training batches since the run began, from which E-AT draws), which MSD does
    not tell apart, and the passes over single images. "train/robust" is the accuracy of the
    updates' logits; with "avg" those of the last norm. In the result, "val/robust" is the union's
    accuracy once more, under the name that all methods have.

    Raises:
        ConfigError: a norm without eps, or fewer batches than norms to draw.
        NonFiniteLossError: training diverged.
    """
    clean_only = config.attack == "none"
    threats = context.task.threat_models if clean_only else config.threats(context.task)
    model = context.start.build().to(context.device)
    optimizer = build_optimizer(config.optimizer, model.named_parameters(), lr=config.lr)
    if config.legacy_group_lr:
        optimizer.param_groups[-1].update({"lr": LEGACY_RATE, FIXED_RATE: True})
    network = context.engine.prepare(model, optimizer)
    loader = Loader(
        context.task.splits["train"],
        batch_size=config.batch_size,
        seed=config.seed,
        device=context.device,
        rank=context.rank,
        world_size=context.world_size,
    )
    _check_plan(config, threats, num_batches=config.epochs * len(loader))
    norms = [threat.norm for threat in threats]
    schedule = config.scheme if config.sampled else "uniform"
    sampler = NormSampler(norms, schedule, seed=config.seed)  # type: ignore[arg-type]
    measure = functools.partial(
        validate_norms,
        context=context,
        num_steps=config.val_steps,
        batch_size=config.val_batch_size,
    )
    best, epoch_rows, start_row = Best(), list[Row](), Row()
    saved = context.resume()
    if saved is not None:
        context.engine.load_state(saved["engine"])
        sampler.load_state_dict(saved["sampler"])
        best, epoch_rows = Best.load(saved["best"]), list(saved["epochs"])
        start_row = dict(saved["start"])
    elif context.start.state is not None:
        attacked = context.task.threat_models if config.val_start else ()
        start_row = {"epoch": 0, **measure(context.engine.module, threats=attacked)}
        _warn_of_chance(start_row["val/clean"], context)

    for epoch in range(len(epoch_rows), config.epochs):
        network.train()
        steps = _Steps(config, context, threats=threats, sampler=sampler, num_steps=len(loader))
        trained = run_epoch(config, context, network, loader, steps.batch_loss, epoch=epoch)
        share_buffers(context.engine.module, context)
        metrics = epoch_metrics(trained, accuracy="train/robust") | steps.metrics()
        if epoch + 1 == config.epochs or (epoch + 1) % config.eval_every == 0:
            measured = measure(context.engine.module, threats=context.task.threat_models)
            metrics.update(measured)
            score = measured["val/union"] if config.keep == "best" else float(epoch)
            best.offer(score, epoch=epoch + 1, state=context.engine.model_state)
        epoch_rows.append({"epoch": epoch + 1, **metrics})
        context.report(
            metrics,
            step=epoch + 1,
            total=config.epochs,
            checkpoint=lambda: {
                "engine": context.engine.state(),
                "sampler": sampler.state_dict(),
                "best": best.state(),
                "epochs": list(epoch_rows),
                "start": dict(start_row),
            },
        )
    kept = epoch_rows[best.epoch - 1]
    metrics = {name: value for name, value in kept.items() if name.startswith("val/")}
    metrics |= {"val/robust": kept["val/union"]}
    metrics |= {
        f"val/start_{name.removeprefix('val/')}": value
        for name, value in start_row.items()
        if name != "epoch"
    }
    metrics |= {name: sum(row[name] for row in epoch_rows) for name in PASSES}
    return Result(
        state=best.model,
        metrics=metrics,
        choices={
            "epoch": best.epoch,
            "scheme": "none" if clean_only else config.scheme,
            "norms": "" if clean_only else "+".join(norms),
            "lr": config.lr,
        },
        tables={"epochs": [start_row, *epoch_rows] if start_row else epoch_rows},
    )


def _check_plan(
    config: MultiNormConfig, threats: Sequence[ThreatModel], *, num_batches: int
) -> None:
    if config.attack == "none":
        _logger.warning("attack = 'none': this is clean training, which makes no model robust")
    elif config.sampled and num_batches < len(threats):
        raise ConfigError(
            f"{num_batches} batches cannot draw {len(threats)} norms: lower batch_size = "
            f"{config.batch_size} or raise epochs = {config.epochs}"
        )


def _warn_of_chance(accuracy: float, context: RunContext) -> None:
    if context.rank == 0 and _at_chance(accuracy, context.task):
        _logger.warning(
            "the start is right on %.1f %% of clean images, which guessing among %d classes would "
            "be: probably mean and std, the order of the classes or the weights are not what it "
            "was trained with, and there is no robustness to keep",
            100 * accuracy,
            context.task.num_classes,
        )
