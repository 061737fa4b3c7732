"""Connecting to Ray: what is asked of it, and what is refused before it could wait for ever."""

import sys
from typing import Any

import pytest

from robustft.errors import ResourceError
from robustft.runtime import session
from robustft.runtime.session import Session


class RecordingRay:
    """Keeps the options that ``ray.init`` would get."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def init(self, **options: Any) -> None:
        self.options = options


def test_an_interpreter_in_a_folder_with_a_space_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/my project/.venv/bin/python")
    embedded, cluster = RecordingRay(), RecordingRay()
    session._init(embedded, None)
    session._init(cluster, "10.0.0.1:6379")
    assert embedded.options["runtime_env"]["py_executable"] == "'/my project/.venv/bin/python'"
    # The nodes of a cluster have an interpreter of their own.
    assert "py_executable" not in cluster.options.get("runtime_env", {})


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "fits"),
    [(4, 1, 0, True), (2, 2, 0, True), (5, 1, 0, False), (1, 3, 0, False), (2, 1, 1, False)],
)
def test_a_cluster_must_have_what_is_asked(
    workers: int, cpus: int, gpus: float, fits: bool
) -> None:
    cluster = Session(embedded=False, num_cpus=4, num_gpus=1, largest_node_cpus=2)
    if fits:
        cluster.require(workers, cpus=cpus, gpus=gpus, growing=False)
        return
    with pytest.raises(ResourceError, match=f"asks for {workers} workers"):
        cluster.require(workers, cpus=cpus, gpus=gpus, growing=False)
    cluster.require(workers, cpus=cpus, gpus=gpus, growing=True)


class FailingRay:
    """Raises what it is told to from ``ray.init``."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def init(self, **_: Any) -> None:
        raise self.error


# As node.py and services.py of Ray 2.60 raise them.
SLOW = (
    Exception(
        "The current node timed out during startup. This could happen because some of the raylet "
        "failed to startup or the GCS has become overloaded."
    ),
    TimeoutError("Timed out after 30 seconds while waiting for node to startup. Did not find x"),
)


@pytest.mark.parametrize("error", SLOW, ids=["node", "store"])
def test_a_ray_that_does_not_come_up_is_a_sentence(error: Exception) -> None:
    with pytest.raises(ResourceError, match="did not start on this machine") as refusal:
        session._init(FailingRay(error), None)
    text = str(refusal.value)
    assert "imed out" in text
    assert "run it again when the machine is less busy" in text
    assert refusal.value.__cause__ is error
    with pytest.raises(ResourceError, match="no Ray cluster answers at 10"):
        session._init(FailingRay(error), "10.0.0.1:6379")


def test_other_errors_of_ray_stay_what_they_are() -> None:
    for error in (ValueError("an option of ours"), KeyError("a bug")):
        with pytest.raises(type(error)):
            session._init(FailingRay(error), None)
    with pytest.raises(ResourceError, match="no Ray cluster answers"):
        session._init(FailingRay(ConnectionError("refused")), "10.0.0.1:6379")
    with pytest.raises(KeyError):
        session._init(FailingRay(KeyError("a bug")), "10.0.0.1:6379")
