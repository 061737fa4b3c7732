"""Filters against SciPy, and the JPEG round trip against Pillow's encoder."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from robustft.data.corruption_ops import Draw
from robustft.data.filters import (
    apply_separable,
    blur,
    blur_matrix,
    box_resize_matrix,
    defocus_kernel,
    motion_blur,
    zoom_matrix,
)
from robustft.data.jpeg import jpeg_round_trip, quantisation_table
from robustft.errors import ConfigError

ndimage = pytest.importorskip("scipy.ndimage", reason="needs SciPy to compare with")


def pictures(channels: int, height: int = 32, width: int = 32) -> Tensor:
    draw = Draw(ids=torch.arange(4), seed=2, name="pictures")
    return torch.cat([draw.plasma(height, width, 1.5, f"{c}") for c in range(channels)], dim=1)


@pytest.mark.parametrize("sigma", [0.05, 0.4, 1.0, 3.0])
def test_blur_equals_scipy(sigma: float) -> None:
    images = pictures(1)
    expected = ndimage.gaussian_filter(images[0, 0].double().numpy(), sigma, mode="nearest")
    result = blur(images.double(), sigma)[0, 0]
    torch.testing.assert_close(result, torch.from_numpy(expected))


@pytest.mark.parametrize("sigma", [0.5, 6.4, 40.0])
def test_mirrored_blur_equals_scipy(sigma: float) -> None:
    images = pictures(1)
    options = {"mode": "reflect", "truncate": 3.0}
    expected = ndimage.gaussian_filter(images[0, 0].double().numpy(), sigma, **options)
    result = blur(images.double(), sigma, truncate=3, mirror=True)[0, 0]
    torch.testing.assert_close(result, torch.from_numpy(expected))


@pytest.mark.parametrize("factor", [1.0, 1.01, 1.12, 1.25, 1.75, 2.25, 4.5])
def test_zoom_equals_scipy(factor: float) -> None:
    image = pictures(1)[0, 0].double()
    crop = math.ceil(32 / factor)
    top = (32 - crop) // 2
    zoomed = ndimage.zoom(image[top : top + crop, top : top + crop].numpy(), factor, order=1)
    trim = (zoomed.shape[0] - 32) // 2
    expected = torch.from_numpy(zoomed[trim : trim + 32, trim : trim + 32])
    matrix = zoom_matrix(32, factor)
    torch.testing.assert_close(apply_separable(image, matrix, matrix), expected)


def test_matrices_keep_constants() -> None:
    for matrix in (blur_matrix(20, 2.0), zoom_matrix(20, 1.3), box_resize_matrix(20, 7)):
        torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix), dtype=torch.float64))


def test_defocus_kernel_is_a_softened_disk() -> None:
    kernel = defocus_kernel(3, 0.1)
    # 29 lattice points lie within 3 pixels of the centre; softening by 0.1 pixels changes nothing.
    assert int((kernel > 1e-6).sum()) == 29
    torch.testing.assert_close(kernel[kernel > 1e-6], torch.full((29,), 1 / 29).double())
    assert float(defocus_kernel(1.5, 0.1).sum()) == pytest.approx(1)


def test_motion_blur_draws_a_trail_in_its_direction() -> None:
    images = torch.zeros(2, 1, 31, 31)
    images[:, :, 15, 15] = 1
    result = motion_blur(images, 6, 2.0, torch.tensor([0.0, 90.0]))
    weights = torch.exp(-0.5 * (torch.arange(9) / 2.0) ** 2)
    weights /= weights.sum()
    torch.testing.assert_close(result[0, 0, 15, 7:16].flip(0), weights, atol=1e-4, rtol=0)
    torch.testing.assert_close(result[1, 0, 7:16, 15].flip(0), weights, atol=1e-4, rtol=0)


def pillow_round_trip(image: Tensor, quality: int) -> Tensor:
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    decoded = np.array(Image.open(file))
    decoded = decoded[..., None] if len(image) == 1 else decoded
    return torch.from_numpy(decoded).permute(2, 0, 1) / 255


@pytest.mark.parametrize("quality", [7, 25, 40, 65, 80, 95])
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 28, 28), (3, 40, 21)])
def test_jpeg_equals_pillow(quality: int, channels: int, height: int, width: int) -> None:
    images = pictures(channels, height, width)
    result = jpeg_round_trip(images, quality)
    for image, ours in zip(images, result, strict=True):
        theirs = pillow_round_trip(image, quality)
        # What is left is the encoder's integer arithmetic: a level here and there, and rarely a
        # coefficient that is rounded to the next step.
        assert float((ours - theirs).abs().mean()) < 2.0 / 255
        assert -10 * math.log10(float((ours - theirs).square().mean()) + 1e-12) > 32
        # The comparison has power: compression itself changes far more.
        if quality <= 65:
            assert float((image - theirs).abs().mean()) > 4 * float((ours - theirs).abs().mean())


def test_quantisation_tables() -> None:
    table = quantisation_table(50)
    assert table[0, 0] == 16
    assert table[7, 7] == 99
    assert quantisation_table(25)[0, 0] == 32
    assert quantisation_table(100).max() == 1
    assert quantisation_table(80, chrominance=True)[0, :3].tolist() == [7, 7, 10]
    picture = Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8))
    for quality in (7, 40, 80):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        stored = Image.open(file).quantization  # type: ignore[attr-defined]
        for number, chrominance in ((0, False), (1, True)):
            ours = quantisation_table(quality, chrominance=chrominance)
            assert sorted(ours.flatten().tolist()) == sorted(stored[number])
    with pytest.raises(ConfigError, match="1 to 100"):
        quantisation_table(0)
