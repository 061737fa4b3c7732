"""Engines for several processes, and which methods go with which of an engine's options."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robustft.methods.autolora import AutoLoraConfig
from robustft.methods.instances import InstancesConfig
from robustft.methods.multinorm_config import MultiNormConfig
from robustft.methods.rose_config import RoseConfig
from robustft.methods.text_instances import TextInstancesConfig
from robustft.methods.twins import TwinsConfig
from robustft.methods.vanilla import RftConfig
from robustft.training.context import PlainEngine, State
from robustft.training.engine_options import EngineOptions, synchronise_batch_norm

__all__ = ["DDPEngine", "why_not_options"]


class DDPEngine:
    """Data parallel over torch.distributed; gradients are averaged over ranks in ``backward``.

    Everything but the wrapping is the plain engine's, applied to the bare module.

    Args:
        device: where this worker computes.
        options: precision and the like; None: the defaults.
    """

    def __init__(self, device: torch.device, options: EngineOptions | None = None) -> None:
        self._device = device
        self._plain = PlainEngine(options)
        self._wrapped: DistributedDataParallel | None = None

    @property
    def options(self) -> EngineOptions:
        return self._plain.options

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> nn.Module:
        """Wrap ``model``, unless nothing in it is trained: DDP refuses such a model.

        Raises:
            ConfigError: BatchNorm is to be synchronised on a CPU, or nothing can be recomputed.
            ResourceError: torch.compile does not work on this machine.
        """
        if self.options.sync_bn:
            synchronise_batch_norm(model, self._device)
        self._plain.prepare(model, optimizer)
        self._wrapped = None
        if optimizer is None or not any(p.requires_grad for p in model.parameters()):
            return model
        devices = [self._device] if self._device.type == "cuda" else None
        self._wrapped = DistributedDataParallel(model, device_ids=devices)
        return self._wrapped

    @contextlib.contextmanager
    def computing(self, *, synchronise: bool = True) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._plain.computing())
            if self._wrapped is not None and not synchronise:
                stack.enter_context(self._wrapped.no_sync())
            yield

    @property
    def module(self) -> nn.Module:
        return self._plain.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._plain.optimizer

    def backward(self, loss: Tensor) -> None:
        self._plain.backward(loss)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> None:
        self._plain.clip(parameters, max_norm)

    def step(self) -> None:
        self._plain.step()

    def full_grad(self, parameter: nn.Parameter) -> Tensor | None:
        return self._plain.full_grad(parameter)

    def model_state(self) -> State:
        return self._plain.model_state()

    def state(self) -> State:
        return self._plain.state()

    def load_state(self, state: State) -> None:
        self._plain.load_state(state)


def why_not_options(
    config: Any, options: EngineOptions, *, deepspeed: bool = False, zero_stage: int = 0
) -> str | None:
    """Return why a method cannot run with an engine's options, as a sentence with the remedy.

    Args:
        config: the method's config.
        options: precision and the like.
        deepspeed: whether the engine is DeepSpeed's.
        zero_stage: its stage, 0 to 3.

    Returns:
        None where nothing speaks against it.
    """
    refusals = (
        _why_not_precision(config) if options.precision != "float32" else None,
        _why_not_accumulate(config) if options.accumulate > 1 else None,
        _why_not_change_blocks(config, "checkpoint_activations")
        if options.checkpoint_activations
        else None,
        _why_not_change_blocks(config, "compile") if options.compile else None,
        _why_not_sync(config) if options.sync_bn else None,
        _why_not_deepspeed(options, zero_stage) if deepspeed else None,
    )
    return next((reason for reason in refusals if reason), None)


def _why_not_precision(config: Any) -> str | None:
    if isinstance(config, RoseConfig):
        return (
            "rose has a precision of its own: set method.precision, and leave runtime.precision "
            "at 'float32'"
        )
    return None


def _why_not_accumulate(config: Any) -> str | None:
    if isinstance(config, RoseConfig):
        return (
            "rose cuts batches by a field of its own: set method.accumulate, and leave "
            "runtime.accumulate at 1"
        )
    if isinstance(config, MultiNormConfig):
        return (
            "multinorm draws norms and counts errors batch by batch, which parts of batches would "
            "change: leave runtime.accumulate at 1, or lower method.batch_size"
        )
    if isinstance(config, TwinsConfig):
        return (
            "twins treats the two halves of a batch differently, and parts would have other "
            "halves: leave runtime.accumulate at 1, or lower method.batch_size"
        )
    treats_loss = isinstance(config, (InstancesConfig, TextInstancesConfig))
    if treats_loss and config.mitigation.scope == "batch":
        return (
            "mitigation.scope = 'batch' looks at the mean loss of a batch, which its parts do not "
            "know: choose scope 'instance', or leave runtime.accumulate at 1"
        )
    return None


def _why_not_change_blocks(config: Any, option: str) -> str | None:
    other_weights = isinstance(config, AutoLoraConfig) or (
        isinstance(config, RftConfig) and config.dual_bn
    )
    if other_weights:
        name = "autolora" if isinstance(config, AutoLoraConfig) else "dual_bn"
        return (
            f"{name} calls its network with other weights for natural images, and {option} would "
            f"take the network's own: leave runtime.{option} off"
        )
    return None


def _why_not_sync(config: Any) -> str | None:
    if isinstance(config, (RoseConfig, TextInstancesConfig)):
        return "models of text have no BatchNorm to synchronise: leave runtime.sync_bn off"
    return None


def _why_not_deepspeed(options: EngineOptions, zero_stage: int) -> str | None:
    if options.compile:
        return "runtime.compile was not tried with DeepSpeed: leave it off, or choose engine 'ddp'"
    if options.sync_bn:
        return "runtime.sync_bn was not tried with DeepSpeed: leave it off, or choose engine 'ddp'"
    if options.checkpoint_activations and zero_stage == 3:
        return (
            "zero_stage = 3 has taken away the weights that a block needs to be computed again: "
            "leave runtime.checkpoint_activations off, or choose zero_stage = 2"
        )
    return None
