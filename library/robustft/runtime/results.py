"""A method's Result on disk: safetensors for weights, JSON for everything else."""

import dataclasses
import json
import os
from pathlib import Path

from safetensors.torch import load_file, save_file

from robustft.errors import CheckpointError
from robustft.methods.base import Result
from robustft.runtime.jsonfile import write_json

__all__ = ["has_result", "load_result", "save_result"]

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
