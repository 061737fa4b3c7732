"""AutoLoRa and its baselines on two processes: the same decisions, and the same training."""

import dataclasses
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn

from robustft.data.base import Task
from robustft.methods import autolora, twins, vanilla
from robustft.methods.autolora import AutoLoraConfig, HalvingConfig
from robustft.methods.base import Result
from robustft.methods.common import AttackConfig
from robustft.methods.twins import TwinsConfig
from robustft.methods.vanilla import RftConfig
from robustft.models import Start
from robustft.training.context import LocalContext, PlainEngine

ATTACK = AttackConfig(num_steps=2)
# 50 images in batches of 15: shares of 8 and 7, and of 3 and 2 at the end.
SHARED: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 15,
    "lr": 0.01,
    "attack": ATTACK,
    "val_attack": ATTACK,
}
AUTOLORA = AutoLoraConfig(
    **{**SHARED, "epochs": 4}, rank=2, halving=HalvingConfig(checkpoints=(0, 1, 2))
)
TWINS = TwinsConfig(**{**SHARED, "batch_size": 16})

TRAIN: dict[type, Callable[[Any, Any], Result]] = {
    AutoLoraConfig: autolora.train,
    RftConfig: vanilla.train,
    TwinsConfig: twins.train,
}

# BatchNorm in train mode normalises each worker's share by itself, which is another algorithm.
# These are compared with one worker on a network without it, or with it in eval mode.
SAME_AS_ONE: dict[str, tuple[str, Any]] = {
    "autolora": ("resnet4b", AUTOLORA),
    "rft trades-kl": ("resnet4b", RftConfig(**SHARED)),
    "rft trades-ce": ("resnet4b", RftConfig(**SHARED, variant="trades-ce")),
    "rft at": ("resnet4b", RftConfig(**SHARED, variant="at")),
    "rft alf": ("small_resnet", RftConfig(**SHARED, mode="alf")),
}

# Not what one worker gets, but the same on every rank.
SAME_ON_BOTH: dict[str, tuple[str, Any]] = {
    "autolora with batch norm": ("small_resnet", dataclasses.replace(AUTOLORA, epochs=2)),
    "rft with batch norm": ("small_resnet", RftConfig(**SHARED)),
    "rft with dual batch norm": ("small_resnet", RftConfig(**SHARED, dual_bn=True)),
    "twins": ("small_resnet", TWINS),
    "twins at": ("small_resnet", dataclasses.replace(TWINS, objective="at")),
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


def worker(rank: int, world_size: int, port: int, task: Task, fresh: Start, folder: str) -> None:
    """Run everything that the tests below look at: starting processes is what takes the time."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    saved: dict[str, Any] = {}
    try:
        for name, (architecture, config) in {**SAME_AS_ONE, **SAME_ON_BOTH}.items():
            context = GlooContext(
                task=task,
                start=dataclasses.replace(fresh, architecture=architecture),
                engine=DataParallelEngine(),
                rank=rank,
                world_size=world_size,
            )
            result = TRAIN[type(config)](config, context)
            saved[name] = {"state": dict(result.state), "epochs": list(result.tables["epochs"])}
        torch.save(saved, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(task: Task, fresh: Start, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two workers got."""
    folder = tmp_path_factory.mktemp("workers")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    multiprocessing.spawn(worker, args=(2, port, task, fresh, str(folder)), nprocs=2, join=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", SAME_AS_ONE)
def test_two_workers_train_what_one_trains(
    name: str, task: Task, fresh: Start, ranks: list[Any]
) -> None:
    architecture, config = SAME_AS_ONE[name]
    context = LocalContext(task=task, start=dataclasses.replace(fresh, architecture=architecture))
    alone = TRAIN[type(config)](config, context)
    first, second = (rank[name] for rank in ranks)
    assert first["epochs"] == second["epochs"]
    for entry, value in alone.state.items():
        assert torch.equal(first["state"][entry], second["state"][entry])
        torch.testing.assert_close(first["state"][entry], value, rtol=1e-4, atol=1e-6)
    for row, expected in zip(first["epochs"], alone.tables["epochs"], strict=True):
        assert row.keys() == expected.keys()
        for metric, value in expected.items():
            # Losses to the last digits; accuracies, weights, rates and decisions are the same.
            tolerance = 1e-5 if "loss" in metric or "size" in metric else 0
            assert row[metric] == pytest.approx(value, rel=tolerance, abs=tolerance), metric


def test_the_comparison_has_a_halving(ranks: list[Any]) -> None:
    """Without one, going back to the best weights would not have been compared."""
    rows = ranks[0]["autolora"]["epochs"]
    assert any(row["halving/condition"] for row in rows)


@pytest.mark.parametrize("name", SAME_ON_BOTH)
def test_workers_agree_where_batch_norm_sees_shares(name: str, ranks: list[Any]) -> None:
    first, second = (rank[name] for rank in ranks)
    assert first["epochs"] == second["epochs"]
    assert all(
        torch.equal(value, second["state"][entry]) for entry, value in first["state"].items()
    )
