"""A run's folder in object storage: published after every stage, so that any machine can resume it.

Without object storage (``runtime.storage`` is a folder, local or NFS) nothing here does anything.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from robustft.data.storage import Store, is_uri, local_path, open_store, working_folder
from robustft.errors import ConfigError, ResourceError, RunError
from robustft.runtime.results import has_result

__all__ = ["Mirror", "checkpoint_folder", "list_runs", "ray_storage", "reopen", "run_store"]

log = logging.getLogger(__name__)

RAYS = ("train/*", "search/*", "tracking/lock")
"""Not published: what Ray itself writes to the store, and a lock."""
STARTS = ".starts"
"""Trained starting models, beside the experiments (whose names do not begin with a dot)."""


def run_store(place: str | None) -> Store | None:
    """Return the object store that ``runtime.storage`` names; None for a folder."""
    if place is None or not is_uri(place) or local_path(place) is not None:
        return None
    return open_store(place)


@dataclasses.dataclass(frozen=True, slots=True)
class Mirror:
    """The store's side of a run.

    Args:
        root: the store of all runs; None: the run lies in ``directory`` only.
        directory: the run's local folder, ``<experiment>/<run-id>`` at its end.
    """

    root: Store | None
    directory: Path

    @property
    def store(self) -> Store | None:
        """Where this run is published."""
        if self.root is None:
            return None
        return self.root.inside(self.directory.parent.name).inside(self.directory.name)

    @property
    def address(self) -> str | Path:
        """What ``robustft resume`` takes: a URI that any machine knows, or the folder."""
        return self.directory if self.store is None else self.store.uri

    def inside(self, name: str) -> Store | None:
        """Return where Ray keeps the checkpoints of "train" or the "search"."""
        return None if self.store is None else self.store.inside(name)

    def catch_up(self) -> None:
        """Fetch what another machine has published of this run since this one was at work on it."""
        if self.store is not None and self.store.exists():
            self.store.fetch(self.directory, ours=True)

    def publish(self) -> None:
        """Publish what there is; if the store is away, say so and leave it to the next time.

        Raises:
            RunError: somebody else has published this run meanwhile.
        """
        try:
            self._publish()
        except ResourceError as error:
            log.warning("%s; what is not published yet is in %s", error, self.directory)

    def require_published(self) -> None:
        """Publish the finished run.

        Raises:
            RunError: it could not be published; it is in its folder.
        """
        try:
            self._publish()
        except ResourceError as error:
            raise RunError(
                f"the run is finished, but only in {self.directory}: {error}; then publish it with "
                f"robustft resume {self.directory} on this machine"
            ) from error

    def _publish(self) -> None:
        if self.store is not None:
            self.store.publish(self.directory, leave_out=RAYS)

    def fetch_start(self, cache: Path) -> None:
        """Fetch a trained starting model that another machine has published."""
        if self.root is None or has_result(cache):
            return
        start = self.root.inside(STARTS).inside(cache.name)
        if start.exists():
            start.fetch(cache)

    def publish_start(self, cache: Path) -> None:
        """Publish the trained starting model in ``cache`` for other machines and runs."""
        if self.root is not None:
            try:
                # Whoever trains the same start gets the same weights.
                self.root.inside(STARTS).inside(cache.name).publish(cache, alone=False)
            except ResourceError as error:
                log.warning("%s; the start is kept in %s only", error, cache)


def list_runs(place: str | None, folder: Path) -> dict[str, str]:
    """Return the address of every run -> "finished" or "unfinished".

    Args:
        place: ``runtime.storage``.
        folder: the local folder of all runs, where that is no object storage.
    """
    store = run_store(place)
    found: dict[str, str] = {}
    if store is None:
        for record in sorted(folder.glob("*/*/run.json")):
            found[str(record.parent)] = _state((record.parent / "summary.json").is_file())
        return found
    for experiment in store.names():
        if experiment == STARTS:
            continue
        for name in store.inside(experiment).names():
            run = store.inside(experiment).inside(name)
            files = run.files()
            if "run.json" in files:
                found[run.uri] = _state("summary.json" in files)
    return found


def _state(finished: bool) -> str:
    return "finished" if finished else "unfinished"


def reopen(uri: str) -> tuple[Path, str]:
    """Bring the run at ``uri`` to this machine, to go on with it.

    Returns:
        Its local folder, and the store of all runs.

    Raises:
        ConfigError: ``uri`` names no run of a store.
        DataError: nothing, or something damaged, is published there.
    """
    uri = uri.rstrip("/")
    root, *names = uri.rsplit("/", 2)
    if len(names) < 2 or root.endswith(("/", ":")):
        raise ConfigError(f"{uri} names no run: give <store>/<experiment>/<run-id>")
    folder = working_folder(root).joinpath(*names)
    open_store(uri).fetch(folder, ours=True)
    return folder, root


def ray_storage(folder: Path, store: Store | None) -> dict[str, Any]:
    """Return what tells Ray where to keep its checkpoints: ``folder``, or ``store`` if given."""
    if store is None:
        return {"storage_path": str(folder)}
    return {"storage_path": store.path, "storage_filesystem": store.filesystem}


def checkpoint_folder(checkpoint: Any, scratch: Path) -> Path:
    """Return where a checkpoint of Ray's lies on this machine; ``scratch`` takes a copy if needed.

    Args:
        checkpoint: of Ray Train or Ray Tune.
        scratch: a temporary folder of the caller.
    """
    if checkpoint.filesystem.type_name == "local":
        return Path(checkpoint.path)
    folder = scratch / Path(checkpoint.path).name
    return Path(checkpoint.to_directory(str(folder)))
