"""The project as a whole: its public face, its rooms, its presets, and what it ships."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import robustft
from robustft.runtime.experiment import experiment_from_dict, experiment_to_dict, load_experiment

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "library" / "robustft"
SOURCES = sorted(LIBRARY.rglob("*.py"))
PRESETS = sorted((ROOT / "experiments" / "presets").glob("*.yaml"))
TOP_LEVEL = {
    "cli",
    "cluster_verbs",
    "compare_verb",
    "config",
    "datamap_verb",
    "errors",
    "evaluate_verb",
    "listing",
    "parsing",
    "surface_verb",
    "threat",
    "verbs",
}


def run_python(code: str) -> str:
    """Run ``code`` in a fresh interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the public face -----------------------------------------------------------------------------


def test_all_is_sorted_and_every_name_resolves() -> None:
    names = robustft.__all__
    # The order that ruff (RUF022) keeps: constants, then classes, then the rest.
    constants = [name for name in names if name.isupper()]
    classes = [name for name in names if name[0].isupper() and not name.isupper()]
    rest = [name for name in names if not name[0].isupper()]
    assert names == sorted(constants) + sorted(classes) + sorted(rest)
    assert len(set(names)) == len(names)
    for name in names:
        assert getattr(robustft, name) is not None
    assert dir(robustft) == sorted(names)


def test_all_is_what_type_checkers_see() -> None:
    tree = ast.parse((LIBRARY / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = [
        alias.asname or alias.name
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(seen) == sorted(set(robustft.__all__) - {"__version__"})


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'pgdd'"):
        robustft.pgdd  # noqa: B018  the access is the test


def test_the_version_is_the_installed_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", robustft.__version__)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "robustft.__version__"}


@pytest.mark.parametrize("module", ["robustft", "robustft.cli", "robustft.config"])
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    heavy = ("torch", "ray", "mlflow", "numpy", "deepspeed")
    printed = run_python(
        f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    )
    assert printed.strip() == "[]"


# --- rooms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(LIBRARY)))
def test_source_files_keep_the_house_rules(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    assert text.count("\n") <= 600
    tree = ast.parse(text)
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "print" not in called
    too_long = [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno > 120
    ]
    assert not too_long
    if path.name != "__main__.py" and len(tree.body) > 1:
        assert ast.get_docstring(tree)


def test_there_are_no_unplanned_rooms() -> None:
    rooms = {path.name for path in LIBRARY.iterdir() if (path / "__init__.py").exists()}
    files = {path.stem for path in LIBRARY.glob("*.py")}
    known = {"attacks", "data", "evaluation", "methods", "models", "runtime", "training"}
    assert rooms == known
    assert files == TOP_LEVEL | {"__init__"}


# --- presets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_load_and_survive_the_round_trip(path: Path) -> None:
    experiment = load_experiment(path)
    assert experiment.name == path.stem
    again = experiment_from_dict(experiment_to_dict(experiment))
    assert again == experiment
    assert again.fingerprint == experiment.fingerprint


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_say_what_they_are(path: Path) -> None:
    header = path.read_text(encoding="utf-8").partition("\nname:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    for topic in ("Purpose", "Command", "Time", "Expected", "Seeds"):
        assert f"# {topic}" in header, topic
    assert f"robustft search {path.stem}" in header or f"robustft train {path.stem}" in header


# --- what is shipped -----------------------------------------------------------------------------


def test_constraints_pin_exact_versions_and_nothing_else() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins)
    names = [pin.partition("==")[0].lower().replace("_", "-") for pin in pins]
    assert len(set(names)) == len(names)
    assert {"torch", "torchvision", "ray", "mlflow", "tyro"} <= set(names)
    # These follow torch and exist on some systems only.
    assert not [name for name in names if name.startswith(("nvidia", "cuda", "triton"))]


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [name for group in project["optional-dependencies"].values() for name in group]
    wanted = {
        re.split(r"[\[<>=~! ]", requirement)[0].lower()
        for requirement in [*project["dependencies"], *extras]
    } - {"robustft"}
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower()
    missing = [name for name in sorted(wanted) if f"\n{name}==" not in text]
    assert not missing


def test_a_job_ships_what_it_needs_and_little_else() -> None:
    ignored = (ROOT / ".rayignore").read_text(encoding="utf-8").splitlines()
    assert {".venv/", "runs/", "tests/"} <= set(ignored)
    assert not [line for line in ignored if line.startswith(("library", "experiments"))]


def test_make_without_a_target_explains_itself() -> None:
    done = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: help (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    explained = [line.split()[1] for line in done.stdout.splitlines()]
    assert explained == phony[1].split()


def test_make_refuses_other_pythons_with_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text(encoding="utf-8"))
    done = subprocess.run(
        ["make", "PYTHON=no-such-python", "test"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "robustft needs Python 3.11, 3.12 or 3.13" in done.stderr
    assert not (tmp_path / ".venv").exists()
