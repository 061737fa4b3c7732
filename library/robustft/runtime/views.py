"""What MLflow's pages show of an experiment before anybody has chosen columns and charts there.

MLflow keeps a shared view of a page as a tag of the experiment, and shows it at an address that
names the tag. Ours are written when a run first connects; they list what a comparison needs.

Note: MLflow describes neither the tag nor its content, which its own "Share view" button writes;
an unknown field is ignored there, and a view that it cannot read leaves the page as it was.
"""

import json
from collections.abc import Sequence
from typing import Any

__all__ = ["VIEWS", "note", "view_page", "view_tags"]

_TAG = "mlflow.sharedViewState."
_SECTION = "robustft"
_NORMS = ("test/Linf/robust", "test/L2/robust", "test/L1/robust")
_WORKFLOW = "workflowType=machine_learning"  # else pages for language models


def _keys(kind: str, names: Sequence[str]) -> list[str]:
    return [f"{kind}.`{name}`" for name in names]


def _chart(uuid: str, kind: str, **fields: Any) -> dict[str, Any]:
    place = {"uuid": uuid, "type": kind, "metricSectionId": _SECTION}
    return {**place, "runsCountToCompare": 20, "deleted": False, "isGenerated": False, **fields}


def _metric(name: str) -> dict[str, str]:
    return {"key": name, "type": "METRIC"}


def _view(
    tag: str, value: str, *, columns: Sequence[str], params: Sequence[str], metrics: Sequence[str]
) -> str:
    """Return a view of the runs with a tag: which columns, the trade-off, parallel coordinates."""
    x, y = metrics[:2]
    charts = [
        _chart("trade-off", "SCATTER", xaxis=_metric(x), yaxis=_metric(y)),
        _chart(
            "parallel",
            "PARALLEL",
            selectedParams=list(params),
            selectedMetrics=list(metrics),
            showAllRuns=False,
        ),
    ]
    section = {"uuid": _SECTION, "name": "Comparison", "display": True}
    state = {
        "searchFilter": f"tags.{tag} = '{value}'",
        "orderByKey": f"metrics.`{y}`",
        "orderByAsc": False,
        "selectedColumns": list(columns),
        "compareRunCharts": charts,
        "compareRunSections": [
            {**section, "isReordered": False, "deleted": False, "isGenerated": False}
        ],
        # Else sections are sorted by name, and ours would stand behind that of every metric.
        "isAccordionReordered": True,
    }
    return json.dumps(state)


VIEWS: dict[str, str] = {
    "robustft-runs": _view(
        "kind",
        "experiment",
        columns=[
            *_keys("metrics", ["test/clean", "test/robust", "val/clean", "val/robust"]),
            *_keys("metrics", ["test/corruptions"]),
            *_keys("params", ["method", "method.lr"]),
            *_keys("tags", ["comparison"]),
        ],
        params=["method", "method.lr"],
        metrics=["test/clean", "test/robust"],
    ),
    "robustft-trials": _view(
        "kind",
        "trial",
        columns=[
            *_keys("metrics", ["val/clean", "val/robust", "passes/backwards"]),
            *_keys("params", ["method", "method.lr", "method.epochs", "method.seed"]),
            *_keys("tags", ["run_id"]),
        ],
        params=["method", "method.lr"],
        metrics=["val/clean", "val/robust"],
    ),
    "robustft-comparison": _view(
        "part",
        "row",
        columns=[
            *_keys("metrics", ["test/clean", "test/robust", *_NORMS, "test/corruptions"]),
            *_keys("metrics", ["protocol/search_passes", "protocol/training_passes"]),
            *_keys("metrics", ["protocol/training_seconds", "protocol/memory"]),
            *_keys("params", ["method"]),
            *_keys("tags", ["comparison"]),
        ],
        params=["method"],
        metrics=["test/clean", "test/robust", *_NORMS, "protocol/training_passes"],
    ),
}
"""Name of a view -> its state: the runs side by side, their trials, and the rows of compare."""


def view_tags() -> dict[str, str]:
    """Return the tags of an experiment that hold ``VIEWS``."""
    return {f"{_TAG}{name}": state for name, state in VIEWS.items()}


def view_page(experiment_id: str, name: str) -> str:
    """Return the address of a view, below that of the UI."""
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={name}&{_WORKFLOW}"


def note(experiment_id: str) -> str:
    """Return the experiment's description: links to ``VIEWS``."""
    runs, trials, rows = (view_page(experiment_id, name) for name in VIEWS)
    return (
        f"[The runs side by side]({runs}), [all trials]({trials}), [the rows of compare]({rows}) "
        "(robustft)"
    )
