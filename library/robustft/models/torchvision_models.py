"""Any classification model of torchvision, without its downloadable weights."""

from typing import Any

from torch import nn

from robustft.errors import ConfigError, UnknownNameError

__all__ = ["PREFIX", "torchvision_model", "torchvision_names"]

PREFIX = "torchvision/"

CHANNELS = 3
"""Colour channels that every torchvision classification model takes."""

ONE_OUTPUT: dict[str, dict[str, Any]] = {
    # These two return a tuple of outputs while training unless the auxiliary heads are off, and
    # warn unless init_weights is given.
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def torchvision_names() -> list[str]:
    """Return the names that ``torchvision_model`` accepts, without the prefix."""
    import torchvision.models  # a second of import time that only its users should pay

    return sorted(torchvision.models.list_models(module=torchvision.models))


def torchvision_model(
    name: str, *, num_classes: int, image_shape: tuple[int, int, int]
) -> nn.Module:
    """Return ``torchvision.models.<name>`` with fresh weights.

    Args:
        name: torchvision's own name, such as "resnet18" or "vit_b_16".
        num_classes: width of the last layer.
        image_shape: (3, height, width); transformers are built for that size.

    Raises:
        UnknownNameError: torchvision has no classification model of that name.
        ConfigError: the images are not colour images, or the model refuses their size.
    """
    import torchvision.models

    known = torchvision_names()
    if name not in known:
        raise UnknownNameError("architecture", PREFIX + name, [PREFIX + other for other in known])
    channels, height, width = image_shape
    if channels != CHANNELS:
        raise ConfigError(
            f"{PREFIX}{name} takes images with {CHANNELS} channels, these have {channels}: "
            "choose an architecture of robustft, such as small_resnet"
        )
    arguments = dict(ONE_OUTPUT.get(name, {}))
    if name.startswith("vit_"):
        if height != width:
            raise ConfigError(f"{PREFIX}{name} takes square images, these are {height}x{width}")
        arguments["image_size"] = height
    elif name.startswith("maxvit_"):
        arguments["input_size"] = (height, width)
    try:
        model: nn.Module = torchvision.models.get_model(
            name, weights=None, num_classes=num_classes, **arguments
        )
    except (ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise ConfigError(f"{PREFIX}{name} refuses images of {height}x{width}: {error}") from error
    return model
