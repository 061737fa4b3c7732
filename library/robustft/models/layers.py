"""Names, layers and parts of a model: what RiFT ranks, freezes and caches."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustft.errors import UnknownNameError
from robustft.models.normalize import Normalized, bare, unwrapped

__all__ = ["Part", "batch_norms", "part_of", "parts", "resolve_layer", "weight_layers"]

Part = tuple[str, Callable[[Tensor], Tensor]]
"""(names joined by "+" of the bare modules it holds, tensor -> tensor)."""

NORMALIZE = "normalize"
"""Name of the first part of a normalised model."""

DEAD = "sub_block"
"""Modules with this in their name exist in TRADES-family networks and are never used (RiFT, the
authors' code, skips them by the same test)."""

WEIGHT_LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolution and linear modules that criticality ranks, by bare name, in order.

    Names are those of the network inside normalisation and wrappers ("layer2.1.conv2"), in
    ``named_modules`` order. Modules that the network never uses ("sub_block") are left out.
    """
    return {
        name: module
        for name, module in bare(model).named_modules()
        if isinstance(module, WEIGHT_LAYERS) and DEAD not in name
    }


def resolve_layer(model: nn.Module, name: str) -> nn.Module:
    """Return the weight layer that is called exactly ``name``.

    Note:
        The authors' code matches substrings, so that "conv1" selects every ``conv1`` of the
        network. Here it selects the stem alone.

    Raises:
        UnknownNameError: no weight layer is called that; the nearest name is proposed.
    """
    layers = weight_layers(model)
    if name not in layers:
        raise UnknownNameError("layer", name, layers)
    return layers[name]


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return all batch-norm modules (SyncBatchNorm included) by bare name, in order."""
    return {
        name: module
        for name, module in bare(model).named_modules()
        if isinstance(module, _BatchNorm) and DEAD not in name
    }


@runtime_checkable
class HasParts(Protocol):
    """An architecture that knows how its forward pass falls into pieces."""

    def parts(self) -> list[Part]:
        """Return the pieces in the order in which they are applied."""


def parts(model: nn.Module) -> list[Part]:
    """Return the whole model as a sequence of parts; applying them in turn *is* the forward pass.

    Composition gives the forward pass bit for bit, in either mode. The first part of a normalised
    model is "normalize"; each further one is named after the bare modules that it holds, joined by
    "+" ("conv1+bn1", "layer1.0", "linear"). Architectures of robustft, ``nn.Sequential`` (flattened
    recursively) and torchvision's ResNets are taken apart; any other network is one part, whose
    name is empty.

    A part works on the model's own modules, so it follows their weights, mode and device. Hooks of
    the model itself and of a flattened ``nn.Sequential`` do not run when parts are applied.

    Example:
        >>> from robustft.models import build_model
        >>> model = build_model("small_resnet", num_classes=10, image_shape=(1, 28, 28),
        ...                     mean=(0.286,), std=(0.353,))
        >>> [name for name, _ in parts(model)]
        ['normalize', 'conv1+bn1', 'layer1.0', 'layer2.0', 'layer3.0', 'linear']
    """
    model = unwrapped(model)
    if isinstance(model, Normalized):
        return [(NORMALIZE, model.normalize), *_network_parts(bare(model))]
    return _network_parts(model)


def part_of(model: nn.Module, layer_name: str) -> int:
    """Return the position in ``parts(model)`` of the part that holds a weight layer.

    Raises:
        UnknownNameError: no weight layer is called that; the nearest name is proposed.
    """
    resolve_layer(model, layer_name)
    normalized = isinstance(unwrapped(model), Normalized)
    for index, (names, _) in enumerate(parts(model)):
        if normalized and index == 0:
            continue
        for name in names.split("+"):
            if name in ("", layer_name) or layer_name.startswith(f"{name}."):
                return index
    raise AssertionError(f"no part holds layer {layer_name!r}: parts() is incomplete")


def _network_parts(network: nn.Module) -> list[Part]:
    if isinstance(network, HasParts):
        return network.parts()
    if type(network).forward is nn.Sequential.forward:
        return [
            (_inside(position, names), run)
            # Not named_children(), which leaves out the second use of a shared module.
            for position, child in network._modules.items()
            if child is not None
            for names, run in _network_parts(child)
        ]
    if _is_torchvision_resnet(network):
        return _torchvision_resnet_parts(network)
    return [("", network)]


def _inside(position: str, names: str) -> str:
    """Return the joined ``names`` of a child's modules as the parent calls them."""
    return "+".join(f"{position}.{name}" if name else position for name in names.split("+"))


def _is_torchvision_resnet(network: nn.Module) -> bool:
    # By the name of the module, so that nobody pays for importing torchvision; a subclass with
    # a forward of its own is not taken apart.
    forward = type(network).forward
    return (forward.__module__, forward.__qualname__) == (
        "torchvision.models.resnet",
        "ResNet.forward",
    )


def _torchvision_resnet_parts(network: Any) -> list[Part]:
    blocks = [
        (f"{stage}.{position}", block)
        for stage in ("layer1", "layer2", "layer3", "layer4")
        for position, block in getattr(network, stage).named_children()
    ]
    return [
        ("conv1+bn1+relu+maxpool", partial(_torchvision_stem, network)),
        *blocks,
        ("avgpool+fc", partial(_torchvision_head, network)),
    ]


def _torchvision_stem(network: Any, inputs: Tensor) -> Tensor:
    features: Tensor = network.maxpool(network.relu(network.bn1(network.conv1(inputs))))
    return features


def _torchvision_head(network: Any, features: Tensor) -> Tensor:
    logits: Tensor = network.fc(network.avgpool(features).flatten(1))
    return logits
