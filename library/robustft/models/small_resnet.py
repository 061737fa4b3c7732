"""Small ResNets for the embedded 28x28 grey images: about 2.6 million multiply-adds an image.

Own design: a stride-2 stem, one block per stage, widths 16/32/64. Ten convolution and linear
modules give a criticality ranking with something to rank, at a cost that a laptop bears.
"""

from robustft.models.preact_resnet import PreActResNet
from robustft.models.resnet import ResNet

__all__ = ["small_preact_resnet", "small_resnet"]

WIDTHS = (16, 32, 64)
BLOCKS = (1, 1, 1)
STEM_STRIDE = 2


def small_resnet(*, num_classes: int, image_shape: tuple[int, int, int]) -> ResNet:
    """Return the post-activation form; names as in ``resnet18``, three stages."""
    return ResNet(
        num_classes=num_classes,
        image_shape=image_shape,
        num_blocks=BLOCKS,
        widths=WIDTHS,
        stem_stride=STEM_STRIDE,
    )


def small_preact_resnet(*, num_classes: int, image_shape: tuple[int, int, int]) -> PreActResNet:
    """Return the pre-activation form; names as in ``preact_resnet18``."""
    return PreActResNet(
        num_classes=num_classes,
        image_shape=image_shape,
        num_blocks=BLOCKS,
        widths=WIDTHS,
        stem_stride=STEM_STRIDE,
    )
