"""Figures of a run, drawn with matplotlib's object interface (no pyplot, no display needed).

Rows are what methods return as tables (:mod:`robustft.methods.base`): accuracies are fractions in
[0, 1], accuracy drops are percentage points, criticality is in nats.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from robustft.evaluation.drawing import (
    CHOSEN,
    CLEAN,
    HALO,
    INK,
    MUTED,
    PAPER,
    REST,
    ROBUST,
    SMALL,
    STYLE,
    Label,
    blank_figure,
    end_labels,
    place_labels,
    save_figures,
    shade_below,
    signed,
    span_points,
    text_columns,
    tip,
)
from robustft.evaluation.evaluation_plots import (
    corruption_accuracy,
    eps_curve,
    magnification,
    reliability_diagram,
    strip_figure,
)

__all__ = [
    "corruption_accuracy",
    "corruption_bars",
    "criticality_bars",
    "eps_curve",
    "interpolation_curve",
    "magnification",
    "reliability_diagram",
    "save_figures",
    "strip_figure",
    "training_curves",
    "trial_plane",
]

Rows = Sequence[Mapping[str, Any]]

DECADES_FOR_LOG = 1.5
"""Bars whose values spread wider than this are unreadable on a linear axis."""
FOCUS = 5.0
"""Percentage points below the start that the robust axis shows at most: curves that collapse would
flatten everything near the tolerance."""
MARGIN = 0.3
"""Percentage points shown below the chosen curve."""
ACCURACY = r"(?:^|[/_])(?:accuracy|clean|robust|pgd|apgd|adv|union|Linf|L2|L1)\d*$"
ATTACKED = r"robust|pgd|adv|union|Linf|L2|L1"


def criticality_bars(rows: Rows) -> Figure:
    """Draw the robust criticality of every layer, in network order.

    Args:
        rows: layer, index, criticality (nats, >= 0, may be infinite), accuracy_drop (points),
            and optionally eligible and chosen (both bool).
    """
    rows = sorted(_needed(rows, "criticality"), key=lambda row: row["index"])
    values = [float(row["criticality"]) for row in rows]
    with matplotlib.rc_context(STYLE):
        figure = blank_figure(height=1.0 + 0.185 * len(rows))
        axes, text = text_columns(figure, ("nats", "drop"), width=0.5)
        unit = _criticality_scale(axes, [value for value in values if math.isfinite(value)])
        for place, (row, value) in enumerate(zip(rows, values, strict=True)):
            _criticality_bar(axes, text, place, row, value)
        axes.set_yticks(range(len(rows)), [str(row["layer"]) for row in rows])
        for label, row in zip(axes.get_yticklabels(), rows, strict=True):
            label.set(family="DejaVu Sans Mono", size=SMALL, color=MUTED)
            if row.get("chosen"):
                label.set(color=INK, weight="bold")
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        notes = ["hollow: not eligible"] if not all(map(_eligible, rows)) else []
        notes += ["hatched: not finite"] if not all(map(math.isfinite, values)) else []
        axes.set_xlabel(f"robust criticality ({unit})\n{'; '.join(notes)}".strip())
        axes.set_title("Robust criticality by layer")
    return figure


def _criticality_scale(axes: Axes, finite: Sequence[float]) -> str:
    """Set the x axis and return its unit."""
    top = max(finite, default=0.0) or 1.0
    positive = [value for value in finite if value > 0]
    if positive and math.log10(top / min(positive)) > DECADES_FOR_LOG:
        # Linear below the smallest decade that matters: bars keep a true zero to start from.
        smallest = max(min(positive), top / 1e4)
        threshold = 10.0 ** math.floor(math.log10(smallest))
        axes.set_xscale("symlog", linthresh=threshold, linscale=0.5)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlim(0, top * 1.3)
        return f"nats, logarithmic above {threshold:g}"
    axes.set_xlim(0, top * 1.05)
    return "nats"


def _eligible(row: Mapping[str, Any]) -> bool:
    return bool(row.get("eligible", True))


def _criticality_bar(
    axes: Axes, text: Axes, place: int, row: Mapping[str, Any], value: float
) -> None:
    chosen, finite = bool(row.get("chosen")), math.isfinite(value)
    color = CHOSEN if chosen else REST
    bar = axes.barh(
        place,
        value if finite else axes.get_xlim()[1],
        height=0.72,
        facecolor=color if finite and _eligible(row) else PAPER,
        edgecolor=color,
        hatch=None if finite else "/////",
        linewidth=0.8,
    )[0]
    drop = float(row["accuracy_drop"])
    bar.set_gid(tip(f"{row['layer']}: {value:.4g} nats, accuracy drop {drop:.2f} points"))
    style: dict[str, Any] = {"size": SMALL, "va": "center", "ha": "right"}
    style |= {"color": INK, "weight": "bold"} if chosen else {"color": MUTED}
    text.text(1, place, f"{value:.2f}" if value >= 0.01 or value == 0 else f"{value:.1g}", **style)
    text.text(2, place, f"{drop:.1f} pt", **style)


def interpolation_curve(
    rows: Rows, *, alpha: float, tolerance: float, trial: str | None = None
) -> Figure:
    """Draw clean and robust accuracy between the starting and the fine-tuned weights.

    Args:
        rows: alpha, clean, robust (fractions); optionally trial or seed, which part the rows into
            curves.
        alpha: the chosen point.
        tolerance: how far robust accuracy may fall below its value at alpha 0: a fraction.
        trial: the chosen curve among several, drawn bold; None: the first.
    """
    curves = _groups(_needed(rows, "alpha", "clean", "robust"))
    chosen = curves.get(str(trial)) or next(iter(curves.values()))
    start = _at(chosen, 0.0)
    with matplotlib.rc_context(STYLE):
        figure = blank_figure(height=3.9)
        panels = figure.subplots(2, 1, sharex=True)
        for axes, name, color in zip(panels, ("clean", "robust"), (CLEAN, ROBUST), strict=True):
            style: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.35}
            for curve in curves.values():
                if curve is not chosen:
                    axes.plot(*_points(curve, "alpha", name), color=color, **style)
            axes.plot(*_points(chosen, "alpha", name), color=color, marker="o", markersize=4)
            values = [100 * row[name] for row in itertools.chain(*curves.values())]
            # Other trials may leave below: what the choice turned on is the chosen curve.
            lowest = min(100 * row[name] for row in chosen)
            span_points(axes, values, lowest=max(100 * start[name] - FOCUS, lowest - MARGIN))
            axes.set_ylabel(f"{name} accuracy (%)")
            _mark_alpha(axes, chosen, name, alpha, color)
        floor = 100 * (start["robust"] - tolerance)
        shade_below(panels[1], floor, f"tolerance: start - {100 * tolerance:g} points")
        _note_clipped(panels[1], min(100 * row["robust"] for row in chosen))
        panels[1].set_xlabel("interpolation weight alpha (0: start, 1: fine-tuned)")
        panels[1].set_xlim(-0.03, 1.03)
        panels[0].set_title("Between start and fine-tuned weights")
    return figure


def _mark_alpha(axes: Axes, curve: Rows, name: str, alpha: float, color: str) -> None:
    value, start = 100 * _at(curve, alpha)[name], 100 * _at(curve, 0.0)[name]
    axes.axvline(alpha, color=CHOSEN, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.plot(
        alpha,
        value,
        color=CHOSEN,
        marker="o",
        markersize=9,
        markerfacecolor="none",
        markeredgecolor=CHOSEN,
        markeredgewidth=1.8,
        zorder=4,
    )
    left = alpha > 0.5
    axes.annotate(
        f"alpha {alpha:g}: {value:.2f} % ({signed(value - start)})",
        (alpha, 1),
        (-6 if left else 6, -4),
        xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
        ha="right" if left else "left",
        va="top",
        size=8,
        weight="bold",
        color=color,
        bbox=HALO,
        zorder=5,
    )


def _note_clipped(axes: Axes, lowest: float) -> None:
    if lowest < axes.get_ylim()[0]:
        axes.annotate(
            f"falls to {lowest:.1f} %",
            (1, 0),
            (-4, 4),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="right",
            size=SMALL,
            color=ROBUST,
            bbox=HALO,
        )


def training_curves(rows: Rows, *, trial: str | None = None) -> Figure:
    """Draw loss and accuracies against the epoch, one column per stage.

    Args:
        rows: epoch, whatever metrics there are ("train/loss", "val/clean": fractions), and
            optionally stage and trial. Metrics may be missing in some epochs.
        trial: the curve drawn bold among several; None: all are.
    """
    rows = _needed(rows, "epoch")
    stages = list(dict.fromkeys(str(row.get("stage", "Training")) for row in rows))
    metrics = list(dict.fromkeys(key for row in rows for key in row))
    losses = [name for name in metrics if "loss" in name]
    shares = [name for name in metrics if re.search(ACCURACY, name)]
    rows_of_panels = (("loss (nats)", 1.0, losses), ("accuracy (%)", 100.0, shares))
    panels = [(label, factor, names) for label, factor, names in rows_of_panels if names]
    if not panels:
        raise ValueError("training curves need a column such as train/loss or val/clean")
    with matplotlib.rc_context(STYLE):
        figure = blank_figure(height=0.6 + 1.75 * len(panels))
        grid = figure.subplots(len(panels), len(stages), squeeze=False, sharex="col")
        labelled: set[str] = set()
        for column, stage in enumerate(stages):
            part = [row for row in rows if str(row.get("stage", "Training")) == stage]
            last = max(row["epoch"] for row in part)
            lowest = grid[0, column]
            for axes, (label, factor, names) in zip(grid[:, column], panels, strict=True):
                if not any(_finite(row.get(name)) for row in part for name in names):
                    axes.set_visible(False)
                    continue
                _training_panel(axes, _groups(part), names, factor=factor, trial=trial, last=last)
                lowest = axes
                if label not in labelled:
                    axes.set_ylabel(label)
                    labelled.add(label)
            grid[0, column].set_title(stage)
            lowest.set_xlabel("epoch")
            lowest.tick_params(labelbottom=True)
            ticks = MaxNLocator(5, integer=True, min_n_ticks=1).tick_values(0, last)
            lowest.set_xticks([tick for tick in ticks if 1 <= tick <= last])
    return figure


def _training_panel(
    axes: Axes,
    groups: Mapping[str, Rows],
    names: Sequence[str],
    *,
    factor: float,
    trial: str | None,
    last: float,
) -> None:
    ends: dict[str, tuple[float, str, str]] = {}
    for name, (key, rows) in itertools.product(names, groups.items()):
        points = [row for row in rows if _finite(row.get(name))]
        if not points:
            continue
        color = CLEAN if "clean" in name else ROBUST if re.search(ATTACKED, name) else MUTED
        bold = trial is None or key == trial or len(groups) == 1
        style: dict[str, Any] = {"zorder": 3} if bold else {"linewidth": 0.8, "alpha": 0.35}
        # Accuracy on training batches is dashed: it is not comparable to that on held-out data.
        style["linestyle"] = (0, (4, 2)) if name.startswith("train") and factor > 1 else "-"
        style["marker"] = "o" if len(points) == 1 else ""
        across, up = _points(points, "epoch", name, factor=factor)
        axes.plot(across, up, color=color, markersize=4, **style)
        if bold:
            ends.setdefault(name, (up[-1], name, color))
    axes.margins(x=0.03, y=0.12)
    end_labels(axes, list(ends.values()), at=last)


def trial_plane(
    rows: Rows,
    *,
    start: tuple[float, float] | None = None,
    tolerance: float = 0.0,
    curves: Rows = (),
) -> Figure:
    """Draw trials in the clean/robust plane of the selection split.

    Args:
        rows: val/clean, val/robust (fractions); optionally trial, label and chosen. Rows without
            finite values (failed trials) are left out.
        start: (clean, robust) of the model all trials started from.
        tolerance: how far robust accuracy may fall below the start's: a fraction.
        curves: trial, alpha, clean, robust: each trial's way from the start, drawn thin.
    """
    rows = _needed(rows, "val/clean", "val/robust")
    rows = sorted(rows, key=lambda row: (not row.get("chosen"), -row["val/clean"]))
    chosen = {str(row.get("trial")) for row in rows if row.get("chosen")}
    with matplotlib.rc_context(STYLE):
        figure = blank_figure(height=3.7)
        axes = figure.subplots()
        labels = [_trial_point(axes, row) for row in rows]
        heights = [y for _, y, _, _ in labels]
        if start is not None:
            labels = _start_point(axes, labels, 100 * start[0], 100 * start[1])
            floor = 100 * (start[1] - tolerance)
            span_points(axes, [*heights, 100 * start[1], floor], lowest=100 * start[1] - FOCUS)
            shade_below(axes, floor, f"tolerance: start - {100 * tolerance:g} points")
        axes.margins(x=0.14)
        axes.autoscale_view(scaley=start is None)
        axes.autoscale(enable=False)
        for key, curve in _groups(curves).items():
            style: dict[str, Any] = {"color": REST, "linewidth": 0.7, "alpha": 0.3, "zorder": 1}
            if key in chosen:
                style = {"color": CHOSEN, "linewidth": 1.2, "zorder": 2}
            way = sorted(curve, key=lambda row: row["alpha"])
            axes.plot(
                [100 * row["clean"] for row in way], [100 * row["robust"] for row in way], **style
            )
        axes.set_xlabel("clean accuracy on the selection split (%)")
        axes.set_ylabel("robust accuracy (%)")
        axes.set_title("Trials: clean against robust")
        place_labels(figure, axes, labels)
    return figure


def _trial_point(axes: Axes, row: Mapping[str, Any]) -> Label:
    x, y, chosen = 100 * row["val/clean"], 100 * row["val/robust"], bool(row.get("chosen"))
    point = axes.plot(
        x,
        y,
        marker="o",
        markersize=9 if chosen else 5.5,
        color=CHOSEN if chosen else REST,
        markeredgecolor=PAPER,
        markeredgewidth=0.7,
        linestyle="none",
        zorder=5 if chosen else 3,
    )[0]
    label = str(row.get("label", row.get("trial", "")))
    point.set_gid(tip(f"{label}: clean {x:.2f} %, robust {y:.2f} %"))
    return x, y, f"chosen: {label}" if chosen else label, chosen


def _start_point(axes: Axes, labels: Sequence[Label], x: float, y: float) -> list[Label]:
    """Mark the start; trials that chose to stay there share its label."""
    axes.plot(x, y, marker="D", markersize=7, color=INK, zorder=4, linestyle="none")
    moved = [label for label in labels if label[3] or math.dist(label[:2], (x, y)) > 1e-9]
    stayed = len(labels) - len(moved)
    note = f" and {stayed} trial{'s' if stayed > 1 else ''} that stayed" if stayed else ""
    return [(x, y, f"start{note}", True), *moved]


def corruption_bars(rows: Rows) -> Figure:
    """Draw the accuracy under every corruption before and after, and their mean.

    Args:
        rows: corruption, before, after (fractions), drawn in the given order.
    """
    rows = _needed(rows, "before", "after")
    mean: dict[str, Any] = {"corruption": "mean"}
    mean |= {name: float(np.mean([row[name] for row in rows])) for name in ("before", "after")}
    lines = [*rows, mean]
    with matplotlib.rc_context(STYLE):
        figure = blank_figure(height=1.0 + 0.24 * len(lines))
        axes, text = text_columns(figure, ("change",), width=0.2)
        for place, row in enumerate(lines):
            _corruption_line(axes, text, place, row, bold=row is mean)
        axes.axhline(len(rows) - 0.5, color=MUTED, linewidth=0.8)
        names = [str(row["corruption"]).replace("_", " ") for row in lines]
        axes.set_yticks(range(len(lines)), names)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.get_yticklabels()[-1].set_fontweight("bold")
        axes.set_ylim(len(lines) - 0.4, -0.9)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.12)
        axes.set_xlabel("accuracy, mean over severities (%)")
        axes.set_title("Common corruptions")
    return figure


def _corruption_line(
    axes: Axes, text: Axes, place: int, row: Mapping[str, Any], *, bold: bool
) -> None:
    before, after = 100 * row["before"], 100 * row["after"]
    axes.plot([before, after], [place, place], color=REST, linewidth=2.2, zorder=2)
    dot: dict[str, Any] = {"marker": "o", "markersize": 6.5, "linestyle": "none"}
    axes.plot(
        before,
        place,
        color=MUTED,
        markerfacecolor=PAPER,
        markeredgecolor=MUTED,
        markeredgewidth=1.5,
        zorder=3,
        **dot,
    )
    point = axes.plot(after, place, color=CHOSEN, zorder=4, **dot)[0]
    point.set_gid(tip(f"{row['corruption']}: {before:.2f} % before, {after:.2f} % after"))
    text.text(
        1,
        place,
        signed(after - before),
        ha="right",
        va="center",
        size=8,
        weight="bold" if bold else "normal",
    )
    if place == 0:
        outward = 5 if after >= before else -5
        for x, name, color, shift in (
            (before, "before", MUTED, -outward),
            (after, "after", CHOSEN, outward),
        ):
            axes.annotate(
                name,
                (x, 0),
                (shift, 5),
                textcoords="offset points",
                size=SMALL,
                ha="left" if shift > 0 else "right",
                color=color,
            )


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _needed(rows: Rows, *columns: str) -> list[Mapping[str, Any]]:
    """Return the rows that have a number in every column; a criticality may be infinite."""
    kept = [
        row
        for row in rows
        if all(
            _finite(row.get(name)) or (name == "criticality" and row.get(name) == math.inf)
            for name in columns
        )
    ]
    if not kept:
        raise ValueError(f"nothing to draw: no row has a number in {', '.join(columns)}")
    return kept


def _groups(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Part rows by trial (or seed, if there are no trials) in order of appearance."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row.get("trial", row.get("seed"))), []).append(row)
    return groups


def _at(curve: Rows, alpha: float) -> Mapping[str, Any]:
    return min(curve, key=lambda row: abs(row["alpha"] - alpha))


def _points(
    rows: Rows, across: str, up: str, *, factor: float = 100.0
) -> tuple[list[float], list[float]]:
    points = sorted((row[across], factor * row[up]) for row in rows)
    return [x for x, _ in points], [y for _, y in points]
