"""From configuration to task: what each selection gives, and what limits leave alone."""

import dataclasses

import numpy as np
import pytest

from robustft.config import from_dict
from robustft.data import Task, TaskConfig, load_task
from robustft.data.source import TEST_OFFSET
from robustft.errors import ConfigError, UnknownNameError
from robustft.threat import ThreatModel


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(TaskConfig())


def ids(task: Task, split: str) -> set[int]:
    return set(task.splits[split].ids.tolist())


def test_embedded_data(task: Task) -> None:
    assert {name: len(split) for name, split in task.splits.items()} == {
        "train": 5_400,
        "val": 600,
        "test": 2_000,
    }
    assert task.image_shape == (1, 28, 28)
    assert task.class_names[0] == "T-shirt/top"
    assert (task.mean, task.std) == ((0.2860,), (0.3530,))
    assert task.threat == ThreatModel("Linf", 0.1)
    for name, per_class in (("train", 540), ("val", 60), ("test", 200)):
        assert np.bincount(task.splits[name].labels).tolist() == [per_class] * 10
    pixels = np.concatenate([task.splits[n].images for n in ("train", "val")]) / 255
    assert pixels.mean() == pytest.approx(0.2860, abs=0.004)
    assert pixels.std() == pytest.approx(0.3530, abs=0.004)


def test_splits_are_disjoint_by_id(task: Task) -> None:
    assert not ids(task, "train") & ids(task, "val")
    assert not (ids(task, "train") | ids(task, "val")) & ids(task, "test")
    assert min(ids(task, "test")) >= TEST_OFFSET
    assert max(ids(task, "train")) < 60_000


def test_limits_move_nothing_between_splits(task: Task) -> None:
    small = load_task(TaskConfig(limit_train=100, limit_val=50, limit_test=30))
    for name, size in (("train", 100), ("val", 50), ("test", 30)):
        assert len(small.splits[name]) == size
        assert ids(small, name) < ids(task, name)
        assert np.bincount(small.splits[name].labels).tolist() == [size // 10] * 10
    smaller = load_task(TaskConfig(limit_train=40))
    assert ids(smaller, "train") < ids(small, "train")
    assert ids(smaller, "val") == ids(task, "val")


def test_rows_stay_together(task: Task) -> None:
    whole = load_task(TaskConfig(selection="official"))
    position = {int(i): row for row, i in enumerate(whole.splits["train"].ids)}
    val = task.splits["val"]
    rows = [position[int(i)] for i in val.ids]
    assert np.array_equal(whole.splits["train"].images[rows], val.images)
    assert np.array_equal(whole.splits["train"].labels[rows], val.labels)


def test_test_half(task: Task) -> None:
    half = load_task(TaskConfig(selection="test_half"))
    assert len(half.splits["train"]) == 6_000
    assert len(half.splits["val"]) == len(half.splits["test"]) == 1_000
    assert ids(half, "val") | ids(half, "test") == ids(task, "test")
    assert not ids(half, "val") & ids(half, "test")
    assert np.bincount(half.splits["val"].labels).tolist() == [100] * 10
    assert not half.leaky


def test_official_is_leaky_and_says_so(task: Task) -> None:
    official = load_task(TaskConfig(selection="official", limit_val=20, limit_test=20))
    assert official.leaky
    assert ids(official, "val") == ids(official, "test")
    assert not task.leaky


def test_digest_names_content_and_membership(task: Task) -> None:
    for change in ({"split_seed": 1}, {"limit_test": 100}):
        assert load_task(dataclasses.replace(TaskConfig(), **change)).digest != task.digest
    # Threat models and statistics are not content.
    other = TaskConfig(threat_models=(ThreatModel("L2", 1.0),), mean=(0.1,), std=(0.2,))
    assert load_task(other).digest == task.digest


def test_split_seed_changes_who_is_held_out(task: Task) -> None:
    assert ids(load_task(TaskConfig(split_seed=1)), "val") != ids(task, "val")


def test_image_size_and_statistics() -> None:
    task = load_task(TaskConfig(image_size=32, limit_train=20, mean=(0.3,), std=(0.4,)))
    assert task.image_shape == (1, 32, 32)
    assert (task.mean, task.std) == ((0.3,), (0.4,))
    small, large = load_task(TaskConfig()).splits["test"], task.splits["test"]
    assert large.images.mean() == pytest.approx(small.images.mean(), rel=0.02)
    with pytest.raises(ConfigError, match="mean and std have 3 and 3 values"):
        load_task(TaskConfig(mean=(0.1,) * 3, std=(0.1,) * 3))


def test_from_yaml_like_mapping() -> None:
    config = from_dict(
        TaskConfig,
        {"data": "cifar10", "threat_models": [{"norm": "L2", "eps": "128/255"}], "val_size": 5000},
    )
    assert config.threat_models == (ThreatModel("L2", 128 / 255),)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "cifar11"}, "did you mean 'cifar10'"),
        ({"selection": "vall"}, "did you mean 'val'"),
        ({"val_size": 0}, "val_size = 0 is out of range"),
        ({"limit_test": -1}, "limit_test = -1 is out of range"),
        ({"image_size": 8}, "image_size = 8 is out of range: 16 to 1024"),
        ({"threat_models": ()}, "threat_models is empty"),
        (
            {"threat_models": (ThreatModel("Linf", 0.1), ThreatModel("Linf", 0.2))},
            "of two radii of one norm the larger includes the smaller",
        ),
        ({"mean": (0.5,)}, "mean and std go together"),
        ({"mean": (0.5,), "std": (0.0,)}, "every value must be > 0"),
    ],
)
def test_bad_values_are_refused_when_written(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TaskConfig(**values)  # type: ignore[arg-type]


def test_bad_values_are_refused_when_loaded() -> None:
    with pytest.raises(ConfigError, match="val_size = 5991 leaves no training example per class"):
        load_task(TaskConfig(val_size=5_991))
    with pytest.raises(ConfigError, match="'parquet' needs root"):
        load_task(TaskConfig(data="parquet"))
    with pytest.raises(ConfigError, match="cub200 cannot be downloaded"):
        load_task(TaskConfig(data="cub200", download=True))
    with pytest.raises(UnknownNameError):
        from_dict(TaskConfig, {"dataset": "cifar10"})
