"""What holds for every attack."""

import typing
from collections.abc import Callable

import pytest
import torch
from attack_toys import Counter, convolutional
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from robustft.attacks import ATTACKS, AttackName, AttackResult, zero_gradient
from robustft.errors import ConfigError, UnknownNameError

RADII = {"Linf": 0.03, "L2": 0.2}
ORDERS = {"Linf": float("inf"), "L2": 2}

Attack = Callable[..., AttackResult]


def attack_named(name: str, **fixed: object) -> Attack:
    """An attack with settings small enough for a test."""
    steps = {"fgsm": {}, "pgd": {"num_steps": 5}, "apgd": {"num_steps": 8}}[name]

    def attack(*arguments: object, **options: object) -> AttackResult:
        return ATTACKS[name](*arguments, **{**steps, **fixed, **options})

    return attack


CASES = [
    pytest.param(attack_named(name, **options), id="-".join([name, *options]))
    for name, options in [
        ("fgsm", {}),
        ("fgsm", {"random_start": True}),
        ("pgd", {}),
        ("pgd", {"num_restarts": 3}),
        ("apgd", {}),
        ("apgd", {"num_restarts": 3}),
        ("apgd", {"check_clean": True}),
    ]
]
every_attack = pytest.mark.parametrize("attack", CASES)
both_norms = pytest.mark.parametrize("norm", ["Linf", "L2"])


def correct(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs).argmax(1) == labels


def test_names() -> None:
    assert set(typing.get_args(AttackName)) == set(ATTACKS)


@every_attack
@both_norms
@pytest.mark.parametrize("loss", ["ce", "dlr", "margin"])
def test_result_is_feasible_and_says_the_truth(
    attack: Attack, norm: str, loss: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    untouched = inputs.clone()
    result = attack(model, inputs, labels, norm=norm, eps=RADII[norm], loss=loss)
    assert torch.equal(inputs, untouched)
    assert (result.inputs.shape, result.inputs.dtype) == (inputs.shape, inputs.dtype)
    assert not result.inputs.requires_grad
    assert not result.loss.requires_grad
    distance = torch.linalg.vector_norm((result.inputs - inputs).flatten(1), ORDERS[norm], dim=1)
    assert (distance <= RADII[norm] * (1 + 1e-5) + 1e-6).all()
    assert result.inputs.min() >= 0
    assert result.inputs.max() <= 1
    assert result.robust.dtype == torch.bool
    assert torch.equal(result.robust, correct(model, result.inputs, labels))
    assert (result.robust <= correct(model, inputs, labels)).all()
    assert 0 < result.robust.sum() < correct(model, inputs, labels).sum()


@every_attack
@both_norms
@pytest.mark.parametrize("eps", [0, 0.0, "0"])
def test_radius_zero_returns_the_input(
    attack: Attack, norm: str, eps: float | str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    result = attack(model, inputs, labels, norm=norm, eps=eps)
    assert torch.equal(result.inputs, inputs)
    assert torch.equal(result.robust, correct(model, inputs, labels))


@every_attack
@both_norms
def test_a_sample_does_not_depend_on_its_batch(attack: Attack, norm: str) -> None:
    """In float64, where rounding that differs between batch sizes stays far below 1e-10."""
    model = convolutional().double()
    inputs = torch.rand(9, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = model(inputs).argmax(1)
    ids = torch.tensor([3, 10**12, 17, 0, 4, 5, 99, 2, 1])
    options = {"norm": norm, "eps": RADII[norm]}
    whole = attack(model, inputs, labels, sample_ids=ids, **options)
    order = torch.tensor([8, 2, 5, 0, 1, 7, 3, 6, 4])
    parts = [
        attack(model, inputs[rows], labels[rows], sample_ids=ids[rows], **options)
        for rows in (order[:2], order[2:3], order[3:])
    ]
    back = order.argsort()
    assert torch.equal(torch.cat([part.robust for part in parts])[back], whole.robust)
    for field in ("inputs", "loss"):
        joined = torch.cat([getattr(part, field) for part in parts])[back]
        torch.testing.assert_close(joined, getattr(whole, field), atol=1e-10, rtol=0)


@every_attack
def test_generator_is_the_run_seed(
    attack: Attack, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    options = {"norm": "Linf", "eps": 0.03}

    def drawn(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        result = attack(model, inputs, labels, generator=generator, **options).inputs
        twin = torch.Generator().manual_seed(seed)
        torch.randint(2**63 - 1, (), generator=twin)
        assert torch.equal(generator.get_state(), twin.get_state())
        return result

    assert torch.equal(drawn(1), drawn(1))
    default = attack(model, inputs, labels, **options).inputs
    assert torch.equal(attack(model, inputs, labels, **options).inputs, default)


@every_attack
def test_model_and_global_state_stay(attack: Attack, inputs: Tensor, labels: Tensor) -> None:
    model = convolutional()
    model.train()
    model[1].eval()
    model[3].weight.requires_grad_(False)
    model[0].weight.grad = torch.full_like(model[0].weight, 3.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    with torch.no_grad():
        attack(model, inputs, labels, norm="Linf", eps=0.03)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert (model[0].weight.grad == 3).all()
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@every_attack
def test_flags_come_back_when_the_model_raises(
    attack: Attack, inputs: Tensor, labels: Tensor
) -> None:
    class Breaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, inputs: Tensor) -> Tensor:
            raise FloatingPointError("broken layer")

    model = Breaking()
    with pytest.raises(FloatingPointError, match="broken layer"):
        attack(model, inputs, labels, norm="Linf", eps=0.03)
    assert model.training
    assert model.scale.requires_grad
    assert torch.is_grad_enabled()


@every_attack
def test_inference_mode_gives_the_same(
    attack: Attack, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    expected = attack(model, inputs, labels, norm="L2", eps=0.4)
    with torch.inference_mode():
        result = attack(model, inputs + 0, labels + 0, norm="L2", eps=0.4)
    assert torch.equal(result.inputs, expected.inputs)


@every_attack
@both_norms
def test_empty_and_single_batches(
    attack: Attack, norm: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    empty = attack(model, inputs[:0], labels[:0], norm=norm, eps=0.03)
    assert empty.inputs.shape == (0, 2, 8, 8)
    assert empty.robust.shape == empty.loss.shape == (0,)
    single = attack(model, inputs[:1], labels[:1], norm=norm, eps=0.03)
    assert single.robust.shape == (1,)
    assert not attack(model, inputs, (labels + 1) % 10, norm=norm, eps=1e-6).robust.any()


@every_attack
@pytest.mark.parametrize("num_classes", [2, 3, 4])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_few_classes(attack: Attack, num_classes: int, loss: str, inputs: Tensor) -> None:
    model = convolutional(num_classes)
    labels = model(inputs).argmax(1)
    result = attack(model, inputs, labels, norm="Linf", eps=0.05, loss=loss)
    assert torch.equal(result.robust, correct(model, result.inputs, labels))
    assert result.robust.sum() < len(labels)


@every_attack
@both_norms
def test_models_without_gradient_keep_their_clean_mask(
    attack: Attack, norm: str, inputs: Tensor
) -> None:
    def disconnected(inputs: Tensor) -> Tensor:
        return torch.eye(3)[:1].expand(len(inputs), 3)

    def flat(inputs: Tensor) -> Tensor:
        return disconnected(inputs) + 0 * inputs.sum()

    labels = torch.arange(24) % 3
    for model in (disconnected, flat):
        result = attack(model, inputs, labels, norm=norm, eps=0.1, loss="dlr")
        assert torch.equal(result.robust, labels == 0)
        assert torch.equal(zero_gradient(model, inputs, labels), labels == 0)


def test_zero_gradient_is_silent_on_a_healthy_model(
    model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    assert not zero_gradient(model, inputs, labels).any()


@pytest.mark.parametrize("name", ATTACKS)
def test_no_host_sync_in_the_loop(
    name: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    """Operations that must read a tensor's value: their number does not grow with the steps."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore
            words = ("local_scalar", "nonzero", "equal.default", "masked_select", "unique")
            self.count += any(word in str(func) for word in words)
            return func(*args, **(kwargs or {}))

    def reads(num_steps: int) -> int:
        options = {} if name == "fgsm" else {"num_steps": num_steps}
        with Reads() as mode:
            ATTACKS[name](model, inputs, labels, norm="L2", eps=0.4, loss="dlr", **options)
        return mode.count

    assert reads(3) == reads(12) <= 4  # the range check of the inputs, on the CPU only


@pytest.mark.parametrize("name", ATTACKS)
@both_norms
def test_half_precision_keeps_step_arithmetic_in_float32(
    name: str, norm: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    attack = attack_named(name)
    with torch.autocast("cpu", torch.bfloat16):
        result = attack(model, inputs, labels, norm=norm, eps=RADII[norm])
    assert result.inputs.dtype == result.loss.dtype == torch.float32
    distance = torch.linalg.vector_norm((result.inputs - inputs).flatten(1), ORDERS[norm], dim=1)
    assert (distance <= RADII[norm] * (1 + 1e-5) + 1e-6).all()
    half = attack(model.bfloat16(), inputs.bfloat16(), labels, norm=norm, eps=RADII[norm])
    assert half.inputs.dtype == torch.bfloat16
    assert half.loss.dtype == torch.float32


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "L1", "eps": 12}, "does not support norm 'L1' yet"),
        ({"norm": "L3"}, "unknown norm 'L3'"),
        ({"eps": 8}, "write 8/255, not 8"),
        ({"eps": -0.1}, "out of range"),
        ({"loss": "cee"}, "did you mean 'ce'"),
        ({"inputs": torch.full((2, 3), 1.5)}, "make normalisation the first layer"),
        ({"inputs": torch.zeros(2, 3, dtype=torch.uint8)}, "inputs must be floating point"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must be class indices \[2\]"),
        ({"labels": torch.zeros(2)}, r"labels must be class indices \[2\]"),
        ({"sample_ids": torch.arange(3)}, r"sample_ids must be \[2\]"),
        ({"model": lambda inputs: inputs[:, :1]}, "at least 2 classes"),
    ],
)
def test_bad_arguments_get_a_sentence(name: str, change: dict[str, object], message: str) -> None:
    arguments = {
        "model": lambda inputs: inputs,
        "inputs": torch.full((2, 3), 0.5),
        "labels": torch.zeros(2, dtype=torch.int64),
        "norm": "Linf",
        "eps": "8/255",
        **change,
    }
    positional = [arguments.pop(key) for key in ("model", "inputs", "labels")]
    with pytest.raises(ConfigError, match=message):
        ATTACKS[name](*positional, **arguments)


def test_unknown_names_carry_the_nearest() -> None:
    with pytest.raises(UnknownNameError):
        ATTACKS["apgd"](
            lambda inputs: inputs,
            torch.zeros(1, 2),
            torch.zeros(1, dtype=torch.int64),
            norm="Linf",
            eps=0.1,
            keep="best",
        )


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("num_restarts", [1, 2])
def test_counted_passes_are_the_real_ones(
    name: str, num_restarts: int, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    options = {} if name == "fgsm" else {"num_steps": 7, "num_restarts": num_restarts}
    forwards, backwards = {"fgsm": (2, 1), "pgd": (8, 7), "apgd": (8, 7)}[name]
    if name == "fgsm":
        num_restarts = 1
    counter = Counter(model)
    result = ATTACKS[name](counter, inputs, labels, norm="Linf", eps=0.01, **options)
    assert counter.forwards == result.num_forwards == forwards * num_restarts
    assert counter.backwards == result.num_backwards == backwards * num_restarts
