"""FGSM and RS-FGSM."""

import pytest
import torch
from attack_toys import Counter
from torch import Tensor, nn
from torch.nn import functional

from robustft.attacks import fgsm, project
from robustft.errors import ConfigError


def gradient(model: nn.Module, points: Tensor, labels: Tensor) -> Tensor:
    points = points.clone().requires_grad_()
    loss = functional.cross_entropy(model(points), labels, reduction="sum")
    return torch.autograd.grad(loss, points)[0]


def test_linf_is_the_signed_step(model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    result = fgsm(model, inputs, labels, norm="Linf", eps="8/255")
    expected = (inputs + 8 / 255 * gradient(model, inputs, labels).sign()).clamp(0, 1)
    torch.testing.assert_close(result.inputs, expected, atol=1e-7, rtol=0)


def test_l2_is_the_normalised_step(model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    result = fgsm(model, inputs, labels, norm="L2", eps=0.5)
    slope = gradient(model, inputs, labels)
    slope = slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(result.inputs, (inputs + 0.5 * slope).clamp(0, 1))


def test_random_start_steps_by_five_quarters_and_stays_in_the_ball(
    model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    seen = []

    class Recording(nn.Module):
        def forward(self, points: Tensor) -> Tensor:
            seen.append(points.detach().clone())
            return model(points)

    result = fgsm(Recording(), inputs, labels, norm="Linf", eps=0.1, random_start=True)
    start = seen[0]
    assert 0.09 < (start - inputs).abs().max() <= 0.1 + 1e-6
    moved = start - inputs + 0.125 * gradient(model, start, labels).sign()
    expected = inputs + project(moved, inputs, norm="Linf", eps=0.1)
    torch.testing.assert_close(result.inputs, expected, atol=1e-6, rtol=0)


def test_without_report_one_pass_each(model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    counter = Counter(model)
    result = fgsm(counter, inputs, labels, norm="Linf", eps=0.03, report=False)
    full = fgsm(model, inputs, labels, norm="Linf", eps=0.03)
    assert (counter.forwards, counter.backwards) == (1, 1)
    assert (result.num_forwards, result.num_backwards) == (1, 1)
    assert torch.equal(result.inputs, full.inputs)
    # Evaluated at the clean input, where exactly the first three labels are wrong.
    assert torch.equal(result.robust, torch.arange(24) >= 3)


def test_negative_step_is_refused(model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    with pytest.raises(ConfigError, match="step_size must be a finite number >= 0"):
        fgsm(model, inputs, labels, norm="Linf", eps=0.1, step_size=-0.1)
