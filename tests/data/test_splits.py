"""Stratified choices: sizes, stability and independence of row order."""

import numpy as np
import pytest

from robustft.data.splits import choose, class_shares
from robustft.errors import ConfigError

LABELS = np.repeat(np.arange(4), [40, 30, 20, 10]).astype(np.int64)
IDS = np.arange(100, dtype=np.int64) + 5_000


def test_class_shares_add_up_and_are_nearest() -> None:
    for size in range(101):
        shares = class_shares(np.array([40, 30, 20, 10]), size)
        assert shares.sum() == size
        assert (np.abs(shares - size * np.array([0.4, 0.3, 0.2, 0.1])) < 1).all()
    assert class_shares(np.array([1, 1, 1]), 2).tolist() == [1, 1, 0]


def test_choice_is_stratified_disjoint_and_complete() -> None:
    chosen, left = choose(LABELS, IDS, 20, seed=0, purpose="val")
    assert np.bincount(LABELS[chosen]).tolist() == [8, 6, 4, 2]
    assert sorted([*chosen, *left]) == list(range(100))
    assert (np.diff(chosen) > 0).all()


def test_choice_depends_on_ids_not_on_row_order() -> None:
    order = np.random.default_rng(0).permutation(100)
    chosen, _ = choose(LABELS, IDS, 20, seed=0, purpose="val")
    shuffled, _ = choose(LABELS[order], IDS[order], 20, seed=0, purpose="val")
    assert set(IDS[order][shuffled]) == set(IDS[chosen])


def test_smaller_choice_is_part_of_larger_one() -> None:
    small, _ = choose(LABELS, IDS, 10, seed=3, purpose="limit")
    large, _ = choose(LABELS, IDS, 50, seed=3, purpose="limit")
    assert set(small) < set(large)


def test_seed_and_purpose_change_the_choice() -> None:
    base, _ = choose(LABELS, IDS, 50, seed=0, purpose="val")
    assert set(base) != set(choose(LABELS, IDS, 50, seed=1, purpose="val")[0])
    assert set(base) != set(choose(LABELS, IDS, 50, seed=0, purpose="limit")[0])


def test_the_choice_is_written_in_stone() -> None:
    # A change here would silently mix held-out examples of old runs into training.
    chosen, _ = choose(LABELS, IDS, 6, seed=0, purpose="val")
    assert IDS[chosen].tolist() == [5004, 5023, 5042, 5044, 5082, 5095]


def test_too_many_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot choose 101 of 100"):
        choose(LABELS, IDS, 101, seed=0, purpose="val")
