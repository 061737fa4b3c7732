"""Precision of measurements on a GPU."""

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["full_float32"]


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Keep TF32 out of convolutions and matrix products inside (also usable as a decorator).

    torch allows TF32 in convolutions unless told otherwise. Its rounding changes logits by about
    1e-3 of their size: enough to flip images in an evaluation, and the ranks of layers in a long
    ascent. Training is free to use it.
    """
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
