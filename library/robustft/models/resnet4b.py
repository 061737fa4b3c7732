"""Two small CIFAR networks without batch norm for which adversarially trained weights exist.

Both come from the neural-network verification literature; the weights that fit are
``models/cifar10_resnet/resnet4b.pth`` and ``models/sdp/cifar_cnn_a_adv4.model`` of
Verified-Intelligence/alpha-beta-CROWN (BSD 3-clause).
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from robustft.models.resnet import stack, stages

__all__ = ["ResNet4b", "cnn_a", "resnet4b"]

STEM_WIDTH = 16
WIDTH = 32
HIDDEN = 100


class PlainBlock(nn.Module):
    """conv-ReLU-conv plus shortcut, then ReLU; all convolutions have a bias."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut.append(nn.Conv2d(in_channels, channels, 1, stride=stride))

    def forward(self, inputs: Tensor) -> Tensor:
        out = self.conv2(functional.relu(self.conv1(inputs)))
        return functional.relu(out + self.shortcut(inputs))


class ResNet4b(nn.Module):
    """Four residual blocks without batch norm and two linear layers: 13 weight layers.

    Names: ``conv1``, ``layer1.0.conv1``, ``layer1.0.shortcut.0``, ..., ``linear1``, ``linear2``.
    """

    def __init__(self, *, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = image_shape
        cells = -(-height // 8) * -(-width // 8)  # three layers of stride 2
        self.conv1 = nn.Conv2d(channels, STEM_WIDTH, 3, stride=2, padding=1)
        self.layer1 = stack(PlainBlock, STEM_WIDTH, WIDTH, 2, 2)
        self.layer2 = stack(PlainBlock, WIDTH, WIDTH, 2, 2)
        self.linear1 = nn.Linear(WIDTH * cells, HIDDEN)
        self.linear2 = nn.Linear(HIDDEN, num_classes)

    def stem(self, inputs: Tensor) -> Tensor:
        """Return the features that enter the first block."""
        return functional.relu(self.conv1(inputs))

    def hidden(self, features: Tensor) -> Tensor:
        """Return the 100 hidden units of the classifier."""
        return functional.relu(self.linear1(features.flatten(1)))

    def parts(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        """Return the forward pass in pieces; see :func:`robustft.models.layers.parts`."""
        return [
            ("conv1", self.stem),
            *stages(self, ("layer1", "layer2")),
            ("linear1", self.hidden),
            ("linear2", self.linear2),
        ]

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.layer2(self.layer1(self.stem(inputs)))
        logits: Tensor = self.linear2(self.hidden(features))
        return logits


def resnet4b(*, num_classes: int, image_shape: tuple[int, int, int]) -> ResNet4b:
    """Return resnet4b: 123,734 parameters for 10 classes at 32 px."""
    return ResNet4b(num_classes=num_classes, image_shape=image_shape)


def cnn_a(*, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """Return cnn_a: two 4x4 stride-2 convolutions, two linear layers; 214,918 parameters.

    Names are positions: ``0`` and ``2`` are convolutions, ``5`` and ``7`` linear.
    """
    channels, height, width = image_shape
    cells = (height // 4) * (width // 4)  # 4x4, stride 2, padding 1 halves and rounds down
    return nn.Sequential(
        nn.Conv2d(channels, STEM_WIDTH, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(STEM_WIDTH, WIDTH, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(WIDTH * cells, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, num_classes),
    )
