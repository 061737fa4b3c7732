"""Every error that robustft raises on purpose.

::

    RobustftError
    |-- ConfigError (ValueError)         a field, value, preset or name that cannot be used
    |   `-- UnknownNameError             ... because nothing has that name; the nearest is proposed
    |-- DataError                        data files that are missing, damaged or not what they claim
    |-- CheckpointError                  weights that cannot be read, are unsafe or do not fit
    |-- ResourceError                    cluster, disk or folder does not offer what the run needs
    |-- NonFiniteLossError               a loss became NaN or infinite: ends the trial, no more
    `-- RunError                         a run failed or was interrupted; says how to resume

Each class carries ``exit_code``: 2 for input that the user can correct, 1 for a run that failed.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "NonFiniteLossError",
    "ResourceError",
    "RobustftError",
    "RunError",
    "UnknownNameError",
    "nearest",
]


class RobustftError(Exception):
    """Base class; its text is one sentence that names the remedy."""

    exit_code = 1


class ConfigError(RobustftError, ValueError):
    """A field, value or preset that cannot be used."""

    exit_code = 2


class UnknownNameError(ConfigError):
    """Nothing is called that: method, model, layer, data set, field, preset."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        guess = nearest(name, known)
        hint = f"did you mean {guess!r}?" if guess else f"known: {', '.join(known) or 'none'}"
        super().__init__(f"unknown {kind} {name!r}: {hint}")
        self.kind, self.name, self.known = kind, name, known

    def __reduce__(self) -> tuple[type, tuple[str, str, list[str]]]:
        # Exceptions are pickled by their args; ours has three and the base class sees one.
        return type(self), (self.kind, self.name, self.known)


class DataError(RobustftError):
    """Data files that are missing, damaged or not what they claim to be."""

    exit_code = 2


class CheckpointError(RobustftError):
    """Weights that cannot be read, are unsafe to read, or do not fit the architecture."""

    exit_code = 2


class ResourceError(RobustftError):
    """The cluster, the disk or a folder does not offer what the run asks for."""

    exit_code = 2


class NonFiniteLossError(RobustftError):
    """A training loss became NaN or infinite."""


class RunError(RobustftError):
    """A run failed or was interrupted; the text says how to resume it."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most like ``name``, or None if nothing is close."""
    options = {option.lower(): option for option in known}
    matches = difflib.get_close_matches(name.lower(), options, n=1, cutoff=0.5)
    return options[matches[0]] if matches else None
