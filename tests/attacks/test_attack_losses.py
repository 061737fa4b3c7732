"""The attacked losses: worked values, invariances, few classes."""

import logging

import pytest
import torch

from robustft.attacks.losses import (
    LOSSES,
    TARGETED_LOSSES,
    TargetedLoss,
    _log_fallback,
    ce,
    ce_targeted,
    dlr,
    dlr_targeted,
    logit_gap,
    margin,
    resolve_loss,
)
from robustft.errors import UnknownNameError

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0], [1.0, 2.0, 0.5, -1.0, 0.0]])
LABELS = torch.tensor([0, 0])
TARGETS = torch.tensor([1, 1])


def test_worked_values() -> None:
    torch.testing.assert_close(
        ce(LOGITS, LABELS), torch.tensor([0.5744, 1.5744]), atol=5e-5, rtol=0
    )
    torch.testing.assert_close(margin(LOGITS, LABELS), torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(dlr(LOGITS, LABELS), torch.tensor([-2 / 3, 2 / 3]))


def test_worked_values_of_targeted_losses() -> None:
    torch.testing.assert_close(
        dlr_targeted(LOGITS, LABELS, TARGETS), torch.tensor([-0.57143, 0.57143]), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(logit_gap(LOGITS, LABELS, TARGETS), torch.tensor([-1.0, 1.0]))
    # -CE of class 1: minus (logsumexp - z_1), with logsumexp = 2.5744 in both rows.
    torch.testing.assert_close(
        ce_targeted(LOGITS, LABELS, TARGETS), torch.tensor([-1.5744, -0.5744]), atol=5e-5, rtol=0
    )


def test_targeted_losses_depend_on_the_target() -> None:
    far = torch.tensor([3, 4])
    torch.testing.assert_close(logit_gap(LOGITS, LABELS, far), torch.tensor([-3.0, -1.0]))
    # The denominator is the same for every target: 2 - (0.5 + 0) / 2.
    torch.testing.assert_close(dlr_targeted(LOGITS, LABELS, far), torch.tensor([-3.0, -1.0]) / 1.75)
    # A target that is the label itself has no gap, and no gradient.
    assert dlr_targeted(LOGITS, LABELS, LABELS).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("loss", [logit_gap, dlr_targeted, ce_targeted])
def test_targeted_losses_are_highest_where_the_target_wins(loss: TargetedLoss) -> None:
    logits = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(300) % 6
    targets = (labels + 1 + torch.arange(300) % 5) % 6
    values, top = loss(logits, labels, targets), logits.argmax(1)
    if loss is ce_targeted:
        # Above -log 2 means p(target) > 1/2, which only the predicted class has.
        assert (top == targets)[values > -torch.log(torch.tensor(2.0))].all()
        assert (values[top != targets] < 0).all()
    else:
        assert (values[top == targets] > 0).all()
        assert (values[top == labels] < 0).all()
    raised = logits.scatter_add(1, targets[:, None], torch.full((300, 1), 30.0))
    assert (loss(raised, labels, targets) > values)[top == labels].all()


def test_targeted_dlr_ignores_scale_and_shift() -> None:
    torch.testing.assert_close(
        dlr_targeted(40 * LOGITS - 7, LABELS, TARGETS), dlr_targeted(LOGITS, LABELS, TARGETS)
    )


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


def test_targeted_dlr_of_three_classes_is_the_logit_gap_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _log_fallback.cache_clear()
    logits, labels = torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([0])
    with caplog.at_level(logging.WARNING, logger="robustft.attacks.losses"):
        for _ in range(3):
            assert dlr_targeted(logits, labels, torch.tensor([2])).tolist() == [-1.0]
    assert [record.getMessage() for record in caplog.records] == [
        "the targeted DLR loss needs at least 4 classes and the model has 3: the logit gap to the "
        "target is used instead"
    ]


@pytest.mark.parametrize("num_classes", [3, 4])
def test_dlr_with_as_few_classes_as_it_can_have(num_classes: int) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]])[:, :num_classes]
    torch.testing.assert_close(dlr(logits, torch.tensor([0])), torch.tensor([-1 / 1.5]))
    if num_classes == 4:
        value = dlr_targeted(logits, torch.tensor([0]), torch.tensor([1]))
        torch.testing.assert_close(value, torch.tensor([-1 / (2 - (0.5 - 1) / 2)]))


def test_constant_logits_are_finite() -> None:
    for loss in LOSSES.values():
        assert loss(torch.zeros(2, 4), torch.tensor([0, 3])).isfinite().all()
    for targeted in TARGETED_LOSSES.values():
        assert (
            targeted(torch.zeros(2, 4), torch.tensor([0, 3]), torch.tensor([1, 1])).isfinite().all()
        )


def test_unknown_loss_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'dlr'"):
        resolve_loss("drl")
    assert resolve_loss(margin) is margin
