"""The names under which runs of all methods appear in MLflow: parameters, metrics and tags.

One vocabulary, so that any two runs can be compared in the UI without knowing their methods.

* Parameters: "method", "method.lr", "task.data", "task.eps.Linf", "start.model",
  "evaluation.suite", ...: numbers, words or short lists, one field each. A trial has those of its
  run and the values that it varies; a search has the values that it chose, once it has.
* Metrics: ``VOCABULARY``.
* Tags: ``OWN_TAGS``, and what the user adds, on a run and on its children.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

from robustft.errors import ConfigError
from robustft.runtime.experiment import Experiment, experiment_to_dict

__all__ = [
    "OWN_TAGS",
    "TAGS_VARIABLE",
    "VOCABULARY",
    "by_epoch",
    "checked_tags",
    "headline",
    "is_known_metric",
    "parameters",
    "short_text",
    "user_tags",
    "varied",
]

TAGS_VARIABLE = "ROBUSTFT_TAGS"
"""Environment variable with tags for the runs that are started: "comparison=table 1,owner=me"."""

OWN_TAGS = ("kind", "method", "data", "model", "threat", "selection", "leaky", "run_id")
"""What a run says of itself; ``kind`` is "experiment", "stage", "trial" or "comparison"."""

VOCABULARY: Mapping[str, str] = {
    "train/*": "of an epoch of training, by epoch: loss, clean, robust",
    "epoch/*": "everything else that is known epoch by epoch: epoch/val/clean, epoch/lr",
    "val/clean": "accuracy on the selection split, of the finished model",
    "val/robust": "the same under the method's validation attack",
    "val/union": "the same under all norms together",
    "val/{norm}": "the same under one norm",
    "val/loss": "clean cross-entropy, nats",
    "val/start_*": "any of these, of the start",
    "val/tuned_*": "any of these, before interpolation",
    "test/clean": "accuracy on test, read once at the end",
    "test/{norm}/{attack}": "right without and with this attack (after those before it)",
    "test/{norm}/robust": "under every attack of the norm",
    "test/robust": "under every attack",
    "test/union": "under every attack, where several norms attacked",
    "test/union/{norm}/{attack}": "the same up to this attack, where norms ran in sequence",
    "test/corruptions": "mean over corruptions",
    "test/{text}": "of texts, by attack, noise level or fixed set: accuracy, or /success, /queries",
    "start/*": "test accuracy of the start",
    "change/*": "that of the result less that of the start",
    "curve/*": "along an interpolation, step = 100 x alpha",
    "mrc/*": "criticality of a layer, nats",
    "mrc_drop/*": "accuracy that the layer's perturbation costs",
    "passes/*": "passes of single images through the network, in all",
    "seconds/wall": "from start to report",
    "overhead": "share of them in which no method code ran",
    "protocol/*": "of a row of compare --preset: val by one attack for all, costs, memory (MiB)",
    "method/*": "what only this method measures",
}
"""Names of metrics -> what they mean; ``*`` is any ending."""

_PATTERNS = [
    re.compile(
        re.escape(name)
        .replace(r"\{norm\}", "(Linf|L2|L1)")
        .replace(r"\{attack\}", "[a-z-]+")
        .replace(r"\{text\}", "[a-z_]+(-[0-9.]+)?(/(success|queries|changed_words|f1))?")
        .replace(r"\*", ".+")
    )
    for name in VOCABULARY
]

# Where something lies says nothing about what is computed.
_PLACES = ("root", "download", "corrupted_root")
_SECTIONS = ("task", "start", "method", "evaluation")
_LONGEST = 250  # characters of a parameter; the whole configuration is in config.yaml


def is_known_metric(name: str) -> bool:
    """Return whether ``name`` is in ``VOCABULARY``."""
    return any(pattern.fullmatch(name) for pattern in _PATTERNS)


def by_epoch(metrics: Mapping[str, float]) -> dict[str, float]:
    """Name what a method reports after an epoch.

    "val/clean" is that of the finished model, in every run; by epoch it is "epoch/val/clean".

    Example:
        >>> by_epoch({"train/loss": 0.5, "val/clean": 0.9, "lr": 0.1})
        {'train/loss': 0.5, 'epoch/val/clean': 0.9, 'epoch/lr': 0.1}
    """
    return {
        name if name.startswith("train/") else f"epoch/{name}": value
        for name, value in metrics.items()
    }


def headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """Name the metrics of a finished model: those of the vocabulary, the rest below "method/".

    Example:
        >>> headline({"val/clean": 0.9, "movement": 0.02})
        {'val/clean': 0.9, 'method/movement': 0.02}
    """
    return {
        name if name.startswith(("val/", "passes/")) else f"method/{name}": value
        for name, value in metrics.items()
    }


def parameters(experiment: Experiment) -> dict[str, str | int | float | bool]:
    """Return the experiment's parameters, flat: "method.optimizer.weight_decay" and the like.

    A section is named by what is chosen there ("method" = "rift", "method.schedule" = "halfway"),
    radii are numbers by norm ("task.eps.Linf" = 0.1), lists are joined by commas, and what is not
    set, or is only a place on a disk, is left out. So are the fields that a search varies: its
    trials have them, and "search.lr" says which values.
    """
    values = experiment_to_dict(experiment)
    found = _flat({name: values[name] for name in _SECTIONS})
    search = values["search"]
    space = search.pop("space")
    if space:
        found |= _flat({"search": search})
        found |= {f"search.{_field(name)}": short_text(value) for name, value in space.items()}
    for name in space:
        field = f"method.{_field(name)}"
        below = [one for one in found if one == field or one.startswith(f"{field}.")]
        for one in below:
            del found[one]
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    found: dict[str, str | int | float | bool] = {}
    for key, value in values.items():
        name = prefix.removesuffix(".") if key == "name" and prefix else f"{prefix}{key}"
        if key == "threat_models":
            found |= {f"{prefix}eps.{one['norm']}": one["eps"] for one in value}
        elif key in _PLACES or value is None or value in ((), [], {}):
            continue
        elif isinstance(value, Mapping):
            found |= _flat(value, f"{name}.")
        elif isinstance(value, (bool, int, float)):
            found[name] = value
        else:
            found[name] = short_text(value)
    return found


def _field(name: str) -> str:
    """Return a searched field as parameters call it: "schedule.name" is "schedule"."""
    return name.removesuffix(".name")


def short_text(value: Any) -> str:
    """Return a parameter's value in a few words: lists joined by commas, numbers without noise."""
    if isinstance(value, (list, tuple)):
        text = ", ".join(short_text(one) for one in value)
    elif isinstance(value, Mapping):
        text = " ".join(f"{key}={short_text(one)}" for key, one in value.items())
    else:
        text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def varied(values: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Return the searched values of a trial as parameters."""
    return _flat({"method": {_field(name): value for name, value in values.items()}})


def user_tags() -> dict[str, str]:
    """Return the tags that ``ROBUSTFT_TAGS`` names: "comparison=table 1,owner=me".

    Raises:
        ConfigError: it cannot be read, or names a tag that robustft or MLflow sets.
    """
    tags = {}
    for part in filter(str.strip, os.environ.get(TAGS_VARIABLE, "").split(",")):
        name, equals, value = (text.strip() for text in part.partition("="))
        if not equals or not re.fullmatch(r"\w[\w.-]*", name):
            raise ConfigError(
                f"{TAGS_VARIABLE} has {part.strip()!r}: write name=value, joined by commas"
            )
        tags[name] = value
    return checked_tags(tags)


def checked_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return a user's tags, or raise ConfigError if one has a name that is taken."""
    for name in tags:
        if name in OWN_TAGS or name.startswith(("mlflow.", "robustft.", "flag.", "chosen.")):
            raise ConfigError(f"the tag {name!r} is set by the run itself: choose another name")
    return dict(tags)
