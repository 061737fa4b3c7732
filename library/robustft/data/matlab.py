"""MATLAB level 5 files, as far as data sets need them: numbers, text, and cells of text.

Written against "MAT-File Format" (The MathWorks), version 5; sparse arrays, structures, objects
and version 7.3 files are refused.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustft.errors import DataError

__all__ = ["read_mat"]

_HEADER = 128
# Data types of elements.
_COMPRESSED, _MATRIX = 15, 14
_NUMBERS = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
    16: "u1",  # UTF-8, read as bytes
    17: "u2",  # UTF-16, read as code units
}
# Classes of arrays.
_CELL, _CHAR = 1, 4
_NUMERIC = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4"}

Value = NDArray[Any] | str | list[Any]


def read_mat(path: Path) -> dict[str, Value]:
    """Return the variables of a file: numeric arrays, str, and cell arrays as flat lists.

    Raises:
        DataError: the file is missing, damaged, or of a kind that is not supported.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    try:
        if data[126:128] not in (b"IM", b"MI"):
            raise ValueError("no level 5 header")
        order = "<" if data[126:128] == b"IM" else ">"
        variables: dict[str, Value] = {}
        for kind, body in _elements(memoryview(data)[_HEADER:], order):
            if kind == _COMPRESSED:
                (kind, body), *_ = _elements(memoryview(zlib.decompress(body)), order)
            if kind == _MATRIX:
                name, value = _matrix(body, order)
                variables[name] = value
    except (ValueError, KeyError, IndexError, struct.error, zlib.error) as error:
        raise DataError(f"{path} is no MATLAB level 5 file that can be read ({error})") from error
    return variables


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Yield (data type, bytes) of consecutive elements."""
    position = 0
    while position + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, position)
        if kind >> 16:  # the small form: both numbers in one word, up to 4 bytes in the other
            kind, size = kind & 0xFFFF, kind >> 16
            start, following = position + 4, position + 8
        else:
            start = position + 8
            # Compressed elements are not padded; all others fill up to 8 bytes.
            following = start + size + (0 if kind == _COMPRESSED else -size % 8)
        if start + size > len(data):
            raise ValueError("the file ends early")
        yield kind, data[start : start + size]
        position = following


def _numbers(element: tuple[int, memoryview], order: str) -> NDArray[Any]:
    kind, body = element
    return np.frombuffer(body, dtype=f"{order}{_NUMBERS[kind]}")


def _matrix(body: memoryview, order: str) -> tuple[str, Value]:
    flags, dimensions, name, *contents = _elements(body, order)
    array_class = int(_numbers(flags, order)[0]) & 0xFF
    shape = tuple(int(size) for size in _numbers(dimensions, order))
    title = bytes(name[1]).decode("ascii")
    if array_class == _CELL:
        return title, [_matrix(cell, order)[1] for _, cell in contents]
    values = _numbers(contents[0], order) if contents else np.empty(0)
    if array_class == _CHAR:
        return title, "".join(chr(int(code)) for code in values)
    if array_class not in _NUMERIC:
        raise ValueError(f"array class {array_class} is not supported")
    return title, values.astype(_NUMERIC[array_class]).reshape(shape, order="F")
