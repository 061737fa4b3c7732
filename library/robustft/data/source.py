"""What a data set's loader is asked for and what it returns, and checks that loaders share."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robustft.data.base import Split
from robustft.errors import DataError

__all__ = ["TEST_OFFSET", "Loaded", "Request", "find_folder", "make_split", "require", "test_ids"]

TEST_OFFSET = 10_000_000
"""Added to positions in the test split, so that ids are unique over train and test."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Where the files are and how the pictures are to be.

    Args:
        name: of the data set.
        root: folder with the files.
        image_size: side length in pixels; None is the data's own.
        download: fetch what is missing, where the data set can be fetched.
        train_file: file name or pattern under ``root`` of Parquet training data; None is the
            default layout.
        test_file: likewise for test data.
    """

    name: str
    root: Path
    image_size: int | None = None
    download: bool = False
    train_file: str | None = None
    test_file: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Loaded:
    """A data set as it was published: before anything is held out.

    Args:
        train: the training split; ids are positions in the original order.
        test: the test split; ids are positions plus ``TEST_OFFSET``.
        class_names: one per class.
        whole: false if the files are a subset by design (Parquet), so that counts may differ from
            the published ones.
    """

    train: Split
    test: Split
    class_names: tuple[str, ...]
    whole: bool = True


def test_ids(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the instance ids of positions in the original test split."""
    return positions + TEST_OFFSET


def make_split(
    images: NDArray[np.uint8],
    labels: Sequence[int] | NDArray[np.integer],
    *,
    test: bool,
    positions: NDArray[np.int64] | None = None,
) -> Split:
    """Build a split; ``positions`` in the original order default to 0, 1, 2, ..."""
    if positions is None:
        positions = np.arange(len(images), dtype=np.int64)
    if len(positions) and not 0 <= positions.min() <= positions.max() < TEST_OFFSET:
        raise DataError(f"positions must lie in 0 .. {TEST_OFFSET - 1}")
    if len(np.unique(positions)) != len(positions):
        raise DataError("two rows have the same index: the index column must be unique")
    ids = test_ids(positions) if test else positions
    return Split(images, np.asarray(labels, dtype=np.int64), ids)


def find_folder(root: Path, *names: str) -> Path | None:
    """Return the first of ``root/name`` that is there, or ``root`` if it is called so itself."""
    for name in names:
        if (root / name).is_dir():
            return root / name
        if root.name == name and root.is_dir():
            return root
    return None


def require(condition: object, message: str) -> None:
    """Raise DataError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise DataError(message)
