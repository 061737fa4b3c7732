"""Module robust criticality: known answers, the ball, and independence of how it is computed."""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustft.errors import ConfigError, NonFiniteLossError, UnknownNameError
from robustft.methods.criticality import (
    Criticality,
    CriticalityConfig,
    CriticalityWork,
    Projection,
    criticality_of_layer,
    eligible_layers,
    module_robust_criticality,
    rank_layers,
)
from robustft.models import Start, weight_layers
from robustft.training.seeding import generator


def example(start: Start, *, count: int = 24, dtype: torch.dtype = torch.float64) -> tuple:
    """Return a model with plausible running statistics, stored examples and labels."""
    model = start.build().to(dtype)
    draw = torch.Generator().manual_seed(0)
    inputs = torch.rand(count, *start.image_shape, generator=draw, dtype=dtype)
    labels = torch.arange(count) % start.num_classes
    model.train()
    with torch.no_grad():
        model(inputs)
    return model.eval(), inputs, labels


def by_the_book(
    model: nn.Module,
    name: str,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    lr: float,
    num_epochs: int,
    batch_size: int,
    every_step: bool = False,
) -> tuple[float, float]:
    """The published loop, written independently, without a cache; the shuffles are ours."""
    model = copy.deepcopy(model)
    weight = weight_layers(model)[name].weight
    original = weight.detach().clone()

    def measure() -> tuple[float, float]:
        with torch.no_grad():
            logits = model(inputs)
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        return functional.cross_entropy(logits, labels).item(), accuracy

    base, base_accuracy = worst, accuracy = measure()
    optimizer = torch.optim.SGD([weight], lr=lr)

    def pull_back() -> None:
        ratio = ((weight.detach() - original).norm() / original.norm()).item()
        if ratio > eps:
            with torch.no_grad():
                weight.copy_(original + (weight - original) * (eps / ratio))

    for epoch in range(num_epochs):
        order = torch.randperm(len(labels), generator=generator(0, "mrc", epoch)).tolist()
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            optimizer.zero_grad()
            (-functional.cross_entropy(model(inputs[rows]), labels[rows])).backward()
            optimizer.step()
            if every_step:
                pull_back()
        pull_back()
        loss, correct = measure()
        if loss > worst:
            worst, accuracy = loss, correct
    return worst - base, (base_accuracy - accuracy) * 100


@pytest.mark.parametrize(("batch_size", "projection"), [(24, "epoch"), (7, "epoch"), (7, "step")])
def test_equals_the_published_loop_for_every_layer(
    fresh: Start, batch_size: int, projection: Projection
) -> None:
    model, inputs, labels = example(fresh)
    found = module_robust_criticality(
        model, inputs, labels, num_epochs=3, batch_size=batch_size, projection=projection
    )
    assert list(found) == list(weight_layers(model))
    for name, criticality in found.items():
        value, drop = by_the_book(
            model,
            name,
            inputs,
            labels,
            eps=0.1,
            lr=1.0,
            num_epochs=3,
            batch_size=batch_size,
            every_step=projection == "step",
        )
        assert criticality.value == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert criticality.accuracy_drop == pytest.approx(drop, abs=1e-9)


@pytest.mark.parametrize("projection", ["epoch", "step"])
def test_never_negative_inside_the_ball_and_model_untouched(fresh: Start, projection: str) -> None:
    model, inputs, labels = example(fresh, dtype=torch.float32)
    model.train()
    model.requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    found = module_robust_criticality(
        model,
        inputs,
        labels,
        num_epochs=3,
        batch_size=10,
        projection=projection,  # type: ignore[arg-type]
    )
    assert all(criticality.value >= 0 for criticality in found.values())
    assert max(criticality.value for criticality in found.values()) > 0.01
    assert all(c.movement <= 0.1 * (1 + 1e-6) for c in found.values())
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_one_batch_per_epoch_projects_alike_per_epoch_and_per_step(fresh: Start) -> None:
    model, inputs, labels = example(fresh)
    per_epoch, per_step = (
        module_robust_criticality(
            model, inputs, labels, num_epochs=3, batch_size=24, projection=projection
        )
        for projection in ("epoch", "step")
    )
    assert per_epoch == per_step


def test_several_batches_make_the_projection_matter(fresh: Start) -> None:
    model, inputs, labels = example(fresh)
    per_epoch, per_step = (
        module_robust_criticality(
            model,
            inputs,
            labels,
            layers=["conv1"],
            num_epochs=3,
            batch_size=6,
            projection=projection,
        )["conv1"].value
        for projection in ("epoch", "step")
    )
    assert per_epoch != pytest.approx(per_step, rel=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_prefix_cache_changes_nothing(fresh: Start, dtype: torch.dtype, tolerance: float) -> None:
    model, inputs, labels = example(fresh, dtype=dtype)
    cached, naive, over_budget = (
        module_robust_criticality(
            model, inputs, labels, num_epochs=3, batch_size=10, lr=0.05, **options
        )
        for options in ({}, {"prefix_cache": False}, {"cache_mib": 0})
    )
    for name in cached:
        assert cached[name].value == pytest.approx(naive[name].value, rel=tolerance, abs=1e-12)
    assert over_budget == naive


def test_parts_that_work_in_place_spoil_neither_cache_nor_inputs() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Hardtanh(0.2, 0.8, inplace=True),
            nn.Conv2d(1, 4, 3),
            nn.Threshold(0.1, 0.5, inplace=True),  # applied twice, it gives something else
            nn.Conv2d(4, 2, 3),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(32, 3),
        ).double()
        inputs = torch.rand(10, 1, 8, 8, dtype=torch.float64)
    labels, before = torch.arange(10) % 3, inputs.clone()
    cached, plain = (
        module_robust_criticality(
            model, inputs, labels, num_epochs=2, batch_size=4, prefix_cache=prefix_cache
        )
        for prefix_cache in (True, False)
    )
    assert torch.equal(inputs, before)
    for name, criticality in plain.items():
        assert cached[name].value == pytest.approx(criticality.value, rel=1e-10)


def test_prefix_cache_saves_forwards(fresh: Start) -> None:
    model, inputs, labels = example(fresh)

    def stem_runs(prefix_cache: bool) -> int:
        runs = 0

        def count(*_: object) -> None:
            nonlocal runs
            runs += 1

        counted = copy.deepcopy(model)
        counted.network.conv1.register_forward_hook(count)  # type: ignore[union-attr,operator]
        # The copy made inside keeps the hook, and the hook this counter.
        module_robust_criticality(
            counted,
            inputs,
            labels,
            layers=["linear"],
            num_epochs=3,
            batch_size=12,
            prefix_cache=prefix_cache,
        )
        return runs

    # Naive: 2 batches to begin with, then 2 steps and 2 evaluations in each epoch.
    assert stem_runs(False) == 2 + 3 * 4
    # Cached: one image to learn the size, then each batch once.
    assert stem_runs(True) == 1 + 2


class Muted(nn.Module):
    """Two branches, one of which is multiplied by zero."""

    def __init__(self) -> None:
        super().__init__()
        self.heard, self.muted = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.flatten(1)
        logits: Tensor = self.heard(flat) + 0.0 * self.muted(flat)
        return logits


def test_a_layer_that_is_multiplied_by_zero_has_criticality_exactly_zero() -> None:
    torch.manual_seed(0)
    found = module_robust_criticality(
        Muted(), torch.rand(9, 1, 2, 2), torch.arange(9) % 3, batch_size=4
    )
    assert found["muted"] == Criticality(0.0, 0.0, 0.0)
    assert found["heard"].value > 0


def test_convex_case_is_solved_on_the_boundary() -> None:
    """One linear layer with two weights: the loss is convex, so its maximum is on the circle."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False)).double()
    weight = torch.tensor([[1.0], [-0.5]], dtype=torch.float64)
    model[1].weight.data.copy_(weight)
    inputs = torch.tensor([0.9, 0.4, 0.7, 0.2], dtype=torch.float64).reshape(4, 1, 1, 1)
    labels = torch.tensor([0, 0, 1, 0])
    found = module_robust_criticality(model, inputs, labels, num_epochs=20)["1"]

    radius = 0.1 * weight.norm().item()
    angles = torch.linspace(0, 2 * math.pi, 20_001, dtype=torch.float64)
    moves = radius * torch.stack([angles.cos(), angles.sin()], 1)
    logits = (weight[:, 0] + moves)[:, None, :] * inputs.reshape(1, 4, 1)
    losses = functional.cross_entropy(
        logits.transpose(1, 2), labels.expand(len(moves), 4), reduction="none"
    ).mean(1)
    base = functional.cross_entropy(model(inputs), labels)
    assert found.value == pytest.approx((losses.max() - base).item(), rel=1e-6)
    assert found.movement == pytest.approx(0.1, rel=1e-9)


def test_overflow_is_infinitely_critical_not_harmless() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    model[3].weight.data.mul_(1e4)
    inputs, labels = torch.rand(9, 1, 2, 2), torch.arange(9) % 3
    huge = {"lr": 3e38, "batch_size": 3, "num_epochs": 2}
    found = module_robust_criticality(model, inputs, labels, **huge)
    assert math.isinf(found["1"].value)
    assert found["1"].value > 0
    # The published code lets NaN lose every comparison: minus the base loss, "least critical".
    published = module_robust_criticality(model, inputs, labels, start_at_zero=True, **huge)
    with torch.no_grad():
        base = functional.cross_entropy(model(inputs), labels).item()
    assert published["1"].value == pytest.approx(-base, rel=1e-6)


def test_a_layers_value_does_not_depend_on_who_computes_what(fresh: Start) -> None:
    """Any number of workers: alone, in a subset or in another order, bit for bit the same."""
    model, inputs, labels = example(fresh, dtype=torch.float32)
    start = dataclasses.replace(fresh, state=model.state_dict())
    config = CriticalityConfig(num_epochs=2, batch_size=10)
    work = CriticalityWork(
        start=start,
        inputs=inputs.numpy().astype(np.float32),
        labels=labels.numpy(),
        config=config,
        device="cpu",
    )
    whole = module_robust_criticality(model, inputs, labels, num_epochs=2, batch_size=10)
    reversed_order = module_robust_criticality(
        model, inputs, labels, layers=list(whole)[::-1], num_epochs=2, batch_size=10
    )
    alone = {name: Criticality(**criticality_of_layer(work, name)) for name in whole}
    assert alone == whole == reversed_order


def test_seed_shuffles_the_batches(fresh: Start) -> None:
    model, inputs, labels = example(fresh)
    values = {
        module_robust_criticality(
            model, inputs, labels, layers=["linear"], num_epochs=2, batch_size=7, seed=seed
        )["linear"].value
        for seed in (0, 0, 1)
    }
    assert len(values) == 2


@pytest.mark.parametrize("start_at_zero", [False, True])
def test_a_model_that_is_broken_before_the_ascent_is_refused(
    fresh: Start, start_at_zero: bool
) -> None:
    model, inputs, labels = example(fresh)
    with torch.no_grad():
        weight_layers(model)["linear"].weight[0, 0] = math.nan  # type: ignore[index, operator]
    with pytest.raises(NonFiniteLossError, match="starting model's loss is nan"):
        module_robust_criticality(model, inputs, labels, start_at_zero=start_at_zero)


def test_bad_arguments_are_named(fresh: Start) -> None:
    model, inputs, labels = example(fresh)
    with pytest.raises(UnknownNameError, match=r"did you mean 'layer2.0.conv1'"):
        module_robust_criticality(model, inputs, labels, layers=["layer2.0.conv11"])
    with pytest.raises(ConfigError, match="eps = 0: must be a number > 0"):
        module_robust_criticality(model, inputs, labels, eps=0)
    with pytest.raises(ConfigError, match="24 inputs and 3 labels"):
        module_robust_criticality(model, inputs, labels[:3])


def test_a_weight_far_outside_the_ball_is_pulled_back_although_its_square_overflows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    inputs, labels = torch.rand(9, 1, 2, 2), torch.arange(9) % 3
    options = {"num_epochs": 1, "batch_size": 9}
    near, far = (
        module_robust_criticality(model, inputs, labels, lr=lr, **options)["1"]
        for lr in (1e3, 1e30)
    )
    # One step along the gradient, projected: the same point, however long the step was.
    assert far.value == pytest.approx(near.value, rel=1e-5)
    assert far.movement == pytest.approx(0.1, rel=1e-6)


def test_ranking_prefers_the_middle_among_ties() -> None:
    values = {"a": 0.102, "b": 0.5, "c": 0.105, "d": 0.109, "e": 0.1, "f": math.inf}
    # Middle index 2.5: c and d are equally near, the earlier one first; then a and e by distance.
    assert rank_layers(values) == ["c", "d", "e", "a", "b", "f"]
    assert rank_layers(values, tie_tolerance=0.0) == ["e", "a", "c", "d", "b", "f"]
    assert rank_layers(values, eligible=["a", "f"]) == ["a", "f"]
    assert rank_layers(dict.fromkeys("abc", math.inf)) == ["b", "a", "c"]


def test_ranking_holds_every_eligible_layer_once() -> None:
    for values in itertools.permutations((0.0, 0.005, 0.012, 0.02)):
        assert sorted(rank_layers(dict(zip("abcd", values, strict=True)))) == list("abcd")


def test_eligible_patterns() -> None:
    layers = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "linear"]
    assert eligible_layers(layers, ["*"]) == layers
    assert eligible_layers(layers, ["*.conv2", "linear"]) == ["layer1.0.conv2", "linear"]
    assert eligible_layers(layers, ["conv1"]) == ["conv1"]
    with pytest.raises(UnknownNameError, match="layer or pattern"):
        eligible_layers(layers, ["*.conv9"])
