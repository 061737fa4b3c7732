"""What goes wrong while a run is under way: real processes, a real Ray, real signals."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from small import small_experiment

from robustft.runtime.experiment import dump_yaml, experiment_to_dict

pytestmark = [pytest.mark.ray, pytest.mark.cluster]

DEADLINE = 240
"""Seconds after which a run that should have got somewhere is given up."""
MARK = "ROBUSTFT_TEST_FAULTS"
"""Variable that every process of a run inherits, so that those left behind are found."""


class Command:
    """A ``robustft`` process with storage and caches of its own."""

    def __init__(self, folder: Path, *words: str, **variables: str) -> None:
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        own = {"ROBUSTFT_STORAGE": str(folder / "runs"), "ROBUSTFT_HOME": str(folder / "home")}
        environment = {**os.environ, **own, **variables, MARK: self.mark}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "robustft.cli", *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A group of its own: Ctrl-C on a terminal reaches a whole group.
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                with self._changed:
                    self.lines.append(line)
                    self._changed.notify_all()

    def wait_for(self, pattern: str) -> None:
        """Wait until a line on standard error matches."""
        with self._changed:
            seen = self._changed.wait_for(
                lambda: any(re.search(pattern, line) for line in self.lines), timeout=DEADLINE
            )
        assert seen, f"{pattern!r} never came:\n{''.join(self.lines)}"

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)

    def finish(self) -> tuple[int, str, str]:
        """Return (exit code, standard output, last line of standard error)."""
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            output = stream.read()
        code = self.process.wait(timeout=DEADLINE)
        self._reader.join(timeout=DEADLINE)
        return code, output, self.lines[-1] if self.lines else ""

    def left_behind(self) -> list[str]:
        """Return the command lines of processes that have outlived the run by 20 seconds."""
        for _ in range(40):
            alive = list(marked(self.mark))
            if not alive:
                break
            time.sleep(0.5)
        return alive


def marked(mark: str) -> Iterator[str]:
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                yield " ".join(process.cmdline())
        except psutil.Error:  # ended meanwhile, or not ours to look at
            continue


def write_experiment(folder: Path, **changes: object) -> str:
    folder.mkdir(exist_ok=True)
    values = experiment_to_dict(small_experiment(folder / "runs", **changes))
    path = folder / "small.yaml"
    path.write_text(dump_yaml(values), encoding="utf-8")
    return str(path)


def numbers(output: str) -> object:
    summary = json.loads(output)["summary"]
    return summary["before"], summary["after"], summary["chosen"]


def test_interrupted_while_training_and_searching_then_resumed_equals_undisturbed(
    tmp_path: Path,
) -> None:
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    undisturbed = Command(calm, "search", write_experiment(calm), "--json")
    code, expected, _ = undisturbed.finish()
    assert code == 0, "".join(undisturbed.lines)

    # SIGTERM in the starting model's training (Ray Train), then Ctrl-C in the search (Ray Tune).
    first = Command(disturbed, "search", write_experiment(disturbed), "--json")
    first.wait_for("start: training")
    time.sleep(2)
    first.process.terminate()
    code, output, last = first.finish()
    assert code == 130
    (directory,) = (disturbed / "runs" / "small").iterdir()
    assert f"robustft resume {directory}" in last
    assert json.loads(output)["error"]["exit_code"] == 130
    assert first.left_behind() == []

    second = Command(disturbed, "resume", str(directory), "--json")
    second.wait_for("search: started")
    second.interrupt()
    code, _, last = second.finish()
    assert code == 130
    assert f"robustft resume {directory}" in last
    assert "Traceback" not in "".join(second.lines)
    assert second.left_behind() == []

    third = Command(disturbed, "resume", str(directory), "--json")
    code, output, _ = third.finish()
    assert code == 0, "".join(third.lines)
    assert numbers(output) == numbers(expected)
    # The times are those of all three sessions.
    assert json.loads(output)["summary"]["seconds"]["start (at)"] > 2
    assert third.left_behind() == []


def test_a_diverging_single_run_fails_with_one_sentence(tmp_path: Path) -> None:
    path = write_experiment(tmp_path, search={"space": {}})
    run = Command(tmp_path, "train", path, "--method.modules", "all", "--method.lr", "1e30")
    code, output, last = run.finish()
    assert code == 1
    assert output == ""
    assert "the training loss became nan in epoch 1: lower lr" in last
    assert "Traceback" not in "".join(run.lines)
    assert run.left_behind() == []
