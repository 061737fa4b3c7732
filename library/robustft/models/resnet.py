"""ResNets for small images (He et al., 2015, arXiv 1512.03385) as RiFT and its kin use them.

A 3x3 stem without max-pooling, stages of basic blocks, average pooling with a 4x4 window, one
linear layer. Module names are those of released checkpoints: ``conv1``, ``bn1``,
``layer1.0.conv1``, ``layer2.0.shortcut.0``, ``linear``.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "BasicBlock",
    "ResNet",
    "conv3x3",
    "pooled_size",
    "resnet18",
    "resnet34",
    "stack",
    "stages",
]

POOL_WINDOW = 4
"""Side of the average-pooling window before the classifier, in cells of the last feature map."""

CIFAR_WIDTHS = (64, 128, 256, 512)
"""Channels of the four stages of every CIFAR ResNet."""


def conv3x3(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution, padding 1, without bias: batch norm follows or precedes it."""
    return nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)


def pooled_size(
    image_shape: tuple[int, int, int], strides: Sequence[int], window: int = POOL_WINDOW
) -> tuple[int, int, tuple[int, int]]:
    """Return height and width after pooling, and the pooling window that gives them.

    Each stride-s layer with padding "same" gives ``ceil(size / s)``. The window shrinks to the
    feature map where that is smaller than the window (images below 25 pixels for a ResNet-18),
    so that small images are pooled globally instead of being refused.

    Args:
        image_shape: (channels, height, width).
        strides: of the layers before the pooling, first to last.
        window: wanted side of the window.
    """
    _, height, width = image_shape
    for stride in strides:
        height, width = -(-height // stride), -(-width // stride)
    windows = min(window, height), min(window, width)
    return height // windows[0], width // windows[1], windows


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN plus shortcut, then ReLU. 1x1 conv and BN where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, inputs: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(inputs)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + self.shortcut(inputs))


def stack(
    block: Callable[[int, int, int], nn.Module],
    in_channels: int,
    channels: int,
    num_blocks: int,
    stride: int,
) -> nn.Sequential:
    """Return one stage; its first block has the stride and changes the width."""
    first = block(in_channels, channels, stride)
    return nn.Sequential(first, *(block(channels, channels, 1) for _ in range(num_blocks - 1)))


def stages(model: nn.Module, names: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Return (name, block) of every block in the named stages, in order."""
    return [
        (f"{name}.{position}", block)
        for name in names
        for position, block in model.get_submodule(name).named_children()
    ]


class ResNet(nn.Module):
    """Post-activation ResNet for small images.

    Args:
        num_classes: width of ``linear``.
        image_shape: (channels, height, width). The classifier's input is
            ``widths[-1] * (height // 32) * (width // 32)`` for multiples of 32 (a 64 px image
            leaves a 2x2 map, flattened); other sizes follow :func:`pooled_size` (28 px leaves a
            4x4 map, hence 1x1).
        num_blocks: per stage.
        widths: channels per stage; the stem has as many as the first.
        stem_stride: stride of ``conv1``; the stages have 1, 2, 2, ...
    """

    def __init__(
        self,
        *,
        num_classes: int,
        image_shape: tuple[int, int, int],
        num_blocks: Sequence[int],
        widths: Sequence[int] = CIFAR_WIDTHS,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        strides = (1, *(2 for _ in widths[1:]))
        rows, columns, self.window = pooled_size(image_shape, (stem_stride, *strides))
        self.conv1 = conv3x3(image_shape[0], widths[0], stem_stride)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stage_names = tuple(f"layer{index + 1}" for index in range(len(widths)))
        in_channels = widths[0]
        for name, width, blocks, stride in zip(
            self.stage_names, widths, num_blocks, strides, strict=True
        ):
            self.add_module(name, stack(BasicBlock, in_channels, width, blocks, stride))
            in_channels = width
        self.linear = nn.Linear(in_channels * rows * columns, num_classes)

    def stem(self, inputs: Tensor) -> Tensor:
        """Return the features that enter the first block."""
        return functional.relu(self.bn1(self.conv1(inputs)))

    def head(self, features: Tensor) -> Tensor:
        """Return the logits of the last block's features."""
        pooled = functional.avg_pool2d(features, self.window)
        logits: Tensor = self.linear(pooled.flatten(1))
        return logits

    def parts(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        """Return the forward pass in pieces; see :func:`robustft.models.layers.parts`."""
        return [
            ("conv1+bn1", self.stem),
            *stages(self, self.stage_names),
            ("linear", self.head),
        ]

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.stem(inputs)
        for name in self.stage_names:
            features = self.get_submodule(name)(features)
        return self.head(features)


def resnet18(*, num_classes: int, image_shape: tuple[int, int, int]) -> ResNet:
    """Return RiFT's ResNet-18: 11,173,962 parameters for 10 classes at 32 px."""
    return ResNet(num_classes=num_classes, image_shape=image_shape, num_blocks=(2, 2, 2, 2))


def resnet34(*, num_classes: int, image_shape: tuple[int, int, int]) -> ResNet:
    """Return RiFT's ResNet-34: 21,282,122 parameters for 10 classes at 32 px."""
    return ResNet(num_classes=num_classes, image_shape=image_shape, num_blocks=(3, 4, 6, 3))
