"""Filters, resampling and textures that the corruptions are made of: batched tensor code.

Separable linear operations along one axis are ``[size, size]`` matrices: boundary rules and any
width are then exact, and applying one is a matrix product.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "apply_separable",
    "blur",
    "blur_matrix",
    "box_resize_matrix",
    "defocus_kernel",
    "depthwise",
    "motion_blur",
    "pixel_grid",
    "plasma",
    "sample_at",
    "zoom_matrix",
]

_NEGLIGIBLE = (
    4.0  # standard deviations beyond which a Gaussian weight (3e-4 of the peak) is dropped
)


def apply_separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply ``rows`` ``[h', h]`` along the height and ``columns`` ``[w', w]`` along the width."""
    return rows.to(images) @ images @ columns.to(images).T


def blur_matrix(
    size: int, sigma: float, *, truncate: float = _NEGLIGIBLE, mirror: bool = False
) -> Tensor:
    """Return the matrix of a Gaussian filter along an axis of ``size`` pixels.

    Args:
        size: number of pixels, >= 1.
        sigma: standard deviation in pixels, >= 0; 0 gives the identity.
        truncate: kernel radius in standard deviations.
        mirror: beyond the border the picture is mirrored (edge pixel repeated) if true, else the
            edge pixel goes on for ever.
    """
    if sigma == 0:
        return torch.eye(size, dtype=torch.float64)
    radius = int(truncate * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    weights /= weights.sum()
    sources = torch.arange(size)[:, None] + offsets
    if mirror:
        sources = sources % (2 * size)
        sources = torch.where(sources < size, sources, 2 * size - 1 - sources)
    else:
        sources = sources.clamp(0, size - 1)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, sources, weights.expand(size, -1).contiguous())


def blur(
    images: Tensor, sigma: float, *, truncate: float = _NEGLIGIBLE, mirror: bool = False
) -> Tensor:
    """Gaussian filter of ``[..., height, width]``; see :func:`blur_matrix`."""
    height, width = images.shape[-2:]
    rows = blur_matrix(height, sigma, truncate=truncate, mirror=mirror)
    columns = blur_matrix(width, sigma, truncate=truncate, mirror=mirror)
    return apply_separable(images, rows, columns)


def zoom_matrix(size: int, factor: float) -> Tensor:
    """Return the matrix that enlarges the middle of an axis by ``factor`` (>= 1), linearly.

    The middle ``ceil(size / factor)`` pixels are stretched end to end and the result is cut to
    ``size`` pixels around its middle.
    """
    crop = math.ceil(size / factor)
    first = (size - crop) // 2
    stretched = round(crop * factor)
    if stretched <= 1:
        return torch.ones(size, 1, dtype=torch.float64)
    trim = (stretched - size) // 2
    positions = torch.arange(size, dtype=torch.float64) + trim
    sources = first + positions * (crop - 1) / (stretched - 1)
    lower = sources.floor().clamp(0, size - 1)
    share = sources - lower
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix.scatter_add_(1, lower.long()[:, None], (1 - share)[:, None])
    upper = (lower + 1).clamp(max=size - 1).long()
    return matrix.scatter_add_(1, upper[:, None], share[:, None])


def box_resize_matrix(size: int, new_size: int) -> Tensor:
    """Return the ``[new_size, size]`` matrix of resizing with Pillow's BOX filter.

    Smaller: the mean of the pixels whose centres fall into the new pixel; larger: the nearest.
    """
    scale = size / new_size
    support = max(scale, 1.0)
    centres = (torch.arange(new_size, dtype=torch.float64) + 0.5) * scale
    distance = (torch.arange(size, dtype=torch.float64) + 0.5 - centres[:, None]) / support
    weights = ((distance > -0.5) & (distance <= 0.5)).double()
    return weights / weights.sum(dim=1, keepdim=True)


def defocus_kernel(radius: float, softening: float) -> Tensor:
    """Return the kernel of a lens out of focus: a disk of ``radius`` pixels, softened.

    Args:
        radius: of the disk in pixels, >= 0.
        softening: standard deviation of the Gaussian that softens the disk's edge, > 0; cut off
            at 1 pixel for radii up to 8 and at 2 pixels above.
    """
    reach = 1 if radius <= 8 else 2
    half = int(radius) + reach
    points = torch.arange(-half, half + 1, dtype=torch.float64)
    disk = ((points**2 + points[:, None] ** 2) <= radius**2).double()
    taps = torch.arange(-reach, reach + 1, dtype=torch.float64)
    soft = torch.exp(-0.5 * (taps / softening) ** 2)
    soft = soft[:, None] * soft
    kernel = F.conv2d(disk[None, None], soft[None, None], padding=reach)[0, 0]
    return kernel / kernel.sum()


def depthwise(images: Tensor, kernel: Tensor) -> Tensor:
    """Correlate every channel with one odd-sized ``kernel``; borders are reflected."""
    channels = images.shape[1]
    half = kernel.shape[-1] // 2
    padded = F.pad(images, (half, half, half, half), mode="reflect")
    weight = kernel.to(images).expand(channels, 1, *kernel.shape)
    return F.conv2d(padded, weight, groups=channels)


def pixel_grid(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pixel coordinates (x, y) of ``[n, c, h, w]``, each ``[1, h, w]``."""
    height, width = images.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, dtype=images.dtype, device=images.device),
        torch.arange(width, dtype=images.dtype, device=images.device),
        indexing="ij",
    )
    return x[None], y[None]


def sample_at(images: Tensor, x: Tensor, y: Tensor, *, padding: str) -> Tensor:
    """Bilinear samples at pixel coordinates ``[n, h, w]``; padding "border" or "reflection"."""
    height, width = images.shape[-2:]
    grid = torch.stack((2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1), dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=padding, align_corners=True)


def motion_blur(images: Tensor, radius: float, sigma: float, degrees: Tensor) -> Tensor:
    """Smear each picture along its own direction with a one-sided Gaussian trail.

    Args:
        images: float ``[n, c, h, w]``.
        radius: the trail has ``2 * radius + 1`` taps, one pixel apart.
        sigma: of the trail in pixels.
        degrees: ``[n]`` direction; 0 points along the width.
    """
    taps = min(2 * math.ceil(radius), math.ceil(_NEGLIGIBLE * sigma)) + 1
    weights = [math.exp(-0.5 * (tap / sigma) ** 2) for tap in range(taps)]
    x, y = pixel_grid(images)
    radians = torch.deg2rad(degrees)[:, None, None]
    step_x, step_y = torch.cos(radians), torch.sin(radians)
    total = torch.zeros_like(images)
    for tap, weight in enumerate(weights):
        shifted = sample_at(images, x + tap * step_x, y + tap * step_y, padding="border")
        total += shifted * (weight / sum(weights))
    return total


def plasma(noise: Callable[[tuple[int, ...], int, str], Tensor], size: int, decay: float) -> Tensor:
    """Cloud-like fractal by the diamond-square algorithm on a torus.

    Fournier, Fussell and Carpenter, "Computer rendering of stochastic models", 1982.

    Args:
        noise: ``noise(shape, level, place)`` returns numbers of (-1, 1), ``[n, *shape]``.
        size: side length in pixels; a power of two.
        decay: the noise added at each finer level falls by ``decay ** 2``; larger is smoother.

    Returns:
        ``[n, size, size]``; each picture spans exactly [0, 1].
    """
    first = noise((1, 1), 0, "centres")
    field = first.new_zeros(len(first), size, size)
    step, amplitude, level = size, 1.0, 0
    while step >= 2:
        half = step // 2
        corners = field[:, ::step, ::step]
        shape = tuple(corners.shape[1:])
        sums = corners + corners.roll(-1, 1)
        sums = sums + sums.roll(-1, 2)
        centres = sums / 4 + amplitude * noise(shape, level, "centres")
        field[:, half::step, half::step] = centres
        # Each edge point lies between two corners and two centres.
        across = centres + centres.roll(1, 1) + corners + corners.roll(-1, 2)
        field[:, ::step, half::step] = across / 4 + amplitude * noise(shape, level, "across")
        down = centres + centres.roll(1, 2) + corners + corners.roll(-1, 1)
        field[:, half::step, ::step] = down / 4 + amplitude * noise(shape, level, "down")
        step, amplitude, level = half, amplitude / decay**2, level + 1
    lowest = field.amin(dim=(1, 2), keepdim=True)
    return (field - lowest) / (field.amax(dim=(1, 2), keepdim=True) - lowest)
