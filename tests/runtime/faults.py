"""For tests of faults: the tiniest search, what it leaves in MLflow, and finding its processes."""

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from test_faults import MARK, Command

from robustft.models import Start, save_model
from robustft.runtime.experiment import dump_yaml, experiment_from_dict, experiment_to_dict

PATIENCE = 600.0
"""Seconds after which a step that should have come is given up; quiet machines need a tenth."""

TIMES = ("overhead", "seconds")
"""Metrics that tell how long something took: the only ones in which two runs may differ."""

CHECKPOINTS = "search/tune/*/checkpoint_*/state.pt"
"""Of running trials, below the run's folder."""


def write_tiny(folder: Path, *, search: bool = True, **runtime: Any) -> str:
    """Write an experiment of a minute at most and the model that it starts from; return its path.

    Args:
        folder: gets the model, the experiment's file and, below "runs", the runs.
        search: False: one training by Ray Train instead of two trials by Ray Tune.
        runtime: fields of the section.
    """
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    shape = {"image_shape": (1, 28, 28), "mean": (0.286,), "std": (0.353,)}
    start = Start(architecture="small_resnet", num_classes=10, **shape)  # type: ignore[arg-type]
    save_model(folder / "start", start=start, state=start.build().state_dict(), card={})
    attack = {"num_steps": 1, "step_size": 0.05}
    experiment = experiment_from_dict(
        {
            "name": "tiny",
            "task": {"val_size": 100, "limit_train": 200, "limit_test": 60},
            "start": {"model": "small_resnet", "checkpoint": str(folder / "start")},
            "method": {
                "name": "rft",
                "variant": "at",
                "epochs": 8,
                "lr": 0.05,
                "batch_size": 50,
                "schedule": {"name": "constant"},
                "attack": attack,
                "val_attack": attack,
            },
            "search": {"space": {"lr": [0.05, 0.01]} if search else {}},
            "evaluation": {"suite": "clean", "sanity": False, "shard_size": 30},
            "runtime": {"storage": str(folder / "runs"), "cpus_per_worker": 1, **runtime},
        }
    )
    path = folder / "tiny.yaml"
    path.write_text(dump_yaml(experiment_to_dict(experiment)), encoding="utf-8")
    return str(path)


def run_folder(folder: Path) -> Path:
    """Return the one run below ``folder``, as soon as it is there."""
    wait_until(lambda: any(folder.glob("runs/tiny/*/run.json")), "the run's folder")
    (path,) = (folder / "runs" / "tiny").iterdir()
    return path


def wait_until(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what}: never came"
        time.sleep(0.05)


def processes(run: Command, name: str) -> Iterator[psutil.Process]:
    """Yield the processes of ``run`` whose command line contains ``name``, and no others."""
    for process in psutil.process_iter():
        try:
            ours = process.environ().get(MARK) == run.mark
            if ours and name in " ".join(process.cmdline()):
                yield process
        except psutil.Error:  # ended meanwhile, or not ours to look at
            continue


def summary(folder: Path) -> dict[str, Any]:
    """Return what the run below ``folder`` has found, without times."""
    values = json.loads((run_folder(folder) / "summary.json").read_text())
    assert values["failed_trials"] == {}
    return {name: values[name] for name in ("chosen", "before", "after", "num_trials")}


Point = tuple[str, str, int, float]
"""Name of the MLflow run, key, step, value."""


def points(folder: Path) -> Counter[Point]:
    """Return every metric in MLflow -> how often it is there; the experiment must be one run."""
    with sqlite3.connect(folder / "runs" / "mlflow.db") as database:
        runs = database.execute("SELECT run_uuid, name, status FROM runs").fetchall()
        tagged = "SELECT run_uuid FROM tags WHERE key = 'mlflow.parentRunId'"
        children = {uuid for (uuid,) in database.execute(tagged)}
        rows = database.execute(
            "SELECT run_uuid, key, step, value FROM metrics WHERE NOT is_nan"
        ).fetchall()
    assert {status for *_, status in runs} == {"FINISHED"}, runs
    names = {uuid: name if uuid in children else "experiment" for uuid, name, _ in runs}
    assert len(set(names.values())) == len(runs), f"a run is there twice: {runs}"
    found = [(names[uuid], key, step, value) for uuid, key, step, value in rows]
    return Counter(point for point in found if not point[1].startswith(TIMES))
