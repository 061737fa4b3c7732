"""How a run ends: what it leaves in its folder, and the sentence that says how to go on."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
from small import small_experiment

from robustft.errors import ConfigError, ResourceError, RobustftError, RunError
from robustft.runtime.events import Clock
from robustft.runtime.resumable import resumable
from robustft.runtime.search import _can_continue, _keep_credentials_out_of_logs


def end_with(error: BaseException, folder: Path) -> BaseException:
    """Return what becomes of an error inside a run."""
    with (
        pytest.raises(type(error) if isinstance(error, KeyboardInterrupt) else Exception) as ended,
        resumable(folder / "one", folder, small_experiment(folder)),
    ):
        raise error
    return ended.value


def test_an_interruption_says_how_to_resume(tmp_path: Path) -> None:
    directory = tmp_path / "a folder"
    ended = end_with(KeyboardInterrupt(), directory)
    assert f"continue with: robustft resume '{directory}/one'" in str(ended)
    assert (directory / "one" / "run.json").is_file()
    assert (directory / "one" / "config.yaml").is_file()


def test_sigterm_is_an_interruption_and_the_handler_comes_back(tmp_path: Path) -> None:
    earlier = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(KeyboardInterrupt, match="robustft resume"),
        resumable(tmp_path / "one", tmp_path, small_experiment(tmp_path)),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is earlier


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        ResourceError(f"cannot write records: {os.strerror(errno.ENOSPC)}; free space"),
        RunError(f"training failed: OSError: [Errno 28] {os.strerror(errno.ENOSPC)}"),
    ],
)
def test_a_full_disk_is_one_sentence_wherever_it_was_noticed(
    error: Exception, tmp_path: Path
) -> None:
    ended = end_with(error, tmp_path)
    assert isinstance(ended, RunError)
    assert "is full: free some space, then continue with: robustft resume" in str(ended)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    ended = end_with(PermissionError(errno.EACCES, "Permission denied", "/there"), tmp_path)
    assert isinstance(ended, ResourceError)
    assert str(ended).startswith("cannot write /there (Permission denied)")


@pytest.mark.parametrize("error", [ConfigError("no such layer"), ZeroDivisionError("a bug")])
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    ended = end_with(error, tmp_path)
    assert ended is error
    assert ended.__cause__ is None
    assert isinstance(ended, (RobustftError, ZeroDivisionError))


def test_times_of_earlier_sessions_count(tmp_path: Path) -> None:
    path = tmp_path / "seconds.json"
    first = Clock(began=1000.0)
    first.keep(path)
    first({"kind": "busy", "began": 1000.0, "ended": 1030.0})
    first.save(now=1100.0)
    # A day later: 30 of 100 seconds were busy, then 10 of 20.
    second = Clock(began=90_000.0)
    second.keep(path)
    second({"kind": "busy", "began": 90_005.0, "ended": 90_015.0})
    wall, share = second.overhead(now=90_020.0)
    assert wall == 120.0
    assert share == pytest.approx(1 - 40 / 120)


def test_stages_of_earlier_sessions_add_up(tmp_path: Path) -> None:
    path = tmp_path / "seconds.json"
    path.write_text('{"wall": 9, "busy": 1, "stages": {"search": 5.0, "prepare": 2.0}}')
    clock = Clock(began=0.0)
    with clock.stage("start-up"):
        pass
    clock.keep(path)
    with clock.stage("search"):
        pass
    assert clock.stages()["search"] >= 5.0
    assert clock.stages()["prepare"] == 2.0
    again = Clock(began=0.0)
    again.keep(path)
    assert again.stages() == clock.stages()


class FakeTune:
    """Tune as far as it says whether a folder can be restored."""

    class Tuner:
        @staticmethod
        def can_restore(path: str) -> bool:
            return (Path(path) / "tuner.pkl").is_file()


@pytest.mark.parametrize(
    ("states", "whole"),
    [
        (["{}"], True),
        (['{"cut off in the mid', "{}"], True),
        (["{}", '{"cut off in the mid'], False),
        ([], False),
    ],
)
def test_half_a_state_of_a_search_is_set_aside(
    states: list[str], whole: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "tune"
    assert not _can_continue(folder, FakeTune)
    folder.mkdir()
    (folder / "tuner.pkl").touch()
    for number, text in enumerate(states):
        (folder / f"experiment_state-2026-01-0{number + 1}.json").write_text(text)
    assert _can_continue(folder, FakeTune) is whole
    assert folder.exists() is whole
    assert len(list(tmp_path.glob("tune-damaged-*"))) == (0 if whole else 1)


@pytest.mark.parametrize(
    ("status", "named", "there", "going_on"),
    [
        ("RUNNING", "checkpoint_000001", ["checkpoint_000001", "checkpoint_000002"], True),
        # The driver deleted it and died before it wrote its state again.
        ("RUNNING", "checkpoint_000001", ["checkpoint_000002", "checkpoint_000003"], False),
        ("PENDING", None, [], True),
        ("TERMINATED", "checkpoint_000001", ["checkpoint_000002"], True),
    ],
)
def test_a_state_that_names_a_deleted_checkpoint_is_set_aside(
    status: str, named: str | None, there: list[str], going_on: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "tune"
    (folder / "abc_00000").mkdir(parents=True)
    (folder / "tuner.pkl").touch()
    for name in there:
        (folder / "abc_00000" / name).mkdir()
    last = {} if named is None else {"checkpoint_dir_name": named}
    trial = {"trial_id": "abc_00000", "status": status}
    progress = {"last_result": last or None}
    state = {"trial_data": [[json.dumps(trial), json.dumps(progress)]]}
    (folder / "experiment_state-2026-01-01.json").write_text(json.dumps(state))
    assert _can_continue(folder, FakeTune) is going_on
    assert len(list(tmp_path.glob("tune-damaged-*"))) == (0 if going_on else 1)


def test_trials_are_not_handed_credentials_that_ray_would_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = pytest.importorskip("ray")
    from ray.tune.execution import class_cache

    given: list[dict[str, str]] = []

    def remote(*, runtime_env: dict[str, dict[str, str]]) -> object:
        given.append(runtime_env["env_vars"])
        return lambda one: one

    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    monkeypatch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "0")
    _keep_credentials_out_of_logs()
    class_cache._ActorClassCache().get(object)
    assert given[0]["RAY_CHDIR_TO_TRIAL_DIR"] == "0"
    assert not any(name.startswith("AWS_") for name in given[0])
