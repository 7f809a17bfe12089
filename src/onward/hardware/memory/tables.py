"""Derivatives of activations as step functions of few steps: what a backward pass needs is then the step's number.

``f'(x) ~ levels[#{borders < x}]``: K levels, K - 1 borders, log2 K bits a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

#: Activations whose backward pass needs their input, which nothing else keeps. (What tanh and sigmoid keep is their
#: output, which the next layer keeps anyway: a table would add to that.)
SMOOTH: dict[str, Callable[..., Tensor]] = {
    "gelu": F.gelu, "silu": F.silu, "softplus": F.softplus, "mish": F.mish, "hardswish": F.hardswish, "elu": F.elu,
    "selu": F.selu, "celu": F.celu, "logsigmoid": F.logsigmoid, "softsign": F.softsign, "tanhshrink": F.tanhshrink,
}


class StepTable(NamedTuple):
    """A step function: K - 1 borders, ascending, and the K levels between them."""

    borders: tuple[float, ...]
    levels: tuple[float, ...]

    @property
    def bits(self) -> int:
        """Of the number of a step."""
        return max(1, math.ceil(math.log2(len(self.levels))))


@lru_cache(maxsize=64)
def best_table(name: str, bits: int, reach: float = 8.0, points: int = 1601) -> StepTable:
    """The step function of ``2^bits`` levels nearest to an activation's derivative.

    Least ``int (f'(x) - q(x))^2 dx`` over ``[-reach, reach]`` among all with borders on a grid, by dynamic programming:
    ``E_k(j) = min_i E_{k-1}(i) + c(i, j)``, c the error of the best single level on a stretch, which is
    ``(f(b) - f(a)) / (b - a)``. Source: Novikov et al. 2022, "Few-Bit Backward" (arXiv 2202.00441).
    """
    x, slope, f = _on_grid(name, reach, points)
    dx = x[1] - x[0]
    squares = np.concatenate([[0.0], np.cumsum((slope[1:] ** 2 + slope[1:] * slope[:-1] + slope[:-1] ** 2) / 3 * dx)])
    length = x[None, :] - x[:, None]
    rise = f[None, :] - f[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = squares[None, :] - squares[:, None] - rise**2 / length
    cost[length <= 0] = np.inf
    error, came = cost[0], []
    for _ in range(2**bits - 1):
        total = error[:, None] + cost
        came.append(total.argmin(0))
        error = np.take_along_axis(total, came[-1][None, :], 0)[0]
    cuts = [points - 1]
    for back in reversed(came):
        cuts.insert(0, int(back[cuts[0]]))
    cuts.insert(0, 0)
    levels = [(f[b] - f[a]) / (x[b] - x[a]) for a, b in zip(cuts, cuts[1:], strict=False)]
    return StepTable(tuple(float(x[c]) for c in cuts[1:-1]), tuple(map(float, levels)))


def table_error(name: str, table: StepTable, reach: float = 8.0) -> float:
    """``int (f'(x) - q(x))^2 dx`` over ``[-reach, reach]``, on a grid finer than any table's."""
    x, slope, _ = _on_grid(name, reach, 160_001)
    q = np.asarray(table.levels)[np.searchsorted(np.asarray(table.borders), x, side="left")]
    return float(((slope - q) ** 2).mean() * 2 * reach)


def _on_grid(name: str, reach: float, points: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # a table may be asked for first within a transform of functions, whose tensors numpy cannot read
    with torch._C._DisableFuncTorch(), torch.enable_grad():
        x = torch.linspace(-reach, reach, points, dtype=torch.float64, requires_grad=True)
        f = SMOOTH[name](x)
        (slope,) = torch.autograd.grad(f.sum(), x)
        return x.detach().numpy(), slope.numpy(), f.detach().numpy()


def approximation(a: tuple[float, ...], c: tuple[float, ...]) -> StepTable:
    """The derivative of ``sum_i a_i max(x - c_i, 0)``: with ``sum a = 1`` and ``sum a c = 0`` it is x for large x."""
    return StepTable(c, tuple(float(v) for v in np.concatenate([[0.0], np.cumsum(a)])))


#: Coefficients (a, c) of the sums of three ReLUs nearest to GELU and SiLU themselves (not to their derivatives).
#: Source: Yang et al. 2024, "Reducing Fine-Tuning Memory Overhead by Approximate and Memory-Sharing Backpropagation",
#: (arXiv 2406.16282; ReGELU2, ReSiLU2).
RELU_SUMS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "gelu": ((-0.049222611, 1.097963207, -0.048740595), (-3.185881004, -0.001178821, 3.190832613)),
    "silu": ((-0.040603572, 1.080925429, -0.040321857), (-6.305046100, -0.000868494, 6.325815242)),
}
