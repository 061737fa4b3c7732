"""Which figures a run's rows allow, and that these show the rows' numbers."""

from collections.abc import Callable
from typing import Any

import pytest
from matplotlib.figure import Figure

from robustft.evaluation.method_figures import (
    FIGURES,
    Choice,
    drawable,
    mask_shares,
    norm_frequencies,
    scalar_schedules,
)
from robustft.evaluation.plots import training_curves
from robustft.evaluation.report import method_panels

Row = dict[str, Any]

START: list[Row] = [{"trial": None, "stage": "start", "epoch": 1, "train/loss": 2.0, "lr": 9.0}]


def epochs(trial: str = "b", shift: float = 0.0, **columns: tuple[float, ...]) -> list[Row]:
    """Return rows of epochs 1, 2, ...; "__" in a column's name stands for "/"."""
    names = [name.replace("__", "/") for name in columns]
    return [
        {"trial": trial, "stage": "toy", "epoch": epoch}
        | {name: value + shift for name, value in zip(names, values, strict=True)}
        for epoch, values in enumerate(zip(*columns.values(), strict=True), start=1)
    ]


def lines(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    """Return what is drawn: column -> (epochs, heights)."""
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))
        for axes in figure.axes
        for line in axes.lines
    }


def words(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_schedules_of_the_chosen_trial_in_their_own_units() -> None:
    columns = {"lr": (0.1, 0.01), "lambda1": (0.2, 0.3), "lambda2": (4.0, 3.5)}
    rows = START + epochs("a", shift=5.0, **columns) + epochs("b", **columns)
    figure = scalar_schedules(rows, trial="b")
    assert lines(figure) == {name: ([1, 2], list(values)) for name, values in columns.items()}
    assert [axes.get_ylabel() for axes in figure.axes] == ["learning rate", "lambda1", "lambda2"]
    assert lines(scalar_schedules(rows))["lr"][1] == [5.1, 5.01], "None: the first trial"
    assert lines(scalar_schedules(START))["lr"] == ([1], [9.0]), "where there is no other trial"


def test_what_is_constant_does_not_look_as_if_it_swung() -> None:
    figure = scalar_schedules(epochs(lr=(0.5, 0.5, 0.5 + 1e-12)))
    low, high = figure.axes[0].get_ylim()
    assert high - low > 0.04


def test_norm_frequencies_are_percentages_of_batches() -> None:
    rows: list[Row] = [{"trial": "b", "epoch": 0, "val/clean": 0.7}]
    rows += epochs(
        sampler__Linf_share=(0.25, 0.5),
        sampler__L1_share=(0.75, 0.5),
        sampler__Linf_error=(0.4, 0.3),
        sampler__L1_error=(0.6, 0.7),
    )
    figure = norm_frequencies(rows)
    shares, errors = figure.axes
    assert (shares.get_ylabel(), errors.get_ylabel()) == (
        "batches attacked (%)",
        "robust error (%)",
    )
    assert lines(figure)["sampler/Linf_share"] == ([1, 2], [25.0, 50.0])
    assert lines(figure)["sampler/L1_error"][1] == pytest.approx([60.0, 70.0])
    assert sorted(words(figure)) == ["L1", "L1", "Linf", "Linf"]
    assert list(shares.get_xticks()) == [1, 2], "the start, epoch 0, attacked nothing"
    looks = [(line.get_color(), line.get_marker()) for line in shares.lines]
    assert len(set(looks)) == 2, "norms differ in colour and marker"
    for row in rows:
        row.pop("sampler/L1_error", None)
        row.pop("sampler/Linf_error", None)
    assert len(norm_frequencies(rows).axes) == 1


def test_masks_by_kind_and_their_churn() -> None:
    rows = epochs(
        mask__kept=(0.5, 0.4),
        mask__kept_scalars=(0.9, 0.9),
        mask__kept_norm=(0.1, 0.2),
        mask__kept_attention=(0.6, 0.7),
        mask__churn=(0.0, 0.25),
    )
    figure = mask_shares(rows)
    kept, churn = figure.axes
    assert lines(figure)["mask/kept_attention"] == ([1, 2], [60.0, 70.0])
    assert [line.get_label() for line in kept.lines] == [
        "mask/kept",
        "mask/kept_attention",
        "mask/kept_norm",
    ]
    assert [list(line.get_ydata()) for line in churn.lines] == [[0.0, 25.0]]
    assert {"all", "attention", "norm", "churn"} <= set(words(figure))


def test_training_curves_leave_norms_and_schedules_to_their_own_figures() -> None:
    rows = epochs(train__loss=(1.0, 0.5), lr=(0.1, 0.2), sampler__L1_share=(0.5, 0.5))
    assert len(training_curves(rows).axes) == 1


@pytest.mark.parametrize("draw", [scalar_schedules, norm_frequencies, mask_shares])
def test_rows_without_the_columns_are_refused(draw: Callable[..., Figure]) -> None:
    with pytest.raises(ValueError, match="need"):
        draw(epochs(train__loss=(1.0,)))


def test_rows_allow_what_they_have_numbers_for() -> None:
    choice = Choice(trial="b", alpha=0.5)
    curve = [{"trial": "b", "alpha": a, "clean": 0.8, "robust": 0.5} for a in (0.0, 0.5, 1.0)]
    layers = [{"layer": "conv1", "index": 0, "criticality": 0.1, "accuracy_drop": 2.0}]
    everything = epochs(train__loss=(1.0,), lr=(0.1,), sampler__L1_share=(0.5,), mask__kept=(0.5,))
    tables = {"epochs": everything, "interpolation": curve, "criticality": layers}
    assert list(drawable(tables, choice)) == list(FIGURES)
    assert "interpolation" not in drawable(tables, choice._replace(alpha=None))
    assert list(drawable({"epochs": epochs(train__loss=(1.0,))}, choice)) == ["training"]
    unknown = epochs(train__loss=(1.0,), lr=(float("nan"),))
    assert list(drawable({"epochs": unknown}, choice)) == ["training"]
    assert list(drawable({"epochs": [{"epoch": 1, "val/clean": 0.5}]}, choice)) == ["training"]
    assert drawable({}, choice) == {}
    # The start's rate alone is no schedule of the method.
    begun = [*START, *epochs(train__loss=(1.0,))]
    assert list(drawable({"epochs": begun}, choice)) == ["training"]
    assert [panel.name for panel in method_panels({"epochs": begun}, choice)] == ["training"]


def test_panels_carry_the_numbers_of_the_chosen_trial_once() -> None:
    rows = (
        START + epochs("a", train__loss=(3.0,), lr=(0.3,)) + epochs(train__loss=(1.0,), lr=(0.1,))
    )
    panels = {panel.name: panel for panel in method_panels({"epochs": rows}, Choice("b"))}
    assert list(panels) == ["training", "schedules"]
    table = panels["training"].table
    assert table is not None
    losses = [cell.text for _, cells in table.rows for cell in cells if cell.text in "1 2 3"]
    assert "3" not in losses
    assert panels["schedules"].table is None
    assert panels["schedules"].figure is not panels["training"].figure
