"""Adversarial training: what a step costs, what it minimises, and that it resumes exactly."""

import ast
import dataclasses
import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustft.config import from_dict, to_dict
from robustft.data.base import Split, Task
from robustft.errors import ConfigError, NonFiniteLossError
from robustft.methods import METHODS
from robustft.methods.adversarial import ATConfig, TradesConfig, craft_trades, train_at
from robustft.methods.common import AttackConfig, craft, validate
from robustft.models import Start
from robustft.training.augment import augment
from robustft.training.context import LocalContext, State
from robustft.training.loaders import Batch, Loader
from robustft.training.loop import run_epoch
from robustft.training.seeding import generator

ATTACK = AttackConfig(num_steps=2)
SMALL: dict[str, Any] = {"epochs": 3, "batch_size": 16, "attack": ATTACK, "val_attack": ATTACK}
CONFIGS = {"at": ATConfig(**SMALL), "trades": TradesConfig(**SMALL)}


def batch_of(split: Split) -> Batch:
    inputs = torch.from_numpy(split.images).float() / 255
    labels, ids = torch.from_numpy(split.labels), torch.from_numpy(split.ids)
    return Batch(inputs=inputs, labels=labels, ids=ids, scale=1.0, count=len(ids))


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


@pytest.mark.parametrize("name", ["at", "trades"])
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_resumed_equals_undisturbed_bit_for_bit(
    name: str, stop_after: int, task: Task, fresh: Start
) -> None:
    config, train = CONFIGS[name], METHODS[name].train
    whole = train(config, LocalContext(task=task, start=fresh))
    first = StoppingContext(task=task, start=fresh, stop_after=stop_after)
    with pytest.raises(Stopped):
        train(config, first)
    torch.manual_seed(999)  # Whatever happened to the global generator in between.
    second = LocalContext(task=task, start=fresh, checkpoint=first.checkpoint)
    resumed = train(config, second)
    assert len(second.reports) == config.epochs - stop_after
    assert resumed.metrics == whole.metrics
    assert resumed.tables == whole.tables
    assert resumed.choices == whole.choices
    assert all(torch.equal(resumed.state[name], whole.state[name]) for name in whole.state)


def test_checkpoint_survives_a_safe_load(task: Task, fresh: Start, tmp_path: Any) -> None:
    context = LocalContext(task=task, start=fresh)
    train_at(CONFIGS["at"], context)
    torch.save(context.checkpoint, tmp_path / "checkpoint.pt")
    loaded: State = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert loaded["epochs"] == context.checkpoint["epochs"]  # type: ignore[index]


def test_training_against_the_attack_makes_robust(task: Task, fresh: Start) -> None:
    config = dataclasses.replace(ATConfig(**SMALL), epochs=12, lr=0.05)
    context = LocalContext(task=task, start=fresh)
    result = train_at(config, context)
    before = validate(fresh.build(), context, attack=ATTACK, batch_size=16, seed=0)
    assert before["val/robust"] <= 0.5
    assert result.metrics["val/robust"] >= 0.8
    # What is returned is what was measured, and loads into the start's architecture.
    model = dataclasses.replace(fresh, state=result.state).build()
    again = validate(model, context, attack=ATTACK, batch_size=5, seed=0)
    assert again == result.metrics


def test_keep_chooses_the_epoch(task: Task, fresh: Start) -> None:
    results = {
        keep: train_at(
            dataclasses.replace(ATConfig(**SMALL), keep=keep, epochs=4),  # type: ignore[arg-type]
            LocalContext(task=task, start=fresh),
        )
        for keep in ("best", "last")
    }
    rows = results["best"].tables["epochs"]
    scores = [row["val/robust"] for row in rows]
    assert results["best"].choices["epoch"] == scores.index(max(scores)) + 1
    assert results["last"].choices["epoch"] == 4
    assert results["last"].metrics["val/robust"] == scores[-1]


def test_nothing_is_chosen_by_looking_at_test(task: Task, fresh: Start) -> None:
    split = task.splits["test"]
    scrambled = Split(255 - split.images, split.labels[::-1].copy(), split.ids)
    other = dataclasses.replace(task, splits={**task.splits, "test": scrambled})
    first, second = (
        train_at(CONFIGS["at"], LocalContext(task=each, start=fresh)) for each in (task, other)
    )
    assert first.tables == second.tables


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_diverging_loss_is_an_error(task: Task, fresh: Start) -> None:
    config = dataclasses.replace(ATConfig(**SMALL), lr=1e30)
    with pytest.raises(NonFiniteLossError, match=r"training loss became .* in epoch 1: lower lr"):
        train_at(config, LocalContext(task=task, start=fresh))


def test_a_step_costs_its_attack_and_one_update(task: Task, fresh: Start) -> None:
    """PGD-2 and the update: 3 forwards for each of the 4 batches, whole epochs of them."""
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: count() if type(module).__name__ == "Normalized" else None
    )
    try:
        train_at(
            dataclasses.replace(ATConfig(**SMALL), epochs=1), LocalContext(task=task, start=fresh)
        )
    finally:
        hook.remove()
    # 50 training images: 4 batches. 21 validation images: 2 batches, clean + PGD-2 + its answer.
    assert forwards == 4 * (2 + 1) + 2 * (1 + 2 + 1)


def test_crafting_leaves_no_trace_and_stays_feasible(task: Task, fresh: Start) -> None:
    model = fresh.build().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = batch_of(task.splits["val"])
    adversarial = craft(
        model,
        batch.inputs,
        batch.labels,
        ids=batch.ids,
        threat=task.threat,
        attack=ATTACK,
        start_noise=generator(0, "x"),
    )
    assert (adversarial - batch.inputs).abs().max() <= task.threat.eps + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_craft_mode_train_lets_batch_norm_see_the_attack(task: Task, fresh: Start) -> None:
    results = [
        train_at(
            dataclasses.replace(ATConfig(**SMALL), craft_mode=mode, epochs=1),  # type: ignore[arg-type]
            LocalContext(task=task, start=fresh),
        )
        for mode in ("eval", "train")
    ]
    tracked = [int(result.state["network.bn1.num_batches_tracked"]) for result in results]
    assert tracked == [4, 4 * 3]


def test_trades_attack_climbs_the_divergence(task: Task, fresh: Start) -> None:
    model = fresh.build()
    context = LocalContext(task=task, start=fresh)
    context.engine.prepare(model, None)
    config = TradesConfig(attack=AttackConfig(num_steps=5))
    batch = batch_of(task.splits["val"])
    adversarial = craft_trades(config, context, batch, generator(0, "x"))
    assert (adversarial - batch.inputs).abs().max() <= task.threat.eps + 1e-6

    def divergence(inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            clean, moved = model(batch.inputs).softmax(1), model(inputs).softmax(1)
        return (clean * (clean / moved).log()).sum(1)

    corners = batch.inputs + task.threat.eps * torch.sign(torch.randn_like(batch.inputs))
    assert (divergence(adversarial) > divergence(corners.clamp(0, 1))).all()


@pytest.mark.parametrize("beta", [0.0, 50.0])
def test_trades_loss_is_the_published_one(beta: float, task: Task, fresh: Start) -> None:
    config = dataclasses.replace(TradesConfig(**SMALL), beta=beta, epochs=1, batch_size=50)
    context = LocalContext(task=task, start=fresh)
    METHODS["trades"].train(config, context)
    model = fresh.build()
    other = LocalContext(task=task, start=fresh)
    other.engine.prepare(model, None)
    loader = Loader(task.splits["train"], batch_size=50, seed=0, device=torch.device("cpu"))
    (batch,) = loader.epoch(0)
    inputs = augment(batch.inputs, batch.ids, config=config.augment, seed=0, epoch=0)
    batch = dataclasses.replace(batch, inputs=inputs)
    adversarial = craft_trades(config, other, batch, generator(0, "step", 0, 0))
    model.train()
    with torch.no_grad():
        clean, attacked = model(inputs).double(), model(adversarial).double().softmax(1)
    divergence = (clean.softmax(1) * (clean.softmax(1) / attacked).log()).sum(1).mean()
    expected = functional.cross_entropy(clean, batch.labels) + beta * divergence
    assert context.reports[0]["train/loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_eval_every_spares_evaluations_but_not_the_last(task: Task, fresh: Start) -> None:
    context = LocalContext(task=task, start=fresh)
    result = train_at(ATConfig(**SMALL, eval_every=2), context)
    assert ["val/robust" in row for row in result.tables["epochs"]] == [False, True, True]


def test_layers_that_draw_repeat_their_draws_after_a_resume(task: Task, fresh: Start) -> None:
    config = ATConfig(**SMALL)
    context = LocalContext(task=task, start=fresh)
    model = context.engine.prepare(fresh.build(), None)
    loader = Loader(task.splits["train"], batch_size=16, seed=0, device=torch.device("cpu"))

    def drawing(network: nn.Module, batch: Batch, _: torch.Generator) -> tuple[Any, Any]:
        return torch.rand(()), network(batch.inputs)

    first, _, again = (
        run_epoch(config, context, model, loader, drawing, epoch=epoch, update=False)["loss"]
        for epoch in (0, 1, 0)
    )
    assert first == again


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


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_field_is_documented_and_configs_survive_yaml(name: str) -> None:
    config_class = METHODS[name].config
    names = {field.name for field in dataclasses.fields(config_class)}
    assert documented(config_class) == names
    assert from_dict(config_class, to_dict(config_class())) == config_class()
    assert METHODS[name].name == name
    assert set(METHODS[name].prepare_fields) <= names


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.0}, "lr = 0.0: must be a number > 0"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"epochs": 0}, "epochs = 0: must be a whole number >= 1"),
        ({"keep": "bset"}, "did you mean 'best'"),
        ({"batch_size": 1.5}, "batch_size = 1.5"),
        ({"seed": -1}, "seed = -1: must be a whole number >= 0"),
    ],
)
@pytest.mark.parametrize("config_class", [ATConfig, TradesConfig])
def test_options_are_checked(config_class: type, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_class(**fields)


def test_trades_needs_its_start_noise() -> None:
    with pytest.raises(ConfigError, match="needs its Gaussian start"):
        TradesConfig(attack=AttackConfig(random_start=False))
    with pytest.raises(ConfigError, match="step_size = 0"):
        AttackConfig(step_size=0.0)
