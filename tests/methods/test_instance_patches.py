"""Perturbed patch embeddings of image transformers: closed form, exact control, cost, shards."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from robustft.config import from_dict, to_dict
from robustft.data.base import Split
from robustft.errors import ConfigError, DataError
from robustft.methods.instance_collector import Collected, collect, patch_surface
from robustft.methods.instance_config import CollectConfig
from robustft.methods.instance_perturbations import (
    EmbeddingPerturbation,
    GradientPerturbation,
    PatchPerturbation,
    perturbation_parameters,
)
from robustft.models import build_model
from robustft.models.normalize import Normalized
from robustft.models.patches import patch_model

SIDE, PATCH, WIDTH, CLASSES, COUNT, K = 16, 8, 8, 3, 7, 3
IMAGE = PatchPerturbation(per="image", eps=0.5, num_steps=K)
EACH = PatchPerturbation(per="patch", eps=0.2, num_steps=K, start_size=0.05)
LINF = PatchPerturbation(per="image", norm="Linf", eps=0.05, num_steps=K)
PIXELS = GradientPerturbation(eps=4 / 255, num_steps=K)
EVERY = (PIXELS, "identity", IMAGE, EACH, LINF, "identity-patches")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    network = VisionTransformer(
        image_size=SIDE,
        patch_size=PATCH,
        num_layers=2,
        num_heads=2,
        hidden_dim=WIDTH,
        mlp_dim=16,
        num_classes=CLASSES,
    )
    with torch.no_grad():
        for parameter in network.parameters():
            # A fresh head is zero: all logits would be.
            parameter.add_(0.3 * torch.randn_like(parameter))
    return Normalized(network, (0.5,) * 3, (0.25,) * 3).eval()


@pytest.fixture(scope="module")
def split() -> Split:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (COUNT, 3, SIDE, SIDE)).astype(np.uint8)
    ids = draw.permutation(100)[:COUNT].astype(np.int64)
    return Split(images, np.arange(COUNT, dtype=np.int64) % CLASSES, ids)


def ordered(*parts: Collected) -> dict[str, Any]:
    """Return column -> ``[perturbations, instances]``, instances by id."""
    columns = {
        name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns
    }
    order = np.lexsort((columns["instance_id"], columns["perturbation"]))
    return {name: values[order].reshape(-1, COUNT) for name, values in columns.items()}


@pytest.fixture(scope="module")
def found(model: nn.Module, split: Split) -> dict[str, Any]:
    return ordered(collect(model, split, perturbations=EVERY, batch_size=4))


def test_the_control_is_exact_in_pixels_and_in_patches(found: dict[str, Any]) -> None:
    """Also where gradients are taken beside it, without which attention has a faster path."""
    for row in (1, 5):
        for name in ("loss", "logit", "margin", "prob", "pred"):
            np.testing.assert_array_equal(found[f"pert_{name}"][row], found[f"clean_{name}"][row])
        assert (found["delta_norm"][row] == 0).all()
    # Its own embeddings give a model's own logits, bit by bit.
    for name in ("clean_loss", "clean_margin", "clean_pred"):
        assert (found[name] == found[name][0]).all()
    for row in (0, 2, 3, 4):
        assert (found["pert_loss"][row] > found["clean_loss"][row]).all()


def test_lengths_are_those_of_the_perturbation(found: dict[str, Any]) -> None:
    patches = (SIDE // PATCH) ** 2
    _, _, image, each, entry, _ = found["delta_norm"]
    assert (image <= 0.5 * (1 + 1e-5)).all()
    assert (image > 0.49).all()
    assert (each <= 0.2 * patches**0.5 * (1 + 1e-5)).all()
    assert (each > 0.38).all(), "every patch moves by about .2"
    assert (entry <= 0.05 * (patches * WIDTH) ** 0.5 * (1 + 1e-5)).all()


@pytest.mark.parametrize("world_size", [2, 4])
def test_shards_and_batches_do_not_matter(
    world_size: int, model: nn.Module, split: Split, found: dict[str, Any]
) -> None:
    parts = [
        collect(model, split, perturbations=EVERY, batch_size=2, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    columns: dict[str, Any] = {}
    for name in parts[0].columns:
        # Shares hold every perturbation; rows that only keep ranks in step are dropped already.
        columns[name] = np.concatenate([part.columns[name] for part in parts])
    again = ordered(*parts)
    assert len(columns["instance_id"]) == len(EVERY) * COUNT
    for name, expected in found.items():
        np.testing.assert_allclose(again[name], expected, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("perturbations", "forwards", "backwards"),
    [
        ((IMAGE,), 1 + K, K),
        ((IMAGE, LINF), 1 + 2 * K, 1 + 2 * (K - 1)),
        (("identity-patches",), 2, 0),
        ((EACH,), 1 + K + 1, K),
        # Pixels and patches: a clean pass and a first gradient each.
        ((PIXELS, IMAGE, "identity", "identity-patches"), 2 * (1 + K + 1), 2 * K),
    ],
)
def test_passes_are_asserted(
    perturbations: Any, forwards: int, backwards: int, model: nn.Module, split: Split
) -> None:
    passes: Counter[str] = Counter()
    head = model.network.heads  # type: ignore[union-attr]
    assert isinstance(head, nn.Module)
    hooks = (
        head.register_forward_hook(lambda module, given, made: passes.update(forward=len(made))),
        head.register_full_backward_pre_hook(
            lambda module, gradients: passes.update(backward=len(gradients[0]))
        ),
    )
    made = collect(model, split, perturbations=perturbations, batch_size=4)
    for hook in hooks:
        hook.remove()
    assert (passes["forward"], passes["backward"]) == (forwards * COUNT, backwards * COUNT)
    assert (made.num_forwards, made.num_backwards) == (forwards * COUNT, backwards * COUNT)


class Sum(nn.Module):
    """Offers embeddings of its own; everything is linear, logits are +v and -v."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 3, dtype=torch.float64))

    def embed(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(2).transpose(1, 2)  # Every pixel a token of three channels.

    def from_embeddings(self, embeddings: Tensor, inputs: Tensor) -> Tensor:
        value = (embeddings @ self.weight).mean(1)
        return torch.stack([value, -value], dim=1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.from_embeddings(self.embed(inputs), inputs)


@pytest.mark.parametrize("normalised", [False, True])
def test_a_linear_model_loses_what_the_closed_form_says(normalised: bool, split: Split) -> None:
    network: nn.Module = Sum()
    if normalised:
        network = Normalized(network, (0.5,) * 3, (0.25,) * 3).double()
    two = Split(split.images, split.labels % 2, split.ids)
    fixed = {"eps": None, "step_size": 0.02, "num_steps": K}
    whole, each = PatchPerturbation(per="image", **fixed), PatchPerturbation(per="patch", **fixed)
    found = ordered(collect(network, two, perturbations=[whole, each]))
    tokens, norm = SIDE**2, float(torch.linspace(-1, 1, 3).norm())
    # The margin is twice the mean over tokens of w . e: a length over all tokens is shared.
    fall = 2 * K * 0.02 * norm
    margins = found["clean_margin"] - found["pert_margin"]
    np.testing.assert_allclose(margins[0], fall / tokens**0.5, rtol=1e-6)
    np.testing.assert_allclose(margins[1], fall, rtol=1e-6)


def test_models_without_patches_and_word_perturbations_are_refused(split: Split) -> None:
    other = build_model(
        "small_resnet",
        num_classes=CLASSES,
        image_shape=(3, SIDE, SIDE),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    with pytest.raises(ConfigError, match="no patch embeddings that are known"):
        collect(other, split, perturbations=[IMAGE])
    with pytest.raises(ConfigError, match="EmbeddingPerturbation is for text"):
        collect(other, split, perturbations=[EmbeddingPerturbation()])
    assert patch_model(nn.DataParallel(Sum())).embed(torch.zeros(1, 3, 2, 2)).shape == (1, 4, 3)


def test_pictures_of_another_scale_are_refused(model: nn.Module) -> None:
    loud = torch.full((2, 3, SIDE, SIDE), 255.0)
    with pytest.raises(DataError, match=r"must lie in \[0, 1\]"):
        patch_surface(model, loud)


def test_options_tell_patches_from_pixels() -> None:
    values = {"attacks": [{"eps": "1/255"}, {"per": "patch", "eps": 0.3}]}
    config = from_dict(CollectConfig, values)
    pixels, patches = config.attacks
    assert type(pixels) is GradientPerturbation
    assert patches == PatchPerturbation(per="patch", eps=0.3)
    assert from_dict(CollectConfig, to_dict(config)) == config
    assert [*perturbation_parameters([*config.attacks, IMAGE, "identity-patches"])] == [
        "px-linf-k10-1/255", "patch-l2-k8-0.3-each", "patch-l2-k3-0.5", "identity-patches",
    ]  # fmt: skip
    with pytest.raises(ConfigError):
        from_dict(CollectConfig, {"attacks": [{"per": "word"}]})
