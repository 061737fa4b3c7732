"""How an evaluation works on its independent items: here in turn, or through any mapper."""

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Mapper", "in_turn", "shared_key"]

ValueT = TypeVar("ValueT")
ItemT = TypeVar("ItemT")


class Mapper(Protocol):
    """``RunContext.map``: ``[fn(shared, item) for item in items]``, perhaps in parallel."""

    def __call__(
        self,
        fn: Callable[[Any, ItemT], ValueT],
        items: Iterable[ItemT],
        *,
        shared: Any,
        key: str,
        name: str,
    ) -> list[ValueT]: ...


def in_turn(
    fn: Callable[[Any, ItemT], ValueT],
    items: Iterable[ItemT],
    *,
    shared: Any,
    key: str,
    name: str,
) -> list[ValueT]:
    """Work on one item after another in this process; the mapper where no other is given."""
    return [fn(shared, item) for item in items]


def shared_key(model_digest: str, kind: type, ids: NDArray[np.int64], *facts: str | int) -> str:
    """Name what all items of an evaluation share by its content.

    What is done with it is in the items. A stored value may be used again exactly where this name
    and the item are the same.

    Args:
        model_digest: of the weights (``robustft.models.state_digest``).
        kind: the model's class, which weights alone do not tell.
        ids: int64 ``[n]`` of the examples, in their order.
        facts: whatever else the values depend on: the task's digest, a seed.
    """
    digest = hashlib.sha256(model_digest.encode())
    digest.update(kind.__qualname__.encode())
    digest.update(np.ascontiguousarray(ids).tobytes())
    version = importlib.metadata.version("robustft")
    digest.update(" ".join(map(str, (*facts, version))).encode())
    return digest.hexdigest()
