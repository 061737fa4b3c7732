"""A run read from its folder says what it said when it was written; other folders are refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustft.data import Split, Task
from robustft.data.text import TextTask
from robustft.errors import ConfigError, DataError
from robustft.evaluation import plots
from robustft.evaluation.outcome import Evaluation, Strip
from robustft.evaluation.report import ReportData, write_report
from robustft.evaluation.text_outcome import TextEvaluation
from robustft.methods import Result
from robustft.models import Start
from robustft.runtime import outputs, stored_runs
from robustft.runtime.events import Clock
from robustft.runtime.experiment import Experiment, experiment_from_dict, experiment_to_dict
from robustft.runtime.jsonfile import write_json
from robustft.runtime.search import Trial
from robustft.runtime.stored_runs import (
    StoredRun,
    compared_run,
    load_run,
    load_strips,
    save_strips,
    stored_report_data,
    write_reports,
)

N = 60
COMMAND = "robustft search toy"


def experiment(**changes: Any) -> Experiment:
    values = {
        "name": "toy",
        "task": {"data": "fashion_mnist_mini"},
        "method": {"name": "rift", "tolerance": 0.01},
        "search": {"space": {"lr": [0.1, 0.01], "seed": [0, 1]}, "metric": "val/clean"},
        "evaluation": {"suite": "quick", "pgd_steps": 3, "limit": N},
    }
    return experiment_from_dict({**values, **changes})


def task() -> Task:
    def split(size: int, first: int) -> Split:
        images = np.zeros((size, 1, 28, 28), dtype=np.uint8)
        return Split(images, np.zeros(size, dtype=np.int64), np.arange(first, first + size))

    names = tuple(f"class {index}" for index in range(10))
    splits = {"train": split(300, 0), "val": split(100, 300), "test": split(N, 1000)}
    threats = experiment().task.threat_models
    return Task("fashion_mnist_mini", splits, names, threats, (0.3,), (0.3,), "digest")


def strips() -> list[Strip]:
    picture = np.random.default_rng(0).random((2, 1, 28, 28), dtype=np.float32)
    return [
        Strip(
            norm="Linf",
            eps=0.1,
            ids=np.arange(2),
            labels=np.arange(2),
            predicted=np.arange(2) + 1,
            clean=picture,
            adversarial=np.clip(picture + 0.1, 0, 1),
            attacks=["pgd", "apgd"],
        )
    ]


def evaluation(clean: int, robust: int) -> Evaluation:
    places = np.arange(N)
    return Evaluation(
        split="test",
        masks={"clean": places < clean, "Linf/pgd": places < robust},
        ids=places + 1000,
        settings={
            **dataclasses.asdict(experiment().evaluation),
            "corruptions": "generated",
            "threat_models": ["Linf 0.1"],
            "eps": {"Linf": 0.1},
        },
        num_forwards=600,
        num_backwards=60,
        strips=strips(),
    )


def trial(lr: float, seed: int, clean: float, *, chosen: bool) -> Trial:
    metrics = {"val/clean": clean, "val/robust": 0.5, "passes/forwards": 1000.0 + seed}
    rows = [{"epoch": 1, "train/loss": 1.5}, {"epoch": 2, "train/loss": 1.0, "val/clean": clean}]
    curve = [{"alpha": a, "clean": clean - 0.1 * a, "robust": 0.5 - 0.1 * a} for a in (0.0, 1.0)]
    tables = {"epochs": rows, "interpolation": curve}
    if chosen:
        tables["criticality"] = [
            {"layer": name, "index": i, "criticality": 0.5 + i, "accuracy_drop": 1.0 + i}
            for i, name in enumerate(("conv1", "linear"))
        ]
    return Trial(
        label=f"lr={lr} seed={seed}",
        values={"lr": lr, "seed": seed},
        result=Result(
            state={},
            metrics=metrics,
            choices={"layer": "conv1", "alpha": 0.0, "leaky": False},
            tables=tables,
        ),
        seconds=10.0 + seed,
    )


def write_run(directory: Path) -> ReportData:
    """Write what a run leaves, with the functions that a run uses, and return what it showed."""
    (directory / "masks").mkdir(parents=True)
    (directory / "model").mkdir()
    (directory / "tracking").mkdir()
    this = experiment()
    stopped = Trial(
        label="lr=0.1 seed=1",
        values={"lr": 0.1, "seed": 1},
        result=None,
        error="RuntimeError: no luck",
        reported={"val/clean": 0.2, "passes/forwards": 10.0},
        seconds=1.0,
    )
    chosen = [trial(0.01, 0, 0.8, chosen=True), trial(0.01, 1, 0.9, chosen=True)]
    start = Start(
        architecture="small_resnet",
        num_classes=10,
        image_shape=(1, 28, 28),
        mean=(0.3,),
        std=(0.3,),
        source="small_resnet trained by at",
    )
    found = outputs.Found(
        task=task(),
        start=start,
        start_result=Result(state={}, metrics={}, tables={"epochs": [{"epoch": 1, "lr": 0.1}]}),
        trials=[trial(0.1, 0, 0.7, chosen=False), stopped, *chosen],
        chosen=chosen,
        before=evaluation(40, 20),
        after=[evaluation(41, 22), evaluation(45, 18)],
        model_dir=directory / "model",
    )
    clock = Clock(began=0.0)
    clock.stages = lambda: {"start-up": 2.0, "search": 30.0}  # type: ignore[method-assign]
    clock.overhead = lambda now=None: (40.0, 0.25)  # type: ignore[method-assign]
    named = {"start": found.before, "seed-0": found.after[0], "seed-1": found.after[1]}
    for name, one in named.items():
        assert one is not None
        one.save(directory / "masks" / f"{name}.parquet")
    card = outputs.card(this, found.task, start, found.results[1], found.after[1])
    about = {"architecture": "small_resnet", "num_classes": 10, "image_shape": [1, 28, 28]}
    write_json(directory / "model" / "card.json", {**about, **card})
    record = {"experiment": experiment_to_dict(this), "command": COMMAND}
    write_json(directory / "run.json", record)
    lines = [
        {"kind": "dataset", "digest": digest, "context": context, "num_rows": rows}
        for digest, context, rows in (
            ("digest", "train", 300),
            ("digest", "val", 100),
            ("digest", "test", N),
            ("digest", "start test", 7),
            ("other", "test", 8),
        )
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "tracking" / "records.jsonl").write_text(text, encoding="utf-8")
    _, data, _ = outputs.write(this, directory, found, clock, command=COMMAND, tracking_url=None)
    return data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReportData]:
    directory = tmp_path_factory.mktemp("runs") / "toy" / "20260101-000000-abcdef"
    return directory, write_run(directory)


@pytest.fixture
def folder(written: tuple[Path, ReportData], tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(written[0], tmp_path / "toy" / written[0].name))


@pytest.fixture(scope="module")
def stored(written: tuple[Path, ReportData]) -> StoredRun:
    return load_run(written[0])


def test_the_page_made_again_shows_the_same(
    written: tuple[Path, ReportData], stored: StoredRun
) -> None:
    data = dataclasses.replace(stored_report_data(stored), created="")
    before = dataclasses.replace(written[1], created="")
    for field in dataclasses.fields(ReportData):
        assert getattr(data, field.name) == getattr(before, field.name), field.name


def test_a_run_is_read_whole(stored: StoredRun) -> None:
    assert stored.name == "toy/20260101-000000-abcdef"
    assert list(stored.after) == ["0", "1"]
    assert stored.best == "1"
    assert stored.command == COMMAND
    assert stored.split_sizes == {"train": 300, "val": 100, "test": N}
    assert stored.before is not None
    assert stored.before.metrics["clean"] == 40 / N
    assert stored.after["1"].metrics["clean"] == 45 / N


def test_costs_are_those_of_the_chosen_and_of_all_trials(stored: StoredRun) -> None:
    run = compared_run(stored, "mine")
    assert run.name == "mine"
    assert run.cost.forwards == 1000.5
    assert run.cost.backwards is None
    assert run.cost.seconds == 10.5
    # The failed trial has counted its 10, too.
    assert run.cost.all_forwards == 1000 + 10 + 1000 + 1001
    assert run.cost.all_seconds == 10 + 1 + 10 + 11
    assert run.cost.num_trials == 4
    assert run.cost.wall_seconds == 40.0
    assert run.data_digest == "digest"


def test_a_total_that_a_trial_has_not_counted_is_unknown(stored: StoredRun) -> None:
    rows = [dict(row) for row in stored.trials]
    rows[0]["passes/forwards"] = None
    cost = compared_run(dataclasses.replace(stored, trials=rows)).cost
    assert cost.all_forwards is None
    assert cost.forwards == 1000.5


def test_sizes_that_nothing_tells_are_not_shown(stored: StoredRun) -> None:
    data = stored_report_data(dataclasses.replace(stored, split_sizes={}))
    assert data.selection_split == "the val split"
    assert data.report_split == "the test split"
    assert "(0" not in data.sentence


def test_pictures_are_not_thrown_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(directory: Path, data: ReportData, *, further: object) -> Path:
        assert further == []
        path = directory / "report.html"
        path.write_text(data.title, encoding="utf-8")
        return path

    # The other page, whose figures take most of the time, is looked at elsewhere.
    monkeypatch.setattr(stored_runs, "write_report", quick)
    page = folder / "evaluation" / "report.html"
    before = page.read_text(encoding="utf-8")
    assert "What the attacks changed" in before
    assert set(write_reports(load_run(folder))) == {"report"}
    assert page.read_text(encoding="utf-8") == before
    assert "evaluation" in write_reports(load_run(folder), without_pictures=True)
    assert "What the attacks changed" not in page.read_text(encoding="utf-8")
    # With stored pictures the page is whole again, those of the saved model's seed.
    save_strips(folder / "masks" / "seed-1.pictures.npz", strips())
    assert "evaluation" in write_reports(load_run(folder))
    assert page.read_text(encoding="utf-8") == before


def test_pictures_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "pictures.npz"
    save_strips(path, strips())
    for one, other in zip(load_strips(path), strips(), strict=True):
        for field in dataclasses.fields(Strip):
            read, made = getattr(one, field.name), getattr(other, field.name)
            assert np.array_equal(read, made), field.name
            assert getattr(read, "dtype", None) == getattr(made, "dtype", None)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="holds no pictures"):
        load_strips(path)


def test_a_task_of_text_says_sentences(stored: StoredRun) -> None:
    from robustft.runtime.stored_runs import _task
    from robustft.runtime.text_runs import units

    text = TextEvaluation(
        split="test",
        ids=np.arange(3),
        masks={"clean": np.array([True, True, False])},
        fixed={},
        settings={},
        num_forwards=3,
        num_backwards=0,
    )
    found = _task(dataclasses.replace(stored, after={"0": text}))
    assert isinstance(found, TextTask)
    assert units(found) == "sentences"


def test_text_and_images_are_told_apart_by_their_files(folder: Path) -> None:
    text = TextEvaluation(
        split="test",
        ids=np.arange(3),
        masks={"clean": np.array([True, True, False])},
        fixed={},
        settings={},
        num_forwards=3,
        num_backwards=0,
    )
    text.save(folder / "masks" / "seed-1.parquet")
    found = load_run(folder)
    assert isinstance(found.after["1"], TextEvaluation)
    assert isinstance(found.after["0"], Evaluation)


def configured(stored: StoredRun, **changes: Any) -> StoredRun:
    """Return the run as if it had been of another configuration, from a trained start."""
    values = {**experiment_to_dict(experiment()), "start": {"checkpoint": "x"}, "search": {}}
    config = experiment_to_dict(experiment_from_dict({**values, **changes}))
    return dataclasses.replace(stored, record={**stored.record, "experiment": config})


@pytest.mark.parametrize(
    ("changes", "points"),
    [
        ({}, 1),  # of the method itself, RiFT
        ({"method": {"name": "at"}}, 0),
        ({"method": {"name": "at"}, "interpolate": {"tolerance": 0.02}}, 2),
        (
            {
                "method": {
                    "name": "fine-tune",
                    "mode": "wise-ft",
                    "interpolate": {"tolerance": 0.03},
                }
            },
            3,
        ),
    ],
)
def test_what_the_line_may_cost_is_what_chose_on_it(
    changes: dict[str, Any], points: float, stored: StoredRun
) -> None:
    data = stored_report_data(configured(stored, **changes))
    assert 100 * data.tolerance == pytest.approx(points)


def test_the_figure_of_the_trials_says_the_tolerance(
    folder: Path, stored: StoredRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    shaded: list[tuple[float, str]] = []
    monkeypatch.setattr(
        plots, "shade_below", lambda axes, level, text: shaded.append((level, text))
    )
    run = configured(stored, method={"name": "at"}, interpolate={"tolerance": 0.02})
    write_report(folder, stored_report_data(run))
    # The start keeps half of val, from which the tolerance is counted.
    levels = {text: level for level, text in shaded}
    assert levels["tolerance: start - 2 points"] == pytest.approx(48.0)


@pytest.mark.parametrize(
    ("missing", "error", "sentence"),
    [
        ("summary.json", ConfigError, "is not finished: finish it with robustft resume"),
        ("run.json", ConfigError, "is no run folder"),
        ("masks/seed-1.parquet", DataError, "seed-1.parquet holds no saved evaluation"),
        ("trials.parquet", DataError, "trials.parquet is missing or damaged"),
        ("model/card.json", DataError, "card.json is missing or damaged"),
    ],
)
def test_unfinished_and_damaged_runs_are_refused(
    folder: Path, missing: str, error: type[Exception], sentence: str
) -> None:
    (folder / missing).unlink()
    with pytest.raises(error, match=sentence):
        load_run(folder)


def test_a_damaged_file_is_named(folder: Path) -> None:
    (folder / "summary.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"summary\.json is missing or damaged"):
        load_run(folder)
    (folder / "summary.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="lacks 'chosen'"):
        load_run(folder)


def test_a_summary_leads_to_no_file_outside_its_run(folder: Path) -> None:
    path = folder / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    seeds = summary["after"]["seeds"]
    outside = ["../../elsewhere", *list(seeds)[1:]]
    summary["after"]["seeds"] = (
        dict(zip(outside, seeds.values(), strict=True)) if isinstance(seeds, dict) else outside
    )
    path.write_text(json.dumps(summary), encoding="utf-8")
    with pytest.raises(DataError, match=r"names the seed '\.\./\.\./elsewhere'"):
        load_run(folder)


def test_foreign_folders_are_named_for_what_they_are(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no run folder \(no run.json\)"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is a part of a run: give"):
        load_run(folder / "model")
    with pytest.raises(ConfigError, match="holds 1 runs: name one of them"):
        load_run(folder.parent)
    output = tmp_path / "eval"
    output.mkdir()
    (output / "evaluation.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="is the output of robustft evaluate, not a run"):
        load_run(output)


def test_a_lost_spool_is_no_error(folder: Path) -> None:
    """Of runs that did not store the sizes of their splits yet, the spool knows them."""
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    del summary["split_sizes"]
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    records = folder / "tracking" / "records.jsonl"
    records.write_text(records.read_text("utf-8") + '{"kind": "dataset", "dig', encoding="utf-8")
    assert load_run(folder).split_sizes["val"] == 100
    records.unlink()
    assert load_run(folder).split_sizes == {}
