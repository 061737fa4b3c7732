"""The tracker against real MLflow stores: SQLite, a server that goes away, and none at all."""

import dataclasses
import errno
import json
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded import best_rate, made_evaluation, record_run, recorded_experiment, small_task
from serving import PATIENCE, closed_port, served, until

from robustft.errors import ConfigError, ResourceError, RunError
from robustft.evaluation.suites import SUITES, EvaluationConfig
from robustft.methods import METHODS
from robustft.runtime.experiment import experiment_from_dict, load_experiment
from robustft.runtime.mlflow_store import LOCAL_ID_TAG, MlflowStore, clean_key
from robustft.runtime.registry import ALIASES, Score, best_version, score_tags, settle_aliases
from robustft.runtime.spool import Progress, Spool, mask
from robustft.runtime.tracking import Backoff, Tracker, default_uri, replay
from robustft.runtime.ui import serve_ui
from robustft.runtime.vocabulary import headline, is_known_metric, parameters, user_tags
from robustft.threat import ThreatModel

pytestmark = [
    # SQLAlchemy 2.1 deprecates a loader that MLflow 3.17 uses.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

QUICK = Backoff(first=0.05, longest=0.1)

Open = Callable[..., Tracker]


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty SQLite store: creating its schema takes seconds, copying it nothing."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    code = "import sys; from mlflow import MlflowClient; MlflowClient('sqlite:///' + sys.argv[1])"
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    subprocess.run([sys.executable, "-c", code, path], check=True, env=environment)
    return path


@pytest.fixture
def storage(new_store: Path, tmp_path: Path) -> Path:
    """A storage root, with a space in its name, that holds an empty store."""
    root = tmp_path / "all runs"
    root.mkdir()
    shutil.copy(new_store, root / "mlflow.db")
    return root


@pytest.fixture
def open_tracker(storage: Path) -> Iterator[Open]:
    trackers: list[Tracker] = []

    def open_(directory: Path, **options: Any) -> Tracker:
        options = {"experiment": "sweep", "storage": storage, "backoff": QUICK} | options
        trackers.append(Tracker(directory, **options))
        return trackers[-1]

    yield open_
    for tracker in trackers:
        tracker.close(timeout=5)


def client(storage: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{storage}/mlflow.db")


def runs_by_name(mlflow: Any) -> dict[str, Any]:
    """All runs; fails if a name occurs twice, which in these tests means a duplicate."""
    experiments = [e.experiment_id for e in mlflow.search_experiments()]
    runs = mlflow.search_runs(experiments)
    assert len({run.info.run_name for run in runs}) == len(runs)
    return {run.info.run_name: run for run in runs}


def write_model(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(b"weights")
    (directory / "card.json").write_text('{"method": "rift"}')
    return directory


def log_small_experiment(tracker: Tracker, directory: Path) -> tuple[str, str]:
    """A parent with a trial, and one of everything."""
    parent = tracker.start_run(
        "rift sweep", key="experiment", params={"method": {"lr": 0.01, "layers": ["a", "b"]}}
    )
    trial = tracker.start_run(
        "trial 0", key="trial/0", parent=parent, params={"layer": "conv2"}, tags={"seed": 7}
    )
    for epoch in range(1, 4):
        tracker.log_metrics(trial, {"train/loss": 1 / epoch, "val/clean": 0.5}, step=epoch)
    tracker.log_metrics(trial, {"mrc/conv=1": math.nan, "val/worst": math.inf}, step=0)
    tracker.log_params(trial, {"bn_mode": "frozen"})
    tracker.set_tags(trial, {"chosen": True})
    for context in ("train", "test"):
        tracker.log_dataset(
            parent, name="mini", digest="d" * 64, context=context, source="embedded", num_rows=6000
        )
    plot = directory / "plots" / "curve.png"
    plot.parent.mkdir(parents=True, exist_ok=True)
    plot.write_bytes(b"png")
    tracker.log_artifact(parent, plot, folder="plots")
    model = write_model(directory / "model")
    tracker.log_model(
        parent,
        model,
        name="mini/rift",
        tags={"threat": "Linf 8/255", "leaky": False},
        metrics={"test/clean": 0.9},
    )
    tracker.finish_run(trial)
    tracker.finish_run(parent)
    return parent, trial


def check_small_experiment(storage: Path) -> None:
    mlflow = client(storage)
    runs = runs_by_name(mlflow)
    assert set(runs) == {"rift sweep", "trial 0"}
    parent, trial = runs["rift sweep"], runs["trial 0"]
    assert trial.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.params == {"method.lr": "0.01", "method.layers": '["a", "b"]'}
    assert trial.data.params == {"layer": "conv2", "bn_mode": "frozen"}
    assert trial.data.tags["seed"] == "7"
    assert trial.data.tags["chosen"] == "true"
    history = mlflow.get_metric_history(trial.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert math.isnan(trial.data.metrics["mrc/conv_1"])
    assert math.isnan(trial.data.metrics["val/worst"])
    assert {run.info.status for run in runs.values()} == {"FINISHED"}

    (dataset,) = (d for d in parent.inputs.dataset_inputs if d.dataset.name == "mini/train")
    assert len(parent.inputs.dataset_inputs) == 2
    assert (dataset.dataset.name, dataset.dataset.digest) == ("mini/train", "d" * 12)
    assert json.loads(dataset.dataset.profile) == {"num_rows": 6000}
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "train")]
    (plot,) = mlflow.list_artifacts(parent.info.run_id, "plots")
    assert plot.path == "plots/curve.png"

    (model,) = mlflow.search_logged_models([parent.info.experiment_id])
    assert (model.name, str(model.status)) == ("mini-rift", "READY")
    assert model.source_run_id == parent.info.run_id
    assert model.params == {"threat": "Linf 8/255", "leaky": "false"}
    assert [(metric.key, metric.value) for metric in model.metrics] == [("test/clean", 0.9)]
    (version,) = mlflow.search_model_versions("name = 'mini-rift'")
    assert version.tags["threat"] == "Linf 8/255"
    assert version.tags["leaky"] == "false"
    assert mlflow.get_model_version_by_alias("mini-rift", "newest").version == version.version
    files = {file.path for file in mlflow.list_logged_model_artifacts(model.model_id)}
    assert files == {"MLmodel", "card.json", "model.safetensors"}


def test_everything_arrives(storage: Path, open_tracker: Open, tmp_path: Path) -> None:
    directory = storage / "sweep" / "1"
    tracker = open_tracker(directory)
    parent, _ = log_small_experiment(tracker, directory)
    assert tracker.flush(PATIENCE)
    assert not tracker.degraded
    check_small_experiment(storage)
    page = tracker.run_url(parent)
    assert page is not None
    assert runs_by_name(client(storage))["rift sweep"].info.run_id in page
    # Artifacts lie beside the database, wherever the process was started.
    assert (storage / "mlflow-artifacts").is_dir()


def test_more_metrics_than_one_request_holds(storage: Path, open_tracker: Open) -> None:
    tracker = open_tracker(storage / "sweep" / "1")
    run = tracker.start_run("many", key="many")
    values = {f"layer/{i}": float(i) for i in range(1203)}
    tracker.log_metrics(run, values, step=1)
    tracker.log_params(run, {f"p{i}": "x" * 7000 for i in range(101)})
    assert tracker.flush(PATIENCE)
    data = runs_by_name(client(storage))["many"].data
    assert data.metrics == values
    assert len(data.params) == 101
    assert data.params["p100"].endswith("x...")


def test_absent_server_then_sync(
    storage: Path, open_tracker: Open, caplog: pytest.LogCaptureFixture
) -> None:
    directory = storage / "sweep" / "1"
    with closed_port() as port:
        tracker = open_tracker(directory, tracking_uri=f"http://127.0.0.1:{port}")
        parent, _ = log_small_experiment(tracker, directory)
        assert not tracker.flush(PATIENCE)
        assert not tracker.flush(PATIENCE)
        assert tracker.degraded
        assert tracker.run_url(parent) is None
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    with pytest.raises(RunError, match="another process"):
        replay(directory, tracking_uri=default_uri(storage))
    tracker.close(timeout=5)
    assert "robustft sync" in caplog.messages[-1]

    moved = storage / "sweep" / "moved"
    directory.rename(moved)
    assert replay(moved, tracking_uri=default_uri(storage)).records > 10
    check_small_experiment(storage)
    assert replay(moved, tracking_uri=default_uri(storage)).records == 0


def test_replay_after_lost_progress_duplicates_nothing(storage: Path, open_tracker: Open) -> None:
    """The worst crash: MLflow has everything and the file that says so is gone."""
    directory = storage / "sweep" / "1"
    tracker = open_tracker(directory)
    log_small_experiment(tracker, directory)
    tracker.close(PATIENCE)
    (progress,) = directory.glob("tracking/replayed-*.json")
    progress.write_text("{")
    assert replay(directory).records > 10
    check_small_experiment(storage)


def unsent(open_tracker: Open, directory: Path, port: int) -> None:
    """Leave the records of a small experiment of which MLflow has none."""
    tracker = open_tracker(directory, tracking_uri=f"http://127.0.0.1:{port}")
    log_small_experiment(tracker, directory)
    assert not tracker.flush(PATIENCE)
    tracker.close(timeout=5)


def test_a_chunk_is_marked_once_and_sent_again_after_a_kill(
    storage: Path, open_tracker: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the last record and the mark: MLflow has all, the file says nothing of it."""
    directory = storage / "sweep" / "1"
    with closed_port() as port:
        unsent(open_tracker, directory, port)
    saved: list[int] = []
    save = Progress.save

    class Killed(BaseException):
        pass

    def killed(self: Progress) -> None:
        saved.append(self.offset)
        raise Killed

    def counted(self: Progress) -> None:
        saved.append(self.offset)
        save(self)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "save", killed)
        with pytest.raises(Killed):
            replay(directory, tracking_uri=default_uri(storage))
    check_small_experiment(storage)
    monkeypatch.setattr(Progress, "save", counted)
    records = replay(directory, tracking_uri=default_uri(storage)).records
    assert records > 10
    check_small_experiment(storage)
    size = (directory / "tracking" / "records.jsonl").stat().st_size
    assert saved == [size, size]


def test_what_was_sent_before_a_failure_is_marked(
    storage: Path, open_tracker: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = storage / "sweep" / "1"
    with closed_port() as port:
        unsent(open_tracker, directory, port)
    sent: list[str] = []
    apply = MlflowStore._apply

    def failing(self: MlflowStore, record: Any) -> None:
        if record["kind"] == "artifact":
            raise ConnectionError("away")
        sent.append(record["kind"])
        apply(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowStore, "_apply", failing)
        with pytest.raises(RunError, match="away"):
            replay(directory, tracking_uri=default_uri(storage))
    assert sent.count("start") == 2
    lines = (directory / "tracking" / "records.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    left = len(kinds) - kinds.index("artifact")
    assert replay(directory, tracking_uri=default_uri(storage)).records == left
    check_small_experiment(storage)


def test_resume_returns_to_the_same_runs(storage: Path, open_tracker: Open) -> None:
    directory = storage / "sweep" / "1"
    first = open_tracker(directory)
    parent, trial = log_small_experiment(first, directory)
    first.close(PATIENCE)

    second = open_tracker(directory)
    assert second.start_run("rift sweep", key="experiment") == parent
    assert second.start_run("trial 0", key="trial/0", parent=parent) == trial
    assert second.start_run("trial 1", key="trial/1", parent=parent) not in (parent, trial)
    second.log_metrics(trial, {"val/clean": 0.6}, step=4)
    assert second.flush(PATIENCE)
    runs = runs_by_name(client(storage))
    assert set(runs) == {"rift sweep", "trial 0", "trial 1"}
    assert {run.info.status for run in runs.values()} == {"RUNNING"}
    assert runs["trial 0"].data.metrics["val/clean"] == 0.6
    second.finish_run(trial, "FAILED")
    assert second.flush(PATIENCE)
    assert runs_by_name(client(storage))["trial 0"].info.status == "FAILED"


def test_a_value_that_is_reported_again_after_a_kill_is_one_point(
    storage: Path, open_tracker: Open
) -> None:
    directory = storage / "sweep" / "1"
    first = open_tracker(directory)
    run = first.start_run("trial 0", key="trial/0")
    first.log_metrics(run, {"val/clean": 0.5, "loss": float("nan")}, step=1)
    first.close(PATIENCE)

    second = open_tracker(directory)
    assert second.start_run("trial 0", key="trial/0") == run
    second.log_metrics(run, {"val/clean": 0.5, "loss": float("nan"), "lr": 0.1}, step=1)
    second.log_metrics(run, {"val/clean": 0.5}, step=2)
    second.log_metrics(run, {"val/clean": 0.75}, step=2)
    assert second.flush(PATIENCE)
    mlflow = client(storage)
    (found,) = runs_by_name(mlflow).values()
    history = mlflow.get_metric_history(found.info.run_id, "val/clean")
    # Another value at the same step is news, the same one is not.
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 0.5), (2, 0.75)]
    assert len(mlflow.get_metric_history(found.info.run_id, "loss")) == 1
    assert found.data.metrics["lr"] == 0.1


def test_same_key_in_another_directory_is_another_run(storage: Path, open_tracker: Open) -> None:
    runs = {
        open_tracker(storage / "sweep" / str(i)).start_run(f"run {i}", key="experiment")
        for i in range(2)
    }
    assert len(runs) == 2


def test_torn_and_damaged_lines(
    storage: Path, open_tracker: Open, caplog: pytest.LogCaptureFixture
) -> None:
    directory = storage / "sweep" / "1"
    first = open_tracker(directory)
    run = first.start_run("torn", key="torn")
    first.log_metrics(run, {"a": 1.0}, step=1)
    first.close(PATIENCE)
    records = directory / "tracking" / "records.jsonl"
    with records.open("a") as file:
        file.write('{"kind": "metrics", "run": "x\x00garbage\n{"kind": "metr')

    second = open_tracker(directory)
    assert second.start_run("torn", key="torn") == run
    second.log_metrics(run, {"a": 2.0}, step=2)
    assert second.flush(PATIENCE)
    assert records.read_text().endswith('"values": {"a": 2.0}}\n')
    assert "incomplete last record" in caplog.text
    assert "damaged record" in caplog.text
    run_id = runs_by_name(client(storage))["torn"].info.run_id
    history = client(storage).get_metric_history(run_id, "a")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 2.0)]


def test_another_or_a_new_store_gets_everything(
    storage: Path, new_store: Path, open_tracker: Open
) -> None:
    directory = storage / "sweep" / "1"
    first = open_tracker(directory)
    log_small_experiment(first, directory)
    first.close(PATIENCE)
    other = storage / "elsewhere"
    other.mkdir()
    shutil.copy(new_store, other / "mlflow.db")
    assert replay(directory, tracking_uri=default_uri(other)).records > 10
    check_small_experiment(other)

    mlflow = client(storage)
    old = mlflow.get_experiment_by_name("sweep").experiment_id
    mlflow.rename_experiment(old, "old sweep")
    replay(directory)
    new = mlflow.get_experiment_by_name("sweep").experiment_id
    names = [run.info.run_name for run in mlflow.search_runs([new])]
    assert sorted(names) == ["rift sweep", "trial 0"]


def test_refused_record_does_not_block_the_rest(
    storage: Path, open_tracker: Open, caplog: pytest.LogCaptureFixture
) -> None:
    directory = storage / "sweep" / "1"
    tracker = open_tracker(directory)
    run = tracker.start_run("run", key="run", params={"lr": 1})
    assert tracker.flush(PATIENCE)
    tracker.log_params(run, {"lr": 2})
    tracker.log_metrics(run, {"after": 1.0}, step=1)
    assert tracker.flush(PATIENCE)
    assert not tracker.degraded
    data = runs_by_name(client(storage))["run"].data
    assert (data.params["lr"], data.metrics["after"]) == ("1", 1.0)
    refused = (directory / "tracking" / "refused.jsonl").read_text().splitlines()
    assert [json.loads(line)["record"]["values"] for line in refused] == [{"lr": "2"}]
    assert "MLflow refused a params record" in caplog.text


def test_mlflow_that_cannot_be_imported(
    storage: Path,
    open_tracker: Open,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mlflow", None)
        tracker = open_tracker(storage / "sweep" / "1")
        run = tracker.start_run("run", key="run")
        assert not tracker.flush(PATIENCE)
        assert tracker.degraded
    tracker.finish_run(run)
    until(lambda: not tracker.degraded)  # without being asked: the thread tries again by itself
    assert tracker.flush(PATIENCE)
    assert runs_by_name(client(storage))["run"].info.status == "FINISHED"
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 2
    assert "does not answer" in warnings[0]
    assert "answers again" in warnings[1]


def test_credentials_are_neither_kept_nor_shown(
    storage: Path, open_tracker: Open, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    directory = storage / "sweep" / "1"
    with closed_port() as port:
        uri = f"http://me:hunter2@127.0.0.1:{port}"
        tracker = open_tracker(directory, tracking_uri=uri)
        tracker.start_run("run", key="run", params={"source": "s3://k:hunter2@bucket/x"})
        assert not tracker.flush(PATIENCE)
        assert tracker.uri == f"http://***@127.0.0.1:{port}"
        tracker.close(timeout=5)
        with pytest.raises(RunError, match="nothing is lost") as raised:
            replay(directory, tracking_uri=uri)
    assert "hunter2" not in str(raised.value)
    assert "hunter2" not in "".join(r.getMessage() for r in caplog.records if r.thread)
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert files
    assert all(b"hunter2" not in path.read_bytes() for path in files)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        replay(directory)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("postgresql+psycopg://u:p@h:1/d", "postgresql+psycopg://***@h:1/d"),
        ("error at https://token@h/x: refused", "error at https://***@h/x: refused"),
        ("https://h/x?a=1&password=p&b=2", "https://h/x?a=1&password=***&b=2"),
        ("mail me@example.org", "mail me@example.org"),
    ],
)
def test_mask(text: str, shown: str) -> None:
    assert mask(text) == shown


@pytest.mark.parametrize(
    ("key", "clean"),
    [
        ("test/clean", "test/clean"),
        ("corr=0.5(x)", "corr_0.5_x_"),
        ("/a//../b", "a/b"),
        ("..", "_"),
        ("k" * 300, "k" * 250),
    ],
)
def test_clean_key(key: str, clean: str) -> None:
    assert clean_key(key) == clean


def test_full_disk_leaves_whole_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path, header={"experiment": "sweep", "uri": "sqlite:////x.db"})
    before = spool.size
    written: list[int] = []

    def write_half(file: int, data: memoryview) -> int:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(len(data) // 2)
        return real_write(file, bytes(data[: len(data) // 2]))

    real_write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_half)
        with pytest.raises(ResourceError, match="No space left"):
            spool.append({"kind": "metrics", "run": "a"})
    assert written
    spool.append({"kind": "tags", "run": "b"})
    assert [record["run"] for record, _ in spool.read(before)] == ["b"]
    spool.close()


def test_misuse_has_clear_answers(storage: Path, open_tracker: Open, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no tracking records"):
        replay(tmp_path / "nothing")
    tracker = open_tracker(storage / "sweep" / "1")
    with pytest.raises(ConfigError, match="what start_run returned"):
        tracker.log_metrics("other", {"a": 1.0}, step=0)
    run = tracker.start_run("run", key="run")
    with pytest.raises(ConfigError, match="no such file"):
        tracker.log_artifact(run, tmp_path / "missing.png")
    with pytest.raises(RunError, match="another process"):
        open_tracker(storage / "sweep" / "1")
    with pytest.raises(ConfigError, match="first"):
        Backoff(first=0.0)


def test_default_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///here.db")
    assert default_uri(tmp_path) == f"sqlite:///{tmp_path}/here.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert default_uri(tmp_path) == "http://server:5000"
    with pytest.raises(ConfigError, match="http://server:5000"):
        serve_ui(tmp_path)


@pytest.mark.parametrize("module", ["tracking", "mlflow_store", "ui"])
def test_importing_the_tracker_does_not_import_mlflow(module: str) -> None:
    code = f"import sys, robustft.runtime.{module}; assert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ui_needs_a_store_and_a_free_port(storage: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run something first"):
        serve_ui(tmp_path / "nothing")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ResourceError, match="another port"):
            serve_ui(storage, port=taken.getsockname()[1])


def test_server_that_goes_away_and_comes_back(
    storage: Path, open_tracker: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """``serve_ui`` is the server here: that it starts, answers and stops is tested with it."""
    directory = storage / "sweep" / "1"
    with closed_port() as port:
        pass
    uri = f"http://127.0.0.1:{port}"
    with served(storage, port):
        tracker = open_tracker(directory, tracking_uri=uri)
        run = tracker.start_run("run", key="run")
        tracker.log_metrics(run, {"loss": 1.0}, step=1)
        assert tracker.flush(PATIENCE)
        page = tracker.run_url(run)
        assert page is not None
        assert page.startswith(f"{uri}/#/experiments/")
    tracker.log_metrics(run, {"loss": 0.5}, step=2)
    model = write_model(directory / "model")
    tracker.log_model(run, model, name="final", tags={}, metrics={"test/clean": 0.9})
    assert not tracker.flush(PATIENCE)
    assert tracker.degraded
    with served(storage, port):
        tracker.finish_run(run)
        until(lambda: tracker.flush(PATIENCE))
        assert not tracker.degraded
        tracker.close(PATIENCE)
    mlflow = client(storage)
    (found,) = mlflow.search_runs([e.experiment_id for e in mlflow.search_experiments()])
    assert found.info.status == "FINISHED"
    assert found.data.tags[LOCAL_ID_TAG] == run
    history = mlflow.get_metric_history(found.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5)]
    (version,) = mlflow.search_model_versions("name = 'final'")
    assert version.run_id == found.info.run_id
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 2


# --- one vocabulary ------------------------------------------------------------------------------

PRESETS = sorted((Path(__file__).resolve().parents[2] / "experiments" / "presets").glob("*.yaml"))
IMAGE_METHODS = [name for name, method in METHODS.items() if "images" in method.kinds]


def spooled(storage: Path, record: Callable[[Tracker, Path], Any]) -> list[dict[str, Any]]:
    """Return what ``record`` tells a tracker that has no MLflow."""
    directory = storage / "compare" / "20260301-100000"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mlflow", None)
        tracker = Tracker(directory, experiment="compare", storage=storage)
        record(tracker, directory)
        tracker.close(timeout=5)
    lines = (directory / "tracking" / "records.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def metric_names(records: list[dict[str, Any]]) -> set[str]:
    names = {name for r in records if r["kind"] == "metrics" for name in r["values"]}
    return names | {name for r in records if r["kind"] == "model" for name in r["metrics"]}


@pytest.mark.parametrize("method", IMAGE_METHODS)
def test_runs_of_all_methods_use_the_same_names(tmp_path: Path, method: str) -> None:
    experiment = recorded_experiment(tmp_path, method)

    def record(tracker: Tracker, directory: Path) -> None:
        record_run(experiment, directory, tracker=tracker, numbers=(0.8, 0.6))

    records = spooled(tmp_path, record)
    names = metric_names(records)
    assert [name for name in names if not is_known_metric(name)] == []
    assert {"train/loss", "epoch/val/clean", "val/clean", "val/robust"} <= names
    assert {"test/clean", "test/Linf/pgd", "test/Linf/apgd", "test/robust"} <= names
    parent, *trials = (r for r in records if r["kind"] == "start")
    shared = {"method", "method.epochs", "method.batch_size", "task.data", "task.eps.Linf"}
    assert shared | {"start.model", "evaluation.suite", "search.lr"} <= set(parent["params"])
    # A search has no learning rate before it has chosen one.
    assert "method.lr" not in parent["params"]
    chosen = {k: v for r in records if r["kind"] == "params" for k, v in r["values"].items()}
    assert float(chosen["method.lr"]) == [0.001, 0.01, 0.03][best_rate(method)]
    for trial in trials:
        assert shared <= set(trial["params"])
        assert trial["params"]["method"] == trial["tags"]["method"] == method
        assert trial["name"].startswith(f"{method} lr=")
        assert trial["tags"]["kind"] == "trial"
        assert trial["tags"]["run_id"] == parent["tags"]["run_id"] == "20260301-100000"
        assert not [name for name in trial["tags"] if name.startswith("mlflow.")]


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_declares_is_in_the_vocabulary(name: str) -> None:
    method = METHODS[name]
    assert "val/clean" in method.metrics
    assert [n for n in headline(dict.fromkeys(method.metrics, 0.0)) if not is_known_metric(n)] == []


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("mode", ["per_norm", "union_only"])
@pytest.mark.parametrize("norms", [["Linf"], ["Linf", "L2", "L1"]])
def test_every_suite_of_measurements_is_in_the_vocabulary(
    tmp_path: Path, suite: str, mode: Any, norms: list[Any]
) -> None:
    experiment = recorded_experiment(tmp_path, "at")
    threats = tuple(ThreatModel(norm, 0.1) for norm in norms)
    task = dataclasses.replace(small_task(experiment), threat_models=threats)
    try:
        config = EvaluationConfig(suite=suite, mode=mode)
        found = made_evaluation(
            config, task, clean=0.8, robust=0.5, draw=np.random.default_rng(0)
        ).metrics
    except ConfigError:
        assert mode == "union_only" or len(norms) > 1  # not every attack knows every norm
        return
    names = [f"test/{name}" for name in found if not name.startswith("corruption/")]
    assert "test/clean" in names
    assert [name for name in names if not is_known_metric(name)] == []


@pytest.mark.parametrize(
    "name",
    ["test/linf/apgd", "test/clean_acc2", "val/accuracy", "val/robust/x", "clean", "Test/clean"],
)
def test_other_spellings_are_not(name: str) -> None:
    assert not is_known_metric(name)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_parameters_are_short_flat_and_clean(path: Path) -> None:
    found = parameters(load_experiment(path))
    assert found["method"]
    for name, value in found.items():
        assert clean_key(name) == name
        assert isinstance(value, (bool, int, float)) or 0 < len(value) <= 250
        assert not isinstance(value, str) or not value.startswith(("{", "["))
        assert value != "None"


def test_parameters_of_an_experiment() -> None:
    experiment = experiment_from_dict(
        {
            "name": "x",
            "task": {
                "data": "fashion_mnist_mini",
                "root": "/somewhere",
                "threat_models": [{"norm": "Linf", "eps": 0.1}, {"norm": "L2", "eps": 1.0}],
            },
            "method": {"name": "at", "schedule": {"name": "constant"}},
            "search": {"space": {"optimizer.weight_decay": [0.0, 0.0005], "lr": [0.1]}},
        }
    )
    found = parameters(experiment)
    assert (found["task.eps.Linf"], found["task.eps.L2"]) == (0.1, 1.0)
    assert found["method"] == "at"
    assert found["method.schedule"] == "constant"
    assert found["search.optimizer.weight_decay"] == "0, 0.0005"
    assert found["search.lr"] == "0.1"
    absent = {"task.root", "method.lr", "method.optimizer.weight_decay", "method.name"}
    assert not absent & set(found)


def test_tags_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTFT_TAGS", "comparison=table 1, owner=me")
    assert user_tags() == {"comparison": "table 1", "owner": "me"}
    experiment = recorded_experiment(tmp_path, "at")

    def record(tracker: Tracker, directory: Path) -> None:
        tags = {"comparison": "overruled", "figure": "3"}
        record_run(experiment, directory, tracker=tracker, numbers=(0.8, 0.6), tags=tags)

    started = [r["tags"] for r in spooled(tmp_path, record) if r["kind"] == "start"]
    assert len(started) == 4
    for tags in started:
        assert (tags["comparison"], tags["owner"], tags["figure"]) == ("table 1", "me", "3")


@pytest.mark.parametrize("text", ["comparison", "=x", "method=rift", "mlflow.user=me"])
def test_tags_that_cannot_be_taken(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTFT_TAGS", text)
    with pytest.raises(ConfigError, match=r"the tag|write name=value"):
        user_tags()


def test_a_finished_run_leaves_tables_and_a_description(tmp_path: Path) -> None:
    experiment = recorded_experiment(tmp_path, "rift")

    def record(tracker: Tracker, directory: Path) -> None:
        record_run(experiment, directory, tracker=tracker, numbers=(0.8, 0.6))

    records = spooled(tmp_path, record)
    tags = {k: v for r in records if r["kind"] == "tags" for k, v in r["values"].items()}
    assert "| clean | 0." in tags["mlflow.note.content"]
    shown = json.loads(tags["mlflow.loggedArtifacts"])
    folder = tmp_path / "compare" / "20260301-100000"
    assert "tables" in {r["path"] for r in records if r["kind"] == "artifact"}
    values = {k: v for r in records if r["kind"] == "model" for k, v in r["metrics"].items()}
    for one in shown:
        table = json.loads((folder / one["path"]).read_text())
        assert all(len(row) == len(table["columns"]) for row in table["data"])
        if one["path"].endswith("results.json"):
            rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
            result = {row["metric"]: row["result"] for row in rows}
            assert result["clean"] == values["test/clean"]
            for row in rows:
                assert row["change"] == pytest.approx(row["result"] - row["start"])
    # Three trials and their learning rates.
    assert [row[table["columns"].index("lr")] for row in table["data"]] == [0.001, 0.01, 0.03]


# --- aliases -------------------------------------------------------------------------------------


class Registry:
    """One registered model, as ``settle_aliases`` sees it; ``before_write`` is somebody else."""

    def __init__(self) -> None:
        self.tags: dict[int, dict[str, str]] = {}
        self.aliases: dict[str, str] = {}
        self.before_write: list[Callable[[], None]] = []
        self.moves = 0

    def register(self, clean: float, measure: str = "val") -> int:
        number = len(self.tags) + 1
        self.tags[number] = score_tags({"val/clean": Score(clean, measure)})
        return number

    def search_model_versions(self, _: str, page_token: str | None = None) -> list[Any]:
        return [types.SimpleNamespace(version=n, tags=dict(t)) for n, t in self.tags.items()]

    def get_registered_model(self, _: str) -> Any:
        return types.SimpleNamespace(aliases=dict(self.aliases))

    def set_registered_model_alias(self, _: str, alias: str, version: str) -> None:
        if self.before_write:
            self.before_write.pop()()
        self.aliases[alias] = version
        self.moves += 1

    def set_model_version_tag(self, _: str, version: str, key: str, value: str) -> None:
        self.tags[int(version)][key] = value


def test_an_alias_moves_only_to_a_better_version() -> None:
    registry = Registry()
    for clean, holder in [(0.5, "1"), (0.4, "1"), (0.5, "1"), (0.6, "4"), (math.nan, "4")]:
        settle_aliases(registry, "m", registry.register(clean))
        assert registry.aliases == {"best-clean": holder}
    assert registry.moves == 2


@pytest.mark.parametrize("ours", [0.5, 0.7])
def test_concurrent_runs_leave_the_alias_at_the_best(ours: float) -> None:
    """Another run registers and moves the alias between our comparison and our move."""
    registry = Registry()
    settle_aliases(registry, "m", registry.register(0.1))

    def other() -> None:
        settle_aliases(registry, "m", registry.register(0.6))

    registry.before_write = [other]
    settle_aliases(registry, "m", registry.register(ours))
    assert registry.aliases["best-clean"] == ("3" if ours < 0.6 else "2")
    assert not registry.before_write


def test_values_measured_in_another_way_are_not_compared(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = Registry()
    settle_aliases(registry, "m", registry.register(0.5, "PGD-10"))
    settle_aliases(registry, "m", registry.register(0.9, "PGD-2"))
    assert registry.aliases == {"best-clean": "1"}
    assert "version 1" in registry.tags[2]["best-clean.note"]
    assert "not compared" in caplog.text
    settle_aliases(registry, "m", registry.register(0.6, "PGD-10"))
    assert registry.aliases == {"best-clean": "3"}
    assert best_version(registry.tags, "val/clean", "PGD-2") == 2


def test_aliases_in_mlflow_survive_outages_and_replays(storage: Path, open_tracker: Open) -> None:
    def log(number: int, clean: float, uri: str | None = None) -> Path:
        directory = storage / "sweep" / str(number)
        tracker = open_tracker(directory, tracking_uri=uri)
        run = tracker.start_run(f"run {number}", key="experiment")
        tracker.log_model(
            run,
            write_model(directory / "model"),
            name="at",
            registered="robustft-mini-Linf-0.1",
            tags={},
            metrics={"test/clean": 1 - clean},  # test must not matter
            scores={name: Score(clean, "100 images") for name in ALIASES.values()},
        )
        tracker.close(PATIENCE if uri is None else 5)
        return directory

    first = log(1, 0.5)
    with closed_port() as port:
        away = log(2, 0.9, f"http://127.0.0.1:{port}")
    log(3, 0.4)
    mlflow = client(storage)
    model = "robustft-mini-Linf-0.1"
    expected = {"newest": "2", **dict.fromkeys(ALIASES, "1")}
    assert {k: str(v) for k, v in mlflow.get_registered_model(model).aliases.items()} == expected
    replay(away, tracking_uri=default_uri(storage))
    for path in first.glob("tracking/replayed-*.json"):
        path.unlink()
    replay(first)
    found = mlflow.get_registered_model(model).aliases
    assert {str(found[alias]) for alias in ALIASES} == {"3"}
    assert len(mlflow.search_model_versions(f"name = '{model}'")) == 3
    best = mlflow.get_model_version_by_alias(model, "best-robust")
    assert (best.tags["val/robust"], best.tags["val/robust.measure"]) == ("0.9", "100 images")
