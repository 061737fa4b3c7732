"""Natural fine-tuning: what each mode trains, what the modes have in common, and with RiFT."""

import copy
import dataclasses
import itertools
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from test_workers import DataParallelEngine, GlooContext
from torch import distributed, multiprocessing, nn

from robustft.data.base import Task
from robustft.errors import ConfigError
from robustft.methods import METHODS, rift, vanilla
from robustft.methods.common import AttackConfig, validate
from robustft.methods.interpolation import InterpolateConfig
from robustft.methods.natural import NaturalConfig, ProbeConfig, train
from robustft.models import Start
from robustft.training.augment import AugmentConfig
from robustft.training.context import LocalContext
from robustft.training.optimizers import OptimizerConfig
from robustft.training.schedules import ScheduleConfig

ATTACK = AttackConfig(num_steps=1)
LINE = InterpolateConfig(alphas=(0.0, 0.5, 1.0), tolerance=1.0, curve_attack=ATTACK, curve_runs=2)
BASE = NaturalConfig(
    epochs=2,
    lr=0.02,
    batch_size=16,
    augment=AugmentConfig(crop_padding=2),
    schedule=ScheduleConfig(name="cosine"),
    probe=ProbeConfig(epochs=2, lr=0.05),
    interpolate=LINE,
    val_attack=ATTACK,
)
MODES = ("full", "last-layer", "lp-ft", "wise-ft")
HEAD = {"network.linear.weight", "network.linear.bias"}


@pytest.fixture(scope="module")
def start(task: Task, fresh: Start) -> Start:
    """A model that has learnt something, so that epochs and points differ."""
    config = dataclasses.replace(BASE, mode="full", epochs=1)
    state = train(config, LocalContext(task=task, start=fresh)).state
    return dataclasses.replace(fresh, state=state)


def of(mode: str, **changes: Any) -> NaturalConfig:
    return dataclasses.replace(BASE, mode=mode, **changes)  # type: ignore[arg-type]


def same(first: Any, second: Any) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


def test_full_is_gradient_descent_on_the_cross_entropy(task: Task, start: Start) -> None:
    """Against a loop of torch's own, over one batch of everything."""
    config = of(
        "full",
        batch_size=50,
        augment=AugmentConfig(crop_padding=0, flip=0),
        schedule=ScheduleConfig(name="constant"),
        optimizer=OptimizerConfig(momentum=0.9, weight_decay=1e-3),
        keep="last",
    )
    result = train(config, LocalContext(task=task, start=start))
    model = start.build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    images = torch.from_numpy(task.splits["train"].images).float() / 255
    labels = torch.from_numpy(task.splits["train"].labels)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(result.state[name], value, rtol=1e-3, atol=1e-5)
    # As far from the start as a step: the comparison is no comparison of two starts.
    moved = (
        result.state["network.conv1.weight"] - start.build().state_dict()["network.conv1.weight"]
    )
    assert float(moved.abs().max()) > 1e-3


def test_the_last_layer_is_the_linear_mode_of_the_robust_baseline(task: Task, start: Start) -> None:
    """Two implementations of a linear probe; only the head moves in either."""
    result = train(of("last-layer", keep="last"), LocalContext(task=task, start=start))
    other = vanilla.train(
        vanilla.RftConfig(
            mode="slf",
            epochs=2,
            lr=BASE.lr,
            batch_size=BASE.batch_size,
            augment=BASE.augment,
            schedule=BASE.schedule,
            optimizer=BASE.optimizer,
            val_attack=ATTACK,
            keep="last",
        ),
        LocalContext(task=task, start=start),
    )
    assert same(result.state, other.state)
    assert result.metrics == other.metrics
    before = start.build().state_dict()
    assert {n for n, value in result.state.items() if not torch.equal(value, before[n])} == HEAD


@pytest.mark.parametrize("keep", ["best", "last"])
def test_lp_ft_is_a_probe_and_then_full_fine_tuning(keep: str, task: Task, start: Start) -> None:
    together = train(of("lp-ft", keep=keep), LocalContext(task=task, start=start))
    options = {"epochs": 2, "lr": 0.05, "schedule": BASE.probe.schedule}
    probed = train(of("last-layer", keep=keep, **options), LocalContext(task=task, start=start))
    moved = dataclasses.replace(start, state=probed.state)
    tuned = train(of("full", keep=keep), LocalContext(task=task, start=moved))
    assert same(together.state, tuned.state)
    rows = [*probed.tables["epochs"], *tuned.tables["epochs"]]
    expected = [{**row, "epoch": number} for number, row in enumerate(rows, 1)]
    assert together.tables["epochs"] == expected
    assert together.choices["epoch"] == 2 + int(tuned.choices["epoch"])
    assert together.metrics["val/clean"] == tuned.metrics["val/clean"]
    assert not same(probed.state, tuned.state)


def test_wise_ft_is_rift_without_its_choice_of_a_layer(task: Task, start: Start) -> None:
    result = train(of("wise-ft"), LocalContext(task=task, start=start))
    config = rift.RiftConfig(
        modules="all",
        bn_mode="update",
        **{f.name: getattr(LINE, f.name) for f in dataclasses.fields(LINE)},
        **{name: getattr(BASE, name) for name in ("epochs", "lr", "batch_size", "optimizer")},
        augment=BASE.augment,
        schedule=BASE.schedule,
    )
    expected = rift.train(config, LocalContext(task=task, start=start))
    assert same(result.state, expected.state)
    assert result.tables["interpolation"] == expected.tables["interpolation"]
    assert result.tables["epochs"] == expected.tables["epochs"]
    assert expected.metrics.items() <= result.metrics.items()
    full = train(of("full"), LocalContext(task=task, start=start))
    assert result.metrics["val/tuned_clean"] == full.metrics["val/clean"]


@pytest.mark.parametrize("mode", MODES)
def test_results_are_true_and_resume_exactly(mode: str, task: Task, start: Start) -> None:
    whole_context = LocalContext(task=task, start=start)
    checkpoints: list[Any] = []
    report = whole_context.report

    def keeping(*args: Any, **options: Any) -> None:
        report(*args, **options)
        checkpoints.append(copy.deepcopy(whole_context.checkpoint))

    whole_context.report = keeping  # type: ignore[method-assign]
    whole = train(of(mode), whole_context)
    assert len(checkpoints) == (4 if mode == "lp-ft" else 2)
    model = dataclasses.replace(start, state=whole.state).build()
    measured = validate(model, whole_context, attack=ATTACK, batch_size=7, seed=0)
    assert whole.metrics["val/clean"] == measured["val/clean"]
    if mode != "wise-ft":
        assert whole.metrics["val/robust"] == measured["val/robust"]
    for done, checkpoint in enumerate(checkpoints, 1):
        torch.manual_seed(done)
        again = LocalContext(task=task, start=start, checkpoint=checkpoint)
        resumed = train(of(mode), again)
        assert len(again.reports) == len(checkpoints) - done
        assert resumed.tables == whole.tables
        assert resumed.metrics == whole.metrics
        assert resumed.choices == whole.choices
        assert same(resumed.state, whole.state)


@pytest.mark.parametrize("mode", MODES)
def test_passes_are_counted(mode: str, task: Task, start: Start) -> None:
    images = 0

    def forward(module: nn.Module, inputs: Any) -> None:
        nonlocal images
        if type(module).__name__ == "Normalized":
            images += len(inputs[0])

    hook = nn.modules.module.register_module_forward_pre_hook(forward)
    try:
        result = train(of(mode), LocalContext(task=task, start=start))
    finally:
        hook.remove()
    assert result.metrics["passes/forwards"] == images
    epochs = {"lp-ft": 4}.get(mode, 2)
    attacked = 3 * 2 if mode == "wise-ft" else epochs  # points times runs, or epochs
    assert result.metrics["passes/backwards"] == 50 * epochs + 21 * attacked
    assert set(METHODS["fine-tune"].metrics) <= set(result.metrics)


def test_frozen_batch_norm_keeps_its_statistics(task: Task, start: Start) -> None:
    before = start.build().state_dict()
    buffers = {name for name, _ in start.build().named_buffers() if "running" in name}
    for bn_mode, kept in (("frozen", True), ("update", False)):
        state = train(of("full", bn_mode=bn_mode), LocalContext(task=task, start=start)).state
        assert all(torch.equal(state[name], before[name]) is kept for name in buffers)


def test_a_new_head_is_no_end_of_a_line(task: Task, start: Start) -> None:
    context = LocalContext(task=task, start=dataclasses.replace(start, fresh_head=True))
    with pytest.raises(ConfigError, match="the start has a new head"):
        train(of("wise-ft"), context)
    train(of("lp-ft", epochs=1, probe=ProbeConfig(epochs=1)), context)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "lpft"}, "unknown value of mode 'lpft'"),
        ({"bn_mode": "recalibrate_only"}, "unknown value of bn_mode"),
        ({"keep": "bset"}, "did you mean 'best'"),
        ({"lr": 0.0}, "lr = 0.0: must be a number > 0"),
        ({"epochs": 0}, "epochs = 0"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_options_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NaturalConfig(**fields)
    with pytest.raises(ConfigError, match="epochs = 0"):
        ProbeConfig(epochs=0)


# Batches of 15: shares of 8 and 7. With BatchNorm in train mode each share would be normalised by
# itself, which is another algorithm.
SHARED = [of(mode, batch_size=15, bn_mode="frozen") for mode in ("lp-ft", "wise-ft")]


def worker(rank: int, port: int, task: Task, start: Start, folder: str) -> None:
    """Train every configuration as one rank of two."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        found = []
        for config in SHARED:
            engine = DataParallelEngine()
            context = GlooContext(task=task, start=start, engine=engine, rank=rank, world_size=2)
            result = train(config, context)
            found.append((dict(result.state), dict(result.metrics), result.tables["epochs"]))
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


def test_two_workers_train_what_one_trains(task: Task, start: Start, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    multiprocessing.spawn(worker, args=(port, task, start, str(tmp_path)), nprocs=2, join=True)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for config, first, second in zip(SHARED, *ranks, strict=True):
        alone = train(config, LocalContext(task=task, start=start))
        assert first[1:] == second[1:]
        assert same(first[0], second[0])
        for name, value in alone.state.items():
            torch.testing.assert_close(first[0][name], value, rtol=1e-4, atol=1e-5)
        for row, expected in zip(first[2], alone.tables["epochs"], strict=True):
            assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-4)
            assert row["passes/forwards"] == expected["passes/forwards"]


def test_modes_are_different_methods(task: Task, start: Start) -> None:
    states = [train(of(mode), LocalContext(task=task, start=start)).state for mode in MODES[:3]]
    assert not any(same(a, b) for a, b in itertools.combinations(states, 2))
