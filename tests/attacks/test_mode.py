"""An attack leaves the model as it found it."""

import copy

import pytest
import torch
from torch import Tensor, nn

from robustft.attacks import attack_mode


def mixed() -> nn.Module:
    """Modes and flags that no single train() or requires_grad_() call could restore."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    model.train()
    model[1].eval()
    model[0].requires_grad_(False)
    return model


def snapshot(model: nn.Module) -> tuple[list[bool], list[bool]]:
    modes = [module.training for module in model.modules()]
    return modes, [parameter.requires_grad for parameter in model.parameters()]


def test_inside_everything_is_eval_and_frozen_and_afterwards_as_before() -> None:
    model = mixed()
    before = snapshot(model)
    with attack_mode(model):
        modes, flags = snapshot(model)
        assert not any(modes)
        assert not any(flags)
    assert snapshot(model) == before


def test_an_error_inside_restores_too() -> None:
    model = mixed()
    before = snapshot(model)
    with pytest.raises(KeyError), attack_mode(model):
        raise KeyError("inside")
    assert snapshot(model) == before


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
def test_gradients_work_under_the_callers_switch(outer: type) -> None:
    weight = torch.ones(3)
    with outer():
        with attack_mode(mixed()):
            point = weight.clone().requires_grad_()
            (gradient,) = torch.autograd.grad((2 * point).sum(), point)
        assert not torch.is_grad_enabled()
    assert gradient.tolist() == [2, 2, 2]


def test_overridden_train_is_not_called() -> None:
    class Refusing(nn.Linear):
        def train(self, mode: bool = True) -> nn.Module:
            raise AssertionError("train() was called")

    model = Refusing(2, 2)
    with attack_mode(model):
        assert not model.training
    assert model.training


def test_functions_are_models_too() -> None:
    def model(inputs: Tensor) -> Tensor:
        return inputs.flatten(1)

    with attack_mode(model):
        assert torch.is_grad_enabled()


def test_batch_norm_statistics_stay(inputs: Tensor, model: nn.Module) -> None:
    state = copy.deepcopy(model.state_dict())
    model.train()
    with attack_mode(model), torch.no_grad():
        model(inputs)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
