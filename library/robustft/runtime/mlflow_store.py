"""Send the records of a spool to an MLflow store, in order and each of them once.

Only ``MlflowClient`` is used, never the fluent functions with their global active run. MLflow is
imported when the first connection is made: the import and a new SQLite file's schema take seconds.

Every step can be repeated. Runs, logged models and model versions carry the tag
``robustft.local_id`` and are looked for before they are created; parameters, tags and aliases are
set to the same values again; equal metric points (key, step, time, value) are stored once.
"""

import contextlib
import json
import logging
import math
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from robustft.runtime.registry import settle_aliases
from robustft.runtime.spool import Progress, Record, Spool, mask
from robustft.runtime.views import note, view_tags

__all__ = ["LOCAL_ID_TAG", "MlflowStore", "clean_key", "sqlite_path"]

logger = logging.getLogger(__name__)

LOCAL_ID_TAG = "robustft.local_id"

CHUNK = 2000
"""Records read at a time: metrics among them are sent together."""

# MLflow's limits (mlflow/utils/validation.py).
_METRICS_PER_BATCH = 1000
_PARAMS_PER_BATCH = 100
_KEY_LENGTH = 250
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000

_DIGEST_LENGTH = 12
"""MLflow allows 36 digits; the whole digest would fill a column of the runs table."""

_REGISTERED = (
    "Models of one task, by robustft. The aliases best-clean, best-robust and best-union are "
    "chosen on the selection split, never on test; the tags of a version say by which value."
)

# Answers that will be the same tomorrow; every other error means "not now".
_REFUSALS = {
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
}

# Our own back-off replaces MLflow's, with which one call may block for four minutes.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # Else it prints a line about every finished run.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

# These two report a failed connection on their own, with traceback; we say it in one line.
_NOISY = ("urllib3.connectionpool", "mlflow.store.db.utils")


class RefusedError(Exception):
    """MLflow will never accept this record; the ones behind it must not wait for it."""


class MlflowStore:
    """One spool's way into one MLflow store.

    Args:
        spool: where records come from.
        uri: MLflow tracking address.
    """

    def __init__(self, spool: Spool, uri: str) -> None:
        self.uri = uri
        self.progress = Progress.load(spool, uri)
        self._connected = False
        self._spool = spool
        self._client: Any = None

    def send_pending(self) -> int:
        """Send up to ``CHUNK`` records and return how many; 0 means that none is waiting.

        Raises:
            Exception: whatever MLflow, its database or the network raises while it is away.
        """
        with _quiet():
            if not self._connected:
                self._connect()
            # After a failure the next attempt looks whether the store is still the same one.
            self._connected = False
            count = self._send_chunk()
            self._connected = True
            return count

    def _send_chunk(self) -> int:
        """Send a chunk; how far it came is saved once, whether or not it was sent to its end.

        A process that is killed before that sends the chunk again, which changes nothing.
        """
        progress, count = self.progress, 0
        waiting: dict[str, list[Record]] = {}
        try:
            for record, end in self._spool.read(progress.offset, limit=CHUNK):
                count += 1
                if record["kind"] == "metrics":
                    waiting.setdefault(record["run"], []).append(record)
                else:
                    self._send_metrics(waiting)
                    self._send(record)
                    progress.offset = end
            if count:
                self._send_metrics(waiting)
                progress.offset = end
        finally:
            if count:
                progress.save()
        return count

    def _send_metrics(self, waiting: dict[str, list[Record]]) -> None:
        """Send the collected metric records of each run together, and forget them."""
        for run, records in waiting.items():
            self._send({"kind": "metrics", "run": run, "records": records})
        waiting.clear()

    def _send(self, record: Record) -> None:
        from mlflow.exceptions import MlflowException

        try:
            try:
                self._apply(record)
            except MlflowException as error:
                if error.error_code in _REFUSALS:
                    raise RefusedError(str(error)) from error
                raise
        except RefusedError as error:
            path = self._spool.folder / "refused.jsonl"
            logger.warning(
                "MLflow refused a %s record, kept in %s: %s",
                record["kind"],
                path,
                mask(str(error)).partition("\n")[0],
            )
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"error": mask(str(error)), "record": record}) + "\n")

    def _connect(self) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        logging.getLogger("alembic").setLevel(logging.WARNING)
        name = self._spool.header["experiment"]
        database = sqlite_path(self.uri)
        artifacts = None
        if database is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
            artifacts = (database.parent / "mlflow-artifacts" / _clean_name(name)).as_uri()
        self._client = MlflowClient(tracking_uri=self.uri)
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            experiment_id = experiment.experiment_id
        else:
            # The UI shows training runs first when an experiment is of this kind.
            tags = {"mlflow.experimentKind": "custom_model_development"}
            experiment_id = self._client.create_experiment(name, artifacts, tags)
        known = self.progress.experiment_id
        if self.progress.runs and known and (experiment is None or known != experiment_id):
            logger.warning("MLflow at %s is a new store; sending everything", mask(self.uri))
            self.progress.offset, self.progress.runs = 0, {}
        self.progress.experiment_id = experiment_id
        self._show_views(experiment_id, dict(experiment.tags) if experiment is not None else {})

    def _show_views(self, experiment_id: str, tags: Mapping[str, str]) -> None:
        """Give the experiment its views, and a description that links to them unless it has one."""
        wanted = view_tags()
        if "mlflow.note.content" not in tags:
            wanted["mlflow.note.content"] = note(experiment_id)
        for key, value in wanted.items():
            if tags.get(key) != value:
                self._client.set_experiment_tag(experiment_id, key, value)

    def _apply(self, record: Record) -> None:
        kind = record["kind"]
        if kind in ("spool", "damaged"):
            return
        if kind == "start":
            self._start(record)
            return
        run_id = self.progress.runs.get(record["run"])
        if run_id is None:
            raise RefusedError(f"run {record['run']} does not exist in MLflow")
        if kind == "metrics":
            self._log_metrics(run_id, record["records"])
        elif kind == "params":
            self._log_texts(run_id, params=record["values"])
        elif kind == "tags":
            self._log_texts(run_id, tags=record["values"])
        elif kind == "artifact":
            path = self._existing(record["path"])
            self._client.log_artifact(run_id, str(path), record["folder"] or None)
        elif kind == "dataset":
            self._log_dataset(run_id, record)
        elif kind == "model":
            self._log_model(run_id, record)
        elif kind == "reopen":
            self._client.update_run(run_id, status="RUNNING")
        elif kind == "finish":
            self._client.set_terminated(run_id, record["status"], record["time"])
        else:
            raise RefusedError(f"unknown kind of record {kind!r}: written by a newer robustft?")

    def _start(self, record: Record) -> None:
        tags = {LOCAL_ID_TAG: record["run"]}
        if record["parent"] is not None:
            parent = self.progress.runs.get(record["parent"])
            if parent is None:
                raise RefusedError(f"parent run {record['parent']} does not exist in MLflow")
            tags["mlflow.parentRunId"] = parent
        experiment_id = self.progress.experiment_id
        found = self._client.search_runs(
            [experiment_id], f"tags.`{LOCAL_ID_TAG}` = '{record['run']}'", max_results=1
        )
        if found:
            run_id = found[0].info.run_id
        else:
            run = self._client.create_run(experiment_id, record["time"], tags, record["name"])
            run_id = run.info.run_id
        self.progress.runs[record["run"]] = run_id
        self._log_texts(run_id, params=record["params"], tags=record["tags"])

    def _log_metrics(self, run_id: str, records: Sequence[Record], model_id: str = "") -> None:
        from mlflow.entities import Metric

        owner = {"model_id": model_id, "run_id": run_id} if model_id else {}
        points = [
            Metric(clean_key(key), _plottable(value), record["time"], record["step"], **owner)
            for record in records
            for key, value in record["values"].items()
        ]
        for batch in _batches(points, _METRICS_PER_BATCH):
            self._client.log_batch(run_id, metrics=batch)

    def _log_texts(
        self, run_id: str, *, params: Mapping[str, str] = {}, tags: Mapping[str, str] = {}
    ) -> None:
        from mlflow.entities import Param, RunTag

        rows = [Param(clean_key(key), _shortened(v, _PARAM_LENGTH)) for key, v in params.items()]
        for batch in _batches(rows, _PARAMS_PER_BATCH):
            self._client.log_batch(run_id, params=batch)
        rows = [RunTag(clean_key(key), _shortened(v, _TAG_LENGTH)) for key, v in tags.items()]
        for batch in _batches(rows, _PARAMS_PER_BATCH):
            self._client.log_batch(run_id, tags=batch)

    def _log_dataset(self, run_id: str, record: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # MLflow merges inputs of equal name and digest: the splits of one data set need names.
        dataset = Dataset(
            name=f"{record['name']}/{record['context']}",
            digest=record["digest"][:_DIGEST_LENGTH],
            source_type="local",
            source=json.dumps({"uri": record["source"], "sha256": record["digest"]}),
            profile=json.dumps({"num_rows": record["num_rows"]}),
        )
        context = InputTag("mlflow.data.context", record["context"])
        self._client.log_inputs(run_id, [DatasetInput(dataset, [context])])

    def _log_model(self, run_id: str, record: Record) -> None:
        """Create a logged model, fill it, register it: safetensors and JSON, no flavour."""
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        client, experiment_id = self._client, self.progress.experiment_id
        name, directory = _clean_name(record["name"]), self._existing(record["path"])
        # Older spools know one name for both.
        registered = _clean_name(record.get("registered") or name, dots=True)
        tags = {clean_key(key): value for key, value in record["tags"].items()}
        tags[LOCAL_ID_TAG] = record["model"]
        found = client.search_logged_models(
            [experiment_id], f"tags.`{LOCAL_ID_TAG}` = '{record['model']}'", max_results=1
        )
        if found:
            model = found[0]
        else:
            # The model's page shows parameters, not tags; the registry's pages show tags.
            params = {key: _shortened(value, _PARAM_LENGTH) for key, value in tags.items()}
            params.pop(LOCAL_ID_TAG)
            model = client.create_logged_model(
                experiment_id, name, run_id, tags, params, "robustft"
            )
        if str(model.status) != "READY":
            client.log_model_artifacts(model.model_id, str(directory))
            with tempfile.TemporaryDirectory() as folder:
                # The registry's pages read this file; a model without flavours is never unpickled.
                path = Path(folder) / "MLmodel"
                Model(run_id=run_id, model_id=model.model_id, metadata=tags).save(str(path))
                client.log_model_artifact(model.model_id, str(path))
            client.finalize_logged_model(model.model_id, "READY")
        outputs = client.get_run(run_id).outputs
        if model.model_id not in {output.model_id for output in outputs.model_outputs}:
            # Unlike inputs, MLflow does not accept the same output twice.
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        self._log_metrics(run_id, [{**record, "values": record["metrics"]}], model.model_id)
        if record.get("register", True):
            tags |= {clean_key(key): value for key, value in record.get("scores", {}).items()}
            self._register(run_id, model, registered, tags, record["alias"])

    def _register(
        self, run_id: str, model: Any, name: str, tags: Mapping[str, str], alias: str
    ) -> None:
        """Add a version, unless an earlier attempt has, and move the aliases."""
        from mlflow.exceptions import MlflowException

        client = self._client
        try:
            client.create_registered_model(name, description=_REGISTERED)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for version in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
            if version.tags.get(LOCAL_ID_TAG) == tags[LOCAL_ID_TAG]:
                break
        else:
            # Not "models:/<id>" as source: the SQL registry would look that up in the process's
            # default store, which is another one.
            version = client.create_model_version(
                name,
                model.artifact_location,
                run_id,
                dict(tags),
                await_creation_for=0,
                model_id=model.model_id,
            )
        link = json.dumps([{"name": name, "version": str(version.version)}])
        client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": link})
        client.set_registered_model_alias(name, alias, str(version.version))
        settle_aliases(client, name, int(version.version))

    def _existing(self, path: str) -> Path:
        full = self._spool.directory / path
        if not full.exists():
            raise RefusedError(f"{full} was removed before it could be sent")
        return full


def clean_key(key: str) -> str:
    """Return ``key`` as MLflow accepts it: letters, digits, ``_ - . : /`` and spaces.

    Example:
        >>> clean_key("curve//alpha=0.5")
        'curve/alpha_0.5'
    """
    parts = re.sub(r"[^\w./\-: ]", "_", key).split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))[:_KEY_LENGTH] or "_"


def sqlite_path(uri: str) -> Path | None:
    """Return the database file of a ``sqlite:///`` address, or None for any other address."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _clean_name(name: str, *, dots: bool = False) -> str:
    """Return ``name`` as a logged model and a folder may be called.

    Args:
        name: any text.
        dots: keep them, as the names of registered models may.
    """
    return re.sub(r"[^\w\-. ]" if dots else r"[^\w\- ]", "-", name) or "model"


def _plottable(value: float | str) -> float:
    """Return a metric's value for MLflow; the spool keeps what was really reported.

    Note: MLflow stores infinity as 1.8e308, which ruins the axis of every plot: send NaN.
    """
    number = float(value)
    return number if math.isfinite(number) else math.nan


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _batches(rows: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep libraries from reporting, in this thread, the failures that we report ourselves."""
    thread = threading.get_ident()

    def from_elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != thread

    for name in _NOISY:
        logging.getLogger(name).addFilter(from_elsewhere)
    try:
        yield
    finally:
        for name in _NOISY:
            logging.getLogger(name).removeFilter(from_elsewhere)
