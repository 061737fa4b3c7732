"""The tracking spool: an append-only file of JSON records, and how far each store has read it.

Everything a run wants to tell MLflow is first a line in ``<run directory>/tracking/records.jsonl``.
A line counts once its newline is on disk; what a crash leaves behind after the last newline is cut
off by the next writer. How far the spool has been replayed is kept per store in
``replayed-<digest of the address>.json``, written atomically, so that one spool can be sent to
several stores and each of them gets every record once.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from robustft.errors import ConfigError, ResourceError, RunError

__all__ = ["FOLDER", "Progress", "Record", "Spool", "mask"]

logger = logging.getLogger(__name__)

FOLDER = "tracking"
"""Name of the spool's folder in the run directory."""

Record = dict[str, Any]
"""One line of the spool; ``kind`` says what it is, ``time`` (ms since 1970) when it was made."""

_METRICS_PREFIX = b'{"kind": "metrics"'
_USER_INFO = re.compile(r"(?<=://)[^/@\s]*@")
_SECRET_QUERY = re.compile(
    r"(?i)([?&][^=&\s]*(?:passw|pwd|token|secret|api_?key|access_?key|signature)[^=&\s]*=)[^&\s]+"
)
# Errors that mean "this file system has no locks", not "somebody holds the lock".
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def mask(text: str) -> str:
    """Return ``text`` with the credentials of every address in it replaced by ``***``.

    Example:
        >>> mask("postgresql://me:secret@host/db?token=abc")
        'postgresql://***@host/db?token=***'
    """
    return _SECRET_QUERY.sub(r"\1***", _USER_INFO.sub("***@", text))


class Spool:
    """The records of one run directory. At most one process has it open.

    Args:
        directory: the run directory; the spool lies in ``directory / "tracking"``.
        header: written as the first record of a new spool, and again whenever it differs from the
            newest header (a resumed run may have another address). None opens an existing spool.

    Attributes:
        id: random name of this spool; part of every local run id.
        header: the newest header.
        size: bytes of complete records.

    Raises:
        ConfigError: ``header`` is None and there is no spool.
        RunError: another process has the spool open.
        ResourceError: the folder cannot be written.
    """

    def __init__(self, directory: Path, *, header: Mapping[str, str] | None) -> None:
        self.directory = directory.absolute()
        self.folder = self.directory / FOLDER
        self._path = self.folder / "records.jsonl"
        if header is None and not self._path.exists():
            raise ConfigError(
                f"{directory} holds no tracking records ({FOLDER}/{self._path.name}): name the "
                f"directory of a run, runs/<experiment>/<run-id>"
            )
        self._mutex = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ResourceError(_unwritable(self.folder, error)) from error
        try:
            self._take_lock()
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            os.close(self._lock)
            raise ResourceError(_unwritable(self._path, error)) from error
        except RunError:
            os.close(self._lock)
            raise
        self.size = self._cut_torn_line()
        self.header = self._newest_header()
        self.id: str = self.header.get("id") or uuid.uuid4().hex[:12]
        if header is not None and {**self.header, **header} != self.header:
            self.header = {"kind": "spool", "id": self.id, **header}
            self.append(self.header)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record; it is complete when this returns.

        Raises:
            ResourceError: the disk is full or the file cannot be written. The spool then still
                ends with its last complete record.
        """
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with self._mutex:
            try:
                view = memoryview(line)
                while view:
                    view = view[os.write(self._file, view) :]
            except OSError as error:
                os.ftruncate(self._file, self.size)
                raise ResourceError(_unwritable(self._path, error)) from error
            self.size += len(line)

    def read(self, offset: int, *, limit: int | None = None) -> Iterator[tuple[Record, int]]:
        """Yield (record, offset behind it) for the complete records from ``offset`` on.

        A damaged line is reported and skipped: one bad sector must not hide what follows it.
        """
        for line, end in self._lines(offset, limit=limit):
            record = _parsed(line)
            if record is None:
                logger.warning("%s: skipped a damaged record before byte %d", self._path, end)
                record = {"kind": "damaged"}
            yield record, end

    def structure(self) -> Iterator[Record]:
        """Yield every record but the metrics, which are nearly all of a long run's spool."""
        for line, _ in self._lines(0, limit=None):
            record = None if line.startswith(_METRICS_PREFIX) else _parsed(line)
            if record is not None:
                yield record

    def close(self) -> None:
        """Flush to disk and let another process open the spool."""
        with contextlib.suppress(OSError):  # some file systems cannot sync; the data are written
            os.fsync(self._file)
        os.close(self._file)
        os.close(self._lock)

    def _lines(self, offset: int, *, limit: int | None) -> Iterator[tuple[bytes, int]]:
        with self._path.open("rb") as file:
            file.seek(offset)
            for line in itertools.islice(file, limit):
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                yield line, offset

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"{self.directory} is being written by another process: wait until that run or "
                f"sync has ended (a live run sends its records itself)"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning("%s cannot lock files; do not open a run twice", self.folder)

    def _cut_torn_line(self) -> int:
        """Drop what follows the last newline: a record whose writer died, never acknowledged."""
        size = end = os.fstat(self._file).st_size
        block = 1 << 16
        while end > 0:
            start = max(0, end - block)
            newline = os.pread(self._file, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            logger.warning("%s: cut off an incomplete last record", self._path)
            os.ftruncate(self._file, end)
        return end

    def _newest_header(self) -> Record:
        header: Record = {}
        for record in self.structure():
            if record.get("kind") == "spool":
                header = record
        return header


@dataclasses.dataclass(slots=True)
class Progress:
    """How far one store has read one spool.

    Args:
        path: file that keeps it.
        offset: bytes of the spool that have been replayed.
        runs: local run id -> MLflow run id.
        experiment_id: of the newest connection; "" before the first.
    """

    path: Path
    offset: int = 0
    runs: dict[str, str] = dataclasses.field(default_factory=dict)
    experiment_id: str = ""

    @classmethod
    def load(cls, spool: Spool, uri: str) -> "Progress":
        """Read the progress of the store at ``uri``; a missing or damaged file means none.

        Starting over is safe: runs are found again by their tag, and MLflow keeps equal metric
        points once.
        """
        digest = hashlib.sha256(mask(uri).encode()).hexdigest()[:10]
        progress = cls(spool.folder / f"replayed-{digest}.json")
        try:
            values = json.loads(progress.path.read_text(encoding="utf-8"))
            offset, runs = int(values["offset"]), dict(values["runs"])
            progress.experiment_id = str(values["experiment_id"])
        except FileNotFoundError:
            return progress
        except (OSError, ValueError, KeyError, TypeError):
            logger.warning("%s cannot be read; replaying from the beginning", progress.path)
            return progress
        if offset <= spool.size:
            progress.offset, progress.runs = offset, runs
        return progress

    def save(self) -> None:
        """Write atomically: a crash leaves the old or the new state."""
        values = {"offset": self.offset, "experiment_id": self.experiment_id, "runs": self.runs}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(values), encoding="utf-8")
        temporary.replace(self.path)


def _parsed(line: bytes) -> Record | None:
    """Return the record, or None if the line is not one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("kind"), str) else None


def _unwritable(path: Path, error: OSError) -> str:
    return (
        f"cannot write {path}: {error.strerror}; free space or choose another run directory, "
        f"then resume the run"
    )
