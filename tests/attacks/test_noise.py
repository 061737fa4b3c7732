"""Noise that belongs to a sample, not to a batch."""

import pytest
import torch
from torch import Tensor

from robustft.attacks.noise import normal, run_seed, sample_keys, uniform

SHAPE = torch.Size([3, 8, 8])
CPU = torch.device("cpu")


def keys(ids: Tensor, *, seed: int = 0, stream: str = "pgd/start", restart: int = 0) -> Tensor:
    return sample_keys(torch.tensor(seed), stream=stream, restart=restart, sample_ids=ids)


@pytest.mark.parametrize("draw", [uniform, normal])
def test_values_follow_the_id(draw: object) -> None:
    ids = torch.tensor([5, 900, 17, 2**40])
    together = draw(keys(ids), SHAPE, dtype=torch.float32)
    alone = torch.cat([draw(keys(ids[i : i + 1]), SHAPE, dtype=torch.float32) for i in range(4)])
    assert torch.equal(together, alone)
    assert torch.equal(together.flip(0), draw(keys(ids.flip(0)), SHAPE, dtype=torch.float32))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"stream": "apgd/start"}, {"restart": 1}, {"ids": torch.arange(1, 9)}]
)
def test_every_coordinate_changes_the_values(change: dict[str, object]) -> None:
    arguments = {"ids": torch.arange(8), **change}
    base = uniform(keys(torch.arange(8)), SHAPE, dtype=torch.float64).flatten(1)
    other = uniform(keys(**arguments), SHAPE, dtype=torch.float64).flatten(1)
    assert (base == other).float().mean() < 0.001
    correlation = torch.corrcoef(torch.cat([base, other]))[:8, 8:]
    if "ids" not in change:
        assert correlation.abs().max() < 0.35  # 5 standard errors of 192 values


def test_uniform_is_uniform() -> None:
    values = uniform(keys(torch.arange(2000)), SHAPE, dtype=torch.float64)
    count = values.numel()
    assert 0 < values.min() < 1e-4
    assert 1 - 1e-4 < values.max() < 1
    histogram = torch.histc(values, bins=64, min=0, max=1)
    chi_square = ((histogram - count / 64) ** 2 / (count / 64)).sum().item()
    assert 25 < chi_square < 115  # 63 degrees of freedom, both tails about 1e-5
    columns = values.flatten(1)
    assert torch.corrcoef(columns.T[:20]).fill_diagonal_(0).abs().max() < 0.12  # between elements
    assert torch.corrcoef(columns[:40]).fill_diagonal_(0).abs().max() < 0.4  # between samples


def test_normal_is_normal() -> None:
    values = normal(keys(torch.arange(2000)), SHAPE, dtype=torch.float64)
    assert abs(values.mean().item()) < 0.008
    assert abs(values.var().item() - 1) < 0.012
    assert abs((values**4).mean().item() - 3) < 0.1
    shares = [(values.abs() > bound).double().mean().item() for bound in (1, 2, 3)]
    assert shares == pytest.approx([0.31731, 0.04550, 0.00270], abs=0.004)


def test_known_first_values() -> None:
    """Stored examples depend on these: a change must be deliberate.

    SplitMix64 seeded with 0 gives e220a8397b1dcdaf first; its top 23 bits are the first uniform.
    """
    first = uniform(torch.zeros(1, dtype=torch.int64), torch.Size([1]), dtype=torch.float64).item()
    assert first == ((0xE220A8397B1DCDAF >> 41) + 0.5) / 2**23


def test_generator_moves_by_one_draw_and_none_means_seed_zero() -> None:
    assert run_seed(None, CPU).item() == 0
    generator, twin = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    first, second = run_seed(generator, CPU), run_seed(generator, CPU)
    assert first != second
    assert torch.equal(run_seed(twin, CPU), first)
