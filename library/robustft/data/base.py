"""What a method sees of its data: splits of uint8 arrays, and the task made of them."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from robustft.errors import ConfigError, DataError, UnknownNameError
from robustft.threat import ThreatModel

__all__ = ["Selection", "Split", "Task"]

Selection = Literal["val", "test_half", "official"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Labelled images of one split, aligned by position.

    Args:
        images: uint8 ``[n, channels, height, width]``; may be memory-mapped and is never written.
        labels: int64 ``[n]`` class indices.
        ids: int64 ``[n]`` instance ids: stable positions in the original data set, unique over
            all splits of a data set. Everything per-instance (masks, statistics, attack noise) is
            joined by them.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    ids: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise DataError(
                f"images must be uint8 [n, channels, height, width], got {self.images.dtype} "
                f"{list(self.images.shape)}"
            )
        if not len(self.images) == len(self.labels) == len(self.ids):
            raise DataError(
                f"images, labels and ids differ in length: {len(self.images)}, "
                f"{len(self.labels)}, {len(self.ids)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: NDArray[np.int64]) -> "Split":
        """Return the rows at ``positions`` (copied), in that order."""
        return Split(self.images[positions], self.labels[positions], self.ids[positions])


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What is being made robust: data, splits, classes and threat models.

    ``splits`` always holds "train", "val" and "test". Everything that chooses anything looks at
    "val" only; what "val" is depends on ``selection``:

    * ``"val"``: held out of the training split; the sound default.
    * ``"test_half"``: half of the test split, for checkpoints that were trained on all of train.
    * ``"official"``: the test split itself, as the papers do; ``leaky`` is then true wherever the
      number is shown.

    Args:
        name: name of the data set.
        splits: "train" | "val" | "test" -> Split.
        class_names: one name per class.
        threat_models: one or several; several mean their union.
        mean, std: per-channel statistics of [0, 1] pixels for the normalising first layer.
        digest: SHA-256 over content and split membership.
        selection: see above.
    """

    name: str
    splits: Mapping[str, Split]
    class_names: tuple[str, ...]
    threat_models: tuple[ThreatModel, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    selection: Selection = "val"

    def __post_init__(self) -> None:
        check_threats(self.threat_models)
        for name in ("train", "val", "test"):
            if name not in self.splits:
                raise UnknownNameError("split", name, self.splits)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.splits["train"].images.shape[1:]
        return channels, height, width

    @property
    def threat(self) -> ThreatModel:
        """The first (often the only) threat model."""
        return self.threat_models[0]

    @property
    def leaky(self) -> bool:
        """True if the numbers reported on "test" come from examples that also chose the model."""
        return self.selection == "official"


def check_threats(threats: Sequence[ThreatModel]) -> None:
    """Raise ConfigError unless there is a threat model and no norm occurs twice."""
    if not threats:
        raise ConfigError("threat_models is empty: give at least one, e.g. Linf 8/255")
    if len({threat.norm for threat in threats}) < len(threats):
        raise ConfigError(
            f"threat_models = {', '.join(map(str, threats))}: of two radii of one norm the larger "
            "includes the smaller; keep that one"
        )


def content_digest(*arrays: NDArray[np.generic]) -> str:
    """Return the SHA-256 of the arrays' shapes, types and bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
