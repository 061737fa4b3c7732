"""Every image method says what ROSE's masks did, where the figure of masks looks for it."""

import dataclasses
from typing import Any

import pytest

from robustft.data.base import Task
from robustft.evaluation.method_figures import Choice, drawable
from robustft.methods import METHODS
from robustft.methods.common import AttackConfig
from robustft.models import Start
from robustft.training.context import LocalContext
from robustft.training.optimizers import OptimizerConfig

ATTACK = AttackConfig(num_steps=1)
ATTACKED: dict[str, Any] = {"attack": ATTACK, "val_attack": ATTACK}
FIELDS: dict[str, dict[str, Any]] = {
    "at": ATTACKED,
    "trades": ATTACKED,
    "rft": ATTACKED,
    "twins": ATTACKED,
    "autolora": ATTACKED,
    "instances": ATTACKED,
    "fine-tune": {"val_attack": ATTACK},
    "multinorm": {"num_steps": 1, "val_steps": 1, "norms": ("Linf",)},
    "rift": {"modules": "all", "curve_attack": ATTACK, "curve_runs": 1, "alphas": (0.0, 1.0)},
}


def test_every_method_of_images_with_a_choice_of_optimizer_is_here() -> None:
    chooses = {
        name
        for name, method in METHODS.items()
        if "optimizer" in [field.name for field in dataclasses.fields(method.config)]
    }
    assert chooses - set(FIELDS) == {"text-instances"}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("optimizer", ["rose", "adamw"])
def test_masks_are_in_the_epochs_of_roses_optimizer_alone(
    name: str, optimizer: Any, task: Task, fresh: Start
) -> None:
    method = METHODS[name]
    config = method.config(
        **FIELDS[name],
        epochs=1,
        batch_size=25,
        lr=0.001,
        optimizer=OptimizerConfig(name=optimizer, upper=60.0),
    )
    tables = method.train(config, LocalContext(task=task, start=fresh)).tables
    assert ("masks" in drawable(tables, Choice())) == (optimizer == "rose")
    if optimizer == "rose":
        row = tables["epochs"][-1]
        assert 0.6 < row["mask/kept"] < 1, "the first of the two steps keeps everything"
        assert row["mask/churn"] > 0
