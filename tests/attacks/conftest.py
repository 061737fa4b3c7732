"""The network and the batch that the attack tests share."""

import pytest
import torch
from attack_toys import convolutional
from torch import Tensor, nn


@pytest.fixture
def model() -> nn.Module:
    return convolutional()


@pytest.fixture
def inputs() -> Tensor:
    """24 images of 2 x 8 x 8 with exact zeros and ones, as real images have."""
    images = torch.rand(24, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    return (images * 1.4 - 0.2).clamp(0, 1)


@pytest.fixture
def labels(model: nn.Module, inputs: Tensor) -> Tensor:
    """What the model predicts, except for the first three, which count as misclassified."""
    with torch.no_grad():
        predicted = model(inputs).argmax(1)
    predicted[:3] = (predicted[:3] + 1) % 10
    return predicted
