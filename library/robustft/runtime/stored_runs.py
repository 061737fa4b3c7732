"""Finished runs, read from their folders: nothing is trained, evaluated or downloaded again.

What a run leaves is described in :mod:`robustft.runtime.outputs`. Read here are ``run.json``,
``summary.json``, ``masks/*.parquet``, ``trials.parquet``, ``curves.parquet``,
``criticality.parquet``, ``model/card.json`` and ``tracking/records.jsonl``; of all of these only
numbers, names and outcomes, never weights.
"""

import dataclasses
import json
import re
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from robustft.data import Task
from robustft.data.storage import fetched
from robustft.data.text import TextTask
from robustft.errors import ConfigError, DataError, ResourceError
from robustft.evaluation.comparison import AnyEvaluation, ComparedRun, Cost
from robustft.evaluation.evaluation_report import write_evaluation_report
from robustft.evaluation.method_figures import Choice
from robustft.evaluation.outcome import Strip, load_evaluation
from robustft.evaluation.report import Panel, ReportData, method_panels, write_report
from robustft.evaluation.text_outcome import TextEvaluation, load_text_evaluation
from robustft.evaluation.text_report import write_text_report
from robustft.methods import Result
from robustft.methods.base import Row
from robustft.models import Start
from robustft.runtime import outputs
from robustft.runtime.events import Clock
from robustft.runtime.experiment import experiment_from_dict
from robustft.runtime.run_figures import START, file_panels, staged, tolerance_of
from robustft.runtime.search import Trial
from robustft.runtime.text_runs import AnyTask, units
from robustft.threat import ThreatModel

__all__ = [
    "StoredRun",
    "compared_run",
    "load_run",
    "load_strips",
    "run_panels",
    "save_strips",
    "stored_report_data",
    "write_reports",
]

CHOICE = "chosen_"
"""What begins the names of the columns of trials.parquet that hold a trial's choices."""
NEVER_READ = ("*.safetensors", "items/*")
"""Of a published run: weights, and what a resumed run would need."""
STRIP_ARRAYS = ("ids", "labels", "predicted", "clean", "adversarial")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredRun:
    """A finished run.

    Args:
        directory: its folder.
        record: ``run.json``: the experiment, the command, commit and versions when it began.
        summary: ``summary.json``: every headline number.
        card: ``model/card.json``.
        before: the start on the test split; None if it was not measured.
        after: seed -> the chosen model on the test split, in the order in which they were chosen.
        trials: rows of ``trials.parquet``.
        curves: rows of ``curves.parquet``.
        criticality: rows of ``criticality.parquet``; empty without one.
        split_sizes: "train", "val" and "test" -> examples; empty where nothing says so.
    """

    directory: Path
    record: Mapping[str, Any]
    summary: Mapping[str, Any]
    card: Mapping[str, Any]
    before: AnyEvaluation | None
    after: Mapping[str, AnyEvaluation]
    trials: Sequence[Row]
    curves: Sequence[Row]
    criticality: Sequence[Row]
    split_sizes: Mapping[str, int]

    @property
    def name(self) -> str:
        """Experiment and run id: where the run lies under the folder of all runs."""
        return f"{self.summary['experiment']}/{self.summary['run_id']}"

    @property
    def command(self) -> str:
        """The command that started it, as one would type it."""
        return str(self.record["command"])

    @property
    def config(self) -> Mapping[str, Any]:
        """The whole configuration, nested."""
        return cast(Mapping[str, Any], self.record["experiment"])

    @property
    def versions(self) -> dict[str, str]:
        """Package -> version, with Python's own."""
        return {**self.summary["versions"], "python": self.summary["python"]}

    @property
    def best(self) -> str:
        """The seed whose model was saved: the first of the best on the selection split."""
        metric = self.config["search"]["metric"]
        scores = [one.get(metric, 0.0) for one in self.summary["chosen"]["selection_metrics"]]
        return list(self.after)[scores.index(max(scores))]


def load_run(directory: str | Path) -> StoredRun:
    """Read a finished run.

    Args:
        directory: the run's folder, ``runs/<experiment>/<run-id>``, or the URI at which it is
            published.

    Raises:
        ConfigError: no run, or an unfinished one, lies there.
        DataError: something that a finished run leaves is missing or damaged.
        ResourceError: the store that the URI names cannot be read.
    """
    folder = fetched(directory, without=NEVER_READ).expanduser().resolve()
    if not (folder / "run.json").is_file():
        raise ConfigError(_foreign(folder, directory))
    if not (folder / "summary.json").is_file():
        raise ConfigError(
            f"the run in {directory} is not finished: finish it with robustft resume {directory}"
        )
    record, summary = _json(folder / "run.json"), _json(folder / "summary.json")
    card = _json(folder / "model" / "card.json")
    try:
        count = len(summary["chosen"]["trials"])
        seeds = list(summary["after"]["seeds"])
        # Seeds that were not searched have one name in the summary and are numbered in the files.
        seeds = seeds if len(seeds) == count else [str(index) for index in range(count)]
        # They name files, and the summary may come from elsewhere.
        odd = [seed for seed in seeds if not re.fullmatch(r"[A-Za-z0-9-]+", str(seed))]
        if odd:
            path = folder / "summary.json"
            raise DataError(f"{path} names the seed {odd[0]!r}: robustft did not write it")
        before = _evaluation(folder, START) if summary["before"] is not None else None
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / 'summary.json'} lacks {error}: run it again") from error
    return StoredRun(
        directory=folder,
        record=record,
        summary=summary,
        card=card,
        before=before,
        after={seed: _evaluation(folder, f"seed-{seed}") for seed in seeds},
        trials=_rows(folder / "trials.parquet"),
        curves=_rows(folder / "curves.parquet"),
        criticality=_rows(folder / "criticality.parquet", optional=True),
        split_sizes=summary.get("split_sizes") or _logged_sizes(folder, summary["data_digest"]),
    )


def compared_run(run: StoredRun, name: str | None = None) -> ComparedRun:
    """Return a run as it enters a comparison; ``name`` is what it is called there."""
    finished = [row for row in run.trials if row["status"] == "finished"]
    chosen = [row for row in finished if row["chosen"]]
    seconds = run.summary["seconds"]
    return ComparedRun(
        name=name or run.name,
        evaluations=run.after,
        data=run.summary["data"],
        data_digest=run.summary["data_digest"],
        leaky=bool(run.summary["leaky"]),
        cost=Cost(
            forwards=_mean(chosen, "passes/forwards"),
            backwards=_mean(chosen, "passes/backwards"),
            seconds=_mean(chosen, "seconds"),
            all_forwards=_total(run.trials, "passes/forwards"),
            all_backwards=_total(run.trials, "passes/backwards"),
            all_seconds=_total(run.trials, "seconds"),
            num_trials=len(run.trials),
            wall_seconds=seconds.get("wall"),
        ),
    )


def stored_report_data(run: StoredRun) -> ReportData:
    """Return what the page of the run shows, from what the run has stored.

    Raises:
        ConfigError: this version of robustft no longer knows a field or the method of the run.
    """
    experiment = experiment_from_dict(run.record["experiment"])
    data = outputs.report_data(
        experiment,
        run.directory,
        _found(run),
        _StoredClock(run.summary),
        command=run.command,
        tracking_url=run.summary.get("tracking_url"),
    )
    # Sizes that nothing tells are not shown as if they were known to be 0.
    unknown = f" (0 {units(_task(run))})"
    told = ("sentence", "selection_split", "report_split")
    # Of the run, not of this moment and this checkout.
    finished = (run.directory / "summary.json").stat().st_mtime
    created = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(finished))
    return dataclasses.replace(
        data,
        created=run.summary.get("created") or created,
        commit=run.summary["commit"],
        versions=run.versions,
        # As it was given: a newer version may know further fields.
        config=run.config,
        **{name: getattr(data, name).replace(unknown, "") for name in told},
    )


def write_reports(run: StoredRun, *, without_pictures: bool = False) -> dict[str, Path]:
    """Write ``report.html`` and ``evaluation/report.html`` of a run once more.

    Args:
        run: what to show.
        without_pictures: write the page of the evaluation even if the pictures of attacked images
            are not stored, and will be missing on it. Otherwise such a page, once there, stays.

    Returns:
        "report" and, if it was written, "evaluation" -> the page.

    Raises:
        ConfigError: see ``stored_report_data``.
        ResourceError: a file cannot be written.
    """
    data = stored_report_data(run)
    pages = {"report": write_report(run.directory, data, further=_file_panels(run))}
    folder = run.directory / "evaluation"
    evaluation = run.after[run.best]
    about: dict[str, Any] = {
        "title": f"{run.summary['experiment']}: the chosen model",
        "facts": {
            "run": run.directory.name,
            "model": str(run.card.get("architecture") or run.card.get("model")),
            "data": run.summary["data"],
        },
        "command": run.command,
        "class_names": run.card["class_names"],
    }
    if isinstance(evaluation, TextEvaluation):
        pages["evaluation"] = write_text_report(folder, evaluation, **about)
        return pages
    stored = _strips_path(run.directory, f"seed-{run.best}")
    strips = load_strips(stored) if stored.is_file() else []
    missing = not strips and any(not mask.all() for mask in evaluation.masks.values())
    if not missing or without_pictures or not (folder / "report.html").is_file():
        complete = dataclasses.replace(evaluation, strips=strips)
        pages["evaluation"] = write_evaluation_report(folder, complete, **about)
    return pages


def run_panels(run: StoredRun) -> list[Panel]:
    """Return the figures that the rows of the run allow, and those of files beside them.

    They are those of its page, but for what the page of a comparison shows of all runs at once.
    """
    best = list(run.after).index(run.best)
    chosen = run.summary["chosen"]
    layers = str(chosen["choices"][best].get("layer", "")).split(",")
    curves = [_known(row) for row in run.curves]
    tables = {
        "interpolation": [row for row in curves if row["table"] == "interpolation"],
        "criticality": [{**row, "chosen": row["layer"] in layers} for row in run.criticality],
        "epochs": staged(curves, run.summary["method"]),
    }
    choice = Choice(
        trial=chosen["trials"][best],
        alpha=chosen["choices"][best].get("alpha"),
        tolerance=tolerance_of(run.config),
        split=outputs.SELECTIONS.get(run.summary["selection"], "the val split"),
    )
    return [*method_panels(tables, choice), *_file_panels(run)]


def save_strips(path: str | Path, strips: Sequence[Strip]) -> None:
    """Write pictures of attacked images as ``.npz``, the part that ``Evaluation.save`` leaves out.

    Raises:
        ResourceError: the file cannot be written.
    """
    arrays: dict[str, Any] = {
        f"{number} {name}": getattr(strip, name)
        for number, strip in enumerate(strips)
        for name in STRIP_ARRAYS
    }
    rest = [
        {"norm": strip.norm, "eps": float(strip.eps), "attacks": list(strip.attacks)}
        for strip in strips
    ]
    arrays["about"] = np.frombuffer(json.dumps(rest).encode(), dtype=np.uint8)
    try:
        with Path(path).open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
    except OSError as error:
        raise ResourceError(
            f"cannot write {path} ({error.strerror}): make room or choose another folder"
        ) from error


def load_strips(path: str | Path) -> list[Strip]:
    """Read what ``save_strips`` wrote.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        # Opened here: of a damaged file NumPy would leave its own handle open.
        with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes().decode())
            return [
                Strip(**rest, **{name: file[f"{number} {name}"] for name in STRIP_ARRAYS})
                for number, rest in enumerate(about)
            ]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} holds no pictures of an evaluation: {error}") from error


def _file_panels(run: StoredRun) -> list[Panel]:
    where = Path(run.record.get("working_directory", ""))
    return file_panels(run.directory, run.config, working_directory=where)


def _strips_path(directory: Path, name: str) -> Path:
    return directory / "masks" / f"{name}.pictures.npz"


class _StoredClock(Clock):
    """The times of a run that is over."""

    def __init__(self, summary: Mapping[str, Any]) -> None:
        super().__init__(began=0.0)
        self._summary = summary

    def stages(self) -> Mapping[str, float]:
        seconds = self._summary["seconds"]
        return {name: value for name, value in seconds.items() if name != "wall"}

    def overhead(self, now: float | None = None) -> tuple[float, float]:
        return self._summary["seconds"]["wall"], self._summary["overhead"]["share"]


def _found(run: StoredRun) -> outputs.Found:
    """Return what the run had found when it wrote its report; weights are left out."""
    card = run.card
    start = Start(
        architecture=str(card.get("architecture") or card.get("model")),
        num_classes=int(card["num_classes"]),
        image_shape=tuple(card.get("image_shape", (0, 0, 0))),
        mean=(),
        std=(),
        source=card["start"],
    )
    trials = {row["trial"]: _trial(run, row) for row in run.trials}
    curves = _tables(run, START)
    return outputs.Found(
        task=_task(run),
        start=start,
        start_result=Result(state={}, metrics={}, tables=curves) if curves else None,
        trials=list(trials.values()),
        chosen=[trials[label] for label in run.summary["chosen"]["trials"]],
        before=run.before,
        after=list(run.after.values()),
        model_dir=run.directory / "model",
    )


def _task(run: StoredRun) -> AnyTask:
    """Return the task without its data: a range stands for a split, whose size is all we know."""
    splits: Any = {name: range(run.split_sizes.get(name, 0)) for name in ("train", "val", "test")}
    about: dict[str, Any] = {
        "name": run.summary["data"],
        "splits": splits,
        "class_names": tuple(run.card["class_names"]),
        "digest": run.summary["data_digest"],
        "selection": run.summary["selection"],
    }
    if isinstance(next(iter(run.after.values())), TextEvaluation):
        return TextTask(**about, fixed={}, tokenizer="", max_length=0)
    threats = tuple(ThreatModel(**threat) for threat in run.card["threat_models"])
    return Task(**about, threat_models=threats, mean=(), std=())


def _trial(run: StoredRun, row: Row) -> Trial:
    """Return a trial as it stood when ``outputs.trial_rows`` made ``row`` of it."""
    searched = run.config["search"]["space"]
    known = {name: value for name, value in row.items() if value is not None}
    rest = ("trial", "seconds", "status", "error", "chosen", *searched)
    choices = {k.removeprefix(CHOICE): v for k, v in known.items() if k.startswith(CHOICE)}
    metrics = {k: v for k, v in known.items() if k not in rest and not k.startswith(CHOICE)}
    finished = row["status"] == "finished"
    tables: dict[str, Sequence[Row]] = dict(_tables(run, row["trial"]))
    if row["chosen"] and run.criticality:
        tables["criticality"] = run.criticality
    return Trial(
        label=row["trial"],
        values={name: known[name] for name in searched if name in known},
        result=Result(state={}, metrics=metrics, choices=choices, tables=tables)
        if finished
        else None,
        error=row["error"] or "",
        reported={} if finished else metrics,
        seconds=row["seconds"],
    )


def _tables(run: StoredRun, trial: str) -> dict[str, Sequence[Row]]:
    """Return the tables of one trial, or of the start, as its method returned them."""
    tables: dict[str, list[Row]] = {}
    for row in run.curves:
        if row["trial"] == trial:
            rest = {k: v for k, v in _known(row).items() if k not in ("trial", "table")}
            tables.setdefault(row["table"], []).append(rest)
    return dict(tables)


def _known(row: Row) -> Row:
    """Return a row without the columns that only other rows of its file have."""
    return {name: value for name, value in row.items() if value is not None}


def _evaluation(folder: Path, name: str) -> AnyEvaluation:
    """Read the outcomes of one model, of images or of text."""
    path = folder / "masks" / f"{name}.parquet"
    try:
        names = pq.read_schema(path).names
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} holds no saved evaluation: {reason}") from error
    # Only text is measured on further sets, which stand in the same file.
    return load_text_evaluation(path) if "set" in names else load_evaluation(path)


def _rows(path: Path, *, optional: bool = False) -> list[Row]:
    if optional and not path.is_file():
        return []
    try:
        with pq.ParquetFile(path) as file:
            rows: list[Row] = file.read().to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is missing or damaged ({reason}): run it again") from error
    return rows


def _json(path: Path) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is missing or damaged ({error}): run it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is damaged (no JSON object): run it again")
    return value


def _foreign(folder: Path, given: str | Path) -> str:
    """Return the sentence for a folder that holds no run: what it is instead, and what to give."""
    if (folder / "evaluation.json").is_file():
        return (
            f"{given} is the output of robustft evaluate, not a run: give the folder of a run, "
            "runs/<name>/<run-id>"
        )
    if (folder.parent / "run.json").is_file():
        return f"{given} is a part of a run: give {folder.parent}"
    inside = sorted(path.parent for path in folder.glob("*/run.json"))
    if inside:
        return f"{given} holds {len(inside)} runs: name one of them, e.g. {inside[-1]}"
    return f"{given} is no run folder (no run.json): give runs/<name>/<run-id>"


def _logged_sizes(folder: Path, digest: str) -> dict[str, int]:
    """Return the sizes of the splits as they were told to MLflow.

    Empty if the spool is gone or does not say so.
    """
    path = folder / "tracking" / "records.jsonl"
    if not path.is_file():
        return {}
    sizes = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith('{"kind": "dataset"'):
            continue
        try:
            record = json.loads(line)
        except ValueError:
            # What a crash has left of a line; the spool's writer drops it as well.
            continue
        if record["digest"] == digest and not record["context"].startswith(f"{START} "):
            sizes[record["context"]] = int(record["num_rows"])
    return sizes


def _numbers(rows: Sequence[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name) is not None]


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = _numbers(rows, name)
    return sum(values) / len(values) if values and len(values) == len(rows) else None


def _total(rows: Sequence[Row], name: str) -> float | None:
    """Return the sum, or None unless every trial that ran has counted."""
    counted = _numbers(rows, name)
    ran = [row for row in rows if row["status"] != "failed" or row.get(name) is not None]
    return sum(counted) if counted and len(counted) == len(ran) else None
