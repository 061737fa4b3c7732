"""Tracking: runs, metrics, artifacts and models in MLflow, without ever losing or stopping a run.

There is one mechanism. Every call of :class:`Tracker` appends a record to the run directory's spool
(``robustft.runtime.spool``) and returns; a background thread replays the spool to MLflow in order
(``robustft.runtime.mlflow_store``). If MLflow is missing, down or going away in the middle, records
wait in the spool, one warning is logged, and the thread tries again with growing pauses. What is
left when a run ends is sent by the resumed run or by ``robustft sync RUN_DIR`` (:func:`replay`).

Only the driver tracks; workers report to the driver.
"""

import dataclasses
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from robustft.errors import ConfigError, RunError
from robustft.runtime.mlflow_store import MlflowStore, clean_key, sqlite_path
from robustft.runtime.registry import Score, score_tags
from robustft.runtime.spool import Spool, mask

__all__ = ["Backoff", "Replayed", "Tracker", "default_uri", "replay"]

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

UI_ADDRESS = "http://127.0.0.1:5000"
"""Where ``robustft ui`` answers unless told otherwise."""

UI_VIEW = "?workflowType=machine_learning"
"""Without it MLflow 3 opens its pages for language models."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Backoff:
    """Pauses between attempts to reach MLflow, in seconds.

    Args:
        first: after the first failed attempt; doubled after each further one.
        longest: upper limit.
    """

    first: float = 5.0
    longest: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.first <= self.longest:
            raise ConfigError(f"back-off needs 0 < first <= longest, got {self}")


@dataclasses.dataclass(frozen=True, slots=True)
class Replayed:
    """What :func:`replay` did: number of records sent, and where to (credentials masked)."""

    records: int
    uri: str


def default_uri(storage: Path) -> str:
    """Return ``MLFLOW_TRACKING_URI`` if it is set, else the SQLite store under ``storage``."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage.absolute()}/mlflow.db"
    return _absolute(uri)


class Tracker:
    """Records of one run directory on their way to MLflow. All methods return at once.

    Runs are identified by stable local ids: ``start_run`` with the same ``key`` returns the same
    run, also in a resumed process. Values are kept as they were at the time of the call; files and
    folders are read when they are sent, so they should be finished when they are logged.

    Args:
        directory: run directory, ``runs/<experiment>/<run-id>``; the spool lies below it.
        experiment: name of the MLflow experiment.
        storage: storage root; holds the SQLite store where no other address is given.
        tracking_uri: MLflow address; None: see :func:`default_uri`. Credentials in it are neither
            stored nor shown.
        backoff: pauses between attempts while MLflow is away.

    Raises:
        RunError: another process has this run directory open.
        ResourceError: the directory cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        *,
        experiment: str,
        storage: Path,
        tracking_uri: str | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        uri = _absolute(tracking_uri) if tracking_uri else default_uri(storage)
        self._spool = Spool(directory, header={"experiment": experiment, "uri": mask(uri)})
        # run -> is it running, and what it was started with; what earlier processes wrote counts.
        self._running: dict[str, bool] = {}
        self._started: dict[str, Mapping[str, Any]] = {}
        # (run, metric, step) -> the value: a run that goes on after a kill reports some again.
        self._points: dict[tuple[str, str, int], float | str] = {}
        for record, _ in self._spool.read(0):
            if record["kind"] == "metrics":
                run, step = record["run"], record["step"]
                self._points.update({(run, key, step): v for key, v in record["values"].items()})
            if record["kind"] in ("start", "reopen", "finish"):
                self._running[record["run"]] = record["kind"] != "finish"
            if record["kind"] == "start":
                self._started[record["run"]] = record
        self._store = MlflowStore(self._spool, uri)
        self._backoff = backoff or Backoff()
        self._state = threading.Condition()
        self._attempts = 0
        self._failed_attempt = 0
        self._degraded = self._urgent = self._closing = False
        self._thread = threading.Thread(target=self._work, name="robustft-tracking", daemon=True)
        self._thread.start()

    @property
    def uri(self) -> str:
        """The MLflow address, credentials masked."""
        return mask(self._store.uri)

    @property
    def degraded(self) -> bool:
        """True while MLflow is away: the newest attempt to reach it failed."""
        return self._degraded

    def run_url(self, run: str) -> str | None:
        """Return the page of ``run`` in the UI; None until MLflow has the run.

        For a local store it is the page that ``robustft ui`` serves at its default address.
        """
        progress = self._store.progress
        run_id = progress.runs.get(run)
        base = self.uri.rstrip("/") if self.uri.startswith("http") else UI_ADDRESS
        page = f"{base}/#/experiments/{progress.experiment_id}/runs/{run_id}{UI_VIEW}"
        return page if run_id is not None else None

    def start_run(
        self,
        name: str,
        *,
        key: str,
        parent: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        inherit: Mapping[str, str] | None = None,
    ) -> str:
        """Start a run, or return to the one that was started with this ``key``.

        Args:
            name: shown in the UI.
            key: what identifies the run in this directory: "experiment", "trial/3", "stage/at".
            parent: local id of the parent run.
            params: parameters; nested mappings become "outer.inner". Ignored on return to a run.
            tags: the like. The UI has places of their own for "mlflow.note.content" (Markdown),
                "mlflow.source.name", "mlflow.source.git.commit" and "mlflow.user".
            inherit: what it takes over from its parent, so that it can be compared with the runs
                of other parents: name there -> name here, each with everything below it ("task"
                means also "task.data"); later ones replace earlier ones. The parent's tags come
                with them, but for those of MLflow. ``params`` and ``tags`` come on top.

        Returns:
            The local id of the run.
        """
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        run = f"{self._spool.id}-{digest}"
        if run not in self._running:
            own = {"params": _texts(params or {}), "tags": _texts(tags or {})}
            if parent is not None and inherit is not None:
                above = self._started[self._known(parent)]
                own = {
                    "params": _renamed(above["params"], inherit) | own["params"],
                    "tags": _own_tags(above["tags"]) | own["tags"],
                }
            parent = self._known(parent) if parent is not None else None
            self._started[run] = {"name": name, "parent": parent, **own}
            self._record("start", run, **self._started[run])
        elif not self._running[run]:
            self._record("reopen", run)
        self._running[run] = True
        return run

    def parameters(self, run: str) -> dict[str, str]:
        """Return the parameters that ``run`` was started with, as text."""
        return dict(self._started[self._known(run)]["params"])

    def log_metrics(self, run: str, metrics: Mapping[str, float], *, step: int) -> None:
        """Record the values at ``step`` (epoch, 100 x alpha, ...); NaN and infinity are allowed.

        A value that was already recorded for this step, perhaps by a process that was killed, is
        not recorded again: MLflow would keep both points.
        """
        step = int(step)
        points = {(self._known(run), key, step): _number(v) for key, v in metrics.items()}
        new = {point: v for point, v in points.items() if self._points.get(point) != v}
        if new:
            values = {key: value for (_, key, _), value in new.items()}
            self._record("metrics", run, step=step, values=values)
            self._points.update(new)

    def log_params(self, run: str, params: Mapping[str, Any]) -> None:
        """Record parameters. MLflow refuses another value for one that it already has."""
        self._record("params", self._known(run), values=_texts(params))

    def set_tags(self, run: str, tags: Mapping[str, Any]) -> None:
        """Record tags; a later value replaces an earlier one."""
        self._record("tags", self._known(run), values=_texts(tags))

    def log_artifact(self, run: str, path: Path, *, folder: str = "") -> None:
        """Record a file or a folder; it appears as ``folder/<its name>`` in the run's artifacts."""
        self._record("artifact", self._known(run), path=self._relative(path), folder=folder)

    def log_dataset(
        self, run: str, *, name: str, digest: str, context: str, source: str, num_rows: int
    ) -> None:
        """Record what the run read; shown in the UI's data set column.

        Args:
            run: local id.
            name: of the data set.
            digest: SHA-256 of content and split membership; the UI shows the first 12 digits.
            context: what it was used for: "train", "val", "test".
            source: where it comes from: a path, an address, or words.
            num_rows: number of examples.
        """
        self._record(
            "dataset",
            self._known(run),
            name=name,
            digest=digest,
            context=context,
            source=mask(source),
            num_rows=int(num_rows),
        )

    def log_model(
        self,
        run: str,
        directory: Path,
        *,
        name: str,
        tags: Mapping[str, Any],
        metrics: Mapping[str, float],
        registered: str | None = None,
        register: bool = True,
        scores: Mapping[str, Score] | None = None,
        alias: str = "newest",
    ) -> None:
        """Log a model directory (safetensors and card), and register it as a new version.

        Args:
            run: local id of the run that made it.
            directory: everything in it becomes the model's artifacts.
            name: of the logged model; other characters than letters, digits, ``_ -`` and spaces
                become "-".
            tags: threat model, method, data, architecture, leaky: shown with model and version.
            metrics: headline numbers; they appear with the model and with the run, and need not
                be logged again.
            registered: name of the registered model, which may also have dots; None: ``name``.
            register: False: it is only logged.
            scores: metric -> what the model reached on the selection split. The aliases of
                ``registry.ALIASES`` stand at the best versions; a model that test chose has none.
            alias: moves to this version.
        """
        path = self._relative(directory)
        digest = hashlib.sha256(f"{run} {name} {path}".encode()).hexdigest()[:12]
        self._record(
            "model",
            self._known(run),
            model=f"{self._spool.id}-{digest}",
            path=path,
            name=name,
            tags=_texts(tags),
            metrics={key: _number(value) for key, value in metrics.items()},
            step=0,
            registered=registered or name,
            register=register,
            scores=score_tags(scores or {}),
            alias=alias,
        )

    def finish_run(self, run: str, status: Status = "FINISHED") -> None:
        """End a run. One that is never finished stays "running" and may be resumed."""
        self._record("finish", self._known(run), status=status)
        self._running[run] = False

    def flush(self, timeout: float) -> bool:
        """Wait until MLflow has every record made so far.

        While MLflow is away one attempt is made at once; the answer does not wait for more.

        Args:
            timeout: seconds.

        Returns:
            True if MLflow has them all; False if it is away or the time is up.
        """
        target, end = self._spool.size, time.monotonic() + timeout
        with self._state:
            begun = self._attempts
            self._urgent = True
            self._state.notify_all()
            while self._store.progress.offset < target:
                remaining = end - time.monotonic()
                if remaining <= 0 or self._failed_attempt > begun or not self._thread.is_alive():
                    return False
                self._state.wait(remaining)
        return True

    def close(self, timeout: float = 60.0) -> None:
        """Flush, stop the thread and release the directory. What MLflow lacks stays in the spool.

        Args:
            timeout: seconds to wait; a new SQLite store alone may need 20.
        """
        if self._closing:
            return
        complete = self.flush(timeout)
        with self._state:
            self._closing = True
            self._state.notify_all()
        # A call that blocks ends with MLflow's own timeout, or with the process.
        self._thread.join(timeout=1.0)
        if not complete:
            logger.warning(
                "MLflow at %s does not have all records of this run; send them later with: "
                "robustft sync %s",
                self.uri,
                self._spool.directory,
            )

    def _record(self, kind: str, run: str, **fields: Any) -> None:
        if self._closing:
            raise RuntimeError("this tracker is closed")
        now = time.time_ns() // 1_000_000
        self._spool.append({"kind": kind, "run": run, "time": now, **fields})
        with self._state:
            self._state.notify_all()

    def _known(self, run: str) -> str:
        if run not in self._running:
            raise ConfigError(f"no run {run!r} here: pass what start_run returned")
        return run

    def _relative(self, path: Path) -> str:
        """Return ``path`` relative to the run directory if it lies in it: the latter may move."""
        path = path.absolute()
        if not path.exists():
            raise ConfigError(f"cannot log {path}: there is no such file or folder")
        base = self._spool.directory
        return str(path.relative_to(base) if path.is_relative_to(base) else path)

    def _work(self) -> None:
        """Replay until closed: wait for records, send them, or wait for MLflow."""
        pause = self._backoff.first
        try:
            while self._wait_for_records():
                try:
                    self._store.send_pending()
                except (
                    Exception
                ) as error:  # network, server, database, MLflow itself: the run goes on
                    self._failed(error)
                    self._wait_for_retry(pause)
                    pause = min(2 * pause, self._backoff.longest)
                else:
                    self._succeeded()
                    pause = self._backoff.first
        finally:
            self._spool.close()

    def _wait_for_records(self) -> bool:
        with self._state:
            while not self._closing and self._store.progress.offset >= self._spool.size:
                self._state.wait()
            self._attempts += 1
            self._urgent = False
            return not self._closing

    def _wait_for_retry(self, pause: float) -> None:
        with self._state:
            self._state.wait_for(lambda: self._closing or self._urgent, timeout=pause)

    def _failed(self, error: Exception) -> None:
        if not self._degraded:
            logger.warning(
                "MLflow at %s does not answer (%s); the run goes on, its records wait in %s",
                self.uri,
                _one_line(error),
                self._spool.folder,
            )
        with self._state:
            self._degraded, self._failed_attempt = True, self._attempts
            self._state.notify_all()

    def _succeeded(self) -> None:
        if self._degraded:
            logger.warning("MLflow at %s answers again; the waiting records are sent", self.uri)
        with self._state:
            self._degraded = False
            self._state.notify_all()


def replay(directory: Path, *, tracking_uri: str | None = None) -> Replayed:
    """Send what MLflow does not have yet of a run directory's records: ``robustft sync``.

    Args:
        directory: run directory.
        tracking_uri: MLflow address; None: ``MLFLOW_TRACKING_URI``, else the run's own address.
            Another store than the run's own gets everything.

    Raises:
        ConfigError: no records there, or the run's address had credentials, which are not stored.
        RunError: MLflow does not answer, or the run is still being written.
    """
    spool = Spool(directory, header=None)
    try:
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or str(spool.header.get("uri"))
        if "***" in uri:
            raise ConfigError(
                f"the run's MLflow address {uri} had credentials, which are never stored: "
                f"set MLFLOW_TRACKING_URI to the whole address"
            )
        store = MlflowStore(spool, _absolute(uri))
        sent = 0
        try:
            while count := store.send_pending():
                sent += count
        except Exception as error:  # as in Tracker: anything that MLflow may raise
            raise RunError(
                f"MLflow at {mask(uri)} does not answer ({_one_line(error)}); nothing is lost: "
                f"start it and run robustft sync {directory} again"
            ) from error
        return Replayed(sent, mask(uri))
    finally:
        spool.close()


def _absolute(uri: str) -> str:
    """Return ``uri`` with a relative SQLite path made absolute: a later sync starts elsewhere."""
    path = sqlite_path(uri)
    return uri if path is None else f"sqlite:///{path.absolute()}"


def _number(value: float) -> float | str:
    """Return a metric value as JSON can hold it: NaN and infinities are words."""
    number = float(value)
    return number if abs(number) < float("inf") else str(number)


def _texts(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested mappings and turn values into text, credentials in addresses masked."""
    texts: dict[str, str] = {}
    for key, value in values.items():
        name = clean_key(f"{prefix}{key}")
        if isinstance(value, Mapping):
            texts |= _texts(value, f"{name}.")
        elif isinstance(value, (bool, list, tuple)):
            texts[name] = mask(json.dumps(value, default=str))
        else:
            texts[name] = mask(str(value))
    return texts


def _renamed(texts: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    """Return the texts at and below each of ``names``, called by their new names."""
    return {
        new + name.removeprefix(old): text
        for old, new in names.items()
        for name, text in texts.items()
        if name == old or name.startswith(f"{old}.")
    }


def _own_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in tags.items() if not name.startswith("mlflow.")}


def _one_line(error: Exception) -> str:
    text = mask(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
