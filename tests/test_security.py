"""Secrets stay where they are, foreign files run nothing, names stay in their folder, pages escape.

Planted secrets are looked for in every file that a run leaves. What single modules promise is
tested beside them: members of wheels in ``data/test_assets.py``, foreign statistics in
``methods/test_instance_legacy.py``, weights in ``models``, each page's escaping in ``evaluation``,
what is shipped to clusters in ``runtime/test_submit.py`` and ``deploy``.
"""

import ast
import hashlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from robustft.data import download
from robustft.errors import ConfigError, DataError
from robustft.evaluation import report
from robustft.runtime import doctor, preflight, recording
from robustft.runtime.experiment import Experiment, experiment_from_dict
from robustft.runtime.resumable import resumable
from robustft.runtime.submit import prepare
from robustft.runtime.tracking import Tracker

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "library" / "robustft"
# The port refuses: records wait in the run's folder, where they are looked for.
URI = "http://me:planted-uri-c0de@127.0.0.1:1"
PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws-4f1c",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-77aa",
    "HF_TOKEN": "planted-hf-09be",
    "MLFLOW_TRACKING_URI": URI,
}
MARK = b"planted-"
EVIL = "<script>alert(1)</script>"


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set secrets in the environment, where they belong."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")


def holding(folder: Path, mark: bytes = MARK) -> list[str]:
    """Return the files below ``folder`` that hold ``mark``; sockets and the like are no files."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert files, "nothing to look at"
    return [str(path.relative_to(folder)) for path in files if mark in path.read_bytes()]


def experiment(storage: Path, **changes: Any) -> Experiment:
    values: dict[str, Any] = {
        "name": "mine",
        "start": {"method": {"name": "at", "epochs": 1}},
        "method": {"name": "rft", "epochs": 1},
        "task": {"limit_train": 20, "limit_val": 20, "limit_test": 20},
        "runtime": {"storage": str(storage)},
    }
    return experiment_from_dict({**values, **changes})


# --- secrets -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("planted")
def test_what_a_run_writes_first_holds_no_secret(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wanted = experiment(tmp_path)
    with resumable(None, tmp_path, wanted) as directory:
        tracker = Tracker(directory, experiment=wanted.name, storage=tmp_path)
        parent = recording.start_parent(tracker, wanted, directory)
        listener = recording.TrackingListener(tracker, parent)
        event = {"stage": "search", "run": "lr=1", "values": {"lr": 1}}
        listener({"kind": "begin", **event})
        # What goes wrong often quotes what it was given.
        error = f"cannot reach {os.environ['MLFLOW_TRACKING_URI']}"
        listener({"kind": "end", **event, "error": error, "metrics": {}})
        tracker.close(timeout=0.01)
    written = (directory / "tracking" / "records.jsonl").read_text(encoding="utf-8")
    assert "cannot reach http://***@127.0.0.1:1" in written
    assert holding(tmp_path) == []
    ours = [record for record in caplog.records if record.name.startswith("robustft")]
    assert ours
    assert "planted-" not in "".join(record.getMessage() for record in ours)


@pytest.mark.usefixtures("planted")
def test_what_is_said_before_a_run_holds_no_secret(tmp_path: Path) -> None:
    found = list(preflight._check_tracking(experiment(tmp_path)))
    said = "".join(f"{finding}" for finding in found)
    assert "http://***@127.0.0.1:1 does not answer" in said
    uri = os.environ["MLFLOW_TRACKING_URI"]
    said += "".join(map(str, doctor.check_tracking(uri, os.environ)))
    assert "planted-" not in said


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"runtime": {"tracking_uri": URI}}, "runtime.tracking_uri"),
        ({"name": "a", "start": {"checkpoint": "https://me:planted-x@h/w.pt"}}, "start.checkpoint"),
        ({"task": {"root": "http://h/x?token=planted-token"}}, "task.root"),
    ],
)
def test_a_configuration_with_a_password_is_refused_before_it_is_stored(
    changes: dict[str, Any], field: str, tmp_path: Path
) -> None:
    task: Any = None
    with pytest.raises(ConfigError, match=f"{field} holds a password") as refused:
        # What `run` calls before it makes the run's folder.
        preflight.refuse(experiment(tmp_path, **changes), task, task, tmp_path)
    assert "planted-" not in str(refused.value)


def test_validate_finds_the_password_as_well(tmp_path: Path) -> None:
    found = preflight.validate(experiment(tmp_path, runtime={"tracking_uri": URI}))
    errors = [finding.text for finding in found if finding.level == "error"]
    assert [text.partition(" ")[0] for text in errors] == ["runtime.tracking_uri"]
    assert "planted-" not in f"{found}"


def test_addresses_without_a_password_are_no_secret(tmp_path: Path) -> None:
    plain = {"tracking_uri": "http://mlflow:5000/x?page=2", "storage": str(tmp_path)}
    assert list(preflight._check_secrets(experiment(tmp_path, runtime=plain))) == []


def test_a_job_is_shipped_without_the_environment() -> None:
    variables = {**PLANTED, "MLFLOW_TRACKING_URI": "http://mlflow:5000"}
    job = prepare(ROOT / "experiments" / "rift_sweep.py", ("--seed", "1"), variables=variables)
    assert "planted-" not in f"{job}"
    assert job.runtime_env["env_vars"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    with pytest.raises(ConfigError, match="holds a password"):
        prepare(ROOT / "experiments" / "rift_sweep.py", (), variables=PLANTED)


# --- foreign files -------------------------------------------------------------------------------

TRUSTED = {
    # Both name what they may build: numbers, strings, lists, dicts, and arrays for CIFAR.
    ("methods/instance_legacy.py", "find_class"),
    ("data/pickles.py", "find_class"),
}
FORBIDDEN = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load"),
    *("eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "marshal.loads"),
    *("shutil.unpack_archive",),
}


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Yield (file, what is called, the call) for every call in the library."""
    for path in sorted(LIBRARY.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path.relative_to(LIBRARY).as_posix(), ast.unparse(node.func), node


def option(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def test_nothing_foreign_is_unpickled_or_run() -> None:
    wrong, loads = [], 0
    for file, called, call in calls():
        if called in FORBIDDEN or called.endswith((".extractall", ".extract")):
            wrong.append((file, called))
        if called == "torch.load":
            loads += 1
            if option(call, "weights_only") != "True":
                wrong.append((file, called))
        bad = {"allow_pickle": "True", "shell": "True", "trust_remote_code": "True"}
        wrong += [(file, name) for name, value in bad.items() if option(call, name) == value]
    assert wrong == []
    assert loads >= 2


def test_unpicklers_of_our_own_choose_what_is_built() -> None:
    found = set()
    for path in LIBRARY.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(
                ast.unparse, node.bases
            ):
                methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
                file = path.relative_to(LIBRARY).as_posix()
                found |= {(file, name) for name in methods & {"find_class"}} or {(file, "none")}
    assert found == TRUSTED


# --- names and archives --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../up", "..", ".", "", "a/b", "a\\b", "/etc", "a\0b", "a b", "~", "-x", "a\n", "ä"]
)
def test_names_that_could_leave_their_folder_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names a folder"):
        experiment(tmp_path, name=name)


def test_a_published_archive_that_was_exchanged_is_refused_before_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets
    from torchvision.datasets import utils

    evil = io.BytesIO()
    with tarfile.open(fileobj=evil, mode="w:gz") as archive:
        member = tarfile.TarInfo("../outside.txt")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))
    served = []

    def serve(url: str, filename: str | Path, *_: Any, **__: Any) -> None:
        served.append(url)
        Path(filename).write_bytes(evil.getvalue())

    monkeypatch.setattr(utils, "_urlretrieve", serve)
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, **_: url)
    opened: list[object] = []
    monkeypatch.setattr(utils, "extract_archive", lambda archive, *_: opened.append(archive))
    with pytest.raises(DataError, match="cannot fetch CIFAR10"):
        download.download("CIFAR10", tmp_path / "data")
    assert served
    assert opened == []
    # With the right checksum it would have been opened: that is what is being relied on.
    digest = hashlib.md5(evil.getvalue(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", digest)
    download.download("CIFAR10", tmp_path / "other")
    assert len(opened) == 1


@pytest.mark.parametrize("name", ["../../up", "/etc/cron.d/x", "a;rm -rf ~", "$(id)"])
def test_a_submission_id_holds_only_tame_characters(name: str, tmp_path: Path) -> None:
    (tmp_path / "runtime_env.yaml").write_text("working_dir: .\n")
    script = tmp_path / (name.replace("/", "_") + ".py")
    script.write_text("")
    job = prepare(script, ("; id",), variables={})
    assert re.fullmatch(r"[a-z0-9-]+", job.stem)
    assert job.entrypoint.endswith("'; id'")


# --- pages ---------------------------------------------------------------------------------------


def test_every_template_escapes_and_none_says_otherwise() -> None:
    templates = sorted((LIBRARY / "evaluation" / "templates").glob("*.html.j2"))
    assert len(templates) >= 7
    for path in templates:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\|\s*safe\b|autoescape\s+false", text), path.name
        # Inside a script only JSON may stand, which Jinja writes without < > & and '.
        for script in re.findall(r"<script\b[^>]*>(.*?)</script>", text, flags=re.S):
            for shown in re.findall(r"\{\{(.*?)\}\}", script):
                assert shown.strip().endswith("| tojson"), (path.name, shown)
    assert report._template("parts.html.j2").environment.autoescape is True


def test_pages_allow_no_foreign_content() -> None:
    base = (LIBRARY / "evaluation" / "templates" / "base.html.j2").read_text(encoding="utf-8")
    assert "default-src 'none'" in base
    for path in (LIBRARY / "evaluation" / "templates").glob("*.j2"):
        assert not re.search(r"(src|href)=\"?https?:", path.read_text(encoding="utf-8")), path.name


# --- a whole run ---------------------------------------------------------------------------------


def evil_pictures(folder: Path) -> Path:
    """Write a data set whose classes are named like a script."""
    sys.path.insert(0, str(ROOT / "tests" / "runtime"))
    try:
        from small import write_pictures
    finally:
        sys.path.pop(0)
    root: Path = write_pictures(folder, num_classes=4)
    for path in root.glob("*.parquet"):
        names = json.dumps([f"{EVIL}{label}" for label in range(4)])
        pq.write_table(pq.read_table(path).replace_schema_metadata({"class_names": names}), path)
    return root


ATTACK = {"num_steps": 1, "step_size": 0.05}
SCHEDULE = {"name": "constant"}
SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 20, "schedule": SCHEDULE}
SHORT |= {"attack": ATTACK, "val_attack": ATTACK}
EVALUATION = {"pgd_steps": 1, "apgd_steps": 2, "severities": [1], "corruption_limit": 4}


@pytest.mark.cluster
@pytest.mark.slow
def test_a_whole_run_leaves_no_secret_and_no_script(tmp_path: Path) -> None:
    values = {
        "name": "planted",
        "task": {"data": "parquet", "root": str(evil_pictures(tmp_path / "data")), "val_size": 8},
        "start": {"model": "small_resnet", "method": {"name": "at", **SHORT}},
        "method": {"name": "at", **SHORT},
        "search": {"space": {"lr": [0.01, 0.02]}},
        "evaluation": {**EVALUATION, "sanity": False},
    }
    path = tmp_path / "planted.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    # Ray's sockets need a short path; its logs are looked at as well.
    ray = Path(tempfile.mkdtemp(prefix="rp", dir="/tmp"))
    own = {"ROBUSTFT_STORAGE": str(tmp_path / "runs"), "ROBUSTFT_HOME": str(tmp_path / "home")}
    variables = {**os.environ, **PLANTED, **own, "RAY_TMPDIR": str(ray)}

    def robustft(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "robustft.cli", *words],
            env={**variables, **more},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    run = robustft("search", str(path))
    (directory,) = (tmp_path / "runs" / "planted").iterdir()
    store = f"sqlite:///{tmp_path}/mlflow.db"
    synced = robustft("sync", str(directory), MLFLOW_TRACKING_URI=store)
    said = run.stdout + run.stderr + synced.stdout + synced.stderr
    assert "planted-" not in said
    assert (tmp_path / "mlflow.db").stat().st_size > 100_000
    assert holding(tmp_path) == []
    assert holding(ray) == []
    shutil.rmtree(ray)
    # The same search finds what is there.
    assert holding(tmp_path, b"planted")
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert "alert(1)" not in re.sub(r"&lt;script&gt;alert\(1\)&lt;/script&gt;", "", page)
    assert "<script>alert" not in page
    for other in directory.rglob("*.html"):
        assert "<script>alert" not in other.read_text(encoding="utf-8"), other
