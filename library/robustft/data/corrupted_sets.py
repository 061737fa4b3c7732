"""Readers for published corrupted test sets: CIFAR-10-C, CIFAR-100-C and Tiny-ImageNet-C.

Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261. The files hold the test pictures after
corruption; nothing is generated here (:mod:`robustft.data.corruptions` does that).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustft.data.base import Split, Task
from robustft.data.decode import decode_files
from robustft.data.folders import picture_files
from robustft.data.source import find_folder, make_split
from robustft.errors import ConfigError, DataError, UnknownNameError

__all__ = [
    "PublishedSet",
    "available_corruptions",
    "find_published",
    "read_cifar_c",
    "read_published",
    "read_tiny_imagenet_c",
]

SEVERITIES = 5
CIFAR_TEST = 10_000
CIFAR_SIZE, TINY_SIZE = 32, 64
CIFAR_FOLDERS = ("CIFAR-10-C", "CIFAR-100-C")
TINY_FOLDER = "Tiny-ImageNet-C"
PUBLISHED = {
    "cifar10": "CIFAR-10-C",
    "cifar100": "CIFAR-100-C",
    "tiny_imagenet": TINY_FOLDER,
}
"""Data set -> folder of its published corrupted test set."""
GENERATE = "so that corruptions are generated"


def available_corruptions(root: str | Path) -> tuple[str, ...]:
    """Return the types that a -C folder holds, sorted.

    Raises:
        DataError: there is none.
    """
    folder = find_folder(Path(root).absolute(), *CIFAR_FOLDERS, TINY_FOLDER) or Path(root)
    names = {path.stem for path in folder.glob("*.npy")} - {"labels"}
    if folder.is_dir():
        names |= {path.name for path in folder.iterdir() if (path / "1").is_dir()}
    if not names:
        raise DataError(
            f"no corrupted set in {folder}: unpack CIFAR-10-C.tar or CIFAR-100-C.tar (<type>.npy "
            "and labels.npy) or Tiny-ImageNet-C.tar (<type>/<severity>/<class>/*.JPEG) there"
        )
    return tuple(sorted(names))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PublishedSet:
    """Where the published corrupted test set of a task's data lies.

    Args:
        data: name of the data set.
        folder: with the files.
        class_names: of the task.
    """

    data: str
    folder: Path
    class_names: tuple[str, ...]


def find_published(task: Task, root: str | Path, types: Sequence[str]) -> PublishedSet:
    """Return the published corrupted test set of a task's data.

    Args:
        task: its ``name`` says which set.
        root: folder of the set, or the one above it.
        types: what must be in it.

    Raises:
        ConfigError: no corrupted set was published for the data, or not in the pictures' size.
        DataError: types are missing; the text says what to put where.
    """
    if task.name not in PUBLISHED:
        raise ConfigError(
            f"no corrupted set was published for {task.name}, only for {', '.join(PUBLISHED)}: "
            f"leave corrupted_root out, {GENERATE}"
        )
    archive = PUBLISHED[task.name]
    size = TINY_SIZE if archive == TINY_FOLDER else CIFAR_SIZE
    if task.image_shape != (3, size, size):
        raise ConfigError(
            f"{archive} has {size}x{size} colour pictures and the task's have the shape "
            f"{list(task.image_shape)}: leave corrupted_root out, {GENERATE}"
        )
    root = Path(root).expanduser().absolute()
    folder = find_folder(root, archive) or root
    missing = sorted(set(types) - set(available_corruptions(folder)))
    if missing:
        layout = "<type>/<severity>/<class>/*.JPEG" if archive == TINY_FOLDER else "<type>.npy"
        raise DataError(
            f"{folder} lacks {', '.join(missing)}: unpack {archive}.tar there ({layout}), "
            f"or leave corrupted_root out, {GENERATE}"
        )
    return PublishedSet(data=task.name, folder=folder, class_names=task.class_names)


def read_published(published: PublishedSet, name: str, severity: int, *, clean: Split) -> Split:
    """Read the published corrupted versions of ``clean``, row by row the same pictures.

    Args:
        published: what ``find_published`` returned.
        name: type of corruption.
        severity: 1 to 5.
        clean: pictures of the original test split in any order; rows are found by their ids.

    Raises:
        DataError: files are missing or damaged, or lack a picture of ``clean``, or give it
            another label.
    """
    folder, data = published.folder, published.data
    if PUBLISHED[data] == TINY_FOLDER:
        found = read_tiny_imagenet_c(folder, name, severity, wnids=published.class_names)
    else:
        found = read_cifar_c(folder, name, severity, num_images=CIFAR_TEST)
    order = np.argsort(found.ids)
    places = np.searchsorted(found.ids, clean.ids, sorter=order)
    rows = order[places.clip(max=len(order) - 1)]
    strangers = int((found.ids[rows] != clean.ids).sum())
    if strangers:
        raise DataError(
            f"{strangers} of {len(clean)} pictures are not in {folder}, which holds the test "
            f"pictures of {data} alone: evaluate test examples, or leave corrupted_root out, "
            f"{GENERATE}"
        )
    others = int((found.labels[rows] != clean.labels).sum())
    if others:
        raise DataError(
            f"{others} of {len(clean)} pictures have another label in {folder} than in {data}: "
            f"put {PUBLISHED[data]} there, in its original order"
        )
    return found.take(rows)


def read_cifar_c(
    root: str | Path, name: str, severity: int, *, num_images: int = CIFAR_TEST
) -> Split:
    """Open one type and severity of CIFAR-10-C or CIFAR-100-C, memory-mapped.

    Args:
        root: folder with ``<name>.npy`` (uint8 ``[5 * n, 32, 32, 3]``, severities 1 to 5 one after
            the other) and ``labels.npy`` (``[5 * n]``), or the folder above it.
        name: type of corruption, the file's name.
        severity: 1 to 5.
        num_images: n, the test pictures per severity.

    Returns:
        Split whose images are a view ``[n, 3, 32, 32]`` of the file and whose ids are those of the
        clean test pictures.

    Raises:
        UnknownNameError: no such type in the folder.
        ConfigError: the severity is not 1 to 5.
        DataError: files are missing, damaged, pickled or of other shapes.
    """
    _check_severity(severity)
    root = Path(root).absolute()
    folder = find_folder(root, *CIFAR_FOLDERS) or root
    known = available_corruptions(folder)
    if name not in known:
        raise UnknownNameError("corruption", name, known)
    pixels = _open(folder / f"{name}.npy")
    labels = _open(folder / "labels.npy")
    expected = (SEVERITIES * num_images, 32, 32, 3)
    if pixels.dtype != np.uint8 or pixels.shape != expected:
        raise DataError(
            f"{folder / name}.npy must be uint8 {list(expected)}, is {pixels.dtype} "
            f"{list(pixels.shape)}; fetch the archive again"
        )
    if labels.shape != expected[:1]:
        raise DataError(f"{folder / 'labels.npy'} must have {expected[0]} labels; fetch it again")
    rows = slice((severity - 1) * num_images, severity * num_images)
    return make_split(pixels[rows].transpose(0, 3, 1, 2), np.array(labels[rows]), test=True)


def read_tiny_imagenet_c(
    root: str | Path, name: str, severity: int, *, wnids: Sequence[str], image_size: int = TINY_SIZE
) -> Split:
    """Decode one type and severity of Tiny-ImageNet-C.

    Args:
        root: folder with ``<name>/<severity>/<class>/*.JPEG``, or the folder above it.
        name: type of corruption.
        severity: 1 to 5.
        wnids: class folders in label order: the sorted names of the training folders, as they
            stand at the beginning of the task's class names.
        image_size: side length in pixels.

    Returns:
        Split with labels as in ``wnids``. Ids are the numbers in the files' names (``val_17.JPEG``
        is the clean test picture 17), else positions in the sorted order.

    Raises:
        UnknownNameError: no such type in the folder.
        ConfigError: the severity is not 1 to 5.
        DataError: folders are missing or hold other classes.
    """
    _check_severity(severity)
    root = Path(root).absolute()
    folder = find_folder(root, TINY_FOLDER) or root
    known = available_corruptions(folder)
    if name not in known:
        raise UnknownNameError("corruption", name, known)
    top = folder / name / str(severity)
    wnids = [text.split(" ")[0] for text in wnids]
    found = {path.name for path in top.iterdir() if path.is_dir()} if top.is_dir() else set()
    if found != set(wnids):
        raise DataError(
            f"{top} has {len(found)} class folders that are not the {len(wnids)} classes expected; "
            "unpack Tiny-ImageNet-C.tar again"
        )
    listing = [(file, i) for i, wnid in enumerate(wnids) for file in picture_files(top / wnid)]
    files = [file for file, _ in listing]
    if not files:
        raise DataError(f"{top} holds no pictures; unpack Tiny-ImageNet-C.tar again")
    key = f"tiny_imagenet_c-{name}-{severity}"
    images = decode_files(files, top, size=image_size, channels=3, name=key)
    labels = [label for _, label in listing]
    return make_split(images, labels, test=True, positions=_numbers(files))


def _numbers(files: Sequence[Path]) -> NDArray[np.int64] | None:
    """Return the numbers of names such as val_17.JPEG, or None if they are not all so named."""
    numbers = [file.stem.rsplit("_", 1)[-1] for file in files]
    if not all(number.isdecimal() for number in numbers) or len(set(numbers)) != len(numbers):
        return None
    return np.array([int(number) for number in numbers], dtype=np.int64)


def _check_severity(severity: int) -> None:
    if severity not in range(1, SEVERITIES + 1):
        raise ConfigError(f"severity = {severity!r} is out of range: it goes from 1 to 5")


def _open(path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"no {path.name} in {path.parent}; unpack the archive again") from error
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path} is damaged or holds pickled objects ({error}); fetch the archive again"
        ) from error
    return array
