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
