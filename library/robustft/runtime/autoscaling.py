"""Clusters that grow on demand: how large they can get, and what waits for their next node.

Ray lets a request wait for ever that no node will ever satisfy, since tomorrow's cluster may be
another. So before a run the request is compared with the node types that the autoscaler knows, and
while it runs somebody says how much is waiting.
"""

import contextlib
import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from robustft.config import load_yaml
from robustft.errors import ConfigError

__all__ = ["Fleet", "NodeType", "Waiting", "find_fleet", "fleet_of", "watching"]

log = logging.getLogger(__name__)

ANSWER_SECONDS = 30.0
"""How long the head may take to say what the autoscaler's configuration holds."""
LOOK_SECONDS = 2.0
"""Pause between two looks at what waits; what waits for less is not worth a line."""
SAY_AGAIN_SECONDS = 60.0
"""After how long the same is said again."""
HEAD_RESOURCE = "node:__internal_head__"
"""What Ray calls a resource that the head node alone has."""
CONFIG_OPTION = "--autoscaling-config="
ALIVE = (1, 3)
"""RUNNING and IDLE of Ray's NodeStatus."""


@dataclasses.dataclass(frozen=True, slots=True)
class NodeType:
    """A kind of node.

    Args:
        name: in the autoscaler's configuration.
        cpus, gpus: of one node.
        most: how many of them there can be at a time.
    """

    name: str
    cpus: float
    gpus: float
    most: int

    def holds(self, *, cpus: float, gpus: float) -> int:
        """Return how many workers with so many ``cpus`` (> 0) and ``gpus`` (>= 0) fit on a node."""
        by_cpu = self.cpus // cpus
        return int(min(by_cpu, self.gpus // gpus) if gpus else by_cpu)

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPUs" if self.gpus else ""
        return f"{self.most} x {self.name} with {self.cpus:g} CPUs{gpus}"


@dataclasses.dataclass(frozen=True, slots=True)
class Fleet:
    """The largest cluster that an autoscaler may make.

    Args:
        head: the node that is always there.
        workers: the kinds of nodes that come and go.
        most: how many of those there can be at a time, of all kinds together.
    """

    head: NodeType
    workers: tuple[NodeType, ...]
    most: int

    def holds(self, *, cpus: float, gpus: float) -> int:
        """Return how many workers of that size fit into the grown cluster."""
        count, left = self.head.holds(cpus=cpus, gpus=gpus), self.most
        roomy = sorted(self.workers, key=lambda kind: -kind.holds(cpus=cpus, gpus=gpus))
        for kind in roomy:
            nodes = min(left, kind.most)
            count, left = count + nodes * kind.holds(cpus=cpus, gpus=gpus), left - nodes
        return count

    def __str__(self) -> str:
        kinds = ", ".join(map(str, (self.head, *self.workers)))
        return f"{kinds}, at most {self.most} beside {self.head.name}"


def fleet_of(config: Mapping[str, Any]) -> Fleet | None:
    """Return what a `ray up` configuration allows.

    Args:
        config: what ``ray_config.yaml`` holds, or Ray's completed copy of it on the head.

    Returns:
        None if there is no telling: no head is named, or the cloud is to say what a node has.
    """
    most = int(config.get("max_workers", 0))
    kinds = {}
    for name, entry in (config.get("available_node_types") or {}).items():
        resources = entry.get("resources") or {}
        if "CPU" not in resources:
            return None
        kinds[name] = NodeType(
            name,
            cpus=float(resources["CPU"]),
            gpus=float(resources.get("GPU", 0)),
            most=int(entry.get("max_workers", most)),
        )
    head = kinds.pop(config.get("head_node_type", ""), None)
    if head is None:
        return None
    return Fleet(dataclasses.replace(head, most=1), tuple(kinds.values()), most)


def find_fleet(ray: Any) -> Fleet | None:
    """Return what the autoscaler of the connected cluster may make of it.

    The head's autoscaler process is started with the path of its configuration, which Ray keeps
    nowhere else, so a task on the head looks there.

    Args:
        ray: the module, connected to the cluster.

    Returns:
        None if there is no autoscaler, or one that runs elsewhere (KubeRay: in a container of its
        own); then the cluster's limits are not known before something waits for them.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    heads = [n["NodeID"] for n in ray.nodes() if n["Alive"] and HEAD_RESOURCE in n["Resources"]]
    if not heads:
        return None
    port = ray.get_runtime_context().gcs_address.rpartition(":")[2]
    there = NodeAffinitySchedulingStrategy(heads[0], soft=False)
    look = ray.remote(num_cpus=0, max_retries=0)(_fleet_on_this_node)
    answer = look.options(scheduling_strategy=there).remote(port)
    try:
        found: Fleet | None = ray.get(answer, timeout=ANSWER_SECONDS)
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError) as error:
        log.warning("how far this cluster can grow is not known: the head does not say (%s)", error)
        return None
    return found


def _fleet_on_this_node(port: str) -> Fleet | None:
    """Return what the autoscaler on this node was told, if it belongs to the GCS at ``port``."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or ()
        ours = any(w.startswith("--gcs-address=") and w.endswith(f":{port}") for w in words)
        paths = [w.removeprefix(CONFIG_OPTION) for w in words if w.startswith(CONFIG_OPTION)]
        if ours and paths:
            try:
                return fleet_of(load_yaml(Path(paths[0]).expanduser()))
            except (ConfigError, OSError) as error:
                log.warning("the autoscaler's configuration cannot be read: %s", error)
    return None


@dataclasses.dataclass(frozen=True, slots=True)
class Waiting:
    """What waits for nodes.

    Args:
        count: requests: a trial, a worker group or a task each.
        wanted: what they want, in words.
        hopeless: those that the autoscaler says no node it may add will ever satisfy, in words.
        nodes: how many nodes there are, the head included.
        coming: how many have been ordered.
    """

    count: int
    wanted: str
    hopeless: str
    nodes: int
    coming: int

    def __str__(self) -> str:
        return (
            f"{self.count} waiting for nodes ({self.wanted}); {self.nodes} there, "
            f"{self.coming} coming"
        )


def waiting_of(reply: Any) -> Waiting:
    """Return what a GetClusterStatusReply says of waiting requests.

    Note: only the second generation of Ray's autoscaler names the hopeless ones.
    """
    state, scaler = reply.cluster_resource_state, reply.autoscaling_state
    wanted: Counter[str] = Counter()
    for entry in state.pending_resource_requests:
        wanted[_words([entry.request])] += entry.count
    for group in state.pending_gang_resource_requests:
        wanted[_words(_bundles(group))] += 1
    hopeless = {_words([request]) for request in scaler.infeasible_resource_requests}
    hopeless |= {_words(_bundles(group)) for group in scaler.infeasible_gang_resource_requests}
    return Waiting(
        count=wanted.total(),
        wanted="; ".join(f"{count} x {words}" for words, count in sorted(wanted.items())),
        hopeless="; ".join(sorted(hopeless)),
        nodes=sum(node.status in ALIVE for node in state.node_states),
        coming=sum(request.count for request in scaler.pending_instance_requests)
        + len(scaler.pending_instances),
    )


def _bundles(group: Any) -> list[Any]:
    """Return the bundles of a placement group; newer Rays keep them in selectors."""
    first = list(group.bundle_selectors)[:1]
    return list(group.requests) or [one for entry in first for one in entry.resource_requests]


def _words(requests: list[Any]) -> str:
    """Return "2 CPU 1 GPU" for one bundle, "4 of 2 CPU 1 GPU" for as many equal ones."""
    each = Counter(
        " ".join(f"{amount:g} {name}" for name, amount in sorted(one.resources_bundle.items()))
        for one in requests
    )
    return " + ".join(f"{n} of {text}" if n > 1 else text for text, n in each.items())


@contextlib.contextmanager
def watching(ray: Any, say: Callable[[str], None]) -> Iterator[None]:
    """Tell ``say`` what waits for nodes during the ``with`` block: changes, and now and then.

    A request that the autoscaler calls hopeless is warned of: no run is ended for it, since nodes
    may still be added by hand.
    """
    stop = threading.Event()
    address = ray.get_runtime_context().gcs_address
    thread = threading.Thread(
        target=_watch, args=(address, say, stop), name="robustft-waiting", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=LOOK_SECONDS)


def _watch(address: str, say: Callable[[str], None], stop: threading.Event) -> None:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
    from ray.exceptions import RayError

    client = GcsClient(address=address)
    before, said, when, warned = False, (False, 0, 0), 0.0, ""
    while not stop.wait(LOOK_SECONDS):
        reply = GetClusterStatusReply()
        try:
            reply.ParseFromString(client.get_cluster_status(timeout_s=ANSWER_SECONDS))
        except (RayError, RuntimeError) as error:
            log.debug("the cluster does not say what waits for nodes: %s", error)
            continue
        now = waiting_of(reply)
        lasting, before = before and now.count > 0, now.count > 0
        if lasting:
            key = (True, now.nodes, now.coming)
            if key != said or time.monotonic() - when > SAY_AGAIN_SECONDS:
                say(str(now))
                said, when = key, time.monotonic()
        elif said[0] and not before:
            say("nothing is waiting for nodes any more")
            said = (False, 0, 0)
        if now.hopeless and now.hopeless != warned:
            warned = now.hopeless
            log.warning(
                "no node that the autoscaler may add offers %s: it will wait until one is added by "
                "hand; lower what a worker asks for, or add a node type",
                warned,
            )
