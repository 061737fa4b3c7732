"""``cluster/local up``, a doctor on every node, jobs with their own exit codes, ``down``."""

import json
import os
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from deploy_files import CLUSTER

BIN = Path(sys.executable).parent
DOCTOR = """
import json, sys
from robustft.cluster_verbs import Doctor, examine
answer = examine(Doctor())
json.dump(answer.document, sys.stdout)
sys.exit(answer.code)
"""
SUBMIT = """
import sys
from robustft.cluster_verbs import Submit, submit_script
answer = submit_script(Submit(script=sys.argv[1], arguments=tuple(sys.argv[2:])))
print(answer.text)
sys.exit(answer.code)
"""
SCRIPT = """
import os, sys
import ray
ray.init(log_to_driver=False)
@ray.remote(num_cpus=1)
def there():
    return ray.get_runtime_context().get_node_id()
nodes = set(ray.get([there.remote() for _ in range(4)]))
workers = {n["NodeID"] for n in ray.nodes() if n["NodeName"].startswith("worker-")}
driver = ray.get_runtime_context().get_node_id()
print("tracking:", os.environ["MLFLOW_TRACKING_URI"])
print("worked on worker nodes only:", len(workers) == 2 and nodes <= workers)
print("driven from the head:", driver not in workers, flush=True)
sys.exit(int(sys.argv[1]))
"""


def clean_environment() -> dict[str, str]:
    """Return this process's variables without those that name a cluster."""
    ours = ("RAY_", "MLFLOW_", "ROBUSTFT_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def local(verb: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(CLUSTER / "local"), verb, "--folder", str(folder)],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


# --- without a cluster ---------------------------------------------------------------------------


def test_where_nothing_runs_there_is_nothing_to_stop(tmp_path: Path) -> None:
    done = local("status", tmp_path)
    assert done.returncode == 1
    assert json.loads(done.stdout)["running"] == {}
    assert local("down", tmp_path).returncode == 0


def test_a_stranger_with_the_same_number_is_left_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        # What `up` had started is gone, and the system has given its number to somebody else.
        created = psutil.Process(stranger.pid).create_time() - 100
        entry = {"pid": stranger.pid, "created": created}
        (tmp_path / "state.json").write_text(json.dumps({"processes": {"head": entry}}))
        assert json.loads(local("status", tmp_path).stdout)["running"] == {"head": False}
        assert local("down", tmp_path).returncode == 0
        assert stranger.poll() is None
        assert not (tmp_path / "state.json").exists()
    finally:
        stranger.kill()
        stranger.wait()


def test_what_was_started_is_stopped(tmp_path: Path) -> None:
    ours = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        entry = {"pid": ours.pid, "created": psutil.Process(ours.pid).create_time()}
        (tmp_path / "state.json").write_text(json.dumps({"processes": {"head": entry}}))
        assert local("down", tmp_path).returncode == 0
        assert ours.wait(timeout=10) != 0
    finally:
        ours.kill()
        ours.wait()


# --- with one ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("local")


@pytest.fixture(scope="module")
def variables(folder: Path) -> Iterator[dict[str, str]]:
    """Start the cluster for this module; return what a shell would have after `up`."""
    try:
        done = local("up", folder)
        logs = "\n".join(p.read_text()[-1500:] for p in (folder / "logs").glob("*.log"))
        assert done.returncode == 0, f"{done.stderr}\n{logs}"
        exported = [shlex.split(line)[1].partition("=") for line in done.stdout.splitlines()]
        named = {name: value for name, _, value in exported}
        yield {**clean_environment(), **named, "PATH": f"{BIN}:{os.environ['PATH']}"}
    finally:
        assert local("down", folder).returncode == 0


def processes(folder: Path) -> list[psutil.Process]:
    state = json.loads((folder / "state.json").read_text())
    roots = [psutil.Process(entry["pid"]) for entry in state["processes"].values()]
    return [*roots, *(child for root in roots for child in root.children(recursive=True))]


def python(code: str, *words: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env=variables,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.mark.cluster
def test_up_is_idempotent_and_everything_is_on_loopback(
    folder: Path, variables: dict[str, str]
) -> None:
    before = (folder / "state.json").read_text()
    # Another Ray of this machine must stay what "auto" finds.
    pointer = Path("/tmp/ray/ray_current_cluster")
    assert not pointer.exists() or pointer.read_text() != variables["RAY_ADDRESS"]
    again = local("up", folder)
    assert again.returncode == 0
    assert f"RAY_ADDRESS={variables['RAY_ADDRESS']}" in again.stdout
    assert (folder / "state.json").read_text() == before
    assert all(json.loads(local("status", folder).stdout)["running"].values())
    assert (folder / "token").stat().st_mode & 0o077 == 0
    listening = {
        (connection.laddr.ip, process.name())
        for process in processes(folder)
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening
    assert {ip for ip, _ in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listening


@pytest.mark.cluster
def test_the_doctor_sees_every_node(variables: dict[str, str]) -> None:
    done = python(DOCTOR, variables=variables)
    assert done.stdout, done.stderr[-3000:]
    document = json.loads(done.stdout)
    wrong = [check for check in document["checks"] if check["level"] == "error"]
    assert (done.returncode, document["ok"], wrong) == (0, True, [])
    found = {(check["where"], check["subject"]): check["found"] for check in document["checks"]}
    nodes = {where for where, subject in found if subject == "Python"} - {"here"}
    assert len(nodes) == 3
    assert found["cluster", "clocks"]
    assert "the same on all nodes" in found["cluster", "shared folder"]
    assert "answers" in found["here", "MLflow"]


@pytest.mark.cluster
def test_a_job_ends_with_its_own_exit_code_and_runs_anew_when_asked_again(
    variables: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "runtime_env.yaml").write_text("working_dir: .\n")
    (tmp_path / "try_it.py").write_text(SCRIPT)
    ended = []
    for code in (3, 3, 0):
        script = str(tmp_path / "try_it.py")
        done = python(SUBMIT, script, str(code), variables=variables)
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        assert f"tracking: {variables['MLFLOW_TRACKING_URI']}" in done.stdout
        assert "worked on worker nodes only: True" in done.stdout
        assert "driven from the head: True" in done.stdout
        ended.append(done.stdout.rstrip().splitlines()[-1])
    assert "FAILED with exit code 3" in ended[0]
    first, second = ended[0].partition(":")[0], ended[1].partition(":")[0]
    assert second == f"{first}-2"
    assert ended[2].endswith("SUCCEEDED")


@pytest.mark.cluster
@pytest.mark.slow
def test_rays_own_command_and_mlflows_page_work_as_the_guide_says(
    variables: dict[str, str], tmp_path: Path
) -> None:
    def ray_job(*words: str) -> str:
        done = subprocess.run(
            [str(BIN / "ray"), "job", *words],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    # Not followed: on a busy machine Ray's stream of the log breaks.
    command = ("python", "-c", "print(6 * 7, 'is the answer')")
    ray_job("submit", "--no-wait", "--submission-id", "by-ray", "--", *command)
    deadline = time.monotonic() + 120
    while "succeeded" not in ray_job("status", "by-ray").lower():
        assert time.monotonic() < deadline
        time.sleep(1)
    assert "42 is the answer" in ray_job("logs", "by-ray")
    with urllib.request.urlopen(variables["MLFLOW_TRACKING_URI"], timeout=30) as answer:
        assert "<title>MLflow</title>" in answer.read().decode()


@pytest.mark.cluster
def test_a_wrong_token_is_refused_with_a_sentence(
    variables: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "runtime_env.yaml").write_text("working_dir: .\n")
    (tmp_path / "try_it.py").write_text(SCRIPT)
    other: dict[str, Any] = {**variables, "RAY_AUTH_TOKEN": "wrong"}
    done = python(SUBMIT, str(tmp_path / "try_it.py"), variables=other)
    assert done.returncode != 0
    assert "wants another token" in done.stderr
    assert "ray get-auth-token" not in done.stdout


@pytest.mark.cluster
def test_down_stops_all_of_it(folder: Path, variables: dict[str, str]) -> None:
    started = processes(folder)
    assert len(started) > 10
    assert local("down", folder).returncode == 0
    _, alive = psutil.wait_procs(started, timeout=20)
    assert alive == []
    assert (folder / "mlflow.db").exists()
    assert local("down", folder).returncode == 0
