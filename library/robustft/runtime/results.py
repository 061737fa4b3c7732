"""A method's Result on disk: safetensors for weights, JSON for everything else."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from robustft.errors import CheckpointError
from robustft.methods.base import Result

__all__ = ["has_result", "load_result", "save_result", "write_json"]

WEIGHTS, RECORD = "result.safetensors", "result.json"


def save_result(result: Result, directory: Path) -> None:
    """Write ``result``; the record comes last and marks the whole as complete."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in result.state.items()}
    temporary = directory / f".{WEIGHTS}.{os.getpid()}"
    save_file(state, temporary)
    os.replace(temporary, directory / WEIGHTS)
    record = dataclasses.asdict(dataclasses.replace(result, state={}))
    del record["state"]
    write_json(directory / RECORD, record)


def has_result(directory: Path) -> bool:
    """Return True if ``directory`` holds a complete result."""
    return (directory / RECORD).is_file()


def load_result(directory: Path) -> Result:
    """Read what ``save_result`` wrote.

    Raises:
        CheckpointError: nothing complete is there.
    """
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        state = load_file(directory / WEIGHTS)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no complete result in {directory}: {error}") from error
    return Result(state=state, **record)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; numbers that JSON lacks become null."""
    text = json.dumps(_finite(value), indent=1, allow_nan=False, default=_scalar)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _scalar(value: Any) -> Any:
    """Turn NumPy and tensor scalars into Python's."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} does not fit into JSON")
