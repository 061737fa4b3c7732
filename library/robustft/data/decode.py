"""Encoded pictures to uint8 arrays: once per data set, never in a training step."""

import functools
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robustft.data.home import cached_images
from robustft.errors import DataError

__all__ = ["decode_files", "decode_image", "decode_many", "resize_images"]

BLOCK = 512
"""Images that are decoded between two writes."""
RUN = 64
"""Images that a thread decodes in one go; handing over single ones costs as much as decoding."""
PREPARATION = "v1"
"""Changes whenever the code here gives other pixels, so that no stale file is used."""

Reader = Callable[[int], bytes]


def decode_image(data: bytes, size: int | None, channels: int, name: str) -> NDArray[np.uint8]:
    """Decode one picture.

    Args:
        data: the bytes of a PNG, JPEG or other file that Pillow reads.
        size: side length in pixels: the shorter side is scaled to it (bilinear, antialiased) and
            the middle square is cut out. None keeps the picture's own size.
        channels: 3 (grey pictures are repeated) or 1 (colour becomes luma).
        name: of the picture, for messages.

    Returns:
        uint8 ``[channels, height, width]``.

    Raises:
        DataError: the bytes are no picture.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            picture = image.convert("RGB" if channels == 3 else "L")
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name} is no readable picture ({error}); fetch the file again") from error
    if size is not None and picture.size != (size, size):
        picture = _cut_square(picture, size)
    pixels = np.asarray(picture, dtype=np.uint8)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def decode_many(
    read: Reader, names: Sequence[str], *, size: int | None, channels: int, key: str | None
) -> NDArray[np.uint8]:
    """Decode ``read(0) .. read(n - 1)`` to one array, kept under ``key`` for the next time.

    Args:
        read: position -> encoded bytes.
        names: one per picture, for messages.
        size: side length in pixels; None if all have the same size already.
        channels: 1 or 3.
        key: names the content and the preparation; None decodes into memory every time.

    Returns:
        uint8 ``[n, channels, height, width]``; memory-mapped if large.

    Raises:
        DataError: a picture is unreadable, or the sizes differ and ``size`` is None.
    """
    if not names:
        raise DataError("there is no picture to decode")
    decode = functools.partial(_decode_at, read, names, size, channels)
    shape = decode(0).shape

    def decode_run(first: int) -> list[NDArray[np.uint8]]:
        return [decode(position) for position in range(first, min(first + RUN, len(names)))]

    def blocks() -> Iterator[NDArray[np.uint8]]:
        # Pillow releases the interpreter lock while it decodes.
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(names), BLOCK):
                runs = pool.map(decode_run, range(start, min(start + BLOCK, len(names)), RUN))
                pictures = [picture for run in runs for picture in run]
                for position, picture in enumerate(pictures, start):
                    if picture.shape != shape:
                        raise DataError(
                            f"pictures differ in size ({names[0]}: {shape[1:]}, "
                            f"{names[position]}: {picture.shape[1:]}); set image_size"
                        )
                yield np.stack(pictures)

    if key is None:
        return np.concatenate(list(blocks()))
    return cached_images(key, (len(names), *shape), blocks())


def decode_files(
    files: Sequence[Path], root: Path, *, size: int | None, channels: int, name: str
) -> NDArray[np.uint8]:
    """Decode picture files; the result is kept and found again by names, sizes and times.

    Args:
        files: the pictures, in order.
        root: folder that the names are taken relative to.
        size, channels: see :func:`decode_image`.
        name: of the data set and split, for the cache's file name.
    """
    digest = hashlib.sha256(f"{PREPARATION} {size} {channels}".encode())
    for file in files:
        status = file.stat()
        text = f"{file.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\n"
        digest.update(text.encode())
    return decode_many(
        lambda position: files[position].read_bytes(),
        [str(file) for file in files],
        size=size,
        channels=channels,
        key=f"{name}-{digest.hexdigest()[:16]}",
    )


def resize_images(images: NDArray[np.uint8], size: int, *, name: str) -> NDArray[np.uint8]:
    """Scale decoded square images to ``size`` pixels as :func:`decode_image` does; kept on disk."""
    n, channels, height, width = images.shape
    if (height, width) == (size, size):
        return images
    digest = hashlib.sha256(f"{PREPARATION} {size} {images.shape}".encode())
    for first in range(0, n, BLOCK):
        digest.update(np.ascontiguousarray(images[first : first + BLOCK]).data)

    def resize(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        planes = [np.asarray(_cut_square(Image.fromarray(plane), size)) for plane in image]
        return np.stack(planes)

    def blocks() -> Iterator[NDArray[np.uint8]]:
        for first in range(0, n, BLOCK):
            yield np.stack([resize(image) for image in images[first : first + BLOCK]])

    return cached_images(f"{name}-{digest.hexdigest()[:16]}", (n, channels, size, size), blocks())


def _decode_at(
    read: Reader, names: Sequence[str], size: int | None, channels: int, position: int
) -> NDArray[np.uint8]:
    return decode_image(read(position), size, channels, names[position])


def _cut_square(picture: Image.Image, size: int) -> Image.Image:
    width, height = picture.size
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))
