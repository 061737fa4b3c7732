"""Models that enter and leave: our model directories, and weights that others trained.

What leaves a run is a directory with ``model.safetensors`` and ``card.json``. What enters is such a
directory, a safetensors file, a torch state dict, a RobustBench model or a feature extractor in a
released layout (``backbones`` beside this file); it must fit the architecture exactly, or nothing
is loaded.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from robustft.config import to_dict
from robustft.errors import CheckpointError, ConfigError, ResourceError
from robustft.models.backbones import require_plain, split_reference, translate
from robustft.models.start import Start
from robustft.models.weight_files import parse_weights, read_bytes, read_weights

__all__ = [
    "ROBUSTBENCH",
    "load_model_dir",
    "load_robustbench",
    "load_start",
    "require_finite",
    "save_model",
    "state_digest",
    "without_nan",
]

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
CARD = "card.json"
ARCHITECTURE_FIELDS = ("architecture", "num_classes", "image_shape", "mean", "std")
OWN_FIELDS = (*ARCHITECTURE_FIELDS, "source", "digest")

NETWORK = "network."
"""Prefix of the network's entries in the state dict of a normalised model."""

PREFIXES = ("module.", "_orig_mod.", "model.", "1.", NETWORK)
"""What DataParallel and DDP, ``torch.compile``, wrapper classes, ``Sequential(normalise, network)``
and robustft itself put in front of every name."""

NORMALIZER_MEANS = ("mean", "mu", "new_mean")
NORMALIZER_STDS = ("std", "sigma", "new_std")
DEAD_MODULE = "sub_block1"
NUM_NAMED = 3
"""How many keys of each kind an error message names; the others are counted."""

ROBUSTBENCH = "robustbench/"
ROBUSTBENCH_DATASETS = {10: "cifar10", 100: "cifar100", 1000: "imagenet"}


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of a state dict, in name order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_model(
    directory: str | Path, *, start: Start, state: Mapping[str, Tensor], card: Mapping[str, Any]
) -> dict[str, Any]:
    """Write ``model.safetensors`` and ``card.json``; each file appears whole or not at all.

    The weights come first. An interruption between the two leaves a card whose digest does not fit,
    which :func:`load_model_dir` reports.

    Args:
        directory: made if missing; files of an older model in it are replaced.
        start: what the model was made from; gives architecture and normalisation.
        state: state dict in the layout of ``start.build()``.
        card: method, threat model, data, config hash, commit, metrics: whatever JSON or a
            configuration can hold. Numbers that are not finite are written as null.

    Returns:
        The card as written; ``digest`` is the SHA-256 of the weight file.

    Raises:
        CheckpointError: ``state`` does not fit the architecture.
        ConfigError: ``card`` has a field that this function writes itself.
        ResourceError: the directory cannot be written.
    """
    directory = Path(directory)
    taken = sorted(set(card) & set(OWN_FIELDS))
    if taken:
        raise ConfigError(f"card fields {', '.join(taken)} are written by save_model: leave out")
    fitted = _checked(state, start.build().state_dict(), start, "the state to be saved")
    data = safetensors.torch.save(fitted)
    written = {
        **{name: to_dict(getattr(start, name)) for name in ARCHITECTURE_FIELDS},
        "source": start.source,
        "digest": hashlib.sha256(data).hexdigest(),
        **without_nan(to_dict(card)),
    }
    text = json.dumps(written, indent=2, allow_nan=False) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _replace(directory / WEIGHTS, data)
        _replace(directory / CARD, text.encode())
    except OSError as error:
        raise ResourceError(
            f"cannot write the model to {directory}: {error.strerror or error}; "
            "free space there or choose another folder"
        ) from error
    return written


def load_model_dir(path: str | Path) -> tuple[Start, dict[str, Any]]:
    """Read a directory that :func:`save_model` wrote.

    Returns:
        The model as a starting point, and its card.

    Raises:
        CheckpointError: a file is missing or damaged, the weights are not those of the card, or
            it is a text model's directory.
        UnknownNameError: this version has no architecture of that name.
    """
    path = Path(path)
    card = _read_card(path / CARD)
    data = read_bytes(path / WEIGHTS)
    if hashlib.sha256(data).hexdigest() != card["digest"]:
        raise CheckpointError(
            f"{path / WEIGHTS} is not the file that {CARD} describes (SHA-256 differs): "
            "it was changed or cut off; copy the whole directory again"
        )
    try:
        channels, height, width = (int(size) for size in card["image_shape"])
        start = Start(
            architecture=str(card["architecture"]),
            num_classes=int(card["num_classes"]),
            image_shape=(channels, height, width),
            mean=tuple(float(value) for value in card["mean"]),
            std=tuple(float(value) for value in card["std"]),
            source=f"model directory {path}",
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path / CARD} is damaged ({error}): copy it again") from error
    weights = parse_weights(data, path / WEIGHTS)
    state = _checked(weights, start.build().state_dict(), start, str(path))
    require_finite(state, str(path))
    return dataclasses.replace(start, state=state), card


def load_start(
    reference: str | Path,
    *,
    architecture: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> Start:
    """Load weights that must fit ``architecture`` exactly.

    Accepted are a model directory of :func:`save_model`; a safetensors file; a torch file with a
    state dict at top level or under "net", "state_dict", "model", "model_state_dict"; and
    "robustbench/<threat>/<id>" where that package is installed. The wrappers' prefixes are
    stripped, ``sub_block1.*`` (dead weights of released WRN checkpoints) is dropped.

    "<layout>:<file>" with a layout of ``backbones.LAYOUTS`` is a feature extractor as it was
    released; it gets a fresh head, but for a supervised one of as many classes.

    Normalisation: a file in the layout of a normalised robustft model, a model directory and a
    feature extractor that tells it bring their own ``mean`` and ``std``. Normaliser entries of any
    other file are ignored, with a warning where they differ from the arguments.

    Args:
        reference: see above.
        architecture: a key of MODELS or "torchvision/<name>".
        num_classes, image_shape: as in ``build_model``.
        mean, std: what the weights were trained with, per channel, in [0, 1] pixel units.

    Raises:
        CheckpointError: the weights cannot be read, are unsafe to read, or do not fit.
        UnknownNameError: no architecture, or no layout, has that name.
    """
    start = Start(
        architecture=architecture,
        num_classes=num_classes,
        image_shape=image_shape,
        mean=tuple(mean),
        std=tuple(std),
        source=str(reference),
    )
    if str(reference).startswith(ROBUSTBENCH):
        return _fit(start, load_robustbench(str(reference), num_classes).state_dict())
    layout, path = split_reference(reference)
    if layout is None and path.is_dir():
        loaded, _ = load_model_dir(path)
        for field in ("architecture", "num_classes", "image_shape"):
            has, wanted = getattr(loaded, field), getattr(start, field)
            if has != wanted:
                raise CheckpointError(
                    f"{path} has {field} {has}, but {wanted} was asked for: ask for {has}, or "
                    "start from another model"
                )
        return loaded
    weights = read_weights(path)
    if layout is None:
        require_plain(weights, path)
    return _fit(start, weights, layout)


def _fit(start: Start, weights: Mapping[str, Tensor], layout: str | None = None) -> Start:
    """Return ``start`` with foreign weights in the normalised layout."""
    fresh = start.build().state_dict()
    network = {
        name.removeprefix(NETWORK): value
        for name, value in fresh.items()
        if name.startswith(NETWORK)
    }
    if layout is None:
        entries, normalizer = _without_normalizer(weights, network)
        entries, prefixes = _without_prefixes(entries, network)
        trusted, fresh_head = NETWORK in prefixes, False
    else:
        backbone = translate(weights, network, layout=layout, reference=start.source)
        entries, normalizer = backbone.entries, backbone.normalizer
        trusted, fresh_head = True, backbone.fresh_head
    dead = [name for name in entries if DEAD_MODULE in name and name not in network]
    if dead:
        logger.info("%s: dropped %d unused entries (%s)", start.source, len(dead), DEAD_MODULE)
    entries = {name: value for name, value in entries.items() if name not in dead}
    for name, value in network.items():
        if name.endswith("num_batches_tracked") and name not in entries:
            # Files from before torch 0.4.1 lack the counters, which no output depends on.
            entries[name] = value
    fitted = _checked(entries, network, start, start.source)
    require_finite(fitted, start.source)
    mean, std = _normalization(start, normalizer, trusted=trusted)
    state = {
        "mean": torch.tensor(mean).view_as(fresh["mean"]),
        "std": torch.tensor(std).view_as(fresh["std"]),
        **{NETWORK + name: value for name, value in fitted.items()},
    }
    return dataclasses.replace(start, state=state, mean=mean, std=std, fresh_head=fresh_head)


def _without_normalizer(
    weights: Mapping[str, Tensor], network: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split off the entries of a normalising layer: "mean" and "std", whatever stands before."""
    entries, normalizer = {}, {}
    for name, value in weights.items():
        last = name.rpartition(".")[2]
        if name in network or last not in NORMALIZER_MEANS + NORMALIZER_STDS:
            entries[name] = value
        else:
            normalizer["mean" if last in NORMALIZER_MEANS else "std"] = value
    return entries, normalizer


def _without_prefixes(
    entries: Mapping[str, Tensor], network: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Strip each prefix that *all* names have, until a name is the network's own."""
    found: list[str] = []
    stripped = dict(entries)
    while stripped and not network.keys() & stripped.keys():
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in stripped)), None)
        if prefix is None:
            break
        found.append(prefix)
        stripped = {name.removeprefix(prefix): value for name, value in stripped.items()}
    return stripped, found


def _normalization(
    start: Start, normalizer: Mapping[str, Tensor], *, trusted: bool
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Choose between the normalisation asked for and the one that the file carries."""
    channels = start.image_shape[0]
    if not all(k in normalizer and normalizer[k].numel() == channels for k in ("mean", "std")):
        return start.mean, start.std
    mean = tuple(normalizer["mean"].double().flatten().tolist())
    std = tuple(normalizer["std"].double().flatten().tolist())
    pairs = zip(mean + std, start.mean + start.std, strict=True)
    if all(math.isclose(has, asked, rel_tol=1e-6, abs_tol=1e-6) for has, asked in pairs):
        return start.mean, start.std
    if trusted:
        logger.info("%s: its own mean %s and std %s are used", start.source, mean, std)
        return mean, std
    logger.warning(
        "%s carries a normalisation with mean %s and std %s, which is ignored: the model is given "
        "mean %s and std %s; if its accuracy is low, pass the file's",
        *(start.source, mean, std, start.mean, start.std),
    )
    return start.mean, start.std


def _checked(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Start, origin: str
) -> dict[str, Tensor]:
    """Return ``weights`` in the order, types and contiguous layout of ``expected``.

    Raises:
        CheckpointError: keys are missing or unexpected, or shapes differ.
    """
    reshaped = [
        f"{name} {list(weights[name].shape)} instead of {list(expected[name].shape)}"
        for name in expected
        if name in weights and weights[name].shape != expected[name].shape
    ]
    complaints = [
        _listed(kind, names)
        for kind, names in (
            ("missing", [name for name in expected if name not in weights]),
            ("unexpected", [name for name in weights if name not in expected]),
            ("of another shape", reshaped),
        )
        if names
    ]
    if complaints:
        size = "x".join(map(str, start.image_shape))
        raise CheckpointError(
            f"{origin} does not fit {start.architecture} with {start.num_classes} classes and "
            f"{size} images: {'; '.join(complaints)}; choose the architecture, classes and image "
            "size that the weights were trained with"
        )
    return {
        # A copy of its own for each: safetensors refuses tensors that share memory.
        name: weights[name].detach().to("cpu", value.dtype, copy=True).contiguous()
        for name, value in expected.items()
    }


def _listed(kind: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return f"{len(names)} {kind} ({', '.join(names[:NUM_NAMED])}{more})"


def require_finite(state: Mapping[str, Tensor], origin: str) -> None:
    """Refuse weights that are NaN or infinite.

    Args:
        state: the weights.
        origin: where they come from, for the message.

    Raises:
        CheckpointError: there are such tensors; names the first few.
    """
    broken = [name for name, value in state.items() if not bool(value.isfinite().all())]
    if broken:
        raise CheckpointError(
            f"{origin} holds weights that are NaN or infinite: {_listed('tensors', broken)}; "
            "use a checkpoint from before the training diverged"
        )


def load_robustbench(reference: str, num_classes: int) -> nn.Module:
    """Return a RobustBench model as that package builds it: pixels in [0, 1] -> logits.

    Args:
        reference: "robustbench/<threat>/<id>"; the package downloads the weights if need be.
        num_classes: 10, 100 or 1000, which tell the data set.

    Raises:
        CheckpointError: the package is not installed, or does not give the model.
    """
    try:
        _, threat, name = reference.split("/")
    except ValueError:
        raise CheckpointError(
            f"{reference!r} is no RobustBench reference: write robustbench/<threat>/<id>, for "
            "example robustbench/Linf/Engstrom2019Robustness"
        ) from None
    dataset = ROBUSTBENCH_DATASETS.get(num_classes)
    if dataset is None:
        raise CheckpointError(
            f"RobustBench has models for {sorted(ROBUSTBENCH_DATASETS)} classes, not {num_classes}"
        )
    try:
        from robustbench.utils import load_model  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise CheckpointError(
            f"{reference} needs the package robustbench, which is not installed: install it, or "
            "give the model's weights as a file"
        ) from error
    try:
        model: nn.Module = load_model(model_name=name, dataset=dataset, threat_model=threat)
    except Exception as error:
        # Names, downloads and files: the package raises whatever its parts raise.
        raise CheckpointError(
            f"RobustBench could not load {name} for {dataset} and {threat} ({error}): check the "
            "name and the network, or give the model's weights as a file"
        ) from error
    return model


def _read_card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}; a model directory holds {WEIGHTS} "
            f"and {CARD}"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): copy it again") from error
    missing = [name for name in OWN_FIELDS if not isinstance(card, dict) or name not in card]
    if missing and isinstance(card, dict) and "model" in card:
        raise CheckpointError(
            f"{path} describes a text model ({card['model']}), and an image model is wanted: give "
            "text data with it (--data rotten_tomatoes), or another folder"
        )
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}: it was not written by robustft; give the weight "
            "file itself and name its architecture"
        )
    return dict(card)


def without_nan(value: Any) -> Any:
    """Return ``value`` with null in place of numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, data: bytes) -> None:
    """Write ``path`` so that it holds its old content or all of ``data`` at any time."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
