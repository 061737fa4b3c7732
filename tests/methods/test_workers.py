"""One process equals two: the same method under DistributedDataParallel on gloo."""

import dataclasses
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn

from robustft.data.base import Task
from robustft.methods import METHODS
from robustft.methods.adversarial import ATConfig, TradesConfig
from robustft.methods.common import AttackConfig
from robustft.methods.rift import RiftConfig
from robustft.models import Start
from robustft.training.context import LocalContext, PlainEngine
from robustft.training.loop import share_buffers

ATTACK = AttackConfig(num_steps=2)
# 50 images in batches of 15: shares of 8 and 7, and of 3 and 2 at the end.
AT = ATConfig(epochs=2, batch_size=15, lr=0.01, attack=ATTACK, val_attack=ATTACK)
CONFIGS: dict[str, Any] = {
    # BatchNorm in train mode normalises each worker's share by itself, which is another
    # algorithm; so AT and TRADES are compared on a network without it, and RiFT with it frozen.
    "at": AT,
    "trades": TradesConfig(epochs=2, batch_size=15, lr=0.01, attack=ATTACK, val_attack=ATTACK),
    "rift": RiftConfig(
        epochs=2,
        batch_size=15,
        lr=0.01,
        modules="layer2.0.conv2",
        curve_attack=ATTACK,
        curve_runs=1,
        alphas=(0.0, 1.0),
    ),
}

# With BatchNorm in train mode: not what one worker gets, but the same on every rank.
BATCH_NORM: dict[str, Any] = {
    "at": dataclasses.replace(AT, epochs=1),
    "rift": dataclasses.replace(CONFIGS["rift"], epochs=1, bn_mode="update"),
}


class DataParallelEngine(PlainEngine):
    """The plain engine with its module wrapped."""

    def prepare(self, model: nn.Module, optimizer: Any) -> nn.Module:
        super().prepare(model, optimizer)
        return nn.parallel.DistributedDataParallel(model)


@dataclasses.dataclass(kw_only=True)
class GlooContext(LocalContext):
    """A local context whose sums go over all ranks."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total


def start_of(name: str, fresh: Start) -> Start:
    return fresh if name == "rift" else dataclasses.replace(fresh, architecture="resnet4b")


def worker(rank: int, world_size: int, port: int, task: Task, fresh: Start, folder: str) -> None:
    """Run everything that the tests below look at: starting processes is what takes the time."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    ranks: dict[str, Any] = {"rank": rank, "world_size": world_size}
    saved: dict[str, Any] = {}
    try:
        for name, config in CONFIGS.items():
            context = GlooContext(
                task=task, start=start_of(name, fresh), engine=DataParallelEngine(), **ranks
            )
            result = METHODS[name].train(config, context)
            saved[name] = {"state": dict(result.state), "epochs": list(result.tables["epochs"])}
        for name, config in BATCH_NORM.items():
            context = GlooContext(task=task, start=fresh, engine=DataParallelEngine(), **ranks)
            result = METHODS[name].train(config, context)
            saved[f"{name} with batch norm"] = {
                "state": dict(result.state),
                "epochs": list(result.tables["epochs"]),
            }
        model = drifted(fresh, task, rank)
        share_buffers(model, GlooContext(task=task, start=fresh, **ranks))
        saved["buffers"] = dict(model.named_buffers())
        torch.save(saved, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


def drifted(fresh: Start, task: Task, rank: int) -> nn.Module:
    """Return a model whose BatchNorm buffers have seen this rank's data."""
    model = fresh.build().train()
    draw = torch.Generator().manual_seed(rank)
    model(torch.rand(4, *task.image_shape, generator=draw))
    return model


@pytest.fixture(scope="module")
def ranks(task: Task, fresh: Start, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two workers got."""
    folder = tmp_path_factory.mktemp("workers")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    multiprocessing.spawn(worker, args=(2, port, task, fresh, str(folder)), nprocs=2, join=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_two_workers_train_what_one_trains(
    name: str, task: Task, fresh: Start, ranks: list[Any]
) -> None:
    context = LocalContext(task=task, start=start_of(name, fresh))
    alone = METHODS[name].train(CONFIGS[name], context)
    first, second = (rank[name] for rank in ranks)
    assert first["epochs"] == second["epochs"]
    for entry, value in alone.state.items():
        assert torch.equal(first["state"][entry], second["state"][entry])
        torch.testing.assert_close(first["state"][entry], value, rtol=1e-4, atol=1e-6)
    for row, expected in zip(first["epochs"], alone.tables["epochs"], strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)


@pytest.mark.parametrize("name", sorted(BATCH_NORM))
def test_workers_agree_where_batch_norm_sees_shares(name: str, ranks: list[Any]) -> None:
    first, second = (rank[f"{name} with batch norm"] for rank in ranks)
    assert first["epochs"] == second["epochs"]
    assert all(
        torch.equal(value, second["state"][entry]) for entry, value in first["state"].items()
    )


def test_every_rank_gets_rank_zeros_buffers(task: Task, fresh: Start, ranks: list[Any]) -> None:
    first, second = (rank["buffers"] for rank in ranks)
    for name, expected in drifted(fresh, task, 0).named_buffers():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], expected)
