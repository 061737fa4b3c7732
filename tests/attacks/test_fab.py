"""FAB: closed forms, an independent loop, and the official implementation."""

import math

import pytest
import torch
from attack_toys import Linear, convolutional
from torch import Tensor, nn

from robustft.attacks import AttackResult, apgd, fab
from robustft.attacks.fab import Record
from robustft.attacks.hyperplane import project_on_hyperplane
from robustft.attacks.problem import Problem
from robustft.errors import ConfigError
from robustft.threat import NORMS

ORDERS = {"Linf": float("inf"), "L2": 2.0, "L1": 1.0}
DUAL_ORDERS = {"Linf": 1.0, "L2": 2.0, "L1": float("inf")}
RADII = {"Linf": 0.03, "L2": 0.2, "L1": 0.7}

every_norm = pytest.mark.parametrize("norm", NORMS)
both_kinds = pytest.mark.parametrize("targeted", [True, False])


class Recording(nn.Module):
    """Keeps every batch that a model is asked about, and its answers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.points: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.gradients = 0

    def forward(self, inputs: Tensor) -> Tensor:
        logits = self.model(inputs)
        self.points.append(inputs.detach().clone())
        self.logits.append(logits.detach().clone())
        if inputs.requires_grad:
            inputs.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.gradients += len(gradient)


def distances(points: Tensor, inputs: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm((points - inputs).flatten(1), ORDERS[norm], dim=1)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    rows = labels.unsqueeze(1)
    return logits.scatter(1, rows, -math.inf).amax(1) - logits.gather(1, rows).squeeze(1)


def linear_case(num_classes: int) -> tuple[Linear, Tensor, Tensor, Tensor, Tensor]:
    """A linear model, points far from the box's walls, gaps and slopes of all boundaries."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_classes, 30, generator=generator)
    model = Linear(weight, -0.5 * weight.sum(1))
    inputs = 0.5 + 0.02 * torch.randn(16, 30, generator=generator)
    with torch.no_grad():
        logits = model(inputs)
    labels = logits.argmax(1)
    gaps = logits - logits.gather(1, labels.unsqueeze(1))
    slopes = (model.weight - model.weight[labels].unsqueeze(1)).detach()
    return model, inputs, labels, gaps, slopes


@every_norm
@both_kinds
@pytest.mark.parametrize("num_classes", [2, 7])
def test_finds_the_shortest_way_out_of_a_linear_model(
    norm: str, targeted: bool, num_classes: int
) -> None:
    """Distance to a boundary: |gap| over the dual norm of its slope."""
    model, inputs, labels, gaps, slopes = linear_case(num_classes)
    sizes = torch.linalg.vector_norm(slopes, DUAL_ORDERS[norm], dim=2)
    reach = torch.where(sizes > 0, -gaps / sizes, math.inf)
    if targeted:  # towards the second largest logit, which is not always the nearest
        reach = reach.gather(1, gaps.argsort(descending=True)[:, 1:2])
    shortest = reach.amin(1)
    eps = 0.4
    options = {"norm": norm, "num_steps": 10, "targeted": targeted}
    result = fab(model, inputs, labels, eps=eps, num_targets=1 if targeted else None, **options)
    assert not result.robust.any()
    found = distances(result.inputs, inputs, norm)
    if targeted:
        assert (found <= shortest * 1.01).all()
    else:
        assert (found >= shortest * (1 - 1e-5)).all()
        assert (found <= shortest * 1.01).all()
    # The mask for a radius in the middle of the distances.
    if not targeted or num_classes == 2:
        eps = shortest.sort().values[7:9].mean().item()
        result = fab(model, inputs, labels, eps=eps, **options)
        clear = (shortest / eps - 1).abs() > 0.01
        assert torch.equal(result.robust[clear], (shortest > eps)[clear])
        assert torch.equal(result.inputs[result.robust], inputs[result.robust])


@every_norm
def test_a_box_in_the_way_is_walked_along(norm: str) -> None:
    """Two classes, inputs at the walls: still the shortest within the box."""
    generator = torch.Generator().manual_seed(5)
    model = Linear(torch.randn(2, 30, generator=generator), torch.zeros(2)).double()
    inputs = (torch.rand(16, 30, generator=generator, dtype=torch.float64) * 2 - 0.5).clamp(0, 1)
    with torch.no_grad():
        logits = model(inputs)
    labels = logits.argmax(1)
    slopes = (model.weight[1 - labels] - model.weight[labels]).detach()
    gaps = logits.gather(1, 1 - labels[:, None])[:, 0] - logits.gather(1, labels[:, None])[:, 0]
    moves = project_on_hyperplane(inputs, slopes, gaps, norm=norm)
    shortest = torch.linalg.vector_norm(moves, ORDERS[norm], dim=1)
    reachable = ((slopes * moves).sum(1) + gaps).abs() < 1e-9
    assert reachable.sum() > 8
    result = fab(model, inputs, labels, norm=norm, eps=1.0 if norm == "Linf" else 30.0)
    found = distances(result.inputs, inputs, norm)
    assert torch.equal(~result.robust, reachable)
    assert (found <= shortest * 1.01)[reachable].all()
    assert (found >= shortest * (1 - 1e-9))[reachable].all()


def loop(
    model: nn.Module, point: Tensor, label: int, target: int | None, norm: str, num_steps: int
) -> list[Tensor]:
    """The attack on one sample, as the paper has it; returns all points that it classifies."""
    points, current = [], point
    for _ in range(num_steps):
        points.append(current)
        jacobian = torch.autograd.functional.jacobian(lambda u: model(u)[0], current)
        logits = model(current).detach()[0]
        planes = []
        for other in range(len(logits)) if target is None else [target]:
            if other != label:
                gap = (logits[other] - logits[label]).item()
                slope = (jacobian[other] - jacobian[label]).flatten()
                size = torch.linalg.vector_norm(slope, DUAL_ORDERS[norm]).item()
                planes.append((abs(gap) / size, gap, slope))
        _, gap, slope = min(planes, key=lambda plane: plane[0])
        offset = slope @ current.flatten() - gap
        ahead, sizes = [], []
        for start in (current, point):
            flat = start.flatten(1)
            move = project_on_hyperplane(flat, slope[None], flat @ slope - offset, norm=norm)
            ahead.append(flat + 1.05 * move)
            sizes.append(max(torch.linalg.vector_norm(move, ORDERS[norm]).item(), 1e-8))
        alpha = min(sizes[0] / (sizes[0] + sizes[1]), 0.1)
        current = ((1 - alpha) * ahead[0] + alpha * ahead[1]).clamp(0, 1).view_as(point)
        points.append(current)
        if model(current).argmax().item() != label:
            current = 0.1 * point + 0.9 * current
    return points


@every_norm
@both_kinds
def test_visits_the_points_of_a_plain_loop(norm: str, targeted: bool) -> None:
    model = convolutional(4).double()
    generator = torch.Generator().manual_seed(3)
    inputs = torch.rand(3, 2, 8, 8, generator=generator, dtype=torch.float64).mul(1.4).sub(0.2)
    inputs = inputs.clamp(0, 1)
    logits = model(inputs)
    recording = Recording(model)
    options = {"norm": norm, "eps": 1e-6, "num_steps": 4, "targeted": targeted}
    fab(recording, inputs, logits.argmax(1), **options, num_targets=1 if targeted else None)
    visited = torch.stack(recording.points[1:])
    assert len(visited) == 8
    order = logits.argsort(1, descending=True).tolist()
    for sample, (label, target, *_) in enumerate(order):
        aim = target if targeted else None
        expected = loop(model, inputs[sample : sample + 1], label, aim, norm, 4)
        torch.testing.assert_close(visited[:, sample], torch.cat(expected), atol=1e-9, rtol=0)


@every_norm
@both_kinds
def test_the_nearest_of_all_misclassified_points_is_returned(
    norm: str, targeted: bool, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    recording = Recording(model)
    options = {"norm": norm, "eps": RADII[norm], "num_steps": 6, "targeted": targeted}
    num_targets = 1 if targeted else None
    # 32 rows and one target: every pass sees the whole batch.
    result = fab(recording, inputs, labels, num_targets=num_targets, **options)
    logits = torch.stack(recording.logits)
    away = torch.stack([distances(points, inputs, norm) for points in recording.points])
    hit = (logits.argmax(2) != labels) & (away <= RADII[norm])
    assert torch.equal(result.robust, ~hit.any(0))
    assert 0 < result.robust.sum() < len(labels) - 3
    nearest = away.where(hit, math.inf).argmin(0)
    for sample, step in enumerate(nearest.tolist()):
        expected = recording.points[0] if result.robust[sample] else recording.points[step]
        assert torch.equal(result.inputs[sample], expected[sample])
    if targeted:
        aims = logits[0].argsort(descending=True)[:, 1]
        gaps = torch.stack([z.gather(1, aims[:, None]) for z in logits])[..., 0]
        gaps = gaps - torch.stack([z.gather(1, labels[:, None]) for z in logits])[..., 0]
    else:
        gaps = torch.stack([margins(z, labels) for z in logits])
    highest = gaps.where(away <= RADII[norm], -math.inf).amax(0)
    torch.testing.assert_close(result.loss, highest)


def test_a_point_on_the_boundary_is_no_find() -> None:
    """Steps: clean; misclassified by a hair at 0.1; clearly misclassified at 0.3, then at 0.2."""
    walk = [(0.0, -1.0), (0.1, 1e-7), (0.3, 0.25), (0.2, 0.5)]
    inputs = torch.zeros(1, 2)
    record = Record(
        Problem.build(
            "fab",
            lambda points: points,
            inputs,
            torch.tensor([0]),
            norm="Linf",
            eps=0.25,
            loss="margin",
            generator=None,
            sample_ids=None,
        )
    )
    for move, gap in walk:
        record.update(inputs + move, torch.tensor([gap]), torch.tensor([gap <= 0]))
    points, robust, loss = record.outcome()
    torch.testing.assert_close(points, inputs + 0.2)
    assert not robust.any()
    assert loss.item() == 0.5


@every_norm
@both_kinds
@pytest.mark.parametrize("check_clean", [True, False])
def test_misclassified_inputs_come_back_unchanged(
    norm: str, targeted: bool, check_clean: bool, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    options = {"norm": norm, "eps": RADII[norm], "num_steps": 5, "targeted": targeted}
    result = fab(model, inputs, labels, check_clean=check_clean, **options)
    assert not result.robust[:3].any()
    assert torch.equal(result.inputs[:3], inputs[:3])
    assert torch.equal(result.inputs[result.robust], inputs[result.robust])
    other = fab(model, inputs, labels, check_clean=not check_clean, **options)
    assert torch.equal(result.robust, other.robust)


@every_norm
@both_kinds
def test_agrees_with_apgd(norm: str, targeted: bool, inputs: Tensor) -> None:
    """Two attacks that have nothing in common but the model break the same samples."""
    model = convolutional(norm=False)
    labels = model(inputs).argmax(1)
    result = fab(model, inputs, labels, norm=norm, eps=RADII[norm], num_steps=20, targeted=targeted)
    other = apgd(model, inputs, labels, norm=norm, eps=RADII[norm], num_steps=20, loss="dlr")
    assert 0 < result.robust.sum() < len(labels)
    assert (result.robust != other.robust).sum() <= 1


@every_norm
@both_kinds
def test_restarts_begin_half_the_radius_away(norm: str, targeted: bool, model: nn.Module) -> None:
    inputs = torch.full((6, 2, 8, 8), 0.5)
    labels = model(inputs).argmax(1)
    eps = {"Linf": 2e-4, "L2": 2e-3, "L1": 1e-2}[norm]
    recording = Recording(model)
    options = {"norm": norm, "eps": eps, "num_steps": 2, "targeted": targeted}
    targets = {"num_targets": 1} if targeted else {}
    result = fab(recording, inputs, labels, num_restarts=3, **options, **targets)
    assert result.robust.all()
    starts = [recording.points[1 + 4 * restart] for restart in range(3)]
    assert torch.equal(starts[0], inputs)
    for start in starts[1:]:
        away = distances(start, inputs, norm)
        torch.testing.assert_close(away, torch.full((6,), eps / 2), rtol=1e-3, atol=1e-8)
    assert not torch.equal(starts[1], starts[2])
    assert not torch.equal(starts[1][0], starts[1][1])


@every_norm
@both_kinds
def test_noise_belongs_to_the_sample(norm: str, targeted: bool) -> None:
    model = convolutional().double()
    inputs = torch.rand(7, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = model(inputs).argmax(1)
    ids = torch.tensor([3, 10**12, 17, 0, 4, 5, 99])
    targets = {"num_targets": 2} if targeted else {}

    def attack(rows: list[int], seed: int = 1) -> AttackResult:
        return fab(
            model,
            inputs[rows],
            labels[rows],
            norm=norm,
            eps=RADII[norm] / 4,
            num_steps=3,
            num_restarts=3,
            targeted=targeted,
            sample_ids=ids[rows],
            generator=torch.Generator().manual_seed(seed),
            **targets,
        )

    whole = attack([0, 1, 2, 3, 4, 5, 6])
    parts = [attack([6, 2]), attack([0]), attack([1, 5, 4, 3])]
    back = torch.tensor([6, 2, 0, 1, 5, 4, 3]).argsort()
    assert torch.equal(torch.cat([part.robust for part in parts])[back], whole.robust)
    for field in ("inputs", "loss"):
        joined = torch.cat([getattr(part, field) for part in parts])[back]
        torch.testing.assert_close(joined, getattr(whole, field), atol=1e-10, rtol=0)
    assert not torch.equal(attack([0, 1, 2, 3, 4, 5, 6], seed=2).loss, whole.loss)


@both_kinds
def test_counted_passes_are_the_real_ones(targeted: bool, model: nn.Module, inputs: Tensor) -> None:
    labels = model(inputs).argmax(1)
    recording = Recording(model)
    options = {"norm": "L2", "eps": 0.1, "num_steps": 4, "num_restarts": 2}
    result = fab(recording, inputs, labels, targeted=targeted, **options)
    assert 0 < result.robust.sum() < len(labels)
    assert result.total_forwards == sum(map(len, recording.points))
    assert result.total_backwards == recording.gradients
    if targeted:
        assert (result.num_forwards, result.num_backwards) == (1 + 2 * 9 * 8, 2 * 9 * 4)
    else:
        assert (result.num_forwards, result.num_backwards) == (1 + 2 * 8, 2 * 9 * 4)
        # The classes share the forward of their gradients.
        assert len(recording.points) == 1 + 2 * 8


@every_norm
@both_kinds
def test_a_model_without_gradient_stops_nothing(norm: str, targeted: bool, inputs: Tensor) -> None:
    def disconnected(inputs: Tensor) -> Tensor:
        return torch.eye(3)[:1].expand(len(inputs), 3)

    def flat(inputs: Tensor) -> Tensor:
        return disconnected(inputs) + 0 * inputs.sum()

    labels = torch.arange(len(inputs)) % 3
    for model in (disconnected, flat):
        result = fab(
            model,
            inputs,
            labels,
            norm=norm,
            eps=0.5,
            num_steps=3,
            num_restarts=2,
            targeted=targeted,
        )
        assert torch.equal(result.robust, labels == 0)
        assert torch.equal(result.inputs, inputs)
        assert result.loss.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_max": 1.5}, r"alpha_max must be a finite number in \[0, 1\], got 1.5"),
        ({"eta": 0.9}, "eta must be a finite number >= 1, got 0.9"),
        ({"eta": math.inf}, "eta must be a finite number >= 1"),
        ({"beta": -0.1}, r"beta must be a finite number in \[0, 1\]"),
        ({"beta": math.nan}, r"beta must be a finite number in \[0, 1\]"),
        ({"num_steps": 0}, "num_steps must be a whole number >= 1"),
        ({"num_restarts": 0}, "num_restarts must be a whole number >= 1"),
        ({"num_targets": 0}, "num_targets must be a whole number >= 1"),
        ({"targeted": False, "num_targets": 3}, "num_targets has no meaning with targeted=False"),
    ],
)
def test_bad_arguments_are_refused(
    options: dict[str, object], message: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    with pytest.raises(ConfigError, match=message):
        fab(model, inputs, labels, norm="Linf", eps=0.1, **options)


def official_case() -> tuple[nn.Module, Tensor, Tensor]:
    model = convolutional(norm=False)
    generator = torch.Generator().manual_seed(4)
    inputs = (torch.rand(48, 2, 8, 8, generator=generator) * 1.4 - 0.2).clamp(0, 1)
    labels = model(inputs).argmax(1)
    labels[:4] = (labels[:4] + 1) % 10
    return model, inputs, labels


@every_norm
@both_kinds
@pytest.mark.parametrize("num_steps", [3, 10])
def test_same_as_the_official_implementation(norm: str, targeted: bool, num_steps: int) -> None:
    official = pytest.importorskip(
        "pyautoattack.fab_pt", reason="needs the extra robustft[autoattack]"
    )
    model, inputs, labels = official_case()
    theirs, ours = Recording(model), Recording(model)
    attack = official.FABAttack_PT(
        theirs, norm=norm, n_iter=num_steps, eps=RADII[norm], targeted=targeted, device="cpu"
    )
    with torch.random.fork_rng(devices=[]):  # It seeds the global generator.
        expected = attack.perturb(inputs, labels).detach()
    options = {"norm": norm, "eps": RADII[norm], "num_steps": num_steps, "targeted": targeted}
    result = fab(ours, inputs, labels, check_clean=True, **options)
    with torch.no_grad():
        robust = model(expected).argmax(1) == labels
    assert 0 < robust.sum() < len(labels) - 4
    assert torch.equal(result.robust, robust)
    broken = ~robust & (distances(expected, inputs, norm) > 0)
    ratios = (distances(result.inputs, inputs, norm) / distances(expected, inputs, norm))[broken]
    assert ratios.median().item() == pytest.approx(1, abs=1e-4)
    assert ratios.quantile(0.9) <= 1.001
    # Iterates of the first target or restart; each classifies the clean inputs beforehand. A point
    # that comes to lie on the boundary itself falls to one side or the other by rounding, and goes
    # its own way from then on.
    first_theirs, first_ours = (3, 1) if targeted else (2, 2)
    for step in range(2 * num_steps):
        far = (theirs.points[first_theirs + step] - ours.points[first_ours + step]).flatten(1)
        assert (far.abs().amax(1) <= 2e-5).float().mean() >= 0.95
