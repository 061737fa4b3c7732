"""What a run's report says, as data and as words: estimates, the verdict, the table for terminals.

Nothing here claims more than the intervals allow; numbers whose split also chose something carry
the word "leaky" wherever they appear.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from robustft.evaluation.intervals import mean_interval, paired_bootstrap, wilson

__all__ = [
    "Estimate",
    "ReportData",
    "Stage",
    "SummaryRow",
    "Verdict",
    "console_table",
    "duration",
    "facts",
    "interval_text",
    "percent",
    "points",
    "summary_lines",
    "summary_row",
    "verdict",
    "write_summary",
]

Rows = Sequence[Mapping[str, Any]]
Kind = Literal["clean", "robust", "corruptions"]

MINUTE, HOUR = 60, 3600
HEADERS = ("", "before", "after", "change (points)", "n")
FACTS = {"layer": "layer", "lr": "learning rate", "alpha": "alpha", "bn_mode": "BatchNorm"}
"""Choices that the page and the terminal show first, under these names."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A measured fraction, or a difference of two, with its interval.

    Args:
        value: accuracy in [0, 1], or a difference in [-1, 1].
        low, high: ends of the interval; infinite where nothing is known about the spread.
        n: how many images (or seeds) it stands on.
    """

    value: float
    low: float
    high: float
    n: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SummaryRow:
    """One measurement before and after.

    Args:
        name: as the reader should see it: "Clean", "PGD-20, Linf 8/255".
        kind: "robust" rows decide whether robustness was kept.
        before, after: accuracies; None where not measured.
        change: after - before with a *paired* interval; None leaves the difference bare.
    """

    name: str
    kind: Kind
    before: Estimate | None
    after: Estimate | None
    change: Estimate | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """What a part of the run cost: wall seconds, and passes over single images if counted."""

    name: str
    seconds: float
    num_forwards: int | None = None
    num_backwards: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReportData:
    """Everything the report shows. Accuracies are fractions, times are seconds."""

    title: str
    """Name of the experiment."""
    sentence: str
    """What was done, in one sentence."""
    run_id: str
    created: str
    """Date and time with zone, as it should be read."""
    commit: str
    """Of the code, with "+changes" if there were any."""
    command: str
    """The exact command that repeats the run."""
    versions: Mapping[str, str]
    config: Mapping[str, Any]
    """The whole configuration, nested."""
    summary: Sequence[SummaryRow]
    chosen: Mapping[str, Any]
    """What was chosen: layer, lr, alpha, ...; "trial" names the row of ``trials``."""
    tolerance: float = 0.0
    """How far robust accuracy was allowed to fall: a fraction."""
    selection_split: str = "val"
    report_split: str = "test"
    leaky: bool = False
    """The split that is reported also chose something."""
    confidence: float = 0.95
    """Of all intervals."""
    warnings: Sequence[str] = ()
    stages: Sequence[Stage] = ()
    wall_seconds: float | None = None
    overhead: float | None = None
    """Share of the wall time in which no method code ran, in [0, 1]."""
    trials: Rows = ()
    criticality: Rows = ()
    interpolation: Rows = ()
    epochs: Rows = ()
    corruptions: Rows = ()
    run_directory: str = ""
    report_path: str = ""
    """The page itself, for the terminal."""
    tracking_url: str | None = None
    """The MLflow run: a link if it is http(s), else shown as text."""

    @property
    def trial(self) -> str | None:
        """Name of the chosen trial."""
        return None if self.chosen.get("trial") is None else str(self.chosen["trial"])


class Verdict(NamedTuple):
    """Whether robustness was kept, and the sentence that says so."""

    state: Literal["kept", "lost", "open", "unchanged", "unmeasured"]
    text: str


def summary_row(
    name: str,
    kind: Kind,
    before: NDArray[Any],
    after: NDArray[Any],
    *,
    confidence: float = 0.95,
) -> SummaryRow:
    """Build a row from per-example outcomes of two models on the same images.

    Args:
        name, kind: see SummaryRow.
        before, after: ``[n]``, in the same order: bool masks (Wilson's intervals), or means per
            image in [0, 1] (Student's t). The change has a paired bootstrap interval.
        confidence: of all three intervals.
    """
    low, high = paired_bootstrap(before, after, confidence=confidence)
    if before.dtype == after.dtype == np.bool_ and bool((before == after).all()):
        # Resampling finds no spread where no image differs; the rate at which others would differ
        # is still only known to be below this exact bound (about 3 / n at 95 %).
        high = 1 - (1 - confidence) ** (1 / len(before))
        low = -high
    value = float(np.mean(after, dtype=np.float64) - np.mean(before, dtype=np.float64))
    return SummaryRow(
        name=name,
        kind=kind,
        before=_estimate(before, confidence),
        after=_estimate(after, confidence),
        change=Estimate(value=value, low=low, high=high, n=len(before)),
    )


def _estimate(outcomes: NDArray[Any], confidence: float) -> Estimate:
    n = len(outcomes)
    if outcomes.dtype == np.bool_:
        low, high = wilson(int(outcomes.sum()), n, confidence)
    else:
        low, high = mean_interval(outcomes, confidence)
        if math.isfinite(low):
            low, high = max(0.0, low), min(1.0, high)
    return Estimate(value=float(np.mean(outcomes)), low=low, high=high, n=n)


def verdict(data: ReportData) -> Verdict:
    """Say whether robustness was kept, as far as the intervals of the changes allow.

    Kept: every robust row's interval lies above minus the tolerance. Lost: some row's lies below.
    Everything else is open: the data cannot tell. Unchanged: alpha 0 gives back the start.
    """
    changes = [row.change for row in data.summary if row.change is not None]
    if data.chosen.get("alpha") == 0 and all(change.value == 0 for change in changes):
        return Verdict("unchanged", "The chosen alpha is 0: the result is the start itself.")
    allowed = f"a loss of {100 * data.tolerance:g} points was allowed"
    states, parts = set(), []
    for row in data.summary:
        if row.kind != "robust" or row.before is None or row.after is None:
            continue
        change = row.change
        bare = "" if change is None else f", interval {interval_text(change, digits=2, sign=True)}"
        parts.append(f"{row.name} changed by {points(_difference(row))} points{bare}")
        if change is None or not math.isfinite(change.low):
            states.add("open")  # No interval, no claim.
        elif change.high < -data.tolerance:
            states.add("lost")
        else:
            states.add("kept" if change.low >= -data.tolerance else "open")
    if not parts:
        return Verdict("unmeasured", "Robust accuracy was not measured before and after.")
    measured = f"{'; '.join(parts)}; {allowed}."
    if "lost" in states:
        return Verdict("lost", f"Robustness was not kept on {data.report_split}: {measured}")
    if "open" in states:
        text = f"Not decided on {data.report_split} whether robustness was kept: {measured}"
        return Verdict("open", text)
    return Verdict("kept", f"Robustness was kept on {data.report_split}: {measured}")


def facts(data: ReportData) -> dict[str, str]:
    """Return what was chosen as name -> text, the headline choices first."""
    # Leakiness has its badge.
    chosen = {k: v for k, v in data.chosen.items() if v is not None and k != "leaky"}
    order = [name for name in FACTS if name in chosen]
    order += [name for name in chosen if name not in FACTS]
    return {FACTS.get(name, name): _plain(chosen[name]) for name in order}


def console_table(data: ReportData) -> Group:
    """Return the end of a run for a rich console: the table, the verdict, choices and places."""
    table = Table(title=Text(data.title, style="bold"), title_justify="left")
    for header in HEADERS:
        table.add_column(header, justify="right" if header else "left", no_wrap=bool(header))
    for cells in _cells(data):
        # Text, not str: names must not be read as markup.
        table.add_row(Text(cells[0], style="bold"), *map(_two_lines, cells[1:]))
    style = {"kept": "green", "lost": "bold red"}.get(verdict(data).state, "yellow")
    notes = [Text(line, style="bold red") for line in _warnings(data)]
    places = [Text(f"{name}: {text}", overflow="fold") for name, text in _places(data)]
    return Group(table, Text(verdict(data).text, style=style), *notes, *places)


def _two_lines(cell: str) -> Text:
    """Put interval and mark below the number, so that the table fits into 80 columns."""
    number, bracket, rest = cell.partition(" [")
    text = Text(number, style="bold")
    below = f"\n[{rest}".replace("] (", "]\n(")
    return text.append(below, style="not bold dim") if bracket else text


def summary_lines(data: ReportData) -> str:
    """Return the same as plain aligned ASCII text: for logs, pipes and files."""
    cells = [HEADERS, *_cells(data)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADERS))]
    lines = [data.title]
    for row in cells:
        texts = [row[0].ljust(widths[0])]
        texts += [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(texts).rstrip())
    lines += [verdict(data).text, *_warnings(data)]
    lines += [f"{name}: {text}" for name, text in _places(data)]
    return "\n".join(lines) + "\n"


def write_summary(data: ReportData, stream: TextIO) -> None:
    """Write the table to ``stream``: styled on a terminal, plain elsewhere."""
    if stream.isatty():
        Console(file=stream).print(console_table(data))
    else:
        stream.write(summary_lines(data))


def percent(value: float, digits: int = 2) -> str:
    """Return a fraction as a percentage without its sign."""
    return f"{100 * value:.{digits}f}"


def points(difference: float, digits: int = 2) -> str:
    """Return a difference of fractions in percentage points, with its sign."""
    return f"{100 * difference:+.{digits}f}"


def interval_text(estimate: Estimate, *, digits: int = 1, sign: bool = False) -> str:
    """Return "82.7 to 84.1"; "unknown" where nothing is known about the spread."""
    if not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
        return "unknown"
    show = points if sign else percent
    return f"{show(estimate.low, digits)} to {show(estimate.high, digits)}"


def duration(seconds: float) -> str:
    """Return "4.2 s", "3 min 05 s" or "2 h 07 min"."""
    if seconds < MINUTE:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < HOUR:
        return f"{whole // MINUTE} min {whole % MINUTE:02d} s"
    minutes = round(seconds / MINUTE)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _cells(data: ReportData) -> list[tuple[str, ...]]:
    mark = " (leaky)" if data.leaky else ""
    rows: list[tuple[str, ...]] = []
    for row in data.summary:
        measured = [estimate for estimate in (row.before, row.after) if estimate is not None]
        change = "-"
        if len(measured) == 2:
            change = points(_difference(row))
        if row.change is not None:
            change += f" [{interval_text(row.change, digits=2, sign=True)}]"
        rows.append(
            (
                row.name,
                _cell(row.before),
                _cell(row.after) + mark,
                change + mark,
                f"{min((estimate.n for estimate in measured), default=0):,}",
            )
        )
    return rows


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{percent(estimate.value)} [{interval_text(estimate)}]"


def _difference(row: SummaryRow) -> float:
    if row.change is not None:
        return row.change.value
    if row.before is None or row.after is None:
        raise ValueError(f"{row.name} was not measured before and after")
    return row.after.value - row.before.value


def _warnings(data: ReportData) -> list[str]:
    return [f"warning: {text}" for text in data.warnings]


def _places(data: ReportData) -> list[tuple[str, str]]:
    chosen = ", ".join(f"{name} {text}" for name, text in facts(data).items())
    lines = [
        ("accuracy in %", f"{100 * data.confidence:g} % intervals in brackets"),
        ("chosen", f"{chosen or 'nothing'} (on {data.selection_split})"),
    ]
    if data.wall_seconds is not None:
        share = "" if data.overhead is None else f", {100 * data.overhead:.0f} % of it overhead"
        lines.append(("time", duration(data.wall_seconds) + share))
    lines += [("report", data.report_path)] if data.report_path else []
    lines += [("MLflow run", data.tracking_url)] if data.tracking_url else []
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
