"""Layer names, and the parts whose composition must be the forward pass bit for bit."""

import pytest
import torch
from torch import nn

from robustft.errors import UnknownNameError
from robustft.models import (
    MODELS,
    Normalized,
    batch_norms,
    build_model,
    part_of,
    parts,
    resolve_layer,
    weight_layers,
)

ALL = [*sorted(MODELS), "torchvision/resnet18", "torchvision/mobilenet_v3_small"]


def build(name: str, size: int = 16) -> Normalized:
    """Small images keep the large architectures quick."""
    return build_model(
        name,
        num_classes=4,
        image_shape=(3, size, size),
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.25),
    )


def composed(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    for _, run in parts(model):
        inputs = run(inputs)
    return inputs


class OnePiece(nn.Module):
    """A network that nobody can take apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 5)
        self.second = nn.Linear(5, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.first(inputs.flatten(1))
        return self.second(hidden) * hidden.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_parts_are_the_forward_pass(name, dtype):
    model = build(name).to(dtype).eval()
    inputs = torch.rand(2, 3, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(composed(model, inputs), model(inputs))


@pytest.mark.parametrize("name", ["small_resnet", "small_preact_resnet", "resnet4b"])
def test_parts_are_the_forward_pass_in_train_mode_with_gradients(name):
    model = build(name).double().train()
    inputs = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    expected = torch.autograd.grad(model(inputs).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(composed(model, inputs).square().sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_part_of_finds_the_part_that_a_layer_is_in(name):
    """Changing a layer changes the output of the part named for it, and of none before it."""
    model = build(name).eval()
    layers = weight_layers(model)
    positions = [part_of(model, layer) for layer in layers]
    assert positions == sorted(positions)
    assert min(positions) == 1  # part 0 normalises
    names = list(layers)
    inputs = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        for layer in {names[0], names[len(names) // 2], names[-1]}:
            before = []
            features = inputs
            for _, run in parts(model):
                features = run(features)
                before.append(features)
            old = layers[layer].weight.clone()
            layers[layer].weight.mul_(1.5)
            features, changed = inputs, []
            for index, (_, run) in enumerate(parts(model)):
                features = run(features)
                if not torch.equal(features, before[index]):
                    changed.append(index)
            layers[layer].weight.copy_(old)
            assert changed[0] == part_of(model, layer)


def test_suffix_on_cached_activations_is_the_forward_pass():
    model = build("small_resnet").eval()
    inputs = torch.rand(3, 3, 16, 16)
    position = part_of(model, "layer2.0.conv2")
    pieces = [run for _, run in parts(model)]
    with torch.no_grad():
        features = inputs
        for run in pieces[:position]:
            features = run(features)
        resolve_layer(model, "layer2.0.conv2").weight.mul_(0.3)
        for run in pieces[position:]:
            features = run(features)
        assert torch.equal(features, model(inputs))


def test_nested_sequentials_with_a_shared_module_are_flattened():
    activation = nn.Tanh()
    network = nn.Sequential(
        nn.Sequential(nn.Flatten(), activation, nn.Linear(12, 6), activation),
        nn.Sequential(nn.Linear(6, 6), activation, Tail()),
    )
    names = [name for name, _ in parts(network)]
    assert names == ["0.0", "0.1", "0.2", "0.3", "1.0", "1.1", "1.2"]
    inputs = torch.rand(2, 3, 2, 2)
    assert torch.equal(composed(network, inputs), network(inputs))
    assert part_of(network, "1.0") == 4
    assert part_of(network, "1.2.last") == 6


class Tail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(inputs)


def test_a_sequential_with_its_own_forward_is_not_flattened():
    class Doubled(nn.Sequential):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(inputs)

    network = Doubled(nn.Flatten(), nn.Linear(12, 3))
    inputs = torch.rand(2, 3, 2, 2)
    assert len(parts(network)) == 1
    assert torch.equal(composed(network, inputs), network(inputs))


def test_an_architecture_inside_a_sequential_keeps_its_names():
    inner = build("resnet4b").network
    network = nn.Sequential(nn.Identity(), inner)
    assert [name for name, _ in parts(network)][:3] == ["0", "1.conv1", "1.layer1.0"]
    assert part_of(network, "1.layer1.0.shortcut.0") == 2


def test_any_other_network_is_one_part():
    model = Normalized(OnePiece(), mean=(0.5,) * 3, std=(0.5,) * 3)
    inputs = torch.rand(2, 3, 2, 2)
    assert len(parts(model)) == 2
    assert torch.equal(composed(model, inputs), model(inputs))
    assert part_of(model, "first") == part_of(model, "second") == 1
    lone = nn.Linear(3, 2)
    assert weight_layers(lone) == {"": lone}
    assert part_of(lone, "") == 0


def test_parts_see_through_wrappers():
    model = build("small_resnet")
    assert [n for n, _ in parts(nn.DataParallel(model))] == [n for n, _ in parts(model)]


def test_layer_names_are_bare_and_exact():
    model = build("resnet18")
    layers = weight_layers(model)
    assert list(layers)[:2] == ["conv1", "layer1.0.conv1"]
    assert list(layers)[-1] == "linear"
    assert resolve_layer(model, "conv1") is model.network.conv1
    with pytest.raises(UnknownNameError, match=r"did you mean 'layer2\.1\.conv2'"):
        resolve_layer(model, "layer2.1.convv2")
    with pytest.raises(UnknownNameError, match="unknown layer"):
        resolve_layer(model, "layer2")
    with pytest.raises(UnknownNameError, match="unknown layer"):
        part_of(model, "bn1")


def test_dead_modules_are_not_ranked():
    network = nn.Module()
    network.conv1 = nn.Conv2d(3, 3, 1)
    network.sub_block1 = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert list(weight_layers(network)) == ["conv1"]
    assert batch_norms(network) == {}


def test_batch_norms_are_found_by_name():
    norms = batch_norms(build("small_preact_resnet"))
    assert next(iter(norms)) == "layer1.0.bn1"
    assert list(norms)[-1] == "bn"
    assert len(norms) == 7
