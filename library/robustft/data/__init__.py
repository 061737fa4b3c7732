"""Data sets, splits, instance ids, and common corruptions."""

from robustft.data.base import Selection, Split, Task
from robustft.data.corrupted_sets import (
    available_corruptions,
    read_cifar_c,
    read_tiny_imagenet_c,
)
from robustft.data.corruptions import C15, CORRUPTIONS, RIFT18, SEVERITIES, corrupt, supported
from robustft.data.datasets import DATASETS, DatasetEntry, load_dataset
from robustft.data.task import TaskConfig, load_task

__all__ = [
    "C15",
    "CORRUPTIONS",
    "DATASETS",
    "RIFT18",
    "SEVERITIES",
    "DatasetEntry",
    "Selection",
    "Split",
    "Task",
    "TaskConfig",
    "available_corruptions",
    "corrupt",
    "load_dataset",
    "load_task",
    "read_cifar_c",
    "read_tiny_imagenet_c",
    "supported",
]
