"""Losses that attacks maximise: per sample, from logits, ``[n, classes]`` -> ``[n]``.

CE, the margin, and the difference of logits ratio (DLR) of F. Croce and M. Hein, "Reliable
evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks", 2020,
arXiv 2003.01690.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from robustft.errors import UnknownNameError

__all__ = [
    "LOSSES",
    "TARGETED_LOSSES",
    "LossFunction",
    "TargetedLoss",
    "ce",
    "ce_targeted",
    "dlr",
    "dlr_targeted",
    "logit_gap",
    "margin",
    "resolve_loss",
]

logger = logging.getLogger(__name__)

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""``loss(logits [n, classes], labels [n]) -> [n]``; larger means closer to a wrong prediction."""

TargetedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``loss(logits [n, classes], labels [n], targets [n]) -> [n]``; larger: closer to the target."""

DLR_MIN_CLASSES = 3  # the denominator needs the third largest logit
DLR_TARGETED_MIN_CLASSES = 4  # and the targeted one the fourth
DLR_OFFSET = 1e-12  # of the official code: keeps the denominator away from zero


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats, ``logsumexp(z) - z_y``."""
    return functional.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the label's; > 0 means misclassified, 0 is a tie."""
    rows = labels.unsqueeze(1)
    others = logits.scatter(1, rows, float("-inf")).max(dim=1).values
    return others - logits.gather(1, rows).squeeze(1)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Margin divided by the distance of the largest from the third largest logit.

    It does not change when the logits are scaled or shifted, so that a model cannot hide its
    gradients behind large logits.

    Note:
        With two classes there is no third logit; the official code then fails with an index
        error. Here the margin takes its place, and the log says so once.
    """
    if logits.shape[1] < DLR_MIN_CLASSES:
        _log_fallback("DLR loss", DLR_MIN_CLASSES, logits.shape[1], "margin")
        return margin(logits, labels)
    top, classes = logits.topk(DLR_MIN_CLASSES, dim=1)
    other = top[:, 1].where(classes[:, 0] == labels, top[:, 0])
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    return -(own - other) / (top[:, 0] - top[:, 2] + DLR_OFFSET)


def logit_gap(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Target's logit minus the label's; > 0 means misclassified."""
    pair = logits.gather(1, torch.stack([targets, labels], dim=1))
    return pair[:, 0] - pair[:, 1]


def ce_targeted(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Minus the cross-entropy to the target, in nats."""
    return -ce(logits, targets)


def dlr_targeted(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Logit gap to the target divided by the distance of the largest logit from the mean of the
    third and fourth.

    Note:
        With fewer than four classes there is no fourth logit and the official code fails; here
        the logit gap itself takes its place, and the log says so once.
    """
    gap = logit_gap(logits, labels, targets)
    if logits.shape[1] < DLR_TARGETED_MIN_CLASSES:
        _log_fallback(
            "targeted DLR loss",
            DLR_TARGETED_MIN_CLASSES,
            logits.shape[1],
            "logit gap to the target",
        )
        return gap
    top = logits.topk(DLR_TARGETED_MIN_CLASSES, dim=1).values
    return gap / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + DLR_OFFSET)


LOSSES: dict[str, LossFunction] = {"ce": ce, "dlr": dlr, "margin": margin}
TARGETED_LOSSES: dict[str, TargetedLoss] = {
    "ce-targeted": ce_targeted,
    "dlr-targeted": dlr_targeted,
}


def resolve_loss(loss: str | LossFunction) -> LossFunction:
    """Return the loss called ``loss``; a function is returned as it is.

    Raises:
        UnknownNameError: no loss has that name.
    """
    if not isinstance(loss, str):
        return loss
    if loss not in LOSSES:
        raise UnknownNameError("attack loss", loss, LOSSES)
    return LOSSES[loss]


@functools.cache
def _log_fallback(loss: str, needed: int, num_classes: int, instead: str) -> None:
    logger.warning(
        "the %s needs at least %d classes and the model has %d: the %s is used instead",
        loss,
        needed,
        num_classes,
        instead,
    )
