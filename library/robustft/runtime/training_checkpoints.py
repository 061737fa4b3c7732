"""Training checkpoints on disk: the newest whole one is used, and every damaged one is said.

Ray keeps the checkpoints of one run as sibling folders ``checkpoint_*`` on storage that all nodes
share. A node that dies, a disk that fills up or decays leaves one of them damaged; going on from
the one before costs an epoch and changes no number. Age decides which is the newest: Ray's own
record is written every few seconds, and after a kill it names one that may be gone already.
"""

import logging
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from robustft.errors import CheckpointError
from robustft.training.context import State

__all__ = ["load_state", "newest_state", "newest_whole", "save_state"]

log = logging.getLogger(__name__)

STATE_FILE = "state.pt"
UNREADABLE = (OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile)
"""What zipfile and torch raise for files that are cut off, zeroed or not archives."""


def save_state(state: State, folder: Path) -> None:
    """Write ``state`` into ``folder``; torch stores a checksum with every tensor."""
    torch.save(state, folder / STATE_FILE)


def load_state(folder: Path) -> State:
    """Read what ``save_state`` wrote.

    Note: ``torch.load`` itself compares no checksums (it is built without), so a flipped bit would
    become a wrong weight; the archive is checked first, at the cost of reading it once more.

    Raises:
        CheckpointError: it is missing, cut off or changed.
    """
    path = folder / STATE_FILE
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        state: State = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"the checkpoint {path} is damaged ({reason})") from error
    return state


def newest_whole(
    known: Path, *, warn: Callable[[str], None] = log.warning
) -> tuple[Path, State] | None:
    """Return the newest undamaged checkpoint of a run.

    Args:
        known: a checkpoint of the run, such as Ray hands out; its siblings are the others.
        warn: is told of every damaged one, and of what is used in its place.

    Returns:
        Its folder and its state; None where there is none, so that the training starts anew.
    """
    folders = _by_age(known.parent)
    for folder in folders:
        try:
            state = load_state(folder)
        except CheckpointError as error:
            warn(f"{error}: going on from the one before")
        else:
            if folder != folders[0]:
                warn(f"training goes on from the checkpoint {folder}")
            return folder, state
    if folders:
        warn(f"no checkpoint beside {known} is whole: training starts again")
    return None


def newest_state(run: Path) -> Path | None:
    """Return the newest checkpoint in a run's folder, whole or not; None for a fresh run."""
    return next(iter(_by_age(run)), None)


def _by_age(run: Path) -> list[Path]:
    """Return the checkpoints that hold a state, newest first."""
    # Not by name: after a restart Ray may give a number once more.
    files = run.glob(f"checkpoint_*/{STATE_FILE}")
    ages = sorted(((path.stat().st_mtime_ns, path.parent) for path in files), reverse=True)
    return [folder for _, folder in ages]
