"""Ray Train: run a method's training function on N workers, and the contexts that methods get."""

import dataclasses
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from robustft.data.base import Task
from robustft.data.storage import Store
from robustft.errors import CheckpointError, ConfigError, RobustftError, RunError
from robustft.methods import METHODS, Result
from robustft.methods.interpolation import InterpolateConfig, require_line
from robustft.methods.rift import interpolated
from robustft.models.start import Start
from robustft.runtime.deepspeed_engine import DeepSpeedEngine
from robustft.runtime.engines import DDPEngine, why_not_options
from robustft.runtime.events import Sender, busy
from robustft.runtime.jsonfile import write_json
from robustft.runtime.mirror import checkpoint_folder, ray_storage
from robustft.runtime.training_checkpoints import load_state, newest_state, newest_whole, save_state
from robustft.training.context import Engine, PlainEngine, State
from robustft.training.engine_options import EngineOptions

__all__ = ["DriverContext", "Job", "WorkerContext", "run_job", "train"]

log = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
ValueT = TypeVar("ValueT")
RECORD_FILE = "checkpoint_manager_snapshot.json"
"""Ray Train's list of a run's checkpoints, in the run's folder."""
RESERVATION_FILE = "reservation.json"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run of a method, as it travels to the workers.

    Args:
        method: key in METHODS.
        config: the method's config.
        task, start, prepared: what the context offers, or Ray object references to it.
        stage, run: where the run stands in the experiment, for progress and tracking.
        threads: torch threads of each worker.
        gpu: True to compute on the GPU that Ray has assigned.
        engine, zero_stage: as in RuntimeConfig.
        options: how forwards are computed.
        send: takes events to the driver.
        interpolate: how to go back from the result towards the start; None: not at all.
    """

    method: str
    config: Any
    task: Any
    start: Any
    prepared: Any
    stage: str
    run: str
    threads: int
    gpu: bool
    send: Sender
    interpolate: InterpolateConfig | None = None
    engine: str = "auto"
    zero_stage: int = 0
    options: EngineOptions = dataclasses.field(default_factory=EngineOptions)


@dataclasses.dataclass(kw_only=True)
class DriverContext:
    """The context of ``prepare``: one process, the driver, whose ``map`` fans out over Ray.

    Time between maps counts as method code that runs here; inside a map the tasks count it.
    """

    task: Any
    start: Any
    mapper: Callable[..., list[Any]]
    report_to: Sender
    stage: str
    began: float = dataclasses.field(default_factory=time.time)
    prepared: Mapping[str, Any] | None = None
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    engine: Engine = dataclasses.field(default_factory=PlainEngine)
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
        event = {"kind": "metrics", "stage": self.stage, "run": "", "step": step, "total": total}
        self.report_to({**event, "metrics": dict(metrics)})

    def resume(self) -> State | None:
        return None

    def map(
        self,
        fn: Callable[[Any, ItemT], ValueT],
        items: Iterable[ItemT],
        *,
        shared: Any,
        key: str,
        name: str,
    ) -> list[ValueT]:
        self.pause()
        values = self.mapper(fn, items, shared=shared, key=key, name=name)
        self.began = time.time()
        return values

    def pause(self) -> None:
        """Report the time since the last map, or since the beginning, as busy."""
        event = {"kind": "busy", "stage": self.stage, "run": "", "began": self.began}
        self.report_to({**event, "ended": time.time()})

    def sum(self, values: Tensor) -> Tensor:
        return values


class WorkerContext:
    """The context of a training function under Ray Train or Ray Tune.

    Args:
        job: what is run.
        save: hands (metrics, folder or None) to Ray; every rank calls it.
        restore: returns the folder of the newest checkpoint, or None.
        rank, world_size: this worker among all.
        device: where it computes; None: the CPU, or the one GPU that Ray lets it see.
    """

    def __init__(
        self,
        job: Job,
        *,
        save: Callable[[dict[str, Any], Path | None], None],
        restore: Callable[[], Path | None],
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self.task: Task = job.task
        self.start: Start = job.start
        self.prepared: Mapping[str, Any] | None = job.prepared
        self.rank, self.world_size = rank, world_size
        self.device = device or torch.device("cuda" if job.gpu else "cpu")
        self.engine = _engine(job, self.device, world_size)
        self._job, self._save, self._restore = job, save, restore

    def report(
        self,
        metrics: Mapping[str, float],
        *,
        step: int,
        total: int,
        checkpoint: Callable[[], State] | None = None,
    ) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        state = checkpoint() if checkpoint is not None else None
        record = {**values, "step": step, "total": total}
        with tempfile.TemporaryDirectory(prefix="robustft-") as folder:
            if state is not None and self.rank == 0:
                save_state(state, Path(folder))
                self._save(record, Path(folder))
            else:
                self._save(record, None)
        if self.rank == 0:
            event = {"kind": "metrics", "stage": self._job.stage, "run": self._job.run}
            self._job.send({**event, "step": step, "total": total, "metrics": values})

    def resume(self) -> State | None:
        """Return the newest state that is whole; rank 0 decides which one all ranks take."""
        folder, found = self._restore(), None
        if folder is not None and self.rank == 0:
            found = newest_whole(folder, warn=self._warn)
        if self.world_size > 1:
            chosen = [None if found is None else found[0].name]
            torch.distributed.broadcast_object_list(chosen, device=self.device)
            if self.rank > 0 and chosen[0] is not None:
                return _same_state(folder, chosen[0])
        return None if found is None else found[1]

    def _warn(self, text: str) -> None:
        """Say ``text`` here and where the user reads."""
        log.warning("%s", text)
        title = ": ".join(part for part in (self._job.stage, self._job.run) if part)
        event = {"kind": "warning", "stage": self._job.stage, "run": self._job.run}
        self._job.send({**event, "text": f"{title}: {text}"})

    def map(
        self,
        fn: Callable[[Any, ItemT], ValueT],
        items: Iterable[ItemT],
        *,
        shared: Any,
        key: str,
        name: str,
    ) -> list[ValueT]:
        """Share the items out among the ranks of this run.

        A trial owns its processes and nothing else: asking Ray for further tasks from inside one
        could wait for ever on a cluster whose CPUs are all held by trials.
        """
        work = list(items)
        mine = {i: fn(shared, work[i]) for i in range(self.rank, len(work), self.world_size)}
        if self.world_size == 1:
            return [mine[i] for i in range(len(work))]
        gathered: list[dict[int, ValueT]] = [{} for _ in range(self.world_size)]
        torch.distributed.all_gather_object(gathered, mine)
        together = {i: value for part in gathered for i, value in part.items()}
        return [together[i] for i in range(len(work))]

    def sum(self, values: Tensor) -> Tensor:
        if self.world_size == 1:
            return values
        total = values.detach().clone()
        torch.distributed.all_reduce(total)
        return total


def _same_state(folder: Path | None, name: str) -> State:
    """Return the state that rank 0 has chosen, which must not be another one on this rank.

    Args:
        folder: the newest checkpoint as this rank sees it; the chosen one lies beside it.
        name: of the chosen one. Copies from an object store lie elsewhere for each rank.

    Raises:
        RuntimeError: this rank cannot read it; Ray Train then restarts all of them.
    """
    if folder is None:
        raise RuntimeError(f"this node does not see {name}: the run's storage is not shared")
    try:
        return load_state(folder.parent / name)
    except CheckpointError as error:
        raise RuntimeError(str(error)) from error


def _engine(job: Job, device: torch.device, world_size: int) -> Engine:
    """Return what wraps a job's model on this worker.

    Raises:
        ConfigError: the method cannot run with the options.
    """
    deepspeed = world_size > 1 and job.engine == "deepspeed"
    reason = why_not_options(
        job.config, job.options, deepspeed=deepspeed, zero_stage=job.zero_stage
    )
    if reason:
        raise ConfigError(reason)
    if deepspeed:
        clip_norm = getattr(job.config, "clip_norm", None)
        return DeepSpeedEngine(
            device, stage=job.zero_stage, options=job.options, clip_norm=clip_norm
        )
    return PlainEngine(job.options) if world_size == 1 else DDPEngine(device, job.options)


def run_job(job: Job, context: WorkerContext) -> Result:
    """Run the method's training function in this worker, and interpolate its result if asked to."""
    # A reused process keeps whatever the run before it had set.
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    with busy(job.send, job.stage, job.run):
        if job.interpolate is not None:
            require_line(context.start)
        result: Result = METHODS[job.method].train(job.config, context)
        if job.interpolate is not None:
            result = interpolated(job.interpolate, context, result)
    return result


def train_loop(config: dict[str, Any]) -> Result | RobustftError | None:
    """The function that Ray Train runs on every worker; rank 0's value comes back.

    An error of ours (a NaN loss, a field out of range) is a value too: it happens on every rank
    and would happen again, and Ray Train restarts whatever raises.
    """
    import ray
    import ray.train.torch

    job, folder = fetched(config["job"]), config["folder"]
    place = ray.train.get_context()
    rank = place.get_world_rank()
    scratch = tempfile.TemporaryDirectory(prefix="robustft-")
    if rank == 0 and folder is not None:
        _note_reservation(folder)
    if rank == 0 and config["elastic"]:
        text = f"{job.stage}: training on {place.get_world_size()} worker(s)"
        job.send({"kind": "note", "text": text})

    def save(record: dict[str, Any], folder: Path | None) -> None:
        checkpoint = ray.train.Checkpoint.from_directory(folder) if folder else None
        ray.train.report(record, checkpoint=checkpoint)

    def restore() -> Path | None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint:
            return checkpoint_folder(checkpoint, Path(scratch.name))
        return None if folder is None else newest_state(folder)

    context = WorkerContext(
        job,
        save=save,
        restore=restore,
        rank=rank,
        world_size=place.get_world_size(),
        # Workers of one node see each other's GPUs; Ray Train knows which is whose.
        device=ray.train.torch.get_device() if job.gpu else None,
    )
    result: Result | RobustftError
    try:
        with scratch:
            result = run_job(job, context)
    except RobustftError as error:
        result = error
    return result if rank == 0 else None


def fetched(job: Job) -> Job:
    """Return ``job`` with its object references replaced by the objects."""
    import ray

    names = ("task", "start", "prepared")
    values = {
        name: ray.get(value) if isinstance(value := getattr(job, name), ray.ObjectRef) else value
        for name in names
    }
    return dataclasses.replace(job, **values)


def train(
    job: Job,
    *,
    name: str,
    storage: Path,
    workers: int | tuple[int, int],
    cpus: int,
    gpus: float,
    max_failures: int,
    callbacks: list[Any] | None = None,
    store: Store | None = None,
) -> Result:
    """Run ``job`` with Ray Train on ``workers`` processes and return rank 0's result.

    With (fewest, most) workers, Ray Train takes as many as the cluster has room for: whenever that
    changes, it starts them all again from the newest checkpoint. Loaders cut the same global
    batches for any number.

    A run of the same ``name`` in the same ``storage``, or ``store`` if that is given, continues
    from its newest checkpoint.

    Raises:
        RobustftError: what the training function raised.
        RunError: workers, or Ray Train's own controller, died more often than ``max_failures``.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        """Leaves Ctrl-C to the run: Ray's handler would stay behind and end the process with 0."""

        def _register_sigint_handler(self, controller: Any) -> None:
            controllers.append(controller)

    controllers: list[Any] = []
    resources: dict[str, float] = {"CPU": cpus}
    if gpus:
        resources["GPU"] = gpus
    folder = storage / name
    _set_aside_damaged(folder)
    # Of an earlier cluster.
    (folder / RESERVATION_FILE).unlink(missing_ok=True)
    trainer = Trainer(
        train_loop,
        # What an object store holds is whole, and no folder of the driver's is the workers'.
        train_loop_config={
            "job": job,
            "folder": folder if store is None else None,
            "elastic": isinstance(workers, tuple),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu=bool(gpus), resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=name,
            **ray_storage(storage, store),
            callbacks=callbacks,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            failure_config=ray.train.FailureConfig(
                max_failures=max_failures, controller_failure_limit=3
            ),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        result: Result | RobustftError = trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from error
    except ray.exceptions.RayActorError as error:
        # Ray Train restarts workers, and nobody but us the controller that does so.
        if max_failures == 0:
            raise RunError(f"training failed: Ray Train's controller died ({name})") from error
        log.warning("Ray Train's controller died: %s goes on from its newest checkpoint", name)
        _free_reservation(folder)
        return train(
            job,
            name=name,
            storage=storage,
            workers=workers,
            cpus=cpus,
            gpus=gpus,
            max_failures=max_failures - 1,
            callbacks=callbacks,
            store=store,
        )
    except KeyboardInterrupt:
        for controller in controllers:
            ray.kill(controller)
        raise
    if isinstance(result, RobustftError):
        raise result
    return result


def _set_aside_damaged(folder: Path) -> None:
    """Rename Ray's record of a run's checkpoints where it is damaged: Ray would refuse the run.

    Ray overwrites it in place, so a full disk or a kill at that moment leaves half of it. The
    checkpoints themselves are found without it.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))["checkpoint_results"]
        missing = [one["checkpoint_dir_name"] for one in known]
        missing = [name for name in missing if not (folder / name).is_dir()]
    except (ValueError, KeyError, TypeError):
        missing = [path.name]
    if missing:
        aside = path.with_name(f"{path.stem}-damaged-{time.time_ns()}{path.suffix}")
        log.warning("Ray's record of the checkpoints in %s is damaged; see %s", folder, aside.name)
        path.rename(aside)


def _note_reservation(folder: Path) -> None:
    """Write down which placement group holds the resources of this run."""
    import ray.util

    group = ray.util.get_current_placement_group()
    if group is not None:
        write_json(folder / RESERVATION_FILE, {"placement_group": group.id.hex()})


def _free_reservation(folder: Path) -> None:
    """Give back what a dead controller had reserved.

    Ray Train's own cleaner asks the dashboard, which an embedded Ray does not have; without it the
    next attempt would wait for the resources of the one before.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    path = folder / RESERVATION_FILE
    if path.is_file():
        identity = json.loads(path.read_text(encoding="utf-8"))["placement_group"]
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(identity)))


def _cause(error: Exception) -> Exception:
    """Return what the training function itself raised, where a worker still could say it."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause = getattr(failure, "cause", None) or failure.__cause__ or failure
        if isinstance(cause, RobustftError):
            return cause
    lines = [line for line in str(error).splitlines() if line.strip()]
    return RunError(f"training failed: {lines[-1] if lines else type(error).__name__}")
