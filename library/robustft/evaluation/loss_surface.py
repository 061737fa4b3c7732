"""The loss around a model's weights, on a plane through them: for any model and any method.

H. Li, Z. Xu, G. Taylor, C. Studer, T. Goldstein, "Visualizing the loss landscape of neural nets",
2018, arXiv 1712.09913, section 4: two random directions, normalised filter by filter, so that the
sharpness of two networks can be compared although the scale of their weights differs. With an
attack at every point it is the adversarial surface of D. Wu, S.-T. Xia, Y. Wang, "Adversarial
weight perturbation helps robust generalization", 2020, arXiv 2004.05884, section 3.

Every row of the grid is an item of ``map``: a plain loop, or a task each on a cluster. Weights are
computed for each point and handed to the model for the call; the model's own are never written.
"""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustft.attacks import attack_mode, pgd
from robustft.attacks.losses import LossFunction, ce
from robustft.data.base import content_digest
from robustft.errors import ConfigError, DataError, ResourceError
from robustft.evaluation.mapping import Mapper, in_turn
from robustft.evaluation.shards import device_of
from robustft.models import state_digest
from robustft.threat import ThreatModel
from robustft.training.loaders import rows as image_rows
from robustft.training.precision import full_float32
from robustft.training.seeding import generator

__all__ = [
    "LOG_FLOOR",
    "RADII",
    "LossSurface",
    "directions",
    "load_surface",
    "loss_surface",
    "measure_rows",
    "split_batches",
]

Floats = NDArray[np.float64]
Batch = tuple[Tensor, Tensor]
Weights = dict[str, Tensor]

LOG_FLOOR = 1e-8
"""Nats: losses below it are drawn as this. The authors' code draws ln(L + 0.1), which hides every
difference between losses below 0.1."""
RADII = (0.05, 0.1, 0.25)
"""Radii of the scalars: shares of each filter's norm."""
WIDTH_MARGIN = 0.1
"""Nats above the centre's loss up to which a point belongs to the bowl."""
NORM_OFFSET = 1e-10
"""Of the authors' code: keeps the direction of a filter that is all zero finite."""
ON_THE_CIRCLE = 1 + 1e-9
"""Points on a circle are inside it, whatever the rounding of their coordinates."""
ARRAYS = ("x", "y", "loss", "accuracy")
UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)
"""What NumPy raises for files that are missing, damaged, of another kind, or hold pickles."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LossSurface:
    """Loss and accuracy at the weights ``theta + x d1 + y d2``.

    Args:
        x: float64 ``[columns]``, coordinates along d1, ascending, symmetric about an exact 0: how
            far each filter moves, in units of its own norm.
        y: float64 ``[rows]``, the same along d2.
        loss: float64 ``[rows, columns]``, mean over the examples; cross-entropy is in nats.
            ``inf`` where it is not finite.
        accuracy: float64 ``[rows, columns]``, share of right predictions, in [0, 1].
        metadata: what has been measured, as JSON holds it: seed, digests of model and data, loss,
            attack, number of examples, which tensors were moved.
    """

    x: Floats
    y: Floats
    loss: Floats
    accuracy: Floats
    metadata: Mapping[str, Any]

    @property
    def log_loss(self) -> Floats:
        """``ln(max(loss, LOG_FLOOR))``, ``[rows, columns]``."""
        return np.log(np.maximum(self.loss, LOG_FLOOR))

    @property
    def center(self) -> tuple[int, int]:
        """Row and column of the model itself."""
        return len(self.y) // 2, len(self.x) // 2

    @property
    def scalars(self) -> dict[str, float]:
        """The surface in a few numbers.

        "loss_center" and "accuracy_center"; "loss_mean_<r>" and "loss_max_<r>" over the points
        within each radius of RADII that the grid resolves and covers; "width", the share of grid
        points whose loss is less than WIDTH_MARGIN above the centre's; "finite", the share of
        finite losses.
        """
        center = float(self.loss[self.center])
        found = {"loss_center": center, "accuracy_center": float(self.accuracy[self.center])}
        distance = np.hypot(self.x[None, :], self.y[:, None])
        for radius in RADII:
            outermost, nearest = self.x[-1], np.diff(self.x).min()
            if nearest <= radius * ON_THE_CIRCLE and radius <= outermost * ON_THE_CIRCLE:
                inside = self.loss[distance <= radius * ON_THE_CIRCLE]
                found[f"loss_mean_{radius:g}"] = float(inside.mean())
                found[f"loss_max_{radius:g}"] = float(inside.max())
        found["width"] = float(np.mean(self.loss < center + WIDTH_MARGIN))
        found["finite"] = float(np.mean(np.isfinite(self.loss)))
        return found

    def save(self, path: str | Path) -> None:
        """Write a ``.npz`` file, whole or not at all; :func:`load_surface` reads it.

        Raises:
            ResourceError: the file cannot be written.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        text = np.frombuffer(json.dumps(dict(self.metadata)).encode(), dtype=np.uint8)
        arrays = {name: getattr(self, name) for name in ARRAYS}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, metadata=text, **arrays)
            os.replace(temporary, path)
        except OSError as error:
            raise ResourceError(
                f"cannot write {path} ({error.strerror}): make room or choose another folder"
            ) from error


def load_surface(path: str | Path) -> LossSurface:
    """Read what :meth:`LossSurface.save` wrote; nothing in the file is unpickled.

    Raises:
        DataError: the file is missing, damaged, or no loss surface.
    """
    try:
        # Opened here, since np.load leaves a damaged file open.
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as found:
            arrays = {name: np.asarray(found[name], dtype=np.float64) for name in ARRAYS}
            metadata = dict(json.loads(found["metadata"].tobytes().decode()))
            shape = (len(arrays["y"]), len(arrays["x"]))
    except UNREADABLE as error:
        raise DataError(
            f"{path} is no loss surface that can be read ({error}): measure it again"
        ) from error
    if not arrays["loss"].shape == arrays["accuracy"].shape == shape:
        raise DataError(f"the arrays of {path} do not fit each other: measure it again")
    return LossSurface(**arrays, metadata=metadata)


def directions(parameters: Mapping[str, Tensor], *, seed: int) -> tuple[Weights, Weights]:
    """Return two random directions, normalised filter by filter.

    The draw for a tensor depends on (seed, its name, its shape) alone, so that models of one
    architecture share it; its lengths are those of the model's own weights: a filter ``theta_j``,
    a slice along axis 0, gets a direction of norm ``||theta_j||`` (equation 1 of Li et al.).

    Args:
        parameters: name -> weights, as ``dict(model.named_parameters())`` has them. Buffers, such
            as the statistics of BatchNorm, do not belong in it: they are not moved.
        seed: of the draw.

    Returns:
        Two dicts of CPU tensors with the names, shapes and types of the parameters; zero for
        tensors of less than two dimensions (biases, the scales of normalisation layers).

    Note:
        Linear layers have one filter per output, embedding tables one per token. The paper
        perturbs biases and BatchNorm in its formulas; the authors' code sets them to zero by
        default ("ignore biasbn"), and so do we.
    """
    found: tuple[Weights, Weights] = ({}, {})
    for number, direction in enumerate(found):
        for name, parameter in parameters.items():
            weights = parameter.detach().cpu()
            if weights.dim() < 2:
                direction[name] = torch.zeros_like(weights)
                continue
            noise = generator(seed, "surface", number, name, *weights.shape)
            draw = torch.randn(weights.shape, generator=noise).to(weights.dtype)
            ratio = _filter_norms(weights) / (_filter_norms(draw) + NORM_OFFSET)
            direction[name] = draw * ratio.view(-1, *[1] * (weights.dim() - 1))
    return found


def loss_surface(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    loss: LossFunction = ce,
    grid: tuple[float, float, int] = (-0.25, 0.25, 25),
    num_examples: int = 512,
    seed: int = 0,
    attack: ThreatModel | None = None,
    attack_steps: int = 10,
    map: Mapper | None = None,
    device: str | None = None,
) -> LossSurface:
    """Measure the loss on a plane through the weights of ``model``.

    The model is in eval mode with float32 arithmetic meanwhile (no TF32) and left as it was, its
    weights bit for bit. The result does not depend on how ``map`` spreads the rows.

    Args:
        model: inputs -> logits ``[n, classes]``; its parameters are float32 or float64.
        data: batches (inputs ``[n, ...]``, labels ``[n]``): those of :func:`split_batches`, of a
            ``DataLoader``, or of a tokenised set. Read once, up to ``num_examples``, and kept.
        loss: ``(logits, labels) -> [n]``, a function of a module (its name stands for it where
            finished rows are looked up). Also what the attack maximises.
        grid: (-r, r, number of points, odd) of both axes, in units of each filter's norm; (0, 0),
            the model itself, is a point of the grid.
        num_examples: at most so many are used, the first ones.
        seed: of the directions and of the attack's noise. The same for models to be compared.
        attack: None for the plain loss; a threat model (Linf or L2) for that of images that PGD
            makes anew at every point of the grid, from the same random start.
        attack_steps: of that PGD.
        map: where the rows are computed; None is a loop in this process.
        device: where they are computed; None: where the model is.

    Raises:
        ConfigError: an argument cannot be used, or the model gives no logits of the labels.
        DataError: there are no examples, or one of them is not finite.

    Note:
        The authors' code moves the weights in place and writes them back after each point.
    """
    axis = _axis(grid)
    if attack_steps < 1 or num_examples < 1:
        raise ConfigError(
            f"attack_steps = {attack_steps} and num_examples = {num_examples} must be at least 1"
        )
    name = f"{loss.__module__}.{getattr(loss, '__qualname__', '<nameless>')}"
    if "<" in name:
        raise ConfigError(f"loss is {name}: give a function that a module defines by name")
    parameters = dict(model.named_parameters())
    _check_parameters(parameters)
    batches = _first(data, num_examples)
    _check_batches(batches, attack)
    moved = [key for key, tensor in parameters.items() if tensor.dim() > 1]
    embeddings = _embeddings(model)
    metadata: dict[str, Any] = {
        "seed": seed,
        "loss": name,
        "log": f"ln(max(loss, {LOG_FLOOR:g}))",
        "attack": None if attack is None else dataclasses.asdict(attack),
        "attack_steps": None if attack is None else attack_steps,
        "num_examples": sum(len(labels) for _, labels in batches),
        "batch_sizes": sorted({len(labels) for _, labels in batches}),
        "model": type(model).__qualname__,
        "model_digest": state_digest(model.state_dict()),
        "parameters_digest": _layout_digest(parameters),
        "data_digest": content_digest(*(part.numpy() for part in itertools.chain(*batches))),
        "moved_tensors": len(moved),
        "fixed_tensors": len(parameters) - len(moved),
        "one_filter_per_token": [key for key in moved if key in embeddings],
        "versions": {key: importlib.metadata.version(key) for key in ("robustft", "torch")},
    }
    shared = {
        "model": model,
        "directions": directions(parameters, seed=seed),
        "batches": batches,
        "loss": loss,
        "attack": attack,
        "attack_steps": attack_steps,
        "seed": seed,
        "device": device,
    }
    values = (map or in_turn)(
        measure_rows,
        [{"x": axis.tolist(), "y": [float(y)]} for y in axis],
        shared=shared,
        key=hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest(),
        name="loss surface",
    )
    found = {part: np.concatenate([value[part] for value in values]) for part in ARRAYS[2:]}
    return LossSurface(x=axis, y=axis.copy(), **found, metadata=metadata)


def split_batches(
    split: Sized,
    *,
    num_examples: int = 512,
    batch_size: int = 128,
    rows: Callable[..., tuple[Tensor, ...]] = image_rows,
) -> Iterator[Batch]:
    """Yield (inputs, labels) of a fixed sample of a split, on the CPU.

    Args:
        split: images; or whatever ``rows`` reads.
        num_examples: a sample of so many, in an order that depends on the split's length alone:
            files are often sorted by class, so that their first rows are no sample.
        batch_size: examples of a forward pass.
        rows: ``(split, positions, device=...) -> (inputs, labels, ...)``.

    Note:
        Li et al. take the first training examples of the file.
    """
    chosen = np.random.default_rng(0).permutation(len(split))[:num_examples]
    for first in range(0, len(chosen), batch_size):
        part = rows(split, chosen[first : first + batch_size], device=torch.device("cpu"))
        yield part[0], part[1]


def measure_rows(shared: Mapping[str, Any], item: Mapping[str, Any]) -> dict[str, Any]:
    """Measure some rows of the grid, wherever ``map`` wants.

    Args:
        shared: "model", "directions", "batches" (inputs, labels), "loss", "attack",
            "attack_steps", "seed" and "device" (None: where the model is).
        item: "x" and "y", the coordinates of the columns and of these rows.

    Returns:
        "loss" and "accuracy", float64 ``[rows, columns]``.
    """
    model: nn.Module = shared["model"]
    if shared["device"] is not None:
        model = model.to(shared["device"])
    device = device_of(model)
    first, second = (
        {name: tensor.to(device) for name, tensor in direction.items()}
        for direction in shared["directions"]
    )
    batches = [(inputs.to(device), labels.to(device)) for inputs, labels in shared["batches"]]
    found = np.empty((2, len(item["y"]), len(item["x"])))
    with attack_mode(model), full_float32():
        parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}
        points = itertools.product(enumerate(item["y"]), enumerate(item["x"]))
        for (row, y), (column, x) in points:
            weights = {
                name: tensor + x * first[name] + y * second[name] if tensor.dim() > 1 else tensor
                for name, tensor in parameters.items()
            }
            found[:, row, column] = _measure(model, weights, batches, shared)
    return {"loss": found[0], "accuracy": found[1]}


def _measure(
    model: nn.Module, weights: Weights, batches: Sequence[Batch], shared: Mapping[str, Any]
) -> tuple[float, float]:
    """Return mean loss, inf if it is not finite, and accuracy at ``weights``."""

    def forward(inputs: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(model, weights, (inputs,))
        return logits

    attack: ThreatModel | None = shared["attack"]
    total, right, count = 0.0, 0, 0
    for inputs, labels in batches:
        if attack is not None:
            inputs = pgd(
                forward,
                inputs,
                labels,
                norm=attack.norm,
                eps=attack.eps,
                num_steps=shared["attack_steps"],
                loss=shared["loss"],
                generator=torch.Generator().manual_seed(shared["seed"]),
                # By position, so that the start does not depend on how the examples are batched.
                sample_ids=torch.arange(count, count + len(labels), device=labels.device),
                report=False,
            ).inputs
        with torch.no_grad():
            logits = forward(inputs)
            if logits.dim() != 2 or len(logits) != len(labels):
                raise ConfigError(
                    f"the model must return logits [{len(labels)}, classes], got "
                    f"{list(logits.shape)}: wrap it so that it does"
                )
            # Summed where every build of torch has float64.
            losses = shared["loss"](logits, labels).cpu().double()
            right += int((logits.argmax(dim=1) == labels).sum())
        total += float(losses.sum())
        count += len(labels)
    mean = total / count
    return (mean if math.isfinite(mean) else math.inf), right / count


def _filter_norms(weights: Tensor) -> Tensor:
    """Return the L2 norm of every slice along axis 0."""
    norms: Tensor = torch.linalg.vector_norm(weights.flatten(1), dim=1)
    return norms


def _axis(grid: tuple[float, float, int]) -> Floats:
    low, high, points = grid
    if not (math.isfinite(high) and high > 0 and low == -high and points >= 3 and points % 2):
        raise ConfigError(
            f"grid = {grid} must be (-r, r, points) with r above 0 and an odd number of points, 3 "
            "or more: the model itself is the point in the middle"
        )
    half = points // 2
    # Symmetric, with an exact 0 and exact ends, which linspace does not promise.
    return high * (np.arange(-half, half + 1) / half)


def _check_parameters(parameters: Mapping[str, Tensor]) -> None:
    if not any(tensor.dim() > 1 for tensor in parameters.values()):
        raise ConfigError(
            "the model has no weights of two or more dimensions: nothing can be moved"
        )
    for name, tensor in parameters.items():
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"{name} is {tensor.dtype}, too coarse to be moved a little: use model.float()"
            )


def _first(data: Iterable[Batch], num_examples: int) -> list[Batch]:
    """Return the batches of the first examples, on the CPU, the last one cut to fit."""
    found: list[Batch] = []
    missing = num_examples
    for inputs, labels in data:
        found.append((inputs[:missing].detach().cpu(), labels[:missing].detach().cpu()))
        missing -= len(found[-1][1])
        if missing <= 0:
            break
    return found


def _check_batches(batches: Sequence[Batch], attack: ThreatModel | None) -> None:
    if sum(len(labels) for _, labels in batches) == 0:
        raise DataError("there are no examples to measure the loss on: choose another split")
    for inputs, labels in batches:
        if len(inputs) != len(labels):
            raise DataError(
                f"a batch has {len(inputs)} inputs and {len(labels)} labels: give one label each"
            )
        if attack is not None and not inputs.is_floating_point():
            raise ConfigError(
                f"inputs are {inputs.dtype}, and {attack} moves numbers in [0, 1]: leave out attack"
            )
        if not torch.isfinite(inputs).all():
            raise DataError("an input is not finite: clean the data first")


def _embeddings(model: nn.Module) -> set[str]:
    """Return the names of parameters that are tables with a row per token."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, kinds)}
    return {name for name, tensor in model.named_parameters() if id(tensor) in tables}


def _layout_digest(parameters: Mapping[str, Tensor]) -> str:
    """Name what the draw depends on beside the seed: models of one architecture have the same."""
    layout = sorted((name, list(tensor.shape)) for name, tensor in parameters.items())
    return hashlib.sha256(json.dumps(layout).encode()).hexdigest()
