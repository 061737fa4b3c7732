"""Robust instances, first step, for text: measure every sentence with perturbed word embeddings.

Method: "Characterizing the Impacts of Instances on Robustness" (Findings of ACL 2023,
2023.findings-acl.146), authors' code ``ruizheng20/robust_data``. The ascent, what is stored and
what it costs are those of :mod:`robustft.methods.instance_collector`: in eval mode, with gradients
to the embeddings only and K + 1 forwards and K backwards for K updates. What is perturbed is the
output of the table of word embeddings, before positions and types are added; padding, positions
and token types are the same in both passes.

Note:
    The authors' code leaves the token types out of the perturbed pass, so that for pairs of texts
    its differences contain the effect of deleting them even where nothing is perturbed.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from robustft.data.base import Split
from robustft.data.text import TextSplit
from robustft.errors import ConfigError
from robustft.methods.instance_collector import (
    Collected,
    MakeSurface,
    Surface,
    Target,
    collect_batches,
    embedding_surface,
    shard_positions,
)
from robustft.methods.instance_perturbations import (
    IDENTITY,
    EmbeddingPerturbation,
    Perturbation,
)
from robustft.models.text import TextModel
from robustft.training.text_loader import text_rows

__all__ = ["collect_text", "text_surface", "word_surface"]


def word_surface(model: TextModel, inputs: Tensor) -> Surface:
    """Return a batch of texts as a surface: the one place where a text model is called.

    Args:
        model: the bare model.
        inputs: int64 ``[n, 2, length]``: token ids, token types.
    """
    with torch.no_grad():
        base = model.embed(inputs)
    free = (inputs[:, 0] != model.pad_id).unsqueeze(2)
    return embedding_surface(base, lambda point: model.from_embeddings(point, inputs), free=free)


def text_surface(perturbation: Perturbation) -> MakeSurface:
    """Return how a perturbation sees texts.

    Raises:
        ConfigError: it is not one of word embeddings.
    """
    if not isinstance(perturbation, EmbeddingPerturbation) and perturbation != IDENTITY:
        raise ConfigError(
            f"text is perturbed in its word embeddings: name an EmbeddingPerturbation or "
            f"{IDENTITY!r}, not {perturbation!r}"
        )
    return word_surface


def collect_text(
    model: TextModel,
    split: TextSplit,
    *,
    perturbations: Sequence[Perturbation],
    record: int = 0,
    batch_size: int = 256,
    target: Target = "gold",
    seed: int = 0,
    device: torch.device | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Collected:
    """Measure one worker's share of a split of texts.

    Args:
        model: the bare model; left as it was.
        split: the texts; batches are made of texts of similar lengths.
        perturbations: what is done to them; codes in the result are positions in this sequence.
        record: number of the record; only random starts depend on it.
        batch_size: texts at a time; changes the result by rounding at most.
        target: "gold" labels, or the clean "pred"iction, which losses are measured against.
        seed: of random starts.
        device: where the model is; None: the CPU.
        rank, world_size: which share; each has the same number of passes.

    Raises:
        ConfigError: a perturbation is not one of embeddings, or the split is empty.
    """
    device = device or torch.device("cpu")
    # It reads the ids, which a split of text has as well.
    positions, count = shard_positions(cast(Split, split), rank=rank, world_size=world_size)
    # What keeps ranks in step stays behind the rows that count.
    by_length = np.argsort(split.lengths[positions[:count]], kind="stable")
    positions = np.concatenate([positions[:count][by_length], positions[count:]])

    def batches() -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        for first in range(0, len(positions), batch_size):
            chosen = positions[first : first + batch_size]
            yield text_rows(split, chosen, device=device, pad_id=model.pad_id)

    return collect_batches(
        model,
        batches(),
        count=count,
        perturbations=perturbations,
        surface_of=text_surface,
        record=record,
        target=target,
        seed=seed,
    )
