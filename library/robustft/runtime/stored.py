"""``RunContext.map`` as a loop in this process that stores every finished item."""

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from robustft.runtime.fanout import load_value, store_value, stored_value, value_path

__all__ = ["StoredMap"]

log = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
ValueT = TypeVar("ValueT")

INTERVAL = 10.0  # seconds between progress lines


class StoredMap:
    """Computes items in order; those that an earlier, interrupted call has finished are read back.

    Args:
        store: folder for finished items, in files named by (name, key, item).
    """

    def __init__(self, store: Path) -> None:
        self._store = store

    def __call__(
        self,
        fn: Callable[[Any, ItemT], ValueT],
        items: Iterable[ItemT],
        *,
        shared: Any,
        key: str,
        name: str,
    ) -> list[ValueT]:
        work = list(items)
        values: list[Any] = []
        told = time.monotonic()
        for item in work:
            path = value_path(self._store, name, key, item)
            value = stored_value(path)
            if value is None:
                store_value(path, fn(shared, item))  # type: ignore[arg-type]
                # Read back, so that a resumed run cannot see other types than this one.
                value = load_value(path)
            values.append(value)
            if time.monotonic() - told >= INTERVAL:
                told = time.monotonic()
                log.info("%s: %d of %d shards", name, len(values), len(work))
        return values
