"""Runs in object storage: published after every stage, read and resumed on any machine."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from object_store import BUCKET, served_bucket
from pyarrow import fs
from small import small_experiment

from robustft import cli
from robustft.data.storage import open_store, working_folder
from robustft.errors import ConfigError, DataError, ResourceError, RunError
from robustft.methods import Result
from robustft.runtime import mirror as mirror_module
from robustft.runtime.experiment import RuntimeConfig
from robustft.runtime.mirror import (
    Mirror,
    checkpoint_folder,
    list_runs,
    ray_storage,
    reopen,
    run_store,
)
from robustft.runtime.results import load_result, save_result
from robustft.runtime.search import _is_stored
from robustft.runtime.session import storage_root

served = pytest.fixture(scope="module")(served_bucket)


@pytest.fixture
def root(served: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty store, and a machine that has never seen it."""
    for name, value in served.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ROBUSTFT_HOME", str(tmp_path / "home"))
    return f"{BUCKET}/{tmp_path.parent.name}-{tmp_path.name}"


@pytest.fixture
def mirror(root: str) -> Mirror:
    """A run that is at work on this machine."""
    directory = working_folder(root) / "small" / "20260101-000000-abcdef"
    directory.mkdir(parents=True)
    (directory / "run.json").write_text("{}")
    return Mirror(run_store(root), directory)


def result(value: float) -> Result:
    return Result(state={"w": torch.full((8,), value)}, metrics={"val/clean": value})


def test_a_folder_is_no_object_storage(tmp_path: Path) -> None:
    for place in (None, "runs", str(tmp_path), f"file://{tmp_path}"):
        assert run_store(place) is None
    runtime = RuntimeConfig(storage=f"file://{tmp_path}/runs")
    assert storage_root(runtime) == tmp_path / "runs"
    alone = Mirror(None, tmp_path)
    alone.catch_up()
    alone.publish()
    alone.require_published()
    assert alone.address == tmp_path
    assert alone.inside("train") is None
    assert ray_storage(tmp_path, None) == {"storage_path": str(tmp_path)}
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_published_and_reopened_elsewhere(
    mirror: Mirror, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_result(result(0.5), mirror.directory / "stages" / "rift")
    (mirror.directory / "train").mkdir()
    (mirror.directory / "train" / "reservation.json").write_text("{}")
    mirror.publish()
    assert mirror.address == f"{root}/small/20260101-000000-abcdef"
    monkeypatch.setenv("ROBUSTFT_HOME", str(tmp_path / "elsewhere"))
    directory, found = reopen(f"{mirror.address}/")
    assert found == root
    assert directory.is_relative_to(tmp_path / "elsewhere")
    assert directory.parts[-2:] == mirror.directory.parts[-2:]
    assert not (directory / "train").exists()
    assert load_result(directory / "stages" / "rift").metrics == {"val/clean": 0.5}


def test_two_machines_cannot_go_on_with_one_run(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.publish()
    monkeypatch.setenv("ROBUSTFT_HOME", str(tmp_path / "elsewhere"))
    other = Mirror(mirror.root, reopen(str(mirror.address))[0])
    (other.directory / "more").write_text("from there")
    other.publish()
    (mirror.directory / "less").write_text("from here")
    with pytest.raises(RunError, match="published from elsewhere"):
        mirror.publish()
    mirror.catch_up()
    assert (mirror.directory / "more").read_text() == "from there"
    mirror.publish()


def test_a_store_that_is_away_does_not_stop_a_run_but_its_end_says_so(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise ResourceError("cannot write to the store")

    with monkeypatch.context() as patched:
        patched.setattr(mirror_module.Store, "publish", away)
        mirror.publish()
        assert "what is not published yet is in" in caplog.text
        with pytest.raises(RunError, match=r"is finished, but only in .* robustft resume"):
            mirror.require_published()
    mirror.require_published()
    assert open_store(str(mirror.address)).files() == {"run.json": 2}


def test_a_trained_start_is_shared_between_machines(mirror: Mirror, tmp_path: Path) -> None:
    here, there = tmp_path / "here" / "0123", tmp_path / "there" / "0123"
    mirror.fetch_start(here)
    assert not here.exists()
    save_result(result(0.25), here)
    mirror.publish_start(here)
    mirror.fetch_start(there)
    assert torch.equal(load_result(there).state["w"], result(0.25).state["w"])
    # Another machine has trained the same start at the same time.
    (there / ".published.json").unlink()
    mirror.publish_start(there)
    assert list_runs(str(mirror.root and mirror.root.uri), tmp_path) == {}


def test_results_are_read_from_the_store_and_damage_is_named(mirror: Mirror) -> None:
    save_result(result(0.75), mirror.directory / "stages" / "rift")
    mirror.publish()
    address = f"{mirror.address}/stages/rift"
    assert load_result(address).metrics == {"val/clean": 0.75}
    store = open_store(str(mirror.address))
    shutil.rmtree(working_folder(store.uri).parents[1] / "fetched")
    digest = json.loads((mirror.directory / ".published.json").read_text())["files"][
        "stages/rift/result.safetensors"
    ]["sha256"]
    path = f"{store.path}/files/stages/rift/result.{digest[:16]}.safetensors"
    with store.filesystem.open_output_stream(path) as stream:
        stream.write(b"decayed")
    with pytest.raises(DataError, match=r"result\.safetensors is damaged"):
        load_result(address)


def test_ls_lists_the_runs_of_a_store(
    mirror: Mirror, root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ROBUSTFT_STORAGE", root)
    mirror.publish()
    assert cli.main(["ls", "runs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": {mirror.address: "unfinished"}}
    (mirror.directory / "summary.json").write_text("{}")
    mirror.publish()
    assert cli.main(["ls", "runs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": {mirror.address: "finished"}}


def test_an_address_that_names_no_run_is_refused(root: str) -> None:
    for uri in ("s3://bucket/run", "s3://bucket"):
        with pytest.raises(ConfigError, match="names no run"):
            reopen(uri)
    with pytest.raises(DataError, match="nothing is published"):
        reopen(f"{root}/small/none")


def test_a_checkpoint_in_the_store_is_copied_and_a_local_one_is_not(
    root: str, tmp_path: Path
) -> None:
    from ray.train import Checkpoint

    local = tmp_path / "checkpoint_000001"
    local.mkdir()
    (local / "state.pt").write_bytes(b"state")
    assert checkpoint_folder(Checkpoint.from_directory(local), tmp_path / "scratch") == local
    store = open_store(root).inside("checkpoint_000001")
    with store.filesystem.open_output_stream(f"{store.path}/state.pt") as stream:
        stream.write(b"stored")
    stored = Checkpoint(store.path, filesystem=store.filesystem)
    copy = checkpoint_folder(stored, tmp_path / "scratch")
    assert copy == tmp_path / "scratch" / "checkpoint_000001"
    assert (copy / "state.pt").read_bytes() == b"stored"


class Tune:
    """Tune as far as it says whether a folder can be restored."""

    class Tuner:
        @staticmethod
        def can_restore(path: str, storage_filesystem: Any) -> bool:
            return bool(storage_filesystem.get_file_info(f"{path}/tuner.pkl").is_file)


def test_a_search_in_the_store_goes_on_if_its_state_is_whole(root: str) -> None:
    store = open_store(root).inside("search")
    assert not _is_stored(store, "tune", Tune)
    for name, text in (
        ("tuner.pkl", ""),
        ("experiment_state-1.json", "{"),
        ("experiment_state-2.json", "{}"),
    ):
        with store.filesystem.open_output_stream(f"{store.path}/tune/{name}") as stream:
            stream.write(text.encode())
    assert _is_stored(store, "tune", Tune)
    store.filesystem.delete_file(f"{store.path}/tune/experiment_state-2.json")
    with pytest.raises(RunError, match=r"the state of the search in s3://.* is damaged"):
        _is_stored(store, "tune", Tune)


def trials(root: str) -> dict[str, bytes]:
    """What the store holds of every finished trial, with the time at which it ended."""
    store = open_store(root)
    found = store.filesystem.get_file_info(fs.FileSelector(store.path, recursive=True))
    paths = [info.path for info in found if info.base_name == "trial.json"]
    return {path: store.filesystem.open_input_stream(path).read() for path in paths}


@pytest.mark.cluster
@pytest.mark.slow
def test_a_run_on_a_store_resumes_on_a_machine_that_has_nothing(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its search; the folder and the caches are gone; no trial runs again."""
    from robustft.runtime import run as run_module
    from robustft.runtime.run import resume, run
    from robustft.runtime.stored_runs import compared_run, load_run

    monkeypatch.setenv("ROBUSTFT_HOME", str(tmp_path / "home"))

    class Killed(Exception):
        pass

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "_evaluate", die)
        with pytest.raises(Killed):
            run(small_experiment(tmp_path, runtime={"storage": root}))
    ((address, state),) = list_runs(root, tmp_path).items()
    assert state == "unfinished"
    assert not list((tmp_path / "home").rglob("checkpoint_*"))
    ended = trials(root)
    assert len(ended) == 4
    shutil.rmtree(tmp_path / "home")

    ran: list[str] = []
    train = run_module._train
    monkeypatch.setattr(
        run_module, "_train", lambda *a, **k: ran.append(k["stage"]) or train(*a, **k)
    )
    report = resume(address)
    assert ran == []
    assert trials(root) == ended
    assert list_runs(root, tmp_path) == {address: "finished"}
    assert os.fspath(report.directory).startswith(str(tmp_path / "home"))

    monkeypatch.setenv("ROBUSTFT_HOME", str(tmp_path / "reader"))
    stored = load_run(address)
    assert stored.summary["after"] == report.summary["after"]
    assert len(compared_run(stored).evaluations) == 1
    assert not list(stored.directory.rglob("*.safetensors"))
    assert all(row["status"] == "finished" for row in stored.trials)
    assert cli.main(["report", address]) == 0
    assert (
        cli.main(["compare", address, address, "--names", "a", "b", "--output", str(tmp_path)]) == 0
    )
