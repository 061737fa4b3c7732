"""Small models for the attack tests."""

import torch
from torch import Tensor, nn


class Counter(nn.Module):
    """Counts the forwards of a model and the backwards to its input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = self.backwards = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.forwards += 1
        if inputs.requires_grad:
            inputs.register_hook(self._count_backward)
        return self.model(inputs)

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += 1


class Linear(nn.Module):
    """``logits = W x + b`` on flattened inputs."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(1) @ self.weight.T + self.bias


def convolutional(num_classes: int = 10, *, norm: bool = True) -> nn.Module:
    """A small network with everything whose mode matters: batch norm and dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1),
            nn.BatchNorm2d(8) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(8 * 16, num_classes),
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
    return model.eval()
