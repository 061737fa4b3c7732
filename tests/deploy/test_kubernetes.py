"""The Kubernetes manifests: complete, of one version, without rights, doors or secrets."""

import copy
import functools
import gzip
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from deploy_files import CLUSTER, IMAGE, MLFLOW_IMAGE, PINS, ROOT, SECRET, documents, mappings

SCHEMAS = ROOT.parent / "shared" / "schemas"
KUBERAY = CLUSTER / "kuberay"
TLS = CLUSTER / "kuberay-tls"
KUSTOMIZATIONS = sorted(CLUSTER.rglob("kustomization.yaml"))
FILES = sorted([*CLUSTER.glob("kuberay*/*.yaml"), CLUSTER / "mlflow" / "kubernetes.yaml"])
MANIFESTS = [
    pytest.param(document, id=f"{path.stem}-{document['kind']}-{index}")
    for path in FILES
    for index, document in enumerate(documents(path))
]
API = {
    "Namespace": "v1",
    "PersistentVolumeClaim": "v1",
    "Service": "v1",
    "Deployment": "apps/v1",
    "StatefulSet": "apps/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "Kustomization": "kustomize.config.k8s.io/v1beta1",
    "RayCluster": "ray.io/v1",
    "RayJob": "ray.io/v1",
}


def of_kind(path: Path, kind: str) -> dict[str, Any]:
    (found,) = [document for document in documents(path) if document["kind"] == kind]
    return found


def pods(manifest: Any) -> list[dict[str, Any]]:
    return [mapping for mapping in mappings(manifest) if "containers" in mapping]


# --- what every manifest must keep ---------------------------------------------------------------


def complaints(manifest: dict[str, Any]) -> list[str]:
    """Return what is wrong with a manifest; the tests below spoil one to see that it is found."""
    found = []
    if API.get(manifest["kind"]) != manifest["apiVersion"]:
        found.append(f"{manifest['apiVersion']}/{manifest['kind']} is unknown")
    namespaced = manifest["kind"] not in {"Namespace", "Kustomization"}
    if namespaced and manifest["metadata"].get("namespace") != "robustft":
        found.append("not in the namespace")
    for mapping in mappings(manifest):
        kind = mapping.get("serviceType") or (mapping.get("type") if "ports" in mapping else None)
        if kind not in {None, "ClusterIP"}:
            found.append(f"service is {kind}")
        for name in ("privileged", "hostNetwork", "hostPID", "hostIPC", "hostPath", "hostPort"):
            if mapping.get(name):
                found.append(name)
        if SECRET.search(str(mapping.get("name", ""))) and (
            "value" in mapping or "secretKeyRef" not in mapping.get("valueFrom", {})
        ):
            found.append(f"{mapping['name']} is not from a secret")
    for pod in pods(manifest):
        context = pod.get("securityContext", {})
        if not (context.get("runAsNonRoot") and context.get("runAsUser", 0) > 0):
            found.append("runs as root")
        for container in pod["containers"]:
            locked = container.get("securityContext", {})
            if locked.get("allowPrivilegeEscalation") is not False:
                found.append("may become root")
            if locked.get("capabilities", {}).get("drop") != ["ALL"]:
                found.append("keeps capabilities")
            resources = container.get("resources", {})
            for part in ("requests", "limits"):
                if not {"cpu", "memory"} <= set(resources.get(part, {})):
                    found.append(f"no {part}")
            if resources.get("limits", {}).get("memory") != resources["requests"]["memory"] and (
                container["name"].startswith("ray-worker")
            ):
                found.append("memory may be taken away")
            if container["image"] not in {IMAGE, MLFLOW_IMAGE, "postgres:18.6"}:
                found.append(f"image {container['image']}")
    return found


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_manifests_are_complete_and_closed(manifest: dict[str, Any]) -> None:
    assert complaints(manifest) == []


@pytest.mark.parametrize(
    ("where", "value", "complaint"),
    [
        (("spec", "headGroupSpec", "serviceType"), "NodePort", "service is NodePort"),
        (("spec", "headGroupSpec", "template", "spec", "hostNetwork"), True, "hostNetwork"),
        (("spec", "headGroupSpec", "template", "spec", "securityContext"), {}, "runs as root"),
        (("apiVersion",), "ray.io/v1alpha1", "ray.io/v1alpha1/RayCluster is unknown"),
        (("metadata", "namespace"), "default", "not in the namespace"),
    ],
)
def test_a_spoilt_manifest_is_noticed(where: tuple[str, ...], value: Any, complaint: str) -> None:
    manifest = copy.deepcopy(of_kind(KUBERAY / "raycluster.yaml", "RayCluster"))
    # YAML's anchors are one object in several places; a spoilt place must be one.
    inner = functools.reduce(lambda mapping, key: mapping[key], where[:-1], manifest)
    inner[where[-1]] = value
    assert complaint in complaints(manifest)


def test_a_secret_in_the_open_is_noticed() -> None:
    manifest = copy.deepcopy(of_kind(KUBERAY / "rayjob.yaml", "RayJob"))
    (container,) = pods(manifest)[0]["containers"]
    container["env"].append({"name": "RAY_AUTH_TOKEN", "value": "abc"})
    assert "RAY_AUTH_TOKEN is not from a secret" in complaints(manifest)


def test_no_secret_is_in_the_repository() -> None:
    assert not [d for path in FILES for d in documents(path) if d["kind"] == "Secret"]


# --- Ray -----------------------------------------------------------------------------------------


@functools.cache
def schema(name: str) -> dict[str, Any]:
    path = SCHEMAS / f"ray.io_{name}.yaml.gz"
    if not path.is_file():
        pytest.skip("the resource definitions of KubeRay are not here")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with gzip.open(path) as file:
        definition = yaml.load(file, Loader=loader)
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    return _closed(version["schema"]["openAPIV3Schema"])


def _closed(node: Any) -> Any:
    """Refuse unknown fields, as the Kubernetes API server does in strict mode."""
    if isinstance(node, dict):
        closed = {key: _closed(value) for key, value in node.items()}
        open_ended = node.get("x-kubernetes-preserve-unknown-fields")
        if "properties" in node and "additionalProperties" not in node and not open_ended:
            closed["additionalProperties"] = False
        if node.get("x-kubernetes-int-or-string"):
            closed = {"type": ["integer", "string"]}
        return closed
    return [_closed(item) for item in node] if isinstance(node, list) else node


@pytest.mark.parametrize(
    ("name", "file", "kind"),
    [
        ("rayclusters", "raycluster.yaml", "RayCluster"),
        ("rayjobs", "rayjob.yaml", "RayJob"),
    ],
)
def test_kuberay_knows_every_field(name: str, file: str, kind: str) -> None:
    manifest = of_kind(KUBERAY / file, kind)
    validator = jsonschema.Draft7Validator(_top(schema(name)))
    assert [
        f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)
    ] == []


def test_kuberay_would_refuse_an_unknown_field() -> None:
    manifest = copy.deepcopy(of_kind(KUBERAY / "raycluster.yaml", "RayCluster"))
    manifest["spec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    validator = jsonschema.Draft7Validator(_top(schema("rayclusters")))
    (error,) = validator.iter_errors(manifest)
    assert "maxReplica" in error.message


def test_kuberay_knows_the_field_that_the_tls_overlay_adds() -> None:
    overlay = of_kind(TLS / "kustomization.yaml", "Kustomization")
    (patch,) = yaml.safe_load(overlay["patches"][0]["patch"])
    assert patch["path"] == "/spec/tlsOptions"
    manifest = copy.deepcopy(of_kind(KUBERAY / "raycluster.yaml", "RayCluster"))
    manifest["spec"]["tlsOptions"] = patch["value"]
    validator = jsonschema.Draft7Validator(_top(schema("rayclusters")))
    assert list(validator.iter_errors(manifest)) == []


def _top(found: dict[str, Any]) -> dict[str, Any]:
    """Let metadata be: every Kubernetes object has the same, and the definition leaves it out."""
    properties = {**found["properties"], "metadata": {"type": "object"}}
    return {**found, "properties": properties}


def test_the_ray_cluster_grows_and_shrinks() -> None:
    spec = of_kind(KUBERAY / "raycluster.yaml", "RayCluster")["spec"]
    assert spec["rayVersion"] == PINS["ray"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["idleTimeoutSeconds"] == 600
    assert spec["authOptions"] == {"mode": "token", "secretName": "ray-auth"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    # Without options an experiment asks for one CPU, which must be there before anything grows.
    assert groups["cpu"]["minReplicas"] == 1
    assert (groups["gpu"]["minReplicas"], groups["gpu"]["replicas"]) == (0, 0)
    assert groups["gpu"]["maxReplicas"] > 0
    for name, group in groups.items():
        (container,) = group["template"]["spec"]["containers"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (name == "gpu")
    for params in mappings(spec):
        for value in params.get("rayStartParams", {}).values():
            assert isinstance(value, str)


def test_all_ray_pods_share_folders_and_the_head_alone_tracks() -> None:
    spec = of_kind(KUBERAY / "raycluster.yaml", "RayCluster")["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    containers = [pod["containers"][0] for group in groups for pod in pods(group)]
    assert len(containers) == 3
    for container in containers:
        is_head = container["name"] == "ray-head"
        names = {entry["name"]: entry.get("value") for entry in container["env"]}
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"/shared", "/dev/shm"}
        assert names["ROBUSTFT_HOME"].startswith("/shared/")
        assert names["ROBUSTFT_STORAGE"].startswith("/shared/")
        tracking = {f"MLFLOW_TRACKING_{name}" for name in ("URI", "USERNAME", "PASSWORD")}
        # Drivers are on the head, and nothing else talks to MLflow.
        assert tracking & set(names) == (tracking if is_head else set())
        if is_head:
            assert names["MLFLOW_TRACKING_URI"] == "http://mlflow.robustft.svc.cluster.local:5000"


def test_the_ray_job_runs_the_experiment_on_the_standing_cluster() -> None:
    cluster = of_kind(KUBERAY / "raycluster.yaml", "RayCluster")
    spec = of_kind(KUBERAY / "rayjob.yaml", "RayJob")["spec"]
    assert spec["entrypoint"] == "python experiments/rift_sweep.py"
    assert (ROOT / spec["entrypoint"].split()[1]).is_file()
    assert spec["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    secret = cluster["spec"]["authOptions"]["secretName"]
    used = [m["secretKeyRef"] for m in mappings(spec) if "secretKeyRef" in m]
    assert used == [{"name": secret, "key": "auth_token"}]


def refusals(spec: dict[str, Any]) -> list[str]:
    """Return what KubeRay's operator refuses in a RayJob though its definition lets it pass."""
    found = []
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not spec.get("shutdownAfterJobFinishes"):
        found.append("ttlSecondsAfterFinished without shutdownAfterJobFinishes")
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        found.append("suspend without shutdownAfterJobFinishes")
    if ("rayClusterSpec" in spec) == bool(spec.get("clusterSelector")):
        found.append("one of rayClusterSpec and clusterSelector")
    if spec.get("submissionMode") == "SidecarMode" and (
        "submitterPodTemplate" in spec or spec.get("clusterSelector")
    ):
        found.append("SidecarMode with a cluster or submitter of its own")
    return found


def test_the_operator_takes_the_ray_job_and_leaves_the_standing_cluster() -> None:
    spec = of_kind(KUBERAY / "rayjob.yaml", "RayJob")["spec"]
    assert refusals(spec) == []
    assert "shutdownAfterJobFinishes" not in spec
    assert refusals({**spec, "ttlSecondsAfterFinished": 60})
    assert refusals({**spec, "clusterSelector": {}})


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda path: path.parent.name)
def test_no_base_contains_its_overlay(path: Path) -> None:
    (kustomization,) = documents(path)
    for resource in kustomization["resources"]:
        base = (path.parent / resource).resolve()
        assert base.exists(), resource
        # Kustomize calls that a cycle and refuses it.
        assert not path.parent.resolve().is_relative_to(base), resource


@pytest.mark.slow  # for kubectl's sake, which may be a launcher that takes seconds
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here")
@pytest.mark.parametrize("folder", ["kuberay", "kuberay-tls"])
def test_kustomize_itself_builds_it(folder: str) -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(CLUSTER / folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (cluster,) = [d for d in yaml.safe_load_all(done.stdout) if d["kind"] == "RayCluster"]
    assert cluster["spec"].get("tlsOptions") == ({"enabled": True} if folder != "kuberay" else None)


def test_kustomize_takes_every_file() -> None:
    kustomization = of_kind(KUBERAY / "kustomization.yaml", "Kustomization")
    others = {path.name for path in KUBERAY.glob("*.yaml")} - {"kustomization.yaml", "rayjob.yaml"}
    assert set(kustomization["resources"]) == others


STAND_INS = {
    "docker": 'echo "$@" >> "$OUT/docker.txt"',
    "openssl": "echo 00",
    "kubectl": """
        applied=$(mktemp "$OUT/XXXXXX.yaml")
        case "$*" in
          kustomize*)
            rm "$applied"
            for name in $(sed -n 's/^  - //p' "$2/kustomization.yaml")
            do cat "$2/$name"; echo ---; done ;;
          *"--filename -") cat > "$applied" ;;
          *--filename*) cp "$3" "$applied" ;;
          *"get secret"*) echo cGFzcw== ;;
        esac
    """,
}


def test_the_guides_commands_put_the_registry_into_everything(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    commands = guide.partition("## Kubernetes: KubeRay")[2].split("```\n")[1]
    out, path = tmp_path / "out", tmp_path / "bin"
    out.mkdir()
    path.mkdir()
    for name, script in STAND_INS.items():
        (path / name).write_text(f"#!/bin/bash\n{script}\n")
        (path / name).chmod(0o755)
    variables = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}", "OUT": str(out)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    applied = [d for file in out.glob("*.yaml") for d in documents(file)]
    assert {d["kind"] for d in applied} == set(API) - {"Kustomization"}
    images = {c["image"] for d in applied for pod in pods(d) for c in pod["containers"]}
    ours = {
        image.replace("registry.example.com", "ghcr.io/CHANGE-ME")
        for image in (IMAGE, MLFLOW_IMAGE)
    }
    assert images == ours | {"postgres:18.6"}
    pushed = re.findall(r"^push (\S+)$", (out / "docker.txt").read_text(), re.MULTILINE)
    built = re.findall(r"--tag (\S+)", (out / "docker.txt").read_text())
    assert set(pushed) == set(built) == ours


# --- MLflow --------------------------------------------------------------------------------------


def test_mlflow_answers_to_the_name_that_ray_calls_it_by() -> None:
    deployment = of_kind(CLUSTER / "mlflow" / "kubernetes.yaml", "Deployment")
    (container,) = pods(deployment)[0]["containers"]
    values = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    assert "mlflow.robustft.svc.cluster.local:5000" in values["MLFLOW_SERVER_ALLOWED_HOSTS"]
    hosts = values["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert "*" not in hosts
    # Under these a port-forward calls it.
    assert {"localhost:*", "127.0.0.1:*"} <= set(hosts)
    assert "@" in values["MLFLOW_BACKEND_STORE_URI"]
    # The password is in PGPASSWORD: an address with one would be in every log.
    assert "mlflow@" in values["MLFLOW_BACKEND_STORE_URI"].partition("://")[2]


def test_the_secrets_that_are_used_are_the_ones_that_the_guide_makes() -> None:
    guide = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    used = {
        (mapping["secretKeyRef"]["name"], mapping["secretKeyRef"]["key"])
        for path in FILES
        for document in documents(path)
        for mapping in mappings(document)
        if "secretKeyRef" in mapping
    }
    assert used
    for name, key in used:
        assert f"create secret generic {name}" in guide
        assert f"--from-literal={key}=" in guide
