"""Pre-activation ResNets (He et al., 2016, arXiv 1603.05027) as multi-norm training uses them.

Croce and Hein, "Adversarial Robustness against Multiple and Single Lp-Threat Models via Quick
Fine-Tuning of Robust Classifiers" (2022, arXiv 2105.12508) train a PreActResNet-18 with softplus.
Module names: ``conv1``, ``layer1.0.bn1``, ``layer1.0.conv1``, ``layer2.0.shortcut.0``, ``bn``,
``linear``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from robustft.errors import UnknownNameError
from robustft.models.resnet import CIFAR_WIDTHS, conv3x3, pooled_size, stack, stages

__all__ = [
    "Activation",
    "PreActBlock",
    "PreActResNet",
    "preact_resnet18",
    "preact_resnet18_softplus",
]

Activation = Literal["relu", "softplus"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "softplus": functional.softplus,  # beta 1, the value of the published checkpoints
}


class PreActBlock(nn.Module):
    """BN-act-conv-BN-act-conv plus shortcut.

    Where the shape changes the shortcut is a 1x1 convolution, without BN, of the *activated* input;
    elsewhere it is the raw input.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int, *, activation: Activation
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut.append(nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False))

    def forward(self, inputs: Tensor) -> Tensor:
        activated = self.activation(self.bn1(inputs))
        skipped = self.shortcut(activated) if len(self.shortcut) else inputs
        out = self.activation(self.bn2(self.conv1(activated)))
        residual: Tensor = self.conv2(out)
        return residual + skipped


class PreActResNet(nn.Module):
    """Pre-activation ResNet for small images; arguments as in ``ResNet``.

    Note:
        The last activation, before pooling, is ReLU even with ``activation="softplus"``: so it is
        in the authors' code, and their checkpoints depend on it.

    Raises:
        UnknownNameError: ``activation`` is neither "relu" nor "softplus".
    """

    def __init__(
        self,
        *,
        num_classes: int,
        image_shape: tuple[int, int, int],
        num_blocks: Sequence[int],
        widths: Sequence[int] = CIFAR_WIDTHS,
        stem_stride: int = 1,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UnknownNameError("activation", activation, ACTIVATIONS)
        strides = (1, *(2 for _ in widths[1:]))
        rows, columns, self.window = pooled_size(image_shape, (stem_stride, *strides))
        self.conv1 = conv3x3(image_shape[0], widths[0], stem_stride)
        self.stage_names = tuple(f"layer{index + 1}" for index in range(len(widths)))
        block = partial(PreActBlock, activation=activation)
        in_channels = widths[0]
        for name, width, blocks, stride in zip(
            self.stage_names, widths, num_blocks, strides, strict=True
        ):
            self.add_module(name, stack(block, in_channels, width, blocks, stride))
            in_channels = width
        self.bn = nn.BatchNorm2d(in_channels)
        self.linear = nn.Linear(in_channels * rows * columns, num_classes)

    def head(self, features: Tensor) -> Tensor:
        """Return the logits of the last block's features."""
        pooled = functional.avg_pool2d(functional.relu(self.bn(features)), self.window)
        logits: Tensor = self.linear(pooled.flatten(1))
        return logits

    def parts(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        """Return the forward pass in pieces; see :func:`robustft.models.layers.parts`."""
        return [
            ("conv1", self.conv1),
            *stages(self, self.stage_names),
            ("bn+linear", self.head),
        ]

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.conv1(inputs)
        for name in self.stage_names:
            features = self.get_submodule(name)(features)
        return self.head(features)


def preact_resnet18(
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    activation: Activation = "relu",
) -> PreActResNet:
    """Return a PreActResNet-18; 11,172,170 parameters for 10 classes at 32 px."""
    return PreActResNet(
        num_classes=num_classes,
        image_shape=image_shape,
        num_blocks=(2, 2, 2, 2),
        activation=activation,
    )


def preact_resnet18_softplus(
    *, num_classes: int, image_shape: tuple[int, int, int]
) -> PreActResNet:
    """Return the PreActResNet-18 with softplus that E-AT trains from scratch."""
    return preact_resnet18(num_classes=num_classes, image_shape=image_shape, activation="softplus")
