"""Preflight: every kind of mistake is found, named with its remedy, and nothing else is."""

import dataclasses
import http.server
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from small import write_pictures

from robustft.data import load_task
from robustft.errors import RobustftError
from robustft.methods.adversarial import ATConfig
from robustft.models import Start, save_model
from robustft.runtime import preflight
from robustft.runtime import search as search_module
from robustft.runtime.experiment import Experiment, experiment_from_dict, load_experiment
from robustft.runtime.preflight import Finding, refuse, validate
from robustft.runtime.run import run

AT = {"name": "at", "epochs": 1}
RFT = {"name": "rft", "epochs": 1}


def experiment(**changes: Any) -> Experiment:
    values: dict[str, Any] = {
        "name": "mine",
        "start": {"method": AT},
        "method": {"name": "rift"},
        "task": {"limit_train": 20, "limit_val": 20, "limit_test": 20},
    }
    return experiment_from_dict({**values, **changes})


def texts(found: list[Finding], level: str = "error") -> str:
    return "\n".join(finding.text for finding in found if finding.level == level)


def test_a_good_experiment_has_no_findings(tmp_path: Path) -> None:
    storage = tmp_path / "not" / "there" / "yet"
    good = experiment(runtime={"storage": str(storage)})
    assert validate(good) == []
    assert not storage.exists()
    assert list(tmp_path.iterdir()) == []


def test_the_embedded_presets_are_ready_to_run() -> None:
    for name in ("at-embedded", "multinorm-embedded", "rift-embedded", "trades-embedded"):
        assert texts(validate(load_experiment(name))) == ""


def test_data_that_is_not_there_is_asked_for(tmp_path: Path) -> None:
    found = validate(experiment(task={"data": "cifar10", "root": str(tmp_path)}))
    assert "put cifar-10-python.tar.gz" in texts(found)
    assert str(tmp_path) in texts(found)


def test_an_unknown_architecture_is_named() -> None:
    found = validate(experiment(start={"model": "resnet81", "method": AT}))
    assert "'resnet81': did you mean 'resnet18'" in texts(found)


def test_fine_tuning_needs_a_start() -> None:
    found = validate(experiment(start={"model": "small_resnet"}))
    assert "give start.checkpoint, or start.method" in texts(found)
    assert texts(validate(experiment(start={"model": "small_resnet"}, method=AT))) == ""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey pictures of 28 x 28 in four classes."""
    return write_pictures(tmp_path_factory.mktemp("data") / "four", num_classes=4)


def transfer(pictures: Path, task: dict[str, Any] | None = None, **changes: Any) -> Experiment:
    """Return rft on ``pictures`` from a start that learns Fashion-MNIST."""
    own = {"limit_train": 20, "limit_val": 20, "limit_test": 20, **(task or {})}
    start = {"method": AT, "task": own, **changes.pop("start", {})}
    data = {"data": "parquet", "root": str(pictures), "val_size": 8}
    return experiment(**{"task": data, "start": start, "method": RFT, **changes})


def test_a_start_may_learn_another_task(pictures: Path) -> None:
    assert validate(transfer(pictures)) == []
    assert validate(transfer(pictures, start={"head": "fresh"})) == []


def test_both_tasks_must_fit_together(pictures: Path, tmp_path: Path) -> None:
    missing = validate(transfer(pictures, task={"data": "cifar10", "root": str(tmp_path)}))
    assert "put cifar-10-python.tar.gz" in texts(missing)
    kept = validate(transfer(pictures, start={"head": "keep"}))
    assert "knows 10 classes, the task (parquet) has 4" in texts(kept)
    other = write_pictures(tmp_path / "small", num_classes=4, side=20)
    assert "set image_size of either task" in texts(validate(transfer(other)))
    bad = {"threat_models": [{"norm": "L1", "eps": 1}]}
    assert "does not support norm 'L1'" in texts(validate(transfer(pictures, task=bad)))
    grey = {"threat_models": [{"norm": "Linf", "eps": 0.6}]}
    assert "same grey" in texts(validate(transfer(pictures, task=grey)), "warning")


def test_layers_cannot_be_ranked_under_a_new_head(pictures: Path) -> None:
    found = texts(validate(transfer(pictures, method={"name": "rift"})))
    assert "rift looks for the layers" in found
    same = experiment(start={"method": AT, "head": "fresh"})
    assert "which a new head makes meaningless" in texts(validate(same))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"interpolate": {"curve_runs": 1}}, "interpolate goes back .* leave interpolate out"),
        (
            {"method": {"name": "fine-tune", "mode": "wise-ft"}},
            "wise-ft' goes back .* another mode",
        ),
        (
            {"method": {"name": "fine-tune"}, "search": {"space": {"mode": ["full", "wise-ft"]}}},
            "wise-ft' goes back .* another mode",
        ),
    ],
)
def test_nothing_goes_back_to_a_start_that_gets_a_new_head(
    pictures: Path, changes: dict[str, Any], sentence: str
) -> None:
    """Found before the start is trained, not when the method's worker begins."""
    found = texts(validate(transfer(pictures, **changes)))
    assert re.search(sentence, found), found
    # The same with a head that is kept, and a new head where nothing goes back.
    assert texts(validate(experiment(**{"method": RFT, **changes}))) == ""
    assert texts(validate(transfer(pictures, method={"name": "fine-tune"}))) == ""


def test_attacks_of_everything_that_runs_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """PGD is tried where anything uses it: start.before and an interpolation as well."""
    tried: list[str] = []

    def pgd(*_: Any, norm: str, **__: Any) -> None:
        tried.append(norm)

    monkeypatch.setattr(preflight, "pgd", pgd)
    multinorm = {"name": "multinorm"}

    def found(**changes: Any) -> list[str]:
        tried.clear()
        threats = [{"norm": "Linf", "eps": 0.1}, {"norm": "L2", "eps": 1}]
        values: dict[str, Any] = {
            "task": {"limit_train": 20, "limit_test": 20, "threat_models": threats},
            "method": multinorm,
            "search": {"metric": "val/clean"},
        }
        assert texts(validate(experiment(**{**values, **changes}))) == ""
        return list(tried)

    assert found(start={"method": multinorm}) == []
    assert found(start={"method": multinorm, "before": AT}) == ["Linf"]
    assert found(start={"method": AT}) == ["Linf"]
    assert found(start={"method": multinorm}, interpolate={"curve_runs": 1}) == ["Linf"]


def test_a_start_that_has_seen_what_is_measured_is_found() -> None:
    limits = {"limit_train": 20, "limit_val": 20, "limit_test": 20}

    def both(task: dict[str, Any], own: dict[str, Any]) -> Experiment:
        start = {"method": AT, "task": {**limits, **own}}
        return experiment(start=start, task={**limits, **task}, method=RFT)

    def found(task: dict[str, Any], own: dict[str, Any]) -> list[Finding]:
        one = both(task, own)
        tasks = load_task(one.task), load_task(one.start.task)
        return list(preflight._check_shared_images(one, *tasks))

    assert found({}, {}) == []
    assert found({}, {"threat_models": [{"norm": "L2", "eps": 1}]}) == []
    # Another held-out part: what chooses the run was trained on.
    seen = found({"limit_val": 600}, {"split_seed": 1, "limit_train": 5000})
    assert texts(seen) == ""
    assert "images of the task's val split" in texts(seen, "warning")
    # The start is chosen on test.
    official = {"selection": "official", "limit_val": 100}
    chosen = validate(both({"limit_test": 2000}, official))
    assert "the start has seen 100 images of the task's test split" in texts(chosen)
    # A run that says of itself that it is leaky may have such a start.
    assert found(official, official) == []


def test_searched_fields_inside_others_are_checked() -> None:
    def found(**space: Any) -> str:
        return texts(validate(experiment(search={"space": space})))

    assert found(**{"optimizer.weight_decay": [0.1, "1/8"], "curve_attack.num_steps": [1]}) == ""
    assert "weight_decay = -1" in found(**{"optimizer.weight_decay": [0.1, -1]})
    assert "curve_attack.num_steps must be a whole" in found(**{"curve_attack.num_steps": [0.5]})


def test_optuna_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    space = {"lr": {"loguniform": [0.001, 0.1]}}
    wanted = experiment(search={"space": space, "algorithm": "optuna"})
    monkeypatch.setattr(search_module.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'robustft[search]'" in texts(validate(wanted))
    monkeypatch.undo()
    pytest.importorskip("optuna")
    assert validate(wanted) == []


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    start = Start(
        architecture="small_resnet",
        num_classes=10,
        image_shape=(1, 28, 28),
        mean=(0.286,),
        std=(0.353,),
    )
    save_model(tmp_path / "model", start=start, state=start.build().state_dict(), card={})
    return tmp_path / "model" / "model.safetensors"


def test_a_checkpoint_must_be_whole_and_fit(checkpoint: Path, tmp_path: Path) -> None:
    def found(**start: str) -> str:
        return texts(validate(experiment(start=start)))

    assert found(model="small_resnet", checkpoint=str(checkpoint)) == ""
    assert found(model="resnet18", checkpoint=str(checkpoint)) != ""
    assert "nowhere.pt" in found(model="small_resnet", checkpoint=str(tmp_path / "nowhere.pt"))
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert str(checkpoint) in found(model="small_resnet", checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("modules", "sentence"),
    [
        ("conv11", "unknown layer 'conv11': did you mean 'conv1'"),
        ("mrc-99", "only 10 layers are eligible"),
        ("top-11", "only 10 layers are eligible"),
        ("layer1.0.conv1,lineer", "did you mean 'linear'"),
    ],
)
def test_layers_are_checked_against_the_architecture(modules: str, sentence: str) -> None:
    assert sentence in texts(validate(experiment(method={"name": "rift", "modules": modules})))
    searched = experiment(search={"space": {"modules": ["mrc-1", modules], "lr": [0.1]}})
    assert sentence in texts(validate(searched))
    fine = ["mrc-10", "top-10", "most-critical", "last", "all", "bn", "conv1,linear"]
    assert validate(experiment(search={"space": {"modules": fine}})) == []


def test_every_searched_value_is_checked() -> None:
    found = validate(experiment(search={"space": {"lr": [0.1, -1, "x"], "epochs": [1, 0.5]}}))
    assert "search.space: lr = -1" in texts(found)
    assert "'x'" in texts(found)
    assert "epochs must be a whole number" in texts(found)
    space = {"lr": {"uniform": [-0.1, 0.1]}}
    found = validate(experiment(search={"space": space, "algorithm": "random"}))
    assert "lr = -0.1" in texts(found)


def test_a_radius_without_meaning_is_a_warning() -> None:
    for eps, sentence in ((0.5, "same grey"), (0, "no attack at all")):
        threats = [{"norm": "Linf", "eps": eps}]
        found = validate(experiment(task={"threat_models": threats, "limit_train": 20}))
        assert sentence in texts(found, "warning")
        assert texts(found) == ""


def test_choosing_on_test_is_a_warning() -> None:
    leaky = experiment(
        task={"selection": "official", "limit_train": 20},
        method={"name": "rift", "mrc_split": "test"},
    )
    assert "task.selection = official and method.mrc_split = test" in texts(
        validate(leaky), "warning"
    )


def test_a_metric_that_the_method_does_not_report_is_refused() -> None:
    found = validate(experiment(search={"space": {"lr": [0.1]}, "metric": "val/claen"}))
    assert "unknown search.metric 'val/claen': did you mean 'val/clean'?" in texts(found)
    fine = experiment(search={"space": {"lr": [0.1]}, "metric": "val/start_clean"})
    assert validate(fine) == []
    assert "start_clean" in texts(validate(dataclasses.replace(fine, method=ATConfig())))


def test_storage_must_be_a_folder_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    found = validate(experiment(runtime={"storage": str(tmp_path / "file" / "runs")}))
    assert "cannot write runs to" in texts(found)
    assert "runtime.storage" in texts(found)


@pytest.mark.parametrize(("free", "level"), [(2**20, "error"), (2**30, "warning")])
def test_a_full_disk_is_found(free: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage._replace(free=free))
    assert " left: free some space" in texts(validate(experiment()), level)


@pytest.fixture
def mlflow_answering(request: pytest.FixtureRequest) -> Iterator[str]:
    """Serve /health as MLflow does, with the status that the test asks for."""

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Health) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://me:secret@127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("mlflow_answering", [503], indirect=True)
def test_mlflow_that_does_not_answer_is_a_warning_without_its_password(
    mlflow_answering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_answering)
    found = validate(experiment())
    assert "does not answer" in texts(found, "warning")
    assert "secret" not in texts(found, "warning")
    assert texts(found) == ""
    refused = validate(experiment(runtime={"tracking_uri": "http://127.0.0.1:1"}))
    assert "does not answer" in texts(refused, "warning")


@pytest.mark.parametrize("mlflow_answering", [200], indirect=True)
def test_mlflow_that_answers_is_no_finding(mlflow_answering: str) -> None:
    address = mlflow_answering.replace("me:secret@", "")
    assert validate(experiment(runtime={"tracking_uri": address})) == []


def test_more_workers_than_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.os, "cpu_count", lambda: 4)

    def errors(**runtime: Any) -> str:
        return texts(validate(experiment(runtime=runtime)))

    assert errors(workers=4) == ""
    assert "asks for 5 workers" in errors(workers=5)
    assert "asks for 3 workers with 2 CPUs" in errors(workers=3, cpus_per_worker=2)
    assert "GPUs each and the cluster has" in errors(gpus_per_worker=99)
    # An embedded Ray is this machine, and does not grow.
    assert "name a larger cluster in RAY_ADDRESS" in errors(workers=5, autoscaling=True)
    # Without a search there are no trials, and their width does not matter.
    assert errors(workers_per_trial=5) == ""
    wide = experiment(search={"space": {"lr": [0.1]}}, runtime={"workers_per_trial": 5})
    assert "asks for 5 workers" in texts(validate(wide))


def test_errors_come_first() -> None:
    bad = experiment(
        task={"threat_models": [{"norm": "Linf", "eps": 0}], "limit_train": 20},
        method={"name": "rift", "modules": "conv9"},
        runtime={"workers": 10_000},
    )
    levels = [finding.level for finding in validate(bad)]
    assert levels == ["error", "error", "warning"]
    assert dataclasses.asdict(validate(bad)[0]).keys() == {"level", "text"}


def test_weights_that_are_not_numbers_are_refused(checkpoint: Path) -> None:
    state = load_file(checkpoint)
    state[next(name for name in state if name.endswith("linear.weight"))].fill_(float("nan"))
    damaged = checkpoint.with_name("damaged.safetensors")
    save_file(state, damaged)
    found = validate(experiment(start={"model": "small_resnet", "checkpoint": str(damaged)}))
    assert "damaged.safetensors" in texts(found)
    assert "NaN or infinite" in texts(found)


def test_a_norm_that_attacks_do_not_know_is_found() -> None:
    threats = [{"norm": "L1", "eps": 1}]
    found = validate(experiment(task={"threat_models": threats, "limit_train": 20}))
    assert "does not support norm 'L1'" in texts(found)


def test_the_folder_of_caches_must_have_room_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ROBUSTFT_HOME", str(tmp_path / "file" / "home"))
    assert "with ROBUSTFT_HOME" in texts(validate(experiment()))
    assert texts(validate(experiment(start={}, method=AT))) == ""


def test_a_cluster_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert f"no Ray cluster answers at {address}" in texts(validate(experiment()))


def test_a_run_is_refused_before_it_leaves_anything(tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    good = experiment(runtime={"storage": str(storage)})
    task = load_task(good.task)
    refuse(good, task, task, storage)
    mistakes: dict[str, dict[str, Any]] = {
        "unknown layer 'conv9'": {"method": {"name": "rift", "modules": "conv9"}},
        "unknown search.metric": {"search": {"metric": "val/claen"}},
        "asks for 9999 workers": {"runtime": {"workers": 9999}},
    }
    for sentence, change in mistakes.items():
        bad = experiment(**{"runtime": {"storage": str(storage)}, **change})
        with pytest.raises(RobustftError, match=sentence) as refusal:
            run(bad, run_dir=storage / "mine" / "1")
        assert refusal.value.exit_code == 2
    assert not storage.exists()
