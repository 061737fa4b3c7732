"""Moves to a hyperplane within the box: known answers and the properties that define them."""

import itertools

import pytest
import torch
from torch import Tensor

from robustft.attacks.hyperplane import project_on_hyperplane
from robustft.threat import NORMS

ORDERS = {"Linf": float("inf"), "L2": 2.0, "L1": 1.0}


def lengths(moves: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(moves, ORDERS[norm], dim=-1)


def random_case(seed: int, size: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """20 points with exact zeros and ones, and a normal for each."""
    generator = torch.Generator().manual_seed(seed)
    points = (torch.rand(20, size, generator=generator, dtype=dtype) * 1.4 - 0.2).clamp(0, 1)
    return points, torch.randn(20, size, generator=generator, dtype=dtype)


def farthest(points: Tensor, normals: Tensor, excess: Tensor) -> Tensor:
    """The corner of the box that lies deepest on the other side of the hyperplane."""
    return (normals * excess.sign().unsqueeze(-1) < 0).to(points.dtype) - points


def within_reach(points: Tensor, normals: Tensor, share: float, seed: int = 0) -> Tensor:
    """Excesses of either sign that use ``share`` of what the box allows."""
    signs = torch.rand(len(points), generator=torch.Generator().manual_seed(seed)) - 0.5
    signs = signs.sign().to(points.dtype)
    return signs * share * (normals * farthest(points, normals, signs)).sum(-1).abs()


def by_bisection(points: Tensor, normals: Tensor, excess: Tensor, norm: str) -> Tensor:
    """Linf and L2, solved slowly."""
    gaps = farthest(points, normals, excess)
    scale = torch.ones_like(normals) if norm == "Linf" else normals.abs()
    low, high = torch.zeros_like(excess).unsqueeze(-1), torch.full_like(excess, 1e9).unsqueeze(-1)
    for _ in range(200):
        middle = (low + high) / 2
        moves = torch.clamp(gaps, -middle * scale, middle * scale)
        short = (normals * moves).sum(-1, keepdim=True).abs() < excess.abs().unsqueeze(-1)
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return torch.clamp(gaps, -high * scale, high * scale)


def greedily(points: Tensor, normals: Tensor, excess: Tensor) -> Tensor:
    """L1, one coordinate after the other."""
    gaps = farthest(points, normals, excess)
    moves = torch.zeros_like(points)
    for row in range(len(points)):
        left = excess[row].abs().item()
        for column in normals[row].abs().argsort(descending=True).tolist():
            weight = normals[row, column].abs().item()
            share = min(1.0, left / max(weight * gaps[row, column].abs().item(), 1e-300))
            moves[row, column] = gaps[row, column] * share
            left -= weight * moves[row, column].abs().item()
            if left <= 0:
                break
    return moves


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("Linf", [0.3, -0.3, 0.1]),
        ("L2", [0.95 / 5.25, -1.9 / 5.25, 0.475 / 5.25]),
        ("L1", [0.0, -0.475, 0.0]),
    ],
)
def test_worked_example(norm: str, expected: list[float], dtype: torch.dtype) -> None:
    """<w, u> = 0.6 from -0.35, in both orientations of w."""
    point = torch.tensor([[0.2, 0.5, 0.9]], dtype=dtype)
    for sign in (1, -1):
        normal = sign * torch.tensor([[1.0, -2.0, 0.5]], dtype=dtype)
        excess = (normal * point).sum(1) - sign * 0.6
        moves = project_on_hyperplane(point, normal, excess, norm=norm)
        torch.testing.assert_close(moves, torch.tensor([expected], dtype=dtype))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [1, 2, 7, 100, 784])
@pytest.mark.parametrize("share", [1e-6, 0.01, 0.3, 0.9, 0.999])
def test_equals_the_slow_solution(norm: str, size: int, share: float) -> None:
    points, normals = random_case(size, size)
    excess = within_reach(points, normals, share)
    moves = project_on_hyperplane(points, normals, excess, norm=norm)
    if norm == "L1":
        expected = greedily(points, normals, excess)
    else:
        expected = by_bisection(points, normals, excess, norm)
    torch.testing.assert_close(moves, expected, atol=1e-12, rtol=1e-9)
    single = project_on_hyperplane(points.float(), normals.float(), excess.float(), norm=norm)
    assert single.dtype == torch.float32
    # The single coordinate that L1 fills in part may be another one after rounding.
    size_of = lengths(moves, norm)
    torch.testing.assert_close(lengths(single.double(), norm), size_of, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [1e-4, 0.2, 0.95])
def test_result_is_in_the_box_and_on_the_hyperplane(
    norm: str, dtype: torch.dtype, share: float
) -> None:
    points, normals = random_case(1, 300, dtype)
    excess = within_reach(points, normals, share)
    moves = project_on_hyperplane(points, normals, excess, norm=norm)
    rounding = 1e-12 if dtype == torch.float64 else 1e-6
    assert (points + moves).min() >= -rounding
    assert (points + moves).max() <= 1 + rounding
    reached = (normals.double() * moves.double()).sum(-1)
    torch.testing.assert_close(reached, -excess.double(), atol=100 * rounding, rtol=rounding)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [2, 12, 100])
def test_no_other_point_of_the_hyperplane_is_nearer(norm: str, size: int) -> None:
    """Points between a random one and the farthest corner meet the hyperplane in the box."""
    points, normals = random_case(10 + size, size)
    excess = within_reach(points, normals, 0.4)
    moves = project_on_hyperplane(points, normals, excess, norm=norm)
    corners = farthest(points, normals, excess)
    generator = torch.Generator().manual_seed(3)
    for scale in (1.0, 0.1, 0.01):
        for _ in range(30):
            noise = scale * torch.randn(points.shape, generator=generator, dtype=points.dtype)
            other = (moves + noise).clamp(-points, 1 - points)
            start, end = ((normals * z).sum(-1) + excess for z in (other, corners))
            crosses = start.sign() == excess.sign()  # Else the origin is on the other side of it.
            far = torch.where(crosses.unsqueeze(-1), corners, torch.zeros_like(corners))
            end = torch.where(crosses, end, excess)
            weight = (start / (start - end)).unsqueeze(-1)
            other = (1 - weight) * other + weight * far
            assert ((normals * other).sum(-1) + excess).abs().max() < 1e-9
            assert (lengths(other, norm) >= lengths(moves, norm) - 1e-9).all()


@pytest.mark.parametrize("norm", NORMS)
def test_linear_programs_agree(norm: str) -> None:
    """Linf and L1 are linear programs; in L2 the optimality conditions are looked at."""
    points, normals = random_case(30, 9)
    excess = within_reach(points, normals, 0.6)
    moves = project_on_hyperplane(points, normals, excess, norm=norm)
    if norm == "L2":
        gaps = farthest(points, normals, excess)
        free = (moves - gaps).abs() > 1e-12
        level = moves / normals
        steepest = torch.where(free, level.abs(), 0).amax(-1, keepdim=True)
        assert (free.sum(-1) > 1).any()
        torch.testing.assert_close(level.abs()[free], steepest.expand_as(level)[free])
        assert (level.abs() <= steepest * (1 + 1e-9)).all()
        return
    optimize = pytest.importorskip("scipy.optimize")
    size = points.shape[1]
    eye = torch.eye(size, dtype=points.dtype)
    # Variables: moves, then one bound on |move| for all (Linf) or one for each (L1).
    bounds = -torch.ones(size, 1, dtype=points.dtype) if norm == "Linf" else -eye
    rows = torch.cat([torch.cat([eye, bounds], 1), torch.cat([-eye, bounds], 1)])
    cost = torch.cat([torch.zeros(size), torch.ones(bounds.shape[1])])
    for row in range(len(points)):
        box = list(zip((-points[row]).tolist(), (1 - points[row]).tolist(), strict=True))
        solved = optimize.linprog(
            cost.numpy(),
            A_ub=rows.numpy(),
            b_ub=torch.zeros(len(rows)).numpy(),
            A_eq=torch.cat([normals[row], torch.zeros(bounds.shape[1])]).unsqueeze(0).numpy(),
            b_eq=(-excess[row : row + 1]).numpy(),
            bounds=[*box, *[(0, None)] * bounds.shape[1]],
        )
        assert solved.fun == pytest.approx(lengths(moves[row], norm).item(), rel=1e-7)


def test_wide_ranges_are_solved_exactly() -> None:
    """Weights and rooms over 26 octaves, close to the corner: far from where Newton starts."""
    generator = torch.Generator().manual_seed(2)
    octaves = torch.arange(784) % 26
    wide = 2.0 ** -octaves.double() * torch.rand(20, 784, generator=generator, dtype=torch.float64)
    other = wide[:, torch.randperm(784, generator=generator)]
    heavy = torch.randn(20, 784, generator=generator, dtype=torch.float64).mul(5).exp()
    small = torch.rand(20, 784, generator=generator, dtype=torch.float64) ** 8
    flat = 0.5 + 1e-4 * small
    for normals, rooms in itertools.product((wide, heavy.clamp(1e-7, 1e8)), (other, small, flat)):
        for share, norm in itertools.product((1e-6, 0.3, 0.9, 0.9999, 0.999999), NORMS):
            total = (normals * rooms).sum(-1)
            moves = project_on_hyperplane(rooms, normals, share * total, norm=norm)
            torch.testing.assert_close(-(normals * moves).sum(-1), share * total, rtol=1e-9, atol=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_out_of_reach_everything_moves_to_its_bound(norm: str, dtype: torch.dtype) -> None:
    points, normals = random_case(5, 40, dtype)
    excess = within_reach(points, normals, 1.001)
    moves = project_on_hyperplane(points, normals, excess, norm=norm)
    assert torch.equal(moves, farthest(points, normals, excess))
    exact = project_on_hyperplane(points, normals, within_reach(points, normals, 1.0), norm=norm)
    torch.testing.assert_close(exact, farthest(points, normals, excess), atol=1e-4, rtol=0)
    huge = project_on_hyperplane(points, normals, excess * 1e30, norm=norm)
    assert torch.equal(huge, moves)


@pytest.mark.parametrize("norm", NORMS)
def test_coordinates_without_room_or_weight_stay(norm: str) -> None:
    point = torch.tensor([[0.0, 1.0, 0.5, 0.5, 0.5]])
    normal = torch.tensor([[1.0, -1.0, 1.0, 1e-9, 0.0]])
    moves = project_on_hyperplane(point, normal, torch.tensor([0.2]), norm=norm)
    torch.testing.assert_close(moves, torch.tensor([[0.0, 0.0, -0.2, 0.0, 0.0]]))
    moves = project_on_hyperplane(point, normal, torch.tensor([9.0]), norm=norm)
    torch.testing.assert_close(moves, torch.tensor([[0.0, 0.0, -0.5, 0.0, 0.0]]))
    for excess in (0.0, 0.2, -0.2, 1e30):
        still = project_on_hyperplane(point, 1e-9 * normal, torch.tensor([excess]), norm=norm)
        assert torch.equal(still, torch.zeros_like(point))
    on_it = project_on_hyperplane(point, normal, torch.tensor([0.0]), norm=norm)
    assert torch.equal(on_it, torch.zeros_like(point))


def test_ties_of_l1_share_what_is_left() -> None:
    points = torch.tensor([[0.5, 0.5, 0.5, 0.1]])
    normals = torch.tensor([[2.0, 1.0, 1.0, -1.0]])
    moves = project_on_hyperplane(points, normals, torch.tensor([1.38]), norm="L1")
    torch.testing.assert_close(moves, torch.tensor([[-0.5, -0.1, -0.1, 0.18]]))


@pytest.mark.parametrize("norm", NORMS)
def test_points_that_share_a_normal(norm: str) -> None:
    points, normals = random_case(6, 30)
    others = random_case(7, 30)[0]
    both = torch.stack([points, others])
    excess = torch.stack([within_reach(z, normals, 0.5, seed) for seed, z in enumerate(both)])
    joint = project_on_hyperplane(both, normals, excess, norm=norm)
    for found, each, amount in zip(joint, both, excess, strict=True):
        single = project_on_hyperplane(each, normals, amount, norm=norm)
        torch.testing.assert_close(found, single, atol=1e-12, rtol=0)
    empty = project_on_hyperplane(both[:, :0], normals[:0], excess[:, :0], norm=norm)
    assert empty.shape == (2, 0, 30)
