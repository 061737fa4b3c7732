"""Common corruptions: properties that all types share, and known answers."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from robustft.data import (
    C15,
    CORRUPTIONS,
    RIFT18,
    SEVERITIES,
    TaskConfig,
    corrupt,
    load_task,
    supported,
)
from robustft.data.corruption_ops import Draw, poisson
from robustft.data.corruptions import corruption_parameters
from robustft.errors import ConfigError, UnknownNameError

ALL = tuple(CORRUPTIONS)
# Types whose published constants change the kind of damage from one severity to the next.
UNORDERED = {"saturate", "elastic_transform", "spatter", "glass_blur", "frost"}


@pytest.fixture(scope="module")
def colour() -> Tensor:
    """Smooth colour pictures with structure at several scales, [6, 3, 32, 32]."""
    ids = torch.arange(6)
    draw = Draw(ids=ids, seed=11, name="fixture")
    fine = draw.uniform((3, 32, 32), "fine")
    clouds = torch.cat([draw.plasma(32, 32, 1.6, f"{c}") for c in range(3)], dim=1)
    return (0.9 * clouds + 0.1 * fine).clamp(0, 1)


@pytest.fixture(scope="module")
def grey() -> Tensor:
    """Real Fashion-MNIST pictures, [8, 1, 28, 28]."""
    images = load_task(TaskConfig()).splits["test"].images[:8]
    return torch.from_numpy(images / np.float32(255))


def run(images: Tensor, name: str, severity: int, *, seed: int = 0) -> Tensor:
    ids = torch.arange(len(images)) + 100
    return corrupt(images, name, severity, sample_ids=ids, seed=seed)


def mean_changes(images: Tensor, name: str) -> list[float]:
    """Mean absolute change per severity, over several random draws per picture."""
    batch = images.repeat(6, 1, 1, 1)
    return [float((run(batch, name, s) - batch).abs().mean()) for s in SEVERITIES]


def test_named_sets() -> None:
    assert len(C15) == 15
    assert len(RIFT18) == 18
    assert set(RIFT18) - set(C15) == {"speckle_noise", "gaussian_blur", "spatter", "saturate"}
    assert set(C15) - set(RIFT18) == {"glass_blur"}
    assert set(CORRUPTIONS) == set(C15) | set(RIFT18)


@pytest.mark.parametrize("name", ALL)
def test_every_type_has_five_distinct_severities(name: str) -> None:
    for table in (CORRUPTIONS[name].small, CORRUPTIONS[name].large):
        assert len(table) == len(set(table)) == 5


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", ALL)
def test_range_shape_and_change(name: str, severity: int, colour: Tensor, grey: Tensor) -> None:
    for images in (colour, grey):
        if not supported(name, tuple(images.shape[1:])):
            continue
        before = images.clone()
        result = run(images, name, severity)
        assert result.shape == images.shape
        assert result.dtype == images.dtype
        assert 0 <= float(result.min()) <= float(result.max()) <= 1
        assert float((result - images).abs().mean()) > 1e-4
        assert torch.equal(images, before)


@pytest.mark.parametrize("name", ALL)
def test_a_sample_does_not_depend_on_its_batch(name: str, colour: Tensor) -> None:
    ids = torch.tensor([5, 900, 3, 41, 10_000_007, 6])
    whole = corrupt(colour, name, 4, sample_ids=ids, seed=3)
    order = torch.tensor([4, 1])
    part = corrupt(colour[order], name, 4, sample_ids=ids[order], seed=3)
    # Matrix products of another batch size may differ in the last bit.
    torch.testing.assert_close(part, whole[order], rtol=0, atol=2e-6)
    again = corrupt(colour, name, 4, sample_ids=ids, seed=3)
    assert torch.equal(again, whole)


RANDOM = sorted(
    set(ALL)
    - {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    - {"gaussian_blur", "saturate"}
)


@pytest.mark.parametrize("name", RANDOM)
def test_seed_and_id_change_the_randomness(name: str, colour: Tensor) -> None:
    same = colour[:1].expand(2, -1, -1, -1)
    two_ids = corrupt(same, name, 5, sample_ids=torch.tensor([1, 2]))
    assert not torch.allclose(two_ids[0], two_ids[1], atol=1e-3)
    other_seed = corrupt(same, name, 5, sample_ids=torch.tensor([1, 2]), seed=1)
    assert not torch.allclose(two_ids, other_seed, atol=1e-3)


@pytest.mark.parametrize("name", sorted(set(ALL) - UNORDERED))
def test_damage_grows_with_severity(name: str, colour: Tensor, grey: Tensor) -> None:
    for images in (colour, grey):
        damage = mean_changes(images, name)
        steps = list(itertools.pairwise(damage))
        if name == "motion_blur":  # the trail's sigma is the same at severities 3 and 4
            assert damage[3] == pytest.approx(damage[2], rel=1e-4)
            del steps[2]
        if name == "pixelate":  # 28 pixels to 26 and to 25: which hurts more depends on the picture
            del steps[0]
        assert all(second > first for first, second in steps), damage


def test_damage_grows_where_severities_are_not_in_one_order(colour: Tensor) -> None:
    saturate = mean_changes(colour, "saturate")
    # Lowered at 1 and 2, raised from 3 on.
    assert saturate[1] > saturate[0]
    assert saturate[4] > saturate[3] > saturate[2]
    glass = mean_changes(colour, "glass_blur")
    # Severities 2 and 4, and 3 and 5, have the same blur and one or two passes.
    assert glass[3] > 1.1 * glass[1]
    assert glass[4] > 1.1 * glass[2]
    mud = mean_changes(colour, "spatter")
    assert mud[4] > mud[3]
    assert mud[2] > mud[0]


def test_frost_hides_more_and_more(colour: Tensor, grey: Tensor) -> None:
    # It brightens and dims at once, so the mean change says little; likeness does.
    for images in (colour, grey):
        batch = images.repeat(6, 1, 1, 1)
        likeness = []
        for severity in SEVERITIES:
            result = run(batch, "frost", severity)
            both = torch.stack((batch.flatten(), result.flatten()))
            likeness.append(float(torch.corrcoef(both)[0, 1]))
        assert all(second < first for first, second in itertools.pairwise(likeness)), likeness
        assert likeness[0] > 0.5


@pytest.mark.parametrize("name", ["brightness", "contrast", "pixelate", "gaussian_noise", "snow"])
def test_large_pictures_take_the_other_constants(name: str) -> None:
    assert corruption_parameters(name, 3, (3, 64, 64)) == CORRUPTIONS[name].small[2]
    assert corruption_parameters(name, 3, (3, 64, 65)) == CORRUPTIONS[name].large[2]


@pytest.mark.parametrize("name", ALL)
def test_large_and_oblong_pictures(name: str) -> None:
    images = Draw(ids=torch.arange(2), seed=0, name="large").plasma(80, 96, 1.5, "x")
    images = images.expand(-1, 3, -1, -1)
    for severity in (1, 5):
        result = run(images, name, severity)
        assert result.shape == images.shape
        assert 0 <= float(result.min()) <= float(result.max()) <= 1


@pytest.mark.parametrize("name", ALL)
def test_smallest_pictures_and_other_channel_counts(name: str) -> None:
    images = torch.rand(2, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    if supported(name, (2, 16, 16)):
        assert run(images, name, 5).shape == images.shape
    else:
        assert name == "saturate"


def test_brightness_is_exact() -> None:
    grey = torch.tensor([0.0, 0.2, 0.9]).reshape(1, 1, 1, 3).expand(1, 1, 16, 3).repeat(1, 1, 1, 6)
    result = run(grey, "brightness", 2)
    torch.testing.assert_close(result[0, 0, 0, :3], torch.tensor([0.1, 0.3, 1.0]))
    pixel = torch.tensor([0.4, 0.2, 0.0]).reshape(1, 3, 1, 1).expand(1, 3, 16, 16)
    # Value .4 becomes .5; hue and saturation stay, so all channels grow by a quarter.
    expected = torch.tensor([0.5, 0.25, 0.0])
    torch.testing.assert_close(run(pixel, "brightness", 2)[0, :, 3, 3], expected)


def test_contrast_is_exact() -> None:
    images = torch.zeros(1, 3, 16, 16)
    images[:, 0, :8] = 1.0
    result = run(images, "contrast", 2)
    assert torch.equal(result[0, 0, :8], torch.full((8, 16), 0.75))
    assert torch.equal(result[0, 0, 8:], torch.full((8, 16), 0.25))
    assert not result[0, 1:].any()


def test_saturate_is_exact() -> None:
    pixel = torch.tensor([0.8, 0.4, 0.6]).reshape(1, 3, 1, 1).expand(1, 3, 16, 16)
    # Saturation .5 times .3 is .15: the lowest channel is .8 (1 - .15), the other half-way.
    expected = torch.tensor([0.8, 0.68, 0.74])
    torch.testing.assert_close(run(pixel, "saturate", 1)[0, :, 0, 0], expected)
    grey = torch.full((1, 3, 16, 16), 0.5)
    # Severity 4 adds .1 to the saturation, and a grey pixel's hue is red.
    expected = torch.tensor([0.5, 0.45, 0.45])
    torch.testing.assert_close(run(grey, "saturate", 4)[0, :, 0, 0], expected)


def test_noise_has_the_stated_strength() -> None:
    images = torch.full((16, 3, 32, 32), 0.5)
    for severity in SEVERITIES:
        (std,) = corruption_parameters("gaussian_noise", severity, (3, 32, 32))
        noise = run(images, "gaussian_noise", severity) - images
        assert float(noise.mean()) == pytest.approx(0, abs=4 * std / noise.numel() ** 0.5)
        assert float(noise.std()) == pytest.approx(std, rel=0.02)
        (std,) = corruption_parameters("speckle_noise", severity, (3, 32, 32))
        assert float(run(images, "speckle_noise", severity).std()) == pytest.approx(
            0.5 * std, rel=0.02
        )
        (photons,) = corruption_parameters("shot_noise", severity, (3, 32, 32))
        shot = run(images, "shot_noise", severity)
        assert float(shot.std()) == pytest.approx((0.5 / photons) ** 0.5, rel=0.02)
        torch.testing.assert_close(shot * photons, (shot * photons).round(), atol=1e-3, rtol=0)


def test_impulse_noise_hits_the_stated_share() -> None:
    images = torch.full((32, 3, 32, 32), 0.5)
    result = run(images, "impulse_noise", 5)
    assert float((result != 0.5).float().mean()) == pytest.approx(0.07, rel=0.03)
    hit = result[result != 0.5]
    assert set(hit.unique().tolist()) == {0.0, 1.0}
    assert float(hit.mean()) == pytest.approx(0.5, abs=0.02)
    weaker = run(images, "impulse_noise", 1)
    assert bool((result[weaker != 0.5] != 0.5).all()), "severities share their random numbers"


@pytest.mark.parametrize("rate", [0.0, 0.4, 3.0, 11.9, 12.1, 30.0, 400.0])
def test_poisson_numbers_follow_the_law(rate: float) -> None:
    unit = (torch.arange(100_000) + 0.5) / 100_000
    counts = poisson(torch.full_like(unit, rate), unit).double()
    assert torch.equal(counts, counts.round())
    assert float(counts.mean()) == pytest.approx(rate, rel=2e-3, abs=1e-9)
    assert float(counts.var()) == pytest.approx(rate, rel=1e-2, abs=1e-9)
    if rate:
        law = torch.distributions.Poisson(torch.tensor(rate, dtype=torch.float64))
        for count in {int(rate), int(rate + rate**0.5), max(0, int(rate - rate**0.5))}:
            share = float((counts == count).double().mean())
            exact = float(law.log_prob(torch.tensor(float(count))).exp())
            assert share == pytest.approx(exact, rel=0.02)


def test_glass_blur_takes_values_from_nearby() -> None:
    columns = torch.arange(32.0) / 31
    images = columns.expand(1, 1, 32, 32)
    # Severity 1: reach one pixel, hardly any blur.
    result = run(images, "glass_blur", 1)
    moved = (result - images).mul(31)
    assert float(moved.abs().max()) <= 1 + 1e-4
    assert float((moved.abs() > 0.5).float().mean()) > 0.3


def test_pixelate_equals_pillow(colour: Tensor) -> None:
    image = (colour[:1] * 255).round()
    for severity, share in zip(SEVERITIES, (0.95, 0.9, 0.85, 0.75, 0.65), strict=True):
        picture = Image.fromarray(image[0].permute(1, 2, 0).numpy().astype(np.uint8))
        small = int(32 * share)
        picture = picture.resize((small, small), Image.Resampling.BOX)
        picture = picture.resize((32, 32), Image.Resampling.BOX)
        expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
        result = run(image / 255, "pixelate", severity)[0]
        assert float((result - expected).abs().max()) <= 1.01 / 255


def test_fog_is_a_mixture_of_picture_and_cloud() -> None:
    images = torch.full((4, 1, 32, 32), 0.5)
    result = run(images, "fog", 1)
    # x = (0.5 + 0.2 cloud) 0.5 / 0.7, cloud spans [0, 1].
    low, high = result.amin(dim=(1, 2, 3)), result.amax(dim=(1, 2, 3))
    torch.testing.assert_close(low, torch.full((4,), 0.25 / 0.7))
    torch.testing.assert_close(high, torch.full((4,), 0.5))


def test_motion_and_zoom_keep_flat_pictures() -> None:
    flat = torch.full((3, 3, 32, 32), 0.37)
    for name in ("motion_blur", "zoom_blur", "defocus_blur", "glass_blur", "gaussian_blur"):
        torch.testing.assert_close(run(flat, name, 5), flat)
    for name in ("elastic_transform", "pixelate"):
        torch.testing.assert_close(run(flat, name, 5), flat)


def test_motion_blur_runs_along_the_width_more_than_the_height() -> None:
    stripes = (torch.arange(32) % 2).float()
    upright = stripes.expand(32, 1, 32, 32)
    lying = upright.transpose(2, 3)
    # Angles lie within 45 degrees of the width, so upright stripes are smeared more.
    assert float(run(upright, "motion_blur", 5).std()) < 0.8 * float(
        run(lying, "motion_blur", 5).std()
    )


def test_bad_arguments_get_one_sentence() -> None:
    images, ids = torch.zeros(2, 1, 28, 28), torch.arange(2)
    with pytest.raises(UnknownNameError, match="did you mean 'gaussian_noise'"):
        corrupt(images, "gausian_noise", 1, sample_ids=ids)
    with pytest.raises(ConfigError, match="severity = 6 is out of range"):
        corrupt(images, "fog", 6, sample_ids=ids)
    with pytest.raises(ConfigError, match="needs sides of 16 pixels or more and RGB"):
        corrupt(images, "saturate", 1, sample_ids=ids)
    with pytest.raises(ConfigError, match="divide 8-bit pictures by 255"):
        corrupt(images + 2, "fog", 1, sample_ids=ids)
    with pytest.raises(ConfigError, match="divide 8-bit pictures by 255"):
        corrupt(images * float("nan"), "fog", 1, sample_ids=ids)
    with pytest.raises(ConfigError, match="as many ids"):
        corrupt(images, "fog", 1, sample_ids=ids[:1])
    with pytest.raises(ConfigError, match="must be float"):
        corrupt(images.byte(), "fog", 1, sample_ids=ids)
    assert not supported("fog", (1, 12, 28))


def test_pictures_stay_distinguishable(grey: Tensor) -> None:
    for name in C15:
        result = run(grey, name, 5)
        assert float((result[0] - result[1]).abs().mean()) > 0.005, name
