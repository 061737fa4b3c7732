"""AutoLoRa: which gradient goes where, its two automatic schedules, and that it resumes exactly."""

import ast
import dataclasses
import functools
import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustft.config import from_dict, to_dict
from robustft.data.base import Split, Task
from robustft.errors import CheckpointError, ConfigError, NonFiniteLossError, UnknownNameError
from robustft.methods.autolora import (
    AutoLoraConfig,
    HalvingConfig,
    HalvingController,
    LowRankConv2d,
    TwoPaths,
    add_low_rank_branches,
    loss_weights,
    train,
)
from robustft.methods.common import AttackConfig, validate
from robustft.methods.fine_tuning import craft_batch, divergence, find_head, start_model
from robustft.methods.low_rank import low_rank_layers
from robustft.models import Start, build_model
from robustft.training.augment import augment
from robustft.training.context import LocalContext
from robustft.training.loaders import Batch, Loader
from robustft.training.optimizers import OptimizerConfig
from robustft.training.schedules import ScheduleConfig
from robustft.training.seeding import generator

ATTACK = AttackConfig(num_steps=2)
SMALL: dict[str, Any] = {
    "epochs": 5,
    "lr": 0.02,
    "batch_size": 16,
    "rank": 4,
    "attack": ATTACK,
    "val_attack": ATTACK,
    "halving": HalvingConfig(checkpoints=(0, 2, 3)),
}
CONFIG = AutoLoraConfig(**SMALL)


@pytest.fixture(scope="module")
def whole(task: Task, fresh: Start) -> Any:
    """A run of five epochs: its context and its result."""
    context = LocalContext(task=task, start=fresh)
    return context, train(CONFIG, context)


def batch_of(split: Split) -> Batch:
    inputs = torch.from_numpy(split.images).float() / 255
    labels, ids = torch.from_numpy(split.labels), torch.from_numpy(split.ids)
    return Batch(inputs=inputs, labels=labels, ids=ids, scale=1.0, count=len(ids))


# 1. Which gradient goes where (section 2.4 of the specification).


def network(fresh: Start, *, grown: bool) -> tuple[nn.Module, TwoPaths]:
    """Return a network with branches, those with an effect if ``grown``, and its two paths."""
    draw = torch.Generator().manual_seed(3)
    model = fresh.build()
    _, head = find_head(model, None, num_classes=3)
    add_low_rank_branches(model, 4, generator=draw)
    if grown:
        for layer in low_rank_layers(model).values():
            layer.lora_B_nat.data = torch.randn(layer.lora_B_nat.shape, generator=draw) * 0.1
    return model, TwoPaths(model, head).train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {name: torch.zeros(()) if grad is None else grad for name, grad in grads.items()}


def loss_of(
    natural_logits: Tensor, logits: Tensor, labels: Tensor, lambda1: float, lambda2: float
) -> Tensor:
    """The objective of section 2.3, written out."""
    p, q = natural_logits.softmax(1), logits.softmax(1)
    rows = torch.arange(len(labels))
    natural, adversarial = -p[rows, labels].log().mean(), -q[rows, labels].log().mean()
    kl = (p * (p.log() - q.log())).sum() / len(labels)
    return lambda1 * natural + (1 - lambda1) * adversarial + lambda2 * kl


def toggled(model: nn.Module, inputs: Tensor, adversarial: Tensor) -> tuple[Tensor, Tensor]:
    """Both forwards as the authors do them: ``requires_grad`` by name, a flag in every layer."""

    def switch(trainable: Any, *, branch: bool) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable(name))
        for layer in low_rank_layers(model).values():
            layer.forward = functools.partial(LowRankConv2d.forward, layer, branch=branch)  # type: ignore[method-assign]

    switch(lambda name: "lora" in name or "linear" in name, branch=True)
    natural_logits = model(inputs)
    switch(lambda name: "lora" not in name, branch=False)
    logits = model(adversarial)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return natural_logits, logits


@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("lambdas", [(1.0, 0.0), (0.0, 6.0), (0.3, 2.0)])
def test_gradients_are_those_of_toggling_by_name(
    lambdas: tuple[float, float], grown: bool, task: Task, fresh: Start
) -> None:
    batch = batch_of(task.splits["val"])
    moved = (batch.inputs + 0.05 * torch.sign(torch.randn_like(batch.inputs))).clamp(0, 1)
    model, paths = network(fresh, grown=grown)
    loss_of(*paths(batch.inputs, moved), batch.labels, *lambdas).backward()
    other, _ = network(fresh, grown=grown)
    other.train()
    loss_of(*toggled(other, batch.inputs, moved), batch.labels, *lambdas).backward()
    found, expected = gradients(model), gradients(other)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name
    # Running statistics have seen both batches, in the same order.
    for (name, buffer), wanted in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(buffer, wanted), name
    assert int(model.get_buffer("network.bn1.num_batches_tracked")) == 2


@pytest.mark.parametrize("grown", [False, True])
def test_natural_images_alone_leave_the_extractor_alone(
    grown: bool, task: Task, fresh: Start
) -> None:
    batch = batch_of(task.splits["val"])
    model, paths = network(fresh, grown=grown)
    loss_of(*paths(batch.inputs, batch.inputs), batch.labels, 1.0, 0.0).backward()
    for name, grad in gradients(model).items():
        if "lora_A" in name:
            assert grad.any() == grown, name  # exactly 0 while B is 0
        elif "lora_B" in name or "linear" in name:
            assert grad.any(), name
        else:
            assert not grad.any(), name


@pytest.mark.parametrize("grown", [False, True])
def test_the_divergence_reaches_both_paths(grown: bool, task: Task, fresh: Start) -> None:
    batch = batch_of(task.splits["val"])
    model, paths = network(fresh, grown=grown)
    natural_logits, logits = paths(batch.inputs, batch.inputs.flip(0))
    divergence(natural_logits, logits).mean().backward()  # type: ignore[no-untyped-call]
    grads = gradients(model)
    assert grads["network.conv1.weight"].any()
    assert grads["network.bn1.bias"].any()
    assert grads["network.layer2.0.conv1.conv.weight"].any()
    assert grads["network.layer2.0.conv1.lora_B_nat"].any()
    assert grads["network.layer2.0.conv1.lora_A_nat"].any() == grown


def test_entangled_natural_images_train_everything(task: Task, fresh: Start) -> None:
    batch = batch_of(task.splits["val"])
    model, paths = network(fresh, grown=True)
    entangled = TwoPaths(model, nn.Identity(), disentangle=False).train()
    assert torch.equal(entangled.natural(batch.inputs), paths.natural(batch.inputs))
    functional.cross_entropy(entangled.natural(batch.inputs), batch.labels).backward()
    assert all(grad.any() for grad in gradients(model).values())


def test_crafting_and_forwards_leave_flags_and_gradients_alone(task: Task, fresh: Start) -> None:
    batch = batch_of(task.splits["val"])
    model, paths = network(fresh, grown=True)
    craft_batch(
        model,
        batch,
        context=LocalContext(task=task, start=fresh),
        attack=ATTACK,
        noise=generator(0, "x"),
    )
    paths(batch.inputs, batch.inputs)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(module.training for module in paths.modules())


def test_dropout_is_off_on_both_paths() -> None:
    drop = nn.Dropout(0.5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), drop, nn.Linear(8, 8), nn.Linear(8, 3))
    paths = TwoPaths(add_low_rank_branches(model, 2), model[-1]).train()
    assert not drop.training
    assert model.training
    inputs = torch.rand(5, 1, 2, 2)
    first, second = paths(inputs, inputs)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, model.eval()(inputs))


# 2. The weights of the losses (section 3.1).


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [(0, (1, 0)), (0.1, (0.9, 0.6)), (0.5, (0.5, 3)), (0.9, (0.1, 5.4)), (1, (0, 6))],
)
def test_loss_weights(accuracy: float, expected: tuple[float, float]) -> None:
    assert loss_weights(accuracy) == pytest.approx(expected)


def test_loss_weights_with_other_constants() -> None:
    assert loss_weights(0.5, lambda_max=4, alpha=2) == (0.75, 1.0)
    assert loss_weights(0.04, alpha=0.5) == pytest.approx((0.8, 1.2))
    with pytest.raises(ConfigError, match=r"train_accuracy = 50: must be a fraction"):
        loss_weights(50)


# 3. The learning rate (section 3.2).

HIGH = tuple(range(0, 60, 4))


def follow(
    accuracies: list[float], checkpoints: tuple[int, ...] = HIGH, lr: float = 0.01
) -> tuple[list[float], list[int], int]:
    """Return the rate after each epoch, the conditions, and the epoch after which it stops."""
    controller = HalvingController(lr, checkpoints)
    rates, conditions = [], []
    for accuracy in accuracies:
        conditions.append(controller.update(accuracy).condition)
        rates.append(controller.lr)
        if controller.finished:
            break
    return rates, conditions, len(rates)


def halvings(conditions: list[int]) -> dict[int, int]:
    return {epoch: c for epoch, c in enumerate(conditions, start=1) if c}


def test_always_rising_keeps_the_rate() -> None:
    rates, conditions, _ = follow([epoch / 100 for epoch in range(60)])
    assert set(rates) == {0.01}
    assert not any(conditions)


def test_always_falling_halves_at_every_check_and_stops() -> None:
    rates, conditions, stop = follow([1 - epoch / 100 for epoch in range(60)])
    assert halvings(conditions) == dict.fromkeys(range(5, 42, 4), 1)
    assert rates[3:5] == [0.01, 0.005]
    assert stop == 41
    assert rates[-1] == 0.01 / 2**10


def test_rising_then_flat() -> None:
    rates, conditions, _ = follow([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert halvings(conditions) == {9: 1}
    assert rates[7:] == [0.01, 0.005, 0.005]


def test_a_high_first_value_then_a_slow_rise_is_condition_two() -> None:
    _, conditions, _ = follow([0.9, *(0.1 + epoch / 100 for epoch in range(12))])
    # At epoch 5 it rose three times in four and there is no earlier check to compare with.
    assert halvings(conditions) == {9: 2, 13: 2}


def test_three_rises_of_four_are_enough_and_two_are_not() -> None:
    assert not any(follow([0.5, 0.6, 0.5, 0.6, 0.7])[1])
    assert halvings(follow([0.5, 0.6, 0.6, 0.6, 0.7])[1]) == {5: 1}


def test_the_spacing_for_32_pixels() -> None:
    low = (0, 16, 24, 28, 36, 40, 42, 44, 46, 48, 50)
    _, conditions, stop = follow([0.5] * 50, low, lr=0.1)
    assert list(halvings(conditions)) == [17, 25, 29, 37, 41, 43, 45, 47, 49]
    assert stop == 50  # the check at 50 would be at the end of epoch 51


def test_decisions_name_improvements() -> None:
    controller = HalvingController(1.0, (2, 4))
    assert [controller.update(a).improved for a in (0.1, 0.1, 0.2, 0.15, 0.3)] == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert controller.lr == 0.25  # one rise of two is too few, at epoch 3 and at epoch 5
    assert not controller.finished


def reference(accuracies: list[float], checkpoints: tuple[int, ...]) -> list[int]:
    """The loop of section 3.2, kept as state instead of a history."""
    best, best_at_check, k, conditions = -1.0, None, 1, []
    for epoch, accuracy in enumerate(accuracies, start=1):
        best = max(best, accuracy)
        condition = 0
        if k < len(checkpoints) and epoch - 1 == checkpoints[k]:
            steps = range(checkpoints[k - 1] + 1, checkpoints[k] + 1)
            rises = sum(accuracies[j] > accuracies[j - 1] for j in steps)
            if rises < 0.75 * (checkpoints[k] - checkpoints[k - 1]):
                condition = 1
            elif k >= 2 and best == best_at_check:
                condition = 2
            best_at_check = best
            k += 1
        conditions.append(condition)
    return conditions


@pytest.mark.parametrize("checkpoints", [HIGH, (0, 16, 24, 28, 36, 40, 42, 44), (0, 1, 2, 5)])
def test_the_controller_is_the_published_loop(checkpoints: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(50):
        walk = torch.randn(60, generator=draw) + 0.8
        accuracies = (walk.cumsum(0) / 60).round(decimals=2).tolist()
        controller = HalvingController(1.0, checkpoints, min_lr=0)
        found = [controller.update(a).condition for a in accuracies]
        assert found == reference(accuracies, checkpoints)
        assert controller.lr == 0.5 ** sum(map(bool, found))
        seen |= set(found)
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start_lr": 0.0}, "start_lr = 0.0"),
        ({"checkpoints": (0, 4, 4)}, r"checkpoints = \(0, 4, 4\): must be ascending whole"),
        ({"checkpoints": (-1, 4)}, "ascending whole epochs"),
        ({"checkpoints": (0, 1.5)}, "ascending whole epochs"),
        ({"rho": 1.5}, "rho = 1.5"),
        ({"factor": 1.0}, "factor = 1.0"),
        ({"min_lr": -1.0}, "min_lr"),
    ],
)
def test_controllers_check_their_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HalvingController(**{"start_lr": 0.1, "checkpoints": (0, 4), **arguments})


# 4. Whole runs.


class Stopped(Exception):
    """Stands for a worker that is killed."""


@dataclasses.dataclass(kw_only=True)
class StoppingContext(LocalContext):
    """Dies right after it has saved the checkpoint of a given epoch."""

    stop_after: int

    def report(self, metrics: Any, *, step: int, total: int, checkpoint: Any = None) -> None:
        LocalContext.report(self, metrics, step=step, total=total, checkpoint=checkpoint)
        if step == self.stop_after:
            raise Stopped


def test_the_run_under_test_goes_back_to_its_best_weights(whole: Any) -> None:
    """The tests below would prove nothing if the rate were never halved."""
    _, result = whole
    rows = result.tables["epochs"]
    assert any(row["halving/condition"] for row in rows)
    assert any(row["halving/condition"] and row["halving/best"] < row["epoch"] for row in rows)
    assert len({row["lr"] for row in rows}) > 1


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_resumed_equals_undisturbed_bit_for_bit(
    stop_after: int, whole: Any, task: Task, fresh: Start, tmp_path: Any
) -> None:
    _, expected = whole
    first = StoppingContext(task=task, start=fresh, stop_after=stop_after)
    with pytest.raises(Stopped):
        train(CONFIG, first)
    torch.manual_seed(999)  # Whatever happened to the global generator in between.
    torch.save(first.checkpoint, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = LocalContext(task=task, start=fresh, checkpoint=saved)
    resumed = train(CONFIG, second)
    assert len(second.reports) == CONFIG.epochs - stop_after
    assert resumed.metrics == expected.metrics
    assert resumed.tables == expected.tables
    assert resumed.choices == expected.choices
    assert all(torch.equal(resumed.state[name], expected.state[name]) for name in expected.state)


def test_a_halving_restores_the_best_weights_and_keeps_the_momentum(
    whole: Any, task: Task, fresh: Start
) -> None:
    _, result = whole
    rows = result.tables["epochs"]
    row = next(r for r in rows if r["halving/condition"] and r["halving/best"] < r["epoch"])
    states = {}
    for reset in (False, True):
        halving = dataclasses.replace(CONFIG.halving, reset_momentum=reset)
        config = dataclasses.replace(CONFIG, halving=halving)
        at_best, at_halving = (
            StoppingContext(task=task, start=fresh, stop_after=epoch)
            for epoch in (row["halving/best"], row["epoch"])
        )
        for context in (at_best, at_halving):
            with pytest.raises(Stopped):
                train(config, context)
        best, now = at_best.checkpoint, at_halving.checkpoint
        assert best is not None
        assert now is not None
        for name, value in best["engine"]["model"].items():
            assert torch.equal(now["engine"]["model"][name], value), name
        states[reset] = now["engine"]["optimizer"]["state"]
    assert states[False]
    assert not states[True]


def test_training_stops_when_the_rate_is_too_small(task: Task, fresh: Start) -> None:
    halving = HalvingConfig(checkpoints=(0, 1, 2, 3, 4), min_lr=CONFIG.lr)
    config = dataclasses.replace(CONFIG, epochs=9, halving=halving)
    context = LocalContext(task=task, start=fresh)
    result = train(config, context)
    *earlier, last = [row["halving/condition"] for row in result.tables["epochs"]]
    assert not any(earlier)
    assert last
    assert len(earlier) < 5
    assert result.choices["halvings"] == 1
    # A finished run that is asked again has nothing left to do.
    again = LocalContext(task=task, start=fresh, checkpoint=context.checkpoint)
    assert train(config, again).tables == result.tables
    assert again.reports == []


def test_the_weights_follow_the_branch_accuracy(whole: Any) -> None:
    _, result = whole
    rows = result.tables["epochs"]
    for before, row in itertools.pairwise(rows):
        accuracy = before["branch/accuracy"]
        assert (row["lambda1"], row["lambda2"]) == loss_weights(accuracy)
    assert "branch/accuracy" not in rows[-1]


@pytest.mark.parametrize("source", ["branch", "plain"])
def test_the_branch_accuracy_is_that_of_augmented_training_images(
    source: str, task: Task, fresh: Start
) -> None:
    config = dataclasses.replace(CONFIG, epochs=3, lambda_source=source)  # type: ignore[arg-type]
    context = StoppingContext(task=task, start=fresh, stop_after=2)
    with pytest.raises(Stopped):
        train(config, context)
    assert context.checkpoint is not None
    model, paths = network(fresh, grown=False)
    paths.load_state_dict(context.checkpoint["engine"]["model"])
    paths.eval()
    batch = batch_of(task.splits["train"])
    inputs = augment(batch.inputs, batch.ids, config=config.augment, seed=0, epoch=2)
    with torch.no_grad():
        logits = paths.natural(inputs) if source == "branch" else model(inputs)
    expected = (logits.argmax(1) == batch.labels).double().mean().item()
    assert context.reports[-1]["branch/accuracy"] == pytest.approx(expected)


def test_a_new_head_starts_near_chance(task: Task, fresh: Start) -> None:
    config = dataclasses.replace(CONFIG, epochs=1, head_init="zeros")
    result = train(config, LocalContext(task=task, start=fresh))
    (row,) = result.tables["epochs"]
    share = float((task.splits["train"].labels == 0).mean())  # equal logits: class 0
    assert (row["lambda1"], row["lambda2"]) == pytest.approx((1 - share, 6 * share))


def test_the_loss_is_the_published_one(task: Task, fresh: Start) -> None:
    config = dataclasses.replace(CONFIG, epochs=1, batch_size=50)
    context = LocalContext(task=task, start=fresh)
    train(config, context)
    report = context.reports[0]
    model = start_model(config, context)
    add_low_rank_branches(model, config.rank, generator=generator(0, "branches"))
    paths = TwoPaths(model, find_head(model, None, num_classes=3)[1])
    loader = Loader(task.splits["train"], batch_size=50, seed=0, device=torch.device("cpu"))
    (batch,) = loader.epoch(0)
    inputs = augment(batch.inputs, batch.ids, config=config.augment, seed=0, epoch=0)
    batch = dataclasses.replace(batch, inputs=inputs)
    adversarial = craft_batch(
        model, batch, context=context, attack=ATTACK, noise=generator(0, "step", 0, 0)
    )
    paths.train()
    with torch.no_grad():
        natural_logits, logits = paths(inputs, adversarial)
    both = (natural_logits.double(), logits.double(), batch.labels)
    loss = loss_of(*both, report["lambda1"], report["lambda2"])
    assert report["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    natural, robust, together = (loss_of(*both, *pair) for pair in ((1, 0), (0, 0), (0, 1)))
    assert report["loss/natural"] == pytest.approx(natural.item(), rel=1e-5)
    assert report["loss/adversarial"] == pytest.approx(robust.item(), rel=1e-5)
    assert report["loss/divergence"] == pytest.approx((together - robust).item(), rel=1e-4)


def test_a_gaussian_start_is_one(task: Task, fresh: Start) -> None:
    batch = batch_of(task.splits["val"])
    model = fresh.build()
    options: dict[str, Any] = {
        "context": LocalContext(task=task, start=fresh),
        "attack": AttackConfig(num_steps=1, step_size=1e-9),
        "noise": generator(0, "x"),
    }
    moved = craft_batch(model, batch, start_deviation=0.001, **options) - batch.inputs
    inner = (batch.inputs > 0.01) & (batch.inputs < 0.99)
    assert moved[inner].std().item() == pytest.approx(0.001, rel=0.1)


def test_what_is_returned_is_what_was_measured(task: Task, fresh: Start) -> None:
    config = dataclasses.replace(CONFIG, epochs=4, lr_control="schedule")
    context = LocalContext(task=task, start=fresh)
    result = train(config, context)
    rows = result.tables["epochs"]
    best = max(rows, key=lambda row: row["val/robust"])  # the first of equals
    assert result.choices["epoch"] == best["epoch"] < 4
    assert result.choices["leaky"] is False
    model = dataclasses.replace(fresh, state=result.state).build()
    measured = validate(model, context, attack=ATTACK, batch_size=5, seed=0)
    for name in ("val/clean", "val/robust"):
        assert result.metrics[name] == best[name] == measured[name]
    assert not any("lora" in name for name in result.state)


def test_fine_tuning_makes_robust(task: Task, fresh: Start) -> None:
    config = dataclasses.replace(CONFIG, epochs=10, lr=0.03, halving=HalvingConfig())
    context = LocalContext(task=task, start=fresh)
    before = validate(fresh.build(), context, attack=ATTACK, batch_size=16, seed=0)
    result = train(config, context)
    assert before["val/robust"] <= 0.5
    assert result.metrics["val/robust"] >= 0.8
    # The branch takes part: it has learnt from natural images.
    *rows, last = result.tables["epochs"]
    assert last["branch/size"] > 0.02
    assert max(row["branch/accuracy"] for row in rows) >= 0.9


def test_nothing_is_chosen_by_looking_at_test(whole: Any, task: Task, fresh: Start) -> None:
    split = task.splits["test"]
    scrambled = Split(255 - split.images, split.labels[::-1].copy(), split.ids)
    other = dataclasses.replace(task, splits={**task.splits, "test": scrambled})
    result = train(CONFIG, LocalContext(task=other, start=fresh))
    assert result.tables == whole[1].tables


def test_published_habits_are_options_and_leaky_where_they_are(task: Task, fresh: Start) -> None:
    halving = dataclasses.replace(CONFIG.halving, split="train")
    config = dataclasses.replace(CONFIG, epochs=4, keep_split="test", halving=halving)
    test = task.splits["test"]
    other = Split(test.images, (test.labels + 1) % 3, test.ids)  # as different from val as can be
    task = dataclasses.replace(task, splits={**task.splits, "test": other})
    context = LocalContext(task=task, start=fresh)
    result = train(config, context)
    rows = result.tables["epochs"]
    scores = [row["test/robust"] for row in rows]
    assert result.choices["epoch"] == scores.index(max(scores)) + 1
    assert result.choices["leaky"] is True
    controls = [row["control/robust"] for row in rows]
    controller = HalvingController(CONFIG.lr, CONFIG.halving.checkpoints)
    assert [row["halving/condition"] for row in rows] == [
        controller.update(a).condition for a in controls
    ]
    assert [row["halving/best"] for row in rows] == [
        max(range(1, e + 1), key=lambda epoch: (controls[epoch - 1], -epoch)) for e in range(1, 5)
    ]
    model = dataclasses.replace(fresh, state=result.state).build()
    on_test = dataclasses.replace(task, splits={**task.splits, "val": task.splits["test"]})
    again = LocalContext(task=on_test, start=fresh)
    measured = validate(model, again, attack=ATTACK, batch_size=5, seed=0)
    assert measured["val/robust"] == max(scores)
    for column in ("test/robust", "control/robust"):
        assert [row[column] for row in rows] != [row["val/robust"] for row in rows]


def test_a_schedule_instead_of_the_controller(task: Task, fresh: Start) -> None:
    config = dataclasses.replace(
        CONFIG,
        epochs=3,
        lr_control="schedule",
        schedule=ScheduleConfig(name="multistep", milestones=(1.0,)),
        fixed_lambdas=(0.25, 2.0),
        keep="last",
    )
    result = train(config, LocalContext(task=task, start=fresh))
    rows = result.tables["epochs"]
    assert [row["lr"] for row in rows] == pytest.approx([0.02, 0.002, 0.002])
    assert all((row["lambda1"], row["lambda2"]) == (0.25, 2.0) for row in rows)
    assert not any("halving/condition" in row or "branch/accuracy" in row for row in rows)
    assert result.choices["epoch"] == 3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_diverging_loss_is_an_error(task: Task, fresh: Start) -> None:
    config = dataclasses.replace(CONFIG, lr=1e30)
    with pytest.raises(NonFiniteLossError, match=r"training loss became .* in epoch 1: lower lr"):
        train(config, LocalContext(task=task, start=fresh))


def test_passes_are_counted(task: Task, fresh: Start) -> None:
    """PGD-2 and two forwards a step; one clean forward per image for the weights."""
    images = forwards = backwards = 0

    def forward(module: nn.Module, inputs: Any) -> None:
        nonlocal images, forwards
        if type(module).__name__ == "Normalized":
            images += len(inputs[0])
            forwards += 1

    context = LocalContext(task=task, start=fresh)
    original = context.engine.backward

    def backward(loss: Tensor) -> None:
        nonlocal backwards
        backwards += 1
        original(loss)

    context.engine.backward = backward  # type: ignore[method-assign]
    hook = nn.modules.module.register_module_forward_pre_hook(forward)
    try:
        result = train(dataclasses.replace(CONFIG, epochs=2), context)
    finally:
        hook.remove()
    # 50 training images: 4 batches. 21 validation images: 2 batches, clean + PGD-2 + its answer.
    steps, weights, validation = 2 * 4 * (2 + 2), 2 * 4, 2 * 2 * (1 + 2 + 1)
    assert forwards == steps + weights + validation
    assert backwards == 2 * 4
    assert images == result.metrics["passes/forwards"]
    assert images == 2 * 50 * (2 + 2) + 2 * 50 + 2 * 21 * (1 + 2 + 1)
    # PGD-2 and the two graphs of the loss.
    assert result.metrics["passes/backwards"] == 2 * 50 * (2 + 2) + 2 * 21 * 2


# 5. Errors and options.


def test_a_head_that_is_not_found_names_the_candidates() -> None:
    images = {"image_shape": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    model = build_model("resnet4b", num_classes=10, **images)  # type: ignore[arg-type]
    assert find_head(model, None, num_classes=10)[0] == "linear2"
    assert find_head(model, "linear2", num_classes=10)[1].out_features == 10
    with pytest.raises(ConfigError, match=r"linear1 \(Linear\) is none: set head to linear2"):
        find_head(model, "linear1", num_classes=10)
    with pytest.raises(UnknownNameError, match="unknown layer 'linear3': did you mean"):
        find_head(model, "linear3", num_classes=10)
    with pytest.raises(ConfigError, match=r"with 7 outputs, .* choose another model"):
        find_head(model, None, num_classes=7)
    features = nn.Sequential(nn.Linear(4, 10), nn.Linear(10, 10), nn.Linear(10, 2))
    with pytest.raises(ConfigError, match=r"2 \(Linear\) is none: set head to 0 or 1"):
        find_head(features, None, num_classes=10)
    with pytest.raises(ConfigError, match="no layer at all is none"):
        find_head(nn.Flatten(), None, num_classes=10)


@pytest.mark.parametrize("init", ["keep", "fresh", "zeros"])
def test_heads_are_initialised_as_asked(init: str, task: Task, fresh: Start) -> None:
    context = LocalContext(task=task, start=fresh)
    config = dataclasses.replace(CONFIG, head_init=init)  # type: ignore[arg-type]
    before = torch.get_rng_state()
    first, same = start_model(config, context), start_model(config, context)
    assert torch.equal(torch.get_rng_state(), before)
    other = start_model(dataclasses.replace(config, seed=1), context)
    weights = [model.get_parameter("network.linear.weight") for model in (first, same, other)]
    start = fresh.build().get_parameter("network.linear.weight")
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], start) == (init == "keep")
    assert torch.equal(weights[0], weights[2]) == (init != "fresh")
    assert bool(weights[0].any()) == (init != "zeros")
    conv = first.get_parameter("network.conv1.weight")
    assert torch.equal(conv, fresh.build().get_parameter("network.conv1.weight"))


def test_a_rank_that_is_too_large_names_the_layer(task: Task, fresh: Start) -> None:
    config = dataclasses.replace(CONFIG, rank=17)
    with pytest.raises(ConfigError, match=r"layer layer1.0.conv1: rank = 17: .* from 1 to 16"):
        train(config, LocalContext(task=task, start=fresh))


def test_a_checkpoint_of_another_kind_is_refused(whole: Any, task: Task, fresh: Start) -> None:
    context, result = whole
    other = LocalContext(task=task, start=fresh, checkpoint=context.checkpoint)
    with pytest.raises(CheckpointError, match=r"lora_A_nat, .* and \d+ others do not fit"):
        train(dataclasses.replace(CONFIG, rank=2), other)
    plain = {**context.checkpoint, "engine": {"model": dict(result.state)}}
    with pytest.raises(CheckpointError, match="resume with the method, model and rank that wrote"):
        train(CONFIG, LocalContext(task=task, start=fresh, checkpoint=plain))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.0}, "lr = 0.0: must be a number > 0"),
        ({"epochs": 0}, "epochs = 0"),
        ({"rank": 0}, "rank = 0: must be a whole number >= 1"),
        ({"alpha": 0}, "alpha = 0"),
        ({"lambda_max": -1}, "lambda_max = -1"),
        ({"keep": "bset"}, "did you mean 'best'"),
        ({"keep_split": "train"}, "unknown value of keep_split"),
        ({"blocks": "first"}, "unknown value of blocks"),
        ({"start_deviation": 0.0}, "start_deviation"),
        ({"fixed_lambdas": (2.0, 1.0)}, r"fixed_lambdas = \(2.0, 1.0\)"),
        ({"fixed_lambdas": (1.0, float("nan"))}, "fixed_lambdas"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_options_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoLoraConfig(**fields)


def documented(cls: type) -> set[str]:
    """Return the fields that a string follows in the source of ``cls``."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        statement.target.id
        for statement, following in itertools.pairwise(definition.body)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
        and isinstance(following.value.value, str)
    }


@pytest.mark.parametrize("cls", [AutoLoraConfig, HalvingConfig])
def test_every_field_is_documented_and_survives_yaml(cls: type) -> None:
    assert documented(cls) == {field.name for field in dataclasses.fields(cls)}
    assert from_dict(cls, to_dict(cls())) == cls()


def test_a_run_survives_another_optimiser(task: Task, fresh: Start) -> None:
    config = dataclasses.replace(
        CONFIG, epochs=1, optimizer=OptimizerConfig(name="adamw"), disentangle=False
    )
    assert train(config, LocalContext(task=task, start=fresh)).choices["epoch"] == 1
