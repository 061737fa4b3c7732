"""Starts that learnt another task: their head, their cache, what is left out, what is refused."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from small import small_experiment, write_pictures

from robustft.data import Task, load_task
from robustft.errors import ConfigError
from robustft.methods import METHODS, Result
from robustft.models import Start, load_model_dir, save_model
from robustft.runtime import outputs, starts
from robustft.runtime import run as run_module
from robustft.runtime.experiment import (
    Experiment,
    dump_yaml,
    experiment_from_dict,
    experiment_to_dict,
    load_experiment,
    method_name,
)
from robustft.runtime.results import load_result
from robustft.runtime.run import Report, resume, run
from robustft.runtime.running import Running
from robustft.runtime.session import Session
from robustft.runtime.starts import fit_to_task, load_or_fresh
from robustft.runtime.stored import StoredMap
from robustft.training.context import LocalContext

FASHION = {"data": "fashion_mnist_mini", "val_size": 20, "limit_train": 60, "limit_test": 20}
ATTACK = {"num_steps": 1, "step_size": 0.05}
AT = {
    "name": "at",
    "epochs": 1,
    "lr": 0.05,
    "batch_size": 30,
    "schedule": {"name": "constant"},
    "attack": ATTACK,
    "val_attack": ATTACK,
}
RFT = {
    "name": "rft",
    "variant": "trades-ce",
    "epochs": 2,
    "batch_size": 20,
    "lr": 0.01,
    "schedule": {"name": "constant"},
    "attack": ATTACK,
    "val_attack": ATTACK,
}


task_of = functools.cache(load_task)


class Notes:
    """A tracker that only takes notes."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., str]:
        def note(*args: Any, **kwargs: Any) -> str:
            self.calls.append((name, args, kwargs))
            return name

        return note

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@dataclasses.dataclass
class Local:
    """Runs of experiments in this process, without Ray and MLflow, and what they have trained."""

    trained: list[tuple[str, str, Start]]
    notes: list[Notes]


@pytest.fixture(scope="module")
def local() -> Iterator[Local]:
    here = Local([], [])

    class Pump:
        sender = None

        def local(self, event: Mapping[str, Any]) -> None:
            pass

        sync = close = lambda self: None

    def opened(experiment, mirror, tasks, tracker, parent, clock, stack):  # type: ignore[no-untyped-def]
        run_module.recording.log_data(tracker, parent, experiment, *tasks)
        return Running(
            experiment=experiment,
            directory=mirror.directory,
            session=Session(embedded=True, num_cpus=1, num_gpus=0, largest_node_cpus=1),
            pump=Pump(),  # type: ignore[arg-type]
            tracker=tracker,
            clock=clock,
            parent=parent,
            task=tasks[0],
            task_ref=None,
            start_task=tasks[1],
            mirror=mirror,
        )

    def train(running, config, start, task, *, stage, prepared=None):  # type: ignore[no-untyped-def]
        here.trained.append((stage, task.name, start))
        context = LocalContext(task=task, start=start, prepared=prepared)
        result: Result = METHODS[method_name(config)].train(config, context)
        return result

    def tracker(*_: Any, **__: Any) -> Notes:
        here.notes.append(Notes())
        return here.notes[-1]

    with pytest.MonkeyPatch.context() as patch:
        for module in (run_module, starts):
            patch.setattr(module, "load_any_task", task_of)
        # Pages of pictures, which tell nothing of the start.
        patch.setattr(outputs, "write_evaluation_report", lambda *_, **__: None)
        patch.setattr(run_module, "_open", opened)
        patch.setattr(run_module, "_train", train)
        patch.setattr(run_module, "Tracker", tracker)
        patch.setattr(Running, "fanout", lambda self, stage: StoredMap(self.directory / "items"))
        yield here


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "four", num_classes=4)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def transfer(storage: Path, pictures: Path, **start: Any) -> Experiment:
    """Return rft on four classes of stripes, from a start that learnt Fashion-MNIST."""
    return experiment_from_dict(
        {
            "name": "transfer",
            "task": {"data": "parquet", "root": str(pictures), "val_size": 8},
            "start": {"model": "small_resnet", "method": AT, "task": FASHION, **start},
            "method": RFT,
            "evaluation": {"suite": "clean,pgd", "pgd_steps": 1, "sanity": False},
            "runtime": {"storage": str(storage)},
        }
    )


@pytest.fixture(scope="module")
def finished(local: Local, storage: Path, pictures: Path) -> Report:
    return run(transfer(storage, pictures))


# --- a whole run ---------------------------------------------------------------------------------


def test_the_start_learns_its_own_task_and_gets_a_new_head(
    finished: Report, local: Local, storage: Path, pictures: Path
) -> None:
    (stage, data, fresh), (method, fine, start) = local.trained[:2]
    assert (stage, data, fresh.num_classes) == ("start-at", "fashion_mnist_mini", 10)
    assert (method, fine, start.num_classes) == ("rft", "parquet", 4)
    assert start.fresh_head
    assert start.source == (
        "small_resnet trained by at on fashion_mnist_mini, with a new head for 4 classes"
    )
    # The features are the trained ones and keep their normalisation.
    experiment = transfer(storage, pictures)
    cached = load_result(cache(experiment)).state
    assert start.state is not None
    same = {name for name in cached if torch.equal(cached[name], start.state[name])}
    assert set(cached) - same == {"network.linear.weight", "network.linear.bias"}
    assert start.mean == fresh.mean != task_of(experiment.task).mean


def test_there_is_no_before_where_the_head_is_new(finished: Report, local: Local) -> None:
    directory = finished.directory
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["before"] is None
    assert {"clean", "Linf/pgd"} <= set(summary["after"]["mean"])
    masks = {path.name for path in (directory / "masks").iterdir()}
    assert masks == {"seed-0.parquet", "seed-0.pictures.npz"}
    assert {row.before for row in finished.data.summary} == {None}
    assert "new head for 4 classes" in finished.data.sentence
    page = (directory / "report.html").read_text()
    assert "new head for 4 classes" in page
    metrics = {name for args, _ in local.notes[0].named("log_metrics") for name in args[1]}
    assert not any(name.startswith(("start/", "change/")) for name in metrics)


def test_both_data_sets_are_recorded(finished: Report, local: Local) -> None:
    logged = [kwargs for _, kwargs in local.notes[0].named("log_dataset")]
    assert {(one["name"], one["context"]) for one in logged} == {
        ("parquet", "train"),
        ("parquet", "val"),
        ("parquet", "test"),
        ("fashion_mnist_mini", "start train"),
        ("fashion_mnist_mini", "start val"),
        ("fashion_mnist_mini", "start test"),
    }


def test_the_saved_model_has_the_tasks_classes(finished: Report) -> None:
    start, card = load_model_dir(finished.directory / "model")
    assert start.num_classes == card["num_classes"] == 4
    assert card["class_names"] == [f"stripes {label}" for label in range(4)]
    assert "fashion_mnist_mini" in card["start"]
    assert not start.fresh_head


def test_a_single_run_has_its_cost_in_the_table(finished: Report) -> None:
    (row,) = pq.read_table(finished.directory / "trials.parquet").to_pylist()
    # Two epochs of 32 training images, PGD-1 and two forwards; 8 on val: clean, PGD-1, its answer.
    assert row["passes/forwards"] == 2 * (32 * 3 + 8 * 3)
    assert row["passes/backwards"] == 2 * (32 * 3 + 8 * 1)
    assert (row["status"], row["error"], row["chosen"]) == ("finished", "", True)
    assert row["seconds"] > 0


def test_resume_finds_both_tasks_again(
    finished: Report, local: Local, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    count = len(local.trained)
    monkeypatch.chdir(tmp_path)
    again = resume(finished.directory)
    assert again.summary["after"] == finished.summary["after"]
    # The start comes from the cache.
    assert [stage for stage, *_ in local.trained[count:]] == ["rft"]


def test_a_relative_folder_of_the_starts_data_is_kept(
    storage: Path, pictures: Path, tmp_path: Path
) -> None:
    own = {"data": "parquet", "root": "four", "val_size": 8}
    experiment = run_module.with_absolute_paths(
        transfer(storage, pictures, task=own), pictures.parent
    )
    assert experiment.start.task.root == str(pictures)


def test_the_start_is_shared_by_experiments_on_other_tasks(
    finished: Report, local: Local, storage: Path, pictures: Path
) -> None:
    count = len(local.trained)
    five = write_pictures(pictures.parent / "five", num_classes=5)
    report = run(transfer(storage, five))
    assert report.summary["before"] is None
    ((stage, data, start),) = local.trained[count:]
    assert (stage, data, start.num_classes) == ("rft", "parquet", 5)
    first = local.trained[1][2]
    assert first.state is not None
    assert start.state is not None
    name = "network.conv1.weight"
    assert torch.equal(first.state[name], start.state[name])


# --- the cache -----------------------------------------------------------------------------------


def own_task(experiment: Experiment) -> Task:
    """Return what the start learns."""
    return task_of(experiment.start.task or experiment.task)


def cache(experiment: Experiment) -> Path:
    return outputs.start_cache(experiment, own_task(experiment))


def test_the_cache_is_named_by_what_the_start_learns(storage: Path, pictures: Path) -> None:
    base = transfer(storage, pictures)
    key = cache(base)

    def changed(**start: Any) -> Path:
        return cache(transfer(storage, pictures, **start))

    others = [
        changed(task={**FASHION, "limit_train": 50}),
        changed(task={**FASHION, "threat_models": [{"norm": "Linf", "eps": 0.2}]}),
        changed(seed=1),
        changed(method={**AT, "lr": 0.06}),
        changed(task=None),
    ]
    assert len({key, *others}) == 1 + len(others)
    # What decides nothing of its weights does not name it.
    assert changed(head="fresh") == key
    task = dataclasses.replace(base.start.task, download=True)
    elsewhere = dataclasses.replace(base, start=dataclasses.replace(base.start, task=task))
    assert outputs.start_cache(elsewhere, own_task(base)) == key
    fine_tuned = dataclasses.replace(base, method=dataclasses.replace(base.method, lr=0.1))
    assert cache(fine_tuned) == key
    other_task = dataclasses.replace(base, task=dataclasses.replace(base.task, limit_train=20))
    assert cache(other_task) == key


def test_a_start_on_the_runs_own_task_is_cached_by_that(storage: Path) -> None:
    own = small_experiment(storage)
    explicit = small_experiment(storage, start={"task": experiment_to_dict(own)["task"]})
    assert explicit.start.task == own.task
    assert cache(explicit) == cache(own)


# --- keep or fresh -------------------------------------------------------------------------------


def trained(experiment: Experiment) -> Start:
    """Return the start as if trained, fitted to the task."""
    task, own = task_of(experiment.task), own_task(experiment)
    start = load_or_fresh(experiment, own)
    if start.state is None:
        start = dataclasses.replace(start, state=start.build().state_dict())
    return fit_to_task(experiment, start, task, own)


def test_a_head_is_kept_where_the_classes_have_the_same_names(
    storage: Path, pictures: Path
) -> None:
    same = {"data": "parquet", "root": str(pictures), "val_size": 8}
    for head, fresh in ((None, False), ("keep", False), ("fresh", True)):
        assert trained(transfer(storage, pictures, task=same, head=head)).fresh_head == fresh
        own = small_experiment(storage, start={"head": head})
        assert trained(own).fresh_head == fresh
    # As many classes, but others.
    ten = write_pictures(pictures.parent / "ten", num_classes=10)
    for head, fresh in ((None, True), ("keep", False), ("fresh", True)):
        start = trained(transfer(storage, ten, head=head))
        assert (start.fresh_head, start.num_classes) == (fresh, 10)


def test_a_head_of_other_classes_cannot_be_kept(storage: Path, pictures: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        trained(transfer(storage, pictures, head="keep"))
    assert str(refused.value) == (
        "start.head = keep: the start knows 10 classes, the task (parquet) has 4: "
        "set start.head to fresh"
    )


def test_pictures_of_another_shape_are_refused(storage: Path, pictures: Path) -> None:
    small = write_pictures(pictures.parent / "small", num_classes=4, side=20)
    with pytest.raises(
        ConfigError, match=r"shape \(1, 28, 28\), .* has \(1, 20, 20\): .* image_size"
    ):
        trained(transfer(storage, small))


def test_the_new_head_depends_on_the_starts_seed_and_not_on_its_first_head(
    storage: Path, pictures: Path
) -> None:
    def head(seed: int) -> torch.Tensor:
        start = trained(transfer(storage, pictures, seed=seed))
        return start.build().get_parameter("network.linear.weight")

    assert torch.equal(head(0), head(0))
    assert not torch.equal(head(0), head(1))
    own = small_experiment(storage, start={"head": "fresh"})
    start = trained(own)
    first = dataclasses.replace(start, state=None).build().get_parameter("network.linear.weight")
    assert not torch.equal(start.build().get_parameter("network.linear.weight"), first)


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A model folder of ten classes, whose normalisation is its own."""
    start = Start(
        architecture="small_resnet",
        num_classes=10,
        image_shape=(1, 28, 28),
        mean=(0.1,),
        std=(0.9,),
    )
    save_model(tmp_path / "model", start=start, state=start.build().state_dict(), card={})
    return tmp_path / "model"


def test_a_model_folder_of_other_classes_can_be_a_start(
    storage: Path, pictures: Path, checkpoint: Path
) -> None:
    given = {"checkpoint": str(checkpoint), "method": None, "task": None}
    start = trained(transfer(storage, pictures, **given, head="fresh"))
    assert (start.num_classes, start.mean, start.fresh_head) == (4, (0.1,), True)
    with pytest.raises(ConfigError, match=r"knows 10 classes, .* set start\.head to fresh"):
        trained(transfer(storage, pictures, **given))


def test_a_checkpoint_stands_in_for_training_on_the_starts_task(
    storage: Path, pictures: Path, checkpoint: Path
) -> None:
    """``--start.checkpoint`` beside a preset that trains its start."""
    weights = checkpoint / "model.safetensors"
    for path in (checkpoint, weights):
        start = trained(transfer(storage, pictures, checkpoint=str(path)))
        assert (start.num_classes, start.fresh_head) == (4, True)
        assert start.source == f"{path}, with a new head for 4 classes" or path == checkpoint


def test_a_preset_says_it_in_one_file(storage: Path, pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "transfer.yaml"
    path.write_text(dump_yaml(experiment_to_dict(transfer(storage, pictures))), encoding="utf-8")
    assert load_experiment(path) == transfer(storage, pictures)


def test_a_relative_file_in_a_released_layout_is_found_again(
    storage: Path, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "weights.pt").touch()
    for name, expected in (
        ("robustssl:weights.pt", f"robustssl:{tmp_path / 'weights.pt'}"),
        ("weights.pt", str(tmp_path / "weights.pt")),
        ("robustssl:elsewhere.pt", "robustssl:elsewhere.pt"),
    ):
        experiment = transfer(storage, pictures)
        start = dataclasses.replace(experiment.start, checkpoint=name, method=None)
        experiment = dataclasses.replace(experiment, start=start)
        assert run_module.with_absolute_paths(experiment, tmp_path).start.checkpoint == expected
