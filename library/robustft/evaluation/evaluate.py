"""One evaluation protocol for all methods: clean, attacked and corrupted accuracy with masks.

An evaluation is a list of independent *measurements* (clean, PGD and APGD per threat model, each
corruption at each severity), each cut into shards of examples. Shards go through ``map``, a plain
loop or a fan-out over a cluster; attack noise depends on instance ids only, so the result is the
same for any number of shards and workers.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import nn

from robustft.attacks import apgd, attack_mode, pgd
from robustft.data import C15, RIFT18, Split, Task, corrupt, supported
from robustft.data.base import content_digest
from robustft.data.corrupted_sets import PublishedSet, find_published, read_published
from robustft.errors import ConfigError, UnknownNameError
from robustft.evaluation.intervals import mean_interval, wilson
from robustft.models import state_digest
from robustft.threat import ThreatModel
from robustft.training.precision import full_float32

__all__ = ["SUITES", "Evaluation", "EvaluationConfig", "evaluate"]

SUITES: dict[str, tuple[str, ...]] = {
    "clean": ("clean",),
    "quick": ("clean", "pgd", "apgd"),
    "corruptions": ("clean", "corruptions"),
    "report": ("clean", "pgd", "apgd", "corruptions"),
}
MEASURES = ("clean", "pgd", "apgd", "corruptions")
CORRUPTION_SETS: dict[str, tuple[str, ...]] = {"c15": C15, "rift18": RIFT18}

ValueT = TypeVar("ValueT")
ItemT = TypeVar("ItemT")


class Mapper(Protocol):
    """``RunContext.map``: ``[fn(shared, item) for item in items]``, perhaps in parallel."""

    def __call__(
        self,
        fn: Callable[[Any, ItemT], ValueT],
        items: Iterable[ItemT],
        *,
        shared: Any,
        key: str,
        name: str,
    ) -> list[ValueT]: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """How a model is measured."""

    suite: str = "report"
    """A name in SUITES, or measurements joined by commas: "clean,pgd,apgd,corruptions"."""
    pgd_steps: int = 20
    """PGD steps, >= 1; the step size is 2.5 * eps / steps."""
    pgd_restarts: int = 1
    """Random starts of PGD, >= 1; an example counts as robust if it survives all of them."""
    apgd_steps: int = 50
    """APGD-CE steps, >= 1."""
    apgd_restarts: int = 1
    """Restarts of APGD, >= 1."""
    corruption_set: str = "c15"
    """c15: the 15 standard types; rift18: the 18 types of RiFT's official code."""
    corrupted_root: str | None = None
    """Folder of the published CIFAR-10-C, CIFAR-100-C or Tiny-ImageNet-C files, or the one above
    it; every node must see it. None: corruptions are generated."""
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Corruption severities, each 1 to 5."""
    limit: int | None = None
    """Evaluate only so many examples, >= 1, drawn with a fixed seed; None: all."""
    corruption_limit: int | None = None
    """The same for corruptions only."""
    shard_size: int = 500
    """Examples per fan-out item, >= 1; it never changes the result."""
    batch_size: int = 250
    """Examples per forward pass, >= 1; it never changes the result."""
    seed: int = 0
    """Seed of attack noise and corruption noise."""

    def __post_init__(self) -> None:
        counts = ("pgd_steps", "pgd_restarts", "apgd_steps", "apgd_restarts")
        for name in (*counts, "limit", "corruption_limit", "shard_size", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"evaluation.{name} = {value} must be at least 1")
        if not self.severities or any(not 1 <= s <= 5 for s in self.severities):
            raise ConfigError(f"evaluation.severities = {self.severities} must be within 1 to 5")
        if len(set(self.severities)) < len(self.severities):
            raise ConfigError(f"evaluation.severities = {self.severities} names one twice")
        if self.corruption_set not in CORRUPTION_SETS:
            raise UnknownNameError("corruption set", self.corruption_set, CORRUPTION_SETS)
        measures(self.suite)


def measures(suite: str) -> tuple[str, ...]:
    """Return the measurements of a suite name or of a comma-separated list of measurements."""
    if suite in SUITES:
        return SUITES[suite]
    names = tuple(dict.fromkeys(name.strip() for name in suite.split(",") if name.strip()))
    for name in names or (suite,):
        if name not in MEASURES:
            raise UnknownNameError("evaluation suite or measurement", name, [*SUITES, *MEASURES])
    return names


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What was measured: per-example outcomes, from which every number follows.

    Args:
        split: which split was read.
        masks: measurement -> bool ``[n]``, True where the model was right. Keys are "clean",
            "<norm>/pgd" and "<norm>/apgd" (right on the clean image *and* after the attack), and
            "corruption/<type>/<severity>". Corruptions may cover fewer examples than the rest: the
            first ones.
        ids: int64 ``[n]`` instance ids, so that two models can be compared pair by pair.
        settings: how it was measured.
        num_forwards: forward passes over all examples.
        num_backwards: backward passes (to the input) over all examples.
        leaky: True if the same examples also chose the model.
    """

    split: str
    masks: Mapping[str, NDArray[np.bool_]]
    ids: NDArray[np.int64]
    settings: Mapping[str, Any]
    num_forwards: int
    num_backwards: int
    leaky: bool = False

    @property
    def metrics(self) -> dict[str, float]:
        """Accuracies in [0, 1]: each mask's mean, "<norm>/robust" (survives clean and every attack
        of that norm), "robust" (survives all), "corruption/<type>" and "corruptions" (means over
        severities, then types).
        """
        return {name: float(values.mean()) for name, values in self._columns().items()}

    def outcomes(self, name: str) -> NDArray[Any]:
        """Return a metric's outcome per example: bool, or means in [0, 1] for corruptions.

        Raises:
            UnknownNameError: no such metric.
        """
        columns = self._columns()
        if name not in columns:
            raise UnknownNameError("metric", name, columns)
        return columns[name]

    def interval(self, name: str, confidence: float = 0.95) -> tuple[float, float]:
        """Return a confidence interval of one metric over examples.

        Wilson's interval for plain accuracies. Corruption means average several outcomes of the
        same image, so there it is Student's interval of the per-image means.
        """
        values = self.outcomes(name)
        if values.dtype == np.bool_:
            return wilson(int(values.sum()), len(values), confidence)
        low, high = mean_interval(values, confidence)
        return max(0.0, low), min(1.0, high)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per metric: name, accuracy, low, high, n, split, leaky."""
        rows = []
        for name, values in self._columns().items():
            low, high = self.interval(name)
            rows.append(
                {
                    "metric": name,
                    "accuracy": float(values.mean()),
                    "low": low,
                    "high": high,
                    "n": len(values),
                    "split": self.split,
                    "leaky": self.leaky,
                }
            )
        return rows

    def save(self, path: str | Path) -> None:
        """Write the per-example masks as Parquet: id, then one nullable bool column per mask."""
        n = len(self.ids)
        columns: dict[str, Any] = {"id": self.ids}
        for name, mask in self.masks.items():
            column = np.full(n, None, dtype=object)
            column[: len(mask)] = mask
            columns[name] = pa.array(column, type=pa.bool_())
        table = pa.table(columns)
        metadata = {b"robustft": json.dumps({"split": self.split, **self.settings}).encode()}
        pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd")

    def _columns(self) -> dict[str, NDArray[Any]]:
        columns: dict[str, NDArray[Any]] = {}
        by_norm: dict[str, list[NDArray[np.bool_]]] = {}
        by_type: dict[str, list[NDArray[np.bool_]]] = {}
        for name, mask in self.masks.items():
            kind, _, rest = name.partition("/")
            if kind == "corruption":
                by_type.setdefault(rest.partition("/")[0], []).append(mask)
            else:
                columns[name] = mask
                if rest:
                    by_norm.setdefault(kind, []).append(mask)
        clean = [self.masks["clean"]] if "clean" in self.masks else []
        for norm, attacked in by_norm.items():
            columns[f"{norm}/robust"] = np.logical_and.reduce([*clean, *attacked])
        if by_norm:
            attacked = [mask for group in by_norm.values() for mask in group]
            columns["robust"] = np.logical_and.reduce([*clean, *attacked])
        means = {kind: np.mean(group, axis=0) for kind, group in by_type.items()}
        columns.update({f"corruption/{kind}": values for kind, values in means.items()})
        if means:
            columns["corruptions"] = np.mean(list(means.values()), axis=0)
        return columns


def evaluate(
    model: nn.Module,
    task: Task,
    *,
    suite: str | None = None,
    split: str = "test",
    config: EvaluationConfig | None = None,
    map: Mapper | None = None,
    device: str | None = None,
) -> Evaluation:
    """Measure ``model`` on one split of ``task``.

    Args:
        model: NCHW float in [0, 1] -> logits; normalisation is its first layer. It is evaluated
            in eval mode on the device its parameters are on.
        task: data and threat models.
        suite: overrides ``config.suite``.
        split: "test" (read it once, at the end) or "val".
        config: attack strength, limits, seed; the default is the report's.
        map: where the shards run; None is a loop in this process.
        device: "cpu" or "cuda" where the shards compute; None: where the model is.

    Raises:
        UnknownNameError: no such suite or split.
        ConfigError: ``config.corrupted_root`` for data that has no published corrupted set.
        DataError: its files are missing or damaged, or hold other pictures than the split.
    """
    config = config or EvaluationConfig()
    if suite is not None:
        config = dataclasses.replace(config, suite=suite)
    if split not in task.splits:
        raise UnknownNameError("split", split, task.splits)
    data = _limited(task.splits[split], config)
    num_corrupted = min(config.corruption_limit or len(data), len(data))
    items = _items(config, task, len(data), num_corrupted)
    shared = {"model": model, "split": data, "config": config, "device": device}
    key = _key(model, data, task.digest, config)
    if any(item.get("source") == "files" for item in items):
        clean = data.take(np.arange(num_corrupted))
        shared["published"], key = _published(items, task, config, clean, key)
    run = map or _loop
    values = run(measure_shard, items, shared=shared, key=key, name=f"evaluate {split}")
    masks: dict[str, list[NDArray[np.bool_]]] = {}
    for item, value in zip(items, values, strict=True):
        masks.setdefault(item["name"], []).append(np.asarray(value["correct"], dtype=np.bool_))
    return Evaluation(
        split=split,
        masks={name: np.concatenate(shards) for name, shards in masks.items()},
        ids=data.ids,
        settings={
            **dataclasses.asdict(config),
            "corruptions": _source(config),
            "task": task.name,
            "task_digest": task.digest,
            "threat_models": [str(threat) for threat in task.threat_models],
        },
        num_forwards=sum(int(value["num_forwards"]) for value in values),
        num_backwards=sum(int(value["num_backwards"]) for value in values),
        leaky=task.leaky and split == "test",
    )


@full_float32()
def measure_shard(shared: Mapping[str, Any], item: Mapping[str, Any]) -> dict[str, Any]:
    """Measure one shard: ``{"correct": bool [n], "num_forwards": int, "num_backwards": int}``."""
    model: nn.Module = shared["model"]
    if shared["device"] is not None:
        model = model.to(shared["device"])
    config: EvaluationConfig = shared["config"]
    data: Split = shared["split"].take(np.arange(item["first"], item["last"]))
    if item.get("source") == "files":
        data = read_published(shared["published"], item["type"], item["severity"], clean=data)
    device = next(iter(model.parameters())).device
    correct, forwards, backwards = [], 0, 0
    with attack_mode(model):
        for first in range(0, len(data), config.batch_size):
            rows = slice(first, first + config.batch_size)
            images = torch.from_numpy(data.images[rows]).to(device).float().div_(255)
            labels = torch.from_numpy(data.labels[rows]).to(device)
            ids = torch.from_numpy(data.ids[rows]).to(device)
            mask, num_forwards, num_backwards = _measure(model, images, labels, ids, item, config)
            correct.append(mask)
            forwards += num_forwards
            backwards += num_backwards
    outcomes = torch.cat(correct).cpu().numpy()
    return {"correct": outcomes, "num_forwards": forwards, "num_backwards": backwards}


def _measure(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    ids: torch.Tensor,
    item: Mapping[str, Any],
    config: EvaluationConfig,
) -> tuple[torch.Tensor, int, int]:
    """Return who is right, and the passes over single images."""
    measure = item["measure"]
    if measure == "corruptions" and item["source"] == "generated":
        images = corrupt(images, item["type"], item["severity"], sample_ids=ids, seed=config.seed)
    with torch.no_grad():
        correct = model(images).argmax(dim=1) == labels
    forwards = len(labels)
    if measure not in ("pgd", "apgd"):
        return correct, forwards, 0
    # What is wrong without an attack is not robust: only the rest is attacked.
    rows = correct.nonzero().flatten()
    if len(rows) == 0:
        return correct, forwards, 0
    attack, num_steps, num_restarts = (
        (pgd, config.pgd_steps, config.pgd_restarts)
        if measure == "pgd"
        else (apgd, config.apgd_steps, config.apgd_restarts)
    )
    result = attack(
        model,
        images[rows],
        labels[rows],
        norm=item["norm"],
        eps=item["eps"],
        num_steps=num_steps,
        num_restarts=num_restarts,
        generator=torch.Generator().manual_seed(config.seed),
        sample_ids=ids[rows],
    )
    survived = correct.index_copy(0, rows, result.robust)
    count = len(rows)
    return survived, forwards + result.num_forwards * count, result.num_backwards * count


def _items(
    config: EvaluationConfig, task: Task, num_examples: int, num_corrupted: int
) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    for measure in measures(config.suite):
        variants = list(_variants(measure, config, task.threat_models, task.image_shape))
        n = num_corrupted if measure == "corruptions" else num_examples
        for variant in variants:
            for first in range(0, n, config.shard_size):
                last = min(first + config.shard_size, n)
                items.append({"measure": measure, **variant, "first": first, "last": last})
    return items


def _variants(
    measure: str,
    config: EvaluationConfig,
    threats: Sequence[ThreatModel],
    image_shape: tuple[int, int, int],
) -> Iterable[dict[str, Any]]:
    if measure == "clean":
        yield {"name": "clean"}
    elif measure == "corruptions":
        for kind in CORRUPTION_SETS[config.corruption_set]:
            if supported(kind, image_shape):
                for severity in config.severities:
                    name = f"corruption/{kind}/{severity}"
                    source = _source(config)
                    yield {"name": name, "type": kind, "severity": severity, "source": source}
    else:
        for threat in threats:
            yield {"name": f"{threat.norm}/{measure}", "norm": threat.norm, "eps": threat.eps}


def _source(config: EvaluationConfig) -> str:
    return "generated" if config.corrupted_root is None else "files"


def _published(
    items: Sequence[Mapping[str, Any]],
    task: Task,
    config: EvaluationConfig,
    clean: Split,
    key: str,
) -> tuple[PublishedSet, str]:
    """Return where the files are, and ``key`` with their content.

    All of them are read once before any work starts: a file that is missing, damaged or of
    another data set must not end an evaluation in its last hour.
    """
    wanted = [
        (item["type"], item["severity"]) for item in items if item["measure"] == "corruptions"
    ]
    assert config.corrupted_root is not None
    found = find_published(task, config.corrupted_root, [kind for kind, _ in wanted])
    digest = hashlib.sha256(key.encode())
    for kind, severity in dict.fromkeys(wanted):
        pictures = read_published(found, kind, severity, clean=clean).images
        digest.update(content_digest(pictures).encode())
    return found, digest.hexdigest()


def _limited(split: Split, config: EvaluationConfig) -> Split:
    n = len(split)
    limits = [limit for limit in (config.limit, config.corruption_limit) if limit is not None]
    if not limits or min(limits) >= n:
        return split
    # Files are often sorted by class, so a prefix of the file would be no sample of the split.
    order = np.random.default_rng(0).permutation(n)
    return split.take(order[: config.limit])


def _key(model: nn.Module, data: Split, task_digest: str, config: EvaluationConfig) -> str:
    """Name what all shards share by its content."""
    # How the work is cut and where it runs does not belong to the content.
    settings = dataclasses.replace(
        config, shard_size=1, batch_size=1, suite="clean", corrupted_root=None
    )
    digest = hashlib.sha256(state_digest(model.state_dict()).encode())
    digest.update(type(model).__qualname__.encode())
    digest.update(np.ascontiguousarray(data.ids).tobytes())
    digest.update(task_digest.encode())
    digest.update(repr(settings).encode())
    return digest.hexdigest()


def _loop(
    fn: Callable[[Any, ItemT], ValueT],
    items: Iterable[ItemT],
    *,
    shared: Any,
    key: str,
    name: str,
) -> list[ValueT]:
    return [fn(shared, item) for item in items]
