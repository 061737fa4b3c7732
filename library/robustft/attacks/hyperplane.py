"""Projection of points on a hyperplane intersected with the pixel box [0, 1]^d.

F. Croce and M. Hein, "Minimally distorted adversarial examples with a fast adaptive boundary
attack", 2020, arXiv 1907.02044: the step of FAB.

Bring a point t to ``<w, u> = b`` with as little movement as possible. Every coordinate moves
against its w (along it if ``<w, t> < b``) by some a_i, 0 <= a_i <= room_i, where the room is what
the box leaves, and the moves must add up: ``sum_i |w_i| a_i = |<w, t> - b|``. The shortest are

* Linf: ``a_i = min(level, room_i)``,
* L2: ``a_i = min(level |w_i|, room_i)``,
* L1: ``a_i = room_i`` for the largest ``|w_i|``, the last of them in part,

with one number per point to find. The paper and the official code sort the coordinates for it; a
bisection of a few passes over the data finds the same number several times faster.
"""

import torch
from torch import Tensor
from torch.nn import functional

from robustft.threat import Norm

__all__ = ["project_on_hyperplane"]

SMALLEST_SIZE = 1e-8  # of the official code: coordinates with |w| up to it are left alone
# Chosen so that random and geometric weights and rooms of 26 octaves come out exact in float64.
HALVINGS = 8
NEWTON_STEPS = 5


def project_on_hyperplane(points: Tensor, normals: Tensor, excess: Tensor, *, norm: Norm) -> Tensor:
    """Return the shortest moves that bring ``points`` on hyperplanes without leaving the box.

    Where the box does not reach its hyperplane, every coordinate moves to the bound that is
    nearest to the hyperplane.

    Args:
        points: ``[..., d]`` in [0, 1], float32 or float64, without a gradient.
        normals: w, ``[..., d]`` or anything that broadcasts to the points.
        excess: ``<w, point> - b``, ``[...]``: how far the points are off, and on which side.
        norm: what is shortest: "Linf", "L2" or "L1".

    Returns:
        Displacements ``[..., d]``; ``points + displacements`` is in [0, 1] up to rounding.

    Note:
        Where several ``|w_i|`` tie at the threshold of L1, all of them move by the same share of
        their rooms. That is as short as filling one after the other, as the official code does,
        and does not depend on the order of the coordinates.

    Example:
        >>> points, normals = torch.tensor([[0.2, 0.5, 0.9]]), torch.tensor([[1.0, -2.0, 0.5]])
        >>> project_on_hyperplane(points, normals, torch.tensor([-0.95]), norm="Linf")
        tensor([[ 0.3000, -0.3000,  0.1000]])
    """
    normals = functional.hardshrink(normals, SMALLEST_SIZE)
    sizes = normals.abs()
    excess = excess.unsqueeze(-1)
    needed = excess.abs()
    # Comparisons that write floats are vectorised; boolean masks are several times slower.
    corners = torch.lt(normals * excess.sign(), 0, out=torch.empty_like(points))
    gaps = (corners - points).mul_(sizes.sign())  # to the bound that a coordinate moves towards
    if norm == "Linf":
        reach = _level(gaps.abs(), sizes, needed)
    elif norm == "L2":
        reach = sizes * _level(gaps.abs() / sizes.clamp(min=SMALLEST_SIZE), sizes.square(), needed)
    else:
        return gaps.mul_(_greedy_shares(sizes, sizes * gaps.abs(), needed))
    return torch.clamp(gaps, -reach, reach)


def _level(kinks: Tensor, slopes: Tensor, needed: Tensor) -> Tensor:
    """Solve ``sum_i slopes_i min(level, kinks_i) = needed`` for ``level``, ``[..., 1]``.

    The sum is concave, increasing and piecewise linear in ``level``. From the left, Newton's method
    therefore rises monotonically to the solution and is exact once it is on the last segment. From
    far away that may take many steps, so a few halvings of the logarithm come first.
    """
    buffer = torch.empty_like(kinks)
    tiny, huge = torch.finfo(kinks.dtype).tiny, torch.finfo(kinks.dtype).max

    def value(level: Tensor) -> Tensor:
        return torch.minimum(kinks, level, out=buffer).mul_(slopes).sum(-1, keepdim=True)

    high = kinks.amax(dim=-1, keepdim=True)
    low = torch.minimum(needed / slopes.sum(-1, keepdim=True).clamp(min=tiny), high)
    unreachable = needed >= value(high)
    for _ in range(HALVINGS):
        middle = (low * high).sqrt()
        too_low = value(middle) < needed
        low, high = middle.where(too_low, low), high.where(too_low, middle)
    for _ in range(NEWTON_STEPS):
        missing = (needed - value(low)).clamp(min=0)
        slope = torch.gt(kinks, low, out=buffer).mul_(slopes).sum(-1, keepdim=True)
        low = low + missing / slope.clamp(min=tiny)
    return low.clamp(max=huge).where(~unreachable, huge)  # Not inf: inf * 0 would be NaN.


def _greedy_shares(sizes: Tensor, gains: Tensor, needed: Tensor) -> Tensor:
    """Return which share of its room each coordinate uses: all above a threshold of ``sizes``.

    The threshold is the smallest number above which the gains do not exceed ``needed``. Floats >= 0
    have the order of their bits, so that halving the range of the bits finds it exactly.
    """
    buffer = torch.empty_like(gains)
    integers = torch.int32 if sizes.dtype == torch.float32 else torch.int64

    def gain_above(bits: Tensor) -> Tensor:
        above = torch.gt(sizes, bits.view(sizes.dtype), out=buffer)
        return above.mul_(gains).sum(-1, keepdim=True)

    largest = sizes.amax(dim=-1, keepdim=True).expand_as(needed).contiguous()
    high = largest.view(integers)
    low = torch.zeros_like(high)
    for _ in range(torch.iinfo(integers).bits - 1):
        middle = low + (high - low) // 2
        too_low = gain_above(middle) > needed
        low, high = middle.where(too_low, low), high.where(too_low, middle)
    threshold = high.view(sizes.dtype)
    certain = gain_above(high)
    at_threshold = torch.eq(sizes, threshold, out=buffer).mul_(gains).sum(-1, keepdim=True)
    tiny = torch.finfo(gains.dtype).tiny
    share = ((needed - certain) / at_threshold.clamp(min=tiny)).clamp(0, 1)
    shares = torch.eq(sizes, threshold, out=buffer).mul_(share)
    return shares.add_(torch.gt(sizes, threshold, out=torch.empty_like(gains)))
