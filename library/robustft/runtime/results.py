"""A method's Result on disk: safetensors for weights, JSON for everything else."""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from robustft.data.storage import fetched
from robustft.errors import CheckpointError
from robustft.methods.base import Result
from robustft.runtime.jsonfile import replacing, write_json

__all__ = ["has_result", "load_result", "save_result", "stored_result"]

log = logging.getLogger(__name__)

WEIGHTS, RECORD = "result.safetensors", "result.json"


def save_result(result: Result, directory: Path) -> None:
    """Write ``result``; the record comes last and marks the whole as complete."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in result.state.items()}
    with replacing(directory / WEIGHTS) as temporary:
        save_file(state, temporary)
        digest = _digest(temporary)
    record = dataclasses.asdict(dataclasses.replace(result, state={}))
    del record["state"]
    write_json(directory / RECORD, {**record, "weights_sha256": digest})


def has_result(directory: Path) -> bool:
    """Return True if ``directory`` holds a complete result."""
    return (directory / RECORD).is_file()


def load_result(directory: str | Path) -> Result:
    """Read what ``save_result`` wrote.

    Args:
        directory: its folder, or a URI: ``s3://.../<experiment>/<run-id>/stages/rift``.

    Raises:
        CheckpointError: nothing complete is there, or its weights have changed since.
        DataError, ResourceError: nothing is published at the URI, or it cannot be read.
    """
    directory = fetched(directory)
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        # Results of earlier versions have none.
        expected = record.pop("weights_sha256", None)
        if expected is not None and _digest(directory / WEIGHTS) != expected:
            raise ValueError(f"{WEIGHTS} is damaged (its checksum is wrong)")
        state = load_file(directory / WEIGHTS)
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"no complete result in {directory}: {error}") from error
    return Result(state=state, **record)


def stored_result(directory: Path) -> Result | None:
    """Return what an earlier attempt has left; None if nothing, or something damaged (logged)."""
    if not has_result(directory):
        return None
    try:
        return load_result(directory)
    except CheckpointError as error:
        log.warning("%s; it is computed again", error)
        return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
