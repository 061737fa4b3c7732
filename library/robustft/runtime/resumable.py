"""A run's folder, how a run ends, and the sentence that says how to go on with it."""

import contextlib
import dataclasses
import errno
import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from robustft.data.home import home
from robustft.data.storage import is_uri
from robustft.errors import ResourceError, RunError
from robustft.models.backbones import split_reference
from robustft.runtime import outputs
from robustft.runtime.experiment import Experiment, dump_yaml, experiment_to_dict
from robustft.runtime.jsonfile import replacing, write_json
from robustft.runtime.mirror import Mirror, run_store
from robustft.runtime.session import storage_place

__all__ = ["resumable", "run_address", "with_absolute_paths"]

log = logging.getLogger(__name__)

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


@contextlib.contextmanager
def resumable(
    run_dir: str | Path | None, storage: Path, experiment: Experiment, *, how: str | None = None
) -> Iterator[Path]:
    """Make the run's folder, turn SIGTERM into Ctrl-C, and say how to go on with an ended run."""
    if run_dir is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        directory = storage / experiment.name / f"{stamp}-{experiment.fingerprint[:6]}"
    else:
        directory = Path(run_dir).resolve()
    where = run_address(experiment, directory)
    how = how or f"continue with: robustft resume {shlex.quote(where)}"
    try:
        with _terminable():
            _describe(directory, storage, experiment)
            yield directory
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; what is finished is kept; {how}") from None
    except Exception as error:
        explained = _explained(error, directory, how)
        if explained is error:
            raise
        raise explained from error


def run_address(experiment: Experiment, directory: Path) -> str:
    """Return what ``robustft resume`` takes for a run: its folder, or where it is published."""
    store = run_store(storage_place(experiment.runtime))
    return str(Mirror(store, directory).address)


def with_absolute_paths(experiment: Experiment, where: Path) -> Experiment:
    """Return ``experiment`` with relative paths taken from the folder where it was started."""
    task, start = experiment.task, experiment.start
    if task.root is not None:
        task = dataclasses.replace(task, root=str(where / task.root))
    if start.task is not None and start.task.root is not None:
        own = dataclasses.replace(start.task, root=str(where / start.task.root))
        start = dataclasses.replace(start, task=own)
    if start.checkpoint is not None:
        layout, file = split_reference(start.checkpoint)
        if (where / file).exists():
            prefix = "" if layout is None else f"{layout}:"
            start = dataclasses.replace(start, checkpoint=f"{prefix}{where / file}")
    return dataclasses.replace(experiment, task=task, start=start)


def _explained(error: Exception, directory: Path, how: str) -> Exception:
    """Return ``error``, or what it means for the run where the disk is its cause."""
    full = {getattr(error, "errno", None)} & {errno.ENOSPC, errno.EDQUOT}
    # Workers and MLflow wrap what the disk has said.
    if full or any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
        folders = (directory, home(), Path(tempfile.gettempdir()))
        existing = [folder for folder in folders if folder.exists()]
        fullest = min(existing, key=lambda folder: shutil.disk_usage(folder).free)
        return RunError(f"the disk of {fullest} is full: free some space, then {how}")
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return ResourceError(
            f"cannot write {error.filename or directory} ({error.strerror}): choose another "
            "folder with --runtime.storage"
        )
    if isinstance(error, RunError):
        log.info("the run stopped early; %s", how)
    return error


def _describe(directory: Path, storage: Path, experiment: Experiment) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    place = storage_place(experiment.runtime) or ""
    values = experiment_to_dict(experiment)
    if not (directory / "config.yaml").is_file():
        with replacing(directory / "config.yaml") as temporary:
            temporary.write_text(dump_yaml(values), encoding="utf-8")
    if not (directory / "run.json").is_file():
        write_json(
            directory / "run.json",
            {
                "run_id": directory.name,
                "experiment": values,
                "fingerprint": experiment.fingerprint,
                "working_directory": str(Path.cwd()),
                "storage": place if is_uri(place) else str(storage),
                "command": outputs.command_line(sys.argv),
                **outputs.provenance(),
            },
        )


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Treat SIGTERM (``ray job stop``) as Ctrl-C for the duration of a ``with`` block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)
