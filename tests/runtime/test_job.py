"""The experiment as a Ray job: the literal command of the README gives the laptop's result."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from faults import points_of_run

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return what both the cluster and the laptop run have in common."""
    folder = tmp_path_factory.mktemp("job")
    variables = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "ROBUSTFT_HOME": str(folder / "home"),
    }
    for name in ("RAY_ADDRESS", "ROBUSTFT_STORAGE", "OMP_NUM_THREADS"):
        variables.pop(name, None)
    return variables


@pytest.fixture(scope="module")
def dashboard(environment: dict[str, str]) -> Iterator[str]:
    """Start a head node on loopback for this module and stop exactly what was started."""
    if " " in sys.executable:
        pytest.skip("`ray start` cannot run from a folder with a space (its client server cannot)")
    port, gcs, client, agent = (free_port() for _ in range(4))
    address, health = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{agent}"
    head = subprocess.Popen(
        [
            str(BIN / "ray"),
            "start",
            "--head",
            "--block",
            # As many as an embedded Ray takes: threads decide the last bits of a sum.
            f"--num-cpus={os.cpu_count()}",
            f"--port={gcs}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={port}",
            f"--dashboard-agent-listen-port={agent}",
            f"--ray-client-server-port={client}",
            "--disable-usage-stats",
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 90
        while True:
            assert head.poll() is None, "ray start ended"
            assert time.monotonic() < deadline, "the dashboard did not answer in 90 s"
            try:
                # The second one takes the jobs, and is there some seconds after the first.
                for url in (f"{address}/api/version", f"{health}/api/local_raylet_healthz"):
                    with urllib.request.urlopen(url, timeout=2) as answer:
                        assert answer.status == 200
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        if head.poll() is None:
            tree = psutil.Process(head.pid).children(recursive=True)
            head.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs(tree, timeout=20)
            for process in alive:
                process.kill()
            head.wait(timeout=20)


def summary_of(storage: Path) -> dict[str, object]:
    (path,) = storage.glob("*/*/summary.json")
    loaded: dict[str, object] = json.loads(path.read_text())
    return loaded


SMALL = (
    *("--task.limit_train", "1500", "--task.val_size", "200"),
    *("--start.method.epochs", "2", "--method.epochs", "2"),
    *("--search.space.modules", "mrc-1", "last", "--search.space.lr", "0.001"),
    *("--evaluation.limit", "200", "--evaluation.corruption_limit", "50"),
)
"""Overrides that leave every stage in place and a tenth of the time."""


def wait_for(job: str, *, address: str, seconds: float) -> None:
    """Wait until a job has succeeded.

    ``ray job submit`` would wait as well, but it gives up where the stream of the log breaks, which
    happens on a busy machine while the job goes on.
    """
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(address)
    deadline = time.monotonic() + seconds
    while not client.get_job_status(job).is_terminal():
        assert time.monotonic() < deadline, client.get_job_logs(job)[-3000:]
        time.sleep(1)
    assert client.get_job_status(job) == "SUCCEEDED", client.get_job_logs(job)[-3000:]


def submit(home: Path, *words: str, dashboard: str, environment: dict[str, str]) -> None:
    """Submit a script by the literal command of the README; the job is called as its home is."""
    submitted = subprocess.run(
        [
            str(BIN / "ray"),
            "job",
            "submit",
            *("--address", dashboard, "--working-dir", "."),
            *("--no-wait", "--submission-id", home.name),
            *("--runtime-env-json", json.dumps({"env_vars": {"ROBUSTFT_HOME": str(home)}})),
            *("--", "python", *words),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert submitted.returncode == 0, submitted.stdout[-3000:] + submitted.stderr[-3000:]


def local(*words: str, environment: dict[str, str]) -> None:
    """Run robustft or a script with the Ray of its own."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(SMALL, id="small"),
        pytest.param((), id="as it is", marks=pytest.mark.slow),
    ],
)
def test_the_job_gives_the_same_result_as_the_local_run(
    overrides: tuple[str, ...], dashboard: str, environment: dict[str, str], tmp_path: Path
) -> None:
    script = "experiments/rift_sweep.py"
    # A home for each case: caches and runs of the other one would be found there.
    home = tmp_path / f"job-{len(overrides)}"
    submit(home, script, *overrides, dashboard=dashboard, environment=environment)
    wait_for(home.name, address=dashboard, seconds=900)
    # A job writes to ROBUSTFT_HOME, since its working directory is a temporary copy.
    job = summary_of(home / "runs")

    local_environment = {
        **environment,
        "ROBUSTFT_HOME": str(tmp_path / "home"),
        "ROBUSTFT_STORAGE": str(tmp_path / "runs"),
    }
    local(script, *overrides, environment=local_environment)
    alone = summary_of(tmp_path / "runs")
    for name in ("chosen", "before", "after", "fingerprint"):
        assert job[name] == alone[name], name


@pytest.mark.slow
def test_a_stopped_job_goes_on_where_it_was(
    dashboard: str, environment: dict[str, str], tmp_path: Path
) -> None:
    from ray.job_submission import JobSubmissionClient

    script = "experiments/rift_sweep.py"
    overrides = (*SMALL, "--search.space.modules", "mrc-1", "--method.epochs", "20")
    home = tmp_path / "stopped-job"
    submit(home, script, *overrides, dashboard=dashboard, environment=environment)
    client = JobSubmissionClient(dashboard)
    deadline = time.monotonic() + 600
    while not any(home.glob("runs/*/*/search/tune/*/checkpoint_*/state.pt")):
        assert time.monotonic() < deadline, client.get_job_logs(home.name)[-3000:]
        assert not client.get_job_status(home.name).is_terminal()
        time.sleep(0.2)
    assert client.stop_job(home.name)
    while not client.get_job_status(home.name).is_terminal():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert client.get_job_status(home.name) == "STOPPED"
    (record,) = home.glob("runs/*/*/run.json")
    assert not (record.parent / "summary.json").exists()
    assert not any(record.parent.glob("search/tune/*/checkpoint_*/trial.json"))
    said = client.get_job_logs(home.name)
    assert f"robustft resume {record.parent}" in said.splitlines()[-1], said[-3000:]

    resumed = {**environment, "ROBUSTFT_HOME": str(home)}
    local("-m", "robustft.cli", "resume", str(record.parent), environment=resumed)
    undisturbed = {
        **environment,
        "ROBUSTFT_HOME": str(tmp_path / "home"),
        "ROBUSTFT_STORAGE": str(tmp_path / "runs"),
    }
    local(script, *overrides, environment=undisturbed)
    found, alone = summary_of(home / "runs"), summary_of(tmp_path / "runs")
    for name in ("chosen", "before", "after", "fingerprint"):
        assert found[name] == alone[name], name
    assert points_of_run(record.parent, home / "runs") == points_of_run(
        next((tmp_path / "runs").glob("*/*/run.json")).parent, tmp_path / "runs"
    )
