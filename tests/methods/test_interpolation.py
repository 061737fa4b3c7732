"""The straight line between two models, and the point chosen on it."""

import pytest
import torch

from robustft.errors import ConfigError
from robustft.methods.rift import interpolate, select_alpha


def state(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(50, generator=draw),
        "running_var": torch.rand(5, generator=draw, dtype=torch.float64),
        "num_batches_tracked": torch.tensor(10 * seed),
        "mask": torch.tensor([True, seed == 1]),
    }


def test_ends_are_exact_and_integers_are_the_starts() -> None:
    a, b = state(1), state(2)
    at_zero, at_one = interpolate(a, b, 0.0), interpolate(a, b, 1.0)
    assert all(torch.equal(at_zero[name], a[name]) for name in a)
    for name in ("weight", "running_var"):
        assert torch.equal(at_one[name], b[name])
    for result in (at_one, interpolate(a, b, 0.3)):
        assert result["num_batches_tracked"].item() == 10
        assert torch.equal(result["mask"], a["mask"])


def test_between_is_the_weighted_mean_running_statistics_included() -> None:
    a, b = state(1), state(2)
    for alpha in (0.1, 0.3, 0.7):
        result = interpolate(a, b, alpha)
        for name in ("weight", "running_var"):
            assert result[name].dtype == a[name].dtype
            torch.testing.assert_close(result[name], (1 - alpha) * a[name] + alpha * b[name])


def test_equal_entries_come_back_bit_for_bit() -> None:
    a = state(1)
    for step in range(11):
        result = interpolate(a, state(1), step / 10)
        assert all(torch.equal(result[name], a[name]) for name in a)


def test_the_result_shares_no_memory() -> None:
    a, b = state(1), state(2)
    for alpha in (0.0, 0.5, 1.0):
        result = interpolate(a, b, alpha)
        for value in result.values():
            value.zero_()
        assert a["weight"].abs().sum() > 0
        assert b["weight"].abs().sum() > 0


def test_misfits_are_refused() -> None:
    a, b = state(1), state(2)
    with pytest.raises(ConfigError, match=r"alpha = 1\.5"):
        interpolate(a, b, 1.5)
    with pytest.raises(ConfigError, match="alpha = nan"):
        interpolate(a, b, float("nan"))
    with pytest.raises(ConfigError, match="differ in extra"):
        interpolate(a, {**b, "extra": torch.zeros(1)}, 0.5)
    with pytest.raises(ConfigError, match="differ in weight"):
        interpolate(a, {**b, "weight": torch.zeros(3)}, 0.5)


@pytest.mark.parametrize(
    ("curve", "tolerance", "expected"),
    [
        # The cleanest point that keeps its robustness.
        ([(0, 0.80, 0.50), (0.5, 0.82, 0.50), (1, 0.85, 0.40)], 0.001, 0.5),
        # Nothing qualifies but the start.
        ([(0, 0.80, 0.50), (0.5, 0.90, 0.40), (1, 0.95, 0.30)], 0.001, 0.0),
        # The start is already cleanest.
        ([(0, 0.80, 0.50), (0.5, 0.79, 0.60)], 0.001, 0.0),
        # Equal clean accuracy: the more robust one; equal in both: the smaller alpha.
        ([(0, 0.80, 0.50), (0.4, 0.82, 0.50), (0.6, 0.82, 0.51)], 0.001, 0.6),
        ([(0, 0.80, 0.50), (0.4, 0.82, 0.51), (0.6, 0.82, 0.51)], 0.001, 0.4),
        # Exactly at the limit, where floating point subtracts to the wrong side.
        ([(0, 0.80, 0.538), (1, 0.90, 0.537)], 0.001, 1.0),
        ([(0, 0.80, 0.3), (1, 0.90, 0.2)], 0.1, 1.0),
        ([(0, 0.80, 0.5381), (1, 0.90, 0.537)], 0.001, 0.0),
        ([(0, 0.80, 0.010), (1, 0.90, 0.009)], 0.001, 1.0),
        ([(0, 80.0, 10.3), (0.7, 90.0, 10.2)], 0.1, 0.7),
        # No tolerance, order of rows, a collapsed point.
        ([(1, 0.9, 0.5), (0, 0.8, 0.5)], 0.0, 1.0),
        ([(0, 0.8, 0.5), (0.5, float("nan"), 0.5), (1, 0.9, float("nan"))], 0.001, 0.0),
    ],
)
def test_choice(curve: list[tuple[float, float, float]], tolerance: float, expected: float) -> None:
    assert select_alpha(curve, tolerance=tolerance) == expected
    rows = [dict(zip(("alpha", "clean", "robust"), point, strict=True)) for point in curve]
    assert select_alpha(rows, tolerance=tolerance) == expected
    assert select_alpha(rows[::-1], tolerance=tolerance) == expected


def test_a_curve_without_its_start_is_refused() -> None:
    with pytest.raises(ConfigError, match="no point at alpha 0"):
        select_alpha([(0.5, 0.8, 0.5)], tolerance=0.001)
    with pytest.raises(ConfigError, match="tolerance = -1"):
        select_alpha([(0, 0.8, 0.5)], tolerance=-1)
