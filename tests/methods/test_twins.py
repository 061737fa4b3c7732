"""TWINS: two batch normalisations, of which one stays as it was and the other is returned."""

import ast
import dataclasses
import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustft.config import from_dict, to_dict
from robustft.data.base import Task
from robustft.errors import ConfigError
from robustft.methods.common import AttackConfig, validate
from robustft.methods.fine_tuning import craft_batch
from robustft.methods.twins import (
    TwinBatchNorm,
    TwinsConfig,
    add_twins,
    export_adaptive,
    train,
)
from robustft.models import Start, build_model
from robustft.training.augment import augment
from robustft.training.context import LocalContext
from robustft.training.loaders import Loader
from robustft.training.seeding import generator

ATTACK = AttackConfig(num_steps=2)
SMALL: dict[str, Any] = {
    "epochs": 3,
    "lr": 0.02,
    "batch_size": 16,
    "attack": ATTACK,
    "val_attack": ATTACK,
}
CONFIGS = {name: TwinsConfig(**SMALL, objective=name) for name in ("trades", "at")}  # type: ignore[arg-type]


@pytest.fixture
def pretrained(task: Task, fresh: Start) -> Start:
    """A start whose BatchNorm statistics and weights are those of some data."""
    model = fresh.build().train()
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        model(torch.rand(16, *task.image_shape, generator=draw))
    for name, parameter in model.named_parameters():
        if "bn" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return dataclasses.replace(fresh, state=model.state_dict())


def twins(model: nn.Module) -> dict[str, TwinBatchNorm]:
    return {name: m for name, m in model.named_modules() if isinstance(m, TwinBatchNorm)}


# The layer.


@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_a_batch_is_divided_between_the_two(size: int) -> None:
    norm = nn.BatchNorm2d(3)
    norm(torch.randn(32, 3, 4, 4) * 2 + 1)
    nn.init.normal_(norm.weight)
    statistics = norm.running_mean.clone(), norm.running_var.clone()  # type: ignore[union-attr]
    layer = TwinBatchNorm(norm).train()
    inputs = torch.randn(size, 3, 4, 4)
    outputs = layer(inputs)
    half = size // 2

    def normalised(points: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        shape = (1, 3, 1, 1)
        scaled = (points - mean.view(shape)) / (variance.view(shape) + norm.eps).sqrt()
        return scaled * norm.weight.view(shape) + norm.bias.view(shape)

    torch.testing.assert_close(outputs[:half], normalised(inputs[:half], *statistics))
    rest = inputs[half:]
    own = rest.mean((0, 2, 3)), rest.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(outputs[half:], normalised(rest, *own))
    assert torch.equal(layer.frozen.running_mean, statistics[0])  # type: ignore[arg-type]
    assert torch.equal(layer.frozen.running_var, statistics[1])  # type: ignore[arg-type]
    assert not torch.equal(layer.adaptive.running_mean, statistics[0])  # type: ignore[arg-type]
    layer.eval()
    torch.testing.assert_close(layer(inputs), norm.eval()(inputs))


def test_each_half_trains_the_weights_of_its_own_norm() -> None:
    layer = TwinBatchNorm(nn.BatchNorm2d(3)).train()
    inputs = torch.randn(8, 3, 4, 4)
    layer(inputs)[:4].square().sum().backward()
    assert layer.frozen.weight.grad is not None
    assert layer.frozen.weight.grad.all()
    assert not layer.adaptive.weight.grad.any()
    layer.zero_grad()
    layer(inputs)[4:].square().sum().backward()
    assert not layer.frozen.weight.grad.any()
    assert layer.adaptive.weight.grad.any()


@pytest.mark.parametrize("architecture", ["small_resnet", "small_preact_resnet"])
def test_every_batch_norm_gets_a_twin_and_loses_it(architecture: str) -> None:
    model = build_model(
        architecture, num_classes=3, image_shape=(1, 12, 12), mean=(0.3,), std=(0.2,)
    ).eval()
    count = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = torch.rand(2, 1, 12, 12)
    logits = model(inputs)
    assert add_twins(model) is model
    assert len(twins(model)) == count
    assert torch.equal(model.eval()(inputs), logits)
    exported = export_adaptive(model)
    assert exported.keys() == before.keys()
    assert all(torch.equal(exported[name], value) for name, value in before.items())


# Whole runs.


@pytest.mark.parametrize("objective", ["trades", "at"])
def test_frozen_statistics_stay_and_adaptive_ones_follow(
    objective: str, task: Task, pretrained: Start
) -> None:
    context = LocalContext(task=task, start=pretrained)
    result = train(CONFIGS[objective], context)
    assert context.checkpoint is not None
    state = context.checkpoint["engine"]["model"]
    prefix = "model." if objective == "trades" else ""
    start = pretrained.build().state_dict()
    for name in twins(add_twins(pretrained.build())):
        for buffer in ("running_mean", "running_var"):
            assert torch.equal(state[f"{prefix}{name}.frozen.{buffer}"], start[f"{name}.{buffer}"])
            assert not torch.equal(
                state[f"{prefix}{name}.adaptive.{buffer}"], start[f"{name}.{buffer}"]
            )
        for twin in ("frozen", "adaptive"):
            weight = state[f"{prefix}{name}.{twin}.weight"]
            assert not torch.equal(weight, start[f"{name}.weight"])
    assert result.state.keys() == start.keys()


@pytest.mark.parametrize("batch_size", [50, 49])
@pytest.mark.parametrize("objective", ["trades", "at"])
def test_the_loss_is_the_published_one(
    objective: str, batch_size: int, task: Task, pretrained: Start
) -> None:
    """Written out half by half; a batch of 49 leaves one of 1, whose frozen half is empty."""
    config = TwinsConfig(
        **{**SMALL, "epochs": 1, "batch_size": batch_size, "lr": 1e-12},
        objective=objective,  # type: ignore[arg-type]
        frozen_weight=0.4,
    )
    context = LocalContext(task=task, start=pretrained)
    row = train(config, context).tables["epochs"][0]
    loader = Loader(task.splits["train"], batch_size=batch_size, seed=0, device=torch.device("cpu"))
    model = add_twins(pretrained.build())
    total = 0.0
    for step, batch in enumerate(loader.epoch(0)):
        inputs = augment(batch.inputs, batch.ids, config=config.augment, seed=0, epoch=0)
        batch = dataclasses.replace(batch, inputs=inputs)
        noise = generator(0, "step", 0, step)
        adversarial = craft_batch(model, batch, context=context, attack=ATTACK, noise=noise)
        model.train()
        with torch.no_grad():
            natural_logits = model(inputs).double() if objective == "trades" else None
            logits = model(adversarial).double()
        size, half = len(inputs), len(inputs) // 2
        for weight, rows in ((0.4, slice(0, half)), (1.0, slice(half, size))):
            labels = batch.labels[rows]
            if not len(labels):
                continue
            if natural_logits is None:
                total += weight * size * nn.functional.cross_entropy(logits[rows], labels).item()
                continue
            p, q = natural_logits[rows].softmax(1), logits[rows].softmax(1)
            natural = nn.functional.cross_entropy(natural_logits[rows], labels)
            kl = (p * (p.log() - q.log())).sum() / size  # of the whole batch, not of the half
            total += weight * size * (natural + 6 * kl).item()
    assert row["train/loss"] == pytest.approx(total / 50, rel=1e-5)


@pytest.mark.parametrize("objective", ["trades", "at"])
def test_the_attack_sees_the_adaptive_network(
    objective: str, task: Task, pretrained: Start
) -> None:
    """Frozen twins that answer nonsense change the attack of no image."""
    context = LocalContext(task=task, start=pretrained)
    (batch,) = Loader(task.splits["val"], batch_size=21, seed=0, device=torch.device("cpu")).epoch(
        0
    )
    images = []
    for noise in (0.0, 10.0):
        model = add_twins(pretrained.build()).train()
        for twin in twins(model).values():
            twin.frozen.weight.data += noise
        images.append(
            craft_batch(model, batch, context=context, attack=ATTACK, noise=generator(0, "x"))
        )
    plain = pretrained.build()
    images.append(
        craft_batch(plain, batch, context=context, attack=ATTACK, noise=generator(0, "x"))
    )
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


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


@pytest.mark.parametrize("objective", ["trades", "at"])
def test_results_are_plain_and_resume_exactly(
    objective: str, task: Task, pretrained: Start
) -> None:
    config = CONFIGS[objective]
    whole = train(config, LocalContext(task=task, start=pretrained))
    model = dataclasses.replace(pretrained, state=whole.state).build()
    context = LocalContext(task=task, start=pretrained)
    measured = validate(model, context, attack=ATTACK, batch_size=7, seed=0)
    assert measured.items() <= whole.metrics.items()
    interrupted = StoppingContext(task=task, start=pretrained, stop_after=2)
    with pytest.raises(Stopped):
        train(config, interrupted)
    second = LocalContext(task=task, start=pretrained, checkpoint=interrupted.checkpoint)
    resumed = train(config, second)
    assert resumed.tables == whole.tables
    assert all(torch.equal(resumed.state[key], value) for key, value in whole.state.items())


@pytest.mark.parametrize(("objective", "forwards"), [("trades", 2 + 2), ("at", 2 + 1)])
def test_passes_are_counted(objective: str, forwards: int, task: Task, fresh: Start) -> None:
    images = 0

    def forward(module: nn.Module, inputs: Any) -> None:
        nonlocal images
        if type(module).__name__ == "Normalized":
            images += len(inputs[0])

    hook = nn.modules.module.register_module_forward_pre_hook(forward)
    try:
        config = dataclasses.replace(CONFIGS[objective], epochs=1)
        result = train(config, LocalContext(task=task, start=fresh))
    finally:
        hook.remove()
    # Validation: clean, PGD-2, and its answer.
    assert images == 50 * forwards + 21 * (1 + 2 + 1)
    assert images == result.metrics["passes/forwards"]
    assert result.metrics["passes/backwards"] == 50 * forwards + 21 * 2


def test_fine_tuning_makes_robust(task: Task, fresh: Start) -> None:
    config = dataclasses.replace(CONFIGS["trades"], epochs=12, lr=0.05)
    result = train(config, LocalContext(task=task, start=fresh))
    assert result.metrics["val/robust"] >= 0.8


def test_networks_without_batch_norm_are_refused(task: Task, fresh: Start) -> None:
    start = dataclasses.replace(fresh, architecture="resnet4b")
    with pytest.raises(ConfigError, match="twins needs BatchNorm"):
        train(CONFIGS["at"], LocalContext(task=task, start=start))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "kl"}, "unknown value of objective"),
        ({"frozen_weight": -0.1}, "frozen_weight = -0.1"),
        ({"beta": float("inf")}, "beta = inf"),
        ({"lr": 0}, "lr = 0"),
    ],
)
def test_options_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TwinsConfig(**fields)


def test_every_field_is_documented_and_survives_yaml() -> None:
    (definition,) = ast.parse(inspect.getsource(TwinsConfig)).body
    assert isinstance(definition, ast.ClassDef)
    documented = {
        statement.target.id
        for statement, following in itertools.pairwise(definition.body)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(following, ast.Expr)
    }
    assert documented == {field.name for field in dataclasses.fields(TwinsConfig)}
    assert from_dict(TwinsConfig, to_dict(TwinsConfig())) == TwinsConfig()
