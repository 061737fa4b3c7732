"""Run an experiment: start -> method (searched) -> evaluation -> report.

Every stage leaves what it found in the run's folder, so that ``resume`` goes on where a run
stopped and repeats no finished trial and no finished item of a fan-out.
"""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from robustft.data.storage import is_uri
from robustft.errors import ConfigError
from robustft.evaluation import Evaluation
from robustft.evaluation.report import ReportData
from robustft.methods import METHODS, Result
from robustft.methods.base import Row
from robustft.models import save_model
from robustft.models.text import TextStart, save_text_model
from robustft.runtime import outputs, recording
from robustft.runtime.autoscaling import watching
from robustft.runtime.events import Clock, EventPump
from robustft.runtime.experiment import (
    Experiment,
    experiment_from_dict,
    method_name,
)
from robustft.runtime.mirror import Mirror, reopen, run_store
from robustft.runtime.preflight import refuse, require_workers
from robustft.runtime.progress import ProgressLines
from robustft.runtime.results import save_result, stored_result
from robustft.runtime.resumable import resumable, with_absolute_paths
from robustft.runtime.running import Running
from robustft.runtime.search import Trial, choose, search
from robustft.runtime.session import connect, set_environment, storage_place, storage_root
from robustft.runtime.starts import fit_to_task, load_or_fresh, start_task
from robustft.runtime.stored_runs import save_strips
from robustft.runtime.text_runs import (
    AnyEvaluation,
    AnyStart,
    AnyTask,
    load_any_task,
    measure,
)
from robustft.runtime.tracking import Tracker
from robustft.runtime.trainer import DriverContext, Job, train

__all__ = ["Report", "rank_layers", "resume", "run"]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """Where a finished run lies, and its numbers.

    Args:
        directory: the run's folder.
        summary: what ``summary.json`` holds.
        report_html: the self-contained page.
        data: what the page and the terminal's table show (``evaluation.report.write_summary``).
    """

    directory: Path
    summary: Mapping[str, Any]
    report_html: Path
    data: ReportData


def run(
    experiment: Experiment,
    *,
    address: str | None = None,
    run_dir: str | Path | None = None,
    began: float | None = None,
) -> Report:
    """Run ``experiment`` from start to report.

    Args:
        experiment: what to run.
        address: Ray address; overrides ``experiment.runtime.address``.
        run_dir: folder of the run; None makes a new one. Whatever it holds already is not
            computed again.
        began: when the process started (seconds since 1970), for the share of time in which no
            method code ran; None is now.

    Raises:
        RobustftError: with one sentence that names the remedy.
        KeyboardInterrupt: after Ctrl-C or SIGTERM; its text says how to resume.
    """
    runtime = experiment.runtime
    if address is not None:
        runtime = dataclasses.replace(runtime, address=address)
        experiment = dataclasses.replace(experiment, runtime=runtime)
    set_environment(runtime)
    storage, store = storage_root(runtime), run_store(storage_place(runtime))
    clock = Clock(time.time() if began is None else began)
    with clock.stage("start-up"):
        tasks = _load_tasks(experiment)
        refuse(experiment, *tasks, storage if run_dir is None else Path(run_dir))
    with resumable(run_dir, storage, experiment) as directory:
        mirror = Mirror(store, directory)
        mirror.catch_up()
        clock.keep(directory / "seconds.json")
        tracker = Tracker(
            directory,
            experiment=experiment.name,
            storage=storage,
            tracking_uri=runtime.tracking_uri,
        )
        with contextlib.ExitStack() as stack:
            # After the tracker has closed its records.
            stack.callback(mirror.publish)
            stack.callback(tracker.close)
            parent = recording.start_parent(tracker, experiment, directory)
            # Until something says otherwise, a run that ends has failed.
            status = ["FAILED"]
            stack.callback(lambda: tracker.finish_run(parent, status[0]))  # type: ignore[arg-type]
            try:
                report = _run(experiment, mirror, tasks, tracker, parent, clock, stack)
            except KeyboardInterrupt:
                status[0] = "KILLED"
                # Said at once, since whoever interrupts may also kill what has to be stopped.
                log.info("stopping the workers; robustft resume %s will go on", mirror.address)
                raise
            finally:
                clock.save()
            status[0] = "FINISHED"
        mirror.require_published()
        return report


def resume(run_dir: str | Path) -> Report:
    """Continue the run in ``run_dir``: its folder, or the URI at which it is published.

    Raises:
        ConfigError: no run lies there.
        DataError: nothing is published at that URI, or it is damaged.
    """
    directory, root = reopen(str(run_dir)) if is_uri(run_dir) else (Path(run_dir).resolve(), None)
    try:
        record = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{run_dir} is no run folder (no readable run.json): give runs/<name>/<run-id>"
        ) from error
    experiment = experiment_from_dict(record["experiment"])
    where = Path(record["working_directory"])
    storage = root or record.get("storage")
    if storage is not None and (is_uri(storage) or Path(storage).is_dir()):
        # Wherever it is resumed: its records go on in the same store.
        runtime = dataclasses.replace(experiment.runtime, storage=storage)
        experiment = dataclasses.replace(experiment, runtime=runtime)
    return run(with_absolute_paths(experiment, where), run_dir=directory)


def rank_layers(experiment: Experiment, *, address: str | None = None) -> list[Row]:
    """Return the criticality of every layer of the experiment's start, most critical last.

    Raises:
        ConfigError: the experiment's method is not RiFT.
    """
    method = METHODS[method_name(experiment.method)]
    if method.name != "rift" or method.prepare is None:
        raise ConfigError(f"criticality belongs to rift; this experiment runs {method.name}")
    report_rows: list[Row] = []

    def stop_after_prepare(running: Running, start: AnyStart) -> None:
        report_rows.extend(_prepare(running, start)["criticality"])

    _partial(experiment, address, stop_after_prepare)
    return sorted(report_rows, key=lambda row: row["criticality"])


def _partial(experiment: Experiment, address: str | None, then: Any) -> None:
    runtime = experiment.runtime
    if address is not None:
        experiment = dataclasses.replace(
            experiment, runtime=dataclasses.replace(runtime, address=address)
        )
    set_environment(runtime)
    storage = storage_root(runtime)
    tasks = _load_tasks(experiment)
    refuse(experiment, *tasks, storage)
    again = "run the same command again"
    with (
        resumable(None, storage, experiment, how=again) as directory,
        contextlib.ExitStack() as stack,
    ):
        tracker = Tracker(
            directory,
            experiment=experiment.name,
            storage=storage,
            tracking_uri=runtime.tracking_uri,
        )
        stack.callback(tracker.close)
        parent = recording.start_parent(tracker, experiment, directory)
        clock = Clock(time.time())
        mirror = Mirror(run_store(storage_place(runtime)), directory)
        running = _open(experiment, mirror, tasks, tracker, parent, clock, stack)
        start, _ = _start(running)
        then(running, start)
        tracker.finish_run(parent)


def _load_tasks(experiment: Experiment) -> tuple[AnyTask, AnyTask]:
    """Return the run's task, and what its start is trained on (usually the same)."""
    task = load_any_task(experiment.task)
    return task, start_task(experiment, task)


def _run(
    experiment: Experiment,
    mirror: Mirror,
    tasks: tuple[AnyTask, AnyTask],
    tracker: Tracker,
    parent: str,
    clock: Clock,
    stack: contextlib.ExitStack,
) -> Report:
    directory = mirror.directory
    running = _open(experiment, mirror, tasks, tracker, parent, clock, stack)
    mirror.publish()
    start, start_result = _start(running)
    mirror.publish()
    trials = _method(running, start)
    mirror.publish()
    chosen = choose(trials, experiment.search.metric)
    before, after = _evaluate(running, start, chosen)
    running.pump.sync()
    mirror.publish()
    model_dir = _save_model(running, start, chosen, after)
    found = outputs.Found(
        task=running.task,
        start=start,
        start_result=start_result,
        trials=trials,
        chosen=chosen,
        before=before,
        after=after,
        model_dir=model_dir,
    )
    # The report links to the MLflow run, which exists once the spool has been replayed so far.
    tracker.flush(timeout=20)
    record = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    summary, data, page = outputs.write(
        experiment,
        directory,
        found,
        clock,
        command=record["command"],
        tracking_url=tracker.run_url(parent),
    )
    recording.log_finished(
        tracker, parent, directory, found, summary, register=experiment.runtime.register
    )
    return Report(directory=directory, summary=summary, report_html=page, data=data)


def _open(
    experiment: Experiment,
    mirror: Mirror,
    tasks: tuple[AnyTask, AnyTask],
    tracker: Tracker,
    parent: str,
    clock: Clock,
    stack: contextlib.ExitStack,
) -> Running:
    """Connect and start listening."""
    import ray

    with clock.stage("start-up"):
        session = stack.enter_context(connect(experiment.runtime))
        require_workers(session, experiment)
        progress = ProgressLines()
        stack.callback(progress.close)
        pump = EventPump([clock, progress, recording.TrackingListener(tracker, parent)])
        stack.callback(pump.close)
        if experiment.runtime.autoscaling and not session.embedded:
            stack.enter_context(
                watching(ray, lambda text: pump.local({"kind": "waiting", "text": text}))
            )
    task, trained_on = tasks
    recording.log_data(tracker, parent, experiment, task, trained_on)
    return Running(
        experiment=experiment,
        directory=mirror.directory,
        session=session,
        pump=pump,
        tracker=tracker,
        clock=clock,
        parent=parent,
        task=task,
        task_ref=ray.put(task),
        start_task=trained_on,
        mirror=mirror,
    )


def _start(running: Running) -> tuple[AnyStart, Result | None]:
    """Return the starting model: fresh, from a file, or trained once and cached."""
    experiment, trained_on = running.experiment, running.start_task
    config = experiment.start
    start, result = load_or_fresh(experiment, trained_on), None
    if config.checkpoint is None and config.method is not None:
        start, result = _trained_start(running, start)
    start = fit_to_task(experiment, start, running.task, trained_on)
    if start.fresh_head:
        running.say("start", start.source)
    return start, result


def _trained_start(running: Running, fresh: AnyStart) -> tuple[AnyStart, Result]:
    """Train the starting model by one method or by two in turn, or take it from the cache."""
    config, task = running.experiment.start, running.start_task
    start, names, keys = fresh, list[str](), list[str]()
    for method in filter(None, (config.before, config.method)):
        alone = dataclasses.replace(config, method=method, before=None)
        cache = outputs.start_cache(dataclasses.replace(running.experiment, start=alone), task)
        names.append(method_name(method))
        # What a model has been before is part of what it is.
        keys.append(cache.name)
        cache, name, stage = cache.with_name("-".join(keys)), names[-1], "-".join(["start", *names])
        running.mirror.fetch_start(cache)
        kept = stored_result(cache)
        with running.clock.stage(f"start ({name})"):
            if kept is not None:
                running.say("start", f"{config.model} trained by {name} is cached in {cache}")
                result = kept
            else:
                running.say("start", f"training {config.model} by {name}")
                result = _train(running, method, start, task, stage=stage)
                save_result(result, cache)
                running.mirror.publish_start(cache)
        recording.log_stage(running.tracker, running.parent, stage, result)
        source = f"{config.model} trained by {', then '.join(names)} on {task.name}"
        start = dataclasses.replace(fresh, state=result.state, source=source)
    return start, result


def _train(
    running: Running,
    config: Any,
    start: AnyStart,
    task: AnyTask,
    *,
    stage: str,
    prepared: Mapping[str, Any] | None = None,
) -> Result:
    """Run one training function with Ray Train, or return what an earlier attempt has left."""
    import ray

    folder = running.directory / "stages" / stage
    kept = stored_result(folder)
    if kept is not None:
        return kept
    runtime = running.experiment.runtime
    cpus = running.cpus(runtime.workers, trial=False)
    shared = ray.put(prepared) if prepared else None
    job = _job(running, config, ray.put(start), shared, stage=stage, cpus=cpus)
    if task is not running.task:
        job = dataclasses.replace(job, task=ray.put(task))
    result = train(
        job,
        name=stage,
        storage=running.directory / "train",
        store=running.mirror.inside("train"),
        workers=runtime.worker_range,
        cpus=cpus,
        gpus=runtime.gpus_per_worker,
        max_failures=runtime.max_failures,
    )
    save_result(result, folder)
    running.pump.sync()
    return result


def _job(running: Running, config: Any, start: Any, prepared: Any, *, stage: str, cpus: int) -> Job:
    return Job(
        method=method_name(config),
        config=config,
        task=running.task_ref,
        start=start,
        prepared=prepared,
        stage=stage,
        run="",
        threads=cpus,
        gpu=running.gpu,
        send=running.pump.sender,
        # Of the method's result: a start is trained from nothing that it could go back to.
        interpolate=(
            running.experiment.interpolate if config is running.experiment.method else None
        ),
        **running.experiment.runtime.engine_fields,
    )


def _prepare(running: Running, start: AnyStart) -> Mapping[str, Any]:
    """Do once what all trials share, fanned out over the cluster."""
    config = running.experiment.method
    method = METHODS[method_name(config)]
    if method.prepare is None:
        return {}
    stage = f"{method.name}-prepare"
    running.say("prepare", f"what all {method.name} trials share")
    context = DriverContext(
        task=running.task,
        start=start,
        mapper=running.fanout("prepare"),
        report_to=running.pump.local,
        stage="prepare",
        device=torch.device(running.device),
    )
    with running.clock.stage("prepare"):
        prepared = method.prepare(config, context)
        context.pause()
    running.pump.sync()
    recording.log_prepared(running.tracker, running.parent, stage, prepared)
    return prepared


def _method(running: Running, start: AnyStart) -> list[Trial]:
    """Run the method: a search, or a single run."""
    import ray

    experiment = running.experiment
    name = method_name(experiment.method)
    prepared = _prepare(running, start)
    if not experiment.search.space:
        with running.clock.stage(name):
            running.say(name, f"running {name} on {experiment.runtime.workers} worker(s)")
            result = _train(
                running, experiment.method, start, running.task, stage=name, prepared=prepared
            )
        recording.log_stage(running.tracker, running.parent, name, result)
        seconds = running.clock.stages()[name]
        return [Trial(label=name, values={}, result=result, seconds=seconds)]
    cpus = running.cpus(experiment.runtime.workers_per_trial, trial=True)
    job = _job(
        running,
        experiment.method,
        ray.put(start),
        ray.put(prepared) if prepared else None,
        stage="search",
        cpus=cpus,
    )
    count = _num_trials(experiment)
    running.say("search", f"{count} trials of {name}", trials=count)
    with running.clock.stage("search"):
        trials = search(
            job,
            experiment.search,
            experiment.runtime,
            running.session,
            directory=running.directory / "search",
            store=running.mirror.inside("search"),
            cpus=cpus,
        )
        running.pump.sync()
    for trial in trials:
        if trial.error:
            log.warning("trial %s failed: %s", trial.label, trial.error)
        elif trial.stopped:
            log.info("trial %s was stopped early by the scheduler", trial.label)
    recording.log_trials(running.tracker, running.parent, trials)
    return trials


def _num_trials(experiment: Experiment) -> int:
    count = experiment.search.num_samples
    if experiment.search.algorithm == "grid":
        for values in experiment.search.space.values():
            count *= len(values)
    return count


def _evaluate(
    running: Running, start: AnyStart, chosen: Sequence[Trial]
) -> tuple[AnyEvaluation | None, list[AnyEvaluation]]:
    """Read the test split: once for the start, once for each seed of the chosen configuration.

    A start that has not learnt the task's classes is left out: it has no "before".
    """
    config = running.experiment.evaluation
    fanout = running.fanout("evaluate")
    knows_task = start.state is not None and not start.fresh_head
    what = "start and " if knows_task else ""
    running.say("evaluate", f"test split: {what}{len(chosen)} chosen model(s)")
    states = [start.state] if knows_task else []
    states += [trial.result.state for trial in chosen if trial.result is not None]
    found = []
    with running.clock.stage("evaluate"):
        for state in states:
            other = start.build() if knows_task and state is not start.state else None
            found.append(
                measure(
                    dataclasses.replace(start, state=state).build(),
                    running.task,
                    config=config,
                    map=fanout,
                    device=running.device,
                    surrogate=other,
                )
            )
    folder = running.directory / "masks"
    folder.mkdir(exist_ok=True)
    names = ["start"] if knows_task else []
    names += [f"seed-{trial.values.get('seed', i)}" for i, trial in enumerate(chosen)]
    for name, evaluation in zip(names, found, strict=True):
        evaluation.save(folder / f"{name}.parquet")
        if isinstance(evaluation, Evaluation) and evaluation.strips:
            save_strips(folder / f"{name}.pictures.npz", evaluation.strips)
    return (found[0], found[1:]) if knows_task else (None, found)


def _save_model(
    running: Running, start: AnyStart, chosen: Sequence[Trial], after: Sequence[AnyEvaluation]
) -> Path:
    """Save the seed that is best on the selection split, with its card."""
    metric = running.experiment.search.metric
    finished = [(t.result, e) for t, e in zip(chosen, after, strict=True) if t.result is not None]
    result, evaluation = max(finished, key=lambda pair: pair[0].metrics.get(metric, 0.0))
    card = outputs.card(running.experiment, running.task, start, result, evaluation)
    directory = running.directory / "model"
    if isinstance(start, TextStart):
        save_text_model(directory, start=start, state=result.state, card=card)
    else:
        save_model(directory, start=start, state=result.state, card=card)
    return directory
