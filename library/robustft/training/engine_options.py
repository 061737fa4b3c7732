"""How an engine computes what a method asks for: precision, parts, recomputing, compiling."""

import dataclasses
import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.checkpoint import checkpoint

from robustft.errors import ConfigError, ResourceError
from robustft.training.checks import require_at_least, require_choice

__all__ = [
    "EngineOptions",
    "Precision",
    "arrange",
    "blocks",
    "cores",
    "synchronise_batch_norm",
]

Precision = Literal["float32", "bf16"]
CONTAINERS = (nn.Sequential, nn.ModuleList)
COMPILER = "inductor"
"""Backend of torch.compile."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """What an engine does beside wrapping and stepping; the defaults do nothing."""

    precision: Precision = "float32"
    """Of forwards in training, those of attacks included. Weights, logits, gradients, optimiser
    and every evaluation are float32 in any case."""
    accumulate: int = 1
    """Parts that a worker's share of a batch is computed in, to save memory, >= 1."""
    checkpoint_activations: bool = False
    """Whether the network's blocks keep only their inputs and are computed again in backward."""
    compile: bool = False
    """Whether the network is compiled (torch.compile, static graphs per mode and batch shape)."""
    sync_bn: bool = False
    """Whether BatchNorm in train mode normalises with the global batch, not the worker's share."""

    def __post_init__(self) -> None:
        if self.precision == "fp16":  # type: ignore[comparison-overlap]
            raise ConfigError(
                "precision = 'fp16': the gradients by which an attack climbs would become 0 in so "
                "few exponents: choose 'bf16'"
            )
        require_choice(self, "precision", Precision)
        require_at_least(self, 1, "accumulate")
        if self.compile and self.checkpoint_activations:
            raise ConfigError(
                "compile and checkpoint_activations exclude each other, since the compiler decides "
                "itself what is computed again: choose one"
            )

    @property
    def numerics(self) -> dict[str, Any]:
        """The options that change results by more than rounding, where they are not the defaults.

        Without BatchNorm, ``accumulate`` and ``sync_bn`` change no results; whether a model has
        it, an experiment's identity cannot know.
        """
        names = ("precision", "accumulate", "sync_bn")
        found = {name: getattr(self, name) for name in names}
        default = {field.name: field.default for field in dataclasses.fields(EngineOptions)}
        return {name: value for name, value in found.items() if value != default[name]}


def arrange(model: nn.Module, options: EngineOptions) -> None:
    """Make ``model`` (on its device, not yet wrapped) compute as ``options`` say, in place.

    Parameters, their names and the state dict stay as they are.

    Raises:
        ConfigError: there is nothing to recompute.
        ResourceError: torch.compile does not work on this machine.
    """
    if options.checkpoint_activations:
        _recompute_blocks(model)
    if options.precision != "float32":
        for module in cores(model):
            # Rounding logits would round the loss and, with it, the signs that an attack follows.
            module.register_forward_hook(_to_float32)
    if options.compile:
        _compile(model)


def cores(model: nn.Module) -> list[nn.Module]:
    """Return ``model`` and what it wraps, from the outside in: each holds all its parameters."""
    found = [model]
    while True:
        size = len(list(found[-1].parameters()))
        inner = [child for child in found[-1].children() if len(list(child.parameters())) == size]
        if not size or len(inner) != 1:
            return found
        found.append(inner[0])


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the outermost modules of several layers that stand in a Sequential or ModuleList.

    These are the residual blocks of ResNets and the layers of transformers.
    """
    found: list[nn.Module] = []
    for child in model.children():
        composite = any(True for _ in child.children()) and not isinstance(child, CONTAINERS)
        if isinstance(model, CONTAINERS) and composite:
            found.append(child)
        else:
            found += blocks(child)
    return found


def _to_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    if isinstance(outputs, tuple):
        return tuple(_to_float32(module, inputs, output) for output in outputs)
    low = isinstance(outputs, Tensor) and outputs.dtype in (torch.bfloat16, torch.float16)
    return outputs.float() if low else outputs


# Recomputing.


def _recompute_blocks(model: nn.Module) -> None:
    found = blocks(model)
    if not found:
        raise ConfigError(
            "checkpoint_activations = True: the network has no blocks of several layers in an "
            "nn.Sequential or nn.ModuleList that could be computed again; leave it off"
        )
    for block in found:
        # A method may prepare the same model twice.
        if "forward" not in vars(block):
            block.forward = functools.partial(_recomputed, block, block.forward)


def _recomputed(block: nn.Module, forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """Call ``forward`` of a block; with gradients, keep its inputs alone for the backward."""
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(
        forward,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _StillStatistics(block)),
        **options,
    )


class _StillStatistics:
    """Leaves running statistics alone inside: a recomputed forward has been counted already.

    With a momentum of 0 a layer computes the same outputs, and writes back the statistics that it
    had. Can be entered several times, as a graph that is kept is recomputed for each backward.
    """

    def __init__(self, block: nn.Module) -> None:
        self._norms = [module for module in block.modules() if isinstance(module, _NormBase)]
        self._before: list[tuple[float | None, Tensor | None]] = []

    def __enter__(self) -> None:
        self._before = [
            (norm.momentum, None if count is None else count.clone())
            for norm in self._norms
            for count in [norm.num_batches_tracked]
        ]
        for norm in self._norms:
            norm.momentum = 0.0

    def __exit__(self, *error: object) -> None:
        for norm, (momentum, count) in zip(self._norms, self._before, strict=True):
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)


# Compiling and synchronising.


def _compile(model: nn.Module) -> None:
    """Compile the innermost network, in place: attacks and evaluations call it as well."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        torch.compile(torch.square, backend=COMPILER)(torch.ones(2, device=device))
    except Exception as error:  # Whatever a compiler raises; it is told on.
        raise ResourceError(
            f"compile = True: torch.compile does not work here ({_first_line(error)}): install a "
            "C++ compiler (on GPUs also triton), or leave it off"
        ) from error
    cores(model)[-1].compile(backend=COMPILER)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Make every BatchNorm of ``model`` normalise with the batches of all workers, in place.

    Its parameters and buffers stay the same objects, so an optimiser that has them keeps them.

    Raises:
        ConfigError: there is BatchNorm, and the device is a CPU: torch has no such layer for it.
    """
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    if device.type == "cpu":
        raise ConfigError(
            "sync_bn = True: torch synchronises BatchNorm on GPUs only: set gpus_per_worker, use "
            "one worker, or leave it off"
        )
    nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
