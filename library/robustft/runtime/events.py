"""What happens elsewhere, told to the driver: progress, metrics, and when method code ran.

Workers send small dictionaries to one actor; a thread of the driver fetches them and hands them to
the listeners (progress lines, tracking, the clock). So only the driver writes, and a worker needs
neither MLflow nor a terminal.
"""

import contextlib
import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from robustft.runtime.jsonfile import write_json

__all__ = ["Clock", "Event", "EventPump", "Sender", "busy"]

log = logging.getLogger(__name__)

Event = dict[str, Any]
"""kind ("begin", "metrics", "busy", "warning", "end"), stage, run, time, what the kind needs."""

Sender = Callable[[Event], None]


class EventLog:
    """The actor's code: a list that workers append to and the driver empties."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def put(self, event: Event) -> None:
        self._events.append(event)

    def drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events


@dataclasses.dataclass(frozen=True, slots=True)
class RemoteSender:
    """Sends events to the actor without waiting; picklable, so that workers can have it."""

    actor: Any

    def __call__(self, event: Event) -> None:
        self.actor.put.remote({"time": time.time(), **event})


class EventPump:
    """Moves events from the actor to the listeners, in order, in a thread of the driver.

    Where the thread fails, as a listener whose disk is full does, it says once what is lost and
    ends; the next ``sync`` raises the same error, where the run can end with its sentence.
    """

    def __init__(self, listeners: list[Callable[[Event], None]], *, interval: float = 0.3) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray = ray
        # No CPU: it only holds a list. On the driver's node, since Ray would put it anywhere, and a
        # lost node would take the events of all others with it.
        node = ray.get_runtime_context().get_node_id()
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        self._actor = ray.remote(num_cpus=0, scheduling_strategy=here)(EventLog).remote()
        self._listeners = listeners
        self._interval = interval
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._failure: Exception | None = None
        self.sender = RemoteSender(self._actor)
        self._thread = threading.Thread(target=self._run, name="robustft-events", daemon=True)
        self._thread.start()

    def local(self, event: Event) -> None:
        """Take an event of the driver itself."""
        with self._lock:
            self._deliver({"time": time.time(), **event})

    def sync(self) -> None:
        """Deliver everything that has arrived; called where a stage ends.

        Raises:
            Exception: what a listener raises, or Ray; also if it was raised in the thread before.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._fetch()

    def close(self) -> None:
        """Stop the thread after a last delivery, unless it has failed and said so."""
        self._stop.set()
        self._thread.join(timeout=10)
        if self._failure is None:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self.sync()

    def _run(self) -> None:
        while not self._stop.wait(self._interval) and self._failure is None:
            with self._lock:
                try:
                    self._fetch()
                except Exception as error:  # Any listener's: said here, and raised by sync.
                    self._note(error)

    def _note(self, error: Exception) -> None:
        if self._stop.is_set() and isinstance(error, self._ray.exceptions.RayError):
            return  # Ray goes away at the end of a run.
        self._failure = error
        log.error(
            "progress lines and metrics of the workers are lost from here on (%s: %s)",
            type(error).__name__,
            error,
        )

    def _fetch(self) -> None:
        for event in self._ray.get(self._actor.drain.remote()):
            self._deliver(event)

    def _deliver(self, event: Event) -> None:
        if event["kind"] == "warning":
            # What a worker logs stays on its node.
            log.warning("%s", event["text"])
        for listener in self._listeners:
            listener(event)


@contextlib.contextmanager
def busy(send: Sender, stage: str, run: str = "") -> Iterator[None]:
    """Tell the driver that method code ran during the ``with`` block."""
    began = time.time()
    try:
        yield
    finally:
        send({"kind": "busy", "stage": stage, "run": run, "began": began, "ended": time.time()})


class Clock:
    """Adds up, per stage and in all, the time in which some method code ran somewhere.

    A run that is resumed goes on with the times of its earlier sessions.

    Args:
        began: when this session began, in seconds since 1970.
    """

    def __init__(self, began: float) -> None:
        self.began = began
        self._spans: list[tuple[float, float]] = []
        self._stages: dict[str, float] = {}
        self._earlier = {"wall": 0.0, "busy": 0.0}
        self._path: Path | None = None

    def keep(self, path: Path) -> None:
        """Add the times that ``path`` holds, and write them there after every stage."""
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            self._earlier = {name: float(record[name]) for name in self._earlier}
            for name, seconds in record["stages"].items():
                self._stages[name] = self._stages.get(name, 0.0) + seconds
        self._path = path

    def save(self, now: float | None = None) -> None:
        """Write the times so far, if they are to be kept."""
        if self._path is not None:
            wall, share = self.overhead(now)
            write_json(
                self._path,
                {"wall": wall, "busy": (1.0 - share) * wall, "stages": self._stages},
            )

    def __call__(self, event: Event) -> None:
        if event["kind"] == "busy":
            self._spans.append((event["began"], event["ended"]))

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage of the run by the wall."""
        began = time.time()
        try:
            yield
        finally:
            self._stages[name] = self._stages.get(name, 0.0) + time.time() - began
            self.save()

    def stages(self) -> Mapping[str, float]:
        """Return stage -> wall seconds."""
        return dict(self._stages)

    def overhead(self, now: float | None = None) -> tuple[float, float]:
        """Return (wall seconds, share of them in which no method code ran anywhere)."""
        now = time.time() if now is None else now
        wall = self._earlier["wall"] + now - self.began
        covered, reached = self._earlier["busy"], self.began
        for began, ended in sorted(self._spans):
            began, ended = max(began, reached), min(ended, now)
            if ended > began:
                covered += ended - began
                reached = ended
        return wall, 1.0 - covered / wall if wall > 0 else 0.0
