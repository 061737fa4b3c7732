"""Seeded batches of a split: the same global batches for any number of workers."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustft.data.base import Split
from robustft.errors import ConfigError
from robustft.training.seeding import derive_seed

__all__ = ["Batch", "Loader", "rows"]

RESIDENT_BYTES = 2 * 1024**3
"""Splits up to this size are kept on an accelerator as uint8: CIFAR takes 150 MB."""

_MAX_PIXEL = 255.0


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """One worker's share of a global batch.

    Args:
        inputs: float32 ``[n, channels, height, width]`` in [0, 1], on the device.
        labels: int64 ``[n]``.
        ids: int64 ``[n]`` instance ids.
        scale: factor on the worker's *mean* loss so that the mean of the workers' gradients is
            exactly the gradient of the global batch's mean loss, whatever the shares' sizes.
        count: how many examples of the global batch this share stands for; 0 for a share that is
            only there to keep the workers in step (then n is 1 and ``scale`` 0).
    """

    inputs: Tensor
    labels: Tensor
    ids: Tensor
    scale: float
    count: int


class Loader:
    """Batches over a split, shuffled by (seed, epoch) alone.

    Each *global* batch is cut across the workers (worker r takes positions r, r + world_size,
    ...), so that one worker with batch 128 and two workers with 64 each see the same global
    batches. The partial last batch is kept. The split's arrays are never written.

    Args:
        split: the examples.
        batch_size: size of the global batch.
        seed: the run's seed.
        device: where batches are put.
        rank, world_size: this worker among all.
        resident_bytes: on an accelerator, splits up to this size are kept there as uint8.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        resident_bytes: int = RESIDENT_BYTES,
    ) -> None:
        if len(split) == 0:
            raise ConfigError("the training split is empty: enlarge it or lower val_size")
        self._split = split
        self._batch_size = batch_size
        self._seed = seed
        self._device = device
        self._rank, self._world_size = rank, world_size
        fits = split.images.nbytes <= resident_bytes
        everything = np.arange(len(split), dtype=np.int64)
        self._resident = (
            _host_rows(split, everything, device) if device.type != "cpu" and fits else None
        )

    def __len__(self) -> int:
        """Return the number of steps in an epoch."""
        return -(-len(self._split) // self._batch_size)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield this worker's shares of the epoch's global batches, in order."""
        order = np.random.default_rng(derive_seed(self._seed, "order", epoch))
        permutation = order.permutation(len(self._split))
        resident_order = (
            torch.from_numpy(permutation).to(self._device) if self._resident is not None else None
        )
        for start in range(0, len(permutation), self._batch_size):
            stop = min(start + self._batch_size, len(permutation))
            size = stop - start
            count = len(range(self._rank, size, self._world_size))
            # A worker without a share still needs a forward and a backward, or the others would
            # wait for it in the all-reduce: it gets the first row at weight zero.
            share = slice(start + self._rank, stop, self._world_size)
            share = share if count else slice(start, start + 1)
            if self._resident is not None and resident_order is not None:
                chosen = resident_order[share]
                images, labels, ids = (column[chosen] for column in self._resident)
            else:
                images, labels, ids = _host_rows(self._split, permutation[share], self._device)
            yield Batch(
                inputs=_to_unit(images),
                labels=labels,
                ids=ids,
                scale=count * self._world_size / size,
                count=count,
            )


def rows(
    split: Split, positions: NDArray[np.int64], *, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (inputs float32 in [0, 1], labels, ids) of the rows at ``positions``."""
    images, labels, ids = _host_rows(split, positions, device)
    return _to_unit(images), labels, ids


def _host_rows(
    split: Split, positions: NDArray[np.int64], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Copy rows out of the (possibly read-only, memory-mapped) arrays to the device."""
    columns = (split.images[positions], split.labels[positions], split.ids[positions])
    tensors = [torch.from_numpy(column) for column in columns]
    if device.type == "cuda":
        tensors = [tensor.pin_memory() for tensor in tensors]
    images, labels, ids = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return images, labels, ids


def _to_unit(images: Tensor) -> Tensor:
    return images.to(torch.float32).div_(_MAX_PIXEL)
