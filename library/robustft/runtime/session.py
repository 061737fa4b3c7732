"""Connect to Ray: embedded on this machine, or the cluster that an address names.

An embedded Ray listens on the loopback interface only. Workers get the driver's robustft, whether
that is an installed package, a checkout, or the working directory that a Ray job has shipped.
"""

import contextlib
import dataclasses
import logging
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import robustft
from robustft.data.home import home
from robustft.data.storage import is_uri, local_path, working_folder
from robustft.errors import ResourceError
from robustft.runtime.autoscaling import Fleet, find_fleet
from robustft.runtime.experiment import RuntimeConfig

__all__ = [
    "Session",
    "connect",
    "default_output",
    "in_ray_job",
    "ray_address",
    "set_environment",
    "set_patience",
    "source_root",
    "storage_place",
    "storage_root",
]

log = logging.getLogger(__name__)

ENVIRONMENT = {
    # Ray reads this once in a process, which could then not go on to a cluster of the other mode.
    # Who shares a machine, and so its loopback, with others sets it to token, and RAY_AUTH_TOKEN to
    # a secret of their own.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # How fast Ray Train notices reports and deaths; the default of 2 s is long for small runs.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Results are read from our own tables; Tune need not write CSV and TensorBoard files as well.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # A trial that failed reports no metric, which must end neither ASHA nor Optuna.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ctrl-C ends a search at once, as everywhere else; what is finished is on disk already.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}
GROWING_ENVIRONMENT = {
    # A new machine works after minutes. Ray Train would give up on it after 60 seconds, and on the
    # run after a few such times.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "3600",
}
ANSWER_SECONDS = 10.0
"""How long a cluster may take to accept a connection."""
LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Despite its name, "0" is what makes Ray bind every port to the loopback interface."""
EMBEDDED_ENVIRONMENT = {
    LOOPBACK_VARIABLE: "0",
    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    # Workers wait for the next fan-out instead of starting Python and torch again, but not through
    # a whole search: each holds 600 MB.
    "RAY_idle_worker_killing_time_threshold_ms": "3000",
    # glibc gives a tensor's pages back to the system as soon as it is freed, and a network on a CPU
    # then spends a fifth of its time in page faults. Workers keep up to 256 MiB instead.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Session:
    """A connection to Ray.

    Args:
        embedded: True if this process started the Ray that it uses.
        num_cpus, num_gpus: of the whole cluster when the session began.
        largest_node_cpus: CPUs of the largest node: the most that one worker can have.
        fleet: what an autoscaler may make of the cluster; None where there is none or no telling.
    """

    embedded: bool
    num_cpus: int
    num_gpus: float
    largest_node_cpus: int
    fleet: Fleet | None = None

    def require(self, workers: int, *, cpus: int, gpus: float, growing: bool) -> None:
        """Refuse what the cluster can never offer; Ray itself would wait for ever.

        Args:
            workers: how many have to run at the same time.
            cpus, gpus: of each.
            growing: the cluster may be too small now, if its autoscaler can make it large enough.
                An embedded Ray never grows.

        Raises:
            ResourceError: naming what is asked, what there is, and what to change.
        """
        if growing and not self.embedded:
            self._require_fleet(workers, cpus=cpus, gpus=gpus)
            return
        larger = (
            "name a larger cluster in RAY_ADDRESS"
            if self.embedded
            else "set runtime.autoscaling if it will grow"
        )
        if workers * cpus > self.num_cpus or cpus > self.largest_node_cpus:
            raise ResourceError(
                f"the run asks for {workers} workers with {cpus} CPUs each and the cluster has "
                f"{self.num_cpus} CPUs (at most {self.largest_node_cpus} on a node): lower the "
                f"workers or runtime.cpus_per_worker, or {larger}"
            )
        if workers * gpus > self.num_gpus:
            raise ResourceError(
                f"the run asks for {workers} workers with {gpus:g} GPUs each and the cluster has "
                f"{self.num_gpus:g} GPUs: lower the workers or runtime.gpus_per_worker, or {larger}"
            )

    def _require_fleet(self, workers: int, *, cpus: int, gpus: float) -> None:
        if self.fleet is None:
            return
        most = self.fleet.holds(cpus=cpus, gpus=gpus)
        if workers <= most:
            return
        asked = f"{workers} workers with {cpus} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        fit = "none of them fits on any node" if not most else f"only {most} of them fit"
        raise ResourceError(
            f"the run asks for {asked} each, and {fit} of the largest cluster that the autoscaler "
            f"may make ({self.fleet}): lower the workers, runtime.cpus_per_worker or "
            "runtime.gpus_per_worker, or give the autoscaler other node types or more nodes"
        )


def in_ray_job() -> bool:
    """Return True in the driver of ``ray job submit``."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def storage_place(runtime: RuntimeConfig) -> str | None:
    """Return the path or URI that was given for all runs; None: the default."""
    return runtime.storage or os.environ.get("ROBUSTFT_STORAGE")


def storage_root(runtime: RuntimeConfig) -> Path:
    """Return the local folder of all runs: ``runtime.storage``, $ROBUSTFT_STORAGE, or a default."""
    configured = storage_place(runtime)
    if configured and is_uri(configured):
        # Object storage: runs are at work in a local folder, and published from there.
        return local_path(configured) or working_folder(configured)
    if configured:
        return Path(configured).expanduser().resolve()
    if in_ray_job():
        # A job's working directory is a temporary copy: results there would vanish with it.
        return home().resolve() / "runs"
    return Path("runs").resolve()


def default_output(name: str) -> Path:
    """Return the folder of an experiment's tables where none was named: ``name`` beside the runs.

    A Ray job's working directory is a temporary copy, in which they would be lost.
    """
    return storage_root(RuntimeConfig()) / name


def source_root() -> Path | None:
    """Return the folder to put on workers' PYTHONPATH, or None for an installed package."""
    root = Path(robustft.__file__).resolve().parents[1]
    return root if (root.parent / "pyproject.toml").is_file() else None


def ray_address(runtime: RuntimeConfig) -> str | None:
    """Return the cluster's address, or None for an embedded Ray."""
    return runtime.address or os.environ.get("RAY_ADDRESS") or None


def set_environment(runtime: RuntimeConfig) -> None:
    """Set what Ray reads when it is imported; MLflow imports it too, so call this first."""
    variables = dict(ENVIRONMENT)
    if ray_address(runtime) is None:
        variables |= EMBEDDED_ENVIRONMENT
        if "ray" in sys.modules and LOOPBACK_VARIABLE not in os.environ:
            log.warning(
                "ray was imported before robustft: the embedded Ray may listen on other "
                "interfaces than loopback"
            )
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    set_patience(runtime)


def set_patience(runtime: RuntimeConfig) -> None:
    """Let Ray Train runs that start in this process wait for nodes, where the cluster grows."""
    if runtime.autoscaling:
        for name, value in GROWING_ENVIRONMENT.items():
            os.environ.setdefault(name, value)


@contextlib.contextmanager
def connect(runtime: RuntimeConfig) -> Iterator[Session]:
    """Connect to Ray for the duration of a ``with`` block; an embedded Ray stops at its end.

    Raises:
        ResourceError: an address is given and nothing answers there, or an embedded Ray does not
            start in its time.
    """
    address = ray_address(runtime)
    embedded = address is None
    set_environment(runtime)
    import ray

    started_here = not ray.is_initialized()
    try:
        if started_here:
            if address is not None:
                _require_answer(address)
            with _own_sigterm():
                _init(ray, address)
        session = _describe(ray, embedded=embedded and started_here)
        if runtime.autoscaling and not embedded:
            session = dataclasses.replace(session, fleet=find_fleet(ray))
        yield session
    finally:
        if started_here:
            ray.shutdown()


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's SIGTERM handler: Ray's own ends it with a traceback."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)


def _init(ray: Any, address: str | None) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    root = source_root()
    if root is not None and "PYTHONPATH" not in os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", ""):
        options["runtime_env"] = {"env_vars": {"PYTHONPATH": str(root)}}
    if address is None:
        # Workers map the data; a cap keeps Ray from reserving 30 % of a laptop's memory.
        memory = min(2 * 1024**3, int(0.2 * _total_memory()))
        options |= {"include_dashboard": False, "object_store_memory": memory, "address": "local"}
        # Ray starts workers of a runtime environment through a shell and does not quote the
        # interpreter: in a folder with a space every worker would die, and Ray wait for ever.
        environment = options.setdefault("runtime_env", {})
        environment["py_executable"] = shlex.quote(sys.executable)
    else:
        options["address"] = address
    if os.environ.get("ROBUSTFT_DEBUG") != "1":
        # Tracebacks of every attempt at a trial; we say in one line how each trial has ended.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    try:
        ray.init(**options)
    except Exception as error:
        # Ray has no narrower class for a node of its own that did not come up in its time.
        not_up = type(error) is Exception or isinstance(error, TimeoutError)
        if not_up and address is None:
            raise _not_started(error) from error
        unanswered = not_up or isinstance(error, (ConnectionError, RuntimeError, ValueError))
        if unanswered and address is not None:
            raise _no_answer(address, error) from error
        raise


def _require_answer(address: str) -> None:
    """Refuse a host and port that nothing listens on; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto" and the like are Ray's to understand
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS):
            return
    except (OSError, OverflowError) as error:
        raise _no_answer(address, error) from error


def _no_answer(address: str, error: Exception) -> ResourceError:
    reason = getattr(error, "strerror", None) or error
    return ResourceError(
        f"no Ray cluster answers at {address} ({reason}): start one with `ray start --head`, name "
        "another in RAY_ADDRESS or runtime.address, or unset it to run embedded"
    )


def _not_started(error: Exception) -> ResourceError:
    reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
    return ResourceError(
        f"Ray did not start on this machine ({reason}): run it again when the machine is less busy "
        "and has memory and disk space left, or name a cluster in RAY_ADDRESS"
    )


def _describe(ray: Any, *, embedded: bool) -> Session:
    resources = ray.cluster_resources()
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return Session(
        embedded=embedded,
        num_cpus=int(resources.get("CPU", 0)),
        num_gpus=float(resources.get("GPU", 0)),
        largest_node_cpus=int(max(nodes, default=0)),
    )


def _total_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().total)
