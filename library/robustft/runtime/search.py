"""Ray Tune: search spaces over a method's config, trials, and resuming them.

A trial of one process is a Tune function trial whose process is reused by the next trial, so that
Python and torch start once per CPU and not once per trial. A trial of several processes holds no
CPU itself and drives a Ray Train run; how many run at a time is computed here, since Tune does not
see what the inner runs hold.
"""

import dataclasses
import errno
import importlib.util
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from robustft.config import config_hash
from robustft.data.storage import Store
from robustft.errors import ConfigError, RobustftError, RunError, UnknownNameError
from robustft.methods import METHODS, Result
from robustft.runtime.experiment import RuntimeConfig, SearchConfig, with_values
from robustft.runtime.jsonfile import write_json
from robustft.runtime.mirror import checkpoint_folder, ray_storage
from robustft.runtime.results import has_result, load_result, save_result, stored_result
from robustft.runtime.session import Session, set_patience
from robustft.runtime.trainer import Job, WorkerContext, fetched, run_job, train

__all__ = ["Trial", "search", "trial_label"]

log = logging.getLogger(__name__)

DISTRIBUTIONS = ("uniform", "loguniform", "randint", "choice")
PASSES = ("passes/forwards", "passes/backwards")
"""Of an epoch in a trial's reports, of all its epochs in its result."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A trial that finished, failed, or was stopped by the scheduler.

    Args:
        label: "mrc-1 lr=0.001 seed=0"; unique in a search.
        values: the searched fields.
        result: what the method returned; None if it did not come to that.
        error: why it failed, in a sentence; empty if it did not.
        reported: the last metrics that it reported, with the passes of all epochs that it finished.
        seconds: wall time that it took; None where it never reported.
    """

    label: str
    values: Mapping[str, Any]
    result: Result | None
    error: str = ""
    reported: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seconds: float | None = None

    @property
    def metrics(self) -> Mapping[str, float]:
        """Those of the result or, without one, the last that were reported."""
        return self.reported if self.result is None else self.result.metrics

    @property
    def stopped(self) -> bool:
        """Whether the scheduler ended it early, which is no error."""
        return self.result is None and not self.error

    @property
    def status(self) -> str:
        """How it ended: "finished", "stopped" or "failed"."""
        if self.result is not None:
            return "finished"
        return "stopped" if self.stopped else "failed"


def trial_label(values: Mapping[str, Any]) -> str:
    """Return the searched values in one line; words ("mrc-1") need no field name."""
    return " ".join(_short(name, value) for name, value in values.items())


def _short(name: str, value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "+".join(map(str, value))
    if isinstance(value, str):
        return value
    return f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"


def search(
    job: Job,
    config: SearchConfig,
    runtime: RuntimeConfig,
    session: Session,
    *,
    directory: Path,
    cpus: int,
    store: Store | None = None,
) -> list[Trial]:
    """Run every trial, or those that ``directory`` does not hold as finished yet.

    Args:
        job: the method with its base config; a trial replaces the searched fields.
        config: what is varied.
        runtime: workers per trial, GPUs, restarts.
        session: the cluster.
        directory: Tune's folder of this search; an interrupted one is continued.
        cpus: of each worker of a trial.
        store: where Tune's folder lies instead, if that is in object storage.

    Raises:
        RunError: the search was interrupted, or the disk was full.
    """
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback

    workers = runtime.workers_per_trial
    at_a_time = config.max_concurrent or _concurrency(session, workers, cpus, runtime)
    # A trial tracks nothing itself: the address, which may hold a password, stays here.
    inner = dataclasses.replace(runtime, tracking_uri=None)
    settings = {
        "storage": str(directory / "train"),
        "store": None if store is None else store.inside("train"),
        "cpus": cpus,
        "runtime": inner,
    }
    _keep_credentials_out_of_logs()
    path = directory / "tune"
    going_on = _can_continue(path, tune) if store is None else _is_stored(store, path.name, tune)
    finished = {} if going_on else _finished(directory)
    if workers == 1:
        trainable = tune.with_parameters(run_trial, job=job, finished=finished)
        resources: Any = {"cpu": cpus, **({"gpu": runtime.gpus_per_worker} if job.gpu else {})}
    else:
        trainable = tune.with_parameters(drive_trial, job=job, settings=settings, finished=finished)
        # A driver that held even 0.01 CPU could keep its own workers waiting for ever.
        resources = tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])
    trainable = tune.with_resources(trainable, resources)
    if going_on:
        log.info("continuing the search in %s", path)
        tuner = tune.Tuner.restore(
            str(path) if store is None else store.inside(path.name).path,
            trainable=trainable,
            resume_errored=True,
            storage_filesystem=None if store is None else store.filesystem,
        )
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=param_space(config, tune),
            tune_config=tune.TuneConfig(
                num_samples=config.num_samples,
                max_concurrent_trials=at_a_time,
                reuse_actors=workers == 1,
                trial_dirname_creator=lambda trial: trial.trial_id,
                **_strategy(config, tune),
            ),
            run_config=tune.RunConfig(
                name=path.name,
                **ray_storage(path.parent, store),
                failure_config=tune.FailureConfig(max_failures=runtime.max_failures),
                # The one before the newest, should that be damaged.
                checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
                # Every report of every trial, so that one without a result still has its cost.
                callbacks=[JsonLoggerCallback()],
                verbose=0,
            ),
        )
    grid = tuner.fit()
    # A trial that died before its first report has no values in its own result.
    known = grid._experiment_analysis.trials
    trials = [
        (one.run_metadata.start_time or math.inf, _trial(found, one.config, job.method, config))
        for found, one in zip(grid, known, strict=True)
    ]
    _require_room([trial for _, trial in trials])
    return [trial for _, trial in sorted(trials, key=lambda pair: _place(config, *pair))]


def _keep_credentials_out_of_logs() -> None:
    """Keep Tune from handing the driver's AWS credentials to trials: Ray logs what is handed on.

    Workers have the credentials of their own node, as those of evaluations and of Ray Train do.
    """
    from ray.tune.execution import class_cache

    handed_on: set[str] = class_cache.ENV_VARS_TO_PROPAGATE
    handed_on.difference_update({name for name in handed_on if name.startswith("AWS_")})


def _require_room(trials: Sequence[Trial]) -> None:
    """Refuse to choose among trials of which some had no room to say what they found.

    Raises:
        RunError: the disk was full; a resumed search runs those trials again.
    """
    for trial in trials:
        if any(os.strerror(code) in trial.error for code in (errno.ENOSPC, errno.EDQUOT)):
            raise RunError(f"trial {trial.label} failed: {trial.error}")


def _can_continue(path: Path, tune: Any) -> bool:
    """Return whether Tune's folder holds a search to go on with; one that is damaged is set aside.

    Tune overwrites its state in place, so that a full disk or a kill at that moment leaves half of
    it; restored from that, it would run one trial without values. A finished trial whose result is
    damaged would not run again either.
    """
    if not tune.Tuner.can_restore(str(path)):
        return False
    states = sorted(path.glob("experiment_state-*.json"))
    try:
        state = json.loads(states[-1].read_text(encoding="utf-8") if states else "")
    except ValueError:
        what = "the state of the search is damaged"
    else:
        ended = [record.parent for record in path.glob("*/checkpoint_*/result.json")]
        if any(stored_result(folder) is None for folder in ended):
            what = "a finished trial of the search is damaged"
        elif _is_outdated(state, path):
            what = "the state of the search is older than its checkpoints"
        else:
            return True
    aside = path.with_name(f"{path.name}-damaged-{time.time_ns()}")
    log.warning("%s: trials that are not finished start again; see %s", what, aside)
    path.rename(aside)
    return False


def _is_outdated(state: Mapping[str, Any], path: Path) -> bool:
    """Return whether a trial would go on from a checkpoint that has been deleted since.

    Tune writes its state from time to time and deletes checkpoints at once, so that a driver that
    dies in between leaves the name of one that is gone. Restored from it, Tune gives the trial up.

    Args:
        state: content of Tune's ``experiment_state-*.json``.
        path: folder of the search.
    """
    for trial, progress in state.get("trial_data", ()):
        known, last = json.loads(trial), json.loads(progress).get("last_result") or {}
        name = last.get("checkpoint_dir_name")
        folder = path / str(known["trial_id"])
        ended = known["status"] in ("TERMINATED", "ERROR")
        if name and not ended and folder.is_dir() and not (folder / name).is_dir():
            return True
    return False


def _is_stored(store: Store, name: str, tune: Any) -> bool:
    """Return whether a search to go on with lies in object storage, where nothing is half written.

    Raises:
        RunError: its state is damaged.
    """
    folder = store.inside(name)
    if not tune.Tuner.can_restore(folder.path, storage_filesystem=folder.filesystem):
        return False
    try:
        json.loads(folder.newest("experiment_state-*.json") or b"")
    except ValueError as error:
        raise RunError(
            f"the state of the search in {folder.uri} is damaged: restore the earlier version of "
            "its experiment_state, or delete that folder to start the trials again"
        ) from error
    return True


def _finished(directory: Path) -> dict[str, str]:
    """Return hash of a trial's values -> its result, of searches that were set aside as damaged."""
    found = {}
    for record in sorted(directory.glob("tune-damaged-*/*/checkpoint_*/trial.json")):
        if stored_result(record.parent) is not None:
            values = json.loads(record.read_text(encoding="utf-8"))["values"]
            found[config_hash(values)] = str(record.parent)
    return found


def _place(config: SearchConfig, began: float, trial: Trial) -> tuple[Any, ...]:
    """Return where a trial stands in its search: Tune's own order is another after a restore."""
    if config.algorithm != "grid":
        return began, trial.label
    return tuple(list(values).index(trial.values[n]) for n, values in config.space.items())


def param_space(config: SearchConfig, tune: Any) -> dict[str, Any]:
    """Return Tune's search space: grids, or distributions by name."""
    space: dict[str, Any] = {}
    for name, values in config.space.items():
        if isinstance(values, Mapping):
            ((kind, limits),) = values.items()
            if kind not in DISTRIBUTIONS:
                raise ConfigError(
                    f"search.space.{name}: unknown distribution {kind!r}; "
                    f"known: {', '.join(DISTRIBUTIONS)}"
                )
            space[name] = (
                tune.choice(list(limits)) if kind == "choice" else (getattr(tune, kind)(*limits))
            )
        elif config.algorithm == "grid":
            space[name] = tune.grid_search(list(values))
        else:
            space[name] = tune.choice(list(values))
    return space


def require_algorithm(config: SearchConfig) -> None:
    """Raise ConfigError if the search needs a package that is not installed."""
    if config.algorithm == "optuna" and importlib.util.find_spec("optuna") is None:
        raise ConfigError("search.algorithm optuna needs the extra: pip install 'robustft[search]'")


def _strategy(config: SearchConfig, tune: Any) -> dict[str, Any]:
    options: dict[str, Any] = {}
    require_algorithm(config)
    if config.algorithm == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        class Optuna(OptunaSearch):
            """Learns from a trial when it ends: not every report of an epoch has the metric."""

            def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
                pass

        options["search_alg"] = Optuna(metric=config.metric, mode="max", seed=config.seed)
    elif config.algorithm == "random":
        from ray.tune.search.basic_variant import BasicVariantGenerator

        options["search_alg"] = BasicVariantGenerator(random_state=config.seed)
    if config.scheduler == "asha":
        from ray.tune.schedulers import ASHAScheduler

        # Trials end by themselves: ASHA's own end, 100 steps, would take their results away.
        options["scheduler"] = ASHAScheduler(
            time_attr="step", metric=config.metric, mode="max", stop_last_trials=False
        )
    return options


def _concurrency(session: Session, workers: int, cpus: int, runtime: RuntimeConfig) -> int | None:
    """Return how many trials fit into the cluster; None leaves the number to Tune.

    A cluster that grows on demand only grows for trials that wait. Tune lets them wait where each
    asks for its own CPUs; a trial that drives workers asks for none, so it must not wait.
    """
    if runtime.autoscaling and workers == 1:
        return None
    by_cpu = session.num_cpus // (workers * cpus)
    if runtime.gpus_per_worker:
        by_gpu = int(session.num_gpus / (workers * runtime.gpus_per_worker))
        return max(1, min(by_cpu, by_gpu))
    return max(1, by_cpu)


def run_trial(values: Mapping[str, Any], job: Job, finished: Mapping[str, str]) -> None:
    """A trial in one process: Tune calls it in a process that the next trial may reuse."""
    from ray import tune

    def save(record: dict[str, Any], folder: Path | None) -> None:
        checkpoint = tune.Checkpoint.from_directory(str(folder)) if folder else None
        tune.report(record, checkpoint=checkpoint)

    def run(own: Job) -> Result:
        own = fetched(own)
        with tempfile.TemporaryDirectory(prefix="robustft-") as scratch:
            restore = partial(_tune_checkpoint, Path(scratch))
            return run_job(own, WorkerContext(own, save=save, restore=restore))

    _guarded(values, job, finished, run)


def _tune_checkpoint(scratch: Path) -> Path | None:
    from ray import tune

    checkpoint = tune.get_checkpoint()
    return checkpoint_folder(checkpoint, scratch) if checkpoint else None


def drive_trial(
    values: Mapping[str, Any], job: Job, settings: Mapping[str, Any], finished: Mapping[str, str]
) -> None:
    """A trial of several processes: drives a Ray Train run named after the trial."""
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    runtime: RuntimeConfig = settings["runtime"]
    set_patience(runtime)
    name = f"trial-{tune.get_context().get_trial_id()}"

    def run(own: Job) -> Result:
        return train(
            own,
            name=name,
            storage=Path(settings["storage"]),
            store=settings["store"],
            workers=runtime.workers_per_trial,
            cpus=settings["cpus"],
            gpus=runtime.gpus_per_worker,
            max_failures=runtime.max_failures,
            callbacks=[TuneReportCallback()],
        )

    _guarded(values, job, finished, run)


def _guarded(
    values: Mapping[str, Any], job: Job, finished: Mapping[str, str], run: Callable[[Job], Result]
) -> None:
    """Run a trial once, store its result with Tune, and turn errors of the trial into a mark.

    A result that an earlier attempt has left (``finished``, by the trial's values) is taken as it
    is. What the user's configuration caused (a NaN loss, a field out of range) would happen again
    on every restart, so it ends the trial; a killed process is Tune's to restart.
    """
    from ray import tune

    with tempfile.TemporaryDirectory(prefix="robustft-") as scratch:
        earlier = _tune_checkpoint(Path(scratch))
        if earlier is not None and has_result(earlier):
            return  # killed between its last report and its end
    kept = finished.get(config_hash(values))
    if kept is not None:
        metrics = dict(load_result(Path(kept)).metrics)
        tune.report(
            {**metrics, "finished": True, "failure": ""},
            checkpoint=tune.Checkpoint.from_directory(kept),
        )
        return
    own = dataclasses.replace(job, config=with_values(job.config, values), run=trial_label(values))
    event = {"stage": own.stage, "run": own.run}
    own.send({"kind": "begin", **event, "values": dict(values)})
    error = ""
    with tempfile.TemporaryDirectory(prefix="robustft-") as folder:
        record: dict[str, Any] = {}
        try:
            result = run(own)
            save_result(result, Path(folder))
            record = dict(result.metrics)
        except RobustftError as failure:
            error = str(failure)
        document = {"values": dict(values), "error": error, "ended": time.time()}
        write_json(Path(folder) / "trial.json", document)
        own.send({"kind": "end", **event, "error": error, "metrics": record})
        tune.report(
            {**record, "finished": True, "failure": error},
            checkpoint=tune.Checkpoint.from_directory(folder),
        )


def _trial(found: Any, values: Mapping[str, Any], method: str, config: SearchConfig) -> Trial:
    """Return what Tune knows of a trial."""
    last = found.metrics or {}
    trial = Trial(
        label=trial_label(values),
        values=values,
        result=None,
        error=last.get("failure", ""),
        reported=_reported(found, METHODS[method].metrics),
        seconds=last.get("time_total_s"),
    )
    if found.error is not None:
        lines = [line for line in str(found.error).splitlines() if line.strip()]
        error = lines[-1] if lines else type(found.error).__name__
        return dataclasses.replace(trial, error=error)
    if trial.error:
        return trial
    if found.checkpoint is None or not last.get("finished"):
        early = config.scheduler != "fifo"
        return trial if early else dataclasses.replace(trial, error="ended without a result")
    with found.checkpoint.as_directory() as folder:
        return dataclasses.replace(trial, result=load_result(Path(folder)))


def _reported(found: Any, names: Sequence[str]) -> dict[str, float]:
    """Return the last values of the metrics ``names`` that a trial reported, and all its passes."""
    table = found.metrics_dataframe
    if table is None or "step" not in table:
        return {}
    # One row per epoch: what a restarted trial repeats counts once, as in its result.
    steps = table.dropna(subset="step").drop_duplicates("step", keep="last").sort_values("step")
    metrics = {}
    for name in (name for name in names if name in steps):
        values = steps[name].dropna()
        if len(values):
            metrics[name] = float(values.sum() if name in PASSES else values.iloc[-1])
    return metrics


def choose(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """Return the trials of the best configuration: one per seed.

    Trials that differ only in ``seed`` are one configuration, judged by the mean of ``metric`` on
    the selection split; ties go to the configuration that was named first. A configuration of
    which a seed failed or was stopped is only considered if no other is complete.

    Raises:
        RunError: no trial finished.
        UnknownNameError: the trials report no such metric.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        rest = {name: value for name, value in trial.values.items() if name != "seed"}
        groups.setdefault(trial_label(rest), []).append(trial)
    finished = [
        (all(t.result for t in group), [t for t in group if t.result]) for group in groups.values()
    ]
    candidates = [group for complete, group in finished if complete and group]
    candidates = candidates or [group for _, group in finished if group]
    if not candidates:
        reasons = sorted({trial.error or "stopped early by the scheduler" for trial in trials})
        more = f" (and {len(reasons) - 1} other reasons, above)" if len(reasons) > 1 else ""
        raise RunError(f"all {len(trials)} trials failed: {reasons[0]}{more}")

    known = candidates[0][0].result
    if known is not None and metric not in known.metrics:
        raise UnknownNameError("search.metric", metric, known.metrics)

    def score(group: Sequence[Trial]) -> float:
        values = [t.result.metrics[metric] for t in group if t.result is not None]
        return sum(values) / len(values)

    return max(candidates, key=score)
