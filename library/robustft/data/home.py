"""Where downloaded and decoded data is kept: a folder that the user may set, and atomic writing."""

import logging
import os
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from robustft.errors import DataError, ResourceError

__all__ = ["cached_images", "home", "open_array"]

logger = logging.getLogger(__name__)

MEMORY_LIMIT = 256 * 1024 * 1024
"""Arrays of more bytes are memory-mapped instead of read."""
PROGRESS_SECONDS = 10.0
"""Time between two progress messages."""


def home() -> Path:
    """Return the folder for caches: ``ROBUSTFT_HOME``, else ``~/.robustft``."""
    return Path(os.environ.get("ROBUSTFT_HOME", "~/.robustft")).expanduser()


def cached_images(
    key: str, shape: tuple[int, int, int, int], blocks: Iterable[NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    """Return the images stored under ``key``; make them from ``blocks`` the first time.

    The file is written beside its final place and renamed when it is complete, so that a killed
    run leaves no half-written set and two runs may write the same one at the same time.

    Args:
        key: name of the set's content and preparation, usable as a file name.
        shape: (n, channels, height, width) of the whole.
        blocks: consecutive uint8 blocks ``[m, channels, height, width]``, n images in all; not
            touched when the set is stored already.

    Raises:
        ResourceError: the folder cannot be written.
        DataError: the blocks hold another number of images than ``shape`` says.
    """
    path = home() / "images" / f"{key}.npy"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, shape, blocks)
        except OSError as error:
            raise ResourceError(
                f"cannot write decoded images to {path.parent}: {error.strerror or error}; set "
                "ROBUSTFT_HOME to a writable folder with enough space"
            ) from error
    return open_array(path)


def open_array(path: Path) -> NDArray[np.uint8]:
    """Read a .npy file; large ones are memory-mapped.

    Raises:
        DataError: the file is damaged or holds Python objects.
    """
    mode: Literal["r"] | None = "r" if path.stat().st_size > MEMORY_LIMIT else None
    try:
        array: NDArray[np.uint8] = np.load(path, mmap_mode=mode, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path} is damaged ({error}); delete it and run again") from error
    return array


def _write(
    path: Path, shape: tuple[int, int, int, int], blocks: Iterable[NDArray[np.uint8]]
) -> None:
    part = path.with_name(f"{path.stem}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    started = told = time.monotonic()
    done = 0
    try:
        target = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
        for block in blocks:
            if done + len(block) > len(target):
                raise DataError(f"{path.stem}: more images than the {len(target)} announced")
            target[done : done + len(block)] = block
            done += len(block)
            now = time.monotonic()
            if now - told > PROGRESS_SECONDS:
                told = now
                left = (now - started) / done * (len(target) - done)
                logger.info("decoding images: %d of %d, %.0f s left", done, len(target), left)
        if done != len(target):
            raise DataError(f"{path.stem}: {done} images instead of the {len(target)} announced")
        target.flush()
        del target
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    logger.info("stored %d images in %s after %.1f s", done, path, time.monotonic() - started)
