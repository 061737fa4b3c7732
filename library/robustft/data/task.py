"""From a configuration to a task: load, hold out, limit, and name the result by its content."""

import dataclasses
import hashlib
import logging
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from robustft.data.base import Selection, Split, Task, check_threats, content_digest
from robustft.data.datasets import DATASETS, DatasetEntry, load_dataset
from robustft.data.decode import BLOCK
from robustft.data.home import MEMORY_LIMIT, cached_images
from robustft.data.source import Loaded
from robustft.data.splits import choose
from robustft.errors import ConfigError, UnknownNameError
from robustft.threat import ThreatModel

__all__ = ["TaskConfig", "load_task"]

logger = logging.getLogger(__name__)

SELECTIONS: tuple[Selection, ...] = ("val", "test_half", "official")
SMALLEST_IMAGE, LARGEST_IMAGE = 16, 1024
NEUTRAL = 0.5  # mean and std of a grey data set that nothing is known about


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """What is being made robust."""

    data: str = "fashion_mnist_mini"
    """Data set: a name that ``robustft ls`` shows."""
    root: str | None = None
    """Folder with the data files; None is $ROBUSTFT_HOME/data/<name>."""
    image_size: int | None = None
    """Side length in pixels, 16 to 1024; None is the data set's default."""
    download: bool = False
    """Fetch missing files, for the data sets that can be fetched."""
    train_file: str | None = None
    """Parquet file (or pattern) of the training split; None is train.parquet or train-*.parquet."""
    test_file: str | None = None
    """Parquet file (or pattern) of the test split; None is test.parquet, or val.parquet."""
    val_size: int = 600
    """Training examples held out for selection "val", >= 1; unused by the other selections."""
    selection: Selection = "val"
    """What chooses: "val" (held out of train), "test_half" (half of test) or "official" (test)."""
    threat_models: tuple[ThreatModel, ...] = (ThreatModel("Linf", 0.1),)
    """One or several threat models; several mean their union."""
    split_seed: int = 0
    """Seed of the held-out split and of the limits' choice."""
    limit_train: int | None = None
    """Use this many training examples, stratified, >= 1; None is all."""
    limit_val: int | None = None
    """Use this many selection examples, stratified, >= 1; None is all."""
    limit_test: int | None = None
    """Use this many test examples, stratified, >= 1; None is all."""
    mean: tuple[float, ...] | None = None
    """Per-channel mean of [0, 1] pixels for the normalising layer; None is the data set's."""
    std: tuple[float, ...] | None = None
    """Per-channel standard deviation, > 0; None is the data set's."""

    def __post_init__(self) -> None:
        if self.data not in DATASETS:
            raise UnknownNameError("data set", self.data, DATASETS)
        if self.selection not in SELECTIONS:
            raise UnknownNameError("selection", str(self.selection), SELECTIONS)
        check_threats(self.threat_models)
        for name in ("val_size", "limit_train", "limit_val", "limit_test"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value} is out of range: it must be >= 1")
        size = self.image_size
        if size is not None and not SMALLEST_IMAGE <= size <= LARGEST_IMAGE:
            raise ConfigError(
                f"image_size = {size} is out of range: {SMALLEST_IMAGE} to {LARGEST_IMAGE}"
            )
        if (self.mean is None) != (self.std is None):
            raise ConfigError("mean and std go together: give both or neither")
        if self.std is not None and min(self.std, default=0.0) <= 0:
            raise ConfigError(f"std = {self.std} is out of range: every value must be > 0")


def load_task(config: TaskConfig) -> Task:
    """Load the data of ``config`` and divide it into "train", "val" and "test".

    Held-out examples depend on the data and ``split_seed`` only: limits take subsets afterwards and
    move nothing from one split to another.

    Raises:
        ConfigError: a value does not fit the data.
        DataError: files are missing, damaged or not what they claim to be.
    """
    loaded = load_dataset(
        config.data,
        root=config.root,
        image_size=config.image_size,
        download=config.download,
        train_file=config.train_file,
        test_file=config.test_file,
    )
    splits = _divide(config, loaded)
    for name in splits:
        splits[name] = _limit(config, name, splits[name])
    channels = loaded.train.images.shape[1]
    mean, std = _statistics(config, DATASETS[config.data], channels)
    task = Task(
        name=config.data,
        splits=splits,
        class_names=loaded.class_names,
        threat_models=config.threat_models,
        mean=mean,
        std=std,
        digest=_digest(splits),
        selection=config.selection,
    )
    sizes = ", ".join(f"{name} {len(split)}" for name, split in splits.items())
    logger.info("%s: %s; %d classes; %s", task.name, sizes, task.num_classes, task.image_shape)
    return task


def _divide(config: TaskConfig, loaded: Loaded) -> dict[str, Split]:
    train, test = loaded.train, loaded.test
    if config.selection == "official":
        return {"train": train, "val": test, "test": test}
    if config.selection == "test_half":
        half = len(test) // 2
        if half == 0:
            raise ConfigError(f"{config.data} has too few test examples for selection test_half")
        positions = choose(test.labels, test.ids, half, seed=config.split_seed, purpose="test half")
        val, test = (_rows(config, test, rows) for rows in positions)
        return {"train": train, "val": val, "test": test}
    if config.val_size > len(train) - len(loaded.class_names):
        raise ConfigError(
            f"val_size = {config.val_size} leaves no training example per class: {config.data} has "
            f"{len(train)} training examples of {len(loaded.class_names)} classes"
        )
    positions = choose(
        train.labels, train.ids, config.val_size, seed=config.split_seed, purpose="val"
    )
    val, train = (_rows(config, train, rows) for rows in positions)
    return {"train": train, "val": val, "test": test}


def _limit(config: TaskConfig, name: str, split: Split) -> Split:
    limit = getattr(config, f"limit_{name}")
    if limit is None or limit >= len(split):
        return split
    # One purpose for all splits: under selection "official" val and test are the same examples,
    # and equal limits must keep them so.
    chosen, _ = choose(split.labels, split.ids, limit, seed=config.split_seed, purpose="limit")
    return _rows(config, split, chosen)


def _rows(config: TaskConfig, split: Split, positions: NDArray[np.int64]) -> Split:
    """Take rows: into memory, or into a file of their own if they are many."""
    size = len(positions) * int(np.prod(split.images.shape[1:]))
    if size <= MEMORY_LIMIT or not isinstance(split.images, np.memmap):
        return split.take(positions)
    source = split.images
    stamp = hashlib.sha256(f"{source.filename}".encode())
    stamp.update(positions.tobytes())

    def blocks() -> Iterator[NDArray[np.uint8]]:
        for first in range(0, len(positions), BLOCK):
            yield source[positions[first : first + BLOCK]]

    key = f"{config.data}-rows-{stamp.hexdigest()[:16]}"
    images = cached_images(key, (len(positions), *source.shape[1:]), blocks())
    return Split(images, split.labels[positions], split.ids[positions])


def _statistics(
    config: TaskConfig, entry: DatasetEntry, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if config.mean is not None and config.std is not None:
        mean, std = config.mean, config.std
        if not len(mean) == len(std) == channels:
            raise ConfigError(
                f"mean and std have {len(mean)} and {len(std)} values, {config.data} has "
                f"{channels} channels"
            )
        return mean, std
    if len(entry.mean) != channels:
        return (NEUTRAL,) * channels, (NEUTRAL,) * channels
    return entry.mean, entry.std


def _digest(splits: dict[str, Split]) -> str:
    digest = hashlib.sha256()
    for name, split in splits.items():
        digest.update(f"{name} {content_digest(split.images, split.labels, split.ids)}".encode())
    return digest.hexdigest()
