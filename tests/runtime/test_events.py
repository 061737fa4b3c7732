"""The thread that moves events to their listeners: it never fails in silence."""

import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from robustft.errors import ResourceError
from robustft.runtime.events import Event, EventPump

PATIENCE = 20.0


class RayError(Exception):
    """Stands for ray.exceptions.RayError."""


class Actor:
    """An actor in this process: its methods answer at once."""

    def __init__(self, code: Any) -> None:
        self._code = code
        self.broken: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> Any:
            if self.broken is not None:
                raise self.broken
            return getattr(self._code, name)(*given)

        return types.SimpleNamespace(remote=call)


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> list[Actor]:
    """What the pump creates, by a stand-in for Ray."""
    made: list[Actor] = []

    def remote(**_: Any) -> Any:
        def of(code: Any) -> Any:
            def create() -> Actor:
                made.append(Actor(code()))
                return made[-1]

            return types.SimpleNamespace(remote=create)

        return of

    node = types.SimpleNamespace(get_node_id=lambda: "here")
    ray: Any = types.ModuleType("ray")
    ray.remote, ray.get, ray.get_runtime_context = remote, lambda value: value, lambda: node
    ray.exceptions = types.SimpleNamespace(RayError=RayError)
    strategies: Any = types.ModuleType("ray.util.scheduling_strategies")
    strategies.NodeAffinitySchedulingStrategy = lambda *_, **__: None
    for name, module in {
        "ray": ray,
        "ray.util": types.ModuleType("ray.util"),
        "ray.util.scheduling_strategies": strategies,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


Open = Callable[..., EventPump]


@pytest.fixture
def open_pump(actors: list[Actor]) -> Iterator[Open]:
    pumps: list[EventPump] = []

    def open_(*listeners: Callable[[Event], None]) -> EventPump:
        pumps.append(EventPump(list(listeners), interval=0.001))
        return pumps[-1]

    yield open_
    for pump in pumps:
        pump.close()


def ended(pump: EventPump) -> bool:
    pump._thread.join(PATIENCE)
    return not pump._thread.is_alive()


def test_events_arrive_in_order_and_the_last_ones_on_close(open_pump: Open) -> None:
    seen: list[Any] = []
    arrived = threading.Event()

    def listen(event: Event) -> None:
        seen.append(event["step"])
        arrived.set()

    pump = open_pump(listen)
    pump.sender({"kind": "metrics", "step": 1})
    assert arrived.wait(PATIENCE)
    pump._stop.set()
    assert ended(pump)
    pump.sender({"kind": "metrics", "step": 2})
    pump.local({"kind": "metrics", "step": 3})
    pump.sync()
    pump.sender({"kind": "metrics", "step": 4})
    pump.close()
    assert seen == [1, 3, 2, 4]


def test_a_listener_that_fails_is_said_once_and_raised_by_sync(
    open_pump: Open, caplog: pytest.LogCaptureFixture
) -> None:
    full = ResourceError("cannot write records.jsonl: No space left on device")

    def fail(event: Event) -> None:
        raise full

    pump = open_pump(fail)
    pump.sender({"kind": "metrics"})
    assert ended(pump)
    # Whoever drives the run ends with the sentence, at the end of this stage or of a later one.
    for _ in range(2):
        with pytest.raises(ResourceError, match="No space left") as raised:
            pump.sync()
        assert raised.value is full
    # While a run ends, perhaps with an error of its own, nothing is raised over it.
    pump.close()
    (record,) = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert record.levelno == logging.ERROR
    assert "progress lines and metrics of the workers are lost" in record.getMessage()
    assert "No space left" in record.getMessage()


@pytest.mark.parametrize("stopping", [False, True])
def test_a_lost_actor_is_said_unless_the_run_is_ending(
    stopping: bool,
    open_pump: Open,
    actors: list[Actor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    pump = open_pump()
    if stopping:
        pump._stop.set()
        assert ended(pump)
    actors[0].broken = RayError("the actor died")
    if not stopping:
        assert ended(pump)
        with pytest.raises(RayError):
            pump.sync()
    pump.close()
    messages = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert [("are lost" in text, "the actor died" in text) for text in messages] == (
        [] if stopping else [(True, True)]
    )
