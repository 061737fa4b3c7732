"""Crops and flips: known answers, independence of the batch, and their distribution."""

import pytest
import torch
from torch.nn import functional

from robustft.errors import ConfigError
from robustft.training.augment import AugmentConfig, augment


def images(count: int, *, channels: int = 2, height: int = 6, width: int = 5) -> torch.Tensor:
    numbers = torch.arange(1, 1 + count * channels * height * width, dtype=torch.float32)
    return numbers.reshape(count, channels, height, width)


def test_nothing_to_do_changes_nothing() -> None:
    inputs = images(3)
    config = AugmentConfig(crop_padding=0, flip=0.0)
    assert torch.equal(augment(inputs, torch.arange(3), config=config, seed=0, epoch=0), inputs)


def test_a_sure_flip_mirrors_the_width() -> None:
    inputs = images(3)
    config = AugmentConfig(crop_padding=0, flip=1.0)
    outputs = augment(inputs, torch.arange(3), config=config, seed=0, epoch=0)
    assert torch.equal(outputs, inputs.flip(3))


@pytest.mark.parametrize(("mode", "pad_mode"), [("reflect", "reflect"), ("zero", "constant")])
def test_every_output_is_one_of_the_crops_of_the_padded_image(mode: str, pad_mode: str) -> None:
    inputs = images(60)
    config = AugmentConfig(crop_padding=2, padding_mode=mode, flip=0.5)  # type: ignore[arg-type]
    outputs = augment(inputs, torch.arange(60), config=config, seed=5, epoch=2)
    padded = functional.pad(inputs, (2, 2, 2, 2), mode=pad_mode)
    seen = set()
    for index in range(60):
        matches = [
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            if torch.equal(
                outputs[index],
                (
                    padded[index, :, top : top + 6, left : left + 5].flip(2)
                    if flip
                    else padded[index, :, top : top + 6, left : left + 5]
                ),
            )
        ]
        assert matches, f"image {index} is no crop"
        seen.update(matches)
    assert {top for top, _, _ in seen} == set(range(5))
    assert {left for _, left, _ in seen} == set(range(5))
    assert {flip for _, _, flip in seen} == {False, True}


def test_an_example_meets_the_same_fate_in_any_batch() -> None:
    inputs, ids = images(8), torch.tensor([3, 99, 5, 7, 2**40, 1, 0, 6])
    config = AugmentConfig(crop_padding=2)
    whole = augment(inputs, ids, config=config, seed=1, epoch=4)
    shuffled = torch.tensor([6, 1, 4])
    part = augment(inputs[shuffled], ids[shuffled], config=config, seed=1, epoch=4)
    assert torch.equal(part, whole[shuffled])


def test_epoch_and_seed_change_what_is_done() -> None:
    inputs, ids = images(20), torch.arange(20)
    config = AugmentConfig(crop_padding=2)
    first = augment(inputs, ids, config=config, seed=0, epoch=0)
    assert not torch.equal(first, augment(inputs, ids, config=config, seed=0, epoch=1))
    assert not torch.equal(first, augment(inputs, ids, config=config, seed=1, epoch=0))
    assert torch.equal(inputs, images(20))


def test_flips_happen_as_often_as_asked() -> None:
    inputs = images(1, channels=1, height=1, width=2).expand(20_000, 1, 1, 2)
    config = AugmentConfig(crop_padding=0, flip=0.25)
    outputs = augment(inputs, torch.arange(20_000), config=config, seed=0, epoch=0)
    share = (outputs[:, 0, 0, 0] != inputs[:, 0, 0, 0]).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.015)  # five standard errors


def test_padding_as_wide_as_the_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="crop_padding = 5: reflect padding must be below"):
        augment(images(1), torch.arange(1), config=AugmentConfig(crop_padding=5), seed=0, epoch=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop_padding": -1}, "crop_padding = -1: must be a whole number >= 0"),
        ({"flip": 1.5}, "flip = 1.5: must be a number >= 0 and <= 1"),
        ({"padding_mode": "reflekt"}, "did you mean 'reflect'"),
    ],
)
def test_options_are_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AugmentConfig(**fields)  # type: ignore[arg-type]
