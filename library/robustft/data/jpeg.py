"""The loss of a JPEG round trip as tensor code: quantised block cosine transforms.

Baseline JPEG (ITU-T T.81, 1992) with the example tables of its annex K, scaled by quality as the
Independent JPEG Group's library does; colour is stored at half resolution in both directions
(4:2:0). Entropy coding is left out because it loses nothing.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from robustft.errors import ConfigError

__all__ = ["jpeg_round_trip", "quantisation_table"]

_BLOCK = 8
_CENTRE = 128.0  # grey level that is shifted to zero before the transform
_LARGEST = 255.0

# ITU-T T.81, tables K.1 (luminance) and K.2 (chrominance).
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)

# ITU-R BT.601 luma weights as JFIF uses them, rows Y, Cb, Cr.
_TO_YCC = (
    (0.299, 0.587, 0.114),
    (-0.168735892, -0.331264108, 0.5),
    (0.5, -0.418687589, -0.081312411),
)
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136286, -0.714136286), (1.0, 1.772, 0.0))


def quantisation_table(quality: int, *, chrominance: bool = False) -> Tensor:
    """Return the ``[8, 8]`` table of steps at ``quality`` (1 to 100), integers from 1 to 255."""
    if not 1 <= quality <= 100:
        raise ConfigError(f"JPEG quality = {quality} is out of range: it goes from 1 to 100")
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    base = torch.tensor(_CHROMINANCE if chrominance else _LUMINANCE)
    return ((base * percent + 50) // 100).clamp(1, 255).float()


def jpeg_round_trip(images: Tensor, quality: int) -> Tensor:
    """Return ``images`` as they look after being saved as JPEG and read again.

    Three channels are taken as RGB and coded 4:2:0; any other number of channels is coded as that
    many grey pictures.

    Args:
        images: float ``[n, channels, height, width]`` in [0, 1]; rounded to 256 levels first.
        quality: 1 (worst) to 100.

    Returns:
        Same shape, in [0, 1], on the lattice of 1/255.
    """
    height, width = images.shape[-2:]
    levels = (images * _LARGEST).round()
    # Blocks at the border are completed by repeating the last row and column, as encoders do.
    multiple = 2 * _BLOCK
    levels = F.pad(levels, (0, -width % multiple, 0, -height % multiple), mode="replicate")
    luminance = quantisation_table(quality).to(images)
    if images.shape[1] != 3:
        result = _code_plane(levels, luminance)
    else:
        chrominance = quantisation_table(quality, chrominance=True).to(images)
        offset = images.new_tensor((0.0, _CENTRE, _CENTRE))[:, None, None]
        ycc = (_mix_channels(levels, _TO_YCC) + offset).round().clamp(0, _LARGEST)
        luma = _code_plane(ycc[:, :1], luminance)
        colour = F.interpolate(
            _code_plane(_halve(ycc[:, 1:]), chrominance),
            scale_factor=2,
            mode="bilinear",
            align_corners=False,
        ).round()
        result = _mix_channels(torch.cat((luma, colour), dim=1) - offset, _TO_RGB)
    result = result[..., :height, :width].round().clamp(0, _LARGEST)
    return result / _LARGEST


def _mix_channels(images: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    red, green, blue = images.unbind(1)
    rows = [row[0] * red + row[1] * green + row[2] * blue for row in matrix]
    return torch.stack(rows, dim=1)


def _halve(planes: Tensor) -> Tensor:
    """Average 2 x 2 pixels; ties are rounded down and up in alternate columns (libjpeg)."""
    sums = 4 * F.avg_pool2d(planes, 2)
    bias = 1 + torch.arange(sums.shape[-1], device=planes.device) % 2
    return ((sums + bias) / 4).floor()


def _code_plane(planes: Tensor, table: Tensor) -> Tensor:
    """Transform, quantise and transform back each 8 x 8 block of planes in [0, 255]."""
    n, channels, height, width = planes.shape
    blocks = (planes - _CENTRE).reshape(
        n, channels, height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK
    )
    blocks = blocks.transpose(3, 4)
    basis = _cosine_basis().to(planes)
    coefficients = ((basis @ blocks @ basis.T) / table).round() * table
    blocks = (basis.T @ coefficients @ basis).transpose(3, 4)
    return (blocks.reshape(planes.shape) + _CENTRE).round().clamp(0, _LARGEST)


def _cosine_basis() -> Tensor:
    """Return the orthonormal type-II cosine transform of 8 points: row = frequency."""
    points = torch.arange(_BLOCK, dtype=torch.float64)
    basis = torch.cos(math.pi / _BLOCK * (points + 0.5) * points[:, None])
    basis *= math.sqrt(2 / _BLOCK)
    basis[0] /= math.sqrt(2)
    return basis
