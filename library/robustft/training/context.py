"""What a method is given to run in: a context and an engine, and their plain implementations.

A training function never sees Ray, MLflow or DeepSpeed. It gets a :class:`RunContext`;
``LocalContext`` here is a loop in one process, ``robustft.runtime`` has the ones for Ray Tune and
Ray Train. The same function under any of them gives the same result.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from robustft.data.base import Task
from robustft.models.start import Start
from robustft.training.engine_options import EngineOptions, arrange

__all__ = ["Engine", "LocalContext", "PlainEngine", "RunContext", "State"]

ItemT = TypeVar("ItemT")
ValueT = TypeVar("ValueT")

State = dict[str, Any]
"""Nested dicts and lists of tensors and scalars: what ``torch.load(weights_only=True)`` reads."""


class Engine(Protocol):
    """Owns wrapping, backward, step and the optimiser's state.

    Freeze parameters *before* ``prepare``: a parameter unfrozen after wrapping would silently not
    be synchronised between ranks. Another set of trainable parameters means another ``prepare``.
    """

    @property
    def options(self) -> EngineOptions:
        """Precision and the like; ``run_epoch`` cuts batches into ``options.accumulate`` parts."""

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> nn.Module:
        """Wrap ``model`` (already on the device) and return what the training step calls.

        ``optimizer`` is None for methods that never step.
        """

    def computing(self, *, synchronise: bool = True) -> contextlib.AbstractContextManager[None]:
        """Return what the forwards of a training step, and its attack, run inside: the precision.

        Args:
            synchronise: False if more backwards follow before the step, so that what ranks have
                need not be averaged yet.
        """

    @property
    def module(self) -> nn.Module:
        """The bare model: what attacks, evaluation and state dicts use."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser as the method built it (schedules change its ``lr``)."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of ``loss``, averaged over ranks."""

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> None:
        """Clip the whole gradient of ``parameters`` to an L2 norm, between backward and step.

        Args:
            parameters: all that are trained, others may be among them.
            max_norm: > 0.
        """

    def step(self) -> None:
        """Apply one optimiser step and clear the gradients."""

    def full_grad(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the whole gradient of ``parameter`` between ``backward`` and ``step``."""

    def model_state(self) -> State:
        """Return ``{"model": the model's state dict}``: ``state`` without gathering the rest."""

    def state(self) -> State:
        """Return the model's and the optimiser's state, on every rank the whole of it."""

    def load_state(self, state: State) -> None:
        """Restore what ``state`` returned."""


class RunContext(Protocol):
    """What a training function gets.

    Attributes:
        task: the data, with splits "train", "val" and "test".
        start: the model to start from; ``start.build()`` gives a fresh module.
        prepared: what the method's ``prepare`` returned, or None if it has not been run.
        rank, world_size: this worker among all workers of the run.
        device: where this worker computes.
        engine: how this worker wraps, steps and saves.
    """

    task: Task
    start: Start
    prepared: Mapping[str, Any] | None
    rank: int
    world_size: int
    device: torch.device
    engine: Engine

    def report(
        self,
        metrics: Mapping[str, float],
        *,
        step: int,
        total: int,
        checkpoint: Callable[[], State] | None = None,
    ) -> None:
        """Report progress and, if given, save a checkpoint. Every rank calls it equally often.

        Args:
            metrics: "train/loss", "val/clean", ...; the ranks pass the same values.
            step: 1-based number of the finished epoch (or other unit).
            total: number of units in the whole run; gives the time left.
            checkpoint: returns the state from which ``resume`` continues; called on every rank.
        """

    def resume(self) -> State | None:
        """Return the newest checkpointed state of this run, or None for a fresh start."""

    def map(
        self,
        fn: Callable[[Any, ItemT], ValueT],
        items: Iterable[ItemT],
        *,
        shared: Any,
        key: str,
        name: str,
    ) -> list[ValueT]:
        """Return ``[fn(shared, item) for item in items]``, perhaps computed elsewhere.

        ``fn`` is a module-level function without side effects, whose value is a dict of JSON
        scalars, lists and NumPy arrays. Every rank gets the whole list, in item order.

        Args:
            fn: ``fn(shared, item)``.
            items: small, JSON-able descriptions of the work (strings, numbers, tuples, dicts).
            shared: what all items need (a model, arrays); sent once.
            key: content hash of ``shared``: finished items are found again by (name, key, item).
            name: what the work is called in progress lines.
        """

    def sum(self, values: Tensor) -> Tensor:
        """Return ``values`` summed over ranks (on one rank: ``values``)."""


class PlainEngine:
    """One process, no wrapping.

    Args:
        options: precision and the like; None: the defaults. ``sync_bn`` has nobody to talk to.
    """

    def __init__(self, options: EngineOptions | None = None) -> None:
        self.options = EngineOptions() if options is None else options
        self._module: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> nn.Module:
        arrange(model, self.options)
        self._module, self._optimizer = model, optimizer
        return model

    @contextlib.contextmanager
    def computing(self, *, synchronise: bool = True) -> Iterator[None]:
        device = next((value.device.type for value in self.module.parameters()), "cpu")
        low = self.options.precision == "bf16"
        with torch.autocast(device, dtype=torch.bfloat16, enabled=low):
            yield

    @property
    def module(self) -> nn.Module:
        if self._module is None:
            raise RuntimeError("call engine.prepare(model, optimizer) first")
        return self._module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        if self._optimizer is None:
            raise RuntimeError("this engine was prepared without an optimiser")
        return self._optimizer

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> None:
        nn.utils.clip_grad_norm_(parameters, max_norm)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def full_grad(self, parameter: nn.Parameter) -> Tensor | None:
        return parameter.grad

    def model_state(self) -> State:
        return {"model": self.module.state_dict()}

    def state(self) -> State:
        state = self.model_state()
        if self._optimizer is not None:
            state["optimizer"] = self._optimizer.state_dict()
        return state

    def load_state(self, state: State) -> None:
        self.module.load_state_dict(state["model"])
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])


@dataclasses.dataclass(kw_only=True)
class LocalContext:
    """A run in this process: no Ray, no tracking. For tests, notebooks and embedding.

    ``reports`` collects what was reported; ``checkpoint`` is the newest saved state, and a context
    made with it (``LocalContext(..., checkpoint=old.checkpoint)``) resumes there.
    """

    task: Task
    start: Start
    prepared: Mapping[str, Any] | None = None
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    engine: Engine = dataclasses.field(default_factory=PlainEngine)
    checkpoint: State | None = None
    reports: list[dict[str, float]] = dataclasses.field(default_factory=list)
    rank: int = 0
    world_size: int = 1

    def report(
        self,
        metrics: Mapping[str, float],
        *,
        step: int,
        total: int,
        checkpoint: Callable[[], State] | None = None,
    ) -> None:
        self.reports.append({**metrics, "step": step, "total": total})
        if checkpoint is not None:
            self.checkpoint = detached(checkpoint())

    def resume(self) -> State | None:
        return self.checkpoint

    def map(
        self,
        fn: Callable[[Any, ItemT], ValueT],
        items: Iterable[ItemT],
        *,
        shared: Any,
        key: str,
        name: str,
    ) -> list[ValueT]:
        return [fn(shared, item) for item in items]

    def sum(self, values: Tensor) -> Tensor:
        return values


def detached(state: Any) -> Any:
    """Return a copy of a nested state in which no tensor shares memory with the original."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {key: detached(value) for key, value in state.items()}
    if isinstance(state, Sequence) and not isinstance(state, (str, bytes)):
        return [detached(value) for value in state]
    return state
