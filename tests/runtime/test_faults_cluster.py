"""Lost nodes, spot nodes that are taken back, stragglers, a dead controller of Ray Train."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import (
    Nodes,
    finished_trials,
    points,
    processes,
    restarted_trials,
    run_folder,
    running_nodes,
    summary,
    wait_until,
    write_tiny,
)
from safetensors.torch import load_file
from test_faults import Command

pytestmark = [pytest.mark.ray, pytest.mark.cluster, pytest.mark.slow]

TRIAL = "ray::ImplicitFunc"
"""What Ray calls the process of a trial."""


nodes = pytest.fixture(scope="module")(running_nodes)


def search(folder: Path, nodes: Nodes, **runtime: Any) -> Command:
    """Start the tiny search, whose two trials run side by side on the two worker nodes."""
    # Long enough that no trial has finished when something is taken from under it.
    path = write_tiny(folder, epochs=24, **runtime)
    return Command(folder, "search", path, "--json", RAY_ADDRESS=nodes.address)


def train(folder: Path, nodes: Nodes, **runtime: Any) -> Command:
    """Start the tiny experiment as one training by Ray Train, of a network without BatchNorm."""
    path = write_tiny(folder, search=False, model="resnet4b", **runtime)
    return Command(folder, "train", path, "--json", RAY_ADDRESS=nodes.address)


def finish(run: Command) -> None:
    code, _, _ = run.finish()
    assert code == 0, "".join(run.lines)


@pytest.fixture(scope="module")
def calm(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("calm")
    finish(search(folder, nodes))
    assert set(points(folder).values()) == {1}
    return folder


def wait_for_both(folder: Path) -> None:
    """Wait until both trials have something to lose."""
    directory = run_folder(folder)

    def begun() -> bool:
        states = directory.glob("search/tune/*/checkpoint_*/state.pt")
        return len({path.parents[1] for path in states}) == 2

    wait_until(begun, "a checkpoint of either trial")


def test_lost_nodes(calm: Path, nodes: Nodes, tmp_path: Path) -> None:
    """Both worker nodes die, one after the other; wherever Ray had put something, it is lost."""
    run = search(tmp_path, nodes)
    wait_for_both(tmp_path)
    assert finished_trials(tmp_path) == 0
    nodes.lose(0)
    nodes.lose(1)
    finish(run)
    assert restarted_trials(tmp_path) >= 1
    assert summary(tmp_path) == summary(calm)
    assert points(tmp_path) == points(calm)


def test_a_spot_node_is_taken_back_after_its_notice(
    calm: Path, nodes: Nodes, tmp_path: Path
) -> None:
    """Not one failure is allowed here: a loss with notice is none."""
    run = search(tmp_path, nodes, max_failures=0)
    wait_for_both(tmp_path)
    nodes.announce_loss(0, seconds=2.0)
    time.sleep(2.0)
    assert finished_trials(tmp_path) == 0
    nodes.lose(0)
    finish(run)
    assert restarted_trials(tmp_path) == 1
    assert summary(tmp_path) == summary(calm)
    assert points(tmp_path) == points(calm)


def test_a_straggler_is_waited_for(calm: Path, nodes: Nodes, tmp_path: Path) -> None:
    run = search(tmp_path, nodes)
    wait_for_both(tmp_path)
    # Workers belong to their node, not to the run: it started them with its own variables.
    stopped = stop_one_trial()
    assert finished_trials(tmp_path) == 0
    wait_until(lambda: finished_trials(tmp_path) == 1, "the end of the other trial")
    time.sleep(20.0)
    assert run.process.poll() is None
    assert finished_trials(tmp_path) == 1
    os.kill(stopped, signal.SIGCONT)
    finish(run)
    assert restarted_trials(tmp_path) == 0
    assert summary(tmp_path) == summary(calm)
    assert points(tmp_path) == points(calm)


def test_an_elastic_run_goes_on_with_the_workers_that_are_left(
    nodes: Nodes, tmp_path: Path
) -> None:
    """Begun on two nodes, ended on one: the weights of one worker that was never disturbed."""
    calm, elastic = tmp_path / "calm", tmp_path / "elastic"
    finish(train(calm, nodes))
    run = train(elastic, nodes, workers=2, min_workers=1)
    directory = run_folder(elastic)
    wait_until(lambda: any(directory.glob("train/*/checkpoint_*/state.pt")), "a checkpoint")
    nodes.take_away(1)
    finish(run)
    lines = "".join(run.lines)
    assert "training on 2 worker(s)" in lines
    assert "training on 1 worker(s)" in lines
    assert points_by_name(elastic) == points_by_name(calm)
    expected, found = (
        load_file(folder / "model" / "model.safetensors")
        for folder in (run_folder(calm), directory)
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    nodes.workers[1] = nodes.add()


def points_by_name(folder: Path) -> list[tuple[str, str, int]]:
    """Return run, key and step of every metric in MLflow, each there once."""
    found = sorted((run, key, step) for run, key, step, _ in points(folder).elements())
    assert len(found) == len(set(found))
    return found


def stop_one_trial() -> int:
    """Stop a process of a trial of this module's cluster."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        if TRIAL in " ".join(process.cmdline()):
            process.send_signal(signal.SIGSTOP)
            return process.pid
    raise AssertionError("no trial is running")


def test_a_dead_controller_of_ray_train(tmp_path: Path) -> None:
    """On an embedded Ray, where nobody else gives back what the controller had reserved."""
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    finish(Command(calm, "train", write_tiny(calm, search=False), "--json"))
    run = Command(disturbed, "train", write_tiny(disturbed, search=False), "--json")
    directory = run_folder(disturbed)
    wait_until(lambda: any(directory.glob("train/*/checkpoint_*/state.pt")), "a checkpoint")
    (controller,) = processes(run, "ray::TrainController")
    controller.kill()
    finish(run)
    assert "Ray Train's controller died" in "".join(run.lines)
    assert summary(disturbed) == summary(calm)
    assert points(disturbed) == points(calm)
