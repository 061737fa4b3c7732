"""RoseAdamW on parts of tensors: the step of the whole, cut up."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustft.errors import ConfigError
from robustft.training.rose_adamw import RoseAdamW
from robustft.training.rose_masks import MaskOptions

SHAPES = {
    "layer.0.weight": (4, 6),
    "layer.1.weight": (3, 3),
    "layer.2.weight": (5, 2),
    "layer.2.bias": (5,),
}
STEPS = 4


def grad(name: str, step: int) -> Tensor:
    index = list(SHAPES).index(name)
    draw = torch.Generator().manual_seed(10 * step + index)
    return (1 + index) * torch.randn(SHAPES[name], generator=draw)


def optimizer_of(parameters: dict[str, nn.Parameter], **more: Any) -> RoseAdamW:
    return RoseAdamW(
        parameters.items(), lr=0.1, variant="second", upper=50.0, eligible="matrices", **more
    )


def run(options: MaskOptions) -> tuple[dict[str, Tensor], list[Any], list[Tensor]]:
    """Return the weights after some steps, the masks, and every norm that was asked for."""
    torch.manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    optimizer = optimizer_of(parameters, options=options)
    asked: list[Tensor] = []

    def norms(tensors: Sequence[Tensor]) -> Tensor:
        asked.append(torch.stack([tensor.norm() for tensor in tensors]))
        return asked[-1]

    optimizer.hold_parts({}, norms)
    masks = []
    for step in range(STEPS):
        for name, parameter in parameters.items():
            parameter.grad = grad(name, step)
        optimizer.step()
        assert optimizer.record is not None
        masks.append(dict(optimizer.record.masks))
    return {name: value.detach() for name, value in parameters.items()}, masks, asked


@pytest.mark.parametrize("norm", ["frobenius", "rms"])
@pytest.mark.parametrize("end", [0, 2, 5])
def test_a_part_is_stepped_as_the_whole_is(norm: Any, end: int) -> None:
    """Of each tensor this worker has the first numbers, or none; norms come from all workers."""
    options = MaskOptions(norm=norm)
    whole, masks, asked = run(options)
    torch.manual_seed(0)
    starts = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    parts = {name: nn.Parameter(value.flatten()[:end].clone()) for name, value in starts.items()}
    optimizer = optimizer_of_parts(parts, options, asked)
    for step, expected in enumerate(masks):
        for name, part in parts.items():
            part.grad = grad(name, step).flatten()[:end]
        optimizer.step()
        assert optimizer.record is not None
        assert optimizer.record.masks == expected
    assert {value for mask in masks for value in mask.values()} == {0.0, 1.0}
    for name, part in parts.items():
        torch.testing.assert_close(part.detach(), whole[name].flatten()[:end])


def optimizer_of_parts(
    parts: dict[str, nn.Parameter], options: MaskOptions, asked: list[Tensor]
) -> RoseAdamW:
    answers = iter(asked)
    wholes = {name: torch.empty(shape, device="meta") for name, shape in SHAPES.items()}
    optimizer = RoseAdamW(
        [{"params": list(parts.items())[:3]}, {"params": list(parts.items())[3:], **PLAIN}],
        lr=0.1,
        variant="second",
        upper=50.0,
        eligible="official",
        options=options,
    )
    # An engine cuts the parameters up later, when they have been found eligible.
    optimizer.eligible = "matrices"
    optimizer.hold_parts(wholes, lambda tensors: next(answers))
    return optimizer


PLAIN = {"weight_decay": 0.0}


def test_the_plain_step_asks_for_the_same_norms() -> None:
    """``hold_parts`` with what the optimiser computes by itself changes nothing."""
    for norm in ("frobenius", "rms"):
        options = MaskOptions(norm=norm)  # type: ignore[arg-type]
        held, masks, _ = run(options)
        torch.manual_seed(0)
        parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
        optimizer = optimizer_of(parameters, options=options)
        for step in range(STEPS):
            for name, parameter in parameters.items():
                parameter.grad = grad(name, step)
            optimizer.step()
            assert optimizer.record is not None
            assert optimizer.record.masks == masks[step]
        for name, value in parameters.items():
            torch.testing.assert_close(value.detach(), held[name])


def test_units_that_are_split_are_refused() -> None:
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    optimizer = optimizer_of(parameters, options=MaskOptions(granularity="row"))
    with pytest.raises(ConfigError, match="choose 'tensor'"):
        optimizer.hold_parts({}, lambda tensors: torch.zeros(len(tensors)))
