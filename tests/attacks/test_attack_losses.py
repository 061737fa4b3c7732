"""The attacked losses: worked values, invariances, few classes."""

import logging

import pytest
import torch

from robustft.attacks.losses import LOSSES, _log_fallback, ce, dlr, margin, resolve_loss
from robustft.errors import UnknownNameError

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0], [1.0, 2.0, 0.5, -1.0, 0.0]])
LABELS = torch.tensor([0, 0])


def test_worked_values() -> None:
    torch.testing.assert_close(
        ce(LOGITS, LABELS), torch.tensor([0.5744, 1.5744]), atol=5e-5, rtol=0
    )
    torch.testing.assert_close(margin(LOGITS, LABELS), torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(dlr(LOGITS, LABELS), torch.tensor([-2 / 3, 2 / 3]))


def test_dlr_ignores_scale_and_shift() -> None:
    torch.testing.assert_close(dlr(40 * LOGITS - 7, LABELS), dlr(LOGITS, LABELS))


@pytest.mark.parametrize("loss", LOSSES.values())
def test_losses_are_positive_exactly_where_misclassified(loss: object) -> None:
    logits = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % 6
    wrong = logits.argmax(1) != labels
    threshold = torch.log(torch.tensor(2.0)) if loss is ce else 0.0
    # CE above log 2 means p(label) < 1/2, which is only implied by a mistake.
    assert (loss(logits, labels)[wrong] > threshold).all()
    if loss is not ce:
        assert (loss(logits, labels)[~wrong] <= 0).all()


def test_dlr_of_two_classes_is_the_margin_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _log_fallback.cache_clear()
    logits, labels = torch.tensor([[1.0, 3.0], [2.0, -1.0]]), torch.tensor([0, 0])
    with caplog.at_level(logging.WARNING, logger="robustft.attacks.losses"):
        for _ in range(3):
            torch.testing.assert_close(dlr(logits, labels), torch.tensor([2.0, -3.0]))
    assert [record.getMessage() for record in caplog.records] == [
        "the DLR loss needs at least 3 classes and the model has 2: the margin is used instead"
    ]


def test_constant_logits_are_finite() -> None:
    for loss in LOSSES.values():
        assert loss(torch.zeros(2, 4), torch.tensor([0, 3])).isfinite().all()


def test_unknown_loss_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'dlr'"):
        resolve_loss("drl")
    assert resolve_loss(margin) is margin
