"""``robustft doctor``: what this machine, or every node of the cluster, lacks, and what to do.

``node_facts`` gathers facts on each node; here they are judged, by functions of facts alone. The
rest of the library is imported only once torch, Ray and MLflow are known to be there.
"""

import base64
import contextlib
import dataclasses
import http.client
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from robustft.runtime.node_facts import (
    Folder,
    NodeFacts,
    existing_part,
    folder_facts,
    node_facts,
)

__all__ = [
    "Check",
    "check_cluster",
    "check_node",
    "check_tracking",
    "diagnose",
    "read_pins",
]

GIB = 1024**3
FIRST_PYTHON, NO_PYTHON = (3, 11), (3, 14)
"""robustft runs from the first up to, and not including, the second."""
TOGETHER = ("ray", "torch", "mlflow", "robustft")
"""Packages whose versions must be the same on all nodes."""
NEEDED_BYTES, COMFORTABLE_BYTES = GIB // 2, 4 * GIB
"""Free disk: an error below the first, a warning below the second."""
OPEN_FILES = 8192
"""Sockets, workers and object transfers of a busy node need more than the usual 1,024."""
SHARED_MEMORY_SHARE, SHARED_MEMORY_CAP = 0.2, 2 * GIB
"""What an embedded Ray puts into shared memory: the smaller of this share of memory and the cap."""
SKEW_SECONDS = 1.0
"""Clocks further apart than this put records and checkpoints into a wrong order."""
ANSWER_SECONDS = 5.0
NODE_SECONDS = 120.0
"""How long a node may take: its worker imports torch first, on a busy machine for a minute."""

Level = Literal["ok", "warning", "error"]


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Args:
        level: "ok"; "warning" if it may hurt; "error" if runs will fail.
        where: the node's name, "cluster", or "here".
        subject: what was looked at.
        found: what is so.
        remedy: what to do about it; "" if it is well.
    """

    level: Level
    where: str
    subject: str
    found: str
    remedy: str = ""


Checks = Iterator[Check]


def diagnose(address: str | None = None) -> list[Check]:
    """Look at this machine, or at every node of the cluster that is named.

    Args:
        address: of a Ray cluster; None: $RAY_ADDRESS, else only this machine.

    Returns:
        Every check, in the order in which they were made.
    """
    pins, source = _own_pins()
    packages = sorted({*pins, *TOGETHER})
    here = node_facts(packages, (), ())
    checks = [*check_node(here, pins, where="here", source=source)]
    if here.torch_error or not {"ray", "mlflow"} <= set(here.versions):
        # The rest of the library needs them, and so does a connection.
        return checks
    from robustft.data.home import home
    from robustft.runtime.experiment import RuntimeConfig
    from robustft.runtime.session import ray_address, set_environment, storage_root
    from robustft.runtime.tracking import default_uri

    runtime = RuntimeConfig(address=address)
    set_environment(runtime)
    storage = storage_root(runtime)
    folders = (str(home().absolute()), str(storage))
    uri = os.environ.get("MLFLOW_TRACKING_URI") or default_uri(storage)
    if ray_address(runtime) is None:
        for folder in folders:
            checks += check_folder(folder_facts(folder, None), where="here")
    else:
        checks += _cluster_checks(runtime, pins, source, folders, uri)
    return [*checks, *check_tracking(uri, os.environ)]


# --- judgements ----------------------------------------------------------------------------------


def check_node(facts: NodeFacts, pins: Mapping[str, str], *, where: str, source: str) -> Checks:
    """Judge one machine by itself.

    Args:
        facts: what it says.
        pins: package -> version that robustft was tested with; empty if unknown.
        where: the machine's name in the answers.
        source: where the pins are from.
    """
    version = ".".join(map(str, facts.python))
    if FIRST_PYTHON <= facts.python[:2] < NO_PYTHON:
        yield Check("ok", where, "Python", version)
    else:
        yield Check(
            "error", where, "Python", version, "make a virtual environment with Python 3.11 to 3.13"
        )
    yield from _check_versions(facts, pins, where, source)
    yield from _check_torch(facts, where)
    if facts.open_files >= OPEN_FILES:
        yield Check("ok", where, "open files", f"at most {facts.open_files}")
    else:
        yield Check(
            "warning",
            where,
            "open files",
            f"at most {facts.open_files}",
            "run ulimit -n 65536 in the shell that starts Ray or the run",
        )
    yield from _check_shared_memory(facts, where)
    for folder in facts.folders:
        yield from check_folder(folder, where=where)


def check_folder(folder: Folder, *, where: str) -> Checks:
    """Judge a folder that runs write to."""
    setting = "set ROBUSTFT_HOME and ROBUSTFT_STORAGE to folders with room"
    if folder.error:
        found = f"{folder.path} cannot be written ({folder.error})"
        yield Check("error", where, "folder", found, setting)
        return
    found = f"{folder.path} can be written, {_size(folder.free)} free"
    if folder.free >= COMFORTABLE_BYTES:
        yield Check("ok", where, "folder", found)
    else:
        level: Level = "error" if folder.free < NEEDED_BYTES else "warning"
        yield Check(level, where, "folder", found, f"free some space, or {setting}")


def check_cluster(nodes: Sequence[NodeFacts], skews: Sequence[tuple[float, float]]) -> Checks:
    """Judge what must be the same on all nodes.

    Args:
        nodes: their facts, the driver's node first.
        skews: for each node how far its clock is ahead of the driver's, and how far that may be
            wrong, in seconds.
    """
    yield from _check_same("Python", {node.host: node.python[:2] for node in nodes})
    for name in TOGETHER:
        yield from _check_same(
            name, {node.host: node.versions.get(name, "not installed") for node in nodes}
        )
    worst, host = 0.0, ""
    for node, (skew, error) in zip(nodes, skews, strict=True):
        certain = max(0.0, abs(skew) - error)
        if certain >= worst:
            worst, host = certain, node.host
    if worst > SKEW_SECONDS:
        yield Check(
            "warning",
            "cluster",
            "clocks",
            f"the clock of {host} differs from the driver's by at least {worst:.1f} s",
            "keep the nodes' clocks with chrony or systemd-timesyncd",
        )
    else:
        yield Check("ok", "cluster", "clocks", f"within {SKEW_SECONDS:g} s of each other")
    for index, folder in enumerate(nodes[0].folders if len(nodes) > 1 else ()):
        blind = [node.host for node in nodes if node.folders[index].marker is False]
        if blind:
            yield Check(
                "error",
                "cluster",
                "shared folder",
                f"{folder.path} is another folder on {', '.join(blind)} than on the driver's node",
                "put ROBUSTFT_HOME and ROBUSTFT_STORAGE on a file system that all nodes mount "
                "(NFS, EFS, Lustre)",
            )
        elif folder.marker is not None:
            found = f"{folder.path} is the same on all nodes"
            yield Check("ok", "cluster", "shared folder", found)


def check_tracking(uri: str, variables: Mapping[str, str]) -> Checks:
    """Ask the MLflow server whether it would accept records from here.

    Args:
        uri: MLflow address.
        variables: environment variables; MLflow's user name and password are looked up there.
    """
    from robustft.runtime.spool import mask

    shown = mask(uri)
    if not re.match(r"https?://", uri):
        found = f"{shown}, written by the driver only"
        yield Check("ok", "here", "MLflow", found)
        return
    user, password = (variables.get(f"MLFLOW_TRACKING_{n}", "") for n in ("USERNAME", "PASSWORD"))
    request = urllib.request.Request(
        # /health answers to every host name and without a password, so it would say too little.
        f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search",
        data=b'{"max_results": 1}',
        headers={"Content-Type": "application/json"},
        method="POST",
    )
    if user:
        word = base64.b64encode(f"{user}:{password}".encode()).decode()
        request.add_header("Authorization", f"Basic {word}")
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS):
            yield Check("ok", "here", "MLflow", f"{shown} answers")
    except urllib.error.HTTPError as error:
        remedy = {
            401: "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
            403: "start the server with this name among its --allowed-hosts, or ask for permission",
        }.get(error.code, "read the server's log")
        yield Check("error", "here", "MLflow", f"{shown} answers {error.code}", remedy)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        yield Check(
            "warning",
            "here",
            "MLflow",
            f"{shown} does not answer ({reason})",
            "start it or correct MLFLOW_TRACKING_URI; until then runs keep their records, and "
            "robustft sync RUN_DIR sends them",
        )


def _check_reach(where: str, uri: str, reason: str | None) -> Checks:
    """Judge what ``_tracking_reach`` says on a node."""
    from robustft.runtime.spool import mask

    if reason is None:
        return
    if not reason:
        yield Check("ok", where, "MLflow", f"{mask(uri)} answers")
        return
    yield Check(
        "warning",
        where,
        "MLflow",
        f"{mask(uri)} does not answer from here ({reason})",
        "open the way to the server, or name another in MLFLOW_TRACKING_URI: a driver on this "
        "node, as of a job, keeps its records until robustft sync RUN_DIR sends them",
    )


def _check_versions(facts: NodeFacts, pins: Mapping[str, str], where: str, source: str) -> Checks:
    if not pins:
        found = f"ray {facts.versions.get('ray')}, torch {facts.versions.get('torch')}; {source}"
        yield Check("ok", where, "packages", found)
    missing = [name for name in TOGETHER if name not in facts.versions]
    if missing:
        yield Check(
            "error",
            where,
            "packages",
            f"{', '.join(missing)} not installed",
            "pip install --constraint constraints.txt .",
        )
    # "2.15.0+cpu" is a build of 2.15.0.
    other = [
        f"{name} {facts.versions[name]} (tested: {pin})"
        for name, pin in sorted(pins.items())
        if name in facts.versions and facts.versions[name].partition("+")[0] != pin
    ]
    if other:
        more = f" and {len(other) - 6} more" if len(other) > 6 else ""
        yield Check(
            "warning",
            where,
            "packages",
            f"other versions than in {source}: {', '.join(other[:6])}{more}",
            "pip install --constraint constraints.txt .",
        )
    elif pins and not missing:
        same = sum(name in facts.versions for name in pins)
        yield Check("ok", where, "packages", f"{same} installed, all as in {source}")


def _check_torch(facts: NodeFacts, where: str) -> Checks:
    if facts.torch_error:
        yield Check(
            "error",
            where,
            "torch",
            f"cannot be imported ({facts.torch_error})",
            "install torch and torchvision together: pip install --constraint constraints.txt .",
        )
        return
    names = ", ".join(f"{facts.gpus.count(name)} x {name}" for name in sorted(set(facts.gpus)))
    built = f"torch for CUDA {facts.torch_cuda}" if facts.torch_cuda else "torch for CPUs only"
    if facts.gpus and facts.torch_cuda is None:
        yield Check("error", where, "GPUs", f"{names}; {built}", "install a CUDA build of torch")
    elif facts.gpus and facts.cuda_usable is False:
        yield Check(
            "error",
            where,
            "GPUs",
            f"{names}; {built} cannot use them",
            "install an NVIDIA driver that knows this CUDA version, or unset CUDA_VISIBLE_DEVICES",
        )
    else:
        yield Check("ok", where, "GPUs", f"{names or 'none'}; {built}")
    needed = ("nccl", "gloo") if facts.gpus else ("gloo",)
    lacking = [name for name in needed if name not in facts.backends]
    if lacking:
        yield Check(
            "error",
            where,
            "collectives",
            f"torch.distributed lacks {' and '.join(lacking)}",
            "install torch from its own wheels",
        )
    else:
        yield Check("ok", where, "collectives", ", ".join(facts.backends))


def _check_shared_memory(facts: NodeFacts, where: str) -> Checks:
    if facts.shared_memory is None:
        return
    wanted = min(SHARED_MEMORY_CAP, int(SHARED_MEMORY_SHARE * facts.memory))
    found = f"{_size(facts.shared_memory)} in /dev/shm"
    if facts.shared_memory >= wanted:
        yield Check("ok", where, "shared memory", found)
    else:
        yield Check(
            "warning",
            where,
            "shared memory",
            f"{found}; Ray's object store would be on disk, which is slow",
            f"give the container {_size(wanted)}: --shm-size, or an emptyDir with medium Memory",
        )


def _check_same(subject: str, values: Mapping[str, Any]) -> Checks:
    """One check if the nodes differ, none if they do not."""
    if len(set(values.values())) > 1:
        found = ", ".join(f"{host}: {_shown(value)}" for host, value in values.items())
        remedy = "install the same constraints.txt, with the same Python, on every node"
        yield Check("error", "cluster", subject, found, remedy)


def _shown(value: Any) -> str:
    return ".".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _size(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB // 10 else f"{size / 2**20:.0f} MiB"


def read_pins(text: str) -> dict[str, str]:
    """Return package -> version of the ``name==version`` lines of a constraints file."""
    found = {}
    for line in text.splitlines():
        name, equals, version = line.partition("#")[0].strip().partition("==")
        if equals:
            found[name.strip().lower().replace("_", "-")] = version.strip()
    return found


def _own_pins() -> tuple[dict[str, str], str]:
    """Return the pins of the checkout and their name; none, and why, for an installed package."""
    path = Path(__file__).resolve().parents[3] / "constraints.txt"
    if not path.is_file():
        return {}, "an installed package has no constraints.txt to compare with"
    return read_pins(path.read_text(encoding="utf-8")), path.name


# --- a cluster -----------------------------------------------------------------------------------


def _cluster_checks(
    runtime: Any, pins: Mapping[str, str], source: str, folders: Sequence[str], uri: str
) -> Checks:
    """Connect, ask every node, and judge them one by one and together."""
    import ray

    from robustft.runtime.session import connect

    with connect(runtime), contextlib.ExitStack() as stack:
        markers = [_marker(folder, stack) for folder in folders]
        driver = ray.get_runtime_context().get_node_id()
        alive = [node for node in ray.nodes() if node["Alive"]]
        alive.sort(key=lambda node: (node["NodeID"] != driver, node["NodeManagerHostname"]))
        names = _names([node["NodeManagerHostname"] for node in alive])
        packages = sorted({*pins, *TOGETHER})
        tasks = [_task_on(ray, node["NodeID"], node_facts) for node in alive]
        asked = [task.remote(packages, folders, markers) for task in tasks]
        answers: list[NodeFacts] = []
        skews = []
        bare = _without_login(uri)
        for node, name, answer in zip(alive, names, asked, strict=True):
            try:
                facts = ray.get(answer, timeout=NODE_SECONDS)
                skews.append(_skew(ray, _task_on(ray, node["NodeID"], _now)))
                reach = _task_on(ray, node["NodeID"], _tracking_reach).remote(bare)
                asked, reason = ray.get(reach, timeout=NODE_SECONDS)
            except ray.exceptions.RayError as error:
                yield _silent(name, error)
                continue
            answers.append(dataclasses.replace(facts, host=name))
            yield from check_node(answers[-1], pins, where=name, source=source)
            yield from _check_gpu_count(answers[-1], int(node["Resources"].get("GPU", 0)))
            yield from _check_reach(name, asked, reason)
        if answers:
            yield from check_cluster(answers, skews)


def _marker(folder: str, stack: contextlib.ExitStack) -> str | None:
    """Put a file there for as long as the stack lives; None if that is not possible."""
    try:
        place = existing_part(Path(folder))
        file = tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-")  # noqa: SIM115  the stack
        return stack.enter_context(file).name
    except OSError:
        return None


def _task_on(ray: Any, node: str, function: Callable[..., Any]) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    # No CPU: a doctor must be able to come while runs hold them all.
    return ray.remote(function).options(num_cpus=0, scheduling_strategy=strategy, max_retries=0)


def _now() -> float:
    return time.time()


def _without_login(uri: str) -> str:
    """Return the address without user name and password, which a node need not be told."""
    return re.sub(r"^(https?://)[^/@]*@", r"\1", uri)


def _tracking_reach(uri: str) -> tuple[str, str | None]:
    """Ask whether an MLflow server can be reached from the machine that this runs on.

    Args:
        uri: the address to ask where the machine has no MLFLOW_TRACKING_URI of its own.

    Returns:
        The address that was asked; and "" if anything answers there, a refusal too, else why it
        does not, or None if it is no server's address.
    """
    uri = _without_login(os.environ.get("MLFLOW_TRACKING_URI") or uri)
    if not re.match(r"https?://", uri):
        return uri, None
    try:
        with urllib.request.urlopen(uri, timeout=ANSWER_SECONDS):
            return uri, ""
    except urllib.error.HTTPError:
        return uri, ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        return uri, str(getattr(error, "reason", error))


def _skew(ray: Any, clock: Any) -> tuple[float, float]:
    """Return how far a node's clock is ahead and how far that may be wrong, of several asks."""
    asks = []
    for _ in range(5):
        before = time.time()
        there = ray.get(clock.remote(), timeout=NODE_SECONDS)
        after = time.time()
        asks.append(((after - before) / 2, there - (before + after) / 2))
    error, skew = min(asks)
    return skew, error


def _silent(name: str, error: Exception) -> Check:
    text = str(error).strip().splitlines()
    found = f"cannot run a task ({text[-1] if text else type(error).__name__})"
    remedy = "install robustft with this Python on the node and look into its /tmp/ray logs"
    return Check("error", name, "worker", found, remedy)


def _check_gpu_count(facts: NodeFacts, offered: int) -> Checks:
    if offered > len(facts.gpus):
        yield Check(
            "error",
            facts.host,
            "GPUs",
            f"Ray offers {offered} and the NVIDIA driver lists {len(facts.gpus)}",
            "start this node without --num-gpus, or repair its driver",
        )


def _names(hosts: Sequence[str]) -> list[str]:
    """Return names that differ: several nodes of one machine get a number."""
    if len(set(hosts)) == len(hosts):
        return list(hosts)
    return [f"{host}#{index}" for index, host in enumerate(hosts)]
