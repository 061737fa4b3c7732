"""Progress for people: live bars on a terminal, plain lines in a log."""

import logging
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from robustft.runtime.events import Event

__all__ = ["ProgressLines"]

log = logging.getLogger(__name__)

SHOWN = (
    "train/loss",
    "train/robust",
    "train/clean",
    "val/tuned_clean",
    "val/clean",
    "val/robust",
    "val/union",
)


class ProgressLines:
    """A listener that shows stage, trial, epoch, newest numbers and the time left."""

    def __init__(self, *, interval: float = 10.0) -> None:
        console = Console(stderr=True)
        self._bars: Progress | None = None
        if console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
                transient=True,
            )
            self._bars.start()
        self._interval = interval
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._began: dict[tuple[str, str], tuple[float, int]] = {}
        self._written: dict[tuple[str, str], float] = {}
        self._trials = (0, 0)
        self._search_began = 0.0

    def __call__(self, event: Event) -> None:
        kind = event["kind"]
        if kind == "stage":
            self._trials = (0, event.get("trials", 0))
            self._search_began = event["time"]
            self._say(f"{event['stage']}: {event['text']}")
        elif kind in ("metrics", "items"):
            self._step(event)
        elif kind in ("waiting", "note"):
            self._say(event["text"])
        elif kind == "begin":
            self._say(f"{event['stage']}: started {event['run']}")
        elif kind == "end":
            done, total = self._trials[0] + 1, self._trials[1]
            self._trials = (done, total)
            self._drop((event["stage"], event["run"]))
            what = f"failed: {event['error']}" if event["error"] else _numbers(event["metrics"])
            # Trials run side by side, so the mean time per finished one is what counts.
            left = (event["time"] - self._search_began) / done * max(total - done, 0)
            rest = f"  {_clock(left)} left" if left > 0 else ""
            self._say(f"{event['stage']} [{done}/{total}]: {event['run']}  {what}{rest}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bars is not None:
            self._bars.stop()

    def _step(self, event: Event) -> None:
        key = (event["stage"], event.get("run", ""))
        step, total, now = event["step"], event["total"], event["time"]
        first, first_step = self._began.setdefault(key, (now, step))
        rate = (now - first) / (step - first_step) if step > first_step else None
        left = f"{_clock(rate * (total - step))} left" if rate is not None else ""
        numbers = _numbers(event.get("metrics", {}))
        title = ": ".join(part for part in key if part)
        if self._bars is not None:
            if key not in self._tasks:
                self._tasks[key] = self._bars.add_task(title, total=total, note="")
            note = "  ".join(part for part in (numbers, left) if part)
            self._bars.update(self._tasks[key], completed=step, total=total, note=note)
            if step >= total:
                self._drop(key)
            return
        # In a log one line per interval and one at the end are enough.
        due = now - self._written.get(key, 0.0) >= self._interval
        if due or step >= total:
            self._written[key] = now
            parts = [f"{title} {step}/{total}", numbers, left if step < total else ""]
            log.info("  ".join(part for part in parts if part))

    def _drop(self, key: tuple[str, str]) -> None:
        self._began.pop(key, None)
        if self._bars is not None and key in self._tasks:
            self._bars.remove_task(self._tasks.pop(key))

    def _say(self, text: str) -> None:
        if self._bars is not None:
            self._bars.console.print(f"[dim]{time.strftime('%H:%M:%S')}[/] ", end="")
            self._bars.console.print(text, markup=False, highlight=False)
        else:
            log.info(text)


def _numbers(metrics: dict[str, Any]) -> str:
    shown = [(name, metrics[name]) for name in SHOWN if name in metrics]
    return "  ".join(
        f"{name} {value:.3f}" if "loss" in name else f"{name} {100 * value:.1f} %"
        for name, value in shown
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
