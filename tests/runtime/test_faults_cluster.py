"""Lost nodes, spot nodes that are taken back, stragglers, a dead controller of Ray Train."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from safetensors.torch import load_file
from test_faults import Command

pytestmark = [pytest.mark.ray, pytest.mark.cluster, pytest.mark.slow]

HOST = "127.0.0.1"
TRIAL = "ray::ImplicitFunc"
"""What Ray calls the process of a trial."""


class Nodes:
    """A cluster on this machine: a head without CPUs, where drivers are, and worker nodes."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._common = {"node_ip_address": HOST, "object_store_memory": 100 * 2**20}
        head = {**self._common, "num_cpus": 0, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.workers = [self.add() for _ in range(2)]
        self.address: str = self._cluster.address

    def add(self) -> Any:
        return self._cluster.add_node(**self._common, num_cpus=1)

    def lose(self, index: int) -> None:
        """Kill every process of a worker node at once, and start another node."""
        self._cluster.remove_node(self.workers[index], allow_graceful=False)
        self.workers[index] = self.add()

    def take_away(self, index: int) -> None:
        """Kill every process of a worker node at once; nothing takes its place."""
        self._cluster.remove_node(self.workers[index], allow_graceful=False)

    def announce_loss(self, index: int, *, seconds: float) -> None:
        """Say that a node will be taken back: what a cloud's notice becomes in Ray."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        deadline = int((time.time() + seconds) * 1000)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        node = self.workers[index].node_id
        accepted, why = GcsClient(address=self.address).drain_node(node, reason, "spot", deadline)
        assert accepted, why

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    before = dict(os.environ)
    # Its own folder, short for the sake of sockets: "auto" must go on finding another Ray.
    folder = Path("/tmp") / f"rf{os.getpid()}"
    folder.mkdir()
    os.environ["RAY_TMPDIR"] = str(folder)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    cluster = Nodes()
    try:
        yield cluster
    finally:
        cluster.close()
        for name, handler in handlers.items():
            signal.signal(name, handler)
        os.environ.clear()
        os.environ.update(before)


def search(folder: Path, nodes: Nodes, **runtime: Any) -> Command:
    """Start the tiny search, whose two trials run side by side on the two worker nodes."""
    return Command(
        folder, "search", write_tiny(folder, **runtime), "--json", RAY_ADDRESS=nodes.address
    )


def train(folder: Path, nodes: Nodes, **runtime: Any) -> Command:
    """Start the tiny experiment as one training by Ray Train."""
    path = write_tiny(folder, search=False, **runtime)
    return Command(folder, "train", path, "--json", RAY_ADDRESS=nodes.address)


def finish(run: Command) -> None:
    code, _, _ = run.finish()
    assert code == 0, "".join(run.lines)


@pytest.fixture(scope="module")
def calm(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("calm")
    finish(search(folder, nodes))
    assert set(points(folder).values()) == {1}
    return folder


def wait_for_checkpoints(folder: Path, count: int) -> None:
    directory = run_folder(folder)
    wait_until(lambda: len(list(directory.glob(CHECKPOINTS))) >= count, "checkpoints")


def test_lost_nodes(calm: Path, nodes: Nodes, tmp_path: Path) -> None:
    """Both worker nodes die, one after the other; wherever Ray had put something, it is lost."""
    run = search(tmp_path, nodes)
    wait_for_checkpoints(tmp_path, 2)
    nodes.lose(0)
    nodes.lose(1)
    finish(run)
    assert summary(tmp_path) == summary(calm)
    assert points(tmp_path) == points(calm)


def test_a_spot_node_is_taken_back_after_its_notice(
    calm: Path, nodes: Nodes, tmp_path: Path
) -> None:
    """Not one failure is allowed here: a loss with notice is none."""
    run = search(tmp_path, nodes, max_failures=0)
    wait_for_checkpoints(tmp_path, 2)
    nodes.announce_loss(0, seconds=2.0)
    time.sleep(2.0)
    nodes.lose(0)
    finish(run)
    assert summary(tmp_path) == summary(calm)
    assert points(tmp_path) == points(calm)


def test_a_straggler_is_waited_for(calm: Path, nodes: Nodes, tmp_path: Path) -> None:
    run = search(tmp_path, nodes)
    wait_for_checkpoints(tmp_path, 2)
    # Workers belong to their node, not to the run: it started them with its own variables.
    stopped = stop_one_trial()
    time.sleep(20.0)
    os.kill(stopped, signal.SIGCONT)
    finish(run)
    assert summary(tmp_path) == summary(calm)
    assert points(tmp_path) == points(calm)


def test_an_elastic_run_goes_on_with_the_workers_that_are_left(
    nodes: Nodes, tmp_path: Path
) -> None:
    """Begun on two nodes, ended on one: the weights of one worker that was never disturbed."""
    calm, elastic = tmp_path / "calm", tmp_path / "elastic"
    finish(train(calm, nodes))
    run = train(elastic, nodes, workers=2, min_workers=1)
    directory = run_folder(elastic)
    wait_until(lambda: any(directory.glob("train/*/checkpoint_*/state.pt")), "a checkpoint")
    nodes.take_away(1)
    finish(run)
    lines = "".join(run.lines)
    assert "training on 2 worker(s)" in lines
    assert "training on 1 worker(s)" in lines
    assert points_by_name(elastic) == points_by_name(calm)
    expected, found = (
        load_file(folder / "model" / "model.safetensors")
        for folder in (run_folder(calm), directory)
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    nodes.workers[1] = nodes.add()


def points_by_name(folder: Path) -> list[tuple[str, str, int]]:
    """Return run, key and step of every metric in MLflow, each there once."""
    found = sorted((run, key, step) for run, key, step, _ in points(folder).elements())
    assert len(found) == len(set(found))
    return found


def stop_one_trial() -> int:
    """Stop a process of a trial of this module's cluster."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        if TRIAL in " ".join(process.cmdline()):
            process.send_signal(signal.SIGSTOP)
            return process.pid
    raise AssertionError("no trial is running")


def test_a_dead_controller_of_ray_train(tmp_path: Path) -> None:
    """On an embedded Ray, where nobody else gives back what the controller had reserved."""
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    finish(Command(calm, "train", write_tiny(calm, search=False), "--json"))
    run = Command(disturbed, "train", write_tiny(disturbed, search=False), "--json")
    directory = run_folder(disturbed)
    wait_until(lambda: any(directory.glob("train/*/checkpoint_*/state.pt")), "a checkpoint")
    (controller,) = processes(run, "ray::TrainController")
    controller.kill()
    finish(run)
    assert "Ray Train's controller died" in "".join(run.lines)
    assert summary(disturbed) == summary(calm)
    assert set(points(disturbed)) == set(points(calm))
