"""What the figures of a run are drawn from: its rows as pages show them, and files beside them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robustft.data.storage import is_uri
from robustft.errors import ConfigError, DataError
from robustft.evaluation.instance_plots import data_map
from robustft.evaluation.loss_surface import load_surface
from robustft.evaluation.report import Panel
from robustft.evaluation.surface_plots import surface_figure
from robustft.methods.base import Row
from robustft.methods.instance_statistics import InstanceStatistics

__all__ = ["START", "SURFACES", "file_panels", "staged", "tolerance_of"]

log = logging.getLogger(__name__)

START = "start"
"""What the rows of the start have for a trial."""
SURFACES = Path("surface") / "surfaces"
"""Where a run's folder holds loss surfaces: robustft surface RUN --output RUN/surface."""


def staged(curves: Sequence[Row], method: str) -> list[Row]:
    """Return the rows of the table "epochs" with the stage that each belongs to.

    Args:
        curves: trial and table, then the table's own columns.
        method: what the stage after the start is called.
    """
    rows = []
    for row in curves:
        if row["table"] == "epochs":
            is_start = row["trial"] == START
            trial, stage = (None, START) if is_start else (row["trial"], method)
            rows.append({**row, "trial": trial, "stage": stage})
    return rows


def tolerance_of(config: Mapping[str, Any]) -> float:
    """Return what the weight line may cost in robust accuracy, a fraction; 0 without a line.

    Args:
        config: of an experiment, nested.
    """
    method = config["method"]
    line = config.get("interpolate") or method.get("interpolate") or method
    return float(line.get("tolerance", 0.0))


def file_panels(
    directory: Path, config: Mapping[str, Any], *, working_directory: Path
) -> list[Panel]:
    """Return the figures of what a run used or left in files: its data map and loss surfaces.

    What is not there any more is left out; what cannot be read is so too, and the log says why: a
    page about many runs does not fail for it.

    Args:
        directory: of the run.
        config: of its experiment, nested.
        working_directory: where the run was started; paths in ``config`` may be relative to it.
    """
    panels = []
    for draw in (
        lambda: _data_map(config["method"], working_directory),
        lambda: _surfaces(directory / SURFACES),
    ):
        try:
            panels += list(draw())
        except (ConfigError, DataError) as error:
            log.warning("a figure of %s is missing: %s", directory, error)
    return panels


def _data_map(method: Mapping[str, Any], working_directory: Path) -> Iterator[Panel]:
    """Yield the map of the statistics that the method chose instances by, or else wrote."""
    group, collect = method.get("group") or {}, method.get("collect") or {}
    named = group.get("statistics") or collect.get("folder")
    # Those of a store are not fetched for a picture.
    if named is None or is_uri(named) or not (working_directory / named).is_dir():
        return
    statistics = InstanceStatistics(working_directory / named)
    perturbation = group.get("perturbation") or next(iter(statistics.manifest.perturbations))
    summary = statistics.aggregate(perturbation)
    mean = summary.values["perturbed_loss_mean"]
    if not np.isfinite(mean).any():
        return
    yield Panel(
        "data-map",
        data_map(
            mean,
            summary.values["perturbed_loss_std"],
            correctness=summary.values["clean_correctness"],
            flip_rate=summary.values["flip_times"] / summary.num_records,
        ),
        "training instances by mean and standard deviation of their perturbed loss",
        f"{len(summary.ids):,} training instances over {summary.num_records} records, under "
        f"{perturbation}. Lower left: robust throughout training; right: not robust; high: "
        "swinging between both. robustft datamap shows which they are.",
        None,
    )


def _surfaces(folder: Path) -> Iterator[Panel]:
    # They are numbered: the order is that of the command that measured them.
    files = sorted(folder.glob("[0-9]*-*.npz"), key=lambda path: (path.name.index("-"), path.name))
    if not files:
        return
    names = [path.stem.partition("-")[2] for path in files]
    if len(set(names)) < len(names):
        names = [path.stem for path in files]
    surfaces = {name: load_surface(path) for name, path in zip(names, files, strict=True)}
    yield Panel(
        "loss-surface",
        surface_figure(surfaces),
        "loss as a surface over a plane of two random directions through the weights",
        "Height and colour: loss, logarithmic; the model is in the middle. Parts with a loss too "
        "high to be shown, or none, are grey.",
        None,
    )
