"""The page of a comparison: one self-contained HTML page, its figure as PNG, and the same as text.

The page needs no network. Without JavaScript everything on it can be read; with it, tables sort,
runs are tabs, and points of figures say their numbers on hover, on touch and on focus.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import yaml
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustft.config import to_dict
from robustft.evaluation.comparison import ComparedRun, Comparison, Difference, Score
from robustft.evaluation.drawing import (
    CHOSEN,
    INK,
    PAPER,
    REST,
    STYLE,
    Label,
    blank_figure,
    inline_svg,
    place_labels,
    tip,
)
from robustft.evaluation.report import Panel, write_page
from robustft.evaluation.summary import duration, interval_text, percent, points

__all__ = [
    "RunFacts",
    "comparison_lines",
    "pareto_plane",
    "verdict_text",
    "write_comparison_report",
]

PLACES = ("name", "runtime")
"""Parts of a configuration that say what a run is called and where it ran, not what it computed."""


class Entry(NamedTuple):
    """A cell: its text, what it sorts by (text, or a number as text), and notes below it."""

    text: str
    order: str
    below: tuple[str, ...] = ()


class Table(NamedTuple):
    """A table of the page.

    Args:
        columns: (header, whether it holds numbers).
        rows: cells; the first names the row.
    """

    columns: list[tuple[str, bool]]
    rows: list[list[Entry]]


class RunFacts(NamedTuple):
    """What identifies a run on the page.

    Args:
        facts: name -> text: method, what was chosen, folder, commit.
        command: the exact command that started it.
        config: the whole configuration, nested.
        versions: package -> version.
        panels: figures of what the run recorded; each name once.
    """

    facts: Mapping[str, str]
    command: str
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    panels: Sequence[Panel] = ()


class _Tab(NamedTuple):
    """What the page shows of a run: the same with the configuration and the figures as text."""

    name: str
    facts: Mapping[str, str]
    command: str
    config: str
    versions: Mapping[str, str]
    panels: Sequence[Panel]
    drawings: Mapping[str, Markup]


def write_comparison_report(
    directory: str | Path,
    comparison: Comparison,
    *,
    described: Mapping[str, RunFacts],
    title: str,
    command: str | None = None,
) -> Path:
    """Write ``report.html`` and ``plots/pareto.png`` into ``directory`` and return the page's path.

    Args:
        directory: made if it is missing.
        comparison: what was found.
        described: name of a run -> what identifies it; may be empty.
        title: the page's heading.
        command: what repeats the comparison.

    Raises:
        ResourceError: a file cannot be written.
    """
    configs = {name: about.config for name, about in described.items()}
    values = {
        "title": title,
        "comparison": comparison,
        "data": comparison.runs[0].data,
        "split": comparison.runs[0].first.split,
        "sentence": _sentence(comparison),
        "warnings": _warnings(comparison),
        "interval": f"{100 * comparison.confidence:g} %",
        "several": any(len(run.evaluations) > 1 for run in comparison.runs),
        "scores": _score_table(comparison),
        "differences": _difference_table(comparison),
        "costs": _cost_table(comparison.runs),
        "settings": _settings_table(configs),
        "recipes": _recipe_table(comparison),
        "tabs": [
            _tab(name, about, f"run-{number}")
            for number, (name, about) in enumerate(described.items(), start=1)
        ],
        "command": command,
    }
    return write_page(directory, "comparison.html.j2", list(_panels(comparison)), values)


def _tab(name: str, about: RunFacts, prefix: str) -> _Tab:
    """Return what the page shows of a run; ``prefix`` makes its ids the only ones on the page."""
    panels = [
        panel._replace(name=f"{prefix}-{panel.name}", alt=f"{name}: {panel.alt}")
        for panel in about.panels
    ]
    return _Tab(
        name,
        about.facts,
        about.command,
        yaml.safe_dump(to_dict(about.config), sort_keys=False, width=88),
        about.versions,
        panels,
        # Our own drawing: every text in it has become outlines or an escaped title.
        {panel.name: Markup(inline_svg(panel.name, panel.figure)) for panel in panels},
    )


def comparison_lines(comparison: Comparison) -> str:
    """Return the comparison as plain aligned ASCII text: for terminals, logs and pipes."""
    parts = [
        _aligned(_score_table(comparison)),
        _aligned(_difference_table(comparison)),
        _aligned(_cost_table(comparison.runs)),
        "\n".join([_sentence(comparison), *(f"note: {text}" for text in _warnings(comparison))]),
    ]
    return "\n\n".join(parts) + "\n"


def verdict_text(comparison: Comparison, difference: Difference) -> str:
    """Return what the test says of two runs: "first better", "second better", "not decided".

    Not decided is also where more examples speak for one run and the mean for the other.
    """
    balance = difference.gained - difference.lost
    if not comparison.decided(difference) or balance * difference.change.value <= 0:
        return "not decided"
    return "second better" if balance > 0 else "first better"


def pareto_plane(comparison: Comparison) -> Figure:
    """Draw the runs in the plane of clean and robust accuracy, with the front.

    Thin crosses are intervals over examples, small dots single seeds.

    Raises:
        ValueError: the comparison has no two such metrics.
    """
    if comparison.axes is None:
        raise ValueError("nothing to draw: the runs share no clean and robust accuracy")
    clean, robust = comparison.axes
    with matplotlib.rc_context(STYLE):
        figure = blank_figure(height=3.9)
        axes = figure.subplots()
        labels = [
            _run_point(
                axes,
                run.name,
                comparison.score(run.name, clean),
                comparison.score(run.name, robust),
                on_front=run.name in comparison.front,
            )
            for run in comparison.runs
        ]
        axes.margins(x=0.12, y=0.12)
        axes.autoscale_view()
        axes.autoscale(enable=False)
        front = sorted(label[:2] for label in labels if label[3])
        across = [axes.get_xlim()[0], *(x for x, _ in front), front[-1][0]]
        up = [front[0][1], *(y for _, y in front), axes.get_ylim()[0]]
        # What lies below and left of the steps is beaten.
        axes.step(across, up, where="pre", color=CHOSEN, linewidth=1, alpha=0.7, zorder=2)
        axes.set_xlabel(f"{clean} accuracy (%)")
        axes.set_ylabel(f"{robust} accuracy (%)")
        axes.set_title("Pareto front" if len(labels) > 1 else "Accuracy")
        place_labels(figure, axes, labels, every=True)
    return figure


def _run_point(axes: Axes, name: str, clean: Score, robust: Score, *, on_front: bool) -> Label:
    x, y = 100 * clean.estimate.value, 100 * robust.estimate.value
    color = CHOSEN if on_front else REST
    for one, horizontal in ((clean, True), (robust, False)):
        ends = [100 * one.estimate.low, 100 * one.estimate.high]
        if all(map(math.isfinite, ends)):
            across, up = (ends, [y, y]) if horizontal else ([x, x], ends)
            axes.plot(across, up, color=color, linewidth=0.7, alpha=0.5, zorder=2)
    if len(clean.seeds) > 1:
        axes.plot(
            [100 * value for value in clean.seeds],
            [100 * value for value in robust.seeds],
            color=color,
            marker="o",
            markersize=2.5,
            linestyle="none",
            alpha=0.6,
            zorder=3,
        )
    point = axes.plot(
        x,
        y,
        color=color,
        marker="o" if on_front else "s",
        markersize=8.5 if on_front else 6.5,
        markeredgecolor=INK if on_front else PAPER,
        markeredgewidth=0.8,
        linestyle="none",
        zorder=5 if on_front else 4,
    )[0]
    of = f", mean of {len(clean.seeds)} seeds" if len(clean.seeds) > 1 else ""
    beaten = "on the front" if on_front else "beaten by another run"
    point.set_gid(tip(f"{name}: {clean.metric} {x:.2f} %, {robust.metric} {y:.2f} %{of}; {beaten}"))
    return x, y, name, on_front


def _panels(comparison: Comparison) -> Iterator[Panel]:
    if comparison.axes is None:
        return
    clean, robust = comparison.axes
    yield Panel(
        "pareto",
        pareto_plane(comparison),
        f"runs in the plane of {clean} and {robust} accuracy",
        "Right is more accurate, up is more robust. Round and green: on the front, where no other "
        "run is at least as good in both and better in one; square and grey: beaten. Crosses are "
        "intervals over examples, small dots single seeds. The front is that of the measured "
        "means: whether two runs really differ says the table below.",
        None,
    )


def _sentence(comparison: Comparison) -> str:
    decided = [one for one in comparison.differences if comparison.decided(one)]
    count = len(comparison.differences)
    text = (
        f"{len(decided)} of {count} differences are more than chance over examples (Holm, "
        f"{1 - comparison.confidence:g})."
    )
    if comparison.axes is None:
        return text
    return f"On the front of {' and '.join(comparison.axes)}: {', '.join(comparison.front)}. {text}"


def _warnings(comparison: Comparison) -> list[str]:
    lines = []
    leaky = [run.name for run in comparison.runs if run.leaky]
    if leaky:
        lines.append(
            f"leaky: test examples took part in choosing what is reported of {', '.join(leaky)}, "
            "so these numbers are too good by an unknown amount"
        )
    single = [run.name for run in comparison.runs if len(run.evaluations) == 1]
    if single:
        lines.append(
            f"one seed: how much another seed would change is not known of {', '.join(single)}"
        )
    for run in comparison.runs:
        raised = {f.name: f.text for one in run.evaluations.values() for f in one.flags if f.raised}
        lines += [f"{run.name}: {name}: {text}" for name, text in raised.items()]
    lines += [f"{name} is not compared: {why}" for name, why in comparison.left_out.items()]
    for metric in comparison.metrics:
        n = comparison.score(comparison.runs[0].name, metric).estimate.n
        more = [
            run.name
            for run in comparison.runs
            if any(_measured(one, metric) > n for one in run.evaluations.values())
        ]
        if more:
            lines.append(
                f"{metric} is compared on the {n:,} examples that all runs measured; "
                f"{', '.join(more)} measured more"
            )
    return lines


def _measured(evaluation: Any, metric: str) -> int:
    row = next(row for row in evaluation.rows() if row["metric"] == metric)
    return int(row["n"])


def _score_table(comparison: Comparison) -> Table:
    columns = [("run", False), ("seeds", True)]
    columns += [(f"{metric} (%)", True) for metric in comparison.metrics]
    if comparison.axes is not None:
        columns.append(("on the front", False))
    columns.append(("n", True))
    rows = []
    for run in comparison.runs:
        scores = [comparison.score(run.name, metric) for metric in comparison.metrics]
        cells = [_text(run.name), _number(len(run.evaluations), f"{len(run.evaluations)}")]
        cells += [_accuracy(score) for score in scores]
        if comparison.axes is not None:
            cells.append(_text("yes" if run.name in comparison.front else "no"))
        sizes = sorted({score.estimate.n for score in scores})
        cells.append(
            _number(sizes[0], " to ".join(f"{n:,}" for n in (sizes[0], sizes[-1])[: len(sizes)]))
        )
        rows.append(cells)
    return Table(columns, rows)


def _accuracy(score: Score) -> Entry:
    below = [interval_text(score.estimate)]
    if len(score.seeds) > 1:
        below.append(f"seeds {percent(min(score.seeds), 1)} to {percent(max(score.seeds), 1)}")
    return Entry(percent(score.estimate.value), repr(score.estimate.value), tuple(below))


def _difference_table(comparison: Comparison) -> Table:
    columns = [
        ("metric", False),
        ("first", False),
        ("second", False),
        ("change (points)", True),
        ("lost", True),
        ("gained", True),
        ("p", True),
        ("p, all rows", True),
        ("result", False),
    ]
    rows = []
    for one in comparison.differences:
        span = interval_text(one.change, digits=2, sign=True)
        rows.append(
            [
                _text(one.metric),
                _text(one.one),
                _text(one.other),
                Entry(points(one.change.value), repr(one.change.value), (span,)),
                _number(one.lost, f"{one.lost:,}"),
                _number(one.gained, f"{one.gained:,}"),
                _number(one.p_value, _p(one.p_value)),
                _number(one.adjusted, _p(one.adjusted)),
                _result(comparison, one),
            ]
        )
    return Table(columns, rows)


def _result(comparison: Comparison, difference: Difference) -> Entry:
    text = verdict_text(comparison, difference)
    within = text != "not decided" and difference.within_seeds
    return Entry(text, text, ("within seeds",) if within else ())


def _cost_table(runs: Sequence[ComparedRun]) -> Table:
    columns = [
        ("run", False),
        ("one training (forwards)", True),
        ("trials", True),
        ("all trials (forwards)", True),
        ("evaluation (forwards)", True),
        ("whole run", True),
    ]
    # Only the protocol of compare --preset watches it.
    with_memory = any(run.cost.memory is not None for run in runs)
    if with_memory:
        columns.append(("memory of a worker (MiB)", True))
    rows = []
    for run in runs:
        cost, measured = run.cost, run.evaluations.values()
        forwards, backwards = (
            sum(getattr(one, name) for one in measured)
            for name in ("num_forwards", "num_backwards")
        )
        whole, memory = cost.wall_seconds, cost.memory
        cells = [
            _text(run.name),
            _passes(cost.forwards, cost.backwards, cost.seconds),
            _number(cost.num_trials, f"{cost.num_trials:,}"),
            _passes(cost.all_forwards, cost.all_backwards, cost.all_seconds),
            _passes(forwards, backwards, None),
            Entry("-", "") if whole is None else _number(whole, duration(whole)),
        ]
        if with_memory:
            cells.append(Entry("-", "") if memory is None else _number(memory, f"{memory:,.0f}"))
        rows.append(cells)
    return Table(columns, rows)


def _passes(forwards: float | None, backwards: float | None, seconds: float | None) -> Entry:
    below = [] if backwards is None else [f"{backwards:,.0f} backwards"]
    below += [] if seconds is None else [duration(seconds)]
    if forwards is None:
        return Entry("-", "", tuple(below))
    return Entry(f"{forwards:,.0f}", repr(float(forwards)), tuple(below))


def _settings_table(configs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the fields in which configurations differ, a row each."""
    flat = {
        name: dict(_leaves({key: value for key, value in config.items() if key not in PLACES}))
        for name, config in configs.items()
    }
    fields = dict.fromkeys(field for values in flat.values() for field in values)
    rows = []
    for field in fields:
        texts = [values.get(field, "-") for values in flat.values()]
        if len(set(texts)) > 1:
            rows.append([_text(field), *map(_text, texts)])
    return Table([("setting", False), *((name, False) for name in flat)], rows)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted names and texts of what is not nested any further."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield (
            path,
            yaml.safe_dump(to_dict(value), default_flow_style=True, width=math.inf)[
                :-1
            ].removesuffix("\n..."),
        )


def _recipe_table(comparison: Comparison) -> Table:
    rows = []
    for metric, how in comparison.recipes.items():
        parts = [", ".join(how["measured"])]
        parts += [
            f"{name.replace('_', ' ')} {_words(value)}"
            for name, value in how.items()
            if name != "measured" and value is not None
        ]
        same = [name for name, other in comparison.doubles.items() if other == metric]
        parts += [f"example by example the same: {', '.join(same)}"] if same else []
        rows.append([_text(metric), _text("; ".join(parts))])
    return Table([("metric", False), ("made of", False)], rows)


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(item)}" for name, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else f"{value:.1e}"


def _text(text: str) -> Entry:
    return Entry(text, text)


def _number(value: float, text: str) -> Entry:
    return Entry(text, repr(value))


def _one_line(cell: Entry) -> str:
    return cell.text + (f" ({'; '.join(cell.below)})" if cell.below else "")


def _aligned(table: Table) -> str:
    """Return a table as plain text, numbers to the right."""
    lines = [[name for name, _ in table.columns]]
    lines += [[_one_line(cell) for cell in row] for row in table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    numbers = [number for _, number in table.columns]
    return "\n".join(
        "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(line, widths, numbers, strict=True)
        ).rstrip()
        for line in lines
    )
