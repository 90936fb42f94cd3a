"""torch.compile for the layers of encoders on a GPU, where a run asks for it.

On a CPU it gains nothing over the forward that encoders have there (docs/performance.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from sparring.models.lean import encoders

logger = logging.getLogger("sparring")


def compile_layers(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile every layer of the encoders of BERT's kind in a model, in place, for inputs of any length.

    All layers share their code, which is made at the first forward of each kind (with and without gradients, padded or
    not) and takes its time there. Names of weights stay; a copy of the model is not compiled.

    Args:
        backend: of torch.compile.

    Returns: how many layers.
    """
    layers = [layer for encoder in encoders(model) for layer in encoder.layer]
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
    logger.info("%s: %d layers are compiled at their first use", type(model).__name__.lower(), len(layers))
    return len(layers)
