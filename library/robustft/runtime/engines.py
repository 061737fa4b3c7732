"""Engines for several processes."""

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robustft.training.context import PlainEngine

__all__ = ["DDPEngine"]


class DDPEngine:
    """Data parallel over torch.distributed; gradients are averaged over ranks in ``backward``.

    Everything but the wrapping is the plain engine's, applied to the bare module.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._plain = PlainEngine()

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> nn.Module:
        """Wrap ``model``, unless nothing in it is trained: DDP refuses such a model."""
        self._plain.prepare(model, optimizer)
        if optimizer is None or not any(p.requires_grad for p in model.parameters()):
            return model
        devices = [self._device] if self._device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)

    @property
    def module(self) -> nn.Module:
        return self._plain.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._plain.optimizer

    def backward(self, loss: Tensor) -> None:
        self._plain.backward(loss)

    def step(self) -> None:
        self._plain.step()

    def full_grad(self, parameter: nn.Parameter) -> Tensor | None:
        return self._plain.full_grad(parameter)

    def state(self) -> dict[str, object]:
        return self._plain.state()

    def load_state(self, state: dict[str, object]) -> None:
        self._plain.load_state(state)
