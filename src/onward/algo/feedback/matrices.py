"""Fixed random feedback matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DISTRIBUTIONS = ("uniform", "normal")


def random_matrix(shape: Sequence[int], distribution: str, std: float) -> Tensor:
    """Independent entries of mean 0 and standard deviation ``std``, uniform or normal.

    Drawn from the global stream, which the platform seeds before a rule is set up.
    """
    if distribution == "uniform":
        return torch.empty(*shape).uniform_(-1.0, 1.0).mul_(std * math.sqrt(3.0))
    return torch.randn(*shape).mul_(std)
