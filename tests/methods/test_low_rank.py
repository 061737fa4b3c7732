"""The low-rank branch: its shape, where it sits, that it changes nothing and leaves no trace."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer, mobilenet_v2, resnet18, resnet50

from robustft.errors import ConfigError, UnknownNameError
from robustft.methods.autolora import (
    LowRankAttention,
    LowRankConv2d,
    LowRankLinear,
    TwoPaths,
    add_low_rank_branches,
    export_plain,
)
from robustft.methods.low_rank import low_rank_layers
from robustft.models import Normalized, build_model
from robustft.models.wide_resnet import WideResNet

CLASSES = 3


def vision_transformer() -> nn.Module:
    network = VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        num_classes=CLASSES,
    )
    nn.init.normal_(network.heads.head.weight)  # torchvision's is zero and hides everything
    return network


def own(name: str) -> Callable[[], nn.Module]:
    return lambda: build_model(
        name, num_classes=CLASSES, image_shape=(3, 32, 32), mean=(0.4,) * 3, std=(0.2,) * 3
    )


def wide_resnet() -> nn.Module:
    network = WideResNet(num_classes=CLASSES, image_shape=(3, 32, 32), depth=10, widen_factor=1)
    return Normalized(network, (0.4,) * 3, (0.2,) * 3)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "small_resnet": own("small_resnet"),
    "small_preact_resnet": own("small_preact_resnet"),
    "wide_resnet": wide_resnet,
    "resnet4b": own("resnet4b"),
    "cnn_a": own("cnn_a"),
    "torchvision/resnet18": lambda: resnet18(num_classes=CLASSES),
    "torchvision/vit": vision_transformer,
}
LAYERS = {
    "small_resnet": 8,
    "small_preact_resnet": 8,
    "wide_resnet": 8,
    "resnet4b": 11,
    "cnn_a": 2,
    "torchvision/resnet18": 19,
    "torchvision/vit": 6,
}
"""Convolutions (and hidden linear layers) inside: blocks and shortcuts, or attention and MLP."""


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def grown(model: nn.Module) -> nn.Module:
    """Return ``model`` with branches that do something."""
    draw = torch.Generator().manual_seed(2)
    add_low_rank_branches(model, 2, generator=draw)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
    return model.eval()


def natural(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return TwoPaths(model, nn.Identity()).eval().natural(inputs)


# One layer.


def test_a_branch_of_a_convolution_is_the_published_one() -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect")
    layer = LowRankConv2d(conv, rank=2)
    inputs = torch.rand(2, 4, 9, 9)
    assert torch.equal(layer(inputs, branch=True), conv(inputs))
    assert layer.lora_A_nat.shape == (2 * 3, 4 * 3)
    assert layer.lora_B_nat.shape == (6 * 3, 2 * 3)
    assert not layer.lora_B_nat.any()
    layer.lora_B_nat.data.normal_()
    product = (layer.lora_B_nat @ layer.lora_A_nat).detach()
    expected = copy.deepcopy(conv)
    for channel in range(6):
        # Rows 3 o to 3 o + 2 hold the kernel of output channel o, in reading order.
        kernel = product[3 * channel : 3 * channel + 3].flatten() / 2
        expected.weight.data[channel] += kernel.view(4, 3, 3)
    torch.testing.assert_close(layer(inputs, branch=True), expected(inputs))
    assert torch.equal(layer(inputs, branch=False), conv(inputs))
    assert torch.equal(layer(inputs), conv(inputs))


def test_a_branch_of_a_linear_layer() -> None:
    linear = nn.Linear(5, 7)
    layer = LowRankLinear(linear, rank=3)
    inputs = torch.rand(2, 5)
    assert torch.equal(layer(inputs, branch=True), linear(inputs))
    assert (layer.lora_A_nat.shape, layer.lora_B_nat.shape) == ((3, 5), (7, 3))
    layer.lora_B_nat.data.normal_()
    change = inputs @ layer.lora_A_nat.T @ layer.lora_B_nat.T / 3
    torch.testing.assert_close(layer(inputs, branch=True), linear(inputs) + change)
    assert torch.equal(layer(inputs, branch=False), linear(inputs))


@pytest.mark.parametrize("gradients", [True, False])
def test_a_branch_of_an_attention(gradients: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    layer = LowRankAttention(copy.deepcopy(attention), rank=2).eval()
    inputs = torch.rand(2, 5, 8)
    layer.lora_B_nat.data.normal_()
    layer.lora_B_nat_out.data.normal_()
    expected = copy.deepcopy(attention)
    expected.in_proj_weight.data += (layer.lora_B_nat @ layer.lora_A_nat).detach() / 2
    expected.out_proj.weight.data += (layer.lora_B_nat_out @ layer.lora_A_nat_out).detach() / 2
    with torch.set_grad_enabled(gradients):
        outputs, _ = layer(inputs, inputs, inputs, branch=True, need_weights=False)
        wanted, _ = expected(inputs, inputs, inputs, need_weights=False)
        torch.testing.assert_close(outputs, wanted)
        plain, weights = layer(inputs, inputs, inputs)
        torch.testing.assert_close(plain, attention(inputs, inputs, inputs)[0])
        assert weights is not None


def test_factors_are_standard_normal_and_follow_the_generator() -> None:
    layers = [
        LowRankConv2d(nn.Conv2d(64, 64, 3), generator=torch.Generator().manual_seed(seed))
        for seed in (5, 5, 6)
    ]
    first, same, other = (layer.lora_A_nat for layer in layers)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert first.std().item() == pytest.approx(1, abs=0.03)
    assert first.mean().item() == pytest.approx(0, abs=0.03)


def test_a_fresh_branch_learns_through_its_second_factor_only() -> None:
    layer = LowRankConv2d(nn.Conv2d(4, 4, 3), rank=2)
    layer(torch.rand(2, 4, 5, 5), branch=True).square().sum().backward()
    assert layer.lora_A_nat.grad is not None
    assert layer.lora_B_nat.grad is not None
    assert not layer.lora_A_nat.grad.any()
    assert layer.lora_B_nat.grad.all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LowRankConv2d(nn.Conv2d(4, 4, 3), rank=0), "rank = 0: must be a whole number"),
        (lambda: LowRankConv2d(nn.Conv2d(4, 9, 3), rank=5), "rank = 5: .* from 1 to 4"),
        (lambda: LowRankLinear(nn.Linear(9, 3), rank=4), "rank = 4: .* from 1 to 3"),
        (lambda: LowRankLinear(nn.Linear(9, 3), rank=1.5), "rank = 1.5"),  # type: ignore[arg-type]
        (lambda: LowRankConv2d(nn.Conv2d(8, 8, 3, groups=4), rank=2), "in 4 groups"),
        (lambda: LowRankConv2d(nn.Conv2d(8, 8, (1, 7)), rank=2), "1x7 convolution"),
        (lambda: LowRankAttention(nn.MultiheadAttention(8, 2), rank=9), "from 1 to 8"),
        (
            lambda: LowRankAttention(nn.MultiheadAttention(8, 2, kdim=4), rank=2),
            "width of their own",
        ),
    ],
)
def test_layers_that_can_have_no_branch(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


# A whole network.


@pytest.mark.parametrize("name", NETWORKS)
def test_fresh_branches_change_nothing(name: str) -> None:
    model = NETWORKS[name]().eval()
    with torch.no_grad():
        before = model(images())
        assert add_low_rank_branches(model, 2) is model
        assert len(low_rank_layers(model)) == LAYERS[name]
        assert torch.equal(model(images()), before)
        assert torch.equal(natural(model, images()), before)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_natural_path_is_the_network_with_other_weights(name: str) -> None:
    model = grown(NETWORKS[name]())
    other = NETWORKS[name]().eval()
    state = export_plain(model)
    for prefix, layer in low_rank_layers(model).items():
        for inside, delta in layer.deltas().items():
            state[f"{prefix}.{inside}"] = state[f"{prefix}.{inside}"] + delta.detach()
    other.load_state_dict(state)
    with torch.no_grad():
        through_branch = natural(model, images())
        torch.testing.assert_close(through_branch, other(images()), rtol=1e-4, atol=1e-5)
        assert (through_branch - model(images())).abs().max() > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_export_is_the_plain_path(name: str) -> None:
    fresh = NETWORKS[name]().eval()
    model = grown(copy.deepcopy(fresh))
    for parameter in model.parameters():
        parameter.data.mul_(1.01)  # not what the fresh network has
    exported = export_plain(model)
    assert exported.keys() == fresh.state_dict().keys()
    fresh.load_state_dict(exported, strict=True)
    with torch.no_grad():
        assert torch.equal(fresh(images()), model(images()))


@pytest.mark.parametrize(
    ("build", "backbone", "rank", "percent"),
    [
        (resnet18, 11_176_512, 2, 1.19),
        (resnet18, 11_176_512, 4, 2.38),
        (resnet18, 11_176_512, 6, 3.57),
        (resnet18, 11_176_512, 8, 4.76),
        (resnet18, 11_176_512, 10, 5.94),
        (resnet18, 11_176_512, 16, 9.51),
        (resnet50, 23_508_032, 2, 0.93),
        (resnet50, 23_508_032, 4, 1.86),
        (resnet50, 23_508_032, 6, 2.79),
        (resnet50, 23_508_032, 8, 3.72),
        (resnet50, 23_508_032, 10, 4.66),
        (resnet50, 23_508_032, 16, 7.45),
    ],
)
def test_counts_are_the_published_ones(
    build: Callable[[], Any], backbone: int, rank: int, percent: float
) -> None:
    model = on_meta(build)
    backbone_and_head = sum(p.numel() for p in model.parameters())
    assert backbone_and_head - sum(p.numel() for p in model.fc.parameters()) == backbone
    add_low_rank_branches(model, rank)
    extra = branch_parameters(model)
    assert sum(p.numel() for p in model.parameters()) == backbone_and_head + extra
    assert round(100 * extra / backbone, 2) == percent
    assert extra == {resnet18: 531_456, resnet50: 875_520}[build] * rank / 8


@pytest.mark.parametrize(
    ("build", "backbone", "layers", "percent"),
    [(resnet18, 11_176_512, (8, 19), 2.47), (resnet50, 23_508_032, (12, 52), 0.91)],
)
def test_the_last_blocks_are_where_the_published_branch_works(
    build: Callable[[], Any], backbone: int, layers: tuple[int, int], percent: float
) -> None:
    last, every = on_meta(build), on_meta(build)
    add_low_rank_branches(last, blocks="last")
    add_low_rank_branches(every)
    assert (len(low_rank_layers(last)), len(low_rank_layers(every))) == layers
    assert round(100 * branch_parameters(last) / backbone, 2) == percent
    blocks = {resnet18: (1, 1, 1, 1), resnet50: (2, 3, 5, 2)}[build]
    places = {name.rpartition(".")[0] for name in low_rank_layers(last)}
    assert places == {f"layer{stage + 1}.{block}" for stage, block in enumerate(blocks)}


def test_stem_and_head_have_no_branch() -> None:
    model = add_low_rank_branches(NETWORKS["small_resnet"](), 2)
    assert list(low_rank_layers(model)) == [
        "network.layer1.0.conv1",
        "network.layer1.0.conv2",
        "network.layer2.0.conv1",
        "network.layer2.0.conv2",
        "network.layer2.0.shortcut.0",
        "network.layer3.0.conv1",
        "network.layer3.0.conv2",
        "network.layer3.0.shortcut.0",
    ]
    transformer = add_low_rank_branches(vision_transformer(), 2)
    block = "encoder.layers.encoder_layer_1"
    assert list(low_rank_layers(transformer))[3:] == [
        f"{block}.self_attention",
        f"{block}.mlp.0",
        f"{block}.mlp.3",
    ]


def test_a_head_that_is_not_last_can_be_named() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3), nn.Linear(3, 3))
    add_low_rank_branches(network, 2, head="2")
    assert list(low_rank_layers(network)) == ["3"]


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (lambda: resnet18(), {"rank": 65}, r"layer layer1.0.conv1: rank = 65: .* from 1 to 64"),
        (lambda: resnet18(), {"rank": 0}, "rank = 0"),
        (lambda: mobilenet_v2(), {}, r"layer features\.1\.conv\.0\.0: .* in 32 groups"),
        (lambda: grown(own("small_resnet")()), {}, "has low-rank branches already"),
        (vision_transformer, {"rank": 2, "blocks": "last"}, "or blocks = 'all'"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), {}, "no layer that could get"),
        (
            lambda: nn.Sequential(
                nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 1, 4), nn.Linear(4, 2)
            ),
            {"rank": 2},
            "layer 1.self_attn: a MultiheadAttention in a TransformerEncoderLayer",
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 2)),
            {"rank": 2},
            "layer 1: a Conv1d in a Sequential",
        ),
    ],
)
def test_networks_that_can_have_no_branch(
    build: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    model = build()
    before = list(model.state_dict())
    with pytest.raises(ConfigError, match=message):
        add_low_rank_branches(model, **options)
    assert list(model.state_dict()) == before


def test_a_head_that_nothing_is_called() -> None:
    with pytest.raises(UnknownNameError, match="unknown layer 'fcc': did you mean 'fc'"):
        add_low_rank_branches(resnet18(), head="fcc")


def on_meta(build: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return build()


def branch_parameters(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "lora" in name)
