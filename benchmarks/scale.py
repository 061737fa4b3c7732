"""What a search of 1,000 trials costs besides training, on 8 simulated nodes of this machine.

The trials run a method that computes nothing: each reports some epochs of some metrics and returns
a tiny model. Everything around it is what a real search uses: ``robustft.runtime.search`` on Ray
Tune, the event actor, the spool, and MLflow on SQLite. So nearly all the time is overhead, of the
driver above all, and its growth from the first to the last trials is what a larger search would
feel. The nodes are processes of one machine: their number is real to Ray's scheduler, their CPUs
are not, and nothing is said about networks.

    python benchmarks/scale.py --write                 1,000 trials
    python benchmarks/scale.py --trials 40             to see it work
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import itertools
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import tyro

from robustft.methods import METHODS, Result
from robustft.methods.base import Method
from robustft.runtime.events import Event, EventPump
from robustft.runtime.experiment import RuntimeConfig, SearchConfig
from robustft.runtime.recording import TrackingListener, log_trials
from robustft.runtime.search import Trial, search
from robustft.runtime.session import connect, set_environment, source_root
from robustft.runtime.spool import Spool
from robustft.runtime.tracking import Tracker, replay
from robustft.runtime.trainer import Job

RESULTS = Path(__file__).parent / "results"
NODE_MEMORY = 80 * 2**20
"""Bytes of each node's object store, all of it shared memory of one machine."""
MIB = 2**20

LIMITS = {
    "overhead": (1.6, "s per trial at a time; docs/scaling.md: a tiny trial, process reused"),
    "memory": (4096.0, "MiB; docs/scaling.md: the driver's and 1,000 trials' records"),
    "growth": (1.5, "times; what is constant per trial would be 1"),
    "metrics": (1000 / 0.16, "metrics a second; one MLflow call of 1,000 metrics takes 0.16 s"),
}
"""What the numbers are held against."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    trials: int = 1000
    """Trials of the search."""
    nodes: int = 8
    """Simulated nodes beside the head."""
    cpus: int = 1
    """CPUs that each node claims to have: as many processes with torch (0.4 GB) run on it."""
    epochs: int = 5
    """Reports of each trial."""
    metrics: int = 8
    """Metrics of each report."""
    write: bool = False
    """Write the result to benchmarks/results/."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StubConfig:
    """The config of a method that computes nothing."""

    x: int = 0
    """What is searched: the number of the trial."""
    epochs: int = 1
    """Reports."""
    metrics: int = 1
    """Metrics of each."""


def train_stub(config: StubConfig, context: Any) -> Result:
    """Report what an epoch would have, as often as there are epochs, and return a tiny model."""
    names = ["val/clean", "val/robust", *(f"train/m{i}" for i in range(config.metrics - 2))]
    for epoch in range(1, config.epochs + 1):
        values = dict.fromkeys(names, (config.x + epoch) / 10_000)
        context.report(values, step=epoch, total=config.epochs)
    return Result(
        state={"weight": torch.zeros(8)},
        metrics={"val/clean": config.x / 10_000, "val/robust": 0.0},
    )


def register() -> None:
    """Add the stub to METHODS: here, and by Ray in every worker."""
    METHODS["stub"] = Method(name="stub", config=StubConfig, train=train_stub, paper="none")


@contextlib.contextmanager
def cluster(config: Config) -> Iterator[None]:
    """Start the nodes on loopback and connect to them."""
    import ray
    from ray.cluster_utils import Cluster

    common = {"node_ip_address": "127.0.0.1", "object_store_memory": NODE_MEMORY}
    nodes = Cluster(
        initialize_head=True,
        head_node_args={**common, "num_cpus": 0, "include_dashboard": False},
    )
    try:
        for _ in range(config.nodes):
            nodes.add_node(**common, num_cpus=config.cpus)
        folders = [str(Path(__file__).parent), str(source_root() or "")]
        ray.init(
            address=nodes.address,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={
                "env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, folders))},
                "worker_process_setup_hook": "scale.register",
            },
        )
        yield
    finally:
        ray.shutdown()
        nodes.shutdown()


class Memory:
    """The resident memory of this process, looked at once a second."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.before = self.now()
        self.peak = self.before
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def now(self) -> float:
        """Return MiB."""
        return float(self._process.memory_info().rss) / MIB

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(1.0):
            self.peak = max(self.peak, self.now())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What one search has shown.

    Args:
        trials: as the search returns them.
        seconds: of the search; then of ``log_trials``; then until MLflow had all of it.
        ended: seconds after the beginning at which each trial said that it had ended.
        memory: MiB of the driver: before, at most, after.
        held: the same at the end of each trial.
        spool: bytes of the records.
        metrics: metric values among them, in all.
        replay: seconds to send the same records to another, empty store.
        records: how many those are.
    """

    trials: list[Trial]
    seconds: tuple[float, float, float]
    ended: list[float]
    memory: tuple[float, float, float]
    held: list[float]
    spool: int
    metrics: int
    replay: float
    records: int


def measure(config: Config, folder: Path) -> Measured:
    """Run the search and send its records."""
    from mlflow import MlflowClient

    ended: list[float] = []
    held: list[float] = []
    runtime = RuntimeConfig(address="connected already")
    space = SearchConfig(space={"x": list(range(config.trials))})
    directory = folder / "runs" / "scale" / "1"
    memory = Memory()
    with connect(runtime) as session:
        tracker = Tracker(directory, experiment="scale", storage=folder / "runs")
        parent = tracker.start_run("scale", key="experiment", params={"method": "stub"})

        def note(event: Event) -> None:
            if event["kind"] == "end":
                ended.append(time.monotonic() - began)
                held.append(memory.now())

        pump = EventPump([note, TrackingListener(tracker, parent)])
        job = Job(
            method="stub",
            config=StubConfig(epochs=config.epochs, metrics=config.metrics),
            task=None,
            start=None,
            prepared=None,
            stage="search",
            run="",
            threads=1,
            gpu=False,
            send=pump.sender,
        )
        began = time.monotonic()
        trials = search(job, space, runtime, session, directory=directory / "search", cpus=1)
        pump.sync()
        searched = time.monotonic()
        log_trials(tracker, parent, trials)
        logged = time.monotonic()
        after = memory.now()
        tracker.finish_run(parent)
        tracker.close(timeout=3600)
        sent = time.monotonic()
        pump.close()
    memory.stop()
    spool = Spool(directory, header=None)
    count = sum(len(r["values"]) for r, _ in spool.read(0) if r["kind"] == "metrics")
    size = spool.size
    spool.close()
    other = f"sqlite:///{folder}/other.db"
    # A new file's schema takes seconds, whatever is sent.
    MlflowClient(tracking_uri=other).search_experiments()
    again = time.monotonic()
    replayed = replay(directory, tracking_uri=other)
    return Measured(
        trials=trials,
        seconds=(searched - began, logged - searched, sent - logged),
        ended=ended,
        memory=(memory.before, memory.peak, after),
        held=held,
        spool=size,
        metrics=count,
        replay=time.monotonic() - again,
        records=replayed.records,
    )


def pace(ended: Sequence[float]) -> list[float]:
    """Return seconds per trial in each quarter of a search, from when its trials ended.

    The first quarter begins with the first end: what comes before is start-up.
    """
    cuts = [round(i * (len(ended) - 1) / 4) for i in range(5)]
    return [
        (ended[right] - ended[left]) / (right - left)
        for left, right in itertools.pairwise(cuts)
        if right > left
    ]


def report(config: Config, found: Measured) -> list[str]:
    """Return the page."""
    finished = sum(trial.status == "finished" for trial in found.trials)
    quarters = pace(found.ended)
    width = config.nodes * config.cpus
    searching, logging_, sending = found.seconds
    per_trial = statistics.fmean(quarters)
    growth = quarters[-1] / quarters[0]
    rate = found.metrics / found.replay
    before, peak, after = found.memory
    half = len(found.held) // 2
    # Before that MLflow and its database are being imported.
    grown = 1024 * (found.held[-1] - found.held[half]) / (len(found.held) - 1 - half)

    def row(what: str, value: str, limit: str) -> str:
        text = "" if not limit else f"{LIMITS[limit][0]:.4g} {LIMITS[limit][1]}"
        return f"| {what} | {value} | {text} |"

    return [
        f"# What a search of {config.trials} trials costs, cpu, {datetime.date.today()}",
        "",
        f"Command: `python benchmarks/scale.py`, trials {config.trials}, nodes {config.nodes} with "
        f"{config.cpus} CPUs each (claimed), epochs {config.epochs}, metrics {config.metrics}.",
        f"Python {platform.python_version()}, torch {importlib.metadata.version('torch')}, "
        f"ray {importlib.metadata.version('ray')}, mlflow {importlib.metadata.version('mlflow')}, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[1]:.1f} (5 minutes).",
        "",
        "| what | measured | held against |",
        "|---|---|---|",
        row("trials finished", f"{finished} of {config.trials}", ""),
        row("search, s", f"{searching:.1f}", ""),
        row("start-up to the first end of a trial, s", f"{found.ended[0]:.1f}", ""),
        row("per trial, s (wall)", f"{per_trial:.3f}", ""),
        row(f"per trial and place ({width} at a time), s", f"{per_trial * width:.2f}", "overhead"),
        row("per trial, by quarters of the search, s", _list(quarters), ""),
        row("last quarter against the first", f"{growth:.2f}", "growth"),
        row("driver's memory before, at most, after, MiB", _list((before, peak, after), 0), ""),
        row("at most", f"{peak:.0f}", "memory"),
        row("grown per trial in the second half, KiB", f"{grown:.0f}", ""),
        row("log_trials, s", f"{logging_:.2f}", ""),
        row("MLflow has everything, s after that", f"{sending:.1f}", ""),
        row("spool, KiB per trial", f"{found.spool / 1024 / config.trials:.2f}", ""),
        row(f"replay of {found.records} records to an empty store, s", f"{found.replay:.1f}", ""),
        row("metrics a second in that replay", f"{rate:.0f}", "metrics"),
        row("runs a second in that replay", f"{config.trials / found.replay:.1f}", ""),
        "",
        "MLflow's limit is that of one call with nothing but metrics; a trial here is a run with "
        "parameters, tags and an end, and few metrics, so runs are what costs.",
    ]


def _list(values: Sequence[float], digits: int = 3) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def main(config: Config) -> None:
    """Measure, print, and write the page if asked to."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # every port on loopback
    set_environment(RuntimeConfig())
    register()
    # In the temporary folder's own name there is room for the paths of sockets.
    with tempfile.TemporaryDirectory(prefix="rs") as folder, cluster(config):
        found = measure(config, Path(folder))
    text = "\n".join(report(config, found)) + "\n"
    print(text)
    if config.write:
        RESULTS.mkdir(exist_ok=True)
        name = f"scale_{config.trials}_cpu_{datetime.date.today()}.md"
        (RESULTS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    # Workers import this file by its name, so the stub must not be one of __main__.
    import scale

    scale.main(tyro.cli(scale.Config, description=__doc__))
