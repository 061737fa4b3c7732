"""PGD: against a plain loop, closed forms, restarts."""

import pytest
import torch
from attack_toys import Counter, Linear, convolutional
from torch import Tensor, nn
from torch.nn import functional

from robustft.attacks import pgd
from robustft.errors import ConfigError


def plain_pgd(
    model: nn.Module, inputs: Tensor, labels: Tensor, start: Tensor, eps: float, step: float, n: int
) -> Tensor:
    """The textbook loop for Linf, with the mean loss as in the common libraries."""
    points = start.clone()
    for _ in range(n):
        points.requires_grad_()
        loss = functional.cross_entropy(model(points), labels)
        (slope,) = torch.autograd.grad(loss, points)
        points = points.detach() + step * slope.sign()
        points = (inputs + (points - inputs).clamp(-eps, eps)).clamp(0, 1)
    return points


def test_equals_the_textbook_loop_bit_for_bit(inputs: Tensor, labels: Tensor) -> None:
    model, inputs = convolutional().double(), inputs.double()
    noise = torch.rand(
        inputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    start = (inputs + (2 * noise - 1) * 8 / 255).clamp(0, 1)
    expected = plain_pgd(model, inputs, labels, start, 8 / 255, 2 / 225, 10)
    result = pgd(
        model,
        inputs,
        labels,
        norm="Linf",
        eps="8/255",
        step_size="2/225",
        start=start,
        num_steps=10,
    )
    assert torch.equal(result.inputs, expected)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("random_start", [True, False])
def test_reaches_the_optimum_of_a_linear_model(norm: str, random_start: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    model = Linear(torch.randn(2, 12, generator=generator), torch.randn(2, generator=generator))
    inputs = 0.4 + 0.2 * torch.rand(8, 3, 2, 2, generator=generator)
    labels = torch.arange(8) % 2
    result = pgd(
        model,
        inputs,
        labels,
        norm=norm,
        eps=0.1,
        step_size=0.1,
        num_steps=40,
        random_start=random_start,
    )
    slope = (model.weight[1 - labels] - model.weight[labels]).detach().view_as(inputs)
    if norm == "Linf":
        best = inputs + 0.1 * slope.sign()
    else:
        best = inputs + 0.1 * slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    optimum = functional.cross_entropy(model(best), labels, reduction="none")
    torch.testing.assert_close(result.loss, optimum.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_random_start_fills_the_ball(norm: str) -> None:
    """A step of zero leaves the start in place; the input is the middle of the box."""
    inputs = torch.full((2000, 2, 2, 2), 0.5)
    labels = torch.zeros(2000, dtype=torch.int64)
    linear = Linear(torch.zeros(2, 8), torch.zeros(2))
    result = pgd(linear, inputs, labels, norm=norm, eps=0.3, step_size=0.0, num_steps=1)
    delta = (result.inputs - inputs).flatten(1)
    if norm == "Linf":
        fill = delta.abs().flatten() / 0.3
    else:
        fill = (delta.norm(dim=1) / 0.3) ** 8  # the radius of a uniform point is U^(1/d)
    quarters = torch.histc(fill, bins=4, min=0, max=1) / fill.numel()
    assert fill.max() <= 1 + 1e-5
    torch.testing.assert_close(quarters, torch.full((4,), 0.25), atol=0.05, rtol=0)
    assert delta.mean(0).abs().max() < 0.02


def test_restarts_keep_what_broke_and_repeat_the_single_runs(inputs: Tensor) -> None:
    """R restarts break what any of R single runs breaks; each run draws its own noise."""
    model, inputs = convolutional().double(), inputs.double()
    labels = model(inputs).argmax(1)
    options = {"norm": "Linf", "eps": 0.02, "step_size": 0.004, "num_steps": 3}
    single = pgd(model, inputs, labels, **options)
    triple = pgd(model, inputs, labels, num_restarts=3, **options)
    assert (triple.robust <= single.robust).all()
    assert (triple.loss >= single.loss).all()
    broken = ~single.robust
    assert broken.any()
    assert torch.equal(triple.inputs[broken], single.inputs[broken])
    kept = triple.robust
    assert kept.any()
    assert (triple.inputs[kept] != single.inputs[kept]).any()
    assert torch.equal(model(triple.inputs).argmax(1) == labels, triple.robust)


def test_restarts_end_when_nothing_is_left(
    model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    counter = Counter(model)
    wrong = (labels + 5) % 10
    result = pgd(counter, inputs, wrong, norm="Linf", eps=1e-6, num_steps=2, num_restarts=5)
    assert not result.robust.any()
    assert counter.forwards == result.num_forwards == 3


def test_given_start_outside_the_ball_is_moved_in(
    model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    for norm in ("Linf", "L2"):
        result = pgd(
            model, inputs, labels, norm=norm, eps=0.1, step_size=0, num_steps=1, start=inputs + 5
        )
        order = float("inf") if norm == "Linf" else 2
        delta = (result.inputs - inputs).flatten(1)
        assert (torch.linalg.vector_norm(delta, order, dim=1) <= 0.1 + 1e-6).all()


def test_without_report_the_last_forward_is_saved(
    model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    counter = Counter(model)
    options = {"norm": "Linf", "eps": 0.03, "step_size": 0.01}
    result = pgd(counter, inputs, labels, num_steps=4, report=False, **options)
    assert (counter.forwards, counter.backwards) == (4, 4)
    assert torch.equal(result.inputs, pgd(model, inputs, labels, num_steps=4, **options).inputs)
    before = pgd(model, inputs, labels, num_steps=3, **options)
    assert torch.equal(result.loss, before.loss)
    assert torch.equal(result.robust, before.robust)


def test_loss_may_be_a_function(model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    """As TRADES needs it: the divergence from the clean prediction."""
    clean = model(inputs).log_softmax(1).detach()

    def divergence(logits: Tensor, labels: Tensor) -> Tensor:
        return (clean.exp() * (clean - logits.log_softmax(1))).sum(1)

    result = pgd(model, inputs, labels, norm="Linf", eps=0.03, loss=divergence)
    torch.testing.assert_close(result.loss, divergence(model(result.inputs).detach(), labels))
    random = pgd(model, inputs, labels, norm="Linf", eps=0.03, loss=divergence, step_size=0)
    assert (result.loss > 5 * random.loss).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be a whole number >= 1"),
        ({"num_restarts": 0}, "num_restarts must be a whole number >= 1"),
        ({"num_restarts": 2, "random_start": False}, "needs random_start=True"),
        ({"num_restarts": 2, "report": False}, "needs report=True"),
        ({"step_size": float("nan")}, "step_size must be a finite number"),
        ({"step_size": "two"}, "a fraction such as '8/255'"),
        ({"start": torch.zeros(1, 2, 8, 8)}, "start must have the shape of inputs"),
    ],
)
def test_meaningless_settings_are_refused(
    options: dict[str, object], message: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    with pytest.raises(ConfigError, match=message):
        pgd(model, inputs, labels, norm="Linf", eps=0.1, **options)
