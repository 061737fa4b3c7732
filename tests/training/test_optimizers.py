"""Optimisers and learning-rate schedules."""

import pytest
import torch
from torch import nn

from robustft.config import from_dict
from robustft.errors import ConfigError
from robustft.training.optimizers import OptimizerConfig, build_optimizer, set_lr
from robustft.training.schedules import ScheduleConfig, lr_factor


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3), requires_grad=False)]


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (OptimizerConfig(nesterov=True), torch.optim.SGD),
        (OptimizerConfig(name="adam"), torch.optim.Adam),
        (OptimizerConfig(name="adamw"), torch.optim.AdamW),
        (OptimizerConfig(name="rmsprop"), torch.optim.RMSprop),
    ],
)
def test_only_trainable_parameters_are_given_to_the_optimizer(
    config: OptimizerConfig, kind: type
) -> None:
    everything = parameters()
    optimizer = build_optimizer(config, everything, lr=0.5)
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(everything[0])]
    assert group["lr"] == 0.5
    assert group["weight_decay"] == 5e-4


def test_sgd_takes_the_textbook_step() -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    config = OptimizerConfig(momentum=0.9, weight_decay=0.1)
    optimizer = build_optimizer(config, [weight], lr=0.5)
    for _ in range(2):
        weight.grad = torch.tensor([1.0])
        optimizer.step()
    first = 2.0 - 0.5 * 1.2
    second = first - 0.5 * (0.9 * 1.2 + 1.0 + 0.1 * first)
    assert weight.item() == pytest.approx(second, rel=1e-6)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="no parameter is trainable"):
        build_optimizer(OptimizerConfig(), parameters()[1:], lr=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "sdg"}, "did you mean 'sgd'"),
        ({"momentum": 1.0}, "momentum = 1.0: must be a number >= 0 and < 1"),
        ({"weight_decay": -1.0}, "weight_decay = -1.0: must be a number >= 0"),
        ({"name": "adam", "nesterov": True}, "nesterov = True: needs name = 'sgd'"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_optimizer_options_are_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ScheduleConfig(), {0: 1.0, 9.9: 1.0}),
        (
            ScheduleConfig(name="multistep", milestones=(4.0, 6.0)),
            {0: 1.0, 3.99: 1.0, 4: 0.1, 5.9: 0.1, 6: 0.01, 9.9: 0.01},
        ),
        (ScheduleConfig(name="halfway"), {0: 1.0, 4.99: 1.0, 5: 0.1, 9.9: 0.1}),
        (ScheduleConfig(name="cosine"), {0: 1.0, 5: 0.5, 10: 0.0}),
        (ScheduleConfig(name="cyclic", peak=0.4), {0: 0.0, 2: 0.5, 4: 1.0, 7: 0.5, 10: 0.0}),
    ],
)
def test_schedule_values(config: ScheduleConfig, expected: dict[float, float]) -> None:
    for epoch, factor in expected.items():
        assert lr_factor(config, epoch, 10) == pytest.approx(factor, abs=1e-12)


def test_halfway_of_ten_epochs_is_the_published_schedule() -> None:
    """RiFT: 0.001 in epochs 0 to 4 and 0.0001 in epochs 5 to 9."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = build_optimizer(OptimizerConfig(), [weight], lr=1e-3)
    rates = [
        set_lr(optimizer, ScheduleConfig(name="halfway"), lr=1e-3, epoch=epoch, num_epochs=10)
        for epoch in range(10)
    ]
    assert rates == pytest.approx([1e-3] * 5 + [1e-4] * 5)
    assert optimizer.param_groups[0]["lr"] == rates[-1]


def test_schedule_from_yaml_values() -> None:
    config = from_dict(ScheduleConfig, {"name": "multistep", "milestones": [6, 8]})
    assert config.milestones == (6.0, 8.0)
    with pytest.raises(ConfigError, match="ascending"):
        ScheduleConfig(name="multistep", milestones=(5.0, 5.0))
