"""Which version of a registered model is the best: aliases that validation chooses, never test.

A registered model holds the models of one task, whatever method made them. Each version carries, as
tags, the values that it reached on the selection split and how they were measured:
``val/clean`` = "0.91", ``val/clean.measure`` = "600 examples of 3fa2b1c9". An alias stands at the
version with the highest value among those that were measured in the same way; of equal ones, at
the oldest.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["ALIASES", "Score", "best_version", "score_tags", "settle_aliases"]

logger = logging.getLogger(__name__)

ALIASES: Mapping[str, str] = {
    "best-clean": "val/clean",
    "best-robust": "val/robust",
    "best-union": "val/union",
}
"""Alias -> the metric that chooses its version; higher is better."""

_ATTEMPTS = 20
"""Each further one means that another process has just registered a better version."""


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """What a model reached on the selection split.

    Args:
        value: higher is better.
        measure: how it was measured; values are compared where these words are equal.
    """

    value: float
    measure: str


def score_tags(scores: Mapping[str, Score]) -> dict[str, str]:
    """Return the tags of a version: ``<metric>`` and ``<metric>.measure``; NaN leaves them out."""
    tags: dict[str, str] = {}
    for metric, score in scores.items():
        if math.isfinite(score.value):
            tags |= {metric: repr(score.value), f"{metric}.measure": score.measure}
    return tags


def best_version(versions: Mapping[int, Mapping[str, str]], metric: str, measure: str) -> int:
    """Return the number of the version with the highest value; of equal ones, the oldest.

    Args:
        versions: number -> tags.
        metric: name of the tag that holds the value.
        measure: only versions measured like this take part; there is at least one.
    """
    values = {
        number: float(tags[metric])
        for number, tags in versions.items()
        if tags.get(f"{metric}.measure") == measure
    }
    return min(values, key=lambda number: (-values[number], number))


def settle_aliases(client: Any, name: str, version: int) -> None:
    """Move each alias of the model ``name`` to its best version, after ``version`` was registered.

    Safe among processes that register at the same time and when repeated: all versions are
    compared, not the new one with the present one, and after a move they are compared again. Who
    moved an alias last has therefore seen every version registered before; who registers later
    compares later.

    Args:
        client: an ``MlflowClient``.
        name: of the registered model.
        version: the new version. An alias whose holder was measured in another way stays where it
            is, and the new version gets a tag that says so.
    """
    for alias, metric in ALIASES.items():
        for _ in range(_ATTEMPTS):
            versions = _versions(client, name)
            measure = versions[version].get(f"{metric}.measure")
            if measure is None:
                break
            holder = _holder(client, name, alias)
            held = versions.get(holder, {}).get(f"{metric}.measure", measure)
            if held != measure:
                text = f"not compared with version {holder}, whose {metric} is of {held}"
                logger.warning("model %s, version %d: %s: %s", name, version, alias, text)
                client.set_model_version_tag(name, str(version), f"{alias}.note", text)
                break
            best = best_version(versions, metric, measure)
            if best == holder:
                break
            client.set_registered_model_alias(name, alias, str(best))


def _versions(client: Any, name: str) -> dict[int, Mapping[str, str]]:
    found: dict[int, Mapping[str, str]] = {}
    token: str | None = None
    while token != "":
        page: Sequence[Any] = client.search_model_versions(f"name = '{name}'", page_token=token)
        found |= {int(one.version): one.tags for one in page}
        token = getattr(page, "token", None) or ""
    return found


def _holder(client: Any, name: str, alias: str) -> int:
    """Return the version that has the alias; 0 if none has."""
    return int(client.get_registered_model(name).aliases.get(alias, 0))
