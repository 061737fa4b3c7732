"""Object storage: a folder is published whole or not at all, and every byte is checked on read."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from object_store import BUCKET, served_bucket
from pyarrow import fs

from robustft.data import storage
from robustft.data.storage import (
    MANIFEST,
    Store,
    fetched,
    is_uri,
    local_path,
    open_store,
    require_uri,
    working_folder,
)
from robustft.errors import ConfigError, DataError, ResourceError, RunError

SECRET = "wJalrXUtnFEMI"

served = pytest.fixture(scope="module")(served_bucket)


@pytest.fixture
def bucket(served: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in served.items():
        monkeypatch.setenv(name, value)
    return BUCKET


@pytest.fixture(params=["s3", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty folder in an S3-compatible server, and one of the local file system."""
    if request.param == "file":
        return open_store(f"file://{tmp_path}/store").inside("run")
    root = open_store(request.getfixturevalue("bucket"))
    return root.inside(f"{tmp_path.parent.name}-{tmp_path.name}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    (folder / "model").mkdir(parents=True)
    (folder / "run.json").write_text('{"run_id": "1"}')
    (folder / "model" / "weights.safetensors").write_bytes(bytes(range(256)) * 40)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of every file, without those that remember."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files
        if not path.name.startswith(".")
    }


def objects(store: Store) -> dict[str, int]:
    """Name -> bytes of everything that lies in a store, published or not."""
    found = store.filesystem.get_file_info(fs.FileSelector(store.path, recursive=True))
    return {i.path.removeprefix(store.path + "/"): i.size for i in found if i.is_file}


def overwrite(store: Store, name: str, change: Any) -> None:
    path = f"{store.path}/{name}"
    with store.filesystem.open_input_stream(path) as stream:
        old = stream.read()
    with store.filesystem.open_output_stream(path) as stream:
        stream.write(change(old))


# --- round trips ---------------------------------------------------------------------------------


def test_what_is_published_can_be_fetched(store: Store, folder: Path, tmp_path: Path) -> None:
    assert not store.exists()
    assert store.files() == {}
    assert store.names() == []
    store.publish(folder)
    assert store.exists()
    assert store.files() == {name: len(data) for name, data in content(folder).items()}
    store.fetch(tmp_path / "copy")
    assert content(tmp_path / "copy") == content(folder)


def test_publishing_again_sends_only_what_has_changed(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    store.publish(folder)
    before = objects(store)
    store.publish(folder)
    assert objects(store) == before
    (folder / "run.json").write_text('{"run_id": "2"}')
    (folder / "new.txt").write_text("new")
    (folder / ".hidden").write_text("no")
    (folder / "train").mkdir()
    (folder / "train" / "state.pt").write_text("no")
    store.publish(folder, leave_out=["train/*"])
    assert set(store.files()) == {"run.json", "new.txt", "model/weights.safetensors"}
    assert len(objects(store)) == len(before) + 2
    store.fetch(tmp_path / "copy")
    assert (tmp_path / "copy" / "run.json").read_text() == '{"run_id": "2"}'


def test_a_part_of_a_folder_leaves_the_rest_published(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    store.publish(folder)
    copy = tmp_path / "copy"
    store.fetch(copy, without=["*.safetensors"])
    assert list(content(copy)) == ["run.json"]
    (copy / "report.html").write_text("page")
    store.publish(copy)
    assert set(store.files()) == {"run.json", "report.html", "model/weights.safetensors"}


def test_a_folder_that_is_ahead_keeps_its_files_and_one_that_is_behind_gets_them(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    store.publish(folder)
    (folder / "run.json").write_text("ahead")
    store.fetch(folder, ours=True)
    assert (folder / "run.json").read_text() == "ahead"
    other = tmp_path / "other"
    store.fetch(other, ours=True)
    (other / "run.json").write_text("further")
    store.publish(other)
    with pytest.raises(RunError, match="published from elsewhere"):
        store.publish(folder)
    store.fetch(folder, ours=True)
    assert (folder / "run.json").read_text() == "further"
    store.publish(folder)


def test_a_uri_of_a_part_is_fetched_and_checked_every_time(
    bucket: str, folder: Path, tmp_path: Path
) -> None:
    store = open_store(bucket).inside(tmp_path.name).inside("run")
    store.publish(folder)
    part = fetched(f"{store.uri}/model")
    assert list(content(part)) == ["weights.safetensors"]
    (part / "weights.safetensors").write_bytes(b"decayed")
    assert content(fetched(f"{store.uri}/model")) == content(folder / "model")
    assert fetched(folder) == folder
    assert fetched(f"file://{folder}") == folder
    with pytest.raises(DataError, match="nothing is published at"):
        fetched(f"{bucket}/none/at/all")


# --- whole or not at all -------------------------------------------------------------------------


class Killed(BaseException):
    """What a process that dies never gets to see."""


def test_a_publisher_that_dies_before_the_manifest_leaves_nothing_visible(
    store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Store, "_write", die)
        with pytest.raises(Killed):
            store.publish(folder)
    assert len(objects(store)) == 2
    assert not store.exists()
    with pytest.raises(DataError, match="nothing is published"):
        store.fetch(tmp_path / "copy")
    store.publish(folder)

    first = content(folder)
    (folder / "run.json").write_text("newer")
    with monkeypatch.context() as patched:
        patched.setattr(Store, "_write", die)
        with pytest.raises(Killed):
            store.publish(folder)
    store.fetch(tmp_path / "copy")
    assert content(tmp_path / "copy") == first
    store.publish(folder)


def test_a_killed_process_leaves_nothing_visible(bucket: str, folder: Path) -> None:
    """The same with SIGKILL, in the middle of an upload."""
    store = open_store(bucket).inside(folder.parent.name)
    code = """
import os, signal, sys
from pathlib import Path
from robustft.data.storage import Store, open_store
whole = Store._upload
def upload(self, path, name, known):
    if name == "run.json":
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, path, name, known)
Store._upload = upload
open_store(sys.argv[1]).publish(Path(sys.argv[2]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, store.uri, str(folder)], timeout=60, check=False
    )
    assert done.returncode == -9
    assert not store.exists()
    store.publish(folder)
    assert set(store.files()) == {"run.json", "model/weights.safetensors"}


def test_of_concurrent_publishers_a_reader_sees_one_whole(store: Store, tmp_path: Path) -> None:
    folders = []
    for number in range(3):
        folder = tmp_path / f"writer-{number}"
        folder.mkdir()
        for name in ("a.txt", "b.txt", "c.txt"):
            (folder / name).write_text(f"of {number}")
        folders.append(folder)
    barrier = threading.Barrier(len(folders))

    def publish(folder: Path) -> None:
        barrier.wait()
        store.publish(folder, alone=False)

    threads = [threading.Thread(target=publish, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for number in range(20):
        if store.exists():
            store.fetch(tmp_path / f"reader-{number}")
            assert len(set(content(tmp_path / f"reader-{number}").values())) == 1
        if not any(thread.is_alive() for thread in threads):
            break
    for thread in threads:
        thread.join()
    store.fetch(tmp_path / "last")
    assert content(tmp_path / "last") in [content(folder) for folder in folders]


def test_a_file_that_grows_meanwhile_is_published_as_it_was(
    store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = folder / "records.jsonl"
    records.write_text("one\n")
    object_of = Store._object

    def grow(self: Store, name: str, entry: Any) -> str:
        if name == records.name:
            with records.open("a") as file:
                file.write("two\n")
        return object_of(self, name, entry)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "_object", grow)
        store.publish(folder)
    store.fetch(tmp_path / "copy")
    assert (tmp_path / "copy" / records.name).read_text() == "one\n"


def test_a_file_that_is_overwritten_meanwhile_is_not_published(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    object_of = Store._object

    def overwritten(self: Store, name: str, entry: Any) -> str:
        with (folder / name).open("r+b") as file:
            file.write(b"#")
        return object_of(self, name, entry)

    monkeypatch.setattr(Store, "_object", overwritten)
    with pytest.raises(RunError, match="was overwritten while it was published"):
        store.publish(folder)
    assert not store.exists()


# --- damage --------------------------------------------------------------------------------------


def flip(data: bytes) -> bytes:
    return data[:5] + bytes([data[5] ^ 1]) + data[6:]


@pytest.mark.parametrize("change", [flip, lambda data: data[:-1], lambda data: b""])
def test_a_damaged_object_is_named_and_not_left_behind(
    change: Any, store: Store, folder: Path, tmp_path: Path
) -> None:
    store.publish(folder)
    (name,) = (name for name in objects(store) if name.endswith(".safetensors"))
    overwrite(store, name, change)
    with pytest.raises(DataError, match=r"model/weights\.safetensors is damaged .*digest is wrong"):
        store.fetch(tmp_path / "copy")
    assert not list((tmp_path / "copy" / "model").iterdir())


def test_an_object_that_is_gone_is_named(store: Store, folder: Path, tmp_path: Path) -> None:
    store.publish(folder)
    (name,) = (name for name in objects(store) if name.endswith(".safetensors"))
    store.filesystem.delete_file(f"{store.path}/{name}")
    with pytest.raises(DataError, match=r"weights\.safetensors is damaged .*it is gone"):
        store.fetch(tmp_path / "copy")


def renamed(data: bytes) -> bytes:
    """A manifest that names another file than was published."""
    return data.replace(b"run.json", b"run.jsom")


@pytest.mark.parametrize("change", [renamed, lambda data: data[:-9], lambda data: b"[]"])
def test_a_damaged_manifest_is_refused(change: Any, store: Store, folder: Path) -> None:
    store.publish(folder)
    overwrite(store, MANIFEST, change)
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        store.exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a//b", "a/./b", "a\\b", "", ".."])
def test_names_that_lead_out_are_refused(
    name: str, store: Store, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="names nothing inside"):
        store.inside(name)
    store.publish(folder)

    def hostile(data: bytes) -> bytes:
        manifest = json.loads(data)
        manifest["files"][name] = manifest["files"].pop("run.json")
        manifest["sha256"] = storage._files_digest(manifest["files"])
        return json.dumps(manifest).encode()

    overwrite(store, MANIFEST, hostile)
    with pytest.raises(DataError, match="is damaged"):
        store.fetch(tmp_path / "copy")
    assert not (tmp_path / "outside").exists()


def test_links_are_not_followed(store: Store, folder: Path) -> None:
    (folder / "link").symlink_to("/etc/hostname")
    store.publish(folder)
    assert "link" not in store.files()


# --- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://AKIA:{SECRET}@bucket/prefix",
        f"s3://{SECRET}@bucket/prefix",
        f"s3://bucket/prefix?secret_key={SECRET}",
        f"s3://bucket/prefix?region={SECRET}",
        f"s3://bucket/prefix#{SECRET}",
        f"abfs://container:{SECRET}@account/x",
        f"https://user:{SECRET}@bucket/prefix",
    ],
)
def test_secrets_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    from robustft.runtime.experiment import RuntimeConfig

    for use in (open_store, require_uri, fetched, lambda uri: RuntimeConfig(storage=uri)):
        with pytest.raises(ConfigError) as refused:
            use(uri)
        assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    ("uri", "remedy"),
    [
        ("ftp://host/x", "begins with one of"),
        ("s3:///prefix", "names no bucket"),
        ("s3://bucket/../other", "leads out"),
        ("file://host/x", "no absolute path"),
        ("runs", "give a path, or a URI"),
    ],
)
def test_what_is_no_store_is_refused(uri: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        open_store(uri)


def test_addresses_and_their_local_folders() -> None:
    assert is_uri("s3://bucket")
    assert not is_uri("runs/a")
    assert local_path("file:///shared/my%20runs") == Path("/shared/my runs")
    assert local_path("s3://bucket/x") is None
    one, other = working_folder("s3://bucket/x"), working_folder("s3://bucket-x")
    assert one != other
    assert working_folder("s3://bucket/x/") == one
    assert one.is_relative_to(Path(os.environ["ROBUSTFT_HOME"]).resolve())


def test_a_store_that_cannot_be_written_names_the_remedy(bucket: str) -> None:
    open_store(bucket).require_writable()
    assert not any(".writable" in name for name in objects(open_store(bucket)))
    with pytest.raises(ResourceError, match="check that the bucket exists"):
        Store("s3://none/x", open_store(bucket).filesystem, "none/x").require_writable()


def test_credentials_do_not_travel_with_a_store(bucket: str) -> None:
    (options,) = open_store(bucket).filesystem.__reduce__()[1]
    assert options["access_key"] is None
    assert options["secret_key"] is None
