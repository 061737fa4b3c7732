"""An ordered, resumable, bounded map over Ray tasks.

Every finished item is stored under the hash of (name, key of the shared input, item), so that an
interrupted sweep repeats nothing. Results come in item order and do not depend on how many
workers computed them.
"""

import hashlib
import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from robustft.errors import DataError
from robustft.runtime.events import EventPump, Sender, busy
from robustft.runtime.jsonfile import replacing

__all__ = ["Fanout", "load_value", "store_value", "stored_value", "value_path"]

log = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
ValueT = TypeVar("ValueT")


class Fanout:
    """``RunContext.map`` on Ray tasks.

    Args:
        store: folder for finished items.
        pump: where progress goes.
        stage: name of the stage in progress lines.
        max_in_flight: tasks submitted at a time; bounds memory, not parallelism.
        cpus, gpus: of each task.
    """

    def __init__(
        self,
        store: Path,
        pump: EventPump,
        *,
        stage: str,
        max_in_flight: int,
        cpus: int = 1,
        gpus: float = 0.0,
    ) -> None:
        self._store = store
        self._pump = pump
        self._stage = stage
        self._max_in_flight = max(1, max_in_flight)
        self._cpus, self._gpus = cpus, gpus

    def __call__(
        self,
        fn: Callable[[Any, ItemT], ValueT],
        items: Iterable[ItemT],
        *,
        shared: Any,
        key: str,
        name: str,
    ) -> list[ValueT]:
        import ray

        work = list(items)
        paths = [value_path(self._store, name, key, item) for item in work]
        values: dict[int, Any] = {}
        for index, path in enumerate(paths):
            value = stored_value(path)
            if value is not None:
                values[index] = value
        waiting = [index for index in range(len(work)) if index not in values]
        self._progress(name, len(values), len(work))
        if not waiting:
            return [values[index] for index in range(len(work))]
        shared_ref = ray.put(shared)
        task = ray.remote(num_cpus=self._cpus, num_gpus=self._gpus, max_retries=3)(run_item)
        running: dict[Any, int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self._max_in_flight:
                    index = waiting.pop(0)
                    arguments = (fn, shared_ref, work[index], self._pump.sender, self._stage, name)
                    running[task.remote(*arguments, self._cpus)] = index
                finished, _ = ray.wait(list(running), num_returns=1)
                for reference in finished:
                    index = running.pop(reference)
                    values[index] = _result(ray, reference)
                    store_value(paths[index], values[index])
                self._progress(name, len(values), len(work))
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
        return [values[index] for index in range(len(work))]

    def _progress(self, name: str, done: int, total: int) -> None:
        self._pump.local(
            {"kind": "items", "stage": self._stage, "run": name, "step": done, "total": total}
        )


def run_item(
    fn: Callable[[Any, Any], Any],
    shared: Any,
    item: Any,
    send: Sender,
    stage: str,
    name: str,
    threads: int,
) -> Any:
    """Run one item in a Ray worker."""
    import torch

    torch.set_num_threads(threads)
    with busy(send, stage, name):
        return fn(shared, item)


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        # Raise what the function raised: ConfigError and the like keep their sentence.
        raise error.cause if isinstance(error.cause, Exception) else error from None


def value_path(store: Path, name: str, key: str, item: Any) -> Path:
    """Return the file of a finished item: named by everything that decides its value."""
    text = json.dumps([name, key, item], sort_keys=True)
    folder = re.sub(r"[^A-Za-z0-9_-]+", "-", name)
    return store / folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"


def store_value(path: Path, value: Mapping[str, Any]) -> None:
    """Store a dict of JSON scalars, lists and NumPy arrays, atomically and without pickle."""
    arrays = {name: item for name, item in value.items() if isinstance(item, np.ndarray)}
    scalars = {name: item for name, item in value.items() if name not in arrays}
    path.parent.mkdir(parents=True, exist_ok=True)
    order = list(value)
    text = np.frombuffer(json.dumps([order, scalars]).encode(), dtype=np.uint8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, __json__=text, **arrays)


def load_value(path: Path) -> dict[str, Any]:
    """Read what ``store_value`` wrote; the archive's checksums are compared.

    Raises:
        DataError: nothing whole is there.
    """
    try:
        # Opened here: of a damaged file NumPy would leave its own handle open.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            order, scalars = json.loads(file["__json__"].tobytes().decode())
            return {name: scalars[name] if name in scalars else file[name] for name in order}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"{path} holds no finished item ({reason}): delete it") from error


def stored_value(path: Path) -> dict[str, Any] | None:
    """Return a finished item; None if there is none, or a damaged one (logged)."""
    if not path.is_file():
        return None
    try:
        return load_value(path)
    except DataError as error:
        log.warning("%s; it is computed again", error)
        return None
