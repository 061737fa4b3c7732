"""The report of a run: one self-contained HTML page and its figures as PNG files.

The page needs no network and no JavaScript (which only adds sorting, tooltips and a copy button).
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

from robustft.config import to_dict
from robustft.errors import ResourceError
from robustft.evaluation import plots
from robustft.evaluation.drawing import THEME
from robustft.evaluation.method_figures import Choice, drawable
from robustft.evaluation.summary import (
    Estimate,
    ReportData,
    Stage,
    SummaryRow,
    Verdict,
    console_table,
    duration,
    facts,
    interval_text,
    percent,
    points,
    summary_lines,
    summary_row,
    verdict,
    write_summary,
)

__all__ = [
    "Estimate",
    "ReportData",
    "Stage",
    "SummaryRow",
    "Verdict",
    "console_table",
    "summary_lines",
    "summary_row",
    "verdict",
    "write_report",
    "write_summary",
]

Row = Mapping[str, Any]

MINUS = "\u2212"
HIDDEN = ("label", "chosen", "table")
"""Columns that the page shows in another form."""


class Cell(NamedTuple):
    """Text of a table's cell, and what it sorts by (text, or a number as text)."""

    text: str
    order: str


class Grid(NamedTuple):
    """A table of the page.

    Args:
        columns: (header, whether it holds numbers).
        rows: (whether it was chosen, cells).
        common: columns in which all rows agree, as text.
    """

    columns: list[tuple[str, bool]]
    rows: list[tuple[bool, list[Cell]]]
    common: str


class Panel(NamedTuple):
    """A figure of the page.

    Args:
        name: of its file.
        figure: drawn.
        alt: what it shows, for those who do not see it.
        caption: how to read it.
        table: its numbers, or None if they stand elsewhere on the page.
        affected: whether a leaky selection makes its numbers too good.
    """

    name: str
    figure: Figure
    alt: str
    caption: str
    table: Grid | None
    affected: bool = False


def write_report(directory: str | Path, data: ReportData, *, further: Sequence[Panel] = ()) -> Path:
    """Write ``report.html`` and ``plots/*.png`` into ``directory`` and return the page's path.

    Args:
        directory: made if it is missing.
        data: what the page shows.
        further: figures of what lies in files beside the rows: data map, loss surfaces.

    Raises:
        ResourceError: a file cannot be written.
    """
    tables = {
        "interpolation": data.interpolation,
        "criticality": data.criticality,
        "epochs": data.epochs,
    }
    choice = Choice(data.trial, data.chosen.get("alpha"), data.tolerance, data.selection_split)
    panels = [
        *_trial_panels(data),
        *method_panels(tables, choice),
        *_corruption_panels(data),
        *further,
    ]
    values = {
        "data": data,
        "verdict": verdict(data),
        "interval": f"{100 * data.confidence:g} %",
        "facts": facts(data),
        "trials": _grid(_trials(data), keep=("trial", "seed", "val/clean", "val/robust")),
        "total_seconds": sum(stage.seconds for stage in data.stages),
        "config": yaml.safe_dump(to_dict(data.config), sort_keys=False, width=88),
        "link": data.tracking_url if re.match(r"https?://", data.tracking_url or "") else None,
    }
    return write_page(directory, "report.html.j2", panels, values)


def write_page(
    directory: str | Path, template: str, panels: Sequence[Panel], values: Mapping[str, Any]
) -> Path:
    """Write ``report.html`` and the panels' ``plots/*.png`` and return the page's path.

    Args:
        directory: made if it is missing.
        template: name of the page's template.
        panels: figures; the template gets them as ``panels``, their SVG as ``drawings``.
        values: what else the template names.

    Raises:
        ResourceError: a file cannot be written.
    """
    folder = Path(directory)
    inline = plots.save_figures({panel.name: panel.figure for panel in panels}, folder / "plots")
    page = _template(template).render(
        **values,
        theme=[(name, light, dark) for light, (name, dark) in THEME.items()],
        panels=panels,
        # Our own drawing: every text in it has become outlines or an escaped title.
        drawings={name: Markup(svg) for name, svg in inline.items()},
    )
    path = folder / "report.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ResourceError(
            f"cannot write {path} ({error.strerror}): make room or choose another folder"
        ) from error
    return path


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "duration": duration,
        "interval": interval_text,
        "minus": _minus,
    }
    return environment.get_template(name)


def method_panels(tables: Mapping[str, Sequence[Row]], choice: Choice) -> Iterator[Panel]:
    """Yield the figures that the rows of a run allow, each with its numbers.

    Args:
        tables: see ``method_figures.drawable``.
        choice: what of the run is drawn.
    """
    for name, kind in drawable(tables, choice).items():
        rows = tables[kind.table]
        shown = [row for row in rows if _of_trial(row, choice.trial)]
        yield Panel(
            name,
            kind.draw(rows, choice),
            kind.alt,
            kind.caption.format(split=choice.split),
            None if kind.keep is None else _grid(shown or rows, keep=kind.keep),
            kind.affected,
        )


def _trial_panels(data: ReportData) -> Iterator[Panel]:
    finished = [row for row in _trials(data) if _finite(row, "val/clean", "val/robust")]
    if not finished:
        return
    ours = [row for row in data.interpolation if _of_trial(row, data.trial)]
    start = next(((row["clean"], row["robust"]) for row in ours if row["alpha"] == 0), None)
    yield Panel(
        "trials",
        plots.trial_plane(
            finished, start=start, tolerance=data.tolerance, curves=data.interpolation
        ),
        "trials in the plane of clean and robust accuracy",
        f"Each dot is a finished trial on {data.selection_split}: right is more accurate, up "
        "is more robust. Thin lines lead from the start to the fine-tuned weights; the chosen "
        "trial's is green.",
        None,
        affected=True,
    )


def _corruption_panels(data: ReportData) -> Iterator[Panel]:
    if data.corruptions:
        yield Panel(
            "corruptions",
            plots.corruption_bars(data.corruptions),
            "accuracy under common corruptions before and after",
            f"Accuracy under corruption on {data.report_split}: where the filled dot is right of "
            "the hollow one, the result is better than the start. Changes are in points.",
            _grid(data.corruptions, keep=("corruption", "before", "after")),
            affected=True,
        )


def _trials(data: ReportData) -> list[Row]:
    """Return the trials with the chosen one marked."""
    return [
        {
            **row,
            "chosen": bool(row.get("chosen"))
            or (data.trial is not None and str(row.get("trial")) == data.trial),
        }
        for row in data.trials
    ]


def _minus(text: str) -> str:
    """Give negative numbers a true minus; hyphens in names stay."""
    return re.sub(r"(?<![\w.\-])-(?=[\d.])", MINUS, text)


def _grid(rows: Sequence[Row], keep: Sequence[str] = ()) -> Grid:
    """Lay rows out as a table; columns in which all agree become one line below it."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    names = [name for name in names if name not in HIDDEN]
    alike = [
        name
        for name in names
        if len(rows) > 1 and name not in keep and len({repr(row.get(name)) for row in rows}) == 1
    ]
    shown = [name for name in names if name not in alike]
    columns = []
    for name in shown:
        number = all(_number(row.get(name)) or row.get(name) is None for row in rows)
        columns.append((_header(name), number))
    cells = [
        (bool(row.get("chosen")), [_cell(name, row.get(name)) for name in shown]) for row in rows
    ]
    alike = [name for name in alike if rows[0].get(name) not in (None, "")]
    common = ", ".join(f"{_header(name)} {_cell(name, rows[0][name]).text}" for name in alike)
    return Grid(columns, cells, common)


def _header(name: str) -> str:
    text = name.replace("_", " ")
    if re.search(plots.ACCURACY, name) or name in ("before", "after"):
        return f"{text} (%)"
    units = {"criticality": " (nats)", "accuracy_drop": " (points)", "seconds": " (s)"}
    return text + units.get(name, "")


def _cell(name: str, value: Any) -> Cell:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return Cell("-", "")
    if isinstance(value, bool):
        return Cell("yes" if value else "no", str(int(value)))
    if not _number(value):
        return Cell(str(value), str(value))
    if _header(name).endswith("(%)"):
        return Cell(percent(value), repr(value))
    if name in ("seconds", "accuracy_drop"):
        return Cell(f"{value:.1f}", repr(value))
    return Cell(f"{value:.4g}" if isinstance(value, float) else str(value), repr(value))


def _of_trial(row: Row, trial: str | None) -> bool:
    """Say whether a row is the trial's, or of none: the start's, a layer's."""
    return trial is None or row.get("trial") is None or str(row["trial"]) == trial


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(row: Row, *names: str) -> bool:
    return all(_number(row.get(name)) and math.isfinite(row[name]) for name in names)
