"""Off-line collection of instance statistics: how its time falls from one worker to four.

    python benchmarks/instance_collection.py --write

Three checkpoints of a small ResNet, each cut into four shards, are measured by 1, 2, ... processes
with one thread each, as Ray tasks measure them (``collect_shard``): reading the weights is timed,
starting the processes is not. The rows of all numbers of workers are compared. Workers beyond the
number of cores share them: their ratio says nothing, and is marked.
"""

import argparse
import dataclasses
import datetime
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robustft.data.base import Split
from robustft.methods.instance_collector import collect
from robustft.methods.instance_config import CollectConfig
from robustft.methods.instance_format import Record
from robustft.methods.instance_perturbations import GradientPerturbation
from robustft.methods.instance_recording import (
    CollectWork,
    Subject,
    collect_shard,
    save_checkpoint,
)
from robustft.models import Start, state_digest

RESULTS = Path(__file__).parent / "results"
CHECKPOINTS, SHARDS = 3, 4
SIDE, CLASSES = 28, 10
START = Start(
    architecture="small_resnet",
    num_classes=CLASSES,
    image_shape=(1, SIDE, SIDE),
    mean=(0.5,),
    std=(0.25,),
)

held: dict[str, CollectWork] = {}


def work_of(instances: int) -> CollectWork:
    """Return what every worker measures: synthetic pictures, five steps of PGD and the control."""
    draw = np.random.default_rng(0)
    split = Split(
        draw.integers(0, 256, (instances, 1, SIDE, SIDE)).astype(np.uint8),
        draw.integers(0, CLASSES, instances),
        np.arange(instances, dtype=np.int64),
    )
    options = CollectConfig(
        folder="unused",
        when="offline",
        attacks=(GradientPerturbation(eps=4 / 255, num_steps=5),),
        transforms=("identity",),
        shards=SHARDS,
    )
    subject = Subject(
        measure=collect, options=options, model=START.architecture, run="benchmark", content=[]
    )
    return CollectWork(subject=subject, start=START, split=split, device="cpu")


def prepare(instances: int) -> None:
    torch.set_num_threads(1)
    held["work"] = work_of(instances)


def measure(item: dict[str, Any]) -> dict[str, Any]:
    return collect_shard(held["work"], item)


def ready(seconds: float) -> None:
    """Occupy a process for a moment, so that all are started before the clock is."""
    time.sleep(seconds)


def items(folder: Path) -> list[dict[str, Any]]:
    """Save the checkpoints and return the pieces of work."""
    found = []
    for number in range(CHECKPOINTS):
        state = dataclasses.replace(START, seed=number).build().state_dict()
        record = Record(record=number, epoch=number, global_step=0, weights=state_digest(state))
        file = save_checkpoint(folder, record, state)
        found += [
            {"record": number, "checkpoint": str(file), "weights": record.weights, "shard": shard}
            for shard in range(SHARDS)
        ]
    return found


def timed(
    workers: int, instances: int, work: Sequence[dict[str, Any]], repeats: int
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Return the seconds of every repeat, and all rows by record and instance."""
    spawn = multiprocessing.get_context("spawn")
    seconds, values = [], []
    with spawn.Pool(workers, initializer=prepare, initargs=(instances,)) as pool:
        pool.map(ready, [1.0] * workers, chunksize=1)
        pool.map(measure, work[:workers], chunksize=1)  # first use of every kernel
        for _ in range(repeats):
            began = time.perf_counter()
            values = pool.map(measure, work, chunksize=1)
            seconds.append(time.perf_counter() - began)
    records = np.concatenate(
        [np.full(len(v["label"]), item["record"]) for item, v in zip(work, values, strict=True)]
    )
    columns = {name: np.concatenate([v[name] for v in values]) for name in ("pert_loss",)}
    ids, codes = (
        np.concatenate([v[name] for v in values]) for name in ("instance_id", "perturbation")
    )
    order = np.lexsort((ids, codes, records))
    return seconds, {name: column[order] for name, column in columns.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, default=2000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write to benchmarks/results/")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    lines, first = [], None
    with tempfile.TemporaryDirectory() as name:
        work = items(Path(name))
        for workers in options.workers:
            seconds, rows = timed(workers, options.instances, work, options.repeats)
            middle = statistics.median(seconds)
            first = first or (workers, middle, rows)
            same = all(np.array_equal(first[2][column], rows[column]) for column in rows)
            ratio = f"{first[1] / middle:.2f}" + ("" if workers <= cores else " (shared cores)")
            spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
            per_second = options.instances * CHECKPOINTS / middle
            lines.append(
                f"| {workers} | {middle:.1f} ({spread}) | {ratio} | {per_second:,.0f} | "
                f"{'yes' if same else 'NO'} |"
            )
            print(lines[-1], flush=True)
    today = datetime.date.today().isoformat()
    load = os.getloadavg()[0]
    text = "\n".join(
        [
            f"# Off-line collection of instance statistics, {today}",
            "",
            f"{options.instances:,} synthetic {SIDE}x{SIDE} pictures x {CHECKPOINTS} checkpoints "
            f"of small_resnet in {SHARDS} shards each; Linf PGD of 5 updates and the control: 7 "
            "forwards and 5 backwards to the input per picture. Processes of one thread; torch "
            f"{torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
            f"{cores} cores, load {load:.1f} at the end; median (lowest to highest) of "
            f"{options.repeats}.",
            "",
            f"| workers | seconds | times as fast as {options.workers[0]} | pictures/s "
            "| same rows |",
            "|---|---|---|---|---|",
            *lines,
            "",
        ]
    )
    print(text)
    if options.write:
        (RESULTS / f"instance_collection_{today}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
