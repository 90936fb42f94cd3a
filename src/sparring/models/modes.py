"""Evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sparring.models.lean import lean_encoders


@contextmanager
def evaluating(model: nn.Module, dtype: torch.dtype | None = None, *, fuse: bool = True) -> Iterator[None]:
    """Dropout off, no gradients, autocast to ``dtype`` (None: none); every submodule's own mode comes back.

    ``fuse``: see `lean_encoders`.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device.type
    model.eval()
    try:
        autocast = torch.autocast(device, dtype=dtype, enabled=dtype is not None)
        with torch.no_grad(), autocast, lean_encoders(model, fuse=fuse):
            yield
    finally:
        for module, training in modes:
            module.training = training
