"""Readers of the published corrupted sets, on small files of the same form."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robustft.data import available_corruptions, read_cifar_c, read_tiny_imagenet_c
from robustft.data.source import TEST_OFFSET
from robustft.errors import ConfigError, DataError, UnknownNameError

N = 4


@pytest.fixture
def cifar_c(tmp_path: Path) -> Path:
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    rng = np.random.default_rng(0)
    np.save(folder / "fog.npy", rng.integers(0, 256, (5 * N, 32, 32, 3), dtype=np.uint8))
    np.save(folder / "labels.npy", np.tile(np.arange(N, dtype=np.int64), 5))
    return tmp_path


def test_cifar_c_blocks_are_severities(cifar_c: Path) -> None:
    whole = np.load(cifar_c / "CIFAR-10-C" / "fog.npy")
    for root in (cifar_c, cifar_c / "CIFAR-10-C"):
        assert available_corruptions(root) == ("fog",)
        for severity in (1, 3, 5):
            split = read_cifar_c(root, "fog", severity, num_images=N)
            assert split.images.shape == (N, 3, 32, 32)
            row = (severity - 1) * N + 2
            assert np.array_equal(split.images[2], whole[row].transpose(2, 0, 1))
            assert split.labels.tolist() == [0, 1, 2, 3]
            assert split.ids.tolist() == [TEST_OFFSET + i for i in range(N)]
    base = read_cifar_c(cifar_c, "fog", 2, num_images=N).images
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap), "a view of the file, not a copy"


def test_cifar_c_refuses_what_it_must(cifar_c: Path, tmp_path: Path) -> None:
    folder = cifar_c / "CIFAR-10-C"
    with pytest.raises(UnknownNameError, match="did you mean 'fog'"):
        read_cifar_c(cifar_c, "fogg", 1, num_images=N)
    with pytest.raises(ConfigError, match="severity = 0"):
        read_cifar_c(cifar_c, "fog", 0, num_images=N)
    with pytest.raises(DataError, match=r"must be uint8 \[50000, 32, 32, 3\]"):
        read_cifar_c(cifar_c, "fog", 1)
    np.save(folder / "snow.npy", np.array([object()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="pickled objects"):
        read_cifar_c(cifar_c, "snow", 1, num_images=N)
    (folder / "frost.npy").write_bytes((folder / "fog.npy").read_bytes()[:1000])
    with pytest.raises(DataError, match="damaged"):
        read_cifar_c(cifar_c, "frost", 1, num_images=N)
    (folder / "labels.npy").unlink()
    with pytest.raises(DataError, match=r"no labels\.npy"):
        read_cifar_c(cifar_c, "fog", 1, num_images=N)
    with pytest.raises(DataError, match=r"unpack CIFAR-10-C\.tar"):
        read_cifar_c(tmp_path / "nowhere", "fog", 1)


def test_tiny_imagenet_c(tmp_path: Path) -> None:
    wnids = ["n01", "n02"]
    for severity in (1, 2):
        for label, wnid in enumerate(wnids):
            folder = tmp_path / "Tiny-ImageNet-C" / "snow" / str(severity) / wnid
            folder.mkdir(parents=True)
            for k in range(2):
                number = 10 * (1 - label) + k
                level = 100 * label + 10 * severity + k
                Image.new("RGB", (64, 64), (level,) * 3).save(folder / f"val_{number}.JPEG")
    assert available_corruptions(tmp_path) == ("snow",)
    split = read_tiny_imagenet_c(tmp_path, "snow", 2, wnids=["n01 goldfish", "n02"])
    assert split.labels.tolist() == [0, 0, 1, 1]
    assert (split.ids - TEST_OFFSET).tolist() == [10, 11, 0, 1]
    assert split.images.shape == (4, 3, 64, 64)
    levels = split.images.mean(axis=(1, 2, 3))
    assert np.abs(levels - [20, 21, 120, 121]).max() <= 1
    with pytest.raises(DataError, match="not the 3 classes expected"):
        read_tiny_imagenet_c(tmp_path, "snow", 2, wnids=[*wnids, "n03"])
    with pytest.raises(DataError, match="has 0 class folders"):
        read_tiny_imagenet_c(tmp_path, "snow", 4, wnids=wnids)
