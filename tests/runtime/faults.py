"""For tests of faults: the tiniest search, what it leaves in MLflow, its processes, and nodes."""

import json
import os
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from test_faults import MARK, Command

from robustft.models import Start, save_model
from robustft.runtime.experiment import dump_yaml, experiment_from_dict, experiment_to_dict

PATIENCE = 600.0
"""Seconds after which a step that should have come is given up; quiet machines need a tenth."""

TIMES = ("overhead", "seconds")
"""Metrics that tell how long something took: the only ones in which two runs may differ."""

HOST = "127.0.0.1"

CHECKPOINTS = "search/tune/*/checkpoint_*/state.pt"
"""Of running trials, below the run's folder."""


def write_tiny(
    folder: Path,
    *,
    search: bool = True,
    epochs: int = 8,
    model: str = "small_resnet",
    **runtime: Any,
) -> str:
    """Write an experiment of a minute at most and the model that it starts from; return its path.

    Args:
        folder: gets the model, the experiment's file and, below "runs", the runs.
        search: False: one training by Ray Train instead of two trials by Ray Tune.
        epochs: of each training.
        model: small_resnet has BatchNorm, with which results depend on the number of workers;
            resnet4b has none.
        runtime: fields of the section.
    """
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    shape = {"image_shape": (1, 28, 28), "mean": (0.286,), "std": (0.353,)}
    start = Start(architecture=model, num_classes=10, **shape)  # type: ignore[arg-type]
    save_model(folder / "start", start=start, state=start.build().state_dict(), card={})
    attack = {"num_steps": 1, "step_size": 0.05}
    experiment = experiment_from_dict(
        {
            "name": "tiny",
            "task": {"val_size": 100, "limit_train": 200, "limit_test": 60},
            "start": {"model": model, "checkpoint": str(folder / "start")},
            "method": {
                "name": "rft",
                "variant": "at",
                "epochs": epochs,
                "lr": 0.05,
                "batch_size": 50,
                "schedule": {"name": "constant"},
                "attack": attack,
                "val_attack": attack,
            },
            "search": {"space": {"lr": [0.05, 0.01]} if search else {}},
            "evaluation": {"suite": "clean", "sanity": False, "shard_size": 30},
            "runtime": {"storage": str(folder / "runs"), "cpus_per_worker": 1, **runtime},
        }
    )
    path = folder / "tiny.yaml"
    path.write_text(dump_yaml(experiment_to_dict(experiment)), encoding="utf-8")
    return str(path)


def run_folder(folder: Path) -> Path:
    """Return the one run below ``folder``, as soon as it is there."""
    wait_until(lambda: any(folder.glob("runs/tiny/*/run.json")), "the run's folder")
    (path,) = (folder / "runs" / "tiny").iterdir()
    return path


def wait_until(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what}: never came"
        time.sleep(0.05)


def processes(run: Command, name: str) -> Iterator[psutil.Process]:
    """Yield the processes of ``run`` whose command line contains ``name``, and no others."""
    for process in psutil.process_iter():
        try:
            ours = process.environ().get(MARK) == run.mark
            if ours and name in " ".join(process.cmdline()):
                yield process
        except psutil.Error:  # ended meanwhile, or not ours to look at
            continue


def summary(folder: Path) -> dict[str, Any]:
    """Return what the run below ``folder`` has found, without times."""
    values = json.loads((run_folder(folder) / "summary.json").read_text())
    assert values["failed_trials"] == {}
    return {name: values[name] for name in ("chosen", "before", "after", "num_trials")}


Point = tuple[str, str, int, float]
"""Name of the MLflow run, key, step, value."""


def points(folder: Path) -> Counter[Point]:
    """Return every metric in MLflow -> how often it is there; the experiment must be one run."""
    directory = run_folder(folder)
    assert count_runs(folder / "runs") == 1
    return points_of_run(directory, folder / "runs")


def count_runs(storage: Path) -> int:
    """Return how many experiments' runs are in the MLflow of ``storage``."""
    with sqlite3.connect(storage / "mlflow.db") as database:
        (runs,) = database.execute("SELECT COUNT(*) FROM runs").fetchone()
        tagged = "SELECT COUNT(*) FROM tags WHERE key = 'mlflow.parentRunId'"
        (children,) = database.execute(tagged).fetchone()
    count: int = runs - children
    return count


def points_of_run(directory: Path, storage: Path) -> Counter[Point]:
    """Return the metrics of one run, its stages and trials -> how often each is in MLflow."""
    with sqlite3.connect(storage / "mlflow.db") as database:
        named = "SELECT run_uuid FROM runs WHERE name LIKE ?"
        experiments = database.execute(named, (f"% {directory.name}",)).fetchall()
        assert len(experiments) == 1, f"not one run of {directory.name}: {experiments}"
        runs = database.execute(
            "SELECT run_uuid, name, status FROM runs WHERE run_uuid = ?1 OR run_uuid IN "
            "(SELECT run_uuid FROM tags WHERE key = 'mlflow.parentRunId' AND value = ?1)",
            experiments[0],
        ).fetchall()
        rows = database.execute(
            "SELECT run_uuid, key, step, value FROM metrics WHERE NOT is_nan"
        ).fetchall()
    assert {status for *_, status in runs} == {"FINISHED"}, runs
    names = {uuid: name for uuid, name, _ in runs} | {experiments[0][0]: "experiment"}
    assert len(set(names.values())) == len(runs), f"a run is there twice: {runs}"
    found = [(names[uuid], key, step, value) for uuid, key, step, value in rows if uuid in names]
    return Counter(point for point in found if not point[1].startswith(TIMES))


def finished_trials(folder: Path) -> int:
    """Return how many trials of the run below ``folder`` have their result."""
    return len(list(run_folder(folder).glob("search/tune/*/checkpoint_*/trial.json")))


def restarted_trials(folder: Path) -> int:
    """Return how many trials of the run below ``folder`` more than one process has worked on."""
    reports = run_folder(folder).glob("search/tune/*/result.json")
    workers = [
        {json.loads(line)["pid"] for line in path.read_text().splitlines()} for path in reports
    ]
    assert workers
    return sum(len(pids) > 1 for pids in workers)


# --- several nodes -------------------------------------------------------------------------------


class Nodes:
    """A cluster on this machine: a head without CPUs, where drivers are, and worker nodes."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._common = {"node_ip_address": HOST, "object_store_memory": 100 * 2**20}
        head = {**self._common, "num_cpus": 0, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.workers = [self.add() for _ in range(2)]
        self.address: str = self._cluster.address

    def add(self, **more: Any) -> Any:
        """Start a worker node of one CPU."""
        return self._cluster.add_node(**self._common, num_cpus=1, **more)

    def remove(self, node: Any) -> None:
        """Kill every process of a node at once."""
        self._cluster.remove_node(node, allow_graceful=False)

    def lose(self, index: int) -> None:
        """Kill every process of a worker node at once, and start another node."""
        self.remove(self.workers[index])
        self.workers[index] = self.add()

    def take_away(self, index: int) -> None:
        """Kill every process of a worker node at once; nothing takes its place."""
        self.remove(self.workers[index])

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


def running_nodes() -> Iterator[Nodes]:
    """Yield a cluster: the body of a fixture."""
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
