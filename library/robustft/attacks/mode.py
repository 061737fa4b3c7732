"""The state that a model is attacked in."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

__all__ = ["Model", "attack_mode"]

Model = Callable[[Tensor], Tensor]
"""``[n, ...]`` in [0, 1] -> logits ``[n, classes]``: usually a module, but any function will do."""


@contextlib.contextmanager
def attack_mode(model: Model) -> Iterator[None]:
    """Put ``model`` in eval mode with frozen parameters, and everything back afterwards.

    Inside, gradients are enabled even if the caller switched them off. Each submodule's
    ``training`` flag and each parameter's ``requires_grad`` flag gets its own old value back, also
    when the model raises. Frozen parameters keep no activations for their gradients, and their
    ``.grad`` stays untouched.

    Note:
        The flags are set directly, without calling ``train()`` or ``eval()``: a module may do
        more in those (merge weights, refuse a mode), and that could not be undone exactly.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        for module in modules:
            module.training = False
        for parameter in parameters:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
