"""Method "instances": statistics of a run, training on what they say, equal updates, resuming."""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robustft.config import from_dict, to_dict
from robustft.data.base import Task
from robustft.errors import ConfigError
from robustft.methods import adversarial, instance_training, instances
from robustft.methods.common import AttackConfig
from robustft.methods.instance_config import CollectConfig, GroupConfig, InstancesConfig
from robustft.methods.instance_format import Record
from robustft.methods.instance_losses import MitigationConfig, mitigated_loss
from robustft.methods.instance_perturbations import GradientPerturbation
from robustft.methods.instance_recording import save_checkpoint
from robustft.methods.instance_selection import select, split_groups
from robustft.methods.instance_statistics import InstanceStatistics
from robustft.methods.instance_training import SteadyLoader
from robustft.methods.instances import collect, collect_checkpoints, train
from robustft.models import Start, state_digest
from robustft.training.augment import AugmentConfig, augment
from robustft.training.context import LocalContext
from robustft.training.loaders import Loader

ATTACK = AttackConfig(num_steps=1)
SMALL = InstancesConfig(epochs=2, batch_size=16, lr=0.02, attack=ATTACK, val_attack=ATTACK)
PERTURBATION = GradientPerturbation(eps=0.05, num_steps=2)


def collecting(folder: Path, **changes: Any) -> InstancesConfig:
    options = CollectConfig(
        folder=str(folder), attacks=(PERTURBATION,), transforms=("identity",), shards=3
    )
    return dataclasses.replace(SMALL, collect=options, **changes)


@pytest.fixture(scope="module")
def folder(task: Task, fresh: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The statistics of a short run."""
    path = tmp_path_factory.mktemp("instances") / "statistics"
    train(collecting(path), LocalContext(task=task, start=fresh))
    return path


def contents(path: Path) -> dict[str, Any]:
    """Return every number of an artifact."""
    statistics = InstanceStatistics(path)
    names = ("clean_loss", "pert_loss", "clean_margin", "pert_pred", "delta_norm")
    return {
        f"{record.record} {perturbation} {name}": statistics.column(
            name, perturbation=perturbation, record=record.record
        )
        for record in statistics.records
        for perturbation in statistics.manifest.perturbations
        for name in names
    }


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def same_state(first: Any, second: Any) -> bool:
    return all(torch.equal(first[name], value) for name, value in second.items())


# --- collection ----------------------------------------------------------------------------------


def test_a_run_measures_start_and_every_epoch(folder: Path, task: Task, fresh: Start) -> None:
    statistics = InstanceStatistics(folder, split=task.splits["train"])
    assert [(one.record, one.epoch, one.global_step) for one in statistics.records] == [
        (0, 0, 0),
        (1, 1, 4),
        (2, 2, 8),
    ]
    assert statistics.records[0].weights == state_digest(fresh.build().state_dict())
    first = collect(fresh.build(), task.splits["train"], perturbations=[PERTURBATION])
    read = statistics.column("pert_loss", perturbation=PERTURBATION.name, record=0)
    order = np.argsort(first.columns["instance_id"])
    np.testing.assert_allclose(read, first.columns["pert_loss"][order], atol=1e-5)
    same = statistics.aggregate("identity")
    assert (same.values["loss_diff_mean"] == 0).all()
    assert (same.values["flip_times"] == 0).all()


def test_collecting_does_not_change_the_run(folder: Path, task: Task, fresh: Start) -> None:
    with_statistics = train(collecting(folder), LocalContext(task=task, start=fresh))
    without = train(SMALL, LocalContext(task=task, start=fresh))
    assert same_state(with_statistics.state, without.state)
    assert with_statistics.tables["epochs"] == without.tables["epochs"]
    rows = with_statistics.tables["statistics"]
    assert [(row["perturbation"], row["record"]) for row in rows] == [
        (name, record) for name in (PERTURBATION.name, "identity") for record in range(3)
    ]
    assert (folder / "summary.parquet").is_file()


class Killed(LocalContext):
    """Dies when it should report its first epoch: after the record, before the checkpoint."""

    def report(self, *arguments: Any, **options: Any) -> None:
        if options["step"] == 2:
            raise KeyboardInterrupt
        super().report(*arguments, **options)


def test_a_killed_run_resumes_to_the_same_weights_and_statistics(
    folder: Path, task: Task, fresh: Start, tmp_path: Path
) -> None:
    config = collecting(tmp_path / "statistics")
    killed = Killed(task=task, start=fresh)
    with pytest.raises(KeyboardInterrupt):
        train(config, killed)
    (tmp_path / "statistics" / "record=00002" / "_SUCCESS").unlink()
    resumed = LocalContext(task=task, start=fresh, checkpoint=killed.checkpoint)
    result = train(config, resumed)
    undisturbed = train(SMALL, LocalContext(task=task, start=fresh))
    assert same_state(result.state, undisturbed.state)
    assert result.tables["epochs"] == undisturbed.tables["epochs"]
    assert_equal(contents(tmp_path / "statistics"), contents(folder))


def test_off_line_collection_gives_the_same_artifact(
    folder: Path, task: Task, fresh: Start, tmp_path: Path
) -> None:
    config = collecting(tmp_path / "statistics")
    config = dataclasses.replace(
        config, collect=dataclasses.replace(config.collect, when="offline")
    )
    result = train(config, LocalContext(task=task, start=fresh))
    assert len(result.tables["statistics"]) == 6
    found, expected = contents(tmp_path / "statistics"), contents(folder)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5, err_msg=name)
    parts = sorted(file.name for file in (tmp_path / "statistics" / "record=00001").iterdir())
    assert parts == ["_SUCCESS", *(f"part-{part:05d}-of-00003.parquet" for part in range(3))]


def test_off_line_work_is_small_and_says_what_it_depends_on(
    task: Task, fresh: Start, tmp_path: Path
) -> None:
    config = collecting(tmp_path / "statistics", epochs=1)
    options = dataclasses.replace(config.collect, when="offline")
    calls: list[Any] = []

    class Spy(LocalContext):
        def map(self, fn: Any, items: Any, *, shared: Any, key: str, name: str) -> Any:
            items = list(items)
            calls.append((items, key))
            return super().map(fn, items, shared=shared, key=key, name=name)

    config = dataclasses.replace(config, collect=options)
    train(config, Spy(task=task, start=fresh))
    ((items, key),) = calls
    assert Counter((item["record"], item["shard"]) for item in items) == Counter(
        (record, shard) for record in range(2) for shard in range(3)
    )
    json.dumps(items)
    # What is complete is not asked for again.
    collect_checkpoints(config, Spy(task=task, start=fresh))
    assert len(calls) == 1
    (tmp_path / "statistics" / "record=00001" / "_SUCCESS").unlink()
    collect_checkpoints(config, Spy(task=task, start=fresh))
    assert {item["record"] for item in calls.pop()[0]} == {1}
    # Other random numbers are other work.
    checkpoints = tmp_path / "statistics" / "checkpoints"
    shutil.copytree(checkpoints, tmp_path / "other" / "checkpoints")
    options = dataclasses.replace(options, seed=1, folder=str(tmp_path / "other"))
    other = dataclasses.replace(config, collect=options)
    collect_checkpoints(other, Spy(task=task, start=fresh))
    assert calls[1][1] != key
    assert len(calls[1][0]) == 2 * 3


def test_off_line_collection_refuses_what_it_cannot_measure(
    task: Task, fresh: Start, tmp_path: Path
) -> None:
    context = LocalContext(task=task, start=fresh)
    config = collecting(tmp_path / "statistics", epochs=1)
    options = dataclasses.replace(config.collect, when="offline")
    config = dataclasses.replace(config, collect=options)
    with pytest.raises(ConfigError, match="holds no checkpoints"):
        collect_checkpoints(config, context)
    with pytest.raises(ConfigError, match=r"collect\.folder = None"):
        collect_checkpoints(SMALL, context)
    state = fresh.build().state_dict()
    record = Record(record=0, epoch=0, global_step=0, weights=state_digest(state))
    name = next(name for name, value in state.items() if value.is_floating_point())
    save_checkpoint(tmp_path / "statistics", record, state | {name: state[name] + 1})
    with pytest.raises(ConfigError, match="is no longer what it was"):
        collect_checkpoints(config, context)


def test_fewer_records_keep_the_last_one(task: Task, fresh: Start, tmp_path: Path) -> None:
    config = collecting(tmp_path / "statistics", epochs=3)
    config = dataclasses.replace(config, collect=dataclasses.replace(config.collect, every=2))
    train(config, LocalContext(task=task, start=fresh))
    statistics = InstanceStatistics(tmp_path / "statistics")
    assert [record.epoch for record in statistics.records] == [0, 2, 3]
    other = dataclasses.replace(config, collect=dataclasses.replace(config.collect, every=1))
    with pytest.raises(ConfigError, match="another run"):
        train(other, LocalContext(task=task, start=fresh))


# --- training ------------------------------------------------------------------------------------


def test_without_statistics_it_is_adversarial_training(task: Task, fresh: Start) -> None:
    config = dataclasses.replace(SMALL, training="adversarial")
    common: Any = {
        name: getattr(config, name)
        for name in ("epochs", "lr", "batch_size", "seed", "optimizer", "schedule", "augment")
    }
    theirs = adversarial.train_at(
        adversarial.ATConfig(**common, attack=ATTACK, val_attack=ATTACK, keep="last"),
        LocalContext(task=task, start=fresh),
    )
    ours = train(config, LocalContext(task=task, start=fresh))
    for name, value in theirs.state.items():
        torch.testing.assert_close(ours.state[name], value)
    for name in ("val/clean", "val/robust"):
        assert ours.metrics[name] == theirs.metrics[name]


def of_group(folder: Path, which: Any, **changes: Any) -> InstancesConfig:
    group = GroupConfig(statistics=str(folder), which=which, share=0.3)
    return dataclasses.replace(SMALL, group=group, **changes)


@pytest.mark.parametrize("which", ["robust", "swing", "non-robust", "random", "all"])
def test_every_group_makes_the_same_number_of_updates(
    which: str, folder: Path, task: Task, fresh: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def spy(config: Any, logits: Any, labels: Any, chosen: Any, **options: Any) -> Any:
        seen.append(labels.tolist())
        return mitigated_loss(config, logits, labels, chosen, **options)

    monkeypatch.setattr(instance_training, "mitigated_loss", spy)
    result = train(of_group(folder, which, use="subset"), LocalContext(task=task, start=fresh))
    assert len(seen) == 2 * 4
    assert result.metrics["updates"] == 8
    size = 50 if which == "all" else 15
    assert result.choices["group_size"] == size
    if which != "all":
        # Balanced: five of each class in a pass.
        assert Counter(seen[0]) == {0: 5, 1: 5, 2: 5}
        assert {"score/clean_loss", "score/label", "score/split_half"} <= set(result.metrics)
        assert result.choices["score"] == "perturbed_loss_mean_r"
        assert result.choices["perturbation"] == PERTURBATION.name
        assert result.choices["records"] == 3


def test_the_subset_is_the_group(folder: Path, task: Task, fresh: Start) -> None:
    config = of_group(folder, "swing", use="subset")
    plan = instance_training.plan(config, LocalContext(task=task, start=fresh))
    statistics = InstanceStatistics(folder)
    groups = split_groups(statistics.aggregate(PERTURBATION.name), share=0.3)
    assert sorted(plan.split.ids) == statistics.ids[groups["swing"]].tolist()
    whole = task.splits["train"]
    for place, number in enumerate(plan.split.ids):
        row = int(np.flatnonzero(whole.ids == number)[0])
        np.testing.assert_array_equal(plan.split.images[place], whole.images[row])


@pytest.mark.parametrize(
    ("kind", "scope"),
    [("flooding", "instance"), ("flooding", "batch"), ("soft_label", "instance")],
)
def test_the_remedy_reaches_the_group_by_id(
    kind: Any, scope: Any, folder: Path, task: Task, fresh: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    level = 1.0
    config = of_group(
        folder, "robust", mitigation=MitigationConfig(kind=kind, scope=scope, level=level)
    )
    config = dataclasses.replace(config, augment=AugmentConfig(crop_padding=0, flip=0.0))
    statistics = InstanceStatistics(folder)
    groups = split_groups(statistics.aggregate(PERTURBATION.name), share=0.3, groups=("robust",))
    robust = set(statistics.ids[groups["robust"]].tolist())
    pictures = {
        task.splits["train"].images[row].tobytes(): int(number)
        for row, number in enumerate(task.splits["train"].ids)
    }
    shown: list[Any] = []
    calls: list[Any] = []

    def spy(options: Any, logits: Any, labels: Any, chosen: Any, **more: Any) -> Any:
        calls.append((chosen.tolist(), logits.detach(), labels, more["mean"]))
        return mitigated_loss(options, logits, labels, chosen, **more)

    real_augment = augment

    def see(inputs: Any, ids: Any, **options: Any) -> Any:
        shown.append((inputs * 255).round().to(torch.uint8).numpy())
        return real_augment(inputs, ids, **options)

    monkeypatch.setattr(instance_training, "mitigated_loss", spy)
    monkeypatch.setattr(instances, "augment", see)
    train(config, LocalContext(task=task, start=fresh))
    assert len(calls) == 8
    for (chosen, logits, labels, mean), images in zip(calls, shown, strict=True):
        ids = [pictures[image.tobytes()] for image in images]
        assert chosen == [number in robust for number in ids]
        if scope == "batch":
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            expected = losses[torch.tensor(chosen)].mean() if any(chosen) else torch.zeros(())
            torch.testing.assert_close(mean, expected)


def test_the_level_may_follow_the_groups_losses(folder: Path, task: Task, fresh: Start) -> None:
    mitigation = MitigationConfig(kind="flooding", level_quantile=0.9)
    config = of_group(folder, "robust", mitigation=mitigation)
    result = train(config, LocalContext(task=task, start=fresh))
    statistics = InstanceStatistics(folder)
    groups = split_groups(statistics.aggregate(PERTURBATION.name), share=0.3, groups=("robust",))
    losses = statistics.column("clean_loss", perturbation=PERTURBATION.name, record=2)
    expected = np.quantile(losses[groups["robust"]], 0.9)
    assert result.choices["level"] == pytest.approx(float(expected))


def test_flooding_keeps_the_training_loss_up(folder: Path, task: Task, fresh: Start) -> None:
    longer = dataclasses.replace(SMALL, epochs=6)
    plain = train(longer, LocalContext(task=task, start=fresh))
    flooded = train(
        dataclasses.replace(longer, mitigation=MitigationConfig(kind="flooding", level=1.0)),
        LocalContext(task=task, start=fresh),
    )
    assert plain.tables["epochs"][-1]["train/loss"] < 0.8
    assert flooded.tables["epochs"][-1]["train/loss"] >= 1.0
    assert {"val/loss", "val/clean", "val/robust"} <= set(flooded.tables["epochs"][-1])


def test_the_validation_loss_is_that_of_the_split(task: Task, fresh: Start) -> None:
    result = train(SMALL, LocalContext(task=task, start=fresh))
    model = dataclasses.replace(fresh, state=result.state).build()
    split = task.splits["val"]
    with torch.no_grad():
        logits = model(torch.from_numpy(split.images).float() / 255)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(split.labels))
    assert result.metrics["val/loss"] == pytest.approx(float(loss), rel=1e-5)


# --- equal numbers of updates --------------------------------------------------------------------


def batches(loader: Any, epochs: int) -> list[Any]:
    return [batch for epoch in range(epochs) for batch in loader.epoch(epoch)]


@pytest.mark.parametrize("size", [50, 15, 7, 33])
def test_a_steady_loader_repeats_whole_passes(size: int, task: Task) -> None:
    part = task.splits["train"].take(np.arange(size))
    inner = Loader(part, batch_size=16, seed=0, device=torch.device("cpu"))
    config = dataclasses.replace(SMALL, augment=AugmentConfig(crop_padding=2))

    def augmented(batch: Any, turn: int) -> Any:
        return augment(batch.inputs, batch.ids, config=config.augment, seed=0, epoch=turn)

    steady = SteadyLoader(inner, 4, augment=augmented)
    assert len(steady) == 4
    found = batches(steady, 5)
    assert len(found) == 20
    expected = [
        dataclasses.replace(
            batch,
            inputs=augment(batch.inputs, batch.ids, config=config.augment, seed=0, epoch=turn),
        )
        for turn in range(30)
        for batch in inner.epoch(turn)
    ][:20]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.inputs, other.inputs)
        assert one.count == other.count
    # Every epoch can be had by itself, as resuming needs.
    alone = list(steady.epoch(3))
    assert all(
        torch.equal(one.inputs, other.inputs)
        for one, other in zip(alone, found[12:16], strict=True)
    )


# --- what is refused -----------------------------------------------------------------------------


def test_statistics_of_another_split_are_refused(folder: Path, task: Task, fresh: Start) -> None:
    fewer = dataclasses.replace(
        task, splits={**task.splits, "train": task.splits["train"].take(np.arange(40))}
    )
    with pytest.raises(ConfigError, match="which are not the 40 given"):
        train(of_group(folder, "robust", use="subset"), LocalContext(task=fewer, start=fresh))
    config = of_group(folder, "robust", use="subset")
    group = dataclasses.replace(config.group, perturbation="blur-weak")
    with pytest.raises(ConfigError, match="'blur-weak' was not measured"):
        train(dataclasses.replace(config, group=group), LocalContext(task=task, start=fresh))


def test_an_empty_class_is_refused(folder: Path, task: Task, fresh: Start) -> None:
    wider = dataclasses.replace(task, class_names=(*task.class_names, "never"))
    with pytest.raises(ConfigError, match="class 3 has no instance"):
        train(of_group(folder, "robust", use="subset"), LocalContext(task=wider, start=fresh))


def test_overlapping_groups_are_refused(folder: Path, task: Task, fresh: Start) -> None:
    config = of_group(folder, "swing", use="subset")
    config = dataclasses.replace(config, group=dataclasses.replace(config.group, share=0.4))
    with pytest.raises(ConfigError, match="makes 3 groups of"):
        train(config, LocalContext(task=task, start=fresh))


def test_statistics_of_another_split_of_the_same_size_are_refused(
    folder: Path, task: Task, fresh: Start
) -> None:
    train_split = task.splits["train"]
    moved = dataclasses.replace(train_split, ids=train_split.ids + 10_000_000)
    other = dataclasses.replace(task, splits={**task.splits, "train": moved})
    with pytest.raises(ConfigError, match="their ids or labels differ"):
        train(of_group(folder, "robust", use="subset"), LocalContext(task=other, start=fresh))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use": "subset", "mitigation": {"kind": "flooding"}}, "trains on the group alone"),
        ({"group": {"which": "robust"}}, "name the folder of an earlier run's statistics"),
        ({"group": {"which": "robust", "statistics": "x"}}, "'robust' has no effect"),
        (
            {"mitigation": {"kind": "flooding", "level_quantile": 0.5}},
            "level_quantile needs group.statistics",
        ),
        ({"training": "both"}, "value of training 'both'"),
        ({"collect": {"every": 0}}, "every = 0"),
        ({"collect": {"folder": "x", "attacks": []}}, "there is nothing to measure"),
        ({"collect": {"folder": "x", "transforms": ["blur"]}}, "strength of the corruption"),
        ({"collect": {"folder": "s3://bucket/x"}}, "collect.folder = 's3://bucket/x'.*NFS"),
        ({"group": {"statistics": "gs://bucket/x"}}, "group.statistics = 'gs://bucket/x'.*NFS"),
        ({"group": {"share": 0.0}}, "share = 0.0"),
        ({"epochs": 0}, "epochs = 0"),
    ],
)
def test_options_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(InstancesConfig, fields)


def test_the_config_survives_yaml() -> None:
    config = collecting(Path("here"))
    assert from_dict(InstancesConfig, to_dict(config)) == config


def test_the_names_that_must_hold() -> None:
    for name in ("collect", "select", "flooding_loss", "soft_label_loss", "InstanceStatistics"):
        assert name in instances.__all__
    assert instances.select is select
