"""One process equals two: ROSE under DistributedDataParallel on gloo."""

import dataclasses
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rose import BASE, ToyStart, make_task
from test_workers import DataParallelEngine, GlooContext
from torch import distributed, multiprocessing

from robustft.methods.rose import RoseConfig, train
from robustft.methods.text_losses import TextLossConfig
from robustft.training.context import LocalContext
from robustft.training.mask_log import MaskLog
from robustft.training.rose_adamw import StepRecord

# Without dropout, or with noise that depends on the texts alone, shares do not matter. The last
# batch is one text: the second worker has no share of it.
PLAIN, NOISY = ToyStart(dropout=0.0), ToyStart(dropout=0.0, fixed_noise=True)
SHARED: dict[str, tuple[ToyStart, RoseConfig]] = {
    "second": (PLAIN, BASE),
    "first": (NOISY, dataclasses.replace(BASE, variant="first")),
    "ensemble in parts": (NOISY, dataclasses.replace(BASE, variant="ensemble", accumulate=2)),
    "random": (PLAIN, dataclasses.replace(BASE, mask="random")),
    "freelb": (PLAIN, dataclasses.replace(BASE, loss=TextLossConfig(name="freelb"))),
}
DROPOUT: dict[str, tuple[ToyStart, RoseConfig]] = {
    "first by norms": (
        ToyStart(),
        dataclasses.replace(BASE, variant="first", first_order_reduce="norm"),
    ),
    "ensemble": (ToyStart(), dataclasses.replace(BASE, variant="ensemble")),
    "loss without a pair": (
        ToyStart(),
        dataclasses.replace(BASE, variant="first", loss=TextLossConfig(name="ce")),
    ),
}


class Stopped(Exception):
    """Raised after the first epoch."""


@dataclasses.dataclass(kw_only=True)
class StoppingContext(GlooContext):
    """Saves the first epoch and ends there."""

    def report(self, *args: Any, **kwargs: Any) -> None:
        super().report(*args, **kwargs)
        raise Stopped


def worker(rank: int, world_size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    saved: dict[str, Any] = {}
    masks: list[dict[str, float]] = []
    original = MaskLog.add

    def add(self: MaskLog, record: StepRecord) -> None:
        masks.append(dict(record.masks))
        original(self, record)

    MaskLog.add = add  # type: ignore[method-assign]

    def keep(name: str, start: ToyStart, config: RoseConfig, kind: Any = GlooContext) -> Any:
        masks.clear()
        any_start: Any = start
        any_task: Any = make_task()
        context = kind(
            task=any_task,
            start=any_start,
            engine=DataParallelEngine(),
            rank=rank,
            world_size=world_size,
        )
        context.checkpoint = saved.pop("checkpoint", None)
        try:
            result = train(config, context)
        except Stopped:
            return context.checkpoint
        saved[name] = {
            "state": dict(result.state),
            "epochs": list(result.tables["epochs"]),
            "frequency": list(result.tables["mask_frequency"]),
            "masks": list(masks),
        }
        return None

    try:
        for name, (start, config) in {**SHARED, **DROPOUT}.items():
            keep(name, start, config)
        start, config = DROPOUT["ensemble"]
        saved["checkpoint"] = keep("", start, config, StoppingContext)
        keep("ensemble resumed", start, config)
        torch.save(saved, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two workers got."""
    folder = tmp_path_factory.mktemp("workers")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    multiprocessing.spawn(worker, args=(2, port, str(folder)), nprocs=2, join=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", [*SHARED, *DROPOUT])
def test_masks_and_weights_agree_on_all_workers(name: str, ranks: list[Any]) -> None:
    first, second = (rank[name] for rank in ranks)
    assert len(first["masks"]) == 8
    assert first["masks"] == second["masks"]
    assert {value for mask in first["masks"] for value in mask.values()} > {1.0}
    assert first["epochs"] == second["epochs"]
    for entry, value in first["state"].items():
        assert torch.equal(value, second["state"][entry])


@pytest.mark.parametrize("name", SHARED)
def test_two_workers_train_what_one_trains(name: str, ranks: list[Any]) -> None:
    start, config = SHARED[name]
    any_start: Any = start
    any_task: Any = make_task()
    alone = train(config, LocalContext(task=any_task, start=any_start))
    shared = ranks[0][name]
    for entry, value in alone.state.items():
        torch.testing.assert_close(shared["state"][entry], value, rtol=1e-4, atol=1e-5)
    assert shared["frequency"] == alone.tables["mask_frequency"]
    for row, expected in zip(shared["epochs"], alone.tables["epochs"], strict=True):
        assert row == pytest.approx(expected, rel=1e-3)


def test_two_workers_resume_exactly(ranks: list[Any]) -> None:
    for rank in ranks:
        whole, resumed = rank["ensemble"], rank["ensemble resumed"]
        assert whole["epochs"] == resumed["epochs"]
        assert whole["frequency"] == resumed["frequency"]
        for entry, value in whole["state"].items():
            assert torch.equal(value, resumed["state"][entry])


def test_workers_have_dropout_of_their_own(ranks: list[Any]) -> None:
    """Otherwise one worker would train the same."""
    start, config = DROPOUT["ensemble"]
    any_start: Any = start
    any_task: Any = make_task()
    alone = train(config, LocalContext(task=any_task, start=any_start))
    weight = "classifier.weight"
    assert not torch.allclose(alone.state[weight], ranks[0]["ensemble"]["state"][weight])
