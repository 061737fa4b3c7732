"""RiFT: robust critical fine-tuning.

Zhu, Hu, Wang, Xie, Yang, "Improving Generalization of Adversarial Training via Robust Critical
Fine-Tuning", 2023, arXiv 2308.02533, algorithm 1. Three steps on a finished robust model: measure
every layer's criticality, fine-tune the least critical one on clean images, and go back along
the straight line between old and new weights until robustness is what it was.

The options are in ``robustft.methods.rift_config``, the ascent of step 1 in ``criticality`` and the
line of step 3 in ``interpolation`` beside this file. Other methods use steps 2 and 3 as they are:
``fine_tune`` and ``interpolated``.
"""

import copy
import dataclasses
import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from robustft.config import config_hash, to_dict
from robustft.data.base import Split, Task, content_digest
from robustft.errors import ConfigError
from robustft.methods.base import Result, Row
from robustft.methods.common import AttackConfig, craft, validate
from robustft.methods.criticality import (
    Criticality,
    CriticalityConfig,
    CriticalityWork,
    criticality_of_layer,
    eligible_layers,
    module_robust_criticality,
    rank_layers,
)
from robustft.methods.fine_tuning import PASSES
from robustft.methods.instance_config import GroupConfig
from robustft.methods.instance_selection import split_groups
from robustft.methods.instance_statistics import InstanceStatistics
from robustft.methods.interpolation import (
    CurveConfig,
    CurveWork,
    curve_point,
    interpolate,
    select_alpha,
)
from robustft.methods.rift_config import PREPARE_FIELDS, RiftConfig, TuneConfig, official
from robustft.models import batch_norms, resolve_layer, state_digest, weight_layers
from robustft.models.start import Start
from robustft.threat import ThreatModel
from robustft.training.context import RunContext
from robustft.training.loaders import Batch, Loader, rows
from robustft.training.loop import Best, cpu_state, epoch_metrics, run_epoch, share_buffers
from robustft.training.optimizers import build_optimizer
from robustft.training.precision import full_float32
from robustft.training.seeding import derive_seed, generator

__all__ = [
    "PREPARE_FIELDS",
    "Criticality",
    "RiftConfig",
    "Tuned",
    "choose_modules",
    "criticality_of_layer",
    "fine_tune",
    "interpolate",
    "interpolated",
    "module_robust_criticality",
    "official",
    "prepare",
    "rank_layers",
    "select_alpha",
    "train",
]

_logger = logging.getLogger(__name__)

# Step 1: criticality of every layer, once per starting model.


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CraftWork:
    """What crafting the stored adversarial examples needs, wherever a shard of it runs."""

    start: Start
    split: Split
    threat: ThreatModel
    attack: AttackConfig
    seed: int
    batch_size: int
    device: str


@full_float32()
def craft_shard(work: CraftWork, begin: int) -> dict[str, NDArray[np.float32]]:
    """Return the adversarial examples of rows ``begin`` to ``begin + batch_size``."""
    device = torch.device(work.device)
    positions = np.arange(begin, min(begin + work.batch_size, len(work.split)), dtype=np.int64)
    inputs, labels, ids = rows(work.split, positions, device=device)
    adversarial = craft(
        work.start.build().to(device),
        inputs,
        labels,
        ids=ids,
        threat=work.threat,
        attack=work.attack,
        start_noise=generator(work.seed, "mrc attack"),
    )
    return {"inputs": adversarial.cpu().numpy()}


def prepare(config: RiftConfig, context: RunContext) -> dict[str, Any]:
    """Craft the stored adversarial examples and measure every layer's criticality.

    Done once per starting model; all trials of a search share it. Its value is small: the
    examples themselves are not in it.

    Returns:
        "criticality": rows (layer, index, criticality, accuracy_drop, movement, eligible, rank and
        the settings that make values comparable); "settings": hash of what they depend on.
    """
    split = _mrc_split(config, context.task)
    state_key = _start_key(context.start)
    craft_work = CraftWork(
        start=context.start,
        split=split,
        threat=context.task.threat,
        attack=config.mrc_attack,
        seed=config.mrc_seed,
        batch_size=config.eval_batch_size,
        device=context.device.type,
    )
    craft_key = _key(
        state_key,
        content_digest(split.images, split.labels, split.ids),
        config_hash([context.task.threat, config.mrc_attack]),
        config.mrc_seed,
        config.eval_batch_size,
    )
    shards = context.map(
        craft_shard,
        range(0, len(split), config.eval_batch_size),
        shared=craft_work,
        key=craft_key,
        name="adversarial examples",
    )
    ascent = CriticalityConfig(
        eps=config.mrc_eps,
        lr=config.mrc_lr,
        num_epochs=config.mrc_epochs,
        batch_size=config.mrc_batch_size,
        projection=config.mrc_projection,
        start_at_zero=config.mrc_start_at_zero,
        prefix_cache=config.mrc_prefix_cache,
        cache_mib=config.mrc_cache_mib,
        seed=config.mrc_seed,
    )
    work = CriticalityWork(
        start=context.start,
        inputs=np.concatenate([shard["inputs"] for shard in shards]),
        labels=split.labels,
        config=ascent,
        device=context.device.type,
    )
    layers = list(weight_layers(context.start.build()))
    eligible = eligible_layers(layers, config.eligible)
    values = context.map(
        criticality_of_layer,
        layers,
        shared=work,
        key=_key(craft_key, config_hash(ascent)),
        name="criticality",
    )
    measured = {layer: float(value["value"]) for layer, value in zip(layers, values, strict=True)}
    ranking = rank_layers(measured, eligible=eligible, tie_tolerance=config.tie_tolerance)
    settings = {
        "split": config.mrc_split,
        "num_examples": len(split),
        "threat_model": str(context.task.threat),
        "attack_steps": config.mrc_attack.num_steps,
        "attack_step_size": config.mrc_attack.step(context.task.threat),
        "eps": config.mrc_eps,
        "lr": config.mrc_lr,
        "epochs": config.mrc_epochs,
        "batch_size": config.mrc_batch_size,
        "projection": config.mrc_projection,
        "seed": config.mrc_seed,
    }
    table: list[Row] = [
        {
            "layer": layer,
            "index": index,
            "criticality": measured[layer],
            "accuracy_drop": float(value["accuracy_drop"]),
            "movement": float(value["movement"]),
            "eligible": layer in eligible,
            "rank": ranking.index(layer) + 1 if layer in ranking else None,
            **settings,
        }
        for index, (layer, value) in enumerate(zip(layers, values, strict=True))
    ]
    for layer in ranking:
        _logger.info("criticality of %s: %.4f nats", layer, measured[layer])
    return {"criticality": table, "settings": _prepare_hash(config)}


def _mrc_split(config: RiftConfig, task: Task) -> Split:
    split = task.splits[config.mrc_split]
    if config.mrc_examples is None or config.mrc_examples >= len(split):
        return split
    draw = np.random.default_rng(derive_seed(config.mrc_seed, "mrc examples"))
    return split.take(np.sort(draw.permutation(len(split))[: config.mrc_examples]))


def _prepare_hash(config: RiftConfig) -> str:
    return config_hash({name: getattr(config, name) for name in PREPARE_FIELDS})


def _start_key(start: Start) -> str:
    """Name a starting model by its content."""
    return _key(start.architecture, state_digest(start.build().state_dict()))


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


# Step 2: fine-tune the chosen modules.


def choose_modules(config: RiftConfig, model: nn.Module, table: Sequence[Row]) -> list[str]:
    """Return the names of the layers that ``config.modules`` stands for, "all" or "bn".

    Args:
        config: its ``modules``.
        model: the starting model.
        table: criticality rows; may be empty where the selection does not need them.

    Raises:
        UnknownNameError: no layer is called that; the nearest is proposed.
        ConfigError: fewer eligible layers than asked for.
    """
    chosen: list[str] = []
    for name in config.selection_names:
        counted = re.fullmatch(r"(mrc|top)-([1-9]\d*)", name)
        if name in ("all", "bn"):
            chosen.append(name)
        elif name == "last":
            chosen.append(list(weight_layers(model))[-1])
        elif name == "most-critical":
            eligible = [row for row in table if row["eligible"]]
            chosen.append(max(eligible, key=lambda row: row["criticality"])["layer"])
        elif counted is not None:
            ranked = sorted((row for row in table if row["rank"]), key=lambda row: row["rank"])
            wanted = int(counted[2])
            if wanted > len(ranked):
                raise ConfigError(
                    f"modules = {name!r}: only {len(ranked)} layers are eligible; "
                    "lower the number or widen `eligible`"
                )
            first = 0 if counted[1] == "top" else wanted - 1
            chosen.extend(row["layer"] for row in ranked[first:wanted])
        else:
            resolve_layer(model, name)
            chosen.append(name)
    return list(dict.fromkeys(chosen))


def _needs_criticality(config: RiftConfig) -> bool:
    return any(
        name == "most-critical" or re.fullmatch(r"(mrc|top)-\d+", name)
        for name in config.selection_names
    )


def _set_trainable(model: nn.Module, modules: Sequence[str], *, weights: bool) -> None:
    """Freeze everything but the chosen modules' parameters; before the engine wraps the model."""
    model.requires_grad_(False)
    if not weights:
        return
    for name in modules:
        if name == "all":
            model.requires_grad_(True)
        elif name == "bn":
            for layer in batch_norms(model).values():
                layer.requires_grad_(True)
        else:
            resolve_layer(model, name).requires_grad_(True)


def _group_split(group: GroupConfig, task: Task) -> Split:
    """Return the training examples of a group, by the statistics of an earlier run.

    Raises:
        ConfigError: the statistics are of other examples, or the group cannot be made.
        DataError: the statistics are incomplete or damaged.
    """
    split = task.splits["train"]
    if group.which == "all" or group.statistics is None:
        return split
    statistics = InstanceStatistics(group.statistics, split=split)
    name = group.perturbation or next(iter(statistics.manifest.perturbations))
    chosen = split_groups(
        statistics.aggregate(name, only_correct=group.only_correct),
        group.metric,
        share=group.share,
        groups=(group.which,),
        balance=group.balance,
        num_classes=task.num_classes,
        seed=group.seed,
    )[group.which]
    return split.take(np.flatnonzero(np.isin(split.ids, statistics.ids[chosen])))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Tuned:
    """What fine-tuning found.

    Args:
        state: the weights of the kept epoch, on the CPU.
        rows: one per epoch of all stages.
        epoch: 1-based number of the kept one, which is of the last stage.
    """

    state: dict[str, Tensor]
    rows: list[Row]
    epoch: int


def fine_tune(
    stages: Sequence[tuple[TuneConfig, Sequence[str]]],
    context: RunContext,
    *,
    split: Split | None = None,
    attack: AttackConfig | None = None,
) -> Tuned:
    """Fine-tune on natural images, in one stage or in several that follow one another.

    Each stage has its own optimiser and schedule and begins from the weights that the stage before
    has kept. A resumed run goes on in the stage that its checkpoint was written in.

    Args:
        stages: options, and names of the modules that are trained: layers, "all" or "bn".
        context: the start, the data, the checkpoint to continue from.
        split: what is trained on; None: the training split.
        attack: PGD on the selection split after each epoch, for "val/robust" beside "val/clean".
            None: clean accuracy alone, as "val/tuned_clean", since an interpolation follows and
            "val/clean" is that of its result.

    Raises:
        NonFiniteLossError: fine-tuning diverged.
    """
    split = context.task.splits["train"] if split is None else split
    total = sum(config.epochs for config, _ in stages)
    saved = context.resume()
    epoch_rows: list[Row] = [] if saved is None else list(saved["epochs"])
    own, begin, best = copy.copy(context), 0, Best()
    for config, modules in stages:
        # A checkpoint of a later stage holds all that this one has left.
        if len(epoch_rows) <= begin + config.epochs:
            best = _stage(
                config, own, modules, split, epoch_rows, begin=begin, total=total, attack=attack
            )
            own.start = dataclasses.replace(own.start, state=best.model)
        begin += config.epochs
    return Tuned(best.model, epoch_rows, best.epoch)


def _stage(
    config: TuneConfig,
    context: RunContext,
    modules: Sequence[str],
    split: Split,
    epoch_rows: list[Row],
    *,
    begin: int,
    total: int,
    attack: AttackConfig | None,
) -> Best:
    """Train the epochs from ``begin`` on that are not in ``epoch_rows`` yet, and append them."""
    trains_weights = config.bn_mode != "recalibrate_only"
    model = context.start.build().to(context.device)
    _set_trainable(model, modules, weights=trains_weights)
    optimizer = (
        build_optimizer(config.optimizer, model.named_parameters(), lr=config.lr)
        if trains_weights
        else None
    )
    network = context.engine.prepare(model, optimizer)
    loader = Loader(
        split,
        batch_size=config.batch_size,
        seed=config.seed,
        device=context.device,
        rank=context.rank,
        world_size=context.world_size,
    )
    best, val = Best(), "val/tuned_" if attack is None else "val/"
    # A checkpoint from the end of the stage before has another optimiser.
    saved = context.resume() if len(epoch_rows) > begin else None
    if saved is not None:
        context.engine.load_state(saved["engine"])
        best = Best.load(saved["best"])
    attacks = len(context.task.splits["val"]) * (0 if attack is None else attack.num_steps)
    answers = len(context.task.splits["val"]) * (1 if attack is None else 2)
    # A backward to one layer counts as one.
    passes = (len(split) + attacks + answers, len(split) * trains_weights + attacks)
    for epoch in range(len(epoch_rows) - begin, config.epochs):
        network.train()
        if config.bn_mode == "frozen":
            for layer in batch_norms(context.engine.module).values():
                layer.eval()
        trained = run_epoch(
            config, context, network, loader, _clean_loss, epoch=epoch, update=trains_weights
        )
        share_buffers(context.engine.module, context)
        measured = validate(
            context.engine.module,
            context,
            attack=attack,
            batch_size=config.eval_batch_size,
            seed=config.seed,
        )
        number = begin + epoch + 1
        score = measured["val/clean"] if config.keep == "best" else float(epoch)
        best.offer(score, epoch=number, state=context.engine.model_state)
        metrics = {
            **epoch_metrics(trained, accuracy="train/clean"),
            **{name.replace("val/", val): value for name, value in measured.items()},
            **dict(zip(PASSES, passes, strict=True)),
        }
        epoch_rows.append({"epoch": number, **metrics})
        context.report(
            metrics,
            step=number,
            total=total,
            checkpoint=lambda: {
                "engine": context.engine.state(),
                "best": best.state(),
                "epochs": list(epoch_rows),
            },
        )
    return best


def _clean_loss(network: nn.Module, batch: Batch, _: torch.Generator) -> tuple[Tensor, Tensor]:
    logits = network(batch.inputs)
    return functional.cross_entropy(logits, batch.labels), logits


# Step 3: interpolate, and choose where to stop.


def interpolated(config: CurveConfig, context: RunContext, result: Result) -> Result:
    """Go back from a method's result towards its start as far as robustness demands.

    Every entry of the state is interpolated, BatchNorm's running statistics like weights. Points
    are compared on the task's "val" split, against its first threat model.

    Args:
        config: the points, the attack, the tolerance.
        context: gives the start and fans out over the points.
        result: of a method that began at ``context.start``.

    Returns:
        ``result`` with the chosen state. Its accuracies on "val" are those of that state; what the
        method had measured itself is called "val/tuned_...". It gains "val/start_clean",
        "val/start_robust", "movement", choice "alpha" and table "interpolation", and counts the
        passes of the curve if the method counts its own.
    """
    start_state = cpu_state(context.start.build().state_dict())
    changed = {
        name: value
        for name, value in result.state.items()
        if not torch.equal(value, start_state[name])
    }
    work = CurveWork(
        start=context.start,
        tuned=changed,
        split=context.task.splits["val"],
        threat=context.task.threat,
        config=config,
        device=context.device.type,
    )
    curve = context.map(
        curve_point,
        config.alphas,
        shared=work,
        key=_key(
            _start_key(context.start),
            context.task.digest,
            config_hash(to_dict([config, context.task.threat, context.task.selection])),
            state_digest(changed),
        ),
        name="interpolation",
    )
    alpha = select_alpha(curve, tolerance=config.tolerance)
    at = {row["alpha"]: row for row in curve}
    # What the method has measured of the start stays true of the start.
    own = {re.sub(r"^val/(?!start_)", "val/tuned_", n): v for n, v in result.metrics.items()}
    metrics = own | {
        "val/clean": at[alpha]["clean"],
        "val/robust": at[alpha]["robust"],
        "val/start_clean": at[0]["clean"],
        "val/start_robust": at[0]["robust"],
        "movement": _relative_movement(start_state, changed),
    }
    if 1 in at:
        metrics |= {"val/tuned_clean": at[1]["clean"], "val/tuned_robust": at[1]["robust"]}
    backwards = len(curve) * len(work.split) * config.curve_runs * config.curve_attack.num_steps
    forwards = backwards + len(curve) * len(work.split) * (config.curve_runs + 1)
    for name, count in zip(PASSES, (forwards, backwards), strict=True):
        if name in metrics:
            metrics[name] += count
    return Result(
        state=interpolate(start_state, result.state, alpha),
        metrics=metrics,
        choices={**result.choices, "alpha": alpha},
        tables={
            **result.tables,
            "interpolation": [{**row, "chosen": row["alpha"] == alpha} for row in curve],
        },
    )


def _relative_movement(start: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> float:
    """Return ``||w_FT - w_AT|| / ||w_AT||`` over the weights that moved (buffers left out)."""
    names = [
        name
        for name, value in changed.items()
        if value.is_floating_point() and not name.endswith(("running_mean", "running_var"))
    ]
    moved = sum(float((changed[name] - start[name]).double().pow(2).sum()) for name in names)
    norm = sum(float(start[name].double().pow(2).sum()) for name in names)
    return float((moved / norm) ** 0.5) if norm else 0.0


# The whole method.


def train(config: RiftConfig, context: RunContext) -> Result:
    """Run the method: criticality (unless prepared), fine-tuning, interpolation, choice.

    Every choice is made on the task's "val" split.

    Raises:
        ConfigError: what was prepared belongs to other settings, or the group cannot be made.
        NonFiniteLossError: fine-tuning diverged.
    """
    prepared = context.prepared or None
    if prepared is None and _needs_criticality(config):
        prepared = prepare(config, context)
    if prepared is not None and prepared["settings"] != _prepare_hash(config):
        raise ConfigError(
            "the prepared criticality was measured with other settings: prepare again, or give "
            f"all trials the same {', '.join(PREPARE_FIELDS)}"
        )
    table: list[Row] = list(prepared["criticality"]) if prepared is not None else []
    modules = choose_modules(config, context.start.build(), table)
    split = _group_split(config.group, context.task)
    tuned = fine_tune([(config, modules)], context, split=split)
    grouped = {"group": config.group.which, "group_size": len(split)}
    result = Result(
        state=tuned.state,
        metrics={},
        choices={
            "layer": ",".join(modules),
            "modules": ",".join(config.selection_names),
            "lr": config.lr,
            "bn_mode": config.bn_mode,
            **(grouped if config.group.which != "all" else {}),
            "epoch": tuned.epoch,
            "leaky": context.task.leaky or config.mrc_split == "test",
        },
        tables={"epochs": tuned.rows, "criticality": table},
    )
    return interpolated(config, context, result)
