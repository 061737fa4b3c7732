"""Robust instances: the records of a run, measured between its epochs or afterwards.

Both ways give the same artifact. Off-line, training only saves its weights and is neither slowed
nor disturbed; the measuring is spread over checkpoints and shards, wherever ``context.map`` runs.

Nothing here knows what an instance is: a method says what is measured by a :class:`Subject`.
"""

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from robustft.config import config_hash, to_dict
from robustft.errors import ConfigError
from robustft.methods.base import Row
from robustft.methods.instance_collector import Collected, Target
from robustft.methods.instance_config import CollectOptions
from robustft.methods.instance_format import Manifest, Record, fingerprint
from robustft.methods.instance_perturbations import Perturbation, perturbation_parameters
from robustft.methods.instance_statistics import (
    InstanceStatistics,
    StatisticsFolder,
    write_summary,
)
from robustft.models import state_digest
from robustft.models.weight_files import read_weights
from robustft.training.context import RunContext

__all__ = ["Collection", "Measure", "Subject", "collect_shard", "save_checkpoint"]

DIGEST_BYTES = 32  # of SHA-256
HELD_ROWS = 4_000_000
"""Rows of off-line collection that are in memory at a time, about 60 bytes each."""


class Measure(Protocol):
    """What measures one worker's share of a split: ``collect``, ``collect_text``."""

    def __call__(
        self,
        model: Any,
        split: Any,
        *,
        perturbations: Sequence[Perturbation],
        record: int,
        batch_size: int,
        target: Target,
        seed: int,
        device: torch.device,
        rank: int,
        world_size: int,
    ) -> Collected: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is measured, and how, where instances of one kind differ from those of another.

    Args:
        measure: the function, of a module: shards are measured elsewhere.
        options: the perturbations, and where and when.
        model: name of the architecture.
        run: everything else that decides the weights of a record: the training's options.
        content: what the measured numbers depend on beside weights and options: hashes of the
            split's content and what the model is built by.
    """

    measure: Measure
    options: CollectOptions
    model: str
    run: Any
    content: Sequence[Any]

    def shard(
        self,
        model: Any,
        split: Any,
        *,
        record: int,
        device: torch.device,
        rank: int,
        world_size: int,
    ) -> Collected:
        """Measure one share of ``split``."""
        return self.measure(
            model,
            split,
            perturbations=self.options.perturbations,
            record=record,
            batch_size=self.options.batch_size,
            target=self.options.target,
            seed=self.options.seed,
            device=device,
            rank=rank,
            world_size=world_size,
        )


def _manifest(subject: Subject, context: RunContext) -> Manifest:
    task, split, options = context.task, context.task.splits["train"], subject.options
    state = context.start.build().state_dict()
    return Manifest(
        data=task.name,
        split="train",
        num_instances=len(split),
        fingerprint=fingerprint(split.ids, split.labels),
        num_classes=task.num_classes,
        model=subject.model,
        run=config_hash([to_dict(subject.run), state_digest(state), task.digest]),
        perturbations=perturbation_parameters(options.perturbations),
        target=options.target,
        seed=options.seed,
        dtype=str(next(iter(state.values())).dtype).removeprefix("torch."),
        code_version=importlib.metadata.version("robustft"),
    )


class Collection:
    """The records of a run, in the loop or off-line.

    Args:
        subject: what is measured.
        context: of the run.
        epochs: of the run.
        num_steps: of an epoch.

    Raises:
        ConfigError: no folder is named, or it holds statistics of another run.
    """

    def __init__(
        self, subject: Subject, context: RunContext, *, epochs: int, num_steps: int
    ) -> None:
        self._subject, self._options, self._context = subject, subject.options, context
        self._epochs, self._num_steps = epochs, num_steps
        if self._options.folder is None:
            raise ConfigError("collect.folder = None: name the folder with the checkpoints")
        self.folder = StatisticsFolder(self._options.folder, _manifest(subject, context))
        if context.rank == 0:
            self.folder.prepare()
        self._wait()

    def due(self, epoch: int) -> bool:
        """Return whether the model after so many epochs is to be measured."""
        return epoch % self._options.every == 0 or epoch == self._epochs

    def visit(self, epoch: int) -> None:
        """Measure the model after so many epochs, or save it for later; every rank calls it."""
        context = self._context
        state = context.engine.state()["model"]
        record = Record(
            record=-(-epoch // self._options.every),
            epoch=epoch,
            global_step=epoch * self._num_steps,
            weights=state_digest(state),
        )
        if self._options.when == "offline":
            if context.rank == 0:
                save_checkpoint(self.folder.path, record, state)
            self._wait()
            return
        record, missing = self._agree(record)
        if not missing:
            return
        collected = self._subject.shard(
            context.engine.module,
            context.task.splits["train"],
            record=record.record,
            device=context.device,
            rank=context.rank,
            world_size=context.world_size,
        )
        self.folder.write_part(record, context.rank, context.world_size, collected.columns)
        self._wait()
        if context.rank == 0:
            self.folder.finish(record)
        self._wait()

    def measure_saved(self) -> None:
        """Measure the checkpoints that a run with ``collect.when = "offline"`` has saved.

        ``context.map`` spreads checkpoints and shards; what is finished is not repeated. The result
        is that of the collection in the loop. Every rank calls it.

        Raises:
            ConfigError: there are no checkpoints, or one has been changed.
        """
        context, options, folder = self._context, self._options, self.folder
        files = sorted((folder.path / "checkpoints").glob("*.safetensors"))
        if not files:
            raise ConfigError(
                f"{folder.path} holds no checkpoints: train with collect.when 'offline'"
            )
        split = context.task.splits["train"]
        work = CollectWork(
            subject=self._subject,
            start=dataclasses.replace(context.start, state=None),
            split=split,
            device=context.device.type,
        )
        key = config_hash([to_dict(self._subject.content), to_dict(options)], length=64)
        described = [(_read_record(file), file) for file in files]
        records = [(record, file) for record, file in described if not folder.complete(record)]
        at_once = max(1, HELD_ROWS // (len(split) * len(options.perturbations)))
        for first in range(0, len(records), at_once):
            part = records[first : first + at_once]
            items = [
                {
                    "record": record.record,
                    "checkpoint": str(file),
                    "weights": record.weights,
                    "shard": shard_number,
                }
                for record, file in part
                for shard_number in range(options.shards)
            ]
            values = context.map(
                collect_shard, items, shared=work, key=key, name="instance statistics"
            )
            if context.rank == 0:
                for place, (record, _) in enumerate(part):
                    found = values[place * options.shards : (place + 1) * options.shards]
                    _write(folder, record, found)
            self._wait()

    def finish(self) -> list[Row]:
        """Measure what has only been saved, write the summary, return one row per record."""
        if self._options.when == "offline":
            self.measure_saved()
        found: list[Row] = []
        statistics = InstanceStatistics(self.folder.path, split=self._context.task.splits["train"])
        for number, name in enumerate(statistics.manifest.perturbations):
            found += [{"perturbation": name, **row} for row in statistics.curve(name)]
            if number == 0 and self._context.rank == 0:
                summary = statistics.aggregate(name)
                write_summary(self.folder.path / "summary.parquet", summary)
        return found

    def _agree(self, record: Record) -> tuple[Record, bool]:
        """Return rank 0's record, and whether it is still to be measured."""
        told = torch.zeros(1 + DIGEST_BYTES, dtype=torch.int64, device=self._context.device)
        if self._context.rank == 0:
            told[0] = self.folder.begin(record)
            told[1:] = torch.tensor(list(bytes.fromhex(record.weights)))
        missing, *digest = self._context.sum(told).tolist()
        return dataclasses.replace(record, weights=bytes(digest).hex()), bool(missing)

    def _wait(self) -> None:
        """Wait for all ranks."""
        self._context.sum(torch.zeros(1, device=self._context.device))


def save_checkpoint(folder: Path, record: Record, model: Mapping[str, Tensor]) -> Path:
    """Save weights for off-line collection: safetensors, with the record as metadata."""
    target = folder / "checkpoints" / f"{record.record:05d}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    state = {name: value.detach().cpu().contiguous() for name, value in model.items()}
    described = {name: str(value) for name, value in dataclasses.asdict(record).items()}
    safetensors.torch.save_file(state, temporary, metadata=described)
    temporary.replace(target)
    return target


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CollectWork:
    """What measuring a shard of a checkpoint needs, wherever it runs.

    Args:
        subject: what is measured.
        start: builds the model, with the checkpoint as its ``state``.
        split: the instances.
        device: type of the device to compute on.
    """

    subject: Subject
    start: Any
    split: Any
    device: str


def collect_shard(work: CollectWork, item: Mapping[str, Any]) -> dict[str, Any]:
    """Measure one shard of one checkpoint: ``context.map``'s function.

    Raises:
        ConfigError: the checkpoint has been changed.
    """
    state = read_weights(Path(item["checkpoint"]))
    if state_digest(state) != item["weights"]:
        raise ConfigError(
            f"{item['checkpoint']} is no longer what it was: train again, or restore it"
        )
    collected = work.subject.shard(
        dataclasses.replace(work.start, state=state).build().to(work.device),
        work.split,
        record=item["record"],
        device=torch.device(work.device),
        rank=item["shard"],
        world_size=work.subject.options.shards,
    )
    return {
        **collected.columns,
        "num_forwards": collected.num_forwards,
        "num_backwards": collected.num_backwards,
    }


def _read_record(file: Path) -> Record:
    with safetensors.safe_open(file, framework="pt") as opened:
        described = opened.metadata()
    return Record(
        record=int(described["record"]),
        epoch=int(described["epoch"]),
        global_step=int(described["global_step"]),
        weights=described["weights"],
    )


def _write(folder: StatisticsFolder, record: Record, parts: Sequence[Mapping[str, Any]]) -> None:
    if not folder.begin(record):
        return
    for number, columns in enumerate(parts):
        folder.write_part(record, number, len(parts), columns)
    folder.finish(record)
