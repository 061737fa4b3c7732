"""One process equals two: statistics and remedies under DistributedDataParallel on gloo."""

import dataclasses
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_workers import DataParallelEngine, GlooContext
from torch import distributed, multiprocessing

from robustft.data.base import Task
from robustft.methods.common import AttackConfig
from robustft.methods.instance_config import CollectConfig, GroupConfig, InstancesConfig
from robustft.methods.instance_losses import MitigationConfig
from robustft.methods.instance_perturbations import GradientPerturbation
from robustft.methods.instance_statistics import InstanceStatistics
from robustft.methods.instances import train
from robustft.models import Start
from robustft.training.context import LocalContext

# 49 images in batches of 16: the last batch is one image, so that the second of two workers has no
# share of it, and the row that stands in must not be counted.
IMAGES = 33
ATTACK = AttackConfig(num_steps=1)
BASE = InstancesConfig(epochs=1, batch_size=16, lr=0.01, attack=ATTACK, val_attack=ATTACK)
COLLECT = CollectConfig(
    attacks=(GradientPerturbation(norm="L2", eps=0.3, num_steps=2),), transforms=("identity",)
)


def configs(folder: str) -> dict[str, InstancesConfig]:
    group = GroupConfig(statistics=folder, which="robust", share=0.3)
    # Near the first losses, so that the means of two shares are on different sides of it.
    flooding = MitigationConfig(kind="flooding", level=1.0986)
    return {
        "flooding": dataclasses.replace(BASE, group=group, mitigation=flooding),
        "flooding the batch": dataclasses.replace(
            BASE, group=group, mitigation=dataclasses.replace(flooding, scope="batch")
        ),
        "subset": dataclasses.replace(BASE, group=group, use="subset", training="adversarial"),
    }


def collecting(folder: Path) -> InstancesConfig:
    return dataclasses.replace(BASE, collect=dataclasses.replace(COLLECT, folder=str(folder)))


@pytest.fixture(scope="module")
def fewer(task: Task) -> Task:
    splits = {**task.splits, "train": task.splits["train"].take(np.arange(IMAGES))}
    return dataclasses.replace(task, splits=splits)


@pytest.fixture(scope="module")
def plain(fresh: Start) -> Start:
    """Without BatchNorm, which would normalise each worker's share by itself."""
    return dataclasses.replace(fresh, architecture="resnet4b")


def worker(rank: int, world_size: int, port: int, task: Task, start: Start, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    saved: dict[str, Any] = {}
    try:
        runs = {"collect": collecting(Path(folder) / "two"), **configs(f"{folder}/one")}
        for name, config in runs.items():
            context = GlooContext(
                task=task,
                start=start,
                engine=DataParallelEngine(),
                rank=rank,
                world_size=world_size,
            )
            result = train(config, context)
            saved[name] = {"state": dict(result.state), "epochs": list(result.tables["epochs"])}
        torch.save(saved, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(fewer: Task, plain: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process measured ("one"), and what each of two workers got."""
    path = tmp_path_factory.mktemp("workers")
    train(collecting(path / "one"), LocalContext(task=fewer, start=plain))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    multiprocessing.spawn(worker, args=(2, port, fewer, plain, str(path)), nprocs=2, join=True)
    return path


def test_two_workers_measure_what_one_measures(folder: Path) -> None:
    one, two = InstanceStatistics(folder / "one"), InstanceStatistics(folder / "two")
    assert one.manifest == two.manifest
    assert len(list((folder / "two" / "record=00001").glob("part-*-of-00002.parquet"))) == 2
    for record in range(2):
        for name in one.manifest.perturbations:
            for column in ("clean_loss", "pert_loss", "pert_margin", "delta_norm"):
                first, second = (
                    statistics.column(column, perturbation=name, record=record)
                    for statistics in (one, two)
                )
                np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["flooding", "flooding the batch", "subset"])
def test_two_workers_train_what_one_trains(
    name: str, folder: Path, fewer: Task, plain: Start
) -> None:
    alone = train(configs(f"{folder}/one")[name], LocalContext(task=fewer, start=plain))
    first, second = (
        torch.load(folder / f"{rank}.pt", weights_only=True)[name] for rank in range(2)
    )
    assert first["epochs"] == second["epochs"]
    for entry, value in alone.state.items():
        assert torch.equal(first["state"][entry], second["state"][entry])
        torch.testing.assert_close(first["state"][entry], value, rtol=1e-4, atol=1e-6)
    for row, expected in zip(first["epochs"], alone.tables["epochs"], strict=True):
        for metric in expected:
            assert row[metric] == pytest.approx(expected[metric], rel=1e-4), metric
