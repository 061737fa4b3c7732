"""What can be found wrong with an experiment before anything starts: ``robustft validate``."""

import dataclasses
import logging
import os
import re
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from robustft.attacks import apgd, pgd
from robustft.data import Task
from robustft.data.home import home
from robustft.data.text import TextTask
from robustft.errors import (
    ConfigError,
    ResourceError,
    RobustftError,
    UnknownNameError,
)
from robustft.methods import METHODS
from robustft.methods.common import AttackConfig
from robustft.methods.criticality import eligible_layers
from robustft.methods.natural import NaturalConfig
from robustft.methods.rift import RiftConfig, choose_modules
from robustft.models import weight_layers
from robustft.runtime.deepspeed_engine import require_deepspeed, why_not
from robustft.runtime.engines import why_not_options
from robustft.runtime.experiment import (
    Experiment,
    experiment_to_dict,
    method_name,
    with_values,
)
from robustft.runtime.mirror import run_store
from robustft.runtime.search import require_algorithm
from robustft.runtime.session import Session, connect, ray_address, storage_place, storage_root
from robustft.runtime.spool import mask
from robustft.runtime.starts import fit_to_task, gets_new_head, load_or_fresh, start_task
from robustft.runtime.text_runs import AnyTask, classify_once, load_any_task, radii, units
from robustft.runtime.tracking import default_uri
from robustft.training.engine_options import EngineOptions

__all__ = ["Finding", "refuse", "require_workers", "validate"]

log = logging.getLogger(__name__)

GIB = 1024**3
NEEDED_BYTES = GIB // 2
"""Below this much free disk a run is refused: checkpoints, tables and plots need room."""
COMFORTABLE_BYTES = 4 * GIB
"""Below this much a warning."""
ANSWER_SECONDS = 3.0
"""How long MLflow may take to say that it is there."""
GREY_RADIUS = 0.5
"""From this Linf radius on an attack can turn every image into the same grey one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or may be.

    Args:
        level: "error" if the experiment cannot run like this, else "warning".
        text: one sentence that names the remedy.
    """

    level: Literal["error", "warning"]
    text: str


Findings = Iterator[Finding]


def validate(experiment: Experiment) -> list[Finding]:
    """Check an experiment against its data, its weights, this machine and its cluster.

    Nothing is trained and nothing is left behind, except that data sets of encoded pictures are
    decoded into the cache, where the run would do the same.

    Returns:
        What was found, errors first; empty if nothing was.
    """
    checks = (
        _check_secrets,
        _check_engine,
        _check_content,
        _check_threats,
        _check_leaks,
        _check_search,
        _check_storage,
        _check_tracking,
        _check_resources,
    )
    found = [finding for check in checks for finding in _caught(partial(check, experiment))]
    return sorted(found, key=lambda finding: finding.level != "error")


def refuse(experiment: Experiment, task: AnyTask, trained_on: AnyTask, folder: Path) -> None:
    """Raise the first error that ``validate`` would find without a network; log its warnings.

    Args:
        experiment: what is about to run.
        task: its data.
        trained_on: the data of its start, usually the same.
        folder: where it will write.

    Raises:
        RobustftError: with one sentence that names the remedy.
    """
    checks = (
        partial(_check_secrets, experiment),
        partial(_check_engine, experiment),
        partial(_check_model, experiment, task, trained_on),
        partial(_check_shared_images, experiment, task, trained_on),
        partial(_check_threats, experiment),
        partial(_check_leaks, experiment),
        partial(_check_search, experiment),
        partial(_check_folders, experiment, folder),
        partial(_check_machine, experiment),
    )
    for check in checks:
        for finding in check():
            if finding.level == "error":
                raise ConfigError(finding.text)
            log.warning(finding.text)


def require_workers(session: Session, experiment: Experiment) -> None:
    """Refuse an experiment that asks for more workers than the cluster can ever offer.

    Raises:
        ResourceError: naming what is asked, what there is, and what to change.
    """
    runtime = experiment.runtime
    fewest = runtime.min_workers or runtime.workers
    wanted = {fewest, runtime.workers_per_trial if experiment.search.space else 1}
    for workers in sorted(wanted):
        session.require(
            workers,
            cpus=runtime.cpus_per_worker or 1,
            gpus=runtime.gpus_per_worker,
            growing=runtime.autoscaling,
        )


def _caught(check: Callable[[], Findings]) -> Findings:
    """Yield what ``check`` finds; an error that it raises is a finding too."""
    try:
        yield from check()
    except RobustftError as error:
        yield Finding("error", str(error))


def _check_secrets(experiment: Experiment) -> Findings:
    """Refuse passwords in addresses: the configuration is stored, shown and logged as it is."""
    for name, text in _texts(experiment_to_dict(experiment)):
        if mask(text) != text:
            raise ConfigError(
                f"{name} holds a password, which the run's folder and MLflow would keep: leave it "
                "out of the address and set it in the environment (for MLflow: "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)"
            )
    yield from ()


def _texts(values: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted name, text) for every text in nested mappings and lists."""
    if isinstance(values, str):
        yield name, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from _texts(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _texts(value, name)


def _check_engine(experiment: Experiment) -> Findings:
    """Look whether the engine is there and can train every method that is asked for."""
    runtime = experiment.runtime
    if runtime.engine != "deepspeed" and runtime.options == EngineOptions():
        return
    own, start = experiment.method, experiment.start
    methods = [own, *(with_values(own, {name: value}) for name, value in _searched(experiment))]
    methods += [method for method in (start.method, start.before) if method is not None]
    deepspeed = runtime.engine == "deepspeed"
    for method in methods:
        reason = why_not_options(
            method, runtime.options, deepspeed=deepspeed, zero_stage=runtime.zero_stage
        )
        if reason:
            raise ConfigError(reason)
    if not deepspeed:
        return
    require_deepspeed()
    if max(runtime.workers, runtime.workers_per_trial) == 1:
        raise ConfigError(
            "runtime.engine = 'deepspeed' with one process has nobody to share with: raise "
            "runtime.workers (in a search: workers_per_trial), or leave engine at 'auto'"
        )
    for method in methods:
        reason = why_not(method, runtime.zero_stage)
        if reason:
            raise ConfigError(reason)
    yield from ()


def _check_content(experiment: Experiment) -> Findings:
    """Data, then the model that fits them, then the layers of that model."""
    task = load_any_task(experiment.task)
    trained_on = start_task(experiment, task)
    yield from _check_model(experiment, task, trained_on)
    yield from _check_shared_images(experiment, task, trained_on)


def _check_model(experiment: Experiment, task: AnyTask, trained_on: AnyTask) -> Findings:
    config = experiment.start
    start = load_or_fresh(experiment, trained_on)
    if isinstance(task, TextTask) or isinstance(trained_on, TextTask):
        model = fit_to_task(experiment, start, task, trained_on).build()
        if isinstance(task, TextTask):
            classify_once(model, task)
        for field, value in _searched(experiment):
            yield from _caught(partial(_check_value, experiment.method, {field: value}, model))
        return
    # A checkpoint is loaded, and its method, if one is named, does not run.
    learning = () if config.checkpoint is not None else (config.before, config.method)
    pgd_too = any(_uses_pgd(method) for method in learning)
    if trained_on is not task:
        _attack_once(start.build(), trained_on, pgd_too=pgd_too)
    model = fit_to_task(experiment, start, task, trained_on).build()
    if gets_new_head(experiment, task, trained_on):
        _require_old_head(experiment)
    pgd_too = pgd_too or _uses_pgd(experiment.method) or _uses_pgd(experiment.interpolate)
    _attack_once(model, task, pgd_too=pgd_too)
    for field, value in _searched(experiment):
        yield from _caught(partial(_check_value, experiment.method, {field: value}, model))
    if "modules" not in experiment.search.space:
        yield from _caught(partial(_check_value, experiment.method, {}, model))


def _require_old_head(experiment: Experiment) -> None:
    """Refuse what a start with a new head cannot do, before that start is trained."""
    method = experiment.method
    if isinstance(method, RiftConfig):
        raise ConfigError(
            "rift looks for the layers that a robust model of this task can spare, which a new "
            "head makes meaningless: start from a model of the task, or fine-tune with another "
            "method first"
        )
    modes = experiment.search.space.get("mode", ())
    if isinstance(method, NaturalConfig) and "wise-ft" in (method.mode, *modes):
        what, remedy = "method.mode = 'wise-ft'", "choose another mode"
    elif experiment.interpolate is not None:
        what, remedy = "interpolate", "leave interpolate out"
    else:
        return
    raise ConfigError(
        f"{what} goes back to a robust model of the task, and this start gets a new head for the "
        f"task's classes: start from a model of the task, or {remedy}"
    )


def _check_shared_images(experiment: Experiment, task: AnyTask, trained_on: AnyTask) -> Findings:
    """Look for images that the run measures on and its start has learnt from."""
    own = experiment.start.task
    if own is None or (own.data, own.root) != (experiment.task.data, experiment.task.root):
        return
    learnt, chose = (trained_on.splits[name].ids for name in ("train", "val"))
    # What chose the start counts as well, unless the run says of itself that it is leaky.
    seen = learnt if task.leaky else np.concatenate([learnt, chose])
    remedy = "use the task's selection, val_size and split_seed in start.task, or leave it out"
    for split, ids in (("test", seen), ("val", learnt)):
        count = int(np.isin(task.splits[split].ids, ids).sum())
        if count:
            yield Finding(
                "error" if split == "test" else "warning",
                f"the start has seen {count} {units(task)} of the task's {split} split: {remedy}",
            )


def _attack_once(model: nn.Module, task: Task, *, pgd_too: bool) -> None:
    """Attack a black image by one step: raises if model, pictures and norms do not fit together."""
    image, label = torch.zeros(1, *task.image_shape), torch.zeros(1, dtype=torch.long)
    for threat in task.threat_models:
        apgd(model, image, label, norm=threat.norm, eps=threat.eps, num_steps=1)
    if pgd_too:
        pgd(model, image, label, norm=task.threat.norm, eps=task.threat.eps, num_steps=1)


def _uses_pgd(config: Any) -> bool:
    """Return whether a method or an interpolation crafts with PGD, against the first threat model.

    Args:
        config: of either; None: there is none.
    """
    return config is not None and any(
        isinstance(getattr(config, field.name), AttackConfig)
        for field in dataclasses.fields(config)
    )


def _searched(experiment: Experiment) -> Iterator[tuple[str, Any]]:
    """Yield (field, value) for every value of a grid and both ends of every distribution."""
    for field, values in experiment.search.space.items():
        if isinstance(values, Mapping):
            for limits in values.values():
                yield from ((field, value) for value in limits)
        else:
            yield from ((field, value) for value in values)


def _check_value(method: Any, changed: Mapping[str, Any], model: nn.Module) -> Findings:
    """Raise if the method refuses a searched value, or if it names layers that are not there."""
    try:
        config = with_values(method, changed)
    except ConfigError as error:
        raise ConfigError(f"search.space: {error}") from error
    if isinstance(config, RiftConfig) and (not changed or "modules" in changed):
        choose_modules(config, model, _all_layers(config, model))
    yield from ()


def _all_layers(config: RiftConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Return a criticality table as the run will make it, but for the values."""
    names = list(weight_layers(model))
    eligible = eligible_layers(names, config.eligible)
    return [
        {
            "layer": name,
            "eligible": name in eligible,
            "rank": eligible.index(name) + 1 if name in eligible else 0,
            "criticality": 0.0,
        }
        for name in names
    ]


def _check_threats(experiment: Experiment) -> Findings:
    own = experiment.start.task
    others = () if own is None else radii(own)
    for threat in dict.fromkeys([*radii(experiment.task), *others]):
        if threat.eps == 0:
            yield Finding("warning", f"{threat}: a radius of 0 is no attack at all")
        if threat.norm == "Linf" and threat.eps >= GREY_RADIUS:
            yield Finding(
                "warning",
                f"{threat}: from {GREY_RADIUS} on every image can be turned into the same grey "
                "one, so nothing can be robust; radii are in [0, 1] pixel units",
            )


def _check_leaks(experiment: Experiment) -> Findings:
    choosing = []
    if experiment.task.selection == "official":
        choosing.append("task.selection = official")
    if getattr(experiment.method, "mrc_split", None) == "test":
        choosing.append("method.mrc_split = test")
    if choosing:
        yield Finding(
            "warning",
            f"{' and '.join(choosing)}: choices are made on the test split, as in the paper, and "
            "its numbers will be marked leaky",
        )


def _check_search(experiment: Experiment) -> Findings:
    require_algorithm(experiment.search)
    metric, known = experiment.search.metric, METHODS[method_name(experiment.method)].metrics
    if metric not in known:
        raise UnknownNameError("search.metric", metric, known)
    yield from ()


def _check_storage(experiment: Experiment) -> Findings:
    yield from _check_folders(experiment, storage_root(experiment.runtime))


def _check_folders(experiment: Experiment, storage: Path) -> Findings:
    yield from _check_folder(storage, "runs", "runtime.storage")
    store = run_store(storage_place(experiment.runtime))
    if store is not None:
        store.require_writable()
    if experiment.start.checkpoint is None and experiment.start.method is not None:
        yield from _check_folder(home(), "trained starting models", "ROBUSTFT_HOME")


def _check_folder(folder: Path, what: str, setting: str) -> Findings:
    """Look whether ``folder``, or where it would be made, can be written and has room."""
    try:
        existing = next(f for f in (folder.absolute(), *folder.absolute().parents) if f.exists())
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(1))
            file.flush()
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise ResourceError(
            f"cannot write {what} to {folder} ({error.strerror or error}): choose another folder "
            f"with {setting}"
        ) from error
    if free < COMFORTABLE_BYTES:
        level: Literal["error", "warning"] = "error" if free < NEEDED_BYTES else "warning"
        size = f"{free / GIB:.1f} GiB" if free > GIB // 10 else f"{free / 2**20:.0f} MiB"
        yield Finding(
            level,
            f"the disk of {folder} has {size} left: free some space, or choose another folder "
            f"with {setting}",
        )


def _check_tracking(experiment: Experiment) -> Findings:
    """Only a warning: a run never dies because tracking did, and its records are kept."""
    runtime = experiment.runtime
    uri = runtime.tracking_uri or default_uri(storage_root(runtime))
    if not re.match(r"https?://", uri):
        return
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=ANSWER_SECONDS):
            return
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        yield Finding(
            "warning",
            f"MLflow at {mask(uri)} does not answer ({reason}): the run would keep its records; "
            "send them later with robustft sync RUN_DIR",
        )


def _check_resources(experiment: Experiment) -> Findings:
    runtime = experiment.runtime
    if ray_address(runtime) is not None:
        with connect(runtime) as session:
            require_workers(session, experiment)
    else:
        require_workers(_this_machine(), experiment)
    yield from ()


def _check_machine(experiment: Experiment) -> Findings:
    """Before Ray starts, if it would be embedded: what the machine lacks, it will lack as well."""
    if ray_address(experiment.runtime) is None and not _ray_is_running():
        require_workers(_this_machine(), experiment)
    yield from ()


def _ray_is_running() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _this_machine() -> Session:
    """Return what an embedded Ray will find."""
    cpus = os.cpu_count() or 1
    gpus = torch.cuda.device_count()
    return Session(embedded=True, num_cpus=cpus, num_gpus=gpus, largest_node_cpus=cpus)
