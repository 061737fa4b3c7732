"""Wide ResNets (Zagoruyko and Komodakis, 2016, arXiv 1605.07146), named as in RiFT and TRADES.

``conv1``, ``block1.layer.0.bn1``, ``block1.layer.0.conv1``, ``block1.layer.0.convShortcut``,
``bn1``, ``fc``.

Note:
    The authors' class also holds ``sub_block1``, a copy of block 1 that the forward pass never
    uses (2,102,112 parameters). We leave it out, because DDP would complain about parameters
    without gradient; the checkpoint loader drops its weights and says so.
"""

import math
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from robustft.models.resnet import conv3x3, pooled_size, stages

__all__ = ["WideBlock", "WideResNet", "wrn34_10"]

STEM_WIDTH = 16
POOL_WINDOW = 8
STRIDES = (1, 2, 2)


class WideBlock(nn.Module):
    """Pre-activation block; ``convShortcut`` of the activated input where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.convShortcut: nn.Conv2d | None = None
        if in_channels != channels:
            self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        activated = functional.relu(self.bn1(inputs))
        skipped = inputs if self.convShortcut is None else self.convShortcut(activated)
        residual: Tensor = self.conv2(functional.relu(self.bn2(self.conv1(activated))))
        return skipped + residual


class WideStage(nn.Module):
    """Blocks under the name ``layer``, as released checkpoints have them."""

    def __init__(self, in_channels: int, channels: int, num_blocks: int, stride: int) -> None:
        super().__init__()
        first = WideBlock(in_channels, channels, stride)
        others = (WideBlock(channels, channels, 1) for _ in range(num_blocks - 1))
        self.layer = nn.Sequential(first, *others)

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.layer(inputs)
        return features


class WideResNet(nn.Module):
    """WRN-depth-widen_factor for small images.

    Args:
        num_classes: width of ``fc``.
        image_shape: (channels, height, width). ``fc`` takes
            ``64 * widen_factor * (height // 32) * (width // 32)`` inputs for multiples of 32;
            maps smaller than the 8x8 pooling window (28 px) are pooled globally.
        depth: 6 * blocks per stage + 4.
        widen_factor: multiplies the stage widths 16, 32, 64.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        image_shape: tuple[int, int, int],
        depth: int,
        widen_factor: int,
    ) -> None:
        super().__init__()
        num_blocks = (depth - 4) // 6
        widths = [STEM_WIDTH * widen_factor * factor for factor in (1, 2, 4)]
        rows, columns, self.window = pooled_size(image_shape, STRIDES, POOL_WINDOW)
        self.conv1 = conv3x3(image_shape[0], STEM_WIDTH)
        self.block1 = WideStage(STEM_WIDTH, widths[0], num_blocks, STRIDES[0])
        self.block2 = WideStage(widths[0], widths[1], num_blocks, STRIDES[1])
        self.block3 = WideStage(widths[1], widths[2], num_blocks, STRIDES[2])
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2] * rows * columns, num_classes)
        self._initialize()

    def _initialize(self) -> None:
        """Conv weights from N(0, 2 / (k * k * out)), linear bias 0, as in the authors' code."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def head(self, features: Tensor) -> Tensor:
        """Return the logits of the last block's features."""
        pooled = functional.avg_pool2d(functional.relu(self.bn1(features)), self.window)
        logits: Tensor = self.fc(pooled.flatten(1))
        return logits

    def parts(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        """Return the forward pass in pieces; see :func:`robustft.models.layers.parts`."""
        names = ("block1.layer", "block2.layer", "block3.layer")
        return [("conv1", self.conv1), *stages(self, names), ("bn1+fc", self.head)]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.block3(self.block2(self.block1(self.conv1(inputs)))))


def wrn34_10(*, num_classes: int, image_shape: tuple[int, int, int]) -> WideResNet:
    """Return RiFT's WRN34-10: 46,160,474 parameters for 10 classes at 32 px (all of them live)."""
    return WideResNet(num_classes=num_classes, image_shape=image_shape, depth=34, widen_factor=10)
