"""What Ray costs: an epoch under Ray Train, and the start-up of a trial.

Two measurements, each a ratio within one run:

* the same training function (adversarial training of the small network on the embedded data) on
  ``LocalContext`` in this process and under Ray Train with one worker, in turns;
* the wall time of the same tiny trials (each needs torch) as Tune function trials whose processes
  are reused, as function trials with a process each, and as one Ray Train run each.

    python benchmarks/runtime.py --write
"""

import dataclasses
import datetime
import importlib.metadata
import itertools
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import tyro

from robustft.data import TaskConfig, load_task
from robustft.methods.adversarial import ATConfig, train_at
from robustft.methods.common import AttackConfig
from robustft.models.start import Start
from robustft.runtime.experiment import RuntimeConfig
from robustft.runtime.session import connect, set_environment
from robustft.training.context import LocalContext
from robustft.training.schedules import ScheduleConfig

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    epochs: int = 4
    """Epochs of each training run; the first is left out as warm-up."""
    steps: int = 10
    """PGD steps: how long an epoch is."""
    turns: int = 3
    """Alternating repetitions of local and Ray Train."""
    trials: int = 6
    """Trials of each way to run them."""
    write: bool = False
    """Write the result to benchmarks/results/."""


class TimedContext(LocalContext):
    """A LocalContext that notes when each epoch was reported."""

    def report(self, metrics: Any, *, step: int, total: int, checkpoint: Any = None) -> None:
        super().report(
            {**metrics, "at": time.time()}, step=step, total=total, checkpoint=checkpoint
        )


def training(config: Config) -> ATConfig:
    attack = AttackConfig(num_steps=config.steps, step_size=0.02)
    return ATConfig(
        epochs=config.epochs,
        lr=0.05,
        schedule=ScheduleConfig(name="constant"),
        attack=attack,
        val_attack=attack,
    )


def between(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def local_epochs(config: Config, task: Any, start: Start) -> list[float]:
    context = TimedContext(task=task, start=start)
    train_at(training(config), context)
    return between([report["at"] for report in context.reports])


def ray_epochs(config: Config, task: Any, start: Start) -> list[float]:
    import ray

    from robustft.runtime.events import EventPump
    from robustft.runtime.trainer import Job, train

    times: list[float] = []
    pump = EventPump([lambda e: times.append(e["time"]) if e["kind"] == "metrics" else None])
    job = Job(
        method="at",
        config=training(config),
        task=ray.put(task),
        start=ray.put(start),
        prepared=None,
        stage="benchmark",
        run="",
        threads=1,
        gpu=False,
        send=pump.sender,
    )
    with tempfile.TemporaryDirectory() as folder:
        train(
            job,
            name="benchmark",
            storage=Path(folder),
            workers=1,
            cpus=1,
            gpus=0,
            max_failures=0,
        )
    pump.close()
    return between(times)


def epoch_table(config: Config) -> list[str]:
    task = load_task(TaskConfig())
    start = Start(
        architecture="small_resnet",
        num_classes=task.num_classes,
        image_shape=task.image_shape,
        mean=task.mean,
        std=task.std,
    )
    torch.set_num_threads(1)
    local: list[float] = []
    under_ray: list[float] = []
    for _ in range(config.turns):
        local += local_epochs(config, task, start)
        under_ray += ray_epochs(config, task, start)
    ratio = statistics.median(under_ray) / statistics.median(local)
    return [
        "| epoch | median (s) | min (s) | max (s) | n | ratio of medians |",
        "|---|---|---|---|---|---|",
        f"| LocalContext | {statistics.median(local):.2f} | {min(local):.2f} | {max(local):.2f} "
        f"| {len(local)} | 1 |",
        f"| Ray Train, 1 worker | {statistics.median(under_ray):.2f} | {min(under_ray):.2f} "
        f"| {max(under_ray):.2f} | {len(under_ray)} | {ratio:.3f} |",
    ]


def tiny_trial(config: dict[str, Any]) -> None:
    """Import what a trial imports, and finish."""
    import torch as library
    from ray import tune

    import robustft.methods

    tune.report({"value": float(library.ones(1)) + len(robustft.methods.METHODS)})


def tiny_loop() -> None:
    import robustft.methods  # noqa: F401


def tune_seconds(config: Config, *, reuse: bool) -> float:
    from ray import tune

    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        tune.Tuner(
            tune.with_resources(tiny_trial, {"cpu": 1}),
            param_space={"x": tune.grid_search(list(range(config.trials)))},
            tune_config=tune.TuneConfig(
                reuse_actors=reuse, max_concurrent_trials=os.cpu_count() or 1
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()
    return time.time() - began


def train_seconds(config: Config) -> float:
    import ray.train
    from ray.train.torch import TorchTrainer

    began = time.time()
    for number in range(config.trials):
        with tempfile.TemporaryDirectory() as folder:
            TorchTrainer(
                tiny_loop,
                scaling_config=ray.train.ScalingConfig(num_workers=1),
                run_config=ray.train.RunConfig(name=f"tiny-{number}", storage_path=folder),
            ).fit()
    return time.time() - began


def trial_table(config: Config) -> list[str]:
    ways = {
        "Tune function trials, processes reused (what robustft does)": tune_seconds(
            config, reuse=True
        ),
        "Tune function trials, one process each": tune_seconds(config, reuse=False),
        "one Ray Train run each, in turn": train_seconds(config),
    }
    first = next(iter(ways.values()))
    rows = [
        f"| {way} | {seconds:.1f} | {seconds / config.trials:.1f} | {seconds / first:.1f} |"
        for way, seconds in ways.items()
    ]
    head = f"| {config.trials} tiny trials | total (s) | per trial (s) | ratio |"
    return [head, "|---|---|---|---|", *rows]


def main(config: Config) -> None:
    runtime = RuntimeConfig()
    set_environment(runtime)
    with connect(runtime):
        lines = [
            f"# What Ray costs, cpu, {datetime.date.today()}",
            "",
            f"Command: `python benchmarks/runtime.py`, epochs {config.epochs}, PGD steps "
            f"{config.steps}, turns {config.turns}, trials {config.trials}.",
            f"Python {platform.python_version()}, torch {importlib.metadata.version('torch')}, "
            f"ray {importlib.metadata.version('ray')}, {os.cpu_count()} cores; small_resnet on "
            "fashion_mnist_mini, one thread.",
            "",
            *epoch_table(config),
            "",
            *trial_table(config),
        ]
    text = "\n".join(lines) + "\n"
    print(text)
    if config.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"runtime_cpu_{datetime.date.today()}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
