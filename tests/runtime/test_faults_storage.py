"""Damaged files, a full disk, an MLflow that goes away: first each function, then whole runs."""

import contextlib
import errno
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from faults import (
    CHECKPOINTS,
    points,
    processes,
    run_folder,
    summary,
    wait_until,
    write_tiny,
)
from small import small_experiment
from test_faults import Command

from robustft.errors import CheckpointError, DataError, RunError
from robustft.methods import Result
from robustft.runtime import jsonfile, results
from robustft.runtime.fanout import load_value, store_value, stored_value
from robustft.runtime.jsonfile import write_json
from robustft.runtime.results import load_result, save_result, stored_result
from robustft.runtime.resumable import resumable
from robustft.runtime.search import Trial, _can_continue, _finished, _require_room
from robustft.runtime.stored import StoredMap
from robustft.runtime.trainer import (
    RECORD_FILE,
    RESERVATION_FILE,
    Job,
    WorkerContext,
    _set_aside_damaged,
    train,
)
from robustft.runtime.training_checkpoints import (
    STATE_FILE,
    load_state,
    newest_state,
    save_state,
)

# --- damage --------------------------------------------------------------------------------------


def cut_off(path: Path) -> None:
    """What a writer leaves that died, or had no more room."""
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    """What some file systems leave after a power cut: the name without the data."""
    os.truncate(path, 0)


def zeroed(path: Path) -> None:
    """What others leave: the length without the data."""
    path.write_bytes(bytes(path.stat().st_size))


def flipped(path: Path) -> None:
    """One wrong bit in the middle of the numbers."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = [cut_off, emptied, zeroed, flipped]
ANY_DAMAGE = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)


def damage_in_place(damage: Callable[[Path], None], path: Path) -> None:
    """Damage a file without making it younger than the others."""
    before = path.stat()
    damage(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


sent: list[Any] = []
"""What the newest context has told the driver."""


def state(epoch: int) -> dict[str, Any]:
    """Mostly one tensor, so that the middle of the file lies in it."""
    return {"epoch": epoch, "weights": torch.full((4096,), float(epoch))}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of three epochs as Ray Tune names them."""
    for epoch in range(3):
        folder = tmp_path / "run" / f"checkpoint_{epoch:06d}"
        folder.mkdir(parents=True)
        save_state(state(epoch), folder)
        # Written at once, they might be equally old.
        os.utime(folder / STATE_FILE, (1_000_000 + epoch, 1_000_000 + epoch))
    return tmp_path / "run"


def job() -> Job:
    return Job(
        method="at",
        config=None,
        task=None,
        start=None,
        prepared=None,
        stage="",
        run="",
        threads=1,
        gpu=False,
        send=sent.append,
    )


def context(known: Path | None, **place: Any) -> WorkerContext:
    sent.clear()
    return WorkerContext(job(), save=lambda *_: None, restore=lambda: known, **place)


def test_the_newest_whole_checkpoint_is_taken_in_silence(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Whichever Ray names: its record may be older than the newest checkpoint.
    for known in ("checkpoint_000002", "checkpoint_000001", "checkpoint_gone"):
        saved = context(run / known).resume()
        assert saved is not None
        assert saved["epoch"] == 2
    assert caplog.records == []
    assert context(None).resume() is None


@ANY_DAMAGE
def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(
    damage: Any, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = run / "checkpoint_000002"
    damage_in_place(damage, newest / STATE_FILE)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_state(newest)
    saved = context(newest).resume()
    assert saved is not None
    assert saved["epoch"] == 1
    assert torch.equal(saved["weights"], torch.ones(4096))
    said = "\n".join(caplog.messages)
    assert f"{newest / STATE_FILE} is damaged" in said
    assert f"training goes on from the checkpoint {run / 'checkpoint_000001'}" in said
    # A worker's own log stays on its node: the driver is told as well.
    assert [event["kind"] for event in sent] == ["warning", "warning"]
    assert str(newest) in sent[0]["text"]


def test_age_decides_and_not_the_number(run: Path) -> None:
    """After a restart from an old record Ray counts on from there."""
    save_state(state(7), run / "checkpoint_000001")
    saved = context(run / "checkpoint_000002").resume()
    assert saved is not None
    assert saved["epoch"] == 7


def test_where_nothing_is_whole_training_starts_again(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in run.iterdir():
        cut_off(folder / STATE_FILE)
    assert context(run / "checkpoint_000002").resume() is None
    assert "training starts again" in caplog.messages[-1]


def test_all_ranks_take_what_rank_0_has_found_whole(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks must not go on from different epochs, whatever each of them can read."""
    told: list[Any] = []

    def broadcast(values: list[Any], **_: Any) -> None:
        if told:
            values[:] = told
        else:
            told.extend(values)

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    newest = run / "checkpoint_000002"
    whole = (newest / STATE_FILE).read_bytes()
    damage_in_place(flipped, newest / STATE_FILE)
    first = context(newest, rank=0, world_size=2).resume()
    (newest / STATE_FILE).write_bytes(whole)
    second = context(newest, rank=1, world_size=2).resume()
    assert first is not None
    assert second is not None
    assert (first["epoch"], second["epoch"]) == (1, 1)
    # One that cannot read it ends, and Ray Train restarts both: no error of the experiment's.
    emptied(run / "checkpoint_000001" / STATE_FILE)
    with pytest.raises(RuntimeError, match="is damaged"):
        context(newest, rank=1, world_size=2).resume()
    with pytest.raises(RuntimeError, match="not shared"):
        context(None, rank=1, world_size=2).resume()


@pytest.mark.parametrize("text", ["", '{"checkpoint_results": [{"checkpo', "[]"])
def test_half_of_rays_record_is_set_aside_and_the_checkpoints_found_without_it(
    text: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / RECORD_FILE).write_text(text)
    _set_aside_damaged(run)
    assert not (run / RECORD_FILE).exists()
    assert "is damaged" in caplog.text
    # What Ray had not finished has no state yet.
    (run / "checkpoint_000003").mkdir()
    assert newest_state(run) == run / "checkpoint_000002"
    assert newest_state(run / "none") is None


def test_rays_record_of_a_checkpoint_that_is_gone_is_set_aside(run: Path) -> None:
    names = [folder.name for folder in sorted(run.iterdir())]
    record = {"checkpoint_results": [{"checkpoint_dir_name": name} for name in names]}
    write_json(run / RECORD_FILE, record)
    _set_aside_damaged(run)
    assert (run / RECORD_FILE).exists()
    shutil.rmtree(run / names[1])
    _set_aside_damaged(run)
    assert not (run / RECORD_FILE).exists()


class Trainings:
    """Ray Train, of which the first ``deaths`` controllers die."""

    def __init__(self, deaths: int, monkeypatch: pytest.MonkeyPatch) -> None:
        train = pytest.importorskip("ray.train.torch")
        groups = pytest.importorskip("ray.util.placement_group")
        self.deaths, self.attempts = deaths, 0
        self.freed: list[str] = []
        monkeypatch.setattr(train.TorchTrainer, "__init__", self._init)
        monkeypatch.setattr(train.TorchTrainer, "fit", lambda trainer: self._fit())
        monkeypatch.setattr(
            groups, "remove_placement_group", lambda g: self.freed.append(g.id.hex())
        )

    def _init(self, *_: Any, train_loop_config: dict[str, Any], **__: Any) -> None:
        self.folder = train_loop_config["folder"]

    def _fit(self) -> Any:
        import ray

        self.attempts += 1
        # As rank 0 does when it begins.
        group = ray.PlacementGroupID.of(ray.JobID.from_int(self.attempts)).hex()
        self.noted = group
        write_json(self.folder / RESERVATION_FILE, {"placement_group": group})
        if self.attempts <= self.deaths:
            raise ray.exceptions.ActorDiedError
        return SimpleNamespace(return_value=result(0.5))


def train_with(trainings: Trainings, folder: Path, *, max_failures: int) -> Result:
    (folder / "name").mkdir()
    return train(
        job(),
        name="name",
        storage=folder,
        workers=1,
        cpus=1,
        gpus=0.0,
        max_failures=max_failures,
    )


def test_another_controller_of_ray_train_takes_the_place_of_a_dead_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainings = Trainings(2, monkeypatch)
    found = train_with(trainings, tmp_path, max_failures=2)
    assert found.metrics == {"val/clean": 0.5}
    assert trainings.attempts == 3
    # What the dead ones had reserved is given back, and what the living one has is not.
    assert len(set(trainings.freed)) == 2
    assert trainings.noted not in trainings.freed
    assert caplog.text.count("Ray Train's controller died: name goes on") == 2


def test_controllers_that_die_again_and_again_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings = Trainings(9, monkeypatch)
    with pytest.raises(RunError, match="Ray Train's controller died"):
        train_with(trainings, tmp_path, max_failures=2)
    assert trainings.attempts == 3


# --- damaged results -----------------------------------------------------------------------------


def result(value: float) -> Result:
    return Result(state={"w": torch.full((4096,), value)}, metrics={"val/clean": value})


@ANY_DAMAGE
@pytest.mark.parametrize("name", ["result.safetensors", "result.json"])
def test_a_damaged_result_is_computed_again(
    damage: Any, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if (damage, name) == (flipped, "result.json"):
        pytest.skip("a wrong letter in JSON may be another number: only weights have a checksum")
    save_result(result(0.5), tmp_path)
    kept = stored_result(tmp_path)
    assert kept is not None
    assert torch.equal(kept.state["w"], torch.full((4096,), 0.5))
    damage(tmp_path / name)
    assert stored_result(tmp_path) is None
    assert "it is computed again" in caplog.text
    save_result(result(0.5), tmp_path)
    assert stored_result(tmp_path) is not None


def test_nothing_is_no_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert stored_result(tmp_path) is None
    assert stored_value(tmp_path / "item.npz") is None
    assert caplog.records == []


class Tune:
    """Tune as far as it says whether a folder can be restored."""

    class Tuner:
        @staticmethod
        def can_restore(path: str) -> bool:
            return Path(path).is_dir()


def test_a_finished_trial_that_is_damaged_runs_again_and_only_that_one(tmp_path: Path) -> None:
    folders = []
    for number in range(3):
        folder = tmp_path / "tune" / f"trial_{number}" / "checkpoint_000001"
        save_result(result(number / 10), folder)
        write_json(folder / "trial.json", {"values": {"lr": number}, "error": ""})
        folders.append(folder)
    (tmp_path / "tune" / "experiment_state-2026.json").write_text("{}")
    assert _can_continue(tmp_path / "tune", Tune)
    flipped(folders[1] / "result.safetensors")
    assert not _can_continue(tmp_path / "tune", Tune)
    kept = [load_result(Path(path)).metrics["val/clean"] for path in _finished(tmp_path).values()]
    assert sorted(kept) == [0.0, 0.2]


# --- damaged items of a fan-out ------------------------------------------------------------------


ITEM = {"mask": np.arange(4096.0), "loss": 0.25}


@ANY_DAMAGE
def test_a_damaged_item_is_computed_again(
    damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "item.npz"
    store_value(path, ITEM)
    damage(path)
    with pytest.raises(DataError, match="holds no finished item"):
        load_value(path)
    assert stored_value(path) is None
    assert "it is computed again" in caplog.text


def double(shared: float, item: float) -> dict[str, Any]:
    calls.append(item)
    return {"twice": shared * item}


calls: list[float] = []


def test_a_map_repeats_the_damaged_item_alone(tmp_path: Path) -> None:
    todo: Any = {"shared": 2.0, "key": "k", "name": "doubling"}
    calls.clear()
    first = StoredMap(tmp_path)(double, [1.0, 2.0, 3.0], **todo)
    cut_off(sorted(tmp_path.glob("*/*.npz"))[1])
    again = StoredMap(tmp_path)(double, [1.0, 2.0, 3.0], **todo)
    assert again == first == [{"twice": 2.0}, {"twice": 4.0}, {"twice": 6.0}]
    assert len(calls) == 4


# --- a full disk ---------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one MiB."""
    with tiny_disk(tmp_path / "disk", "1m") as folder:
        yield folder


@contextlib.contextmanager
def tiny_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a disk of its own of ``size`` at ``folder``."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        # Lazily: a process that is still ending may have a file open.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Fill the disk of ``folder`` to the last byte; return the file to delete."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    assert shutil.disk_usage(folder).free == 0
    return ballast


def test_on_a_full_disk_the_old_files_stay_whole_and_nothing_half_is_left(disk: Path) -> None:
    write_json(disk / "seconds.json", {"wall": 1.0})
    save_result(result(0.5), disk / "stage")
    store_value(disk / "items" / "item.npz", ITEM)
    before = sorted(path for path in disk.rglob("*"))
    ballast = fill(disk)

    large = {"wall": 1.0, "stages": {str(number): 0.0 for number in range(10_000)}}
    with pytest.raises(OSError, match="No space left"):
        write_json(disk / "seconds.json", large)
    with pytest.raises(Exception, match="No space left"):
        save_result(Result(state={"w": torch.zeros(500_000)}, metrics={}), disk / "stage")
    with pytest.raises(OSError, match="No space left"):
        store_value(disk / "items" / "item.npz", {"mask": np.random.default_rng(0).random(99_999)})
    assert sorted(path for path in disk.rglob("*") if path != ballast) == before
    assert jsonfile.json.loads((disk / "seconds.json").read_text()) == {"wall": 1.0}
    kept = stored_result(disk / "stage")
    assert kept is not None
    assert kept.metrics == {"val/clean": 0.5}
    assert load_value(disk / "items" / "item.npz")["loss"] == 0.25

    ballast.unlink()
    write_json(disk / "seconds.json", large)
    assert (disk / "seconds.json").stat().st_size > 100_000


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_without_room_no_half_is_left(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same where no small disk can be mounted."""
    save_result(result(0.5), tmp_path)
    before = sorted(tmp_path.iterdir())

    def fail(weights: Any, path: Path) -> None:
        path.write_bytes(bytes(10))
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(results, "save_file", fail)
    with pytest.raises(OSError, match=os.strerror(code)):
        save_result(result(0.75), tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    kept = stored_result(tmp_path)
    assert kept is not None
    assert kept.metrics == {"val/clean": 0.5}


def test_a_search_does_not_choose_among_trials_that_had_no_room(tmp_path: Path) -> None:
    """Else the run would end well, with other numbers than an undisturbed one."""
    full = f"OSError: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}"
    whole = Trial(label="a", values={}, result=result(0.5))
    _require_room([whole, Trial(label="b", values={}, result=None, error="loss became NaN")])
    with (
        pytest.raises(RunError, match="is full: free some space, then continue with: robustft"),
        resumable(tmp_path / "one", tmp_path, small_experiment(tmp_path)),
    ):
        _require_room([whole, Trial(label="b", values={}, result=None, error=full)])


# --- whole runs ----------------------------------------------------------------------------------

WHOLE = (pytest.mark.ray, pytest.mark.cluster, pytest.mark.slow)


def whole(test: Any) -> Any:
    """Mark a test that runs whole experiments on an embedded Ray."""
    for mark in WHOLE:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("calm")
    finish(Command(folder, "search", write_tiny(folder), "--json"))
    assert set(points(folder).values()) == {1}
    return folder


def finish(run: Command) -> str:
    """Wait for the end of a run that succeeds; return what it has said."""
    code, _, _ = run.finish()
    said = "".join(run.lines)
    assert code == 0, said
    return said


def kill_all(run: Command) -> None:
    """Kill every process of a run at once, Ray's own among them: the machine is gone."""
    for process in list(processes(run, "")):
        with contextlib.suppress(psutil.Error):
            process.kill()
    run.finish()


def epochs_done(folder: Path) -> int:
    numbers = [int(path.parent.name[-6:]) for path in run_folder(folder).glob(CHECKPOINTS)]
    return max(numbers, default=-1) + 1


@whole
def test_a_dead_machine_and_a_damaged_newest_checkpoint(calm: Path, tmp_path: Path) -> None:
    first = Command(tmp_path, "search", write_tiny(tmp_path), "--json")
    wait_until(lambda: epochs_done(tmp_path) >= 4, "four epochs")
    kill_all(first)
    damaged = []
    for trial in run_folder(tmp_path).glob("search/tune/*/"):
        files = sorted(trial.glob("checkpoint_*/state.pt"), key=lambda p: p.stat().st_mtime_ns)
        if files:
            damage_in_place(flipped, files[-1])
            damaged.append(files[-1])
    assert damaged
    said = finish(Command(tmp_path, "resume", str(run_folder(tmp_path)), "--json"))
    assert any(f"{path} is damaged" in said for path in damaged)
    assert summary(tmp_path) == summary(calm)
    assert points(tmp_path) == points(calm)


@whole
def test_a_full_disk_and_then_room_again(calm: Path, tmp_path: Path) -> None:
    # A run is refused where there is less than half a GiB.
    with tiny_disk(tmp_path / "disk", "640m") as folder:
        first = Command(folder, "search", write_tiny(folder), "--json")
        wait_until(lambda: epochs_done(folder) >= 2, "two epochs")
        ballast = fill(folder)
        code, _, last = first.finish()
        assert code == 1, "".join(first.lines)
        assert "is full: free some space, then continue with: robustft resume" in last
        assert first.left_behind() == []
        ballast.unlink()
        finish(Command(folder, "resume", str(run_folder(folder)), "--json"))
        assert summary(folder) == summary(calm)
        assert points(folder) == points(calm)


@whole
def test_an_mlflow_server_that_is_away_for_a_while(calm: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    server = serve(tmp_path / "runs", port)
    try:
        path = write_tiny(tmp_path, tracking_uri=uri)
        run = Command(tmp_path, "search", path, "--json")
        wait_until(lambda: epochs_done(tmp_path) >= 2, "two epochs")
    finally:
        kill_tree(server)
    run.wait_for("does not answer")
    server = serve(tmp_path / "runs", port)
    try:
        finish(run)
        code, _, last = Command(tmp_path, "sync", str(run_folder(tmp_path))).finish()
        assert code == 0, last
    finally:
        kill_tree(server)
    assert summary(tmp_path) == summary(calm)
    assert points(tmp_path) == points(calm)


def serve(storage: Path, port: int) -> subprocess.Popen[bytes]:
    """Start ``robustft ui`` over the storage's own database and wait until it answers."""
    storage.mkdir(exist_ok=True)
    code = (
        "import sys, pathlib, mlflow, robustft.runtime.ui as ui; "
        "mlflow.MlflowClient(f'sqlite:///{sys.argv[1]}/mlflow.db').search_experiments(); "
        "sys.exit(ui.serve_ui(pathlib.Path(sys.argv[1]), port=int(sys.argv[2])))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(storage), str(port)])

    def answers() -> bool:
        assert process.poll() is None
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer,
        ):
            return bool(answer.status == 200)
        return False

    wait_until(answers, "the MLflow server")
    return process


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    tree = [*psutil.Process(process.pid).children(recursive=True), process]
    for one in tree:
        with contextlib.suppress(psutil.Error):
            one.kill()
    process.wait()
