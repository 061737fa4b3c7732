"""Whole experiments on an embedded Ray: results, outputs, faults, resuming, data parallelism."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from faults import points_of_run
from small import small_experiment

from robustft.config import to_dict
from robustft.errors import ConfigError, ResourceError
from robustft.models import Start, load_model_dir, save_model
from robustft.runtime.experiment import (
    Experiment,
    dump_yaml,
    experiment_from_dict,
    experiment_to_dict,
)
from robustft.runtime.results import has_result, load_result
from robustft.runtime.run import Report, rank_layers, resume, run

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(storage: Path) -> Report:
    """One undisturbed sweep of four trials, which the tests below read or compare with."""
    return run(small_experiment(storage))


def trial_results(directory: Path) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    """Return trial values (as JSON) -> (result file, weights) of every finished trial."""
    found = {}
    for record in sorted(directory.glob("search/tune/*/checkpoint_*/trial.json")):
        if has_result(record.parent):
            values = json.dumps(json.loads(record.read_text())["values"], sort_keys=True)
            found[values] = (record, dict(load_result(record.parent).state))
    return found


def ends(directory: Path) -> dict[str, float]:
    """Return trial values -> when the trial ended; one that is run again ends later."""
    found = trial_results(directory)
    return {v: json.loads(path.read_text())["ended"] for v, (path, _) in found.items()}


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_sweep_leaves_everything_that_is_promised(finished: Report) -> None:
    directory = finished.directory
    for name in ("config.yaml", "summary.json", "trials.parquet", "curves.parquet", "report.html"):
        assert (directory / name).stat().st_size > 0, name
    assert list(directory.glob("plots/*.png"))
    summary = json.loads((directory / "summary.json").read_text())
    assert summary == json.loads(json.dumps(finished.summary))
    assert set(summary["after"]["mean"]) >= {"clean", "Linf/pgd", "Linf/apgd", "corruptions"}
    assert 0 <= summary["overhead"]["share"] <= 1
    trials = pq.read_table(directory / "trials.parquet").to_pylist()
    assert len(trials) == 4
    assert sum(row["chosen"] for row in trials) == 1
    best = max(trials, key=lambda row: row["val/clean"])
    assert next(row for row in trials if row["chosen"])["val/clean"] == best["val/clean"]
    curves = pq.read_table(directory / "curves.parquet").to_pylist()
    assert {row["alpha"] for row in curves if row["table"] == "interpolation"} == {0.0, 0.5, 1.0}


def test_the_saved_model_is_the_reported_one(finished: Report) -> None:
    start, card = load_model_dir(finished.directory / "model")
    assert start.state is not None
    assert [(threat["norm"], threat["eps"]) for threat in card["threat_models"]] == [("Linf", 0.1)]
    assert card["leaky"] is False
    assert card["metrics"]["test/clean"] == finished.summary["after"]["mean"]["clean"]
    weights = [state for _, state in trial_results(finished.directory).values()]
    assert any(same_weights(dict(start.state), state) for state in weights)


def test_mlflow_has_parent_stages_trials_and_the_registered_model(
    finished: Report, storage: Path
) -> None:
    with sqlite3.connect(storage / "mlflow.db") as database:
        runs = database.execute("SELECT run_uuid, name, status FROM runs").fetchall()
        children = database.execute(
            "SELECT COUNT(*) FROM tags WHERE key = 'mlflow.parentRunId'"
        ).fetchone()[0]
        metrics = {row[0] for row in database.execute("SELECT DISTINCT key FROM metrics")}
        repeated = database.execute(
            "SELECT COUNT(*) FROM (SELECT 1 FROM metrics GROUP BY run_uuid, key, step "
            "HAVING COUNT(*) > 1)"
        ).fetchone()[0]
        registered = database.execute("SELECT COUNT(*) FROM model_versions").fetchone()[0]
        inputs = database.execute("SELECT digest FROM datasets").fetchall()
    assert f"rift {finished.directory.name}" in {name for _, name, _ in runs}
    assert {status for *_, status in runs} == {"FINISHED"}
    assert children >= 5
    assert {"val/clean", "val/robust", "train/loss", "test/clean", "curve/clean"} <= metrics
    assert repeated == 0
    assert any(name.startswith("mrc/") for name in metrics)
    assert registered == 1
    assert inputs


def test_finished_work_is_not_done_again(finished: Report) -> None:
    files = {
        path: path.stat().st_mtime_ns for path, _ in trial_results(finished.directory).values()
    }
    again = resume(finished.directory)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert again.summary["after"] == finished.summary["after"]
    assert again.summary["chosen"] == finished.summary["chosen"]


def test_resume_says_what_a_run_folder_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run folder"):
        resume(tmp_path)


def kill_once(
    name: str, ready: Path, pattern: str, killed: list[int], ended: threading.Event
) -> None:
    """Kill one Ray process called ``name`` as soon as ``pattern`` matches below ``ready``."""
    while not ended.is_set():
        if any(ready.glob(pattern)):
            for process in psutil.Process().children(recursive=True):
                if name in " ".join(process.cmdline()):
                    process.send_signal(signal.SIGKILL)
                    killed.append(process.pid)
                    return
        time.sleep(0.02)


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("workers", "process", "checkpoints"),
    [
        (1, "ray::ImplicitFunc", "search/tune/*/checkpoint_*"),
        (2, "ray::RayTrainWorker", "search/train/*/checkpoint_*"),
    ],
)
def test_a_killed_worker_ends_with_the_undisturbed_weights(
    storage: Path, tmp_path: Path, workers: int, process: str, checkpoints: str
) -> None:
    if (os.cpu_count() or 1) < workers:
        pytest.skip(f"needs {workers} CPUs")

    def experiment(name: str) -> Experiment:
        # Long enough to be killed between its first checkpoint and its end.
        method = {**to_dict(small_experiment(storage).method), "name": "rift", "epochs": 30}
        search = {"space": {"modules": ["mrc-1"], "lr": [0.01]}}
        runtime = {"workers_per_trial": workers}
        return small_experiment(storage, name=name, method=method, search=search, runtime=runtime)

    calm = run(experiment("calm"))
    killed: list[int] = []
    directory = tmp_path / f"disturbed-{workers}"
    ended = threading.Event()
    words = (process, directory, checkpoints, killed, ended)
    killer = threading.Thread(target=kill_once, args=words)
    killer.start()
    try:
        disturbed = run(experiment("disturbed"), run_dir=directory)
    finally:
        ended.set()
        killer.join()
    assert killed
    ((_, calm_state),) = trial_results(calm.directory).values()
    ((_, state),) = trial_results(disturbed.directory).values()
    assert same_weights(calm_state, state)
    assert disturbed.summary["after"] == calm.summary["after"]
    assert points_of_run(directory, storage) == points_of_run(calm.directory, storage)


def test_finished_trials_outlive_the_state_of_their_search(
    finished: Report, tmp_path: Path
) -> None:
    """Tune's own state, cut off in the middle: the trials' results are where they were."""
    directory = tmp_path / "run"
    shutil.copytree(finished.directory, directory)
    before = ends(directory)
    assert len(before) == 4
    (state, *_) = sorted((directory / "search" / "tune").glob("experiment_state-*.json"))[::-1]
    state.write_text(state.read_text()[: state.stat().st_size // 2])
    weights = [
        path for path in (directory / "search/tune").glob("*/checkpoint_*") if has_result(path)
    ]
    # One of them did not end.
    shutil.rmtree(weights[0])
    left = ends(directory)
    report = resume(directory)
    after = ends(directory)
    assert len(left) == 3
    assert left.items() <= after.items()
    assert after.keys() == before.keys()
    assert report.summary["after"] == finished.summary["after"]
    assert not report.summary["failed_trials"]


@pytest.mark.cluster
def test_a_killed_driver_resumes_without_repeating_trials(
    finished: Report, storage: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "killed"
    config = tmp_path / "small.yaml"
    config.write_text(dump_yaml(experiment_to_dict(small_experiment(storage))))
    script = (
        "import sys; from robustft.runtime.experiment import load_experiment as load; "
        "from robustft.runtime.run import run; run(load(sys.argv[1]), run_dir=sys.argv[2])"
    )
    # One trial at a time, so that some are finished and some are not when the driver dies.
    config.write_text(config.read_text().replace("max_concurrent: null", "max_concurrent: 1"))
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(
            [sys.executable, "-c", script, str(config), str(directory)], stdout=log, stderr=log
        )
        try:
            deadline = time.monotonic() + 240
            while not trial_results(directory) and time.monotonic() < deadline:
                assert driver.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.05)
        finally:
            tree = [driver, *psutil.Process(driver.pid).children(recursive=True)]
            driver.send_signal(signal.SIGKILL)
            driver.wait()
    psutil.wait_procs(tree[1:], timeout=30)
    before = ends(directory)
    assert 1 <= len(before) < 4
    report = resume(directory)
    after = trial_results(directory)
    assert len(after) == 4
    assert before.items() <= ends(directory).items()
    undisturbed = trial_results(finished.directory)
    assert all(same_weights(after[values][1], undisturbed[values][1]) for values in undisturbed)
    assert report.summary["after"] == finished.summary["after"]
    assert points_of_run(directory, storage) == points_of_run(finished.directory, storage)


@pytest.mark.cluster
def test_two_workers_per_trial_equal_one(finished: Report, storage: Path) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two CPUs")
    space = {"modules": ["mrc-1"], "lr": [0.01]}
    parallel = run(
        small_experiment(
            storage,
            name="parallel",
            search={"space": space},
            runtime={"workers_per_trial": 2},
        )
    )
    values = json.dumps({"lr": 0.01, "modules": "mrc-1"}, sort_keys=True)
    _, alone = trial_results(finished.directory)[values]
    _, together = trial_results(parallel.directory)[values]
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.cluster
def test_a_diverging_trial_is_marked_and_the_sweep_goes_on(storage: Path) -> None:
    space = {"modules": ["all"], "lr": [1e30, 0.001]}
    report = run(small_experiment(storage, name="diverging", search={"space": space}))
    rows = pq.read_table(report.directory / "trials.parquet").to_pylist()
    by_lr = {row["lr"]: row for row in rows}
    assert "lower" in by_lr[1e30]["error"] or "loss" in by_lr[1e30]["error"]
    assert by_lr[0.001]["chosen"]
    assert not by_lr[1e30]["chosen"]


@pytest.mark.cluster
def test_what_a_stopped_trial_has_cost_is_in_the_table(storage: Path, tmp_path: Path) -> None:
    shape = {"image_shape": (1, 28, 28), "mean": (0.286,), "std": (0.353,)}
    start = Start(architecture="small_resnet", num_classes=10, **shape)  # type: ignore[arg-type]
    save_model(tmp_path / "model", start=start, state=start.build().state_dict(), card={})
    attack = {"num_steps": 1, "step_size": 0.05}
    # The second trial learns nothing, and comes to ASHA's first rung after the first.
    space = {"lr": [0.05, 1e-12], "optimizer.weight_decay": [0.0]}
    experiment = experiment_from_dict(
        {
            "name": "asha",
            "task": {"val_size": 100, "limit_train": 200, "limit_test": 50},
            "start": {"model": "small_resnet", "checkpoint": str(tmp_path / "model")},
            "method": {
                "name": "rft",
                "variant": "at",
                "epochs": 3,
                "batch_size": 20,
                "schedule": {"name": "constant"},
                "attack": attack,
                "val_attack": attack,
            },
            "search": {"space": space, "scheduler": "asha", "max_concurrent": 1},
            "evaluation": {"suite": "clean", "sanity": False},
            "runtime": {"storage": str(storage)},
        }
    )
    report = run(experiment)
    for again in (report, resume(report.directory)):
        rows = pq.read_table(again.directory / "trials.parquet").to_pylist()
        assert [row["status"] for row in rows] == ["finished", "stopped"]
        assert [row["chosen"] for row in rows] == [True, False]
        assert [row["error"] for row in rows] == ["", ""]
        assert [row["optimizer.weight_decay"] for row in rows] == [0.0, 0.0]
        # An epoch: 200 images by PGD-1 and the update, 100 by a clean forward, PGD-1, its answer.
        assert [row["passes/forwards"] for row in rows] == [3 * 700, 700]
        assert [row["passes/backwards"] for row in rows] == [3 * 500, 500]
        assert rows[0]["val/clean"] > rows[1]["val/clean"] > 0
        assert rows[0]["seconds"] > rows[1]["seconds"] > 0
        assert again.summary["stopped_trials"] == [rows[1]["trial"]]
        assert again.summary["failed_trials"] == {}
    with sqlite3.connect(storage / "mlflow.db") as database:
        statuses = database.execute(
            "SELECT r.status FROM runs r JOIN tags t ON r.run_uuid = t.run_uuid "
            "WHERE t.key = 'stopped' AND t.value = 'true'"
        ).fetchall()
    assert statuses == [("FINISHED",)]


def test_more_workers_than_the_cluster_has_are_refused(storage: Path) -> None:
    experiment = small_experiment(storage, runtime={"workers_per_trial": 999})
    with pytest.raises(ResourceError, match="999 workers"):
        run(experiment)


@pytest.mark.cluster
def test_an_unreachable_mlflow_does_not_stop_a_run(storage: Path, tmp_path: Path) -> None:
    experiment = small_experiment(
        storage,
        search={"space": {}},
        runtime={"tracking_uri": "http://127.0.0.1:9", "storage": str(tmp_path)},
    )
    report = run(experiment)
    assert report.summary["after"]["mean"]["clean"] > 0
    assert any(report.directory.glob("tracking/*.jsonl"))


def test_ranking_layers_fans_out_and_equals_the_local_ranking(storage: Path) -> None:
    rows = rank_layers(small_experiment(storage))
    values = [row["criticality"] for row in rows]
    assert values == sorted(values)
    assert min(values) >= 0
    assert len({row["layer"] for row in rows}) == len(rows) > 5
