"""Which entries of a parameter a sparse rule touches: masks that keep exactly the declared share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MASKS = ("random", "largest", "smallest")


def n_kept(n: int, density: float) -> int:
    """Entries of n that a density keeps: ``round(density n)``, at least one."""
    return max(1, round(density * n))


def mask_of(p: Tensor, density: float, how: str, uniform: Callable[[int], Tensor]) -> Tensor:
    """Which entries of p are kept, flat and boolean: exactly :func:`n_kept` of them.

    how: ``random``, or those of ``largest`` or ``smallest`` magnitude. ``uniform(n)`` gives n uniform random numbers.
    """
    flat = p.detach().flatten()
    score = uniform(flat.numel()).to(p.device) if how == "random" else flat.abs()
    kept = score.topk(n_kept(flat.numel(), density), largest=how != "smallest", sorted=False).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter(0, kept, True)
