"""AutoLoRa's branch: a low-rank change of each weight inside the network, used or not per forward.

Xu, Zhang, Kankanhalli, "AutoLoRa: A Parameter-Free Automated Robust Fine-Tuning Framework", 2024,
arXiv 2310.01818; shapes, initialisation and scaling are those of the authors' code.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from robustft.errors import ConfigError
from robustft.methods.fine_tuning import unwrapped_state
from robustft.models import bare, resolve_layer, weight_layers

__all__ = [
    "Blocks",
    "LowRankAttention",
    "LowRankConv2d",
    "LowRankLayer",
    "LowRankLinear",
    "add_low_rank_branches",
    "export_plain",
    "low_rank_layers",
]

Blocks = Literal["all", "last"]

BLOCK_CONVOLUTION = re.compile(r"(?P<stage>.+)\.(?P<block>\d+)\.conv\d+")
"""A convolution of a numbered residual block: "layer1.0.conv2", "block1.layer.4.conv1"."""

LOOKS_INSIDE = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Modules that read the weights of their attention instead of calling it."""


class LowRankConv2d(nn.Module):
    """A convolution and its branch: kernel W, or W + B A / rank.

    For a ``k x k`` kernel A is ``[rank * k, in_channels * k]``, standard normal, and B is
    ``[out_channels * k, rank * k]``, zeros; the product is reshaped, row by row, to
    ``[out_channels, in_channels, k, k]``. Its rank is thus up to ``rank * k``, and the branch has
    ``rank * k * k * (in_channels + out_channels)`` parameters.

    Args:
        conv: the convolution, with a square kernel and one group; becomes the child ``conv``.
        rank: 1 to min(in_channels, out_channels).
        generator: draws A; None is torch's own.

    Raises:
        ConfigError: the rank is out of range, the convolution grouped or its kernel not square.
    """

    def __init__(
        self, conv: nn.Conv2d, rank: int = 8, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        height, width = conv.kernel_size
        if conv.groups != 1:
            raise ConfigError(
                f"a convolution in {conv.groups} groups can have no low-rank branch: choose a "
                "network without grouped convolutions, such as a ResNet"
            )
        if height != width:
            raise ConfigError(
                f"a {height}x{width} convolution can have no low-rank branch: choose a network "
                "with square kernels, such as a ResNet"
            )
        _check_rank(rank, conv.in_channels, conv.out_channels)
        self.conv = conv
        self.rank = rank
        # The names are the authors', so that the entries of their checkpoints are called the same.
        self.lora_A_nat, self.lora_B_nat = _factors(
            (conv.out_channels * height, rank * height, conv.in_channels * height),
            like=conv.weight,
            generator=generator,
        )

    def deltas(self) -> dict[str, Tensor]:
        """Return what the branch adds to which parameter of ``conv``."""
        product = self.lora_B_nat @ self.lora_A_nat
        return {"weight": product.view(self.conv.weight.shape) / self.rank}

    def forward(self, inputs: Tensor, branch: bool = False) -> Tensor:
        """Return the convolution of ``inputs``, with the branch in its kernel or not."""
        outputs: Tensor = _run(self.conv, self.deltas() if branch else {}, inputs)
        return outputs


class LowRankLinear(nn.Module):
    """A linear layer and its branch: weight W, or W + B A / rank.

    A is ``[rank, in_features]``, standard normal; B is ``[out_features, rank]``, zeros.

    Args:
        linear: the layer; becomes the child ``linear``.
        rank: 1 to min(in_features, out_features).
        generator: draws A; None is torch's own.

    Raises:
        ConfigError: the rank is out of range.

    Note:
        The authors' code has no working branch for linear layers. This is the usual form, with the
        initialisation and the scaling of their convolutions.
    """

    def __init__(
        self, linear: nn.Linear, rank: int = 8, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        _check_rank(rank, linear.in_features, linear.out_features)
        self.linear = linear
        self.rank = rank
        self.lora_A_nat, self.lora_B_nat = _factors(
            (linear.out_features, rank, linear.in_features), like=linear.weight, generator=generator
        )

    def deltas(self) -> dict[str, Tensor]:
        """Return what the branch adds to which parameter of ``linear``."""
        return {"weight": self.lora_B_nat @ self.lora_A_nat / self.rank}

    def forward(self, inputs: Tensor, branch: bool = False) -> Tensor:
        """Return the layer's outputs, with the branch in its weight or not."""
        outputs: Tensor = _run(self.linear, self.deltas() if branch else {}, inputs)
        return outputs


class LowRankAttention(nn.Module):
    """``nn.MultiheadAttention`` and a branch for each of its two projections.

    The packed projection of queries, keys and values counts as the one linear layer, ``[3 d, d]``,
    that it is in other vision transformers; each projection has factors as in ``LowRankLinear``.

    Args:
        attention: self-attention of width d; becomes the child ``attention``.
        rank: 1 to d.
        generator: draws A; None is torch's own.

    Raises:
        ConfigError: the rank is out of range, or keys and values have widths of their own.
    """

    def __init__(
        self,
        attention: nn.MultiheadAttention,
        rank: int = 8,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        packed: Tensor | None = attention.in_proj_weight
        if packed is None:
            raise ConfigError(
                "an attention whose keys or values have a width of their own (kdim, vdim) can have "
                "no low-rank branch: choose a network with self-attention only"
            )
        width = attention.embed_dim
        _check_rank(rank, width, width)
        self.attention = attention
        self.rank = rank
        self.lora_A_nat, self.lora_B_nat = _factors(
            (3 * width, rank, width), like=packed, generator=generator
        )
        self.lora_A_nat_out, self.lora_B_nat_out = _factors(
            (width, rank, width), like=packed, generator=generator
        )

    def deltas(self) -> dict[str, Tensor]:
        """Return what the branch adds to which parameter of ``attention``."""
        return {
            "in_proj_weight": self.lora_B_nat @ self.lora_A_nat / self.rank,
            "out_proj.weight": self.lora_B_nat_out @ self.lora_A_nat_out / self.rank,
        }

    def forward(self, *inputs: Tensor, branch: bool = False, **options: Any) -> Any:
        """Return what ``attention`` returns, with the branch in its weights or not."""
        return _run(self.attention, self.deltas() if branch else {}, *inputs, **options)


LowRankLayer: TypeAlias = LowRankConv2d | LowRankLinear | LowRankAttention

WRAPPED: Mapping[type[nn.Module], str] = {
    LowRankConv2d: "conv",
    LowRankLinear: "linear",
    LowRankAttention: "attention",
}
"""Under what name each wrapper holds the layer that it wraps."""


def add_low_rank_branches(
    model: nn.Module,
    rank: int = 8,
    *,
    blocks: Blocks = "all",
    head: str | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Give the weights inside ``model`` a branch, in place, and return it.

    Every convolution and linear layer gets one but the first (stem, patch embedding) and the head:
    in a ResNet those are the convolutions of the residual blocks and of their shortcuts, in a
    vision transformer attention and MLP. Fresh branches change nothing.

    Args:
        model: a model without branches, with or without normalisation.
        rank: see ``LowRankConv2d``.
        blocks: "last": only ``convN`` of the last block of each stage, and no shortcut. That is
            where the branch works in the authors' code for 224 px, by a slip that the paper
            does not have.
        head: name of the classifier; None is the last convolution or linear layer.
        generator: draws the factors A; None is torch's own.

    Raises:
        UnknownNameError: no layer is called ``head``.
        ConfigError: a layer cannot have a branch of that rank, or the model has branches.
    """
    network = bare(model)
    if low_rank_layers(network):
        raise ConfigError("the model has low-rank branches already: give a plain one")
    wrappers: dict[str, LowRankLayer] = {}
    for name, layer in _layers_inside(network, head=head, blocks=blocks).items():
        parent = network.get_submodule(name.rpartition(".")[0])
        try:
            wrappers[name] = _wrap(layer, rank, generator, parent=parent)
        except ConfigError as error:
            raise ConfigError(f"layer {name}: {error}") from error
    for name, wrapper in wrappers.items():
        outside, _, last = name.rpartition(".")
        network.get_submodule(outside).add_module(last, wrapper)
    return model


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """Return the wrapped layers by the name of the wrapper inside ``model``, in order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (LowRankConv2d, LowRankLinear, LowRankAttention))
    }


def export_plain(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the model without its branches, which are dropped and not merged.

    It has the names that the model had before ``add_low_rank_branches``, and loads into it.
    """
    return unwrapped_state(model, WRAPPED)


def _layers_inside(network: nn.Module, *, head: str | None, blocks: Blocks) -> dict[str, nn.Module]:
    """Return the layers that get a branch, by name."""
    layers = weight_layers(network)
    if head is not None:
        resolve_layer(network, head)
    outside = {next(iter(layers), ""), head or next(reversed(layers), "")}
    attentions = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    inside = {
        name: layer
        for name, layer in layers.items()
        if name not in outside and name.rpartition(".")[0] not in attentions
    }
    inside |= attentions
    if blocks == "last":
        found = {name: BLOCK_CONVOLUTION.fullmatch(name) for name in inside}
        places = {name: (m["stage"], int(m["block"])) for name, m in found.items() if m}
        # Ascending, so that the last block of a stage is what the dictionary ends up with.
        last = dict(sorted(places.values()))
        inside = {name: inside[name] for name, place in places.items() if place in last.items()}
    if not inside:
        raise ConfigError(
            "the network has no layer that could get a low-rank branch: choose another, such as a "
            "ResNet" + (", or blocks = 'all'" if blocks == "last" else "")
        )
    return inside


def _wrap(
    layer: nn.Module, rank: int, generator: torch.Generator | None, *, parent: nn.Module
) -> LowRankLayer:
    if isinstance(layer, nn.Conv2d):
        return LowRankConv2d(layer, rank, generator=generator)
    if isinstance(layer, nn.Linear):
        return LowRankLinear(layer, rank, generator=generator)
    if isinstance(layer, nn.MultiheadAttention) and not isinstance(parent, LOOKS_INSIDE):
        return LowRankAttention(layer, rank, generator=generator)
    raise ConfigError(
        f"a {type(layer).__name__} in a {type(parent).__name__} can have no low-rank branch: "
        "choose a network of Conv2d and Linear layers, such as a ResNet or torchvision's vit_b_16"
    )


def _factors(
    sizes: tuple[int, int, int], *, like: Tensor, generator: torch.Generator | None
) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A ``[inner, columns]`` and B ``[rows, inner]``, whose product is zero."""
    rows, inner, columns = sizes
    # Drawn on the CPU, so that a seed means the same on every device.
    first = torch.randn(inner, columns, generator=generator)
    return nn.Parameter(first.to(like)), nn.Parameter(like.new_zeros(rows, inner))


def _run(layer: nn.Module, deltas: Mapping[str, Tensor], *inputs: Tensor, **options: Any) -> Any:
    if not deltas:
        return layer(*inputs, **options)
    weights = {name: layer.get_parameter(name) + delta for name, delta in deltas.items()}
    return functional_call(layer, weights, inputs, options)


def _check_rank(rank: int, inputs: int, outputs: int) -> None:
    largest = min(inputs, outputs)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= largest:
        raise ConfigError(
            f"rank = {rank!r}: must be a whole number from 1 to {largest}, the smaller width of a "
            f"layer from {inputs} to {outputs}"
        )
