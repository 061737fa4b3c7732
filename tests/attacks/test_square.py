"""Square attack: schedule, starts, an independent slow form, known answers, sizes, the official."""

import itertools
import math

import pytest
import torch
from attack_toys import Counter, Linear, convolutional
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from robustft.attacks import project
from robustft.attacks.losses import margin
from robustft.attacks.problem import Problem
from robustft.attacks.square import (
    _SEARCHES,
    _blocks,
    _bump,
    square,
    window_share,
    window_side,
)
from robustft.errors import ConfigError

RADII = {"Linf": 0.03, "L2": 0.2, "L1": 1.0}
ORDERS = {"Linf": float("inf"), "L2": 2, "L1": 1}

every_norm = pytest.mark.parametrize("norm", RADII)


def lengths(delta: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), ORDERS[norm], dim=1)


def correct(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs).argmax(1) == labels


def problem_of(inputs: Tensor, norm: str, eps: float) -> Problem:
    return Problem.build(
        "square",
        nn.Flatten(),
        inputs,
        torch.zeros(len(inputs), dtype=torch.int64),
        norm=norm,
        eps=eps,
        loss=margin,
        generator=None,
        sample_ids=None,
    )


class Rows(nn.Module):
    """Counts the samples that a model is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.count = model, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.count += len(inputs)
        return self.model(inputs)


@pytest.mark.parametrize(
    ("iteration", "halvings"),
    [
        (0, 0),
        (10, 0),
        (11, 1),
        (50, 1),
        (51, 2),
        (200, 2),
        (201, 3),
        (500, 3),
        (501, 4),
        (1000, 4),
        (1001, 5),
        (2000, 5),
        (2001, 6),
        (4000, 6),
        (4001, 7),
        (6000, 7),
        (6001, 8),
        (8000, 8),
        (8001, 9),
        (10**6, 9),
    ],
)
def test_share_of_pixels(iteration: int, halvings: int) -> None:
    assert window_share(iteration, 5000, p_init=0.8, rescale=False) == 0.8 / 2**halvings


def test_rescaled_schedule_sees_every_stage() -> None:
    shares = [window_share(i, 1000, p_init=0.8, rescale=True) for i in range(1000)]
    assert sorted(set(shares), reverse=True) == [0.8 / 2**k for k in range(10)]
    assert shares[1] == 0.8
    assert shares[2] == 0.4  # 2 of 1,000 is 20 of 10,000


@pytest.mark.parametrize(
    ("size", "norm", "expected"),
    [
        ((28, 28), "Linf", [25, 18, 13, 9, 6, 4, 3, 2]),
        ((28, 28), "L2", [25, 19, 13, 9, 7, 5, 3, 3]),
        ((32, 32), "L1", [29, 21, 15, 11, 7, 5, 5, 3]),
        ((4, 9), "Linf", [4, 4, 3, 2, 1, 1, 1, 1]),
        ((4, 9), "L2", [4, 4, 3, 3, 3, 3, 3, 3]),
        ((2, 2), "L2", [2] * 8),
    ],
)
def test_side_of_a_window(size: tuple[int, int], norm: str, expected: list[int]) -> None:
    assert [window_side(0.8 / 2**k, *size, norm=norm) for k in range(8)] == expected


def test_blocks_have_one_side_and_grow() -> None:
    sides = [5] * 11 + [3] * 60 + [1]
    blocks = list(_blocks(sides))
    assert [i for block in blocks for i in block] == list(range(len(sides)))
    assert all(len({sides[i] for i in block}) == 1 for block in blocks)
    assert [len(block) for block in blocks] == [1, 2, 4, 4, 16, 16, 16, 12, 1]


@pytest.mark.parametrize(("norm", "power"), [("L2", 2), ("L1", 4)])
def test_bump_of_three_pixels(norm: str, power: int) -> None:
    rim, peak = 2.0**-power, 1 + 2.0**-power
    hill = torch.tensor([[rim, peak, rim]])
    valley = torch.tensor([[rim, rim, rim], [rim, peak, rim]])
    parts = [part / torch.linalg.vector_norm(part, ORDERS[norm]) for part in (hill, -valley)]
    expected = torch.cat(parts) / 2 ** (1 / ORDERS[norm])
    torch.testing.assert_close(_bump(3, norm, like=hill), expected)


@pytest.mark.parametrize("side", [1, 2, 5, 6])
def test_bumps_have_length_one_and_two_signs(side: int) -> None:
    for norm in ("L2", "L1"):
        bump = _bump(side, norm, like=torch.zeros(()))
        assert lengths(bump[None], norm).item() == pytest.approx(1)
        assert (bump[: side // 2] > 0).all()
        assert (bump[side // 2 :] < 0).all()


def test_linf_starts_from_stripes() -> None:
    inputs = torch.rand(6, 2, 7, 9, generator=torch.Generator().manual_seed(0))
    problem = problem_of(inputs, "Linf", 0.1)
    start = _SEARCHES["Linf"](problem, 0).points
    low, high = (inputs - 0.1).clamp(min=0), (inputs + 0.1).clamp(max=1)
    raised = (start == high).all(dim=2)
    assert torch.equal(~raised, (start == low).all(dim=2))
    assert 0.3 < raised.float().mean() < 0.7
    assert len({tuple(row.flatten().tolist()) for row in raised}) == 6  # a sample's own
    assert not torch.equal(_SEARCHES["Linf"](problem, 1).points, start)


@pytest.mark.parametrize("norm", ["L2", "L1"])
@pytest.mark.parametrize("size", [(10, 10), (28, 28), (32, 32)])
def test_l2_and_l1_start_from_tiles_on_the_boundary(norm: str, size: tuple[int, int]) -> None:
    inputs = torch.full((4, 2, *size), 0.5)
    start = _SEARCHES[norm](problem_of(inputs, norm, 2.0), 0).points - inputs
    torch.testing.assert_close(lengths(start, norm), torch.full((4,), 2.0), atol=0, rtol=1e-5)
    side = size[0] // 5
    margin = (size[0] - 5 * side) // 2
    tiles = start[:, :, margin : margin + 5 * side, margin : margin + 5 * side]
    torch.testing.assert_close(tiles.abs().sum(), start.abs().sum())
    tiles = tiles.unflatten(3, (5, side)).unflatten(2, (5, side))  # [n, channels, 5, side, 5, side]
    weights = tiles.abs().sum(dim=(3, 5))
    torch.testing.assert_close(weights, weights[:1, :1, :1, :1].expand_as(weights))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 9), (9, 4), (14, 14), (24, 24), (6, 31)])
@every_norm
def test_every_size_of_image(norm: str, size: tuple[int, int]) -> None:
    """Also those on which the official code fails."""
    inputs = torch.rand(5, 2, *size, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(3, inputs[0].numel(), generator=torch.Generator().manual_seed(2))
    model = Linear(weight, torch.zeros(3))
    with torch.no_grad():
        labels = model(inputs).argmax(1)
    result = square(model, inputs, labels, norm=norm, eps=0.1, num_queries=60)
    assert result.inputs.isfinite().all()
    assert (lengths(result.inputs - inputs, norm) <= 0.1 * (1 + 1e-5) + 1e-6).all()
    assert (result.loss > margin(model(inputs), labels)).any()


def plain_search(
    model: nn.Module, inputs: Tensor, labels: Tensor, *, norm: str, eps: float, num_queries: int
) -> tuple[Tensor, Tensor]:
    """The attack as the specification has it, one sample at a time, on whole images.

    It shares only the start and the drawn numbers with the real one.
    """
    height, width = inputs.shape[2:]
    finals, broken = [], []
    for row in range(len(inputs)):
        search = _SEARCHES[norm](problem_of(inputs, norm, eps), 0)
        clean, best = inputs[row], search.points[row].clone()
        loss = margin(model(best[None]), labels[row, None])
        for iteration in range(num_queries):
            if loss > 0:
                break
            share = window_share(iteration, num_queries, p_init=0.8, rescale=False)
            side = window_side(share, height, width, norm=norm)
            search.draw(range(iteration, iteration + 1), side)
            masks = []
            for corner in search.corners[0, :, row, 0].tolist():
                top, left = divmod(corner, width)
                assert top <= max(height - side - 1, 0)
                assert left <= max(width - side - 1, 0)
                mask = torch.zeros(height, width, dtype=torch.bool)
                mask[top : top + side, left : left + side] = True
                masks.append(mask)
            signs = search.signs[0, row]
            if norm == "Linf":
                moved = best + 2 * eps * signs[:, :, None] * masks[0]
                new = moved.clamp(clean - eps, clean + eps).clamp(0, 1)
            else:
                bump = _bump(side, norm, like=clean)
                bump = bump.T if search.turns[0, row] else bump
                new = clean + rebuilt(best - clean, masks, bump, signs, norm, eps, clean)
            new_loss = margin(model(new[None]), labels[row, None])
            if new_loss > loss:
                best, loss = new, new_loss
        finals.append(best)
        broken.append(loss > 0)
    return torch.stack(finals), torch.cat(broken)


def rebuilt(
    delta: Tensor,
    masks: list[Tensor],
    bump: Tensor,
    signs: Tensor,
    norm: str,
    eps: float,
    clean: Tensor,
) -> Tensor:
    channels, power, side = len(delta), ORDERS[norm], len(bump)
    whole = torch.linalg.vector_norm(delta, power)
    held = torch.linalg.vector_norm(delta * (masks[0] | masks[1]), power, dim=(1, 2))
    old = delta[:, masks[0]].unflatten(1, (side, side))
    old_norm = torch.linalg.vector_norm(old, power, dim=(1, 2), keepdim=True)
    new = signs[:, :, None] * bump + old / (old_norm + 1e-12)
    new = new / torch.linalg.vector_norm(new, power, dim=(1, 2), keepdim=True)
    if norm == "L2":
        size = ((eps**2 - whole**2).clamp(min=0) / channels + held**2).sqrt()
    else:
        size = ((eps - whole).clamp(min=0) / channels + held) * channels
    delta = delta * ~masks[1]
    delta[:, masks[0]] = (new * size[:, None, None]).flatten(1)
    if norm == "L1":
        return project(delta[None], clean[None], norm="L1", eps=eps * (1 - 1e-6))[0]
    delta = delta / torch.linalg.vector_norm(delta) * eps
    return (clean + delta).clamp(0, 1) - clean


@every_norm
@pytest.mark.parametrize("size", [(8, 8), (6, 9)])
def test_fast_form_is_the_plain_form(norm: str, size: tuple[int, int]) -> None:
    """What the windows alone show is what the official formulas give on whole images."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.rand(6, 2, *size, dtype=torch.float64, generator=generator)
    weight = torch.randn(4, inputs[0].numel(), dtype=torch.float64, generator=generator)
    model = nn.Sequential(Linear(weight, torch.zeros(4, dtype=torch.float64)), nn.Tanh())
    with torch.no_grad():
        labels = model(inputs).argmax(1)
        eps = {"Linf": 0.03, "L2": 0.2, "L1": 0.6}[norm]
        options = {"norm": norm, "eps": eps, "num_queries": 50}
        points, broken = plain_search(model, inputs, labels, **options)
    result = square(model, inputs, labels, **options)
    assert torch.equal(result.robust, ~broken)
    assert 0 < broken.sum() < len(labels)
    torch.testing.assert_close(result.inputs, points, atol=1e-9, rtol=0)


def test_linf_reaches_the_optimum_of_a_linear_model() -> None:
    """The last row and column have no weight: small windows do not reach them."""
    generator = torch.Generator().manual_seed(0)
    inputs = (torch.rand(8, 1, 5, 5, generator=generator) * 1.4 - 0.2).clamp(0, 1)
    weight = torch.randn(2, 1, 5, 5, generator=generator)
    weight[:, :, -1] = weight[:, :, :, -1] = 0
    model = Linear(weight.flatten(1), torch.tensor([100.0, 0.0]))
    slope = (weight[1] - weight[0]).expand_as(inputs)
    optimum = (inputs + 0.1 * slope.sign()).clamp(0, 1)
    labels = torch.zeros(8, dtype=torch.int64)
    best = margin(model(optimum), labels)
    gaps = []
    options = {"norm": "Linf", "eps": 0.1, "p_init": 0.2}  # one-pixel windows after 50 queries
    for num_queries in (10, 50, 500):
        result = square(model, inputs, labels, num_queries=num_queries, **options)
        gaps.append((best - result.loss).max().item())
        assert (result.loss <= best + 1e-4).all()
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-4


@pytest.mark.parametrize(("norm", "eps"), [("L2", 0.5), ("L1", 2.0)])
def test_l2_and_l1_stay_below_the_optimum_of_a_linear_model(norm: str, eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(4, 1, 8, 8, generator=generator) * 0.2 + 0.4
    weight = torch.randn(1, 64, generator=generator)
    model = Linear(torch.cat([torch.zeros(1, 64), weight]), torch.tensor([100.0, 0.0]))
    labels = torch.zeros(4, dtype=torch.int64)
    if norm == "L2":
        optimum = inputs + eps * (weight / weight.norm()).view(1, 1, 8, 8)
    else:
        optimum = inputs.flatten(1).clone()
        budget = torch.full((4, 1), eps)
        for pixel in weight[0].abs().argsort(descending=True):
            bound = (weight[0, pixel] > 0).float()
            move = (bound - optimum[:, pixel, None]).abs().minimum(budget)
            optimum[:, pixel, None] += move * weight[0, pixel].sign()
            budget = budget - move
        optimum = optimum.view_as(inputs)
    clean, best = (margin(model(points), labels) for points in (inputs, optimum))
    result = square(model, inputs, labels, norm=norm, eps=eps, num_queries=400)
    share = (result.loss - clean) / (best - clean)
    assert (share < 1 + 1e-5).all()
    assert (share > 0.3).all()


@every_norm
def test_more_queries_never_lower_the_margin(norm: str, model: nn.Module, inputs: Tensor) -> None:
    with torch.no_grad():
        labels = model(inputs).argmax(1)
    options = {"norm": norm, "eps": RADII[norm]}
    results = [
        square(model, inputs, labels, num_queries=num_queries, **options)
        for num_queries in (1, 4, 15, 50)
    ]
    for fewer, more in itertools.pairwise(results):
        assert (more.loss >= fewer.loss).all()
        assert (more.robust <= fewer.robust).all()
        # What is broken is attacked no further.
        broken = ~fewer.robust
        assert torch.equal(more.inputs[broken], fewer.inputs[broken])
    assert results[0].robust.sum() > results[-1].robust.sum() > 0


@every_norm
@pytest.mark.parametrize("check_clean", [False, True])
def test_result_is_feasible_and_says_the_truth(
    norm: str, check_clean: bool, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    untouched = inputs.clone()
    result = square(
        model,
        inputs,
        labels,
        norm=norm,
        eps=RADII[norm],
        num_queries=60,
        check_clean=check_clean,
    )
    assert torch.equal(inputs, untouched)
    assert (result.inputs.shape, result.inputs.dtype) == (inputs.shape, inputs.dtype)
    absolute, relative = (1e-6, 0) if norm == "Linf" else (0, 1e-5)
    distance = lengths(result.inputs.double() - inputs.double(), norm)
    assert (distance <= RADII[norm] * (1 + relative) + absolute).all()
    assert result.inputs.min() >= 0
    assert result.inputs.max() <= 1
    assert torch.equal(result.robust, correct(model, result.inputs, labels))
    assert 0 < result.robust.sum() < correct(model, inputs, labels).sum()
    with torch.no_grad():
        torch.testing.assert_close(
            result.loss, margin(model(result.inputs), labels), atol=1e-5, rtol=0
        )
    if check_clean:
        assert torch.equal(result.inputs[:3], inputs[:3])  # misclassified from the beginning


@every_norm
def test_perturbation_keeps_its_length_over_many_queries(norm: str) -> None:
    """On a task that accepts all the time, so that rounding errors could add up."""
    inputs = torch.full((3, 1, 6, 6), 0.5)
    state = {"score": 0.0}

    def easier(points: Tensor) -> Tensor:
        state["score"] += 0.01
        scores = torch.full((len(points),), state["score"])
        return torch.stack([torch.full_like(scores, 100.0), scores], dim=1)

    labels = torch.zeros(3, dtype=torch.int64)
    result = square(easier, inputs, labels, norm=norm, eps=0.4, num_queries=400)
    distance = lengths(result.inputs.double() - 0.5, norm)
    torch.testing.assert_close(distance, torch.full_like(distance, 0.4), atol=1e-7, rtol=2e-6)


@every_norm
def test_a_sample_does_not_depend_on_its_batch(norm: str) -> None:
    """In float64, where rounding that differs between batch sizes stays far below 1e-10."""
    model = convolutional().double()
    inputs = torch.rand(9, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = model(inputs).argmax(1)
    ids = torch.tensor([3, 10**12, 17, 0, 4, 5, 99, 2, 1])
    options = {"norm": norm, "eps": RADII[norm], "num_queries": 40, "num_restarts": 2}
    whole = square(model, inputs, labels, sample_ids=ids, **options)
    assert 0 < whole.robust.sum() < 9
    order = torch.tensor([8, 2, 5, 0, 1, 7, 3, 6, 4])
    parts = [
        square(model, inputs[rows], labels[rows], sample_ids=ids[rows], **options)
        for rows in (order[:2], order[2:3], order[3:])
    ]
    back = order.argsort()
    assert torch.equal(torch.cat([part.robust for part in parts])[back], whole.robust)
    assert sum(part.total_forwards for part in parts) == whole.total_forwards
    for field in ("inputs", "loss"):
        joined = torch.cat([getattr(part, field) for part in parts])[back]
        torch.testing.assert_close(joined, getattr(whole, field), atol=1e-10, rtol=0)


@every_norm
def test_radius_zero_returns_the_input(
    norm: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    result = square(model, inputs, labels, norm=norm, eps="0", num_queries=20)
    assert torch.equal(result.inputs, inputs)
    assert torch.equal(result.robust, correct(model, inputs, labels))


@every_norm
def test_few_samples_and_few_classes(norm: str, inputs: Tensor) -> None:
    model = convolutional(2)
    labels = model(inputs).argmax(1)
    options = {"norm": norm, "eps": RADII[norm], "num_queries": 40}
    result = square(model, inputs, labels, **options)
    assert torch.equal(result.robust, correct(model, result.inputs, labels))
    empty = square(model, inputs[:0], labels[:0], **options)
    assert empty.inputs.shape == (0, 2, 8, 8)
    assert empty.robust.shape == empty.loss.shape == (0,)
    assert empty.total_forwards == 0
    single = square(model, inputs[:1], labels[:1], **options)
    assert torch.equal(single.robust, result.robust[:1])
    wrong = square(model, inputs, 1 - labels, norm=norm, eps=1e-6, num_queries=40)
    assert not wrong.robust.any()
    assert wrong.total_forwards == len(inputs)  # the start already breaks them


@every_norm
def test_a_tie_is_what_the_model_makes_of_it(norm: str, inputs: Tensor) -> None:
    labels = torch.arange(24) % 3
    result = square(
        lambda points: torch.zeros(len(points), 3),
        inputs,
        labels,
        norm=norm,
        eps=0.1,
        num_queries=3,
    )
    assert torch.equal(result.robust, labels == 0)


@every_norm
def test_model_and_global_state_stay(norm: str, inputs: Tensor, labels: Tensor) -> None:
    model = convolutional()
    model.train()
    model[1].eval()
    model[3].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    result = square(model, inputs, labels, norm=norm, eps=RADII[norm], num_queries=5)
    assert not result.inputs.requires_grad
    assert not result.loss.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_generator_is_the_run_seed(model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    def drawn(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        options = {"norm": "L2", "eps": 0.2, "num_queries": 5}
        return square(model, inputs, labels, generator=generator, **options).inputs

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


@every_norm
@pytest.mark.parametrize("check_clean", [False, True])
def test_counted_passes_are_the_real_ones(
    norm: str, check_clean: bool, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    counter, rows = Counter(model), Rows(model)
    options = {"norm": norm, "num_queries": 40, "check_clean": check_clean}
    result = square(counter, inputs[3:], labels[3:], eps=1e-5, **options)
    assert result.robust.all()
    assert counter.forwards == result.num_forwards == 41 + check_clean
    assert result.total_forwards == 21 * (41 + check_clean)
    assert counter.backwards == result.num_backwards == result.total_backwards == 0
    result = square(rows, inputs, labels, eps=RADII[norm], **options)
    assert result.total_forwards == rows.count
    assert rows.count < 24 * result.num_forwards


def test_broken_samples_leave_the_batch(model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    """A sample that breaks is attacked for at most 16 more queries, and as many as it took."""
    options = {"norm": "Linf", "eps": 0.03}
    after = torch.zeros(len(labels))
    for num_queries in range(1, 31):
        after += square(model, inputs, labels, num_queries=num_queries, **options).robust
    whole = square(model, inputs, labels, num_queries=30, **options)
    needed = 1 + after + (after < 30)  # with the start, and with the query that broke it
    needed[~correct(model, inputs, labels)] = 1
    assert whole.total_forwards >= needed.sum()
    assert whole.total_forwards <= (needed + (needed - 1).clamp(max=16)).sum()


def test_restarts_attack_what_is_left(model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    options = {"norm": "L1", "eps": 1.0, "num_queries": 2}
    one = square(model, inputs, labels, **options)
    six = square(model, inputs, labels, num_restarts=6, **options)
    assert six.num_forwards == 18
    assert (six.robust <= one.robust).all()
    assert six.robust.sum() < one.robust.sum()
    assert torch.equal(six.inputs[~one.robust], one.inputs[~one.robust])
    assert torch.equal(six.robust, correct(model, six.inputs, labels))
    assert (six.loss >= one.loss).all()


@every_norm
def test_layout_in_memory_makes_no_difference(
    norm: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    options = {"norm": norm, "eps": RADII[norm], "num_queries": 10}
    expected = square(model, inputs, labels, **options)
    turned = inputs.contiguous(memory_format=torch.channels_last)
    assert torch.equal(square(model, turned, labels, **options).inputs, expected.inputs)
    with torch.inference_mode():
        result = square(model, inputs + 0, labels + 0, **options)
    assert torch.equal(result.inputs, expected.inputs)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_one_host_sync_in_sixteen_queries(
    norm: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore
            words = ("local_scalar", "nonzero", "aten::equal", "masked_select", "unique")
            self.count += any(word in func.name() for word in words)
            return func(*args, **(kwargs or {}))

    def reads(num_queries: int) -> int:
        with Reads() as mode:
            square(model, inputs, labels, norm=norm, eps=1e-4, num_queries=num_queries)
        return mode.count

    assert reads(46) - reads(14) <= math.ceil(32 / 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(2, 3)}, r"needs images \[n, channels, height, width\]"),
        ({"p_init": 0}, r"p_init must be a share of the pixels in \(0, 1\]"),
        ({"p_init": 1.2}, "p_init must be"),
        ({"num_queries": 0}, "num_queries must be a whole number >= 1"),
        ({"num_restarts": 0}, "num_restarts must be a whole number >= 1"),
        ({"norm": "L3"}, "unknown norm 'L3'"),
    ],
)
def test_bad_arguments_get_a_sentence(change: dict[str, object], message: str) -> None:
    arguments = {
        "inputs": torch.full((2, 1, 3, 3), 0.5),
        "labels": torch.zeros(2, dtype=torch.int64),
        "norm": "Linf",
        "eps": "8/255",
        **change,
    }
    with pytest.raises(ConfigError, match=message):
        square(nn.Flatten(), arguments.pop("inputs"), arguments.pop("labels"), **arguments)


@every_norm
def test_as_strong_as_the_official_code(norm: str) -> None:
    """Robust counts over seeds; one seed's count of 64 varies by 1.0 to 1.5 (standard deviation).

    So the difference of two means over 4 seeds varies by 0.7 to 1.
    """
    official = pytest.importorskip(
        "pyautoattack.square", reason="needs the extra robustft[autoattack]"
    )
    model = convolutional(norm=False)
    inputs = torch.rand(64, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    inputs = (inputs * 1.4 - 0.2).clamp(0, 1)
    with torch.no_grad():
        labels = model(inputs).argmax(1)
    ours, theirs = [], []
    for seed in range(4):
        options = {"norm": norm, "eps": RADII[norm]}
        generator = torch.Generator().manual_seed(seed)
        result = square(model, inputs, labels, num_queries=40, generator=generator, **options)
        ours.append(result.robust.sum().item())
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            attack = official.SquareAttack(
                model, n_queries=40, resc_schedule=False, seed=seed, **options
            )
            points = attack.perturb(inputs, labels)
        theirs.append(correct(model, points, labels).sum().item())
    assert sum(ours) / 4 == pytest.approx(sum(theirs) / 4, abs=3)
    assert 20 < sum(ours) / 4 < 60


@pytest.mark.parametrize("side", [1, 2, 3, 6, 7, 13])
@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_bumps_are_the_official_ones(norm: str, side: int) -> None:
    official = pytest.importorskip(
        "pyautoattack.square", reason="needs the extra robustft[autoattack]"
    )
    attack = official.SquareAttack(nn.Flatten(), norm=norm, eps=1.0, device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = attack.eta(side)
    bump = _bump(side, norm, like=expected)
    turned = not torch.allclose(bump, expected, atol=1e-6)
    torch.testing.assert_close(bump.T if turned else bump, expected)
