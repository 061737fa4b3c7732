"""What holds for every attack."""

import typing
from collections.abc import Callable

import pytest
import torch
from attack_toys import convolutional
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from robustft.attacks import ATTACKS, AttackName, AttackResult, zero_gradient
from robustft.errors import ConfigError, UnknownNameError

RADII = {"Linf": 0.03, "L2": 0.2, "L1": 1.0}
ORDERS = {"Linf": float("inf"), "L2": 2, "L1": 1}
DENSE = ("fgsm", "pgd")  # have no L1 step
WITH_LOSS = ("fgsm", "pgd", "apgd")

Attack = Callable[..., AttackResult]

# Settings small enough for a test.
SMALL: dict[str, dict[str, object]] = {
    "fgsm": {},
    "pgd": {"num_steps": 5},
    "apgd": {"num_steps": 8},
    "fab": {"num_steps": 5},
    "square": {"num_queries": 40},
    "autoattack": {"num_steps": 5, "num_queries": 10},
}

TARGETED = {"loss": "dlr-targeted", "num_targets": 3}

VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "fgsm": ("fgsm", {}),
    "fgsm-random_start": ("fgsm", {"random_start": True}),
    "pgd": ("pgd", {}),
    "pgd-restarts": ("pgd", {"num_restarts": 3}),
    "apgd": ("apgd", {}),
    "apgd-restarts": ("apgd", {"num_restarts": 3}),
    "apgd-check_clean": ("apgd", {"check_clean": True}),
    "apgd-large_eps": ("apgd", {"large_eps_schedule": True}),
    "apgd-t": ("apgd", TARGETED),
    "apgd-t-restarts": ("apgd", {**TARGETED, "num_restarts": 2, "check_clean": True}),
    "apgd-t-large_eps": ("apgd", {**TARGETED, "large_eps_schedule": True}),
    "fab": ("fab", {"targeted": False}),
    "fab-restarts": ("fab", {"targeted": False, "num_restarts": 2}),
    "fab-t": ("fab", {"num_targets": 3}),
    "square": ("square", {}),
    "square-restarts": ("square", {"num_restarts": 2, "num_queries": 20}),
    "autoattack": ("autoattack", {}),
    "autoattack-batches": ("autoattack", {"version": "quick", "batch_size": 5}),
}


def variant(name: str, **fixed: object) -> Attack:
    attack, options = VARIANTS[name]

    def run(*arguments: object, **further: object) -> AttackResult:
        return ATTACKS[attack](*arguments, **{**SMALL[attack], **options, **fixed, **further})

    return run


def norms_of(name: str) -> list[str]:
    attack, options = VARIANTS[name]
    if "large_eps_schedule" in options:
        return ["L1"]
    return ["Linf", "L2"] if attack in DENSE else ["Linf", "L2", "L1"]


every_variant = pytest.mark.parametrize(
    ("attack", "norm"),
    [
        pytest.param(variant(name), norm, id=f"{name}-{norm}")
        for name in VARIANTS
        for norm in norms_of(name)
    ],
)
every_attack = pytest.mark.parametrize("name", ATTACKS)
once_each = pytest.mark.parametrize(
    ("attack", "norm"),
    [pytest.param(variant(name), norms_of(name)[-1], id=name) for name in VARIANTS],
)


def correct(model: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs).argmax(1) == labels


def lengths(delta: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), ORDERS[norm], dim=1)


def check_truth(
    result: AttackResult, model: nn.Module, inputs: Tensor, labels: Tensor, norm: str
) -> None:
    assert (result.inputs.shape, result.inputs.dtype) == (inputs.shape, inputs.dtype)
    assert not result.inputs.requires_grad
    assert not result.loss.requires_grad
    distance = lengths(result.inputs - inputs, norm)
    assert (distance <= RADII[norm] * (1 + 1e-5) + 1e-6).all()
    assert result.inputs.min() >= 0
    assert result.inputs.max() <= 1
    assert result.robust.dtype == torch.bool
    assert result.loss.shape == labels.shape
    assert result.loss.isfinite().all()
    assert torch.equal(result.robust, correct(model, result.inputs, labels))
    assert (result.robust <= correct(model, inputs, labels)).all()
    assert 0 < result.robust.sum() < correct(model, inputs, labels).sum()


def test_names() -> None:
    assert set(typing.get_args(AttackName)) == set(ATTACKS) == set(SMALL)
    assert {attack for attack, _ in VARIANTS.values()} == set(ATTACKS)


@every_variant
def test_result_is_feasible_and_says_the_truth(
    attack: Attack, norm: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    untouched = inputs.clone(), labels.clone()
    result = attack(model, inputs, labels, norm=norm, eps=RADII[norm])
    assert torch.equal(inputs, untouched[0])
    assert torch.equal(labels, untouched[1])
    check_truth(result, model, inputs, labels, norm)


@pytest.mark.parametrize("name", WITH_LOSS)
@pytest.mark.parametrize("loss", ["dlr", "margin"])
def test_every_loss_gives_the_truth(
    name: str, loss: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    for norm in norms_of(name):
        result = variant(name)(model, inputs, labels, norm=norm, eps=RADII[norm], loss=loss)
        check_truth(result, model, inputs, labels, norm)


@every_variant
def test_radius_zero_returns_the_input(
    attack: Attack, norm: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    inputs, labels = inputs[:8], labels[:8]
    result = attack(model, inputs, labels, norm=norm, eps="0")
    assert torch.equal(result.inputs, inputs)
    assert torch.equal(result.robust, correct(model, inputs, labels))


@every_variant
def test_a_sample_does_not_depend_on_its_batch(attack: Attack, norm: str) -> None:
    """In float64, where rounding that differs between batch sizes stays far below 1e-10."""
    model = convolutional().double()
    inputs = torch.rand(6, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = model(inputs).argmax(1)
    labels[4:] = (labels[4:] + 3) % 10
    ids = torch.tensor([3, 10**12, 17, 0, 4, 5])
    options = {"norm": norm, "eps": RADII[norm]}
    whole = attack(model, inputs, labels, sample_ids=ids, **options)
    order = torch.tensor([5, 2, 0, 1, 3, 4])
    parts = [
        attack(model, inputs[rows], labels[rows], sample_ids=ids[rows], **options)
        for rows in (order[:1], order[1:])
    ]
    back = order.argsort()
    assert torch.equal(torch.cat([part.robust for part in parts])[back], whole.robust)
    for field in ("inputs", "loss"):
        joined = torch.cat([getattr(part, field) for part in parts])[back]
        torch.testing.assert_close(joined, getattr(whole, field), atol=1e-10, rtol=0)


@once_each
def test_generator_is_the_run_seed(
    attack: Attack, norm: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    inputs, labels = inputs[:8], labels[:8]
    options = {"norm": norm, "eps": RADII[norm]}

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


@pytest.mark.parametrize("name", ["fgsm-random_start", "pgd", "apgd", "apgd-t", "square"])
def test_other_seeds_and_samples_draw_other_noise(
    name: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    attack, norm = variant(name), norms_of(name)[-1]
    options = {"norm": norm, "eps": RADII[norm]}
    found = [
        attack(model, inputs, labels, generator=torch.Generator().manual_seed(seed), **options)
        for seed in (1, 2)
    ]
    shifted = attack(model, inputs, labels, sample_ids=torch.arange(24) + 1, **options)
    default = attack(model, inputs, labels, **options)
    for other in (*found, shifted):
        differs = (other.inputs != default.inputs).flatten(1).any(1)
        assert differs.sum() > 12


@once_each
def test_model_and_global_state_stay(
    attack: Attack, norm: str, inputs: Tensor, labels: Tensor
) -> None:
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
        attack(model, inputs, labels, norm=norm, eps=RADII[norm])
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert (model[0].weight.grad == 3).all()
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@once_each
@pytest.mark.parametrize("calls", [0, 1])
def test_flags_come_back_when_the_model_raises(
    attack: Attack, norm: str, calls: int, inputs: Tensor, labels: Tensor
) -> None:
    class Breaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = convolutional()
            self.left = calls

        def forward(self, inputs: Tensor) -> Tensor:
            assert not any(module.training for module in self.modules())
            assert not any(parameter.requires_grad for parameter in self.parameters())
            if self.left == 0:
                raise FloatingPointError("broken layer")
            self.left -= 1
            return self.model(inputs)

    model = Breaking().train()
    with pytest.raises(FloatingPointError, match="broken layer"):
        attack(model, inputs, labels, norm=norm, eps=RADII[norm])
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.is_grad_enabled()


@once_each
def test_inference_mode_gives_the_same(
    attack: Attack, norm: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    inputs, labels = inputs[:8], labels[:8]
    expected = attack(model, inputs, labels, norm=norm, eps=RADII[norm])
    with torch.inference_mode():
        result = attack(model, inputs + 0, labels + 0, norm=norm, eps=RADII[norm])
    assert torch.equal(result.inputs, expected.inputs)
    assert torch.equal(result.robust, expected.robust)


@every_variant
def test_empty_and_single_batches(
    attack: Attack, norm: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    empty = attack(model, inputs[:0], labels[:0], norm=norm, eps=0.03)
    assert empty.inputs.shape == (0, 2, 8, 8)
    assert empty.robust.shape == empty.loss.shape == (0,)
    assert (empty.total_forwards, empty.total_backwards) == (0, 0)
    single = attack(model, inputs[3:4], labels[3:4], norm=norm, eps=1e-6)
    assert single.robust.tolist() == [True]


@every_variant
def test_everything_misclassified(
    attack: Attack, norm: str, inputs: Tensor, labels: Tensor
) -> None:
    """Some models fail on empty batches: those with a ``view(len(x), -1)``."""

    class NeverEmpty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = convolutional()

        def forward(self, inputs: Tensor) -> Tensor:
            assert len(inputs) > 0
            return self.model(inputs)

    result = attack(NeverEmpty(), inputs, (labels + 5) % 10, norm=norm, eps=1e-6)
    assert not result.robust.any()
    assert (lengths(result.inputs - inputs, norm) <= 2e-6).all()


@once_each
@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_few_classes(attack: Attack, norm: str, num_classes: int, inputs: Tensor) -> None:
    model, inputs = convolutional(num_classes), inputs[:8]
    labels = model(inputs).argmax(1)
    result = attack(model, inputs, labels, norm=norm, eps=3 * RADII[norm])
    assert torch.equal(result.robust, correct(model, result.inputs, labels))
    assert result.robust.sum() < len(labels)


@pytest.mark.parametrize("name", WITH_LOSS)
@pytest.mark.parametrize("num_classes", [2, 3])
def test_few_classes_with_dlr(name: str, num_classes: int, inputs: Tensor) -> None:
    model = convolutional(num_classes)
    labels = model(inputs).argmax(1)
    result = variant(name)(model, inputs, labels, norm="Linf", eps=0.05, loss="dlr")
    assert torch.equal(result.robust, correct(model, result.inputs, labels))
    assert result.robust.sum() < len(labels)


@every_variant
def test_models_without_gradient_keep_their_clean_mask(
    attack: Attack, norm: str, inputs: Tensor
) -> None:
    def disconnected(inputs: Tensor) -> Tensor:
        return torch.tensor([[1.0, 0.0, 0.5, 0.2]]).repeat(len(inputs), 1)

    def flat(inputs: Tensor) -> Tensor:
        return disconnected(inputs) + 0 * inputs.sum()

    inputs, labels = inputs[:8], torch.arange(8) % 4
    for model in (disconnected, flat):
        result = attack(model, inputs, labels, norm=norm, eps=RADII[norm])
        assert torch.equal(result.robust, labels == 0)
        assert result.inputs.isfinite().all()
        assert torch.equal(zero_gradient(model, inputs, labels), labels == 0)


def test_zero_gradient_is_silent_on_a_healthy_model(
    model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    assert not zero_gradient(model, inputs, labels).any()


@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd", "apgd-t", "fab", "fab-t"])
def test_no_host_sync_in_the_loop(
    name: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    """Operations that must read a tensor's value: their number does not grow with the steps.

    On the CPU the L1 step and Square look at values on purpose, to work on less.
    """

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore
            words = ("local_scalar", "nonzero", "equal.default", "masked_select", "unique")
            self.count += any(word in str(func) for word in words)
            return func(*args, **(kwargs or {}))

    def reads(num_steps: int) -> int:
        options = {} if name == "fgsm" else {"num_steps": num_steps}
        with Reads() as mode:
            result = variant(name)(model, inputs, labels, norm="L2", eps=0.05, **options)
        assert result.robust.any()  # so that no round over targets is left out
        return mode.count

    # The range checks of the inputs and labels, on the CPU only, and who is left for each target.
    assert reads(3) == reads(12) <= 12


@once_each
def test_half_precision_keeps_step_arithmetic_in_float32(
    attack: Attack, norm: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    inputs, labels = inputs[:8], labels[:8]
    with torch.autocast("cpu", torch.bfloat16):
        result = attack(model, inputs, labels, norm=norm, eps=RADII[norm])
    assert result.inputs.dtype == result.loss.dtype == torch.float32
    distance = lengths(result.inputs - inputs, norm)
    assert (distance <= RADII[norm] * (1 + 1e-5) + 1e-6).all()
    half = attack(model.bfloat16(), inputs.bfloat16(), labels, norm=norm, eps=RADII[norm])
    assert half.inputs.dtype == torch.bfloat16
    assert half.loss.dtype == torch.float32


IMAGES = torch.full((2, 3, 6, 6), 0.5)


@every_attack
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "L3"}, "unknown norm 'L3'"),
        ({"eps": 8}, "write 8/255, not 8"),
        ({"eps": -0.1}, "out of range"),
        ({"eps": "wide"}, "a fraction such as '8/255'"),
        ({"inputs": IMAGES + 1}, "make normalisation the first layer"),
        ({"inputs": IMAGES - 1}, "make normalisation the first layer"),
        ({"inputs": IMAGES * float("nan")}, r"inputs must lie in \[0, 1\], got nan"),
        ({"inputs": IMAGES * float("inf")}, r"inputs must lie in \[0, 1\], got inf"),
        ({"inputs": (255 * IMAGES).to(torch.uint8)}, "inputs must be floating point"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must be class indices \[2\]"),
        ({"labels": torch.zeros(2)}, r"labels must be class indices \[2\]"),
        ({"labels": torch.tensor([0, -1])}, "labels must be class indices >= 0, got -1"),
        ({"labels": torch.tensor([0, 3])}, "labels go up to 3, but the model has 3 classes"),
        ({"sample_ids": torch.arange(3)}, r"sample_ids must be \[2\]"),
        ({"model": lambda inputs: inputs.mean((2, 3))[:, :1]}, "at least 2 classes"),
        ({"model": lambda inputs: inputs}, r"must return logits \[2, classes\]"),
        ({"model": lambda inputs: inputs.mean((2, 3))[:1]}, r"must return logits \[2, classes\]"),
    ],
)
def test_bad_arguments_get_a_sentence(name: str, change: dict[str, object], message: str) -> None:
    arguments = {
        "model": lambda inputs: inputs.mean((2, 3)),
        "inputs": IMAGES,
        "labels": torch.zeros(2, dtype=torch.int64),
        "norm": "Linf",
        "eps": "8/255",
        **change,
    }
    positional = [arguments.pop(key) for key in ("model", "inputs", "labels")]
    with pytest.raises(ConfigError, match=message):
        variant(name)(*positional, **arguments)


@pytest.mark.parametrize("name", DENSE)
def test_dense_attacks_refuse_l1_and_name_the_one_for_it(
    name: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    sentence = f"{name} does not support norm 'L1': use 'Linf' or 'L2' here, or apgd"
    with pytest.raises(ConfigError, match=sentence):
        ATTACKS[name](model, inputs, labels, norm="L1", eps=12)


@pytest.mark.parametrize("name", WITH_LOSS)
def test_unknown_losses_carry_the_nearest(
    name: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'ce'"):
        ATTACKS[name](model, inputs, labels, norm="Linf", eps=0.1, loss="cee")


@once_each
def test_probabilities_are_attacked_as_they_are(
    attack: Attack, norm: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    """Whether a model gives probabilities is for an evaluation to flag, not for an attack."""
    softmax = nn.Sequential(model, nn.Softmax(dim=1))
    result = attack(softmax, inputs, labels, norm=norm, eps=RADII[norm])
    assert torch.equal(result.robust, correct(softmax, result.inputs, labels))
    assert (result.robust <= correct(model, inputs, labels)).all()


class Rows(nn.Module):
    """Counts the samples that go forward, and those that go back to the input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = self.backwards = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.forwards += len(inputs)
        if inputs.requires_grad:
            inputs.register_hook(self._count_backward)
        return self.model(inputs)

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


PASSES = {
    "fgsm": (2, 1),
    "fgsm-random_start": (2, 1),
    "pgd": (6, 5),
    "pgd-restarts": (18, 15),
    "apgd": (9, 8),
    "apgd-restarts": (27, 24),
    "apgd-check_clean": (10, 8),
    "apgd-large_eps": (11, 8),
    "apgd-t": (1 + 3 * 9, 3 * 8),
    "apgd-t-restarts": (1 + 6 * 9, 6 * 8),
    "apgd-t-large_eps": (1 + 3 * 11, 3 * 8),
    "fab": (1 + 2 * 5, 9 * 5),
    "fab-restarts": (1 + 4 * 5, 2 * 9 * 5),
    "fab-t": (1 + 3 * 2 * 5, 3 * 5),
    "square": (41, 0),
    "square-restarts": (42, 0),
    # The clean forward, APGD-CE, APGD-T, FAB-T, Square; with L1: restarts, targets, three stages.
    "autoattack": (1 + 5 * 8 + (1 + 5 * 8) + (1 + 9 * 10) + 11, 5 * 5 + 5 * 5 + 9 * 5),
    "autoattack-batches": (1 + 5 * 8 + (1 + 5 * 8), 5 * 5 + 5 * 5),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_counted_passes_are_the_real_ones(
    name: str, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    norm = norms_of(name)[-1]
    single = Rows(model)
    result = variant(name)(single, inputs[3:4], labels[3:4], norm=norm, eps=1e-6)
    assert result.robust.all()
    assert (result.num_forwards, result.num_backwards) == PASSES[name]
    assert (result.total_forwards, result.total_backwards) == PASSES[name]
    assert (single.forwards, single.backwards) == PASSES[name]
    # In a batch samples drop out once they are broken; those that do not need as many as one.
    batch = Rows(model)
    result = variant(name)(batch, inputs, labels, norm=norm, eps=RADII[norm])
    assert 0 < result.robust.sum() < len(labels)
    assert (result.num_forwards, result.num_backwards) == PASSES[name]
    assert (result.total_forwards, result.total_backwards) == (batch.forwards, batch.backwards)
    assert result.total_forwards <= 24 * PASSES[name][0]
