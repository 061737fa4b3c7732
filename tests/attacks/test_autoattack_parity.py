"""Our attacks against the official ones, as the package pyautoattack ships them."""

import logging

import pytest
import torch
from attack_toys import convolutional
from torch import Tensor, nn
from torch.nn import functional

from robustft.attacks import apgd, attack_plan, autoattack, project
from robustft.attacks.official import _attack, _Watched
from robustft.attacks.problem import Problem

official = pytest.importorskip(
    "pyautoattack.autopgd_base", reason="needs the extra robustft[autoattack]"
)

RADII = {"Linf": 4 / 255, "L2": 0.3, "L1": 1.5}
QUIET = logging.Logger("official", level=logging.CRITICAL)  # else a Python warning: zero gradients


class Recording(nn.Module):
    """Keeps every batch of points that a model sees."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[Tensor] = []

    def forward(self, points: Tensor) -> Tensor:
        self.seen.append(points.detach().clone())
        return self.model(points)


def case(norm: str) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    model = convolutional(norm=False)
    inputs = (torch.rand(48, 2, 8, 8, generator=generator) * 1.4 - 0.2).clamp(0, 1)
    labels = model(inputs).argmax(1)
    labels[:4] = (labels[:4] + 1) % 10
    noise = torch.randn(inputs.shape, generator=generator)
    start = inputs + project(noise, inputs, norm=norm, eps=RADII[norm])
    return model, inputs, labels, start.clamp(0, 1)


def official_attack(
    model: nn.Module, norm: str, loss: str, num_steps: int, **options: object
) -> object:
    return official.APGDAttack(
        model,
        n_iter=num_steps,
        norm=norm,
        eps=RADII[norm],
        loss=loss,
        device="cpu",
        seed=0,
        logger=QUIET,
        **options,
    )


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("num_steps", [1, 5, 20])
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


def same_path(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """Where all points that a sample went through agree, bool ``[n]``.

    The rounding of a level of the projection can decide whether a coordinate is counted as
    changed; a sample in which that happens goes another way from there on.
    """
    assert len(ours) == len(theirs)
    pairs = zip(ours, theirs, strict=True)
    return torch.stack([(a - b).abs().flatten(1).amax(1) <= 1e-6 for a, b in pairs]).all(0)


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("num_steps", [1, 5, 20, 50])
def test_l1_same_start_same_path(loss: str, num_steps: int) -> None:
    model, inputs, labels, start = case("L1")
    theirs, ours = Recording(model), Recording(model)
    attack = official_attack(theirs, "L1", loss, num_steps)
    attack.init_hyperparam(inputs)
    _, robust, best_loss, _ = attack.attack_single_run(inputs, labels, x_init=start)
    options = {"norm": "L1", "eps": RADII["L1"], "num_steps": num_steps, "loss": loss}
    options |= {"start": start, "keep": "best_loss"}
    result = apgd(ours, inputs, labels, l1_compat_rounding=True, **options)
    same = same_path(ours.seen, theirs.seen)
    assert same.sum() >= 45
    assert 0 < robust.sum() < len(robust)
    assert torch.equal(result.robust, robust)
    if loss == "ce":  # DLR divides by a difference of logits that may be nearly 0
        torch.testing.assert_close(result.loss[same], best_loss[same], rtol=2e-6, atol=0)
    plain = apgd(model, inputs, labels, **options)
    assert torch.equal(plain.robust, robust)
    if loss == "ce":
        torch.testing.assert_close(plain.loss, best_loss, rtol=0, atol=0.07)


def same_noise(monkeypatch: pytest.MonkeyPatch, inputs: Tensor, starts: Tensor) -> None:
    """Let the official large-eps schedule start at the given points."""

    def noise(like: Tensor) -> Tensor:
        return (starts - inputs)[rows_of(like, inputs)]

    monkeypatch.setattr(torch, "randn_like", noise)


def rows_of(some: Tensor, inputs: Tensor) -> Tensor:
    return (some.flatten(1)[:, None] == inputs.flatten(1)).all(2).int().argmax(1)


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("num_steps", [5, 20])
def test_l1_schedule_of_radii(loss: str, num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, labels, _ = case("L1")
    options = {"norm": "L1", "eps": RADII["L1"], "num_steps": num_steps, "loss": loss}
    ours, theirs = Recording(model), Recording(model)
    result = apgd(ours, inputs, labels, large_eps_schedule=True, l1_compat_rounding=True, **options)
    same_noise(monkeypatch, inputs, ours.seen[0])
    attack = official_attack(theirs, "L1", loss, num_steps, use_largereps=True)
    found = attack.perturb(inputs, labels).detach()
    correct = model(inputs).argmax(1) == labels
    robust = correct & (model(found).argmax(1) == labels)
    assert 0 < robust.sum() < correct.sum()
    assert (result.robust[correct] != robust[correct]).sum() == 0
    # Their first pass classifies the clean inputs, and only the correct ones are attacked.
    same = same_path([points[correct] for points in ours.seen], theirs.seen[1:])
    assert same.sum() >= correct.sum() - 3


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("num_steps", [5, 20])
def test_targeted(norm: str, num_steps: int) -> None:
    model, inputs, labels, start = case(norm)
    losses = torch.full((48,), float("-inf"))

    class SameStart(official.APGDAttack_targeted):
        def attack_single_run(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            rows = rows_of(x, inputs)
            found = super().attack_single_run(x, y, x_init=start[rows])
            losses[rows] = torch.maximum(losses[rows], found[2])
            return found

    attack = SameStart(
        model,
        n_iter=num_steps,
        norm=norm,
        eps=RADII[norm],
        n_target_classes=9,
        device="cpu",
        logger=QUIET,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        found = attack.perturb(inputs, labels)
    robust = model(found).argmax(1) == labels
    result = apgd(
        model,
        inputs,
        labels,
        norm=norm,
        eps=RADII[norm],
        num_steps=num_steps,
        loss="dlr-targeted",
        start=start,
        check_clean=True,
        l1_compat_rounding=True,
    )
    assert 0 < robust.sum() < 44
    assert torch.equal(result.robust, robust)
    close = (result.loss - losses)[robust].abs() <= 1e-4
    assert close.sum() >= robust.sum() - 1
    ours = result.inputs.where(~result.robust.view(-1, 1, 1, 1), inputs)
    same = (ours - found).abs().flatten(1).amax(1) <= 1e-5
    assert same.sum() >= 45


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


SETTINGS = {
    "apgd": ("n_iter", "n_restarts", "eot_iter", "use_largereps", "thr_decr", "loss"),
    "fab": ("n_iter", "n_restarts", "targeted", "n_target_classes", "alpha_max", "eta", "beta"),
    "square": ("n_queries", "n_restarts", "p_init", "rescale_schedule", "loss", "targeted"),
}


@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_plans_are_the_official_ones(version: str, norm: str) -> None:
    """The package's attacks, set up from our plan, are those that its own versions set up."""
    model, inputs, labels, _ = case(norm)
    package = pytest.importorskip("pyautoattack.autoattack")
    suite = package.AutoAttack(model, norm=norm, eps=RADII[norm], version=version, seed=7)
    problem = Problem.build(
        "autoattack",
        model,
        inputs,
        labels,
        norm=norm,
        eps=RADII[norm],
        loss="margin",
        generator=None,
        sample_ids=None,
    )
    plan = attack_plan(version, norm)
    assert list(plan) == suite.attacks_to_run
    for name, step in plan.items():
        # What its driver sets before it runs each of them.
        theirs = {
            "apgd-ce": suite.apgd,
            "apgd-dlr": suite.apgd,
            "apgd-t": suite.apgd_targeted,
            "fab": suite.fab,
            "fab-t": suite.fab,
            "square": suite.square,
        }[name]
        expected = {setting: getattr(theirs, setting) for setting in SETTINGS[step["attack"]]}
        if step["attack"] == "fab":
            expected["targeted"] = name == "fab-t"
            expected["n_restarts"] = 1 if name == "fab-t" else theirs.n_restarts
            if name == "fab":
                del expected["n_target_classes"]
        if name in ("apgd-ce", "apgd-dlr"):
            expected["loss"] = name.removeprefix("apgd-")
        if name == "apgd-t":
            expected["n_target_classes"] = theirs.n_target_classes
        ours = _attack(package, _Watched(problem), step, num_classes=10, seed=7)
        assert type(ours) is type(theirs)
        assert {setting: getattr(ours, setting) for setting in expected} == expected
        assert (ours.norm, ours.eps, ours.seed) == (norm, RADII[norm], 7)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that has learnt ten noisy patterns, and 60 points that are mostly correct."""
    generator = torch.Generator().manual_seed(11)
    patterns = 0.25 + 0.5 * torch.rand(10, 2, 8, 8, generator=generator)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(10, (count,), generator=generator)
        noise = 0.25 * torch.randn(count, 2, 8, 8, generator=generator)
        return (patterns[labels] + noise).clamp(0, 1), labels

    model = convolutional(norm=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        images, labels = draw(64)
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, *draw(60)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.04), ("L2", 0.4), ("L1", 1.0)])
def test_both_backends_find_the_same(
    norm: str, eps: float, trained: tuple[nn.Module, Tensor, Tensor]
) -> None:
    model, inputs, labels = trained
    options = {"norm": norm, "eps": eps, "num_steps": 10, "num_queries": 30, "batch_size": 25}
    native = autoattack(model, inputs, labels, **options)
    other = autoattack(model, inputs, labels, backend="pyautoattack", **options)
    clean = int((model(inputs).argmax(1) == labels).sum())
    assert 50 < clean < 60
    assert list(native.standing) == list(other.standing)
    for result in (native, other):
        counts = [clean, *result.standing.values()]
        assert counts == sorted(counts, reverse=True)
        assert 10 < counts[-1] < clean - 10
        assert counts[-1] == result.robust.sum()
    assert (native.robust != other.robust).sum() <= 1
