"""What figures of a run are drawn from; files that cannot be read cost one figure, not the page."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustft.evaluation.loss_surface import LossSurface
from robustft.runtime.run_figures import SURFACES, file_panels, staged, tolerance_of


def names(directory: Path, method: dict[str, Any], where: Path) -> list[str]:
    panels = file_panels(directory, {"method": method}, working_directory=where)
    return [panel.name for panel in panels]


def test_epochs_know_their_stage() -> None:
    curves = [
        {"trial": "start", "table": "epochs", "epoch": 1},
        {"trial": "lr=1", "table": "interpolation", "alpha": 0.0},
        {"trial": "lr=1", "table": "epochs", "epoch": 1},
    ]
    found = [(row["trial"], row["stage"], row["epoch"]) for row in staged(curves, "rift")]
    assert found == [(None, "start", 1), ("lr=1", "rift", 1)]


@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        ({"interpolate": None, "method": {"tolerance": 0.01}}, 0.01),
        ({"interpolate": {"tolerance": 0.02}, "method": {"tolerance": 0.01}}, 0.02),
        ({"method": {"interpolate": {"tolerance": 0.03}}}, 0.03),
        ({"method": {"interpolate": None}}, 0.0),
    ],
)
def test_the_tolerance_is_that_of_the_line(config: dict[str, Any], tolerance: float) -> None:
    assert tolerance_of(config) == tolerance


def test_a_surface_left_in_the_folder_is_drawn(tmp_path: Path) -> None:
    axis, values = np.linspace(-0.2, 0.2, 3), np.full((3, 3), 2.0)
    values[1, 1] = 0.5
    surface = LossSurface(x=axis, y=axis, loss=values, accuracy=values / 4, metadata={})
    assert names(tmp_path, {}, tmp_path) == []
    surface.save(tmp_path / SURFACES / "1-model.npz")
    assert names(tmp_path, {}, tmp_path) == ["loss-surface"]


def test_what_cannot_be_read_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / SURFACES / "1-model.npz"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no surface")
    (tmp_path / "statistics").mkdir()
    method = {"collect": {"folder": "statistics"}}
    with caplog.at_level(logging.WARNING):
        assert names(tmp_path, method, tmp_path) == []
    assert len(caplog.records) == 2
    assert "1-model.npz" in caplog.text
    assert "statistics" in caplog.text


@pytest.mark.parametrize("place", [None, "gone", "s3://bucket/statistics"])
def test_statistics_that_are_not_here_are_no_error(
    place: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    method = {"group": {"statistics": place}, "collect": None}
    assert names(tmp_path, method, tmp_path) == []
    assert caplog.records == []
