"""What a comparison of methods found: tables, picture, page and document."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from robustft.config import to_dict
from robustft.errors import DataError, RunError
from robustft.evaluation.comparison import (
    ComparedRun,
    Comparison,
    Cost,
    compare_runs,
    pareto_front,
)
from robustft.evaluation.comparison_report import RunFacts, write_comparison_report
from robustft.evaluation.drawing import place_labels
from robustft.evaluation.intervals import mean_interval
from robustft.methods.costs import Passes
from robustft.runtime.jsonfile import write_json
from robustft.runtime.protocol import Candidate, Entry, Findings, robust_mean
from robustft.runtime.stored_runs import StoredRun, compared_run, load_run, run_panels

__all__ = [
    "RESULTS",
    "compared",
    "conclude",
    "conclude_again",
    "draw",
    "load_findings",
    "measured_columns",
    "table",
    "tested",
]

START = "start"
RESULTS = "results.json"
"""What a comparison has found, in its folder."""


def compared(entries: Sequence[Entry], stored: Sequence[StoredRun]) -> list[ComparedRun]:
    """Return start and methods as they enter the tests.

    Raises:
        RunError: two methods did not begin at the same start.
    """
    found = []
    first = stored[0]
    if first.before is not None:
        for one in stored:
            same = one.before is not None and same_outcomes(first.before, one.before)
            if not same:
                raise RunError(
                    f"{one.directory} and {first.directory} began at different starts: remove one "
                    "of them and run the comparison again"
                )
        reference = compared_run(first, START)
        found.append(
            dataclasses.replace(reference, evaluations={"0": first.before}, cost=Cost(num_trials=0))
        )
    for entry, one in zip(entries, stored, strict=True):
        run_of = compared_run(one, entry.name)
        cost = dataclasses.replace(
            run_of.cost,
            forwards=entry.trial.forwards,
            backwards=entry.trial.backwards,
            all_forwards=entry.prepared.forwards + entry.trial.forwards * len(entry.candidates),
            all_backwards=entry.prepared.backwards + entry.trial.backwards * len(entry.candidates),
            all_seconds=entry.search_seconds,
            num_trials=len(entry.candidates),
            memory=None if math.isnan(entry.memory) else entry.memory,
        )
        found.append(dataclasses.replace(run_of, cost=cost))
    return found


def same_outcomes(one: Any, other: Any) -> bool:
    """Return whether two evaluations agree on every example."""
    return one.masks.keys() == other.masks.keys() and all(
        np.array_equal(mask, other.masks[name]) for name, mask in one.masks.items()
    )


def percent(values: Sequence[float], form: str = ".1f") -> str:
    """Return mean and Student's interval over seeds in percent; of one value only itself."""
    if not values:
        return ""
    mean = 100 * sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:{form}}"
    low, high = (100 * bound for bound in mean_interval(values))
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def number(value: float | None, form: str = ",.0f") -> str:
    return "" if value is None or math.isnan(value) else f"{value:{form}}"


def short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def measured_columns(findings: Findings) -> dict[str, str]:
    """Return the columns that all rows have: header -> metric on test."""
    return {
        title: metric
        for title, metric in findings.columns.items()
        if all(metric in entry.test for entry in findings.methods)
    }


def table(findings: Findings, start: Mapping[str, float], pairs: Comparison | None = None) -> str:
    """Return Markdown: accuracies on test, changes from the start, costs, and paired tests.

    Args:
        findings: the rows, in their order.
        start: metric -> accuracy on test; empty where there is no start that knows the task.
        pairs: every pair of methods.
    """
    entries = findings.methods
    columns = measured_columns(findings)
    rows = []
    if start:
        rows.append([START, *(percent([start[m]]) for m in columns.values()), ""])
    for entry in entries:
        notes = [f"{entry.field} {short(entry.chosen.value)}"]
        notes += [] if entry.kept else ["robustness not kept on val"]
        notes += [f"seed {seed} diverged" for seed in entry.failed]
        cells = [percent(entry.test[metric]) for metric in columns.values()]
        rows.append([entry.name, *cells, "; ".join(notes)])
    lines = markdown(["", *columns, "chosen"], rows)
    if start:
        rows = []
        for entry in entries:
            changes = [[v - start[m] for v in entry.test[m]] for m in columns.values()]
            rows.append([entry.name, *(percent(change, "+.1f") for change in changes)])
        lines += ["", *markdown(["change from the start", *columns], rows)]
    costs = ["cost", "trials", "search passes", "judging passes", "search s"]
    costs += ["training passes", "training s", "worker MiB"]
    rows = [
        [
            entry.name,
            str(len(entry.candidates)),
            number(entry.search_passes),
            number(sum(one.judging for one in entry.candidates)),
            number(entry.search_seconds),
            number(entry.trial.total),
            number(entry.seconds, ",.1f"),
            number(entry.memory),
        ]
        for entry in entries
    ]
    lines += ["", *markdown(costs, rows)]
    lines += ["", *chosen_on_val(findings)]
    lines += ["", *tested(pairs, findings)]
    seeds = ", ".join(map(str, findings.seeds))
    lines += [
        "",
        f"Test, percent: mean over seeds {seeds} of fine-tuning and 95 % interval (Student), one "
        "start. Costs: passes of single examples, forwards and backwards, seconds on one worker; "
        "judging is the protocol's look at val.",
        f"Chosen on val: highest clean accuracy among trials that lose at most "
        f"{100 * findings.tolerance:g} points of the start's mean robust accuracy.",
    ]
    return "\n".join(lines) + "\n"


def chosen_on_val(findings: Findings) -> list[str]:
    """Return what the rule chose, and what the most robust trial would have been, as a table."""

    def cells(one: Candidate, field: str) -> list[str]:
        union = one.accuracies.get("robust", math.nan)
        numbers = (100 * one.clean, 100 * one.robust, 100 * union)
        return [f"{field} {short(one.value)}", *(number(value, ".1f") for value in numbers)]

    clean, robust = findings.reference
    # Of the start, or of the trial that takes its place where the start does not know the task.
    rows = [["reference", "", f"{100 * clean:.1f}", f"{100 * robust:.1f}", *[""] * 5]]
    for entry in findings.methods:
        value = entry.others["robust"]
        other = next(one for one in entry.candidates if one.value == value and not one.error)
        same = other.index == entry.chosen.index
        rest = ["the same", "", "", ""] if same else cells(other, entry.field)
        rows.append([entry.name, *cells(entry.chosen, entry.field), *rest])
    header = ["on val", "chosen", "clean", "robust", "union"]
    return markdown([*header, "most robust", *header[2:]], rows)


def tested(pairs: Comparison | None, findings: Findings) -> list[str]:
    """Return the differences between methods that Holm's procedure leaves, as a table."""
    if pairs is None:
        return []
    titles = {metric: title for title, metric in findings.columns.items()}
    rows = [
        [
            titles.get(one.metric, one.metric),
            f"{one.other} - {one.one}",
            f"{100 * one.change.value:+.1f}",
            f"{one.adjusted:.2g}",
            "yes" if one.within_seeds else "",
        ]
        for one in pairs.differences
        if pairs.decided(one)
    ]
    names = ", ".join(titles.get(name, name) for name in pairs.metrics)
    count = f"{len(rows)} of {len(pairs.differences)}"
    text = (
        f"Paired tests over examples of {names}, every pair, adjusted by Holm: {count} are decided."
    )
    missing = [titles.get(name, name) for name in findings.paired if name not in pairs.metrics]
    if missing:
        text += f" Not tested, because not measured apart by every row: {', '.join(missing)}."
    lines = [text]
    if rows:
        header = ["", "difference", "points", "p", "no larger than between seeds"]
        lines += ["", *markdown(header, rows)]
    return lines


def tested_metrics(paired: Sequence[str], against: Comparison) -> list[str]:
    """Return the metrics in which every pair is tested: those of ``paired`` that all rows measured.

    Args:
        paired: names them.
        against: all rows against the first. A double there says the same of every example as
            another metric of that page; here it is tested under its own name.
    """
    known = {*against.metrics, *against.doubles}
    return [name for name in paired if name in known]


def draw(findings: Findings, start: Mapping[str, float]) -> Figure:
    """Draw clean against robust accuracy: rows on test, and every trial on val.

    Args:
        findings: the rows and their trials.
        start: metric -> accuracy on test, or empty.
    """
    entries, columns = findings.methods, findings.columns
    figure = Figure(figsize=(11, 5), layout="constrained")
    test, val = figure.subplots(1, 2)
    points = {entry.name: plane(entry.test, columns) for entry in entries}
    if start:
        points[START] = plane({name: [value] for name, value in start.items()}, columns)
    front = pareto_front(points)
    for index, (name, (clean, robust)) in enumerate(points.items()):
        marker = "*" if name == START else "o"
        color = "black" if name == START else f"C{index % 10}"
        face = color if name in front else "none"
        test.plot([clean], [robust], marker, color=color, markerfacecolor=face)
    labels = [(*points[name], name, name in front or name == START) for name in points]
    line = sorted(points[name] for name in front)
    test.plot(*zip(*line, strict=True), color="0.7", linewidth=1, zorder=0)
    for index, entry in enumerate(entries):
        finished = [one for one in entry.candidates if not one.error]
        places = [(100 * one.clean, 100 * one.robust) for one in finished]
        style = {"color": f"C{index % 10}", "marker": "os^D"[index // 10 % 4]}
        val.plot(
            *zip(*places, strict=True), linestyle="", fillstyle="none", label=entry.name, **style
        )
        chosen = entry.chosen
        val.plot([100 * chosen.clean], [100 * chosen.robust], linestyle="", **style)
    clean, robust = findings.reference
    val.plot([100 * clean], [100 * robust], "*", color="black", label=START)
    test.set_title("test, mean over seeds; filled: on the Pareto front", fontsize="small")
    val.set_title("val, every trial; filled: chosen", fontsize="small")
    val.legend(fontsize="x-small", ncols=2)
    for axes in (test, val):
        axes.set_xlabel("clean accuracy (%)")
        axes.set_ylabel("robust accuracy, mean over attacks (%)")
        axes.grid(alpha=0.3)
    test.margins(0.12)
    place_labels(figure, test, labels, every=True)
    return figure


def plane(test: Mapping[str, Sequence[float]], columns: Mapping[str, str]) -> tuple[float, float]:
    """Return mean clean, and mean robust accuracy over threat models (text: attacks), percent."""
    means = {name: sum(values) / len(values) for name, values in test.items() if values}
    known = {name: value for name, value in means.items() if name in columns.values()}
    return 100 * known["clean"], 100 * robust_mean(known)


def described(entries: Sequence[Entry], stored: Sequence[StoredRun]) -> dict[str, RunFacts]:
    """Return what identifies each method on the page."""
    return {
        entry.name: RunFacts(
            facts={
                "method": entry.method,
                "chosen": f"{entry.field} {short(entry.chosen.value)}",
                "robustness kept on val": "yes" if entry.kept else "no",
                "trials": str(len(entry.candidates)),
                "seeds": ", ".join(one.after),
                "folder": str(one.directory),
                "commit": one.summary["commit"] or "unknown",
            },
            command=one.command,
            config=one.config,
            versions=one.versions,
            panels=run_panels(one),
        )
        for entry, one in zip(entries, stored, strict=True)
    }


def conclude(
    output: Path, findings: Findings, stored: Sequence[StoredRun]
) -> tuple[dict[str, Any], str]:
    """Test, write everything; return the document and the table.

    Args:
        output: folder of table.md, pareto.png, results.json and the page.
        findings: what the comparison has found.
        stored: the runs of the rows, in their order.
    """
    runs = compared(findings.methods, stored)
    start: dict[str, float] = {}
    against, pairs = None, None
    if runs[0].name == START:
        known = runs[0].first.metrics
        start = {m: float(known[m]) for m in findings.columns.values() if m in known}
    if len(runs) > 1:
        against = compare_runs(runs, with_first=True)
        pairs = compare_runs(runs, metrics=tested_metrics(findings.paired, against))
        write_comparison_report(
            output,
            against,
            described=described(findings.methods, stored),
            title=f"{len(findings.methods)} methods on {findings.data}, one protocol",
            command=findings.command,
        )
    text = table(findings, start, pairs)
    (output / "table.md").write_text(text, encoding="utf-8")
    draw(findings, start).savefig(output / "pareto.png", dpi=150)
    document = {
        **to_dict(findings),
        "start": start,
        "against_first": None if against is None else against.document(),
        "pairs": None if pairs is None else pairs.document(),
    }
    for entry, written in zip(findings.methods, document["methods"], strict=True):
        written["search_passes"] = entry.search_passes
    write_json(output / RESULTS, document)
    return document, text


def load_findings(folder: Path) -> Findings:
    """Read what ``conclude`` has written.

    Raises:
        DataError: the file is not one of this version's.
    """
    path = folder / RESULTS
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        fields = {field.name: document[field.name] for field in dataclasses.fields(Findings)}
        clean, robust = fields["reference"]
        methods = [_entry(values) for values in fields["methods"]]
        return Findings(**{**fields, "reference": (clean, robust), "methods": methods})
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}: {error}): it is damaged or of another "
            "version; give the command of the comparison again, which repeats nothing"
        ) from error


def _entry(values: Mapping[str, Any]) -> Entry:
    """Return a row as it was before JSON."""
    own = {field.name: values[field.name] for field in dataclasses.fields(Entry)}
    candidates = [_candidate(one) for one in own["candidates"]]
    memory = own["memory"]
    return Entry(
        **{
            **own,
            "candidates": candidates,
            "chosen": next(one for one in candidates if one.index == own["chosen"]["index"]),
            "prepared": Passes(**own["prepared"]),
            "trial": Passes(**own["trial"]),
            "memory": math.nan if memory is None else memory,
            "folder": Path(own["folder"]),
        }
    )


def _candidate(values: Mapping[str, Any]) -> Candidate:
    # JSON has no NaN: what failed has no accuracy.
    numbers = {
        name: math.nan if values[name] is None else values[name] for name in ("clean", "robust")
    }
    return Candidate(**{**values, **numbers})


def conclude_again(folder: Path) -> Path:
    """Test, draw and write a comparison anew from what it has stored; return its page.

    Args:
        folder: of the comparison; it may have been moved since.

    Raises:
        ConfigError: a row's run is not there any more.
        DataError: something stored is damaged.
    """
    findings = load_findings(folder)
    stored = [load_run(folder / "runs" / entry.folder.name) for entry in findings.methods]
    conclude(folder, findings, stored)
    return folder / "report.html"
