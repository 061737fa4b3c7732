"""A tiny task that can be learnt in seconds, and starting models for it."""

import numpy as np
import pytest

from robustft.data.base import Split, Task
from robustft.models import Start
from robustft.threat import ThreatModel

SIZE = 12
CLASSES = 3


def make_split(count: int, first_id: int) -> Split:
    """Stripes whose orientation and brightness depend on the class, in noise."""
    draw = np.random.default_rng(first_id)
    labels = np.arange(count) % CLASSES
    images = draw.integers(0, 110, (count, 1, SIZE, SIZE))
    images[labels == 1, :, ::3, :] += 120
    images[labels == 2, :, :, ::3] += 120
    return Split(
        images.astype(np.uint8),
        labels.astype(np.int64),
        np.arange(first_id, first_id + count, dtype=np.int64),
    )


@pytest.fixture(scope="session")
def task() -> Task:
    return Task(
        name="stripes",
        splits={"train": make_split(50, 0), "val": make_split(21, 100), "test": make_split(9, 200)},
        class_names=("none", "rows", "columns"),
        threat_models=(ThreatModel("Linf", 0.05),),
        mean=(0.3,),
        std=(0.2,),
        digest="stripes",
    )


@pytest.fixture(scope="session")
def fresh(task: Task) -> Start:
    """A network without BatchNorm would miss half of what is tested: this one has ten."""
    return Start(
        architecture="small_resnet",
        num_classes=CLASSES,
        image_shape=task.image_shape,
        mean=task.mean,
        std=task.std,
    )
