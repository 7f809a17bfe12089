"""Fixed random feedback matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DISTRIBUTIONS = ("uniform", "normal")
INITS = ("kaiming", "xavier")


def random_matrix(shape: Sequence[int], distribution: str, std: float,
                  source: torch.Generator | None = None) -> Tensor:
    """Independent entries of mean 0 and standard deviation ``std``, uniform or normal.

    Drawn from ``source``, or from the global stream, which the platform seeds before a rule is set up.
    """
    if distribution == "uniform":
        return torch.empty(*shape).uniform_(-1.0, 1.0, generator=source).mul_(std * math.sqrt(3.0))
    return torch.randn(*shape, generator=source).mul_(std)


def initial_std(shape: Sequence[int], init: str) -> float:
    """Standard deviation of initial weights (outputs, inputs, *kernel), as BioTorch names them.

    ``kaiming``: ``1 / sqrt(3 fan_in)``, torch's default; ``xavier``: ``sqrt(2 / (fan_in + fan_out))``.
    """
    positions = math.prod(shape[2:])
    fan_in, fan_out = shape[1] * positions, shape[0] * positions
    return 1 / math.sqrt(3 * fan_in) if init == "kaiming" else math.sqrt(2 / (fan_in + fan_out))
