"""Every experiment as a Ray job, with nothing else to set: its tables outlive the job's folder."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from robustft.runtime.experiment import RuntimeConfig
from robustft.runtime.session import default_output, storage_root

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "experiments").glob("*.py"))
RUN_FOLDER_ONLY = ("multinorm_finetune", "rift_sweep")
"""Scripts without tables of their own: ``run`` chooses the folder, by ``storage_root``."""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be the driver of a Ray job; return the storage root."""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("ROBUSTFT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ROBUSTFT_STORAGE", raising=False)
    (tmp_path / "copy").mkdir()
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "home" / "runs"


@pytest.fixture(params=SCRIPTS, ids=lambda path: path.stem)
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path: Path = request.param
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


def test_there_are_experiments() -> None:
    assert len(SCRIPTS) > 8


def test_tables_go_beside_the_runs(script: ModuleType, job: Path) -> None:
    assert storage_root(RuntimeConfig()) == job
    source = Path(str(script.__file__)).read_text(encoding="utf-8")
    assert 'Path("runs")' not in source, "a job would write into its temporary copy"
    if script.__name__ in RUN_FOLDER_ONLY:
        assert not hasattr(script, "Options")
        return
    output = script.Options().output
    if output is None:  # its name is that of the preset, which is read later
        assert "options.output or default_output(" in source
        return
    assert output.parent == job


def test_what_is_set_decides(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_output("tables") == job / "tables"
    monkeypatch.setenv("ROBUSTFT_STORAGE", str(tmp_path / "disk"))
    assert default_output("tables") == tmp_path / "disk" / "tables"
    monkeypatch.delenv("ROBUSTFT_STORAGE")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert default_output("tables") == tmp_path / "copy" / "runs" / "tables"
