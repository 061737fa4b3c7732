"""Runs of several methods in MLflow, made by the real tracking code and without any training.

The numbers are invented, of the size that the embedded data give; each method trades clean against
robust accuracy in its own way, so that plots of them look like plots.
"""

import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from robustft.data.base import Split, Task
from robustft.evaluation import Evaluation
from robustft.evaluation.suites import EvaluationConfig, attack_stages, measures
from robustft.methods import METHODS, Result
from robustft.models import Start
from robustft.runtime import outputs, recording
from robustft.runtime.events import Clock
from robustft.runtime.experiment import (
    Experiment,
    experiment_from_dict,
    experiment_to_dict,
    with_values,
)
from robustft.runtime.jsonfile import write_json
from robustft.runtime.search import Trial, trial_label
from robustft.runtime.tracking import Tracker

NUM_EPOCHS = 6
NUM_TEST = 400

METHOD_NUMBERS = {
    "at": (0.842, 0.612),
    "trades": (0.828, 0.631),
    "rift": (0.868, 0.622),
    "twins": (0.856, 0.628),
    "autolora": (0.861, 0.634),
}
"""Method -> (clean, robust) that its best trial reaches."""


def recorded_experiment(
    storage: Path, method: str, *, name: str = "compare", space: Mapping[str, Any] | None = None
) -> Experiment:
    """Return an experiment on the embedded data, with a search over learning rates."""
    epochs = {"epochs": NUM_EPOCHS} if "text" not in METHODS[method].kinds else {}
    values: dict[str, Any] = {
        "name": name,
        "task": {"data": "fashion_mnist_mini", "val_size": 600},
        "start": {"model": "small_resnet", "method": {"name": "at", "epochs": NUM_EPOCHS}},
        "method": {"name": method, **epochs},
        "search": {"space": {"lr": [0.001, 0.01, 0.03]} if space is None else dict(space)},
        "evaluation": {"suite": "report"},
        "runtime": {"storage": str(storage)},
    }
    if not METHODS[method].needs_start:
        del values["start"]["method"]
    return experiment_from_dict(values)


def small_task(experiment: Experiment) -> Task:
    """Return a task of blank pictures under the experiment's names."""
    splits = {
        name: Split(
            images=np.zeros((size, 1, 2, 2), np.uint8),
            labels=np.arange(size, dtype=np.int64) % 10,
            ids=np.arange(size, dtype=np.int64),
        )
        for name, size in {"train": 20, "val": 600, "test": NUM_TEST}.items()
    }
    return Task(
        name=experiment.task.data,
        splits=splits,
        class_names=tuple(f"class {index}" for index in range(10)),
        threat_models=experiment.task.threat_models,
        mean=(0.5,),
        std=(0.5,),
        digest="3fa2b1c9" * 8,
        selection=experiment.task.selection,
    )


def made_evaluation(
    config: EvaluationConfig, task: Task, *, clean: float, robust: float, draw: Any
) -> Evaluation:
    """Return an evaluation with the masks that ``config`` asks for, and such accuracies."""
    measured = measures(config.suite)
    right = draw.random(NUM_TEST) < clean
    masks = {"clean": right}
    standing = right.copy()
    for stage in attack_stages(config, task.threat_models):
        for attack in stage:
            standing = standing & (draw.random(NUM_TEST) < (robust / clean) ** 0.4)
            masks[attack.mask] = standing
    if "corruptions" in measured:
        for kind in ("gaussian_noise", "fog"):
            masks[f"corruption/{kind}/3"] = right & (draw.random(NUM_TEST) < 0.85)
    return Evaluation(
        split="test",
        masks=masks,
        ids=np.arange(NUM_TEST),
        settings={},
        num_forwards=1000,
        num_backwards=900,
    )


def record_run(
    experiment: Experiment,
    directory: Path,
    *,
    tracker: Tracker,
    numbers: tuple[float, float],
    tags: Mapping[str, str] | None = None,
) -> str:
    """Tell MLflow of a whole run, as ``run`` would; return the parent's local id."""
    name = recording.method_name(experiment.method)
    task, draw = small_task(experiment), np.random.default_rng(zlib.crc32(directory.name.encode()))
    start = Start(
        architecture="small_resnet",
        num_classes=10,
        image_shape=(1, 28, 28),
        mean=(0.5,),
        std=(0.5,),
        source="small_resnet trained by at",
    )
    _write_files(experiment, directory)
    parent = recording.start_parent(tracker, experiment, directory, tags=tags)
    listener = recording.TrackingListener(tracker, parent)
    recording.log_data(tracker, parent, experiment, task, task)
    trials = _trials(experiment, listener, name, numbers, draw)
    chosen = max(trials, key=lambda trial: trial.metrics["val/clean"])
    assert chosen.result is not None
    if experiment.search.space:
        recording.log_trials(tracker, parent, trials)
    else:
        recording.log_stage(tracker, parent, name, chosen.result)
    clean, robust = (chosen.metrics.get(f"val/{name}", 0.5) for name in ("clean", "robust"))
    found = outputs.Found(
        task=task,
        start=start,
        start_result=None,
        trials=trials,
        chosen=[chosen],
        before=made_evaluation(experiment.evaluation, task, clean=0.83, robust=0.6, draw=draw),
        after=[
            made_evaluation(
                experiment.evaluation, task, clean=clean - 0.01, robust=robust - 0.02, draw=draw
            )
        ],
        model_dir=directory / "model",
    )
    card = outputs.card(experiment, task, start, chosen.result, found.after[0])
    write_json(directory / "model" / "card.json", card)
    clock = Clock(0.0)
    summary = outputs.summarize(experiment, directory, found, clock)
    summary["seconds"]["wall"], summary["overhead"]["share"] = 60 + 100 * draw.random(), 0.02
    write_json(directory / "summary.json", summary)
    for table, rows in {"trials": outputs.trial_rows(found), "curves": [{"epoch": 1}]}.items():
        outputs.write_rows(directory / f"{table}.parquet", rows)
    recording.log_finished(tracker, parent, directory, found, summary)
    tracker.finish_run(parent)
    return parent


def record_comparison(storage: Path, methods: Sequence[str] = tuple(METHOD_NUMBERS)) -> None:
    """Record one searched run of each method, all tagged ``comparison = table 1``."""
    for index, method in enumerate(methods):
        experiment = recorded_experiment(storage, method)
        directory = storage / experiment.name / f"20260301-10{index:02d}00"
        tracker = Tracker(directory, experiment=experiment.name, storage=storage)
        record_run(
            experiment,
            directory,
            tracker=tracker,
            numbers=METHOD_NUMBERS[method],
            tags={"comparison": "table 1"},
        )
        tracker.close(timeout=300)
        assert not list(directory.glob("tracking/refused.jsonl"))


def best_rate(method: str) -> int:
    """Return which of the learning rates is the best one for a method."""
    return (len(method) + 1) % 3


def _trials(
    experiment: Experiment, listener: Any, name: str, numbers: tuple[float, float], draw: Any
) -> list[Trial]:
    rates = experiment.search.space.get("lr", [None])
    trials = []
    for index, rate in enumerate(rates):
        values = {} if rate is None else {"lr": rate}
        config = with_values(experiment.method, values)
        label = trial_label(values) or name
        event = {"stage": "search", "run": label} if values else {"stage": name, "run": ""}
        if values:
            listener({"kind": "begin", **event, "values": values})
        clean = numbers[0] - 0.012 * (index - best_rate(name)) ** 2
        robust = numbers[1] - 0.02 * index
        epochs = []
        for epoch in range(1, NUM_EPOCHS + 1):
            share = 1 - 0.6**epoch
            row = {
                "train/loss": 1.9 - 1.1 * share + 0.02 * draw.random(),
                "train/robust": robust * share + 0.02,
                "val/clean": clean * share,
                "val/robust": robust * share,
                "lr": 0.1 / epoch,
            }
            epochs.append({"epoch": epoch, **row})
            listener({"kind": "metrics", **event, "metrics": row, "step": epoch})
        declared = METHODS[name].metrics
        metrics = dict.fromkeys(declared, 0.1) | {"val/clean": clean}
        if "val/robust" in declared:
            metrics["val/robust"] = robust
        metrics |= {one: 3e5 for one in declared if one.startswith("passes/")}
        result = Result(
            state={},
            metrics=metrics,
            choices={"epoch": NUM_EPOCHS, "lr": getattr(config, "lr", 0.0)},
            tables={"epochs": epochs},
        )
        if values:
            listener({"kind": "end", **event, "metrics": metrics, "error": ""})
        trials.append(Trial(label=label, values=values, result=result, seconds=12.0))
    return trials


def _write_files(experiment: Experiment, directory: Path) -> None:
    for folder in ("model", "plots", "evaluation"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    values = experiment_to_dict(experiment)
    write_json(directory / "run.json", {"experiment": values})
    (directory / "config.yaml").write_text("name: compare\n")
    (directory / "report.html").write_text("<p>report</p>")
    (directory / "evaluation" / "report.html").write_text("<p>evaluation</p>")
    (directory / "model" / "model.safetensors").write_bytes(b"weights")
    pixels = io.BytesIO()
    Image.fromarray(np.tile(np.arange(160, dtype=np.uint8), (90, 1))).save(pixels, "PNG")
    (directory / "plots" / "trade_off.png").write_bytes(pixels.getvalue())
