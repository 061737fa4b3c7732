"""APGD: schedule, closed forms, modes of keeping."""

import math

import pytest
import torch
from attack_toys import Counter, Linear, convolutional
from torch import Tensor, nn
from torch.nn import functional

from robustft.attacks import apgd
from robustft.attacks.apgd import MomentumRule, Record, check_steps
from robustft.attacks.problem import Problem
from robustft.errors import ConfigError


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [
        (1, [1]),
        (5, [1, 2, 3, 4, 5]),
        (10, [2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (20, [4, 7, 9, *range(10, 21)]),
        (50, [11, 21, 30, 38, 45]),
        (100, [22, 41, 57, 70, 80, 87, 93, 99]),
    ],
)
def test_schedule(num_steps: int, expected: list[int]) -> None:
    checks = check_steps(num_steps)
    assert list(checks) == expected
    before = [0, *expected]
    assert list(checks.values()) == [b - a for a, b in zip(before, expected, strict=False)]


def best_delta(slope: Tensor, inputs: Tensor, eps: float, norm: str) -> Tensor:
    """Maximise <slope, delta> over the ball and the box, in closed form."""
    rooms = torch.where(slope > 0, 1 - inputs, inputs)
    if norm == "Linf":
        return slope.sign() * rooms.clamp(max=eps)
    # L2 with a box: delta_i = min(c |w_i|, room_i), with c such that the norm is eps.
    low, high = torch.zeros(len(slope), 1), torch.full((len(slope), 1), 1e4)
    for _ in range(200):
        middle = (low + high) / 2
        short = torch.minimum(middle * slope.abs(), rooms).norm(dim=1, keepdim=True) < eps
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return slope.sign() * torch.minimum(low * slope.abs(), rooms)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("from_clean", [False, True])
def test_reaches_the_optimum_of_a_linear_model(norm: str, boxed: bool, from_clean: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    model = Linear(torch.randn(2, 30, generator=generator), torch.randn(2, generator=generator))
    inputs = torch.rand(12, 30, generator=generator)
    inputs = (1.4 * inputs - 0.2).clamp(0, 1) if boxed else 0.4 + 0.2 * inputs
    labels = torch.arange(12) % 2
    eps = 0.1 if norm == "Linf" else 0.4
    start = inputs if from_clean else None
    result = apgd(model, inputs, labels, norm=norm, eps=eps, start=start, keep="best_loss")
    slope = (model.weight[1 - labels] - model.weight[labels]).detach()
    best = inputs + best_delta(slope, inputs, eps, norm)
    optimum = functional.cross_entropy(model(best), labels, reduction="none").detach()
    assert (result.loss <= optimum + 1e-5).all()
    # Ball first, box second is no exact projection: what clipping takes from a coordinate is given
    # to the others only as the step shrinks, in the official code as here.
    tolerance = 1e-2 if norm == "L2" and boxed else 1e-4
    torch.testing.assert_close(result.loss, optimum, atol=tolerance, rtol=0)
    reached = functional.cross_entropy(model(result.inputs), labels, reduction="none").detach()
    torch.testing.assert_close(reached, result.loss)


def test_best_loss_grows_with_the_steps_and_is_that_of_the_point(
    model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    clean = functional.cross_entropy(model(inputs), labels, reduction="none").detach()
    result = apgd(
        model, inputs, labels, norm="Linf", eps=0.03, num_steps=6, start=inputs, keep="best_loss"
    )
    assert (result.loss >= clean).all()
    reached = functional.cross_entropy(model(result.inputs), labels, reduction="none").detach()
    torch.testing.assert_close(reached, result.loss)


def test_loss_and_mask_are_those_of_all_iterates(
    model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    seen = []

    class Recording(nn.Module):
        def forward(self, points: Tensor) -> Tensor:
            logits = model(points)
            seen.append((points.detach().clone(), logits.detach().clone()))
            return logits

    result = apgd(Recording(), inputs, labels, norm="L2", eps=0.4, num_steps=15, loss="margin")
    wrong = torch.stack([logits.argmax(1) != labels for _, logits in seen])
    assert torch.equal(result.robust, ~wrong.any(0))
    others = [logits.scatter(1, labels[:, None], -math.inf).amax(1) for _, logits in seen]
    own = [logits.gather(1, labels[:, None])[:, 0] for _, logits in seen]
    highest = torch.stack([a - b for a, b in zip(others, own, strict=True)]).amax(0)
    torch.testing.assert_close(result.loss, highest)
    for sample in range(len(labels)):
        if wrong[:, sample].any():
            latest = int(wrong[:, sample].nonzero().max())
            assert torch.equal(result.inputs[sample], seen[latest][0][sample])


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_random_start_touches_the_boundary(norm: str, model: nn.Module) -> None:
    starts = []

    class Recording(nn.Module):
        def forward(self, points: Tensor) -> Tensor:
            starts.append(points.detach().clone())
            return model(points)

    inputs = torch.full((6, 2, 8, 8), 0.5)
    labels = torch.zeros(6, dtype=torch.int64)
    apgd(Recording(), inputs, labels, norm=norm, eps=0.3, num_steps=1)
    order = float("inf") if norm == "Linf" else 2
    delta = (starts[0] - inputs).flatten(1)
    torch.testing.assert_close(torch.linalg.vector_norm(delta, order, dim=1), torch.full((6,), 0.3))


def test_restarts(inputs: Tensor) -> None:
    model, inputs = convolutional().double(), inputs.double()
    labels = model(inputs).argmax(1)
    options = {"norm": "Linf", "eps": 0.012, "num_steps": 2}
    single = apgd(model, inputs, labels, **options)
    many = apgd(model, inputs, labels, num_restarts=4, **options)
    assert (many.robust <= single.robust).all()
    assert torch.equal(many.inputs[~single.robust], single.inputs[~single.robust])
    everywhere = apgd(model, inputs, labels, num_restarts=4, keep="best_loss", **options)
    assert torch.equal(everywhere.robust, many.robust)
    assert (everywhere.loss >= many.loss).all()
    assert (everywhere.loss > many.loss).any()


def test_check_clean_returns_misclassified_inputs_unchanged(
    model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    counter = Counter(model)
    options = {"norm": "Linf", "eps": 0.03, "num_steps": 5}
    result = apgd(counter, inputs, labels, check_clean=True, **options)
    assert torch.equal(result.inputs[:3], inputs[:3])
    assert not result.robust[:3].any()
    clean = functional.cross_entropy(model(inputs), labels, reduction="none").detach()
    torch.testing.assert_close(result.loss[:3], clean[:3])
    assert counter.forwards == result.num_forwards == 7
    plain = apgd(model, inputs, labels, **options)
    assert torch.equal(result.robust, plain.robust)


def reviews(losses: list[float], *, first: float, compat: bool = True) -> dict[int, bool]:
    """Feed one sample's losses to the rule; return {check step: step size was halved}."""
    problem = Problem.build(
        "apgd",
        lambda inputs: inputs,
        torch.full((1, 2), 0.5),
        torch.tensor([0]),
        norm="Linf",
        eps=0.1,
        loss="ce",
        generator=None,
        sample_ids=None,
    )
    rule = MomentumRule(problem, torch.tensor([first]), num_steps=20, first_check_compat=compat)
    point = problem.inputs
    record = Record(point, torch.tensor([first]), point, torch.tensor([True]))
    halved = {}
    for step, loss in enumerate(losses, start=1):
        values = torch.tensor([loss])
        record.update(point, values, torch.tensor([True]))
        before = rule.step_sizes.item()
        if rule.review(record, values, step) is not None:
            halved[step] = rule.step_sizes.item() < before
            assert rule.step_sizes.item() in (before, before / 2)
    return halved


def test_first_check_compares_with_zero_or_with_the_start() -> None:
    """n = 20: of the first 4 comparisons at most 3 may be increases for the step to be halved."""
    rising = [-0.9, -0.8, -0.7, -0.6]  # as DLR of a correct point
    assert reviews(rising, first=-1.0) == {4: True}
    assert reviews(rising, first=-1.0, compat=False) == {4: False}
    positive = [2.0, 2.1, 2.2, 2.3]  # as CE, here below the start at first
    assert reviews(positive, first=2.05) == {4: False}
    assert reviews(positive, first=2.05, compat=False) == {4: True}


def test_conditions_at_later_checks() -> None:
    """Checks after steps 4, 7 and 9, with windows 4, 3 and 2."""
    rising = [1.0, 2.0, 3.0, 4.0]
    assert reviews([*rising, 5.0, 6.0, 7.0, 8.0, 9.0], first=0.5) == {4: False, 7: False, 9: False}
    # Two of three comparisons rise: 2 <= 0.75 * 3. The window's first compares with step 4.
    assert reviews([*rising, 3.0, 5.0, 6.0], first=0.5) == {4: False, 7: True}
    assert reviews([*rising, 5.0, 6.0, 7.0, 6.5, 7.5], first=0.5) == {4: False, 7: False, 9: True}
    # All rise, but no new best since the check at step 4, after which the step was not halved.
    assert reviews([1.0, 2.0, 3.0, 9.0, 1.0, 2.0, 3.0], first=0.5)[7]
    high_start = reviews([*rising, 4.1, 4.2, 4.3, 4.4, 4.5], first=50.0)
    # No new best at the first check either, but there the second condition is off.
    assert high_start == {4: False, 7: True, 9: False}


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_gradients_of_a_noisy_model_are_averaged(norm: str) -> None:
    """Odd and even calls see different weights; only their mean says where to go."""

    class Alternating(nn.Module):
        calls = 0

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += 1
            slopes = torch.tensor([[3.0, -1.0, 0.0], [-1.0, 3.0, 0.0]])[self.calls % 2]
            return torch.stack([torch.zeros(len(inputs)), inputs @ slopes - self.calls], dim=1)

    inputs = torch.full((2, 3), 0.5)
    labels = torch.tensor([0, 0])
    model = Alternating()
    options = {"norm": norm, "eps": 0.1, "num_steps": 3, "initial_sparsity": 0.5}
    result = apgd(
        model, inputs, labels, eot_steps=2, loss="margin", start=inputs, keep="best_loss", **options
    )
    # Along the mean slope (1, 1, 0). The offset makes every later loss lower: the best point is
    # the start, seen last by call 2, whose slope is the first one.
    assert model.calls == result.num_forwards == 7
    assert result.num_backwards == 6
    assert torch.equal(result.inputs, inputs)
    torch.testing.assert_close(result.loss, torch.full((2,), 1.0 - 2.0))
    seen: list[Tensor] = []

    class Recording(Alternating):
        def forward(self, inputs: Tensor) -> Tensor:
            seen.append(inputs.detach().clone())
            return super().forward(inputs)

    apgd(Recording(), inputs, labels, eot_steps=2, loss="margin", start=inputs, **options)
    step = seen[2] - inputs
    assert (step[:, :2] > 0.01).all()
    assert (step[:, 2] == 0).all()
    torch.testing.assert_close(step[:, 0], step[:, 1])
    torch.testing.assert_close(seen[2], seen[3])


def test_a_targeted_loss_is_attacked_as_any_other() -> None:
    """More in test_targets.py."""
    model = convolutional()
    inputs = torch.rand(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = model(inputs).argmax(1)
    result = apgd(model, inputs, labels, norm="Linf", eps=0.3, num_steps=5, loss="dlr-targeted")
    assert not result.robust.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_targets": 9}, "num_targets needs a targeted loss: loss='dlr-targeted'"),
        ({"loss": "dlr-targeted", "keep": "best_loss"}, "needs a loss without targets"),
        ({"loss": "dlr-target"}, "unknown attack loss 'dlr-target'"),
        ({"num_steps": 0}, "num_steps must be a whole number >= 1"),
        ({"num_steps": 2.5}, "num_steps must be a whole number >= 1"),
        ({"num_restarts": True}, "num_restarts must be a whole number >= 1"),
        ({"eot_steps": 0}, "eot_steps must be a whole number >= 1"),
        ({"keep": "last"}, "unknown value of keep 'last'"),
        ({"keep": "best_loss", "check_clean": True}, "check_clean has no meaning"),
        ({"start": torch.zeros(1, 2, 8, 8)}, "start must have the shape of inputs"),
    ],
)
def test_meaningless_settings_are_refused(
    options: dict[str, object], message: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    with pytest.raises(ConfigError, match=message):
        apgd(model, inputs, labels, **{"norm": "Linf", "eps": 0.1, **options})
