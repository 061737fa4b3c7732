"""Multi-norm training: what each scheme costs and computes, its options, and that it resumes."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustft.attacks import apgd, project
from robustft.data.base import Task
from robustft.errors import ConfigError
from robustft.methods import METHODS, multinorm
from robustft.methods.base import Result
from robustft.methods.multinorm import (
    MultiNormConfig,
    multi_steepest_descent,
    train,
    train_apgd,
    validate_norms,
)
from robustft.methods.multinorm_attacks import _msd_step
from robustft.models import Start, load_start
from robustft.models.preact_resnet import preact_resnet18_softplus
from robustft.threat import ThreatModel
from robustft.training.augment import AugmentConfig, augment
from robustft.training.context import LocalContext
from robustft.training.loaders import Loader
from robustft.training.optimizers import OptimizerConfig
from robustft.training.schedules import ScheduleConfig
from robustft.training.seeding import generator

SCHEMES = ("error_weighted", "uniform", "alternate", "max", "avg", "msd")
THREATS = (ThreatModel("Linf", 0.05), ThreatModel("L2", 0.4), ThreatModel("L1", 1.5))
STILL = AugmentConfig(crop_padding=0, flip=0.0)
ROSE = OptimizerConfig(name="rose", upper=60.0)
SMALL: dict[str, Any] = {"num_steps": 2, "val_steps": 2, "batch_size": 16, "augment": STILL}


@pytest.fixture(scope="module")
def union(task: Task) -> Task:
    """The stripes against three norms."""
    return dataclasses.replace(task, threat_models=THREATS)


@pytest.fixture(scope="module")
def robust(union: Task, fresh: Start) -> Start:
    """A start that has been trained: against Linf only."""
    config = MultiNormConfig(**SMALL, norms=("Linf",), epochs=8)
    result = train(config, LocalContext(task=union, start=fresh))
    return dataclasses.replace(fresh, state=result.state)


def one_batch(task: Task, **changes: Any) -> MultiNormConfig:
    """Return a config whose epoch is one step on all 50 pictures."""
    return MultiNormConfig(**{**SMALL, "epochs": 1, "batch_size": 50, **changes})


def pictures(task: Task, count: int = 50) -> tuple[Tensor, Tensor]:
    """Return the first training batch as the loader orders it."""
    loader = Loader(task.splits["train"], batch_size=count, seed=0, device=torch.device("cpu"))
    batch = next(iter(loader.epoch(0)))
    return batch.inputs, batch.labels


# --- cost ----------------------------------------------------------------------------------------


@pytest.fixture
def passes() -> Iterator[Counter[str]]:
    """Count passes of whole models: forwards, and backwards with parameters frozen or not."""
    found: Counter[str] = Counter()

    def forward(module: nn.Module, _: Any) -> None:
        if type(module).__name__ == "Normalized":
            found["forward"] += 1

    def backward(module: nn.Module, _: Any) -> None:
        if type(module).__name__ == "Normalized":
            trains = any(parameter.requires_grad for parameter in module.parameters())
            found["to weights" if trains else "to inputs"] += 1

    hooks = (
        nn.modules.module.register_module_forward_pre_hook(forward),
        nn.modules.module.register_module_full_backward_pre_hook(backward),
    )
    yield found
    for hook in hooks:
        hook.remove()


K = 3
TABLE = {
    "error_weighted": (K + 1 + 1, K, 1),
    "uniform": (K + 1 + 1, K, 1),
    "alternate": (K + 1 + 1, K, 1),
    "max": (3 * (K + 1) + 1, 3 * K, 1),
    "avg": (3 * (K + 1) + 3, 3 * K, 3),
    "msd": (K * (1 + 3) + 1, K, 1),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_costs_what_the_table_says(
    scheme: Any,
    union: Task,
    fresh: Start,
    passes: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(multinorm, "validate_norms", lambda *_, **__: {"val/union": 0.0})
    config = one_batch(union, scheme=scheme, num_steps=K, epochs=2, batch_size=25)
    result = train(config, LocalContext(task=union, start=fresh))
    forwards, to_inputs, to_weights = TABLE[scheme]
    steps = 4
    assert passes["forward"] == steps * forwards
    assert passes["to inputs"] == steps * to_inputs
    assert passes["to weights"] == steps * to_weights
    # What is reported: passes of single images, 25 in a step.
    assert result.metrics["passes/forwards"] == 25 * passes["forward"]
    assert result.metrics["passes/backwards"] == 25 * (passes["to inputs"] + passes["to weights"])


def test_norms_may_have_their_own_numbers_of_steps(
    union: Task, fresh: Start, passes: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multinorm, "validate_norms", lambda *_, **__: {"val/union": 0.0})
    config = one_batch(
        union, scheme="alternate", batch_size=25, steps_per_norm={"Linf": 1, "L1": 4}
    )
    train(config, LocalContext(task=union, start=fresh))
    assert (passes["forward"], passes["to inputs"]) == ((1 + 1 + 1) + (4 + 1 + 1), 1 + 4)


def test_max_costs_about_three_times_the_attack_of_e_at(union: Task, robust: Start) -> None:
    forwards = {
        scheme: train(
            one_batch(union, scheme=scheme, num_steps=10, batch_size=25, val_start=False),
            LocalContext(task=union, start=robust),
        ).metrics["passes/forwards"]
        for scheme in ("error_weighted", "max")
    }
    assert forwards == {"error_weighted": 50 * 12, "max": 50 * 34}


# --- what a step computes ------------------------------------------------------------------------


def without_batch_norm(start: Start) -> Start:
    return dataclasses.replace(start, architecture="resnet4b", state=None)


def stepped(start: Start, points: list[Tensor], labels: Tensor, *, lr: float) -> dict[str, Tensor]:
    """Return the weights after one SGD step on the mean of the losses at ``points``."""
    model = start.build().train()
    loss = sum(functional.cross_entropy(model(point), labels) for point in points) / len(points)
    assert isinstance(loss, Tensor)
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()))
    with torch.no_grad():
        return {
            name: value - lr * (gradient + 5e-4 * value)
            for (name, value), gradient in zip(named.items(), gradients, strict=True)
        }


@pytest.mark.parametrize("scheme", ["max", "avg"])
@pytest.mark.parametrize("with_norm_layers", [False, True])
def test_max_and_avg_take_their_published_step(
    scheme: Any, with_norm_layers: bool, union: Task, fresh: Start
) -> None:
    start = fresh if with_norm_layers else without_batch_norm(fresh)
    config = one_batch(union, scheme=scheme, schedule=ScheduleConfig())
    result = train(config, LocalContext(task=union, start=start))

    inputs, labels = pictures(union)
    model = start.build()
    found = [
        train_apgd(model, inputs, labels, threat=threat, num_steps=2)
        for threat in sorted(THREATS, key=lambda threat: ("Linf", "L1", "L2").index(threat.norm))
    ]
    points = [result.inputs for result in found]
    if scheme == "max":
        chosen = []
        for image in range(50):
            losses = [float(result.loss[image]) for result in found]
            chosen.append(points[losses.index(max(losses))][image])
        points = [torch.stack(chosen)]
    for name, value in stepped(start, points, labels, lr=config.lr).items():
        torch.testing.assert_close(result.state[name], value, rtol=1e-4, atol=1e-6)
    assert result.choices["norms"] == "Linf+L1+L2"


def test_e_at_is_its_pseudo_code(union: Task, fresh: Start) -> None:
    """Section by section, with our seeds: probabilities, draw, attack, statistics, SGD."""
    start = without_batch_norm(fresh)
    config = MultiNormConfig(
        **{**SMALL, "augment": AugmentConfig(crop_padding=2)}, epochs=3, keep="last", lr=0.02
    )
    result = train(config, LocalContext(task=union, start=start))

    model = start.build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    radii = {"Linf": 0.05, "L1": 1.5}
    stats = {norm: [0, 0] for norm in radii}
    random = generator(0, "norm")
    loader = Loader(union.splits["train"], batch_size=16, seed=0, device=torch.device("cpu"))
    drawn = []
    for epoch in range(3):
        for step, batch in enumerate(loader.epoch(epoch)):
            t = epoch + (step + 1) / len(loader)
            for group in optimizer.param_groups:
                group["lr"] = 0.02 if t < 1 else 0.002 if t < 2 else 0.0002
            if all(seen for _, seen in stats.values()):
                weights = [1 - correct / seen for correct, seen in stats.values()]
            else:
                weights = [0.5, 0.5]
            position = float(torch.rand((), generator=random, dtype=torch.float64))
            drawn.append("Linf" if position < weights[0] / sum(weights) else "L1")
            inputs = augment(batch.inputs, batch.ids, config=config.augment, seed=0, epoch=epoch)
            attacked = apgd(
                model,
                inputs,
                batch.labels,
                norm=drawn[-1],  # type: ignore[arg-type]
                eps=radii[drawn[-1]],
                num_steps=2,
                start=inputs,
                keep="best_loss",
                initial_sparsity=0.05,
            )
            stats[drawn[-1]][0] += int(attacked.robust.sum())
            stats[drawn[-1]][1] += len(batch.labels)
            optimizer.zero_grad()
            functional.cross_entropy(model(attacked.inputs), batch.labels).backward()
            optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(result.state[name], value, rtol=1e-4, atol=1e-6)
    assert len(set(drawn)) == 2
    last = result.tables["epochs"][-1]
    assert last["sampler/L1_share"] == drawn[-4:].count("L1") / 4
    for norm, (correct, seen) in stats.items():
        assert last[f"sampler/{norm}_error"] == pytest.approx(1 - correct / seen)


def test_training_apgd_starts_at_the_clean_image_and_keeps_the_highest_loss(
    union: Task, robust: Start
) -> None:
    model = robust.build()
    inputs, labels = pictures(union)
    with torch.no_grad():
        clean = functional.cross_entropy(model(inputs), labels, reduction="none")
    for threat in THREATS:
        result = train_apgd(model, inputs, labels, threat=threat, num_steps=4)
        with torch.no_grad():
            loss = functional.cross_entropy(model(result.inputs), labels, reduction="none")
        torch.testing.assert_close(loss, result.loss, rtol=1e-4, atol=1e-5)
        assert (loss >= clean - 1e-5).all()
        assert (loss > clean).float().mean() > 0.9
        again = train_apgd(model, inputs, labels, threat=threat, num_steps=4)
        assert torch.equal(again.inputs, result.inputs)


# --- MSD -----------------------------------------------------------------------------------------


def candidates(points: Tensor, inputs: Tensor, slope: Tensor, share: float) -> dict[str, Tensor]:
    """Return the three steps of MSD from first principles, one image at a time."""
    found: dict[str, list[Tensor]] = {"L1": [], "L2": [], "Linf": []}
    for point, image, gradient in zip(points, inputs, slope, strict=True):
        kept = gradient.abs().flatten().sort(descending=True).values[:8][-1]
        largest = gradient.sign() * (gradient.abs() >= kept)
        moves = {
            "L1": 1.5 * share * largest / largest.abs().sum(),
            "L2": 0.4 * share * gradient / gradient.norm(),
            "Linf": 0.05 * share * gradient.sign(),
        }
        for threat in THREATS:
            delta = (point + moves[threat.norm] - image)[None]
            inside = project(delta, image[None], norm=threat.norm, eps=threat.eps)[0]
            found[threat.norm].append(image + inside)
    return {norm: torch.stack(images) for norm, images in found.items()}


def test_msd_climbs_with_the_best_of_three_steps_from_one_gradient(
    union: Task, robust: Start
) -> None:
    model = robust.build()
    inputs, labels = pictures(union, 24)
    found = multi_steepest_descent(
        model, inputs, labels, threats=THREATS, num_steps=3, step_size=0.5
    )
    points, best = inputs, inputs
    with torch.no_grad():
        logits = model(inputs)
    best_loss = functional.cross_entropy(logits, labels, reduction="none")
    robust_mask = logits.argmax(1) == labels
    winners: Counter[str] = Counter()
    for _ in range(3):
        leaf = points.clone().requires_grad_()
        loss = functional.cross_entropy(model(leaf), labels, reduction="sum")
        (slope,) = torch.autograd.grad(loss, leaf)
        options = candidates(points, inputs, slope, 0.5)
        with torch.no_grad():
            outputs = {norm: model(option) for norm, option in options.items()}
        losses = {
            norm: functional.cross_entropy(output, labels, reduction="none")
            for norm, output in outputs.items()
        }
        for output in outputs.values():
            robust_mask &= output.argmax(1) == labels
        rows = []
        for image in range(len(labels)):
            norm = max(("Linf", "L2", "L1"), key=lambda norm: float(losses[norm][image]))
            winners[norm] += 1
            rows.append((options[norm][image], losses[norm][image]))
        points = torch.stack([point for point, _ in rows])
        loss_now = torch.stack([loss for _, loss in rows])
        best = points.where((loss_now > best_loss).view(-1, 1, 1, 1), best)
        best_loss = torch.maximum(best_loss, loss_now)
    assert len(winners) > 1
    torch.testing.assert_close(found.inputs, best, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.loss, best_loss, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.robust, robust_mask)
    assert (found.num_forwards, found.num_backwards) == (12, 3)
    assert (found.total_forwards, found.total_backwards) == (12 * 24, 3 * 24)


class Cliff(nn.Module):
    """Logits [0, s, 0]: s has a slope everywhere, but its value only tells whether x has moved."""

    def __init__(self, jump: float) -> None:
        super().__init__()
        self.jump = jump

    def forward(self, inputs: Tensor) -> Tensor:
        moved = ((inputs - 0.5).abs().flatten(1).amax(1) > 1e-6).float()
        slope = (inputs - inputs.detach()).flatten(1).sum(1)
        zero = torch.zeros_like(slope)
        return torch.stack([zero, self.jump * moved + slope, zero], dim=1)


@pytest.mark.parametrize(("jump", "expected"), [(1.0, 0.525), (-1.0, 0.5)])
def test_where_losses_tie_msd_takes_linf_and_never_less_than_the_clean_loss(
    jump: float, expected: float
) -> None:
    inputs, labels = torch.full((2, 1, 12, 12), 0.5), torch.zeros(2, dtype=torch.long)
    found = multi_steepest_descent(
        Cliff(jump), inputs, labels, threats=THREATS, num_steps=1, step_size=0.5
    )
    torch.testing.assert_close(found.inputs, torch.full_like(inputs, expected))


@pytest.mark.parametrize("l1_step", ["exact", "published"])
def test_msd_stays_in_the_union_and_leaves_no_trace(
    l1_step: Any, union: Task, robust: Start
) -> None:
    model = robust.build().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs, labels = pictures(union)
    found = multi_steepest_descent(
        model,
        inputs,
        labels,
        threats=THREATS,
        num_steps=4,
        step_size=0.8,
        l1_step=l1_step,
        noise=generator(0, "msd"),
    )
    delta = (found.inputs - inputs).flatten(1)
    lengths = {"Linf": delta.abs().amax(1), "L2": delta.norm(dim=1), "L1": delta.abs().sum(1)}
    feasible = [lengths[threat.norm] <= threat.eps * (1 + 1e-4) for threat in THREATS]
    assert torch.stack(feasible).any(dim=0).all()
    assert 0 <= found.inputs.min() <= found.inputs.max() <= 1
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def onto_l1_ball(delta: Tensor, eps: float) -> Tensor:
    """Project one vector on the L1 ball by sorting."""
    sizes = delta.abs().sort(descending=True).values
    if sizes.sum() <= eps:
        return delta
    ranks = torch.arange(1, len(sizes) + 1)
    cuts = (sizes.cumsum(0) - eps) / ranks
    return delta.sign() * (delta.abs() - cuts[sizes > cuts][-1]).clamp(min=0)


def test_the_published_l1_step_moves_a_few_coordinates_and_clips_last() -> None:
    draw = torch.Generator().manual_seed(3)
    inputs = (torch.rand(6, 1, 12, 12, generator=draw) * 1.4 - 0.2).clamp(0, 1)
    slope = torch.randn(6, 1, 12, 12, generator=draw)
    threat = ThreatModel("L1", 1.0)

    def step(points: Tensor, seed: int) -> Tensor:
        noise = generator(seed, "msd")
        return _msd_step(points, inputs, slope, threat, 0.6, "published", noise)

    counts = set()
    for seed in range(8):
        count = int(torch.randint(5, 21, (), generator=generator(seed, "msd")))
        delta = (step(inputs, seed) - inputs).flatten(1)
        for moved, image, gradient in zip(delta, inputs, slope, strict=True):
            ahead = image + 0.6 / count * gradient.sign()
            room = (gradient.abs() * ((ahead >= 0) & (ahead <= 1))).flatten()
            expected = torch.zeros(144)
            expected[room.argsort(descending=True)[:count]] = 0.6 / count
            torch.testing.assert_close(moved, expected * gradient.flatten().sign())
        counts.add(count)
    assert len(counts) > 3
    # From a point outside: the projection on the ball alone, then the box.
    far = inputs + 0.3 * slope.sign()
    found = _msd_step(far, inputs, torch.zeros_like(slope), threat, 0.6, "published", generator(0))
    for result, point, image in zip(found, far, inputs, strict=True):
        plain = onto_l1_ball((point - image).flatten(), 1.0).view_as(image)
        torch.testing.assert_close(result, (image + plain).clamp(0, 1), rtol=0, atol=1e-5)


# --- the selection split -------------------------------------------------------------------------


def test_validation_is_the_union_of_what_each_norm_leaves(union: Task, robust: Start) -> None:
    threats = (ThreatModel("Linf", 0.15), ThreatModel("L2", 1.3), ThreatModel("L1", 7.0))
    context = LocalContext(task=union, start=robust)
    model = robust.build().train()
    measured = validate_norms(model, context, threats=threats, num_steps=5, batch_size=512)
    assert model.training
    split = union.splits["val"]
    inputs, labels = torch.from_numpy(split.images) / 255, torch.from_numpy(split.labels)
    model.eval()
    with torch.no_grad():
        survives = [model(inputs).argmax(1) == labels]
    for threat in threats:
        found = apgd(
            model, inputs, labels, norm=threat.norm, eps=threat.eps, num_steps=5, start=inputs
        )
        survives.append(survives[0] & found.robust)
    expected = [float(mask.float().mean()) for mask in survives]
    together = float(torch.stack(survives).all(dim=0).float().mean())
    assert list(measured) == ["val/clean", "val/Linf", "val/L2", "val/L1", "val/union"]
    assert list(measured.values()) == pytest.approx([*expected, together])
    assert 0 < together < expected[0]
    small = validate_norms(model, context, threats=threats, num_steps=5, batch_size=4)
    assert small == measured
    assert validate_norms(model, context, threats=(), num_steps=5, batch_size=512) == {
        "val/clean": measured["val/clean"]
    }


def test_keep_chooses_by_the_union_on_val(union: Task, robust: Start) -> None:
    results = {
        keep: train(
            MultiNormConfig(**SMALL, epochs=4, keep=keep, lr=0.2),  # type: ignore[arg-type]
            LocalContext(task=union, start=robust),
        )
        for keep in ("best", "last")
    }
    start, *epochs = results["best"].tables["epochs"]
    scores = [row["val/union"] for row in epochs]
    assert results["best"].choices["epoch"] == scores.index(max(scores)) + 1
    assert results["last"].choices["epoch"] == 4
    assert results["last"].metrics["val/union"] == scores[-1]
    # Epoch 0 is the start, attacked the same way.
    assert start["epoch"] == 0
    assert results["best"].metrics["val/start_union"] == start["val/union"]
    assert results["best"].metrics["val/robust"] == max(scores)
    assert set(METHODS["multinorm"].metrics) <= set(results["best"].metrics)


def test_every_threat_of_the_task_is_validated_not_only_the_trained(
    union: Task, fresh: Start
) -> None:
    context = LocalContext(task=union, start=fresh)
    config = MultiNormConfig(**SMALL, norms=("L1",), epochs=2, eval_every=2)
    result = train(config, context)
    assert {"val/Linf", "val/L2", "val/L1"} <= set(result.metrics)
    assert result.choices["norms"] == "L1"
    assert ["val/union" in row for row in result.tables["epochs"]] == [False, True]
    assert result.tables["epochs"][0]["sampler/L1_share"] == 1.0
    # A fresh start is not measured: there is nothing to see.
    assert "val/start_clean" not in result.metrics


def test_val_start_spares_the_attacks_on_the_start(union: Task, robust: Start) -> None:
    config = MultiNormConfig(**SMALL, epochs=1, val_start=False)
    result = train(config, LocalContext(task=union, start=robust))
    assert set(result.tables["epochs"][0]) == {"epoch", "val/clean"}


# --- rates, groups and clean training ------------------------------------------------------------


def test_the_rate_is_read_as_in_the_published_code(union: Task, fresh: Start) -> None:
    context = LocalContext(task=union, start=fresh)
    train(MultiNormConfig(**SMALL, norms=("Linf",), lr=0.5), context)
    # The last of an epoch's four steps already has the next epoch's rate.
    assert [report["lr"] for report in context.reports] == pytest.approx([0.05, 0.005, 0.005])


def test_legacy_group_lr_leaves_vectors_at_rate_one(union: Task, fresh: Start) -> None:
    rates = {}
    for legacy in (False, True):
        context = LocalContext(task=union, start=fresh)
        config = one_batch(
            union,
            norms=("Linf",),
            epochs=2,
            legacy_group_lr=legacy,
            optimizer=OptimizerConfig(decayed="weights"),
            schedule=ScheduleConfig(),
        )
        train(config, context)
        rates[legacy] = [group["lr"] for group in context.engine.optimizer.param_groups]
    assert rates == {False: [0.05, 0.05], True: [0.05, 1.0]}


def test_clean_training_is_only_done_when_said(
    union: Task, fresh: Start, caplog: pytest.LogCaptureFixture, passes: Counter[str]
) -> None:
    config = MultiNormConfig(**SMALL, attack="none", epochs=1)
    result = train(config, LocalContext(task=union, start=fresh))
    assert "this is clean training" in caplog.text
    assert passes["to weights"] == 4
    assert result.metrics["passes/forwards"] == 50
    assert result.metrics["passes/backwards"] == 50
    assert (result.choices["scheme"], result.choices["norms"]) == ("none", "")
    assert "sampler/Linf_share" not in result.tables["epochs"][0]


# --- resuming ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("scheme", "stop_after"),
    [("error_weighted", 1), ("error_weighted", 3), ("alternate", 1), ("msd", 1)],
)
def test_resumed_equals_undisturbed_bit_for_bit(
    scheme: Any, stop_after: int, union: Task, robust: Start, tmp_path: Any
) -> None:
    config = MultiNormConfig(
        **SMALL, scheme=scheme, epochs=3, lr=0.2, msd_l1_step="published", seed=5
    )
    assert_resumes(config, stop_after, union, robust, tmp_path)


def test_resumed_with_masks_equals_undisturbed_bit_for_bit(
    union: Task, robust: Start, tmp_path: Any
) -> None:
    config = MultiNormConfig(**SMALL, optimizer=ROSE, epochs=2, lr=0.01)
    rows = assert_resumes(config, 1, union, robust, tmp_path).tables["epochs"]
    assert [0 < row["mask/kept"] < 1 for row in rows[1:]] == [True, True]


def assert_resumes(
    config: MultiNormConfig, stop_after: int, union: Task, robust: Start, tmp_path: Any
) -> Result:
    """Check that a run which dies and goes on is the one that does not die; return that one."""
    whole = train(config, LocalContext(task=union, start=robust))
    first = StoppingContext(task=union, start=robust, stop_after=stop_after)
    with pytest.raises(Stopped):
        train(config, first)
    torch.manual_seed(999)  # Whatever happened to the global generator in between.
    torch.save(first.checkpoint, tmp_path / "checkpoint.pt")
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second = LocalContext(task=union, start=robust, checkpoint=checkpoint)
    resumed = train(config, second)
    assert len(second.reports) == config.epochs - stop_after
    assert resumed.metrics == whole.metrics
    assert resumed.tables == whole.tables
    assert resumed.choices == whole.choices
    assert all(torch.equal(resumed.state[name], whole.state[name]) for name in whole.state)
    return whole


# --- with ROSE's masks ---------------------------------------------------------------------------


def test_masks_hold_back_the_weights_that_they_should(union: Task, robust: Start) -> None:
    """The first of two steps keeps all, so only the kernels frozen in the second can differ."""
    states, rows = {}, {}
    for upper in (100.0, 60.0):
        config = MultiNormConfig(
            **{**SMALL, "batch_size": 25},
            optimizer=dataclasses.replace(ROSE, upper=upper),
            schedule=ScheduleConfig(),
            epochs=1,
            lr=0.01,
        )
        context = LocalContext(task=union, start=robust)
        result = train(config, context)
        states[upper], rows[upper] = result.state, result.tables["epochs"][-1]
        assert context.reports[-1]["mask/kept"] == rows[upper]["mask/kept"]
    kernels = {name for name, value in states[60.0].items() if value.ndim > 1 and "layer" in name}
    differing = {
        name for name, value in states[60.0].items() if not torch.equal(value, states[100.0][name])
    }
    kept = (len(kernels) - 1) * 60 // 100 + 1
    assert len(kernels) > 5
    assert differing < kernels
    assert len(differing) == len(kernels) - kept
    assert (rows[100.0]["mask/kept"], rows[100.0]["mask/churn"]) == (1.0, 0.0)
    assert rows[60.0]["mask/kept"] == pytest.approx((1 + kept / len(kernels)) / 2)
    assert rows[60.0]["mask/churn"] == pytest.approx(1 - kept / len(kernels))


def test_without_rose_nothing_is_said_of_masks(union: Task, fresh: Start) -> None:
    result = train(MultiNormConfig(**SMALL, epochs=1), LocalContext(task=union, start=fresh))
    assert not [name for row in result.tables["epochs"] for name in row if "mask" in name]


# --- what it is for ------------------------------------------------------------------------------


def test_e_at_brings_the_missing_norm_and_draws_the_harder_one(union: Task, fresh: Start) -> None:
    hard = dataclasses.replace(
        union,
        # The training split has more pictures to judge by.
        splits={**union.splits, "val": union.splits["train"]},
        threat_models=(ThreatModel("Linf", 0.12), ThreatModel("L1", 7.0)),
    )
    config = MultiNormConfig(
        **{**SMALL, "num_steps": 3, "val_steps": 6}, epochs=8, eval_every=10, keep="last"
    )
    start = train(
        dataclasses.replace(config, norms=("Linf",), epochs=10),
        LocalContext(task=hard, start=fresh),
    )
    config = dataclasses.replace(config, schedule=ScheduleConfig(name="halfway"))
    tuned = dataclasses.replace(fresh, state=start.state)
    result = train(config, LocalContext(task=hard, start=tuned))
    before, after = start.metrics, result.metrics
    assert before["val/Linf"] > 0.9
    assert before["val/L1"] == before["val/union"] < 0.5
    assert after["val/L1"] > before["val/L1"] + 0.2
    assert after["val/union"] > before["val/union"] + 0.2
    last = result.tables["epochs"][-1]
    assert last["sampler/L1_error"] > last["sampler/Linf_error"]
    assert last["sampler/L1_share"] > last["sampler/Linf_share"]


# --- starts and errors ---------------------------------------------------------------------------


def test_a_start_that_only_guesses_is_pointed_out(
    union: Task, fresh: Start, robust: Start, caplog: pytest.LogCaptureFixture
) -> None:
    config = MultiNormConfig(**SMALL, epochs=1)
    broken = dataclasses.replace(fresh, state=fresh.build().state_dict())
    train(config, LocalContext(task=union, start=broken))
    assert "which guessing among 3 classes would be" in caplog.text
    caplog.clear()
    for start in (robust, fresh):
        train(config, LocalContext(task=union, start=start))
    assert "guessing" not in caplog.text


def test_the_published_layout_is_a_start(tmp_path: Any) -> None:
    """``pretr_Linf.pth``: a bare state dict, without normalisation."""
    shape: dict[str, Any] = {"num_classes": 10, "image_shape": (3, 32, 32)}
    network = preact_resnet18_softplus(**shape).eval()
    torch.save(network.state_dict(), tmp_path / "pretr_Linf.pth")
    start = load_start(
        tmp_path / "pretr_Linf.pth",
        architecture="preact_resnet18_softplus",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        **shape,
    )
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(start.build()(image), network(image))


def test_a_norm_without_eps_is_refused(task: Task, fresh: Start) -> None:
    context = LocalContext(task=task, start=fresh)
    with pytest.raises(ConfigError, match=r"norms = Linf, L1: the task gives no eps for L1; add"):
        train(MultiNormConfig(**SMALL), context)
    for scheme in ("uniform", "max"):
        train(MultiNormConfig(**SMALL, scheme=scheme, epochs=1), context)  # type: ignore[arg-type]


def test_more_norms_than_batches_are_refused(union: Task, fresh: Start) -> None:
    context = LocalContext(task=union, start=fresh)
    with pytest.raises(ConfigError, match="1 batches cannot draw 3 norms: lower batch_size = 50"):
        train(one_batch(union, scheme="uniform"), context)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("error_weighted", ["Linf", "L1"]),
        ("alternate", ["Linf", "L1"]),
        ("uniform", ["Linf", "L1", "L2"]),
        ("max", ["Linf", "L1", "L2"]),
        ("avg", ["Linf", "L1", "L2"]),
        ("msd", ["Linf", "L1", "L2"]),
    ],
)
def test_each_scheme_has_the_norms_of_the_paper(
    scheme: Any, expected: list[str], union: Task
) -> None:
    threats = MultiNormConfig(scheme=scheme).threats(union)
    assert [threat.norm for threat in threats] == expected
    chosen = MultiNormConfig(scheme=scheme, norms=("L2", "L1")).threats(union)
    assert chosen == (ThreatModel("L2", 0.4), ThreatModel("L1", 1.5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": "sat"}, "unknown value of scheme 'sat'"),
        ({"norms": ("Linf", "Linf")}, "each only once"),
        ({"norms": ()}, "name at least one"),
        ({"attack": "pgd"}, "did you mean 'apgd'"),
        ({"steps_per_norm": {"L3": 5}}, "norm in steps_per_norm 'L3'"),
        ({"steps_per_norm": {"L1": 0}}, "steps_per_norm.L1 = 0: a whole number >= 1"),
        ({"steps_per_norm": {"L1": 5}, "scheme": "msd"}, "no effect on 'msd'"),
        ({"legacy_group_lr": True}, "needs optimizer.decayed = 'weights'"),
        ({"msd_step_size": 0.0}, "msd_step_size = 0.0: must be a number > 0"),
        ({"lr": 0.0}, "lr = 0.0: must be a number > 0"),
        ({"num_steps": 0}, "num_steps = 0: must be a whole number >= 1"),
        ({"keep": "lst"}, "did you mean 'last'"),
    ],
)
def test_options_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MultiNormConfig(**fields)
