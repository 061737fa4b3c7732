"""Two nodes that hold one worker each: what data-parallel training and the doctor find there."""

import os
from pathlib import Path

import pytest
import torch
from faults import Nodes, points, run_folder, running_nodes, summary, write_tiny
from safetensors.torch import load_file
from test_faults import Command

from robustft.runtime.doctor import diagnose

pytestmark = [pytest.mark.ray, pytest.mark.cluster, pytest.mark.slow]

nodes = pytest.fixture(scope="module")(running_nodes)


def trained(folder: Path, **variables: str) -> Path:
    """Train the tiny experiment on two workers of one CPU each; return the run's folder."""
    path = write_tiny(folder, search=False, epochs=3, workers=2)
    run = Command(folder, "train", path, "--json", **variables)
    code, _, _ = run.finish()
    assert code == 0, "".join(run.lines)
    return run_folder(folder)


def test_two_workers_train_the_same_on_two_nodes_as_on_one(nodes: Nodes, tmp_path: Path) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two CPUs")
    # No node of this cluster has room for both workers; the embedded Ray is one node.
    apart = trained(tmp_path / "apart", RAY_ADDRESS=nodes.address)
    together = trained(tmp_path / "together")
    found, expected = (
        load_file(folder / "model" / "model.safetensors") for folder in (apart, together)
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert summary(tmp_path / "apart") == summary(tmp_path / "together")
    assert points(tmp_path / "apart") == points(tmp_path / "together")


def test_the_doctor_names_the_node_that_does_not_reach_mlflow(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    blind = nodes.add(env_vars={"MLFLOW_TRACKING_URI": "http://127.0.0.1:1"})
    try:
        checks = diagnose(nodes.address)
    finally:
        nodes.remove(blind)
    about = [check for check in checks if check.subject == "MLflow" and check.where != "here"]
    assert [check.level for check in about] == ["warning"]
    assert "http://127.0.0.1:1 does not answer from here" in about[0].found
    assert about[0].where in {check.where for check in checks if check.subject == "Python"}
