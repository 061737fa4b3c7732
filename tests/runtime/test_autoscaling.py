"""A cluster that grows: what it can never offer is refused, and what waits for nodes says so.

The whole ones start Ray's own fake cloud (nodes are processes of this machine) and its autoscaler
of the second generation. Ray's ``AutoscalingCluster`` would do, but it begins with `ray stop`,
which ends every other Ray of the machine, and its configuration is missing from the wheel.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from small import small_experiment

from robustft.errors import ResourceError
from robustft.runtime import autoscaling
from robustft.runtime.autoscaling import Fleet, NodeType, fleet_of, waiting_of
from robustft.runtime.experiment import RuntimeConfig, dump_yaml, experiment_to_dict
from robustft.runtime.session import Session, set_environment

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

# --- the arithmetic ------------------------------------------------------------------------------

HEAD = {"resources": {"CPU": 4}}


def config(*, most: int = 16, **types: dict[str, Any]) -> dict[str, Any]:
    kinds = {"head": HEAD, **types}
    return {"max_workers": most, "head_node_type": "head", "available_node_types": kinds}


def kind(cpus: float, gpus: float = 0, most: int | None = None) -> dict[str, Any]:
    resources = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
    return {"resources": resources, **({} if most is None else {"max_workers": most})}


def fleet(*, most: int = 16, **types: dict[str, Any]) -> Fleet:
    found = fleet_of(config(most=most, **types))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("cpus", "gpus", "expected"),
    [
        (1, 0, 4 + 10 * 8 + 6 * 2),  # the roomy ones first; six places are left for the others
        (4, 0, 1 + 10 * 2),  # a small one holds none, and takes no place
        (5, 0, 10),
        (9, 0, 0),
        (1, 1, 10),
        (1, 0.25, 10 * 4),
        (1, 2, 0),
        (8, 1, 10),
    ],
)
def test_a_grown_cluster_holds(cpus: float, gpus: float, expected: int) -> None:
    grown = fleet(large=kind(8, 1, most=10), small=kind(2))
    assert grown.holds(cpus=cpus, gpus=gpus) == expected


def test_the_limit_of_all_types_counts_as_well_as_that_of_each() -> None:
    types = {"large": kind(8, most=10), "small": kind(2, most=10)}
    assert fleet(most=12, **types).holds(cpus=1, gpus=0) == 4 + 10 * 8 + 2 * 2
    assert fleet(most=3, **types).holds(cpus=1, gpus=0) == 4 + 3 * 8
    assert fleet(most=0, **types).holds(cpus=1, gpus=0) == 4


def test_where_the_cloud_decides_there_is_no_telling() -> None:
    assert fleet_of(config(unknown={"node_config": {"InstanceType": "g6.2xlarge"}})) is None
    assert fleet_of({**config(), "head_node_type": "haed"}) is None
    assert fleet_of({}) is None


def test_the_shipped_configuration_is_understood() -> None:
    shipped = fleet_of(yaml.safe_load((ROOT / "ray_config.yaml").read_text(encoding="utf-8")))
    assert shipped is not None
    assert shipped.head == NodeType("head", cpus=4, gpus=0, most=1)
    assert shipped.holds(cpus=1, gpus=1) == 16  # spot and on-demand together
    assert shipped.holds(cpus=1, gpus=2) == 0


def growing(of: Fleet | None) -> Session:
    return Session(embedded=False, num_cpus=0, num_gpus=0, largest_node_cpus=0, fleet=of)


def test_what_no_node_can_offer_is_refused_with_the_arithmetic() -> None:
    session = growing(fleet(most=2, large=kind(8, 1)))
    session.require(2, cpus=8, gpus=1, growing=True)
    with pytest.raises(ResourceError) as none:
        session.require(1, cpus=16, gpus=0, growing=True)
    assert str(none.value) == (
        "the run asks for 1 workers with 16 CPUs each, and none of them fits on any node of the "
        "largest cluster that the autoscaler may make (1 x head with 4 CPUs, 2 x large with 8 CPUs "
        "and 1 GPUs, at most 2 beside head): lower the workers, runtime.cpus_per_worker or "
        "runtime.gpus_per_worker, or give the autoscaler other node types or more nodes"
    )
    with pytest.raises(ResourceError, match="3 workers with 1 CPUs and 1 GPUs each, and only 2 of"):
        session.require(3, cpus=1, gpus=1, growing=True)


def test_nothing_is_refused_where_nobody_knows() -> None:
    growing(None).require(10_000, cpus=64, gpus=8, growing=True)


def test_an_embedded_ray_does_not_grow() -> None:
    embedded = Session(embedded=True, num_cpus=4, num_gpus=0, largest_node_cpus=4)
    with pytest.raises(ResourceError, match="name a larger cluster in RAY_ADDRESS"):
        embedded.require(5, cpus=1, gpus=0, growing=True)


def test_ray_train_waits_for_a_machine_that_boots(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
    monkeypatch.delenv(name, raising=False)
    set_environment(RuntimeConfig())
    assert name not in os.environ
    set_environment(RuntimeConfig(autoscaling=True))
    # ray_config.yaml: "a new worker needs about five minutes", and Ray Train gives up after 60 s.
    assert float(os.environ[name]) >= 1800


# --- the autoscaler's own file -------------------------------------------------------------------


class FakeProcess:
    def __init__(self, *cmdline: str) -> None:
        self.info = {"cmdline": list(cmdline)}


def test_the_file_of_this_clusters_autoscaler_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(name: str, cpus: int) -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(config(only=kind(cpus))), encoding="utf-8")
        return path

    def process(port: int, *more: object) -> FakeProcess:
        return FakeProcess(
            "python", "monitor.py", f"--gcs-address=127.0.0.1:{port}", *map(str, more)
        )

    other, ours = written("other.yaml", 64), written("ours.yaml", 8)
    running = [
        process(6379, f"--autoscaling-config={other}"),
        process(16380, f"--autoscaling-config={other}"),
        process(6380),  # another process of the same cluster
        process(6380, f"--autoscaling-config={ours}"),
    ]
    monkeypatch.setattr(psutil, "process_iter", lambda names: iter(running))
    found = autoscaling._fleet_on_this_node("6380")
    assert found is not None
    assert found.holds(cpus=8, gpus=0) == 16
    assert autoscaling._fleet_on_this_node("7000") is None
    ours.unlink()
    assert autoscaling._fleet_on_this_node("6380") is None


def test_what_waits_is_counted_and_what_is_hopeless_named() -> None:
    pb = pytest.importorskip("ray.core.generated.autoscaler_pb2")

    def request(**resources: float) -> Any:
        return pb.ResourceRequest(resources_bundle=resources)

    def group(*requests: Any) -> Any:
        return pb.GangResourceRequest(requests=requests)

    state = pb.ClusterResourceState(
        node_states=[pb.NodeState(status=status) for status in (1, 2, 3)],
        pending_resource_requests=[pb.ResourceRequestByCount(request=request(CPU=1), count=3)],
        pending_gang_resource_requests=[
            group(request(CPU=1)),
            group(request(CPU=2, GPU=1), request(CPU=2, GPU=1)),
        ],
    )
    scaler = pb.AutoscalingState(
        pending_instance_requests=[pb.PendingInstanceRequest(count=2)],
        pending_instances=[pb.PendingInstance()],
        infeasible_gang_resource_requests=[group(request(CPU=64))],
    )
    found = waiting_of(
        pb.GetClusterStatusReply(cluster_resource_state=state, autoscaling_state=scaler)
    )
    assert str(found) == (
        "5 waiting for nodes (4 x 1 CPU; 1 x 2 of 2 CPU 1 GPU); 2 there, 3 coming"
    )
    assert found.hopeless == "64 CPU"
    # Newer Rays say the bundles of a group elsewhere.
    selector = pb.BundleSelector(resource_requests=[request(CPU=7)])
    state = pb.ClusterResourceState(
        pending_gang_resource_requests=[pb.GangResourceRequest(bundle_selectors=[selector])]
    )
    later = waiting_of(pb.GetClusterStatusReply(cluster_resource_state=state))
    assert later.wanted == "1 x 7 CPU"


# --- a cluster that grows ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Growing:
    """A head without CPUs, and up to two workers of one CPU that come when something waits."""

    address: str
    environment: dict[str, str]

    def nodes(self) -> int:
        """Return how many nodes are alive."""
        code = (
            "import ray; ray.init(log_to_driver=False, logging_level='ERROR');"
            "print(sum(n['Alive'] for n in ray.nodes()))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return int(done.stdout)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def provider(port: int, head: str) -> dict[str, Any]:
    module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    return {
        "type": "external",
        "module": module,
        "head_node_id": head,
        "gcs_address": f"127.0.0.1:{port}",
        "launch_multiple": True,
        # Nothing is installed on nodes that are processes of this machine.
        "disable_node_updaters": True,
    }


def written_config(folder: Path, port: int, head: str) -> Path:
    store = {"object_store_memory": 100 * 2**20}
    kinds = {
        # The fake cloud knows its head by this name only.
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {"CPU": 1, **store},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 2,
        },
    }
    lists = (
        *("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands"),
        *("setup_commands", "head_setup_commands", "worker_setup_commands"),
        *("head_start_ray_commands", "worker_start_ray_commands"),
    )
    whole = {
        "cluster_name": "growing",
        "max_workers": 2,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        "provider": provider(port, head),
        "auth": {"ssh_user": "nobody"},
        "available_node_types": kinds,
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "docker": {},
        **{name: [] for name in lists},
    }
    path = folder / "autoscaling.yaml"
    path.write_text(yaml.safe_dump(whole), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Growing]:
    """Start the head and its autoscaler on loopback, and stop exactly what was started."""
    if " " in sys.executable:
        pytest.skip("`ray start` cannot run from a folder with a space")
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    # Sockets have short paths; and what lies here tells our processes from all others.
    folder = Path(tempfile.mkdtemp(prefix="rg", dir="/tmp"))
    port, dashboard, agent, client = (free_port() for _ in range(4))
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(folder),
    }
    of_the_head = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    log = (folder / "head.log").open("w")
    head = subprocess.Popen(
        [
            *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=0"),
            *("--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=false"),
            *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-port={dashboard}"),
            *(f"--ray-client-server-port={client}", f"--temp-dir={folder}"),
            f"--object-store-memory={100 * 2**20}",
            f"--autoscaling-config={written_config(folder, port, FAKE_HEAD_NODE_ID)}",
            "--disable-usage-stats",
        ],
        env={**environment, **of_the_head},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    ours = {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    growing_cluster = Growing(f"127.0.0.1:{port}", ours)
    try:
        wait_until(lambda: head.poll() is None and answers(port), seconds=90)
        yield growing_cluster
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(timeout=60)
        left = [p for p in psutil.process_iter(["cmdline"]) if belongs(p, folder, port)]
        for process in left:
            process.terminate()
        _, alive = psutil.wait_procs(left, timeout=20)
        for process in alive:
            process.kill()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def belongs(process: psutil.Process, folder: Path, port: int) -> bool:
    """Return whether a process is of the cluster in ``folder``; nodes are no children of ours."""
    words = process.info["cmdline"] or ()
    return any(str(folder) in w or w.endswith(f"127.0.0.1:{port}") for w in words)


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def wait_until(condition: Any, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.5)


ATTACK = {"num_steps": 1, "step_size": 0.05}
SCHEDULE = {"name": "constant"}
SHORT = {"epochs": 1, "batch_size": 30, "schedule": SCHEDULE}
AT = {"name": "at", **SHORT, "attack": ATTACK, "val_attack": ATTACK}
TINY: dict[str, Any] = {
    "task": {"limit_train": 60, "val_size": 20, "limit_test": 20},
    "start": {"method": AT},
    "search": {"space": {"lr": [0.001, 0.002, 0.003, 0.004]}},
}


def robustft(growing: Growing, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    own = {"ROBUSTFT_STORAGE": str(folder / "runs"), "ROBUSTFT_HOME": str(folder / "home")}
    return subprocess.run(
        [sys.executable, "-m", "robustft.cli", *words],
        env={**growing.environment, **own},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def experiment_file(folder: Path, **runtime: Any) -> str:
    small = small_experiment(folder / "runs", **TINY, runtime={"autoscaling": True, **runtime})
    path = folder / "small.yaml"
    path.write_text(dump_yaml({**experiment_to_dict(small), "method": AT}), encoding="utf-8")
    return str(path)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_search_makes_the_cluster_grow_and_shrink(cluster: Growing, tmp_path: Path) -> None:
    assert cluster.nodes() == 1
    done = robustft(cluster, tmp_path, "search", experiment_file(tmp_path), "--json")
    assert done.returncode == 0, done.stderr[-4000:]
    trials = json.loads(done.stdout)["summary"]
    assert trials["after"]["mean"]
    lines = done.stderr.splitlines()
    # The start waited for the first node; trials for the second, and for a place. What is said is
    # what was so at the moment of a look, every few seconds.
    waiting = [line for line in lines if "waiting for nodes" in line]
    there = [int(number) for line in waiting for number in re.findall(r"(\d+) there", line)]
    assert max(there, default=0) > 1, done.stderr[-4000:]
    assert any("nothing is waiting for nodes any more" in line for line in lines)
    assert "search [4/4]" in done.stderr
    wait_until(lambda: cluster.nodes() == 1, seconds=90)


@pytest.mark.cluster
@pytest.mark.slow
def test_what_the_autoscaler_can_never_offer_is_refused_at_once(
    cluster: Growing, tmp_path: Path
) -> None:
    for verb in ("search", "validate"):
        file = experiment_file(tmp_path, cpus_per_worker=2)
        done = robustft(cluster, tmp_path, verb, file)
        assert done.returncode != 0
        assert "none of them fits on any node" in done.stderr + done.stdout
        assert "2 x worker with 1 CPUs" in done.stderr + done.stdout
        assert "waiting for nodes" not in done.stderr
        assert "start: training" not in done.stderr
    wide = robustft(cluster, tmp_path, "validate", experiment_file(tmp_path, workers_per_trial=3))
    assert "3 workers with 1 CPUs each, and only 2 of them fit" in wide.stderr + wide.stdout
