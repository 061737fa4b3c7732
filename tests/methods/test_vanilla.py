"""Vanilla robust fine-tuning: its modes and variants, and what they have in common with others."""

import ast
import dataclasses
import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from robustft.config import from_dict, to_dict
from robustft.data.base import Task
from robustft.errors import ConfigError
from robustft.methods.adversarial import ATConfig, TradesConfig, train_at, train_trades
from robustft.methods.common import AttackConfig, validate
from robustft.methods.fine_tuning import BothForwards
from robustft.methods.halving import HalvingConfig
from robustft.methods.vanilla import RftConfig, train
from robustft.models import Start, batch_norms
from robustft.training.augment import AugmentConfig
from robustft.training.context import LocalContext, PlainEngine
from robustft.training.optimizers import OptimizerConfig
from robustft.training.schedules import ScheduleConfig

ATTACK = AttackConfig(num_steps=2)
SHARED: dict[str, Any] = {
    "epochs": 3,
    "lr": 0.02,
    "batch_size": 16,
    "attack": ATTACK,
    "val_attack": ATTACK,
    "augment": AugmentConfig(crop_padding=2),
    "optimizer": OptimizerConfig(weight_decay=1e-3),
    "schedule": ScheduleConfig(name="cosine"),
}
CONFIGS = {
    "slf": RftConfig(**SHARED, mode="slf"),
    "alf": RftConfig(**SHARED, mode="alf"),
    "at": RftConfig(**SHARED, variant="at"),
    "trades-kl": RftConfig(**SHARED, variant="trades-kl"),
    "trades-ce": RftConfig(**SHARED, variant="trades-ce"),
    "dual": RftConfig(**SHARED, variant="trades-kl", dual_bn=True),
    "halving": RftConfig(**SHARED, lr_control="halving", halving=HalvingConfig(checkpoints=(1,))),
}


class CountingEngine(PlainEngine):
    """Counts updates and keeps the gradients of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.updates = 0
        self.first: dict[str, torch.Tensor] = {}

    def step(self) -> None:
        if not self.updates:
            named = self.module.named_parameters()
            self.first = {name: p.grad.clone() for name, p in named if p.grad is not None}
        self.updates += 1
        super().step()


@pytest.mark.parametrize(
    ("name", "published", "config_class"),
    [("at", train_at, ATConfig), ("trades-kl", train_trades, TradesConfig)],
)
def test_the_variants_are_at_and_trades_themselves(
    name: str, published: Any, config_class: Any, task: Task, fresh: Start
) -> None:
    expected = published(config_class(**SHARED), LocalContext(task=task, start=fresh))
    result = train(CONFIGS[name], LocalContext(task=task, start=fresh))
    assert expected.metrics.items() <= result.metrics.items()
    assert all(torch.equal(result.state[key], value) for key, value in expected.state.items())


def test_the_two_trades_differ_in_their_attack_alone(task: Task, fresh: Start) -> None:
    states = [
        train(
            dataclasses.replace(CONFIGS[name], epochs=1, beta=beta),
            LocalContext(task=task, start=fresh),
        ).tables["epochs"][0]["train/loss"]
        for name, beta in itertools.product(("trades-kl", "trades-ce"), (0.0, 6.0))
    ]
    assert states[1] != states[3]
    assert states[0] == pytest.approx(states[2], abs=0.05)  # BatchNorm sees the images all the same


@pytest.mark.parametrize("mode", ["slf", "alf"])
def test_linear_modes_train_the_head_and_nothing_else(mode: str, task: Task, fresh: Start) -> None:
    result = train(CONFIGS[mode], LocalContext(task=task, start=fresh))
    start = fresh.build().state_dict()
    changed = {name for name, value in result.state.items() if not torch.equal(value, start[name])}
    assert changed == {"network.linear.weight", "network.linear.bias"}
    accuracy = "train/clean" if mode == "slf" else "train/robust"
    assert all(accuracy in row for row in result.tables["epochs"])


def test_linear_fine_tuning_on_natural_images_is_logistic_regression(
    task: Task, fresh: Start
) -> None:
    """The first gradient of the head against the closed form (p - onehot) x^T."""
    config = dataclasses.replace(
        CONFIGS["slf"],
        epochs=1,
        batch_size=50,
        augment=AugmentConfig(crop_padding=0, flip=0),
    )
    engine = CountingEngine()
    train(config, LocalContext(task=task, start=fresh, engine=engine))
    assert engine.first.keys() == {"network.linear.weight", "network.linear.bias"}
    model = fresh.build()
    features: list[torch.Tensor] = []
    model.get_submodule("network.linear").register_forward_pre_hook(
        lambda _, inputs: features.append(inputs[0].double())
    )
    images = torch.from_numpy(task.splits["train"].images).float() / 255
    labels = torch.from_numpy(task.splits["train"].labels)
    with torch.no_grad():
        errors = model(images).double().softmax(1) - nn.functional.one_hot(labels, 3)
    expected = errors.T @ features[0] / 50
    torch.testing.assert_close(
        engine.first["network.linear.weight"].double(), expected, rtol=1e-3, atol=1e-5
    )


def test_adversarial_linear_fine_tuning_sees_other_images(task: Task, fresh: Start) -> None:
    losses = [
        train(CONFIGS[mode], LocalContext(task=task, start=fresh)).tables["epochs"][0]["train/loss"]
        for mode in ("slf", "alf")
    ]
    assert losses[1] > losses[0]


def test_dual_batch_norm_keeps_natural_statistics_apart(task: Task, fresh: Start) -> None:
    model = fresh.build()
    both = BothForwards(model, dual_bn=True).train()
    bright, dark = torch.full((8, 1, 12, 12), 0.9), torch.full((8, 1, 12, 12), 0.1)
    bright, dark = bright + 0.05 * torch.randn_like(bright), dark + 0.05 * torch.randn_like(dark)
    natural_logits, logits = both(bright, dark)
    single = fresh.build().train()
    torch.testing.assert_close(logits, single(dark))
    for (name, norm), other in zip(
        batch_norms(model).items(), batch_norms(single).values(), strict=True
    ):
        assert torch.equal(norm.get_buffer("running_mean"), other.get_buffer("running_mean")), name
        assert int(norm.get_buffer("num_batches_tracked")) == 1
    other = fresh.build().train()
    torch.testing.assert_close(natural_logits, other(bright))
    for norm, wanted in zip(both.natural_norms, batch_norms(other).values(), strict=True):
        assert torch.equal(norm.running_mean, wanted.running_mean)
    natural_logits.sum().backward()
    assert all(norm.weight.grad is not None for norm in both.natural_norms)
    assert all(norm.weight.grad is None for norm in batch_norms(model).values())


def test_a_single_batch_norm_sees_both(fresh: Start) -> None:
    both = BothForwards(fresh.build()).train()
    both(torch.rand(4, 1, 12, 12), torch.rand(4, 1, 12, 12))
    assert int(both.model.get_buffer("network.bn1.num_batches_tracked")) == 2


@pytest.mark.parametrize("name", CONFIGS)
def test_results_are_plain_and_resume_exactly(name: str, task: Task, fresh: Start) -> None:
    config = CONFIGS[name]
    whole = train(config, LocalContext(task=task, start=fresh))
    model = dataclasses.replace(fresh, state=whole.state).build()
    context = LocalContext(task=task, start=fresh)
    measured = validate(model, context, attack=ATTACK, batch_size=7, seed=0)
    assert measured.items() <= whole.metrics.items()
    interrupted = StoppingContext(task=task, start=fresh, stop_after=2)
    with pytest.raises(Stopped):
        train(config, interrupted)
    torch.manual_seed(7)
    resumed = train(config, LocalContext(task=task, start=fresh, checkpoint=interrupted.checkpoint))
    assert resumed.tables == whole.tables
    assert resumed.choices == whole.choices
    assert all(torch.equal(resumed.state[key], value) for key, value in whole.state.items())


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


@pytest.mark.parametrize(
    ("name", "forwards", "backwards"),
    [
        ("slf", 1, 1),
        ("alf", 2 + 1, 2 + 1),
        ("at", 2 + 1, 2 + 1),
        ("trades-kl", 1 + 2 + 2, 2 + 2),
        ("trades-ce", 2 + 2, 2 + 2),
    ],
)
def test_passes_are_counted(
    name: str, forwards: int, backwards: int, task: Task, fresh: Start
) -> None:
    images = 0

    def forward(module: nn.Module, inputs: Any) -> None:
        nonlocal images
        if type(module).__name__ == "Normalized":
            images += len(inputs[0])

    hook = nn.modules.module.register_module_forward_pre_hook(forward)
    engine = CountingEngine()
    try:
        config = dataclasses.replace(CONFIGS[name], epochs=1)
        result = train(config, LocalContext(task=task, start=fresh, engine=engine))
    finally:
        hook.remove()
    # Validation: clean, PGD-2, and its answer.
    assert images == 50 * forwards + 21 * (1 + 2 + 1)
    assert images == result.metrics["passes/forwards"]
    assert result.metrics["passes/backwards"] == 50 * backwards + 21 * 2
    assert engine.updates == 4


def test_a_head_can_be_reset_and_named(task: Task, fresh: Start) -> None:
    config = dataclasses.replace(CONFIGS["slf"], head_init="zeros", lr=1e-12)
    result = train(config, LocalContext(task=task, start=fresh))
    assert result.state["network.linear.weight"].abs().max() < 1e-9
    with pytest.raises(ConfigError, match=r"layer3.0.conv2 \(Conv2d\) is none: set head to linear"):
        train(
            dataclasses.replace(config, head="layer3.0.conv2"),
            LocalContext(task=task, start=fresh),
        )


def test_fine_tuning_makes_robust(task: Task, fresh: Start) -> None:
    config = dataclasses.replace(CONFIGS["trades-ce"], epochs=10, lr=0.05)
    result = train(config, LocalContext(task=task, start=fresh))
    assert result.metrics["val/robust"] >= 0.8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "trade"}, "unknown value of variant 'trade'"),
        ({"mode": "full"}, "unknown value of mode"),
        ({"beta": -1}, "beta = -1"),
        ({"dual_bn": True, "variant": "at"}, "dual_bn = True: .* 'trades' variant"),
        ({"dual_bn": True, "mode": "slf"}, "only in mode 'aff'"),
        ({"start_deviation": 0}, "start_deviation = 0"),
        ({"lr_control": "auto"}, "unknown value of lr_control"),
    ],
)
def test_options_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RftConfig(**fields)


def test_dual_batch_norm_needs_batch_norm(task: Task, fresh: Start) -> None:
    start = dataclasses.replace(fresh, architecture="resnet4b")
    with pytest.raises(ConfigError, match="the network has no BatchNorm"):
        train(CONFIGS["dual"], LocalContext(task=task, start=start))


def test_every_field_is_documented_and_survives_yaml() -> None:
    (definition,) = ast.parse(inspect.getsource(RftConfig)).body
    assert isinstance(definition, ast.ClassDef)
    documented = {
        statement.target.id
        for statement, following in itertools.pairwise(definition.body)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(following, ast.Expr)
    }
    assert documented == {field.name for field in dataclasses.fields(RftConfig)}
    assert from_dict(RftConfig, to_dict(RftConfig())) == RftConfig()
