"""One process equals two: multi-norm training under DistributedDataParallel on gloo."""

import dataclasses
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from test_workers import DataParallelEngine, GlooContext
from torch import distributed, multiprocessing

from robustft.data.base import Task
from robustft.methods.multinorm import MultiNormConfig, train
from robustft.models import Start
from robustft.threat import ThreatModel
from robustft.training.context import LocalContext
from robustft.training.schedules import ScheduleConfig

# 49 images in batches of 16: the last batch is one image, so that the second of two workers has
# no share of it, and a row that stands in must not be counted.
IMAGES = 49
BASE = MultiNormConfig(epochs=2, batch_size=16, lr=0.01, num_steps=2, val_steps=2)
CONFIGS = {
    scheme: dataclasses.replace(BASE, scheme=scheme)  # type: ignore[arg-type]
    for scheme in ("error_weighted", "max", "avg")
}
# BatchNorm in train mode normalises each worker's share by itself: not what one worker gets, but
# the same on every rank.
BATCH_NORM = {name: dataclasses.replace(CONFIGS[name], epochs=1) for name in ("avg",)}


@pytest.fixture(scope="module")
def union(task: Task) -> Task:
    """The stripes against three norms, hard enough that all are broken now and then."""
    splits = {**task.splits, "train": task.splits["train"].take(torch.arange(IMAGES).numpy())}
    threats = (ThreatModel("Linf", 0.05), ThreatModel("L2", 0.4), ThreatModel("L1", 1.5))
    return dataclasses.replace(task, splits=splits, threat_models=threats)


def plain(fresh: Start) -> Start:
    """Return a start without BatchNorm, which counts as trained: its epoch 0 is measured too."""
    start = dataclasses.replace(fresh, architecture="resnet4b", state=None)
    return dataclasses.replace(start, state=start.build().state_dict())


def worker(rank: int, world_size: int, port: int, task: Task, fresh: Start, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    ranks: dict[str, Any] = {"rank": rank, "world_size": world_size}
    saved: dict[str, Any] = {}

    def keep(name: str, start: Start, config: MultiNormConfig, checkpoint: Any = None) -> Any:
        context = GlooContext(
            task=task, start=start, engine=DataParallelEngine(), checkpoint=checkpoint, **ranks
        )
        result = train(config, context)
        saved[name] = {"state": dict(result.state), "epochs": list(result.tables["epochs"])}
        return context

    try:
        for name, config in CONFIGS.items():
            keep(name, plain(fresh), config)
        for name, config in BATCH_NORM.items():
            keep(f"{name} with batch norm", fresh, config)
        first = keep("short", plain(fresh), dataclasses.replace(BASE, epochs=1, **SAME_RATE))
        keep("resumed", plain(fresh), dataclasses.replace(BASE, **SAME_RATE), first.checkpoint)
        keep("whole", plain(fresh), dataclasses.replace(BASE, **SAME_RATE))
        torch.save(saved, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


SAME_RATE: dict[str, Any] = {"schedule": ScheduleConfig(), "keep": "last"}


@pytest.fixture(scope="module")
def ranks(union: Task, fresh: Start, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two workers got."""
    folder = tmp_path_factory.mktemp("workers")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    multiprocessing.spawn(worker, args=(2, port, union, fresh, str(folder)), nprocs=2, join=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("scheme", CONFIGS)
def test_two_workers_train_what_one_trains(
    scheme: str, union: Task, fresh: Start, ranks: list[Any]
) -> None:
    alone = train(CONFIGS[scheme], LocalContext(task=union, start=plain(fresh)))
    first, second = (rank[scheme] for rank in ranks)
    assert first["epochs"] == second["epochs"]
    for entry, value in alone.state.items():
        assert torch.equal(first["state"][entry], second["state"][entry])
        torch.testing.assert_close(first["state"][entry], value, rtol=1e-4, atol=1e-6)
    for row, expected in zip(first["epochs"], alone.tables["epochs"], strict=True):
        # Norms drawn, global robust errors and passes: equal, not only close.
        for name in expected:
            if name.startswith(("sampler/", "passes/", "val/")):
                assert row[name] == expected[name], name
        if row["epoch"]:
            assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)


def test_both_norms_were_drawn_and_the_images_counted_once(ranks: list[Any]) -> None:
    rows = [row for row in ranks[0]["error_weighted"]["epochs"] if row["epoch"]]
    assert all(sum(row[f"sampler/{norm}_share"] for norm in ("Linf", "L1")) == 1 for row in rows)
    assert {0.0, 1.0}.isdisjoint({rows[0]["sampler/L1_share"]})
    assert [row["passes/forwards"] for row in rows] == [IMAGES * (2 + 1 + 1)] * 2


@pytest.mark.parametrize("scheme", BATCH_NORM)
def test_workers_agree_where_batch_norm_sees_shares(scheme: str, ranks: list[Any]) -> None:
    first, second = (rank[f"{scheme} with batch norm"] for rank in ranks)
    assert first["epochs"] == second["epochs"]
    assert all(
        torch.equal(value, second["state"][entry]) for entry, value in first["state"].items()
    )


def test_two_workers_resume_bit_for_bit(ranks: list[Any]) -> None:
    for rank in ranks:
        assert rank["resumed"]["epochs"] == rank["whole"]["epochs"]
        for entry, value in rank["whole"]["state"].items():
            assert torch.equal(rank["resumed"]["state"][entry], value)
