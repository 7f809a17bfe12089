"""Running statistics of normalisation, kept still while a batch is run many times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def held_statistics(model: nn.Module) -> Iterator[None]:
    """Batch normalisation reads the batch but leaves its running statistics: a batch is run many times."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    kept = [(m, m.momentum, m.num_batches_tracked.clone()) for m in norms]
    try:
        for m in norms:
            m.momentum = 0.0
        yield
    finally:
        for m, momentum, seen in kept:
            m.momentum = momentum
            m.num_batches_tracked.copy_(seen)
