"""DeepSpeed's ZeRO behind the engine protocol: what every worker would hold is shared out.

Rajbhandari, Rasley, Ruwase, He, "ZeRO: Memory Optimizations Toward Training Trillion Parameter
Models", 2020, arXiv 1910.02054. Stage 0 shares nothing, 1 the optimiser's state, 2 also gradients,
3 also weights. Written against deepspeed 0.19; docs/deepspeed.md says what was tried.
"""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from robustft.errors import ConfigError, NonFiniteLossError, ResourceError
from robustft.methods.adversarial import ATConfig, TradesConfig
from robustft.methods.instances import InstancesConfig
from robustft.methods.multinorm_config import MultiNormConfig
from robustft.methods.natural import NaturalConfig
from robustft.methods.rift_config import RiftConfig
from robustft.methods.rose_config import RoseConfig
from robustft.methods.text_instances import TextInstancesConfig
from robustft.runtime.zero_shards import WEIGHTS, Shards, Weights, parts_of
from robustft.training.context import PlainEngine, State
from robustft.training.engine_options import EngineOptions
from robustft.training.rose_adamw import RoseAdamW, StepRecord

__all__ = ["DeepSpeedEngine", "require_deepspeed", "why_not"]

IN_PIECES = (
    ATConfig,
    InstancesConfig,
    MultiNormConfig,
    NaturalConfig,
    RiftConfig,
    TextInstancesConfig,
    TradesConfig,
)
"""Methods, besides ROSE, that were seen to train the same at stage 3 as without DeepSpeed."""
BUCKET = 2**25
"""Most numbers that are reduced at a time; DeepSpeed holds a buffer of so many."""


def require_deepspeed() -> None:
    """Raise ResourceError unless deepspeed is installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ResourceError(
            "engine = 'deepspeed' needs the package deepspeed: pip install 'robustft[deepspeed]'"
        )


def why_not(config: Any, stage: int) -> str | None:
    """Return why a method cannot run on DeepSpeed, as a sentence that names the remedy.

    Args:
        config: the method's config.
        stage: of ZeRO, 0 to 3.

    Returns:
        None where nothing speaks against it.
    """
    if isinstance(config, RoseConfig):
        return _why_not_rose(config, stage)
    if stage == WEIGHTS and not isinstance(config, IN_PIECES):
        return (
            "zero_stage = 3 has the weights in pieces outside of the model's forward, where the "
            "branches of autolora, rft and twins read them: choose zero_stage = 2"
        )
    return None


def _why_not_rose(config: RoseConfig, stage: int) -> str | None:
    if config.child_tuning.name != "none":
        return (
            f"child_tuning = {config.child_tuning.name!r} changes parameter.grad, which DeepSpeed "
            "keeps elsewhere: choose engine = 'ddp'"
        )
    if config.precision == "fp16":
        return (
            "precision = 'fp16' scales the loss, and DeepSpeed's gradients are not unscaled: "
            "choose 'bf16', or engine = 'ddp'"
        )
    if stage and config.variant != "vanilla" and config.options.granularity != "tensor":
        return (
            f"granularity = {config.options.granularity!r} ranks units that DeepSpeed parts "
            "between workers: choose 'tensor', zero_stage = 0, or engine = 'ddp'"
        )
    if stage == WEIGHTS and config.uses_first_order:
        return (
            f"variant = {config.variant!r} needs whole gradients of the disagreement, and "
            "zero_stage = 3 has no whole weights: choose 'second', or zero_stage = 2"
        )
    if stage == WEIGHTS and config.text_loss.name == "smart":
        return (
            "loss = 'smart' averages the weights of all steps, and zero_stage = 3 has them in "
            "pieces: choose another loss, or zero_stage = 2"
        )
    return None


class DeepSpeedEngine:
    """Data parallel over torch.distributed (gloo or NCCL), with ZeRO.

    Losses are averaged over workers as in DistributedDataParallel, however often ``backward`` is
    called before ``step``. Weights stay float32; ``torch.autocast`` around the forward acts as
    without an engine. ``state`` is what the plain engine would return, so a run may resume under
    another engine, stage or number of workers.

    At stages 1 to 3 gradients are not in ``parameter.grad``: ``full_grad`` returns them, every rank
    calls it, and whatever a method does to ``.grad`` (masks, clipping in other ways than by
    ``clip``) would go unheard. At stage 3
    weights are in pieces, too, except inside a forward in train mode; and from ``prepare`` or
    ``module.eval()`` to the next training forward, so that evaluation may make other numbers of
    passes on other workers.

    Args:
        device: where this worker computes.
        stage: of ZeRO, 0 to 3.
        options: precision and the like; None: the defaults.
        clip_norm: L2 norm to which ``step`` clips the whole gradient at stages 1 to 3 for methods
            that clip ``parameter.grad`` themselves, > 0; ``clip`` goes before it. None: not.
        zero_options: more of DeepSpeed's ``zero_optimization``, for what ours are not right for.

    Raises:
        ResourceError: deepspeed is not installed.

    Note:
        DeepSpeed's own clipping and loss scaling are off, and nothing is offloaded: its fused
        optimisers for that replace the method's.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        stage: int,
        options: EngineOptions | None = None,
        clip_norm: float | None = None,
        zero_options: Mapping[str, Any] | None = None,
    ) -> None:
        require_deepspeed()
        self._device, self._stage, self._clip_norm = device, stage, clip_norm
        self._zero_options = dict(zero_options or {})
        self._plain = PlainEngine(options)
        self._deepspeed: Any = None
        self._shards: Shards | None = None
        self._next_clip: float | None = None

    @property
    def options(self) -> EngineOptions:
        return self._plain.options

    def computing(self, *, synchronise: bool = True) -> contextlib.AbstractContextManager[None]:
        return self._plain.computing()

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> nn.Module:
        """Wrap ``model``, unless nothing in it is trained.

        Raises:
            ConfigError: a trained parameter is not float32, or ROSE's units are finer than tensors.
        """
        if self._deepspeed is not None:
            self._deepspeed.destroy()
        self._deepspeed = self._shards = self._next_clip = None
        self._plain.prepare(model, optimizer)
        if optimizer is None or not any(p.requires_grad for p in model.parameters()):
            return model
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        _check(parameters, optimizer, self._stage)
        shapes = [torch.empty_like(value, device="meta") for value in parameters]
        if not self._stage:
            self._deepspeed = self._initialize(model, optimizer, parameters)
            return _Network(model)
        vector = _Vector(parameters, self._apply)
        self._deepspeed = self._initialize(model, vector, parameters)
        parts = parts_of(self._deepspeed.optimizer, parameters, shapes, self._stage)
        self._shards = Shards(optimizer, parts)
        if self._stage == WEIGHTS:
            weights = Weights(model)
            # Until the first training forward: what a method builds on its model may look at it.
            weights.gather()
            self._shards.weights = weights
            return _Network(model, weights.share_out)
        return _Network(model)

    def _initialize(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]
    ) -> Any:
        """Return DeepSpeed's engine."""
        index = self._device.index or 0
        # What its launcher would set; and a CPU run stays on the CPU of a machine with a GPU.
        os.environ.setdefault("LOCAL_RANK", str(index))
        os.environ.setdefault("DS_ACCELERATOR", self._device.type)
        import deepspeed
        import deepspeed.ops

        # Errors are raised; the rest is that it starts and that it does not know our optimiser.
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # Built by a compiler at the first use, minutes for nothing: gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        zero = {
            "stage": self._stage,
            "reduce_bucket_size": min(BUCKET, sum(value.numel() for value in parameters)),
            # One step for all of a worker's numbers: the norms of all tensors are needed at once.
            "sub_group_size": 2**62,
            # Off, it also stops DeepSpeed from leaving out steps with a NaN, which would hide it.
            "compute_grad_norm": self._stage not in (1, 2),
            **self._zero_options,
        }
        engine, *_ = deepspeed.initialize(
            args=SimpleNamespace(device_rank=index),
            model=model,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,  # unused: it only counts samples
                "gradient_accumulation_steps": 1,
                "gradient_clipping": 0.0,
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 2**62,
                "zero_optimization": zero,
            },
        )
        return engine

    @property
    def module(self) -> nn.Module:
        return self._plain.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._plain.optimizer

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``, averaged over ranks, to those since the last step."""
        if not self._stage:
            self._deepspeed.backward(loss)
            return
        zero = self._deepspeed.optimizer
        # DeepSpeed counts forwards of its own wrapper, which are not ours.
        zero.clear_backward_seen_flag()
        before = zero.averaged_gradients.get(0) if self._stage != WEIGHTS else None
        self._deepspeed.backward(loss)
        if before is not None:
            torch._foreach_add_(zero.averaged_gradients[0], before)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> None:
        """Clip as the protocol says; from stage 1 on it is done in ``step``, part by part.

        Raises:
            ConfigError: from stage 1 on, some trained parameter is not among ``parameters``.
        """
        if self._shards is None:
            self._plain.clip(parameters, max_norm)
            return
        trained = {id(value) for value in self.module.parameters() if value.requires_grad}
        if trained - {id(value) for value in parameters}:
            raise ConfigError(
                f"zero_stage = {self._stage} clips the gradient of all trained parameters at once: "
                "pass all of them, or choose engine = 'ddp'"
            )
        self._next_clip = max_norm

    def step(self) -> None:
        """Apply one step and clear the gradients.

        Raises:
            NonFiniteLossError: at stage 3, a gradient is NaN or infinite and the optimiser is not
                one that leaves out such steps.
        """
        if self._shards is not None and self._shards.weights is not None:
            self._shards.weights.share_out()
        self._deepspeed.step()
        if self._stage == WEIGHTS and self._deepspeed.optimizer.overflow:
            # Stage 3 leaves such a step out, whatever its options.
            if not isinstance(self.optimizer, RoseAdamW):
                raise NonFiniteLossError(
                    "a gradient became NaN or infinite: lower lr, or start from other weights"
                )
            self.optimizer.record = StepRecord(masks={}, skipped=True)

    def _apply(self, grad: Tensor) -> None:
        assert self._shards is not None
        clip_norm = self._clip_norm if self._next_clip is None else self._next_clip
        self._next_clip = None
        self._shards.step(grad, clip_norm=clip_norm)

    def full_grad(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the whole gradient of ``parameter``; every rank calls it for the same ones."""
        if self._shards is None:
            return self._plain.full_grad(parameter)
        from deepspeed.utils import safe_get_full_grad

        grad: Tensor | None = safe_get_full_grad(parameter)
        return grad

    def model_state(self) -> State:
        """Return the whole state of the model; every rank calls it."""
        if self._shards is None:
            return self._plain.model_state()
        return self._shards.model_state(self.module)

    def state(self) -> State:
        """Return the whole state, the optimiser's on the CPU; every rank calls it."""
        if self._shards is None:
            return self._plain.state()
        return self._shards.state(self.module)

    def load_state(self, state: State) -> None:
        if self._shards is None:
            self._plain.load_state(state)
        else:
            self._shards.load_state(self.module, state)


def _check(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, stage: int) -> None:
    """Raise ConfigError unless DeepSpeed can share out the parameters of an optimiser."""
    if not all(value.requires_grad and value.dtype == torch.float32 for value in parameters):
        raise ConfigError(
            "engine = 'deepspeed' needs an optimiser of float32 parameters that are all trained: "
            "freeze before building the optimiser, or choose engine = 'ddp'"
        )
    if stage and isinstance(optimizer, RoseAdamW) and optimizer.variant != "vanilla":
        granularity = optimizer.options.granularity
        if granularity != "tensor":
            raise ConfigError(
                f"granularity = {granularity!r}: under zero_stage = {stage} only 'tensor' works"
            )


class _Vector(torch.optim.Optimizer):
    """What DeepSpeed takes for the optimiser: it hands each step's gradient on.

    DeepSpeed joins the parameters of each group into a vector, puts this worker's piece in the
    group's place and steps group by group. All parameters form one group here, whatever groups the
    method has: so there is one call, and it has all gradients.

    Args:
        parameters: in the order of the method's optimiser.
        apply: takes the gradient of this worker's piece ``[n]``, averaged over workers.
    """

    def __init__(self, parameters: Iterable[Tensor], apply: Callable[[Tensor], None]) -> None:
        super().__init__([{"params": list(parameters)}], {"lr": 0.0})
        self._apply = apply

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        ((piece,),) = [group["params"] for group in self.param_groups]
        self._apply(piece.grad)


class _Network(nn.Module):
    """What the training step calls: rank 0's buffers first, as DistributedDataParallel has it.

    Args:
        model: the bare model. DeepSpeed's own wrapper is left out: it undoes autocast, and takes
            every gradient through its outputs, an attack's too, for a training step's.
        before: called before a forward in train mode.
    """

    def __init__(self, model: nn.Module, before: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.module, self._before = model, before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._before is not None and self.module.training:
            self._before()
        with torch.no_grad():
            for buffers in _by_dtype(self.module.buffers()):
                flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
                distributed.broadcast(flat, 0)
                pieces = torch.split(flat, [buffer.numel() for buffer in buffers])
                for buffer, piece in zip(buffers, pieces, strict=True):
                    # Unseen by autograd, as under DDP: an earlier forward of this step, whose
                    # backward is to come, may have saved the buffer (BERT's positions).
                    buffer.data.copy_(piece.view_as(buffer))
        return self.module(*args, **kwargs)


def _by_dtype(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    yield from groups.values()
