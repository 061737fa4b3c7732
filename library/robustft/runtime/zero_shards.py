"""What a worker holds under ZeRO: its pieces of the optimiser's state and of the weights.

DeepSpeed joins the trained parameters into one vector and gives each worker a piece of it, which
may begin and end inside a tensor. The method's own optimiser steps on views of this piece, tensor
by tensor and in its own parameter groups. Only ROSE needs to know more than its worker's share:
the norms of whole tensors.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from robustft.training.context import State
from robustft.training.rose_adamw import RoseAdamW

__all__ = ["WEIGHTS", "Part", "Shards", "Weights", "parts_of"]

WEIGHTS = 3
"""The stage that shares out the weights too."""
UNSHARED = ("step", "mask")
"""Entries of an optimiser's state that are not shaped as the parameter is."""
CLIP_OFFSET = 1e-6  # of torch.nn.utils.clip_grad_norm_
RESIDENT = -1
"""Stands for a module that is using a weight, so that DeepSpeed does not take the weight away."""


class Weights:
    """Stage 3: the weights, whole or in pieces.

    ``eval()`` and a forward in eval mode make them whole on every rank, and they stay so until
    ``share_out``: in between, passes need no other worker.

    Args:
        model: as DeepSpeed has changed it; its ``train`` is replaced.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights: list[Any] = list(model.parameters())
        self._whole = False
        for module in model.modules():
            # Also what the model wraps: a method may evaluate that.
            if len(list(module.parameters())) == len(self._weights):
                module.train = functools.partial(  # type: ignore[method-assign]
                    self._train, module.train
                )
                module.register_forward_pre_hook(self._before_forward)

    def _train(self, original: Callable[[bool], nn.Module], mode: bool = True) -> nn.Module:
        if not mode:
            self.gather()
        return original(mode)

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        # An attack sets the flag without calling eval.
        if not module.training:
            self.gather()

    @property
    def whole(self) -> bool:
        """Whether they are whole at present."""
        return self._whole

    def gather(self) -> None:
        """Make them whole; every rank calls it."""
        if not self._whole:
            self._weights[0].all_gather(self._weights)
            for weight in self._weights:
                weight.ds_active_sub_modules.add(RESIDENT)
        self._whole = True

    def share_out(self, *, changed: bool = False) -> None:
        """Leave each rank its piece; ``changed``: the same new values are on all ranks."""
        if not self._whole:
            return
        for weight in self._weights:
            weight.ds_active_sub_modules.discard(RESIDENT)
        self._weights[0].partition(self._weights, has_been_updated=changed)
        small = [weight for weight in self._weights if weight.ds_persist]
        if small:
            small[0].all_gather(small)
        self._whole = False


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """What this worker has of a parameter.

    Args:
        parameter: the model's; at stage 3 without its values, unless they are gathered.
        shape: the whole parameter, on the meta device.
        begin: where the part begins in the flattened parameter.
        offset: where it begins in the worker's piece.
        values: ``[n]``, a view of the piece, n >= 0.
    """

    parameter: Tensor
    shape: Tensor
    begin: int
    offset: int
    values: Tensor

    def of(self, whole: Tensor) -> Tensor:
        """Return the part ``[n]`` of a tensor shaped as the parameter is."""
        return whole.reshape(-1).narrow(0, self.begin, self.values.numel())

    def within(self, piece: Tensor) -> Tensor:
        """Return the part ``[n]`` of a vector laid out as the worker's piece is."""
        return piece.narrow(0, self.offset, self.values.numel())


def parts_of(
    zero: Any, parameters: Sequence[Any], shapes: Sequence[Tensor], stage: int
) -> list[Part]:
    """Return where DeepSpeed's optimiser ``zero`` has put the parameters."""
    places = []
    if stage == WEIGHTS:
        (piece,) = zero.fp32_partitioned_groups_flat
        offset, rank = 0, distributed.get_rank()
        for parameter, shape in zip(parameters, shapes, strict=True):
            # Each parameter is cut into as many pieces as there are workers; the last are shorter.
            size = parameter.partition_numel()
            begin = min(rank * size, shape.numel())
            places.append((begin, offset, min(size, shape.numel() - begin)))
            offset += size
    else:
        (piece,) = zero.single_partition_of_fp32_groups
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is None:
                places.append((0, 0, 0))
                continue
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            places.append((here.start, there.start, here.numel))
    return [
        Part(parameter, shape, begin, offset, piece.detach().narrow(0, offset, count))
        for parameter, shape, (begin, offset, count) in zip(parameters, shapes, places, strict=True)
    ]


class Shards:
    """A worker's share of the optimiser, and how to make it whole.

    Args:
        optimizer: the method's; its groups' parameters become the parts' values.
        parts: of all its parameters, in its order; empty where this worker has nothing.

    Attributes:
        weights: at stage 3, the model's weights.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parts: Sequence[Part]) -> None:
        self._optimizer, self._parts = optimizer, parts
        self.weights: Weights | None = None
        values = iter([part.values for part in parts])
        for group in optimizer.param_groups:
            group["params"] = [next(values) for _ in group["params"]]
        if isinstance(optimizer, RoseAdamW):
            names = [name for group in optimizer.param_groups for name in group["param_names"]]
            shapes = [part.shape for part in parts]
            optimizer.hold_parts(dict(zip(names, shapes, strict=True)), _whole_norms)

    @torch.no_grad()
    def step(self, grad: Tensor, *, clip_norm: float | None = None) -> None:
        """Clip and step.

        Args:
            grad: ``[n]`` of this worker's piece, averaged over workers; changed in place.
            clip_norm: L2 norm to which the whole gradient is clipped; None: not.
        """
        grads = [part.within(grad) for part in self._parts]
        if clip_norm is not None:
            norm = torch.linalg.vector_norm(_whole_norms(grads))
            grad.mul_((clip_norm / (norm + CLIP_OFFSET)).clamp(max=1))
        for part, value in zip(self._parts, grads, strict=True):
            part.values.grad = value
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    # State, in the layout of the plain engine.

    @torch.no_grad()
    def state(self, module: nn.Module) -> State:
        """Return the whole state of the model and the optimiser; every rank calls it."""
        saved = self._optimizer.state_dict()
        entries = {
            index: {
                name: _whole(self._parts[index], value) if _is_shared(name, value) else value
                for name, value in entry.items()
            }
            for index, entry in saved["state"].items()
        }
        return {**self.model_state(module), "optimizer": {**saved, "state": entries}}

    @torch.no_grad()
    def model_state(self, module: nn.Module) -> State:
        """Return ``{"model": the whole state dict}``; every rank calls it."""
        if self.weights is None:
            return {"model": module.state_dict()}
        was_whole = self.weights.whole
        self.weights.gather()
        state = {name: value.detach().clone() for name, value in module.state_dict().items()}
        if not was_whole:
            self.weights.share_out()
        return {"model": state}

    @torch.no_grad()
    def load_state(self, module: nn.Module, state: State) -> None:
        saved = state["optimizer"]
        entries = {
            index: {
                name: self._parts[index].of(value).clone() if _is_shared(name, value) else value
                for name, value in entry.items()
            }
            for index, entry in saved["state"].items()
        }
        self._optimizer.load_state_dict({**saved, "state": entries})
        if self.weights is not None:
            self.weights.gather()
        module.load_state_dict(state["model"])
        for part in self._parts:
            part.values.copy_(part.of(part.parameter))
        if self.weights is not None:
            self.weights.share_out(changed=True)


def _is_shared(name: str, value: Any) -> bool:
    """Return whether an entry of an optimiser's state is cut up as its parameter is."""
    return isinstance(value, Tensor) and name not in UNSHARED


def _whole(part: Part, values: Tensor) -> Tensor:
    """Return the whole tensor of which each rank has a part, on the CPU; every rank calls it."""
    whole = torch.zeros(part.shape.shape, dtype=values.dtype, device=values.device)
    part.of(whole).copy_(values)
    distributed.all_reduce(whole)
    return whole.cpu()


def _whole_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norms ``[len(tensors)]`` of tensors of which each rank has a part.

    Sums of squares are added over ranks, in float64: norms of parts are never averaged.
    """
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    squares = torch.stack(norms).square()
    distributed.all_reduce(squares)
    return squares.sqrt().to(tensors[0].dtype)
