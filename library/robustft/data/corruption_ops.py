"""What each type of corruption does to a batch; :mod:`robustft.data.corruptions` has the table.

Every function takes float32 pictures ``[n, channels, height, width]`` in [0, 1], the randomness of
the batch, and the parameters of its severity. Results may leave [0, 1]; the caller clips them.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from robustft.data import filters
from robustft.data.jpeg import jpeg_round_trip
from robustft.data.random import derive_seed, hash_bits, uniform

__all__ = [
    "Draw",
    "brightness",
    "contrast",
    "defocus_blur",
    "elastic_transform",
    "fog",
    "frost",
    "gaussian_blur",
    "gaussian_noise",
    "glass_blur",
    "impulse_noise",
    "jpeg_compression",
    "motion",
    "pixelate",
    "poisson",
    "saturate",
    "shot_noise",
    "snow",
    "spatter",
    "speckle_noise",
    "zoom_blur",
]

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_WATER = (175 / 255, 238 / 255, 238 / 255)  # pale turquoise
_MUD = (63 / 255, 42 / 255, 20 / 255)  # brown
_ICE_SIZE = 64  # pixels
_ICE = (0.86, 0.94, 1.0)  # bluish white


@dataclasses.dataclass(frozen=True, slots=True)
class Draw:
    """Random numbers of a batch, one sequence per sample id.

    Args:
        ids: int64 ``[n]``.
        seed: any integer.
        name: of the type of corruption; others get unrelated numbers.
    """

    ids: Tensor
    seed: int
    name: str

    def uniform(
        self, shape: tuple[int, ...], part: str, *, low: float = 0.0, high: float = 1.0
    ) -> Tensor:
        """Uniform numbers of (low, high), float32 ``[n, *shape]``; ``part`` tells uses apart."""
        return (low + (high - low) * self._unit(shape, part)).float()

    def normal(self, shape: tuple[int, ...], part: str) -> Tensor:
        """Standard normal numbers, float32 ``[n, *shape]``, at most 5.5 in size."""
        return (math.sqrt(2) * torch.erfinv(2 * self._unit(shape, part) - 1)).float()

    def integers(self, count: int, shape: tuple[int, ...], part: str) -> Tensor:
        """Integers 0 .. count - 1, int64 ``[n, *shape]``."""
        return hash_bits(self._seed(part), self.ids, shape) % count

    def plasma(self, height: int, width: int, decay: float, part: str) -> Tensor:
        """Fractal clouds ``[n, 1, height, width]`` in [0, 1]."""
        size = 1 << (max(height, width) - 1).bit_length()

        def noise(shape: tuple[int, ...], level: int, place: str) -> Tensor:
            return self.uniform(shape, f"{part} {level} {place}", low=-1, high=1)

        return filters.plasma(noise, size, decay)[:, None, :height, :width]

    def _seed(self, part: str) -> int:
        return derive_seed(self.seed, "corruption", self.name, part)

    def _unit(self, shape: tuple[int, ...], part: str) -> Tensor:
        # Half a step up from the lattice of 24 bits: symmetric about 1/2, and never 0 or 1.
        return uniform(self._seed(part), self.ids, shape).double() + 2.0**-25


def gaussian_noise(images: Tensor, draw: Draw, std: float) -> Tensor:
    return images + std * draw.normal(_shape(images), "noise")


def speckle_noise(images: Tensor, draw: Draw, std: float) -> Tensor:
    return images + images * std * draw.normal(_shape(images), "noise")


def shot_noise(images: Tensor, draw: Draw, photons: float) -> Tensor:
    return poisson(images * photons, draw.uniform(_shape(images), "noise")) / photons


def impulse_noise(images: Tensor, draw: Draw, amount: float) -> Tensor:
    place = draw.uniform(_shape(images), "place")
    white = draw.uniform(_shape(images), "colour") < 0.5
    return torch.where(place < amount, white.to(images), images)


def gaussian_blur(images: Tensor, draw: Draw, sigma: float) -> Tensor:
    return filters.blur(images, sigma)


def defocus_blur(images: Tensor, draw: Draw, radius: float, softening: float) -> Tensor:
    return filters.depthwise(images, filters.defocus_kernel(radius, softening))


def glass_blur(images: Tensor, draw: Draw, sigma: float, reach: float, passes: float) -> Tensor:
    """Blur, replace each inner pixel by a random one up to ``reach`` away, blur again.

    Note:
        The original means to swap the two pixels, but both are views of one array, so that the
        second assignment writes the value back that is already there: the published files hold
        replaced pixels, and so do ours. The original also reads pixels that it has replaced
        already where an offset points to the lower right (``reach`` 2 and more); ours do not.
    """
    blurred = filters.blur(images, sigma)
    height, width = blurred.shape[-2:]
    reach = int(reach)
    rows, columns = (torch.arange(size, device=images.device) for size in (height, width))
    inner = ((rows > reach) & (rows <= height - reach))[:, None] & (
        (columns > reach) & (columns <= width - reach)
    )
    here = rows[:, None] * width + columns
    for number in range(int(passes)):
        offsets = draw.integers(2 * reach, (2, height, width), f"pass {number}") - reach
        there = here + (offsets[:, 0] * width + offsets[:, 1]) * inner
        index = there.flatten(1)[:, None].expand(-1, blurred.shape[1], -1)
        blurred = blurred.flatten(2).gather(2, index).view_as(blurred)
    return filters.blur(blurred, sigma)


def motion(images: Tensor, draw: Draw, radius: float, sigma: float) -> Tensor:
    degrees = draw.uniform((), "angle", low=-45, high=45)
    return filters.motion_blur(images, radius, sigma, degrees)


def zoom_blur(images: Tensor, draw: Draw, *factors: float) -> Tensor:
    height, width = images.shape[-2:]
    total = images.clone()
    for factor in factors:
        rows, columns = filters.zoom_matrix(height, factor), filters.zoom_matrix(width, factor)
        total += filters.apply_separable(images, rows, columns)
    return total / (len(factors) + 1)


def snow(
    images: Tensor,
    draw: Draw,
    mean: float,
    std: float,
    size: float,
    threshold: float,
    radius: float,
    sigma: float,
    share: float,
) -> Tensor:
    """Enlarged thresholded noise, smeared downwards, added with its half turn; picture whitened."""
    height, width = images.shape[-2:]
    flakes = mean + std * draw.normal((1, height, width), "flakes")
    rows, columns = filters.zoom_matrix(height, size), filters.zoom_matrix(width, size)
    flakes = filters.apply_separable(flakes, rows, columns)
    flakes = torch.where(flakes < threshold, 0.0, flakes).clamp(0, 1)
    degrees = draw.uniform((), "angle", low=-135, high=-45)
    flakes = filters.motion_blur(flakes, radius, sigma, degrees)
    whitened = torch.maximum(images, _grey(images) * 1.5 + 0.5)
    base = share * images + (1 - share) * whitened
    return base + flakes + flakes.flip((-2, -1))


def frost(images: Tensor, draw: Draw, picture: float, ice: float) -> Tensor:
    return picture * images + ice * _ice_texture(images, draw) * _tint(images, _ICE)


def fog(images: Tensor, draw: Draw, thickness: float, decay: float) -> Tensor:
    height, width = images.shape[-2:]
    highest = images.amax(dim=(1, 2, 3), keepdim=True)
    foggy = images + thickness * draw.plasma(height, width, decay, "fog")
    return foggy * highest / (highest + thickness)


def brightness(images: Tensor, draw: Draw, amount: float) -> Tensor:
    """Raise the value of (hue, saturation, value), which scales a pixel's channels together."""
    value = images.amax(dim=1, keepdim=True)
    raised = (value + amount).clamp(max=1)
    black = value == 0
    return torch.where(black, raised, images * (raised / torch.where(black, 1.0, value)))


def contrast(images: Tensor, draw: Draw, factor: float) -> Tensor:
    means = images.mean(dim=(2, 3), keepdim=True)
    return (images - means) * factor + means


def saturate(images: Tensor, draw: Draw, factor: float, offset: float) -> Tensor:
    """Change the saturation of (hue, saturation, value); grey pixels have hue 0, red."""
    value = images.amax(dim=1, keepdim=True)
    spread = value - images.amin(dim=1, keepdim=True)
    saturation = spread / torch.where(value == 0, 1.0, value)
    # Depth of a channel below the value, as a share of the deepest: the hue in other words.
    red = images.new_tensor((0.0, 1.0, 1.0))[:, None, None]
    grey = spread == 0
    depth = torch.where(grey, red, (value - images) / torch.where(grey, 1.0, spread))
    return value * (1 - (saturation * factor + offset).clamp(0, 1) * depth)


def jpeg_compression(images: Tensor, draw: Draw, quality: float) -> Tensor:
    return jpeg_round_trip(images, int(quality))


def pixelate(images: Tensor, draw: Draw, share: float) -> Tensor:
    def there_and_back(size: int) -> Tensor:
        small = int(size * share)
        down = filters.box_resize_matrix(size, small)
        return filters.box_resize_matrix(small, size) @ down

    height, width = images.shape[-2:]
    return filters.apply_separable(images, there_and_back(height), there_and_back(width))


def elastic_transform(
    images: Tensor, draw: Draw, displacement: float, sigma: float, jitter: float
) -> Tensor:
    """Random affine map and smooth random displacements; lengths are shares of the shorter side."""
    height, width = images.shape[-2:]
    side = min(height, width)
    middle = images.new_tensor((width // 2, height // 2))
    corner = side // 3
    fixed = middle + corner * images.new_tensor(((1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)))
    moved = fixed + side * draw.uniform((3, 2), "corners", low=-jitter, high=jitter)
    x, y = filters.pixel_grid(images)
    if displacement:
        noise = draw.uniform((2, height, width), "waves", low=-1, high=1)
        smooth = filters.blur(noise, side * sigma, truncate=3, mirror=True)
        x = x + side * displacement * smooth[:, 0]
        y = y + side * displacement * smooth[:, 1]
    # Rows (x, y, 1) of the moved corners times the map give the fixed ones: output -> source.
    ones = torch.ones_like(moved[..., :1])
    affine = torch.linalg.solve(torch.cat((moved, ones), dim=-1), fixed.expand_as(moved))
    weights = affine[..., None, None]
    source_x, source_y = (
        weights[:, 0, axis] * x + weights[:, 1, axis] * y + weights[:, 2, axis] for axis in (0, 1)
    )
    return filters.sample_at(images, source_x, source_y, padding="reflection")


def spatter(
    images: Tensor,
    draw: Draw,
    mean: float,
    std: float,
    size: float,
    threshold: float,
    strength: float,
    mud: float,
) -> Tensor:
    """Drops of water that shine, or of mud that cover.

    Note:
        The original shades water by edge detection and a distance transform; here the drops'
        smoothed outline is lit from the upper left with the same embossing kernel.
    """
    liquid = mean + std * draw.normal((1, *images.shape[-2:]), "liquid")
    liquid = filters.blur(liquid, size)
    wet = liquid > threshold
    if mud:
        cover = filters.blur(wet.to(images), strength)
        cover = torch.where(cover < 0.8, 0.0, cover)
        return images * (1 - cover) + cover * _tint(images, _MUD)
    emboss = images.new_tensor(((-2.0, -1.0, 0.0), (-1.0, 1.0, 1.0), (0.0, 1.0, 2.0)))
    smoothing = images.new_full((3, 3), 1 / 9)
    outline = filters.depthwise(wet.to(images), smoothing)
    relief = filters.depthwise(filters.depthwise(outline, emboss).clamp(0, 1), smoothing)
    shine = torch.where(wet, liquid * relief, 0.0)
    largest = shine.amax(dim=(1, 2, 3), keepdim=True)
    shine = strength * shine / torch.where(largest == 0, 1.0, largest)
    return images + shine * _tint(images, _WATER)


def poisson(rate: Tensor, unit: Tensor) -> Tensor:
    """Return Poisson numbers of mean ``rate`` from uniform ones, by inversion.

    Small rates: the distribution function is summed up to the uniform number, exactly. Large
    rates: Cornish and Fisher's expansion of the quantile (1938) to order 1/sqrt(rate).

    Args:
        rate: means, >= 0, any shape.
        unit: uniform numbers of (0, 1), same shape.
    """
    switch, most = 12.0, 40  # P(count > 40 | rate <= 12) < 1e-10, below the uniform's resolution
    low = rate.clamp(max=switch)
    probability = torch.exp(-low)
    below = probability.clone()
    count = torch.zeros_like(rate)
    for value in range(1, most + 1):
        count += unit > below
        probability = probability * low / value
        below += probability
    z = math.sqrt(2) * torch.erfinv(2 * unit - 1)
    root = rate.sqrt()
    skew = (z**2 - 1) / 6
    kurtosis = (z - z**3) / (72 * root.clamp(min=1))
    high = (rate + z * root + skew + kurtosis + 0.5).floor().clamp(min=0)
    return torch.where(rate > switch, high, count)


def _shape(images: Tensor) -> tuple[int, ...]:
    return tuple(images.shape[1:])


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    return (images * images.new_tensor(_LUMA)[:, None, None]).sum(dim=1, keepdim=True)


def _tint(images: Tensor, colour: tuple[float, float, float]) -> Tensor:
    """Return a colour that can be multiplied with ``images``: its luma if they are not RGB."""
    tint = images.new_tensor(colour)[None, :, None, None]
    return tint if images.shape[1] == 3 else _grey(tint)


def _ice_texture(images: Tensor, draw: Draw) -> Tensor:
    """Return frost on a window pane, ``[n, 1, h, w]`` in [0, 1]: a haze, veins and needles.

    It is drawn at up to 64 pixels and enlarged beyond, so that crystals grow with the picture.
    """
    shrink = max(1.0, max(images.shape[-2:]) / _ICE_SIZE)
    height, width = (round(side / shrink) for side in images.shape[-2:])
    haze = draw.plasma(height, width, 1.5, "haze")
    # A fractal's middle level set is a net of thin branching lines.
    veins = 1 - (2 * draw.plasma(height, width, 1.3, "veins") - 1).abs()
    texture = 0.35 * haze + 0.45 * veins**6
    for needle in range(3):
        grains = (draw.uniform((1, height, width), f"grains {needle}") > 0.97).to(images)
        angles = draw.uniform((), f"angle {needle}", low=60.0 * needle, high=60.0 * needle + 60)
        texture = texture + 2 * filters.motion_blur(grains, 8, 4, angles)
    texture = (texture + 0.1).clamp(0, 1)
    if shrink == 1:
        return texture
    size = (images.shape[-2], images.shape[-1])
    return F.interpolate(texture, size=size, mode="bilinear", align_corners=False)
