"""Submitting: what is shipped, what is kept secret, which id, whose exit code, and no lost log."""

import dataclasses
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from robustft.errors import ConfigError, RunError
from robustft.runtime import submit as submitting
from robustft.runtime.submit import Job, choose_id, exit_code, follow, job_address, prepare

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a folder that a job could ship: a script, and what says so."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "Try_it.py").write_text("print('hello')\n")
    values = {"working_dir": ".", "env_vars": {"PYTHONPATH": "library"}, "excludes": ["*.bin"]}
    (tmp_path / "runtime_env.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def job_of(project: Path, *arguments: str, **options: Any) -> Job:
    options.setdefault("variables", {})
    return prepare(project / "experiments" / "Try_it.py", arguments, **options)


def git(project: Path, *words: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *identity, *words], cwd=project, check=True, capture_output=True)


# --- what is submitted ---------------------------------------------------------------------------


def test_the_job_ships_the_folder_of_runtime_env(project: Path) -> None:
    job = job_of(project, "--name", "two words; rm -rf /")
    assert job.entrypoint == "python experiments/Try_it.py --name 'two words; rm -rf /'"
    assert job.runtime_env == {
        "working_dir": str(project),
        "env_vars": {"PYTHONPATH": "library"},
        "excludes": ["*.bin"],
    }


def test_our_own_experiments_can_be_submitted() -> None:
    job = prepare(ROOT / "experiments" / "rift_sweep.py", (), variables={})
    assert job.entrypoint == "python experiments/rift_sweep.py"
    assert job.runtime_env["working_dir"] == str(ROOT)
    assert job.runtime_env["env_vars"] == {"PYTHONPATH": "library"}


def test_scripts_that_nothing_ships_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        prepare(tmp_path / "no.py", (), variables={})
    (tmp_path / "alone.py").write_text("")
    with pytest.raises(ConfigError, match=r"holds runtime_env\.yaml"):
        prepare(tmp_path / "alone.py", (), variables={})


def test_the_mlflow_address_goes_along_where_others_can_use_it(project: Path) -> None:
    server = {"MLFLOW_TRACKING_URI": "http://mlflow:5000", "MLFLOW_TRACKING_PASSWORD": "hunter2"}
    environment = job_of(project, variables=server).runtime_env["env_vars"]
    assert environment == {"PYTHONPATH": "library", "MLFLOW_TRACKING_URI": "http://mlflow:5000"}
    other = {"MLFLOW_TRACKING_URI": "https://10.0.0.7:5000/mlflow"}
    assert job_of(project, variables=other).runtime_env["env_vars"] == {
        "PYTHONPATH": "library",
        **other,
    }


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///here/mlflow.db",
        "http://127.0.0.1:5000",
        "http://127.0.1.1",
        "http://localhost:5000/mlflow",
        "https://LOCALHOST",
        "http://[::1]:5000",
        "http://0.0.0.0:5000",
    ],
)
def test_an_mlflow_of_this_machine_does_not_replace_that_of_the_cluster(
    uri: str, project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    local = {"MLFLOW_TRACKING_URI": uri}
    assert job_of(project, variables=local).runtime_env["env_vars"] == {"PYTHONPATH": "library"}
    assert f"add --env MLFLOW_TRACKING_URI={uri}" in caplog.text
    # On purpose it does.
    named = job_of(project, variables=local, extra=[f"MLFLOW_TRACKING_URI={uri}"])
    assert named.runtime_env["env_vars"] == {"PYTHONPATH": "library", **local}


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((), {"variables": {"MLFLOW_TRACKING_URI": "http://me:hunter2@mlflow:5000"}}),
        (("--runtime.tracking_uri", "http://me:hunter2@mlflow:5000"), {}),
        ((), {"extra": ["AWS_SECRET_ACCESS_KEY=hunter2"]}),
        ((), {"extra": ["HF_TOKEN=hunter2"]}),
        ((), {"extra": ["API_KEY=hunter2"]}),
        ((), {"extra": ["PROXY=http://me:hunter2@proxy"]}),
    ],
)
def test_secrets_are_refused_and_not_repeated(
    project: Path, arguments: Sequence[str], options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="could read") as caught:
        job_of(project, *arguments, **options)
    assert "hunter2" not in str(caught.value)


def test_an_mlflow_address_that_is_none_is_refused(project: Path) -> None:
    with pytest.raises(ConfigError, match="is no address"):
        job_of(project, variables={"MLFLOW_TRACKING_URI": "http://[::1:5000"})


def test_variables_can_be_added(project: Path) -> None:
    job = job_of(project, extra=["ROBUSTFT_STORAGE=/shared/a=b", "KEYBOARD=yes"])
    assert job.runtime_env["env_vars"]["ROBUSTFT_STORAGE"] == "/shared/a=b"
    assert job.runtime_env["env_vars"]["KEYBOARD"] == "yes"
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        job_of(project, extra=["ROBUSTFT_STORAGE"])


# --- ids -----------------------------------------------------------------------------------------


def test_the_id_is_made_of_command_and_commit(project: Path) -> None:
    git(project, "init", "--quiet")
    git(project, "add", ".")
    git(project, "commit", "--quiet", "--message", "one")
    first = job_of(project, "--lr", "0.1")
    assert first.stem.startswith("try-it-")
    assert first.repeatable
    assert job_of(project, "--lr", "0.1") == first
    assert job_of(project, "--lr", "0.2").stem != first.stem
    assert job_of(project, "--lr", "0.1", extra=["A=b"]).stem != first.stem
    # Words are not glued together: ["a b"] is not ["a", "b"].
    assert job_of(project, "a b").stem != job_of(project, "a", "b").stem

    (project / "new.py").write_text("")
    changed = job_of(project, "--lr", "0.1")
    assert changed.commit == f"{first.commit}+"
    assert not changed.repeatable

    git(project, "add", ".")
    git(project, "commit", "--quiet", "--message", "two")
    assert job_of(project, "--lr", "0.1").stem not in {first.stem, changed.stem}


def test_a_job_that_ran_gets_a_suffix_and_one_under_way_is_followed() -> None:
    job = Job(entrypoint="python a.py", runtime_env={}, commit="abc", stem="a-1")
    assert choose_id(job, {}) == ("a-1", False)
    assert choose_id(job, {"a-1": "FAILED"}) == ("a-1-2", False)
    assert choose_id(job, {"a-1": "FAILED", "a-1-2": "RUNNING"}) == ("a-1-2", True)
    assert choose_id(job, {"a-1": "STOPPED", "a-1-2": "SUCCEEDED"}) == ("a-1-3", False)
    # With changed files the same id may be other code, which must not be taken for this one.
    changed = dataclasses.replace(job, commit="abc+")
    assert choose_id(changed, {"a-1": "RUNNING"}) == ("a-1-2", False)
    assert choose_id(dataclasses.replace(job, commit=""), {"a-1": "PENDING"}) == ("a-1-2", False)


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 3, 3),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("FAILED", 0, 1),
        ("STOPPED", -15, 143),
        ("STOPPED", None, 1),
    ],
)
def test_the_exit_code_is_the_scripts_own(status: str, driver: int | None, code: int) -> None:
    assert exit_code(status, driver) == code


def test_the_address_is_the_dashboards() -> None:
    assert job_address(None, {}) == "http://127.0.0.1:8265"
    variables = {"RAY_API_SERVER_ADDRESS": "https://a:1/", "RAY_ADDRESS": "http://b:2"}
    assert job_address(None, variables) == "https://a:1"
    assert job_address("http://c:3", variables) == "http://c:3"
    assert job_address(None, {"RAY_ADDRESS": "http://b:2"}) == "http://b:2"
    with pytest.raises(ConfigError, match="the dashboard's address"):
        job_address(None, {"RAY_ADDRESS": "10.0.0.1:6379"})
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN") as caught:
        job_address("http://me:hunter2@c:3", {})
    assert "hunter2" not in str(caught.value)


# --- following -----------------------------------------------------------------------------------


class Cluster:
    """A cluster that plays back one (status, log) pair a look; an exception instead fails."""

    def __init__(self, *looks: tuple[str, str | Exception] | Exception, code: int | None = 0):
        self.looks = list(looks)
        self.code = code
        self.now: tuple[str, str | Exception] = ("PENDING", "")
        self.jobs: list[Any] = []
        self.submitted: list[dict[str, Any]] = []

    def get_job_info(self, job_id: str) -> Any:
        look = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if isinstance(look, Exception):
            raise look
        self.now = look
        return SimpleNamespace(status=look[0], driver_exit_code=self.code, message="the message")

    def get_job_logs(self, job_id: str) -> str:
        if isinstance(self.now[1], Exception):
            raise self.now[1]
        return self.now[1]

    def list_jobs(self) -> list[Any]:
        return self.jobs

    def submit_job(self, **options: Any) -> str:
        self.submitted.append(options)
        return str(options["submission_id"])


def no_pause(seconds: float) -> None:
    assert 0 < seconds <= 5


def test_every_piece_of_the_log_is_written_once() -> None:
    cluster = Cluster(
        ("PENDING", ""),
        ("RUNNING", "one\n"),
        ConnectionError("reset"),
        ("RUNNING", RuntimeError("Request failed with status code 500")),
        ("RUNNING", "one\ntwo"),
        ("FAILED", "one\ntwo\nthree\n"),
        code=3,
    )
    written: list[str] = []
    ended = follow(cluster, "a", written.append, pause=no_pause)
    assert written == ["one\n", "two", "\nthree\n"]
    assert (ended.status, ended.code, ended.message) == ("FAILED", 3, "the message")


def test_the_end_of_the_log_is_asked_for_again() -> None:
    gone = RuntimeError("agent is busy")
    cluster = Cluster(("RUNNING", "one\n"), ("SUCCEEDED", gone), ("SUCCEEDED", "one\nlast\n"))
    written: list[str] = []
    assert follow(cluster, "a", written.append, pause=no_pause).code == 0
    assert "".join(written) == "one\nlast\n"


def test_a_job_whose_log_is_gone_still_has_its_exit_code(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster(("FAILED", RuntimeError("node is dead")), code=7)
    assert follow(cluster, "a", lambda text: None, pause=no_pause).code == 7
    assert "the end of the log cannot be read: node is dead" in caplog.text


def test_a_silent_cluster_is_given_up_with_a_sentence() -> None:
    pauses: list[float] = []
    cluster = Cluster(ConnectionError("refused"))
    with pytest.raises(RunError, match=r"does not answer any more \(refused\).*give the same"):
        follow(cluster, "a", lambda text: None, pause=pauses.append)
    assert 180 < sum(pauses) < 600


def test_looks_become_rare_while_nothing_happens_and_frequent_after_news() -> None:
    quiet = [("RUNNING", "one")] * 20
    cluster = Cluster(*quiet, ("RUNNING", "one two"), ("SUCCEEDED", "one two"))
    pauses: list[float] = []
    follow(cluster, "a", lambda text: None, pause=pauses.append)
    assert pauses[19] == 5.0
    assert pauses[20] == pauses[0] == 0.5


# --- all of it -----------------------------------------------------------------------------------


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Return a cluster on which every job prints a line and succeeds."""
    cluster = Cluster(("SUCCEEDED", "hello\n"))
    monkeypatch.setattr(submitting, "_connect", lambda address: cluster)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    return cluster


JOB = Job(entrypoint="python a.py", runtime_env={"working_dir": "/w"}, commit="abc", stem="a-1")


def test_a_job_is_started_and_followed(cluster: Cluster) -> None:
    written: list[str] = []
    ended = submitting.submit(JOB, address="http://h:1", wait=True, write=written.append)
    assert (ended.submission_id, ended.code, written) == ("a-1", 0, ["hello\n"])
    assert cluster.submitted == [
        {
            "entrypoint": "python a.py",
            "submission_id": "a-1",
            "runtime_env": {"working_dir": "/w"},
            "metadata": {"commit": "abc"},
        }
    ]


def test_a_job_under_way_is_not_started_twice(cluster: Cluster) -> None:
    cluster.jobs = [SimpleNamespace(submission_id="a-1", status="RUNNING")]
    written: list[str] = []
    ended = submitting.submit(JOB, address="http://h:1", wait=True, write=written.append)
    assert (ended.submission_id, written, cluster.submitted) == ("a-1", ["hello\n"], [])


def test_not_waiting_returns_at_once(cluster: Cluster) -> None:
    cluster.looks = [AssertionError("nobody looks")]
    # A job without a submission id is one that a driver started by itself.
    cluster.jobs = [SimpleNamespace(submission_id=None, status="RUNNING")]
    ended = submitting.submit(JOB, address="http://h:1", wait=False, write=pytest.fail)
    assert (ended.status, ended.code) == ("PENDING", 0)


def test_ctrl_c_leaves_the_job_and_says_how_to_stop_it(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(job_id: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "get_job_logs", interrupted)
    with pytest.raises(KeyboardInterrupt, match="ray job stop a-1 --address http://h:1"):
        submitting.submit(JOB, address="http://h:1", wait=True, write=pytest.fail)


def test_a_refusal_is_one_sentence(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> str:
        raise RuntimeError("Request failed with status code 500: no\nTraceback ...")

    monkeypatch.setattr(cluster, "submit_job", refuse)
    with pytest.raises(RunError, match="did not take the job") as caught:
        submitting.submit(JOB, address="http://h:1", wait=True, write=pytest.fail)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(("token", "mode"), [("", "disabled"), ("abc", "token")])
def test_a_token_is_sent_if_there_is_one(
    token: str, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    monkeypatch.setenv("RAY_ADDRESS", "http://other:1")
    submitting.set_client_environment("http://h:1")
    assert submitting.os.environ["RAY_AUTH_MODE"] == mode
    assert submitting.os.environ["RAY_API_SERVER_ADDRESS"] == "http://h:1"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    submitting.set_client_environment("http://h:1")
    assert submitting.os.environ["RAY_AUTH_MODE"] == "disabled"
