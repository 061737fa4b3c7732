"""Data sets whose files hold arrays: the embedded Fashion-MNIST, CIFAR, SVHN and STL-10."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robustft.data.base import Split
from robustft.data.decode import resize_images
from robustft.data.download import download
from robustft.data.matlab import read_mat
from robustft.data.parquet import has_parquet, load_parquet, read_parquet_split
from robustft.data.pickles import read_plain_pickle
from robustft.data.source import Loaded, Request, find_folder, make_split
from robustft.errors import DataError

__all__ = [
    "CIFAR10_CLASSES",
    "load_cifar10",
    "load_cifar100",
    "load_fashion_mnist_mini",
    "load_stl10",
    "load_svhn",
]

CIFAR_SHAPE = (3, 32, 32)
STL_SHAPE = (3, 96, 96)
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
CIFAR10_MISSING = (
    "put cifar-10-python.tar.gz or cifar-10-binary.tar.gz, unpacked, into {root} (folder "
    "cifar-10-batches-py or cifar-10-batches-bin), or train.parquet and test.parquet, or set "
    "download: true"
)
CIFAR100_MISSING = (
    "put cifar-100-python.tar.gz or cifar-100-binary.tar.gz, unpacked, into {root} (folder "
    "cifar-100-python or cifar-100-binary), or train.parquet and test.parquet, or set "
    "download: true"
)


def load_fashion_mnist_mini(request: Request) -> Loaded:
    """Fashion-MNIST's first 600 + 200 pictures per class, inside the package.

    Xiao, Rasul and Vollgraf, arXiv 1708.07747; ids are positions in the full set.
    """
    folder = resources.files("robustft.data") / "fashion_mnist_mini"
    with resources.as_file(folder) as path:
        train, names = read_parquet_split(path / "train.parquet", channels=1, test=False)
        test, _ = read_parquet_split(path / "test.parquet", channels=1, test=True)
    return _resized(Loaded(train=train, test=test, class_names=names), request)


def load_cifar10(request: Request) -> Loaded:
    """CIFAR-10 (Krizhevsky, 2009): Python or binary batches, or Parquet."""
    if has_parquet(request):
        return load_parquet(request, channels=3, class_names=CIFAR10_CLASSES)
    if request.download:
        download("CIFAR10", request.root)
    folder = find_folder(request.root, "cifar-10-batches-py")
    if folder is not None:
        names = tuple(read_plain_pickle(folder / "batches.meta").get("label_names", ()))
        batches = [f"data_batch_{number}" for number in range(1, 6)]
        train = _python_batches([folder / name for name in batches], "labels", test=False)
        test = _python_batches([folder / "test_batch"], "labels", test=True)
        return _resized(Loaded(train=train, test=test, class_names=names), request)
    folder = _existing(request, CIFAR10_MISSING, "cifar-10-batches-bin")
    names = _lines(folder / "batches.meta.txt")
    files = [folder / f"data_batch_{number}.bin" for number in range(1, 6)]
    train = _binary_records(files, 1, test=False)
    test = _binary_records([folder / "test_batch.bin"], 1, test=True)
    return _resized(Loaded(train=train, test=test, class_names=names), request)


def load_cifar100(request: Request) -> Loaded:
    """CIFAR-100 (Krizhevsky, 2009) with its 100 fine labels: Python, binary, or Parquet."""
    if has_parquet(request):
        return load_parquet(request, channels=3)
    if request.download:
        download("CIFAR100", request.root)
    folder = find_folder(request.root, "cifar-100-python")
    if folder is not None:
        names = tuple(read_plain_pickle(folder / "meta").get("fine_label_names", ()))
        train = _python_batches([folder / "train"], "fine_labels", test=False)
        test = _python_batches([folder / "test"], "fine_labels", test=True)
        return _resized(Loaded(train=train, test=test, class_names=names), request)
    folder = _existing(request, CIFAR100_MISSING, "cifar-100-binary")
    names = _lines(folder / "fine_label_names.txt")
    # A record starts with the coarse and the fine label.
    train = _binary_records([folder / "train.bin"], 2, test=False)
    test = _binary_records([folder / "test.bin"], 2, test=True)
    return _resized(Loaded(train=train, test=test, class_names=names), request)


def load_svhn(request: Request) -> Loaded:
    """SVHN, cropped digits (Netzer et al., 2011): train_32x32.mat and test_32x32.mat."""
    if has_parquet(request):
        return load_parquet(request, channels=3, class_names=tuple("0123456789"))
    if request.download:
        download("SVHN", request.root)
    splits: list[Split] = []
    for name in ("train_32x32.mat", "test_32x32.mat"):
        path = request.root / name
        if not path.is_file():
            raise DataError(
                f"no {name} in {request.root}: put train_32x32.mat and test_32x32.mat of SVHN "
                "(cropped digits) there, or set download: true"
            )
        variables = read_mat(path)
        pixels, labels = variables.get("X"), variables.get("y")
        if not (
            isinstance(pixels, np.ndarray)
            and isinstance(labels, np.ndarray)
            and pixels.dtype == np.uint8
            and pixels.shape[:3] == (32, 32, 3)
            and pixels.ndim == 4
        ):
            raise DataError(f"{path} holds no 32x32 digits X and labels y; fetch it again")
        images = np.ascontiguousarray(pixels.transpose(3, 2, 0, 1))
        # The files call the digit zero 10.
        splits.append(make_split(images, labels.ravel() % 10, test=bool(splits)))
    loaded = Loaded(train=splits[0], test=splits[1], class_names=tuple("0123456789"))
    return _resized(loaded, request)


def load_stl10(request: Request) -> Loaded:
    """STL-10's labelled pictures (Coates, Ng and Lee, 2011): the binary files."""
    if has_parquet(request):
        return load_parquet(request, channels=3)
    if request.download:
        download("STL10", request.root)
    message = (
        "put stl10_binary.tar.gz, unpacked, into {root} (folder stl10_binary), or set "
        "download: true"
    )
    folder = _existing(request, message, "stl10_binary")
    names = _lines(folder / "class_names.txt")
    splits: list[Split] = []
    for name in ("train", "test"):
        pixels = _bytes(folder / f"{name}_X.bin")
        labels = _bytes(folder / f"{name}_y.bin").astype(np.int64) - 1
        if len(pixels) != len(labels) * np.prod(STL_SHAPE):
            raise DataError(f"{folder / f'{name}_X.bin'} does not fit its labels; fetch it again")
        # Pictures are stored column by column.
        images = np.ascontiguousarray(pixels.reshape(-1, *STL_SHAPE).transpose(0, 1, 3, 2))
        splits.append(make_split(images, labels, test=name == "test"))
    return _resized(Loaded(train=splits[0], test=splits[1], class_names=names), request)


def _existing(request: Request, message: str, *names: str) -> Path:
    folder = find_folder(request.root, *names)
    if folder is None:
        raise DataError(f"no {request.name} in {request.root}: {message.format(root=request.root)}")
    return folder


def _python_batches(files: Sequence[Path], label_key: str, *, test: bool) -> Split:
    images, labels = [], []
    for file in files:
        batch = read_plain_pickle(file)
        data = batch.get("data")
        if not (
            isinstance(data, np.ndarray)
            and data.dtype == np.uint8
            and data.ndim == 2
            and data.shape[1] == np.prod(CIFAR_SHAPE)
        ):
            raise DataError(f"{file} holds no CIFAR pictures; fetch the archive again")
        images.append(data.reshape(-1, *CIFAR_SHAPE))
        labels.append(np.asarray(batch.get(label_key, ()), dtype=np.int64))
    return make_split(np.concatenate(images), np.concatenate(labels), test=test)


def _binary_records(files: Sequence[Path], label_bytes: int, *, test: bool) -> Split:
    """Read records of ``label_bytes`` labels, the last of which counts, and one picture."""
    size = label_bytes + int(np.prod(CIFAR_SHAPE))
    images, labels = [], []
    for file in files:
        data = _bytes(file)
        if len(data) == 0 or len(data) % size:
            raise DataError(f"{file} is cut off or no CIFAR binary file; fetch the archive again")
        records = data.reshape(-1, size)
        labels.append(records[:, label_bytes - 1].astype(np.int64))
        images.append(records[:, label_bytes:].reshape(-1, *CIFAR_SHAPE))
    return make_split(np.concatenate(images), np.concatenate(labels), test=test)


def _bytes(path: Path) -> NDArray[np.uint8]:
    try:
        return np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(
            f"cannot read {path} ({error.strerror}); unpack the archive again"
        ) from error


def _lines(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(
            f"cannot read {path} ({error.strerror}); unpack the archive again"
        ) from error
    return tuple(line.strip() for line in lines if line.strip())


def _resized(loaded: Loaded, request: Request) -> Loaded:
    if request.image_size is None:
        return loaded

    def resized(split: Split, part: str) -> Split:
        assert request.image_size is not None
        name = f"{request.name}-{part}"
        images = resize_images(split.images, request.image_size, name=name)
        return Split(images, split.labels, split.ids)

    return Loaded(
        train=resized(loaded.train, "train"),
        test=resized(loaded.test, "test"),
        class_names=loaded.class_names,
        whole=loaded.whole,
    )
