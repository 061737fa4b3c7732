"""Object storage: folders that are published whole, and fetched with their digests checked.

A :class:`Store` is a folder of a pyarrow file system, named by a URI: ``s3://bucket/prefix``,
``gs://``, ``abfs://`` or ``file://``. Work is done in local folders, where renaming is atomic and
cheap; what is finished is published from there. Below a store, one published folder is ::

    manifest.json                      name -> SHA-256 and size of every file; written last
    files/report.3fa9c2d1e0b4a7c6.html   the content, under names that contain its digest

Content is never overwritten and the manifest is one object, which object stores (and a rename on
local disks and NFS) replace in one step: a reader sees the folder as it was published before or
after, never in between, whoever is killed. Content that no manifest names any more stays behind.

Credentials come from the environment or the machine's role and are never part of a URI.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import SplitResult, quote, unquote, urlsplit

from pyarrow import fs

from robustft.data.home import home
from robustft.errors import ConfigError, DataError, ResourceError, RunError

__all__ = [
    "MANIFEST",
    "Store",
    "fetched",
    "is_uri",
    "local_path",
    "open_store",
    "require_uri",
    "working_folder",
]

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "file")
MANIFEST = "manifest.json"
FILES = "files"
REMEMBERED = ".published.json"
"""In a local folder: the manifest that it was last published as, or fetched from."""
THREADS = 8
"""Files on their way at a time: an object store answers slowly and in parallel."""
BLOCK = 8 * 1024 * 1024
NOT_A_NAME = re.compile(r"[\x00-\x1f\\]")

ItemT = TypeVar("ItemT")
ValueT = TypeVar("ValueT")


def is_uri(place: str | Path) -> bool:
    """Return whether ``place`` is a URI rather than a path."""
    return "://" in str(place)


def local_path(uri: str) -> Path | None:
    """Return the folder that a ``file://`` URI names; None for an object store."""
    parts = require_uri(uri)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def require_uri(uri: str) -> SplitResult:
    """Return the parts of a URI of ours.

    Raises:
        ConfigError: its scheme is unknown, it names no bucket, leads out of it, or contains
            credentials or options. The text shows no part that may be secret.
    """
    # Until it is known to hold no secret, no message may show it.
    scheme = uri.partition("://")[0] if is_uri(uri) else ""
    if scheme not in SCHEMES:
        raise ConfigError(
            f"storage {scheme + '://...' if scheme else uri!r}: give a path, or a URI that begins "
            f"with one of {', '.join(f'{one}://' for one in SCHEMES)}"
        )
    parts = urlsplit(uri)
    # abfs://container@account... names a place, as long as no password follows the container.
    container = scheme.startswith("abfs") and parts.password is None
    if "@" in parts.netloc and not container:
        raise ConfigError(
            f"a {scheme}:// URI must not contain credentials: it is stored with every run; set "
            "AWS_ACCESS_KEY_ID and the like, or give the machine a role (docs/storage.md)"
        )
    if parts.query or parts.fragment:
        raise ConfigError(
            f"a {scheme}:// URI must not contain ? or #: options and credentials come from the "
            "environment, e.g. AWS_ENDPOINT_URL and AWS_REGION (docs/storage.md)"
        )
    if scheme != "file" and not parts.netloc:
        raise ConfigError(f"{uri} names no bucket: give {scheme}://bucket/prefix")
    if scheme == "file" and (parts.netloc or not parts.path.startswith("/")):
        raise ConfigError(f"{uri} is no absolute path: give file:///folder")
    name = parts.path.strip("/")
    if name and not _is_name(name):
        raise ConfigError(f"{uri} leads out of its bucket: leave out . and .. and //")
    return parts


def open_store(uri: str) -> "Store":
    """Return the store that ``uri`` names; nothing is read or written yet.

    Regions, endpoints of S3-compatible servers (``AWS_ENDPOINT_URL``) and credentials are taken
    from the environment by pyarrow, on every machine anew.

    Raises:
        ConfigError: it is no URI of a known scheme, names no bucket, or contains credentials or
            options.
        ResourceError: the bucket's region cannot be found out.
    """
    parts = require_uri(uri)
    plain = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
    if parts.scheme == "file":
        return Store(plain, fs.LocalFileSystem(), str(local_path(plain)))
    with _explained(plain, "reach"):
        filesystem, path = fs.FileSystem.from_uri(plain + _options(parts.scheme))
    return Store(plain, filesystem, path)


@dataclasses.dataclass(frozen=True, slots=True)
class Store:
    """A folder of a file system.

    Args:
        uri: its address, without a slash at the end.
        filesystem: pyarrow's; picklable, credentials are not part of it.
        path: of the folder in ``filesystem``.
    """

    uri: str
    filesystem: Any
    path: str

    def inside(self, name: str) -> "Store":
        """Return a folder below this one.

        Raises:
            ConfigError: ``name`` would lead out of it.
        """
        if not _is_name(name):
            raise ConfigError(f"{name!r} names nothing inside of {self.uri}: use a relative name")
        return dataclasses.replace(self, uri=f"{self.uri}/{name}", path=f"{self.path}/{name}")

    def exists(self) -> bool:
        """Return whether a folder is published here."""
        return self._manifest() is not None

    def names(self) -> list[str]:
        """Return the names of the folders directly below, sorted; none if there is nothing."""
        with _explained(self.uri, "list"):
            found = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def files(self) -> dict[str, int]:
        """Return name -> bytes of everything that is published here; empty if nothing is.

        Raises:
            DataError: the manifest is damaged.
        """
        manifest = self._manifest() or {"files": {}}
        return {name: entry["bytes"] for name, entry in manifest["files"].items()}

    def newest(self, pattern: str) -> bytes | None:
        """Return the content of the last file, by name, that matches; None without one.

        Of files that others write here directly: nothing is checked.
        """
        with _explained(self.uri, "read"):
            found = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
            names = [info.base_name for info in found if _matches(info.base_name, [pattern])]
            if not names:
                return None
            with self.filesystem.open_input_stream(f"{self.path}/{max(names)}") as stream:
                content: bytes = stream.read()
        return content

    def require_writable(self) -> None:
        """Write and delete a small object.

        Raises:
            ResourceError: that fails; the text says what to check.
        """
        path = f"{self.path}/.writable-{uuid.uuid4().hex[:8]}"
        with _explained(self.uri, "write to"):
            self._write(path, b"1")
            self.filesystem.delete_file(path)

    def publish(self, folder: Path, *, leave_out: Sequence[str] = (), alone: bool = True) -> None:
        """Make this the state of ``folder``, in one step; files that ``folder`` lacks stay.

        Files that are being appended to, or replaced by renaming, may go on changing meanwhile:
        each is published as it was when it was opened. Dot files are left out.

        Args:
            folder: what to publish; remembers in a dot file that it was.
            leave_out: patterns of names that are not published ("train/*").
            alone: refuse if somebody else has published here since ``folder`` was published or
                fetched. False where whoever publishes has the same content.

        Raises:
            RunError: see ``alone``; or a file was overwritten while it was read.
            ResourceError: the store cannot be written.
        """
        there = self._manifest()
        if alone and there is not None and there != _remembered(folder):
            raise RunError(
                f"{self.uri} was published from elsewhere while {folder} was at work: let only one "
                f"of them go on, and continue it with robustft resume {self.uri}"
            )
        known: Mapping[str, Any] = there["files"] if there is not None else {}

        def send(name: str) -> tuple[str, dict[str, Any]]:
            return name, self._upload(folder / name, name, known.get(name))

        sent = dict(_parallel(send, list(_published_names(folder, leave_out))))
        files = {**known, **sent}
        if there is None or files != known:
            revision = 1 if there is None else there["revision"] + 1
            there = {"revision": revision, "files": files, "sha256": _files_digest(files)}
            with _explained(self.uri, "write to"):
                self._write(f"{self.path}/{MANIFEST}", _json_bytes(there))
        _remember(folder, there)

    def fetch(
        self, folder: Path, *, only: str = "", without: Sequence[str] = (), ours: bool = False
    ) -> None:
        """Bring what is published here to ``folder``, every file checked against its digest.

        Args:
            folder: where to; what is there with the right digest is not fetched again.
            only: beginning of the names to fetch ("stages/"); "" is everything.
            without: patterns of names to leave ("*.safetensors").
            ours: ``folder`` is where the work goes on. If nobody has published since it last did,
                its files are at least as new and only missing ones are fetched.

        Raises:
            DataError: nothing is published here; a file or the manifest is damaged or missing.
            ResourceError: the store cannot be read or ``folder`` not be written.
        """
        manifest = self._manifest()
        if manifest is None:
            raise DataError(
                f"nothing is published at {self.uri} (no {MANIFEST}): see what is there with "
                "robustft ls runs"
            )
        keep = ours and manifest == _remembered(folder)

        def bring(name: str) -> None:
            entry, target = manifest["files"][name], folder / name
            if target.is_file() and (keep or _file_digest(target) == entry["sha256"]):
                return
            self._download(name, entry, target)

        wanted = [name for name in manifest["files"] if name.startswith(only)]
        _parallel(bring, [name for name in wanted if not _matches(name, without)])
        _remember(folder, manifest)

    def _manifest(self) -> dict[str, Any] | None:
        """Return the manifest, or None if nothing is published here."""
        path = f"{self.path}/{MANIFEST}"
        try:
            with (
                _explained(f"{self.uri}/{MANIFEST}", "read"),
                self.filesystem.open_input_stream(path) as stream,
            ):
                text = stream.read()
        except FileNotFoundError:
            return None
        try:
            manifest: dict[str, Any] = json.loads(text)
            whole = manifest["sha256"] == _files_digest(manifest["files"])
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole or not all(map(_is_name, manifest["files"])):
            raise DataError(
                f"{self.uri}/{MANIFEST} is damaged: restore an earlier version of it, or delete it "
                "and publish again from where the run was made (robustft resume)"
            )
        return manifest

    def _upload(self, path: Path, name: str, known: Mapping[str, Any] | None) -> dict[str, Any]:
        """Upload a file unless the manifest has it as it is; return its entry there."""
        # One open file for both passes: a rename cannot change it, and appending only behind size.
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256()
            for block in _blocks(file, size):
                digest.update(block)
            entry = {"sha256": digest.hexdigest(), "bytes": size}
            if entry == known:
                return entry
            again = hashlib.sha256()
            file.seek(0)
            where = self._object(name, entry)
            with (
                _explained(f"{self.uri}/{name}", "write"),
                self.filesystem.open_output_stream(where) as stream,
            ):
                for block in _blocks(file, size):
                    again.update(block)
                    stream.write(block)
        if again.digest() != digest.digest():
            raise RunError(f"{path} was overwritten while it was published: publish it again")
        return entry

    def _download(self, name: str, entry: Mapping[str, Any], target: Path) -> None:
        digest = hashlib.sha256()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"cannot write {target.parent} ({error.strerror})") from error
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        where = self._object(name, entry)
        try:
            with (
                _explained(f"{self.uri}/{name}", "read"),
                self.filesystem.open_input_stream(where) as stream,
                temporary.open("wb") as file,
            ):
                while block := stream.read(BLOCK):
                    digest.update(block)
                    file.write(block)
            if digest.hexdigest() != entry["sha256"]:
                raise DataError(_damaged(f"{self.uri}/{name}", where, "its digest is wrong"))
            os.replace(temporary, target)
        except FileNotFoundError as error:
            raise DataError(_damaged(f"{self.uri}/{name}", where, "it is gone")) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _object(self, name: str, entry: Mapping[str, Any]) -> str:
        """Return where the content of a file lies: beside its name, its digest."""
        path = PurePosixPath(name)
        stamped = f"{path.stem}.{entry['sha256'][:16]}{path.suffix}"
        where = f"{self.path}/{FILES}/{path.with_name(stamped)}"
        if isinstance(self.filesystem, fs.LocalFileSystem):
            self.filesystem.create_dir(str(PurePosixPath(where).parent))
        return where

    def _write(self, path: str, content: bytes) -> None:
        """Write a small object in one step."""
        if not isinstance(self.filesystem, fs.LocalFileSystem):
            # Object stores show an object when it is complete, and not before.
            with self.filesystem.open_output_stream(path) as stream:
                stream.write(content)
            return
        self.filesystem.create_dir(self.path)
        temporary = f"{path}.{uuid.uuid4().hex[:8]}"
        with self.filesystem.open_output_stream(temporary) as stream:
            stream.write(content)
        self.filesystem.move(temporary, path)


def working_folder(uri: str) -> Path:
    """Return the local folder in which runs of the store ``uri`` are at work, in ROBUSTFT_HOME."""
    return home().resolve() / "stores" / _short(uri)


def fetched(place: str | Path, *, without: Sequence[str] = ()) -> Path:
    """Return a local folder with what ``place`` holds: a path itself, or a checked copy of a URI.

    A URI may name a published folder or a part of one (``<run>/stages/rift``). The copy is kept in
    ROBUSTFT_HOME and its digests are compared again every time.

    Args:
        place: path or URI.
        without: patterns of names that are not needed ("*.safetensors").

    Raises:
        ConfigError, DataError, ResourceError: see ``open_store`` and ``Store.fetch``.
    """
    if not is_uri(place):
        return Path(place)
    folder = local_path(str(place))
    if folder is not None and not (folder / MANIFEST).is_file():
        return folder
    store, inner = open_store(str(place)), ""
    while not store.exists() and store.path.count("/") > 1:
        above, _, name = store.uri.rpartition("/")
        inner, store = f"{name}/{inner}", open_store(above)
    if not store.exists():
        store, inner = open_store(str(place)), ""
    copy = home().resolve() / "fetched" / _short(store.uri)
    store.fetch(copy, only=inner, without=without)
    return copy / inner


def _options(scheme: str) -> str:
    """Return what pyarrow is to do beside what it does by itself."""
    if scheme != "s3":
        return ""
    # Without a region pyarrow asks AWS for the bucket's, whatever the environment says.
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    # A small object is one request in place of three.
    return "?allow_delayed_open=true" + (f"&region={quote(region)}" if region else "")


def _is_name(name: str) -> bool:
    """Return whether ``name`` stays inside of the folder that it is appended to."""
    parts = name.split("/")
    return not NOT_A_NAME.search(name) and not any(part in ("", ".", "..") for part in parts)


@contextlib.contextmanager
def _explained(what: str, verb: str) -> Iterator[None]:
    """Turn what pyarrow says of a store into a sentence; what does not exist is the caller's."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ResourceError(
            f"cannot {verb} {what} ({reason}): check that the bucket exists, that this machine has "
            "credentials for it (AWS_ACCESS_KEY_ID and the like, or a role) and, for an "
            "S3-compatible server, AWS_ENDPOINT_URL"
        ) from error


def _damaged(what: str, where: str, how: str) -> str:
    return (
        f"{what} is damaged ({where}: {how}): restore that object's earlier version, or publish it "
        "again from where it was made (robustft resume)"
    )


def _published_names(folder: Path, leave_out: Sequence[str]) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        # A link may lead anywhere; a name that cannot be fetched again is not published either.
        if hidden or path.is_symlink() or not path.is_file() or not _is_name(name):
            continue
        if not _matches(name, leave_out):
            yield name


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _parallel(work: Callable[[ItemT], ValueT], items: Sequence[ItemT]) -> list[ValueT]:
    with ThreadPoolExecutor(THREADS, thread_name_prefix="robustft-storage") as pool:
        return list(pool.map(work, items))


def _blocks(file: Any, size: int) -> Iterator[bytes]:
    while size > 0 and (block := file.read(min(BLOCK, size))):
        size -= len(block)
        yield block


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files_digest(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _json_bytes(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()


def _remember(folder: Path, manifest: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{REMEMBERED}.{uuid.uuid4().hex[:8]}"
    temporary.write_bytes(_json_bytes(manifest))
    os.replace(temporary, folder / REMEMBERED)


def _remembered(folder: Path) -> Any:
    """Return the manifest that ``folder`` was last published as; None if never, or unreadable."""
    try:
        return json.loads((folder / REMEMBERED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _short(uri: str) -> str:
    """Return a folder name for ``uri`` that people recognise."""
    digest = hashlib.sha256(uri.rstrip("/").encode()).hexdigest()[:10]
    words = re.sub(r"[^A-Za-z0-9_-]+", "-", uri.partition("://")[2]).strip("-")
    return f"{words[-60:]}-{digest}"
