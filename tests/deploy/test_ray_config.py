"""``ray up``: what Ray itself checks, and what it does not: rights, doors, tokens and paths."""

import contextlib
import copy
import json
import os
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import ray
from deploy_files import CLUSTER, PINS, ROOT, SECRET, documents, mappings
from packaging.requirements import Requirement

CONFIGS = {
    "aws": ROOT / "ray_config.yaml",
    "gcp": CLUSTER / "gcp" / "ray_config.yaml",
    "azure": CLUSTER / "azure" / "ray_config.yaml",
}


def load(cloud: str) -> dict[str, Any]:
    (document,) = documents(CONFIGS[cloud])
    return document


def accept(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config as Ray completes it, if Ray accepts it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("cloud", CONFIGS)
def test_ray_accepts_it(cloud: str) -> None:
    config = load(cloud)
    assert config["provider"]["type"] == cloud
    prepared = accept(config)
    assert prepared["head_node_type"] == "head"
    # Ray lays its defaults below: a command of theirs would install another Ray.
    commands = "\n".join(
        command
        for name, value in prepared.items()
        if name.endswith("_commands")
        for command in value
    )
    assert "ray-wheels" not in commands
    assert "0.0.0.0" not in commands


@pytest.mark.parametrize("cloud", CONFIGS)
def test_ray_would_refuse_a_mistake(cloud: str) -> None:
    config = load(cloud)
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        accept({**config, "idle_timeout": 3})
    with pytest.raises(ValueError, match="head_node_type"):
        accept({**config, "head_node_type": "haed"})


@pytest.mark.parametrize("cloud", CONFIGS)
def test_gpu_workers_come_and_go_spot_first(cloud: str) -> None:
    config = load(cloud)
    types = config["available_node_types"]
    assert set(types) == {"head", "gpu_spot", "gpu_on_demand"}
    assert "GPU" not in types["head"]["resources"]
    spot, sure = types["gpu_spot"], types["gpu_on_demand"]
    assert spot["priority"] > sure["priority"]
    assert spot["resources"] == sure["resources"]
    assert spot["resources"]["GPU"] == 1
    for worker in (spot, sure):
        assert worker["min_workers"] == 0
        assert worker["max_workers"] == config["max_workers"] > 0
    assert 0 < config["idle_timeout_minutes"] <= 30
    # The two differ in what they cost and in nothing else.
    bought = copy.deepcopy(spot["node_config"])
    bought.pop("InstanceMarketOptions", None)
    bought.get("azure_arm_parameters", {}).pop("priority", None)
    if cloud == "gcp":
        assert bought["scheduling"][0].pop("preemptible") is True
    assert bought == sure["node_config"]
    assert bought != spot["node_config"] or cloud == "gcp"


@pytest.mark.parametrize("cloud", CONFIGS)
def test_everything_asks_for_the_token(cloud: str) -> None:
    config = load(cloud)
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    setup = "\n".join(config["setup_commands"])
    assert "'export RAY_AUTH_MODE=token'" in setup
    assert "> ~/robustft.env" in setup
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        assert command.startswith(". ~/robustft.env;")
    (head,) = [c for c in config["head_start_ray_commands"] if "ray start" in c]
    assert "--dashboard-host=127.0.0.1" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head


@pytest.mark.parametrize("cloud", CONFIGS)
def test_a_job_finds_the_script_without_a_working_directory(cloud: str) -> None:
    config = load(cloud)
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        (command,) = [c for c in config[name] if "ray start" in c]
        # A job without a working directory runs where `ray start` was run.
        before, _, _ = command.partition("ray start")
        assert "cd ~/robustft &&" in before
        assert "ulimit -n 65536 &&" in before
    mounts = config["file_mounts"]
    local = {remote: path for remote, path in mounts.items() if remote.startswith("/home/ubuntu/r")}
    for remote, path in local.items():
        assert remote == f"/home/ubuntu/robustft/{path}"
        assert (ROOT / path).exists()
    assert {"library", "experiments", "constraints.txt", "pyproject.toml"} <= set(local.values())


@pytest.mark.parametrize("cloud", CONFIGS)
def test_a_node_installs_what_its_own_setup_calls(cloud: str) -> None:
    commands = load(cloud)["setup_commands"]
    (install,) = [i for i, command in enumerate(commands) if "apt-get" in command]
    mounting, venv = (
        next(i for i, command in enumerate(commands) if word in command)
        for word in ("mount -t nfs", "python3.12 -m venv")
    )
    assert install < mounting < venv
    looked_for, _, installed = commands[install].partition("||")
    packages = {"nfs-common", "python3.12-venv", "python3.12-dev", "gcc", "g++"}
    assert packages <= set(looked_for.split())
    assert packages <= set(installed.rstrip(")").split())
    # A password travels there.
    (variables,) = [command for command in commands if command.startswith("printf")]
    assert "'export MLFLOW_TRACKING_URI=https://" in variables


@pytest.mark.parametrize("cloud", CONFIGS)
def test_the_head_installs_the_clouds_packages_in_the_tested_versions(cloud: str) -> None:
    (command,) = load(cloud)["head_setup_commands"]
    assert shlex.split(command.replace("$HOME", "~"))[1:] == [
        *("install", "--quiet", "--constraint", "~/robustft/constraints.txt"),
        *("--editable", f"~/robustft[{cloud}]"),
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text in project["optional-dependencies"][cloud]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(PINS[requirement.name]), text
    guide = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert f"pip install --constraint constraints.txt --editable '.[{cloud}]'" in guide


def test_azures_packages_are_those_that_this_ray_was_made_with() -> None:
    defaults = Path(ray.__file__).parent / "autoscaler" / "azure" / "defaults.yaml"
    pinned = dict(re.findall(r"([a-z-]+)==([0-9a-z.]+)", defaults.read_text(encoding="utf-8")))
    assert len(pinned) == 8
    assert {name: PINS[name] for name in pinned} == pinned


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def head() -> Iterator[tuple[dict[str, str], str]]:
    """Run the head's own commands in a home of their own; yield (environment, address)."""
    # Ray's sockets need a short path.
    home = Path(tempfile.mkdtemp(prefix="rh", dir="/tmp"))
    config = load("aws")
    for path in config["file_mounts"].values():
        source, target = ROOT / path, home / "robustft" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy(source, target)
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("0" * 64)
    environment = {
        **{n: v for n, v in os.environ.items() if not n.startswith(("RAY_", "ROBUSTFT_"))},
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        # Stands in for the installation of ~/robustft into ~/venv.
        "PYTHONPATH": str(home / "robustft" / "library"),
    }
    (variables,) = [c for c in config["setup_commands"] if c.startswith("printf")]
    subprocess.run(["bash", "-c", variables], env=environment, check=True, timeout=60)
    (command,) = [c for c in config["head_start_ray_commands"] if "ray start" in c]
    port = free_port()
    # There is no cloud here, perhaps a lower limit of open files, and there may be other Rays.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    command = command.replace("ulimit -n 65536", f"ulimit -n {min(65536, most)}")
    command = command.replace(" --autoscaling-config=~/ray_bootstrap_config.yaml", "")
    command = command.replace("--port=6379", f"--port={free_port()}")
    command += f" --block --dashboard-port={port} --temp-dir={home}/t --num-cpus=1"
    command += f" --dashboard-agent-listen-port={free_port()}"
    command += f" --ray-client-server-port={free_port()}"
    log = (home / "head.log").open("w")
    process = subprocess.Popen(
        ["bash", "-c", command], env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        yield environment, f"http://127.0.0.1:{port}"
    finally:
        tree = psutil.Process(process.pid).children(recursive=True)
        for one in [*tree, psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.terminate()
        _, alive = psutil.wait_procs(tree, timeout=20)
        for one in alive:
            one.kill()
        process.wait(timeout=20)
        log.close()
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.cluster
@pytest.mark.slow
def test_the_heads_own_command_lets_a_job_find_the_script(
    head: tuple[dict[str, str], str], tmp_path: Path
) -> None:
    environment, address = head
    words = ("--address", address, "--", "python", "experiments/rift_sweep.py", "--help")
    deadline = time.monotonic() + 240
    while True:
        # From elsewhere than a checkout, as the guide says it, and without --working-dir.
        done = subprocess.run(
            [str(Path(sys.executable).parent / "ray"), "job", "submit", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        there = "Failed to connect" not in done.stderr + done.stdout
        if there and "No available agent" not in done.stderr + done.stdout:
            break
        assert time.monotonic() < deadline, done.stderr[-3000:]
        time.sleep(2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "rift_sweep.py" in done.stdout
    assert "--runtime.autoscaling" in done.stdout


@pytest.mark.parametrize("cloud", CONFIGS)
def test_commands_are_whole(cloud: str) -> None:
    config = load(cloud)
    for name, value in config.items():
        for command in value if name.endswith("_commands") else ():
            # A quote that a folded line has lost would be found here, or an hour later by a node.
            assert shlex.split(command)


@pytest.mark.parametrize("cloud", CONFIGS)
def test_there_are_no_secrets(cloud: str) -> None:
    for mapping in mappings(load(cloud)):
        for name, value in mapping.items():
            if name != "/home/ubuntu/.ray/auth_token":
                assert not SECRET.search(str(name)), name
            assert "AKIA" not in str(value)


def test_the_clouds_differ_in_what_they_must() -> None:
    def shared(cloud: str) -> dict[str, Any]:
        config = load(cloud)
        for name in ("provider", "available_node_types", "head_setup_commands"):
            del config[name]
        # AWS alone writes its notice where a script can read it.
        notice = "cluster/aws/spot_notice.py"
        watched = config["file_mounts"].pop(f"/home/ubuntu/robustft/{notice}", None) is not None
        starts = config["worker_start_ray_commands"]
        config["worker_start_ray_commands"] = [c for c in starts if notice not in c]
        assert watched == (len(starts) == 3) == (cloud == "aws")
        setup = config["setup_commands"]
        config["setup_commands"] = [c for c in setup if "sudo mount" not in c]
        assert len(setup) == len(config["setup_commands"]) + 1
        return config

    assert shared("aws") == shared("gcp") == shared("azure")


# --- rights --------------------------------------------------------------------------------------


def statements() -> list[dict[str, Any]]:
    policy = json.loads((CLUSTER / "aws" / "head-policy.json").read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = policy["Statement"]
    return found


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def test_the_head_may_do_what_the_autoscaler_does_and_no_more() -> None:
    actions = {action for entry in statements() for action in listed(entry["Action"])}
    assert actions == {
        "ec2:CreateTags",
        "ec2:DescribeInstanceTypes",
        "ec2:DescribeInstances",
        "ec2:RunInstances",
        "ec2:TerminateInstances",
    }
    for entry in statements():
        assert entry["Effect"] == "Allow"
        reading = all(action.startswith("ec2:Describe") for action in listed(entry["Action"]))
        assert ("*" in listed(entry["Resource"])) == reading


def test_the_head_may_start_and_end_only_machines_of_its_cluster_and_types() -> None:
    config = load("aws")
    workers = [t for name, t in config["available_node_types"].items() if name != "head"]
    (start,) = [
        e
        for e in statements()
        if e["Resource"] == "arn:aws:ec2:*:*:instance/*" and e["Action"] == "ec2:RunInstances"
    ]
    condition = start["Condition"]["StringEquals"]
    assert condition["aws:RequestTag/ray-cluster-name"] == config["cluster_name"]
    assert set(condition["ec2:InstanceType"]) == {w["node_config"]["InstanceType"] for w in workers}
    (end,) = [e for e in statements() if "ec2:TerminateInstances" in listed(e["Action"])]
    own = {"StringEquals": {"aws:ResourceTag/ray-cluster-name": config["cluster_name"]}}
    assert end["Condition"] == own


def test_aws_machines_have_no_open_door() -> None:
    types = load("aws")["available_node_types"]
    for name, node in types.items():
        config = node["node_config"]
        # Where these are left out Ray opens SSH to the world, and gives the head all of EC2 and S3.
        assert config["SecurityGroupIds"], name
        assert ("IamInstanceProfile" in config) == (name == "head")
        assert config["MetadataOptions"] == {"HttpTokens": "required"}
        assert all(device["Ebs"]["Encrypted"] for device in config["BlockDeviceMappings"])
    assert load("aws")["provider"]["cache_stopped_nodes"] is False


def refused(value: Any, shape: Any, where: str = "") -> list[str]:
    """Return the values that are none of those that AWS lists, by its own description."""
    if shape.type_name == "structure":
        parts = [(f"{where}.{name}", value[name], shape.members[name]) for name in value]
    elif shape.type_name == "list":
        parts = [(f"{where}[{i}]", item, shape.member) for i, item in enumerate(value)]
    else:
        known = getattr(shape, "enum", [])
        return [f"{where}={value}"] if known and value not in known else []
    return [text for place, inner, kind in parts for text in refused(inner, kind, place)]


def test_aws_knows_every_word_of_what_is_asked_for() -> None:
    loaders = pytest.importorskip("botocore.loaders", reason="needs the extra aws")
    from botocore.model import ServiceModel
    from botocore.validate import ParamValidator

    description = loaders.Loader().load_service_model("ec2", "service-2")
    shape = ServiceModel(description, "ec2").operation_model("RunInstances").input_shape

    def complaints(node_config: dict[str, Any]) -> list[str]:
        asked = copy.deepcopy(node_config)
        # What Ray makes of the one field that is its own, and adds.
        asked["SubnetId"] = asked.pop("SubnetIds")[0]
        asked |= {"MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(asked, shape).generate_report()
        return [report] if report else refused(asked, shape)

    types = load("aws")["available_node_types"]
    assert {name: complaints(node["node_config"]) for name, node in types.items()} == {
        name: [] for name in types
    }
    spot = types["gpu_spot"]["node_config"]
    assert "InstanceTyp" in complaints({**spot, "InstanceTyp": "g6.2xlarge"})[0]
    assert complaints({**spot, "InstanceMarketOptions": {"MarketType": "spott"}}) == [
        ".InstanceMarketOptions.MarketType=spott"
    ]
    assert complaints({**spot, "InstanceType": "g6.3xlarge"}) == [".InstanceType=g6.3xlarge"]


def test_google_machines_have_no_rights_but_the_heads_own_role() -> None:
    types = load("gcp")["available_node_types"]
    assert types["gpu_spot"]["node_config"]["serviceAccounts"] == []
    assert types["gpu_on_demand"]["node_config"]["serviceAccounts"] == []
    (account,) = types["head"]["node_config"]["serviceAccounts"]
    assert account["email"].startswith("robustft-head@")
    (role,) = documents(CLUSTER / "gcp" / "head-role.yaml")
    assert role["includedPermissions"] == sorted(role["includedPermissions"])
    assert all(name.startswith("compute.") for name in role["includedPermissions"])


# --- the guide -----------------------------------------------------------------------------------


def test_what_is_to_be_filled_in_is_said_in_the_guide() -> None:
    guide = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert "CHANGE-ME" in guide
    for name in ("ImageId", "SecurityGroupIds", "SubnetIds", "IamInstanceProfile", "EFS"):
        assert name in guide
    for path in (Path("cluster/aws/head-policy.json"), Path("cluster/gcp/head-role.yaml")):
        assert path.as_posix() in guide
    # The account that the head runs as has to be made before it.
    (account,) = load("gcp")["available_node_types"]["head"]["node_config"]["serviceAccounts"]
    name = account["email"].partition("@")[0]
    assert f"gcloud iam service-accounts create {name} " in guide
    assert f"--member serviceAccount:{name}@PROJECT.iam.gserviceaccount.com" in guide
    assert PINS["ray"] in guide
