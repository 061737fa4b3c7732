"""What a run tells MLflow: the experiment's run, one child per stage and trial, the final model.

What things are called there, in runs of all methods alike, is in ``robustft.runtime.vocabulary``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robustft.methods import Result
from robustft.runtime.events import Event
from robustft.runtime.experiment import Experiment, method_name
from robustft.runtime.jsonfile import write_json
from robustft.runtime.outputs import Found, commit, evaluations, trial_rows
from robustft.runtime.registry import Score
from robustft.runtime.search import Trial
from robustft.runtime.text_runs import AnyTask, architecture, radii, units
from robustft.runtime.tracking import Tracker
from robustft.runtime.vocabulary import (
    by_epoch,
    checked_tags,
    headline,
    parameters,
    short_text,
    user_tags,
    varied,
)

__all__ = [
    "TrackingListener",
    "log_data",
    "log_finished",
    "log_model",
    "log_prepared",
    "log_stage",
    "log_table",
    "log_trials",
    "registered_name",
    "split_measure",
    "start_parent",
]

FILES = ("config.yaml", "summary.json", "trials.parquet", "curves.parquet", "report.html")

# The names of a start's own stage are those of any other training.
_OF_START = {
    "task": "task",
    "start.task": "task",
    "start.model": "start.model",
    "start.method": "method",
}
_OF_RUN = {"task": "task", "start": "start", "method": "method"}


def start_parent(
    tracker: Tracker,
    experiment: Experiment,
    directory: Path,
    *,
    tags: Mapping[str, str] | None = None,
) -> str:
    """Start the experiment's MLflow run.

    Args:
        tracker: of this run.
        experiment: what is run.
        directory: the run's folder; its name is the run's.
        tags: more tags for the run and its children, such as {"comparison": "table 1"}; those of
            ``user_tags`` come on top.

    Raises:
        ConfigError: a tag has a name that is taken.
    """
    method = method_name(experiment.method)
    own = {
        "kind": "experiment",
        "method": method,
        "data": experiment.task.data,
        "model": experiment.start.model,
        "threat": ", ".join(map(str, radii(experiment.task))),
        "selection": experiment.task.selection,
        "leaky": experiment.task.selection == "official",
        "run_id": directory.name,
        "mlflow.source.git.commit": commit(),
    }
    return tracker.start_run(
        f"{method} {directory.name}",
        key="experiment",
        params=parameters(experiment),
        tags={**checked_tags(tags or {}), **user_tags(), **own},
    )


def log_data(
    tracker: Tracker, parent: str, experiment: Experiment, task: AnyTask, trained_on: AnyTask
) -> None:
    """Log the splits of the task, and those of another one that the start was trained on."""
    used = [("", experiment.task, task)]
    if trained_on is not task:
        used.append(("start ", experiment.start.task, trained_on))
    for prefix, config, one in used:
        for name, split in one.splits.items():
            tracker.log_dataset(
                parent,
                name=one.name,
                digest=one.digest,
                context=f"{prefix}{name}",
                source=config.root or config.data,
                num_rows=len(split),
            )


class TrackingListener:
    """Turns events into MLflow runs: one per stage, one per trial, under the experiment's run."""

    def __init__(self, tracker: Tracker, parent: str) -> None:
        self._tracker, self._parent = tracker, parent
        self._runs: dict[tuple[str, str], str] = {}

    def __call__(self, event: Event) -> None:
        kind = event["kind"]
        if kind == "begin":
            self._tracker.log_params(self._run(event), varied(event["values"]))
        elif kind == "metrics":
            metrics = by_epoch(event["metrics"])
            self._tracker.log_metrics(self._run(event), metrics, step=event["step"])
        elif kind == "end":
            run = self._run(event)
            self._tracker.log_metrics(run, headline(event["metrics"]), step=0)
            if event["error"]:
                self._tracker.set_tags(run, {"error": event["error"]})
            self._tracker.finish_run(run, "FAILED" if event["error"] else "FINISHED")

    def _run(self, event: Event) -> str:
        key = (event["stage"], event["run"])
        if key not in self._runs:
            start = _start_trial if event["run"] else _start_stage
            self._runs[key] = start(self._tracker, self._parent, event["run"] or event["stage"])
        return self._runs[key]


def _start_trial(tracker: Tracker, parent: str, label: str) -> str:
    """Start a trial's run, or find it again."""
    method = tracker.parameters(parent)["method"]
    return tracker.start_run(
        # Beside trials of other methods, what was varied is not enough of a name.
        f"{method} {label}",
        key=f"search/{label}",
        parent=parent,
        tags={"kind": "trial"},
        inherit=_OF_RUN,
    )


def _start_stage(tracker: Tracker, parent: str, stage: str) -> str:
    """Start a stage's run, or find it again."""
    own = {"kind": "stage"}
    of_start = stage.startswith("start-")
    if of_start:
        own["method"] = stage.removeprefix("start-")
    return tracker.start_run(
        stage,
        key=f"{stage}/",
        parent=parent,
        tags=own,
        inherit=_OF_START if of_start else _OF_RUN,
    )


def log_stage(tracker: Tracker, parent: str, stage: str, result: Result) -> None:
    """Log a finished stage's numbers and curves."""
    run = _start_stage(tracker, parent, stage)
    _log_result(tracker, run, result)
    tracker.finish_run(run)


def _log_result(tracker: Tracker, run: str, result: Result) -> None:
    """Log what events have told, which counts once, and what none has.

    A cached start sends no event; a worker or a driver that dies may take the last ones along.
    """
    for row in result.tables.get("epochs", ()):
        numbers = {n: v for n, v in row.items() if n != "epoch" and isinstance(v, int | float)}
        tracker.log_metrics(run, by_epoch(numbers), step=int(row.get("epoch", 0)))
    tracker.log_metrics(run, headline(result.metrics), step=0)


def log_prepared(tracker: Tracker, parent: str, stage: str, prepared: Mapping[str, Any]) -> None:
    """Log a criticality table as metrics, one per layer."""
    rows = prepared.get("criticality")
    if not rows:
        return
    run = _start_stage(tracker, parent, stage)
    for row in rows:
        values = {
            f"mrc/{row['layer']}": row["criticality"],
            f"mrc_drop/{row['layer']}": row["accuracy_drop"],
        }
        tracker.log_metrics(run, values, step=0)
    tracker.finish_run(run)


def log_trials(tracker: Tracker, parent: str, trials: Sequence[Trial]) -> None:
    """Log what only the end of a search knows of its trials: whole curves, who died or was stopped.

    An interpolation appears as "curve/clean" and the like at step 100 * alpha.
    """
    for trial in trials:
        # The run that the trial's events have made, found again by its key.
        run = _start_trial(tracker, parent, trial.label)
        if trial.stopped:
            tracker.set_tags(run, {"stopped": True})
            tracker.finish_run(run)
            continue
        if trial.result is None:
            tracker.set_tags(run, {"error": trial.error})
            tracker.finish_run(run, "FAILED")
            continue
        _log_result(tracker, run, trial.result)
        for row in trial.result.tables.get("interpolation", ()):
            values = {f"curve/{n}": v for n, v in row.items() if n != "alpha" and v is not None}
            tracker.log_metrics(run, values, step=round(100 * row["alpha"]))
        tracker.finish_run(run)


def log_finished(
    tracker: Tracker,
    parent: str,
    directory: Path,
    found: Found,
    summary: Mapping[str, Any],
    *,
    register: bool = True,
) -> None:
    """Log the headline numbers, the tables, the files, the plots and the model of a finished run.

    Args:
        tracker: of this run.
        parent: the experiment's MLflow run.
        directory: the run's folder, with everything that it leaves.
        found: what the run has found.
        summary: what ``summary.json`` holds.
        register: make a version of the task's registered model.
    """
    numbers = {
        name: value
        for name, value in summary["after"]["mean"].items()
        if not name.startswith("corruption/")
    }
    # First: the page that compares runs draws the first metric until another is chosen.
    cost = {"overhead": summary["overhead"]["share"], "seconds/wall": summary["seconds"]["wall"]}
    chosen = _mean([result.metrics for result in found.results])
    tracker.log_metrics(parent, {**headline(chosen), **cost}, step=0)
    if summary["before"] is not None:
        before = {f"start/{n}": v["accuracy"] for n, v in summary["before"].items() if n in numbers}
        change = {
            f"change/{n}": numbers[n] - summary["before"][n]["accuracy"]
            for n in numbers
            if n in summary["before"]
        }
        tracker.log_metrics(parent, {**before, **change}, step=0)
    tracker.log_params(parent, _chosen_values(found))
    choices = found.results[0].choices
    tracker.set_tags(parent, {f"chosen.{name}": value for name, value in choices.items()})
    tracker.set_tags(parent, {"leaky": found.leaky})
    _log_tables(tracker, parent, directory, found, summary)
    for name in FILES:
        tracker.log_artifact(parent, directory / name)
    for name in ("plots", "evaluation"):
        tracker.log_artifact(parent, directory / name)
    raised = {flag.name for e in evaluations(found) for flag in e.flags if flag.raised}
    looked_at = {flag.name for e in evaluations(found) for flag in e.flags}
    tracker.set_tags(parent, {f"flag.{name}": name in raised for name in sorted(looked_at)})
    log_model(
        tracker,
        parent,
        found.model_dir,
        task=found.task,
        network=architecture(found.start),
        method=summary["method"],
        run_id=directory.name,
        leaky=found.leaky,
        # These appear with the run as well, so they are not logged apart.
        metrics={f"test/{name}": value for name, value in numbers.items()},
        scores=_scores(directory, found),
        register=register,
    )


def log_model(
    tracker: Tracker,
    run: str,
    directory: Path,
    *,
    task: AnyTask,
    network: str,
    method: str,
    run_id: str,
    leaky: bool,
    metrics: Mapping[str, float],
    scores: Mapping[str, Score],
    register: bool = True,
) -> None:
    """Log a model of a task, or register one that was logged before.

    Args:
        tracker: of the run's folder.
        run: that made the model.
        directory: of the model.
        task, network, method, run_id, leaky: what names and describes it.
        metrics: on test; they appear with the run as well.
        scores: on the selection split, for the aliases.
        register: make a version of the task's registered model.
    """
    tracker.log_model(
        run,
        directory,
        name=f"{task.name}-{network}-{method}",
        registered=registered_name(task),
        register=register,
        tags={
            "method": method,
            "run_id": run_id,
            "architecture": network,
            "data": task.name,
            "threat_model": ", ".join(map(str, radii(task))),
            "selection": task.selection,
            "leaky": leaky,
        },
        metrics=metrics,
        scores=scores,
    )


def split_measure(task: AnyTask) -> str:
    """Return how the selection split is measured, in the words of ``Score.measure``."""
    return f"{len(task.splits['val'])} {units(task)} of {task.digest[:12]}"


def registered_name(task: AnyTask) -> str:
    """Return the name of the registered model of a task: its data and its threat models.

    Example: ``robustft-fashion_mnist_mini-Linf-0.1``.
    """
    threats = [str(threat).replace(" ", "-") for threat in radii(task)]
    return "-".join(["robustft", task.name, *threats])


def _scores(directory: Path, found: Found) -> dict[str, Score]:
    """Return what the saved model reached on the selection split; nothing if test chose it."""
    if found.leaky:
        return {}
    card = json.loads((found.model_dir / "card.json").read_text(encoding="utf-8"))
    metrics: dict[str, float] = card["selection_metrics"]
    if "val/robust" in metrics and len(radii(found.task)) == 1:
        # The union of one norm is that norm.
        metrics.setdefault("val/union", metrics["val/robust"])
    split = split_measure(found.task)
    attacked = f"{split}, {_validation_attack(directory)}"
    return {
        name: Score(metrics[name], split if name == "val/clean" else attacked)
        for name in ("val/clean", "val/robust", "val/union")
        if name in metrics
    }


def _validation_attack(directory: Path) -> str:
    """Return what "val/robust" was measured under: "PGD-10", "APGD-20".

    Only the kind of attack and its steps: by them attacks differ in strength far more than by the
    step size or by repeated runs, in which methods differ as well.
    """
    record = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    method = record["experiment"]["method"]
    attack = method.get("val_attack", method.get("curve_attack"))
    if "val_steps" in method:
        return f"APGD-{method['val_steps']}"
    if isinstance(attack, Mapping) and "eps" not in attack:
        return f"PGD-{attack['num_steps']}"
    # Of text, an attack brings its own radius.
    return short_text(attack or "")


def _chosen_values(found: Found) -> dict[str, str]:
    """Return the searched values of the chosen trials; of several seeds, all of them."""
    rows = [varied(trial.values) for trial in found.chosen]
    return {
        name: ", ".join(dict.fromkeys(short_text(row[name]) for row in rows if name in row))
        for name in dict.fromkeys(name for row in rows for name in row)
    }


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the means of what all rows have."""
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}


def _log_tables(
    tracker: Tracker, parent: str, directory: Path, found: Found, summary: Mapping[str, Any]
) -> None:
    """Log the result and the trials as tables, and the result as the run's description."""
    before, after = summary["before"], summary["after"]["mean"]
    results = []
    for name, value in after.items():
        start = None if before is None or name not in before else before[name]["accuracy"]
        change = None if start is None else value - start
        results.append({"metric": name, "start": start, "result": value, "change": change})
    tables = {"results.json": results, "trials.json": trial_rows(found)}
    (directory / "tables").mkdir(exist_ok=True)
    for name, rows in tables.items():
        write_json(directory / "tables" / name, _split_table(rows))
    lines = [f"{summary['method']} on {found.task.name}, selection {found.task.selection}", ""]
    lines += ["| test | start | result | change |", "|:--|--:|--:|--:|"]
    for row in results:
        if not row["metric"].startswith("corruption/"):
            cells = [_cell(row["start"]), _cell(row["result"]), _cell(row["change"], "+.4f")]
            lines.append(f"| {row['metric']} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    (directory / "tables" / "results.md").write_text(text, encoding="utf-8")
    _show_tables(tracker, parent, directory, list(tables), note=text)


def log_table(
    tracker: Tracker,
    run: str,
    directory: Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    note: str,
) -> None:
    """Log a table as MLflow's pages show one, and Markdown as the run's description.

    Args:
        tracker: of ``directory``.
        run: local id.
        directory: the table becomes ``tables/<name>.json`` there.
        name: of the table.
        rows: column -> value; columns that a row lacks stay empty.
        note: the description.
    """
    (directory / "tables").mkdir(exist_ok=True)
    write_json(directory / "tables" / f"{name}.json", _split_table(rows))
    _show_tables(tracker, run, directory, [f"{name}.json"], note=note)


def _show_tables(
    tracker: Tracker, run: str, directory: Path, names: Sequence[str], *, note: str
) -> None:
    tracker.log_artifact(run, directory / "tables")
    # The pages that compare runs side by side list these.
    shown = [{"path": f"tables/{name}", "type": "table"} for name in names]
    tracker.set_tags(
        run, {"mlflow.note.content": note, "mlflow.loggedArtifacts": json.dumps(shown)}
    )


def _cell(value: float | None, form: str = ".4f") -> str:
    return "" if value is None else format(value, form)


def _split_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return rows as MLflow's tables are stored: columns, then one list per row."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value: Any) -> Any:
        return short_text(value) if isinstance(value, (list, tuple)) else value

    return {"columns": columns, "data": [[cell(row.get(n)) for n in columns] for row in rows]}
