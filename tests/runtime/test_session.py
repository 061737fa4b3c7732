"""Connecting to Ray: what is asked of it, and what is refused before it could wait for ever."""

import os
import platform
import subprocess
import sys
from typing import Any

import pytest

from robustft.errors import ResourceError
from robustft.runtime import session
from robustft.runtime.experiment import RuntimeConfig
from robustft.runtime.session import EMBEDDED_ENVIRONMENT, Session, set_environment


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


FAULTS = """
import resource
import numpy as np
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    np.ones(2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_workers_do_not_give_back_memory_that_they_need_again() -> None:
    names = [name for name in EMBEDDED_ENVIRONMENT if name.startswith("MALLOC_")]
    assert len(names) == 2
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    # Huge pages would hide most of it; torch does not ask for them.
    plain["NUMPY_MADVISE_HUGEPAGE"] = "0"

    def faults(environment: dict[str, str]) -> int:
        child = subprocess.run(
            [sys.executable, "-c", FAULTS], env=environment, capture_output=True, check=True
        )
        return int(child.stdout)

    # 100 arrays of 8 MiB, pages of 4 KiB: each of them once, or every one a hundred times.
    with_settings = faults({**plain, **{name: EMBEDDED_ENVIRONMENT[name] for name in names}})
    assert with_settings < 10_000
    fixed = faults({**plain, "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)})
    assert fixed > 10 * with_settings


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"MALLOC_TRIM_THRESHOLD_": "1"}
    monkeypatch.setattr(os, "environ", environment)
    set_environment(RuntimeConfig(address="auto"))
    assert "MALLOC_MMAP_THRESHOLD_" not in environment
    set_environment(RuntimeConfig())
    assert environment["MALLOC_TRIM_THRESHOLD_"] == "1"
    assert environment["MALLOC_MMAP_THRESHOLD_"] == EMBEDDED_ENVIRONMENT["MALLOC_MMAP_THRESHOLD_"]
