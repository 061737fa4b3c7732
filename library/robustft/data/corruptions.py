"""Common corruptions: 15 standard types and 4 extra ones at severities 1 to 5.

Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions and
perturbations", ICLR 2019, arXiv 1903.12261. Types and severity constants are theirs: those of
CIFAR-10-C for pictures up to 64 pixels, those of ImageNet-C above. The code is ours: batched
tensor operations on [0, 1], in which a sample's randomness depends on (seed, type, sample id)
alone, so that a picture is corrupted in the same way in any batch or shard. All severities of a
type use the same random numbers, so that they are paired.

Note:
    Pictures made here are comparable with each other, not bit for bit with the published -C files
    (:mod:`robustft.data.corrupted_sets` reads those). The known differences: nothing is rounded to
    256 levels except by ``jpeg_compression``; ``frost`` uses a generated ice texture because the
    original overlays photographs; ``glass_blur`` replaces all pixels of a pass at
    once; ``motion_blur`` and ``snow`` place their trail bilinearly; ``elastic_transform``
    resamples once instead of twice; ``spatter`` draws its drops' relief without edge detection.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from robustft.data import corruption_ops as ops
from robustft.data.corruption_ops import Draw
from robustft.errors import ConfigError, UnknownNameError

__all__ = [
    "C15",
    "CORRUPTIONS",
    "EXTRAS",
    "RIFT18",
    "SEVERITIES",
    "Corruption",
    "corrupt",
    "corruption_parameters",
    "supported",
]

SEVERITIES = (1, 2, 3, 4, 5)
SMALL_SIZE = 64
"""Pictures whose longer side is at most this many pixels take the constants of CIFAR-10-C."""
MIN_SIZE = 16
"""Shortest side in pixels for which the types make sense (kernels reach up to 12 pixels)."""

Parameters = tuple[float, ...]
Group = Literal["noise", "blur", "weather", "digital"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Corruption:
    """One type of corruption.

    Args:
        apply: ``apply(images, draw, *parameters) -> images``.
        group: kind of damage, as in the paper.
        small: parameters per severity for pictures up to ``SMALL_SIZE`` pixels.
        large: parameters per severity for larger ones.
        needs_colour: makes sense for RGB pictures only.
    """

    apply: Callable[..., Tensor]
    group: Group
    small: tuple[Parameters, ...]
    large: tuple[Parameters, ...]
    needs_colour: bool = False


def _each(*values: float) -> tuple[Parameters, ...]:
    """Return one-parameter tuples, one per severity."""
    return tuple((value,) for value in values)


def _zooms(*ranges: tuple[int, int]) -> tuple[Parameters, ...]:
    """Return the zoom factors 1.00, 1.00 + step, ... per severity from (count, step / 0.01)."""
    return tuple(tuple(1 + step * i / 100 for i in range(count)) for count, step in ranges)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(  # standard deviation
        apply=ops.gaussian_noise,
        group="noise",
        small=_each(0.04, 0.06, 0.08, 0.09, 0.10),
        large=_each(0.08, 0.12, 0.18, 0.26, 0.38),
    ),
    "shot_noise": Corruption(  # photons of a white pixel
        apply=ops.shot_noise,
        group="noise",
        small=_each(500, 250, 100, 75, 50),
        large=_each(60, 25, 12, 5, 3),
    ),
    "impulse_noise": Corruption(  # share of values that become 0 or 1
        apply=ops.impulse_noise,
        group="noise",
        small=_each(0.01, 0.02, 0.03, 0.05, 0.07),
        large=_each(0.03, 0.06, 0.09, 0.17, 0.27),
    ),
    "defocus_blur": Corruption(  # radius of the disk, its softening
        apply=ops.defocus_blur,
        group="blur",
        small=((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        large=((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": Corruption(  # sigma, reach of a swap, number of passes
        apply=ops.glass_blur,
        group="blur",
        small=((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        large=((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": Corruption(  # radius, sigma
        apply=ops.motion,
        group="blur",
        small=((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        large=((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": Corruption(  # zoom factors that are averaged
        apply=ops.zoom_blur,
        group="blur",
        small=_zooms((6, 1), (11, 1), (16, 1), (21, 1), (26, 1)),
        large=_zooms((11, 1), (16, 1), (11, 2), (13, 2), (11, 3)),
    ),
    # mean, std, flake size, threshold, trail radius, trail sigma, share of the picture
    "snow": Corruption(
        apply=ops.snow,
        group="weather",
        small=(
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        large=(
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": Corruption(  # weight of the picture, weight of the ice
        apply=ops.frost,
        group="weather",
        small=((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        large=((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ),
    "fog": Corruption(  # thickness, decay of the fractal
        apply=ops.fog,
        group="weather",
        small=((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        large=((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": Corruption(  # added to the value of (hue, saturation, value)
        apply=ops.brightness,
        group="weather",
        small=_each(0.05, 0.1, 0.15, 0.2, 0.3),
        large=_each(0.1, 0.2, 0.3, 0.4, 0.5),
    ),
    "contrast": Corruption(  # factor about the mean
        apply=ops.contrast,
        group="digital",
        small=_each(0.75, 0.5, 0.4, 0.3, 0.15),
        large=_each(0.4, 0.3, 0.2, 0.1, 0.05),
    ),
    # as shares of the size: displacement, its sigma, affine jitter
    "elastic_transform": Corruption(
        apply=ops.elastic_transform,
        group="digital",
        small=(
            (0, 0, 0.08),
            (0.05, 0.2, 0.07),
            (0.08, 0.06, 0.06),
            (0.1, 0.04, 0.05),
            (0.1, 0.03, 0.03),
        ),
        large=(
            (2, 0.7, 0.1),
            (2, 0.08, 0.2),
            (0.05, 0.01, 0.02),
            (0.07, 0.01, 0.02),
            (0.12, 0.01, 0.02),
        ),
    ),
    "pixelate": Corruption(  # size of the smaller picture as a share
        apply=ops.pixelate,
        group="digital",
        small=_each(0.95, 0.9, 0.85, 0.75, 0.65),
        large=_each(0.6, 0.5, 0.4, 0.3, 0.25),
    ),
    "jpeg_compression": Corruption(  # quality
        apply=ops.jpeg_compression,
        group="digital",
        small=_each(80, 65, 58, 50, 40),
        large=_each(25, 18, 15, 10, 7),
    ),
    "speckle_noise": Corruption(  # standard deviation on a white pixel
        apply=ops.speckle_noise,
        group="noise",
        small=_each(0.06, 0.1, 0.12, 0.16, 0.2),
        large=_each(0.15, 0.2, 0.35, 0.45, 0.6),
    ),
    "gaussian_blur": Corruption(  # sigma
        apply=ops.gaussian_blur,
        group="blur",
        small=_each(0.4, 0.6, 0.7, 0.8, 1),
        large=_each(1, 2, 3, 4, 6),
    ),
    "spatter": Corruption(  # mean, std, drop size, threshold, strength (water) or sigma (mud), mud?
        apply=ops.spatter,
        group="weather",
        small=(
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
        large=(
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
    ),
    "saturate": Corruption(  # factor and offset of the saturation
        apply=ops.saturate,
        group="digital",
        small=((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        large=((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
        needs_colour=True,
    ),
}

EXTRAS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""The four that the authors offer for choosing hyper-parameters, not for the benchmark."""

C15 = tuple(name for name in CORRUPTIONS if name not in EXTRAS)
"""The 15 types of the benchmark."""

RIFT18 = tuple(name for name in CORRUPTIONS if name != "glass_blur")
"""The 18 types that the official RiFT code averages: C15 without glass_blur, with the extras."""


def corruption_parameters(
    name: str, severity: int, image_shape: tuple[int, int, int]
) -> Parameters:
    """Return the constants of a type at a severity for pictures of that shape.

    Args:
        name: a key of ``CORRUPTIONS``.
        severity: 1 (light) to 5 (strong).
        image_shape: (channels, height, width).

    Raises:
        UnknownNameError: no such type.
        ConfigError: the severity is not 1 to 5.
    """
    if name not in CORRUPTIONS:
        raise UnknownNameError("corruption", name, CORRUPTIONS)
    if severity not in SEVERITIES:
        raise ConfigError(f"severity = {severity!r} is out of range: it goes from 1 to 5")
    entry = CORRUPTIONS[name]
    return (entry.small if max(image_shape[1:]) <= SMALL_SIZE else entry.large)[severity - 1]


def supported(name: str, image_shape: tuple[int, int, int]) -> bool:
    """Return whether a type makes sense for pictures of (channels, height, width).

    Every side must have 16 pixels or more, and saturation needs colour.

    Raises:
        UnknownNameError: no such type.
    """
    if name not in CORRUPTIONS:
        raise UnknownNameError("corruption", name, CORRUPTIONS)
    channels, height, width = image_shape
    if min(height, width) < MIN_SIZE or channels < 1:
        return False
    return channels == 3 or not CORRUPTIONS[name].needs_colour


def corrupt(
    images: Tensor, name: str, severity: int, *, sample_ids: Tensor, seed: int = 0
) -> Tensor:
    """Corrupt a batch of pictures.

    Args:
        images: float ``[n, channels, height, width]`` in [0, 1]; not changed.
        name: a key of ``CORRUPTIONS``.
        severity: 1 (light) to 5 (strong).
        sample_ids: int64 ``[n]`` instance ids; with ``seed`` they fix the randomness.
        seed: any integer.

    Returns:
        Same shape, type and device, in [0, 1].

    Raises:
        UnknownNameError: no such type.
        ConfigError: an argument is out of range, or the type makes no sense for such pictures.

    Example:
        >>> import torch
        >>> corrupt(torch.zeros(1, 1, 16, 16), "brightness", 2, sample_ids=torch.tensor([7])).max()
        tensor(0.1000)
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ConfigError(
            f"images must be float [n, channels, height, width] in [0, 1], got {images.dtype} "
            f"{list(images.shape)}"
        )
    if sample_ids.shape != images.shape[:1]:
        raise ConfigError(f"{len(images)} images need as many ids, got {list(sample_ids.shape)}")
    channels, height, width = images.shape[1:]
    parameters = corruption_parameters(name, severity, (channels, height, width))
    if not supported(name, (channels, height, width)):
        raise ConfigError(
            f"{name} makes no sense for images of shape {list(images.shape[1:])}: it needs sides "
            f"of {MIN_SIZE} pixels or more"
            f"{' and RGB' if CORRUPTIONS[name].needs_colour else ''}"
        )
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise ConfigError("images must lie in [0, 1]; divide 8-bit pictures by 255 first")
    draw = Draw(ids=sample_ids.to(images.device), seed=seed, name=name)
    result = CORRUPTIONS[name].apply(images.float(), draw, *parameters).clamp(0, 1)
    # clamp() lets NaN through: that is what this checks.
    assert bool(torch.isfinite(result).all()), f"{name} gave a value that is not finite"
    return result.to(images.dtype)
