"""What ROSE's masks did: per epoch by kind of parameter, and over the run per tensor."""

from collections.abc import Mapping
from typing import Any

import torch

from robustft.training.context import State
from robustft.training.rose_adamw import RoseAdamW, StepRecord
from robustft.training.rose_masks import in_normalisation, layer_of

__all__ = ["EpochMasks", "MaskLog", "kind_of"]


def kind_of(name: str) -> str:
    """Return "norm", "attention", "ffn" or, outside of numbered blocks, "other"."""
    if in_normalisation(name):
        return "norm"
    if not layer_of(name):
        return "other"
    parts = name.lower().split(".")
    return "attention" if any("attention" in p or "attn" in p for p in parts) else "ffn"


class MaskLog:
    """Sums over the masks of the steps; every rank has the same.

    Args:
        sizes: name -> number of scalars, of every eligible parameter.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = dict(sizes)
        self._before: dict[str, float] = {}
        self._run, self._run_steps = dict.fromkeys(sizes, 0.0), 0
        self.start_epoch()

    def start_epoch(self) -> None:
        """Forget the sums of the epoch before."""
        self._epoch, self._epoch_steps = dict.fromkeys(self._sizes, 0.0), 0
        self._change, self._changes = 0.0, 0
        self._skipped, self._first_order_skipped = 0, 0

    def add(self, record: StepRecord) -> None:
        """Take note of a step."""
        self._skipped += record.skipped
        self._first_order_skipped += record.first_order_skipped
        masks = record.masks
        if not masks:
            return
        for name, value in masks.items():
            self._epoch[name] += value
            self._run[name] += value
        both = [abs(value - self._before[n]) for n, value in masks.items() if n in self._before]
        self._change += sum(both)
        self._changes += len(both)
        self._before = dict(masks)
        self._epoch_steps += 1
        self._run_steps += 1

    def metrics(self) -> dict[str, float]:
        """Return what the epoch's masks did.

        Returns:
            "mask/skipped_steps" and "mask/first_order_skipped" (numbers of steps whose gradients,
            or first-order gradients, were not finite); and if there were masks: "mask/kept" (mean
            mask over eligible tensors), "mask/kept_scalars" (over their scalars),
            "mask/kept_<kind>" (over the tensors of a kind; of networks with attention only, since
            what else is in the blocks of others is no "ffn") and, once there were two masks,
            "mask/churn" (mean change of a tensor's mask from step to step; of masks of 0 and 1 the
            share that changed).
        """
        values: dict[str, float] = {
            "mask/skipped_steps": self._skipped,
            "mask/first_order_skipped": self._first_order_skipped,
        }
        if not self._epoch_steps:
            return values
        kept = {name: total / self._epoch_steps for name, total in self._epoch.items()}
        values["mask/kept"] = _mean(kept)
        weighted = sum(kept[name] * size for name, size in self._sizes.items())
        values["mask/kept_scalars"] = weighted / sum(self._sizes.values())
        kinds = {kind_of(name) for name in kept}
        for kind in sorted(kinds) if "attention" in kinds else ():
            members = {name: value for name, value in kept.items() if kind_of(name) == kind}
            values[f"mask/kept_{kind}"] = _mean(members)
        if self._changes:
            values["mask/churn"] = self._change / self._changes
        return values

    def table(self) -> list[dict[str, Any]]:
        """Return how often each eligible tensor was kept: its mean mask over all masked steps."""
        return [
            {
                "parameter": name,
                "kind": kind_of(name),
                "layer": layer_of(name),
                "scalars": size,
                "frequency": self._run[name] / self._run_steps if self._run_steps else None,
                "steps": self._run_steps,
            }
            for name, size in self._sizes.items()
        ]

    def state(self) -> State:
        """Return what ``load_state`` needs, between two epochs."""
        return {"before": dict(self._before), "run": dict(self._run), "steps": self._run_steps}

    def load_state(self, state: State) -> None:
        """Restore what ``state`` returned."""
        self._before, self._run = dict(state["before"]), dict(state["run"])
        self._run_steps = int(state["steps"])


class EpochMasks:
    """What the masks of one epoch did, for loops that take any optimiser; others have none.

    An epoch's churn is that between its own steps, so that nothing has to be saved with a run.

    Args:
        optimizer: whose steps follow; None: no step is taken.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None) -> None:
        self._optimizer = optimizer if isinstance(optimizer, RoseAdamW) else None
        self._log = MaskLog({} if self._optimizer is None else self._optimizer.eligible_sizes)

    def add_step(self) -> None:
        """Take note of the step that the optimiser has just taken."""
        # The record is on the host already: its masks' means come with the step's one transfer.
        if self._optimizer is not None and self._optimizer.record is not None:
            self._log.add(self._optimizer.record)

    def metrics(self) -> dict[str, float]:
        """Return ``MaskLog.metrics``; nothing if the optimiser has no masks."""
        return {} if self._optimizer is None else self._log.metrics()


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
