"""``robustft surface`` on small stored models: whose data, what is written, what is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from text_fixtures import tiny_text_start, tiny_text_task

from robustft.config import to_dict
from robustft.data import load_task
from robustft.errors import CheckpointError, ConfigError
from robustft.evaluation.loss_surface import load_surface
from robustft.models import Start, save_model
from robustft.models.text import save_text_model
from robustft.runtime.experiment import Experiment, experiment_to_dict, load_experiment
from robustft.surface_verb import Surface, draw_surfaces

FEW = {"points": 3, "limit": 8, "batch_size": 8}


def write_run(folder: Path, experiment: Experiment) -> Path:
    """Write what a run leaves that a surface needs: its configuration and its model."""
    task = load_task(experiment.task)
    start = Start(
        architecture="small_resnet",
        num_classes=task.num_classes,
        image_shape=task.image_shape,
        mean=task.mean,
        std=task.std,
    )
    state = start.build().state_dict()
    save_model(folder / "model", start=start, state=state, card={})
    # JSON is YAML.
    text = json.dumps(to_dict(experiment_to_dict(experiment)))
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    experiment = load_experiment("rift-embedded")
    return write_run(tmp_path_factory.mktemp("runs") / "one", experiment)


def test_a_run_brings_its_own_data(run: Path, tmp_path: Path) -> None:
    own = draw_surfaces(Surface(models=(str(run),), output=tmp_path / "own", **FEW))
    verb = Surface(models=(str(run),), data="fashion_mnist_mini", output=tmp_path / "named", **FEW)
    named = draw_surfaces(verb)
    one = load_surface(Path(own.document["surfaces"][str(run)]))
    other = load_surface(Path(named.document["surfaces"][str(run)]))
    assert np.array_equal(one.loss, other.loss)
    assert one.metadata == other.metadata
    page = (tmp_path / "own" / "report.html").read_text(encoding="utf-8")
    assert "fashion_mnist_mini, train" in page


def test_data_that_the_run_names_are_looked_for(run: Path, tmp_path: Path) -> None:
    experiment = load_experiment("rift-embedded")
    elsewhere = dataclasses.replace(experiment.task, data="cifar10", root=str(tmp_path / "none"))
    folder = write_run(tmp_path / "run", experiment)
    changed = experiment_to_dict(dataclasses.replace(experiment, task=elsewhere))
    (folder / "config.yaml").write_text(json.dumps(to_dict(changed)), encoding="utf-8")
    with pytest.raises(Exception, match="cifar10") as caught:
        draw_surfaces(Surface(models=(str(folder),), output=tmp_path / "out", **FEW))
    assert str(tmp_path / "none") in str(caught.value)
    # What the command line says goes before what the run says.
    verb = Surface(models=(str(folder),), data="fashion_mnist_mini", output=tmp_path / "out", **FEW)
    assert draw_surfaces(verb).document["rows"][0]["model"] == str(folder)


def test_a_text_model_is_told_that_the_data_are_images(tmp_path: Path) -> None:
    start = tiny_text_start(tiny_text_task(), "bert")
    save_text_model(tmp_path / "model", start=start, state=start.build().state_dict(), card={})
    with pytest.raises(CheckpointError, match="describes a text model"):
        draw_surfaces(Surface(models=(str(tmp_path / "model"),), output=tmp_path / "o", **FEW))


def test_two_models_of_one_name_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="different names"):
        draw_surfaces(Surface(models=(str(run), str(run)), output=tmp_path, **FEW))
