"""Reading the CIFAR batches without running what is in them.

A pickle is a program; the ordinary loader runs whatever it says. This one knows the few names that
a NumPy array needs and refuses everything else.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from robustft.errors import DataError

__all__ = ["read_plain_pickle"]


def _codecs_encode(text: str, encoding: str) -> bytes:
    """Stand in for ``codecs.encode``, which old pickles use to hold bytes, with latin-1 only."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not allowed")
    return text.encode("latin-1")


# The two modules are the same one under NumPy 1 and 2; files may name either.
_reconstruct = np.empty(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _codecs_encode,
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed") from None


def read_plain_pickle(path: Path) -> dict[str, Any]:
    """Read a pickled dict of numbers, text, lists and numeric arrays; nothing else is built.

    Args:
        path: the file; bytes of Python 2 strings are read as latin-1.

    Returns:
        The dict, its keys as text.

    Raises:
        DataError: the file is missing, damaged, holds no dict, or holds other objects.
    """
    try:
        data = path.read_bytes()
        value = _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise DataError(
            f"{path} is not a plain pickle of arrays ({error}); fetch the archive again, or use "
            "its binary version"
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__} instead of a dict")
    for item in value.values():
        if isinstance(item, np.ndarray) and item.dtype.hasobject:
            raise DataError(f"{path} holds an array of Python objects: it is not the real file")
    return {str(key): item for key, item in value.items()}
