"""Data sets of picture files in folders, each in the layout of its official archive.

Pictures are decoded once to RGB: the shorter side is scaled to ``image_size`` and the middle
square is cut out. Within a split the order is that of the official list, or of sorted names where
there is none; that position is the instance id.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from robustft.data.base import Split
from robustft.data.decode import decode_files
from robustft.data.download import download
from robustft.data.matlab import read_mat
from robustft.data.parquet import has_parquet, load_parquet
from robustft.data.random import derive_seed, hash_bits
from robustft.data.source import Loaded, Request, find_folder, make_split, require
from robustft.errors import DataError

__all__ = [
    "load_caltech256",
    "load_cub200",
    "load_dtd",
    "load_food101",
    "load_image_folder",
    "load_stanford_dogs",
    "load_tiny_imagenet",
    "picture_files",
]

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff"})
TINY_CLASSES = 200
CALTECH_TRAIN_PER_CLASS = 60  # of the transfer papers: 257 x 60 = 15,420 training pictures

Listing = list[tuple[Path, int]]
"""Picture files with their labels, in order."""


def load_tiny_imagenet(request: Request) -> Loaded:
    """Tiny-ImageNet-200 (Le and Yang, 2015); its official ``val`` is the test split.

    Labels are positions in the sorted list of the training folders' names, for both splits.
    ``val`` may be as downloaded (all pictures in ``images``, labels in val_annotations.txt) or
    sorted into one folder per class.
    """
    if has_parquet(request):
        return load_parquet(request, channels=3)
    root = _root(request, "tiny-imagenet-200.zip", "tiny-imagenet-200")
    wnids = _folder_names(root / "train", request)
    require(
        len(wnids) == TINY_CLASSES,
        f"{root / 'train'} has {len(wnids)} class folders instead of {TINY_CLASSES}: unpack "
        "tiny-imagenet-200.zip again",
    )
    names = _tiny_words(root / "words.txt", wnids)
    train = [(file, i) for i, wnid in enumerate(wnids) for file in _tiny_files(root, "train", wnid)]
    annotations = root / "val" / "val_annotations.txt"
    if (root / "val" / "images").is_dir() and annotations.is_file():
        index = {wnid: i for i, wnid in enumerate(wnids)}
        val: Listing = []
        for line in _lines(annotations):
            file, wnid = line.split("\t")[:2]
            require(wnid in index, f"{annotations}: unknown class {wnid!r}; unpack the zip again")
            val.append((root / "val" / "images" / file, index[wnid]))
    else:
        found = _folder_names(root / "val", request)
        require(
            found == wnids,
            f"{root / 'val'} has neither images/ with val_annotations.txt nor the {TINY_CLASSES} "
            "class folders of train: unpack tiny-imagenet-200.zip again",
        )
        val = [(file, i) for i, wnid in enumerate(wnids) for file in _tiny_files(root, "val", wnid)]
    # val_0, val_1, ..., val_9999: the same order, and so the same ids, in both arrangements.
    val.sort(key=lambda item: (len(item[0].stem), item[0].stem))
    return _decoded(request, root, train, val, names)


def load_food101(request: Request) -> Loaded:
    """Food-101 (Bossard, Guillaumin and Van Gool, 2014) by meta/train.txt and meta/test.txt."""
    if has_parquet(request):
        return load_parquet(request, channels=3)
    if request.download:
        download("Food101", request.root)
    root = _root(request, "food-101.tar.gz", "food-101")
    names = _lines(root / "meta" / "classes.txt")
    return _listed(
        request,
        root,
        _lines(root / "meta" / "train.txt"),
        _lines(root / "meta" / "test.txt"),
        names,
        lambda line: (root / "images" / f"{line}.jpg", line.split("/")[0]),
    )


def load_dtd(request: Request) -> Loaded:
    """Describable Textures (Cimpoi et al., 2014), first split: train1 and val1 against test1."""
    if has_parquet(request):
        return load_parquet(request, channels=3)
    if request.download:
        download("DTD", request.root)
    # torchvision puts the archive's folder "dtd" into another one of that name.
    nested = request.root / "dtd" / "dtd"
    root = nested if nested.is_dir() else _root(request, "dtd-r1.0.1.tar.gz", "dtd")
    train = _lines(root / "labels" / "train1.txt") + _lines(root / "labels" / "val1.txt")
    names = _folder_names(root / "images", request)
    return _listed(
        request,
        root,
        train,
        _lines(root / "labels" / "test1.txt"),
        names,
        lambda line: (root / "images" / line, line.split("/")[0]),
    )


def load_caltech256(request: Request) -> Loaded:
    """Caltech-256 (Griffin, Holub and Perona, 2007): 256 objects and clutter, 257 classes.

    There is no official split: 60 pictures of each class, drawn with a fixed seed, are the
    training split and all others the test split, as in the transfer papers. The draw is part of
    the data set and does not depend on the task's seed.
    """
    if has_parquet(request):
        return load_parquet(request, channels=3)
    if request.download:
        download("Caltech256", request.root)
    nested = request.root / "caltech256"
    base = nested if nested.is_dir() else request.root
    folder = find_folder(base, "256_ObjectCategories")
    root = folder if folder else _root(request, "256_ObjectCategories.tar", "256_ObjectCategories")
    names = _folder_names(root, request)
    seed = derive_seed(0, "caltech256")
    train: Listing = []
    test: Listing = []
    for label, name in enumerate(names):
        files = picture_files(root / name)
        require(
            len(files) > CALTECH_TRAIN_PER_CLASS,
            f"{root / name} has {len(files)} pictures, more than {CALTECH_TRAIN_PER_CLASS} are "
            "needed: unpack 256_ObjectCategories.tar again",
        )
        keys = hash_bits(seed, torch.arange(len(files)) + label * 10_000, (1,))[:, 0]
        chosen = set(keys.argsort()[:CALTECH_TRAIN_PER_CLASS].tolist())
        train += [(file, label) for i, file in enumerate(files) if i in chosen]
        test += [(file, label) for i, file in enumerate(files) if i not in chosen]
    return _decoded(request, root, train, test, tuple(name.split(".")[-1] for name in names))


def load_cub200(request: Request) -> Loaded:
    """Caltech-UCSD Birds 200-2011 (Wah et al., 2011) by its train_test_split.txt, uncropped."""
    if has_parquet(request):
        return load_parquet(request, channels=3)
    root = _root(request, "CUB_200_2011.tgz", "CUB_200_2011")
    # Each line is a number, then the value; the numbers join the files.
    files = _table(root / "images.txt")
    labels = _table(root / "image_class_labels.txt")
    is_train = _table(root / "train_test_split.txt")
    require(
        files.keys() == labels.keys() == is_train.keys(),
        f"the lists in {root} name different pictures; unpack CUB_200_2011.tgz again",
    )
    names = tuple(name.split(".")[-1] for name in _table(root / "classes.txt").values())
    train: Listing = []
    test: Listing = []
    for number, file in files.items():
        item = (root / "images" / file, int(labels[number]) - 1)
        (train if is_train[number] == "1" else test).append(item)
    return _decoded(request, root, train, test, names)


def load_stanford_dogs(request: Request) -> Loaded:
    """Stanford Dogs (Khosla et al., 2011) by train_list.mat and test_list.mat, uncropped."""
    if has_parquet(request):
        return load_parquet(request, channels=3)
    root = find_folder(request.root, "StanfordDogs", "stanford_dogs") or request.root
    if not (root / "Images").is_dir():
        raise DataError(
            f"no {request.name} in {root}: unpack images.tar and lists.tar of Stanford Dogs there, "
            "so that it holds the folder Images, train_list.mat and test_list.mat"
        )
    names = _folder_names(root / "Images", request)
    listings = []
    for name in ("train_list.mat", "test_list.mat"):
        path = root / name if (root / name).is_file() else root / "lists" / name
        require(path.is_file(), f"no {name} in {root}: unpack lists.tar of Stanford Dogs there")
        variables = read_mat(path)
        files, labels = variables.get("file_list"), variables.get("labels")
        if not isinstance(files, list) or not isinstance(labels, np.ndarray):
            raise DataError(f"{path} has no file_list and labels; unpack lists.tar again")
        require(len(files) == labels.size, f"{path}: files and labels differ in number")
        numbers = (int(label) - 1 for label in labels.ravel())
        listings.append([(root / "Images" / f, n) for f, n in zip(files, numbers, strict=True)])
    breeds = tuple(name.split("-", 1)[-1] for name in names)
    return _decoded(request, root, listings[0], listings[1], breeds)


def load_image_folder(request: Request) -> Loaded:
    """Any pictures in ``train/<class>/`` and ``test/<class>/`` (or ``val/<class>/``)."""
    root = request.root
    if not (root / "train").is_dir():
        raise DataError(
            f"no folder train in {root}: put pictures into {root}/train/<class>/ and "
            f"{root}/test/<class>/ (or val)"
        )
    test_folder = root / "test" if (root / "test").is_dir() else root / "val"
    names = _folder_names(root / "train", request)
    found = _folder_names(test_folder, request)
    require(
        set(found) <= set(names),
        f"{test_folder} has classes that {root / 'train'} lacks: "
        f"{', '.join(sorted(set(found) - set(names)))}",
    )
    train, test = (
        [(f, label) for label, name in enumerate(names) for f in picture_files(folder / name)]
        for folder in (root / "train", test_folder)
    )
    return _decoded(request, root, train, test, names)


def picture_files(folder: Path) -> list[Path]:
    """Return the pictures directly in ``folder``, sorted by name; none if there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)


def _root(request: Request, archive: str, *names: str) -> Path:
    folder = find_folder(request.root, *names)
    if folder is None:
        raise DataError(
            f"no {request.name} in {request.root}: unpack {archive} there, so that it holds the "
            f"folder {names[0]}, or put train.parquet and test.parquet there"
        )
    return folder


def _folder_names(folder: Path, request: Request) -> tuple[str, ...]:
    if not folder.is_dir():
        raise DataError(
            f"no folder {folder}: {request.name} is not complete in {request.root}; unpack its "
            "archive again"
        )
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))


def _lines(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(
            f"cannot read {path} ({error.strerror}); unpack the archive again"
        ) from error
    return tuple(line.strip() for line in lines if line.strip())


def _table(path: Path) -> dict[str, str]:
    """Read lines of a key and a value."""
    rows = [line.split(maxsplit=1) for line in _lines(path)]
    require(all(len(row) == 2 for row in rows), f"{path} is damaged; unpack the archive again")
    return dict(rows)


def _tiny_files(root: Path, split: str, wnid: str) -> list[Path]:
    folder = root / split / wnid
    return picture_files(folder / "images") or picture_files(folder)


def _tiny_words(path: Path, wnids: Sequence[str]) -> tuple[str, ...]:
    words = dict(line.split("\t", 1) for line in _lines(path)) if path.is_file() else {}
    # The first of several synonyms; two classes may share it (crane, the bird and the machine).
    return tuple(f"{wnid} {words.get(wnid, '').split(',')[0]}".strip() for wnid in wnids)


def _listed(
    request: Request,
    root: Path,
    train: Sequence[str],
    test: Sequence[str],
    names: tuple[str, ...],
    parse: Callable[[str], tuple[Path, str]],
) -> Loaded:
    """Load by two lists of lines; ``parse`` turns a line into a file and a class name."""
    index = {name: label for label, name in enumerate(names)}

    def listing(lines: Sequence[str]) -> Listing:
        items: Listing = []
        for file, name in map(parse, lines):
            require(name in index, f"{root}: {file.name} has the unknown class {name!r}")
            items.append((file, index[name]))
        return items

    return _decoded(request, root, listing(train), listing(test), names)


def _decoded(
    request: Request, root: Path, train: Listing, test: Listing, names: tuple[str, ...]
) -> Loaded:
    splits = []
    for part, listing in (("train", train), ("test", test)):
        require(listing, f"{request.name} in {root} has no pictures for {part}")
        missing = next((file for file, _ in listing if not file.is_file()), None)
        require(
            missing is None, f"{missing} is missing; unpack the archive of {request.name} again"
        )
        files = [file for file, _ in listing]
        name = f"{request.name}-{part}"
        images = decode_files(files, root, size=request.image_size, channels=3, name=name)
        splits.append(_split(images, [label for _, label in listing], part))
    return Loaded(train=splits[0], test=splits[1], class_names=names)


def _split(images: NDArray[np.uint8], labels: Sequence[int], part: str) -> Split:
    return make_split(images, labels, test=part == "test")
