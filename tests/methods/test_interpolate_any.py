"""RiFT's third step after other methods, a start of two methods, and RiFT on a group."""

import contextlib
import dataclasses
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robustft.data.base import Task
from robustft.errors import ConfigError
from robustft.methods import METHODS, Result, instances, rift
from robustft.methods.adversarial import ATConfig
from robustft.methods.common import AttackConfig
from robustft.methods.instance_config import CollectConfig, GroupConfig, InstancesConfig
from robustft.methods.instance_statistics import InstanceStatistics
from robustft.methods.interpolation import InterpolateConfig, interpolate
from robustft.methods.natural import NaturalConfig
from robustft.methods.rift import RiftConfig, interpolated
from robustft.models import Start
from robustft.runtime import run as run_module
from robustft.runtime.experiment import (
    Experiment,
    StartConfig,
    experiment_from_dict,
    experiment_to_dict,
)
from robustft.runtime.trainer import Job, WorkerContext, run_job
from robustft.training.context import LocalContext

ATTACK = AttackConfig(num_steps=1)
AT = ATConfig(epochs=1, batch_size=16, lr=0.05, attack=ATTACK, val_attack=ATTACK)
LINE = InterpolateConfig(alphas=(0.0, 0.5, 1.0), tolerance=1.0, curve_attack=ATTACK, curve_runs=2)


@pytest.fixture(scope="module")
def start(task: Task, fresh: Start) -> Start:
    """An adversarially trained model, good but not perfect."""
    config = dataclasses.replace(AT, epochs=4, lr=0.02)
    state = METHODS["at"].train(config, LocalContext(task=task, start=fresh)).state
    return dataclasses.replace(fresh, state=state)


@pytest.fixture(scope="module")
def trained(task: Task, start: Start) -> Result:
    return METHODS["at"].train(AT, LocalContext(task=task, start=start))


def clean_accuracy(state: Any, task: Task, start: Start) -> float:
    split, model = task.splits["val"], dataclasses.replace(start, state=state).build()
    with torch.no_grad():
        answers = model(torch.from_numpy(split.images).float() / 255).argmax(1)
    return float((answers == torch.from_numpy(split.labels)).double().mean())


def test_the_line_of_another_method(task: Task, start: Start, trained: Result) -> None:
    """Points, choice and numbers against models that are mixed by hand."""
    result = interpolated(LINE, LocalContext(task=task, start=start), trained)
    begin = start.build().state_dict()
    mixed = {
        alpha: {
            name: (1 - alpha) * value + alpha * trained.state[name]
            if value.is_floating_point()
            else value
            for name, value in begin.items()
        }
        for alpha in LINE.alphas
    }
    curve = result.tables["interpolation"]
    for row in curve:
        assert row["clean"] == clean_accuracy(mixed[row["alpha"]], task, start)
    # BatchNorm's statistics are on the line like everything else.
    name = next(name for name in begin if name.endswith("running_mean"))
    assert not torch.equal(begin[name], trained.state[name])
    alpha = float(result.choices["alpha"])
    torch.testing.assert_close(result.state[name], mixed[alpha][name])
    # A tolerance of 1 lets every point qualify: the cleanest wins.
    assert result.metrics["val/clean"] == max(row["clean"] for row in curve)
    assert result.metrics["val/clean"] == clean_accuracy(result.state, task, start)
    assert [row["alpha"] for row in curve if row["chosen"]] == [alpha]
    assert result.tables["epochs"] == trained.tables["epochs"]
    assert result.metrics["val/tuned_clean"] == curve[2]["clean"]
    assert result.metrics["val/start_robust"] == curve[0]["robust"]


def test_a_method_that_lost_robustness_is_taken_back(task: Task, start: Start) -> None:
    """The other end of the line answers one class everywhere: no point but the start is robust."""
    state = {name: value.clone() for name, value in start.build().state_dict().items()}
    state["network.linear.weight"].zero_()
    state["network.linear.bias"].copy_(torch.tensor([1e4, 0.0, 0.0]))
    config = dataclasses.replace(LINE, tolerance=0.0)
    context = LocalContext(task=task, start=start)
    result = interpolated(config, context, Result(state=state, metrics={}))
    curve = result.tables["interpolation"]
    assert curve[0]["robust"] > curve[2]["robust"] == pytest.approx(1 / 3)
    assert result.choices["alpha"] == 0
    assert all(torch.equal(result.state[n], v) for n, v in start.build().state_dict().items())


def test_what_a_method_measured_itself_is_not_said_of_the_point(
    task: Task, start: Start, trained: Result
) -> None:
    metrics = {"val/clean": 9.0, "val/union": 8.0, "val/start_union": 0.5}
    metrics |= {"passes/forwards": 5, "passes/backwards": 7}
    own = dataclasses.replace(trained, metrics=metrics, choices={"epoch": 3})
    result = interpolated(LINE, LocalContext(task=task, start=start), own)
    assert "val/union" not in result.metrics
    assert result.metrics["val/tuned_union"] == 8.0
    assert result.metrics["val/start_union"] == 0.5
    assert result.metrics["val/clean"] < 9.0
    assert result.metrics["val/tuned_clean"] == result.tables["interpolation"][2]["clean"]
    # Three points, 21 images: clean, and two runs of one step and an answer.
    assert result.metrics["passes/forwards"] == 5 + 3 * 21 * (1 + 2 * 2)
    assert result.metrics["passes/backwards"] == 7 + 3 * 21 * 2
    assert result.choices["epoch"] == 3


def job_of(task: Task, start: Start, line: InterpolateConfig | None) -> Job:
    return Job(
        method="at",
        config=AT,
        task=task,
        start=start,
        prepared=None,
        stage="at",
        run="",
        threads=1,
        gpu=False,
        send=lambda event: None,  # type: ignore[arg-type]
        interpolate=line,
    )


def worker_context(job: Job) -> WorkerContext:
    return WorkerContext(job, save=lambda record, folder: None, restore=lambda: None)


def test_a_job_interpolates_if_it_is_told_to(
    task: Task, fresh: Start, start: Start, trained: Result
) -> None:
    plain, line = job_of(task, start, None), job_of(task, start, LINE)
    result = run_job(plain, worker_context(plain))
    assert result.metrics == trained.metrics
    expected = interpolated(LINE, LocalContext(task=task, start=start), trained)
    found = run_job(line, worker_context(line))
    assert found.metrics == expected.metrics
    assert all(torch.equal(found.state[name], value) for name, value in expected.state.items())
    nowhere = job_of(task, fresh, LINE)
    with pytest.raises(ConfigError, match="the start has fresh weights"):
        run_job(nowhere, worker_context(nowhere))


# Experiments.


def experiment(**changes: Any) -> Experiment:
    fields: dict[str, Any] = {"name": "line", "start": {"method": {"name": "at"}}}
    fields |= {"method": {"name": "at"}, "interpolate": {"tolerance": 0.01}}
    return experiment_from_dict(fields | changes)


def test_an_experiment_says_so_and_survives_yaml() -> None:
    found = experiment()
    assert found.interpolate == InterpolateConfig(tolerance=0.01)
    assert experiment_from_dict(experiment_to_dict(found)) == found
    assert found.fingerprint != experiment(interpolate=None).fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "rift"}}, "rift goes back to the start by itself"),
        ({"method": {"name": "fine-tune", "mode": "wise-ft"}}, "fine-tune goes back"),
        (
            {"method": {"name": "fine-tune"}, "search": {"space": {"mode": ["full", "wise-ft"]}}},
            "fine-tune goes back",
        ),
        ({"start": {}}, "goes back to a trained start"),
        (
            {"method": {"name": "multinorm"}, "search": {"metric": "val/union"}},
            "search.metric = 'val/union' is not measured along the interpolation",
        ),
        ({"interpolate": {"alphas": [0.5, 1]}}, "must ascend from 0"),
        (
            {"task": {"data": "sst2"}, "method": {"name": "rose"}, "start": {"checkpoint": "x"}},
            "measures images",
        ),
        ({"start": {"before": {"name": "at"}}}, "give start.method"),
    ],
)
def test_what_cannot_be_interpolated_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment(**changes)


def test_a_job_of_a_start_is_not_interpolated() -> None:
    whole = experiment()
    running: Any = types.SimpleNamespace(
        experiment=whole, task_ref=None, gpu=False, pump=types.SimpleNamespace(sender=None)
    )
    for config, expected in ((whole.start.method, None), (whole.method, whole.interpolate)):
        job = run_module._job(running, config, None, None, stage="", cpus=1)
        assert job.interpolate == expected


def test_a_start_of_two_methods_is_trained_in_turn_and_cached_as_such(
    task: Task, fresh: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUSTFT_HOME", str(tmp_path))
    monkeypatch.setattr(run_module.recording, "log_stage", lambda *_, **__: None)
    trained: list[tuple[str, str, Any]] = []

    def train(running: Any, config: Any, start: Start, task: Task, *, stage: str) -> Result:
        trained.append((stage, start.source, start.state))
        state = {"step": torch.tensor(float(len(trained)))}
        return Result(state=state, metrics={"val/clean": 0.5, "val/robust": 0.5})

    monkeypatch.setattr(run_module, "_train", train)

    def started(config: StartConfig) -> Start:
        clock = types.SimpleNamespace(stage=lambda name: contextlib.nullcontext())
        mirror = types.SimpleNamespace(fetch_start=lambda c: None, publish_start=lambda c: None)
        running: Any = types.SimpleNamespace(
            experiment=experiment(start=config, interpolate=None),
            start_task=task,
            say=lambda *_: None,
            clock=clock,
            mirror=mirror,
            tracker=None,
            parent="",
        )
        return run_module._trained_start(running, fresh)[0]  # type: ignore[return-value]

    both = StartConfig(before=AT, method=NaturalConfig())
    found = started(both)
    assert [stage for stage, _, _ in trained] == ["start-at", "start-at-fine-tune"]
    assert trained[0][2] is None
    assert float(trained[1][2]["step"]) == 1
    assert found.source == "small_resnet trained by at, then fine-tune on stripes"
    assert float(found.state["step"]) == 2  # type: ignore[index]
    # Again: from the cache. Its first half is that of a start by itself, its second half is not.
    started(both)
    started(StartConfig(method=AT))
    assert len(trained) == 2
    started(StartConfig(method=NaturalConfig()))
    started(StartConfig(before=dataclasses.replace(AT, epochs=2), method=NaturalConfig()))
    stages = ["start-fine-tune", "start-at", "start-at-fine-tune"]
    assert [stage for stage, _, _ in trained[2:]] == stages


# RiFT on a group.


def test_rift_fine_tunes_on_the_group_alone(
    task: Task, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = CollectConfig(folder=str(tmp_path / "statistics"))
    config = InstancesConfig(epochs=1, batch_size=16, val_attack=ATTACK, collect=collect)
    instances.train(config, LocalContext(task=task, start=start))
    statistics = InstanceStatistics(tmp_path / "statistics")
    perturbation = next(iter(statistics.manifest.perturbations))
    losses = [
        statistics.column("pert_loss", perturbation=perturbation, record=record)
        for record in range(len(statistics.records))
    ]
    order = np.argsort(np.mean(np.asarray(losses, dtype=np.float64), axis=0))
    expected = set(statistics.ids[order[:10]].tolist())

    seen: list[set[int]] = []
    loader = rift.Loader

    def spying(split: Any, **options: Any) -> Any:
        seen.append(set(split.ids.tolist()))
        return loader(split, **options)

    monkeypatch.setattr(rift, "Loader", spying)
    group = GroupConfig(
        statistics=str(tmp_path / "statistics"),
        metric="perturbed_loss_mean_r",
        which="robust",
        share=0.2,
        balance=False,
    )
    small = RiftConfig(
        modules="last",
        epochs=1,
        alphas=(0.0, 1.0),
        curve_attack=ATTACK,
        curve_runs=1,
        group=group,
    )
    result = rift.train(small, LocalContext(task=task, start=start))
    assert seen == [expected]
    assert (result.choices["group"], result.choices["group_size"]) == ("robust", 10)
    whole = dataclasses.replace(small, group=dataclasses.replace(group, which="all"))
    result = rift.train(whole, LocalContext(task=task, start=start))
    assert seen[1] == set(task.splits["train"].ids.tolist())
    assert "group" not in result.choices


def test_interpolation_of_equal_ends_is_the_start(task: Task, start: Start) -> None:
    state = start.build().state_dict()
    result = interpolated(
        LINE, LocalContext(task=task, start=start), Result(state=state, metrics={})
    )
    assert result.choices["alpha"] == 0
    assert result.metrics["movement"] == 0
    assert all(
        torch.equal(result.state[name], value)
        for name, value in interpolate(state, state, 0.5).items()
    )
