"""One evaluation protocol for all methods: clean, attacked and corrupted accuracy with masks.

An evaluation is a few *stages*, each a list of independent shards: some examples, one measurement.
Shards go through ``map``, a plain loop or a fan-out over a cluster that stores what is finished.
Attacks in sequence are a stage each: the survivors of all shards are pooled and cut anew, so that
no shard is left with a handful of examples. Attack noise depends on instance ids only, so the
result is the same for any number of shards and workers.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from robustft.attacks import attack_mode
from robustft.attacks.official import check_official
from robustft.data import Split, Task, supported
from robustft.data.base import content_digest
from robustft.data.corrupted_sets import find_published, read_published
from robustft.errors import ConfigError, DataError, UnknownNameError
from robustft.evaluation import sanity
from robustft.evaluation.mapping import Mapper, in_turn, shared_key
from robustft.evaluation.outcome import Evaluation, Flag, Strip
from robustft.evaluation.shards import device_of, measure_shard
from robustft.evaluation.suites import (
    CORRUPTION_SETS,
    SUITES,
    Attack,
    EvaluationConfig,
    attack_stages,
    measures,
    resolve_threats,
)
from robustft.models import state_digest
from robustft.threat import ThreatModel
from robustft.training.precision import full_float32

__all__ = ["SUITES", "Evaluation", "EvaluationConfig", "Mapper", "evaluate"]

logger = logging.getLogger(__name__)

ValueT = TypeVar("ValueT")
ItemT = TypeVar("ItemT")

Value = dict[str, Any]
Masks = dict[str, NDArray[np.bool_]]

CANDIDATES = 8
"""Pictures are taken from the first so many examples per picture wanted: whatever the shards are,
the same ones are shown, and no worker sends back more."""


def evaluate(
    model: nn.Module,
    task: Task,
    *,
    suite: str | None = None,
    split: str = "test",
    config: EvaluationConfig | None = None,
    map: Mapper | None = None,
    device: str | None = None,
    surrogate: nn.Module | None = None,
) -> Evaluation:
    """Measure ``model`` on one split of ``task``.

    Args:
        model: NCHW float in [0, 1] -> logits; normalisation is its first layer. It is evaluated
            in eval mode on the device its parameters are on, and left as it was.
        task: data and threat models.
        suite: overrides ``config.suite``.
        split: "test" (read it once, at the end) or "val".
        config: attack strength, limits, seed; the default is the report's.
        map: where the shards run; None is a loop in this process.
        device: "cpu" or "cuda" where the shards compute; None: where the model is.
        surrogate: another model of the task, such as the one this was fine-tuned from: with
            attacks and ``config.sanity``, a warning sign is whether images made for it fool
            ``model`` more often than images made for ``model`` itself.

    Raises:
        UnknownNameError: no such suite or split.
        ConfigError: the model gives no logits of the task's classes; the suite needs radii that
            nothing gives; ``config.corrupted_root`` for data without a published corrupted set.
        DataError: the split is empty or has labels of other classes; files are missing or damaged,
            or hold other pictures than the split.
        ResourceError: not even one image at a time fits into memory.
    """
    config = config or EvaluationConfig()
    if suite is not None:
        config = dataclasses.replace(config, suite=suite)
    if split not in task.splits:
        raise UnknownNameError("split", split, task.splits)
    data = _limited(task.splits[split], config)
    threats = resolve_threats(config, task)
    stages = attack_stages(config, threats)
    _check_labels(data, task, split)
    _check_outputs(model, data, task)
    if config.backend == "pyautoattack":
        for attack in itertools.chain.from_iterable(stages):
            check_official(
                {attack.name: attack.options},
                norm=attack.threat.norm,
                shape=task.image_shape,
                num_classes=task.num_classes,
            )
    training = any(module.training for module in model.modules())
    run = _Run(model, data, task, config=config, split=split, map=map or in_turn, device=device)
    if surrogate is not None:
        run.shared["surrogate"] = surrogate
    run.prepare_corruptions()
    flags, curve = run.check(threats) if stages and config.sanity else ([], [])
    # The look at the outputs was a forward, too.
    passes = {"num_forwards": run.num_forwards + 1, "num_backwards": run.num_backwards}
    run.num_forwards = run.num_backwards = 0
    run.measure_unattacked()
    for stage in stages:
        run.attack(stage)
    if stages:
        targets = [a.options.get("num_targets", 0) for stage in stages for a in stage]
        free = sanity.free_flags(
            run.masks,
            run.steps,
            num_classes=task.num_classes,
            num_targets=max(targets),
            training=training,
            excess=run.excess,
        )
        _warn(free)
        flags += free
    return Evaluation(
        split=split,
        masks=run.masks,
        ids=data.ids,
        settings={
            **dataclasses.asdict(config),
            "corruptions": "generated" if config.corrupted_root is None else "files",
            "task": task.name,
            "task_digest": task.digest,
            "num_classes": task.num_classes,
            "threat_models": [str(threat) for threat in threats],
            "eps": {threat.norm: threat.eps for threat in threats},
            "model_digest": run.model_digest,
            "sanity_passes": passes,
        },
        num_forwards=run.num_forwards,
        num_backwards=run.num_backwards,
        leaky=task.leaky and split == "test",
        confidence=run.confidence,
        steps=run.steps,
        flags=flags,
        curve=curve,
        strips=[strip for threat in threats if (strip := run.strip(threat)) is not None],
    )


class _Run:
    """An evaluation under way: what its stages share and what they have found so far."""

    def __init__(
        self,
        model: nn.Module,
        data: Split,
        task: Task,
        *,
        config: EvaluationConfig,
        split: str,
        map: Mapper,
        device: str | None,
    ) -> None:
        self.data, self.task, self.config = data, task, config
        self.map, self.name = map, f"evaluate {split}"
        self.model_digest = state_digest(model.state_dict())
        self.key = shared_key(self.model_digest, type(model), data.ids, task.digest, config.seed)
        self.shared: dict[str, Any] = {
            "model": model,
            "split": data,
            "device": device,
            "seed": config.seed,
            "batch_size": config.batch_size,
        }
        self.corruption_items: list[dict[str, Any]] = []
        self.masks: Masks = {}
        self.standing: Masks = {}
        self.confidence: NDArray[np.float32] | None = None
        self.steps: list[dict[str, Any]] = []
        self.pictures: dict[str, dict[int, tuple[Any, ...]]] = {}
        self.num_forwards = self.num_backwards = 0
        self.excess = 0.0

    def prepare_corruptions(self) -> None:
        """List the corruptions to measure; published files are all read once.

        A file that is missing, damaged or of another data set must not end an evaluation in its
        last hour.
        """
        config = self.config
        if "corruptions" not in measures(config.suite):
            return
        count = min(config.corruption_limit or len(self.data), len(self.data))
        shards = self._shards(np.arange(count))
        kinds = CORRUPTION_SETS[config.corruption_set]
        kinds = tuple(kind for kind in kinds if supported(kind, self.task.image_shape))
        content: dict[str, Any] = {"source": "generated"}
        if config.corrupted_root is not None:
            clean = self.data.take(np.arange(count))
            self.shared["published"] = find_published(self.task, config.corrupted_root, kinds)
        for kind, severity in itertools.product(kinds, config.severities):
            if config.corrupted_root is not None:
                pictures = read_published(self.shared["published"], kind, severity, clean=clean)
                content = {"source": "files", "content": content_digest(pictures.images)}
            name = f"corruption/{kind}/{severity}"
            item = {"measure": "corruptions", "name": name, "type": kind, "severity": severity}
            self.corruption_items += [{**item, **content, "rows": rows} for rows in shards]

    def check(self, threats: Sequence[ThreatModel]) -> tuple[list[Flag], list[dict[str, Any]]]:
        """Look for signs that the numbers to come cannot be trusted."""
        surrogate = self.shared.get("surrogate")
        items = sanity.check_items(
            threats,
            self.task,
            len(self.data),
            self.config.sanity_examples,
            surrogate=None if surrogate is None else state_digest(surrogate.state_dict()),
        )
        values = self._map(sanity.check_shard, items, "sanity checks")
        flags = sanity.checked_flags(items, values, self.task.num_classes)
        _warn(flags)
        return flags, sanity.radius_curve(items, values)

    def measure_unattacked(self) -> None:
        """Measure clean accuracy, which every attack starts from, and corruptions."""
        items: list[dict[str, Any]] = [
            {"measure": "clean", "name": "clean", "rows": rows}
            for rows in self._shards(np.arange(len(self.data)))
        ]
        items += self.corruption_items
        # One name for all suites, under which another suite finds what is stored.
        values = self._map(measure_shard, items, "without attack")
        found: dict[str, list[Value]] = {}
        for item, value in zip(items, values, strict=True):
            found.setdefault(item["name"], []).append(value)
        for name, shards in found.items():
            self.masks[name] = np.concatenate([shard["correct"] for shard in shards])
        self.confidence = np.concatenate([shard["confidence"] for shard in found["clean"]])

    def attack(self, stage: Sequence[Attack]) -> None:
        """Run attacks that do not depend on each other, each on what its chain has standing."""
        work = []
        for attack in stage:
            standing = self.standing.setdefault(attack.chain, self.masks["clean"].copy())
            work += [(attack, rows) for rows in self._shards(np.flatnonzero(standing))]
        items = [self._attack_item(attack, rows) for attack, rows in work]
        label = ", ".join(dict.fromkeys(attack.name for attack in stage))
        if self.config.mode == "union_only":
            label = f"{stage[0].threat.norm} {label}"
        values = self._map(measure_shard, items, label)
        for attack in stage:
            own = [
                (rows, value)
                for (other, rows), value in zip(work, values, strict=True)
                if other is attack
            ]
            self._take_in(attack, own)

    def strip(self, threat: ThreatModel) -> Strip | None:
        """Return pictures of the first examples that an attack of this threat model broke."""
        broken = sorted(self.pictures.get(threat.norm, {}).items())[: self.config.num_strips]
        if not broken:
            return None
        rows = np.array([row for row, _ in broken])
        pictures, predicted, attacks = zip(*(picture for _, picture in broken), strict=True)
        return Strip(
            norm=threat.norm,
            eps=threat.eps,
            ids=self.data.ids[rows],
            labels=self.data.labels[rows],
            predicted=np.array(predicted, dtype=np.int64),
            clean=self.data.images[rows].astype(np.float32) / 255,
            adversarial=np.stack(pictures),
            attacks=attacks,
        )

    def _map(
        self, fn: Callable[[Any, Any], Value], items: Sequence[dict[str, Any]], label: str
    ) -> list[Value]:
        if not items:
            return []
        values = self.map(fn, items, shared=self.shared, key=self.key, name=f"{self.name}: {label}")
        for value in values:
            self.num_forwards += int(value["num_forwards"])
            self.num_backwards += int(value["num_backwards"])
        before = self.shared["batch_size"]
        fitted = min(int(value["shrunk_to"]) or before for value in values)
        if fitted < before:
            logger.warning(
                "memory holds %d examples at a time, not %d: batches are smaller from here on",
                fitted,
                before,
            )
            self.shared["batch_size"] = fitted
        return values

    def _take_in(self, attack: Attack, found: Sequence[tuple[list[int], Value]]) -> None:
        standing = self.standing[attack.chain]
        attacked = int(standing.sum())
        pictures = self.pictures.setdefault(attack.threat.norm, {})
        for rows, value in found:
            standing[rows] = value["correct"]
            self.excess = max(self.excess, value["excess"])
            shown = zip(value["picture_rows"], value["pictures"], value["predicted"], strict=True)
            for row, picture, predicted in shown:
                pictures.setdefault(int(row), (picture, predicted, attack.name))
        self.masks[attack.mask] = standing.copy()
        left = int(standing.sum())
        self.steps.append(
            {
                "norm": attack.threat.norm,
                "eps": attack.threat.eps,
                "attack": attack.name,
                "attacked": attacked,
                "standing": left,
                **{
                    name: sum(value[name] for _, value in found)
                    for name in ("num_forwards", "num_backwards", "seconds")
                },
            }
        )
        logger.info("%s %s: %d of %d standing", attack.threat, attack.name, left, len(self.data))

    def _attack_item(self, attack: Attack, rows: list[int]) -> dict[str, Any]:
        return {
            "measure": "attack",
            "norm": attack.threat.norm,
            "eps": attack.threat.eps,
            "options": dict(attack.options),
            "pictures": CANDIDATES * self.config.num_strips,
            "rows": rows,
        }

    def _shards(self, rows: NDArray[np.int64]) -> list[list[int]]:
        size = self.config.shard_size
        return [rows[first : first + size].tolist() for first in range(0, len(rows), size)]


def _check_labels(data: Split, task: Task, split: str) -> None:
    if len(data) == 0:
        raise DataError(f"split {split!r} of {task.name} has no examples: choose another split")
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0 or high >= task.num_classes:
        raise DataError(
            f"labels of {task.name} go from {low} to {high}, and it has {task.num_classes} "
            f"classes, 0 to {task.num_classes - 1}: number its classes anew"
        )


def _check_outputs(model: nn.Module, data: Split, task: Task) -> None:
    """Raise ConfigError unless the model gives logits of the task's classes."""
    image = torch.from_numpy(data.images[:1].astype(np.float32) / 255).to(device_of(model))
    with attack_mode(model), full_float32(), torch.no_grad():
        logits = model(image)
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, task.num_classes):
        got = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ConfigError(
            f"the model must return logits [n, {task.num_classes}], the classes of {task.name}, "
            f"and one image gives {got}: the model belongs to other data"
        )


def _warn(flags: Sequence[Flag]) -> None:
    for flag in flags:
        if flag.raised:
            logger.warning("%s: %s", flag.name, flag.text)


def _limited(split: Split, config: EvaluationConfig) -> Split:
    n = len(split)
    limits = [limit for limit in (config.limit, config.corruption_limit) if limit is not None]
    if not limits or min(limits) >= n:
        return split
    # Files are often sorted by class, so a prefix of the file would be no sample of the split.
    order = np.random.default_rng(0).permutation(n)
    return split.take(order[: config.limit])
