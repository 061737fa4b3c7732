"""The evaluation protocol: shards and batches do not matter, masks combine, intervals hold."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from robustft.attacks import pgd
from robustft.data import C15, Split, Task, corrupted_sets
from robustft.data.source import TEST_OFFSET
from robustft.errors import ConfigError, DataError, UnknownNameError
from robustft.evaluation import Evaluation, EvaluationConfig, evaluate
from robustft.evaluation.intervals import wilson
from robustft.threat import ThreatModel

CONFIG = EvaluationConfig(
    suite="report", pgd_steps=3, apgd_steps=4, severities=(2,), shard_size=16, batch_size=8
)


class Doubled(nn.Module):
    """A linear model in float64, so that batch sizes cannot change a bit of the outcome."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.linear = nn.Linear(3 * 16 * 16, 4).double()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(inputs.double().flatten(1))
        return logits


def make_task(n: int = 40, *, selection: str = "val") -> Task:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, size=(n, 3, 16, 16)).astype(np.uint8)
    with torch.no_grad():
        labels = Doubled()(torch.from_numpy(images) / 255).argmax(1).numpy()
    labels[::5] = (labels[::5] + 1) % 4  # a fifth is wrong
    split = Split(images, labels.astype(np.int64), np.arange(100, 100 + n, dtype=np.int64))
    return Task(
        name="toy",
        splits={"train": split, "val": split, "test": split},
        class_names=tuple("abcd"),
        threat_models=(ThreatModel("Linf", 0.01), ThreatModel("L2", 0.1)),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        digest="toy",
        selection=selection,  # type: ignore[arg-type]
    )


def same(one: Evaluation, other: Evaluation) -> bool:
    return one.masks.keys() == other.masks.keys() and all(
        np.array_equal(one.masks[name], other.masks[name]) for name in one.masks
    )


def test_shards_and_batches_change_nothing() -> None:
    model, task = Doubled(), make_task()
    whole = evaluate(
        model, task, config=dataclasses.replace(CONFIG, shard_size=1000, batch_size=1000)
    )
    pieces = evaluate(model, task, config=dataclasses.replace(CONFIG, shard_size=7, batch_size=3))
    assert same(whole, pieces)
    assert len(whole.masks) == 1 + 2 * 2 + 15


def test_the_key_of_stored_results_names_what_they_depend_on() -> None:
    keys: list[str] = []

    def remember(fn, items, *, shared, key, name):  # type: ignore[no-untyped-def]
        keys.append(key)
        return [{"correct": np.ones(40, bool), "num_forwards": 0, "num_backwards": 0}]

    def key_of(model: nn.Module, **changes: int) -> str:
        config = dataclasses.replace(CONFIG, suite="clean", **{"shard_size": 50, **changes})
        evaluate(model, make_task(), config=config, map=remember)
        return keys[-1]

    other = Doubled()
    with torch.no_grad():
        other.linear.bias[0] += 1
    expected = key_of(Doubled())
    assert key_of(Doubled(), shard_size=40, batch_size=9) == expected
    assert len({expected, key_of(other), key_of(Doubled(), seed=1)}) == 3


def test_items_may_be_computed_in_any_order() -> None:
    def backwards(fn, items, *, shared, key, name):  # type: ignore[no-untyped-def]
        return [fn(shared, item) for item in reversed(list(items))][::-1]

    model, task = Doubled(), make_task()
    assert same(
        evaluate(model, task, config=CONFIG), evaluate(model, task, config=CONFIG, map=backwards)
    )


def test_metrics_follow_from_the_masks() -> None:
    found = evaluate(Doubled(), make_task(), config=CONFIG)
    metrics, masks = found.metrics, found.masks
    assert metrics["clean"] == pytest.approx(32 / 40)
    survivors = masks["clean"] & masks["L2/pgd"] & masks["L2/apgd"]
    assert metrics["L2/robust"] == pytest.approx(survivors.mean())
    both = survivors & masks["Linf/pgd"] & masks["Linf/apgd"]
    assert metrics["robust"] == pytest.approx(both.mean())
    types = [values for name, values in masks.items() if name.startswith("corruption/")]
    assert metrics["corruptions"] == pytest.approx(np.mean(types))
    assert metrics["robust"] <= metrics["clean"]
    assert found.interval("clean") == wilson(32, 40)


def test_pgd_is_the_attack_with_the_instance_ids() -> None:
    model, task = Doubled(), make_task()
    found = evaluate(model, task, suite="clean,pgd", config=CONFIG)
    split = task.splits["test"]
    result = pgd(
        model,
        torch.from_numpy(split.images.copy()).float() / 255,
        torch.from_numpy(split.labels.copy()),
        norm="Linf",
        eps=0.01,
        num_steps=3,
        generator=torch.Generator().manual_seed(0),
        sample_ids=torch.from_numpy(split.ids.copy()),
    )
    assert np.array_equal(found.masks["Linf/pgd"], found.masks["clean"] & result.robust.numpy())


def test_passes_are_counted_for_attacked_images_only() -> None:
    found = evaluate(Doubled(), make_task(), suite="pgd", config=CONFIG)
    # 2 norms x (40 clean forwards + 32 correct images x (3 steps + 1 report)).
    assert found.num_forwards == 2 * (40 + 32 * 4)
    assert found.num_backwards == 2 * 32 * 3


def test_attack_options_reach_the_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int]] = []

    def recording(*args: object, generator: torch.Generator, **options: int) -> object:
        seen.append((generator.initial_seed(), options["num_steps"], options["num_restarts"]))
        return pgd(*args, generator=generator, **options)  # type: ignore[arg-type]

    module = sys.modules["robustft.evaluation.evaluate"]  # the package's name is the function's
    monkeypatch.setattr(module, "pgd", recording)
    monkeypatch.setattr(module, "apgd", recording)
    options = {"pgd_steps": 2, "pgd_restarts": 3, "apgd_steps": 4, "apgd_restarts": 5, "seed": 6}
    config = EvaluationConfig(suite="pgd,apgd", **options)  # type: ignore[arg-type]
    evaluate(Doubled(), make_task(), config=config)
    assert seen == [(6, 2, 3)] * 2 + [(6, 4, 5)] * 2


def test_limits_draw_a_fixed_sample() -> None:
    model, task = Doubled(), make_task()
    config = dataclasses.replace(CONFIG, suite="corruptions", limit=20, corruption_limit=8)
    found = evaluate(model, task, config=config)
    assert len(found.ids) == len(set(found.ids.tolist())) == 20
    assert len(found.masks["corruption/fog/2"]) == 8
    assert np.array_equal(found.ids, evaluate(model, task, config=config).ids)
    assert not np.array_equal(found.ids, np.sort(found.ids))


def test_masks_are_saved_with_their_ids(tmp_path) -> None:  # type: ignore[no-untyped-def]
    config = dataclasses.replace(CONFIG, corruption_limit=8)
    found = evaluate(Doubled(), make_task(), config=config)
    found.save(tmp_path / "masks.parquet")
    table = pq.read_table(tmp_path / "masks.parquet")
    assert table["id"].to_pylist() == found.ids.tolist()
    assert table["clean"].to_pylist() == found.masks["clean"].tolist()
    fog = table["corruption/fog/2"].to_pylist()
    assert fog[:8] == found.masks["corruption/fog/2"].tolist()
    assert fog[8:] == [None] * 32


def test_leaky_numbers_say_so() -> None:
    model = Doubled()
    assert evaluate(model, make_task(selection="official"), suite="clean").leaky
    assert not evaluate(model, make_task(), suite="clean").leaky


def test_the_model_is_left_as_it_was() -> None:
    model = Doubled().train()
    evaluate(model, make_task(), suite="quick", config=CONFIG)
    assert model.training
    model.linear.eval()
    evaluate(model, make_task(), suite="clean", config=CONFIG)
    assert model.training
    assert not model.linear.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_measurements_are_in_full_float32() -> None:
    seen: set[bool] = set()

    class Watching(Doubled):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            seen.add(torch.backends.cudnn.allow_tf32)
            return super().forward(inputs)

    assert torch.backends.cudnn.allow_tf32, "torch's default"
    evaluate(Watching(), make_task(), config=CONFIG)
    assert seen == {False}


def test_wrong_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'quick'"):
        EvaluationConfig(suite="quik")
    with pytest.raises(UnknownNameError, match="'tset'"):
        evaluate(Doubled(), make_task(), split="tset")
    with pytest.raises(ConfigError, match="severities"):
        EvaluationConfig(severities=(0,))
    with pytest.raises(ConfigError, match="names one twice"):
        EvaluationConfig(severities=(2, 2))
    with pytest.raises(ConfigError, match=r"limit = 0 must be at least 1"):
        EvaluationConfig(limit=0)
    twice = evaluate(Doubled(), make_task(), suite="clean,clean")
    assert len(twice.masks["clean"]) == 40


# Published corrupted sets. A picture's brightness is its class, and the files hold other
# brightnesses than what the generator would make of the clean pictures.

NUM_TEST = 12
LEVELS = 4
FILES = EvaluationConfig(suite="clean,corruptions", severities=(2, 5), shard_size=5, batch_size=2)


class Brightness(nn.Module):
    """Predicts the quarter of [0, 1] that the first pixel lies in."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter((torch.arange(LEVELS) + 0.5) / LEVELS)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return -(inputs[:, 0, 0, :1] - self.centres).abs()


def level(quarter: int) -> int:
    return 32 + 64 * quarter


def published_task(name: str, size: int, *, ids: list[int] | None = None) -> Task:
    positions = np.array(ids if ids is not None else [7, 2, 11, 5, 0, 3])
    labels = (positions % LEVELS).astype(np.int64)
    images = np.zeros((len(labels), 3, size, size), dtype=np.uint8)
    images[:] = 32 + 64 * labels[:, None, None, None].astype(np.uint8)
    split = Split(images, labels, positions + TEST_OFFSET)
    return Task(
        name=name,
        splits={"train": split, "val": split, "test": split},
        class_names=tuple(f"n0{i} class" for i in range(LEVELS)),
        threat_models=(ThreatModel("Linf", 0.01),),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        digest="published",
    )


def wrong(position: int, severity: int, kind: str) -> bool:
    """Whether the files' picture looks like another class: a rule that names single pictures."""
    return (position + severity + C15.index(kind)) % 5 == 0


def shown(position: int, severity: int, kind: str) -> int:
    return level((position + wrong(position, severity, kind)) % LEVELS)


@pytest.fixture
def cifar_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(corrupted_sets, "CIFAR_TEST", NUM_TEST)
    for archive in ("CIFAR-10-C", "CIFAR-100-C"):
        folder = tmp_path / archive
        folder.mkdir()
        for kind in C15:
            # CIFAR-100-C is all black here: reading it for CIFAR-10 would be noticed.
            values = [
                shown(i, s, kind) if archive == "CIFAR-10-C" else 0
                for s in range(1, 6)
                for i in range(NUM_TEST)
            ]
            pixels = np.zeros((5 * NUM_TEST, 32, 32, 3), dtype=np.uint8)
            pixels[:] = np.array(values, dtype=np.uint8)[:, None, None, None]
            np.save(folder / f"{kind}.npy", pixels)
        np.save(folder / "labels.npy", np.tile(np.arange(NUM_TEST) % LEVELS, 5))
    return tmp_path


def assert_as_in_the_files(found: Evaluation, severities: tuple[int, ...]) -> None:
    for kind in C15:
        for severity in severities:
            mask = found.masks[f"corruption/{kind}/{severity}"]
            positions = found.ids[: len(mask)] - TEST_OFFSET
            assert mask.tolist() == [not wrong(int(p), severity, kind) for p in positions]


def test_corruptions_are_read_from_published_files(cifar_c: Path) -> None:
    model, task = Brightness(), published_task("cifar10", 32)
    for root in (cifar_c, cifar_c / "CIFAR-10-C"):
        config = dataclasses.replace(FILES, corrupted_root=str(root))
        found = evaluate(model, task, config=config)
        assert found.settings["corruptions"] == "files"
        assert found.metrics["clean"] == 1
        assert_as_in_the_files(found, (2, 5))
    limited = dataclasses.replace(config, limit=5, corruption_limit=3)
    few = evaluate(model, task, config=limited)
    assert len(few.masks["corruption/fog/2"]) == 3
    assert few.ids.tolist() != task.splits["test"].ids[:5].tolist(), "a shuffled sample"
    assert_as_in_the_files(few, (2, 5))
    # The black CIFAR-100-C shows the class of the darkest quarter only.
    other = evaluate(
        model,
        published_task("cifar100", 32),
        config=dataclasses.replace(FILES, corrupted_root=str(cifar_c)),
    )
    dark = (other.ids - TEST_OFFSET) % LEVELS == 0
    assert np.array_equal(other.masks["corruption/fog/2"], dark)
    assert evaluate(model, task, config=FILES).settings["corruptions"] == "generated"


def test_stored_results_belong_to_the_content_of_the_files(cifar_c: Path) -> None:
    keys: list[str] = []

    def remember(fn, items, *, shared, key, name):  # type: ignore[no-untyped-def]
        keys.append(key)
        return [fn(shared, item) for item in items]

    def measure(root: Path) -> None:
        config = dataclasses.replace(FILES, corrupted_root=str(root))
        evaluate(Brightness(), published_task("cifar10", 32), config=config, map=remember)

    measure(cifar_c)
    measure(cifar_c / "CIFAR-10-C")
    file = cifar_c / "CIFAR-10-C" / "fog.npy"
    pixels = np.load(file)
    pixels[NUM_TEST + 7] += 1
    np.save(file, pixels)
    measure(cifar_c)
    assert keys[0] == keys[1] != keys[2]


def test_tiny_imagenet_c_is_read_by_the_numbers_of_its_names(tmp_path: Path) -> None:
    for kind in C15:
        for position in range(NUM_TEST):
            folder = tmp_path / "Tiny-ImageNet-C" / kind / "1" / f"n0{position % LEVELS}"
            folder.mkdir(parents=True, exist_ok=True)
            grey = (shown(position, 1, kind),) * 3
            Image.new("RGB", (64, 64), grey).save(folder / f"val_{position}.JPEG")
    config = dataclasses.replace(FILES, severities=(1,), corrupted_root=str(tmp_path))
    found = evaluate(Brightness(), published_task("tiny_imagenet", 64), config=config)
    assert_as_in_the_files(found, (1,))


def test_files_that_do_not_fit_are_refused(cifar_c: Path) -> None:
    config = dataclasses.replace(FILES, corrupted_root=str(cifar_c))

    def refused(task: Task, error: type[Exception], text: str, **changes: str) -> None:
        with pytest.raises(error, match=text):
            evaluate(Brightness(), task, config=dataclasses.replace(config, **changes))

    refused(make_task(), ConfigError, "no corrupted set was published for toy")
    refused(published_task("cifar10", 40), ConfigError, "has 32x32 colour pictures")
    beyond = published_task("cifar10", 32, ids=[1, NUM_TEST, NUM_TEST + 4])
    refused(beyond, DataError, "2 of 3 pictures are not in")
    held_out = published_task("cifar10", 32, ids=[1 - TEST_OFFSET])
    refused(held_out, DataError, "evaluate test examples")
    task = published_task("cifar10", 32)
    np.save(cifar_c / "CIFAR-10-C" / "labels.npy", np.zeros(5 * NUM_TEST, dtype=np.int64))
    refused(task, DataError, "5 of 6 pictures have another label")
    (cifar_c / "CIFAR-10-C" / "fog.npy").unlink()
    refused(task, DataError, r"lacks fog: unpack CIFAR-10-C\.tar there")
    refused(task, DataError, "no corrupted set in", corrupted_root=str(cifar_c / "nowhere"))
    # Suites without corruptions do not look at the files.
    assert evaluate(Brightness(), task, suite="clean", config=config).metrics["clean"] == 1
