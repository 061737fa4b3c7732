"""What a comparison leaves beside its tables, with a real store and real networks."""

import dataclasses
import importlib.util
import json
import sys
import types
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from robustft.data.base import Split, Task
from robustft.evaluation.loss_surface import load_surface
from robustft.evaluation.mapping import in_turn
from robustft.methods.costs import Passes
from robustft.models import Start, save_model
from robustft.runtime import protocol, protocol_records
from robustft.runtime.recording import log_model, start_parent
from robustft.runtime.run_figures import SURFACES
from robustft.threat import ThreatModel

ROOT = Path(__file__).resolve().parents[2]
THREATS = (ThreatModel("Linf", 0.1), ThreatModel("L2", 1.0), ThreatModel("L1", 10.0))
VAL = {
    "at": {"clean": 0.7, "Linf/robust": 0.6, "L2/robust": 0.6, "L1/robust": 0.3, "robust": 0.2},
    "e-at": {"clean": 0.6, "Linf/robust": 0.5, "L2/robust": 0.5, "L1/robust": 0.4, "robust": 0.4},
}
"""By the protocol's attack: the first is the better one but under all norms together."""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "compare_methods_for_records", ROOT / "experiments" / "compare_methods.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench(script: ModuleType, tmp_path: Path) -> protocol.Bench:
    rng = np.random.default_rng(0)
    names = {"train": 20, "val": 12, "test": 12}
    splits = {
        name: Split(
            images=rng.integers(0, 256, (n, 1, 28, 28), dtype=np.uint8),
            labels=np.arange(n, dtype=np.int64) % 10,
            ids=np.arange(n, dtype=np.int64),
        )
        for name, n in names.items()
    }
    task = Task(
        name="pictures",
        splits=splits,
        class_names=tuple("abcdefghij"),
        mean=(0.3,),
        std=(0.3,),
        threat_models=THREATS,
        selection="val",
        digest="0123456789abcdef",
    )
    base = script.prepared(script.Options())
    runtime = dataclasses.replace(
        base.runtime, storage=str(tmp_path), tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"
    )
    return protocol.Bench(
        base=dataclasses.replace(base, runtime=runtime),
        kind=script.KINDS["images"],
        options=script.Options(seeds=(0, 1)),
        output=tmp_path / "out",
        task=task,
        start=Start(
            architecture="small_resnet",
            num_classes=10,
            image_shape=(1, 28, 28),
            mean=(0.3,),
            std=(0.3,),
        ),
        sizes=None,  # type: ignore[arg-type]  # nobody asks
        mapper=in_turn,
    )


def row(bench: protocol.Bench, name: str, seed: int) -> tuple[protocol.Entry, Any]:
    """Return a row whose run has saved a model and told MLflow of it, unregistered."""
    folder = bench.output / "runs" / f"row-{name}-0"
    start = dataclasses.replace(bench.start, seed=seed)
    state = start.build().state_dict()
    save_model(folder / "model", start=start, state=state, card={"method": "at"})
    experiment = protocol.measuring(bench.base, bench.kind.methods[name], 0.01, (0, 1), None)
    assert not experiment.runtime.register
    with protocol_records.tracking(bench, folder) as tracker, protocol.tagged("part=row"):
        run = start_parent(tracker, experiment, folder)
        log_model(
            tracker,
            run,
            folder / "model",
            task=bench.task,
            network="small_resnet",
            method="at",
            run_id=folder.name,
            leaky=False,
            metrics={"test/clean": 0.5},
            scores={},
            register=experiment.runtime.register,
        )
        tracker.finish_run(run)
    chosen = protocol.Candidate(index=0, value=0.01, clean=0.5, robust=0.4, judging=10.0)
    entry = protocol.Entry(
        name=name,
        method="at",
        field="lr",
        candidates=[chosen],
        chosen=chosen,
        kept=True,
        others={},
        prepared=Passes(100, 50),
        trial=Passes(1000, 500),
        counted=None,
        search_seconds=12.0,
        seconds=None,
        memory=512.0,
        test={"clean": [0.8, 0.9], "Linf/robust": [0.6, 0.6]},
        failed=[],
        folder=folder,
    )
    return entry, types.SimpleNamespace(directory=folder, name=f"compare/{folder.name}")


def test_a_row_has_its_surface_once(bench: protocol.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol_records, "GRID", (-0.25, 0.25, 3))
    _, stored = row(bench, "at", 3)
    protocol_records.add_surface(bench, "at", stored)
    (file,) = (stored.directory / SURFACES).iterdir()
    assert file.name == "1-at.npz"
    surface = load_surface(file)
    assert surface.loss.shape == (3, 3)
    assert surface.metadata["num_examples"] == 20
    # The middle is the saved model itself, on the training split.
    network = dataclasses.replace(bench.start, seed=3).build()
    images = torch.from_numpy(bench.task.splits["train"].images).float() / 255
    labels = torch.from_numpy(bench.task.splits["train"].labels)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(network(images), labels)
    assert surface.loss[1, 1] == pytest.approx(loss.item(), rel=1e-5)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("measured before")

    monkeypatch.setattr(protocol_records, "loss_surface", refuse)
    protocol_records.add_surface(bench, "at", stored)


def test_rows_are_registered_by_one_measure_and_the_comparison_has_a_run(
    bench: protocol.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    rows = {name: row(bench, name, seed) for seed, name in enumerate(VAL)}
    weights = {
        name: protocol_records.saved_state(bench, stored.directory)
        for name, (_, stored) in rows.items()
    }
    asked: list[str] = []

    def judge(self: Any, state: Any) -> tuple[dict[str, float], float]:
        name = next(
            name
            for name, own in weights.items()
            if all(torch.equal(state[key], own[key]) for key in own)
        )
        asked.append(name)
        return VAL[name], 7.0

    monkeypatch.setattr(protocol.Bench, "judge", judge)
    for entry, stored in [*rows.values(), *rows.values()]:
        protocol_records.record_row(bench, entry, stored)
    assert asked == ["at", "e-at"]  # The second time everything is known.

    client = MlflowClient(bench.base.runtime.tracking_uri)
    name = "robustft-pictures-Linf-0.1-L2-1-L1-10"
    versions = {one.version: one for one in client.search_model_versions(f"name = '{name}'")}
    assert len(versions) == 2
    at, eat = (
        next(v for v in versions.values() if v.tags["run_id"] == f"row-{name}-0") for name in VAL
    )
    aliases = client.get_registered_model(name).aliases
    assert aliases["best-clean"] == at.version
    assert aliases["best-robust"] == at.version
    assert aliases["best-union"] == eat.version
    run = client.get_run(at.run_id)
    assert run.data.tags["part"] == "row"
    assert run.info.status == "FINISHED"
    found = {n: v for n, v in run.data.metrics.items() if n.startswith("protocol/")}
    assert found == {
        "protocol/val_clean": 0.7,
        "protocol/val_robust": pytest.approx(0.5),
        "protocol/val_union": 0.2,
        "protocol/search_passes": 150 + 1500,
        "protocol/search_seconds": 12.0,
        "protocol/training_passes": 1500,
        "protocol/memory": 512.0,
    }

    findings = protocol.Findings(
        data="pictures",
        command="robustft compare",
        options={},
        seeds=(0, 1),
        tolerance=0.01,
        budget=5000.0,
        sizes={},
        columns={"clean": "clean", "Linf": "Linf/robust", "L2": "L2/robust"},
        paired=("clean",),
        reference=(0.7, 0.5),
        methods=[entry for entry, _ in rows.values()],
    )
    (bench.output / "table.md").write_text("| table |", encoding="utf-8")
    for _ in range(2):
        protocol_records.record_comparison(bench, findings, "| table |")
    experiment = client.get_run(at.run_id).info.experiment_id
    (parent,) = client.search_runs([experiment], "tags.kind = 'comparison'")
    assert parent.data.tags["mlflow.note.content"] == "| table |"
    assert parent.data.params["methods"] == '["at", "e-at"]'
    assert {one.path for one in client.list_artifacts(parent.info.run_id)} == {"table.md", "tables"}
    shown = json.loads((bench.output / "tables" / "comparison.json").read_text(encoding="utf-8"))
    assert shown["columns"][:4] == ["method", "clean", "Linf", "lr"]
    assert shown["data"][0][:4] == ["at", pytest.approx(0.85), 0.6, 0.01]
