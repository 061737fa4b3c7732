"""Which figures the recorded rows of a run allow, and how they are drawn.

A method writes what it has to say into tables of rows (:mod:`robustft.methods.base`). No figure
here asks which method that was: what is drawn depends on the columns alone, so that a new method
that records the same columns gets the same figures.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from robustft.evaluation import plots
from robustft.evaluation.drawing import INK, MUTED, REST, STYLE, blank_figure, end_labels

__all__ = [
    "FIGURES",
    "Choice",
    "MethodFigure",
    "drawable",
    "mask_shares",
    "norm_frequencies",
    "scalar_schedules",
]

Rows = Sequence[Mapping[str, Any]]

SCHEDULES = {"lr": "learning rate", "lambda1": "lambda1", "lambda2": "lambda2"}
"""Columns of scalars that a method changes from epoch to epoch, and what they are called."""
KEPT = "mask/kept"
CHURN = "mask/churn"
KINDS = {
    KEPT: "all",
    f"{KEPT}_attention": "attention",
    f"{KEPT}_ffn": "ffn",
    f"{KEPT}_norm": "norm",
    f"{KEPT}_other": "other",
}
"""Columns with the share of tensors that ROSE's masks keep, by kind of tensor."""
LOOKS: tuple[tuple[str, str, Any], ...] = (
    (INK, "o", "-"),
    (MUTED, "s", (0, (5, 2))),
    ("#7d6fc0", "^", "-"),
    ("#c05a86", "D", (0, (6, 2, 1.5, 2))),
    (REST, "v", "-"),
)
"""Colour, marker and dashes of the lines of a panel; beyond these they repeat. No colour of clean,
robust or chosen is among them, since these lines are none of that."""
FEW = 15
"""Epochs up to which each has a marker."""


class Choice(NamedTuple):
    """What of a run is drawn.

    Args:
        trial: the chosen trial, drawn bold or alone; None: the first.
        alpha: the chosen interpolation weight, if there was one.
        tolerance: how far robust accuracy may fall below the start's: a fraction.
        split: where the choice was made, as a reader should see it.
    """

    trial: str | None = None
    alpha: float | None = None
    tolerance: float = 0.0
    split: str = "the selection split"


class MethodFigure(NamedTuple):
    """A figure that some runs allow.

    Args:
        table: whose rows it shows.
        columns: patterns (``re.fullmatch``), each of which some column must match that holds a
            number.
        draw: rows and choice -> figure.
        alt: what it shows, for those who do not see it.
        caption: how to read it; ``{split}`` is the choice's.
        keep: columns of its table of numbers that stay even if all rows agree; None: its numbers
            stand in another figure's table.
        affected: whether a leaky selection makes its numbers too good.
        alone: whether it shows the chosen trial alone, so that others' numbers do not count.
    """

    table: str
    columns: tuple[str, ...]
    draw: Callable[[Rows, Choice], Figure]
    alt: str
    caption: str
    keep: tuple[str, ...] | None = None
    affected: bool = False
    alone: bool = False

    def fits(self, rows: Rows, choice: Choice) -> bool:
        """Say whether the rows of its table have the numbers that it shows."""
        shown = _of_trial(rows, choice.trial) if self.alone else rows
        return all(_columns(shown, pattern) for pattern in self.columns)


def drawable(tables: Mapping[str, Rows], choice: Choice) -> dict[str, MethodFigure]:
    """Return the figures that the rows allow, in the order in which they are shown.

    Args:
        tables: table -> rows: "interpolation", "criticality" and "epochs", as methods return them;
            rows of the start, where there are any, have the trial None.
        choice: what of the run is drawn; without an alpha no interpolation is.
    """
    return {
        name: figure
        for name, figure in FIGURES.items()
        if (name != "interpolation" or choice.alpha is not None)
        and figure.fits(tables.get(figure.table, ()), choice)
    }


def scalar_schedules(rows: Rows, *, trial: str | None = None) -> Figure:
    """Draw scalars that change while training, against the epoch: learning rate, loss weights.

    Args:
        rows: epoch, some of the columns of SCHEDULES; optionally trial, None for the start, which
            is left out.
        trial: the one that is drawn; None: the first.

    Raises:
        ValueError: no row has such a column.
    """
    rows = _of_trial(rows, trial)
    known = {name: label for name, label in SCHEDULES.items() if _columns(rows, name)}
    if not known:
        raise ValueError(f"schedules need a column of {', '.join(SCHEDULES)}")
    with matplotlib.rc_context(STYLE):
        figure = blank_figure(height=0.75 + 1.05 * len(known))
        panels = figure.subplots(len(known), 1, squeeze=False, sharex=True)[:, 0]
        for axes, (name, label) in zip(panels, known.items(), strict=True):
            _lines(axes, rows, {name: ""}, factor=1.0)
            axes.set_ylabel(label)
            low, high = axes.get_ylim()
            # A weight that stays as it is shall not look like one that swings.
            room = max(0.0, 0.1 * abs(high) - (high - low)) / 2
            axes.set_ylim(low - room, high + room)
        _epoch_axis(panels[-1])
        panels[0].set_title("Schedules")
    return figure


def norm_frequencies(rows: Rows, *, trial: str | None = None) -> Figure:
    """Draw how often each norm was attacked in training, and the error that this was drawn from.

    Args:
        rows: epoch, "sampler/<norm>_share" (of the epoch's batches, in [0, 1]) and optionally
            "sampler/<norm>_error" (robust error on training batches, in [0, 1]) and trial.
        trial: the one that is drawn; None: the first.

    Raises:
        ValueError: no row has the share of a norm.
    """
    rows = _of_trial(rows, trial)
    shares = _columns(rows, "sampler/.+_share")
    if not shares:
        raise ValueError("norm frequencies need a column sampler/<norm>_share")
    errors = _columns(rows, "sampler/.+_error")
    with matplotlib.rc_context(STYLE):
        figure = blank_figure(height=0.75 + 1.75 * (1 + bool(errors)))
        panels = figure.subplots(1 + bool(errors), 1, squeeze=False, sharex=True)[:, 0]
        _lines(panels[0], rows, {name: _norm(name) for name in shares})
        panels[0].set_ylabel("batches attacked (%)")
        if errors:
            _lines(panels[1], rows, {name: _norm(name) for name in errors})
            panels[1].set_ylabel("robust error (%)")
        _epoch_axis(panels[-1])
        panels[0].set_title("Norms attacked in training")
    return figure


def mask_shares(rows: Rows, *, trial: str | None = None) -> Figure:
    """Draw how much of the network was trained, by kind of tensor, and how fast that changed.

    Args:
        rows: epoch, "mask/kept" and optionally "mask/kept_<kind>" (shares of tensors, in [0, 1]),
            "mask/churn" (mean change of a tensor's mask from step to step) and trial.
        trial: the one that is drawn; None: the first.

    Raises:
        ValueError: no row says what was kept.
    """
    rows = _of_trial(rows, trial)
    if not _columns(rows, KEPT):
        raise ValueError(f"mask shares need the column {KEPT}")
    changes = bool(_columns(rows, CHURN))
    with matplotlib.rc_context(STYLE):
        figure = blank_figure(height=0.75 + 1.75 * (1 + changes))
        panels = figure.subplots(1 + changes, 1, squeeze=False, sharex=True)[:, 0]
        _lines(panels[0], rows, {name: KINDS[name] for name in KINDS if _columns(rows, name)})
        panels[0].set_ylabel("tensors kept (%)")
        if changes:
            _lines(panels[1], rows, {CHURN: "churn"})
            panels[1].set_ylabel("changed per step (%)")
        _epoch_axis(panels[-1])
        panels[0].set_title("What the masks kept")
    return figure


def _interpolation(rows: Rows, choice: Choice) -> Figure:
    assert choice.alpha is not None
    return plots.interpolation_curve(
        rows, alpha=choice.alpha, tolerance=choice.tolerance, trial=choice.trial
    )


FIGURES: Mapping[str, MethodFigure] = {
    "interpolation": MethodFigure(
        table="interpolation",
        columns=("alpha", "clean", "robust"),
        draw=_interpolation,
        alt="clean and robust accuracy against the interpolation weight alpha",
        caption="Measured on {split}. Among the points whose robust accuracy is not below the "
        "dotted line, the one with the highest clean accuracy is taken.",
        keep=("alpha", "clean", "robust"),
        affected=True,
    ),
    "criticality": MethodFigure(
        table="criticality",
        columns=("index", "criticality", "accuracy_drop"),
        draw=lambda rows, _: plots.criticality_bars(rows),
        alt="robust criticality of every layer",
        caption="How much the loss on stored adversarial images can be made to grow by moving one "
        "layer's weights a little; right, by how much accuracy on them then drops. A short bar "
        "suggests that the layer can be fine-tuned with little harm to robustness.",
        keep=("layer", "criticality", "accuracy_drop"),
    ),
    "training": MethodFigure(
        table="epochs",
        columns=("epoch", rf".*loss.*|.*(?:{plots.ACCURACY})"),
        draw=lambda rows, choice: plots.training_curves(rows, trial=choice.trial),
        alt="loss and accuracy against the epoch",
        caption="Bold: the chosen trial. Dashed: accuracy on training batches, which is not "
        "comparable to the solid lines on held-out examples.",
        keep=("stage", "epoch"),
    ),
    "schedules": MethodFigure(
        table="epochs",
        columns=("epoch", "|".join(SCHEDULES)),
        draw=lambda rows, choice: scalar_schedules(rows, trial=choice.trial),
        alt="learning rate and weights of the loss against the epoch",
        caption="The learning rate at the end of each epoch; where there are any, lambda1 weighs "
        "the natural loss (the rest to 1 the adversarial one) and lambda2 the divergence.",
        alone=True,
    ),
    "norms": MethodFigure(
        table="epochs",
        columns=("epoch", "sampler/.+_share"),
        draw=lambda rows, choice: norm_frequencies(rows, trial=choice.trial),
        alt="share of batches attacked in each norm, and robust errors, against the epoch",
        caption="Above: which part of an epoch's batches was attacked in each norm. Below: the "
        "robust error on training batches since the run began, from which norms are drawn.",
        alone=True,
    ),
    "masks": MethodFigure(
        table="epochs",
        columns=("epoch", KEPT),
        draw=lambda rows, choice: mask_shares(rows, trial=choice.trial),
        alt="share of tensors that the masks kept, and how often masks changed, against the epoch",
        caption="Above: the mean mask over tensors, all and by kind. Below: the mean change of a "
        "tensor's mask from one step to the next.",
        alone=True,
    ),
}
"""Name -> figure; the order is that of the page."""


def _columns(rows: Rows, pattern: str) -> list[str]:
    """Return the columns that match and in which some row has a number."""
    names = dict.fromkeys(name for row in rows for name in row)
    matching = [name for name in names if re.fullmatch(pattern, name)]
    return [name for name in matching if any(_finite(row.get(name)) for row in rows)]


def _of_trial(rows: Rows, trial: str | None) -> list[Mapping[str, Any]]:
    """Return the rows of a trial, or of the first; the start's only where there are no others."""
    groups: dict[str | None, list[Mapping[str, Any]]] = {}
    for row in rows:
        name = row.get("trial")
        groups.setdefault(None if name is None else str(name), []).append(row)
    if trial is not None and trial in groups:
        return groups[trial]
    trials = [group for name, group in groups.items() if name is not None]
    return trials[0] if trials else list(rows)


def _lines(axes: Axes, rows: Rows, names: Mapping[str, str], *, factor: float = 100.0) -> None:
    """Draw columns against the epoch, each with its own look, and write their names at the end.

    Args:
        axes: empty ones.
        rows: epoch and the columns.
        names: column -> what it is called; "" for a single one that needs no name.
        factor: what values are multiplied by.
    """
    ends = []
    for number, (name, label) in enumerate(names.items()):
        points = sorted(
            (row["epoch"], factor * row[name]) for row in rows if _finite(row.get(name))
        )
        color, marker, dashes = LOOKS[number % len(LOOKS)]
        axes.plot(
            *zip(*points, strict=True),
            color=color,
            linestyle=dashes,
            marker=marker if len(points) <= FEW else "",
            markersize=4,
            label=name,
        )
        if label:
            ends.append((points[-1][1], label, INK))
    axes.margins(x=0.06, y=0.15)
    if ends:
        end_labels(axes, ends, at=max(row["epoch"] for row in rows))


def _epoch_axis(axes: Axes) -> None:
    first, last = axes.dataLim.intervalx
    ticks = MaxNLocator(5, integer=True, min_n_ticks=1).tick_values(0, last)
    axes.set_xticks([tick for tick in ticks if first <= tick <= last])
    axes.set_xlabel("epoch")


def _norm(column: str) -> str:
    return column.removeprefix("sampler/").rpartition("_")[0]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
