"""The collector: what it measures, what it costs, and that it leaves no trace."""

import copy
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustft.data.base import Split
from robustft.errors import ConfigError, DataError
from robustft.methods.instance_collector import (
    Collected,
    collect,
    collect_batches,
    log_odds,
    pixel_surface,
    shard_positions,
)
from robustft.methods.instance_perturbations import GradientPerturbation, perturbation_parameters
from robustft.models import build_model

N, SIDE, CLASSES = 21, 16, 3
LINF = GradientPerturbation(eps=4 / 255, num_steps=3)
L2 = GradientPerturbation(norm="L2", eps=0.5, num_steps=3)
FREE = GradientPerturbation(norm="L2", eps=None, step_size=0.08, num_steps=3, start_size=0.05)
LARGEST = GradientPerturbation(
    eps=None, step_size=0.02, num_steps=3, direction="largest", start_size=0.01
)
EVERY = (
    LINF,
    L2,
    FREE,
    LARGEST,
    "rotate-medium",
    "red_shift-weak",
    "shot_noise-strong",
    "identity",
)


def make_split(count: int = N) -> Split:
    draw = np.random.default_rng(0)
    ids = np.sort(draw.permutation(500)[:count]).astype(np.int64)
    images = draw.integers(0, 256, (count, 3, SIDE, SIDE)).astype(np.uint8)
    return Split(images, np.arange(count) % CLASSES, ids)


@pytest.fixture(scope="module")
def split() -> Split:
    return make_split()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A network whose BatchNorm has seen something, in double precision."""
    network = build_model(
        "small_resnet",
        num_classes=CLASSES,
        image_shape=(3, SIDE, SIDE),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    network.train()
    network(torch.rand(32, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)))
    return network.double().eval()


def ordered(*parts: Collected) -> dict[str, np.ndarray[Any, Any]]:
    """Return the rows of all parts, by perturbation and id."""
    columns = {
        name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns
    }
    order = np.lexsort((columns["instance_id"], columns["perturbation"]))
    return {name: values[order] for name, values in columns.items()}


def pixels(split: Split, *, dtype: torch.dtype = torch.float64) -> Tensor:
    # As the loader has them: float32 before anything else.
    return (torch.from_numpy(split.images).float() / 255).to(dtype)


# --- equivalences --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(model: nn.Module, split: Split) -> dict[str, np.ndarray[Any, Any]]:
    return ordered(collect(model, split, perturbations=EVERY, record=2, batch_size=N))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_shards_and_batches_do_not_matter(
    world_size: int,
    batch_size: int,
    model: nn.Module,
    split: Split,
    alone: dict[str, np.ndarray[Any, Any]],
) -> None:
    parts = [
        collect(
            model,
            split,
            perturbations=EVERY,
            record=2,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    found = ordered(*parts)
    assert found["instance_id"].tolist() == [*split.ids.tolist()] * len(EVERY)
    for name, expected in alone.items():
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-6, err_msg=name)


def test_the_order_of_the_split_does_not_matter(
    model: nn.Module, split: Split, alone: dict[str, np.ndarray[Any, Any]]
) -> None:
    shuffled = split.take(np.random.default_rng(1).permutation(N))
    found = ordered(collect(model, shuffled, perturbations=EVERY, record=2, batch_size=8))
    for name, expected in alone.items():
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("world_size", [1, 2, 4, 25])
def test_ranks_share_without_loss_and_make_equal_numbers_of_passes(
    world_size: int, split: Split
) -> None:
    shares = [shard_positions(split, rank=r, world_size=world_size) for r in range(world_size)]
    kept = np.concatenate([positions[:count] for positions, count in shares])
    assert sorted(kept.tolist()) == list(range(N))
    assert len({len(positions) for positions, _ in shares}) == 1
    assert max(count for _, count in shares) - min(count for _, count in shares) <= 1
    with pytest.raises(ConfigError, match="the split is empty"):
        shard_positions(make_split(0), rank=0, world_size=1)


def test_a_rank_without_instances_returns_no_rows(model: nn.Module, split: Split) -> None:
    few = split.take(np.arange(2))
    found = collect(model, few, perturbations=[LINF], rank=3, world_size=4)
    assert all(len(values) == 0 for values in found.columns.values())


# --- what is measured ----------------------------------------------------------------------------


def reference(
    model: nn.Module, image: Tensor, label: Tensor, perturbation: GradientPerturbation
) -> Tensor:
    """Return the end of the ascent for one image, from the definition."""
    delta = torch.zeros_like(image)
    for _ in range(perturbation.updates):
        point = (image + delta)[None].requires_grad_()
        loss = functional.cross_entropy(model(point), label[None])
        (slope,) = torch.autograd.grad(loss, point)
        if perturbation.norm == "L2":
            delta = delta + perturbation.step * slope[0] / slope.norm()
            if perturbation.eps is not None and delta.norm() > perturbation.eps:
                delta = delta * perturbation.eps / delta.norm()
        else:
            slope = (
                slope.sign() if perturbation.direction == "steepest" else slope / slope.abs().max()
            )
            delta = delta + perturbation.step * slope[0]
            if perturbation.eps is not None:
                delta = delta.clamp(-perturbation.eps, perturbation.eps)
        delta = (image + delta).clamp(0, 1) - image
    return image + delta


@pytest.mark.parametrize(
    "perturbation",
    [
        LINF,
        L2,
        GradientPerturbation(norm="L2", eps=None, step_size=0.08, num_steps=3),
        GradientPerturbation(norm="L2", eps=None, step_size=0.08, num_steps=3, legacy_steps=True),
        GradientPerturbation(eps=None, step_size=0.02, num_steps=2, direction="largest"),
        GradientPerturbation(eps=None, step_size=0.02, num_steps=1, legacy_steps=True),
    ],
    ids=lambda perturbation: perturbation.name,
)
def test_the_numbers_are_those_of_the_definition(
    perturbation: GradientPerturbation, model: nn.Module, split: Split
) -> None:
    some = split.take(np.arange(6))
    found = ordered(collect(model, some, perturbations=[perturbation]))
    images, labels = pixels(some), torch.from_numpy(some.labels)
    for row in range(6):
        point = reference(model, images[row], labels[row], perturbation)
        with torch.no_grad():
            clean, perturbed = (model(one[None])[0] for one in (images[row], point))
        for side, logits in (("clean", clean), ("pert", perturbed)):
            label = int(labels[row])
            chances = logits.softmax(0)
            others = max(float(logits[other]) for other in range(CLASSES) if other != label)
            expected = {
                "loss": -math.log(float(chances[label])),
                "logit": float(logits[label]),
                "margin": float(logits[label]) - others,
                "prob": float(chances[label]),
                "pred": int(logits.argmax()),
            }
            for name, value in expected.items():
                assert found[f"{side}_{name}"][row] == pytest.approx(value, abs=1e-6), (side, name)
        length = float((point - images[row]).norm())
        assert found["delta_norm"][row] == pytest.approx(length, abs=1e-9)
    assert found["label"].tolist() == some.labels.tolist()


class Linear(nn.Module):
    """Logits w . x and -w . x: every step goes the same way."""

    def __init__(self, *, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        weight = scale * torch.randn(3 * SIDE * SIDE, generator=draw, dtype=dtype)
        self.weight = nn.Parameter(weight)

    def forward(self, inputs: Tensor) -> Tensor:
        value = (inputs.flatten(1) - 0.5) @ self.weight
        return torch.stack([value, -value], dim=1)


def grey(count: int = 4) -> Split:
    """Pictures far from the borders of the box."""
    images = np.full((count, 3, SIDE, SIDE), 128, np.uint8)
    return Split(images, np.zeros(count, np.int64), np.arange(count))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_the_published_count_is_one_update_fewer(steps: int) -> None:
    common: dict[str, Any] = {"norm": "L2", "eps": None, "step_size": 0.03, "num_steps": steps}
    published = GradientPerturbation(**common, legacy_steps=True)
    ours = GradientPerturbation(**common)
    found = ordered(collect(Linear(), grey(), perturbations=[published, ours]))
    lengths = found["delta_norm"].reshape(2, -1)
    np.testing.assert_allclose(lengths[0], 0.03 * (steps - 1), atol=1e-12)
    np.testing.assert_allclose(lengths[1], 0.03 * steps, atol=1e-12)


def test_projection_holds_ball_and_box(model: nn.Module, split: Split) -> None:
    surface = pixel_surface(model, pixels(split))
    for perturbation in (LINF, L2, FREE, LARGEST):
        seen: list[Tensor] = []

        def spy(network: nn.Module, inputs: Any, seen: list[Tensor] = seen) -> Any:
            def forward(shown: Tensor) -> Tensor:
                seen.append(shown.detach().clone())
                logits: Tensor = network(shown)
                return logits

            return type(surface)(base=inputs, forward=forward, unit_box=True)

        batch = (pixels(split), torch.from_numpy(split.labels), torch.from_numpy(split.ids))
        collect_batches(
            model, [batch], count=N, perturbations=[perturbation], surface_of=lambda _: spy
        )
        for point in seen:
            assert float(point.min()) >= 0
            assert float(point.max()) <= 1
            delta = (point - pixels(split)).flatten(1)
            if perturbation.eps is not None:
                order = 2 if perturbation.norm == "L2" else math.inf
                assert float(delta.norm(order, dim=1).max()) <= perturbation.eps + 1e-12


def test_random_starts_have_their_published_size() -> None:
    # mag / sqrt(3) is the expected length of uniform(-1, 1) * mag / sqrt(d).
    free = GradientPerturbation(
        norm="L2", eps=None, step_size=1.0, num_steps=1, legacy_steps=True, start_size=0.05
    )
    entries = GradientPerturbation(
        eps=None, step_size=1.0, num_steps=1, legacy_steps=True, start_size=0.05
    )
    images = np.full((40, 3, SIDE, SIDE), 128, np.uint8)
    many = Split(images, np.zeros(40, np.int64), np.arange(40))
    found = ordered(collect(Linear(), many, perturbations=[free, entries]))
    lengths = found["delta_norm"].reshape(2, -1).mean(1)
    assert lengths[0] == pytest.approx(0.05 / math.sqrt(3), rel=0.02)
    assert lengths[1] == pytest.approx(0.05 * math.sqrt(3 * SIDE**2 / 3), rel=0.02)


def test_random_starts_depend_on_seed_record_and_instance() -> None:
    def losses(**options: Any) -> np.ndarray[Any, Any]:
        return ordered(collect(Linear(), grey(), perturbations=[FREE], **options))["pert_loss"]

    first = losses(record=1, seed=0)
    np.testing.assert_allclose(first, losses(record=1, seed=0, batch_size=1), rtol=1e-12)
    for other in (losses(record=2, seed=0), losses(record=1, seed=1)):
        assert (np.abs(first - other) > 1e-6).all()
    assert len(set(first.tolist())) == len(first)


def test_losses_can_be_measured_against_the_clean_prediction(
    model: nn.Module, split: Split
) -> None:
    gold = ordered(collect(model, split, perturbations=[LINF]))
    found = ordered(collect(model, split, perturbations=[LINF], target="pred"))
    np.testing.assert_array_equal(found["clean_pred"], gold["clean_pred"])
    np.testing.assert_array_equal(found["label"], gold["label"])
    np.testing.assert_allclose(found["clean_prob"], gold["clean_prob"])
    right = gold["clean_pred"] == gold["label"]
    assert right.any()
    assert (~right).any()
    np.testing.assert_allclose(found["pert_loss"][right], gold["pert_loss"][right])
    assert (found["clean_loss"][~right] < gold["clean_loss"][~right]).all()
    assert (found["pert_loss"] > found["clean_loss"]).all()


@pytest.mark.parametrize("batch_size", [1, 5, 21])
def test_the_identity_changes_exactly_nothing(
    batch_size: int, model: nn.Module, split: Split
) -> None:
    single = copy.deepcopy(model).float()
    found = ordered(collect(single, split, perturbations=["identity", LINF], batch_size=batch_size))
    for name in ("loss", "logit", "margin", "prob", "pred"):
        np.testing.assert_array_equal(found[f"pert_{name}"][:N], found[f"clean_{name}"][:N])
    assert (found["delta_norm"][:N] == 0).all()
    assert (found["pert_loss"][N:] > found["clean_loss"][N:]).all()
    assert np.isnan(
        ordered(collect(single, split, perturbations=["blur-weak"]))["delta_norm"]
    ).all()


def test_half_precision_models_are_attacked_in_float32() -> None:
    found = ordered(collect(Linear(dtype=torch.bfloat16), grey(), perturbations=[L2]))
    np.testing.assert_allclose(found["delta_norm"], 0.5, rtol=1e-5)
    assert found["pert_loss"].dtype == np.float32


def test_sure_predictions_are_attacked_all_the_same() -> None:
    """In float32 the cross-entropy of a sure instance has no gradient: it would look robust."""
    sure = Linear(scale=30.0, dtype=torch.float32)
    split = grey()
    split.images[:, :, :8] = 200
    with torch.no_grad():
        split.labels[:] = sure(pixels(split, dtype=torch.float32)).argmax(1).numpy()
    point = pixels(split, dtype=torch.float32).requires_grad_()
    loss = functional.cross_entropy(sure(point), torch.from_numpy(split.labels), reduction="sum")
    (slope,) = torch.autograd.grad(loss, point)
    assert not slope.any()
    found = ordered(collect(sure, split, perturbations=[L2]))
    np.testing.assert_allclose(found["delta_norm"], 0.5, rtol=1e-5)
    assert (found["pert_margin"] < found["clean_margin"] - 1).all()


def test_the_objective_has_the_direction_of_the_cross_entropy() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20, 5, generator=draw, dtype=torch.float64)
    labels = torch.arange(20) % 5
    point = logits.clone().requires_grad_()
    (ours,) = torch.autograd.grad(log_odds(point, labels).sum(), point)
    (theirs,) = torch.autograd.grad(functional.cross_entropy(point, labels, reduction="sum"), point)
    missing = 1 - logits.softmax(1).gather(1, labels[:, None])
    torch.testing.assert_close(ours, theirs / missing)
    chance = logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(log_odds(logits, labels), ((1 - chance) / chance).log())


# --- cost ----------------------------------------------------------------------------------------


@pytest.fixture
def passes() -> Iterator[Counter[str]]:
    """Count images through whole models, forwards and backwards, parameters frozen or not."""
    found: Counter[str] = Counter()

    def forward(module: nn.Module, inputs: Any) -> None:
        if type(module).__name__ == "Normalized":
            found["forward"] += len(inputs[0])

    def backward(module: nn.Module, gradients: Any) -> None:
        if type(module).__name__ == "Normalized":
            trains = any(parameter.requires_grad for parameter in module.parameters())
            found["to weights" if trains else "to inputs"] += len(gradients[0])

    hooks = (
        nn.modules.module.register_module_forward_pre_hook(forward),
        nn.modules.module.register_module_full_backward_pre_hook(backward),
    )
    yield found
    for hook in hooks:
        hook.remove()


K = 3
PRICES = {
    "one from the instance": ((LINF,), K + 1, K),
    "two share the first gradient": ((LINF, L2), 1 + 2 * K, 1 + 2 * (K - 1)),
    "a random start shares nothing": ((FREE,), 1 + K + 1, K),
    "transformations": (("blur-weak", "rotate-strong", "identity"), 1 + 3, 0),
    "everything": (EVERY, 1 + 2 * K + 2 * (K + 1) + 4, 1 + 2 * (K - 1) + 2 * K),
}


@pytest.mark.parametrize("case", PRICES)
def test_passes_are_those_of_the_table(
    case: str, model: nn.Module, split: Split, passes: Counter[str]
) -> None:
    perturbations, forwards, backwards = PRICES[case]
    found = collect(model, split, perturbations=perturbations, batch_size=8)
    assert (passes["forward"], passes["to inputs"]) == (forwards * N, backwards * N)
    assert passes["to weights"] == 0
    assert (found.num_forwards, found.num_backwards) == (forwards * N, backwards * N)


@pytest.mark.parametrize("steps", [5, 8])
def test_the_cost_is_about_two_forwards_per_step(
    steps: int, model: nn.Module, split: Split
) -> None:
    """Published: 1 + 3 K, a full backward being two forwards; K counts forwards there."""
    published = GradientPerturbation(
        norm="L2", eps=None, step_size=0.08, num_steps=steps, legacy_steps=True, start_size=0.05
    )
    found = collect(model, split.take(np.arange(3)), perturbations=[published])
    assert found.num_forwards + found.num_backwards == 3 * 2 * steps
    ours = GradientPerturbation(norm="L2", eps=None, step_size=0.08, num_steps=steps)
    found = collect(model, split.take(np.arange(3)), perturbations=[ours])
    assert found.num_forwards + found.num_backwards == 3 * (2 * steps + 1)


# --- no trace ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool, model: nn.Module, split: Split) -> None:
    network = copy.deepcopy(model).float().train()
    parameters = dict(network.named_parameters())
    for place, (name, parameter) in enumerate(parameters.items()):
        parameter.requires_grad_(place % 3 != 0)
        if place % 2:
            parameter.grad = torch.full_like(parameter, 0.5)
        if "bn1" in name:
            network.get_submodule(name.rpartition(".")[0]).eval()
    before = copy.deepcopy(network)
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    gradients = {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in parameters.items()
    }
    modes = [module.training for module in network.modules()]
    torch.manual_seed(3)
    random = torch.get_rng_state()
    if fails:
        calls: list[None] = []

        def break_down(*_: Any) -> None:
            calls.append(None)
            if len(calls) == 3:
                raise RuntimeError("the device is gone")

        network.register_forward_pre_hook(break_down)
        with pytest.raises(RuntimeError, match="the device is gone"):
            collect(network, split, perturbations=[LINF])
    else:
        collect(network, split, perturbations=EVERY, batch_size=8)
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in before.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name
    for name, parameter in parameters.items():
        assert parameter.requires_grad == flags[name]
        found, expected = parameter.grad, gradients[name]
        assert (found is None) == (expected is None)
        assert found is None or torch.equal(found, expected)  # type: ignore[arg-type]


def test_layers_that_draw_in_eval_mode_do_not_move_the_random_state(split: Split) -> None:
    class Noisy(Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) + 1e-3 * torch.rand(len(inputs), 1)

    random = torch.get_rng_state()
    collect(Noisy(), grey(), perturbations=[LINF])
    assert torch.equal(torch.get_rng_state(), random)


# --- what is refused -----------------------------------------------------------------------------


def test_pictures_of_another_scale_are_refused(model: nn.Module, split: Split) -> None:
    labels, ids = torch.from_numpy(split.labels), torch.from_numpy(split.ids)
    for images, message in (
        (pixels(split) * 255, "clean: images must lie in"),
        (torch.from_numpy(split.images), "clean: images must be float"),
        (pixels(split) - 0.5, "divide 8-bit pictures by 255"),
        (pixels(split).index_fill(0, torch.tensor([2]), math.nan), "must lie in"),
    ):
        with pytest.raises(DataError, match=message):
            collect_batches(model, [(images, labels, ids)], count=N, perturbations=[LINF])


def test_text_needs_another_surface(model: nn.Module, split: Split) -> None:
    labels, ids = torch.from_numpy(split.labels), torch.from_numpy(split.ids)
    with pytest.raises(ConfigError, match="images only: give another surface"):
        collect_batches(
            model, [({"input_ids": labels}, labels, ids)], count=N, perturbations=[LINF]
        )


@pytest.mark.parametrize(
    ("perturbations", "message"),
    [
        ((), "there is nothing to measure"),
        ((LINF, LINF), "two perturbations are called 'px-linf-k3-4/255'"),
        (("blur-mild",), "did you mean 'blur-medium'"),
        (("blurr-weak",), "did you mean 'blur'"),
        (("blur",), "strength of the corruption 'blur'"),
    ],
)
def test_perturbations_are_checked(perturbations: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        perturbation_parameters(perturbations)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eps": None}, "give step_size"),
        ({"eps": 0.0}, "eps = 0.0: must be a number > 0"),
        ({"num_steps": 0}, "num_steps = 0"),
        ({"norm": "L1"}, "unknown value of norm 'L1'"),
        ({"norm": "L2", "direction": "largest"}, "belongs to norm = 'Linf'"),
        ({"start_size": -1.0}, "start_size = -1.0"),
    ],
)
def test_options_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GradientPerturbation(**fields)


def test_names_say_what_was_done() -> None:
    assert GradientPerturbation(eps=2 / 255).name == "px-linf-k10-2/255"
    assert GradientPerturbation(norm="L2", eps=0.5, num_steps=8).name == "px-l2-k8-0.5"
    assert FREE.name == "px-l2-k3-step0.08-start0.05"
    assert LARGEST.name == "px-linf-k3-step0.02-largest-start0.01"
    parameters = perturbation_parameters([LINF, "blur-weak", "identity"])
    assert parameters[LINF.name]["updates"] == 3
    assert parameters[LINF.name]["step"] == pytest.approx(2.5 * 4 / 255 / 3)
    assert parameters["blur-weak"] == {"kind": "transform", "family": "blur", "strength": "weak"}
