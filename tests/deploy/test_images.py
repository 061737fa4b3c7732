"""Images and the compose file: pinned, not root, without secrets, in an order that caches well."""

import configparser
import fnmatch
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from deploy_files import CLUSTER, IMAGE, MLFLOW_IMAGE, PINS, ROOT, SECRET, documents

DOCKERFILES = [CLUSTER / "image" / "Dockerfile", CLUSTER / "mlflow" / "Dockerfile"]


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return (instruction, arguments) of a Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n", " ", path.read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_images_are_pinned_not_root_and_without_secrets(path: Path) -> None:
    steps = instructions(path)
    (base,) = [arguments for name, arguments in steps if name == "FROM"]
    assert re.fullmatch(r"[a-z0-9./-]+:[a-z]*\d+\.\d+\.\d+[a-z0-9.-]*", base)
    assert "@sha256" not in base
    users = [arguments for name, arguments in steps if name == "USER"]
    assert users == ["10001"]
    # Nothing of ours is copied, installed or started as root.
    before = steps[: steps.index(("USER", "10001"))]
    assert {name for name, _ in before} == {"FROM", "RUN"}
    assert not [arguments for _, arguments in before if "pip" in arguments]
    for name, arguments in steps:
        assert name != "ADD"
        assert name != "ARG"
        if name == "ENV":
            assert not SECRET.search(arguments.partition("=")[0])
        if name == "COPY":
            assert arguments.split()[0] == "--chown=10001"
        if name == "RUN" and "pip install" in arguments:
            assert "--no-cache-dir" in arguments
            assert "--constraint constraints.txt" in arguments or "--no-deps" in arguments


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_what_is_copied_exists_and_nothing_else_is_let_in(path: Path) -> None:
    rules = path.with_name("Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    assert rules[0] == "**"
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = set()
    for name, arguments in instructions(path):
        if name == "COPY":
            copied |= set(arguments.split()[1:-1])
    assert copied == let_in
    for source in copied:
        assert (ROOT / source).exists(), source


def test_the_code_is_the_last_and_smallest_layer() -> None:
    steps = instructions(CLUSTER / "image" / "Dockerfile")
    (large,) = [i for i, (_, text) in enumerate(steps) if "--requirement" in text]
    code = [i for i, (name, text) in enumerate(steps) if name == "COPY" and "library" in text]
    assert large < code[0]
    (workdir,) = [text for name, text in steps if name == "WORKDIR"]
    assert workdir == "/opt/robustft"
    assert ("COPY", "--chown=10001 experiments experiments") in steps
    environment = " ".join(text for name, text in steps if name == "ENV")
    assert "RAY_AUTH_MODE=token" in environment


def test_torch_can_compile_in_the_image() -> None:
    (packages,) = [t for _, t in instructions(CLUSTER / "image" / "Dockerfile") if "apt-get" in t]
    assert {"gcc", "g++", "python3.12", "python3.12-dev", "python3.12-venv"} <= set(
        packages.split()
    )


def requirements_module() -> ModuleType:
    path = CLUSTER / "image" / "requirements.py"
    spec = importlib.util.spec_from_file_location("image_requirements", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_image_installs_what_the_project_asks_for() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = requirements_module().requirements(text, ["search", "deepspeed"])
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in found}
    assert {"ray", "torch", "torchvision", "mlflow", "optuna", "deepspeed"} <= names
    assert not {"pytest", "ruff"} & names
    assert all(name in PINS for name in names)


# --- MLflow --------------------------------------------------------------------------------------


def compose() -> dict[str, Any]:
    (document,) = documents(CLUSTER / "mlflow" / "compose.yaml")
    return document


def test_the_servers_packages_are_the_pinned_ones() -> None:
    lines = (CLUSTER / "mlflow" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert all("==" in line for line in pinned)
    assert f"mlflow[auth]=={PINS['mlflow']}" in pinned
    assert MLFLOW_IMAGE.endswith(PINS["mlflow"])


def test_compose_listens_on_loopback_and_keeps_its_secrets_in_a_file() -> None:
    services = compose()["services"]
    assert services["mlflow"]["image"] == MLFLOW_IMAGE
    for service in services.values():
        assert not service.get("privileged")
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:")
        for name, value in service["environment"].items():
            if SECRET.search(name):
                assert re.fullmatch(r"\$\{[A-Z_]+:[?-].*\}", value), name
    assert "ports" not in services["postgres"]
    hosts = services["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"]
    assert hosts == "${ALLOWED_HOSTS:-localhost:*,127.0.0.1:*}"


def test_the_example_of_the_secrets_holds_none_and_the_real_one_is_ignored() -> None:
    folder = CLUSTER / "mlflow"
    for line in (folder / "example.env").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            assert line.endswith("=")
    assert ".env" in (folder / ".gitignore").read_text(encoding="utf-8").splitlines()
    wanted = set(re.findall(r"\$\{([A-Z_]+):\?", (folder / "compose.yaml").read_text()))
    example = (folder / "example.env").read_text(encoding="utf-8")
    assert wanted == {
        line[:-1] for line in example.splitlines() if fnmatch.fnmatch(line, "[A-Z]*=")
    }


def test_basic_auth_is_on_and_its_settings_hold_no_password() -> None:
    steps = instructions(CLUSTER / "mlflow" / "Dockerfile")
    (command,) = [text for name, text in steps if name == "CMD"]
    assert '"--app-name", "basic-auth"' in command
    parser = configparser.ConfigParser()
    parser.read(CLUSTER / "mlflow" / "basic_auth.ini")
    section = parser["mlflow"]
    assert "admin_password" not in section
    assert section["database_uri"] == "postgresql+psycopg://mlflow@postgres:5432/mlflow"
    assert (
        section["database_uri"]
        == compose()["services"]["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"]
    )


def test_the_image_is_named_as_the_manifests_name_it() -> None:
    text = (CLUSTER / "image" / "Dockerfile").read_text(encoding="utf-8")
    assert IMAGE in text
    guide = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert IMAGE.replace("registry.example.com", "$REGISTRY") in guide
