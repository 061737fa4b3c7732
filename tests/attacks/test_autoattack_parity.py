"""APGD against the official implementation, as the package pyautoattack ships it."""

import logging

import pytest
import torch
from attack_toys import convolutional
from torch import Tensor

from robustft.attacks import apgd, project

official = pytest.importorskip(
    "pyautoattack.autopgd_base", reason="needs the extra robustft[autoattack]"
)

RADII = {"Linf": 4 / 255, "L2": 0.3}


def case(norm: str) -> tuple[torch.nn.Module, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    model = convolutional(norm=False)
    inputs = (torch.rand(48, 2, 8, 8, generator=generator) * 1.4 - 0.2).clamp(0, 1)
    labels = model(inputs).argmax(1)
    labels[:4] = (labels[:4] + 1) % 10
    noise = torch.randn(inputs.shape, generator=generator)
    return model, inputs, labels, inputs + project(noise, inputs, norm=norm, eps=RADII[norm])


def official_attack(model: torch.nn.Module, norm: str, loss: str, num_steps: int) -> object:
    attack = official.APGDAttack(
        model, n_iter=num_steps, norm=norm, eps=RADII[norm], loss=loss, device="cpu", seed=0
    )
    attack.logger = logging.getLogger("official")  # zero gradients would be a Python warning
    return attack


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("num_steps", [1, 5, 20, 50])
@pytest.mark.parametrize("from_clean", [False, True])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_same_start_same_result(norm: str, loss: str, num_steps: int, from_clean: bool) -> None:
    model, inputs, labels, start = case(norm)
    if from_clean:
        start = inputs
    attack = official_attack(model, norm, loss, num_steps)
    attack.init_hyperparam(inputs)
    best, robust, best_loss, adversarial = attack.attack_single_run(inputs, labels, x_init=start)
    options = {"norm": norm, "eps": RADII[norm], "num_steps": num_steps, "loss": loss}
    result = apgd(model, inputs, labels, start=start, keep="best_loss", **options)
    assert 0 < robust.sum() < len(robust)
    assert torch.equal(result.robust, robust)
    if norm == "Linf":
        assert torch.equal(result.loss, best_loss)
        assert torch.equal(result.inputs, best.detach())
        broken = apgd(model, inputs, labels, start=start, **options).inputs[~robust]
        assert torch.equal(broken, adversarial.detach()[~robust])
    else:
        # A tie of "loss > best" at rounding level may move a reset by one iterate.
        torch.testing.assert_close(result.loss, best_loss, atol=1e-4, rtol=0)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_same_driver(norm: str) -> None:
    """The official driver classifies the clean inputs first and returns unbroken ones as given."""
    model, inputs, labels, _ = case(norm)
    attack = official_attack(model, norm, "ce", 20)
    correct = model(inputs).argmax(1) == labels
    with torch.random.fork_rng(devices=[]):
        expected = attack.perturb(inputs, labels).detach()
        # It draws from the global generator, for the samples that it attacks.
        torch.manual_seed(0)
        draw = torch.rand if norm == "Linf" else torch.randn
        noise = draw(inputs[correct].shape)
    noise = attack.normalize(2 * noise - 1 if norm == "Linf" else noise)
    start = inputs.clone()
    start[correct] = (inputs[correct] + RADII[norm] * noise).clamp(0, 1)
    options = {"norm": norm, "eps": RADII[norm], "num_steps": 20, "start": start}
    result = apgd(model, inputs, labels, check_clean=True, **options)
    with torch.no_grad():
        assert torch.equal(model(expected).argmax(1) == labels, result.robust)
    ours = result.inputs.where(~result.robust.view(-1, 1, 1, 1), inputs)
    torch.testing.assert_close(ours, expected, atol=0 if norm == "Linf" else 1e-4, rtol=0)
