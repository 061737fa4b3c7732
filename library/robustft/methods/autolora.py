"""AutoLoRa: robust fine-tuning with a low-rank branch for natural images.

Xu, Zhang, Kankanhalli, "AutoLoRa: A Parameter-Free Automated Robust Fine-Tuning Framework", 2024,
arXiv 2310.01818. Adversarial images pass through the network as it is, natural images through
the network with its low-rank branch; what natural images teach goes into branch and head only. The
weights of the three losses follow from the branch's training accuracy, the learning rate from the
validation accuracy. At the end the branch is dropped.

The branch is in ``low_rank`` beside this file, the learning rate in ``halving``, what AutoLoRa has
in common with its baselines in ``fine_tuning``.
"""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd

from robustft.errors import ConfigError
from robustft.methods.base import Result
from robustft.methods.common import AttackConfig, eval_mode
from robustft.methods.fine_tuning import (
    FineTuning,
    HeadInit,
    Keep,
    KeepSplit,
    LrControl,
    craft_batch,
    divergence,
    find_head,
    start_model,
)
from robustft.methods.halving import Decision, HalvingConfig, HalvingController
from robustft.methods.low_rank import (
    WRAPPED,
    Blocks,
    LowRankAttention,
    LowRankConv2d,
    LowRankLinear,
    add_low_rank_branches,
    export_plain,
    low_rank_layers,
)
from robustft.training.augment import AugmentConfig, augment
from robustft.training.checks import require_at_least, require_choice, require_range
from robustft.training.context import RunContext
from robustft.training.loaders import Batch
from robustft.training.loop import BatchLoss
from robustft.training.optimizers import OptimizerConfig
from robustft.training.schedules import ScheduleConfig
from robustft.training.seeding import generator

__all__ = [
    "AutoLoraConfig",
    "Decision",
    "HalvingConfig",
    "HalvingController",
    "LowRankAttention",
    "LowRankConv2d",
    "LowRankLinear",
    "TwoPaths",
    "add_low_rank_branches",
    "export_plain",
    "loss_weights",
    "train",
]

LambdaSource = Literal["branch", "plain"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AutoLoraConfig:
    """AutoLoRa; the defaults are the published ones for 224 px.

    Published for 32 px: epochs 50, lr 0.1, weight decay 2e-4, ``start_deviation`` 0.001, zero head,
    PGD-20 on val, ``halving.checkpoints`` as noted there.
    """

    epochs: int = 60
    """Passes over the training split, >= 1; fewer if the learning rate becomes too small."""
    lr: float = 0.01
    """Learning rate of the first epochs, > 0."""
    batch_size: int = 128
    """Images in a global batch, over all workers, >= 1."""
    seed: int = 0
    """Seed of order, augmentation, start noise, branches and a fresh head, >= 0."""
    rank: int = 8
    """Rank of the branch, from 1 to the width of the narrowest layer that gets one."""
    blocks: Blocks = "all"
    """Where the branch is: "all" (paper), or "last" (the authors' code for 224 px: only the last
    block of each stage, no shortcut)."""
    lambda_max: float = 6.0
    """Weight of the divergence when the branch fits all training images, >= 0; 0: without it."""
    alpha: float = 1.0
    """Exponent of the accuracy in both weights, > 0."""
    lambda_source: LambdaSource = "branch"
    """Whose training accuracy sets the weights: the "branch"'s (paper), or that of the "plain"
    network (what the authors' code for 32 px computes)."""
    lambda_augment: bool = True
    """Whether it is measured on augmented training images (published)."""
    fixed_lambdas: tuple[float, float] | None = None
    """Ablation: constant (lambda1, lambda2), 0 <= lambda1 <= 1, lambda2 >= 0; nothing is measured
    then. None: automatic."""
    disentangle: bool = True
    """Ablation: False lets natural images change the whole network."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(weight_decay=1e-4)
    )
    """The optimiser of all parameters; its decay acts on branch and BatchNorm too (published)."""
    lr_control: LrControl = "halving"
    """"halving": automatic, from the accuracy on val; "schedule": ``schedule`` (ablation)."""
    halving: HalvingConfig = dataclasses.field(default_factory=HalvingConfig)
    """When the rate is halved and the best weights come back."""
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    """Of the learning rate, in fractional epochs; unused with "halving"."""
    augment: AugmentConfig = dataclasses.field(
        default_factory=lambda: AugmentConfig(padding_mode="zero")
    )
    """Crops and flips."""
    attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    """PGD on the plain network in training."""
    start_deviation: float | None = None
    """Standard deviation of a Gaussian start of that PGD in [0, 1] pixel units, > 0 (published for
    32 px: 0.001); None: uniform in the ball."""
    val_attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    """PGD on the selection split, which sets the learning rate and chooses the epoch."""
    head: str | None = None
    """Name of the classifier; None: the last layer."""
    head_init: HeadInit = "keep"
    """"keep": the start's head; "fresh": new weights; "zeros" (published for 32 px)."""
    keep: Keep = "best"
    """"best": the epoch with the highest robust accuracy on ``keep_split``; "last"."""
    keep_split: KeepSplit = "val"
    """What chooses the epoch; "test" (published) makes results leaky."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "epochs", "batch_size", "rank")
        require_at_least(self, 0, "seed")
        require_range(self, 0, math.inf, "lr", "alpha", open_low=True)
        require_range(self, 0, math.inf, "lambda_max")
        require_choice(self, "blocks", Blocks)
        require_choice(self, "lambda_source", LambdaSource)
        require_choice(self, "lr_control", LrControl)
        require_choice(self, "head_init", HeadInit)
        require_choice(self, "keep", Keep)
        require_choice(self, "keep_split", KeepSplit)
        if self.start_deviation is not None:
            require_range(self, 0, math.inf, "start_deviation", open_low=True)
        if self.fixed_lambdas is not None:
            first, second = self.fixed_lambdas
            if not (0 <= first <= 1 and 0 <= second < math.inf):
                raise ConfigError(
                    f"fixed_lambdas = {self.fixed_lambdas!r}: the first must be between 0 and 1, "
                    "the second at least 0"
                )


def loss_weights(
    train_accuracy: float, *, lambda_max: float = 6.0, alpha: float = 1.0
) -> tuple[float, float]:
    """Return (lambda1, lambda2): the weights of natural cross-entropy and divergence.

    ``lambda1 = 1 - a ** alpha`` and ``lambda2 = lambda_max * a ** alpha``: training begins with
    natural images, branch and head, and turns to adversarial images as the branch fits.

    Args:
        train_accuracy: a, of natural training images through the branch, in [0, 1].
        lambda_max: >= 0.
        alpha: > 0.

    Raises:
        ConfigError: the accuracy is no fraction.

    Example:
        >>> loss_weights(0.5)
        (0.5, 3.0)
    """
    if not 0 <= train_accuracy <= 1:
        raise ConfigError(f"train_accuracy = {train_accuracy!r}: must be a fraction from 0 to 1")
    fitted = train_accuracy**alpha
    return 1 - fitted, lambda_max * fitted


class TwoPaths(nn.Module):
    """Both forwards of a training step in one call, so that data parallelism wraps it once.

    | parameters | natural path | adversarial path |
    |---|---|---|
    | stem, blocks, BatchNorm | used as constants | trained |
    | branch | trained | absent |
    | head | trained | trained |

    The natural path is the same network called with other weights: detached ones and, where
    there is a branch, its sum with them. No ``requires_grad`` flag changes on the way. BatchNorm's
    running statistics see both batches, natural first, as in the authors' code.

    Args:
        model: a network with low-rank branches.
        head: its classifier.
        disentangle: False trains everything on the natural path.

    Note:
        Dropout is off in training: the two paths would have to drop the same units. Activation
        checkpointing would recompute the natural path with the plain weights, so it must be off.
    """

    def __init__(self, model: nn.Module, head: nn.Module, *, disentangle: bool = True) -> None:
        super().__init__()
        self.model = model
        self._disentangle = disentangle
        trained = {id(parameter) for parameter in head.parameters()}
        for layer in low_rank_layers(model).values():
            wrapped = layer.get_submodule(WRAPPED[type(layer)])
            inside = {id(parameter) for parameter in wrapped.parameters()}
            trained |= {id(p) for p in layer.parameters() if id(p) not in inside}
        self._constant = [
            name for name, parameter in model.named_parameters() if id(parameter) not in trained
        ]

    def natural(self, inputs: Tensor) -> Tensor:
        """Return the logits ``[n, classes]`` of the path with the branch."""
        weights: dict[str, Tensor] = {}
        for name in self._constant:
            parameter = self.model.get_parameter(name)
            weights[name] = parameter.detach() if self._disentangle else parameter
        for prefix, layer in low_rank_layers(self.model).items():
            for name, delta in layer.deltas().items():
                name = f"{prefix}.{WRAPPED[type(layer)]}.{name}"
                weights[name] = weights[name] + delta
        logits: Tensor = functional_call(self.model, weights, (inputs,))
        return logits

    def forward(self, inputs: Tensor, adversarial: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of natural inputs with, and of adversarial ones without the branch."""
        natural_logits = self.natural(inputs)
        return natural_logits, self.model(adversarial)

    def train(self, mode: bool = True) -> "TwoPaths":
        """Set the mode as usual, with dropout left off."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _DropoutNd):
                module.eval()
        return self


def train(config: AutoLoraConfig, context: RunContext) -> Result:
    """Fine-tune against the task's first threat model; return the plain network.

    Beside accuracies, loss and rate, the table of epochs has "lambda1" and "lambda2" (used in the
    epoch), "loss/natural", "loss/adversarial" and "loss/divergence" (before weighting, nats),
    "branch/accuracy" (after the epoch, on training images; sets the weights of the next one),
    "branch/size" (norm of what the branch adds, relative to that of the weights),
    "halving/condition" (0: the rate stays; 1, 2: see ``Decision``) and "halving/best" (the epoch
    that a halving goes back to).

    Raises:
        ConfigError: a layer cannot have a branch of that rank, or the head is not found.
        CheckpointError: the checkpoint to resume from is no checkpoint of this model.
        NonFiniteLossError: training diverged.

    Note:
        The accuracy is measured once per epoch; the authors' code for 32 px measures it five
        times, and runs an attack on the whole test split now and then, which is left out here.
        It is not measured again when the best weights come back (published).
    """
    model = start_model(config, context)
    head_name, head = find_head(model, config.head, num_classes=context.start.num_classes)
    add_low_rank_branches(
        model,
        config.rank,
        blocks=config.blocks,
        head=head_name,
        generator=generator(config.seed, "branches"),
    )
    paths = TwoPaths(model, head, disentangle=config.disentangle).to(context.device)
    run = FineTuning(config, context, paths, plain=model, export=export_plain)
    for epoch in run.remaining():
        lambda1, lambda2 = _lambdas(config, context, run, paths)
        terms = torch.zeros(4, dtype=torch.float64, device=context.device)
        objective = _objective(config, context, model, (lambda1, lambda2), terms)
        steps = config.attack.num_steps
        trained = run.train_epoch(epoch, objective, passes=(steps + 2, steps + 2))
        natural, adversarial, distance, count = context.sum(terms).tolist()
        metrics = {
            **trained,
            "lambda1": lambda1,
            "lambda2": lambda2,
            "loss/natural": natural / count,
            "loss/adversarial": adversarial / count,
            "loss/divergence": distance / count,
            "branch/size": _branch_size(model),
        }
        if config.fixed_lambdas is None and epoch + 1 < config.epochs:
            metrics["branch/accuracy"] = _train_accuracy(config, context, run, paths, epoch + 1)
        run.finish_epoch(epoch, metrics)
    return run.result({"rank": config.rank})


def _objective(
    config: AutoLoraConfig,
    context: RunContext,
    model: nn.Module,
    lambdas: tuple[float, float],
    terms: Tensor,
) -> BatchLoss:
    """Return the loss of a batch, which adds what it is made of to ``terms``.

    ``lambda1 CE(z, y) + (1 - lambda1) CE(z', y) + lambda2 KL(z || z')`` with z the logits of
    natural images with the branch and z' those of adversarial images without.

    Args:
        config: its attack.
        context: gives the threat model.
        model: the network that is attacked, without its branch.
        lambdas: (lambda1, lambda2).
        terms: float64 ``[4]``: sums of the three terms over images, and the number of images.
    """
    lambda1, lambda2 = lambdas

    def objective(
        network: nn.Module, batch: Batch, noise: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        adversarial_inputs = craft_batch(
            model,
            batch,
            context=context,
            attack=config.attack,
            noise=noise,
            start_deviation=config.start_deviation,
        )
        natural_logits, logits = network(batch.inputs, adversarial_inputs)
        natural = functional.cross_entropy(natural_logits, batch.labels)
        adversarial = functional.cross_entropy(logits, batch.labels)
        distance = divergence(natural_logits, logits).mean()
        measured = torch.stack([natural, adversarial, distance, torch.ones_like(distance)])
        if batch.count:
            terms.add_(measured.detach(), alpha=batch.count)
        loss = lambda1 * natural + (1 - lambda1) * adversarial + lambda2 * distance
        return loss, logits

    return objective


def _lambdas(
    config: AutoLoraConfig, context: RunContext, run: FineTuning, paths: TwoPaths
) -> tuple[float, float]:
    """Return the loss weights of the coming epoch."""
    if config.fixed_lambdas is not None:
        return config.fixed_lambdas
    if run.rows:
        accuracy = run.rows[-1]["branch/accuracy"]
    else:
        accuracy = _train_accuracy(config, context, run, paths, 0)
    return loss_weights(accuracy, lambda_max=config.lambda_max, alpha=config.alpha)


def _train_accuracy(
    config: AutoLoraConfig, context: RunContext, run: FineTuning, paths: TwoPaths, epoch: int
) -> float:
    """Return the accuracy of natural training images, augmented as in ``epoch``: a forward each."""
    run.spend("train", 1)
    counts = torch.zeros(2, dtype=torch.int64, device=context.device)
    with eval_mode(paths), torch.no_grad():
        for batch in run.loader.epoch(epoch):
            if not batch.count:
                continue
            inputs = batch.inputs
            if config.lambda_augment:
                inputs = augment(
                    inputs, batch.ids, config=config.augment, seed=config.seed, epoch=epoch
                )
            branch = config.lambda_source == "branch"
            logits = paths.natural(inputs) if branch else paths.model(inputs)
            counts[0] += (logits.argmax(1) == batch.labels).sum()
            counts[1] += batch.count
    correct, count = context.sum(counts).tolist()
    return float(correct / count)


def _branch_size(model: nn.Module) -> float:
    """Return the norm of what the branch adds, relative to that of the weights it is added to."""
    changes, weights = [], []
    for layer in low_rank_layers(model).values():
        wrapped = layer.get_submodule(WRAPPED[type(layer)])
        for name, delta in layer.deltas().items():
            changes.append(delta.detach().norm())
            weights.append(wrapped.get_parameter(name).detach().norm())
    return float(torch.stack(changes).norm() / torch.stack(weights).norm())
