"""What a run leaves in its folder: tables, the summary, the report and the model's card."""

import dataclasses
import importlib.metadata
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from robustft.config import config_hash
from robustft.data.home import home
from robustft.evaluation.evaluation_report import write_evaluation_report
from robustft.evaluation.report import ReportData, Stage, SummaryRow, summary_row, write_report
from robustft.evaluation.text_outcome import TextEvaluation
from robustft.evaluation.text_report import write_text_report
from robustft.methods import METHODS, Result
from robustft.methods.base import Row
from robustft.runtime.events import Clock
from robustft.runtime.experiment import Experiment, experiment_to_dict, method_name
from robustft.runtime.jsonfile import write_json
from robustft.runtime.run_figures import START, file_panels, staged, tolerance_of
from robustft.runtime.search import Trial
from robustft.runtime.text_runs import (
    AnyEvaluation,
    AnyStart,
    AnyTask,
    architecture,
    radii,
    units,
)

__all__ = [
    "Found",
    "card",
    "command_line",
    "provenance",
    "start_cache",
    "write",
    "write_rows",
]

TEXT_TITLES = {
    "clean": "Clean",
    "robust": "All attacks together",
    "deepwordbug": "DeepWordBug",
    "synonym_greedy": "Synonyms, greedy",
    "embedding_pgd": "PGD on embeddings",
    "advglue": "AdvGLUE",
}
"""Measurements of text as the report calls them; others keep their names."""

SELECTIONS = {"test_half": "half of the test split", "official": "the test split"}
"""Where a choice was made, as the report calls it; others are a split of that name."""

PACKAGES = ("robustft", "torch", "torchvision", "ray", "mlflow", "numpy")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Everything a run has found.

    Args:
        task: the data.
        start: the starting model.
        start_result: how it was trained, if it was trained here.
        trials: all trials.
        chosen: those of the chosen configuration, one per seed.
        before: the start on the test split; None for fresh weights or a fresh head.
        after: the chosen models on the test split, in the order of ``chosen``.
        model_dir: where the saved model lies.
    """

    task: AnyTask
    start: AnyStart
    start_result: Result | None
    trials: Sequence[Trial]
    chosen: Sequence[Trial]
    before: AnyEvaluation | None
    after: Sequence[AnyEvaluation]
    model_dir: Path

    @property
    def results(self) -> list[Result]:
        """The chosen trials' results."""
        return [trial.result for trial in self.chosen if trial.result is not None]

    @property
    def leaky(self) -> bool:
        """True if any test example took part in choosing what is reported."""
        return self.task.leaky or any(bool(r.choices.get("leaky")) for r in self.results)


def provenance() -> dict[str, Any]:
    """Return versions, platform and the commit of the code, if it is a checkout."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": commit(),
    }


def commit() -> str:
    """Return the checkout's commit, "+" appended if it has uncommitted changes; "" if none."""
    folder = Path(__file__).resolve().parent
    try:
        command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def command_line(arguments: Sequence[str]) -> str:
    """Return the command that started this process, as one would type it in the project."""
    program = Path(arguments[0])
    shown = program.name if program.suffix != ".py" else os.path.relpath(program)
    prefix = "python " if program.suffix == ".py" else ""
    return prefix + shlex.join([shown, *arguments[1:]])


def start_cache(experiment: Experiment, task: AnyTask) -> Path:
    """Return where the trained start of this configuration is kept, under ROBUSTFT_HOME.

    Args:
        experiment: says how it is trained.
        task: what it is trained on.
    """
    start = experiment_to_dict(experiment)["start"]
    identity = {
        # Where the data lie decides nothing, and the head is replaced afterwards.
        "start": {name: start[name] for name in ("model", "checkpoint", "method", "seed")},
        "task": task.digest,
        "threat_models": [dataclasses.astuple(threat) for threat in radii(task)],
        "version": importlib.metadata.version("robustft"),
        # Gradients of data-parallel workers are summed in another order.
        "workers": experiment.runtime.workers,
        **experiment.runtime.options.numerics,
    }
    return home() / "starts" / config_hash(identity, length=20)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as Parquet; columns that only some rows have are null in the others."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [_cell(row.get(name)) for row in rows] for name in names}
    pq.write_table(pa.table(columns), path, compression="zstd")


def _cell(value: Any) -> Any:
    return "+".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def card(
    experiment: Experiment,
    task: AnyTask,
    start: AnyStart,
    result: Result,
    evaluation: AnyEvaluation,
) -> dict[str, Any]:
    """Return what the model's card says beside its architecture."""
    origin = provenance()
    return {
        "method": method_name(experiment.method),
        "paper": METHODS[method_name(experiment.method)].paper,
        "start": start.source,
        "threat_models": [dataclasses.asdict(threat) for threat in radii(task)],
        "data": task.name,
        "data_digest": task.digest,
        "class_names": list(task.class_names),
        "selection": task.selection,
        "leaky": task.leaky or bool(result.choices.get("leaky")),
        "choices": dict(result.choices),
        "metrics": {f"test/{name}": value for name, value in evaluation.metrics.items()},
        "selection_metrics": dict(result.metrics),
        "config_hash": experiment.fingerprint,
        "commit": origin["commit"],
        "versions": origin["versions"],
    }


def trial_rows(found: Found) -> list[Row]:
    """Return one row per trial: searched values, choices, metrics, what it cost, how it ended.

    The metrics of a trial without a result (failed, or stopped by the scheduler) are the last that
    it reported, its passes those of the epochs it has finished.
    """
    chosen = {trial.label for trial in found.chosen}
    rows = []
    for trial in found.trials:
        row: Row = {"trial": trial.label, **trial.values}
        if trial.result is not None:
            row |= {f"chosen_{name}": value for name, value in trial.result.choices.items()}
        row |= dict(trial.metrics)
        ended = {"seconds": trial.seconds, "status": trial.status, "error": trial.error}
        rows.append({**row, **ended, "chosen": trial.label in chosen})
    return rows


def curve_rows(found: Found) -> list[Row]:
    """Return every curve in long form: trial, table, then the table's own columns."""
    rows = []
    sources = [(t.label, t.result) for t in found.trials if t.result is not None]
    if found.start_result is not None:
        sources.insert(0, (START, found.start_result))
    for label, result in sources:
        for table in ("epochs", "interpolation"):
            rows += [
                {"trial": label, "table": table, **row} for row in result.tables.get(table, ())
            ]
    return rows


def summarize(
    experiment: Experiment, directory: Path, found: Found, clock: Clock
) -> dict[str, Any]:
    """Return all headline numbers: what ``summary.json`` holds."""
    wall, share = clock.overhead()
    seeds = [trial.values.get("seed", 0) for trial in found.chosen]
    return {
        "experiment": experiment.name,
        "run_id": directory.name,
        "fingerprint": experiment.fingerprint,
        "method": method_name(experiment.method),
        "data": found.task.name,
        "data_digest": found.task.digest,
        "threat_models": [str(threat) for threat in radii(found.task)],
        "split_sizes": {name: len(split) for name, split in found.task.splits.items()},
        "selection": found.task.selection,
        "leaky": found.leaky,
        "chosen": {
            "trials": [trial.label for trial in found.chosen],
            "values": [dict(trial.values) for trial in found.chosen],
            "choices": [dict(result.choices) for result in found.results],
            "selection_metrics": [dict(result.metrics) for result in found.results],
        },
        "before": None if found.before is None else evaluation_summary(found.before),
        "after": {
            "seeds": {
                str(seed): evaluation_summary(evaluation)
                for seed, evaluation in zip(seeds, found.after, strict=True)
            },
            "mean": {
                name: sum(e.metrics[name] for e in found.after) / len(found.after)
                for name in found.after[0].metrics
                # Words changed in what was broken: of nothing, there is no mean.
                if all(name in e.metrics for e in found.after)
            },
        },
        "num_trials": len(found.trials),
        "failed_trials": {t.label: t.error for t in found.trials if t.error},
        "stopped_trials": [t.label for t in found.trials if t.stopped],
        "seconds": {"wall": wall, **clock.stages()},
        "overhead": {"share": share, "seconds": share * wall},
        "passes": {
            "test_forwards": sum(e.num_forwards for e in evaluations(found)),
            "test_backwards": sum(e.num_backwards for e in evaluations(found)),
        },
        **provenance(),
    }


def evaluations(found: Found) -> list[AnyEvaluation]:
    """Return every evaluation of the test split."""
    return [*([found.before] if found.before is not None else []), *found.after]


def evaluation_summary(evaluation: AnyEvaluation) -> dict[str, Any]:
    """Return metric -> accuracy, interval and n."""
    return {
        row["metric"]: {name: row[name] for name in ("accuracy", "low", "high", "n")}
        for row in evaluation.rows()
    }


def write(
    experiment: Experiment,
    directory: Path,
    found: Found,
    clock: Clock,
    *,
    command: str,
    tracking_url: str | None,
) -> tuple[dict[str, Any], ReportData, Path]:
    """Write summary, tables and report; return the summary, the report's data and its page."""
    write_rows(directory / "trials.parquet", trial_rows(found))
    write_rows(directory / "curves.parquet", curve_rows(found))
    for table in ("criticality",):
        rows = found.results[0].tables.get(table)
        if rows:
            write_rows(directory / f"{table}.parquet", rows)
    data = report_data(
        experiment, directory, found, clock, command=command, tracking_url=tracking_url
    )
    further = file_panels(directory, data.config, working_directory=Path.cwd())
    page = write_report(directory, data, further=further)
    evaluation = found.after[_best_seed(experiment, found)]
    about: dict[str, Any] = {
        "title": f"{experiment.name}: the chosen model",
        "facts": {
            "run": directory.name,
            "model": architecture(found.start),
            "data": found.task.name,
        },
        "command": command,
        "class_names": found.task.class_names,
    }
    if isinstance(evaluation, TextEvaluation):
        write_text_report(directory / "evaluation", evaluation, **about)
    else:
        write_evaluation_report(directory / "evaluation", evaluation, **about)
    # Last: a folder with a summary is a finished run.
    summary = summarize(experiment, directory, found, clock)
    summary |= {"created": data.created, "tracking_url": tracking_url}
    write_json(directory / "summary.json", summary)
    return summary, data, page


def report_data(
    experiment: Experiment,
    directory: Path,
    found: Found,
    clock: Clock,
    *,
    command: str,
    tracking_url: str | None,
) -> ReportData:
    """Return what the report shows."""
    wall, share = clock.overhead()
    origin = provenance()
    best = _best_seed(experiment, found)
    result = found.results[best]
    chosen_layers = str(result.choices.get("layer", "")).split(",")
    criticality = [
        {**row, "chosen": row["layer"] in chosen_layers}
        for row in result.tables.get("criticality", ())
    ]
    curves = curve_rows(found)
    config = experiment_to_dict(experiment)
    return ReportData(
        title=experiment.name,
        sentence=_sentence(experiment, found),
        run_id=directory.name,
        created=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        commit=origin["commit"],
        command=command,
        versions={**origin["versions"], "python": origin["python"]},
        config=config,
        summary=summary_rows(experiment, found),
        chosen={**result.choices, "trial": found.chosen[best].label},
        tolerance=tolerance_of(config),
        selection_split=_split_name(found.task, "val"),
        report_split=_split_name(found.task, "test"),
        leaky=found.leaky,
        warnings=warnings(found),
        stages=_stages(found, clock),
        wall_seconds=wall,
        overhead=share,
        trials=_shown_trials(found),
        criticality=criticality,
        interpolation=[row for row in curves if row["table"] == "interpolation"],
        epochs=staged(curves, method_name(experiment.method)),
        corruptions=_corruption_rows(found),
        run_directory=str(directory),
        report_path=str(directory / "report.html"),
        tracking_url=tracking_url,
    )


def _stages(found: Found, clock: Clock) -> list[Stage]:
    counted = {
        "evaluate": {
            "num_forwards": sum(e.num_forwards for e in evaluations(found)),
            "num_backwards": sum(e.num_backwards for e in evaluations(found)),
        }
    }
    return [
        Stage(name=name, seconds=seconds, **counted.get(name, {}))
        for name, seconds in clock.stages().items()
    ]


def _shown_trials(found: Found) -> list[Row]:
    """Return the trials as the report shows them: what was searched is in the label already."""
    chosen = {trial.label for trial in found.chosen}
    rows = []
    for trial in found.trials:
        row: Row = {"trial": trial.label, "chosen": trial.label in chosen}
        if trial.result is not None:
            choices = trial.result.choices.items()
            row |= {name: value for name, value in choices if name not in trial.values}
            row |= dict(trial.result.metrics)
        rows.append({**row, "status": trial.error or trial.status})
    return rows


def summary_rows(experiment: Experiment, found: Found) -> list[SummaryRow]:
    """Return one row per measurement: before, after (mean over seeds), paired change."""
    evaluation = found.after[0]
    rows = []
    for name in evaluation.metrics:
        if not _is_headline(name, evaluation):
            continue
        after = _outcomes(found.after, name)
        before = after if found.before is None else _outcomes([found.before], name)
        kind = {"clean": "clean", "corruptions": "corruptions"}.get(name, "robust")
        title = _title(name, experiment.evaluation, evaluation)
        row = summary_row(title, kind, before, after)  # type: ignore[arg-type]
        if found.before is None:
            row = dataclasses.replace(row, before=None, change=None)
        rows.append(row)
    return rows


def _is_headline(metric: str, evaluation: AnyEvaluation) -> bool:
    """Leave out what is an intermediate value, or said by another row."""
    if isinstance(evaluation, TextEvaluation):
        # A fixed set's clean originals were partly trained on; they only serve the pairs.
        return evaluation.outcome(metric).kind == "accuracy" and not metric.endswith("_clean")
    return not (
        metric.startswith(("corruption/", "union/")) or metric.rpartition("/")[2] == "robust"
    )


def _title(metric: str, config: Any, evaluation: AnyEvaluation) -> str:
    if isinstance(evaluation, TextEvaluation):
        return TEXT_TITLES.get(metric, metric)
    threats = {text.split()[0]: text for text in evaluation.settings["threat_models"]}
    if metric == "clean":
        return "Clean"
    if metric == "corruptions":
        return f"Corruptions ({config.corruption_set}, {evaluation.settings['corruptions']})"
    if metric == "union":
        return f"Union of {', '.join(threats.values())}"
    norm, attack = metric.split("/")
    steps = {"pgd": config.pgd_steps, "apgd": config.apgd_steps}.get(attack)
    return f"{attack.upper()}{f'-{steps}' if steps else ''}, {threats[norm]}"


def _outcomes(evaluations: Sequence[AnyEvaluation], name: str) -> Any:
    outcomes = [
        one.outcome(name).values if isinstance(one, TextEvaluation) else one.outcomes(name)
        for one in evaluations
    ]
    return outcomes[0] if len(outcomes) == 1 else np.mean(outcomes, axis=0)


def _corruption_rows(found: Found) -> list[Row]:
    if found.before is None:
        return []
    prefix = "corruption/"
    before = found.before.metrics
    return [
        {
            "corruption": name.removeprefix(prefix),
            "before": before[name],
            "after": sum(e.metrics[name] for e in found.after) / len(found.after),
        }
        for name in before
        if name.startswith(prefix)
    ]


def _best_seed(experiment: Experiment, found: Found) -> int:
    scores = [result.metrics.get(experiment.search.metric, 0.0) for result in found.results]
    return scores.index(max(scores))


def _sentence(experiment: Experiment, found: Found) -> str:
    method = method_name(experiment.method)
    threats = " and ".join(map(str, radii(found.task)))
    against = f" against {threats}" if threats else ""
    count = len(found.trials)
    searched = f"{count} trials" if count > 1 else "one run"
    seeds = len(found.chosen)
    over = f"; the chosen setting is the mean of {seeds} seeds" if seeds > 1 else ""
    return (
        f"{method} on {found.task.name}{against}, from {found.start.source}: "
        f"{searched}, chosen on {_split_name(found.task, 'val')}{over}."
    )


def _split_name(task: AnyTask, split: str) -> str:
    name = SELECTIONS.get(task.selection, f"the {split} split")
    return f"{name} ({len(task.splits[split]):,} {units(task)})"


def warnings(found: Found) -> list[str]:
    """Return what a reader must know before believing the numbers."""
    lines = []
    if found.leaky:
        lines.append("leaky: test examples took part in choosing what is reported on them")
    failed = [trial.label for trial in found.trials if trial.error]
    if failed:
        lines.append(f"{len(failed)} of {len(found.trials)} trials failed: {'; '.join(failed)}")
    for evaluation in evaluations(found):
        metrics = evaluation.metrics
        for name, value in metrics.items():
            if name.endswith(("/pgd", "/apgd")) and value > metrics.get("clean", 1.0):
                lines.append(f"{name} accuracy exceeds clean accuracy: the attack is broken")
    raised = {flag.name: flag.text for e in evaluations(found) for flag in e.flags if flag.raised}
    return lines + [f"{name}: {text}" for name, text in raised.items()]
