"""Patch embeddings of image transformers: what they are, and logits with others in their place."""

from typing import Protocol, cast

from torch import Tensor, nn

from robustft.errors import ConfigError
from robustft.models.normalize import Normalized, bare, unwrapped

__all__ = ["Embedded", "patch_model"]


class Embedded(Protocol):
    """A model whose first layer makes embeddings, as :class:`robustft.models.text.TextModel`."""

    def embed(self, inputs: Tensor) -> Tensor:
        """Return embeddings ``[n, length, width]`` of a batch, no positions added yet."""

    def from_embeddings(self, embeddings: Tensor, inputs: Tensor) -> Tensor:
        """Return logits ``[n, classes]`` with ``embeddings`` in place of the batch's own."""


def patch_model(model: nn.Module) -> Embedded:
    """Return the patch embeddings of an image model, pixels in [0, 1] -> logits.

    Any model that offers ``embed`` and ``from_embeddings`` has them, or the network that it
    normalises for, and the vision transformers of torchvision.

    Raises:
        ConfigError: the model is none of these.
    """
    model, network = unwrapped(model), bare(model)
    if _offers(model):
        return cast(Embedded, model)
    if isinstance(model, Normalized) and _offers(network):
        return _Inside(model, cast(Embedded, network))
    projection = getattr(network, "conv_proj", None)
    if isinstance(projection, nn.Conv2d) and hasattr(network, "class_token"):
        return _Projected(model, projection)
    raise ConfigError(
        f"{type(network).__name__} has no patch embeddings that are known: perturb pixels, take "
        "one of torchvision's vit models, or give the model embed(inputs) and "
        "from_embeddings(embeddings, inputs)"
    )


def _offers(model: nn.Module) -> bool:
    return all(callable(getattr(model, name, None)) for name in ("embed", "from_embeddings"))


class _Inside:
    """The embeddings of a network that is given normalised pixels."""

    def __init__(self, model: Normalized, network: Embedded) -> None:
        self._model, self._network = model, network

    def embed(self, inputs: Tensor) -> Tensor:
        return self._network.embed(self._model.normalize(inputs))

    def from_embeddings(self, embeddings: Tensor, inputs: Tensor) -> Tensor:
        return self._network.from_embeddings(embeddings, self._model.normalize(inputs))


class _Projected:
    """What the convolution gives that torchvision's vision transformers begin with.

    The rest of the model runs as always, so that its own embeddings give its own logits, bit by
    bit.
    """

    def __init__(self, model: nn.Module, projection: nn.Conv2d) -> None:
        self._model, self._projection = model, projection

    def embed(self, inputs: Tensor) -> Tensor:
        if isinstance(self._model, Normalized):
            inputs = self._model.normalize(inputs)
        made: Tensor = self._projection(inputs)
        return made.flatten(2).transpose(1, 2).contiguous()

    def from_embeddings(self, embeddings: Tensor, inputs: Tensor) -> Tensor:
        def instead(module: nn.Module, given: tuple[Tensor], made: Tensor) -> Tensor:
            return embeddings.transpose(1, 2).reshape(made.shape)

        handle = self._projection.register_forward_hook(instead)
        try:
            logits: Tensor = self._model(inputs)
        finally:
            handle.remove()
        return logits
