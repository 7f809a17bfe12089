"""Fixed-step solvers of ordinary differential equations on a given grid, and averages over sampled runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SOLVERS = ("euler", "heun")

# The slope of each part of a state at grid point k.
Field = Callable[[int, list[Tensor]], list[Tensor]]


def integrate(field: Field, state: Sequence[Tensor], grid: Sequence[float], solver: str) -> list[Tensor]:
    """The state at ``grid[-1]``, from the state at ``grid[0]``, of ``d state / d r = field``.

    ``field(k, state)`` is the slope at ``grid[k]``. Neither solver evaluates it between grid points:
    ``euler``: ``y + h f(k, y)``, of order 1; ``heun``: ``y + h/2 [f(k, y) + f(k+1, y + h f(k, y))]``, of order 2
    for twice the evaluations. A decreasing grid integrates backward.
    """
    state = list(state)
    for k in range(len(grid) - 1):
        h = grid[k + 1] - grid[k]
        slope = field(k, state)
        if solver == "heun":
            ahead = field(k + 1, _moved(state, slope, h))
            slope = [0.5 * (a + b) for a, b in zip(slope, ahead, strict=True)]
        state = _moved(state, slope, h)
    return state


def _moved(state: Sequence[Tensor], slope: Sequence[Tensor], h: float) -> list[Tensor]:
    return [y + h * f for y, f in zip(state, slope, strict=True)]


def mean_class(scores: Sequence[Tensor]) -> Tensor:
    """Log of the mean over runs of the class probabilities, (B, K): scores again, up to a row's constant."""
    if len(scores) == 1:
        return scores[0]
    return torch.logsumexp(torch.log_softmax(torch.stack(list(scores)), dim=-1), 0) - math.log(len(scores))
