"""The draw of norms, and the L2 ball that two other balls bring along."""

import logging
import math
from typing import Any

import pytest
import torch

from robustft.errors import CheckpointError, ConfigError
from robustft.methods.norm_sampler import NormSampler, hull_l2_radius

NORMS = ("Linf", "L1")


def sampler_with(correct: dict[str, int], *, seed: int = 0) -> NormSampler:
    """Return a sampler that has seen 100 images in every norm."""
    sampler = NormSampler(tuple(correct), seed=seed)  # type: ignore[arg-type]
    for norm, count in correct.items():
        sampler.update(norm, correct=count, seen=100)  # type: ignore[arg-type]
    return sampler


def shares(sampler: NormSampler, draws: int = 4000) -> dict[str, float]:
    drawn = [sampler.draw() for _ in range(draws)]
    return {norm: drawn.count(norm) / draws for norm in sampler.norms}


# --- hull_l2_radius ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eps_l1", "eps_linf", "radius"),
    [
        (12, "8/255", 0.61377),  # CIFAR-10, above its L2 budget 0.5
        (255, "4/255", 2.00001),  # ImageNet, its L2 budget 2
        ("3", "2/255", 0.61377 / 4),
        (10, 0.1, 1.0),
        (0.7, 0.7, 0.7),
    ],
)
def test_hull_radius_known_values(eps_l1: Any, eps_linf: Any, radius: float) -> None:
    assert hull_l2_radius(eps_l1, eps_linf) == pytest.approx(radius, abs=5e-6)


@pytest.mark.parametrize(("eps_l1", "eps_linf"), [(0.55, 0.1), (0.3, 0.1), (0.37, 0.1)])
def test_hull_radius_is_the_smallest_support_of_the_hull(eps_l1: float, eps_linf: float) -> None:
    """max(eps_l1 max|w_i|, eps_linf sum|w_i|) is least at k equal entries and one smaller."""

    def support(direction: torch.Tensor) -> torch.Tensor:
        unit = direction / direction.norm(dim=1, keepdim=True)
        return torch.maximum(eps_l1 * unit.abs().amax(1), eps_linf * unit.abs().sum(1))

    shapes = torch.tensor(
        [[1.0] * k + [last / 500] + [0.0] * (11 - k) for k in range(1, 12) for last in range(501)],
        dtype=torch.float64,
    )
    draws = torch.randn(20_000, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    radius = hull_l2_radius(eps_l1, eps_linf)
    assert support(shapes).min().item() == pytest.approx(radius, rel=1e-5)
    assert support(draws).min().item() > radius


@pytest.mark.parametrize(("eps_l1", "eps_linf"), [(0, 0.1), (1, 0), (-1, 0.1), (math.inf, 0.1)])
def test_hull_radius_needs_positive_radii(eps_l1: float, eps_linf: float) -> None:
    with pytest.raises(ConfigError, match="both must be > 0"):
        hull_l2_radius(eps_l1, eps_linf)


# --- probabilities and draws ---------------------------------------------------------------------


def test_probabilities_follow_the_running_robust_error() -> None:
    sampler = sampler_with({"Linf": 80, "L2": 90, "L1": 30})
    assert sampler.errors() == pytest.approx({"Linf": 0.2, "L2": 0.1, "L1": 0.7})
    assert sampler.probabilities() == pytest.approx({"Linf": 0.2, "L2": 0.1, "L1": 0.7})
    # The whole run counts, by images and not by batches: 0.2 becomes (20 + 300) / 400.
    sampler.update("Linf", correct=0, seen=300)
    assert sampler.errors()["Linf"] == pytest.approx(0.8)
    assert sum(sampler.probabilities().values()) == pytest.approx(1.0)
    assert sampler.probabilities()["L1"] == pytest.approx(0.7 / 1.6)


@pytest.mark.parametrize(
    ("correct", "expected"),
    [
        ({"Linf": 75, "L1": 25}, {"Linf": 0.25, "L1": 0.75}),
        ({"Linf": 75, "L2": 100, "L1": 25}, {"Linf": 0.25, "L2": 0.0, "L1": 0.75}),
        ({"L1": 0}, {"L1": 1.0}),
    ],
)
def test_draws_have_these_probabilities(
    correct: dict[str, int], expected: dict[str, float]
) -> None:
    found = shares(sampler_with(correct))
    for norm, share in expected.items():
        deviation = math.sqrt(share * (1 - share) / 4000)
        assert abs(found[norm] - share) <= 4 * deviation


def test_the_draw_is_uniform_until_every_norm_has_been_drawn() -> None:
    sampler = NormSampler(("Linf", "L2", "L1"))
    sampler.update("Linf", correct=99, seen=100)
    sampler.update("L2", correct=1, seen=100)
    assert list(sampler.probabilities().values()) == [1 / 3] * 3
    sampler.update("L1", correct=0, seen=100)
    assert sampler.probabilities()["L1"] == pytest.approx(1 / 2)


def test_uniform_does_not_look_at_errors() -> None:
    sampler = NormSampler(NORMS, "uniform")
    sampler.update("Linf", correct=100, seen=100)
    sampler.update("L1", correct=0, seen=100)
    assert shares(sampler)["Linf"] == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 4000))


def test_alternate_goes_round() -> None:
    sampler = NormSampler(("Linf", "L2", "L1"), "alternate")
    assert [sampler.draw() for _ in range(7)] == ["Linf", "L2", "L1", "Linf", "L2", "L1", "Linf"]


def test_no_error_at_all_falls_back_to_uniform_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sampler = sampler_with({"Linf": 100, "L1": 100})
    with caplog.at_level(logging.INFO, logger="robustft"):
        found = shares(sampler)
    assert found["Linf"] == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 4000))
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "no training image has been misclassified under any of Linf, L1 so far"
    ]
    sampler.update("L1", correct=99, seen=100)
    assert sampler.probabilities() == {"Linf": 0.0, "L1": 1.0}


def test_draws_depend_on_the_seed_alone() -> None:
    def draws(seed: int) -> list[str]:
        sampler = sampler_with({"Linf": 50, "L1": 50}, seed=seed)
        torch.rand(3)  # Not on the global generator.
        return [sampler.draw() for _ in range(40)]

    assert draws(0) == draws(0)
    assert draws(0) != draws(1)


def test_tensors_count_like_numbers() -> None:
    sampler = NormSampler(NORMS)
    for norm, correct in (("Linf", 80), ("L1", 40)):
        sampler.update(norm, torch.tensor(correct), torch.tensor(100))  # type: ignore[arg-type]
    assert sampler.state_dict()["correct"] == {"Linf": 80, "L1": 40}
    assert sampler.probabilities() == pytest.approx({"Linf": 0.25, "L1": 0.75})
    assert sampler.batches == {"Linf": 1, "L1": 1}


# --- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["error_weighted", "uniform", "alternate"])
def test_a_restored_sampler_goes_on_as_the_old_one(schedule: Any, tmp_path: Any) -> None:
    def steps(sampler: NormSampler, count: int) -> list[str]:
        drawn = []
        for step in range(count):
            drawn.append(sampler.draw())
            sampler.update(drawn[-1], correct=(7 * step) % 10, seen=10)  # type: ignore[arg-type]
        return drawn

    sampler = NormSampler(("Linf", "L2", "L1"), schedule)
    steps(sampler, 13)
    torch.save(sampler.state_dict(), tmp_path / "sampler.pt")
    other = NormSampler(("Linf", "L2", "L1"), schedule, seed=99)
    other.load_state_dict(torch.load(tmp_path / "sampler.pt", weights_only=True))
    assert steps(other, 20) == steps(sampler, 20)
    assert other.errors() == sampler.errors()
    assert other.batches == sampler.batches


def test_a_state_of_other_norms_is_refused() -> None:
    state = NormSampler(("Linf", "L2")).state_dict()
    with pytest.raises(CheckpointError, match="resume with the old settings"):
        NormSampler(NORMS).load_state_dict(state)
    with pytest.raises(CheckpointError, match="uniform"):
        NormSampler(("Linf", "L2"), "uniform").load_state_dict(state)


@pytest.mark.parametrize(
    ("norms", "schedule", "message"),
    [
        ((), "uniform", "name at least one"),
        (("Linf", "Linf"), "uniform", "each only once"),
        (("Linf", "L3"), "uniform", "unknown norm 'L3'"),
        (NORMS, "unifrom", "did you mean 'uniform'"),
    ],
)
def test_a_sampler_of_nonsense_is_refused(norms: Any, schedule: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NormSampler(norms, schedule)


def test_a_norm_that_is_not_drawn_cannot_be_counted() -> None:
    with pytest.raises(ConfigError, match="norm of this sampler"):
        NormSampler(NORMS).update("L2", correct=1, seen=1)
