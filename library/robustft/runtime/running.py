"""What the stages of one run share: its data and folders, its connection, its tracker and clock."""

import dataclasses
from pathlib import Path
from typing import Any

from robustft.runtime.events import Clock, EventPump
from robustft.runtime.experiment import Experiment
from robustft.runtime.fanout import Fanout
from robustft.runtime.mirror import Mirror
from robustft.runtime.session import Session
from robustft.runtime.text_runs import AnyTask
from robustft.runtime.tracking import Tracker

__all__ = ["Running"]

GROWING_IN_FLIGHT = 1000
"""Tasks of a fan-out that are submitted at a time where the cluster grows on demand."""

MAX_THREADS = 8
"""Torch threads of a single run's worker: small models do not gain from more."""


@dataclasses.dataclass(kw_only=True)
class Running:
    """What the stages of one run share."""

    experiment: Experiment
    directory: Path
    session: Session
    pump: EventPump
    tracker: Tracker
    clock: Clock
    parent: str
    task: AnyTask
    task_ref: Any
    start_task: AnyTask
    mirror: Mirror

    @property
    def gpu(self) -> bool:
        return self.experiment.runtime.gpus_per_worker > 0

    @property
    def device(self) -> str:
        """Where workers and tasks compute; the driver may well have no GPU itself."""
        return "cuda" if self.gpu else "cpu"

    def cpus(self, workers: int, *, trial: bool) -> int:
        """Return the CPUs of one worker."""
        configured = self.experiment.runtime.cpus_per_worker
        if configured is not None:
            return configured
        if trial:
            return 1
        share = self.session.num_cpus // workers
        return max(1, min(share, self.session.largest_node_cpus, MAX_THREADS))

    def say(self, stage: str, text: str, **fields: Any) -> None:
        self.pump.local({"kind": "stage", "stage": stage, "text": text, **fields})

    def fanout(self, stage: str) -> Fanout:
        gpus = self.experiment.runtime.gpus_per_worker
        return Fanout(
            self.directory / "items",
            self.pump,
            stage=stage,
            # A cluster that grows on demand only grows for tasks that wait.
            max_in_flight=(
                GROWING_IN_FLIGHT
                if self.experiment.runtime.autoscaling
                else 2 * max(1, self.session.num_cpus)
            ),
            gpus=gpus,
        )
