"""Measurements are in full float32; what the caller has set comes back."""

from collections.abc import Iterator

import pytest
import torch

from robustft.training.precision import full_float32


def flags() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def set_flags(values: tuple[bool, bool]) -> None:
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = values


@pytest.fixture(params=[(True, False), (False, True), (True, True)])
def before(request: pytest.FixtureRequest) -> Iterator[tuple[bool, bool]]:
    default = flags()
    set_flags(request.param)
    yield request.param
    set_flags(default)


def test_inside_is_exact_and_outside_is_as_before(before: tuple[bool, bool]) -> None:
    @full_float32()
    def inside(*, fail: bool) -> tuple[bool, bool]:
        if fail:
            raise ValueError("inside")
        return flags()

    assert inside(fail=False) == (False, False)
    assert flags() == before
    with pytest.raises(ValueError, match="inside"):
        inside(fail=True)
    assert flags() == before
