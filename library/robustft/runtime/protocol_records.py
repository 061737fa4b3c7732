"""What a comparison leaves beside its tables: loss surfaces, MLflow runs, registered models."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from robustft.data.text import TextTask
from robustft.data.tokens import load_tokenizer
from robustft.evaluation.loss_surface import loss_surface, split_batches
from robustft.models import load_model_dir
from robustft.models.text import load_text_model_dir
from robustft.runtime.jsonfile import write_json
from robustft.runtime.protocol import Bench, Entry, Findings, robust_mean
from robustft.runtime.protocol_report import RESULTS, measured_columns
from robustft.runtime.recording import log_model, log_table, registered_name, split_measure
from robustft.runtime.registry import Score
from robustft.runtime.run_figures import SURFACES
from robustft.runtime.session import storage_root
from robustft.runtime.stored_runs import StoredRun
from robustft.runtime.text_runs import architecture, radii
from robustft.runtime.tracking import Tracker
from robustft.runtime.vocabulary import short_text, user_tags
from robustft.training.loaders import rows as image_rows
from robustft.training.text_loader import text_rows

__all__ = ["add_surface", "record_comparison", "record_row"]

GRID = (-0.25, 0.25, 11)
"""Of the loss surfaces: half the points of ``robustft surface`` along either axis."""
SURFACE_LIMITS = {"images": 128, "text": 32}
"""Training examples that they are means of; an encoder takes long on a CPU."""
RECORD = "protocol.json"
"""In a row's folder: what MLflow was told of it, once it was."""
PARTS = ("table.md", "pareto.png", "report.html", RESULTS)


def saved_state(bench: Bench, directory: Path) -> Mapping[str, Any]:
    """Return the weights of the model that a run has saved."""
    folder = directory / "model"
    load: Any = load_text_model_dir if isinstance(bench.task, TextTask) else load_model_dir
    start, _ = load(folder)
    return {**start.state}


def add_surface(bench: Bench, name: str, stored: StoredRun) -> None:
    """Measure the loss around a row's saved model, which its tab on the page shows, once.

    All rows have the same random directions and the same examples of the training split.

    Args:
        bench: what all rows share.
        name: of the row.
        stored: its run.
    """
    file = stored.directory / SURFACES / f"1-{name}.npz"
    if file.is_file():
        return
    rows: Callable[..., tuple[Tensor, ...]] = image_rows
    limit = SURFACE_LIMITS["images"]
    if isinstance(bench.task, TextTask):
        limit, pad_id = SURFACE_LIMITS["text"], load_tokenizer(bench.task.tokenizer).pad_id
        rows = functools.partial(text_rows, pad_id=pad_id)
    batches = split_batches(bench.task.splits["train"], num_examples=limit, rows=rows)
    network = dataclasses.replace(bench.start, state=saved_state(bench, stored.directory)).build()
    surface = loss_surface(network, batches, grid=GRID, num_examples=limit, map=bench.mapper)
    file.parent.mkdir(parents=True, exist_ok=True)
    surface.save(file)


def record_row(bench: Bench, entry: Entry, stored: StoredRun) -> None:
    """Tell MLflow once what a row cost, and register its model.

    The methods measure val in different ways. Here every row's saved model is judged by the one
    attack of the protocol, so that the aliases best-clean, best-robust and best-union compare like
    with like.
    """
    if (stored.directory / RECORD).is_file():
        return
    accuracies, passes = bench.judge(saved_state(bench, stored.directory))
    clean, robust, union = accuracies["clean"], robust_mean(accuracies), accuracies["robust"]
    judge = short_text(bench.kind.judge)
    split = split_measure(bench.task)
    numbers = {
        "val_clean": clean,
        "val_robust": robust,
        "val_union": union,
        "search_passes": entry.search_passes,
        "search_seconds": entry.search_seconds,
        "training_passes": entry.trial.total,
        "training_seconds": entry.seconds,
        "memory": entry.memory,
    }
    with tracking(bench, stored.directory) as tracker:
        run = tracker.start_run(stored.name, key="experiment")
        known = {f"protocol/{name}": v for name, v in numbers.items() if v is not None}
        tracker.log_metrics(run, {n: v for n, v in known.items() if math.isfinite(v)}, step=0)
        log_model(
            tracker,
            run,
            stored.directory / "model",
            task=bench.task,
            network=architecture(bench.start),
            method=entry.method,
            run_id=stored.directory.name,
            leaky=bench.task.selection == "official",
            metrics={},
            scores={
                "val/clean": Score(clean, split),
                "val/robust": Score(robust, f"{split}, mean of {judge}"),
                "val/union": Score(union, f"{split}, {judge}"),
            },
        )
        tracker.finish_run(run)
    write_json(stored.directory / RECORD, {"accuracies": accuracies, "passes": passes})


def record_comparison(bench: Bench, findings: Findings, text: str) -> None:
    """Give the comparison an MLflow run of its own: the table, the pictures and the page.

    Args:
        bench: whose output folder holds them.
        findings: what they show.
        text: the tables as Markdown.
    """
    base = bench.base
    with tracking(bench, bench.output) as tracker:
        run = tracker.start_run(
            f"comparison {bench.output.name}",
            key="comparison",
            params={
                "methods": [entry.name for entry in findings.methods],
                "seeds": findings.seeds,
                "tolerance": findings.tolerance,
                "budget": findings.budget,
                "start.model": base.start.model,
                "task.data": base.task.data,
            },
            tags={
                **user_tags(),
                "kind": "comparison",
                "data": base.task.data,
                "model": base.start.model,
                "threat": ", ".join(map(str, radii(base.task))),
                "run_id": bench.output.name,
                "registered_model": registered_name(bench.task),
            },
        )
        log_table(tracker, run, bench.output, "comparison", list(table_rows(findings)), note=text)
        for name in PARTS:
            if (bench.output / name).is_file():
                tracker.log_artifact(run, bench.output / name)
        tracker.finish_run(run)


def table_rows(findings: Findings) -> Iterator[dict[str, Any]]:
    """Yield a row per method as MLflow's tables show them: accuracies on test, and costs."""
    columns = measured_columns(findings)
    for entry in findings.methods:
        means = {
            title: sum(entry.test[metric]) / len(entry.test[metric])
            for title, metric in columns.items()
            if entry.test[metric]
        }
        yield {
            "method": entry.name,
            **means,
            entry.field: entry.chosen.value,
            "kept on val": entry.kept,
            "search passes": entry.search_passes,
            "search s": entry.search_seconds,
            "training passes": entry.trial.total,
            "training s": entry.seconds,
            "worker MiB": entry.memory,
        }


@contextmanager
def tracking(bench: Bench, directory: Path) -> Iterator[Tracker]:
    """Give the tracker of a folder, and close it."""
    runtime = bench.base.runtime
    tracker = Tracker(
        directory,
        experiment=bench.base.name,
        storage=storage_root(runtime),
        tracking_uri=runtime.tracking_uri,
    )
    try:
        yield tracker
    finally:
        tracker.close()
