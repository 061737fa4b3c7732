"""Architectures: sizes and names that released checkpoints rely on, and seeded weights."""

import pytest
import torch
from torch import nn

from robustft.errors import ConfigError, UnknownNameError
from robustft.models import (
    MODELS,
    Normalized,
    bare,
    batch_norms,
    build_model,
    state_digest,
    weight_layers,
)
from robustft.models.preact_resnet import PreActResNet, preact_resnet18
from robustft.models.resnet import pooled_size

DEAD_WRN_PARAMETERS = 2_102_112  # sub_block1 of the authors' class, which ours leaves out


def build(name: str, *, num_classes: int = 10, size: int = 32, channels: int = 3, seed: int = 0):
    return build_model(
        name,
        num_classes=num_classes,
        image_shape=(channels, size, size),
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        seed=seed,
    )


def giga_multiply_adds(model: nn.Module, size: int) -> float:
    """Count on the meta device, where a forward pass costs nothing."""
    total = [0]

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        total[0] += module.weight.numel() * output[0, 0].numel()

    for layer in weight_layers(model).values():
        layer.register_forward_hook(count)
    model.to("meta").eval()(torch.empty(1, 3, size, size, device="meta"))
    return total[0] / 1e9


@pytest.mark.parametrize(
    ("name", "size", "num_classes", "parameters", "layers", "norms", "gmac"),
    [
        ("resnet18", 32, 10, 11_173_962, 21, 20, 0.555),
        ("resnet34", 32, 10, 21_282_122, 37, 36, 1.159),
        ("wrn34_10", 32, 10, 48_262_586 - DEAD_WRN_PARAMETERS, 35, 31, 6.659),
        ("resnet18", 64, 200, 11_578_632, 21, 20, 2.222),
        ("wrn34_10", 64, 200, 48_768_376 - DEAD_WRN_PARAMETERS, 35, 31, 26.636),
        ("resnet4b", 32, 10, 123_734, 13, 0, 0.003),
        ("cnn_a", 32, 10, 214_918, 4, 0, 0.001),
    ],
)
def test_known_sizes(name, size, num_classes, parameters, layers, norms, gmac):
    """The table of the RiFT notes, measured on the authors' classes."""
    model = build(name, num_classes=num_classes, size=size)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(weight_layers(model)) == layers
    assert len(batch_norms(model)) == norms
    assert round(giga_multiply_adds(model, size), 3) == gmac


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("resnet18", "layer2.1.conv2"),
        ("resnet18", "layer3.1.conv2"),
        ("resnet34", "layer2.3.conv2"),
        ("resnet34", "layer3.5.conv2"),
        ("wrn34_10", "block1.layer.3.conv2"),
        ("wrn34_10", "block1.layer.2.conv2"),
    ],
)
def test_the_published_choices_are_layers(name, chosen):
    layers = weight_layers(build(name))
    assert chosen in layers
    assert all(layer.bias is None for n, layer in layers.items() if isinstance(layer, nn.Conv2d))


def test_names_of_released_checkpoints():
    assert {"conv1.weight", "bn1.running_mean", "layer2.0.shortcut.0.weight", "linear.bias"} <= set(
        bare(build("resnet18")).state_dict()
    )
    assert {"layer2.0.shortcut.1.num_batches_tracked"} <= set(bare(build("resnet18")).state_dict())
    names = set(bare(build("wrn34_10")).state_dict())
    assert {"block2.layer.0.convShortcut.weight", "block1.layer.4.bn2.bias", "bn1.weight"} <= names
    assert {"fc.weight", "conv1.weight"} <= names
    assert not any("sub_block" in name for name in names)


def test_classifier_width_at_64_pixels_is_a_flattened_2x2_map():
    assert bare(build("resnet18", size=64)).linear.in_features == 2048
    assert bare(build("wrn34_10", size=64)).fc.in_features == 2560


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 20), (1, 8)])
def test_every_architecture_takes_other_sizes(name, channels, size):
    model = build(name, channels=channels, size=size, num_classes=7).to("meta").eval()
    assert model(torch.empty(2, channels, size, size, device="meta")).shape == (2, 7)


def test_oblong_images():
    model = build_model(
        "small_resnet", num_classes=3, image_shape=(1, 64, 40), mean=(0.5,), std=(0.5,)
    )
    assert model.eval()(torch.rand(2, 1, 64, 40)).shape == (2, 3)


def test_pooled_size_follows_the_papers_formula():
    for size in (32, 64, 96, 224):
        rows, columns, window = pooled_size((3, size, size), (1, 2, 2, 2))
        assert (rows, columns, window) == (size // 32, size // 32, (4, 4))
    assert pooled_size((1, 28, 28), (1, 2, 2), 8) == (1, 1, (7, 7))


def test_small_resnet_costs_what_the_notes_say():
    for name in ("small_resnet", "small_preact_resnet"):
        model = build_model(name, num_classes=10, image_shape=(1, 28, 28), mean=(0.5,), std=(0.5,))
        assert len(weight_layers(model)) == 10
        counted = sum(
            layer.weight.numel() * cells
            for layer, cells in zip(
                weight_layers(model).values(),
                (196, 196, 196, 49, 49, 49, 16, 16, 16, 1),
                strict=True,
            )
        )
        assert 2_000_000 < counted < 3_000_000


def test_seed_alone_decides_the_weights_and_the_global_state_is_untouched():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = build("small_resnet")
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(2)
    assert state_digest(build("small_resnet").state_dict()) == state_digest(first.state_dict())
    other = build("small_resnet", seed=1)
    assert state_digest(other.state_dict()) != state_digest(first.state_dict())


def test_wide_resnet_starts_as_the_authors_do():
    network = bare(build("wrn34_10"))
    assert not network.fc.bias.any()
    conv = network.block2.layer[1].conv1.weight
    assert conv.std().item() == pytest.approx((2 / (9 * 320)) ** 0.5, rel=0.01)
    assert conv.mean().item() == pytest.approx(0, abs=1e-4)


def test_softplus_is_in_the_blocks_and_not_before_the_pooling():
    shape = (3, 8, 8)
    network = preact_resnet18(num_classes=2, image_shape=shape, activation="softplus").eval()
    plain = preact_resnet18(num_classes=2, image_shape=shape).eval()
    plain.load_state_dict(network.state_dict())
    negative = -torch.rand(2, 512, 1, 1)
    assert torch.equal(network.head(negative), network.linear.bias.expand(2, 2))
    block_inputs = torch.randn(2, 64, 8, 8)
    assert not torch.equal(network.layer1(block_inputs), plain.layer1(block_inputs))
    with pytest.raises(UnknownNameError, match="did you mean 'softplus'"):
        PreActResNet(num_classes=2, image_shape=shape, num_blocks=(1,) * 4, activation="softpluss")


def test_preactivation_shortcut_sees_the_activated_input():
    """A hand calculation of one block that changes its width, with all BN at identity."""
    block = preact_resnet18(num_classes=2, image_shape=(3, 8, 8)).layer2[0].eval()
    with torch.no_grad():
        block.conv2.weight.zero_()
    inputs = -torch.rand(1, 64, 4, 4)  # ReLU makes all of it zero
    assert not block(inputs).any()
    assert block(-inputs).any()


def test_normalisation_is_the_first_layer_and_travels_in_the_state():
    network = nn.Flatten()
    model = Normalized(network, mean=(0.5, 0.25), std=(0.5, 2.0))
    inputs = torch.full((1, 2, 1, 1), 0.75)
    assert model(inputs).tolist() == [[0.5, 0.25]]
    assert set(model.state_dict()) == {"mean", "std"}
    assert model.mean.shape == (1, 2, 1, 1)
    assert bare(model) is network


def test_bare_sees_through_ddp():
    model = build("small_resnet")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert bare(wrapped) is model.network
        assert list(weight_layers(wrapped)) == list(weight_layers(model))
    finally:
        torch.distributed.destroy_process_group()


def test_bare_sees_through_wrappers():
    model = build("small_resnet")
    assert bare(nn.DataParallel(model)) is model.network
    assert bare(torch.compile(model)) is model.network
    assert bare(nn.DataParallel(torch.compile(model))) is model.network
    model.network = torch.compile(model.network)
    assert bare(model) is model.network._orig_mod


@pytest.mark.parametrize(
    ("name", "guess"),
    [("resnet81", "resnet18"), ("torchvision/resnet_18", "torchvision/resnet18")],
)
def test_unknown_architectures_get_the_nearest_name(name, guess):
    with pytest.raises(UnknownNameError, match=f"did you mean '{guess}'"):
        build(name)


def test_sizes_that_cannot_be_built_get_a_sentence():
    with pytest.raises(ConfigError, match="give one each"):
        build_model("resnet18", num_classes=2, image_shape=(3, 32, 32), mean=(0.5,), std=(0.5,))
    with pytest.raises(ConfigError, match="must be positive"):
        build("resnet18", num_classes=0)
    with pytest.raises(ConfigError, match="above 0"):
        Normalized(nn.Flatten(), mean=(0.5,), std=(0.0,))
    with pytest.raises(ConfigError, match="one number per channel"):
        Normalized(nn.Flatten(), mean=(0.5, 0.5), std=(1.0,))
    with pytest.raises(ConfigError, match="3 channels, these have 1"):
        build("torchvision/resnet18", channels=1)
    with pytest.raises(ConfigError, match="refuses images of 30x30"):
        build("torchvision/vit_b_16", size=30)


@pytest.mark.parametrize("name", ["resnet18", "vit_b_32", "mobilenet_v3_small", "googlenet"])
def test_torchvision_models_build_and_run_small(name):
    model = build(f"torchvision/{name}", num_classes=5, size=32).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 32, 32)).shape == (1, 5)
